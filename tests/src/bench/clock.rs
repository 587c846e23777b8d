//! The clock of all benchmarks: the kernel's monotonic one, which its trace events have as well.

use std::time::Duration;

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

/// Now.
///
/// # Errors
/// Those of clock_gettime(2).
pub fn now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// As a number.
#[must_use]
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
