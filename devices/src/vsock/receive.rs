//! Host to guest: fills the receive queue.

use log::debug;

use super::connection::Phase;
use super::device::{RX, TURN, Vsock};
use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD};
use super::streams::read_ended;
use super::table::Entry;
use crate::memory::GuestMemory;
use crate::virtio::queue::{Buffers, Chain, QueueSet};

/// Packets that connections which have much to say share, each filling as many by one read of its host end: so many come
/// before anybody's turn at most, or one of each who stands in line. Linux' driver has buffers of 4 KiB, so these are as
/// much as one connection may send it ahead of its reading (256 KiB).
const TOGETHER: usize = 64;

/// A buffer of the guest for one packet.
struct Room<'m> {
    chain: u16,
    header: Buffers<'m>,
    payload: Buffers<'m>,
}

impl<'m> Room<'m> {
    fn new(chain: &Chain, memory: &'m GuestMemory) -> Self {
        let mut header = chain.writer(memory);
        let payload = header.split_off(HEADER_SIZE);
        Self { chain: chain.head(), header, payload }
    }

    /// Whether not even a header fits.
    fn is_useless(&self) -> bool {
        self.header.remaining() < HEADER_SIZE
    }

    /// Puts the header before what is there already; the chain and how long the packet is.
    fn packet(&mut self, header: &Header) -> (u16, u32) {
        let written = self.header.write(&header.encode());
        (self.chain, u32::try_from(written).unwrap_or(u32::MAX).saturating_add(header.len))
    }
}

impl Vsock {
    /// Gives the guest what waits for it, each connection in turn; true when there is more after this turn.
    pub(super) fn fill(&mut self) -> bool {
        let Some(memory) = self.queues.memory() else { return false };
        let (mut used, mut more, mut left) = (false, true, TURN);
        // Kicks of this queue matter only while it lacks buffers.
        self.queues.disable_kicks(RX);
        while left > 0 {
            if !self.has_work() {
                more = false;
                break;
            }
            let Some(chain) = self.queues.pop(RX) else {
                if self.queues.enable_kicks(RX) {
                    continue;
                }
                more = false;
                break;
            };
            let packets = self.next_packets(Room::new(&chain, &memory), &memory);
            if !packets.is_empty() {
                self.queues.add_used_together(RX, &packets);
                used = true;
            }
            // Rooms that nothing came into.
            self.queues.put_back(RX);
            left = left.saturating_sub(packets.len().max(1));
        }
        if used {
            self.queues.notify(RX);
        }
        more && self.has_work()
    }

    fn has_work(&self) -> bool {
        !self.replies.is_empty() || self.table.has_ready()
    }

    /// Writes the next packet into `room`, or several of one connection into it and those after it; none when there is
    /// none after all.
    fn next_packets<'m>(&mut self, mut room: Room<'m>, memory: &'m GuestMemory) -> Vec<(u16, u32)> {
        if room.is_useless() {
            debug!("a vsock receive buffer is too small for a header: given back empty");
            return vec![(room.chain, 0)];
        }
        if let Some(reply) = self.replies.pop() {
            return vec![room.packet(&reply)];
        }
        let mut rooms = vec![room];
        while let Some(id) = self.table.dequeue() {
            let share = (TOGETHER / (self.table.in_line() + 1)).max(1);
            let Some(entry) = self.table.get(id) else { continue };
            let was_resetting = entry.connection.phase == Phase::Resetting;
            let supply = Supply { queues: &mut self.queues, memory, share };
            let packets = packets_from(entry, self.guest_cid, &mut rooms, supply);
            if was_resetting && !packets.is_empty() {
                // The guest has its RST: this connection is history.
                self.abandon(id, std::io::ErrorKind::ConnectionRefused);
            } else {
                self.follow_up(id);
            }
            if !packets.is_empty() {
                return packets;
            }
        }
        Vec::new()
    }
}

/// The next packet of one connection, or several if its host end has much to say: the payload is read straight into
/// `rooms`, of which there is one at least, and more are taken from the queue then.
fn packets_from<'m>(
    entry: &mut Entry,
    guest_cid: u64,
    rooms: &mut Vec<Room<'m>>,
    mut supply: Supply<'_, 'm>,
) -> Vec<(u16, u32)> {
    let control = |entry: &mut Entry, rooms: &mut Vec<Room<'m>>| -> Option<Vec<(u16, u32)>> {
        let header = entry.connection.next_control(guest_cid)?;
        Some(rooms.first_mut().map(|room| room.packet(&header)).into_iter().collect())
    };
    if let Some(packet) = control(entry, rooms) {
        return packet;
    }
    while entry.readable && entry.connection.wants_host_data() {
        let credit = entry.connection.allowance().min(MAX_PAYLOAD) as usize;
        let Some(socket) = entry.socket.as_ref().filter(|_| credit > 0) else { break };
        if entry.floods {
            supply.add_to(rooms, credit);
        }
        let len = room_of(rooms).min(credit);
        if len == 0 {
            // A buffer for nothing but headers. An empty packet uses it up; the next may be longer.
            let header = entry.connection.data_header(guest_cid, 0);
            return rooms.first_mut().map(|room| room.packet(&header)).into_iter().collect();
        }
        match socket.receive_into(rooms.iter().map(|room| &room.payload), len) {
            Ok(received) if received > 0 => {
                // It had more than there was room for, or as much.
                entry.floods = received == len;
                let mut left = received;
                let mut packets = Vec::with_capacity(rooms.len());
                for room in rooms.iter_mut() {
                    let part = room.payload.remaining().min(left);
                    if part == 0 {
                        break;
                    }
                    left -= part;
                    // All parts together are no more than `credit`, which fits.
                    let part = u32::try_from(part).unwrap_or(MAX_PAYLOAD);
                    packets.push(room.packet(&entry.connection.data_header(guest_cid, part)));
                }
                return packets;
            }
            outcome => read_ended(entry, &outcome),
        }
    }
    control(entry, rooms).unwrap_or_default()
}

/// How many bytes of payload all of them take.
fn room_of(rooms: &[Room<'_>]) -> usize {
    rooms.iter().map(|room| room.payload.remaining()).sum()
}

/// Where more rooms come from.
struct Supply<'q, 'm> {
    queues: &'q mut QueueSet,
    memory: &'m GuestMemory,
    /// How many there may be in all.
    share: usize,
}

impl<'m> Supply<'_, 'm> {
    /// Takes buffers from the queue for as long as they are few and there is credit for more. A first one that has room
    /// for nothing but a header stays alone: those that are filled must be the first of all.
    fn add_to(&mut self, rooms: &mut Vec<Room<'m>>, credit: usize) {
        let there = room_of(rooms);
        if there == 0 {
            return;
        }
        let mut room_left = credit.saturating_sub(there);
        while rooms.len() < self.share && room_left > 0 {
            let Some(chain) = self.queues.pop(RX) else { return };
            let room = Room::new(&chain, self.memory);
            let size = room.payload.remaining();
            if room.is_useless() || size == 0 {
                // It is looked at when it is the first one.
                return self.queues.undo_pop(RX);
            }
            room_left = room_left.saturating_sub(size);
            rooms.push(room);
        }
    }
}
