//! Loading the kernel and the initramfs.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use katavm_devices::memory::GuestMemory;
use linux_loader::bootparam::setup_header;
use linux_loader::loader::{KernelLoader, bzimage::BzImage, elf::Elf};
use vm_memory::{Address as _, GuestAddress, GuestMemory as _, GuestMemoryRegion as _, ReadVolatile as _};

use super::{BootError, read_error};
use crate::config::MicrovmConfig;
use crate::layout::HIGH_MEMORY;

/// A bzImage' 64-bit entry point lies this far behind its start (boot protocol, 64-bit).
const ENTRY_64: u64 = 0x200;
const PAGE: u64 = 0x1000;

/// A kernel in guest memory.
pub struct Kernel {
    /// Where the boot CPU starts.
    pub entry: GuestAddress,
    /// One past the kernel's last byte, its initial bss included.
    pub end: GuestAddress,
    /// The header that a bzImage brings along.
    pub header: Option<setup_header>,
}

/// Loads the kernel that `config` names.
pub fn load(memory: &GuestMemory, config: &MicrovmConfig) -> Result<Kernel, BootError> {
    let path = &config.kernel;
    let mut file = File::open(path).map_err(read_error("the kernel", path))?;
    let mut magic = [0; 4];
    let is_elf = file.read_exact(&mut magic).is_ok() && magic == *b"\x7fELF";
    let mut setup = [0; 4];
    // "HdrS" at 0x202 of a bzImage (boot protocol 2.00).
    let is_bzimage = file.read_exact_at(&mut setup, 0x202).is_ok() && setup == *b"HdrS";
    file.rewind().map_err(read_error("the kernel", path))?;
    let high = Some(GuestAddress(HIGH_MEMORY));
    let loaded = if is_elf {
        Elf::load(memory, None, &mut file, high)
    } else if is_bzimage {
        BzImage::load(memory, None, &mut file, high)
    } else {
        return Err(BootError::NotAKernel(path.clone()));
    };
    let loaded = loaded.map_err(|error| failed(memory, config, &file, error))?;
    let (entry, room) = match loaded.setup_header {
        // The kernel unpacks itself to where it prefers and needs `init_size` bytes there.
        Some(header) => (loaded.kernel_load.unchecked_add(ENTRY_64), header.pref_address + u64::from(header.init_size)),
        None => (loaded.kernel_load, 0),
    };
    Ok(Kernel { entry, end: GuestAddress(loaded.kernel_end.max(room)), header: loaded.setup_header })
}

/// A kernel that does not load is too large for the memory, or broken.
fn failed(memory: &GuestMemory, config: &MicrovmConfig, file: &File, error: linux_loader::loader::Error) -> BootError {
    let needed = HIGH_MEMORY * 16 + file.metadata().map_or(0, |metadata| metadata.len());
    if memory.last_addr().raw_value() < needed {
        return BootError::MemoryTooSmall { memory_mib: config.memory_mib, needed_mib: needed.div_ceil(1 << 20) };
    }
    BootError::Load { path: config.kernel.clone(), error }
}

/// Loads the initramfs as high below the gap as it goes; returns its address and length.
pub fn load_initramfs(
    memory: &GuestMemory,
    path: &Path,
    kernel_end: GuestAddress,
    memory_mib: u32,
) -> Result<(GuestAddress, u32), BootError> {
    let mut file = File::open(path).map_err(read_error("the initramfs", path))?;
    let len = file.metadata().map_err(read_error("the initramfs", path))?.len();
    let top = memory.iter().next().map_or(0, |region| region.len());
    let start = top.checked_sub(len).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel_end.raw_value());
    let (Some(start), Ok(size)) = (start, u32::try_from(len)) else {
        let needed_mib = (kernel_end.raw_value() + len).div_ceil(1 << 20) + 1;
        return Err(BootError::MemoryTooSmall { memory_mib, needed_mib });
    };
    let slice = memory.get_slice(GuestAddress(start), size as usize)?;
    let mut slice = slice;
    let read = file.read_exact_volatile(&mut slice);
    read.map_err(|error| read_error("the initramfs", path)(std::io::Error::other(error)))?;
    Ok((GuestAddress(start), size))
}
