//! Host to guest.

use std::collections::VecDeque;
use std::io;

use log::debug;

use super::backend::{Backend, is_lost};
use super::header;
use super::layout::{HEADER, PACKET_MAX, RX, TURN};
use super::pair::Pair;
use crate::memory::GuestMemory;
use crate::virtio::queue::Chain;

/// Pieces of memory in one readv(2).
const PIECES: usize = libc::UIO_MAXIOV as usize;

/// Buffers that were taken from the queue for packets to come. One read takes the longest packet there can be
/// and mostly gets a shorter one: what is left is for the next.
#[derive(Default)]
pub(super) struct Rooms {
    chains: VecDeque<Room>,
    bytes: usize,
    /// Where they all are in this process, in order.
    vectors: Vectors,
}

struct Room {
    chain: Chain,
    bytes: usize,
    /// How many of the vectors are its.
    pieces: usize,
}

/// Pieces of guest memory, for a system call that fills them.
#[derive(Default)]
struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are into guest memory, which is every thread's alike and stays mapped for as long as the queue is
// active; they are looked at in system calls only, by whoever holds the queue.
unsafe impl Send for Vectors {}

impl Rooms {
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn push(&mut self, chain: Chain, memory: &GuestMemory) {
        let (bytes, before) = (chain.writable_len(), self.vectors.0.len());
        chain.extend_writable(memory, &mut self.vectors.0);
        self.bytes += bytes;
        let pieces = self.vectors.0.len() - before;
        self.chains.push_back(Room { chain, bytes, pieces });
    }

    /// Takes out the chains that the first `len` bytes are in, with how much of each.
    fn take(&mut self, len: usize) -> Vec<(u16, u32)> {
        let (mut left, mut pieces) = (len, 0);
        let mut taken = Vec::new();
        while left > 0
            && let Some(room) = self.chains.pop_front()
        {
            self.bytes -= room.bytes;
            pieces += room.pieces;
            let part = room.bytes.min(left);
            left -= part;
            // A room is a chain, and those have at most 2^32 - 1 bytes here: the header's room was checked.
            taken.push((room.chain.head(), u32::try_from(part).unwrap_or(u32::MAX)));
        }
        self.vectors.0.drain(..pieces);
        taken
    }

    /// Writes the header into the first room.
    fn head(&self, memory: &GuestMemory, change: impl FnOnce([u8; HEADER]) -> Option<[u8; HEADER]>) -> bool {
        let Some(mut buffers) = self.chains.front().map(|room| room.chain.writer(memory)) else { return false };
        let mut bytes = [0; HEADER];
        if buffers.clone().read(&mut bytes) < HEADER {
            return false;
        }
        change(bytes).is_some_and(|header| buffers.write(&header) == HEADER)
    }
}

/// What reading gave.
enum Got {
    /// A packet of so many bytes, header included.
    Packet(usize),
    /// One that the rooms were too small for, or that is none.
    Unusable,
    /// None any more. An event tells when there is one.
    Nothing,
    /// An error. It says nothing about the next packet.
    Failure(io::Error),
    /// The backend is gone.
    Lost(io::Error),
}

impl Pair {
    /// Gives the guest the packets that wait for it; true when there may be more after this turn.
    pub(super) fn receive(&mut self) -> bool {
        if self.stale_rooms {
            // Taken by the device that was saved.
            self.queues.put_back(RX);
            self.stale_rooms = false;
        }
        let Some(memory) = self.queues.memory() else { return false };
        let mut used = false;
        let mut budget = TURN;
        // Kicks of this queue matter only while it lacks buffers.
        self.queues.disable_kicks(RX);
        while budget > 0
            && self.port.readable
            && self.port.open
            && self.may_receive()
            && self.gather(&memory, &mut used, &mut budget)
        {
            budget -= 1;
            used |= self.packet(&memory);
        }
        if used {
            self.queues.notify(RX);
        }
        budget == 0 && self.queues.is_active()
    }

    /// Takes buffers until there is room for whatever comes; false when there are too few now. Buffers without a use
    /// count as packets.
    fn gather(&mut self, memory: &GuestMemory, used: &mut bool, budget: &mut usize) -> bool {
        let (bytes, chains) = self.room_needed();
        while self.rooms.bytes < bytes && self.rooms.chains.len() < chains {
            let Some(chain) = self.queues.pop(RX) else {
                if self.queues.enable_kicks(RX) {
                    continue;
                }
                return false;
            };
            let room = chain.writable_len();
            if room > HEADER && u32::try_from(room).is_ok() {
                self.rooms.push(chain, memory);
            } else {
                debug!("a receive buffer of {room} bytes has no use: given back empty");
                self.queues.add_used(RX, chain.head(), 0);
                *used = true;
                *budget -= 1;
                if *budget == 0 {
                    return false;
                }
            }
        }
        self.queues.is_active()
    }

    /// How many bytes the longest packet takes, and how many buffers there may be for it.
    fn room_needed(&self) -> (usize, usize) {
        if !self.terms.mergeable {
            return (PACKET_MAX, 1);
        }
        (if self.terms.to_guest.segments() { PACKET_MAX } else { self.terms.frame_max }, usize::MAX)
    }

    /// Moves one packet; true when buffers were used.
    fn packet(&mut self, memory: &GuestMemory) -> bool {
        match read(self.port.backend(), &mut self.rooms) {
            Got::Packet(len) => {
                self.owe(len - HEADER);
                return self.deliver(len, memory);
            }
            Got::Unusable => debug!("a packet that does not fit into the guest's buffers is dropped"),
            Got::Nothing => self.port.readable = false,
            Got::Failure(error) => {
                debug!("cannot read a packet: {error}");
                self.port.readable = false;
            }
            Got::Lost(error) => self.lose(error),
        }
        false
    }

    fn deliver(&mut self, len: usize, memory: &GuestMemory) -> bool {
        let accepted = self.terms.to_guest;
        let mut left = len;
        let buffers = self.rooms.chains.iter().take_while(|room| {
            let needed = left > 0;
            left = left.saturating_sub(room.bytes);
            needed
        });
        let count = u16::try_from(buffers.count()).unwrap_or(u16::MAX);
        if !self.rooms.head(memory, |bytes| header::for_driver(bytes, accepted, count)) {
            debug!("a packet of {len} bytes that the driver cannot take is dropped");
            return false;
        }
        // All at once: a driver that finds the first buffer of a packet expects the others to be there.
        let chains = self.rooms.take(len);
        self.queues.add_used_together(RX, &chains);
        true
    }
}

/// Reads one packet straight into guest memory.
fn read(backend: Option<&dyn Backend>, rooms: &mut Rooms) -> Got {
    let Some(backend) = backend else { return Got::Nothing };
    let vectors = &mut rooms.vectors.0;
    // A packet that was cut off is told by nothing but this byte, which comes after all others.
    let mut spare = 0u8;
    let last = vectors.len().min(PIECES - 1);
    vectors.insert(last, libc::iovec { iov_base: (&raw mut spare).cast(), iov_len: 1 });
    let got = read_into(backend, &vectors[..=last]);
    vectors.remove(last);
    got
}

/// The last of `vectors` is one byte that no packet should reach.
fn read_into(backend: &dyn Backend, vectors: &[libc::iovec]) -> Got {
    let room = vectors.iter().map(|vector| vector.iov_len).sum::<usize>() - 1;
    loop {
        // SAFETY: the vectors describe guest memory, which stays mapped while its queue is active, and a byte of the
        // caller's; nothing in this process relies on what is in them.
        let error = match unsafe { backend.read(vectors) } {
            // A tap never gives an empty packet; a socket does when its other end is closed.
            Ok(0) => return Got::Lost(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) if (HEADER..=room).contains(&len) => return Got::Packet(len),
            Ok(_) => return Got::Unusable,
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Got::Nothing,
            _ if is_lost(&error) => return Got::Lost(error),
            _ => return Got::Failure(error),
        }
    }
}
