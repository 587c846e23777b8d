//! The local APIC at the start: its two pins as the MP table says.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, ioctl};

/// Local vector table registers (Intel SDM 3, 11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, bits 8 to 10.
const EXT_INT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;
const MODE: u32 = 7 << 8;

/// LINT0 takes the PIC's interrupts, LINT1 is the NMI.
pub fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
    set_mode(&mut lapic, LVT_LINT0, EXT_INT);
    set_mode(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))
}

fn set_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, from) in bytes.iter_mut().zip(&lapic.regs[register..register + 4]) {
        *byte = *from as u8;
    }
    let value = u32::from_le_bytes(bytes) & !MODE | mode;
    for (to, byte) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = byte as _;
    }
}
