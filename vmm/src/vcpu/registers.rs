//! Registers and tables of the boot CPU: 64-bit mode with the first GiB mapped one to one (boot protocol, 64-bit).

use katavm_devices::memory::GuestMemory;
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::kvm::{KvmError, ioctl};
use crate::layout::{GDT, IDT, PAGE_DIRECTORY, PDPT, PML4, STACK, ZERO_PAGE};

/// Control and feature bits (AMD64 APM 2, 3.1).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Page table entries: present, writable; 2 MiB.
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
/// Bit 1 of rflags is always set.
const RFLAGS: u64 = 2;
/// Selectors that the boot protocol asks for: __BOOT_CS and __BOOT_DS.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// Descriptors: null, unused, flat 64-bit code, flat data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes descriptor and page tables to guest memory.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(at))?;
    }
    memory.write_obj(0_u64, GuestAddress(IDT))?;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    for page in 0..512_u64 {
        memory.write_obj(page << 21 | PRESENT_WRITABLE | LARGE, GuestAddress(PAGE_DIRECTORY + 8 * page))?;
    }
    Ok(())
}

/// Starts the boot CPU at `entry` with the zero page in rsi.
pub fn set_up(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(CODE, 0xb, 1, 0);
    let data = segment(DATA, 3, 0, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, (size_of_val(&DESCRIPTORS) - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 7);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;

    // The x87 control word and MXCSR after FNINIT: all exceptions masked.
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(ioctl("KVM_SET_FPU"))?;

    let regs = kvm_regs { rflags: RFLAGS, rip: entry.0, rsp: STACK, rbp: STACK, rsi: ZERO_PAGE, ..Default::default() };
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))
}
