//! What hooks and loggers leave running is the server's to wait for when it ends: the host may have no init that does.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::host;

/// Processes that come to this one as their sub-reaper.
pub struct Orphans {
    /// Readable when a child has ended: SIGCHLD is blocked, so that it interrupts nothing.
    ended: SignalFd,
}

impl Orphans {
    /// Becomes a sub-reaper. To be called before there are threads, or a child.
    ///
    /// # Errors
    /// Those of [`host::adopt_orphans`], sigprocmask(2) and signalfd(2).
    pub fn adopt() -> io::Result<Self> {
        let mask = SigSet::from_iter([Signal::SIGCHLD]);
        mask.thread_block()?;
        let ended = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        host::adopt_orphans()?;
        Ok(Self { ended })
    }

    /// Waits for those that end, as long as this process lives.
    pub async fn reap(self) {
        if let Err(error) = self.try_reap().await {
            log::warn!("cannot wait for orphans: {error}");
        }
    }

    async fn try_reap(self) -> io::Result<()> {
        // SAFETY: the descriptor inside is the same open one until it is dropped, and `AsyncFd` owns it from here on.
        let ended = unsafe { AsyncFd::register_with_interest(self.ended, Interest::READABLE) }?;
        loop {
            let mut ready = ended.readable().await?;
            // A signal may stand for many children, so they are looked for once it was taken.
            while ended.get_ref().read_signal()?.is_some() {}
            ready.clear_ready();
            if let Err(error) = host::reap_orphans() {
                log::warn!("cannot look for orphans: {error}");
            }
        }
    }
}
