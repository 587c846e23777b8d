//! How many file descriptors the guest may make the process hold.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Descriptors that are left for everything else in the process, unless the limit is low.
const RESERVE: u64 = 512;

/// The limit as it was seen last. Linux gives out the lowest free number, so a number shows how full the table is.
#[derive(Debug, Default)]
pub struct Budget {
    usable: AtomicU64,
}

impl Budget {
    /// Keeps `fd` unless the process comes too close to its limit (RLIMIT_NOFILE).
    ///
    /// # Errors
    /// ENFILE, which the guest's programs get as well ("Too many open files in system").
    pub fn admit(&self, fd: OwnedFd) -> Result<OwnedFd, Errno> {
        let number = u64::from(fd.as_raw_fd().unsigned_abs());
        if number < self.usable.load(Ordering::Relaxed) {
            return Ok(fd);
        }
        // The limit may have been raised since.
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let usable = limit - RESERVE.min(limit / 4);
        self.usable.store(usable, Ordering::Relaxed);
        if number < usable { Ok(fd) } else { Err(Errno::NFILE) }
    }
}
