//! The nodes that the guest knows, each with the number of times it was told of it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::exports::Export;
use super::mounts::Mounted;
use super::wire::ROOT_ID;

/// What makes a file the same file. An open descriptor of it keeps the kernel from giving its inode number to another.
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
    fd: Arc<OwnedFd>,
    told: Mutex<Option<Version>>,
}

impl AsFd for Node {
    /// The descriptor of the file; with O_PATH except, at the runtime's choice, for an export's root.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
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
            fd: found.fd,
            told: Mutex::default(),
        })
    }

    /// Whether its export was removed or its file system unmounted.
    pub fn is_out_of_reach(&self) -> bool {
        self.export.is_removed() || self.mount.as_ref().is_some_and(|mount| mount.is_gone())
    }

    /// Refuses what would change a read-only export.
    ///
    /// # Errors
    /// EROFS.
    pub fn writable(&self) -> Result<(), Errno> {
        if self.export.is_writable() { Ok(()) } else { Err(Errno::ROFS) }
    }

    /// Remembers which version the guest has been told of; true when that is the one it was told of before.
    pub fn tell(&self, stat: &Statx) -> bool {
        let version = Some(Version::of(stat));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *told, version) == version
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
}

struct Table {
    slots: HashMap<u64, Slot>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self { slots: HashMap::new(), by_key: HashMap::new(), last_id: ROOT_ID }
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
    /// ESTALE when the export was removed or the file system unmounted meanwhile.
    pub fn intern(&self, found: Found) -> Result<Arc<Node>, Errno> {
        let key = Key::of(&found.export, &found.stat);
        let mut table = self.lock();
        // Under the lock, so that `drop_where` comes before this or after it.
        if found.export.is_removed() || found.mount.as_ref().is_some_and(|mount| mount.is_gone()) {
            return Err(Errno::STALE);
        }
        let known = table.by_key.get(&key).copied();
        if let Some(slot) = known.and_then(|id| table.slots.get_mut(&id))
            && let Some(node) = &slot.node
        {
            slot.lookups = slot.lookups.saturating_add(1);
            return Ok(Arc::clone(node));
        }
        table.last_id += 1;
        let id = table.last_id;
        Ok(table.insert(id, 1, found))
    }

    /// Puts a node back as it was saved.
    pub fn restore(&self, id: u64, lookups: u64, found: Option<Found>) {
        let mut table = self.lock();
        table.last_id = table.last_id.max(id);
        match found {
            Some(found) => drop(table.insert(id, lookups, found)),
            None => drop(table.slots.insert(id, Slot { lookups, node: None })),
        }
    }

    /// Finds a node by its id.
    ///
    /// # Errors
    /// EROFS for the root, which is no file of the host and takes no change; ESTALE for what is not there any more.
    pub fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        if id == ROOT_ID {
            return Err(Errno::ROFS);
        }
        self.lock().slots.get(&id).and_then(|slot| slot.node.clone()).ok_or(Errno::STALE)
    }

    /// The guest forgets `count` lookups of a node.
    pub fn forget(&self, id: u64, count: u64) {
        let mut table = self.lock();
        let Some(slot) = table.slots.get_mut(&id) else { return };
        slot.lookups = slot.lookups.saturating_sub(count);
        if slot.lookups == 0 {
            let gone = table.slots.remove(&id).and_then(|slot| slot.node);
            if let Some(node) = &gone {
                table.by_key.remove(&node.key);
            }
            drop(table);
            // Here its descriptor is closed, which may take a while for a deleted file.
            drop(gone);
        }
    }

    /// Lets go of files that are out of reach; the guest still has to forget the nodes.
    pub fn drop_where(&self, is_gone: impl Fn(&Node) -> bool) {
        let mut table = self.lock();
        let held = table.slots.values_mut().filter(|slot| slot.node.as_ref().is_some_and(|node| is_gone(node)));
        let gone: Vec<_> = held.filter_map(|slot| slot.node.take()).collect();
        for node in &gone {
            table.by_key.remove(&node.key);
        }
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
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, id: u64, lookups: u64, found: Found) -> Arc<Node> {
        let node = Node::new(id, found);
        self.by_key.insert(node.key, id);
        self.slots.insert(id, Slot { lookups, node: Some(Arc::clone(&node)) });
        node
    }
}
