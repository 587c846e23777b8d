//! How far a guest has come, for those who wait for it.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How many bytes are plugged.
#[derive(Debug, Default)]
pub struct Progress {
    plugged: Mutex<u64>,
    changed: Condvar,
}

impl Progress {
    /// So many now.
    pub(super) fn note(&self, plugged: u64) {
        *self.plugged.lock().unwrap_or_else(PoisonError::into_inner) = plugged;
        self.changed.notify_all();
    }

    /// Waits until `is_enough` of them are plugged, or nothing has changed for `patience`; how many are plugged then.
    pub fn wait(&self, patience: Duration, is_enough: impl Fn(u64) -> bool) -> u64 {
        let mut plugged = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        while !is_enough(*plugged) {
            let before = *plugged;
            let waited = self.changed.wait_timeout(plugged, patience);
            let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            plugged = now;
            if timeout.timed_out() && *plugged == before {
                break;
            }
        }
        *plugged
    }
}
