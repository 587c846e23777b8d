//! One split virtqueue, device side.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::{Chain, ChainError, QueueState};
use crate::memory::{GuestMemory, slice};

/// Why a queue cannot go on. The device must be put into `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Sizes or addresses that do not fit the specification or guest memory.
    #[error("the queue's size or one of its areas is invalid")]
    Config,
    /// The available index is further ahead than the queue is long.
    #[error("the available index jumped from {from} to {to}, more than the queue's size")]
    AvailableIndex {
        /// Next entry the device would take.
        from: u16,
        /// The driver's index.
        to: u16,
    },
    /// The same head was made available while the device still has it.
    #[error("descriptor {0} was made available twice")]
    DuplicateHead(u16),
    /// A chain is malformed.
    #[error("descriptor chain {head}: {error}")]
    Chain {
        /// Its head.
        head: u16,
        /// What is wrong.
        error: ChainError,
    },
    /// The ring is not accessible, or a chain was given back that is not the queue's.
    #[error("ring access failed: {0}")]
    Ring(#[from] virtio_queue::Error),
}

/// A queue that a driver has set up, with the memory it lives in.
pub struct VirtQueue {
    queue: Queue,
    memory: GuestMemory,
    /// Heads taken and not yet given back, in order.
    in_flight: Vec<u16>,
    /// The driver's index of the available ring when it was last read: what comes before it is there to be taken.
    known: Wrapping<u16>,
    /// Chains given back since the driver's wish for an interrupt was last looked at.
    given: Wrapping<u16>,
}

impl VirtQueue {
    /// Takes over a queue whose registers are final, after checking all of its areas over their whole length.
    ///
    /// # Errors
    /// [`QueueError::Config`].
    pub fn new(queue: Queue, memory: GuestMemory) -> Result<Self, QueueError> {
        let known = Wrapping(queue.next_avail());
        let this = Self { queue, memory, in_flight: Vec::new(), known, given: Wrapping(0) };
        if this.queue.ready() && !this.is_valid() {
            return Err(QueueError::Config);
        }
        Ok(this)
    }

    fn is_valid(&self) -> bool {
        let size = usize::from(self.queue.size());
        let fits = |address: u64, len: usize| self.memory.check_range(GuestAddress(address), len);
        // Sizes of the three areas: virtio 1.3, 2.7 (the event index fields included).
        size.is_power_of_two()
            && size <= usize::from(self.queue.max_size())
            && fits(self.queue.desc_table(), 16 * size)
            && fits(self.queue.avail_ring(), 6 + 2 * size)
            && fits(self.queue.used_ring(), 6 + 8 * size)
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// Any but [`QueueError::Config`]: the driver broke the rules.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let from = self.queue.next_avail();
        let size = self.queue.size();
        if self.known.0 == from {
            let to = self.queue.avail_idx(&self.memory, Ordering::Acquire)?;
            if (to - self.known).0 > size {
                return Err(QueueError::AvailableIndex { from, to: to.0 });
            }
            self.known = to;
        }
        if self.known.0 == from {
            return Ok(None);
        }
        let entry = self.queue.avail_ring() + 4 + 2 * u64::from(from % size);
        let head = self.memory.load(GuestAddress(entry), Ordering::Acquire);
        let head = u16::from_le(head.map_err(virtio_queue::Error::GuestMemory)?);
        if self.in_flight.contains(&head) {
            return Err(QueueError::DuplicateHead(head));
        }
        let table = GuestAddress(self.queue.desc_table());
        let chain = Chain::read(&self.memory, table, size, head);
        let chain = chain.map_err(|error| QueueError::Chain { head, error })?;
        self.queue.set_next_avail(from.wrapping_add(1));
        self.in_flight.push(head);
        Ok(Some(chain))
    }

    /// Puts the chain that was taken last back to where it was.
    pub fn undo_pop(&mut self) {
        if self.in_flight.pop().is_some() {
            self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
            // The index is read anew, and checked against where the queue is now.
            self.known = Wrapping(self.queue.next_avail());
        }
    }

    /// Puts all chains that were taken and not given back to where they were, the last ones taken.
    pub fn put_back(&mut self) {
        while !self.in_flight.is_empty() {
            self.undo_pop();
        }
    }

    /// Gives a chain back with `len` bytes written into it.
    ///
    /// # Errors
    /// [`QueueError::Ring`], also when this chain was not in flight.
    pub fn add_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.add_used_together(&[(head, len)])
    }

    /// Gives several chains back, each with the bytes written into it; the driver sees all of them or none.
    ///
    /// # Errors
    /// [`QueueError::Ring`], also when one of these chains was not in flight.
    pub fn add_used_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let ring = self.queue.used_ring();
        let mut next = Wrapping(self.queue.next_used());
        for (head, len) in chains {
            let Some(at) = self.in_flight.iter().position(|taken| taken == head) else {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
            };
            self.in_flight.remove(at);
            // Index and length of the chain, after flags and index of the ring (virtio 1.3, 2.7.8).
            let entry = u64::from(u32::from(*head).to_le()) | u64::from(len.to_le()) << 32;
            let address = GuestAddress(ring + 4 + 8 * u64::from(next.0 % self.queue.size()));
            let written = slice(&self.memory, address, 8).is_some_and(|place| place.write_obj(entry, 0).is_ok());
            if !written {
                self.memory.write_obj(entry, address).map_err(virtio_queue::Error::GuestMemory)?;
            }
            next += 1;
        }
        let index = self.memory.store(next.0.to_le(), GuestAddress(ring + 2), Ordering::Release);
        index.map_err(virtio_queue::Error::GuestMemory)?;
        self.given += next - Wrapping(self.queue.next_used());
        self.queue.set_next_used(next.0);
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn needs_notification(&mut self) -> Result<bool, QueueError> {
        let given = std::mem::take(&mut self.given);
        if !self.queue.ready() || given.0 == 0 {
            return Ok(false);
        }
        // What was given back must be visible before the driver's wish is read, or each side may miss the other.
        fence(Ordering::SeqCst);
        let driver_area = self.queue.avail_ring();
        let read = |address: u64| -> Result<u16, QueueError> {
            let value = self.memory.load(GuestAddress(address), Ordering::Acquire);
            Ok(u16::from_le(value.map_err(virtio_queue::Error::GuestMemory)?))
        };
        if !self.queue.event_idx_enabled() {
            // VIRTQ_AVAIL_F_NO_INTERRUPT, the flags field of the driver area (virtio 1.3, 2.7.7).
            return Ok(read(driver_area)? & 1 == 0);
        }
        // Whether used_event, which stands after the ring, is among what was given back (2.7.10).
        let event = Wrapping(read(driver_area + 4 + 2 * u64::from(self.queue.size()))?);
        Ok(Wrapping(self.queue.next_used()) - event - Wrapping(1) < given)
    }

    /// Asks for kicks again; true when chains came in meanwhile, which no kick will announce.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.ready() && self.queue.enable_notification(&self.memory)?)
    }

    /// Asks for no kicks while the device looks at the queue anyway.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        // The areas of a queue that is not ready were never checked.
        if self.queue.ready() {
            self.queue.disable_notification(&self.memory)?;
        }
        Ok(())
    }

    /// The memory that the queue's chains point into.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The state for a snapshot.
    #[must_use]
    pub fn save(&self) -> QueueState {
        QueueState { in_flight: self.in_flight.clone(), ..save_registers(&self.queue) }
    }

    /// A queue as it was saved, all of it checked again.
    ///
    /// # Errors
    /// [`QueueError::Config`] when the state does not fit the memory.
    pub fn restore(state: &QueueState, memory: GuestMemory) -> Result<Self, QueueError> {
        let queue = restore_registers(state)?;
        let mut taken = state.in_flight.clone();
        taken.sort_unstable();
        taken.dedup();
        let possible = taken.len() == state.in_flight.len() && taken.iter().all(|head| *head < state.size);
        if !possible || !taken.is_empty() && !state.ready {
            return Err(QueueError::Config);
        }
        let mut this = Self::new(queue, memory)?;
        this.in_flight.clone_from(&state.in_flight);
        Ok(this)
    }
}

/// The state of a queue that no device has taken over yet.
pub(crate) fn save_registers(queue: &Queue) -> QueueState {
    let state = queue.state();
    QueueState {
        max_size: state.max_size,
        size: state.size,
        next_avail: state.next_avail,
        next_used: state.next_used,
        event_idx: state.event_idx_enabled,
        ready: state.ready,
        desc_table: state.desc_table,
        avail_ring: state.avail_ring,
        used_ring: state.used_ring,
        in_flight: Vec::new(),
    }
}

/// The inverse of [`save_registers`].
pub(crate) fn restore_registers(state: &QueueState) -> Result<Queue, QueueError> {
    Ok(Queue::try_from(virtio_queue::QueueState {
        max_size: state.max_size,
        next_avail: state.next_avail,
        next_used: state.next_used,
        event_idx_enabled: state.event_idx,
        size: state.size,
        ready: state.ready,
        desc_table: state.desc_table,
        avail_ring: state.avail_ring,
        used_ring: state.used_ring,
    })?)
}

/// A copy of a queue's registers.
pub(crate) fn registers_of(queue: &Queue) -> Result<Queue, QueueError> {
    restore_registers(&save_registers(queue))
}
