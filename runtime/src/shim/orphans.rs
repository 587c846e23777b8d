//! What hooks and loggers leave running is the server's to wait for when it ends: the host may have no init that does.

use std::io;

use nix::sys::signal::{SigSet, Signal};

use crate::host;
use crate::process::signals::Signals;

/// Processes that come to this one as their sub-reaper.
pub struct Orphans {
    /// SIGCHLD, which is blocked, so that it interrupts nothing.
    ended: Signals,
}

impl Orphans {
    /// Becomes a sub-reaper. To be called before there are threads, or a child.
    ///
    /// # Errors
    /// Those of [`host::adopt_orphans`] and [`Signals::block_all`].
    pub fn adopt() -> io::Result<Self> {
        let ended = Signals::block_all(&SigSet::from_iter([Signal::SIGCHLD]))?;
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
        let ended = self.ended.listen()?;
        loop {
            // A signal may stand for many children, so they are looked for once it was taken.
            ended.next().await?;
            if let Err(error) = host::reap_orphans() {
                log::warn!("cannot look for orphans: {error}");
            }
        }
    }
}
