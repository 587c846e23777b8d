//! The link: a backend that comes and goes.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use log::{error, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::Backend;
use super::device::Net;
use super::layout::{LINK_UP, STATUS_AT, TX};
use super::offloads::Offloads;

/// The backend, if there is one, and its readiness.
///
/// It is watched by an epoll set of the device's own, so that whoever attaches or detaches it, on whatever
/// thread, needs nothing of the event loop.
pub(super) struct Link {
    epoll: Epoll,
    backend: Option<Box<dyn Backend>>,
    /// There may be packets to read: events tell only that there are new ones.
    pub readable: bool,
}

impl Link {
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, backend: None, readable: false })
    }

    /// What the event loop watches.
    pub fn events(&self) -> &Epoll {
        &self.epoll
    }

    pub fn backend(&self) -> Option<&dyn Backend> {
        self.backend.as_deref()
    }

    pub fn is_up(&self) -> bool {
        self.backend.is_some()
    }

    pub fn set_offloads(&self, offloads: Offloads) {
        if let Some(backend) = &self.backend
            && let Err(error) = backend.set_offloads(offloads)
        {
            // All packets come finished then, which every driver takes.
            warn!("a guest's network is slower than it could be: cannot set the offloads {offloads:?}: {error}");
        }
    }

    fn put(&mut self, backend: Box<dyn Backend>) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, backend.as_fd().as_raw_fd(), EpollEvent::new(events, 0))?;
        self.backend = Some(backend);
        self.readable = true;
        Ok(())
    }

    fn take(&mut self) -> Option<Box<dyn Backend>> {
        let backend = self.backend.take()?;
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, backend.as_fd().as_raw_fd(), EpollEvent::default())
        {
            error!("cannot forget a network backend: {error}");
        }
        self.readable = false;
        Some(backend)
    }

    /// Takes note of what the backend has to say.
    pub fn look(&mut self) {
        let mut events = [EpollEvent::default()];
        match self.epoll.wait(0, &mut events) {
            Ok(count) => self.readable |= count > 0 && self.is_up(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => error!("cannot look at a network backend: {error}"),
        }
    }
}

impl Net {
    /// Gives the device its backend, in the place of the one that it may have had: its link goes up.
    ///
    /// # Errors
    /// When the backend's descriptor cannot be watched; the link is down then.
    pub fn attach(&mut self, backend: impl Backend + 'static) -> io::Result<()> {
        self.detach();
        self.link.put(Box::new(backend))?;
        self.link.set_offloads(self.to_guest());
        self.announce();
        Ok(())
    }

    /// Takes the backend away, if there is one: the link goes down, and what the guest sends is lost.
    pub fn detach(&mut self) {
        if self.link.take().is_some() {
            self.announce();
        }
    }

    /// Whether there is a backend.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// The backend does not work any more, as when its interface was deleted.
    pub(super) fn lose(&mut self, error: &io::Error) {
        warn!("the host's side of a guest's network interface is gone, its link is down: {error}");
        self.detach();
    }

    /// Tells the driver of the link, and makes the event loop look at it.
    pub(super) fn announce(&mut self) {
        self.config[STATUS_AT] = if self.link.is_up() { LINK_UP } else { 0 };
        self.queues.signal_config();
        self.queues.kick(TX);
    }
}
