//! A descriptor chain, copied out of guest memory once and checked as a whole (virtio 1.3, 2.7.5).

use std::mem::size_of;

use smallvec::SmallVec;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory as _};

use super::Buffers;
use crate::memory::{GuestMemory, slice};

/// More descriptors than this in one chain are refused, indirect ones included. Linux' drivers stay far below.
const MAX_DESCRIPTORS: usize = 1024;

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct RawDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

// SAFETY: plain integers without padding (8 + 4 + 2 + 2 bytes, alignment 8): any bytes are a valid value.
unsafe impl ByteValued for RawDescriptor {}

impl RawDescriptor {
    fn read(memory: &GuestMemory, address: GuestAddress) -> Result<Self, ChainError> {
        if let Some(whole) = slice(memory, address, size_of::<Self>())
            && let Ok(this) = whole.read_obj(0)
        {
            return Ok(this);
        }
        memory.read_obj(address).map_err(|_| ChainError::Table)
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(u16::from_le(self.flags)) & flag != 0
    }
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A `next` or head index outside the table.
    #[error("descriptor index {0} is outside a table of {1}")]
    Index(u16, u16),
    /// The table itself is not in guest memory.
    #[error("the descriptor table is outside guest memory")]
    Table,
    /// The chain is longer than its table, so it has a loop, or longer than any sensible request.
    #[error("the chain has a loop or is too long")]
    TooLong,
    /// An indirect table inside another, of a bad size, or with a `next`.
    #[error("bad indirect descriptor")]
    Indirect,
    /// A buffer that is not wholly inside guest memory. Regions without a gap between them count as one.
    #[error("a buffer of {len} bytes at {addr:#x} is outside guest memory")]
    Buffer {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More than 2^32 bytes in total.
    #[error("the chain is longer than 2^32 bytes")]
    Overflow,
    /// A device-readable buffer after a device-writable one (virtio 1.3, 2.7.4.2).
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
}

/// Buffers of one direction. Few requests have more than fit here without an allocation.
type Pieces = SmallVec<[(GuestAddress, u32); 4]>;

/// One request of the driver: its buffers, all of them valid.
#[derive(Clone, Debug)]
pub struct Chain {
    head: u16,
    readable: Pieces,
    writable: Pieces,
    /// Bytes in all buffers.
    len: u64,
}

impl Chain {
    /// Reads and checks the chain that starts at `head` of the table at `table` with `size` entries.
    pub(super) fn read(memory: &GuestMemory, table: GuestAddress, size: u16, head: u16) -> Result<Self, ChainError> {
        let mut chain = Self { head, readable: Pieces::new(), writable: Pieces::new(), len: 0 };
        chain.walk(memory, table, size, head, false)?;
        Ok(chain)
    }

    fn walk(
        &mut self,
        memory: &GuestMemory,
        table: GuestAddress,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<(), ChainError> {
        let mut index = head;
        // A chain without a loop visits each entry of its table at most once.
        for _ in 0..size {
            if index >= size {
                return Err(ChainError::Index(index, size));
            }
            let offset = u64::from(index) * size_of::<RawDescriptor>() as u64;
            let address = GuestAddress(table.0.checked_add(offset).ok_or(ChainError::Table)?);
            let descriptor = RawDescriptor::read(memory, address)?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                return self.walk_indirect(memory, &descriptor, indirect);
            }
            self.push(memory, &descriptor)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = u16::from_le(descriptor.next);
        }
        Err(ChainError::TooLong)
    }

    fn walk_indirect(
        &mut self,
        memory: &GuestMemory,
        descriptor: &RawDescriptor,
        nested: bool,
    ) -> Result<(), ChainError> {
        let len = u32::from_le(descriptor.len);
        let entry = size_of::<RawDescriptor>() as u32;
        let bad = nested || descriptor.has(VRING_DESC_F_NEXT) || len == 0 || !len.is_multiple_of(entry);
        let size = u16::try_from(len / entry).map_err(|_| ChainError::Indirect)?;
        if bad {
            return Err(ChainError::Indirect);
        }
        self.walk(memory, GuestAddress(u64::from_le(descriptor.addr)), size, 0, true)
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: &RawDescriptor) -> Result<(), ChainError> {
        if self.readable.len() + self.writable.len() >= MAX_DESCRIPTORS {
            return Err(ChainError::TooLong);
        }
        let (addr, len) = (u64::from_le(descriptor.addr), u32::from_le(descriptor.len));
        self.len += u64::from(len);
        if self.len > 1 << 32 {
            return Err(ChainError::Overflow);
        }
        let address = GuestAddress(addr);
        // An empty buffer has no bytes to be outside of memory.
        if slice(memory, address, len as usize).is_none() && !memory.check_range(address, len as usize) {
            return Err(ChainError::Buffer { addr, len });
        }
        if descriptor.has(VRING_DESC_F_WRITE) {
            self.writable.push((address, len));
        } else if self.writable.is_empty() {
            self.readable.push((address, len));
        } else {
            return Err(ChainError::Order);
        }
        Ok(())
    }

    /// The index of the first descriptor, by which the chain is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers that the driver filled, in order. `memory` must be the memory of the queue.
    #[must_use]
    pub fn reader<'m>(&self, memory: &'m GuestMemory) -> Buffers<'m> {
        Buffers::new(memory, &self.readable)
    }

    /// How many bytes the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|(_, len)| *len as usize).sum()
    }

    /// How many bytes the driver filled.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|(_, len)| *len as usize).sum()
    }

    /// The buffers that the driver filled, in order, added to an iovec array. `memory` must be the memory of
    /// the queue; the pointers are valid as long as it is mapped.
    pub fn extend_readable(&self, memory: &GuestMemory, vectors: &mut Vec<libc::iovec>) {
        extend(&self.readable, memory, vectors);
    }

    /// The buffers that the device fills, in order, added to an iovec array, on the same terms.
    pub fn extend_writable(&self, memory: &GuestMemory, vectors: &mut Vec<libc::iovec>) {
        extend(&self.writable, memory, vectors);
    }

    /// The buffers that the device fills, in order. `memory` must be the memory of the queue.
    #[must_use]
    pub fn writer<'m>(&self, memory: &'m GuestMemory) -> Buffers<'m> {
        Buffers::new(memory, &self.writable)
    }
}

fn extend(pieces: &[(GuestAddress, u32)], memory: &GuestMemory, vectors: &mut Vec<libc::iovec>) {
    let slices = pieces.iter().flat_map(|(address, len)| memory.get_slices(*address, *len as usize));
    vectors.extend(slices.flatten().map(|slice| {
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        libc::iovec { iov_base, iov_len: slice.len() }
    }));
}
