//! The nodes that the guest knows, each with the number of times it was told of it.
//!
//! What of them is held by descriptors is decided in `held.rs`; the table only keeps the account.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::exports::Export;
use super::held::{Held, Mark};
use super::mounts::Mounted;
use super::wire::ROOT_ID;

/// Nodes that a guest may have, forgotten ones apart. Each takes some 300 bytes here, and many times that in the guest.
const MAX_NODES: usize = 1 << 21;
/// How many files one search for an unused one passes over.
const MAX_PASSED: usize = 256;

/// What makes a file the same file, as long as it is open: the kernel does not give its inode number to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The export by which the guest reached it; the same file in two exports is two nodes with their own rules.
    pub export: u64,
    /// The mount by which it was reached, for the same reason.
    pub mount: u64,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

impl Key {
    /// The key of the file that `stat` describes.
    pub fn of(export: &Export, stat: &Statx) -> Self {
        let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        Self { export: export.id, mount: stat.stx_mnt_id, dev, ino: stat.stx_ino }
    }
}

/// What changes whenever the contents do; compared at OPEN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
}

impl Version {
    /// The version that `stat` describes.
    pub fn of(stat: &Statx) -> Self {
        Self {
            size: stat.stx_size,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        }
    }
}

/// A file of the host that the guest knows.
#[derive(Debug)]
pub struct Node {
    /// The node id, never given twice.
    pub id: u64,
    /// Which file it is.
    pub key: Key,
    /// Its type, which never changes.
    pub kind: FileType,
    /// The export by which the guest reached it.
    pub export: Arc<Export>,
    /// It is the export's own directory or file.
    pub is_export_root: bool,
    /// A directory on another file system than its parent: the guest mounts it apart, with a device number of its own.
    pub is_submount: bool,
    /// It is on what is mounted below the export, reached by a copy of that mount.
    pub mount: Option<Arc<Mounted>>,
    file: Mutex<File>,
    /// Where the guest saw it last: a directory's id and the name there.
    place: Mutex<Option<Place>>,
    /// Since it was last looked at for whether it can be let go of.
    used: AtomicBool,
    told: Mutex<Option<Version>>,
}

/// A directory's id and a name in it.
pub type Place = (u64, Arc<CStr>);

#[derive(Debug)]
enum File {
    Open(Arc<OwnedFd>),
    Closed(Mark),
}

impl Node {
    /// A node of the server's own, which no guest knows.
    pub fn unlisted(found: Found) -> Arc<Self> {
        Self::new(0, found)
    }

    fn new(id: u64, found: Found) -> Arc<Self> {
        Arc::new(Self {
            id,
            key: Key::of(&found.export, &found.stat),
            kind: found.kind(),
            export: found.export,
            is_export_root: found.is_export_root,
            is_submount: found.is_submount,
            mount: found.mount,
            file: Mutex::new(File::Open(found.fd)),
            place: Mutex::new(found.place),
            used: AtomicBool::new(true),
            told: Mutex::default(),
        })
    }

    /// Its descriptor, if it is open.
    pub fn open_fd(&self) -> Option<Arc<OwnedFd>> {
        match &*lock(&self.file) {
            File::Open(fd) => Some(Arc::clone(fd)),
            File::Closed(_) => None,
        }
    }

    /// How it is known again, if it is closed.
    pub fn mark(&self) -> Option<Mark> {
        match &*lock(&self.file) {
            File::Open(_) => None,
            File::Closed(mark) => Some(mark.clone()),
        }
    }

    /// It is open by `fd` from now on, unless it has been opened meanwhile; gives the descriptor that is kept.
    pub fn open(&self, fd: Arc<OwnedFd>) -> Arc<OwnedFd> {
        let mut file = lock(&self.file);
        if let File::Open(known) = &*file {
            return Arc::clone(known);
        }
        *file = File::Open(Arc::clone(&fd));
        fd
    }

    /// Lets go of its descriptor, which the caller has as well, unless somebody else has it too: false then.
    pub fn close(&self, mark: Mark, fd: Arc<OwnedFd>) -> bool {
        let mut file = lock(&self.file);
        // Under the lock, nobody can get another from here: one is in the node, one is the caller's.
        if Arc::strong_count(&fd) > 2 {
            return false;
        }
        let old = std::mem::replace(&mut *file, File::Closed(mark));
        drop(file);
        drop((old, fd));
        true
    }

    /// Where the guest saw it last.
    pub fn place(&self) -> Option<Place> {
        lock(&self.place).clone()
    }

    /// The guest has seen it in another place.
    pub fn set_place(&self, place: Place) {
        *lock(&self.place) = Some(place);
    }

    /// Whether its export was removed or its file system unmounted.
    pub fn is_out_of_reach(&self) -> bool {
        self.export.is_removed() || self.mount.as_ref().is_some_and(|mount| mount.is_gone())
    }

    /// Refuses what would change a read-only export, or the directory of one that shows some names of it only.
    ///
    /// # Errors
    /// EROFS.
    pub fn writable(&self) -> Result<(), Errno> {
        let is_fixed = self.is_export_root && !self.export.options.only.is_empty();
        if self.export.is_writable() && !is_fixed { Ok(()) } else { Err(Errno::ROFS) }
    }

    /// Whether the guest may know of the file `name` in this directory.
    pub fn shows(&self, name: &CStr) -> bool {
        let only = &self.export.options.only;
        !self.is_export_root || only.is_empty() || only.iter().any(|shown| shown.as_c_str() == name)
    }

    /// Remembers which version the guest has been told of; true when that is the one it was told of before.
    pub fn tell(&self, stat: &Statx) -> bool {
        let version = Some(Version::of(stat));
        std::mem::replace(&mut *lock(&self.told), version) == version
    }
}

/// A file on its way to become a [`Node`].
pub struct Found {
    /// Its descriptor.
    pub fd: Arc<OwnedFd>,
    /// What it is.
    pub stat: Statx,
    /// The export by which it was reached.
    pub export: Arc<Export>,
    /// See [`Node::is_export_root`].
    pub is_export_root: bool,
    /// See [`Node::is_submount`].
    pub is_submount: bool,
    /// See [`Node::mount`].
    pub mount: Option<Arc<Mounted>>,
    /// See [`Node::place`].
    pub place: Option<Place>,
}

impl Found {
    /// Its type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.stx_mode.into())
    }
}

struct Slot {
    lookups: u64,
    /// None once the file is out of reach, with its export: the guest still has to forget it.
    node: Option<Arc<Node>>,
    /// Where it is in [`Table::open`]; None when its file is not open, or is about to be closed.
    position: Option<usize>,
}

struct Table {
    slots: HashMap<u64, Slot>,
    by_key: HashMap<Key, u64>,
    /// Nodes whose files are open, in no order.
    open: Vec<u64>,
    /// Where in `open` the next search for an unused one begins.
    hand: usize,
    last_id: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self { slots: HashMap::new(), by_key: HashMap::new(), open: Vec::new(), hand: 0, last_id: ROOT_ID }
    }
}

/// All nodes but the root.
#[derive(Default)]
pub struct Nodes {
    table: Mutex<Table>,
}

/// A node as [`Nodes::snapshot`] lists it: its id, its lookup count, and itself unless it is out of reach.
pub type Listed = (u64, u64, Option<Arc<Node>>);

impl Nodes {
    /// The node of a file, new or known; counts one lookup.
    ///
    /// # Errors
    /// ESTALE when the export was removed or the file system unmounted meanwhile; ENFILE when the guest knows too many files.
    pub fn intern(&self, found: Found) -> Result<Held, Errno> {
        let key = Key::of(&found.export, &found.stat);
        let mut table = self.lock();
        // Under the lock, so that `drop_where` comes before this or after it.
        if found.export.is_removed() || found.mount.as_ref().is_some_and(|mount| mount.is_gone()) {
            return Err(Errno::STALE);
        }
        if let Some(node) = table.find(&key) {
            let is_it = node.mark().is_none_or(|mark| node.kind == found.kind() && mark.is_of(&found.fd, &found.stat));
            if is_it {
                let id = node.id;
                if let Some(slot) = table.slots.get_mut(&id) {
                    slot.lookups = slot.lookups.saturating_add(1);
                }
                if let Some(place) = found.place {
                    node.set_place(place);
                }
                node.used.store(true, Ordering::Relaxed);
                let fd = node.open(found.fd);
                table.set_open(id);
                return Ok(Held::new(node, fd));
            }
            // While it was closed, its inode number has become another file's.
            table.take(node.id);
        }
        if table.slots.len() >= MAX_NODES {
            return Err(Errno::NFILE);
        }
        table.last_id += 1;
        let (id, fd) = (table.last_id, Arc::clone(&found.fd));
        Ok(Held::new(table.insert(id, 1, found), fd))
    }

    /// The node of a file.
    pub fn find(&self, key: &Key) -> Option<Arc<Node>> {
        self.lock().find(key)
    }

    /// How many files are open.
    pub fn open_count(&self) -> usize {
        self.lock().open.len()
    }

    /// Whether there are nodes whose files are not open.
    pub fn is_any_closed(&self) -> bool {
        let table = self.lock();
        table.slots.len() > table.open.len()
    }

    /// A node that has not been used for a while. It counts as closed from now on, see [`opened`](Self::opened).
    pub fn unused(&self) -> Option<Arc<Node>> {
        let mut table = self.lock();
        for passed in 0..MAX_PASSED.min(table.open.len() * 2) {
            let hand = table.hand % table.open.len();
            table.hand = hand + 1;
            let id = *table.open.get(hand)?;
            let node = table.slots.get(&id).and_then(|slot| slot.node.clone())?;
            if !node.used.swap(false, Ordering::Relaxed) || passed + 1 == MAX_PASSED {
                table.set_closed(id);
                // What came into its place is next.
                table.hand = hand;
                return Some(node);
            }
        }
        None
    }

    /// A node's file is open again, or still.
    pub fn opened(&self, node: &Arc<Node>) {
        let mut table = self.lock();
        if table.slots.get(&node.id).is_some_and(|slot| slot.node.as_ref().is_some_and(|own| Arc::ptr_eq(own, node))) {
            // The next search passes over it.
            node.used.store(true, Ordering::Relaxed);
            table.set_open(node.id);
        }
    }

    /// Puts a node back as it was saved.
    pub fn restore(&self, id: u64, lookups: u64, found: Option<Found>) {
        let mut table = self.lock();
        table.last_id = table.last_id.max(id);
        match found {
            Some(found) => drop(table.insert(id, lookups, found)),
            None => drop(table.slots.insert(id, Slot { lookups, node: None, position: None })),
        }
    }

    /// Finds a node by its id, its file open or not.
    ///
    /// # Errors
    /// EROFS for the root, which is no file of the host and takes no change; ESTALE for what is not there any more.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if id == ROOT_ID {
            return Err(Errno::ROFS);
        }
        let node = self.lock().slots.get(&id).and_then(|slot| slot.node.clone()).ok_or(Errno::STALE)?;
        node.used.store(true, Ordering::Relaxed);
        Ok(node)
    }

    /// The guest forgets `count` lookups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.lock();
        let Some(slot) = table.slots.get_mut(&id) else { return };
        slot.lookups = slot.lookups.saturating_sub(count);
        if slot.lookups == 0 {
            let gone = table.take(id);
            table.slots.remove(&id);
            drop(table);
            // Here its descriptor is closed, which may take a while for a deleted file.
            drop(gone);
        }
    }

    /// Lets go of files that are out of reach; the guest still has to forget the nodes.
    pub fn drop_where(&self, is_gone: impl Fn(&Node) -> bool) {
        let mut table = self.lock();
        let found = table.slots.iter().filter(|(_, slot)| slot.node.as_ref().is_some_and(|node| is_gone(node)));
        let ids: Vec<u64> = found.map(|(id, _)| *id).collect();
        let gone: Vec<_> = ids.into_iter().map(|id| table.take(id)).collect();
        drop(table);
        drop(gone);
    }

    /// Forgets all nodes; their ids are not given again.
    pub fn clear(&self) {
        let mut table = self.lock();
        let last_id = table.last_id;
        let old = std::mem::replace(&mut *table, Table { last_id, ..Table::default() });
        drop(table);
        drop(old);
    }

    /// All nodes, sorted by id, and the id that was given last.
    pub fn snapshot(&self) -> (Vec<Listed>, u64) {
        let table = self.lock();
        let mut all: Vec<_> = table.slots.iter().map(|(id, slot)| (*id, slot.lookups, slot.node.clone())).collect();
        all.sort_unstable_by_key(|(id, ..)| *id);
        (all, table.last_id)
    }

    /// No node gets an id up to `last_id`.
    pub fn reserve_ids(&self, last_id: u64) {
        let mut table = self.lock();
        table.last_id = table.last_id.max(last_id);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    fn insert(&mut self, id: u64, lookups: u64, found: Found) -> Arc<Node> {
        let node = Node::new(id, found);
        self.by_key.insert(node.key, id);
        self.slots.insert(id, Slot { lookups, node: Some(Arc::clone(&node)), position: None });
        self.set_open(id);
        node
    }

    fn find(&self, key: &Key) -> Option<Arc<Node>> {
        self.slots.get(self.by_key.get(key)?)?.node.clone()
    }

    /// Takes a node out of its slot, which the guest still has to forget.
    fn take(&mut self, id: u64) -> Option<Arc<Node>> {
        self.set_closed(id);
        let node = self.slots.get_mut(&id)?.node.take()?;
        if self.by_key.get(&node.key) == Some(&id) {
            self.by_key.remove(&node.key);
        }
        Some(node)
    }

    fn set_open(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.position.is_none()) else { return };
        slot.position = Some(self.open.len());
        self.open.push(id);
    }

    fn set_closed(&mut self, id: u64) {
        let Some(position) = self.slots.get_mut(&id).and_then(|slot| slot.position.take()) else { return };
        self.open.swap_remove(position);
        let moved = self.open.get(position).and_then(|id| self.slots.get_mut(id));
        if let Some(slot) = moved {
            slot.position = Some(position);
        }
    }
}
