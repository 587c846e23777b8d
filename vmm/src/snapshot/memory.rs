//! Guest RAM in a file: regions one after another.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use katavm_devices::memory::GuestMemory;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestMemory as _, GuestMemoryRegion as _, GuestRegionMmap, WriteVolatile as _};

use crate::memory;

/// Writes all of `guest` to `file` from its start. Pages of zeros become holes.
///
/// # Errors
/// Of the file.
pub fn write(guest: &GuestMemory, file: &mut File) -> io::Result<()> {
    const CHUNK: usize = 64 << 10;
    file.set_len(0)?;
    let mut at = 0;
    for region in guest.iter() {
        let slice = region.as_volatile_slice().map_err(io::Error::other)?;
        for offset in (0..slice.len()).step_by(CHUNK) {
            let len = CHUNK.min(slice.len() - offset);
            let chunk = slice.subslice(offset, len).map_err(io::Error::other)?;
            let mut bytes = vec![0_u8; len];
            chunk.copy_to(&mut bytes);
            if bytes.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start(at + offset as u64))?;
                file.write_all_volatile(&chunk).map_err(io::Error::other)?;
            }
        }
        at += region.len();
    }
    file.set_len(at)
}

/// Maps `mib` MiB privately from `file`: pages are read when the guest touches them, and clones share them until then.
///
/// # Errors
/// When the file is too short or cannot be mapped.
pub fn map(mib: u32, file: &File) -> io::Result<GuestMemory> {
    let wanted = u64::from(mib) << 20;
    // A mapping past the end of its file would end this process with SIGBUS.
    if file.metadata()?.len() < wanted {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the memory file is shorter than {mib} MiB")));
    }
    let file = Arc::new(file.try_clone()?);
    let mut at = 0;
    let mut regions = Vec::new();
    for (start, len) in memory::ranges(mib) {
        let region: MmapRegion<()> = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), at))
            .build()
            .map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, start).ok_or_else(|| io::Error::other("a region overflows"))?;
        regions.push(region);
        at += len as u64;
    }
    let guest = GuestMemory::from_regions(regions).map_err(io::Error::other)?;
    memory::keep_private(&guest).map_err(io::Error::other)?;
    Ok(guest)
}
