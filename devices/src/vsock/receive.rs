//! Host to guest: fills the receive queue.

use log::debug;

use super::connection::Phase;
use super::device::{RX, TURN, Vsock};
use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD};
use super::streams::read_ended;
use super::table::Entry;
use crate::virtio::queue::Buffers;

impl Vsock {
    /// Gives the guest what waits for it, one packet per connection in turn; true when there is more after this turn.
    pub(super) fn fill(&mut self) -> bool {
        let Some(memory) = self.queues.memory() else { return false };
        let mut used = false;
        let mut more = true;
        // Kicks of this queue matter only while it lacks buffers.
        self.queues.disable_kicks(RX);
        for _ in 0..TURN {
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
            match self.next_packet(chain.writer(&memory)) {
                Some(len) => {
                    self.queues.add_used(RX, chain.head(), len);
                    used = true;
                }
                None => self.queues.undo_pop(RX),
            }
        }
        if used {
            self.queues.notify(RX);
        }
        more && self.has_work()
    }

    fn has_work(&self) -> bool {
        !self.replies.is_empty() || self.table.has_ready()
    }

    /// Writes the next packet into `buffers` and says how long it is; None when there is none after all.
    fn next_packet(&mut self, mut buffers: Buffers<'_>) -> Option<usize> {
        let body = buffers.split_off(HEADER_SIZE);
        if buffers.remaining() < HEADER_SIZE {
            debug!("a vsock receive buffer is too small for a header: given back empty");
            return Some(0);
        }
        if let Some(reply) = self.replies.pop() {
            return Some(write(buffers, &reply));
        }
        while let Some(id) = self.table.dequeue() {
            let Some(entry) = self.table.get(id) else { continue };
            let was_resetting = entry.connection.phase == Phase::Resetting;
            let header = packet_from(entry, self.guest_cid, &body);
            if was_resetting && header.is_some() {
                // The guest has its RST: this connection is history.
                self.abandon(id, std::io::ErrorKind::ConnectionRefused);
            } else {
                self.follow_up(id);
            }
            if let Some(header) = header {
                return Some(write(buffers, &header));
            }
        }
        None
    }
}

fn write(mut buffers: Buffers<'_>, header: &Header) -> usize {
    buffers.write(&header.encode()) + header.len as usize
}

/// The next packet of one connection; its payload is read straight into `body`.
fn packet_from(entry: &mut Entry, guest_cid: u64, body: &Buffers<'_>) -> Option<Header> {
    if let Some(header) = entry.connection.next_control(guest_cid) {
        return Some(header);
    }
    while entry.readable && entry.connection.wants_host_data() {
        let credit = entry.connection.allowance().min(MAX_PAYLOAD) as usize;
        let room = body.remaining().min(credit);
        let Some(socket) = entry.socket.as_ref().filter(|_| credit > 0) else { break };
        if room == 0 {
            // A buffer for nothing but headers. An empty packet uses it up; the next may be longer.
            return Some(entry.connection.data_header(guest_cid, 0));
        }
        match socket.receive_into(body, room) {
            Ok(len) if len > 0 => {
                // Never more than `room`, which fits.
                let len = u32::try_from(len).unwrap_or(MAX_PAYLOAD);
                return Some(entry.connection.data_header(guest_cid, len));
            }
            outcome => read_ended(entry, &outcome),
        }
    }
    entry.connection.next_control(guest_cid)
}
