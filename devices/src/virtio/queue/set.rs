//! All queues of one device, with their kicks and the interrupt.

use std::io;
use std::ops::Range;

use event_manager::{EventOps, EventSet, Events};
use log::{error, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Chain, QueueError, QueueState, VirtQueue};
use crate::memory::GuestMemory;
use crate::virtio::{Interrupt, ReadyQueues};

/// Mistakes of one driver that are warned of, see [`QueueSet::complain`].
const WARNINGS: u32 = 16;

struct Active {
    queues: Vec<VirtQueue>,
    interrupt: Interrupt,
    memory: GuestMemory,
}

/// The queues of a device: inactive until the driver has set them up, inactive again after a reset or a broken rule.
pub struct QueueSet {
    sizes: Vec<u16>,
    kicks: Vec<EventFd>,
    active: Option<Active>,
    /// How many more of the driver's mistakes are worth a warning: it must not fill the host's log.
    warnings: u32,
}

impl QueueSet {
    /// Queues of at most `sizes` descriptors each (powers of two).
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(sizes: &[u16]) -> io::Result<Self> {
        let kicks = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Self { sizes: sizes.to_vec(), kicks, active: None, warnings: WARNINGS })
    }

    /// A set of some of these queues, told of by the same kicks, for a part of the device; inactive.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn part(&self, range: Range<usize>) -> io::Result<Self> {
        let kicks = self.kicks.get(range.clone()).unwrap_or_default().iter().map(EventFd::try_clone);
        let sizes = self.sizes.get(range).unwrap_or_default().to_vec();
        Ok(Self { sizes, kicks: kicks.collect::<io::Result<_>>()?, active: None, warnings: WARNINGS })
    }

    /// The largest size of each queue.
    #[must_use]
    pub fn sizes(&self) -> &[u16] {
        &self.sizes
    }

    /// One eventfd per queue, which the VMM gives to KVM as ioeventfds on `QueueNotify` (but those of queues that vCPUs serve).
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Whether the driver has set the queues up.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// The memory of the queues, while they are active.
    #[must_use]
    pub fn memory(&self) -> Option<GuestMemory> {
        self.active.as_ref().map(|active| active.memory.clone())
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
    }

    /// Deactivates these queues where the device is in `DEVICE_NEEDS_RESET` because of a queue in another part of it.
    pub fn fail_with_others(&mut self) {
        if self.active.as_ref().is_some_and(|active| active.interrupt.needs_reset()) {
            self.deactivate();
        }
    }

    pub(crate) fn activate(&mut self, ready: ReadyQueues) {
        let ReadyQueues { queues, memory, interrupt } = ready;
        self.active = Some(Active { queues, interrupt, memory });
    }

    pub(crate) fn deactivate(&mut self) {
        self.active = None;
    }

    pub(crate) fn save(&self) -> Option<Vec<QueueState>> {
        self.active.as_ref().map(|active| active.queues.iter().map(VirtQueue::save).collect())
    }

    /// Registers all kicks with the event loop; the index of the queue comes back as [`Events::data`].
    pub fn register(&self, ops: &mut EventOps) {
        for (kick, index) in self.kicks.iter().zip(0..) {
            if let Err(error) = ops.add(Events::with_data(kick, index, EventSet::IN)) {
                error!("cannot watch a queue's kicks: {error}");
            }
        }
    }

    /// Takes the kicks of queue `index` off its eventfd. False when there were none.
    pub fn take_kick(&self, index: usize) -> bool {
        self.kicks.get(index).is_some_and(|kick| kick.read().is_ok())
    }

    /// Makes the event loop look at all queues again, as after a restore.
    pub fn kick_all(&self) {
        for kick in &self.kicks {
            if let Err(error) = kick.write(1) {
                error!("cannot kick a queue: {error}");
            }
        }
    }

    /// Makes the event loop look at queue `index` again.
    pub fn kick(&self, index: usize) {
        if let Some(kick) = self.kicks.get(index)
            && let Err(error) = kick.write(1)
        {
            error!("cannot kick queue {index}: {error}");
        }
    }

    /// Serves at most `limit` chains of queue `index` one after the other: `handle` does what a chain asks
    /// for and returns how many bytes it wrote into it. Where more are waiting, the queue is kicked again.
    pub fn serve(&mut self, index: usize, limit: usize, mut handle: impl FnMut(&Chain, &GuestMemory) -> usize) {
        let Some(memory) = self.memory() else { return };
        self.disable_kicks(index);
        for _ in 0..limit {
            if let Some(chain) = self.pop(index) {
                let written = handle(&chain, &memory);
                self.add_used(index, chain.head(), written);
            } else if !self.enable_kicks(index) {
                return self.notify(index);
            }
        }
        self.notify(index);
        self.kick(index);
    }

    /// Takes the next chain of queue `index`. None as well when the queue is not active, or the
    /// driver broke the rules: the device is then in `DEVICE_NEEDS_RESET` and the queues are inactive.
    pub fn pop(&mut self, index: usize) -> Option<Chain> {
        self.guarded(index, VirtQueue::pop).flatten()
    }

    /// Puts the chain that was taken last from queue `index` back.
    pub fn undo_pop(&mut self, index: usize) {
        self.guarded(index, |queue| {
            queue.undo_pop();
            Ok(())
        });
    }

    /// Gives a chain back with `len` bytes written; the driver is told by [`notify`](Self::notify).
    pub fn add_used(&mut self, index: usize, head: u16, len: usize) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.guarded(index, |queue| queue.add_used(head, len));
    }

    /// Puts all chains that were taken from queue `index` and not given back to where they were.
    pub fn put_back(&mut self, index: usize) {
        self.guarded(index, |queue| {
            queue.put_back();
            Ok(())
        });
    }

    /// Gives several chains back, each with how many bytes were written; the driver sees all of them or none.
    pub fn add_used_together(&mut self, index: usize, chains: &[(u16, u32)]) {
        self.guarded(index, |queue| queue.add_used_together(chains));
    }

    /// Interrupts the driver if it wants to hear of what was given back on queue `index`.
    pub fn notify(&mut self, index: usize) {
        if self.guarded(index, VirtQueue::needs_notification) == Some(true)
            && let Some(active) = &self.active
        {
            active.interrupt.signal_used();
        }
    }

    /// Asks for kicks on queue `index` again; true when there is more to take already.
    pub fn enable_kicks(&mut self, index: usize) -> bool {
        self.guarded(index, VirtQueue::enable_notification) == Some(true)
    }

    /// Asks for no kicks on queue `index` for now.
    pub fn disable_kicks(&mut self, index: usize) {
        self.guarded(index, VirtQueue::disable_notification);
    }

    /// Puts the device into `DEVICE_NEEDS_RESET`: it does nothing more until the driver resets it.
    pub fn fail(&mut self, why: &dyn std::fmt::Display) {
        if let Some(active) = self.active.take() {
            self.complain(&format_args!("a device needs a reset: {why}"));
            active.interrupt.fail();
        }
    }

    /// Warns of something that the driver caused, a limited number of times.
    pub fn complain(&mut self, what: &dyn std::fmt::Display) {
        if let Some(left) = self.warnings.checked_sub(1) {
            self.warnings = left;
            warn!("{what}{}", if left == 0 { "; further mistakes of this driver are not logged" } else { "" });
        }
    }

    fn guarded<T>(&mut self, index: usize, act: impl FnOnce(&mut VirtQueue) -> Result<T, QueueError>) -> Option<T> {
        let queue = self.active.as_mut()?.queues.get_mut(index)?;
        match act(queue) {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(&format_args!("queue {index}: {error}"));
                None
            }
        }
    }
}
