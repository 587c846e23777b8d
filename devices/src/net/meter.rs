//! Limits of what goes through the device, each for all of its pairs of queues together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use log::error;
use serde::{Deserialize, Serialize};

use super::device::Net;
use super::pair::Pair;
use crate::rate::{Limiter, Limits, Timer, now};

/// What a guest may send and receive: bytes of frames, and packets as they are handed over, segmented or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetLimits {
    /// From the host; what comes beyond that waits in the backend, and is lost when that is full.
    pub receive: Limits,
    /// To the host; the guest waits.
    pub transmit: Limits,
}

/// The limits of one direction.
pub(super) struct Meter {
    limiter: Mutex<Limiter>,
    /// There are any: without, nothing is counted.
    limited: AtomicBool,
}

impl Meter {
    pub fn new(limits: Limits) -> Self {
        let limiter = Limiter::new(limits, now());
        Self { limited: AtomicBool::new(limiter.is_limited()), limiter: Mutex::new(limiter) }
    }

    fn set(&self, limits: Limits) {
        let limiter = Limiter::new(limits, now());
        self.limited.store(limiter.is_limited(), Ordering::Release);
        *self.limiter.lock().unwrap_or_else(PoisonError::into_inner) = limiter;
    }

    /// Takes one packet of `len` bytes.
    ///
    /// # Errors
    /// How long until it is worth another try.
    fn take(&self, len: usize) -> Result<(), Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return Ok(());
        }
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner).take(len as u64, now())
    }
}

/// A pair's alarm, for what has to wait.
pub(super) struct Alarm {
    timer: Timer,
    /// When it rings.
    at: Option<Duration>,
}

impl Alarm {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { timer: Timer::new()?, at: None })
    }

    /// What the event loop watches.
    pub fn timer(&self) -> &Timer {
        &self.timer
    }

    /// It has rung.
    pub fn answer(&mut self) {
        if self.timer.has_rung() {
            self.at = None;
        }
    }

    fn ring_after(&mut self, wait: Duration) {
        let at = now() + wait;
        if self.at.is_some_and(|set| set <= at) {
            return;
        }
        match self.timer.arm(wait) {
            Ok(()) => self.at = Some(at),
            Err(error) => error!("cannot set a timer for a network device that is held up: {error}"),
        }
    }
}

impl Pair {
    /// Whether a packet of `len` bytes may be sent now; if not, the pair is woken when it may be.
    pub(super) fn may_send(&mut self, len: usize) -> bool {
        self.sends.take(len).map_err(|wait| self.alarm.ring_after(wait)).is_ok()
    }

    /// Counts a packet that was received: how long one is is known when it is there, so it is paid for before the next.
    pub(super) fn owe(&mut self, len: usize) {
        self.owed = self.receives.take(len).is_err().then_some(len);
    }

    /// Whether all that was received is paid for; if not, the pair is woken when it may be.
    pub(super) fn may_receive(&mut self) -> bool {
        let Some(len) = self.owed else { return true };
        let paid = self.receives.take(len).map_err(|wait| self.alarm.ring_after(wait)).is_ok();
        if paid {
            self.owed = None;
        }
        paid
    }
}

impl Net {
    /// Sets other limits; they begin with full buckets.
    pub fn set_limits(&mut self, limits: NetLimits) {
        self.settings.limits = limits;
        self.receives.set(limits.receive);
        self.sends.set(limits.transmit);
        self.pairs().for_each(|pair| pair.wake());
    }
}
