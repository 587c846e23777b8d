//! The guest's RAM.

use katavm_devices::memory::GuestMemory;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion as _};

use crate::layout::{GAP_END, GAP_START};

/// Why there is no RAM for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// mmap(2) failed.
    #[error("cannot map {0} MiB of guest memory: {1}")]
    Map(u32, vm_memory::mmap::FromRangesError),
    /// madvise(2) failed.
    #[error("cannot advise the kernel about guest memory: {0}")]
    Advise(std::io::Error),
}

/// The ranges of guest-physical addresses that hold `mib` MiB of RAM: below the 3 GiB gap and above it.
pub fn ranges(mib: u32) -> Vec<(GuestAddress, usize)> {
    let bytes = u64::from(mib) << 20;
    let low = bytes.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(GAP_END), (bytes - low) as usize));
    }
    ranges
}

/// Maps `mib` MiB of anonymous memory.
///
/// # Errors
/// When mmap(2) or madvise(2) fails.
pub fn create(mib: u32) -> Result<GuestMemory, MemoryError> {
    let memory = GuestMemory::from_ranges(&ranges(mib)).map_err(|error| MemoryError::Map(mib, error))?;
    keep_private(&memory)?;
    Ok(memory)
}

/// Guest RAM is in no child process and in no core dump of ours.
pub fn keep_private(memory: &GuestMemory) -> Result<(), MemoryError> {
    for region in memory.iter() {
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the range is this mapping's own; neither advice changes what the memory holds.
            let done = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
            if done != 0 {
                return Err(MemoryError::Advise(std::io::Error::last_os_error()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_round_the_gap() {
        assert_eq!(ranges(256), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ranges(3072), [(GuestAddress(0), 3072 << 20)]);
        assert_eq!(ranges(4096), [(GuestAddress(0), 3072 << 20), (GuestAddress(GAP_END), 1024 << 20)]);
    }

    #[test]
    fn created_memory_is_as_large_as_asked_for() {
        let memory = create(8).unwrap();
        assert_eq!(memory.iter().map(|region| region.len()).sum::<u64>(), 8 << 20);
    }
}
