//! Giving the host back what the guest has no use for.

use std::io;

use vm_memory::{GuestAddress, GuestMemory as _, VolatileSlice};

use crate::memory::GuestMemory;

/// The size of a page in the balloon's lists (virtio 1.3, 5.5.6), and of the host's.
pub const PAGE: usize = 4096;

/// Lets go of the pages that lie wholly in `slice`; how many bytes that were. What the guest reads there next is zeroes,
/// or in a guest that was restored from a file what the file has.
///
/// # Errors
/// Those of madvise(2).
pub fn discard(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let first = start.next_multiple_of(PAGE);
    let end = (start + slice.len()) & !(PAGE - 1);
    let Some(len) = end.checked_sub(first).filter(|len| *len > 0) else { return Ok(0) };
    // SAFETY: the range is within the slice, a part of guest memory that stays mapped while it is borrowed. Its bytes may
    // change at any time anyway, as the guest writes to them: nothing in this process relies on them.
    let done = unsafe { libc::madvise(guard.as_ptr().wrapping_add(first - start).cast(), len, libc::MADV_DONTNEED) };
    if done == 0 { Ok(len) } else { Err(io::Error::last_os_error()) }
}

/// Lets go of pages by their numbers, those that follow one another at once; how many bytes that were, and how many of
/// the pages are none of the guest's.
///
/// # Errors
/// Those of madvise(2).
pub fn discard_pages(memory: &GuestMemory, mut pages: Vec<u32>) -> io::Result<(usize, usize)> {
    pages.sort_unstable();
    pages.dedup();
    let (mut bytes, mut strangers) = (0, 0);
    for run in pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
        let Some(first) = run.first() else { continue };
        let start = u64::from(*first) * PAGE as u64;
        // Regions without a gap between them make two slices.
        match memory.get_slices(GuestAddress(start), run.len() * PAGE).collect::<Result<Vec<_>, _>>() {
            Ok(slices) => {
                for slice in slices {
                    bytes += discard(&slice)?;
                }
            }
            Err(_) => strangers += run.len(),
        }
    }
    Ok((bytes, strangers))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestMemoryRegion as _};

    use super::*;

    fn memory() -> GuestMemory {
        let memory =
            crate::memory::anonymous(&[(GuestAddress(0), 16 * PAGE), (GuestAddress(1 << 20), 4 * PAGE)]).unwrap();
        for region in memory.iter() {
            let bytes = vec![7; usize::try_from(region.len()).unwrap()];
            memory.write_slice(&bytes, region.start_addr()).unwrap();
        }
        memory
    }

    fn page(memory: &GuestMemory, number: u64) -> u8 {
        memory.read_obj(GuestAddress(number * PAGE as u64)).unwrap()
    }

    #[test]
    fn only_whole_pages_are_let_go_of() {
        let memory = memory();
        let slice = |start, len| memory.get_slice(GuestAddress(start), len).unwrap();
        assert_eq!(discard(&slice(1, 2 * PAGE)).unwrap(), PAGE);
        assert_eq!([0, 1, 2].map(|number| page(&memory, number)), [7, 0, 7]);
        for (start, len) in [(1, PAGE - 1), (4 * PAGE as u64, 0), (4 * PAGE as u64, PAGE - 1), (100, 10)] {
            assert_eq!(discard(&slice(start, len)).unwrap(), 0, "{start} {len}");
        }
    }

    #[test]
    fn pages_are_let_go_of_in_any_order_and_others_stay() {
        let memory = memory();
        let (bytes, strangers) = discard_pages(&memory, vec![5, 3, 4, 3, 256, 15]).unwrap();
        assert_eq!((bytes, strangers), (5 * PAGE, 0));
        let expected = [7, 0, 0, 0, 7, 0];
        assert_eq!([2, 3, 4, 5, 14, 15].map(|number| page(&memory, number)), expected);
        assert_eq!([256, 257].map(|number| page(&memory, number)), [0, 7]);
    }

    #[test]
    fn pages_of_nobody_are_counted() {
        let memory = memory();
        assert_eq!(discard_pages(&memory, vec![16, u32::MAX, u32::MAX - 1, 300]).unwrap(), (0, 4));
        // A run that leaves the memory is none of it.
        assert_eq!(discard_pages(&memory, vec![14, 15, 16]).unwrap(), (0, 3));
        assert_eq!(page(&memory, 15), 7);
    }
}
