//! The virtio side: configuration space and queues (virtio 1.3, 5.11).

use std::io;
use std::mem;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::pool::{Attendant, Pool, THREADS};
use super::{FsShare, FsState};
use crate::virtio::queue::{QueueError, QueueSet, QueueState};
use crate::virtio::{ActivateError, DeviceType, ReadyQueues, VirtioDevice, Worker};

/// Length of the tag in the configuration space in bytes.
const TAG_LEN: usize = 36;
/// The tag and `num_request_queues`.
const CONFIG_LEN: usize = TAG_LEN + 4;
const REQUEST_QUEUES: u8 = 1;
/// The high-priority queue comes first (5.11.2).
const QUEUES: usize = 1 + REQUEST_QUEUES as usize;
/// 256 pages and the heads of one request fit without an indirect table; Linux caps requests at what fits.
const QUEUE_SIZE: u16 = 1024;
/// Messages of the high-priority queue that one turn of the event loop takes, so that others get theirs.
const FORGETS_PER_TURN: usize = 64;

/// A virtio-fs device.
///
/// In here is the high-priority queue, on which the driver says what it forgets; requests are the [`Pool`]'s. Each thread
/// that serves them gets its own umask and its own working directory with the first one.
pub struct Fs {
    share: FsShare,
    /// Both; never active, as they are `forgets` and the pool's.
    queues: QueueSet,
    forgets: QueueSet,
    pool: Arc<Pool>,
    attendants: Vec<Arc<Mutex<Attendant>>>,
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
        let queues = QueueSet::new(&[QUEUE_SIZE; QUEUES])?;
        let (forgets, requests) = (queues.part(0..1)?, queues.part(1..QUEUES)?);
        let pool = Pool::new(share.clone(), requests)?;
        let attendants = (0..THREADS).map(|_| Arc::new(Mutex::new(Attendant(Arc::clone(&pool))))).collect();
        let mut config = [0; CONFIG_LEN];
        for (to, from) in config.iter_mut().zip(tag.as_bytes()) {
            *to = *from;
        }
        config[TAG_LEN] = REQUEST_QUEUES;
        share.attach()?;
        Ok(Self { share, queues, forgets, pool, attendants, config })
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

    fn workers(&self) -> Vec<Worker> {
        self.attendants.iter().map(|attendant| Arc::clone(attendant) as Worker).collect()
    }

    fn start(&mut self, mut ready: ReadyQueues, _features: u64) -> Result<(), ActivateError> {
        let queues = mem::take(&mut ready.queues);
        let [forgets, requests] = <[_; QUEUES]>::try_from(queues).map_err(|_| QueueError::Config)?;
        self.forgets.activate(ready.part(vec![forgets]));
        self.pool.start(ready.part(vec![requests]));
        Ok(())
    }

    fn stop(&mut self) {
        self.forgets.deactivate();
        self.pool.stop();
        self.share.reset();
    }

    fn save_queues(&self) -> Option<Vec<QueueState>> {
        let (mut all, requests) = (self.forgets.save()?, self.pool.save()?);
        all.extend(requests);
        Some(all)
    }
}

impl MutEventSubscriber for Fs {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.forgets.take_kick(0);
        self.forgets.fail_with_others();
        let share = &self.share;
        self.forgets
            .serve(0, FORGETS_PER_TURN, |chain, memory| share.handle(chain.reader(memory), chain.writer(memory)));
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.forgets.register(ops);
    }
}
