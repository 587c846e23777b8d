//! From names to nodes: LOOKUP, FORGET, and the replies that tell the guest of a node.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat2};
use rustix::io::Errno;

use super::held::Held;
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
pub const MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// `statx` of the file behind a descriptor.
pub fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, MASK)
}

impl Server {
    pub(super) fn lookup(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let name = request.rest(NAME_ROOM)?;
        let name = names::only(&name)?;
        if request.header.nodeid == ROOT_ID {
            let (node, stat) = self.lookup_export(name)?;
            return put(out, &self.entry(&node, &stat));
        }
        let parent = self.node(request.header.nodeid)?;
        let absent = parent.export.options.cache_absent;
        match self.lookup_child(&parent, name) {
            Ok((node, stat)) => put(out, &self.entry(&node, &stat)),
            // Node 0 is how FUSE says for how long there is none.
            Err(Errno::NOENT) if !absent.is_zero() => {
                let (entry_valid, entry_valid_nsec) = (absent.as_secs(), absent.subsec_nanos());
                put(out, &EntryOut { entry_valid, entry_valid_nsec, ..EntryOut::default() })
            }
            Err(error) => Err(error),
        }
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
    pub(super) fn lookup_child(&self, parent: &Held, name: &CStr) -> Result<(Held, Statx), Errno> {
        let found = self.find_child(parent, name)?;
        self.intern(found)
    }

    /// The file `name` in `parent`.
    pub(super) fn find_child(&self, parent: &Held, name: &CStr) -> Result<Found, Errno> {
        if parent.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        if !parent.shows(name) {
            return Err(Errno::NOENT);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match self.mounted_on_original(parent, name) {
            Some(fd) => fd,
            None => openat2(parent, name, flags, Mode::empty(), resolve(parent))?,
        };
        let fd = self.admit(fd)?;
        let stat = stat(&fd)?;
        if stat.stx_mnt_id == parent.key.mount {
            return Ok(found(parent, Some(name), Arc::new(fd), stat, parent.mount.clone()));
        }
        match self.mounted(parent, name, &fd, &stat) {
            Some(mount) => {
                Ok(found(parent, Some(name), Arc::clone(mount.root()), self::stat(mount.root())?, Some(mount)))
            }
            None => Ok(found(parent, Some(name), Arc::new(fd), stat, None)),
        }
    }

    /// The node of a file that was made in `parent`; counts one lookup.
    pub(super) fn adopt(&self, parent: &Node, name: Option<&CStr>, fd: OwnedFd) -> Result<(Held, Statx), Errno> {
        let stat = stat(&fd)?;
        self.intern(found(parent, name, Arc::new(fd), stat, parent.mount.clone()))
    }

    /// The node of a file; counts one lookup.
    pub(super) fn intern(&self, found: Found) -> Result<(Held, Statx), Errno> {
        let stat = found.stat;
        let node = self.nodes.intern(found)?;
        self.make_room();
        Ok((node, stat))
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
    pub(super) fn reply_entry(&self, parent: &Held, name: &CStr, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let (node, stat) = self.lookup_child(parent, name)?;
        put(out, &self.entry(&node, &stat))
    }
}

fn found(parent: &Node, name: Option<&CStr>, fd: Arc<OwnedFd>, stat: Statx, mount: Option<Arc<Mounted>>) -> Found {
    let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
    let place = name.map(|name| (parent.id, Arc::from(name)));
    let is_dir = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
    let is_submount = is_dir && (stat.stx_mnt_id, dev) != (parent.key.mount, parent.key.dev);
    Found { fd, stat, export: Arc::clone(&parent.export), is_export_root: false, is_submount, mount, place }
}

/// How a name in `parent` is resolved.
pub fn resolve(parent: &Node) -> ResolveFlags {
    let flags = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    if parent.export.options.cross_mounts { flags } else { flags | ResolveFlags::NO_XDEV }
}
