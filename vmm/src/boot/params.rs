//! The zero page (`struct boot_params`) with the memory map.

use katavm_devices::memory::GuestMemory;
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::kernel::Kernel;
use crate::layout::{CMDLINE, CMDLINE_MAX, HIGH_MEMORY, LOW_MEMORY_END, ZERO_PAGE};
use crate::memory;

/// Values of the boot protocol's fields.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// Usable RAM in the e820 map.
const RAM: u32 = 1;

/// Writes the command line and the zero page.
pub fn write(
    memory: &GuestMemory,
    kernel: &Kernel,
    initramfs: Option<(GuestAddress, u32)>,
    cmdline: &str,
    memory_mib: u32,
) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_slice(&[0], GuestAddress(CMDLINE + cmdline.len() as u64))?;

    let mut params = boot_params::default();
    match kernel.header {
        Some(header) => params.hdr = header,
        None => {
            params.hdr.boot_flag = BOOT_FLAG;
            params.hdr.header = HEADER_MAGIC;
            params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
        }
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some((address, size)) = initramfs {
        params.hdr.ramdisk_image = address.0 as u32;
        params.hdr.ramdisk_size = size;
    }
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(e820(memory_mib)) {
        *entry = boot_e820_entry { addr, size, type_: RAM };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), memory)?;
    Ok(())
}

/// Usable RAM: all of it but the hole from the MP table to 1 MiB.
fn e820(memory_mib: u32) -> Vec<(u64, u64)> {
    let mut entries = vec![(0, LOW_MEMORY_END)];
    for (start, len) in memory::ranges(memory_mib) {
        let (start, end) = (start.0.max(HIGH_MEMORY), start.0 + len as u64);
        entries.push((start, end - start));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_all_memory_but_the_hole() {
        assert_eq!(e820(128), [(0, 0x9_fc00), (0x10_0000, (128 << 20) - 0x10_0000)]);
        assert_eq!(e820(4096)[2], (1 << 32, 1 << 30));
    }
}
