//! Virtqueues for devices: strict where the driver is hostile, on top of `virtio-queue`.

mod buffers;
mod chain;
mod set;
mod state;
mod virtqueue;

pub use buffers::Buffers;
pub use chain::{Chain, ChainError};
pub use set::QueueSet;
pub use state::QueueState;
pub use virtqueue::{QueueError, VirtQueue};
pub(crate) use virtqueue::{registers_of, restore_registers, save_registers};
