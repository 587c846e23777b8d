//! Ports of the host on which the guest may connect.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EFD_SEMAPHORE, EventFd};

use super::host::Shared;

/// Connections that wait to be accepted, per port; more are refused.
const BACKLOG: usize = 128;

/// What device and listener share.
pub(super) struct Backlog {
    waiting: Mutex<Waiting>,
    /// Counts the streams that wait, plus one once the device is gone: readable when `accept` would return.
    ready: EventFd,
}

#[derive(Default)]
struct Waiting {
    streams: VecDeque<UnixStream>,
    gone: bool,
}

impl Backlog {
    pub fn new() -> io::Result<Self> {
        let ready = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE)?;
        Ok(Self { waiting: Mutex::default(), ready })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more connection may wait.
    pub fn has_room(&self) -> bool {
        self.lock().streams.len() < BACKLOG
    }

    /// Adds the host's end of a new connection.
    pub fn push(&self, stream: UnixStream) -> io::Result<()> {
        let mut waiting = self.lock();
        self.ready.write(1)?;
        waiting.streams.push_back(stream);
        Ok(())
    }

    /// The device is gone: whoever waits is told.
    pub fn close(&self) {
        let mut waiting = self.lock();
        if !waiting.gone {
            waiting.gone = true;
            waiting.streams.clear();
            // The counter is far from full; were it not, `accept` would return all the same.
            let _ = self.ready.write(1);
        }
    }

    fn take(&self) -> Option<io::Result<UnixStream>> {
        let mut waiting = self.lock();
        if let Some(stream) = waiting.streams.pop_front() {
            // A semaphore: takes one off. Each stream had put one on.
            let _ = self.ready.read();
            return Some(Ok(stream));
        }
        waiting.gone.then(|| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

/// A port of the host that is open to the guest until this is dropped. Waiting connections are closed then.
pub struct VsockListener {
    port: u32,
    backlog: Arc<Backlog>,
    shared: Arc<Shared>,
}

impl VsockListener {
    pub(super) fn new(port: u32, backlog: Arc<Backlog>, shared: Arc<Shared>) -> Self {
        Self { port, backlog, shared }
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for a connection of the guest, for ever without a `timeout`, and gives the host's end of it.
    ///
    /// # Errors
    /// `TimedOut`; `BrokenPipe` when the device is gone; what `poll(2)` says.
    pub fn accept(&self, timeout: Option<Duration>) -> io::Result<UnixStream> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if let Some(taken) = self.backlog.take() {
                return taken;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            wait_readable(&self.backlog.ready, left)?;
        }
    }
}

/// Readable when [`accept`](VsockListener::accept) would not wait.
impl AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> RawFd {
        self.backlog.ready.as_raw_fd()
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.shared.close_port(self.port);
    }
}

/// Waits until `fd` is readable or `timeout` is over (`poll(2)`).
fn wait_readable(fd: &EventFd, timeout: Option<Duration>) -> io::Result<()> {
    // Rounded up, or the last millisecond would be spun away.
    let millis = timeout.map_or(-1, |timeout| i32::try_from(timeout.as_millis() + 1).unwrap_or(i32::MAX));
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd that outlives the call.
    let outcome = unsafe { libc::poll(&raw mut poll, 1, millis) };
    match io::Error::last_os_error() {
        error if outcome < 0 && error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}
