//! How the block device does its work: both engines, O_DIRECT, several queues, limits, and disks that come and go.

mod common;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{CONFIG, Desc, INDIRECT, INTERRUPT_STATUS, Machine, STATUS, TABLE, linked, readable, writable};
use katavm_devices::block::{Block, BlockConfig, BlockError, BlockOptions, CacheMode, EngineKind};
use katavm_devices::rate::{Limits, Rate};
use katavm_devices::virtio::VirtioDevice as _;

const SECTORS: u64 = 4096;
const BYTES: usize = 512 * SECTORS as usize;
const OK: u8 = 0;
const IOERR: u8 = 1;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const DEVICE_ID: u64 = 8;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const CAPACITY: u64 = CONFIG;
const WRITEBACK: u64 = CONFIG + 32;
const NUM_QUEUES: u64 = CONFIG + 34;

/// Where data is put.
const DATA: u64 = 32 << 20;

struct Disk {
    machine: Machine,
    device: Arc<Mutex<Block>>,
    file: File,
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

impl Disk {
    /// A disk full of 0x11, opened with O_DIRECT or without. None where the machine has no such engine or mode.
    fn open(direct: bool, options: BlockOptions) -> Option<Self> {
        let path = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        path.as_file().write_all_at(&[0x11; BYTES], 0).unwrap();
        let open = if direct { BlockConfig::open_direct } else { BlockConfig::open };
        let device = open(path.path(), false, "io").and_then(|config| Block::new(config.with(options)));
        match device {
            Ok(device) => {
                let device = Arc::new(Mutex::new(device));
                let mut machine = Machine::new(device.clone());
                machine.start();
                Some(Self { machine, device, file: path.reopen().unwrap() })
            }
            Err(error) => {
                // Past the harness' capture, so that it is seen.
                let _ = writeln!(std::io::stderr(), "SKIPPED a part of block_io: {error}");
                None
            }
        }
    }

    /// One of each kind: engine, O_DIRECT.
    fn all() -> impl Iterator<Item = (String, Self)> {
        let kinds = [EngineKind::IoUring, EngineKind::Blocking].into_iter();
        kinds.flat_map(|engine| [false, true].map(|direct| (engine, direct))).filter_map(|(engine, direct)| {
            let disk = Self::open(direct, BlockOptions { engine, ..BlockOptions::default() })?;
            let name = disk.device.lock().unwrap().engine().unwrap();
            Some((format!("{name}, direct: {direct}"), disk))
        })
    }

    /// One request whose data is at `at`, cut into pieces of `cut` bytes; its status.
    fn request(&mut self, queue: usize, kind: u32, sector: u64, at: u64, len: u32, cut: u32) -> u8 {
        self.offer(queue, 0, kind, sector, at, len, cut);
        self.machine.kick(queue);
        self.machine.run();
        assert_eq!(self.machine.used(queue).len(), 1);
        self.status(0)
    }

    fn status(&self, number: u16) -> u8 {
        self.machine.take(TABLE + 0x4000 * u64::from(number) + 0x3fff, 1)[0]
    }

    /// Makes request `number` available, and tells nobody.
    #[expect(clippy::too_many_arguments, reason = "a request has that many parts")]
    fn offer(&mut self, queue: usize, number: u16, kind: u32, sector: u64, at: u64, len: u32, cut: u32) {
        let place = TABLE + 0x4000 * u64::from(number);
        self.machine.put(place + 0x3f00, &header(kind, sector));
        self.machine.put(place + 0x3fff, &[0xaa]);
        let mut pieces = vec![readable(place + 0x3f00, 16)];
        let flags = if kind == IN { writable } else { readable };
        pieces.extend((0..len).step_by(cut as usize).map(|done| flags(at + u64::from(done), cut.min(len - done))));
        pieces.push(writable(place + 0x3fff, 1));
        self.machine.describe_all(place, &linked(&pieces));
        let table = Desc { addr: place, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 };
        self.machine.describe(self.machine.rings[queue].desc, number, table);
        self.machine.offer(queue, number);
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn whatever_is_asked_for_is_what_a_disk_in_memory_would_have() {
    for (name, mut disk) in Disk::all() {
        let mut model = vec![0x11_u8; BYTES];
        let mut numbers = Numbers(88172645463325252);
        for round in 0..200 {
            // Whole blocks and parts of them, short and longer than a bounce buffer; in memory at even and odd places.
            let unit = [1, 8, 8, 1][numbers.below(4) as usize];
            let most = [4, 600 / unit][numbers.below(2) as usize];
            let sectors = unit * (1 + numbers.below(most));
            let sector = numbers.below((SECTORS - sectors) / unit + 1) * unit;
            let at = DATA + [0, 512, 4096, 4, 1][numbers.below(5) as usize];
            let cut = [4096, 4096, 512, 65536, 8200][numbers.below(5) as usize].max(sectors as u32 * 4);
            let (start, len) = (512 * sector as usize, 512 * sectors as usize);
            let fill = round as u8 | 1;
            let what = format!("{name}, round {round}: sectors {sector} + {sectors}, at {at:#x}, in pieces of {cut}");
            match numbers.below(6) {
                0 | 1 => {
                    disk.machine.put(at, &vec![0xaa; len]);
                    assert_eq!(disk.request(0, IN, sector, at, len as u32, cut), OK, "{what}");
                    assert!(disk.machine.take(at, len) == model[start..start + len], "{what}");
                }
                2 | 3 => {
                    let data: Vec<u8> = (0..len).map(|at| fill.wrapping_add((at / 512) as u8)).collect();
                    disk.machine.put(at, &data);
                    assert_eq!(disk.request(0, OUT, sector, at, len as u32, cut), OK, "{what}");
                    model[start..start + len].copy_from_slice(&data);
                }
                kind => {
                    let kind = if kind == 4 { DISCARD } else { WRITE_ZEROES };
                    let segment = [&sector.to_le_bytes()[..], &(sectors as u32).to_le_bytes(), &[0; 4]].concat();
                    disk.machine.put(DATA, &segment);
                    assert_eq!(disk.request(0, kind, 0, DATA, 16, 16), OK, "{what}");
                    model[start..start + len].fill(0);
                }
            }
        }
        assert_eq!(disk.request(0, FLUSH, 0, DATA, 0, 1), OK);
        assert!(disk.content() == model, "{name}: the file is the model");
    }
}

#[test]
fn a_full_queue_is_served_with_one_kick_and_in_whatever_order() {
    for (name, mut disk) in Disk::all() {
        let numbers = 0..200_u16;
        for number in numbers.clone() {
            let at = DATA + 4096 * u64::from(number);
            disk.machine.put(at, &[number as u8; 4096]);
            disk.offer(0, number, OUT, 8 * u64::from(number), at, 4096, 4096);
        }
        disk.machine.kick(0);
        let mut heads = Vec::new();
        disk.machine.run_until(|machine| {
            heads.extend(machine.used(0).iter().map(|(head, _)| *head as u16));
            heads.len() >= numbers.len()
        });
        heads.sort_unstable();
        assert!(heads.iter().copied().eq(numbers.clone()), "{name}");
        assert!(disk.machine.interrupted(), "{name}");
        let content = disk.content();
        for number in numbers {
            assert_eq!(disk.status(number), OK, "{name}");
            let start = 4096 * usize::from(number);
            assert!(content[start..start + 4096].iter().all(|byte| *byte == number as u8), "{name}: {number}");
        }
    }
}

#[test]
fn nothing_is_answered_after_a_reset_and_nothing_is_under_way_in_a_snapshot() {
    for (name, mut disk) in Disk::all() {
        let offer_all = |disk: &mut Disk| {
            (0..32).for_each(|number| disk.offer(0, number, IN, 0, DATA, 1 << 20, 1 << 18));
            disk.machine.kick(0);
            disk.machine.turn();
        };
        offer_all(&mut disk);
        disk.machine.set(STATUS, 0);
        let before = disk.machine.take(disk.machine.rings[0].used, 6 + 8 * 256);
        let statuses: Vec<_> = (0..32).map(|number| disk.status(number)).collect();
        // Whatever reaches memory now is a leak of the last driver's requests into the next one's.
        disk.machine.put(DATA, &vec![0x77; 1 << 20]);
        disk.machine.run();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(disk.machine.take(disk.machine.rings[0].used, 6 + 8 * 256), before, "{name}");
        assert_eq!((0..32).map(|number| disk.status(number)).collect::<Vec<_>>(), statuses, "{name}");
        assert!(disk.machine.take(DATA, 1 << 20).iter().all(|byte| *byte == 0x77), "{name}");

        disk.machine.start();
        offer_all(&mut disk);
        disk.device.lock().unwrap().settle();
        let state = disk.machine.transport.save();
        assert!(state.queues[0].in_flight.is_empty(), "{name}");
        assert_eq!(state.queues[0].next_used, 32, "{name}");
    }
}

#[test]
fn each_queue_is_served() {
    let options = BlockOptions { queues: 3, ..BlockOptions::default() };
    let mut disk = Disk::open(false, options).unwrap();
    assert_ne!(disk.machine.offered() & F_MQ, 0);
    let mut queues = [0; 2];
    disk.machine.transport.read(NUM_QUEUES, &mut queues);
    assert_eq!(queues, [3, 0]);
    for queue in 0..3 {
        assert_eq!(disk.request(queue, IN, queue as u64, DATA, 512, 512), OK);
    }
    // What one queue has under way is no reason for another to wait.
    for queue in 0..3 {
        (0..100).for_each(|number| disk.offer(queue, number, IN, 0, DATA, 4096, 4096));
        disk.machine.kick(queue);
    }
    let mut used = [0; 3];
    disk.machine.run_until(|machine| {
        (0..3).for_each(|queue| used[queue] += machine.used(queue).len());
        used == [100; 3]
    });
    for queues in [0, 9, u16::MAX] {
        assert!(matches!(Block::slot(queues), Err(BlockError::Queues(_))));
    }
    let one = Disk::open(false, BlockOptions::default()).unwrap().machine.offered();
    assert_eq!(one & F_MQ, 0, "one queue is no multi-queue");
}

#[test]
fn the_cache_mode_is_the_drivers_to_choose() {
    let byte = |machine: &mut Machine| {
        let mut byte = [0xaa];
        machine.transport.read(WRITEBACK, &mut byte);
        byte[0]
    };
    for (cache, found) in [(CacheMode::Writeback, 1), (CacheMode::Writethrough, 0)] {
        let mut disk = Disk::open(false, BlockOptions { cache, ..BlockOptions::default() }).unwrap();
        assert_eq!(byte(&mut disk.machine), found);
        let all = disk.machine.offered() & !(1 << 29);
        for value in [1, 0, 1] {
            disk.machine.transport.write(WRITEBACK, &[value]);
            assert_eq!(byte(&mut disk.machine), value);
            assert_eq!(disk.request(0, OUT, 3, DATA, 512, 512), OK);
        }
        disk.machine.transport.write(WRITEBACK, &[7]);
        disk.machine.transport.write(WRITEBACK, &[0, 0]);
        disk.machine.transport.write(CAPACITY, &[0]);
        assert_eq!(byte(&mut disk.machine), 1, "no mode, no byte, no field to write");
        // Without the feature the mode follows from the other one (5.2.5.2).
        for (features, mode) in [(all & !F_CONFIG_WCE, 1), (all & !F_FLUSH, 0), (all & !F_FLUSH & !F_CONFIG_WCE, 0)] {
            disk.machine.start_with(features);
            assert_eq!(byte(&mut disk.machine), mode);
            disk.machine.transport.write(WRITEBACK, &[1 - mode]);
            assert_eq!(byte(&mut disk.machine), mode);
            assert_eq!(disk.request(0, OUT, 3, DATA, 512, 512), OK);
        }
        disk.machine.set(STATUS, 0);
        assert_eq!(byte(&mut disk.machine), found, "after a reset it is as in the beginning");
    }
}

#[test]
fn a_limited_disk_waits_without_keeping_the_loop() {
    let operations = Some(Rate { per_second: 50, burst: 5 });
    let options = BlockOptions { limits: Limits { operations, bandwidth: None }, ..BlockOptions::default() };
    let mut disk = Disk::open(false, options).unwrap();
    let start = Instant::now();
    (0..15).for_each(|number| disk.offer(0, number, IN, 0, DATA, 512, 512));
    disk.machine.kick(0);
    disk.machine.run();
    let first = disk.machine.used(0).len();
    assert!((5..15).contains(&first), "{first} at once");
    // Kicks bring nothing, and a request of another kind neither.
    for _ in 0..100 {
        disk.machine.kick(0);
        disk.machine.run();
    }
    let mut used = first;
    disk.machine.run_until(|machine| {
        used += machine.used(0).len();
        used == 15
    });
    // The burst and one in debt at once, the others at 50 in a second.
    let least = Duration::from_millis(9 * 20 - 10);
    assert!(start.elapsed() >= least, "15 operations took {:?}", start.elapsed());

    let bandwidth = Some(Rate { per_second: 1 << 20, burst: 1 << 16 });
    disk.device.lock().unwrap().set_limits(Limits { bandwidth, operations: None }).unwrap();
    disk.machine.run();
    disk.machine.used(0);
    let start = Instant::now();
    (0..5).for_each(|number| disk.offer(0, number, IN, 0, DATA, 1 << 16, 1 << 16));
    disk.machine.kick(0);
    let mut used = 0;
    disk.machine.run_until(|machine| {
        used += machine.used(0).len();
        used == 5
    });
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(170), "5 times 64 KiB at 1 MiB/s took {took:?}");
    // A reset while requests wait for tokens forgets them.
    (0..5).for_each(|number| disk.offer(0, number, IN, 0, DATA, 1 << 16, 1 << 16));
    disk.machine.kick(0);
    disk.machine.run();
    disk.machine.start();
    std::thread::sleep(Duration::from_millis(300));
    disk.machine.run();
    assert_eq!(disk.machine.used(0), []);
}

#[test]
fn a_disk_that_grew_or_shrank_says_so() {
    let mut disk = Disk::open(false, BlockOptions::default()).unwrap();
    let capacity = |machine: &mut Machine| {
        let mut bytes = [0; 8];
        machine.transport.read(CAPACITY, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert!(!disk.device.lock().unwrap().resize().unwrap(), "nothing has changed");
    for sectors in [2 * SECTORS, 100] {
        disk.file.set_len(512 * sectors).unwrap();
        assert!(disk.device.lock().unwrap().resize().unwrap());
        disk.machine.transport.config_changed();
        assert_eq!(disk.machine.get(INTERRUPT_STATUS) & 2, 2);
        assert_eq!(capacity(&mut disk.machine), sectors);
        assert_eq!(disk.request(0, IN, sectors - 1, DATA, 512, 512), OK);
        assert_eq!(disk.request(0, IN, sectors, DATA, 512, 512), IOERR);
    }
}

#[test]
fn a_disk_comes_and_goes_in_its_place() {
    let device = Arc::new(Mutex::new(Block::slot(2).unwrap()));
    let mut machine = Machine::new(device.clone());
    assert_eq!(machine.get(DEVICE_ID), 0, "no device");
    assert!(matches!(device.lock().unwrap().resize(), Err(BlockError::Empty)));
    for round in 0..3_u8 {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[round; 4096], 0).unwrap();
        let config = || BlockConfig::new(file.try_clone().unwrap(), round == 1, "slot");
        device.lock().unwrap().attach(config()).unwrap();
        assert_eq!(machine.get(DEVICE_ID), 2);
        assert!(matches!(device.lock().unwrap().attach(config()), Err(BlockError::Taken)));
        machine.start();
        let mut disk = Disk { machine, device: device.clone(), file: file.try_clone().unwrap() };
        assert_eq!(disk.request(1, IN, 0, DATA, 4096, 4096), OK);
        assert_eq!(disk.machine.take(DATA, 4096), [round; 4096]);
        // Surprise: requests fail, those under way and those to come, and nobody waits for ever.
        (1..100).for_each(|number| disk.offer(0, number, IN, 0, DATA, 4096, 4096));
        disk.machine.kick(0);
        disk.machine.turn();
        disk.device.lock().unwrap().detach();
        disk.machine.run();
        assert_eq!(disk.machine.used(0).len(), 99);
        assert_eq!(disk.request(1, IN, 0, DATA, 4096, 4096), IOERR);
        assert_eq!(disk.machine.get(DEVICE_ID), 0);
        assert!(matches!(device.lock().unwrap().attach(config()), Err(BlockError::Taken)), "the driver is still there");
        // Its state goes into a snapshot, and back.
        let state = device.lock().unwrap().save();
        let transport = disk.machine.transport.save();
        assert!(!state.attached);
        let restored = Arc::new(Mutex::new(Block::restore(&state, None).unwrap()));
        let memory = disk.machine.memory.clone();
        let (mut again, result) = Machine::restored(restored, memory, &transport, &disk.machine.rings);
        result.unwrap();
        again.run();
        machine = disk.machine;
        machine.set(STATUS, 0);
    }
}

#[test]
fn a_sparse_file_stays_sparse() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(1 << 40).unwrap();
    let device = Arc::new(Mutex::new(Block::new(BlockConfig::new(file.try_clone().unwrap(), false, "")).unwrap()));
    let mut machine = Machine::new(device.clone());
    machine.start();
    let mut disk = Disk { machine, device, file };
    for sector in [0, 1 << 20, (1 << 31) - 8] {
        assert_eq!(disk.request(0, OUT, sector, DATA, 4096, 4096), OK);
        assert_eq!(disk.request(0, IN, (sector + 8) & !(1 << 31), DATA, 4096, 4096), OK);
    }
    assert!(disk.file.metadata().unwrap().blocks() <= 3 * 64, "{}", disk.file.metadata().unwrap().blocks());
    let segment = [&[0; 8][..], &8_u32.to_le_bytes(), &[0; 4]].concat();
    let before = disk.file.metadata().unwrap().blocks();
    disk.machine.put(DATA, &segment);
    assert_eq!(disk.request(0, DISCARD, 0, DATA, 16, 16), OK);
    disk.file.sync_all().unwrap();
    assert!(disk.file.metadata().unwrap().blocks() < before);
}

#[test]
fn errors_of_the_host_reach_the_driver_and_the_device_lives() {
    for (name, mut disk) in Disk::all() {
        disk.file.set_len(4096).unwrap();
        assert_eq!(disk.request(0, IN, 8, DATA, 4096, 4096), IOERR, "{name}");
        assert_eq!(disk.request(0, IN, 7, DATA, 1024, 512), IOERR, "{name}");
        assert_eq!(disk.request(0, IN, 0, DATA, 4096, 4096), OK, "{name}");
        // Writing makes the file longer again, as on a disk whose image was cut.
        assert_eq!(disk.request(0, OUT, 8, DATA, 4096, 4096), OK, "{name}");
        assert!(!disk.machine.needs_reset());
    }
    // EFBIG, ENOSPC and the like: a descriptor that may not be written stands for them.
    for engine in [EngineKind::Automatic, EngineKind::Blocking] {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(1 << 20).unwrap();
        let config = BlockConfig::new(File::open(path.path()).unwrap(), false, "ro");
        let config = config.with(BlockOptions { engine, ..BlockOptions::default() });
        let device = Arc::new(Mutex::new(Block::new(config).unwrap()));
        let mut machine = Machine::new(device.clone());
        machine.start();
        let mut disk = Disk { machine, device, file: path.reopen().unwrap() };
        (0..20).for_each(|_| assert_eq!(disk.request(0, OUT, 0, DATA, 4096, 4096), IOERR));
        assert_eq!(disk.request(0, IN, 0, DATA, 4096, 4096), OK);
    }
}
