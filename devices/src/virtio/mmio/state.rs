//! The transport's state as it goes into a snapshot.

use serde::{Deserialize, Serialize};

use crate::virtio::queue::QueueState;

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
