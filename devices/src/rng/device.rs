//! The device behind the transport.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use log::warn;
use serde::{Deserialize, Serialize};

use super::fill::fill;
use crate::virtio::queue::QueueSet;
use crate::virtio::{DeviceType, VirtioDevice};

/// `requestq`, the only queue.
const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// Requests that one turn of the event loop serves, so that other devices get theirs.
const REQUESTS_PER_TURN: usize = 16;

/// The state of the device, which is nothing beyond its queue's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

/// The entropy device.
pub struct Rng {
    queues: QueueSet,
}

impl Rng {
    /// A new device.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Self { queues: QueueSet::new(&[QUEUE_SIZE])? })
    }

    /// The state for a snapshot; the queue's is the transport's.
    #[must_use]
    pub fn save(&self) -> RngState {
        RngState {}
    }

    /// A device as it was saved.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn restore(_state: &RngState) -> io::Result<Self> {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &QueueSet {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut QueueSet {
        &mut self.queues
    }

    fn config(&self) -> &[u8] {
        &[]
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if !self.queues.take_kick(QUEUE) {
            return;
        }
        self.queues.serve(QUEUE, REQUESTS_PER_TURN, |chain, memory| {
            let mut buffers = chain.writer(memory);
            if let Err(error) = fill(&mut buffers) {
                warn!("no random bytes for the guest: {error}");
            }
            buffers.consumed()
        });
    }
}
