//! The contract between a virtio device and its transport.

use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use serde::{Deserialize, Serialize};

use super::Interrupt;
use super::queue::{QueueError, QueueSet, QueueState, VirtQueue};
use crate::memory::GuestMemory;

/// What a thread's event loop serves: a device, or a part of one that may have a thread to itself.
pub type Worker = Arc<Mutex<dyn MutEventSubscriber + Send>>;

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
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory that is plugged in and taken out.
    Mem = 24,
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

/// Queues that a driver has set up, all of them checked, with what they work on.
pub struct ReadyQueues {
    /// All queues of the device, by their numbers.
    pub queues: Vec<VirtQueue>,
    /// The memory that they are in.
    pub memory: GuestMemory,
    /// The device's interrupt.
    pub interrupt: Interrupt,
}

impl ReadyQueues {
    /// These ones of them, for a part of the device.
    pub(crate) fn part(&self, queues: Vec<VirtQueue>) -> Self {
        Self { queues, memory: self.memory.clone(), interrupt: self.interrupt.clone() }
    }
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

    /// The queues. Those of a device that gives them to its [`workers`](Self::workers) are never active in here.
    fn queues(&self) -> &QueueSet;

    /// The queues.
    fn queues_mut(&mut self) -> &mut QueueSet;

    /// Whether queue `index` is served by the vCPU that kicks it, in [`kicked`](Self::kicked), before the guest goes on
    /// there: the VMM leaves such a queue without an ioeventfd. The event loop serves it all the same when it is told to, as
    /// after a restore. The default is the event loop for all.
    fn served_by_vcpu(&self, _index: usize) -> bool {
        false
    }

    /// The driver kicks queue `index`, and the kick came as a write to the transport. The default wakes the event loop.
    fn kicked(&mut self, index: usize) {
        self.queues().kick(index);
    }

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

    /// Parts of the device that can do their work beside each other, each on the event loop of another thread. They
    /// are the same for as long as the device is there, and no part takes the device's own lock.
    fn workers(&self) -> Vec<Worker> {
        Vec::new()
    }

    /// Hands the queues over at DRIVER_OK or on restore, and [activates](Self::activate) the device. Only a device with
    /// [`workers`](Self::workers) has its own way of it.
    ///
    /// # Errors
    /// Those of [`activate`](Self::activate); the queues are inactive then.
    fn start(&mut self, ready: ReadyQueues, features: u64) -> Result<(), ActivateError> {
        self.queues_mut().activate(ready);
        let started = self.activate(features);
        if started.is_err() {
            self.queues_mut().deactivate();
        }
        started
    }

    /// Takes the queues away and [resets](Self::reset) the device.
    fn stop(&mut self) {
        self.queues_mut().deactivate();
        self.reset();
    }

    /// The state of all queues, by their numbers; none while they are not active. The event loops must be parked.
    fn save_queues(&self) -> Option<Vec<QueueState>> {
        self.queues().save()
    }

    /// The machine stands still, and so does the event loop: requests that are under way are to be finished and given
    /// back now, so that neither memory nor queues change after this. The default is for devices that have none.
    fn settle(&mut self) {}
}
