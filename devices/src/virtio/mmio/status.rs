//! The device status field: which steps a driver may take (virtio 1.3, 2.1 and 3.1.1).

use super::registers::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};

/// The status of a device that its driver uses.
pub const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// What a driver's write to the status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Zero was written.
    Reset,
    /// One legal step forward, or the same value again.
    Forward(u32),
    /// FAILED was added: the driver gives up, and only a reset is heard from now on.
    GiveUp,
    /// Bits were cleared, skipped or are unknown: the write is ignored.
    Refused,
}

/// Judges the write of `value` while the status is `current` (without DEVICE_NEEDS_RESET, which is the device's).
pub fn step(current: u32, value: u32) -> Step {
    if value == 0 {
        return Step::Reset;
    }
    if value & current != current || value & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) != 0 {
        return Step::Refused;
    }
    if current & FAILED != 0 {
        return Step::Refused;
    }
    if value & FAILED != 0 {
        return Step::GiveUp;
    }
    // DRIVER_OK and FEATURES_OK must each come in a write of their own.
    let added = value & !current;
    let one_gate = (added & (FEATURES_OK | DRIVER_OK)).count_ones() <= 1;
    if in_order(value) && one_gate { Step::Forward(value) } else { Step::Refused }
}

/// Whether a device can have this status (without DEVICE_NEEDS_RESET), after whatever legal steps.
pub fn is_legal(status: u32) -> bool {
    in_order(status & !FAILED)
}

/// Whether every bit comes with all those before it.
fn in_order(value: u32) -> bool {
    const STEPS: [u32; 5] = [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, RUNNING];
    STEPS.contains(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_linux_are_legal() {
        let mut status = 0;
        for value in [1, 3, 11, 15] {
            assert_eq!(step(status, value), Step::Forward(value));
            status = value;
        }
    }

    #[test]
    fn skipping_clearing_and_unknown_bits_are_refused() {
        for (current, value) in [(0, 2), (0, 4), (3, 7), (3, 15), (11, 3), (15, 11), (3, 0x13), (1, 0x41)] {
            assert_eq!(step(current, value), Step::Refused, "{current:#x} -> {value:#x}");
        }
    }

    #[test]
    fn reset_and_failure_are_always_heard() {
        assert_eq!(step(15, 0), Step::Reset);
        assert_eq!(step(3, 0x83), Step::GiveUp);
        assert_eq!(step(0, 0x80), Step::GiveUp);
        assert_eq!(step(0x83, 0), Step::Reset);
    }

    #[test]
    fn after_failure_nothing_but_a_reset_is_heard() {
        for value in [0x83, 0x8b, 0x8f, 0x0b, 0xff] {
            assert_eq!(step(0x83, value), Step::Refused, "{value:#x}");
        }
    }

    #[test]
    fn only_statuses_that_steps_lead_to_are_legal() {
        let legal: Vec<u32> = (0..=0x1ff).filter(|status| is_legal(*status)).collect();
        assert_eq!(legal, [0, 1, 3, 11, 15, 0x80, 0x81, 0x83, 0x8b, 0x8f]);
    }
}
