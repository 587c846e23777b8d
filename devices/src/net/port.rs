//! A pair's way to the backend, which comes and goes.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use log::{error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::Backend;

/// Packets that are thrown away at once; a tap keeps 500 to 1000.
const DRAIN: usize = 4096;

/// The backend, if there is one, and its readiness.
///
/// It is watched by an epoll set of the pair's own, so that whoever puts or takes it, on whatever
/// thread, needs nothing of the event loop.
pub(super) struct Port {
    epoll: Epoll,
    backend: Option<Arc<dyn Backend>>,
    /// Packets come by it. Of several pairs that share a backend only one reads from it.
    receives: bool,
    /// The link is up.
    pub open: bool,
    /// There may be packets to read: events tell only that there are new ones.
    pub readable: bool,
}

impl Port {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, backend: None, receives: false, open: true, readable: false })
    }

    /// What the event loop watches.
    pub fn events(&self) -> &Epoll {
        &self.epoll
    }

    /// Where packets go to now.
    pub fn backend(&self) -> Option<&dyn Backend> {
        self.backend.as_deref().filter(|_| self.open)
    }

    pub fn put(&mut self, backend: Arc<dyn Backend>, receives: bool) -> io::Result<()> {
        let mut events = EventSet::OUT | EventSet::EDGE_TRIGGERED;
        events.set(EventSet::IN, receives);
        self.epoll.ctl(ControlOperation::Add, backend.as_fd().as_raw_fd(), EpollEvent::new(events, 0))?;
        self.backend = Some(backend);
        self.receives = receives;
        self.readable = receives;
        Ok(())
    }

    pub fn take(&mut self) {
        let Some(backend) = self.backend.take() else { return };
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, backend.as_fd().as_raw_fd(), EpollEvent::default())
        {
            error!("cannot forget a network backend: {error}");
        }
        self.readable = false;
    }

    /// Whether packets are to come by this one, where there are several.
    pub fn set_queue(&mut self, on: bool) {
        let Some(backend) = self.backend.as_ref().filter(|_| self.receives) else { return };
        if let Err(error) = backend.set_queue(on) {
            warn!("packets for a guest may be lost: cannot switch a queue of its tap: {error}");
        }
        self.readable = true;
    }

    /// Lets packets through or not. Those that came while it did not are lost, as on a wire.
    pub fn set_open(&mut self, open: bool) {
        if open && !self.open && self.receives {
            self.drain();
        }
        self.open = open;
    }

    fn drain(&self) {
        let Some(backend) = &self.backend else { return };
        // A tap drops what does not fit.
        let mut start = [0; 64];
        for _ in 0..DRAIN {
            match rustix::io::read(backend.as_fd(), &mut start) {
                Ok(1..) | Err(rustix::io::Errno::INTR) => {}
                // Nothing more, or an error that the next reader meets as well.
                _ => return,
            }
        }
    }

    /// Takes note of what the backend has to say.
    pub fn look(&mut self) {
        let mut events = [EpollEvent::default()];
        match self.epoll.wait(0, &mut events) {
            Ok(count) => self.readable |= count > 0 && self.receives && self.backend.is_some(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => error!("cannot look at a network backend: {error}"),
        }
    }
}
