//! A scripted driver: real guest memory, the MMIO transport, the event loop, and rings written by hand.
//!
//! It does what it is told, right or wrong, and checks nothing on the way: the tests do.

#![allow(dead_code, reason = "each test target uses its part")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use katavm_devices::memory::GuestMemory;
use katavm_devices::virtio::mmio::{MmioState, MmioTransport, RestoreError};
use katavm_devices::virtio::{Interrupt, VirtioDevice, Worker};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const DEVICE_FEATURES: u64 = 0x10;
pub const DEVICE_FEATURES_SEL: u64 = 0x14;
pub const DRIVER_FEATURES: u64 = 0x20;
pub const DRIVER_FEATURES_SEL: u64 = 0x24;
pub const QUEUE_SEL: u64 = 0x30;
pub const QUEUE_SIZE_MAX: u64 = 0x34;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const QUEUE_NOTIFY: u64 = 0x50;
pub const INTERRUPT_STATUS: u64 = 0x60;
pub const INTERRUPT_ACK: u64 = 0x64;
pub const STATUS: u64 = 0x70;
pub const QUEUE_DESC: u64 = 0x80;
pub const QUEUE_DRIVER: u64 = 0x90;
pub const QUEUE_DEVICE: u64 = 0xa0;
pub const CONFIG: u64 = 0x100;

pub const NEEDS_RESET: u32 = 0x40;
pub const RUNNING: u32 = 15;

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Guest memory: RAM, the hole that stands for the MMIO window, and two regions that touch each other.
pub const LOW_END: u64 = 16 << 20;
pub const HIGH_START: u64 = 32 << 20;
pub const SEAM: u64 = 40 << 20;
pub const HIGH_END: u64 = 48 << 20;

/// Where buffers are put when a test has no reason for another place.
pub const READABLE: u64 = 4 << 20;
pub const WRITABLE: u64 = 8 << 20;
/// Where indirect tables are put.
pub const TABLE: u64 = 12 << 20;

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A device-readable buffer.
pub fn readable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: 0, next: 0 }
}

/// A device-writable buffer.
pub fn writable(addr: u64, len: u32) -> Desc {
    Desc { addr, len, flags: WRITE, next: 0 }
}

/// Links descriptors that will stand one after the other from entry 0 on.
pub fn linked(descriptors: &[Desc]) -> Vec<Desc> {
    let last = descriptors.len().saturating_sub(1);
    let link = |(index, desc): (usize, &Desc)| {
        if index == last { *desc } else { Desc { flags: desc.flags | NEXT, next: index as u16 + 1, ..*desc } }
    };
    descriptors.iter().enumerate().map(link).collect()
}

/// The driver's side of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// The driver's index: next entry to fill.
    pub next: u16,
    /// The next used entry to look at.
    pub seen: u16,
}

/// A machine with one device.
pub struct Machine {
    pub transport: MmioTransport,
    pub memory: GuestMemory,
    pub line: EventFd,
    pub rings: Vec<Ring>,
    events: EventManager<Worker>,
}

pub fn memory() -> GuestMemory {
    let regions = [(0, LOW_END), (HIGH_START, SEAM - HIGH_START), (SEAM, HIGH_END - SEAM)];
    katavm_devices::memory::anonymous(&regions.map(|(start, len)| (GuestAddress(start), len as usize))).unwrap()
}

impl Machine {
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>) -> Self {
        Self::with_memory(device, memory())
    }

    pub fn with_memory(device: Arc<Mutex<dyn VirtioDevice>>, memory: GuestMemory) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap());
        let sizes = device.lock().unwrap().queues().sizes().to_vec();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone() as Worker);
        for worker in device.lock().unwrap().workers() {
            events.add_subscriber(worker);
        }
        let transport = MmioTransport::new(device, memory.clone(), interrupt).unwrap();
        let mut machine = Self { transport, memory, line, rings: Vec::new(), events };
        machine.place_rings_of(&sizes);
        machine
    }

    /// Puts all rings where they were in the beginning.
    pub fn place_rings(&mut self) {
        let sizes = self.transport.device().lock().unwrap().queues().sizes().to_vec();
        self.place_rings_of(&sizes);
    }

    fn place_rings_of(&mut self, sizes: &[u16]) {
        let place = |(index, size): (usize, &u16)| {
            let base = (index as u64 + 1) << 18;
            Ring { size: *size, desc: base, avail: base + 0x10000, used: base + 0x20000, next: 0, seen: 0 }
        };
        self.rings = sizes.iter().enumerate().map(place).collect();
    }

    /// A machine whose device is restored from `state`, in the same memory.
    pub fn restored(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemory,
        state: &MmioState,
        rings: &[Ring],
    ) -> (Self, Result<(), RestoreError>) {
        let mut machine = Self::with_memory(device, memory);
        machine.rings = rings.to_vec();
        let result = machine.transport.restore(state);
        (machine, result)
    }

    pub fn get(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub fn offered(&mut self) -> u64 {
        self.set(DEVICE_FEATURES_SEL, 0);
        let low = self.get(DEVICE_FEATURES);
        self.set(DEVICE_FEATURES_SEL, 1);
        u64::from(self.get(DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    pub fn accept(&mut self, features: u64) {
        for half in 0..2 {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
    }

    pub fn set_address(&mut self, register: u64, address: u64) {
        self.set(register, address as u32);
        self.set(register + 4, (address >> 32) as u32);
    }

    /// Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        self.accept(features);
        self.set(STATUS, 11);
    }

    /// Sets queue `index` up where its ring is, with zeroed areas.
    pub fn set_up(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        (ring.next, ring.seen) = (0, 0);
        let Ring { size, desc, avail, used, .. } = *ring;
        let size = usize::from(size);
        for (address, len) in [(desc, 16 * size), (avail, 6 + 2 * size), (used, 6 + 8 * size)] {
            // A ring may be put outside memory on purpose.
            let _ = self.memory.write_slice(&vec![0; len], GuestAddress(address));
        }
        self.set(QUEUE_SEL, index as u32);
        self.set(QUEUE_SIZE, size as u32);
        self.set_address(QUEUE_DESC, desc);
        self.set_address(QUEUE_DRIVER, avail);
        self.set_address(QUEUE_DEVICE, used);
        self.set(QUEUE_READY, 1);
    }

    /// A whole initialization without EVENT_IDX, up to DRIVER_OK.
    pub fn start(&mut self) {
        let features = self.offered() & !F_EVENT_IDX;
        self.start_with(features);
    }

    pub fn start_with(&mut self, features: u64) {
        self.negotiate(features);
        (0..self.rings.len()).for_each(|index| self.set_up(index));
        self.set(STATUS, RUNNING);
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn take(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn u16_at(&self, address: u64) -> u16 {
        self.memory.read_obj::<u16>(GuestAddress(address)).unwrap()
    }

    /// Writes one descriptor into the table at `table`.
    pub fn describe(&self, table: u64, index: u16, desc: Desc) {
        let mut bytes = desc.addr.to_le_bytes().to_vec();
        bytes.extend(desc.len.to_le_bytes());
        bytes.extend(desc.flags.to_le_bytes());
        bytes.extend(desc.next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Writes descriptors as they are, from entry 0 of the table at `table` on.
    pub fn describe_all(&self, table: u64, descriptors: &[Desc]) {
        for (index, desc) in descriptors.iter().enumerate() {
            self.describe(table, index as u16, *desc);
        }
    }

    /// Makes `head` available on a queue; the device is not told.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let entry = ring.avail + 4 + 2 * u64::from(ring.next % ring.size);
        ring.next = ring.next.wrapping_add(1);
        let (avail, next) = (ring.avail, ring.next);
        self.put(entry, &head.to_le_bytes());
        self.put(avail + 2, &next.to_le_bytes());
    }

    pub fn kick(&mut self, queue: usize) {
        self.set(QUEUE_NOTIFY, queue as u32);
    }

    /// Lets the event loop run until nothing is left to do, and all that is under way is finished. Returns how many turns
    /// that took.
    pub fn run(&mut self) -> usize {
        const TURNS: usize = 10_000;
        let mut turns = 0;
        loop {
            let device = self.transport.device().clone();
            let rest = (1..TURNS).find(|_| self.events.run_with_timeout(0).unwrap() == 0);
            turns += rest.expect("the event loop comes to rest");
            device.lock().unwrap_or_else(PoisonError::into_inner).settle();
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return turns;
            }
            assert!(turns < TURNS, "the event loop comes to rest");
        }
    }

    /// Lets the event loop run until `done`, waiting for events as a real one does.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            self.events.run_with_timeout(100).unwrap();
            assert!(start.elapsed() < Duration::from_secs(20), "what was waited for did not happen");
        }
    }

    /// One turn of the event loop.
    pub fn turn(&mut self) -> usize {
        self.events.run_with_timeout(0).unwrap()
    }

    /// What was used since the last call: heads and lengths.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let mut ring = self.rings[queue];
        let index = self.u16_at(ring.used + 2);
        let mut all = Vec::new();
        while ring.seen != index && all.len() <= usize::from(ring.size) {
            let entry = self.take(ring.used + 4 + 8 * u64::from(ring.seen % ring.size), 8);
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            all.push((word(0), word(4)));
            ring.seen = ring.seen.wrapping_add(1);
        }
        self.rings[queue] = ring;
        all
    }

    /// Offers a chain of linked descriptors from entry 0 on, kicks, and lets the device work.
    pub fn submit(&mut self, queue: usize, descriptors: &[Desc]) {
        self.describe_all(self.rings[queue].desc, descriptors);
        self.offer(queue, 0);
        self.kick(queue);
        self.run();
    }

    /// A well-formed request of two buffers; what was used of it, and the bytes in the writable one.
    pub fn exchange(&mut self, queue: usize, request: &[u8], room: u32) -> (Option<u32>, Vec<u8>) {
        self.put(READABLE, request);
        self.put(WRITABLE, &vec![0xaa; room as usize]);
        let both = [readable(READABLE, request.len() as u32), writable(WRITABLE, room)];
        let present: Vec<Desc> = both.into_iter().filter(|desc| desc.len != 0).collect();
        self.used(queue);
        self.submit(queue, &linked(&present));
        let len = self.used(queue).first().map(|(_, len)| *len);
        (len, self.take(WRITABLE, room as usize))
    }

    pub fn needs_reset(&mut self) -> bool {
        self.get(STATUS) & NEEDS_RESET != 0
    }

    /// Whether the line was raised since the last call.
    pub fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }
}
