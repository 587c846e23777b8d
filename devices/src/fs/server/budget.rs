//! How many file descriptors the guest may make the process hold.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, getrlimit};

/// Descriptors that are left for everything else in the process, unless the limit is low.
const RESERVE: u64 = 512;
/// Files that are held open because the guest knows them, at most, and at most half of what is left. Each costs the
/// host's kernel a kilobyte or more, which it cannot reclaim.
const MAX_NODES: u64 = 1 << 16;

/// The limit as it was seen last. Linux gives out the lowest free number, so a number shows how full the table is.
#[derive(Debug, Default)]
pub struct Budget {
    usable: AtomicU64,
}

impl Budget {
    /// Whether there are so few descriptors that `fd` can be kept, as the process' limit is (RLIMIT_NOFILE).
    pub fn fits(&self, fd: &OwnedFd) -> bool {
        let number = u64::from(fd.as_raw_fd().unsigned_abs());
        if number < self.usable.load(Ordering::Relaxed) {
            return true;
        }
        // The limit may have been raised since.
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let usable = limit - RESERVE.min(limit / 4);
        self.usable.store(usable, Ordering::Relaxed);
        number < usable
    }

    /// How many files may be open because the guest knows them.
    pub fn nodes(&self) -> usize {
        MAX_NODES.min(self.usable.load(Ordering::Relaxed) / 2) as usize
    }
}
