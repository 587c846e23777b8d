//! The few devices of a PC that a guest kernel without ACPI and PCI still wants, on I/O ports.

mod reset;
mod serial;

pub use reset::{KEYBOARD_PORTS, RESET_PORT, ResetDevice, ResetRequest};
pub use serial::{SERIAL_IRQ, SERIAL_PORTS, Serial, SerialError, SerialState};
