//! The device: its queues, its connections, and one turn of work.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::VsockHost;
use super::host::Shared;
use super::table::Table;
use super::transmit::Replies;
use crate::virtio::queue::QueueSet;
use crate::virtio::{ActivateError, DeviceType, VirtioDevice};

/// Host to guest.
pub(super) const RX: usize = 0;
/// Guest to host.
pub(super) const TX: usize = 1;
/// Events for the driver.
pub(super) const EVENT: usize = 2;

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

/// Descriptors per queue.
const QUEUE_SIZE: u16 = 256;
/// Chains of each queue that are handled before other devices of the event loop get their turn.
pub(super) const TURN: usize = 256;
/// The event loop's tag of the device's own epoll set; the queues have 0 to 2.
const SOCKETS: u32 = 3;
/// The epoll set's tag of the eventfd by which the host wakes the device. Connections have their ids.
const WAKE: u64 = u64::MAX;

/// The socket device (virtio 1.3, 5.10).
///
/// The sockets of all connections are in an epoll set of its own, so that the driver's reset, which
/// comes on a vCPU thread, can take them out without the event loop's help.
pub struct Vsock {
    pub(super) guest_cid: u64,
    config: [u8; 8],
    pub(super) queues: QueueSet,
    pub(super) table: Table,
    pub(super) replies: Replies,
    pub(super) shared: Arc<Shared>,
    pub(super) epoll: Epoll,
    /// The driver is still to be told that all connections are void.
    pub(super) owes_transport_reset: bool,
    pub(super) detached: bool,
}

impl Vsock {
    /// A device for a guest with this context identifier, and the host's handle to it.
    ///
    /// # Errors
    /// `InvalidInput` for a reserved identifier (below 3, or not below 2^32 - 1); when no descriptors can be had.
    pub fn new(guest_cid: u64) -> io::Result<(Self, VsockHost)> {
        let host = VsockHost::new()?;
        let this = Self::attached_to(&host, guest_cid)?;
        Ok((this, host))
    }

    pub(super) fn attached_to(host: &VsockHost, guest_cid: u64) -> io::Result<Self> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            let text = format!("context identifier {guest_cid} is reserved: use 3 to 4294967294");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let shared = Arc::clone(host.shared());
        let queues = QueueSet::new(&[QUEUE_SIZE; 3])?;
        let epoll = Epoll::new()?;
        let wake = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, shared.wake.as_raw_fd(), wake)?;
        if !shared.attach() {
            let text = "the vsock host handle has a device already, or had its last one";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        Ok(Self {
            guest_cid,
            config: guest_cid.to_le_bytes(),
            queues,
            table: Table::default(),
            replies: Replies::default(),
            shared,
            epoll,
            owes_transport_reset: false,
            detached: false,
        })
    }

    /// Does all that can be done now and returns: the VMM calls it once more when a guest has ended, so
    /// that the last bytes it has sent reach the host.
    pub fn settle(&mut self) {
        self.socket_events();
        while self.turn() {}
    }

    /// One turn of work; true when there is more at once.
    fn turn(&mut self) -> bool {
        if self.detached || !self.queues.is_active() {
            return false;
        }
        self.commands();
        let mut more = self.transmit();
        more |= self.fill();
        more |= self.replies.stalled() && self.replies.has_room();
        self.events();
        more
    }

    fn run(&mut self) {
        if self.turn() {
            // Later: the other devices of the event loop come first.
            self.shared.wake();
        }
    }

    /// What the sockets and the host have to say.
    fn socket_events(&mut self) {
        let mut events = [EpollEvent::default(); 128];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return error!("cannot look at the vsock sockets: {error}"),
        };
        for event in events.iter().take(count) {
            if event.data() == WAKE {
                let _ = self.shared.wake.read();
            } else {
                self.socket_event(event.data(), event.event_set());
            }
        }
    }

    /// Sends the driver what it is owed on the event queue.
    fn events(&mut self) {
        if !self.owes_transport_reset {
            return;
        }
        let Some(memory) = self.queues.memory() else { return };
        if let Some(chain) = self.queues.pop(EVENT) {
            let mut writer = chain.writer(&memory);
            if writer.write_all(&TRANSPORT_RESET.to_le_bytes()).is_ok() {
                self.owes_transport_reset = false;
            }
            self.queues.add_used(EVENT, chain.head(), writer.consumed());
            self.queues.notify(EVENT);
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queues(&self) -> &QueueSet {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, _features: u64) -> Result<(), ActivateError> {
        // Calls of the host may have come before the driver.
        self.shared.wake();
        Ok(())
    }

    fn reset(&mut self) {
        if self.detached {
            return;
        }
        self.owes_transport_reset = false;
        self.replies = Replies::default();
        for id in self.table.ids() {
            self.abandon(id, io::ErrorKind::ConnectionReset);
        }
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        if let Err(error) = ops.add(Events::with_data(&self.epoll, SOCKETS, EventSet::IN)) {
            error!("cannot watch the vsock sockets: {error}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            SOCKETS => self.socket_events(),
            queue => {
                self.queues.take_kick(queue as usize);
            }
        }
        self.run();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        if self.detached {
            return;
        }
        debug!("vsock device of guest {} goes with {} connections", self.guest_cid, self.table.len());
        self.shared.close();
    }
}
