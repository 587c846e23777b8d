//! The device behind the transport.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};

use super::blocks::Blocks;
use super::layout::{REQUEST_LEN, Request, response};
use super::progress::Progress;
use super::region::{Backing, MemError, Region};
use crate::virtio::queue::QueueSet;
use crate::virtio::{DeviceType, VirtioDevice};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver keeps its hands off what is not plugged (virtio 1.3, 5.15.3).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// `guest-request`, the only queue.
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// Requests that one turn of the event loop serves, so that other devices get theirs.
const REQUESTS_PER_TURN: usize = 4;

/// The state of the device beyond its queue's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// The length of the region in bytes.
    pub region: u64,
    /// How many of them the driver may use.
    pub usable: u64,
    /// How many are to be plugged.
    pub requested: u64,
    /// What is plugged.
    pub blocks: Blocks,
}

/// A region of guest memory of which the guest plugs as much as the host asks for. What is plugged out goes back to the
/// host at once.
pub struct Mem {
    queues: QueueSet,
    region: Region,
}

impl Mem {
    /// A region of at most `mib` MiB, rounded down to whole blocks of 2 MiB; nothing of it is plugged.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(mib: u64) -> io::Result<Self> {
        Ok(Self { queues: QueueSet::new(&[QUEUE_SIZE])?, region: Region::new(mib) })
    }

    /// The state for a snapshot; the queue's is the transport's.
    #[must_use]
    pub fn save(&self) -> MemState {
        self.region.save()
    }

    /// A device as it was saved.
    ///
    /// # Errors
    /// When the state is not possible, or no eventfd can be made.
    pub fn restore(state: &MemState) -> io::Result<Self> {
        let region = Region::restore(state).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Self { queues: QueueSet::new(&[QUEUE_SIZE])?, region })
    }

    /// The length of the region in bytes.
    #[must_use]
    pub fn region_len(&self) -> u64 {
        self.region.len()
    }

    /// How many bytes of it are there for guest and devices.
    #[must_use]
    pub fn granted(&self) -> u64 {
        self.region.granted()
    }

    /// Places the region at the guest-physical address `address`, a multiple of [`SLOT`](super::SLOT), and has what is
    /// plugged be there.
    ///
    /// # Errors
    /// Of the backing.
    pub fn place(&mut self, address: u64, backing: Box<dyn Backing>) -> io::Result<()> {
        self.region.place(address, backing)
    }

    /// Asks the guest to have `mib` MiB plugged, rounded up to whole blocks. It does so as far as it can. The transport is
    /// to tell the driver that the configuration has changed.
    ///
    /// # Errors
    /// When the region is not as long.
    pub fn request(&mut self, mib: u64) -> Result<(), MemError> {
        self.region.request(mib)
    }

    /// How many MiB are plugged.
    #[must_use]
    pub fn plugged_mib(&self) -> u64 {
        self.region.plugged() >> 20
    }

    /// Tells of every change of how much is plugged.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        self.region.progress()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queues(&self) -> &QueueSet {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }

    fn config(&self) -> &[u8] {
        self.region.bytes()
    }
}

impl MutEventSubscriber for Mem {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if !self.queues.take_kick(QUEUE) {
            return;
        }
        let Self { queues, region } = self;
        queues.serve(QUEUE, REQUESTS_PER_TURN, |chain, memory| {
            let mut request = [0; REQUEST_LEN];
            let whole = chain.reader(memory).read_exact(&mut request).is_ok();
            let (kind, state) = region.answer(Request::parse(&request).filter(|_| whole), memory);
            chain.writer(memory).write(&response(kind, state))
        });
    }
}
