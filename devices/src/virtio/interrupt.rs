//! How a device gets the driver's attention.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use log::error;
use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit 0: a used buffer (virtio 1.3, 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration changed, or the device needs a reset.
pub const CONFIG_CHANGE: u32 = 2;

/// The interrupt line of one device together with its `InterruptStatus` register. Clones share both.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    needs_reset: Arc<AtomicBool>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that is delivered by writing to `line`, which the VMM has given to KVM as an irqfd.
    #[must_use]
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), needs_reset: Arc::default(), line: Arc::new(line) }
    }

    /// The eventfd of the line.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that buffers were used.
    pub fn signal_used(&self) {
        self.signal(USED_BUFFER);
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.signal(CONFIG_CHANGE);
    }

    /// Puts the device into `DEVICE_NEEDS_RESET` (virtio 1.3, 2.1.2) and says so to the driver.
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal(CONFIG_CHANGE);
    }

    /// Whether the device failed since the last [`clear`](Self::clear).
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The value of the `InterruptStatus` register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The driver's write to `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Sets status and failure as they were saved; signals nothing.
    pub fn restore(&self, status: u32, needs_reset: bool) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Back to the state after reset.
    pub fn clear(&self) {
        self.restore(0, false);
    }

    /// Raises the line again where the driver has not acknowledged yet: an edge may have been lost with the old VM.
    pub fn resend(&self) {
        if self.status() != 0 {
            self.signal(0);
        }
    }

    fn signal(&self, bit: u32) {
        // The status bit first: a driver that shares the line reads it as soon as the line is raised.
        self.status.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.line.write(1) {
            error!("cannot raise an interrupt: {error}");
        }
    }
}
