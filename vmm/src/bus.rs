//! Where the guest's port and memory-mapped accesses go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use katavm_devices::legacy::{ResetDevice, ResetRequest, Serial};
use katavm_devices::virtio::mmio::{MmioTransport, WINDOW};

use crate::console::Console;
use crate::layout::{MMIO_START, SERIAL_PORT};

/// All that answers to a guest's accesses.
pub struct Bus {
    transports: Vec<Arc<Mutex<MmioTransport>>>,
    serial: Mutex<Serial<Console>>,
    reset: ResetDevice,
}

impl Bus {
    pub fn new(transports: Vec<Arc<Mutex<MmioTransport>>>, serial: Serial<Console>) -> Self {
        Self { transports, serial: Mutex::new(serial), reset: ResetDevice }
    }

    /// The virtio-mmio devices in the order of their windows.
    pub fn transports(&self) -> &[Arc<Mutex<MmioTransport>>] {
        &self.transports
    }

    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, Serial<Console>> {
        lock(&self.serial)
    }

    /// A memory-mapped read; what nothing answers to reads as all ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((transport, offset)) => lock(transport).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A memory-mapped write.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        let Some((transport, offset)) = self.window(address) else { return };
        let mut transport = lock(transport);
        match transport.kick(offset, data) {
            None => transport.write(offset, data),
            Some(kick) => {
                drop(transport);
                kick.serve();
            }
        }
    }

    /// A port read; what nothing answers to reads as all ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = match port.wrapping_sub(SERIAL_PORT) {
                offset @ 0..8 => self.serial().read(offset as u8),
                _ => self.reset.read(port),
            };
        }
    }

    /// A port write; it may ask for the end of the machine.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<ResetRequest> {
        let [byte] = data else { return None };
        match port.wrapping_sub(SERIAL_PORT) {
            offset @ 0..8 => {
                self.serial().write(offset as u8, *byte);
                None
            }
            _ => self.reset.write(port, *byte),
        }
    }

    fn window(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let transport = self.transports.get(usize::try_from(offset / WINDOW).ok()?)?;
        Some((transport, offset % WINDOW))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
