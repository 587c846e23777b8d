//! The streams of a process, as they are on the host.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use katavm_protocol::agent::Stdio;

use crate::process::stdio::Inherited;
use crate::process::terminal::{Terminal, TerminalError, WindowSize};

/// Where a process' streams lead.
pub struct Io {
    /// The streams; with a terminal, standard input and output are the two directions of it.
    pub stdio: Inherited,
    /// Whether the process is to have a terminal.
    pub has_terminal: bool,
    /// The terminal on this host that it is one with, if there is one: its mode and size are followed.
    pub terminal: Option<Arc<Terminal>>,
    /// The size of a terminal that does not know its own.
    pub fallback_size: WindowSize,
    /// How long the news of the process' end wait for output that nobody reads, counted from when something was read
    /// last; without end if this says nothing.
    pub patience: Option<Duration>,
    /// Output that has arrived is not let go of before somebody has read it, or the process is removed.
    pub lingers: bool,
}

impl Io {
    /// Streams without a terminal.
    #[must_use]
    pub fn plain(stdio: Inherited) -> Self {
        Self {
            stdio,
            has_terminal: false,
            terminal: None,
            fallback_size: WindowSize::default(),
            patience: None,
            lingers: false,
        }
    }

    /// A terminal that is in the guest alone: its two directions are standard input and output.
    #[must_use]
    pub fn guest_terminal(stdio: Inherited) -> Self {
        Self { has_terminal: true, ..Self::plain(stdio) }
    }

    /// The slave of a pseudo-terminal of the host, whose master somebody else has.
    ///
    /// # Errors
    /// When it is no terminal, or no descriptors are left.
    pub fn over_terminal(slave: OwnedFd, fallback_size: WindowSize) -> Result<Self, TerminalError> {
        let terminal = Terminal::new(&slave)?;
        let other = slave.try_clone().map_err(TerminalError::Mode)?;
        let stdio = Inherited { stdin: Some(slave), stdout: Some(other), stderr: None };
        Ok(Self { terminal: Some(Arc::new(terminal)), fallback_size, ..Self::guest_terminal(stdio) })
    }

    /// The same by other descriptors.
    ///
    /// # Errors
    /// When none are left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { stdio: self.stdio.duplicate()?, terminal: self.terminal.clone(), ..*self })
    }

    /// The terminal's size.
    #[must_use]
    pub fn size(&self) -> WindowSize {
        let size = self.terminal.as_deref().map(Terminal::size).unwrap_or_default();
        if size == WindowSize::default() { self.fallback_size } else { size }
    }

    /// What the agent is told of them.
    pub(super) fn wanted(&self) -> Stdio {
        let WindowSize { rows, columns } = self.size();
        if self.has_terminal {
            return Stdio { rows, columns, ..Default::default() };
        }
        Stdio {
            stdin: self.stdio.stdin.is_some(),
            stdout: self.stdio.stdout.is_some(),
            stderr: self.stdio.stderr.is_some(),
            ..Default::default()
        }
    }

    /// Where the terminal's output goes.
    pub(super) fn terminal_sink(&self) -> io::Result<OwnedFd> {
        match &self.stdio.stdout {
            Some(fd) => fd.try_clone(),
            None => File::options().write(true).open("/dev/null").map(OwnedFd::from),
        }
    }
}
