//! The device status field: which steps a driver may take (virtio 1.3, 2.1 and 3.1.1).

use super::registers::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};

/// What a driver's write to the status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Zero was written.
    Reset,
    /// One legal step forward, or the same value again.
    Forward(u32),
    /// FAILED was added: the driver gives up.
    GiveUp(u32),
    /// Bits were cleared, skipped or are unknown: the write is ignored.
    Refused,
}

/// Judges the write of `value` while the status is `current` (without DEVICE_NEEDS_RESET, which is the device's).
pub fn step(current: u32, value: u32) -> Step {
    const ORDER: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    if value == 0 {
        return Step::Reset;
    }
    if value & current != current || value & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED) != 0 {
        return Step::Refused;
    }
    if value & FAILED != 0 {
        return Step::GiveUp(value);
    }
    // Every bit must come with all those before it, and DRIVER_OK and FEATURES_OK each in a write of their own.
    let prefix = ORDER.iter().scan(0, |sum, bit| {
        *sum |= bit;
        Some(*sum)
    });
    let added = value & !current;
    let one_gate = (added & (FEATURES_OK | DRIVER_OK)).count_ones() <= 1;
    if prefix.into_iter().any(|legal| legal == value) && one_gate { Step::Forward(value) } else { Step::Refused }
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
        assert_eq!(step(3, 0x83), Step::GiveUp(0x83));
    }
}
