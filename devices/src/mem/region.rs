//! The region: what of it is plugged, and what the driver's requests do to it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use log::warn;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::MemState;
use super::blocks::{BLOCK, Blocks, Run};
use super::layout::{
    ACK, BUSY, CONFIG_LEN, Config, ERROR, Extent, NACK, Request, STATE_MIXED, STATE_PLUGGED, STATE_UNPLUGGED,
};
use super::progress::Progress;
use crate::balloon::discard;
use crate::memory::GuestMemory;

/// Memory is granted in such steps: what Linux makes memory of at once.
pub const SLOT: u64 = 128 << 20;

/// Where the memory comes from.
pub trait Backing: Send {
    /// Has the first `bytes` of the region be there for the guest and for devices, and no more. A multiple of [`SLOT`], or
    /// the whole region.
    ///
    /// # Errors
    /// Of the host.
    fn grant(&mut self, bytes: u64) -> io::Result<()>;
}

/// Why memory cannot be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// More than the region has.
    #[error("{wanted} MiB of memory cannot be plugged in: {most} MiB at most")]
    TooMuch {
        /// What was asked for.
        wanted: u64,
        /// What there can be.
        most: u64,
    },
    /// A saved state is of another device.
    #[error("the saved state of plugged memory is not possible")]
    State,
}

/// A region of guest memory, the blocks of which are plugged and unplugged.
pub struct Region {
    blocks: Blocks,
    config: Config,
    bytes: [u8; CONFIG_LEN],
    backing: Option<Box<dyn Backing>>,
    granted: u64,
    progress: Arc<Progress>,
}

impl Region {
    /// A region of as many whole blocks as `mib` MiB have, none of them plugged.
    pub fn new(mib: u64) -> Self {
        let count = (mib << 20) / BLOCK;
        Self::with(count * BLOCK, Blocks::new(usize::try_from(count).unwrap_or(usize::MAX)))
    }

    fn with(region: u64, blocks: Blocks) -> Self {
        let config = Config { region, ..Config::default() };
        let (bytes, backing, granted, progress) = ([0; CONFIG_LEN], None, 0, Arc::default());
        let mut region = Self { blocks, config, bytes, backing, granted, progress };
        region.publish();
        region
    }

    /// What a snapshot has of it.
    pub fn save(&self) -> MemState {
        let Config { region, usable, requested, .. } = self.config;
        MemState { region, usable, requested, blocks: self.blocks.clone() }
    }

    /// As it was saved.
    pub fn restore(state: &MemState) -> Result<Self, MemError> {
        let MemState { region, usable, requested, blocks } = state;
        let count = usize::try_from(region / BLOCK).unwrap_or(usize::MAX);
        let sound = region.is_multiple_of(BLOCK) && requested.is_multiple_of(BLOCK) && blocks.is_sound(count);
        // What is plugged and what is to be are within what is usable, and that is within the region.
        if !sound || usable > region || (blocks.top() as u64 * BLOCK).max(*requested) > *usable {
            return Err(MemError::State);
        }
        let mut restored = Self::with(*region, blocks.clone());
        (restored.config.usable, restored.config.requested) = (*usable, *requested);
        restored.publish();
        Ok(restored)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.config.region
    }

    /// How many bytes of it are there for guest and devices.
    pub fn granted(&self) -> u64 {
        (self.blocks.top() as u64 * BLOCK).next_multiple_of(SLOT).min(self.config.region)
    }

    /// Places it at a guest-physical address, and has what is plugged be there.
    pub fn place(&mut self, address: u64, backing: Box<dyn Backing>) -> io::Result<()> {
        self.config.address = address;
        self.backing = Some(backing);
        self.publish();
        self.grant()
    }

    /// How many MiB the guest is to have plugged.
    pub fn request(&mut self, mib: u64) -> Result<(), MemError> {
        let most = self.config.region;
        let wanted =
            mib.checked_mul(1 << 20).and_then(|bytes| bytes.checked_next_multiple_of(BLOCK)).unwrap_or(u64::MAX);
        if wanted > most {
            return Err(MemError::TooMuch { wanted: mib, most: most >> 20 });
        }
        self.config.requested = wanted;
        // It only grows, until the driver unplugs everything (virtio 1.3, 5.15.6.1).
        self.config.usable = self.config.usable.max(wanted.next_multiple_of(SLOT).min(most));
        self.publish();
        Ok(())
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.config.plugged
    }

    /// The configuration space.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Tells of every change of how much is plugged.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Does what a driver asks for; type and state of the response.
    pub fn answer(&mut self, request: Option<Request>, memory: &GuestMemory) -> (u16, u16) {
        match request {
            Some(Request::Plug(extent)) => (self.plug(extent), 0),
            Some(Request::Unplug(extent)) => (self.unplug(extent, memory), 0),
            Some(Request::UnplugAll) => (self.unplug_all(memory), 0),
            Some(Request::State(extent)) => self.state(extent),
            None => (ERROR, 0),
        }
    }

    fn plug(&mut self, extent: Extent) -> u16 {
        let Some(range) = self.range(extent) else { return ERROR };
        if self.blocks.run(range.clone()) != Run::Unplugged {
            return ERROR;
        }
        if self.config.plugged + range.len() as u64 * BLOCK > self.config.requested {
            return NACK;
        }
        self.blocks.set(range.clone(), true);
        if let Err(error) = self.grant() {
            warn!("the guest gets no more memory: {error}");
            self.blocks.set(range, false);
            return BUSY;
        }
        self.publish();
        ACK
    }

    fn unplug(&mut self, extent: Extent, memory: &GuestMemory) -> u16 {
        let Some(range) = self.range(extent).filter(|range| self.blocks.run(range.clone()) == Run::Plugged) else {
            return ERROR;
        };
        self.discard(range.clone(), memory);
        self.blocks.set(range, false);
        self.retract();
        ACK
    }

    fn unplug_all(&mut self, memory: &GuestMemory) -> u16 {
        self.discard(0..self.blocks.top(), memory);
        self.blocks.set(0..self.blocks.count(), false);
        self.config.usable = self.config.requested.next_multiple_of(SLOT).min(self.config.region);
        self.retract();
        ACK
    }

    fn state(&self, extent: Extent) -> (u16, u16) {
        let Some(range) = self.range(extent) else { return (ERROR, 0) };
        match self.blocks.run(range) {
            Run::Plugged => (ACK, STATE_PLUGGED),
            Run::Unplugged => (ACK, STATE_UNPLUGGED),
            Run::Mixed => (ACK, STATE_MIXED),
        }
    }

    fn range(&self, extent: Extent) -> Option<Range<usize>> {
        extent.within(self.config.address, self.config.usable)
    }

    /// Lets go of what blocks hold: it must be read as zeroes, or be gone, once they are plugged again.
    fn discard(&self, range: Range<usize>, memory: &GuestMemory) {
        let (start, len) = (range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
        let len = len.min(self.granted.saturating_sub(start));
        let slices = memory.get_slices(GuestAddress(self.config.address + start), len as usize);
        for slice in slices.flatten() {
            if let Err(error) = discard::discard(&slice) {
                warn!("memory of the guest cannot be given back: {error}");
            }
        }
    }

    /// Has no more be there than up to the last block that is plugged.
    fn retract(&mut self) {
        if let Err(error) = self.grant() {
            warn!("memory that the guest has given back stays within its reach: {error}");
        }
        self.publish();
    }

    fn grant(&mut self) -> io::Result<()> {
        let wanted = self.granted();
        if wanted != self.granted {
            self.backing.as_mut().ok_or(io::ErrorKind::NotConnected)?.grant(wanted)?;
            self.granted = wanted;
        }
        Ok(())
    }

    /// Makes the configuration space what it is to be, and tells those who wait.
    fn publish(&mut self) {
        self.config.plugged = self.blocks.plugged() as u64 * BLOCK;
        self.bytes = self.config.bytes();
        self.progress.note(self.config.plugged);
    }
}
