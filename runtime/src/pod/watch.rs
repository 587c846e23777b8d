//! Out-of-memory kills in a container, and who is told of them.
//!
//! Everything that tells of kills has their number so far: the agent's events, its statistics, and how a process ended.
//! So none is missed or told twice, in whatever order they arrive.

use std::sync::Arc;

use tokio::sync::watch;

use super::Container;

/// How many there were so far, as far as is known.
#[derive(Debug)]
pub(super) struct Kills(watch::Sender<u64>);

impl Kills {
    /// None.
    pub fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// There were so many.
    pub fn note(&self, kills: u64) {
        self.0.send_if_modified(|known| {
            let more = kills > *known;
            *known = kills.max(*known);
            more
        });
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    /// So many processes were killed for want of memory.
    pub kills: u64,
    /// The container's first process has ended: nothing more will happen.
    pub ended: bool,
}

/// A container that is watched. Its sandbox process does not end before this is dropped, for a while.
pub struct Watched {
    container: Arc<Container>,
    kills: watch::Receiver<u64>,
    /// Told already.
    told: u64,
    watchers: watch::Sender<usize>,
}

impl Watched {
    /// From what is known now on.
    pub(super) fn new(container: Arc<Container>, watchers: watch::Sender<usize>) -> Self {
        let mut kills = container.kills().0.subscribe();
        let told = *kills.borrow_and_update();
        watchers.send_modify(|watchers| *watchers += 1);
        Self { container, kills, told, watchers }
    }

    /// Waits for something to happen.
    pub async fn next(&mut self) -> News {
        let ended = tokio::select! {
            // The sender lives in the container. Kills that are known go before the end.
            biased;
            _ = self.kills.changed() => false,
            exit = self.container.init().wait() => {
                self.container.kills().note(exit.oom_kills);
                true
            }
        };
        let kills = *self.kills.borrow_and_update();
        let new = kills - self.told;
        self.told = kills;
        News { kills: new, ended }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watchers.send_modify(|watchers| *watchers -= 1);
    }
}
