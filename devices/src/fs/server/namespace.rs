//! Making, moving and removing names.

use std::ffi::CStr;

use rustix::fs::{AtFlags, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, renameat_with, symlinkat, unlinkat};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::credentials::{Caller, as_caller};
use super::held::Held;
use super::inode::Node;
use super::lookup::NAME_ROOM;
use super::request::{Request, put_bytes};
use super::wire::{InitFlags, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn};
use super::{Server, attr, names};
use crate::virtio::queue::Buffers;

impl Server {
    /// The directory `nodeid`, in which something is to change.
    pub(super) fn directory_to_change(&self, nodeid: u64) -> Result<Held, Errno> {
        let node = self.node(nodeid)?;
        node.writable()?;
        if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// Who sent `request`.
    pub(super) fn caller(&self, request: &mut Request<'_>, umask: u32) -> Result<Caller, Errno> {
        let with_groups = self.session().is_some_and(|session| session.has(InitFlags::CREATE_SUPP_GROUP));
        let groups = if with_groups { request.groups()? } else { Vec::new() };
        let (uid, gid) = (request.header.uid, request.header.gid);
        // -1 is how the guest writes an id that does not exist in its own name space.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        Ok(Caller { uid, gid, groups, umask })
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let mkdir: MkdirIn = request.read()?;
        let caller = self.caller(request, mkdir.umask)?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        as_caller(&caller, || mkdirat(&parent, name, Mode::from_bits_retain(mkdir.mode & 0o7777)))?;
        self.reply_entry(&parent, name, out)
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let mknod: MknodIn = request.read()?;
        let caller = self.caller(request, mknod.umask)?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        let kind = FileType::from_raw_mode(mknod.mode);
        if matches!(kind, FileType::Directory | FileType::Symlink | FileType::Unknown) {
            return Err(Errno::INVAL);
        }
        let mode = Mode::from_bits_retain(mknod.mode & 0o7777);
        as_caller(&caller, || mknodat(&parent, name, kind, mode, attr::decode_device(mknod.rdev)))?;
        self.reply_entry(&parent, name, out)
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let caller = self.caller(request, 0)?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        let strings = request.rest(NAME_ROOM + names::PATH_MAX)?;
        let (name, rest) = names::split_string(&strings)?;
        let name = names::check(name)?;
        let (target, rest) = names::split_string(rest)?;
        if !rest.is_empty() {
            return Err(Errno::INVAL);
        }
        if target.count_bytes() >= names::PATH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        as_caller(&caller, || symlinkat(target, &parent, name))?;
        self.reply_entry(&parent, name, out)
    }

    pub(super) fn readlink(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let node = self.node(request.header.nodeid)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&node, c"", Vec::new())?;
        put_bytes(out, target.as_bytes())
    }

    pub(super) fn link(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let link: LinkIn = request.read()?;
        let parent = self.directory_to_change(request.header.nodeid)?;
        let old = self.node(link.oldnodeid)?;
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        same_export(&old, &parent)?;
        if old.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        // By way of /proc: AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH.
        linkat(self.proc_fds()?, DecInt::from_fd(&old), &parent, name, AtFlags::SYMLINK_FOLLOW)?;
        self.reply_entry(&parent, name, out)
    }

    pub(super) fn unlink(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        self.remove(request, AtFlags::empty())
    }

    pub(super) fn rmdir(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        self.remove(request, AtFlags::REMOVEDIR)
    }

    fn remove(&self, request: &mut Request<'_>, flags: AtFlags) -> Result<(), Errno> {
        let parent = self.directory_to_change(request.header.nodeid)?;
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        let _goes = self.hold_named(&parent, name);
        unlinkat(&parent, name, flags)
    }

    pub(super) fn rename(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let rename: RenameIn = request.read()?;
        self.move_name(request, rename.newdir, 0)
    }

    pub(super) fn rename2(&self, request: &mut Request<'_>, _out: &mut Buffers<'_>) -> Result<(), Errno> {
        let rename: Rename2In = request.read()?;
        self.move_name(request, rename.newdir, rename.flags)
    }

    fn move_name(&self, request: &mut Request<'_>, newdir: u64, flags: u32) -> Result<(), Errno> {
        let from = self.directory_to_change(request.header.nodeid)?;
        let to = self.directory_to_change(newdir)?;
        let both = request.rest(2 * NAME_ROOM)?;
        let (old, new): (&CStr, &CStr) = names::two(&both)?;
        same_export(&from, &to)?;
        let _goes = self.hold_named(&to, new);
        let flags = RenameFlags::from_bits_retain(flags);
        renameat_with(&from, old, &to, new, flags)?;
        self.note_place(&to, new);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_place(&from, old);
        }
        Ok(())
    }
}

/// Exports are file systems of their own to the guest, also when they are on one at the host.
fn same_export(one: &Node, other: &Node) -> Result<(), Errno> {
    if one.key.export == other.key.export { Ok(()) } else { Err(Errno::XDEV) }
}
