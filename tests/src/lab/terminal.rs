//! This process's terminal and signals.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal as Number, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A signal that concerns a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// End, for this reason (a signal number).
    End(i32),
    /// The terminal has a new size.
    Resize,
}

fn watched() -> SigSet {
    [Number::SIGINT, Number::SIGTERM, Number::SIGHUP, Number::SIGWINCH].into_iter().collect()
}

/// Blocks the signals that a session wants to receive. Call it before any thread is started.
///
/// # Errors
/// Never in practice.
pub fn block_signals() -> Result<()> {
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&watched()), None).context("cannot block signals")
}

/// Signals are forwarded until this is dropped.
pub struct Forwarding {
    thread: Option<JoinHandle<()>>,
    stop: Option<PipeWriter>,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

/// Has a thread wait for the signals that [`block_signals`] blocked.
pub fn forward(send: impl Fn(Signal) -> bool + Send + 'static) -> Result<Forwarding> {
    let signals = SignalFd::with_flags(&watched(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch signals")?;
    let (stopped, stop) = io::pipe()?;
    let thread = thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            let mut fds =
                [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            if fds[1].any() == Some(true) {
                return;
            }
            while let Ok(Some(info)) = signals.read_signal() {
                let number = i32::try_from(info.ssi_signo).unwrap_or(libc::SIGTERM);
                if !send(if number == libc::SIGWINCH { Signal::Resize } else { Signal::End(number) }) {
                    return;
                }
            }
        }
    })?;
    Ok(Forwarding { thread: Some(thread), stop: Some(stop) })
}

/// The size of the terminal on stdin: rows and columns.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize to the pointer, which is valid for it.
    let result = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_row > 0).then_some((size.ws_row, size.ws_col))
}

/// The terminal on stdin in raw mode; as it was before when dropped.
pub struct RawMode(Termios);

impl RawMode {
    /// Sets it.
    ///
    /// # Errors
    /// When stdin is not a terminal.
    pub fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("stdin is not a terminal")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).context("cannot set the terminal's raw mode")?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing better can be done if it fails.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

impl std::fmt::Debug for RawMode {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("RawMode")
    }
}

/// The same, or the usual 24 by 80.
#[must_use]
pub fn size_or_default() -> (u16, u16) {
    size().unwrap_or((24, 80))
}
