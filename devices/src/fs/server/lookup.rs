//! From names to nodes: LOOKUP, FORGET, and the replies that tell the guest of a node.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2};
use rustix::io::Errno;

use super::inode::{Found, Node};
use super::mounts::Mounted;
use super::names;
use super::request::{Request, put};
use super::wire::{BatchForgetIn, EntryOut, ForgetIn, ForgetOne, ROOT_ID, opcode};
use super::{Server, attr};
use crate::virtio::queue::Buffers;

/// Room for a name with its NUL.
pub const NAME_ROOM: usize = 4096;

/// All that is ever asked of a file.
const MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// `statx` of the file behind a descriptor.
pub fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, MASK)
}

impl Server {
    pub(super) fn lookup(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        let (node, stat) = if request.header.nodeid == ROOT_ID {
            self.lookup_export(name)?
        } else {
            self.lookup_child(&self.nodes.get(request.header.nodeid)?, name)?
        };
        put(out, &self.entry(&node, &stat))
    }

    pub(super) fn forget(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        if request.header.opcode == opcode::FORGET {
            let forget: ForgetIn = request.read()?;
            self.nodes.forget(request.header.nodeid, forget.nlookup);
            return Ok(());
        }
        let batch: BatchForgetIn = request.read()?;
        for _ in 0..batch.count {
            let one: ForgetOne = request.read()?;
            self.nodes.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    /// The node of `name` in `parent`; counts one lookup.
    pub(super) fn lookup_child(&self, parent: &Arc<Node>, name: &CStr) -> Result<(Arc<Node>, Statx), Errno> {
        let found = self.find_child(parent, name)?;
        let stat = found.stat;
        Ok((self.nodes.intern(found)?, stat))
    }

    /// The file `name` in `parent`.
    pub(super) fn find_child(&self, parent: &Arc<Node>, name: &CStr) -> Result<Found, Errno> {
        if parent.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match self.mounted_on_original(parent, name) {
            Some(fd) => fd,
            None => openat2(parent, name, flags, Mode::empty(), resolve(parent))?,
        };
        let fd = self.budget.admit(fd)?;
        let stat = stat(&fd)?;
        if stat.stx_mnt_id == parent.key.mount {
            return Ok(found(parent, Arc::new(fd), stat, parent.mount.clone()));
        }
        match self.mounted(parent, name, &fd, &stat) {
            Some(mount) => Ok(found(parent, Arc::clone(mount.root()), self::stat(mount.root())?, Some(mount))),
            None => Ok(found(parent, Arc::new(fd), stat, None)),
        }
    }

    /// The node of a file that was made in `parent`; counts one lookup.
    pub(super) fn adopt(&self, parent: &Node, fd: OwnedFd) -> Result<(Arc<Node>, Statx), Errno> {
        let stat = stat(&fd)?;
        Ok((self.nodes.intern(found(parent, Arc::new(fd), stat, parent.mount.clone()))?, stat))
    }

    /// Tells the guest of `node`, as it is by `stat`.
    pub(super) fn entry(&self, node: &Node, stat: &Statx) -> EntryOut {
        node.tell(stat);
        let cache = node.export.options.cache;
        // An export can go at any time, and its name can come back for another.
        let name_cache = if node.is_export_root { std::time::Duration::ZERO } else { cache };
        EntryOut {
            nodeid: node.id,
            generation: 0,
            entry_valid: name_cache.as_secs(),
            entry_valid_nsec: name_cache.subsec_nanos(),
            attr_valid: cache.as_secs(),
            attr_valid_nsec: cache.subsec_nanos(),
            attr: attr::of(node, stat, self.session()),
        }
    }

    /// Looks `name` up in `parent` and tells the guest of it: the reply of all that makes names.
    pub(super) fn reply_entry(&self, parent: &Arc<Node>, name: &CStr, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let (node, stat) = self.lookup_child(parent, name)?;
        put(out, &self.entry(&node, &stat))
    }
}

fn found(parent: &Node, fd: Arc<OwnedFd>, stat: Statx, mount: Option<Arc<Mounted>>) -> Found {
    let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    let is_dir = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
    let is_submount = is_dir && (stat.stx_mnt_id, dev) != (parent.key.mount, parent.key.dev);
    Found { fd, stat, export: Arc::clone(&parent.export), is_export_root: false, is_submount, mount }
}

/// How a name in `parent` is resolved.
pub fn resolve(parent: &Node) -> ResolveFlags {
    let flags = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    if parent.export.options.cross_mounts { flags } else { flags | ResolveFlags::NO_XDEV }
}
