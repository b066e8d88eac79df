//! An MP table: how a guest without ACPI finds its processors and its IOAPIC.
//!
//! Intel MultiProcessor Specification, version 1.4.

use mirror::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::map::EBDA;

const SPEC_REVISION: u8 = 4;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// ISA interrupts, each on the IOAPIC pin of its number.
const ISA_IRQS: u8 = 16;
const ISA_BUS: u8 = 0;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOTS: u8 = 2;
const ALL_PROCESSORS: u8 = 0xff;

/// Length of the floating pointer, which the table follows.
const POINTER_LEN: u32 = 16;
const HEADER_LEN: usize = 44;

/// Writes the table for `vcpus` processors into the last KiB below 640 KiB, where guests look for it.
pub(super) fn write(ram: &GuestRam, vcpus: u8) -> Result<(), BootError> {
    let mut bytes = pointer(EBDA as u32 + POINTER_LEN);
    bytes.extend(table(vcpus));
    ram.write_slice(&bytes, GuestAddress(EBDA))?;
    Ok(())
}

/// The floating pointer structure.
fn pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // One paragraph; revision; checksum; no default configuration.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = complement(&bytes);
    bytes
}

/// The configuration table.
fn table(vcpus: u8) -> Vec<u8> {
    let ioapic = vcpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOTS } else { 0 };
        // Family 6, with APIC and FPU; guests ask CPUID.
        let features = [0, 6, 0, 0, 1, 2, 0, 0];
        let mut entry = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags];
        entry.extend(features);
        entry.extend([0; 8]);
        add(&entry);
    }
    add(&[&[ENTRY_BUS, ISA_BUS][..], b"ISA   "].concat());
    add(&[&[ENTRY_IOAPIC, ioapic, IOAPIC_VERSION, 1][..], &IOAPIC_ADDRESS.to_le_bytes()].concat());
    for irq in 0..ISA_IRQS {
        add(&[ENTRY_INTERRUPT, INTERRUPT_INT, 0, 0, ISA_BUS, irq, ioapic, irq]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_PROCESSORS, 1]);

    let mut bytes = b"PCMP".to_vec();
    bytes.extend(((HEADER_LEN + entries.len()) as u16).to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"UNDRSTDYUNDERSTUDY  ");
    // No OEM table.
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(LAPIC_ADDRESS.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(entries);
    bytes[7] = complement(&bytes);
    bytes
}

/// What makes the sum of all bytes zero.
fn complement(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_their_lengths_counts_and_checksums() {
        for vcpus in [1, 2, 32] {
            let (pointer, table) = (pointer(0x9_fc10), table(vcpus));
            assert_eq!(pointer.len(), 16);
            assert_eq!(complement(&pointer), 0);
            assert_eq!(complement(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 16 + 2);
            assert_eq!(
                table.len(),
                HEADER_LEN + 20 * usize::from(vcpus) + 8 * (usize::from(entries) - usize::from(vcpus))
            );
            assert!(pointer.len() + table.len() <= 1024, "fits the last KiB");
        }
    }
}
