//! What all virtio devices share: queues, interrupts, the device trait and the MMIO transport (virtio 1.3, 2 and 4.2).

mod device;
mod interrupt;
pub mod mmio;
pub mod queue;

pub use device::{ActivateError, DeviceType, ReadyQueues, SharedMemory, VirtioDevice, Worker};
pub use interrupt::Interrupt;
