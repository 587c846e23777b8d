//! The share's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

use super::server::Session;

/// Everything that the server knows of its guest. Untrusted when it comes from a snapshot.
///
/// Files are named by their paths beneath their exports, as they are at the time of saving.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// What was negotiated; None when no guest has the share mounted.
    #[serde(default)]
    pub session: Option<Session>,
    /// Exports, each with its id.
    #[serde(default)]
    pub exports: Vec<(u64, Vec<u8>)>,
    /// Nodes that the guest knows.
    #[serde(default)]
    pub nodes: Vec<NodeState>,
    /// Files that the guest has open.
    #[serde(default)]
    pub handles: Vec<HandleState>,
    /// The export id that was given last.
    #[serde(default)]
    pub last_export: u64,
    /// The node id that was given last.
    #[serde(default)]
    pub last_node: u64,
    /// The handle number that was given last.
    #[serde(default)]
    pub last_handle: u64,
}

/// A node of the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeState {
    /// Node id.
    pub id: u64,
    /// How many lookups the guest has to forget.
    pub lookups: u64,
    /// The file; None when it has no name any more, so that only the process that has it open can reach it.
    pub file: Option<FileState>,
}

/// Where a file is, and how to know it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// Id of its export.
    pub export: u64,
    /// Path beneath the export, without a slash in front; empty for the export itself.
    pub path: Vec<u8>,
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// It is on another file system than its parent.
    pub is_submount: bool,
}

/// An open file of the guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleState {
    /// Its number.
    pub fh: u64,
    /// Its node.
    pub node: u64,
    /// Flags to open it with.
    pub flags: u32,
}

impl FsState {
    /// How many nodes cannot be had back in another process: deleted files that the guest still has open or in its cache.
    #[must_use]
    pub fn unreachable(&self) -> usize {
        self.nodes.iter().filter(|node| node.file.is_none()).count()
    }
}
