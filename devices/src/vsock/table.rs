//! All connections of a device, by id and by ports, and the order in which they may send.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, ConnectionKey, Shutdown};
use super::socket::Socket;

/// More connections than this are refused, lingering ones included.
pub(super) const MAX_CONNECTIONS: usize = 4096;

/// First host port of connections that the host starts.
pub(super) const FIRST_PORT: u32 = 0xc000_0000;
/// `VMADDR_PORT_ANY`, which is no port.
const ANY_PORT: u32 = u32::MAX;

/// A connection with its socket.
pub(super) struct Entry {
    pub connection: Connection,
    /// The device's end of the host's stream; None once there is nothing more to do with it.
    pub socket: Option<Socket>,
    /// The socket may have bytes, or an end, to read: it has not said otherwise since the last event.
    pub readable: bool,
    /// The last read of the socket filled all the room that it was given.
    pub floods: bool,
    /// The socket may have room.
    pub writable: bool,
    /// The host end is closed in both directions.
    pub hung_up: bool,
    /// The halves of the socket that are shut down, in the guest's terms.
    pub shut: Shutdown,
    /// The call of the host that waits for the guest's answer.
    pub call: Option<u64>,
    queued: bool,
}

impl Entry {
    /// Whether there is something for the guest that it may have now.
    pub fn has_work(&mut self) -> bool {
        if self.readable && self.connection.wants_host_data() && self.connection.allowance() > 0 {
            return true;
        }
        self.connection.has_control()
    }
}

/// The connections.
#[derive(Default)]
pub(super) struct Table {
    entries: HashMap<u64, Entry>,
    by_key: HashMap<ConnectionKey, u64>,
    ready: VecDeque<u64>,
    next_id: u64,
    next_port: u32,
}

impl Table {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_full(&self) -> bool {
        self.entries.len() >= MAX_CONNECTIONS
    }

    pub fn find(&self, key: ConnectionKey) -> Option<u64> {
        self.by_key.get(&key).copied()
    }

    pub fn get(&mut self, id: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Entry)> {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    pub fn ids(&self) -> Vec<u64> {
        self.entries.keys().copied().collect()
    }

    /// The id that the next connection gets.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// The port from which the next search for a free one starts.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Continues the counters of a saved table.
    pub fn continue_from(&mut self, next_id: u64, next_port: u32) {
        self.next_id = next_id;
        self.next_port = next_port;
    }

    /// Adds a connection whose key is free, or which has none any more.
    pub fn insert(&mut self, connection: Connection, socket: Option<Socket>, call: Option<u64>, keyed: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.insert_as(id, connection, socket, call, keyed);
        id
    }

    /// As [`insert`](Self::insert), under a saved id.
    pub fn insert_as(
        &mut self,
        id: u64,
        connection: Connection,
        socket: Option<Socket>,
        call: Option<u64>,
        keyed: bool,
    ) {
        if keyed {
            self.by_key.insert(connection.key, id);
        }
        // A new socket has room; whether it has bytes, its first event tells.
        let entry = Entry {
            connection,
            socket,
            readable: false,
            floods: false,
            writable: true,
            hung_up: false,
            shut: Shutdown::empty(),
            call,
            queued: false,
        };
        self.entries.insert(id, entry);
    }

    /// The guest knows the connection no more: its ports are free.
    pub fn forget_key(&mut self, id: u64) {
        if let Some(entry) = self.entries.get(&id)
            && self.by_key.get(&entry.connection.key) == Some(&id)
        {
            self.by_key.remove(&entry.connection.key);
        }
    }

    /// Takes a connection out.
    pub fn remove(&mut self, id: u64) -> Option<Entry> {
        self.forget_key(id);
        let entry = self.entries.remove(&id)?;
        if entry.queued {
            // Keeps the ring bounded by the table, whatever comes and goes.
            self.ready.retain(|queued| *queued != id);
        }
        Some(entry)
    }

    /// Puts a connection at the end of the line if it has something to send.
    pub fn enqueue(&mut self, id: u64) {
        if let Some(entry) = self.entries.get_mut(&id)
            && !entry.queued
            && entry.has_work()
        {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// How many connections stand in line.
    pub fn in_line(&self) -> usize {
        self.ready.len()
    }

    /// Whether any connection stands in line.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The first connection in line, which loses its place.
    pub fn dequeue(&mut self) -> Option<u64> {
        let id = self.ready.pop_front()?;
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.queued = false;
        }
        Some(id)
    }

    /// A host port for a connection to `guest_port`, which `taken` does not claim.
    pub fn free_port(&mut self, guest_port: u32, taken: impl Fn(u32) -> bool) -> Option<u32> {
        // One more try than there can be claims ends at a free port.
        for _ in 0..=(ANY_PORT - FIRST_PORT) {
            let port = self.next_port.clamp(FIRST_PORT, ANY_PORT - 1);
            self.next_port = if port + 1 == ANY_PORT { FIRST_PORT } else { port + 1 };
            if !taken(port) && !self.by_key.contains_key(&ConnectionKey { host_port: port, guest_port }) {
                return Some(port);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn add(table: &mut Table, host_port: u32, guest_port: u32) -> u64 {
        let key = ConnectionKey { host_port, guest_port };
        table.insert(Connection::outgoing(key), None, None, true)
    }

    #[test]
    fn ports_wrap_around_and_skip_what_is_taken() {
        let mut table = Table::default();
        assert_eq!(table.free_port(1, |_| false), Some(FIRST_PORT));
        table.continue_from(0, u32::MAX - 1);
        assert_eq!(table.free_port(1, |_| false), Some(u32::MAX - 1));
        add(&mut table, FIRST_PORT, 1);
        assert_eq!(table.free_port(1, |port| port == FIRST_PORT + 1), Some(FIRST_PORT + 2));
        table.continue_from(0, 5);
        assert_eq!(table.free_port(2, |_| false), Some(FIRST_PORT), "the same port serves another guest port");
    }

    #[test]
    fn a_lingering_connection_does_not_hold_its_ports() {
        let mut table = Table::default();
        let first = add(&mut table, 1, 2);
        table.forget_key(first);
        let second = add(&mut table, 1, 2);
        assert_eq!(table.remove(first).map(|entry| entry.connection.key.host_port), Some(1));
        assert_eq!(table.find(ConnectionKey { host_port: 1, guest_port: 2 }), Some(second));
    }

    proptest! {
        /// Each connection with work stands in line once, and comes up in the order it got there.
        #[test]
        fn the_line_is_fair(steps in proptest::collection::vec((0..4_u8, 0..20_u32), 0..200)) {
            let mut table = Table::default();
            let mut model = VecDeque::new();
            let mut alive = HashSet::new();
            for (what, port) in steps {
                let key = ConnectionKey { host_port: port, guest_port: 1 };
                match (what, table.find(key)) {
                    (0, None) => { alive.insert(add(&mut table, port, 1)); }
                    (1, Some(id)) => {
                        table.enqueue(id);
                        if !model.contains(&id) { model.push_back(id); }
                    }
                    (2, Some(id)) => {
                        prop_assert!(table.remove(id).is_some());
                        alive.remove(&id);
                        model.retain(|queued| *queued != id);
                    }
                    (3, _) => prop_assert_eq!(table.dequeue(), model.pop_front()),
                    _ => {}
                }
                prop_assert_eq!(table.len(), alive.len());
                prop_assert_eq!(table.has_ready(), !model.is_empty());
            }
        }
    }
}
