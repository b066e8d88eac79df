//! Flat segments for the first instructions of a guest, and the table that describes them.

use kvm_bindings::{kvm_dtable, kvm_segment};
use mirror::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// Where the table is put: above the real-mode interrupt vectors and BIOS data.
const GDT_ADDRESS: u64 = 0x500;

/// The Linux boot protocol asks for these two selectors.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const CODE_32_SELECTOR: u16 = 0x28;

const CODE_TYPE: u8 = 0xb;
const DATA_TYPE: u8 = 0x3;
const BUSY_TSS_TYPE: u8 = 0xb;

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    }
}

/// 64-bit code.
pub(super) fn code_64() -> kvm_segment {
    kvm_segment { db: 0, l: 1, ..flat(CODE_SELECTOR, CODE_TYPE) }
}

/// 32-bit code.
pub(super) fn code_32() -> kvm_segment {
    flat(CODE_32_SELECTOR, CODE_TYPE)
}

/// Data.
pub(super) fn data() -> kvm_segment {
    flat(DATA_SELECTOR, DATA_TYPE)
}

/// The task state that a processor must have, and nobody uses.
pub(super) fn task() -> kvm_segment {
    kvm_segment { limit: 0x67, db: 0, s: 0, g: 0, ..flat(TSS_SELECTOR, BUSY_TSS_TYPE) }
}

/// The table's entries, by selector / 8.
fn entries() -> [u64; 6] {
    [0, 0, descriptor(&code_64()), descriptor(&data()), descriptor(&task()), descriptor(&code_32())]
}

/// The register that points to the table.
pub(super) fn gdt() -> kvm_dtable {
    kvm_dtable { base: GDT_ADDRESS, limit: (entries().len() * 8 - 1) as u16, padding: [0; 3] }
}

/// Writes the table.
pub(super) fn write_gdt(ram: &GuestRam) -> Result<(), BootError> {
    for (index, entry) in entries().into_iter().enumerate() {
        ram.write_obj(entry, GuestAddress(GDT_ADDRESS + index as u64 * 8))?;
    }
    Ok(())
}

/// A segment as a descriptor (Intel SDM volume 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let bit = |value: u8, at: u32| u64::from(value) << at;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_that_linux_itself_uses() {
        assert_eq!(descriptor(&code_64()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&code_32()), 0x00cf_9b00_0000_ffff);
    }
}
