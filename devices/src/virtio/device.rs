//! The contract between a virtio device and its transport.

use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};

use super::queue::{QueueError, QueueSet};

/// Device types (virtio 1.3, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
pub enum DeviceType {
    /// No device for now: the driver leaves its place alone, and looks again when it is told to (4.2.2, `DeviceID`).
    Placeholder = 0,
    /// Network device.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Socket device.
    Vsock = 19,
    /// File system device.
    Fs = 26,
}

/// A shared-memory region that a device offers (virtio 1.3, 2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// Guest-physical address of its first byte.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Why a device did not come up at DRIVER_OK.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver's queues cannot be used.
    #[error("a queue is unusable: {0}")]
    Queue(#[from] QueueError),
    /// The device's own resource on the host failed.
    #[error("the host side of the device failed: {0}")]
    Host(#[from] std::io::Error),
}

/// A virtio device behind a transport.
///
/// The event loop calls it as a [`MutEventSubscriber`] for kicks and its own file descriptors; the
/// transport calls the methods here from vCPU threads. Both hold it in one `Arc<Mutex<_>>`.
/// The transport owns negotiation and validation; a device starts to use its [`QueueSet`] once that
/// is active, and stops when it is not.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// The `DeviceID` register.
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits (0 to 23 and 50 on); the transport adds the reserved ones.
    fn features(&self) -> u64;

    /// The queues.
    fn queues(&self) -> &QueueSet;

    /// The queues.
    fn queues_mut(&mut self) -> &mut QueueSet;

    /// The configuration space as it is now. The transport checks bounds.
    fn config(&self) -> &[u8];

    /// The driver writes to the configuration space, within the bounds of [`config`](Self::config).
    /// The default ignores it, for devices with read-only fields.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The shared-memory region `id`, if the device has it.
    fn shared_memory(&self, _id: u8) -> Option<SharedMemory> {
        None
    }

    /// The driver set DRIVER_OK: the queues are active now, with these negotiated features.
    /// Also called on restore.
    ///
    /// # Errors
    /// When the device cannot work; it is then put into `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, _features: u64) -> Result<(), ActivateError> {
        Ok(())
    }

    /// The driver resets the device: forget all requests. The queues are already inactive.
    fn reset(&mut self) {}

    /// The machine stands still, and so does the event loop: requests that are under way are to be finished and given
    /// back now, so that neither memory nor queues change after this. The default is for devices that have none.
    fn settle(&mut self) {}
}
