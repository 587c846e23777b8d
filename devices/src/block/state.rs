//! The device's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

/// What a restored disk must have in common with the saved one, whose driver knows it by heart, and how that uses it.
///
/// Requests are finished before a snapshot is taken, so none is ever under way in one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// There is a disk; without one, the rest tells of the last that was there.
    pub attached: bool,
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// The guest must not write.
    pub read_only: bool,
    /// The device's identification.
    pub serial: String,
    /// Request queues.
    pub queues: u16,
    /// Writes are durable only after a flush.
    pub writeback: bool,
}
