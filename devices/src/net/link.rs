//! The link: backends that come and go, and whoever takes it up or down.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};

use log::warn;

use super::backend::Backend;
use super::device::Net;
use super::layout::{LINK_UP, STATUS_AT};
use super::offloads::Offloads;
use super::pair::Pair;

impl Net {
    /// Gives the device its backend, in the place of what it may have had: its link goes up, unless it is
    /// [held down](Self::set_link). All pairs of queues share it.
    ///
    /// # Errors
    /// As [`attach_queues`](Self::attach_queues).
    pub fn attach(&mut self, backend: impl Backend + 'static) -> io::Result<()> {
        self.attach_queues([backend])
    }

    /// The same with a backend for each pair of queues, as a tap with several queues has them. Pairs that get none send by
    /// those of others.
    ///
    /// # Errors
    /// When there is none, or one's descriptor cannot be watched; the link is down then.
    pub fn attach_queues(&mut self, backends: impl IntoIterator<Item = impl Backend + 'static>) -> io::Result<()> {
        self.take_backends();
        let backends: Vec<Arc<dyn Backend>> =
            backends.into_iter().map(|backend| Arc::new(backend) as Arc<dyn Backend>).collect();
        let put = self.put(&backends);
        if put.is_err() {
            self.take_backends();
        }
        self.announce();
        put
    }

    fn put(&mut self, backends: &[Arc<dyn Backend>]) -> io::Result<()> {
        let Some(first) = backends.first() else { return Err(io::ErrorKind::InvalidInput.into()) };
        for ((index, mut pair), backend) in self.pairs().enumerate().zip(backends.iter().cycle()) {
            pair.lost = None;
            pair.port.put(Arc::clone(backend), index < backends.len())?;
            let enabled = pair.is_enabled();
            pair.port.set_queue(enabled);
        }
        // Those that no pair reads from.
        for extra in backends.iter().skip(self.pairs.len()) {
            extra.set_queue(false)?;
        }
        self.backend = Some(Arc::clone(first));
        self.set_offloads(self.to_guest);
        Ok(())
    }

    /// Takes the backend away, if there is one: the link goes down, and what the guest sends is lost.
    pub fn detach(&mut self) {
        if self.take_backends() {
            self.announce();
        }
    }

    fn take_backends(&mut self) -> bool {
        self.pairs().for_each(|mut pair| pair.port.take());
        self.backend.take().is_some()
    }

    /// Holds the link down, or lets it be up while there is a backend. What comes or is sent while it is down is lost.
    pub fn set_link(&mut self, up: bool) {
        if self.held_down == up {
            self.held_down = !up;
            self.announce();
        }
    }

    /// Whether the link is up.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.backend.is_some() && !self.held_down
    }

    /// Looks whether a pair has found its backend gone.
    pub(super) fn look_for_loss(&mut self) {
        let lost = self.pairs().filter_map(|mut pair| pair.lost.take()).last();
        if let Some(error) = lost
            && self.backend.is_some()
        {
            warn!("the host's side of a guest's network interface is gone, its link is down: {error}");
            self.detach();
        }
    }

    /// Tells the driver of the link, and makes the workers look at it.
    pub(super) fn announce(&mut self) {
        let up = self.is_up();
        self.config[STATUS_AT] = if up { LINK_UP } else { 0 };
        for mut pair in self.pairs() {
            pair.port.set_open(!self.held_down);
            pair.wake();
        }
        self.control.signal_config();
    }

    pub(super) fn set_offloads(&self, offloads: Offloads) {
        if let Some(backend) = &self.backend
            && let Err(error) = backend.set_offloads(offloads)
        {
            // All packets come finished then, which every driver takes.
            warn!("a guest's network is slower than it could be: cannot set the offloads {offloads:?}: {error}");
        }
    }

    /// Each pair, one after the other; also when a thread panicked with it: its state is checked, not trusted.
    pub(super) fn pairs(&self) -> impl Iterator<Item = MutexGuard<'_, Pair>> {
        self.pairs.iter().map(|pair| pair.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
