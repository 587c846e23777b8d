//! What is mounted on the host below an export is served through copies, so that the host can unmount it.
//!
//! A descriptor holds the mount by which its file was reached, and the host's `umount` calls such a mount busy. A private
//! copy that is attached to nothing (open_tree(2)) shows the same files and holds only the file system itself.
//! When the original goes, [`Server::refresh_mounts`] closes what the guest had of the copy.
//! Mount points are looked for in the original all the same: what is mounted there is in no copy.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use log::{debug, warn};
use rustix::fs::{Mode, OFlags, ResolveFlags, Statx, openat2};
use rustix::io::Errno;

use super::held::Held;
use super::inode::Node;
use super::{Server, lookup};

/// A mount of the process' mount namespace, as proc_pid_mountinfo(5) has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Its number, which may be another mount's once it is gone.
    pub id: u64,
    /// The number of the mount that it is mounted on.
    pub parent: u64,
    /// Device number of its file system: major and minor.
    pub device: (u32, u32),
    /// The directory of the file system that it shows.
    pub root: String,
}

/// What a share needs of the host for mounts below its exports. Both need privileges of the process.
pub trait HostMounts: Send + Sync {
    /// A copy of the mount that a descriptor is the root of, without what is mounted on it. It is attached to nothing and
    /// private: nothing that happens to the original happens to it.
    ///
    /// # Errors
    /// EPERM, most of all, for who may not mount. The share does without then: the host's mount is busy while the guest knows
    /// files of it.
    fn copy(&self, root: BorrowedFd<'_>) -> io::Result<OwnedFd>;

    /// All mounts that the serving thread can reach.
    ///
    /// # Errors
    /// Those of reading the list.
    fn list(&self) -> io::Result<Vec<MountEntry>>;
}

/// A mount below an export, in the guest's eyes.
#[derive(Debug)]
pub struct Mounted {
    original: MountEntry,
    /// Where it is mounted: a directory and the name in it.
    at: (Arc<Node>, CString),
    /// Root of the copy.
    root: Arc<OwnedFd>,
    door: OnceLock<Option<(OwnedFd, u64)>>,
    gone: AtomicBool,
}

impl Mounted {
    /// Whether the original is not mounted any more: nothing more of the copy may be opened.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Root of the copy.
    pub fn root(&self) -> &Arc<OwnedFd> {
        &self.root
    }

    /// See [`Export::door`](super::exports::Export::door).
    pub fn door(&self) -> &OnceLock<Option<(OwnedFd, u64)>> {
        &self.door
    }

    /// The directory that it is mounted in, and the name there.
    pub fn at(&self) -> (&Arc<Node>, &CStr) {
        (&self.at.0, &self.at.1)
    }

    fn close(&self) {
        self.gone.store(true, Ordering::Release);
    }
}

/// All copies.
#[derive(Default)]
pub struct Mounts {
    host: Option<Arc<dyn HostMounts>>,
    copies: Mutex<Copies>,
}

#[derive(Default)]
struct Copies {
    /// By export and number of the original.
    by_original: HashMap<(u64, u64), Arc<Mounted>>,
    /// Mounts that others are mounted on.
    parents: HashSet<u64>,
}

impl Mounts {
    /// None yet; they will be made by `host`.
    pub fn over(host: Arc<dyn HostMounts>) -> Self {
        Self { host: Some(host), copies: Mutex::default() }
    }

    /// The copy of the mount whose root is `fd` and which was met as `name` in `parent`. None when it cannot be copied.
    fn of(&self, parent: &Held, name: &CStr, fd: &OwnedFd, stat: &Statx) -> Option<Arc<Mounted>> {
        let host = self.host.as_ref()?;
        let key = (parent.key.export, stat.stx_mnt_id);
        let mut copies = self.lock();
        if let Some(known) = copies.by_original.get(&key)
            // The number may be another mount's by now. Of the old one the file system lives while its copy does.
            && lookup::stat(&known.root).is_ok_and(|root| is_same_file(&root, stat))
        {
            return Some(Arc::clone(known));
        }
        let root =
            host.copy(fd.as_fd()).inspect_err(|error| debug!("a mount below an export is held: {error}")).ok()?;
        // After the copy was made and under the lock: what is not in this list is gone for good.
        let list = host.list().inspect_err(|error| warn!("cannot list mounts: {error}")).ok()?;
        copies.parents = list.iter().map(|mount| mount.parent).collect();
        let original = list.into_iter().find(|mount| mount.id == stat.stx_mnt_id)?;
        let at = (Arc::clone(parent.node()), name.to_owned());
        let (root, door, gone) = (Arc::new(root), OnceLock::new(), AtomicBool::new(false));
        let mounted = Arc::new(Mounted { original, at, root, door, gone });
        copies.by_original.insert(key, Arc::clone(&mounted));
        Some(mounted)
    }

    /// Compares the copies with what is mounted now; takes those out whose originals are gone, and gives them.
    fn refresh(&self) -> Vec<Arc<Mounted>> {
        let mut copies = self.lock();
        let Some(host) = self.host.as_ref().filter(|_| !copies.by_original.is_empty()) else { return Vec::new() };
        let list = match host.list() {
            Ok(list) => list,
            Err(error) => {
                warn!("cannot list mounts: {error}");
                return Vec::new();
            }
        };
        copies.parents = list.iter().map(|mount| mount.parent).collect();
        let list: HashMap<u64, MountEntry> = list.into_iter().map(|mount| (mount.id, mount)).collect();
        // One that was moved is the same still.
        let is_same = |mount: &MountEntry, now: &MountEntry| (mount.device, &mount.root) == (now.device, &now.root);
        let is_gone =
            |mounted: &Arc<Mounted>| !list.get(&mounted.original.id).is_some_and(|now| is_same(&mounted.original, now));
        let gone: Vec<_> = copies.by_original.extract_if(|_, mounted| is_gone(mounted)).map(|(_, gone)| gone).collect();
        gone.iter().for_each(|mounted| mounted.close());
        gone
    }

    /// Lets go of all copies of an export.
    pub fn drop_export(&self, export: u64) {
        let mut copies = self.lock();
        let gone: Vec<_> = copies.by_original.extract_if(|(of, _), _| *of == export).collect();
        drop(copies);
        drop(gone);
    }

    /// Lets go of all copies.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.lock());
        drop(old);
    }

    fn is_mounted_on(&self, mounted: &Mounted) -> bool {
        self.lock().parents.contains(&mounted.original.id)
    }

    fn lock(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_same_file(one: &Statx, other: &Statx) -> bool {
    let identity = |stat: &Statx| (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
    identity(one) == identity(other)
}

impl Server {
    /// Closes what the guest has of mounts that are not there any more. To be called whenever the mount table has changed.
    pub fn refresh_mounts(&self) {
        for gone in self.mounts.refresh() {
            let is_of = |node: &Node| node.mount.as_ref().is_some_and(|mount| Arc::ptr_eq(mount, &gone));
            self.handles.drop_where(is_of);
            self.nodes.drop_where(is_of);
        }
    }

    /// The copy through which the file is served that was found as `name` in `parent` on another mount than that.
    pub(super) fn mounted(&self, parent: &Held, name: &CStr, fd: &OwnedFd, stat: &Statx) -> Option<Arc<Mounted>> {
        self.mounts.of(parent, name, fd, stat)
    }

    /// What is mounted on the host at `name` in `parent`, a directory of a copy. None when nothing is.
    pub(super) fn mounted_on_original(&self, parent: &Held, name: &CStr) -> Option<OwnedFd> {
        let mounted = parent.mount.as_ref().filter(|mounted| self.mounts.is_mounted_on(mounted))?;
        let fd = open(&self.original(parent).ok()?, name, lookup::resolve(parent)).ok()?;
        let stat = lookup::stat(&fd).ok()?;
        (stat.stx_mnt_id != mounted.original.id).then_some(fd)
    }

    /// A descriptor by which a directory's mount points can be seen. It is to be closed soon.
    fn original(&self, node: &Held) -> Result<OwnedFd, Errno> {
        let Some(mounted) = &node.mount else { return rustix::io::fcntl_dupfd_cloexec(node, 0) };
        let (at, name) = mounted.at();
        let at = self.hold(Arc::clone(at))?;
        let root = open(&self.original(&at)?, name, lookup::resolve(&at))?;
        let path = self.path_of(node)?;
        // The kernel gives paths from the root of the copy.
        let path = CString::new(path.strip_prefix(b"/").unwrap_or(&path)).map_err(|_| Errno::INVAL)?;
        let stay = lookup::resolve(&at) | ResolveFlags::NO_XDEV;
        let fd = if path.is_empty() { root } else { open(&root, &path, stay)? };
        let stat = lookup::stat(&fd)?;
        let is_it = stat.stx_mnt_id == mounted.original.id && is_same_file(&stat, &lookup::stat(node)?);
        if is_it { Ok(fd) } else { Err(Errno::STALE) }
    }
}

fn open(directory: &OwnedFd, name: &CStr, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    openat2(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
}
