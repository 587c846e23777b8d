//! How a guest ends: the reset line of the keyboard controller, and a port of katavm's own.

use std::ops::RangeInclusive;

/// Data port, system control port B and command port of the i8042 keyboard controller.
pub const KEYBOARD_PORTS: RangeInclusive<u16> = 0x60..=0x64;
/// katavm's own port: the agent writes one byte to announce why the VM ends.
pub const RESET_PORT: u16 = 0x5f0;

const COMMAND_PORT: u16 = 0x64;
const CONTROL_PORT: u16 = 0x61;
/// The i8042 command that pulses the CPU's reset line; what Linux does for `reboot=k`.
const PULSE_RESET: u8 = 0xfe;
/// Bit 5 of port 0x61 is the output of timer 2. Set, no kernel waits for a timer that is not there.
const TIMER_2_OUTPUT: u8 = 0x20;

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetRequest {
    /// The agent announced the end through [`RESET_PORT`], with this byte.
    Announced(u8),
    /// The guest's kernel pulsed the CPU's reset line: a reboot, which nobody announced.
    Cpu,
}

/// The reset device. It has no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetDevice;

impl ResetDevice {
    /// Whether this device answers at `port`.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        port == RESET_PORT || KEYBOARD_PORTS.contains(&port)
    }

    /// The guest reads a byte from `port`.
    ///
    /// The status at 0x64 is 0: both buffers of the controller are empty, so a driver may write at once.
    #[must_use]
    pub fn read(self, port: u16) -> u8 {
        match port {
            COMMAND_PORT => 0,
            CONTROL_PORT => TIMER_2_OUTPUT,
            0x60 => 0,
            _ => 0xff,
        }
    }

    /// The guest writes `byte` to `port`. What is no request is ignored.
    #[must_use]
    pub fn write(self, port: u16, byte: u8) -> Option<ResetRequest> {
        match (port, byte) {
            (RESET_PORT, byte) => Some(ResetRequest::Announced(byte)),
            (COMMAND_PORT, PULSE_RESET) => Some(ResetRequest::Cpu),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyboard_controller_resets_on_its_command_only() {
        assert_eq!(ResetDevice.write(0x64, 0xfe), Some(ResetRequest::Cpu));
        for (port, byte) in [(0x64, 0xaa), (0x60, 0xfe), (0x61, 0xfe), (0x62, 0xfe)] {
            assert_eq!(ResetDevice.write(port, byte), None, "{port:#x} <- {byte:#x}");
        }
    }

    #[test]
    fn an_announcement_carries_its_byte() {
        assert_eq!(ResetDevice.write(RESET_PORT, 1), Some(ResetRequest::Announced(1)));
        assert_eq!(ResetDevice.write(RESET_PORT, 0), Some(ResetRequest::Announced(0)));
    }

    #[test]
    fn the_controller_is_always_ready_for_a_command() {
        // Linux waits until bit 1, "input buffer full", is clear.
        assert_eq!(ResetDevice.read(0x64) & 2, 0);
        assert_eq!(ResetDevice.read(RESET_PORT), 0xff);
    }

    #[test]
    fn it_owns_its_ports_and_no_others() {
        let owned: Vec<u16> = (0..=u16::MAX).filter(|port| ResetDevice::owns(*port)).collect();
        assert_eq!(owned, [0x60, 0x61, 0x62, 0x63, 0x64, 0x5f0]);
    }
}
