//! Memory that is plugged in, behind its transport.

mod common;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{CONFIG, HIGH_START, Machine};
use katavm_devices::mem::{Backing, Mem, MemError, MemState, SLOT};
use katavm_devices::virtio::VirtioDevice;

const BLOCK: u64 = 2 << 20;
/// Where the region is: blocks of it behind this are none of the machine's memory, which is smaller.
const START: u64 = 64 << 30;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const USABLE: u64 = CONFIG + 32;
const PLUGGED: u64 = CONFIG + 40;
const REQUESTED: u64 = CONFIG + 48;

/// Notes what was granted; refuses more than the host has.
#[derive(Clone, Default)]
struct Host {
    granted: Arc<AtomicU64>,
    most: u64,
}

impl Backing for Host {
    fn grant(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.most {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.granted.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}

struct Bench {
    machine: Machine,
    mem: Arc<Mutex<Mem>>,
    granted: Arc<AtomicU64>,
}

impl Bench {
    /// A region of 320 MiB, of which the host has `most` bytes, and `requested` MiB are to be plugged.
    fn new(most: u64, requested: u64) -> Self {
        Self::over(Mem::new(320).unwrap(), most, requested)
    }

    fn over(mut mem: Mem, most: u64, requested: u64) -> Self {
        let host = Host { most, ..Host::default() };
        mem.place(START, Box::new(host.clone())).unwrap();
        mem.request(requested).unwrap();
        let mem = Arc::new(Mutex::new(mem));
        let mut machine = Machine::new(mem.clone());
        machine.start();
        Self { machine, mem, granted: host.granted }
    }

    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        let mut request = Vec::from(u64::from(kind).to_le_bytes());
        request.extend((START + block * BLOCK).to_le_bytes());
        request.extend(u64::from(count).to_le_bytes());
        let (len, answer) = self.machine.exchange(0, &request, 10);
        assert_eq!(len, Some(10));
        assert_eq!(answer[2..8], [0; 6]);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    /// What the configuration space says of `usable`, `plugged` and `requested`, in blocks; and what the host has granted.
    fn sizes(&mut self) -> [u64; 4] {
        let mut field =
            |offset| (u64::from(self.machine.get(offset)) | u64::from(self.machine.get(offset + 4)) << 32) / BLOCK;
        let config = [field(USABLE), field(PLUGGED), field(REQUESTED)];
        [config[0], config[1], config[2], self.granted.load(Ordering::Relaxed) / BLOCK]
    }
}

#[test]
fn as_much_is_plugged_as_is_asked_for() {
    let mut bench = Bench::new(1 << 30, 6);
    assert_eq!(bench.sizes(), [64, 0, 3, 0]);
    assert_eq!(bench.ask(PLUG, 5, 2), (ACK, 0));
    assert_eq!(bench.sizes(), [64, 2, 3, 64]);
    assert_eq!(bench.ask(PLUG, 7, 2), (NACK, 0));
    assert_eq!(bench.ask(PLUG, 7, 1), (ACK, 0));
    assert_eq!(bench.mem.lock().unwrap().plugged_mib(), 6);
    let states = [(5, 3, 0), (8, 1, 1), (4, 2, 2)];
    for (block, count, state) in states {
        assert_eq!(bench.ask(STATE, block, count), (ACK, state), "{block}");
    }
}

#[test]
fn the_host_has_no_more_there_than_up_to_the_last_block() {
    let mut bench = Bench::new(1 << 30, 320);
    assert_eq!(bench.ask(PLUG, 0, 160), (ACK, 0));
    // The last slot is a short one.
    assert_eq!(bench.sizes(), [160, 160, 160, 160]);
    bench.mem.lock().unwrap().request(2).unwrap();
    assert_eq!(bench.ask(UNPLUG, 64, 96), (ACK, 0));
    // What the driver may use stays until it unplugs everything.
    assert_eq!(bench.sizes(), [160, 64, 1, 64]);
    assert_eq!(bench.ask(UNPLUG, 1, 63), (ACK, 0));
    assert_eq!(bench.sizes(), [160, 1, 1, 64]);
    assert_eq!(bench.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(bench.sizes(), [64, 0, 1, 0]);
}

#[test]
fn wrong_requests_change_nothing() {
    let mut bench = Bench::new(1 << 30, 128);
    assert_eq!(bench.ask(PLUG, 1, 2), (ACK, 0));
    let before = bench.sizes();
    let wrong = [
        (PLUG, 2, 1),
        (PLUG, 0, 2),
        (PLUG, 63, 2),
        (PLUG, 64, 1),
        (PLUG, 0, 0),
        (PLUG, 0, u16::MAX),
        (UNPLUG, 0, 1),
        (UNPLUG, 2, 2),
        (UNPLUG, 1, 0),
        (UNPLUG, 1 << 40, 1),
        (STATE, 64, 1),
        (STATE, 0, 0),
        (4, 0, 1),
        (u16::MAX, 0, 1),
    ];
    for (kind, block, count) in wrong {
        assert_eq!(bench.ask(kind, block, count), (ERROR, 0), "{kind} {block} {count}");
    }
    assert_eq!(bench.sizes(), before);
    // Too short to be one.
    let (len, answer) = bench.machine.exchange(0, &[0; 23], 10);
    assert_eq!((len, answer[0]), (Some(10), ERROR as u8));
    assert!(!bench.machine.needs_reset());
}

#[test]
fn a_host_that_has_no_more_is_asked_again_later() {
    let mut bench = Bench::new(SLOT, 320);
    assert_eq!(bench.ask(PLUG, 63, 1), (ACK, 0));
    assert_eq!(bench.ask(PLUG, 64, 1), (BUSY, 0));
    assert_eq!(bench.sizes(), [160, 1, 160, 64]);
    assert_eq!(bench.ask(STATE, 64, 1), (ACK, 1));
}

#[test]
fn more_than_the_region_has_is_refused() {
    let mut mem = Mem::new(321).unwrap();
    assert_eq!(mem.region_len(), 320 << 20);
    for wanted in [321, u64::MAX] {
        assert!(matches!(mem.request(wanted), Err(MemError::TooMuch { most: 320, .. })), "{wanted}");
    }
    mem.request(320).unwrap();
}

#[test]
fn what_is_plugged_out_goes_back_to_the_host() {
    let mut mem = Mem::new(2).unwrap();
    // The machine's own memory stands for the region's.
    mem.place(HIGH_START, Box::new(Host { most: SLOT, ..Host::default() })).unwrap();
    mem.request(2).unwrap();
    let mut machine = Machine::new(Arc::new(Mutex::new(mem)));
    machine.start();
    let request = |kind: u16| {
        let mut request = Vec::from(u64::from(kind).to_le_bytes());
        request.extend(HIGH_START.to_le_bytes());
        request.extend(1_u64.to_le_bytes());
        request
    };
    let there = |machine: &Machine| machine.take(HIGH_START, 8);
    assert_eq!(machine.exchange(0, &request(PLUG), 10).1[0], 0);
    machine.put(HIGH_START, &[7; 8]);
    assert_eq!(there(&machine), [7; 8]);
    assert_eq!(machine.exchange(0, &request(UNPLUG), 10).1[0], 0);
    assert_eq!(there(&machine), [0; 8]);
}

#[test]
fn those_who_wait_hear_of_it() {
    let mut bench = Bench::new(1 << 30, 4);
    let progress = bench.mem.lock().unwrap().progress();
    assert_eq!(progress.wait(Duration::from_millis(1), |plugged| plugged == 4 << 20), 0);
    let waiter = std::thread::spawn(move || progress.wait(Duration::from_secs(60), |plugged| plugged == 4 << 20));
    assert_eq!(bench.ask(PLUG, 0, 1), (ACK, 0));
    assert_eq!(bench.ask(PLUG, 1, 1), (ACK, 0));
    assert_eq!(waiter.join().unwrap(), 4 << 20);
}

#[test]
fn the_state_is_stored_and_checked() {
    let mut bench = Bench::new(1 << 30, 300);
    assert_eq!(bench.ask(PLUG, 70, 5), (ACK, 0));
    let saved = bench.mem.lock().unwrap().save();
    let stored: MemState = postcard::from_bytes(&postcard::to_stdvec(&saved).unwrap()).unwrap();
    let restored = Mem::restore(&stored).unwrap();
    assert_eq!((restored.save(), restored.granted()), (saved.clone(), 128 * BLOCK));
    let config = bench.mem.lock().unwrap().config().to_vec();
    let mut again = Bench::over(restored, 1 << 30, 300);
    assert_eq!(again.mem.lock().unwrap().config(), config);
    assert_eq!(again.granted.load(Ordering::Relaxed), 128 * BLOCK);
    assert_eq!(again.ask(UNPLUG, 70, 5), (ACK, 0));
    let lies = [
        MemState { region: saved.region + 1, ..saved.clone() },
        MemState { region: saved.region + BLOCK, ..saved.clone() },
        MemState { usable: 10 * BLOCK, requested: 0, ..saved.clone() },
        MemState { usable: saved.region + BLOCK, ..saved.clone() },
        MemState { requested: saved.usable + BLOCK, ..saved.clone() },
        MemState { requested: 1, ..saved.clone() },
    ];
    for lie in lies {
        assert!(Mem::restore(&lie).is_err(), "{lie:?}");
    }
}
