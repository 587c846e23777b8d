//! Guest RAM in a file: regions one after another, each as far as it is there.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use katavm_devices::memory::GuestMemory;
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _, WriteVolatile as _};

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
        at += slice.len() as u64;
    }
    file.set_len(at)
}
