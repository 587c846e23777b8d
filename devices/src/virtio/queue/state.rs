//! A queue's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

/// Everything the device side knows of a virtqueue. Untrusted when it comes from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The largest size that the device offers, in descriptors.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used entry to give.
    pub next_used: u16,
    /// VIRTIO_F_EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// The driver has set the queue up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the driver area.
    pub avail_ring: u64,
    /// Guest-physical address of the device area.
    pub used_ring: u64,
    /// Heads that were taken and not yet given back, in the order they were taken.
    pub in_flight: Vec<u16>,
}
