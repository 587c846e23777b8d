//! The device behind the transport.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use log::warn;
use serde::{Deserialize, Serialize};

use super::discard::{PAGE, discard, discard_pages};
use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, QueueSet};
use crate::virtio::{ActivateError, DeviceType, VirtioDevice};

/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: a guest that is out of memory takes pages out of the balloon (virtio 1.3, 5.5.3).
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`: the guest tells of free pages.
const PAGE_REPORTING: u64 = 1 << 5;
/// `inflateq`: pages that the guest gives into the balloon.
const INFLATE: usize = 0;
/// `reporting_vq`: pages that are free just now. It comes after `deflateq`, by which the guest takes pages out of the balloon
/// again: the queues between, which not every device has, are not counted.
const REPORTING: usize = 2;
/// Linux' driver gives 256 pages in one request; its reports want at least 32 descriptors.
const QUEUE_SIZES: [u16; 3] = [64, 64, 32];
/// Requests of one queue in one turn of the event loop, which has other devices to serve: one may be of many MiB.
const REQUESTS_PER_TURN: usize = 1;
/// Requests that one kick of a vCPU has it serve: Linux has one report at a time, and waits for its end. With the second
/// place the queue is seen to be empty.
const REPORTS_PER_KICK: usize = 2;
/// The most pages of one request of the balloon that are looked at.
const MOST_PAGES: usize = 4096;
/// `struct virtio_balloon_config`: `num_pages` and `actual` (virtio 1.3, 5.5.4); more comes with features.
const CONFIG_LEN: usize = 8;
/// Where `actual` is in it.
const ACTUAL: usize = 4;

/// The state of the device beyond its queues'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the balloon is to hold.
    pub num_pages: u32,
    /// Pages that the driver says it holds.
    pub actual: u32,
}

/// The balloon. Free pages are reported and given back to the host as they come; a guest that is out of memory takes
/// pages out of the balloon by itself.
///
/// Pages of a report are nobody's in the guest until the device has answered: they may be all that is free of a small one,
/// and whoever needs memory meanwhile is killed for want of it. So the vCPU that tells of them serves the report itself,
/// however busy the host is: the guest does not run on there before it has its pages back.
pub struct Balloon {
    queues: QueueSet,
    config: [u8; CONFIG_LEN],
    /// The driver has asked for reports.
    reports: bool,
    given_back: u64,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Self::restore(&BalloonState::default())
    }

    /// The state for a snapshot; the queues' is the transport's.
    #[must_use]
    pub fn save(&self) -> BalloonState {
        let (num_pages, actual) = self.config.split_at(ACTUAL);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
        BalloonState { num_pages: number(num_pages), actual: number(actual) }
    }

    /// A device as it was saved.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn restore(state: &BalloonState) -> io::Result<Self> {
        let mut balloon =
            Self { queues: QueueSet::new(&QUEUE_SIZES)?, config: [0; CONFIG_LEN], reports: false, given_back: 0 };
        balloon.put(0, state.num_pages);
        balloon.put(ACTUAL, state.actual);
        Ok(balloon)
    }

    /// Asks the guest to have `mib` MiB in the balloon. It does so as far as it can: see [`Self::held_mib`].
    pub fn set_target(&mut self, mib: u32) {
        let pages = u64::from(mib) * ((1 << 20) / PAGE as u64);
        self.put(0, u32::try_from(pages).unwrap_or(u32::MAX));
        self.queues.signal_config();
    }

    /// How many MiB are in the balloon, as the guest says.
    #[must_use]
    pub fn held_mib(&self) -> u32 {
        self.save().actual / ((1 << 20) / PAGE as u32)
    }

    /// Bytes that were given back to the host since the device was made, some of them perhaps more than once.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.given_back
    }

    fn put(&mut self, offset: usize, value: u32) {
        if let Some(field) = self.config.get_mut(offset..offset + size_of::<u32>()) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn serve(&mut self, queue: usize, most: usize) {
        let Self { queues, given_back, reports, .. } = self;
        let mut strangers = 0;
        queues.serve(queue, most, |chain, memory| {
            let done = match queue {
                INFLATE => inflate(chain, memory).map(|(bytes, unknown)| {
                    strangers += unknown;
                    bytes
                }),
                REPORTING if *reports => report(chain, memory),
                // Pages that leave the balloon the host finds again when they are touched; a report that nobody has asked
                // for is none.
                _ => Ok(0),
            };
            match done {
                Ok(bytes) => *given_back += bytes as u64,
                Err(error) => warn!("memory of the guest cannot be given back: {error}"),
            }
            0
        });
        if strangers > 0 {
            queues.complain(&format_args!("{strangers} pages for the balloon are none of the guest's"));
        }
    }
}

/// Takes pages into the balloon: their numbers, 32 bits each (virtio 1.3, 5.5.6).
fn inflate(chain: &Chain, memory: &GuestMemory) -> io::Result<(usize, usize)> {
    let mut buffers = chain.reader(memory);
    let mut pages = Vec::new();
    while pages.len() < MOST_PAGES
        && let Ok(number) = buffers.read_obj::<u32>()
    {
        pages.push(u32::from_le(number));
    }
    discard_pages(memory, pages)
}

/// Lets go of pages that are free just now: the driver has them as buffers to write to (virtio 1.3, 5.5.6.7).
fn report(chain: &Chain, memory: &GuestMemory) -> io::Result<usize> {
    chain.writer(memory).pieces().try_fold(0, |bytes, piece| Ok(bytes + discard(piece)?))
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_REPORTING
    }

    fn queues(&self) -> &QueueSet {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }

    fn served_by_vcpu(&self, index: usize) -> bool {
        index == REPORTING
    }

    fn kicked(&mut self, index: usize) {
        if self.served_by_vcpu(index) {
            self.serve(index, REPORTS_PER_KICK);
        } else {
            self.queues.kick(index);
        }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Only `actual` is the driver's.
        for (index, byte) in (offset..).zip(data) {
            if let Some(place) = self.config.get_mut(index).filter(|_| index >= ACTUAL) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, features: u64) -> Result<(), ActivateError> {
        self.reports = features & PAGE_REPORTING != 0;
        Ok(())
    }

    fn reset(&mut self) {
        self.reports = false;
        self.put(ACTUAL, 0);
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let queue = events.data() as usize;
        if self.queues.take_kick(queue) {
            self.serve(queue, REQUESTS_PER_TURN);
        }
    }
}
