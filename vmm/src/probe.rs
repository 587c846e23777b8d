//! Can this host run guests? Asked by running one: flags of a CPU or a module do not tell.

use std::path::Path;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{self, KvmError, ioctl};
use crate::memory::{self, Growth, MemoryError, Source};
use crate::vcpu::{self, cpuid::Cpuid};

/// Why this host cannot run guests.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM gives no virtual machine at all.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for the probe.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory cannot be written.
    #[error("cannot write the probe to guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// KVM is there, but does not execute what every Linux kernel executes.
    #[error(
        "this host's KVM stopped a guest at its instruction {instruction}: {exit}. It is no full hardware virtualization (a software KVM, perhaps), and no stock guest kernel can boot on it; use a machine with VT-x or AMD-V, or nested virtualization switched on"
    )]
    Unusable {
        /// The first instruction that it did not execute.
        instruction: &'static str,
        /// What KVM said.
        exit: String,
    },
}

/// What the probe found.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Instructions that the guest executed.
    pub executed: Vec<&'static str>,
}

/// A port that the probe reports its progress on.
const PORT: u16 = 0x5f0;
const CODE: u64 = 0x1000;

/// Instructions that a stock kernel executes early on, each of which a software KVM was seen to fail at.
const INSTRUCTIONS: [(&str, &[u8]); 4] = [
    // cmpxchg16b [rdi], with rdi = 0x3000
    ("CMPXCHG16B", &[0x48, 0xc7, 0xc7, 0x00, 0x30, 0x00, 0x00, 0x48, 0x0f, 0xc7, 0x0f]),
    // popcnt rax, rbx
    ("POPCNT", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]),
    // rdtsc
    ("RDTSC", &[0x0f, 0x31]),
    // mov rcx, cr3; mov cr3, rcx
    ("MOV CR3", &[0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9]),
];
/// mov dx, PORT; out dx, al
const REPORT: [u8; 5] = [0x66, 0xba, PORT as u8, (PORT >> 8) as u8, 0xee];

/// Runs a few instructions of 64-bit kernel code on `kvm`.
///
/// # Errors
/// Any [`ProbeError`].
pub fn check(kvm: &Path) -> Result<Probe, ProbeError> {
    let kvm = kvm::open(kvm)?;
    let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    let memory = memory::map(2, Growth::default(), Source::Nothing { huge_pages: false })?;
    kvm::set_memory(&vm, &memory)?;
    kvm::create_irqchip(&vm)?;
    vcpu::write_tables(&memory)?;
    let code: Vec<u8> = INSTRUCTIONS.iter().flat_map(|(_, code)| code.iter().chain(&REPORT)).copied().collect();
    memory.write_slice(&code, GuestAddress(CODE))?;
    let mut vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
    vcpu::set_up(&vcpu, &Cpuid::supported(&kvm)?.of(0, 1))?;
    vcpu::boot(&vcpu, GuestAddress(CODE))?;
    let mut executed = Vec::new();
    for (instruction, _) in INSTRUCTIONS {
        run(&mut vcpu).map_err(|exit| ProbeError::Unusable { instruction, exit })?;
        executed.push(instruction);
    }
    Ok(Probe { executed })
}

/// Runs the guest up to its next report.
fn run(vcpu: &mut VcpuFd) -> Result<(), String> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, _)) => Ok(()),
        Ok(other) => Err(format!("{other:?}")),
        Err(error) => Err(format!("KVM_RUN: {error}")),
    }
}
