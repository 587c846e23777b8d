//! The MP table: how a kernel without ACPI learns of its CPUs and interrupt lines (MultiProcessor Specification 1.4).

use katavm_devices::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{GSI_COUNT, IO_APIC, LOCAL_APIC, MP_TABLE};

/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types (4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Version of KVM's APICs.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const HEADER_LEN: usize = 44;
const POINTER_LEN: usize = 16;

/// Writes the floating pointer structure and the configuration table behind it.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), BootError> {
    memory.write_slice(&table(vcpus), GuestAddress(MP_TABLE))?;
    Ok(())
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic = vcpus;
    let mut entries = Vec::new();
    let mut count = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for cpu in 0..vcpus {
        // Flags: enabled, and the boot CPU is the first. Signature and features are read by CPUID.
        let flags = if cpu == 0 { 3 } else { 1 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, flags]);
        entry(&processor);
    }
    entry(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    entry(&[IO_APIC_ENTRY, io_apic, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..GSI_COUNT as u8 {
        // Polarity and trigger as the bus has them: ISA lines are edge-triggered, active high.
        entry(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, line, io_apic, line]);
    }
    entry(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = pointer();
    table.extend(header(&entries, count));
    table.extend(entries);
    table
}

/// The floating pointer structure (4.1); the table follows it directly.
fn pointer() -> Vec<u8> {
    let address = (MP_TABLE as u32 + POINTER_LEN as u32).to_le_bytes();
    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend(address);
    // One paragraph long, specification 1.4, checksum, no default configuration, no IMCR.
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// The configuration table's header (4.2).
fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let len = (HEADER_LEN + entries.len()) as u16;
    let mut header = Vec::from(*b"PCMP");
    header.extend(len.to_le_bytes());
    header.extend([4, 0]);
    header.extend(b"KATAVM  MICROVM     ");
    // No OEM table.
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    // No extended table.
    header.extend([0; 4]);
    let sum = header.iter().chain(entries).fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    header[7] = sum.wrapping_neg();
    header
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{MAX_VCPUS, MP_TABLE_END};

    #[test]
    fn all_bytes_of_both_structures_sum_to_zero() {
        for vcpus in [1, 2, MAX_VCPUS] {
            let table = table(vcpus);
            let (pointer, config) = table.split_at(POINTER_LEN);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(config), 0);
            let len = u16::from_le_bytes([config[4], config[5]]);
            assert_eq!(usize::from(len), config.len());
        }
    }

    #[test]
    fn the_largest_table_fits_below_the_video_memory() {
        assert!(table(MAX_VCPUS).len() as u64 <= MP_TABLE_END - MP_TABLE);
    }
}
