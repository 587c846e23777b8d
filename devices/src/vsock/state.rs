//! The device's state in a snapshot, and how streams go from one device to the next.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent};

use super::VsockHost;
use super::connection::{Connection, ConnectionKey, Owed, Phase, Shutdown};
use super::credit::Credit;
use super::device::Vsock;
use super::packet::Header;
use super::socket::Socket;
use super::table::{Entry, MAX_CONNECTIONS};
use super::transmit::MAX_REPLIES;

/// Names a connection in a [`VsockState`], also when its ports are in use by another one already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnectionId(u64);

/// Why a saved device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state contradicts itself.
    #[error("the saved vsock state is invalid: {0}")]
    Invalid(&'static str),
    /// The host has no resources for it, or the context identifier or the handle cannot be used.
    #[error("the vsock device cannot be built: {0}")]
    Host(#[from] io::Error),
}

/// Everything the device knows, listeners aside: those are the host's. Untrusted when it comes from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    guest_cid: u64,
    next_id: u64,
    next_port: u32,
    owes_transport_reset: bool,
    replies: Vec<Header>,
    connections: Vec<ConnectionState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ConnectionState {
    id: ConnectionId,
    key: ConnectionKey,
    phase: Phase,
    credit: Credit,
    guest: u32,
    host: u32,
    told: u32,
    owed: u8,
    asked: bool,
    pending: Vec<u8>,
    /// The host end is there: a stream must come with the state.
    streaming: bool,
    call: Option<u64>,
}

impl VsockState {
    /// The connections that had a live host end, with their ids.
    pub fn streams(&self) -> impl Iterator<Item = (ConnectionId, ConnectionKey)> {
        self.connections.iter().filter(|saved| saved.streaming).map(|saved| (saved.id, saved.key))
    }

    fn check(&self) -> Result<(), RestoreError> {
        let invalid = |why| Err(RestoreError::Invalid(why));
        if self.connections.len() > MAX_CONNECTIONS || self.replies.len() > MAX_REPLIES {
            return invalid("more connections or replies than a device can have");
        }
        let mut ids = HashSet::new();
        let mut keys = HashSet::new();
        for saved in &self.connections {
            if saved.id.0 >= self.next_id || !ids.insert(saved.id) {
                return invalid("a connection's id is not unique");
            }
            if saved.phase != Phase::Lingering && !keys.insert(saved.key) {
                return invalid("two connections have the same ports");
            }
            let held = saved.credit.is_consistent() && saved.credit.held() as usize == saved.pending.len();
            if !held {
                return invalid("a connection's bytes do not match its credit");
            }
        }
        Ok(())
    }
}

impl ConnectionState {
    fn save(id: u64, entry: &Entry) -> Self {
        let connection = &entry.connection;
        Self {
            id: ConnectionId(id),
            key: connection.key,
            phase: connection.phase,
            credit: connection.credit.clone(),
            guest: connection.guest.bits(),
            host: connection.host.bits(),
            told: connection.told.bits(),
            owed: connection.owed.bits(),
            asked: connection.asked,
            pending: connection.pending.iter().copied().collect(),
            streaming: entry.socket.is_some(),
            call: entry.call,
        }
    }

    fn restore(&self) -> Connection {
        Connection {
            key: self.key,
            phase: self.phase,
            credit: self.credit.clone(),
            guest: Shutdown::from_bits_truncate(self.guest),
            host: Shutdown::from_bits_truncate(self.host),
            told: Shutdown::from_bits_truncate(self.told),
            owed: Owed::from_bits_truncate(self.owed),
            pending: VecDeque::from(self.pending.clone()),
            asked: self.asked,
        }
    }
}

impl Vsock {
    /// The state for a snapshot. The event loop must be parked.
    #[must_use]
    pub fn save(&self) -> VsockState {
        let mut connections: Vec<_> = self.table.iter().map(|(id, entry)| ConnectionState::save(id, entry)).collect();
        // In an order that does not depend on a hash, so that equal devices have equal states.
        connections.sort_by_key(|saved| saved.id.0);
        VsockState {
            guest_cid: self.guest_cid,
            next_id: self.table.next_id(),
            next_port: self.table.next_port(),
            owes_transport_reset: self.owes_transport_reset,
            replies: self.replies.iter().copied().collect(),
            connections,
        }
    }

    /// Gives the device's ends of all streams away, to [`restore`](Self::restore) a device with: in this
    /// process with the same [`VsockHost`], whose listeners, waiting calls and streams live on, or in
    /// another one that gets the descriptors. This device does nothing any more. Call it after [`save`](Self::save).
    pub fn detach(&mut self) -> Vec<(ConnectionId, OwnedFd)> {
        let mut streams = Vec::new();
        for id in self.table.ids() {
            if let Some(socket) = self.table.get(id).and_then(|entry| entry.socket.take()) {
                let _ = self.epoll.ctl(ControlOperation::Delete, socket.as_raw_fd(), EpollEvent::default());
                streams.push((ConnectionId(id), socket.into_fd()));
            }
        }
        if !std::mem::replace(&mut self.detached, true) {
            self.shared.detach();
        }
        streams
    }

    /// A device as it was saved, attached to `host`, with the streams that are still there.
    ///
    /// A connection whose stream is missing is reset. Without any stream, as after the start from a
    /// template, or with another `guest_cid` than the saved one, all connections are: the driver is told
    /// by `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, on which it also reads its identifier again (5.10.6.7).
    ///
    /// # Errors
    /// [`RestoreError`].
    pub fn restore(
        host: &VsockHost,
        guest_cid: u64,
        state: &VsockState,
        streams: Vec<(ConnectionId, OwnedFd)>,
    ) -> Result<Self, RestoreError> {
        state.check()?;
        let mut this = Self::attached_to(host, guest_cid)?;
        this.table.continue_from(state.next_id, state.next_port);
        this.owes_transport_reset = state.owes_transport_reset;
        let same_guest = guest_cid == state.guest_cid;
        if !same_guest || streams.is_empty() {
            let any_lost = state.connections.iter().any(|saved| saved.phase != Phase::Lingering);
            this.owes_transport_reset |= !same_guest || any_lost;
            return Ok(this);
        }
        for reply in &state.replies {
            this.replies.push(*reply);
        }
        let mut streams: HashMap<_, _> = streams.into_iter().collect();
        for saved in &state.connections {
            this.restore_connection(saved, streams.remove(&saved.id))?;
        }
        Ok(this)
    }

    fn restore_connection(&mut self, saved: &ConnectionState, stream: Option<OwnedFd>) -> Result<(), RestoreError> {
        let id = saved.id.0;
        let socket = stream.map(Socket::adopt).transpose()?;
        if let Some(socket) = &socket {
            self.watch(id, socket)?;
        }
        let lost = saved.streaming && socket.is_none();
        let mut connection = saved.restore();
        if lost {
            connection.host_stopped_reading();
            if connection.phase != Phase::Lingering {
                connection.reset();
            }
        }
        let call = saved.call.filter(|call| self.shared.is_started(*call));
        let keyed = connection.phase != Phase::Lingering;
        self.table.insert_as(id, connection, socket, call, keyed);
        self.follow_up(id);
        Ok(())
    }
}
