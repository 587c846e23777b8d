//! The device's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

/// What a restored disk must have in common with the saved one: the guest's kernel knows it by heart.
///
/// Requests are served within one turn of the event loop, so none is ever under way in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Capacity in sectors of 512 bytes.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// The guest must not write.
    pub read_only: bool,
    /// The device's identification.
    pub serial: String,
}
