//! The devices of a machine, by their kinds.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katavm_devices::balloon::Balloon;
use katavm_devices::block::Block;
use katavm_devices::fs::Fs;
use katavm_devices::mem::Mem;
use katavm_devices::net::Net;
use katavm_devices::rng::Rng;
use katavm_devices::virtio::Worker;
use katavm_devices::virtio::mmio::SharedDevice;
use katavm_devices::vsock::Vsock;

use crate::snapshot::DeviceState;

/// The thread of all devices that are soon done with a request.
pub const QUICK: &str = "devices";
/// The thread of all disks that came to places which were empty when the machine was built.
pub const SLOTS: &str = "slots";

/// One virtio device.
#[derive(Clone)]
pub enum Device {
    Vsock(Arc<Mutex<Vsock>>),
    Fs(Arc<Mutex<Fs>>),
    Block(Arc<Mutex<Block>>),
    Net(Arc<Mutex<Net>>),
    Rng(Arc<Mutex<Rng>>),
    Balloon(Arc<Mutex<Balloon>>),
    Mem(Arc<Mutex<Mem>>),
}

impl Device {
    /// Memory that is plugged in, if it is that.
    pub fn mem(&self) -> Option<&Mutex<Mem>> {
        match self {
            Self::Mem(device) => Some(device),
            _ => None,
        }
    }

    /// As transport and event loop see it.
    pub fn shared(&self) -> SharedDevice {
        match self {
            Self::Vsock(device) => Arc::clone(device) as SharedDevice,
            Self::Fs(device) => Arc::clone(device) as SharedDevice,
            Self::Block(device) => Arc::clone(device) as SharedDevice,
            Self::Net(device) => Arc::clone(device) as SharedDevice,
            Self::Rng(device) => Arc::clone(device) as SharedDevice,
            Self::Balloon(device) => Arc::clone(device) as SharedDevice,
            Self::Mem(device) => Arc::clone(device) as SharedDevice,
        }
    }

    /// The name of its thread: another than [`QUICK`] if its requests block on the host's files or go through the
    /// host's network.
    pub fn thread(&self) -> &'static str {
        match self {
            Self::Fs(_) => "fs",
            Self::Block(device) if !lock(device).is_attached() => SLOTS,
            Self::Block(_) => "block",
            Self::Net(_) => "net",
            Self::Vsock(_) | Self::Rng(_) | Self::Balloon(_) | Self::Mem(_) => QUICK,
        }
    }

    /// What has to be served, each with the name of its thread: the device together with its first worker, and every
    /// other one.
    pub fn parts(&self) -> Vec<(String, Worker)> {
        let device = self.shared();
        let name = |number: usize| match number {
            0 => self.thread().to_owned(),
            _ => format!("{}-{number}", self.thread()),
        };
        let workers = lock(&device).workers();
        let workers = workers.into_iter().enumerate().map(|(number, worker)| (name(number), worker));
        std::iter::once((name(0), device as Worker)).chain(workers).collect()
    }

    /// The state for a snapshot; the event loops must be parked.
    pub fn save(&self) -> DeviceState {
        match self {
            Self::Vsock(device) => DeviceState::Vsock(lock(device).save()),
            Self::Fs(device) => DeviceState::Fs(lock(device).save()),
            Self::Block(device) => DeviceState::Block(lock(device).save()),
            Self::Net(device) => DeviceState::Net(lock(device).save()),
            Self::Rng(device) => DeviceState::Rng(lock(device).save()),
            Self::Balloon(device) => DeviceState::Balloon(lock(device).save()),
            Self::Mem(device) => DeviceState::Mem(lock(device).save()),
        }
    }
}

/// A device that another thread may have panicked with; its state is checked, not trusted.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
