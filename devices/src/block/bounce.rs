//! Aligned memory of the host between the guest's buffers and a disk that is opened with O_DIRECT.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::virtio::queue::Buffers;

/// Bytes in one buffer, and its alignment's upper end: with all requests of a disk under way, 16 MiB.
pub const LEN: usize = 128 * 1024;
/// What every block device and file system takes.
const ALIGN: usize = 4096;
const LAYOUT: Layout = match Layout::from_size_align(LEN, ALIGN) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two, and no overflow"),
};

/// A window of the disk that whole blocks of are moved by.
pub struct Bounce {
    memory: NonNull<u8>,
    /// On the disk, a multiple of its unit.
    start: u64,
    /// Bytes of the window, a multiple of the disk's unit, at most [`LEN`].
    len: usize,
    /// Where in the window the guest's bytes begin, and how many there are.
    skip: usize,
    part: usize,
    /// The window has what is on the disk.
    is_filled: bool,
    writes: bool,
}

impl Bounce {
    pub fn new() -> Self {
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(LAYOUT) };
        let Some(memory) = NonNull::new(memory) else { handle_alloc_error(LAYOUT) };
        Self { memory, start: 0, len: 0, skip: 0, part: 0, is_filled: false, writes: false }
    }

    /// Aims the window at the first of `left` bytes from `at` on; `unit` is a power of two of at most 4096.
    pub fn aim(&mut self, at: u64, left: usize, unit: u64, writes: bool) {
        let start = at & !(unit - 1);
        let skip = (at - start) as usize;
        let unit = unit as usize;
        let len = (skip.saturating_add(left)).min(LEN).next_multiple_of(unit).min(LEN);
        if (start, len) != (self.start, self.len) {
            self.is_filled = false;
        }
        let part = left.min(len - skip);
        (self.start, self.len, self.skip, self.part, self.writes) = (start, len, skip, part, writes);
    }

    /// The guest's bytes are not whole blocks: the window must be read before it is written.
    pub fn must_fill(&self) -> bool {
        self.writes && self.part != self.len && !self.is_filled
    }

    /// `done` bytes were read into the window; whether that was all of it.
    pub fn filled(&mut self, done: usize) -> bool {
        self.is_filled = done >= self.len;
        self.is_filled
    }

    /// Where the window is on the disk.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The window's memory, which is valid as long as `self` lives.
    pub fn vector(&self) -> libc::iovec {
        libc::iovec { iov_base: self.memory.as_ptr().cast(), iov_len: self.len }
    }

    /// How many of the guest's bytes were moved with the first `done` of the window.
    pub fn useful(&mut self, done: usize) -> usize {
        // The next window is another one.
        self.is_filled = false;
        done.saturating_sub(self.skip).min(self.part)
    }

    /// Copies the guest's bytes into the window.
    pub fn copy_from(&mut self, data: &mut Buffers<'_>) {
        let (skip, part) = (self.skip, self.part);
        if let Some(bytes) = self.bytes().get_mut(skip..skip + part) {
            data.read(bytes);
        }
    }

    /// Copies to the guest what the first `done` bytes of the window have for it; how many.
    pub fn copy_to(&mut self, data: &mut Buffers<'_>, done: usize) -> usize {
        let (skip, part) = (self.skip, self.useful(done));
        self.bytes().get(skip..skip + part).map_or(0, |bytes| data.write(bytes))
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation has LEN initialized bytes and is this one's own. It is borrowed mutably, so no system
        // call is using the vector: callers make one call at a time, and look here only when it has returned.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), LEN) }
    }
}

// SAFETY: an allocation of its own.
unsafe impl Send for Bounce {}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and not used any more.
        unsafe { dealloc(self.memory.as_ptr(), LAYOUT) };
    }
}
