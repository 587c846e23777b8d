//! The device behind the transport.

use std::io;
use std::mem;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::Backend;
use super::layout::*;
use super::meter::{Meter, NetLimits};
use super::offloads::Offloads;
use super::pair::{Pair, Terms};
use super::state::{Asked, NetState};
use crate::virtio::queue::{QueueError, QueueSet, QueueState};
use crate::virtio::{ActivateError, DeviceType, ReadyQueues, VirtioDevice, Worker};

/// The event loop's tag of a loss; the control queue has 0.
const LOSS: u32 = 1;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A group's address, or none.
    #[error("{} is no address of a network interface", mac(.0))]
    Mac([u8; 6]),
    /// Below what the specification allows.
    #[error("an MTU of {0} is too small: at least {MTU_MIN}")]
    Mtu(u16),
    /// None, or more than there are threads for.
    #[error("{0} pairs of queues: it must be 1 to {MAX_PAIRS}")]
    Pairs(u16),
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
    /// Pairs of queues, 1 to 8. The driver uses the first one until it asks for more.
    pub pairs: u16,
    /// Of what goes through it.
    pub limits: NetLimits,
}

/// The network device. Until it gets a backend it is a placeholder, and its link is down when it loses that.
///
/// In here are what the driver negotiates and commands, and the link; packets are the pairs' of queues, each of which may
/// be served by another thread.
pub struct Net {
    pub(super) config: [u8; CONFIG_BYTES],
    pub(super) settings: NetConfig,
    /// All of them; never active, as they are the pairs', and `control`.
    queues: QueueSet,
    pub(super) control: QueueSet,
    /// Which one the control queue is.
    control_at: usize,
    pub(super) pairs: Vec<Arc<Mutex<Pair>>>,
    /// Limits of each direction.
    pub(super) receives: Arc<Meter>,
    pub(super) sends: Arc<Meter>,
    /// A pair has found its backend gone.
    loss: Arc<EventFd>,
    /// The first pair's.
    pub(super) backend: Option<Arc<dyn Backend>>,
    pub(super) held_down: bool,
    /// Features that the driver accepted.
    pub(super) features: u64,
    /// Pairs in use, from the first one on; none without a driver.
    in_use: u16,
    /// What the driver takes now.
    pub(super) to_guest: Offloads,
    /// What the driver of a restored device knows.
    known: Option<Known>,
}

/// Of a saved device.
struct Known {
    asked: Option<Asked>,
    link_up: bool,
}

impl Net {
    /// A new device, with its link down.
    ///
    /// # Errors
    /// When address, MTU or number of pairs are impossible; when no descriptors can be had.
    pub fn new(settings: NetConfig) -> Result<Self, NetError> {
        let [first, ..] = settings.mac;
        if first & 1 == 1 || settings.mac == [0; 6] {
            return Err(NetError::Mac(settings.mac));
        }
        if let Some(mtu) = settings.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetError::Mtu(mtu));
        }
        if !(1..=MAX_PAIRS).contains(&settings.pairs) {
            return Err(NetError::Pairs(settings.pairs));
        }
        let settings = NetConfig { offloads: settings.offloads.consistent(), ..settings };
        let count = usize::from(settings.pairs);
        let control_at = count * PAIR;
        let queues = QueueSet::new(&vec![QUEUE_SIZE; control_at + 1])?;
        let control = queues.part(control_at..control_at + 1)?;
        let loss = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let meters = [settings.limits.receive, settings.limits.transmit].map(|limits| Arc::new(Meter::new(limits)));
        let pair = |index: usize| -> io::Result<_> {
            let own = queues.part(index * PAIR..(index + 1) * PAIR)?;
            let stand_in_for = control.kicks().first().filter(|_| index == 1).map(EventFd::try_clone).transpose()?;
            Ok(Arc::new(Mutex::new(Pair::new(own, meters.clone(), Arc::clone(&loss), stand_in_for)?)))
        };
        let pairs = (0..count).map(pair).collect::<io::Result<_>>()?;
        let [receives, sends] = meters;
        Ok(Self {
            config: config(settings.mac, settings.pairs, settings.mtu.unwrap_or(0)),
            settings,
            queues,
            control,
            control_at,
            pairs,
            receives,
            sends,
            loss,
            backend: None,
            held_down: false,
            features: 0,
            in_use: 0,
            to_guest: Offloads::empty(),
            known: None,
        })
    }

    /// The device's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.settings.mac
    }

    /// Pairs of queues that it has.
    #[must_use]
    pub fn pair_count(&self) -> u16 {
        self.settings.pairs
    }

    /// The state for a snapshot; the queues' is the transport's.
    #[must_use]
    pub fn save(&self) -> NetState {
        let NetConfig { mac, mtu, offloads, pairs, limits } = self.settings;
        let asked = Asked { pairs: self.in_use, to_guest: self.to_guest.bits() };
        let asked = (self.in_use > 0).then_some(asked);
        NetState { mac, mtu, offloads: offloads.bits(), pairs, limits, asked, link_up: self.is_up() }
    }

    /// A device as it was saved, without its backend: attach one before the guest goes on, or the driver
    /// is told that the link is down.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restore(state: &NetState) -> Result<Self, NetError> {
        let offloads = Offloads::from_bits_truncate(state.offloads);
        let NetState { mac, mtu, pairs, limits, .. } = *state;
        let mut this = Self::new(NetConfig { mac, mtu, offloads, pairs, limits })?;
        this.known = Some(Known { asked: state.asked, link_up: state.link_up });
        Ok(this)
    }

    /// Has the driver use the first `count` pairs.
    pub(super) fn use_pairs(&mut self, count: u16) {
        self.in_use = count;
        for (mut pair, index) in self.pairs().zip(0..) {
            pair.enable(index < count);
        }
    }

    /// What may be left undone in packets for the guest from now on.
    pub(super) fn give(&mut self, offloads: Offloads) {
        // What is on its way by the old terms is judged by the new ones, and lost if they are against it.
        self.to_guest = offloads;
        self.pairs().for_each(|mut pair| pair.terms.to_guest = offloads);
        self.set_offloads(offloads);
    }

    fn start_queues(&mut self, mut ready: ReadyQueues) -> Result<(), QueueError> {
        let mut queues = mem::take(&mut ready.queues);
        // Without VIRTIO_NET_F_MQ there is one pair, and the control queue follows it (virtio 1.3, 5.1.2).
        let pairs = if self.features & F_MQ == 0 { 1 } else { self.pairs.len() };
        self.control_at = pairs * PAIR;
        if self.control_at >= queues.len() {
            return Err(QueueError::Config);
        }
        let control = queues.remove(self.control_at);
        self.control.activate(ready.part(vec![control]));
        let terms = Terms::new(self.features, self.settings.mtu);
        let mut queues = queues.into_iter();
        for mut pair in self.pairs() {
            pair.start(ready.part(queues.by_ref().take(PAIR).collect()), terms);
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    /// Without a backend a new driver finds nothing here; one that has the device already keeps it.
    fn device_type(&self) -> DeviceType {
        if self.backend.is_some() { DeviceType::Net } else { DeviceType::Placeholder }
    }

    fn features(&self) -> u64 {
        let mtu = if self.settings.mtu.is_some() { F_MTU } else { 0 };
        let several = if self.settings.pairs > 1 { F_MQ } else { 0 };
        let offloads = self.settings.offloads.offer();
        F_MAC | F_STATUS | F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | several | mtu | offloads
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

    fn workers(&self) -> Vec<Worker> {
        self.pairs.iter().map(|pair| Arc::clone(pair) as Worker).collect()
    }

    fn start(&mut self, ready: ReadyQueues, features: u64) -> Result<(), ActivateError> {
        // Both take the control queue (5.1.3.1).
        let without = if features & F_CTRL_VQ == 0 { F_MQ | F_CTRL_GUEST_OFFLOADS } else { 0 };
        self.features = features & !without;
        self.start_queues(ready)?;
        let known = self.known.take();
        let asked = known.as_ref().and_then(|known| known.asked);
        let accepted = Offloads::to_guest(self.features);
        let pairs = if self.features & F_MQ == 0 { 1 } else { self.settings.pairs };
        self.give(asked.map_or(accepted, |asked| Offloads::from_bits_truncate(asked.to_guest) & accepted).consistent());
        self.use_pairs(asked.map_or(1, |asked| asked.pairs.clamp(1, pairs)));
        if known.is_some_and(|known| known.link_up != self.is_up()) {
            self.announce();
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.control.deactivate();
        self.pairs().for_each(|mut pair| pair.stop());
        self.features = 0;
        self.in_use = 0;
        // Packets for a driver that is not there yet are packets that any driver can take.
        self.give(Offloads::empty());
    }

    fn save_queues(&self) -> Option<Vec<QueueState>> {
        let mut all = Vec::with_capacity(self.queues.sizes().len());
        for pair in self.pairs() {
            all.extend(pair.queues.save()?);
        }
        let [control]: [QueueState; 1] = self.control.save()?.try_into().ok()?;
        all.insert(self.control_at, control);
        Some(all)
    }
}

impl MutEventSubscriber for Net {
    fn init(&mut self, ops: &mut EventOps) {
        self.control.register(ops);
        if let Err(error) = ops.add(Events::with_data(&*self.loss, LOSS, EventSet::IN)) {
            error!("cannot watch network links: {error}");
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.data() == LOSS {
            // It is empty when another thread was quicker.
            let _ = self.loss.read();
            return self.look_for_loss();
        }
        self.control.take_kick(0);
        self.control.fail_with_others();
        self.obey();
    }
}
