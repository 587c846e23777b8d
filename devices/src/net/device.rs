//! The device behind the transport.

use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;

use super::layout::*;
use super::link::Link;
use super::offloads::Offloads;
use super::receive::Rooms;
use super::state::NetState;
use crate::virtio::queue::QueueSet;
use crate::virtio::{ActivateError, DeviceType, VirtioDevice};

/// The event loop's tag of the link; the queues have 0 and 1.
const LINK: u32 = 2;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A group's address, or none.
    #[error("{} is no address of a network interface", mac(.0))]
    Mac([u8; 6]),
    /// Below what the specification allows.
    #[error("an MTU of {0} is too small: at least {MTU_MIN}")]
    Mtu(u16),
    /// No eventfd or epoll instance.
    #[error("cannot make an eventfd or epoll instance for the network device: {0}")]
    Descriptor(#[from] io::Error),
}

fn mac(bytes: &[u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// What a network device is made from.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The device's address.
    pub mac: [u8; 6],
    /// The MTU to tell the driver, which takes it as the largest that it may ever set. None leaves it the choice.
    pub mtu: Option<u16>,
    /// What to offer, whatever backend comes: usually [`Offloads::of_this_kernel`].
    pub offloads: Offloads,
}

/// The network device. Until it gets a backend it is a placeholder, and its link is down when it loses that.
pub struct Net {
    pub(super) config: [u8; CONFIG_BYTES],
    settings: NetConfig,
    pub(super) queues: QueueSet,
    pub(super) link: Link,
    /// Features that the driver accepted.
    pub(super) features: u64,
    pub(super) rooms: Rooms,
    /// The queue knows of buffers that a device took which was saved then.
    pub(super) stale_rooms: bool,
    /// The driver believes the link to be so, if it differs from what it is.
    believed_up: Option<bool>,
}

impl Net {
    /// A new device, with its link down.
    ///
    /// # Errors
    /// When address or MTU are impossible; when no descriptors can be had.
    pub fn new(settings: NetConfig) -> Result<Self, NetError> {
        let [first, ..] = settings.mac;
        if first & 1 == 1 || settings.mac == [0; 6] {
            return Err(NetError::Mac(settings.mac));
        }
        if let Some(mtu) = settings.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetError::Mtu(mtu));
        }
        let settings = NetConfig { offloads: settings.offloads.consistent(), ..settings };
        Ok(Self {
            config: config(settings.mac, settings.mtu.unwrap_or(0)),
            settings,
            queues: QueueSet::new(&[QUEUE_SIZE; 2])?,
            link: Link::new()?,
            features: 0,
            rooms: Rooms::default(),
            stale_rooms: false,
            believed_up: None,
        })
    }

    /// The device's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.settings.mac
    }

    /// The state for a snapshot; the queues' is the transport's.
    #[must_use]
    pub fn save(&self) -> NetState {
        let NetConfig { mac, mtu, offloads } = self.settings;
        NetState { mac, mtu, offloads: offloads.bits(), link_up: self.is_up() }
    }

    /// A device as it was saved, without its backend: attach one before the guest goes on, or the driver
    /// is told that the link is down.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restore(state: &NetState) -> Result<Self, NetError> {
        let offloads = Offloads::from_bits_truncate(state.offloads);
        let mut this = Self::new(NetConfig { mac: state.mac, mtu: state.mtu, offloads })?;
        this.believed_up = Some(state.link_up);
        Ok(this)
    }

    /// What may be left undone in packets for the guest.
    pub(super) fn to_guest(&self) -> Offloads {
        Offloads::to_guest(self.features)
    }

    /// The longest packet that is not to be segmented any more, with all headers.
    pub(super) fn frame_max(&self) -> usize {
        self.settings.mtu.map_or(PACKET_MAX, |mtu| HEADER + LINK_HEADER + usize::from(mtu))
    }

    /// One turn of work in both directions.
    fn run(&mut self) {
        let mut more = self.transmit();
        more |= self.receive();
        if more {
            // Later: the other devices of the event loop come first.
            self.queues.kick(TX);
        }
    }
}

impl VirtioDevice for Net {
    /// Without a link a new driver finds nothing here; one that has the device already keeps it.
    fn device_type(&self) -> DeviceType {
        if self.is_up() { DeviceType::Net } else { DeviceType::Placeholder }
    }

    fn features(&self) -> u64 {
        let mtu = if self.settings.mtu.is_some() { F_MTU } else { 0 };
        F_MAC | F_STATUS | F_MRG_RXBUF | mtu | self.settings.offloads.offer()
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

    fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        self.features = features;
        self.rooms.clear();
        self.stale_rooms = true;
        self.link.set_offloads(self.to_guest());
        if self.believed_up.take().is_some_and(|up| up != self.is_up()) {
            self.announce();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
        self.rooms.clear();
        // Packets for a driver that is not there yet are packets that any driver can take.
        self.link.set_offloads(Offloads::empty());
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
        if let Err(error) = ops.add(Events::with_data(self.link.events(), LINK, EventSet::IN)) {
            error!("cannot watch a network link: {error}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            LINK => self.link.look(),
            queue => {
                self.queues.take_kick(queue as usize);
            }
        }
        self.run();
    }
}
