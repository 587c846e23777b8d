//! What a block device is made from.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::backend::DiskError;
use super::engine::EngineKind;
use crate::rate::Limits;

/// Queues that a disk has at most, however many vCPUs there are: one thread of the host serves them all.
pub const MAX_QUEUES: u16 = 8;

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
    /// Too many or too few queues.
    #[error("{0} queues: a disk has 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// io_uring was asked for and is not to be had.
    #[error("cannot use io_uring for the disk: {0}")]
    Engine(io::Error),
    /// No eventfd or timer.
    #[error("cannot make an eventfd or timer for the disk: {0}")]
    Descriptor(#[from] io::Error),
    /// The disk is not the one of the snapshot.
    #[error(
        "the disk has {found} sectors of 512 bytes (or other blocks, queues or access), the snapshot was taken with {saved}"
    )]
    Changed {
        /// Sectors in the snapshot.
        saved: u64,
        /// Sectors now.
        found: u64,
    },
    /// There is a disk already, or the driver still has the last one.
    #[error("the place for the disk is taken, or the guest still uses what was there before")]
    Taken,
    /// There is no disk.
    #[error("there is no disk")]
    Empty,
}

/// When a write is durable, as the guest finds it; its driver may choose the other (VIRTIO_BLK_F_CONFIG_WCE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// After the next flush.
    #[default]
    Writeback,
    /// When it is done.
    Writethrough,
}

/// How a disk is served; the default is good for most.
#[derive(Clone, Copy, Debug)]
pub struct BlockOptions {
    /// Request queues, 1 to [`MAX_QUEUES`]. A disk in a slot has as many as the slot.
    pub queues: u16,
    /// The mode that a driver finds.
    pub cache: CacheMode,
    /// Bandwidth and operations.
    pub limits: Limits,
    /// How requests are carried out.
    pub engine: EngineKind,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self { queues: 1, cache: CacheMode::default(), limits: Limits::default(), engine: EngineKind::default() }
    }
}

/// What a block device is made from.
#[derive(Debug)]
pub struct BlockConfig {
    /// A regular file or a block device, opened for what `read_only` says, with O_DIRECT or without.
    pub file: File,
    /// The guest must not write.
    pub read_only: bool,
    /// What the guest finds as the disk's serial: at most 20 printable ASCII characters.
    pub serial: String,
    /// How it is served.
    pub options: BlockOptions,
}

impl BlockConfig {
    /// A disk on an open file.
    #[must_use]
    pub fn new(file: File, read_only: bool, serial: &str) -> Self {
        Self { file, read_only, serial: serial.to_owned(), options: BlockOptions::default() }
    }

    /// Opens the file at `path` for a device, through the host's page cache.
    ///
    /// # Errors
    /// [`BlockError::Open`].
    pub fn open(path: &Path, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        Self::open_with(path, read_only, serial, 0)
    }

    /// Opens the file at `path` for a device, past the host's page cache (O_DIRECT). What the guest asks for that the
    /// host cannot do so goes through a buffer of its own.
    ///
    /// # Errors
    /// [`BlockError::Open`], also where the file system has no O_DIRECT.
    pub fn open_direct(path: &Path, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        Self::open_with(path, read_only, serial, libc::O_DIRECT)
    }

    /// The same with `options`.
    #[must_use]
    pub fn with(self, options: BlockOptions) -> Self {
        Self { options, ..self }
    }

    fn open_with(path: &Path, read_only: bool, serial: &str, flags: libc::c_int) -> Result<Self, BlockError> {
        // O_NONBLOCK: a FIFO by that name is to be refused, not waited for.
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | flags);
        let file = options.open(path).map_err(|error| BlockError::Open { path: path.to_path_buf(), error })?;
        Ok(Self::new(file, read_only, serial))
    }
}
