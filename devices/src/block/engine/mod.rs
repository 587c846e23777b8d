//! How requests are carried out: many at once by io_uring, or one after the other where that is not to be had.

mod blocking;
mod ring;

use std::io;
use std::os::fd::RawFd;

use log::info;
use serde::{Deserialize, Serialize};

use super::backend::Disk;
use super::flight::Flight;

/// Requests that a disk has under way at most. The rest waits in the queues.
pub const DEPTH: usize = 128;

/// Which engine a disk gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineKind {
    /// io_uring where the host's kernel, its settings and this process' seccomp filter allow it.
    #[default]
    Automatic,
    /// io_uring, or an error.
    IoUring,
    /// One system call after the other.
    Blocking,
}

/// What carries requests out. A request that was started is finished by the host alone: it cannot be called back.
pub trait Engine: Send {
    /// Its name, for logs and tests.
    fn name(&self) -> &'static str;

    /// How many more requests it takes now.
    fn room(&self) -> usize;

    /// Takes a request. It may be finished when this returns.
    fn start(&mut self, disk: &Disk, flight: Flight);

    /// Tells the kernel of all that was started, and hears of what it has finished.
    fn look(&mut self, disk: &Disk);

    /// A request that is finished.
    fn finished(&mut self) -> Option<Flight>;

    /// Waits until all that was started is finished.
    fn settle(&mut self, disk: &Disk);
}

/// The engine of `kind`; it writes to the eventfd `completions` when requests are finished while nobody looks.
///
/// # Errors
/// That there is no io_uring and no other was wanted.
pub fn open(kind: EngineKind, completions: RawFd) -> io::Result<Box<dyn Engine>> {
    if kind != EngineKind::Blocking {
        match ring::Ring::new(completions) {
            Ok(ring) => return Ok(Box::new(ring)),
            Err(error) if kind == EngineKind::IoUring => return Err(error),
            // ENOSYS, EPERM (seccomp, kernel.io_uring_disabled) or ENOMEM (RLIMIT_MEMLOCK on old kernels).
            Err(error) => info!("no io_uring for a disk, which then does one request after the other: {error}"),
        }
    }
    Ok(Box::new(blocking::Blocking::default()))
}
