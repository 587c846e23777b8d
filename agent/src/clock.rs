//! The guest's time of day, which the host keeps right: kvm-clock runs on by the host's raw clock, and knows nothing of what NTP,
//! a person or a suspended host has done to its time.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::Error;

/// From here on a step. The kernel takes 200 s for so much bit by bit (500 us a second).
const STEP: Duration = Duration::from_millis(100);

/// CLOCK_REALTIME in nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Adds `offset_ns` nanoseconds to CLOCK_REALTIME (adjtimex(2)).
///
/// # Errors
/// That the kernel refuses: the time would be before the epoch or too far away.
pub fn adjust(offset_ns: i64) -> Result<(), Error> {
    let mut change = change(offset_ns);
    // SAFETY: `change` is a whole timex that the kernel reads and writes during the call.
    match unsafe { libc::adjtimex(&raw mut change) } {
        -1 => Err(Error::io("cannot adjust the clock", io::Error::last_os_error())),
        _ => Ok(()),
    }
}

fn change(offset_ns: i64) -> libc::timex {
    // SAFETY: a timex of zeroes is valid: it has numbers only.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    if Duration::from_nanos(offset_ns.unsigned_abs()) < STEP {
        change.modes = libc::ADJ_OFFSET_SINGLESHOT;
        change.offset = offset_ns / 1000;
    } else {
        change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        // The part of a second counts forwards always.
        change.time.tv_sec = offset_ns.div_euclid(NS_PER_S);
        change.time.tv_usec = offset_ns.rem_euclid(NS_PER_S);
    }
    change
}

const NS_PER_S: i64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_little_is_made_up_bit_by_bit_and_much_at_once() {
        for ns in [1_500, -1_500, 99_999_999, -99_999_999] {
            let change = change(ns);
            assert_eq!((change.modes, change.offset), (libc::ADJ_OFFSET_SINGLESHOT, ns / 1000), "{ns}");
        }
        for (ns, seconds, rest) in [
            (100_000_000, 0, 100_000_000),
            (-100_000_000, -1, 900_000_000),
            (3_600_000_000_001, 3600, 1),
            (-2_000_000_000, -2, 0),
            (i64::MIN, -9_223_372_037, 145_224_192),
        ] {
            let change = change(ns);
            assert_eq!(change.modes, libc::ADJ_SETOFFSET | libc::ADJ_NANO, "{ns}");
            assert_eq!((change.time.tv_sec, change.time.tv_usec), (seconds, rest), "{ns}");
        }
    }
}
