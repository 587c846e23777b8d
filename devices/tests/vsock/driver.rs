//! A guest's side of the socket device: packets by hand, and a well-behaved socket on top of them.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use katavm_devices::virtio::VirtioDevice;
use katavm_devices::vsock::{Vsock, VsockHost};

use crate::common::{F_EVENT_IDX, Machine, READABLE, WRITABLE, linked, readable, writable};

pub const CID: u64 = 5;
pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// What the device grants every connection.
pub const DEVICE_CREDIT: u32 = 256 * 1024;
/// Long enough for any step that is to happen.
pub const SOON: Duration = Duration::from_secs(120);

const HEADER: usize = 44;
/// Room for a header and the largest payload, and then some for those that are too large.
const SLOT: u64 = 0x11000;
const SLOTS: u16 = 60;

/// A packet as the driver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet from the guest's port to the host's, with 256 KiB of credit.
    pub fn new(guest_port: u32, host_port: u32, op: u16) -> Self {
        Self {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 256 * 1024,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    pub fn with_payload(self, payload: &[u8]) -> Self {
        Self { len: payload.len() as u32, payload: payload.to_vec(), ..self }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        for port in [self.src_port, self.dst_port, self.len] {
            bytes.extend(port.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.payload);
        bytes
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            payload: bytes[HEADER..].to_vec(),
        }
    }
}

/// A guest with the socket device's driver.
pub struct Guest {
    pub machine: Machine,
    pub device: Arc<Mutex<Vsock>>,
    pub host: VsockHost,
    /// Size of each receive buffer.
    pub buffer: u32,
    /// Transmit slots that are not the device's.
    free: VecDeque<u16>,
    /// Packets received and not yet looked at.
    inbox: VecDeque<Packet>,
}

impl Guest {
    /// A guest whose driver is up, with 64 receive buffers of 4 KiB.
    pub fn new() -> Self {
        let mut guest = Self::down();
        guest.start();
        guest.post(64);
        guest
    }

    /// A guest whose driver is not up yet.
    pub fn down() -> Self {
        let (device, host) = Vsock::new(CID).unwrap();
        let device = Arc::new(Mutex::new(device));
        let machine = Machine::new(Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>);
        Self::of(machine, device, host)
    }

    pub fn of(machine: Machine, device: Arc<Mutex<Vsock>>, host: VsockHost) -> Self {
        Self { machine, device, host, buffer: 4096, free: (0..SLOTS).collect(), inbox: VecDeque::new() }
    }

    pub fn start(&mut self) {
        self.machine.start();
    }

    pub fn start_with_event_index(&mut self) {
        let features = self.machine.offered();
        assert!(features & F_EVENT_IDX != 0);
        self.machine.start_with(features);
    }

    /// Gives the device its first receive buffers.
    pub fn post(&mut self, count: u16) {
        for index in 0..count {
            self.post_one(index);
        }
        self.machine.kick(RX);
        self.run();
    }

    fn post_one(&mut self, index: u16) {
        let address = WRITABLE + u64::from(index) * u64::from(self.buffer);
        self.machine.describe(self.machine.rings[RX].desc, index, writable(address, self.buffer));
        self.machine.offer(RX, index);
    }

    pub fn run(&mut self) {
        self.machine.run();
    }

    /// Sends a packet in one buffer.
    pub fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    /// Sends any bytes as a packet.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.queue(bytes);
        self.machine.kick(TX);
        self.run();
    }

    /// Makes any bytes available as a packet; the device is not told.
    pub fn queue(&mut self, bytes: &[u8]) {
        self.reclaim();
        let slot = self.free.pop_front().expect("a transmit slot is free");
        let address = READABLE + u64::from(slot) * SLOT;
        self.machine.put(address, bytes);
        self.machine.describe(self.machine.rings[TX].desc, slot, readable(address, bytes.len() as u32));
        self.machine.offer(TX, slot);
    }

    /// Sends a packet as a chain of pieces of these sizes, the rest in a last one.
    pub fn send_in_pieces(&mut self, packet: &Packet, sizes: &[u32]) {
        self.reclaim();
        let bytes = packet.bytes();
        self.machine.put(READABLE, &bytes);
        let mut at = 0;
        let mut descriptors = Vec::new();
        for size in sizes.iter().copied().chain([bytes.len() as u32 - sizes.iter().sum::<u32>()]) {
            descriptors.push(readable(READABLE + u64::from(at), size));
            at += size;
        }
        self.machine.submit(TX, &linked(&descriptors));
        self.machine.used(TX);
    }

    /// Takes back the transmit buffers that the device has used.
    pub fn reclaim(&mut self) -> usize {
        let used = self.machine.used(TX);
        for (head, len) in &used {
            assert_eq!(*len, 0, "the device writes nothing into transmit buffers");
            self.free.push_back(*head as u16);
        }
        used.len()
    }

    /// Transmit slots that the device has not given back.
    pub fn unused(&mut self) -> usize {
        self.reclaim();
        usize::from(SLOTS) - self.free.len()
    }

    /// Lets the device work and fetches what it sent; buffers go back at once.
    pub fn fetch(&mut self) {
        self.run();
        loop {
            let used = self.machine.used(RX);
            if used.is_empty() {
                return;
            }
            for (head, len) in used {
                let address = WRITABLE + u64::from(head) * u64::from(self.buffer);
                let packet = Packet::parse(&self.machine.take(address, len as usize));
                assert_eq!(packet.len as usize, packet.payload.len());
                self.inbox.push_back(packet);
                self.post_one(head as u16);
            }
            self.machine.kick(RX);
            self.run();
        }
    }

    /// Every packet that came since the last look.
    pub fn packets(&mut self) -> Vec<Packet> {
        self.fetch();
        self.inbox.drain(..).collect()
    }

    /// The operations of the packets that came since the last look.
    pub fn operations(&mut self) -> Vec<u16> {
        self.packets().iter().map(|packet| packet.op).collect()
    }

    /// Waits for the next packet.
    pub fn next(&mut self) -> Packet {
        self.wait(|guest| {
            guest.fetch();
            guest.inbox.pop_front()
        })
    }

    /// Lets the device work until `done` has something.
    pub fn wait<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.run();
            if let Some(value) = done(self) {
                return value;
            }
            assert!(start.elapsed() < SOON, "nothing happened in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The host connects in a thread of its own.
    pub fn dial(&self, port: u32, timeout: Duration) -> JoinHandle<std::io::Result<UnixStream>> {
        let host = self.host.clone();
        std::thread::spawn(move || host.connect(port, timeout))
    }

    /// A connection that the host started and the guest accepted.
    pub fn accept(&mut self, port: u32, buf_alloc: u32) -> (Socket, UnixStream) {
        let call = self.dial(port, SOON);
        let request = self.next();
        assert_eq!((request.op, request.dst_port), (REQUEST, port));
        let mut socket = Socket::new(port, request.src_port, buf_alloc);
        socket.granted(&request);
        let response = socket.packet(RESPONSE);
        self.send(&response);
        let stream = call.join().unwrap().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        (socket, stream)
    }

    /// Sends data as far as credit goes; returns how many bytes that was.
    pub fn write(&mut self, socket: &mut Socket, data: &[u8]) -> usize {
        let len = data.len().min(socket.credit() as usize).min(64 * 1024);
        if len > 0 {
            let packet = socket.packet(RW).with_payload(&data[..len]);
            socket.sent += len as u32;
            self.send(&packet);
        }
        len
    }

    /// Hands all packets to the one socket there is; returns their operations.
    pub fn deliver(&mut self, socket: &mut Socket) -> Vec<u16> {
        let packets = self.packets();
        for packet in &packets {
            socket.take(packet);
        }
        packets.iter().map(|packet| packet.op).collect()
    }
}

/// A stream socket of the guest that keeps the rules.
pub struct Socket {
    pub guest_port: u32,
    pub host_port: u32,
    pub buf_alloc: u32,
    pub sent: u32,
    pub peer_alloc: u32,
    pub peer_forwarded: u32,
    /// Bytes that came in all.
    pub received: u32,
    /// Bytes of these that the guest's program has read.
    pub forwarded: u32,
    /// What the program has not read.
    pub unread: VecDeque<u8>,
    /// Flags of the host's SHUTDOWN packets.
    pub shutdown: u32,
    pub reset: bool,
}

impl Socket {
    pub fn new(guest_port: u32, host_port: u32, buf_alloc: u32) -> Self {
        Self {
            guest_port,
            host_port,
            buf_alloc,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            received: 0,
            forwarded: 0,
            unread: VecDeque::new(),
            shutdown: 0,
            reset: false,
        }
    }

    pub fn packet(&self, op: u16) -> Packet {
        let packet = Packet::new(self.guest_port, self.host_port, op);
        Packet { buf_alloc: self.buf_alloc, fwd_cnt: self.forwarded, ..packet }
    }

    pub fn granted(&mut self, packet: &Packet) {
        (self.peer_alloc, self.peer_forwarded) = (packet.buf_alloc, packet.fwd_cnt);
    }

    /// Bytes that may be sent.
    pub fn credit(&self) -> u32 {
        self.peer_alloc - self.sent.wrapping_sub(self.peer_forwarded)
    }

    pub fn take(&mut self, packet: &Packet) {
        assert_eq!((packet.src_cid, packet.dst_cid, packet.kind), (2, CID, 1));
        assert_eq!((packet.src_port, packet.dst_port), (self.host_port, self.guest_port));
        assert!(!self.reset, "nothing follows a reset: {packet:?}");
        if packet.op == RST {
            self.reset = true;
            return;
        }
        self.granted(packet);
        match packet.op {
            RW => {
                assert_eq!(self.shutdown & 2, 0, "no data after the end");
                self.unread.extend(&packet.payload);
                self.received += packet.len;
                assert!(self.received - self.forwarded <= self.buf_alloc, "the device keeps to the guest's credit");
            }
            SHUTDOWN => self.shutdown |= packet.flags,
            CREDIT_UPDATE | CREDIT_REQUEST | RESPONSE => {}
            op => panic!("operation {op}"),
        }
    }

    /// The program reads up to `len` bytes.
    pub fn read(&mut self, len: usize) -> Vec<u8> {
        let data: Vec<u8> = self.unread.drain(..len.min(self.unread.len())).collect();
        self.forwarded += data.len() as u32;
        data
    }
}

/// A generator of numbers that are the same in every run (xorshift64*).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 32) as u8).collect()
    }
}

/// Reads the host's stream to its end.
pub fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).expect("the stream ends well");
    data
}

/// Writes what fits now.
pub fn write_some(stream: &mut UnixStream, data: &[u8]) -> usize {
    stream.set_nonblocking(true).unwrap();
    let written = stream.write(data);
    stream.set_nonblocking(false).unwrap();
    written.unwrap_or(0)
}

/// Reads what is there now.
pub fn read_some(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.set_nonblocking(true).unwrap();
    let read = stream.read(&mut data);
    stream.set_nonblocking(false).unwrap();
    data.truncate(read.unwrap_or(0));
    data
}
