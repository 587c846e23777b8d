//! A pair of queues, and the worker that moves packets between them and the backend.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;
use vmm_sys_util::eventfd::EventFd;

use super::layout::{F_MRG_RXBUF, HEADER, LINK_HEADER, PACKET_MAX, RX, TX};
use super::meter::{Alarm, Meter};
use super::offloads::Offloads;
use super::port::Port;
use super::receive::Rooms;
use crate::virtio::ReadyQueues;
use crate::virtio::queue::QueueSet;

/// The event loop's tags of the port and the alarm; the queues have 0 and 1.
const PORT: u32 = 2;
const ALARM: u32 = 3;

/// What a driver has agreed to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Terms {
    /// What may be left undone in packets for the guest.
    pub to_guest: Offloads,
    /// A packet may be spread over buffers.
    pub mergeable: bool,
    /// The longest packet that is not to be segmented any more, with all headers.
    pub frame_max: usize,
}

impl Terms {
    pub fn new(features: u64, mtu: Option<u16>) -> Self {
        Self {
            to_guest: Offloads::to_guest(features),
            mergeable: features & F_MRG_RXBUF != 0,
            frame_max: mtu.map_or(PACKET_MAX, |mtu| HEADER + LINK_HEADER + usize::from(mtu)),
        }
    }
}

/// A receive queue, a transmit queue, and their way out.
///
/// It never takes the device's lock: that is held by whoever changes something here.
pub(super) struct Pair {
    pub queues: QueueSet,
    pub port: Port,
    pub terms: Terms,
    pub rooms: Rooms,
    /// The queue knows of buffers that a device took which was saved then.
    pub stale_rooms: bool,
    /// The driver uses it.
    enabled: bool,
    /// Limits of each direction, which all pairs share.
    pub receives: Arc<Meter>,
    pub sends: Arc<Meter>,
    /// Bytes of a packet that was received and is over the limit: no other is before that is paid for.
    pub owed: Option<usize>,
    pub alarm: Alarm,
    /// Why the backend is gone.
    pub lost: Option<io::Error>,
    /// Tells the device of that.
    loss: Arc<EventFd>,
    /// Where kicks of the receive queue belong while this pair is not in use: without VIRTIO_NET_F_MQ the control queue
    /// has its number (5.1.2).
    stand_in_for: Option<EventFd>,
}

impl Pair {
    pub fn new(
        queues: QueueSet,
        [receives, sends]: [Arc<Meter>; 2],
        loss: Arc<EventFd>,
        stand_in_for: Option<EventFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            queues,
            receives,
            sends,
            owed: None,
            alarm: Alarm::new()?,
            port: Port::new()?,
            terms: Terms::default(),
            rooms: Rooms::default(),
            stale_rooms: false,
            enabled: false,
            lost: None,
            loss,
            stand_in_for,
        })
    }

    /// A driver is there; the pair is not in use yet.
    pub fn start(&mut self, ready: ReadyQueues, terms: Terms) {
        self.queues.activate(ready);
        self.terms = terms;
        self.rooms.clear();
        self.stale_rooms = true;
    }

    /// No driver is there.
    pub fn stop(&mut self) {
        self.queues.deactivate();
        self.terms = Terms::default();
        self.rooms.clear();
        self.enable(false);
    }

    /// Has the driver use it or not.
    pub fn enable(&mut self, enabled: bool) {
        self.enabled = enabled;
        self.port.set_queue(enabled);
        self.wake();
    }

    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Has its worker look at it.
    pub fn wake(&self) {
        self.queues.kick(TX);
    }

    /// The backend does not work any more, as when its interface was deleted.
    pub fn lose(&mut self, error: io::Error) {
        self.port.take();
        self.lost = Some(error);
        if let Err(error) = self.loss.write(1) {
            error!("cannot tell of a network link that is gone: {error}");
        }
    }

    /// One turn of work in both directions.
    fn run(&mut self) {
        self.queues.fail_with_others();
        if !self.enabled {
            return;
        }
        let mut more = self.transmit();
        more |= self.receive();
        if more {
            // Later: the other devices of the event loop come first.
            self.queues.kick(TX);
        }
    }
}

impl MutEventSubscriber for Pair {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        let watched = [
            Events::with_data(self.port.events(), PORT, EventSet::IN),
            Events::with_data(self.alarm.timer(), ALARM, EventSet::IN),
        ];
        for events in watched {
            if let Err(error) = ops.add(events) {
                error!("cannot watch a network link: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            PORT => self.port.look(),
            ALARM => self.alarm.answer(),
            queue => {
                let kicked = self.queues.take_kick(queue as usize);
                if kicked
                    && queue as usize == RX
                    && !self.enabled
                    && let Some(other) = &self.stand_in_for
                    && let Err(error) = other.write(1)
                {
                    error!("cannot pass on a kick: {error}");
                }
            }
        }
        self.run();
    }
}
