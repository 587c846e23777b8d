//! The state of a microVM as plain data, and a microVM from such data.
//!
//! The bytes are untrusted when they come from a file: every part checks its own on restore.

mod memory;
mod vcpu;
mod vm;

use std::io;

use katavm_devices::balloon::BalloonState;
use katavm_devices::block::BlockState;
use katavm_devices::fs::FsState;
use katavm_devices::legacy::{SerialError, SerialState};
use katavm_devices::mem::MemState;
use katavm_devices::net::NetState;
use katavm_devices::rng::RngState;
use katavm_devices::virtio::mmio::{MmioState, RestoreError};
use katavm_devices::vsock::VsockState;
use serde::{Deserialize, Serialize};

pub use memory::write;
pub use vcpu::VcpuState;
pub use vm::VmState;

use crate::ending::ExitReason;
use crate::kvm::KvmError;

/// Why a microVM cannot be saved, or made from what was saved.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It has ended.
    #[error("the virtual machine has ended: {0}")]
    Ended(ExitReason),
    /// It runs.
    #[error("the virtual machine must be paused first")]
    Running,
    /// KVM refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device refuses the state.
    #[error("device {0} does not fit its saved state: {1}")]
    Device(usize, RestoreError),
    /// The serial port refuses the state.
    #[error("the serial port does not fit its saved state: {0}")]
    Serial(#[from] SerialError),
    /// Size or number of something differs.
    #[error("the saved state has {what} {saved}, this machine {here}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// In the state.
        saved: usize,
        /// In the machine that is built.
        here: usize,
    },
    /// The memory file.
    #[error("guest memory cannot be written or read: {0}")]
    Memory(#[from] io::Error),
}

/// A device's own state, in the order in which the devices were added.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum DeviceState {
    /// The socket device.
    Vsock(VsockState),
    /// A shared file system.
    Fs(FsState),
    /// A disk.
    Block(BlockState),
    /// The entropy source.
    Rng(RngState),
    /// The memory balloon.
    Balloon(BalloonState),
    /// A network interface.
    Net(NetState),
    /// Memory that is plugged in.
    Mem(MemState),
}

/// Everything of a paused microVM but its RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct MicrovmState {
    /// Guest RAM in MiB, without what was plugged in.
    pub memory_mib: u32,
    /// All vCPUs by their index.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer and clock.
    pub vm: VmState,
    /// Transports, in the order in which the devices were added.
    pub transports: Vec<MmioState>,
    /// What the owner restores its devices from before it builds the machine.
    pub devices: Vec<DeviceState>,
    /// The serial port.
    pub serial: SerialState,
}

/// Compares a number in the state with the machine's.
pub(crate) fn same(what: &'static str, saved: usize, here: usize) -> Result<(), SnapshotError> {
    if saved == here { Ok(()) } else { Err(SnapshotError::Mismatch { what, saved, here }) }
}
