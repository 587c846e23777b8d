//! The first serial port: a 16550A UART whose output is the guest's console.

use std::io::{self, Write};
use std::ops::RangeInclusive;

use log::debug;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{Error, NoEvents, Serial as Uart, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

/// The I/O ports of COM1.
pub const SERIAL_PORTS: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// The interrupt line of COM1.
pub const SERIAL_IRQ: u32 = 4;

/// Why a serial port cannot be restored or fed.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The receive buffer in the state is longer than the device's.
    #[error("the saved serial port has more input than fits into its buffer")]
    Input,
    /// The interrupt line's eventfd failed.
    #[error("cannot raise the serial port's interrupt: {0}")]
    Interrupt(io::Error),
    /// The input or output failed.
    #[error("the serial port's host side failed: {0}")]
    Host(io::Error),
}

impl From<Error<io::Error>> for SerialError {
    fn from(error: Error<io::Error>) -> Self {
        match error {
            Error::Trigger(error) => Self::Interrupt(error),
            Error::IOError(error) => Self::Host(error),
            Error::FullFifo => Self::Input,
        }
    }
}

/// The registers of the UART. Untrusted when it comes from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch: low and high byte.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read yet.
    pub input: Vec<u8>,
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port. Each byte that the guest sends goes to `W` at once.
pub struct Serial<W: Write> {
    uart: Uart<Line, NoEvents, W>,
}

impl<W: Write> Serial<W> {
    /// A serial port after power-on that raises its interrupt by writing to `irq`, which the VMM has
    /// given to KVM as an irqfd for [`SERIAL_IRQ`].
    ///
    /// `out` must not block: the guest's vCPU waits for it.
    #[must_use]
    pub fn new(irq: EventFd, out: W) -> Self {
        Self { uart: Uart::new(Line(irq), out) }
    }

    /// The guest reads the register at `offset` from the first port.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// The guest writes the register at `offset` from the first port.
    ///
    /// A byte that the host side cannot take is lost, as on a line without flow control.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.uart.write(offset, value) {
            debug!("serial port: {error}");
        }
    }

    /// Sends `bytes` to the guest; returns how many of them fitted into the receive buffer.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn input(&mut self, bytes: &[u8]) -> Result<usize, SerialError> {
        if self.uart.fifo_capacity() == 0 {
            return Ok(0);
        }
        Ok(self.uart.enqueue_raw_bytes(bytes)?)
    }

    /// Where the output goes.
    pub fn output(&mut self) -> &mut W {
        self.uart.writer_mut()
    }

    /// The state for a snapshot.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let state = self.uart.state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Raises the interrupt again: its edge may have been lost with the old VM. A driver that finds no reason for it
    /// lets it pass.
    ///
    /// # Errors
    /// When it cannot be raised.
    pub fn resend(&self) -> Result<(), SerialError> {
        self.uart.interrupt_evt().trigger().map_err(SerialError::Interrupt)
    }

    /// A serial port as it was saved. A pending interrupt is raised at once; call [`resend`](Self::resend) when the
    /// line has reached somebody.
    ///
    /// # Errors
    /// When the state is impossible or the interrupt cannot be raised.
    pub fn restore(state: &SerialState, irq: EventFd, out: W) -> Result<Self, SerialError> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let state = UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        Ok(Self { uart: Uart::from_state(&state, Line(irq), NoEvents, out)? })
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn line() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn what_the_guest_sends_arrives() {
        let mut serial = Serial::new(line(), Vec::new());
        b"hello\n".iter().for_each(|byte| serial.write(0, *byte));
        assert_eq!(serial.output(), b"hello\n");
        // "Transmitter empty", which Linux polls for.
        assert_eq!(serial.read(5) & 0x60, 0x60);
    }

    #[test]
    fn an_enabled_transmit_interrupt_is_raised() {
        let irq = line();
        let mut serial = Serial::new(irq.try_clone().unwrap(), Vec::new());
        assert!(irq.read().is_err());
        serial.write(1, 0b10);
        assert_eq!(irq.read().unwrap(), 1);
    }

    #[test]
    fn registers_input_and_a_pending_interrupt_survive_a_snapshot() {
        let mut serial = Serial::new(line(), Vec::new());
        serial.write(7, 0x5a);
        serial.write(1, 0b01);
        assert_eq!(serial.input(b"ab").unwrap(), 2);
        let bytes = postcard::to_stdvec(&serial.save()).unwrap();

        let state: SerialState = postcard::from_bytes(&bytes).unwrap();
        let irq = line();
        let mut restored = Serial::restore(&state, irq.try_clone().unwrap(), Vec::new()).unwrap();
        assert!(irq.read().is_ok(), "the interrupt for the input is raised again");
        restored.resend().unwrap();
        assert!(irq.read().is_ok());
        assert_eq!(restored.save(), state);
        assert_eq!((restored.read(7), restored.read(0), restored.read(0)), (0x5a, b'a', b'b'));
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let state = SerialState { input: vec![0; 4096], ..Serial::new(line(), Vec::new()).save() };
        assert!(matches!(Serial::restore(&state, line(), Vec::new()), Err(SerialError::Input)));
    }

    #[test]
    fn input_beyond_the_buffer_is_left_to_the_caller() {
        let mut serial = Serial::new(line(), Vec::new());
        let taken = serial.input(&[b'x'; 100]).unwrap();
        assert!(taken < 100);
        assert_eq!(serial.input(b"y").unwrap(), 0);
    }

    #[test]
    fn any_register_takes_any_byte() {
        let mut serial = Serial::new(line(), io::sink());
        for offset in 0..=u8::MAX {
            for value in 0..=u8::MAX {
                serial.write(offset, value);
                serial.read(offset);
            }
        }
        assert!(serial.save().input.len() <= 64);
    }
}
