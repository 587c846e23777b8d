//! One stream connection as a state machine without file descriptors (virtio 1.3, 5.10.6).

use std::collections::VecDeque;
use std::io::IoSlice;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use super::credit::Credit;
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};

/// The two ports by which a connection is known; the CIDs are always the host's and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ConnectionKey {
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
}

bitflags! {
    /// Directions in which one side is done (the flags of `VIRTIO_VSOCK_OP_SHUTDOWN`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Shutdown: u32 {
        /// It receives no more.
        const RECEIVE = 1;
        /// It sends no more.
        const SEND = 2;
    }

    /// Packets without payload that the guest is still to get.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Owed: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const RST = 4;
        const CREDIT_UPDATE = 8;
        const CREDIT_REQUEST = 16;
    }
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    /// The host asked, the guest has not answered.
    Connecting,
    /// Both ends are there, wholly or half closed.
    Open,
    /// Over, but the guest has not been sent its RST.
    Resetting,
    /// Over for the guest, which may use the ports again; the host end has still bytes to take.
    Lingering,
}

/// What a packet from the guest means for what is around the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing more to do.
    Done,
    /// The guest accepted the host's request.
    Accepted,
    /// The packet's payload is to be taken.
    Data,
    /// The guest reset the connection.
    Reset,
    /// The guest broke the rules; the connection is being reset.
    Violation(&'static str),
}

/// State of one connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub key: ConnectionKey,
    pub phase: Phase,
    pub credit: Credit,
    /// What the guest does no more.
    pub guest: Shutdown,
    /// What the host end does no more.
    pub host: Shutdown,
    /// The part of `host` that the guest was told.
    pub told: Shutdown,
    pub owed: Owed,
    /// Bytes from the guest that the host end's socket did not take yet.
    pub pending: VecDeque<u8>,
    /// The guest was asked for credit since there was none.
    pub asked: bool,
}

impl Connection {
    /// A connection that the host wants.
    pub fn outgoing(key: ConnectionKey) -> Self {
        Self::new(key, Phase::Connecting, Owed::REQUEST)
    }

    /// The connection that the guest's REQUEST asks for.
    pub fn incoming(key: ConnectionKey, request: &Header) -> Self {
        let mut this = Self::new(key, Phase::Open, Owed::RESPONSE);
        this.credit.peer(request.buf_alloc, request.fwd_cnt);
        this
    }

    fn new(key: ConnectionKey, phase: Phase, owed: Owed) -> Self {
        Self {
            key,
            phase,
            credit: Credit::default(),
            guest: Shutdown::empty(),
            host: Shutdown::empty(),
            told: Shutdown::empty(),
            owed,
            pending: VecDeque::new(),
            asked: false,
        }
    }

    /// A packet of this connection came from the guest.
    pub fn receive(&mut self, header: &Header) -> Verdict {
        if header.op == op::RST {
            return Verdict::Reset;
        }
        match self.phase {
            // The guest will see our RST; what it sent before that is void.
            Phase::Resetting | Phase::Lingering => Verdict::Done,
            Phase::Connecting => self.receive_answer(header),
            Phase::Open => self.receive_open(header),
        }
    }

    fn receive_answer(&mut self, header: &Header) -> Verdict {
        if header.op != op::RESPONSE || self.owed.contains(Owed::REQUEST) {
            return self.violation("anything but an answer to a request");
        }
        self.phase = Phase::Open;
        self.credit.peer(header.buf_alloc, header.fwd_cnt);
        Verdict::Accepted
    }

    fn receive_open(&mut self, header: &Header) -> Verdict {
        self.credit.peer(header.buf_alloc, header.fwd_cnt);
        match header.op {
            op::RW if self.guest.contains(Shutdown::SEND) => self.violation("data after the end of data"),
            op::RW => match self.credit.admit(header.len) {
                Ok(()) => Verdict::Data,
                Err(_) => self.violation("more data than credit"),
            },
            op::CREDIT_UPDATE => Verdict::Done,
            op::CREDIT_REQUEST => {
                self.owed |= Owed::CREDIT_UPDATE;
                Verdict::Done
            }
            op::SHUTDOWN => {
                // Hints are permanent, and bits that have no meaning have none here.
                self.guest |= Shutdown::from_bits_truncate(header.flags);
                Verdict::Done
            }
            op::REQUEST => self.violation("a request on a connection"),
            op::RESPONSE => self.violation("an answer on a connection"),
            _ => self.violation("an unknown operation"),
        }
    }

    /// Ends the connection with a RST, and says why.
    pub fn violation(&mut self, what: &'static str) -> Verdict {
        self.reset();
        Verdict::Violation(what)
    }

    /// Ends the connection for the guest; the host end still gets what is pending.
    pub fn reset(&mut self) {
        self.phase = Phase::Resetting;
        self.owed = Owed::RST;
    }

    /// Keeps bytes for which the host end's socket has no room.
    pub fn hold(&mut self, data: &[u8]) {
        self.pending.extend(data);
    }

    /// The pending bytes, for a gathering write.
    pub fn pending_slices(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.pending.as_slices();
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// The host end took `len` of the pending bytes.
    pub fn flushed(&mut self, len: usize) {
        let len = len.min(self.pending.len());
        self.pending.drain(..len);
        if self.pending.is_empty() {
            // An idle connection costs no buffer.
            self.pending = VecDeque::new();
        }
        self.passed(len);
    }

    /// The host end took `len` bytes straight from the guest, or nobody is there to take them.
    pub fn passed(&mut self, len: usize) {
        self.credit.forward(u32::try_from(len).unwrap_or(u32::MAX));
        if self.phase == Phase::Open && self.credit.wants_update() && !self.guest.contains(Shutdown::SEND) {
            self.owed |= Owed::CREDIT_UPDATE;
        }
    }

    /// The host end reads no more: what is pending is void.
    pub fn host_stopped_reading(&mut self) {
        self.host |= Shutdown::RECEIVE;
        self.flushed(self.pending.len());
    }

    /// The guest has said its last word and the host end has all of it.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Open && self.guest.is_all() && self.pending.is_empty()
    }

    /// Whether bytes of the host end still go to the guest.
    pub fn wants_host_data(&self) -> bool {
        self.phase == Phase::Open && !self.guest.contains(Shutdown::RECEIVE) && !self.host.contains(Shutdown::SEND)
    }

    /// How many bytes of the host end may go to the guest now. At zero the guest is asked for more, once.
    pub fn allowance(&mut self) -> u32 {
        let credit = self.credit.available();
        if credit == 0 && !self.asked {
            self.owed |= Owed::CREDIT_REQUEST;
        }
        self.asked = credit == 0;
        credit
    }

    /// Whether the guest is owed a packet without payload.
    pub fn has_control(&self) -> bool {
        !self.owed.is_empty() || self.owes_shutdown()
    }

    fn owes_shutdown(&self) -> bool {
        self.phase == Phase::Open && !(self.host - self.told).is_empty()
    }

    /// The next packet without payload for the guest.
    pub fn next_control(&mut self, guest_cid: u64) -> Option<Header> {
        // A handshake comes before all else; credit is in every header, so it comes last.
        for (flag, op) in [(Owed::RST, op::RST), (Owed::REQUEST, op::REQUEST), (Owed::RESPONSE, op::RESPONSE)] {
            if self.owed.contains(flag) {
                self.owed -= flag;
                return Some(self.header(guest_cid, op, 0));
            }
        }
        if self.owes_shutdown() {
            self.told = self.host;
            let header = self.header(guest_cid, op::SHUTDOWN, 0);
            return Some(Header { flags: self.told.bits(), ..header });
        }
        if self.owed.contains(Owed::CREDIT_REQUEST) {
            self.owed -= Owed::CREDIT_REQUEST;
            return Some(self.header(guest_cid, op::CREDIT_REQUEST, 0));
        }
        if self.owed.contains(Owed::CREDIT_UPDATE) {
            return Some(self.header(guest_cid, op::CREDIT_UPDATE, 0));
        }
        None
    }

    /// The header of `len` bytes of the host end, which are then spent.
    pub fn data_header(&mut self, guest_cid: u64, len: u32) -> Header {
        self.credit.spend(len);
        self.header(guest_cid, op::RW, len)
    }

    fn header(&mut self, guest_cid: u64, op: u16, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        self.owed -= Owed::CREDIT_UPDATE;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: ConnectionKey = ConnectionKey { host_port: 7, guest_port: 9 };

    fn packet(op: u16) -> Header {
        Header { op, kind: TYPE_STREAM, buf_alloc: 1000, ..Header::default() }
    }

    fn open() -> Connection {
        let mut connection = Connection::incoming(KEY, &packet(op::REQUEST));
        assert_eq!(connection.next_control(3).map(|header| header.op), Some(op::RESPONSE));
        assert!(!connection.has_control());
        connection
    }

    fn control(connection: &mut Connection) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| connection.next_control(3)).map(|header| (header.op, header.flags)).collect()
    }

    #[test]
    fn an_answer_counts_only_after_the_request() {
        let mut connection = Connection::outgoing(KEY);
        assert!(matches!(connection.receive(&packet(op::RESPONSE)), Verdict::Violation(_)));
        assert_eq!(control(&mut connection), [(op::RST, 0)]);

        let mut connection = Connection::outgoing(KEY);
        assert_eq!(control(&mut connection), [(op::REQUEST, 0)]);
        assert_eq!(connection.receive(&packet(op::RESPONSE)), Verdict::Accepted);
        assert_eq!(connection.allowance(), 1000);
    }

    #[test]
    fn credit_is_told_in_steps_and_asked_for_once() {
        let mut connection = open();
        let data = Header { len: 64 * 1024, ..packet(op::RW) };
        assert_eq!(connection.receive(&data), Verdict::Data);
        connection.passed(64 * 1024);
        assert_eq!(control(&mut connection), [(op::CREDIT_UPDATE, 0)]);

        assert_eq!(connection.data_header(3, 1000).len, 1000);
        assert_eq!((connection.allowance(), connection.allowance()), (0, 0));
        assert_eq!(control(&mut connection), [(op::CREDIT_REQUEST, 0)]);
        connection.receive(&Header { fwd_cnt: 10, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.allowance(), 10);
    }

    #[test]
    fn shutdown_hints_add_up_and_nonsense_bits_are_nothing() {
        let mut connection = open();
        connection.receive(&Header { flags: !3, ..packet(op::SHUTDOWN) });
        assert_eq!(connection.guest, Shutdown::empty());
        connection.receive(&Header { flags: 1, ..packet(op::SHUTDOWN) });
        connection.receive(&Header { flags: 0, ..packet(op::SHUTDOWN) });
        assert!(!connection.is_finished());
        connection.receive(&Header { flags: 2, ..packet(op::SHUTDOWN) });
        assert!(connection.is_finished());
        assert!(matches!(connection.receive(&Header { len: 1, ..packet(op::RW) }), Verdict::Violation(_)));
    }

    #[test]
    fn the_host_ends_are_told_each_once() {
        let mut connection = open();
        connection.host |= Shutdown::SEND;
        assert_eq!(control(&mut connection), [(op::SHUTDOWN, 2)]);
        connection.host_stopped_reading();
        assert_eq!(control(&mut connection), [(op::SHUTDOWN, 3)]);
    }

    #[test]
    fn a_finished_stream_waits_for_its_pending_bytes() {
        let mut connection = open();
        connection.receive(&Header { len: 3, ..packet(op::RW) });
        connection.hold(b"end");
        connection.receive(&Header { flags: 3, ..packet(op::SHUTDOWN) });
        assert!(!connection.is_finished());
        connection.flushed(3);
        assert!(connection.is_finished());
    }
}
