//! The block device behind its transport: every request type, every way to refuse.

mod common;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::{CONFIG, Desc, F_EVENT_IDX, INDIRECT, Machine, READABLE, TABLE, WRITABLE, linked, readable, writable};
use katavm_devices::block::{Block, BlockConfig, BlockError, BlockState};

const SECTORS: u64 = 4096;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

struct Disk {
    machine: Machine,
    file: File,
}

impl Disk {
    fn new(read_only: bool) -> Self {
        Self::with_features(read_only, u64::MAX)
    }

    fn with_features(read_only: bool, accepted: u64) -> Self {
        Self::on(tempfile::tempfile().unwrap(), read_only, accepted)
    }

    /// On a file, or a block device of the right size, filled so that each byte tells its sector.
    fn on(file: File, read_only: bool, accepted: u64) -> Self {
        if file.metadata().unwrap().is_file() {
            file.set_len(SECTORS * 512).unwrap();
        }
        for sector in 0..SECTORS {
            file.write_all_at(&[sector as u8; 512], 512 * sector).unwrap();
        }
        let config = BlockConfig::new(file.try_clone().unwrap(), read_only, "katavm-0");
        let mut machine = Machine::new(Arc::new(Mutex::new(Block::new(config).unwrap())));
        let features = machine.offered() & accepted & !F_EVENT_IDX;
        machine.start_with(features);
        Self { machine, file }
    }

    /// One request; the used length, the data, the status.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u32, Vec<u8>, u8) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat();
        let (len, mut bytes) = self.machine.exchange(0, &header, room + 1);
        let status = bytes.pop().unwrap();
        (len.unwrap(), bytes, status)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        self.request(kind, sector, data, room).2
    }

    fn on_file(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512 * sectors as usize];
        self.file.read_exact_at(&mut bytes, 512 * sector).unwrap();
        bytes
    }
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn sectors_are_read_where_they_are() {
    let mut disk = Disk::new(false);
    let (len, data, status) = disk.request(IN, 5, &[], 1024);
    assert_eq!((len, status), (1025, OK));
    assert_eq!(data, [[5; 512], [6; 512]].concat());
    // The last one, and an empty read behind it.
    assert_eq!(disk.request(IN, SECTORS - 1, &[], 512).1, [0xff; 512]);
    assert_eq!(disk.request(IN, SECTORS, &[], 0), (1, vec![], OK));
}

#[test]
fn sectors_are_written_where_they_are() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.request(OUT, 7, &[0xee; 1024], 0), (1, vec![], OK));
    assert_eq!(disk.on_file(6, 4), [[6; 512], [0xee; 512], [0xee; 512], [9; 512]].concat());
    assert_eq!(disk.status(FLUSH, 0, &[], 0), OK);
}

#[test]
fn what_is_not_all_on_the_disk_is_refused_as_a_whole() {
    let mut disk = Disk::new(false);
    for sector in [SECTORS - 1, SECTORS, 1 << 55, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
        let (len, data, status) = disk.request(IN, sector, &[], 1024);
        assert_eq!((len, status), (0, IOERR), "nothing before the status was written: {sector}");
        assert!(data.iter().all(|byte| *byte == 0xaa));
        assert_eq!(disk.status(OUT, sector, &[1; 1024], 0), IOERR);
    }
    assert_eq!(disk.on_file(SECTORS - 1, 1), [0xff; 512]);
    assert_eq!(disk.file.metadata().unwrap().len(), 512 * SECTORS, "the file does not grow");
}

#[test]
fn parts_of_sectors_are_refused() {
    let mut disk = Disk::new(false);
    for len in [1, 511, 513, 1023] {
        assert_eq!(disk.status(IN, 0, &[], len), IOERR);
        assert_eq!(disk.status(OUT, 0, &vec![1; len as usize], 0), IOERR);
    }
    assert_eq!(disk.on_file(0, 1), [0; 512]);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut disk = Disk::new(true);
    assert_ne!(disk.machine.offered() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(disk.machine.offered() & (1 << 13 | 1 << 14), 0, "neither discard nor write zeroes");
    assert_eq!(disk.status(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(disk.status(DISCARD, 0, &segment(0, 8, 0), 0), UNSUPP);
    assert_eq!(disk.status(WRITE_ZEROES, 8, &segment(8, 8, 0), 0), UNSUPP);
    assert_eq!((disk.on_file(0, 1), disk.on_file(8, 1)), (vec![0; 512], vec![8; 512]));
    assert_eq!(disk.status(IN, 0, &[], 512), OK);
}

#[test]
fn a_discard_gives_space_back() {
    let mut disk = Disk::new(false);
    disk.file.sync_all().unwrap();
    let before = disk.file.metadata().unwrap().blocks();
    let both = [segment(8, 1024, 0), segment(2048, 1024, 0)].concat();
    assert_eq!(disk.status(DISCARD, 0, &both, 0), OK);
    assert!(disk.file.metadata().unwrap().blocks() < before);
    assert_eq!(disk.on_file(1031, 2), [[0; 512], [8; 512]].concat());
    assert_eq!(disk.file.metadata().unwrap().len(), 512 * SECTORS);
}

#[test]
fn zeroes_are_written_with_and_without_unmap() {
    let mut disk = Disk::new(false);
    for (sector, unmap) in [(8, 0), (2048, 1)] {
        assert_eq!(disk.status(WRITE_ZEROES, 0, &segment(sector, 100, unmap), 0), OK);
        assert_eq!(disk.on_file(sector, 100), vec![0; 51200]);
        assert_ne!(disk.on_file(sector + 100, 1), [0; 512]);
        assert_ne!(disk.on_file(sector - 1, 1), [0; 512]);
    }
}

#[test]
fn bad_segments_are_refused() {
    let mut disk = Disk::new(false);
    for kind in [DISCARD, WRITE_ZEROES] {
        let bad = [
            (segment(SECTORS - 1, 2, 0), IOERR),
            (segment(u64::MAX, 1, 0), IOERR),
            (segment(0, u32::MAX, 0), IOERR),
            (segment(1, 1, 2), UNSUPP),
            (segment(1, 1, 0x8000_0000), UNSUPP),
            (vec![], IOERR),
            (vec![0; 15], IOERR),
            (vec![0; 17], IOERR),
            (vec![0; 16 * 17], IOERR),
        ];
        for (data, status) in bad {
            assert_eq!(disk.status(kind, 0, &data, 0), status, "{kind}: {data:?}");
        }
        assert_eq!(disk.status(kind, 0, &segment(1, 0, 0), 0), OK, "no sectors");
    }
    assert_eq!(disk.status(DISCARD, 0, &segment(1, 1, 1), 0), UNSUPP, "unmap is no flag of discard");
    assert_eq!(disk.on_file(1, 1), [1; 512]);
}

#[test]
fn requests_that_were_not_negotiated_are_unsupported() {
    let mut disk = Disk::with_features(false, 1 << 32);
    assert_eq!(disk.status(DISCARD, 0, &segment(1, 1, 0), 0), UNSUPP);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &segment(1, 1, 0), 0), UNSUPP);
    assert_eq!(disk.status(OUT, 1, &[3; 512], 0), OK);
    for kind in [2, 3, 5, 14, 15, 24, u32::MAX] {
        assert_eq!(disk.status(kind, 0, &[], 0), UNSUPP, "type {kind}");
    }
}

#[test]
fn the_serial_is_the_configured_one() {
    let mut disk = Disk::new(false);
    assert_eq!(disk.request(GET_ID, 0, &[], 20), (21, b"katavm-0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(), OK));
    assert_eq!(disk.request(GET_ID, 0, &[], 4).1, b"kata");
    let (len, bytes, status) = disk.request(GET_ID, 0, &[], 30);
    assert_eq!((len, status), (20, OK), "the rest was not written");
    assert_eq!(bytes[20..], [0xaa; 10]);
}

#[test]
fn framing_means_nothing() {
    let mut disk = Disk::new(false);
    // Header in two pieces with an empty one between, the data in odd ones, the status behind the last byte of data.
    let header = [&IN.to_le_bytes()[..], &[0; 4], &9u64.to_le_bytes()].concat();
    disk.machine.put(READABLE, &header[..7]);
    disk.machine.put(READABLE + 100, &header[7..]);
    disk.machine.put(WRITABLE, &[0xaa; 2000]);
    let pieces = [
        readable(READABLE, 7),
        readable(READABLE + 50, 0),
        readable(READABLE + 100, 9),
        writable(WRITABLE, 1),
        writable(WRITABLE + 1, 510),
        writable(WRITABLE + 511, 2),
    ];
    disk.machine.submit(0, &linked(&pieces));
    assert_eq!(disk.machine.used(0), [(0, 513)]);
    assert_eq!(disk.machine.take(WRITABLE, 514), [&[9; 512][..], &[OK, 0xaa]].concat());
}

#[test]
fn without_a_status_byte_nothing_is_done() {
    let mut disk = Disk::new(false);
    let header = [&OUT.to_le_bytes()[..], &[0; 4], &1u64.to_le_bytes(), &[9; 512]].concat();
    disk.machine.put(READABLE, &header);
    disk.machine.submit(0, &[readable(READABLE, header.len() as u32)]);
    assert_eq!(disk.machine.used(0), [(0, 0)]);
    assert_eq!(disk.on_file(1, 1), [1; 512]);
}

#[test]
fn a_whole_disk_can_be_read_at_once() {
    let mut disk = Disk::new(false);
    // 64 buffers of 32 KiB: the whole disk in one request.
    let header = [&IN.to_le_bytes()[..], &[0; 12]].concat();
    disk.machine.put(READABLE, &header);
    let mut pieces = vec![readable(READABLE, 16)];
    pieces.extend((0..64).map(|index| writable(WRITABLE + 0x8000 * index, 0x8000)));
    pieces.push(writable(TABLE + 0x10000, 1));
    disk.machine.describe_all(TABLE, &linked(&pieces));
    let table = Desc { addr: TABLE, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 };
    disk.machine.submit(0, &[table]);
    assert_eq!(disk.machine.used(0), [(0, 64 * 0x8000 + 1)]);
    assert_eq!(disk.machine.take(WRITABLE, 64 * 0x8000), disk.on_file(0, SECTORS));
}

#[test]
fn no_request_is_longer_than_the_limits_that_the_device_tells() {
    // 254 buffers of 256 KiB; the disk has room for far more.
    const MOST: u32 = 254 * 256 * 1024;
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 33).unwrap();
    let config = BlockConfig::new(file, false, "");
    let mut machine = Machine::new(Arc::new(Mutex::new(Block::new(config).unwrap())));
    machine.start();
    machine.put(READABLE, &[&IN.to_le_bytes()[..], &[0; 12]].concat());
    for (more, status) in [(0, OK), (512, IOERR)] {
        let mut pieces = vec![readable(READABLE, 16)];
        // The same memory again and again.
        pieces.extend([writable(WRITABLE, MOST / 254 * 2); 127]);
        pieces.extend([writable(WRITABLE, more), writable(TABLE + 0x10000, 1)]);
        machine.put(TABLE + 0x10000, &[0xaa]);
        machine.describe_all(TABLE, &linked(&pieces));
        let table = Desc { addr: TABLE, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 };
        machine.submit(0, &[table]);
        let len = if status == OK { MOST + 1 } else { 0 };
        assert_eq!((machine.used(0), machine.take(TABLE + 0x10000, 1)), (vec![(0, len)], vec![status]));
    }
}

#[test]
fn a_file_that_shrank_gives_errors_and_no_more() {
    let mut disk = Disk::new(false);
    disk.file.set_len(512 * 100).unwrap();
    assert_eq!(disk.status(IN, 100, &[], 512), IOERR);
    let (len, data, status) = disk.request(IN, 99, &[], 1024);
    assert_eq!((len, status), (512, IOERR), "one sector was there");
    assert_eq!(data[..512], [99; 512]);
    assert_eq!(disk.status(IN, 98, &[], 1024), OK);
}

#[test]
fn the_configuration_tells_the_capacity() {
    let mut disk = Disk::new(false);
    let mut bytes = [0; 8];
    disk.machine.transport.read(CONFIG, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), SECTORS);
}

#[test]
fn a_snapshot_fits_the_same_disk_only() {
    let file = |sectors: u64| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(512 * sectors).unwrap();
        file
    };
    let config = |sectors, read_only| BlockConfig::new(file(sectors), read_only, "other");
    let saved = Block::new(BlockConfig { serial: "a serial".into(), ..config(64, false) }).unwrap().save();
    let state: BlockState = postcard::from_bytes(&postcard::to_stdvec(&saved).unwrap()).unwrap();
    assert_eq!(Block::restore(&state, Some(config(64, false))).unwrap().save(), saved, "the saved serial counts");
    assert!(matches!(
        Block::restore(&state, Some(config(65, false))),
        Err(BlockError::Changed { saved: 64, found: 65 })
    ));
    assert!(matches!(Block::restore(&state, Some(config(64, true))), Err(BlockError::Changed { .. })));
    let lie = BlockState { serial: "x".repeat(21), ..state };
    assert!(matches!(Block::restore(&lie, Some(config(64, false))), Err(BlockError::Serial(_))));
}

#[test]
fn what_is_no_disk_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let made = BlockConfig::open(&fifo, true, "").and_then(Block::new);
    assert!(matches!(made, Err(BlockError::Disk(_))));
    let missing = BlockConfig::open(&dir.path().join("missing"), false, "").unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
    for serial in ["123456789012345678901", "tab\there", "é"] {
        let config = BlockConfig::new(tempfile::tempfile().unwrap(), false, serial);
        assert!(matches!(Block::new(config), Err(BlockError::Serial(_))), "{serial:?}");
    }
}

/// A loop device, which goes away with this.
struct Loop {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    /// None where the machine has no loop devices for us.
    fn new() -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512 * SECTORS).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().ok()?;
        let path = String::from_utf8(made.stdout).ok()?;
        made.status.success().then(|| Self { path: Path::new(path.trim()).to_path_buf(), _file: file })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn a_block_device_of_the_host_does_as_a_file_does() {
    let Some(host) = Loop::new() else {
        // Past the harness' capture, so that it is seen.
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED a_block_device_of_the_host_does_as_a_file_does: no loop device can be set up here"
        );
        return;
    };
    let config = BlockConfig::open(&host.path, false, "loop").unwrap();
    let mut disk = Disk::on(config.file, false, u64::MAX);
    let mut capacity = [0; 8];
    disk.machine.transport.read(CONFIG, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    assert_eq!(disk.request(IN, SECTORS - 1, &[], 512), (513, vec![0xff; 512], OK));
    assert_eq!(disk.status(IN, SECTORS - 1, &[], 1024), IOERR);
    assert_eq!(disk.status(OUT, 3, &[0xee; 512], 0), OK);
    assert_eq!(disk.status(FLUSH, 0, &[], 0), OK);
    assert_eq!(disk.on_file(2, 3), [[2; 512], [0xee; 512], [4; 512]].concat());
    assert_eq!(disk.status(WRITE_ZEROES, 0, &segment(8, 8, 0), 0), OK);
    assert_eq!(disk.status(DISCARD, 0, &segment(2048, 1024, 0), 0), OK);
    assert_eq!(disk.request(IN, 7, &[], 512 * 10).1, [&[7; 512][..], &[0; 4096], &[16; 512]].concat());
    assert_eq!(disk.request(IN, 2048, &[], 512).1, [0; 512], "a loop device punches holes");
}
