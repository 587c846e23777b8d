//! The user's terminal while the container's process has it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Why the terminal cannot be given to the container.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    /// Standard input is none.
    #[error(
        "the input device is not a TTY: config.json has process.terminal set, so run katavm on a terminal or unset it"
    )]
    NotATerminal,
    /// The system refused.
    #[error("cannot change the terminal's mode: {0}")]
    Mode(#[source] io::Error),
}

/// Rows and columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// In characters; 0 where the terminal does not know.
    pub rows: u32,
    /// In characters; 0 where the terminal does not know.
    pub columns: u32,
}

/// A terminal of the host.
#[derive(Debug)]
pub struct Terminal {
    fd: OwnedFd,
    mode: Termios,
}

impl Terminal {
    /// Takes a duplicate of `fd`, and notes in which mode it is.
    ///
    /// # Errors
    /// When it is no terminal.
    pub fn new(fd: impl AsFd) -> Result<Self, TerminalError> {
        let fd = fd.as_fd();
        if !isatty(fd) {
            return Err(TerminalError::NotATerminal);
        }
        let mode = tcgetattr(fd).map_err(|error| TerminalError::Mode(error.into()))?;
        let fd = fd.try_clone_to_owned().map_err(TerminalError::Mode)?;
        Ok(Self { fd, mode })
    }

    /// Hands every key to the container until the guard is dropped (cfmakeraw(3)).
    ///
    /// # Errors
    /// Those of tcsetattr(3).
    pub fn raw(self: &Arc<Self>) -> Result<RawMode, TerminalError> {
        self.set_raw()?;
        Ok(RawMode { terminal: Arc::clone(self) })
    }

    fn set_raw(&self) -> Result<(), TerminalError> {
        let mut raw = self.mode.clone();
        raw.make_raw();
        tcsetattr(&self.fd, OptionalActions::Now, &raw).map_err(|error| TerminalError::Mode(error.into()))
    }

    /// Its size now.
    #[must_use]
    pub fn size(&self) -> WindowSize {
        tcgetwinsize(&self.fd)
            .map(|size| WindowSize { rows: size.ws_row.into(), columns: size.ws_col.into() })
            .unwrap_or_default()
    }
}

/// The terminal is raw for as long as this lives, panics included; the watcher restores it after a SIGKILL.
#[derive(Debug)]
pub struct RawMode {
    terminal: Arc<Terminal>,
}

impl RawMode {
    /// Sets it once more: a shell that took the terminal while this process was stopped has changed it.
    ///
    /// # Errors
    /// Those of tcsetattr(3).
    pub fn renew(&self) -> Result<(), TerminalError> {
        self.terminal.set_raw()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone: nobody sees its mode then.
        let _ = tcsetattr(&self.terminal.fd, OptionalActions::Now, &self.terminal.mode);
    }
}

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{LocalModes, Winsize, tcsetwinsize};

    use super::*;

    fn pty() -> (OwnedFd, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        (master, slave)
    }

    fn echoes(fd: &OwnedFd) -> bool {
        tcgetattr(fd).unwrap().local_modes.contains(LocalModes::ECHO)
    }

    #[test]
    fn the_mode_comes_back_at_the_end_and_after_a_panic() {
        let (_master, slave) = pty();
        let terminal = Arc::new(Terminal::new(&slave).unwrap());
        assert!(echoes(&slave));
        let raw = terminal.raw().unwrap();
        assert!(!echoes(&slave));
        drop(raw);
        assert!(echoes(&slave));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _raw = terminal.raw().unwrap();
            assert!(echoes(&slave), "raw");
        }));
        assert!(panicked.is_err());
        assert!(echoes(&slave));
    }

    #[test]
    fn raw_mode_is_renewed_after_a_shell_had_the_terminal() {
        let (_master, slave) = pty();
        let terminal = Arc::new(Terminal::new(&slave).unwrap());
        let raw = terminal.raw().unwrap();
        tcsetattr(&slave, OptionalActions::Now, &terminal.mode).unwrap();
        assert!(echoes(&slave));
        raw.renew().unwrap();
        assert!(!echoes(&slave));
    }

    #[test]
    fn the_size_is_the_terminals() {
        let (master, slave) = pty();
        let terminal = Terminal::new(&slave).unwrap();
        tcsetwinsize(&master, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        assert_eq!(terminal.size(), WindowSize { rows: 24, columns: 80 });
    }

    #[test]
    fn a_pipe_is_no_terminal() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(matches!(Terminal::new(&reader), Err(TerminalError::NotATerminal)));
    }
}
