//! The device behind the transport.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::Disk;
use super::config::{BlockConfig, BlockError, BlockOptions, CacheMode, MAX_QUEUES};
use super::engine::{self, Engine};
use super::flight::Flight;
use super::layout::*;
use super::request::{Context, Taken, refuse};
use super::state::BlockState;
use crate::memory::GuestMemory;
use crate::rate::{self, Limiter, Limits, Timer};
use crate::virtio::queue::QueueSet;
use crate::virtio::{ActivateError, DeviceType, VirtioDevice};

/// Requests that one turn of the event loop takes from a queue, so that other devices get theirs.
const REQUESTS_PER_TURN: usize = 32;
/// The event loop's tags beside the queues' numbers.
const COMPLETIONS: u32 = MAX_QUEUES as u32;
const TIMER: u32 = COMPLETIONS + 1;

/// What a driver learns of a disk, and still believes when the disk is gone.
struct Shape {
    geometry: Geometry,
    read_only: bool,
    serial: [u8; ID_BYTES],
    cache: CacheMode,
}

/// What the requests in a queue wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// For a kick.
    Kick,
    /// For others to be finished.
    Room,
    /// For the timer, which rings when there are tokens.
    Tokens,
}

/// A disk that is there.
struct Drive {
    disk: Disk,
    engine: Box<dyn Engine>,
    limiter: Limiter,
}

/// The block device: with a disk, or a place for one.
pub struct Block {
    queues: QueueSet,
    shape: Shape,
    drive: Option<Drive>,
    config: [u8; CONFIG_BYTES],
    /// Features that the driver accepted.
    features: u64,
    /// Of the running driver's queues.
    memory: Option<Arc<GuestMemory>>,
    /// What each queue waits for.
    waiting: [Waits; MAX_QUEUES as usize],
    completions: EventFd,
    timer: Timer,
}

impl Block {
    /// A new device.
    ///
    /// # Errors
    /// When the file, the serial or the number of queues is not possible.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let mut block = Self::slot(config.options.queues)?;
        block.attach(config)?;
        Ok(block)
    }

    /// A place for a disk: drivers find no device there until one is attached.
    ///
    /// # Errors
    /// When the number of queues is not possible.
    pub fn slot(queues: u16) -> Result<Self, BlockError> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlockError::Queues(queues));
        }
        let geometry = Geometry { sectors: 0, logical: SECTOR as u32, physical: SECTOR as u32 };
        let shape = Shape { geometry, read_only: true, serial: [0; ID_BYTES], cache: CacheMode::Writeback };
        let mut block = Self {
            queues: QueueSet::new(&vec![QUEUE_SIZE; queues.into()])?,
            shape,
            drive: None,
            config: [0; CONFIG_BYTES],
            features: 0,
            memory: None,
            waiting: [Waits::Kick; MAX_QUEUES as usize],
            completions: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            timer: Timer::new()?,
        };
        block.describe();
        Ok(block)
    }

    /// Puts a disk into its place. The guest's driver is to be told to look there.
    ///
    /// # Errors
    /// When there is one, or the driver of the last one has not let go of it; when the disk is not possible.
    pub fn attach(&mut self, config: BlockConfig) -> Result<(), BlockError> {
        if self.drive.is_some() || self.queues.is_active() {
            return Err(BlockError::Taken);
        }
        let serial = serial(&config.serial).ok_or(BlockError::Serial(config.serial))?;
        let disk = Disk::new(config.file)?;
        let BlockOptions { cache, limits, engine, .. } = config.options;
        let engine = engine::open(engine, self.completions.as_raw_fd()).map_err(BlockError::Engine)?;
        self.shape = Shape { geometry: disk.geometry(), read_only: config.read_only, serial, cache };
        self.drive = Some(Drive { disk, engine, limiter: Limiter::new(limits, rate::now()) });
        self.describe();
        Ok(())
    }

    /// Takes the disk away, after what is under way was finished. A driver that still uses it gets errors.
    pub fn detach(&mut self) {
        self.settle();
        self.drive = None;
        // What waits for its turn is refused.
        self.queues.kick_all();
    }

    /// Whether there is a disk.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.drive.is_some()
    }

    /// Whether a driver uses what is there.
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.queues.is_active()
    }

    /// Whether another disk may come: there is none, and no driver still takes the last one to be there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.is_attached() && !self.is_driven()
    }

    /// How requests are carried out: `io_uring` or `blocking`.
    #[must_use]
    pub fn engine(&self) -> Option<&'static str> {
        self.drive.as_ref().map(|drive| drive.engine.name())
    }

    /// Looks how large the disk is now. With true, the driver must be told that the configuration has changed.
    ///
    /// # Errors
    /// That there is no disk, or of the host.
    pub fn resize(&mut self) -> Result<bool, BlockError> {
        let drive = self.drive.as_mut().ok_or(BlockError::Empty)?;
        let changed = drive.disk.measure()?;
        self.shape.geometry = drive.disk.geometry();
        let capacity = self.shape.geometry.sectors.to_le_bytes();
        self.config.iter_mut().zip(capacity).for_each(|(to, from)| *to = from);
        Ok(changed)
    }

    /// Sets other limits, from full buckets on.
    ///
    /// # Errors
    /// That there is no disk.
    pub fn set_limits(&mut self, limits: Limits) -> Result<(), BlockError> {
        self.drive.as_mut().ok_or(BlockError::Empty)?.limiter = Limiter::new(limits, rate::now());
        self.queues.kick_all();
        Ok(())
    }

    /// The state for a snapshot; the queues' is the transport's.
    #[must_use]
    pub fn save(&self) -> BlockState {
        let Shape { geometry, read_only, serial, .. } = &self.shape;
        let serial = serial.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte));
        BlockState {
            attached: self.drive.is_some(),
            sectors: geometry.sectors,
            logical_block: geometry.logical,
            read_only: *read_only,
            serial: serial.collect(),
            queues: self.queues.sizes().len() as u16,
            writeback: self.is_writeback(),
        }
    }

    /// A device as it was saved, on the same disk as before or a copy of it, which `config` opens: None if
    /// there was none. The saved serial and number of queues are the ones that count.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`BlockError::Changed`].
    pub fn restore(state: &BlockState, config: Option<BlockConfig>) -> Result<Self, BlockError> {
        let mut block = Self::slot(state.queues)?;
        let serial = serial(&state.serial).ok_or(BlockError::Serial(state.serial.clone()))?;
        match config {
            Some(config) => block.attach(BlockConfig { serial: state.serial.clone(), ..config })?,
            None => {
                let (sectors, logical) = (state.sectors, state.logical_block);
                let geometry = Geometry { sectors, logical, physical: logical };
                block.shape = Shape { geometry, read_only: state.read_only, serial, cache: CacheMode::Writeback };
                block.describe();
            }
        }
        block.set_writeback(state.writeback);
        if block.save() == *state {
            Ok(block)
        } else {
            Err(BlockError::Changed { saved: state.sectors, found: block.shape.geometry.sectors })
        }
    }

    /// Fills the configuration space in.
    fn describe(&mut self) {
        let queues = self.queues.sizes().len() as u16;
        self.config = config(&self.shape.geometry, queues, self.shape.cache == CacheMode::Writeback);
    }

    fn is_writeback(&self) -> bool {
        self.config.get(WRITEBACK) == Some(&1)
    }

    fn set_writeback(&mut self, writeback: bool) {
        if let Some(byte) = self.config.get_mut(WRITEBACK) {
            *byte = writeback.into();
        }
    }

    /// Takes what is available on queue `index`, as much as this turn has room for.
    fn take(&mut self, index: usize) {
        let Some(memory) = self.memory.clone() else { return };
        self.set_waiting(index, Waits::Kick);
        self.queues.disable_kicks(index);
        for _ in 0..REQUESTS_PER_TURN {
            if self.drive.as_ref().is_some_and(|drive| drive.engine.room() == 0) {
                return self.set_waiting(index, Waits::Room);
            }
            let Some(chain) = self.queues.pop(index) else {
                if self.queues.enable_kicks(index) { continue } else { return }
            };
            let head = chain.head();
            let Some(drive) = &mut self.drive else {
                self.queues.add_used(index, head, refuse(&chain, &memory));
                continue;
            };
            let context = Context {
                disk: &drive.disk,
                features: self.features,
                read_only: self.shape.read_only,
                writethrough: self.config.get(WRITEBACK) != Some(&1),
                serial: &self.shape.serial,
            };
            match context.take(index, chain, &memory) {
                Taken::Answered(written) => self.queues.add_used(index, head, written),
                Taken::Started(request) => match drive.limiter.take(request.len() as u64, rate::now()) {
                    Ok(()) => drive.engine.start(&drive.disk, Flight::new(*request)),
                    Err(wait) => {
                        self.queues.undo_pop(index);
                        if let Err(error) = self.timer.arm(wait) {
                            error!("cannot arm a disk's timer: {error}");
                        }
                        return self.set_waiting(index, Waits::Tokens);
                    }
                },
            }
        }
        self.queues.kick(index);
    }

    fn set_waiting(&mut self, index: usize, waits: Waits) {
        if let Some(waiting) = self.waiting.get_mut(index) {
            *waiting = waits;
        }
    }

    /// Gives finished requests back and tells the driver, of those as of the ones that were answered at once.
    fn give_back(&mut self) {
        if let Some(drive) = &mut self.drive {
            drive.engine.look(&drive.disk);
            if !self.queues.is_active() {
                // The driver broke the rules: its memory is not to be touched any more.
                drive.engine.settle(&drive.disk);
            }
            while let Some(flight) = drive.engine.finished() {
                let (request, moved, outcome) = flight.end();
                if !self.queues.is_active() {
                    continue;
                }
                if let Err(error) = &outcome {
                    self.queues.complain(&format_args!("a disk's {:?} failed on the host: {error}", request.work()));
                }
                let written = request.answer(moved, outcome);
                self.queues.add_used(request.queue(), request.head(), written);
            }
        }
        let room = self.drive.as_ref().is_none_or(|drive| drive.engine.room() > 0);
        for (index, waits) in (0..self.queues.sizes().len()).zip(self.waiting) {
            self.queues.notify(index);
            if waits == Waits::Room && room {
                self.queues.kick(index);
            }
        }
    }
}

/// The serial as GET_ID returns it: padded with zeroes.
fn serial(text: &str) -> Option<[u8; ID_BYTES]> {
    let mut bytes = [0; ID_BYTES];
    bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()).then_some(bytes)
}

impl VirtioDevice for Block {
    /// Without a disk a new driver finds nothing here; one that has the device already keeps it.
    fn device_type(&self) -> DeviceType {
        if self.is_attached() { DeviceType::Block } else { DeviceType::Placeholder }
    }

    fn features(&self) -> u64 {
        let always = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE;
        let queues = if self.queues.sizes().len() > 1 { F_MQ } else { 0 };
        always | queues | if self.shape.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queues(&self) -> &QueueSet {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let ([writeback @ (0 | 1)], WRITEBACK) = (data, offset) else { return };
        // A driver without flushes cannot make anything durable later (5.2.5.2).
        if self.features & F_CONFIG_WCE == 0 || self.features & F_FLUSH == 0 {
            return;
        }
        // From now on what is done is durable, and that goes for what was done before as well.
        if *writeback == 0
            && self.is_writeback()
            && let Some(Err(error)) = self.drive.as_ref().map(|drive| drive.disk.sync())
        {
            self.queues.complain(&format_args!("a disk's cache cannot be flushed: {error}"));
        }
        self.set_writeback(*writeback == 1);
    }

    fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        self.features = features;
        self.memory = self.queues.memory().map(Arc::new);
        if features & F_FLUSH == 0 {
            self.set_writeback(false);
        } else if features & F_CONFIG_WCE == 0 {
            self.set_writeback(true);
        }
        Ok(())
    }

    fn reset(&mut self) {
        // The queues are inactive: what is under way is finished and forgotten.
        self.give_back();
        self.features = 0;
        self.memory = None;
        self.waiting = [Waits::Kick; MAX_QUEUES as usize];
        self.set_writeback(self.shape.cache == CacheMode::Writeback);
    }

    fn settle(&mut self) {
        if let Some(drive) = &mut self.drive {
            drive.engine.settle(&drive.disk);
        }
        self.give_back();
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        let others = [
            Events::with_data(&self.completions, COMPLETIONS, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
        ];
        for events in others {
            if let Err(error) = ops.add(events) {
                error!("cannot watch a disk's completions or timer: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            COMPLETIONS => drop(self.completions.read()),
            TIMER => {
                if self.timer.has_rung() {
                    let queues = (0..self.queues.sizes().len()).zip(self.waiting);
                    queues.filter(|(_, waits)| *waits == Waits::Tokens).for_each(|(index, _)| self.take(index));
                }
            }
            queue => {
                if self.queues.take_kick(queue as usize) {
                    self.take(queue as usize);
                }
            }
        }
        self.give_back();
    }
}
