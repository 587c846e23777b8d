//! The host's side of the device: a handle with which any thread connects to the guest and listens for it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::listener::{Backlog, VsockListener};

/// What the device is to do for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Start the connection of a call.
    Connect { call: u64, port: u32 },
    /// The caller waits no more.
    Cancel { call: u64 },
}

/// A `connect` that waits for its answer.
struct Call {
    reply: SyncSender<io::Result<UnixStream>>,
    /// The host's end, once the device has made it.
    stream: Option<UnixStream>,
}

#[derive(Default)]
struct State {
    commands: VecDeque<Command>,
    calls: HashMap<u64, Call>,
    next_call: u64,
    ports: HashMap<u32, Arc<Backlog>>,
    attached: bool,
    gone: bool,
}

/// What a device and the handles of its host share. It outlives a device that is saved and built anew.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Wakes the device's event loop.
    pub wake: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the device's event loop look at everything once more.
    pub fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            error!("cannot wake the vsock device: {error}");
        }
    }

    /// A device takes this over; false when another one has it, or it is over.
    pub fn attach(&self) -> bool {
        let mut state = self.lock();
        let free = !state.attached && !state.gone;
        state.attached |= free;
        free
    }

    /// The device goes, and another will come.
    pub fn detach(&self) {
        self.lock().attached = false;
    }

    /// The device goes for good.
    pub fn close(&self) {
        let mut state = self.lock();
        state.gone = true;
        state.commands.clear();
        // Callers see their reply channels closed.
        state.calls.clear();
        for (_, backlog) in state.ports.drain() {
            backlog.close();
        }
    }

    /// The next command.
    pub fn command(&self) -> Option<Command> {
        self.lock().commands.pop_front()
    }

    /// Puts the host's end of a call's connection aside; false when nobody waits for it any more.
    pub fn park(&self, call: u64, stream: UnixStream) -> bool {
        self.lock().calls.get_mut(&call).map(|call| call.stream = Some(stream)).is_some()
    }

    /// Whether a device has started the connection of this call, and the caller still waits.
    pub fn is_started(&self, call: u64) -> bool {
        self.lock().calls.get(&call).is_some_and(|call| call.stream.is_some())
    }

    /// Answers a call: with its stream, or with why there is none.
    pub fn answer(&self, call: u64, outcome: Result<(), io::ErrorKind>) {
        let Some(Call { reply, stream }) = self.lock().calls.remove(&call) else { return };
        let stream = stream.ok_or_else(|| io::ErrorKind::NotConnected.into());
        // A caller that went meanwhile drops the stream, which the device sees as the host closing it.
        let _ = reply.try_send(outcome.map_err(Into::into).and(stream));
    }

    /// The backlog of a port that is open to the guest.
    pub fn port(&self, port: u32) -> Option<Arc<Backlog>> {
        self.lock().ports.get(&port).cloned()
    }

    /// Whether a port is open to the guest.
    pub fn is_open(&self, port: u32) -> bool {
        self.lock().ports.contains_key(&port)
    }

    pub fn close_port(&self, port: u32) {
        if let Some(backlog) = self.lock().ports.remove(&port) {
            backlog.close();
        }
    }
}

/// The host's handle: clones speak to the same guest, from any thread.
#[derive(Clone)]
pub struct VsockHost {
    shared: Arc<Shared>,
}

impl VsockHost {
    /// A handle for a device that [`Vsock::restore`](super::Vsock::restore) will attach to it. Ports can be opened before.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { state: Mutex::default(), wake }) })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Connects to `port` of the guest and waits until it has accepted. A guest whose driver is not up
    /// yet is waited for as well. Closing and `shutdown(2)` of the stream reach the guest as such.
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens there, `TimedOut`, `ConnectionReset` when the guest
    /// restarts meanwhile, `BrokenPipe` when the VM is gone, `ResourceBusy` when the device has no
    /// room for one more connection.
    pub fn connect(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let (reply, answer) = sync_channel(1);
        let call = {
            let mut state = self.shared.lock();
            if state.gone {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let call = state.next_call;
            state.next_call += 1;
            state.calls.insert(call, Call { reply, stream: None });
            state.commands.push_back(Command::Connect { call, port });
            call
        };
        self.shared.wake();
        match answer.recv_timeout(timeout) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Disconnected) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(RecvTimeoutError::Timeout) => {
                self.cancel(call);
                // It may have been answered at the last moment.
                answer.try_recv().unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }

    fn cancel(&self, call: u64) {
        let mut state = self.shared.lock();
        if state.calls.remove(&call).is_none() {
            return;
        }
        let queued = state.commands.len();
        state.commands.retain(|command| !matches!(command, Command::Connect { call: started, .. } if *started == call));
        if state.commands.len() == queued {
            state.commands.push_back(Command::Cancel { call });
            drop(state);
            self.shared.wake();
        }
    }

    /// Opens `port` of the host to the guest.
    ///
    /// # Errors
    /// `AddrInUse`; `BrokenPipe` when the VM is gone; when no eventfd can be made.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        let backlog = Arc::new(Backlog::new()?);
        let mut state = self.shared.lock();
        if state.gone {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if state.ports.contains_key(&port) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, format!("vsock port {port} is listened on already")));
        }
        state.ports.insert(port, Arc::clone(&backlog));
        Ok(VsockListener::new(port, backlog, Arc::clone(&self.shared)))
    }
}
