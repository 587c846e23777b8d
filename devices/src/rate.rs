//! Token buckets: how many bytes and operations a device may move in a time, with a burst.
//!
//! The clock is the caller's, so that tests have their own. A device that has no tokens left does not wait: it arms a
//! [`Timer`] in its event loop and goes on when that rings.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

const NANOS: u128 = 1_000_000_000;

/// A steady flow with a burst on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Tokens (bytes or operations) that come in each second; at least 1.
    pub per_second: u64,
    /// Tokens that gather while nothing is taken: what may be taken at once. At least 1.
    pub burst: u64,
}

impl Rate {
    /// `per_second` with a burst of a tenth of a second's worth.
    #[must_use]
    pub fn steady(per_second: u64) -> Self {
        Self { per_second, burst: (per_second / 10).max(1) }
    }
}

/// The limits of one device; None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of data.
    pub bandwidth: Option<Rate>,
    /// Requests or packets, whatever their length.
    pub operations: Option<Rate>,
}

/// One bucket. It may go into debt by what is taken at once, so that nothing is too large for it: the next taker waits
/// the longer.
#[derive(Clone, Debug)]
struct Bucket {
    rate: Rate,
    /// In billionths of a token, so that no part of one is lost between two looks; negative while in debt.
    level: i128,
    /// When `level` was true.
    at: Duration,
}

impl Bucket {
    fn new(rate: Rate, now: Duration) -> Self {
        let rate = Rate { per_second: rate.per_second.max(1), burst: rate.burst.max(1) };
        Self { rate, level: Self::full(rate), at: now }
    }

    fn full(rate: Rate) -> i128 {
        i128::from(rate.burst) * NANOS as i128
    }

    fn refill(&mut self, now: Duration) {
        // A clock that went back brings nothing, and takes nothing.
        let passed = now.saturating_sub(self.at).as_nanos().min(u128::from(u64::MAX));
        let gained = passed.saturating_mul(u128::from(self.rate.per_second)).min(i128::MAX as u128 / 4) as i128;
        self.level = (self.level + gained).min(Self::full(self.rate));
        self.at = now;
    }

    /// How long until there is more than nothing in it; zero if there is.
    fn wait(&self) -> Duration {
        if self.level > 0 {
            return Duration::ZERO;
        }
        let nanos = self.level.unsigned_abs() / u128::from(self.rate.per_second) + 1;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// The buckets of one device.
#[derive(Clone, Debug, Default)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// Full buckets at the time `now`.
    #[must_use]
    pub fn new(limits: Limits, now: Duration) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self { bandwidth: bucket(limits.bandwidth), operations: bucket(limits.operations) }
    }

    /// Whether there is any limit.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.bandwidth.is_some() || self.operations.is_some()
    }

    /// Takes one operation of `bytes` bytes, or nothing if one of the buckets is empty.
    ///
    /// # Errors
    /// How long until it is worth another try.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        let mut buckets = [(&mut self.bandwidth, bytes), (&mut self.operations, 1)];
        let mut wait = Duration::ZERO;
        // What takes no bytes does not wait for any.
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket.as_mut().filter(|_| *tokens > 0) {
                bucket.refill(now);
                wait = wait.max(bucket.wait());
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in buckets {
            if let Some(bucket) = bucket {
                bucket.level -= i128::from(tokens) * NANOS as i128;
            }
        }
        Ok(())
    }
}

/// The time that buckets are looked at by: CLOCK_MONOTONIC.
#[must_use]
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// A timerfd that an event loop watches.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// One that does not run.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?))
    }

    /// Rings once after `wait`, instead of whatever was set before.
    ///
    /// # Errors
    /// Of timerfd_settime(2).
    pub fn arm(&self, wait: Duration) -> io::Result<()> {
        // Zero would switch it off.
        self.set(wait.max(Duration::from_nanos(1)))
    }

    /// Does not ring any more.
    ///
    /// # Errors
    /// Of timerfd_settime(2).
    pub fn disarm(&self) -> io::Result<()> {
        self.set(Duration::ZERO)
    }

    /// Whether it has rung since the last call.
    pub fn has_rung(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }

    fn set(&self, wait: Duration) -> io::Result<()> {
        // Years are as good as for ever.
        let tv_sec = i64::try_from(wait.as_secs().min(u64::from(u32::MAX))).unwrap_or(i64::MAX);
        let value = Timespec { tv_sec, tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn limiter(bandwidth: Option<(u64, u64)>, operations: Option<(u64, u64)>) -> Limiter {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        Limiter::new(Limits { bandwidth: bandwidth.map(rate), operations: operations.map(rate) }, Duration::ZERO)
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_waits() {
        let mut limiter = limiter(None, Some((10, 3)));
        for _ in 0..3 {
            assert_eq!(limiter.take(1 << 40, Duration::ZERO), Ok(()));
        }
        let wait = limiter.take(0, Duration::ZERO).unwrap_err();
        assert!(wait <= Duration::from_nanos(1), "an empty bucket has something in it at once: {wait:?}");
        assert_eq!(limiter.take(0, Duration::from_millis(1)), Ok(()));
        let wait = limiter.take(0, Duration::from_millis(1)).unwrap_err();
        assert!((Duration::from_millis(99)..Duration::from_millis(100)).contains(&wait), "{wait:?}");
        assert_eq!(limiter.take(0, Duration::from_millis(1) + wait), Ok(()));
    }

    #[test]
    fn what_is_larger_than_the_burst_goes_into_debt() {
        let mut limiter = limiter(Some((1000, 10)), None);
        assert_eq!(limiter.take(2010, Duration::ZERO), Ok(()));
        let wait = limiter.take(1, Duration::from_secs(1)).unwrap_err();
        assert!((Duration::from_millis(1000)..Duration::from_millis(1001)).contains(&wait), "{wait:?}");
        assert_eq!(limiter.take(0, Duration::from_secs(1)), Ok(()), "no bytes, no wait");
    }

    #[test]
    fn a_clock_that_goes_back_brings_nothing() {
        let mut limiter = limiter(None, Some((1, 1)));
        assert_eq!(limiter.take(0, Duration::from_secs(100)), Ok(()));
        assert!(limiter.take(0, Duration::from_secs(100)).is_err());
        assert!(limiter.take(0, Duration::from_secs(1)).is_err());
    }

    #[test]
    fn a_timer_rings_once() {
        let timer = Timer::new().unwrap();
        assert!(!timer.has_rung());
        timer.arm(Duration::ZERO).unwrap();
        let mut poll = [libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        // SAFETY: one pollfd, which lives until the call returns.
        assert_eq!(unsafe { libc::poll(poll.as_mut_ptr(), 1, 10_000) }, 1);
        assert!(timer.has_rung() && !timer.has_rung());
        timer.arm(Duration::from_secs(1 << 40)).unwrap();
        timer.disarm().unwrap();
    }

    proptest! {
        /// Whatever comes when: never more than the burst, what came in since, and one overdraft.
        #[test]
        fn no_more_than_the_rate_goes_through(
            per_second in 1..2_000_000_000u64,
            burst in 1..1_000_000_000u64,
            takes in prop::collection::vec((0..4000 * MS, 1..1_000_000_000u64), 1..200),
        ) {
            let mut limiter = limiter(Some((per_second, burst)), None);
            let (mut now, mut taken) = (Duration::ZERO, 0u128);
            for (step, bytes) in takes {
                now += Duration::from_nanos(step);
                if limiter.take(bytes, now).is_ok() {
                    // Before this one, the bucket was not empty.
                    let most = u128::from(burst) * NANOS + now.as_nanos() * u128::from(per_second);
                    prop_assert!(taken * NANOS < most);
                    taken += u128::from(bytes);
                }
            }
        }

        /// Who waits as long as he is told goes through, and not before: the rate is reached.
        #[test]
        fn the_rate_is_reached(
            per_second in 1..2_000_000_000u64,
            burst in 1..1_000_000u64,
            sizes in prop::collection::vec(1..1_000_000u64, 1..100),
        ) {
            let mut limiter = limiter(Some((per_second, burst)), Some((per_second, burst)));
            let (mut now, mut taken) = (Duration::ZERO, 0u128);
            for bytes in sizes {
                if let Err(wait) = limiter.take(bytes, now) {
                    prop_assert!(wait > Duration::ZERO);
                    let before = wait.saturating_sub(Duration::from_nanos(2));
                    prop_assert!(before.is_zero() || limiter.take(bytes, now + before).is_err());
                    now += wait;
                    prop_assert_eq!(limiter.take(bytes, now), Ok(()));
                }
                taken += u128::from(bytes);
            }
            // All but the burst and the last one had to wait for its tokens, each rounded up by a nanosecond.
            let earned = now.as_nanos() * u128::from(per_second);
            prop_assert!(earned <= taken * NANOS + 200 * u128::from(per_second) * 2);
        }
    }
}
