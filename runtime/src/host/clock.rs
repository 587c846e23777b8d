//! The time of day.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptor::awaited;

/// Now, in nanoseconds since the epoch.
#[must_use]
pub fn now_ns() -> u64 {
    // A clock before the epoch is one that was never set.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Tells when CLOCK_REALTIME has jumped: it was set, or the machine was suspended (timerfd_create(2),
/// `TFD_TIMER_CANCEL_ON_SET`).
pub struct ClockChanges {
    timer: AsyncFd<OwnedFd>,
}

impl ClockChanges {
    /// From now on. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // Never: it is there to be cancelled.
        let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
        let time = Itimerspec { it_interval: Timespec::default(), it_value: never };
        timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &time)?;
        Ok(Self { timer: awaited(timer, Interest::READABLE)? })
    }

    /// Returns at the next change, or at once if there was one since it last did.
    pub async fn next(&mut self) {
        if let Err(error) = self.cancelled().await {
            log::warn!("changes of the clock are not heard of any more: {error}");
            std::future::pending::<()>().await;
        }
    }

    async fn cancelled(&self) -> io::Result<()> {
        loop {
            let mut ready = self.timer.readable().await?;
            match ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut [0; 8])?)) {
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::CANCELED.raw_os_error()) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}
