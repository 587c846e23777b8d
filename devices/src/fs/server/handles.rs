//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::dir::DirStream;
use super::inode::Node;

/// One open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// What is open.
    pub node: Arc<Node>,
    /// The open file.
    pub file: OwnedFd,
    /// The flags it was opened with on the host.
    pub flags: u32,
    /// Where reading a directory stands.
    pub stream: Mutex<DirStream>,
}

impl Handle {
    /// A handle on `file`.
    pub fn new(node: Arc<Node>, file: OwnedFd, flags: u32) -> Self {
        Self { node, file, flags, stream: Mutex::default() }
    }

    /// Whether it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.flags & libc::O_ACCMODE.cast_unsigned() != libc::O_RDONLY.cast_unsigned()
    }
}

/// All handles.
#[derive(Default)]
pub struct Handles {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

impl Handles {
    /// Keeps a handle; gives its number, which is never given twice and never 0.
    ///
    /// # Errors
    /// ESTALE when the export was removed or the file system unmounted meanwhile.
    pub fn add(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = self.lock();
        // Under the lock, so that `drop_where` comes before this or after it.
        if handle.node.is_out_of_reach() {
            return Err(Errno::STALE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// Puts a handle back as it was saved.
    pub fn restore(&self, number: u64, handle: Handle) {
        let mut table = self.lock();
        table.last = table.last.max(number);
        table.open.insert(number, Arc::new(handle));
    }

    /// Finds a handle of the node `nodeid`.
    ///
    /// # Errors
    /// EBADF when there is none, or it belongs to another node.
    pub fn get(&self, number: u64, nodeid: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.lock().open.get(&number).cloned();
        handle.filter(|handle| handle.node.id == nodeid).ok_or(Errno::BADF)
    }

    /// Takes a handle of the node `nodeid` away.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn remove(&self, number: u64, nodeid: u64) -> Result<Arc<Handle>, Errno> {
        self.get(number, nodeid)?;
        self.lock().open.remove(&number).ok_or(Errno::BADF)
    }

    /// Closes all handles of some nodes.
    pub fn drop_where(&self, is_gone: impl Fn(&Node) -> bool) {
        let mut table = self.lock();
        let gone: Vec<_> = table.open.extract_if(|_, handle| is_gone(&handle.node)).collect();
        drop(table);
        drop(gone);
    }

    /// Closes all handles.
    pub fn clear(&self) {
        let old = std::mem::take(&mut self.lock().open);
        drop(old);
    }

    /// All handles, sorted by number, and the number that was given last.
    pub fn snapshot(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let table = self.lock();
        let mut all: Vec<_> = table.open.iter().map(|(number, handle)| (*number, Arc::clone(handle))).collect();
        all.sort_unstable_by_key(|(number, _)| *number);
        (all, table.last)
    }

    /// No handle gets a number up to `last`.
    pub fn reserve(&self, last: u64) {
        let mut table = self.lock();
        table.last = table.last.max(last);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
