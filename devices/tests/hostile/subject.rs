//! The devices of the table, and what a good request is for each.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use katavm_devices::balloon::Balloon;
use katavm_devices::block::{Block, BlockConfig, BlockOptions, EngineKind};
use katavm_devices::fs::{ExportOptions, Fs, FsShare};
use katavm_devices::mem::{Backing, Mem};
use katavm_devices::net::{Backend, Net, NetConfig, Offloads};
use katavm_devices::rng::Rng;
use katavm_devices::virtio::VirtioDevice;
use katavm_devices::vsock::Vsock;

use crate::common::{Machine, WRITABLE, writable};

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
    engine: EngineKind,
}

/// With many requests at once where this machine has io_uring.
pub fn block() -> impl Subject {
    BlockSubject { read_only: false, engine: EngineKind::Automatic }
}

pub fn block_blocking() -> impl Subject {
    BlockSubject { read_only: false, engine: EngineKind::Blocking }
}

pub fn block_read_only() -> impl Subject {
    BlockSubject { read_only: true, engine: EngineKind::Automatic }
}

impl Subject for BlockSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        use std::io::Write as _;
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..DISK).map(|at| (at / SECTOR) as u8 ^ 0x5a).collect();
        file.write_all(&content).unwrap();
        let options = BlockOptions { engine: self.engine, queues: 2, ..BlockOptions::default() };
        let config = BlockConfig::new(file, self.read_only, "hostile").with(options);
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

struct FsSubject;

pub fn fs() -> impl Subject {
    FsSubject
}

/// A FUSE request: `fuse_in_header` and body.
fn fuse(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let len = 40 + body.len() as u32;
    let head = [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &unique.to_le_bytes(), &node.to_le_bytes()].concat();
    [&head, &[0; 16][..], body].concat()
}

/// The error in a reply to the request `unique`.
fn fuse_error(reply: &[u8], unique: u64) -> i32 {
    assert_eq!(reply[8..16], unique.to_le_bytes());
    i32::from_le_bytes(reply[4..8].try_into().unwrap())
}

impl Subject for FsSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        let share = FsShare::new();
        let directory = std::fs::File::open("/usr").unwrap();
        let options = ExportOptions { read_only: true, ..ExportOptions::default() };
        share.add_export("x", directory.into(), options).unwrap();
        Arc::new(Mutex::new(Fs::new("hostile", share).unwrap()))
    }

    fn queue(&self) -> usize {
        1
    }

    fn request(&self) -> (Vec<u8>, u32) {
        // GETATTR of the root.
        (fuse(3, 77, 1, &[0; 16]), 16 + 104)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        // EIO as long as there is no session.
        match fuse_error(answer, 77) {
            0 => assert_eq!(len, 120),
            error => assert_eq!((error, len), (-libc::EIO, 16)),
        }
    }

    fn good(&self, machine: &mut Machine) {
        let init = [7u32, 41, 1 << 20, 0].map(u32::to_le_bytes).concat();
        let (len, reply) = machine.exchange(1, &fuse(26, 1, 0, &init), 80);
        assert!(len.is_some_and(|len| len >= 16), "INIT is answered");
        // A second INIT in a session is refused.
        assert!([0, -libc::EINVAL].contains(&fuse_error(&reply, 1)));
        let (len, reply) = machine.exchange(1, &fuse(1, 2, 1, b"x\0"), 16 + 128);
        assert_eq!((len, fuse_error(&reply, 2)), (Some(144), 0), "the export is found");
        let (request, room) = self.request();
        let (len, answer) = machine.exchange(1, &request, room);
        self.check(len.expect("GETATTR is answered"), &answer);
        assert_eq!(fuse_error(&answer, 77), 0);
        assert!(machine.interrupted(), "an answer interrupts");
    }
}

const GUEST_CID: u64 = 3;
/// Where packets are received.
const RECEIVED: u64 = 14 << 20;
/// Nobody listens there.
const CLOSED_PORT: u32 = 9;

struct VsockSubject;

pub fn vsock() -> impl Subject {
    VsockSubject
}

impl Subject for VsockSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        Arc::new(Mutex::new(Vsock::new(GUEST_CID).unwrap().0))
    }

    fn queue(&self) -> usize {
        1
    }

    fn request(&self) -> (Vec<u8>, u32) {
        // A REQUEST from port 7777 (virtio 1.3, 5.10.6).
        let cids = [GUEST_CID.to_le_bytes(), 2u64.to_le_bytes()].concat();
        let ports = [7777u32, CLOSED_PORT, 0].map(u32::to_le_bytes).concat();
        let kind = [1u16, 1].map(u16::to_le_bytes).concat();
        (([cids, ports, kind, vec![0; 4], 65536u32.to_le_bytes().to_vec(), vec![0; 4]]).concat(), 0)
    }

    fn check(&self, len: u32, _: &[u8]) {
        assert_eq!(len, 0, "nothing is written to a sent packet");
    }

    fn good(&self, machine: &mut Machine) {
        // What earlier requests were answered with comes first.
        const ROOMS: u64 = 16;
        let (request, _) = self.request();
        for _ in 0..64 {
            for room in 0..ROOMS {
                machine.put(RECEIVED + 4096 * room, &[0; 44]);
                machine.describe(machine.rings[0].desc, room as u16, writable(RECEIVED + 4096 * room, 4096));
                machine.offer(0, room as u16);
            }
            machine.kick(0);
            let (len, _) = machine.exchange(1, &request, 0);
            self.check(len.expect("the packet is taken"), &[]);
            let answers = machine.used(0);
            // The rooms that are left are filled before the next are offered.
            let missing = ROOMS as usize - answers.len();
            for _ in 0..missing {
                machine.exchange(1, &request, 0);
            }
            machine.used(0);
            let answer = machine.take(RECEIVED, 44);
            let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
            if (word(16), word(20), answer[30]) == (CLOSED_PORT, 7777, 3) {
                return assert!(machine.interrupted(), "an answer interrupts");
            }
        }
        panic!("no RST came from the closed port");
    }
}

/// What is sent into it comes out of it again, packet by packet: a socket connected to itself. Clones are the same wire.
#[derive(Clone)]
struct Loopback {
    socket: Arc<UnixDatagram>,
    /// Packets that come into it by themselves.
    supply: Arc<AtomicU32>,
}

impl Loopback {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("katavm-hostile-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        socket.connect_addr(&address).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket: Arc::new(socket), supply: Arc::default() }
    }

    /// As many packets of the supply as there is room for.
    fn top_up(&self) {
        while self.supply.load(Ordering::Relaxed) > 0 && self.socket.send(&packet(0x5a)).is_ok() {
            self.supply.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// A flood, with an end: a driver that spoils its own buffers gets none of it, and the device never rests before.
    fn flood(&self) {
        self.supply.store(5000, Ordering::Relaxed);
        self.top_up();
    }
}

impl AsFd for Loopback {
    /// The device asks for it before each packet.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.top_up();
        self.socket.as_fd()
    }
}

impl Backend for Loopback {
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

/// The device on `wire`; without segmentation, so that small buffers are enough for any packet.
fn net_on(wire: Loopback) -> Arc<Mutex<dyn VirtioDevice>> {
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(68),
        offloads: Offloads::empty(),
        pairs: 2,
        limits: Default::default(),
    };
    let mut net = Net::new(config).unwrap();
    net.attach(wire).unwrap();
    Arc::new(Mutex::new(net))
}

/// A header that asks for nothing, and an Ethernet frame.
fn packet(mark: u8) -> Vec<u8> {
    [&[0; 12][..], &[mark; 60]].concat()
}

/// Room for the longest packet of [`net_on`].
const PACKET_ROOM: u32 = 128;

struct NetTransmitSubject;

pub fn net_transmit() -> impl Subject {
    NetTransmitSubject
}

impl Subject for NetTransmitSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        net_on(Loopback::new())
    }

    fn queue(&self) -> usize {
        1
    }

    fn request(&self) -> (Vec<u8>, u32) {
        (packet(0x5a), 0)
    }

    fn check(&self, len: u32, _: &[u8]) {
        assert_eq!(len, 0, "nothing is written to a sent packet");
    }

    fn good(&self, machine: &mut Machine) {
        const ROOMS: u16 = 16;
        let room = |head: u16| RECEIVED + 4096 * u64::from(head);
        let (mut request, _) = self.request();
        static MARK: AtomicU32 = AtomicU32::new(0);
        request[20..24].copy_from_slice(&MARK.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        machine.used(0);
        (0..ROOMS).for_each(|head| machine.describe(machine.rings[0].desc, head, writable(room(head), PACKET_ROOM)));
        (0..ROOMS).for_each(|head| machine.offer(0, head));
        machine.kick(0);
        // A wire that is full of earlier packets takes this one when those have come back.
        let (mut len, _) = machine.exchange(1, &request, 0);
        for _ in 0..100_000 {
            let came = machine.used(0);
            if came.iter().any(|(head, _)| {
                let bytes = machine.take(room(*head as u16), request.len());
                bytes[12..] == request[12..]
            }) {
                self.check(len.expect("the packet is taken"), &[]);
                return assert!(machine.interrupted(), "a packet interrupts");
            }
            came.iter().for_each(|(head, _)| machine.offer(0, *head as u16));
            machine.kick(0);
            machine.run();
            len = len.or_else(|| machine.used(1).last().map(|(_, len)| *len));
        }
        panic!("the packet did not come back");
    }
}

#[derive(Default)]
struct NetReceiveSubject {
    /// Those of all devices so far.
    wires: Mutex<Vec<Loopback>>,
}

pub fn net_receive() -> impl Subject {
    NetReceiveSubject::default()
}

impl Subject for NetReceiveSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        let wire = Loopback::new();
        wire.flood();
        self.wires.lock().unwrap().push(wire.clone());
        net_on(wire)
    }

    fn request(&self) -> (Vec<u8>, u32) {
        (Vec::new(), PACKET_ROOM)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!(len, 72);
        assert_eq!(answer[..72], [&[0; 10][..], &[1, 0], &[0x5a; 60]].concat());
    }

    fn good(&self, machine: &mut Machine) {
        self.wires.lock().unwrap().iter().for_each(Loopback::flood);
        let (request, room) = self.request();
        let (len, answer) = machine.exchange(self.queue(), &request, room);
        self.check(len.expect("a packet arrives"), &answer);
        assert!(machine.interrupted(), "a packet interrupts");
    }
}

struct NetControlSubject;

pub fn net_control() -> impl Subject {
    NetControlSubject
}

impl Subject for NetControlSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        net_on(Loopback::new())
    }

    fn queue(&self) -> usize {
        4
    }

    fn request(&self) -> (Vec<u8>, u32) {
        // Both pairs.
        (vec![4, 0, 2, 0], 1)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!((len, answer), (1, &[0][..]));
    }
}

struct BalloonSubject {
    queue: usize,
}

pub fn balloon_inflate() -> impl Subject {
    BalloonSubject { queue: 0 }
}

pub fn balloon_report() -> impl Subject {
    BalloonSubject { queue: 2 }
}

impl Subject for BalloonSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        Arc::new(Mutex::new(Balloon::new().unwrap()))
    }

    fn queue(&self) -> usize {
        self.queue
    }

    fn request(&self) -> (Vec<u8>, u32) {
        match self.queue {
            // The page at which writable buffers are put.
            0 => (((WRITABLE >> 12) as u32).to_le_bytes().to_vec(), 0),
            // A part of a page, which stays.
            _ => (Vec::new(), 64),
        }
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!(len, 0);
        assert!(answer.iter().all(|byte| *byte == 0xaa));
    }

    fn good(&self, machine: &mut Machine) {
        machine.put(WRITABLE, &[0xaa; 4096]);
        let (request, room) = self.request();
        let (len, _) = machine.exchange(self.queue, &request, if room == 0 { 0 } else { 4096 });
        assert_eq!(len, Some(0), "a good request is answered");
        assert_eq!(machine.take(WRITABLE, 4096), [0; 4096], "the page was let go of");
        assert!(machine.interrupted(), "an answer interrupts");
    }
}

struct MemSubject;

pub fn mem() -> impl Subject {
    MemSubject
}

/// Memory that is always there.
struct There;

impl Backing for There {
    fn grant(&mut self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Where the region is.
const PLUGGABLE: u64 = 64 << 30;

impl Subject for MemSubject {
    fn device(&self) -> Arc<Mutex<dyn VirtioDevice>> {
        let mut mem = Mem::new(256).unwrap();
        mem.place(PLUGGABLE, Box::new(There)).unwrap();
        mem.request(256).unwrap();
        Arc::new(Mutex::new(mem))
    }

    fn request(&self) -> (Vec<u8>, u32) {
        // What is plugged of the first block.
        let mut request = Vec::from(3_u64.to_le_bytes());
        request.extend(PLUGGABLE.to_le_bytes());
        request.extend(1_u64.to_le_bytes());
        (request, 10)
    }

    fn check(&self, len: u32, answer: &[u8]) {
        assert_eq!((len, answer), (10, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..]));
    }
}
