//! A driver of the network device, and the other end of its backend.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use katavm_devices::memory::GuestMemory;
use katavm_devices::net::{Backend, Net, NetConfig, NetLimits, Offloads};

use crate::common::{CONFIG, F_EVENT_IDX, Machine, writable};

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const MAC: [u8; 6] = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];

pub const F_MRG_RXBUF: u64 = 1 << 15;

/// Where the buffers of the receive queue are.
const ROOMS: u64 = 32 << 20;

/// One end of a pair of sockets that keep packets apart, as a tap does.
pub struct Wire {
    socket: UnixDatagram,
    pub offloads: Arc<Mutex<Vec<Offloads>>>,
    /// The queue's switch.
    pub switched: Arc<Mutex<Vec<bool>>>,
}

impl Wire {
    /// The device's end and the test's.
    pub fn pair() -> (Self, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Self { socket: ours, offloads: Arc::default(), switched: Arc::default() }, theirs)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Backend for Wire {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offloads.lock().unwrap().push(offloads);
        Ok(())
    }

    fn set_queue(&self, on: bool) -> io::Result<()> {
        self.switched.lock().unwrap().push(on);
        Ok(())
    }
}

pub fn settings() -> NetConfig {
    NetConfig { mac: MAC, mtu: Some(1500), offloads: Offloads::all(), pairs: 1, limits: NetLimits::default() }
}

/// A device that its driver has started, without a backend.
pub struct Driver {
    pub machine: Machine,
    pub net: Arc<Mutex<Net>>,
}

impl Driver {
    pub fn new() -> Self {
        Self::with(settings(), !F_EVENT_IDX)
    }

    /// With all offered features that are in `accepted`.
    pub fn with(settings: NetConfig, accepted: u64) -> Self {
        let net = Arc::new(Mutex::new(Net::new(settings).unwrap()));
        let mut machine = Machine::new(net.clone());
        let features = machine.offered() & accepted;
        machine.start_with(features);
        Self { machine, net }
    }

    /// With a backend; the test's end of it.
    pub fn attached() -> (Self, UnixDatagram) {
        Self::new().attach()
    }

    pub fn attach(self) -> (Self, UnixDatagram) {
        let (wire, far) = Wire::pair();
        self.net.lock().unwrap().attach(wire).unwrap();
        (self, far)
    }

    /// The device's parts for another machine that goes on in the same memory.
    pub fn memory(&self) -> GuestMemory {
        self.machine.memory.clone()
    }

    /// Gives the device `count` buffers of `len` bytes, heads 0, 1, and so on, all bytes 0xaa.
    pub fn offer_rooms(&mut self, heads: std::ops::Range<u16>, len: u32) {
        for head in heads {
            let address = room_address(head, len);
            self.machine.put(address, &vec![0xaa; len as usize]);
            self.machine.describe(self.machine.rings[RX].desc, head, writable(address, len));
            self.machine.offer(RX, head);
        }
        self.machine.kick(RX);
    }

    /// What came since the last call, by buffer: head and bytes.
    pub fn received(&mut self, len: u32) -> Vec<(u16, Vec<u8>)> {
        self.machine.run();
        let used = self.machine.used(RX);
        let bytes = |(head, used): (u32, u32)| {
            let head = head as u16;
            (head, self.machine.take(room_address(head, len), used as usize))
        };
        used.into_iter().map(bytes).collect()
    }

    /// The status field of the configuration space.
    pub fn link_status(&mut self) -> u16 {
        let mut bytes = [0; 2];
        self.machine.transport.read(CONFIG + 6, &mut bytes);
        u16::from_le_bytes(bytes)
    }
}

fn room_address(head: u16, len: u32) -> u64 {
    ROOMS + u64::from(head) * u64::from(len)
}

/// A packet with a header that asks for nothing: `len` bytes after it, which tell `seed`.
pub fn packet(len: usize, seed: u8) -> Vec<u8> {
    let content = (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed));
    [0; 12].into_iter().chain(content).collect()
}

/// What the driver finds of it: the number of buffers is in the header.
pub fn in_buffers(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[10..12].copy_from_slice(&buffers.to_le_bytes());
    packet
}
