//! The virtio-mmio transport, version 2 (virtio 1.3, 4.2).

mod registers;
mod state;
mod status;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use virtio_queue::{Queue, QueueT};

pub use state::{MmioState, RestoreError};

use super::queue::{QueueError, VirtQueue};
use super::{Interrupt, ReadyQueues, VirtioDevice};
use crate::memory::GuestMemory;
use crate::virtio::queue::registers_of;
use registers as reg;
use status::Step;

/// Size of the register window, in bytes.
pub const WINDOW: u64 = 0x1000;

/// Offset of `QueueNotify`, where the VMM registers an ioeventfd for each queue that no vCPU serves.
pub const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

/// A device that transport and event loop share.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// One virtio device behind a window of MMIO registers.
pub struct MmioTransport {
    device: SharedDevice,
    memory: GuestMemory,
    interrupt: Interrupt,
    status: u32,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    shm_select: u32,
    config_generation: u32,
    /// The queues' registers until DRIVER_OK hands them to the device.
    queues: Vec<Queue>,
    /// The driver wrote a value to a queue register that no queue can have: the device must not start with another.
    queues_spoilt: bool,
}

/// A kick that came as a write. A VMM with several vCPUs [serves](Self::serve) it without the transport's lock: another one
/// may ask for the cause of an interrupt meanwhile.
#[must_use]
pub struct Kick {
    device: SharedDevice,
    queue: usize,
}

impl Kick {
    /// Has the device serve the queue, or its event loop, as the device likes.
    pub fn serve(self) {
        self.device.lock().unwrap_or_else(PoisonError::into_inner).kicked(self.queue);
    }
}

impl MmioTransport {
    /// A transport in the state after reset.
    ///
    /// # Errors
    /// When a queue size of the device is no power of two or too large.
    pub fn new(device: SharedDevice, memory: GuestMemory, interrupt: Interrupt) -> Result<Self, QueueError> {
        let sizes = lock(&device).queues().sizes().to_vec();
        let queues = sizes.into_iter().map(Queue::new).collect::<Result<_, _>>()?;
        Ok(Self {
            device,
            memory,
            interrupt,
            status: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            shm_select: 0,
            config_generation: 0,
            queues,
            queues_spoilt: false,
        })
    }

    /// The device behind this transport.
    #[must_use]
    pub fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// The device's interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// A read of the guest at `offset` into the window. What nothing answers to reads as all ones.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= reg::CONFIG {
            self.read_config(offset - reg::CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Registers are read by aligned 32-bit accesses only (4.2.2.2).
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    /// A write of the guest at `offset` into the window. What nothing answers to is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(kick) = self.kick(offset, data) {
            kick.serve();
        } else if offset >= reg::CONFIG {
            self.write_config(offset - reg::CONFIG, data);
        } else if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.set_register(offset, u32::from_le_bytes(bytes));
        }
    }

    /// The kick that a write at `offset` is. Most come by ioeventfd; these are of queues that vCPUs serve, or of a VMM that
    /// has no ioeventfds.
    pub fn kick(&self, offset: u64, data: &[u8]) -> Option<Kick> {
        let bytes = <[u8; 4]>::try_from(data).ok().filter(|_| offset == reg::QUEUE_NOTIFY)?;
        Some(Kick { device: self.device.clone(), queue: u32::from_le_bytes(bytes) as usize })
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC_VALUE => reg::MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => self.lock().device_type() as u32,
            reg::VENDOR_ID => reg::VENDOR,
            reg::DEVICE_FEATURES => half(self.offered(), self.features_select),
            reg::QUEUE_SIZE_MAX => self.selected().map_or(0, |queue| queue.max_size().into()),
            reg::QUEUE_READY => self.selected().is_some_and(QueueT::ready).into(),
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS => self.status(),
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => self.shm(offset),
            reg::CONFIG_GENERATION => self.config_generation,
            _ => u32::MAX,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.features_select = value,
            reg::DRIVER_FEATURES => self.accept_features(value),
            reg::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::QUEUE_SEL => self.queue_select = value,
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.set_status(value),
            reg::SHM_SEL => self.shm_select = value,
            reg::QUEUE_SIZE
            | reg::QUEUE_READY
            | reg::QUEUE_DESC_LOW
            | reg::QUEUE_DESC_HIGH
            | reg::QUEUE_DRIVER_LOW
            | reg::QUEUE_DRIVER_HIGH
            | reg::QUEUE_DEVICE_LOW
            | reg::QUEUE_DEVICE_HIGH => self.set_queue_register(offset, value),
            _ => debug!("write of {value:#x} to register {offset:#x} ignored"),
        }
    }

    /// The features on offer: the device's and the transport's own.
    fn offered(&self) -> u64 {
        self.lock().features() | reg::F_VERSION_1 | reg::F_EVENT_IDX | reg::F_INDIRECT_DESC
    }

    fn accept_features(&mut self, value: u32) {
        // Negotiation is open between DRIVER and FEATURES_OK only (3.1.1).
        if self.status != reg::ACKNOWLEDGE | reg::DRIVER {
            return debug!("features written outside negotiation are ignored");
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            // Nothing is offered above bit 63, so nothing can be accepted there.
            _ => {}
        }
    }

    fn set_queue_register(&mut self, offset: u64, value: u32) {
        // Frozen before FEATURES_OK and after DRIVER_OK: the device works on what was checked then.
        if self.status != reg::ACKNOWLEDGE | reg::DRIVER | reg::FEATURES_OK {
            return debug!("queue register {offset:#x} written outside set-up is ignored");
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        if !queue.ready() && !queue_register_fits(offset, value, queue.max_size()) {
            self.queues_spoilt = true;
            return debug!("{value:#x} is impossible for queue register {offset:#x}");
        }
        match offset {
            reg::QUEUE_READY => queue.set_ready(value & 1 == 1),
            _ if queue.ready() => debug!("queue register {offset:#x} written while the queue is ready is ignored"),
            reg::QUEUE_SIZE => queue.set_size(value as u16),
            reg::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            reg::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            reg::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            reg::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            reg::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            reg::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn status(&self) -> u32 {
        if self.interrupt.needs_reset() { self.status | reg::DEVICE_NEEDS_RESET } else { self.status }
    }

    fn set_status(&mut self, value: u32) {
        // Linux writes back what it read, with the device's own bit in it.
        match status::step(self.status, value & !reg::DEVICE_NEEDS_RESET) {
            Step::Reset => self.reset(),
            Step::Forward(value) => self.forward(value),
            Step::GiveUp => self.give_up(),
            Step::Refused => debug!("device status {:#x} -> {value:#x} is no legal step: ignored", self.status),
        }
    }

    fn forward(&mut self, value: u32) {
        let added = value & !self.status;
        if added & reg::FEATURES_OK != 0 && !self.features_fit(self.driver_features) {
            // FEATURES_OK stays clear, which is how the driver learns of it (3.1.1, step 6).
            return debug!("the driver accepted features {:#x} that do not fit the offer", self.driver_features);
        }
        self.status = value;
        if added & reg::DRIVER_OK != 0
            && let Err(error) = self.activate()
        {
            self.lock().queues_mut().complain(&format_args!("the device cannot start: {error}"));
            self.interrupt.fail();
        }
    }

    /// The driver says that it will not go on (3.1.1, FAILED): the device stops, its status stays to be read.
    fn give_up(&mut self) {
        self.lock().stop();
        self.status |= reg::FAILED;
    }

    fn features_fit(&self, accepted: u64) -> bool {
        accepted & !self.offered() == 0 && accepted & reg::F_VERSION_1 != 0
    }

    fn activate(&mut self) -> Result<(), super::ActivateError> {
        if self.queues_spoilt {
            return Err(QueueError::Config.into());
        }
        let event_idx = self.driver_features & reg::F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
            queues.push(VirtQueue::new(registers_of(queue)?, self.memory.clone())?);
        }
        self.hand_over(queues)
    }

    fn hand_over(&self, queues: Vec<VirtQueue>) -> Result<(), super::ActivateError> {
        let ready = ReadyQueues { queues, memory: self.memory.clone(), interrupt: self.interrupt.clone() };
        self.lock().start(ready, self.driver_features)
    }

    fn reset(&mut self) {
        self.lock().stop();
        self.interrupt.clear();
        self.queues.iter_mut().for_each(QueueT::reset);
        self.queues_spoilt = false;
        self.status = 0;
        self.driver_features = 0;
        self.features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.shm_select = 0;
    }

    fn shm(&self, offset: u64) -> u32 {
        let region = u8::try_from(self.shm_select).ok().and_then(|id| self.lock().shared_memory(id));
        // A region that is not there has length and base -1 (4.2.2).
        let (length, base) = region.map_or((u64::MAX, u64::MAX), |region| (region.length, region.address));
        match offset {
            reg::SHM_LEN_LOW => half(length, 0),
            reg::SHM_LEN_HIGH => half(length, 1),
            reg::SHM_BASE_LOW => half(base, 0),
            _ => half(base, 1),
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let device = self.lock();
        if let Some(range) = config_range(offset, data.len())
            && let Some(bytes) = device.config().get(range)
        {
            data.copy_from_slice(bytes);
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut device = self.lock();
        if let Some(range) = config_range(offset, data.len())
            && range.end <= device.config().len()
            && self.status & reg::DRIVER != 0
        {
            device.write_config(range.start, data);
        }
    }

    /// The device changed its configuration space: a driver in the middle of reading it will notice.
    pub fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        if self.status & reg::DRIVER_OK != 0 {
            self.interrupt.signal_config();
        }
    }

    /// The state for a snapshot, queues included. The event loops must be parked.
    #[must_use]
    pub fn save(&self) -> MmioState {
        let running = self.lock().save_queues();
        MmioState {
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            driver_features: self.driver_features,
            selectors: [self.features_select, self.driver_features_select, self.queue_select, self.shm_select],
            config_generation: self.config_generation,
            queues: running.unwrap_or_else(|| self.queues.iter().map(super::queue::save_registers).collect()),
        }
    }

    /// Takes over a saved state; the device's own state must have been restored before. The device
    /// looks at its queues again when its event loop runs.
    ///
    /// # Errors
    /// When the state does not fit this device or its memory; nothing is taken over then, unless the device itself failed.
    pub fn restore(&mut self, state: &MmioState) -> Result<(), RestoreError> {
        let runs = self.check(state)?;
        let running = state.queues.iter().filter(|_| runs);
        let running = running.map(|queue| VirtQueue::restore(queue, self.memory.clone())).collect::<Result<_, _>>()?;
        let registers = state.queues.iter().map(super::queue::restore_registers);
        self.queues = registers.collect::<Result<_, _>>()?;
        self.status = state.status;
        self.driver_features = state.driver_features;
        [self.features_select, self.driver_features_select, self.queue_select, self.shm_select] = state.selectors;
        self.config_generation = state.config_generation;
        self.interrupt.restore(state.interrupt_status, state.needs_reset);
        if runs {
            self.hand_over(running)?;
            self.lock().queues().kick_all();
        }
        Ok(())
    }

    /// Whether a saved state is one that this device could be in; if so, whether its driver uses it.
    fn check(&self, state: &MmioState) -> Result<bool, RestoreError> {
        if !status::is_legal(state.status) {
            return Err(RestoreError::Status(state.status));
        }
        let negotiated = state.status & reg::FEATURES_OK != 0;
        if negotiated && !self.features_fit(state.driver_features) {
            return Err(RestoreError::Features(state.driver_features));
        }
        let event_idx = state.driver_features & reg::F_EVENT_IDX != 0;
        let runs = state.status == status::RUNNING && !state.needs_reset;
        let fits = |(saved, queue): (&super::queue::QueueState, &Queue)| {
            saved.max_size == queue.max_size() && (!runs || saved.event_idx == event_idx)
        };
        if state.queues.len() != self.queues.len() || !state.queues.iter().zip(&self.queues).all(fits) {
            return Err(RestoreError::Queues);
        }
        Ok(runs)
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    fn lock(&self) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
        lock(&self.device)
    }
}

/// The device behind the mutex, also when a thread panicked while it held it: its state is checked, not trusted.
fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bits 0 to 31 or 32 to 63 of `value` by a selector register.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Whether a queue can have `value` in the register at `offset`: sizes and alignments of virtio 1.3, 2.7.
fn queue_register_fits(offset: u64, value: u32, max_size: u16) -> bool {
    match offset {
        reg::QUEUE_SIZE => value.is_power_of_two() && value <= u32::from(max_size),
        reg::QUEUE_DESC_LOW => value.is_multiple_of(16),
        reg::QUEUE_DRIVER_LOW => value.is_multiple_of(2),
        reg::QUEUE_DEVICE_LOW => value.is_multiple_of(4),
        _ => true,
    }
}

fn config_range(offset: u64, len: usize) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok()?;
    Some(start..start.checked_add(len)?)
}
