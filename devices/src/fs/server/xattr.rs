//! Extended attributes.

use std::ffi::CStr;

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::path::DecInt;

use super::credentials::without_fsetid;
use super::held::Held;
use super::request::{Request, put, put_bytes};
use super::wire::{GetxattrIn, InitFlags, ROOT_ID, SETXATTR_ACL_KILL_SGID, SetxattrIn, SetxattrInExt};
use super::{Server, names};
use crate::virtio::queue::Buffers;

/// Longest value, and longest list of names, in bytes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const SIZE_MAX: usize = 64 << 10;
/// Room for a name with its NUL (`XATTR_NAME_MAX` is 255).
const NAME_ROOM: usize = 256;

/// Whether the guest may use an attribute of that name. Labels of the host's security modules and integrity
/// measurements are the host's; `trusted.*` the host gives only to a privileged process.
fn is_served(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default")
}

fn check(name: &CStr) -> Result<&CStr, Errno> {
    if name.count_bytes() >= NAME_ROOM {
        return Err(Errno::RANGE);
    }
    if is_served(name.to_bytes()) { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

/// By descriptor number, relative to the thread's working directory, `/proc/self/fd`: there are no
/// calls for O_PATH descriptors, and the link leads to the file itself, also when that is a symbolic link.
fn path(node: &Held) -> DecInt {
    DecInt::from_fd(node)
}

impl Server {
    pub(super) fn setxattr(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let set: SetxattrIn = request.read()?;
        let extended = self.session().is_some_and(|session| session.has(InitFlags::SETXATTR_EXT));
        let extension: SetxattrInExt = if extended { request.read()? } else { SetxattrInExt::default() };
        let node = self.node(request.header.nodeid)?;
        node.writable()?;
        let bytes = request.rest(NAME_ROOM + SIZE_MAX)?;
        let (name, value) = names::split_string(&bytes)?;
        if value.len() != set.size as usize {
            return Err(Errno::INVAL);
        }
        let name = match check(name) {
            Err(Errno::OPNOTSUPP) if node.export.options.drop_labels && name.to_bytes().starts_with(b"security.") => {
                return Ok(());
            }
            checked => checked?,
        };
        let act = || rustix::fs::setxattr(path(&node), name, value, XattrFlags::from_bits_retain(set.flags));
        if extension.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            without_fsetid(request.header.gid, act)
        } else {
            act()
        }
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let node = self.node(request.header.nodeid)?;
        node.writable()?;
        let bytes = request.rest(NAME_ROOM)?;
        rustix::fs::removexattr(path(&node), check(only(&bytes)?)?)
    }

    pub(super) fn getxattr(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let get: GetxattrIn = request.read()?;
        let node = self.with_attributes(request)?;
        let bytes = request.rest(NAME_ROOM)?;
        let name = check(only(&bytes)?)?;
        if get.size == 0 {
            let size = rustix::fs::getxattr_query(path(&node), name)?;
            return put_size(out, size);
        }
        let mut value = vec![0; SIZE_MAX.min(get.size as usize)];
        let len = rustix::fs::getxattr(path(&node), name, &mut value[..])?;
        put_bytes(out, value.get(..len).unwrap_or_default())
    }

    pub(super) fn listxattr(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let get: GetxattrIn = request.read()?;
        let node = match self.with_attributes(request) {
            Err(Errno::NODATA) => return if get.size == 0 { put_size(out, 0) } else { Ok(()) },
            node => node?,
        };
        // As a whole: what is not served is left out, of the size too.
        let mut list = vec![0; SIZE_MAX];
        let len = rustix::fs::listxattr(path(&node), &mut list[..])?;
        let names = list.get(..len).unwrap_or_default().split_inclusive(|byte| *byte == 0);
        let served = names.filter(|name| is_served(name.strip_suffix(b"\0").unwrap_or(name)));
        let list: Vec<u8> = served.flatten().copied().collect();
        match get.size as usize {
            0 => put_size(out, list.len()),
            size if size < list.len() => Err(Errno::RANGE),
            _ => put_bytes(out, &list),
        }
    }

    /// The node of the request; the root has no attributes. A guest takes "not supported" for a failure where it asks for
    /// an access control list.
    fn with_attributes(&self, request: &Request<'_>) -> Result<Held, Errno> {
        if request.header.nodeid == ROOT_ID { Err(Errno::NODATA) } else { self.node(request.header.nodeid) }
    }
}

fn only(bytes: &[u8]) -> Result<&CStr, Errno> {
    let (name, rest) = names::split_string(bytes)?;
    if rest.is_empty() { Ok(name) } else { Err(Errno::INVAL) }
}

fn put_size(out: &mut Buffers<'_>, size: usize) -> Result<(), Errno> {
    // At most SIZE_MAX.
    put(out, &GetxattrIn { size: size as u32, padding: 0 })
}
