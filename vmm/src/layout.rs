//! Where things are in the guest's physical address space and on its interrupt lines.

/// Global descriptor table of the boot CPU.
pub const GDT: u64 = 0x500;
/// Interrupt descriptor table of the boot CPU.
pub const IDT: u64 = 0x520;
/// The zero page, `struct boot_params` (Linux x86 boot protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const STACK: u64 = 0x8ff0;
/// Page map level 4, followed by one page directory pointer table and one page directory.
pub const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub const PDPT: u64 = 0xa000;
/// Page directory: the first GiB in 2 MiB pages.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// Longest command line with its final zero, in bytes (COMMAND_LINE_SIZE of x86 is 2048).
pub const CMDLINE_MAX: usize = 2048;
/// End of low memory that the kernel may use; the MP table lies above.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The MP floating pointer structure, where kernels look for it: the start of the extended BIOS data area.
pub const MP_TABLE: u64 = LOW_MEMORY_END;
/// One past the last byte the MP table may use.
#[cfg(test)]
pub const MP_TABLE_END: u64 = 0xa_0000;
/// Memory that kernels are loaded to begins here.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM stops here and goes on at [`GAP_END`]: 3 GiB.
pub const GAP_START: u64 = 0xc000_0000;
/// 4 GiB.
pub const GAP_END: u64 = 0x1_0000_0000;
/// The first virtio-mmio window; one page each.
pub const MMIO_START: u64 = 0xd000_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Three pages that VMX needs for itself (KVM_SET_TSS_ADDR).
pub const TSS: usize = 0xfffb_d000;
/// One page that VMX needs for itself (KVM_SET_IDENTITY_MAP_ADDR).
pub const IDENTITY_MAP: u64 = 0xfffb_c000;

/// First serial port: ports 0x3f8 to 0x3ff.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the first serial port.
pub const SERIAL_GSI: u32 = 4;
/// The first interrupt line for virtio devices.
pub const VIRTIO_GSI: u32 = 5;
/// Pins of KVM's I/O APIC.
pub const GSI_COUNT: u32 = 24;
/// Lines for virtio devices. When there are more devices, they share them from the first on again.
pub const VIRTIO_LINES: u32 = GSI_COUNT - VIRTIO_GSI;
/// As many virtio devices as the kernel command line has room for, with all that the guest is told besides.
pub const MAX_DEVICES: usize = 32;
/// As many vCPUs as the MP table has room for with all its interrupt entries.
pub const MAX_VCPUS: u8 = 32;
