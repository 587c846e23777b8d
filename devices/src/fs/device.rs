//! The virtio side: configuration space and queues (virtio 1.3, 5.11).

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::{FsShare, FsState};
use crate::virtio::queue::QueueSet;
use crate::virtio::{DeviceType, VirtioDevice};

/// Length of the tag in the configuration space in bytes.
const TAG_LEN: usize = 36;
/// The tag and `num_request_queues`.
const CONFIG_LEN: usize = TAG_LEN + 4;
const REQUEST_QUEUES: u8 = 1;
/// 256 pages and the heads of one request fit without an indirect table; Linux caps requests at what fits.
const QUEUE_SIZE: u16 = 1024;
/// Requests that one turn of the event loop serves, so that other devices, and a VMM that wants to stop, get theirs.
const REQUESTS_PER_TURN: usize = 64;

/// A virtio-fs device.
///
/// The thread whose event loop runs it gets its own umask and its own working directory with the first request.
pub struct Fs {
    share: FsShare,
    queues: QueueSet,
    config: [u8; CONFIG_LEN],
}

impl Fs {
    /// A device that a guest mounts by `tag` and that serves `share`. A share serves one device at a time.
    ///
    /// # Errors
    /// `InvalidInput` for an empty tag or one of more than 36 bytes; `ResourceBusy` when the share has
    /// a device already; when no eventfd can be made.
    pub fn new(tag: &str, share: FsShare) -> io::Result<Self> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            let message = format!("the virtio-fs tag {tag:?} must have 1 to {TAG_LEN} bytes, none of them NUL");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        // The high-priority queue comes first (5.11.2).
        let queues = QueueSet::new(&[QUEUE_SIZE; 1 + REQUEST_QUEUES as usize])?;
        let mut config = [0; CONFIG_LEN];
        for (to, from) in config.iter_mut().zip(tag.as_bytes()) {
            *to = *from;
        }
        config[TAG_LEN] = REQUEST_QUEUES;
        share.attach()?;
        Ok(Self { share, queues, config })
    }

    /// The share behind the device.
    #[must_use]
    pub fn share(&self) -> &FsShare {
        &self.share
    }

    /// The state for a snapshot, queues apart: they are the transport's. The event loop must be parked.
    #[must_use]
    pub fn save(&self) -> FsState {
        self.share.save()
    }

    /// Serves what is available on queue `index`; where that is more than a turn's work, the rest comes in the next.
    fn serve(&mut self, index: usize) {
        let Some(memory) = self.queues.memory() else { return };
        self.queues.disable_kicks(index);
        for _ in 0..REQUESTS_PER_TURN {
            if let Some(chain) = self.queues.pop(index) {
                let used = self.share.handle(chain.reader(&memory), chain.writer(&memory));
                self.queues.add_used(index, chain.head(), used);
                self.queues.notify(index);
            } else if !self.queues.enable_kicks(index) {
                return;
            }
        }
        self.queues.kick(index);
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.share.detach();
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
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
        &self.config
    }

    fn reset(&mut self) {
        self.share.reset();
    }
}

impl MutEventSubscriber for Fs {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let index = events.data() as usize;
        if self.queues.take_kick(index) {
            self.serve(index);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }
}
