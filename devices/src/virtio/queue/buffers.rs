//! The buffers of a chain as one run of bytes.

use std::io;

use smallvec::SmallVec;
use vm_memory::{ByteValued, GuestAddress, GuestMemory as _, VolatileSlice};

use crate::memory::{GuestMemory, slice};

/// A run of guest memory made of several pieces, consumed from its front.
///
/// Whether to read from it or to write to it is the caller's to know: `Chain::reader` gives what the
/// driver filled, `Chain::writer` what the device fills. The guest may change the bytes at any time:
/// copy a value out once, then check it, then use the copy.
#[derive(Clone)]
pub struct Buffers<'m> {
    /// The pieces that are left stand from `first` on.
    pieces: SmallVec<[VolatileSlice<'m>; 4]>,
    first: usize,
    consumed: usize,
}

impl<'m> Buffers<'m> {
    pub(super) fn new(memory: &'m GuestMemory, pieces: &[(GuestAddress, u32)]) -> Self {
        // Ranges were checked when the chain was read. What is dropped here is memory that the driver has plugged out since.
        let mut slices: SmallVec<[_; 4]> = SmallVec::new();
        for (address, len) in pieces.iter().filter(|(_, len)| *len > 0) {
            match slice(memory, *address, *len as usize) {
                Some(whole) => slices.push(whole),
                None => slices.extend(memory.get_slices(*address, *len as usize).flatten()),
            }
        }
        Self { pieces: slices, first: 0, consumed: 0 }
    }

    /// The pieces that are left, in order.
    pub fn pieces(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.pieces.iter().skip(self.first)
    }

    /// Bytes left.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.pieces().map(VolatileSlice::len).sum()
    }

    /// Bytes consumed so far.
    #[must_use]
    pub fn consumed(&self) -> usize {
        self.consumed
    }

    /// Copies up to `data.len()` bytes out; returns how many.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        self.each(data.len(), |piece, done| {
            if let Some(part) = data.get_mut(done..done + piece.len()) {
                piece.copy_to(part);
            }
        })
    }

    /// Copies up to `data.len()` bytes in; returns how many.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.each(data.len(), |piece, done| {
            if let Some(part) = data.get(done..done + piece.len()) {
                piece.copy_from(part);
            }
        })
    }

    /// Copies `data.len()` bytes out.
    ///
    /// # Errors
    /// `UnexpectedEof` when fewer are left; those are then consumed.
    pub fn read_exact(&mut self, data: &mut [u8]) -> io::Result<()> {
        let len = data.len();
        if self.read(data) == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Copies all of `data` in.
    ///
    /// # Errors
    /// `WriteZero` when fewer bytes are left; those are then consumed.
    pub fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        if self.write(data) == data.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Copies one value out.
    ///
    /// # Errors
    /// `UnexpectedEof` when too few bytes are left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut value = T::default();
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// Copies one value in.
    ///
    /// # Errors
    /// `WriteZero` when too few bytes are left.
    pub fn write_obj<T: ByteValued>(&mut self, value: &T) -> io::Result<()> {
        self.write_all(value.as_slice())
    }

    /// Cuts the run in two: `self` keeps the first `len` bytes, the rest is returned. With fewer left, the rest is empty.
    #[must_use]
    pub fn split_off(&mut self, len: usize) -> Self {
        let (mut at, mut left) = (self.first, len);
        while left > 0
            && let Some(piece) = self.pieces.get(at).filter(|piece| piece.len() <= left)
        {
            left -= piece.len();
            at += 1;
        }
        let mut rest: SmallVec<[_; 4]> = self.pieces.drain(at..).collect();
        if left > 0
            && let Some(cut) = rest.first_mut()
            && let Ok((head, tail)) = cut.split_at(left)
        {
            self.pieces.push(head);
            *cut = tail;
        }
        Self { pieces: rest, first: 0, consumed: 0 }
    }

    /// The pieces of the first `max` bytes as an iovec array for a system call on this memory, at most `IOV_MAX` of them.
    ///
    /// The pointers are valid as long as the guest memory is mapped, which `'m` stands for. After the
    /// call, [`consume`](Self::consume) what it transferred.
    #[must_use]
    pub fn iovecs(&self, max: usize) -> Vec<libc::iovec> {
        let left = self.pieces.len() - self.first;
        let mut vectors = Vec::with_capacity(left.min(libc::UIO_MAXIOV as usize));
        self.add_iovecs(max, &mut vectors);
        vectors
    }

    /// Adds the pieces of the first `max` bytes to an iovec array, as many as it may have in all, on the same terms. Returns
    /// how many bytes they have.
    pub fn add_iovecs(&self, max: usize, vectors: &mut Vec<libc::iovec>) -> usize {
        let mut left = max;
        let places = (libc::UIO_MAXIOV as usize).saturating_sub(vectors.len());
        for piece in self.pieces().take(places) {
            let len = piece.len().min(left);
            if len == 0 {
                break;
            }
            vectors.push(libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: len });
            left -= len;
        }
        max - left
    }

    /// Drops `len` bytes from the front.
    pub fn consume(&mut self, len: usize) {
        self.each(len, |_, _| {});
    }

    /// Walks over the first `len` bytes piece by piece and consumes them; `act` gets each piece and its offset.
    fn each(&mut self, len: usize, mut act: impl FnMut(&VolatileSlice<'m>, usize)) -> usize {
        let mut done = 0;
        while done < len
            && let Some(piece) = self.pieces.get_mut(self.first)
        {
            let take = piece.len().min(len - done);
            let Ok((head, tail)) = piece.split_at(take) else { break };
            act(&head, done);
            done += take;
            if tail.is_empty() {
                self.first += 1;
            } else {
                *piece = tail;
            }
        }
        self.consumed += done;
        done
    }
}
