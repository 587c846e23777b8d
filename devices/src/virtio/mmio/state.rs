//! The transport's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

use crate::virtio::ActivateError;
use crate::virtio::queue::{QueueError, QueueState};

/// Why a saved transport cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No sequence of legal steps leads to this device status.
    #[error("the snapshot has the impossible device status {0:#x}")]
    Status(u32),
    /// The driver accepted features that this device does not offer, or not those it must.
    #[error("the snapshot's features {0:#x} do not fit the device")]
    Features(u64),
    /// Number, sizes or features of the queues are not the device's.
    #[error("the snapshot's queues are not those of this device")]
    Queues,
    /// A queue's registers are impossible or do not fit guest memory.
    #[error("a queue in the snapshot is unusable: {0}")]
    Queue(#[from] QueueError),
    /// The device did not come up.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

/// Registers and queues of one virtio-mmio device. Untrusted when it comes from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// Device status (virtio 1.3, 2.1), without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// The device failed and waits for a reset.
    pub needs_reset: bool,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`, `DriverFeaturesSel`, `QueueSel` and `SHMSel`.
    pub selectors: [u32; 4],
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// All queues, set up or not.
    pub queues: Vec<QueueState>,
}
