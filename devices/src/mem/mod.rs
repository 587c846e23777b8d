//! virtio-mem, memory that is plugged in and taken out while the guest runs (virtio 1.3, 5.15).

mod blocks;
mod device;
mod layout;
mod progress;
mod region;

pub use blocks::Blocks;
pub use device::{Mem, MemState};
pub use progress::Progress;
pub use region::{Backing, MemError, SLOT};
