//! The devices of the table, and what a good request is for each.

use std::sync::{Arc, Mutex};

use katavm_devices::block::{Block, BlockConfig};
use katavm_devices::rng::Rng;
use katavm_devices::virtio::VirtioDevice;

use crate::common::Machine;

/// One kind of device.
pub trait Subject {
    /// A new device.
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>>;

    /// The queue on which the driver sends requests.
    fn queue(&self) -> usize {
        0
    }

    /// The readable bytes of a good request and the room for its answer.
    fn request(&self) -> (Vec<u8>, u32);

    /// Whether `answer`, of which `len` bytes were used, is a good answer to [`request`](Self::request).
    fn check(&self, len: u32, answer: &[u8]);

    /// Sends a good request and checks its answer.
    fn good(&self, machine: &mut Machine) {
        let (request, room) = self.request();
        let (len, answer) = machine.exchange(self.queue(), &request, room);
        self.check(len.expect("a good request is answered"), &answer);
        assert!(machine.interrupted(), "an answer interrupts");
    }
}

struct RngSubject;

pub fn rng() -> impl Subject {
    RngSubject
}

impl Subject for RngSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        Arc::new(Mutex::new(Rng::new().unwrap()))
    }

    fn request(&self) -> (Vec<u8>, u32) {
        (Vec::new(), 64)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!(len, 64);
        // 64 times the byte that was there before: less likely than anything that ever happened.
        assert!(answer.iter().any(|byte| *byte != 0xaa));
    }
}

const DISK: usize = 1 << 20;
const SECTOR: usize = 512;

struct BlockSubject {
    read_only: bool,
}

pub fn block() -> impl Subject {
    BlockSubject { read_only: false }
}

pub fn block_read_only() -> impl Subject {
    BlockSubject { read_only: true }
}

impl Subject for BlockSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..DISK).map(|at| (at / SECTOR) as u8 ^ 0x5a).collect();
        file.write_all(&content).unwrap();
        let config = BlockConfig { file, read_only: self.read_only, serial: "hostile".into() };
        Arc::new(Mutex::new(Block::new(config).unwrap()))
    }

    fn request(&self) -> (Vec<u8>, u32) {
        // GET_ID, which is the same whatever was written to the disk before.
        let mut header = 8u32.to_le_bytes().to_vec();
        header.extend([0; 12]);
        (header, 21)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!(len, 21);
        assert_eq!(answer, b"hostile\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "serial and status");
    }

    fn good(&self, machine: &mut Machine) {
        let (request, room) = self.request();
        let (len, answer) = machine.exchange(0, &request, room);
        self.check(len.expect("GET_ID is answered"), &answer);
        // What is written is what is read; a read-only disk still has what it had.
        let sector = 7u64;
        let header = |kind: u32| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut write = header(1);
        write.extend([0xc3; SECTOR]);
        let (len, status) = machine.exchange(0, &write, 1);
        assert_eq!((len, status), (Some(1), vec![u8::from(self.read_only)]));
        let (len, data) = machine.exchange(0, &header(0), SECTOR as u32 + 1);
        let expected = if self.read_only { sector as u8 ^ 0x5a } else { 0xc3 };
        assert_eq!(len, Some(SECTOR as u32 + 1));
        assert!(data[..SECTOR].iter().all(|byte| *byte == expected) && data[SECTOR] == 0);
        assert!(machine.interrupted(), "an answer interrupts");
    }
}
