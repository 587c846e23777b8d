//! The device behind the transport.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::backend::{Disk, DiskError};
use super::layout::*;
use super::request::Context;
use super::state::BlockState;
use crate::virtio::queue::QueueSet;
use crate::virtio::{ActivateError, DeviceType, VirtioDevice};

/// `requestq1`, the only queue.
const QUEUE: usize = 0;
/// Requests that one turn of the event loop serves, so that other devices get theirs.
const REQUESTS_PER_TURN: usize = 32;

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The file cannot be opened.
    #[error("cannot open the disk {path}: {error}")]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// Of open(2).
        error: io::Error,
    },
    /// The file is no disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The serial number is too long or has bytes that the guest could not show.
    #[error("the disk's serial {0:?} must be at most 20 printable ASCII characters")]
    Serial(String),
    /// No eventfd.
    #[error("cannot make an eventfd for the disk: {0}")]
    EventFd(io::Error),
    /// The disk is not the one of the snapshot.
    #[error(
        "the disk has {found} sectors of 512 bytes (or other blocks or access), the snapshot was taken with {saved}"
    )]
    Changed {
        /// Sectors in the snapshot.
        saved: u64,
        /// Sectors now.
        found: u64,
    },
}

/// What a block device is made from.
#[derive(Debug)]
pub struct BlockConfig {
    /// A regular file or a block device, opened for what `read_only` says.
    pub file: File,
    /// The guest must not write.
    pub read_only: bool,
    /// What the guest finds as the disk's serial: at most 20 printable ASCII characters.
    pub serial: String,
}

impl BlockConfig {
    /// Opens the file at `path` for a device.
    ///
    /// # Errors
    /// [`BlockError::Open`].
    pub fn open(path: &Path, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        // O_NONBLOCK: a FIFO by that name is to be refused, not waited for.
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(|error| BlockError::Open { path: path.to_path_buf(), error })?;
        Ok(Self { file, read_only, serial: serial.to_owned() })
    }
}

/// The block device.
pub struct Block {
    queues: QueueSet,
    disk: Disk,
    config: [u8; CONFIG_BYTES],
    read_only: bool,
    serial: [u8; ID_BYTES],
    /// Features that the driver accepted.
    features: u64,
}

impl Block {
    /// A new device.
    ///
    /// # Errors
    /// When the file or the serial is not possible.
    pub fn new(config: BlockConfig) -> Result<Self, BlockError> {
        let serial = serial(&config.serial).ok_or(BlockError::Serial(config.serial))?;
        let disk = Disk::new(config.file)?;
        let queues = QueueSet::new(&[QUEUE_SIZE]).map_err(BlockError::EventFd)?;
        let space = super::layout::config(&disk.geometry());
        Ok(Self { queues, disk, config: space, read_only: config.read_only, serial, features: 0 })
    }

    /// The state for a snapshot; the queue's is the transport's.
    #[must_use]
    pub fn save(&self) -> BlockState {
        let geometry = self.disk.geometry();
        let serial = self.serial.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte));
        BlockState {
            sectors: geometry.sectors,
            logical_block: geometry.logical,
            read_only: self.read_only,
            serial: serial.collect(),
        }
    }

    /// A device as it was saved, on a disk that looks the same to the guest. The saved serial is the one that counts.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`BlockError::Changed`].
    pub fn restore(state: &BlockState, config: BlockConfig) -> Result<Self, BlockError> {
        let block = Self::new(BlockConfig { serial: state.serial.clone(), ..config })?;
        if block.save() == *state {
            Ok(block)
        } else {
            Err(BlockError::Changed { saved: state.sectors, found: block.disk.geometry().sectors })
        }
    }
}

/// The serial as GET_ID returns it: padded with zeroes.
fn serial(text: &str) -> Option<[u8; ID_BYTES]> {
    let mut bytes = [0; ID_BYTES];
    bytes.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()).then_some(bytes)
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH;
        always | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
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
        Ok(())
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.register(ops);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if !self.queues.take_kick(QUEUE) {
            return;
        }
        let context =
            Context { disk: &self.disk, features: self.features, read_only: self.read_only, serial: &self.serial };
        self.queues.serve(QUEUE, REQUESTS_PER_TURN, |chain, memory| context.serve(chain, memory));
    }
}
