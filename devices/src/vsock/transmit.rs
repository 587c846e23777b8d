//! Guest to host: packets of the transmit queue.

use std::collections::VecDeque;
use std::io;

use log::debug;

use super::connection::{Connection, ConnectionKey, Shutdown, Verdict};
use super::device::{TURN, TX, Vsock};
use super::packet::{HEADER_SIZE, HOST_CID, Header, MAX_PAYLOAD, TYPE_STREAM, op};
use super::socket::Socket;
use super::streams::write_failed;
use super::table::Entry;
use crate::virtio::queue::Buffers;

/// Replies to packets of no connection that wait for a buffer. With so many of them the transmit
/// queue is left alone until the driver takes some (virtio 1.3, 5.10.6.1.1).
pub(super) const MAX_REPLIES: usize = 256;

/// RSTs for packets that belong to no connection.
#[derive(Default)]
pub(super) struct Replies {
    waiting: VecDeque<Header>,
    stalled: bool,
}

impl Replies {
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MAX_REPLIES
    }

    /// Whether the transmit queue waits for room here.
    pub fn stalled(&self) -> bool {
        self.stalled
    }

    pub fn push(&mut self, reply: Header) {
        self.waiting.push_back(reply);
    }

    pub fn pop(&mut self) -> Option<Header> {
        self.waiting.pop_front()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Header> {
        self.waiting.iter()
    }
}

impl Vsock {
    /// Handles packets of the guest; true when there may be more after this turn.
    pub(super) fn transmit(&mut self) -> bool {
        let Some(memory) = self.queues.memory() else { return false };
        self.replies.stalled = false;
        let mut used = false;
        let mut more = true;
        self.queues.disable_kicks(TX);
        for _ in 0..TURN {
            if !self.replies.has_room() {
                self.replies.stalled = true;
                more = false;
                break;
            }
            if let Some(chain) = self.queues.pop(TX) {
                self.packet(chain.reader(&memory));
                self.queues.add_used(TX, chain.head(), 0);
                used = true;
            } else if !self.queues.enable_kicks(TX) {
                more = false;
                break;
            }
        }
        if used {
            self.queues.notify(TX);
        }
        more
    }

    fn packet(&mut self, mut data: Buffers<'_>) {
        let mut bytes = [0; HEADER_SIZE];
        if data.read(&mut bytes) < HEADER_SIZE {
            return debug!("a vsock packet without a whole header is dropped");
        }
        let Some(header) = Header::decode(&bytes) else { return };
        if header.src_cid != self.guest_cid {
            return debug!("a vsock packet from CID {} is dropped", header.src_cid);
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(&header, "it is for another host, or of another socket type");
        }
        let key = ConnectionKey { host_port: header.dst_port, guest_port: header.src_port };
        match self.table.find(key) {
            Some(id) => self.packet_of(id, &header, data),
            None if header.op == op::REQUEST => self.request(key, &header),
            None => self.refuse(&header, "there is no such connection"),
        }
    }

    fn refuse(&mut self, header: &Header, why: &str) {
        debug!("vsock packet {header:?} refused: {why}");
        // Two ends that reset each other's resets would never stop.
        if header.op != op::RST {
            self.replies.push(header.reset_reply());
        }
    }

    fn packet_of(&mut self, id: u64, header: &Header, data: Buffers<'_>) {
        let Some(entry) = self.table.get(id) else { return };
        let has_payload = header.op == op::RW;
        let verdict = if has_payload && (header.len > MAX_PAYLOAD || header.len as usize > data.remaining()) {
            entry.connection.violation("a payload longer than it may be, or than its buffers")
        } else {
            entry.connection.receive(header)
        };
        match verdict {
            Verdict::Done => {}
            Verdict::Data => take_payload(entry, data, header.len as usize),
            Verdict::Accepted => {
                if let Some(call) = entry.call.take() {
                    self.shared.answer(call, Ok(()));
                }
            }
            Verdict::Reset => return self.abandon(id, io::ErrorKind::ConnectionRefused),
            Verdict::Violation(what) => debug!("vsock connection {:?} is reset: {what}", entry.connection.key),
        }
        self.follow_up(id);
    }

    /// The guest wants to connect: to a port that somebody listens on, or not at all.
    fn request(&mut self, key: ConnectionKey, header: &Header) {
        let Some(backlog) = self.shared.port(key.host_port) else {
            return self.refuse(header, "nobody listens there");
        };
        if self.table.is_full() || !backlog.has_room() {
            return self.refuse(header, "there are too many connections");
        }
        let opened = Socket::pair().and_then(|(socket, stream)| {
            self.open(Connection::incoming(key, header), socket, None)?;
            backlog.push(stream)
        });
        if let Err(error) = opened {
            log::warn!("no vsock connection {key:?}: {error}");
            match self.table.find(key) {
                Some(id) => self.reset_connection(id),
                None => self.refuse(header, "the host has no resources"),
            }
        }
    }
}

/// Moves a payload into the socket, straight from guest memory; keeps what does not fit.
fn take_payload(entry: &mut Entry, mut data: Buffers<'_>, len: usize) {
    let mut left = len;
    while left > 0
        && entry.writable
        && entry.connection.pending.is_empty()
        && let Some(socket) = &entry.socket
    {
        match socket.send_from(&data, left) {
            Ok(0) => break,
            Ok(sent) => {
                data.consume(sent);
                left -= sent;
                entry.connection.passed(sent);
            }
            Err(error) => write_failed(entry, &error),
        }
        if entry.connection.host.contains(Shutdown::RECEIVE) {
            break;
        }
    }
    if entry.socket.is_none() || entry.connection.host.contains(Shutdown::RECEIVE) {
        return entry.connection.passed(left);
    }
    let mut scratch = [0; 4096];
    while left > 0 {
        let part = scratch.len().min(left);
        let Some(buffer) = scratch.get_mut(..part) else { break };
        let read = data.read(buffer);
        entry.connection.hold(buffer.get(..read).unwrap_or_default());
        left = if read == 0 { 0 } else { left - read };
    }
}
