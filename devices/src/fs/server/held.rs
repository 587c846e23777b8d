//! Which files are held by descriptors, and how the others are opened again.
//!
//! A guest may know many more files than a process may have descriptors. Those that it has not used for a while are let go
//! of and opened again when it asks: by a file handle where the host's file system has such and the process may use them
//! (CAP_DAC_READ_SEARCH), else by name in the directory where the guest last saw them. Only what is surely the same file is taken.

use std::ffi::CStr;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use log::debug;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, openat, openat2, statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::handle::FileHandle;
use super::inode::{Key, Node};
use super::{Server, lookup};

/// How many files are let go of when descriptors run short for other ends.
const BATCH: usize = 64;
/// Directories that are opened again on the way to a file, at most.
const DEEPEST: usize = 4096;

/// A node while something is done with it: its file stays open.
#[derive(Clone, Debug)]
pub struct Held {
    node: Arc<Node>,
    fd: Arc<OwnedFd>,
}

impl Held {
    /// A node whose file is open.
    pub fn new(node: Arc<Node>, fd: Arc<OwnedFd>) -> Self {
        Self { node, fd }
    }

    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Deref for Held {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl AsFd for Held {
    /// The descriptor of the file; with O_PATH except, at the runtime's choice, for an export's root.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How a file is known again that is not open.
#[derive(Clone, Debug)]
pub struct Mark {
    handle: Option<FileHandle>,
    /// When it was made; together with its key (see [`Node::key`]) that makes it the same file.
    born: Option<(i64, u32)>,
}

impl Mark {
    /// Whether an open file is the one.
    pub fn is_of(&self, fd: &OwnedFd, stat: &rustix::fs::Statx) -> bool {
        match &self.handle {
            Some(handle) => FileHandle::of(fd).is_ok_and(|found| found == *handle),
            None => self.born.is_some() && born(stat) == self.born,
        }
    }
}

fn born(stat: &rustix::fs::Statx) -> Option<(i64, u32)> {
    let has = rustix::fs::StatxFlags::from_bits_retain(stat.stx_mask).contains(rustix::fs::StatxFlags::BTIME);
    has.then_some((stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec))
}

impl Server {
    /// The node `id`, its file open.
    ///
    /// # Errors
    /// EROFS for the root, which is no file of the host and takes no change; ESTALE for what is not there any more.
    pub(super) fn node(&self, id: u64) -> Result<Held, Errno> {
        self.hold(self.nodes.get(id)?)
    }

    /// Has a node's file open.
    ///
    /// # Errors
    /// ESTALE for what is not there any more.
    pub(super) fn hold(&self, node: Arc<Node>) -> Result<Held, Errno> {
        let fd = match node.open_fd() {
            Some(fd) => fd,
            None => self.open_marked(&node)?,
        };
        Ok(Held::new(node, fd))
    }

    /// Keeps a new descriptor unless the process comes too close to its limit.
    ///
    /// # Errors
    /// ENFILE.
    pub(super) fn admit(&self, fd: OwnedFd) -> Result<OwnedFd, Errno> {
        if self.budget.fits(&fd) {
            return Ok(fd);
        }
        self.let_go(BATCH);
        // Where one has been closed.
        let lower = rustix::io::fcntl_dupfd_cloexec(&fd, 0)?;
        if self.budget.fits(&lower) { Ok(lower) } else { Err(Errno::NFILE) }
    }

    /// Lets go of files until no more are open than may be.
    pub(super) fn make_room(&self) {
        let surplus = self.nodes.open_count().saturating_sub(self.budget.nodes());
        if surplus > 0 {
            self.let_go(surplus);
        }
    }

    /// Before a name goes: a file that goes with it stays as it is for who uses it in the guest, as on a host.
    pub(super) fn hold_named(&self, parent: &Held, name: &CStr) -> Option<Held> {
        if !self.nodes.is_any_closed() {
            return None;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(parent, name, flags, lookup::MASK).ok()?;
        let is_last = stat.stx_nlink < 2 || FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        let node = self.nodes.find(&Key::of(&parent.export, &stat)).filter(|_| is_last)?;
        self.hold(node).ok()
    }

    /// After a name was moved: the file has it from now on.
    pub(super) fn note_place(&self, parent: &Held, name: &CStr) {
        if !self.nodes.is_any_closed() {
            return;
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(parent, name, flags, lookup::MASK);
        if let Some(node) = stat.ok().and_then(|stat| self.nodes.find(&Key::of(&parent.export, &stat))) {
            node.set_place((parent.id, Arc::from(name)));
        }
    }

    fn let_go(&self, count: usize) {
        for _ in 0..count {
            let Some(node) = self.nodes.unused() else { return };
            if !self.close(&node) {
                self.nodes.opened(&node);
            }
        }
    }

    /// Closes a node's file; whether that can be made up for.
    fn close(&self, node: &Node) -> bool {
        let Some(fd) = node.open_fd() else { return true };
        // What has no name any more would be lost.
        let Some(stat) = lookup::stat(&fd).ok().filter(|stat| stat.stx_nlink > 0) else { return false };
        let handle = self.handles_of(node).and_then(|_| FileHandle::of(&fd).ok());
        let mark = Mark { handle, born: born(&stat).filter(|_| node.place().is_some()) };
        let is_known_again = mark.handle.is_some() || mark.born.is_some();
        // Not while a request has it: the same file would be open twice.
        is_known_again && node.close(mark, fd)
    }

    /// A descriptor by which file handles of a node's mount are opened. None where that does not work.
    fn handles_of<'n>(&self, node: &'n Node) -> Option<&'n OwnedFd> {
        let (root, door) = match &node.mount {
            Some(mounted) => (mounted.root(), mounted.door()),
            None => (&node.export.fd, &node.export.door),
        };
        let door = door.get_or_init(|| {
            let open = || {
                // One per mount, and on the way to letting go of others: not by `admit`.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let fd = openat(self.proc_fds()?, DecInt::from_fd(root), flags, Mode::empty())?;
                let mount = lookup::stat(&fd)?.stx_mnt_id;
                FileHandle::of(&fd)?.open(&fd)?;
                Ok((fd, mount))
            };
            let tried: Result<_, Errno> = open();
            tried.inspect_err(|error| debug!("files are opened again by their names, not by handles: {error}")).ok()
        });
        // Without a copy, mounts of the host are reached whose root is not at hand.
        door.as_ref().filter(|(_, mount)| *mount == node.key.mount).map(|(fd, _)| fd)
    }

    /// Opens a file again that was let go of.
    fn open_marked(&self, node: &Arc<Node>) -> Result<Arc<OwnedFd>, Errno> {
        let mut closed = vec![Arc::clone(node)];
        // Up to a directory that is open, and down again: a guest makes deep trees, so there is no recursion here.
        let mut fd = loop {
            let last = closed.last().ok_or(Errno::STALE)?;
            if let Some(fd) = last.open_fd() {
                closed.pop();
                break fd;
            }
            let mark = last.mark().ok_or(Errno::STALE)?;
            if let Some(handle) = &mark.handle {
                let fd = handle.open(self.handles_of(last).ok_or(Errno::STALE)?)?;
                let fd = self.keep_open(last, fd)?;
                closed.pop();
                break fd;
            }
            let (parent, _) = last.place().ok_or(Errno::STALE)?;
            if closed.len() >= DEEPEST {
                return Err(Errno::STALE);
            }
            closed.push(self.nodes.get(parent)?);
        };
        while let Some(node) = closed.pop() {
            let (mark, (_, name)) = node.mark().zip(node.place()).ok_or(Errno::STALE)?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened =
                openat2(&fd, &*name, flags, Mode::empty(), lookup::resolve(&node)).map_err(|_| Errno::STALE)?;
            let stat = lookup::stat(&opened)?;
            let is_it = Key::of(&node.export, &stat) == node.key && mark.is_of(&opened, &stat);
            fd = if is_it { self.keep_open(&node, opened)? } else { return Err(Errno::STALE) };
        }
        Ok(fd)
    }

    fn keep_open(&self, node: &Arc<Node>, fd: OwnedFd) -> Result<Arc<OwnedFd>, Errno> {
        let fd = node.open(Arc::new(self.admit(fd)?));
        self.nodes.opened(node);
        self.make_room();
        Ok(fd)
    }
}
