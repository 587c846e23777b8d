//! Connections and their sockets: what follows from what happened to either.

use std::io;
use std::net::Shutdown as Half;
use std::os::fd::AsRawFd;

use event_manager::EventSet;
use log::{debug, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::connection::{Connection, ConnectionKey, Phase, Shutdown};
use super::device::Vsock;
use super::host::Command;
use super::socket::Socket;
use super::table::Entry;

impl Vsock {
    /// Does what the host asked for.
    pub(super) fn commands(&mut self) {
        while let Some(command) = self.shared.command() {
            match command {
                Command::Connect { call, port } => {
                    if let Err(error) = self.connect(call, port) {
                        self.shared.answer(call, Err(error));
                    }
                }
                Command::Cancel { call } => {
                    let started = self.table.iter().find(|(_, entry)| entry.call == Some(call)).map(|(id, _)| id);
                    if let Some(id) = started {
                        self.reset_connection(id);
                    }
                }
            }
        }
    }

    fn connect(&mut self, call: u64, guest_port: u32) -> Result<(), io::ErrorKind> {
        if self.table.is_full() {
            return Err(io::ErrorKind::ResourceBusy);
        }
        let shared = &self.shared;
        let free = self.table.free_port(guest_port, |port| shared.is_open(port));
        let host_port = free.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let (socket, stream) = Socket::pair().map_err(|error| error.kind())?;
        if self.shared.park(call, stream) {
            let connection = Connection::outgoing(ConnectionKey { host_port, guest_port });
            self.open(connection, socket, Some(call)).map_err(|error| error.kind())?;
        }
        Ok(())
    }

    /// Adds a connection with its socket and puts it into the line.
    pub(super) fn open(&mut self, connection: Connection, socket: Socket, call: Option<u64>) -> io::Result<()> {
        let id = self.table.next_id();
        self.watch(id, &socket)?;
        let id = self.table.insert(connection, Some(socket), call, true);
        self.table.enqueue(id);
        Ok(())
    }

    /// Watches a socket: on edges, so that nothing is heard twice of what cannot be taken at the moment
    /// (no credit, no buffers, a full socket), and no system call is needed to look away.
    pub(super) fn watch(&self, id: u64, socket: &Socket) -> io::Result<()> {
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), EpollEvent::new(interest, id))
    }

    /// A socket has news.
    pub(super) fn socket_event(&mut self, id: u64, events: EventSet) {
        let Some(entry) = self.table.get(id) else { return };
        let over = EventSet::HANG_UP | EventSet::ERROR;
        entry.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | over);
        entry.writable |= events.intersects(EventSet::OUT | over);
        entry.hung_up |= events.contains(EventSet::HANG_UP);
        self.follow_up(id);
    }

    /// The connection is over by a broken rule of the guest, or because the host gave it up.
    pub(super) fn reset_connection(&mut self, id: u64) {
        if let Some(entry) = self.table.get(id) {
            entry.connection.reset();
        }
        self.follow_up(id);
    }

    /// The guest knows the connection no more. The host end still gets what is pending, then its end.
    pub(super) fn abandon(&mut self, id: u64, why: io::ErrorKind) {
        let Some(entry) = self.table.get(id) else { return };
        entry.connection.phase = Phase::Lingering;
        entry.connection.owed = super::connection::Owed::empty();
        if let Some(call) = entry.call.take() {
            self.shared.answer(call, Err(why));
        }
        self.table.forget_key(id);
        self.follow_up(id);
    }

    /// Brings socket and connection into step after any change. Doing it twice does no harm.
    pub(super) fn follow_up(&mut self, id: u64) {
        let Some(entry) = self.table.get(id) else { return };
        flush(entry);
        hang_up(entry);
        let connection = &mut entry.connection;
        if connection.is_finished() {
            // A clean end: SHUTDOWN in both directions is answered by a RST (5.10.6.5).
            connection.reset();
        }
        let drained = connection.pending.is_empty();
        let over = match connection.phase {
            Phase::Resetting | Phase::Lingering => drained,
            Phase::Connecting => false,
            Phase::Open => connection.host.is_all(),
        };
        if over {
            close(&self.epoll, entry);
        }
        let refused = (entry.connection.phase == Phase::Resetting).then(|| entry.call.take()).flatten();
        let done = over && entry.connection.phase == Phase::Lingering;
        pass_on_ends(entry);
        if let Some(call) = refused {
            self.shared.answer(call, Err(io::ErrorKind::ConnectionRefused));
        }
        if done {
            self.table.remove(id);
        } else {
            self.table.enqueue(id);
        }
    }
}

/// Gives the socket what it takes of the pending bytes.
fn flush(entry: &mut Entry) {
    while entry.writable && !entry.connection.pending.is_empty() {
        let Some(socket) = &entry.socket else { return entry.connection.host_stopped_reading() };
        match socket.send(&entry.connection.pending_slices()) {
            Ok(len) => entry.connection.flushed(len),
            Err(error) => write_failed(entry, &error),
        }
    }
}

/// A write did not go through: there is no room, or no reader.
pub(super) fn write_failed(entry: &mut Entry, error: &io::Error) {
    match error.kind() {
        io::ErrorKind::WouldBlock => entry.writable = false,
        io::ErrorKind::Interrupted => {}
        kind => {
            if kind != io::ErrorKind::BrokenPipe && kind != io::ErrorKind::ConnectionReset {
                warn!("vsock connection {:?}: cannot write to the host end: {error}", entry.connection.key);
            }
            entry.connection.host_stopped_reading();
        }
    }
}

/// A read found no bytes: not yet, or never again.
pub(super) fn read_ended(entry: &mut Entry, outcome: &io::Result<usize>) {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => entry.readable = false,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
        // ECONNRESET: the host end was closed with bytes in it that nobody had read.
        _ => {
            debug!("vsock connection {:?}: the host end has no more ({outcome:?})", entry.connection.key);
            entry.readable = false;
            entry.connection.host |= Shutdown::SEND;
            if outcome.is_err() {
                entry.connection.host_stopped_reading();
            }
            hang_up(entry);
        }
    }
}

/// A host end that is closed, and whose bytes are all read or wanted by nobody, is done both ways.
fn hang_up(entry: &mut Entry) {
    let connection = &mut entry.connection;
    let read = connection.host.contains(Shutdown::SEND) || connection.guest.contains(Shutdown::RECEIVE);
    if entry.hung_up && read && !connection.host.is_all() {
        connection.host |= Shutdown::SEND;
        connection.host_stopped_reading();
    }
}

/// Half closes of the guest, as the host end sees them: no more bytes to read, or nobody to write to.
fn pass_on_ends(entry: &mut Entry) {
    let Some(socket) = &entry.socket else { return };
    let connection = &entry.connection;
    let mut ends = connection.guest;
    if connection.phase == Phase::Resetting || connection.phase == Phase::Lingering {
        ends |= Shutdown::RECEIVE;
    }
    if !connection.pending.is_empty() {
        ends -= Shutdown::SEND;
    }
    // Once each: every shutdown(2) is an event for our own end, so repeating it would never come to rest.
    let new = ends - entry.shut;
    entry.shut |= new;
    if new.contains(Shutdown::RECEIVE) {
        socket.shutdown(Half::Read);
    }
    if new.contains(Shutdown::SEND) {
        socket.shutdown(Half::Write);
    }
}

fn close(epoll: &Epoll, entry: &mut Entry) {
    entry.readable = false;
    if let Some(socket) = entry.socket.take() {
        // Before it is closed: a copy of the descriptor elsewhere would keep it in the set.
        let _ = epoll.ctl(ControlOperation::Delete, socket.as_raw_fd(), EpollEvent::default());
        socket.close();
    }
}
