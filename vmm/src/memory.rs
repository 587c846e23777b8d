//! The guest's RAM.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use katavm_devices::mem::SLOT;
use katavm_devices::memory::{GuestMemory, GuestRegion};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion as _, GuestRegionMmap};

use crate::layout::{GAP_END, GAP_START};

/// Why there is no RAM for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// mmap(2) failed.
    #[error("cannot map {mib} MiB of guest memory: {error}")]
    Map {
        /// How much was asked for.
        mib: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The host has too few huge pages.
    #[error(
        "cannot map {mib} MiB of guest memory in huge pages: {free} MiB of pages of 2 MiB are free on this host; \
         set vm.nr_hugepages higher, or do without them"
    )]
    HugePages {
        /// How much was asked for.
        mib: u64,
        /// How much there is.
        free: u64,
    },
    /// Huge pages are of 2 MiB each.
    #[error("{mib} MiB of guest memory are no whole number of huge pages of 2 MiB")]
    OddHugePages {
        /// How much was asked for.
        mib: u64,
    },
    /// madvise(2) failed.
    #[error("cannot advise the kernel about guest memory: {0}")]
    Advise(io::Error),
}

/// The region of memory that is plugged in later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Its length in bytes; 0 where there is none.
    pub len: u64,
    /// How many of them are there from the start.
    pub granted: u64,
}

/// Where the guest's RAM comes from.
#[derive(Clone, Copy)]
pub enum Source<'f> {
    /// Anonymous memory.
    Nothing {
        /// In huge pages of 2 MiB, all of them set aside for this guest from the start (mmap(2), `MAP_HUGETLB`): one that is
        /// missing later would end it.
        huge_pages: bool,
    },
    /// This file as [`write`](crate::snapshot::write) left it, mapped privately: pages are read when the guest touches
    /// them, and clones share them until then.
    Snapshot(&'f File),
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

/// Where memory that is plugged in later begins: behind all RAM, at a whole slot.
pub fn growth_start(mib: u32) -> GuestAddress {
    let end = ranges(mib).last().map_or(0, |(start, len)| start.0 + *len as u64);
    GuestAddress(end.max(GAP_END).next_multiple_of(SLOT))
}

/// Maps `mib` MiB, and behind them a region to grow into, if there is to be one: it is the last then.
///
/// # Errors
/// When the file is too short or huge pages are too few, or of mmap(2), mprotect(2) or madvise(2).
pub fn map(mib: u32, growth: Growth, source: Source<'_>) -> Result<GuestMemory, MemoryError> {
    let huge_pages = matches!(source, Source::Nothing { huge_pages: true });
    if huge_pages && !mib.is_multiple_of(2) {
        return Err(MemoryError::OddHugePages { mib: mib.into() });
    }
    let memory = regions(mib, growth, source)
        .and_then(|regions| GuestMemory::from_regions(regions).map_err(io::Error::other))
        .map_err(|error| match free_huge_pages_mib() {
            Some(free) if huge_pages && free < mib.into() => MemoryError::HugePages { mib: mib.into(), free },
            _ => MemoryError::Map { mib: mib.into(), error },
        })?;
    keep_private(&memory).map_err(MemoryError::Advise)?;
    Ok(memory)
}

fn regions(mib: u32, growth: Growth, source: Source<'_>) -> io::Result<Vec<GuestRegion>> {
    let mut at = 0;
    let (file, anonymous) = match source {
        Source::Nothing { huge_pages: false } => (None, FLAGS),
        // Without MAP_NORESERVE: with it pages could run out while the guest runs.
        Source::Nothing { huge_pages: true } => (None, libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
        Source::Snapshot(file) => {
            // A mapping past the end of its file would end this process with SIGBUS.
            if file.metadata()?.len() < (u64::from(mib) << 20) + growth.granted {
                let what = format!("the memory file is shorter than {mib} MiB and what was plugged in");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            (Some(Arc::new(file.try_clone()?)), FLAGS)
        }
    };
    let mut regions = Vec::new();
    for (start, len) in ranges(mib) {
        let builder = private(len, libc::PROT_READ | libc::PROT_WRITE);
        let mapping = match &file {
            Some(file) => builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), at)),
            None => builder.with_mmap_flags(anonymous | libc::MAP_ANONYMOUS),
        };
        regions.push(GuestRegion::whole(region(mapping, start)?));
        at += len as u64;
    }
    if growth.len > 0 {
        // Nobody may touch it yet, so the host need not reckon with it either.
        let builder = private(growth.len as usize, libc::PROT_NONE).with_mmap_flags(FLAGS | libc::MAP_ANONYMOUS);
        let region = GuestRegion::partial(region(builder, growth_start(mib))?, 0);
        if let Some(file) = file.filter(|_| growth.granted > 0) {
            lay_over(&region, growth.granted, &file, at)?;
        }
        regions.push(region);
    }
    Ok(regions)
}

const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_NORESERVE;

fn private(len: usize, access: libc::c_int) -> MmapRegionBuilder<()> {
    MmapRegionBuilder::new(len).with_mmap_prot(access).with_mmap_flags(FLAGS)
}

fn region(builder: MmapRegionBuilder<()>, start: GuestAddress) -> io::Result<GuestRegionMmap<()>> {
    let mapping: MmapRegion<()> = builder.build().map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| io::Error::other("a region overflows"))
}

/// Maps the first `len` bytes of a region anew, from `at` in `file`.
fn lay_over(region: &GuestRegion, len: u64, file: &File, at: u64) -> io::Result<()> {
    if len > region.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range is the beginning of this region's own mapping, which nothing has looked at yet; the file is as long,
    // which `regions` has seen to.
    let mapped = unsafe {
        libc::mmap(region.as_ptr().cast(), len as usize, access, FLAGS | libc::MAP_FIXED, file.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Huge pages of 2 MiB that nobody has and nobody was promised, in MiB (`Documentation/admin-guide/mm/hugetlbpage.rst`).
fn free_huge_pages_mib() -> Option<u64> {
    let read = |name: &str| -> Option<u64> {
        let path = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Some(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?) * 2)
}

/// Guest RAM is in no child process and in no core dump of ours.
fn keep_private(memory: &GuestMemory) -> io::Result<()> {
    for region in memory.iter() {
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: the range is this mapping's own; neither advice changes what the memory holds.
            let done = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes as _;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    const ORDINARY: Source<'static> = Source::Nothing { huge_pages: false };

    #[test]
    fn huge_pages_are_there_or_the_guest_is_not() {
        let huge = |mib| map(mib, Growth::default(), Source::Nothing { huge_pages: true });
        let error = huge(7).err().unwrap().to_string();
        assert_eq!(error, "7 MiB of guest memory are no whole number of huge pages of 2 MiB");
        let Some(free) = free_huge_pages_mib() else { return };
        let error = huge(u32::try_from(free).unwrap() + 2).err().unwrap().to_string();
        assert!(error.contains("in huge pages") && error.contains("set vm.nr_hugepages higher"), "{error}");
    }

    #[test]
    fn memory_goes_round_the_gap() {
        assert_eq!(ranges(256), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ranges(3072), [(GuestAddress(0), 3072 << 20)]);
        assert_eq!(ranges(4096), [(GuestAddress(0), 3072 << 20), (GuestAddress(GAP_END), 1024 << 20)]);
    }

    #[test]
    fn what_is_plugged_in_comes_behind_all_of_it() {
        for (mib, start) in [(96, 4096), (3072, 4096), (3073, 4096 + 128), (4096, 5120), (4097, 5120 + 128)] {
            assert_eq!(growth_start(mib), GuestAddress(start << 20), "{mib}");
        }
    }

    #[test]
    fn mapped_memory_is_as_large_as_asked_for() {
        let memory = map(8, Growth::default(), ORDINARY).unwrap();
        assert_eq!(memory.iter().map(GuestRegion::granted).sum::<u64>(), 8 << 20);
        let memory = map(8, Growth { len: 16 << 20, granted: 0 }, ORDINARY).unwrap();
        assert_eq!(memory.iter().map(GuestRegion::granted).sum::<u64>(), 8 << 20);
        assert_eq!(memory.iter().last().unwrap().len(), 16 << 20);
    }

    #[test]
    fn a_snapshot_has_what_was_plugged_in_behind_the_rest() {
        let mut file = TempFile::new().unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        let growth = Growth { len: 4 << 20, granted: 1 << 20 };
        let error = map(1, growth, Source::Snapshot(&file)).err().unwrap().to_string();
        assert!(error.contains("shorter than 1 MiB"), "{error}");
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[7; 1 << 20]).unwrap();
        let memory = map(1, growth, Source::Snapshot(&file)).unwrap();
        let region = memory.iter().last().unwrap();
        assert_eq!(region.granted(), 0);
        region.grant(1 << 20).unwrap();
        assert_eq!(memory.read_obj::<u8>(growth_start(1)).unwrap(), 7);
    }
}
