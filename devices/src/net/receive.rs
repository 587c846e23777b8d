//! Host to guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use log::debug;

use super::backend::Backend;
use super::device::Net;
use super::header;
use super::layout::{F_MRG_RXBUF, HEADER, PACKET_MAX, RX, TURN};
use crate::memory::GuestMemory;
use crate::virtio::queue::Chain;

/// Pieces of memory in one readv(2).
const PIECES: usize = libc::UIO_MAXIOV as usize;

/// Buffers that were taken from the queue for packets to come. One read takes the longest packet there can be
/// and mostly gets a shorter one: what is left is for the next.
#[derive(Default)]
pub(super) struct Rooms {
    chains: VecDeque<Chain>,
    bytes: usize,
}

impl Rooms {
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn push(&mut self, chain: Chain) {
        self.bytes += chain.writable_len();
        self.chains.push_back(chain);
    }

    /// Takes out the chains that the first `len` bytes are in, with how much of each.
    fn take(&mut self, len: usize) -> Vec<(u16, u32)> {
        let mut left = len;
        let mut taken = Vec::new();
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let room = chain.writable_len();
            self.bytes -= room;
            let part = room.min(left);
            left -= part;
            // A room is a chain, and those have at most 2^32 - 1 bytes here: the header's room was checked.
            taken.push((chain.head(), u32::try_from(part).unwrap_or(u32::MAX)));
        }
        taken
    }

    /// Writes the header into the first room.
    fn head(&self, memory: &GuestMemory, change: impl FnOnce([u8; HEADER]) -> Option<[u8; HEADER]>) -> bool {
        let Some(mut buffers) = self.chains.front().map(|chain| chain.writer(memory)) else { return false };
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

impl Net {
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
        while budget > 0 && self.link.readable && self.gather(&mut used, &mut budget) {
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
    fn gather(&mut self, used: &mut bool, budget: &mut usize) -> bool {
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
                self.rooms.push(chain);
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
        if self.features & F_MRG_RXBUF == 0 {
            return (PACKET_MAX, 1);
        }
        (if self.to_guest().segments() { PACKET_MAX } else { self.frame_max() }, usize::MAX)
    }

    /// Moves one packet; true when buffers were used.
    fn packet(&mut self, memory: &GuestMemory) -> bool {
        let got = read(self.link.backend(), &self.rooms, memory);
        match got {
            Got::Packet(len) => return self.deliver(len, memory),
            Got::Unusable => debug!("a packet that does not fit into the guest's buffers is dropped"),
            Got::Nothing => self.link.readable = false,
            Got::Failure(error) => {
                debug!("cannot read a packet: {error}");
                self.link.readable = false;
            }
            Got::Lost(error) => self.lose(&error),
        }
        false
    }

    fn deliver(&mut self, len: usize, memory: &GuestMemory) -> bool {
        let accepted = self.to_guest();
        let mut left = len;
        let buffers = self.rooms.chains.iter().take_while(|chain| {
            let needed = left > 0;
            left = left.saturating_sub(chain.writable_len());
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
fn read(backend: Option<&dyn Backend>, rooms: &Rooms, memory: &GuestMemory) -> Got {
    let Some(backend) = backend else { return Got::Nothing };
    let mut vectors = Vec::with_capacity(rooms.chains.len());
    for chain in &rooms.chains {
        chain.extend_iovecs(memory, &mut vectors);
        if vectors.len() >= PIECES {
            vectors.truncate(PIECES - 1);
            break;
        }
    }
    let room: usize = vectors.iter().map(|vector| vector.iov_len).sum();
    // A packet that was cut off is told by nothing but this byte.
    let mut spare = 0u8;
    vectors.push(libc::iovec { iov_base: (&raw mut spare).cast(), iov_len: 1 });
    let count = i32::try_from(vectors.len()).unwrap_or(libc::UIO_MAXIOV);
    loop {
        // SAFETY: the descriptor is open, and the vectors describe guest memory that stays mapped while `memory`
        // lives, and `spare`; nothing in this process relies on what is in them.
        let got = unsafe { libc::readv(backend.as_fd().as_raw_fd(), vectors.as_ptr(), count) };
        let error = match usize::try_from(got) {
            // A tap never gives an empty packet; a socket does when its other end is closed.
            Ok(0) => return Got::Lost(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) if (HEADER..=room).contains(&len) => return Got::Packet(len),
            Ok(_) => return Got::Unusable,
            Err(_) => io::Error::last_os_error(),
        };
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return Got::Nothing,
            Some(libc::EBADFD | libc::ENODEV | libc::EPIPE) => return Got::Lost(error),
            _ => return Got::Failure(error),
        }
    }
}
