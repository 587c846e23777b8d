//! A scripted virtio-fs driver: real guest memory, the MMIO transport, the event loop, FUSE messages packed by hand.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use katavm_devices::fs::{ExportOptions, Fs, FsShare};
use katavm_devices::memory::GuestMemory;
use katavm_devices::virtio::mmio::MmioTransport;
use katavm_devices::virtio::{Interrupt, VirtioDevice, Worker};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 32 << 20;
const QUEUE_SIZE: u16 = 1024;
const REQUEST_AT: u64 = 8 << 20;
const REPLY_AT: u64 = 16 << 20;
const LANES_AT: u64 = 24 << 20;
/// Descriptors of a lane: a request of 1 MiB, or a reply, and their headers.
const DESCRIPTORS: u16 = 300;
const PAGE: usize = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Request queue.
pub const REQUESTS: usize = 1;
/// High-priority queue.
pub const HIPRIO: usize = 0;
/// Everything that Linux 6.12 offers in INIT and the server may take.
pub const ALL_FLAGS: u64 = 0x4_7fff_ffff;

/// Packs messages.
#[derive(Clone, Default)]
pub struct Msg(pub Vec<u8>);

impl Msg {
    pub fn new() -> Self {
        Self::default()
    }
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(value);
        self
    }
    /// With its NUL.
    pub fn name(self, value: &str) -> Self {
        self.bytes(value.as_bytes()).bytes(&[0])
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What `fuse_attr` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub flags: u32,
}

pub fn attr_at(bytes: &[u8], at: usize) -> Attr {
    Attr {
        ino: u64_at(bytes, at),
        size: u64_at(bytes, at + 8),
        mtime: u64_at(bytes, at + 32),
        mode: u32_at(bytes, at + 60),
        nlink: u32_at(bytes, at + 64),
        uid: u32_at(bytes, at + 68),
        gid: u32_at(bytes, at + 72),
        rdev: u32_at(bytes, at + 76),
        flags: u32_at(bytes, at + 84),
    }
}

/// What `fuse_entry_out` says.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub node: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub attr: Attr,
}

pub fn entry_of(bytes: &[u8]) -> Entry {
    Entry {
        node: u64_at(bytes, 0),
        entry_valid: u64_at(bytes, 16),
        attr_valid: u64_at(bytes, 24),
        attr: attr_at(bytes, 40),
    }
}

/// One row of a directory listing.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub node: u64,
    pub ino: u64,
    pub next: u64,
    pub kind: u32,
}

pub struct Guest {
    pub share: FsShare,
    pub uid: u32,
    pub gid: u32,
    pub unique: u64,
    transport: MmioTransport,
    memory: GuestMemory,
    events: EventManager<Worker>,
    workers: Vec<Worker>,
    available: [u16; 2],
}

/// A request that was posted.
#[derive(Clone, Copy)]
pub struct Posted {
    queue: usize,
    lane: u16,
    room: usize,
    /// Requests that were used before.
    used: u16,
}

impl Guest {
    /// A driver that has set its queues up on `share`, INIT not yet sent.
    pub fn attach(share: FsShare) -> Self {
        let device = Arc::new(Mutex::new(Fs::new("test", share.clone()).unwrap()));
        let memory = katavm_devices::memory::anonymous(&[(GuestAddress(0), MEMORY)]).unwrap();
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut events = EventManager::<Worker>::new().unwrap();
        events.add_subscriber(device.clone());
        let workers = device.lock().unwrap().workers();
        events.add_subscriber(Arc::clone(&workers[0]));
        let mut transport = MmioTransport::new(device, memory.clone(), interrupt).unwrap();
        let mut set = |register: u64, value: u32| transport.write(register, &value.to_le_bytes());
        // ACKNOWLEDGE, DRIVER, VERSION_1, FEATURES_OK (virtio 1.3, 3.1.1 and 4.2.2).
        set(0x70, 1);
        set(0x70, 3);
        set(0x24, 1);
        set(0x20, 1);
        set(0x70, 11);
        for queue in 0..2 {
            set(0x30, queue);
            set(0x38, QUEUE_SIZE.into());
            let base = Self::base(queue as usize) as u32;
            set(0x80, base);
            set(0x90, base + 0x8000);
            set(0xa0, base + 0x10000);
            set(0x44, 1);
        }
        set(0x70, 15);
        let mut this = Self { share, uid: 0, gid: 0, unique: 0, transport, memory, events, workers, available: [0; 2] };
        assert_eq!(this.status(), 15, "the device is running");
        this
    }

    /// A driver in a session, on a share that exports `path` as "x".
    pub fn mount(path: &Path, options: ExportOptions) -> Self {
        let share = FsShare::new();
        share.add_export("x", open_path(path), options).unwrap();
        let mut guest = Self::attach(share);
        guest.init(ALL_FLAGS).unwrap();
        guest
    }

    fn base(queue: usize) -> u64 {
        (queue as u64 + 1) << 20
    }

    /// The device status register.
    pub fn status(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(0x70, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn config(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 40];
        self.transport.read(0x100, &mut bytes);
        bytes
    }

    /// Resets the device.
    pub fn reset_device(&mut self) {
        self.transport.write(0x70, &0_u32.to_le_bytes());
    }

    /// Sends raw bytes with `room` bytes for the reply, in pages; gives what the device wrote.
    pub fn send(&mut self, queue: usize, request: &[u8], room: usize) -> Vec<u8> {
        let posted = self.post(0, queue, request, room);
        self.events.run_with_timeout(1000).unwrap();
        let reply = self.reply(posted).expect("the request was used");
        assert_eq!(self.used(queue), self.available[queue], "nothing else is under way");
        reply
    }

    /// Makes a request available, whose buffers are those of `lane` 0, which has megabytes, or 1 or 2, which have 32 KiB.
    pub fn post(&mut self, lane: u16, queue: usize, request: &[u8], room: usize) -> Posted {
        let (request_at, reply_at) = Self::lane(lane);
        self.memory.write_slice(request, GuestAddress(request_at)).unwrap();
        self.memory.write_slice(&vec![0xaa; room + PAGE], GuestAddress(reply_at)).unwrap();
        let mut parts = Vec::new();
        // The header apart, as Linux does it.
        let head = request.len().min(40);
        parts.push((request_at, head, 0));
        for at in (head..request.len()).step_by(PAGE) {
            parts.push((request_at + at as u64, (request.len() - at).min(PAGE), 0));
        }
        let reply_head = room.min(16);
        if room > 0 {
            parts.push((reply_at, reply_head, WRITE));
        }
        for at in (reply_head..room).step_by(PAGE) {
            parts.push((reply_at + at as u64, (room - at).min(PAGE), WRITE));
        }
        let used = self.used(queue);
        let base = Self::base(queue);
        let first = lane * DESCRIPTORS;
        for (index, (address, len, flags)) in (first..).zip(&parts) {
            let at = GuestAddress(base + 16 * u64::from(index));
            let last = usize::from(index - first) + 1 == parts.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.memory.write_obj(*address, at).unwrap();
            self.memory.write_obj(*len as u32, GuestAddress(at.0 + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            self.memory.write_obj(index + 1, GuestAddress(at.0 + 14)).unwrap();
        }
        let available = base + 0x8000;
        let slot = self.available[queue] % QUEUE_SIZE;
        self.memory.write_obj(first, GuestAddress(available + 4 + 2 * u64::from(slot))).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue], GuestAddress(available + 2)).unwrap();
        self.transport.write(0x50, &(queue as u32).to_le_bytes());
        Posted { queue, lane, room, used }
    }

    /// What the device wrote for a request, once it has used it.
    pub fn reply(&self, posted: Posted) -> Option<Vec<u8>> {
        let Posted { queue, lane, room, used } = posted;
        let at = |index: u16| Self::base(queue) + 0x10000 + 4 + 8 * u64::from(index % QUEUE_SIZE);
        let count = self.used(queue).wrapping_sub(used);
        let own = |at: &u64| self.memory.read_obj::<u32>(GuestAddress(*at)).unwrap() == u32::from(lane * DESCRIPTORS);
        let at = (0..count).map(|index| at(used.wrapping_add(index))).find(own)?;
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        assert!(len as usize <= room, "no more is used than there is room");
        let mut reply = vec![0; room + PAGE];
        self.memory.read_slice(&mut reply, GuestAddress(Self::lane(lane).1)).unwrap();
        assert!(reply[room..].iter().all(|byte| *byte == 0xaa), "nothing is written beyond the room");
        reply.truncate(len as usize);
        Some(reply)
    }

    /// How many requests of a queue the device has used.
    pub fn used(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(Self::base(queue) + 0x10000 + 2)).unwrap()
    }

    /// The device's workers, the first of which this driver runs itself.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    fn lane(lane: u16) -> (u64, u64) {
        if lane == 0 {
            (REQUEST_AT, REPLY_AT)
        } else {
            let at = LANES_AT + (u64::from(lane) << 16);
            (at, at + (1 << 15))
        }
    }

    /// Request bytes with a right header.
    pub fn request(&mut self, opcode: u32, node: u64, body: &Msg) -> Vec<u8> {
        self.unique += 2;
        let header = Msg::new().u32(40 + body.0.len() as u32).u32(opcode).u64(self.unique).u64(node);
        header.u32(self.uid).u32(self.gid).u32(1).u32(0).bytes(&body.0).0
    }

    /// One request; gives the reply's body, or its errno.
    pub fn call_with_room(&mut self, opcode: u32, node: u64, body: &Msg, room: usize) -> Result<Vec<u8>, i32> {
        let request = self.request(opcode, node, body);
        let reply = self.send(REQUESTS, &request, 16 + room);
        assert!(reply.len() >= 16, "opcode {opcode} is answered");
        assert_eq!(u32_at(&reply, 0) as usize, reply.len(), "length in the header");
        assert_eq!(u64_at(&reply, 8), self.unique);
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert!(error < 0 && error > -4096 && reply.len() == 16, "an error has no body");
                Err(-error)
            }
        }
    }

    pub fn call(&mut self, opcode: u32, node: u64, body: Msg) -> Result<Vec<u8>, i32> {
        self.call_with_room(opcode, node, &body, 4096)
    }

    pub fn init(&mut self, flags: u64) -> Result<Vec<u8>, i32> {
        let body = Msg::new().u32(7).u32(41).u32(1 << 20).u32(flags as u32).u32((flags >> 32) as u32).bytes(&[0; 44]);
        self.call(26, 0, body)
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(1, parent, Msg::new().name(name)).map(|reply| entry_of(&reply))
    }

    /// Node of the export "x".
    pub fn root(&mut self) -> u64 {
        self.lookup(1, "x").unwrap().node
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let request = self.request(2, node, &Msg::new().u64(count));
        assert!(self.send(HIPRIO, &request, 0).is_empty());
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        self.call(3, node, Msg::new().u32(0).u32(0).u64(0)).map(|reply| attr_at(&reply, 16))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        self.call(9, parent, Msg::new().u32(mode).u32(0o22).name(name)).map(|reply| entry_of(&reply))
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<Entry, i32> {
        let body = Msg::new().u32(mode).u32(rdev).u32(0o22).u32(0).name(name);
        self.call(8, parent, body).map(|reply| entry_of(&reply))
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry, i32> {
        self.call(6, parent, Msg::new().name(name).name(target)).map(|reply| entry_of(&reply))
    }

    pub fn create(&mut self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(Entry, u64), i32> {
        let body = Msg::new().u32(flags.cast_unsigned()).u32(mode | 0o100_000).u32(0o22).u32(0).name(name);
        self.call(35, parent, body).map(|reply| (entry_of(&reply), u64_at(&reply, 128)))
    }

    /// Handle and `FOPEN_*` flags.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), i32> {
        let reply = self.call(14, node, Msg::new().u32(flags.cast_unsigned()).u32(0))?;
        Ok((u64_at(&reply, 0), u32_at(&reply, 8)))
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Result<(), i32> {
        self.call(18, node, Msg::new().u64(fh).u32(0).u32(0).u64(0)).map(drop)
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = Msg::new().u64(fh).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        self.call_with_room(15, node, &body, size as usize)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.write_with(node, fh, offset, data, 0, 0)
    }

    pub fn write_with(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
        open_flags: i32,
    ) -> Result<u32, i32> {
        let head = Msg::new().u64(fh).u64(offset).u32(data.len() as u32).u32(write_flags).u64(0);
        let body = head.u32(open_flags.cast_unsigned()).u32(0).bytes(data);
        self.call(16, node, body).map(|reply| u32_at(&reply, 0))
    }

    pub fn rename2(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        self.call(45, from.0, Msg::new().u64(to.0).u32(flags).u32(0).name(from.1).name(to.1)).map(drop)
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        self.call(10, parent, Msg::new().name(name)).map(drop)
    }

    pub fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let head = Msg::new().u32(value.len() as u32).u32(0).u32(0).u32(0);
        self.call(21, node, head.name(name).bytes(value)).map(drop)
    }

    pub fn getxattr(&mut self, node: u64, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        self.call_with_room(22, node, &Msg::new().u32(size).u32(0).name(name), size.max(8) as usize)
    }

    pub fn listxattr(&mut self, node: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.call_with_room(23, node, &Msg::new().u32(size).u32(0), size.max(8) as usize)
    }

    pub fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        self.call(27, node, Msg::new().u32(0).u32(0)).map(|reply| u64_at(&reply, 0))
    }

    pub fn readdir(&mut self, node: u64, fh: u64, offset: u64, size: u32, plus: bool) -> Result<Vec<Row>, i32> {
        let body = Msg::new().u64(fh).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        let reply = self.call_with_room(if plus { 44 } else { 28 }, node, &body, size as usize)?;
        let mut rows = Vec::new();
        let mut at = 0;
        while at < reply.len() {
            let node = if plus { u64_at(&reply, at) } else { 0 };
            at += if plus { 128 } else { 0 };
            let len = u32_at(&reply, at + 16) as usize;
            rows.push(Row {
                name: String::from_utf8(reply[at + 24..at + 24 + len].to_vec()).unwrap(),
                node,
                ino: u64_at(&reply, at),
                next: u64_at(&reply, at + 8),
                kind: u32_at(&reply, at + 20),
            });
            at = (at + 24 + len).next_multiple_of(8);
        }
        Ok(rows)
    }

    /// A whole listing.
    pub fn list(&mut self, node: u64, plus: bool) -> Vec<Row> {
        let fh = self.opendir(node).unwrap();
        let mut rows: Vec<Row> = Vec::new();
        loop {
            let offset = rows.last().map_or(0, |row| row.next);
            let more = self.readdir(node, fh, offset, 4096, plus).unwrap();
            if more.is_empty() {
                self.call(29, node, Msg::new().u64(fh).u32(0).u32(0).u64(0)).unwrap();
                return rows;
            }
            rows.extend(more);
        }
    }
}

pub fn open_path(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory that goes away with the test.
pub fn scratch() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    (dir, path)
}
