//! The 64-bit Linux entry: long mode, identity-mapped, with a zero page. Linux documentation, arch/x86/boot.rst and
//! zero-page.rst.

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use mirror::memory::{GuestRam, Layout};
use vm_memory::{Bytes, GuestAddress};

use super::map::map;
use super::segments::{code_64, data, gdt, task};
use super::{BootError, CMDLINE_ADDRESS, Entry, Told};

const ZERO_PAGE: u64 = 0x7000;
/// Page tables: one for 512 GiB, one for 1 GiB each, and four for 2 MiB each, that map the first 4 GiB to themselves.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;
const MAPPED_GIB: u64 = 4;

const ENTRY_PRESENT_WRITABLE: u64 = 0b11;
const ENTRY_LARGE: u64 = 1 << 7;

const CR0_PG_ET_PE: u64 = 1 << 31 | 0x11;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA_LME: u64 = 0b101 << 8;
const RFLAGS_RESERVED: u64 = 2;

const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes what the guest is told, and says how it starts. `header` is the bzImage's; an ELF kernel has none.
pub(super) fn prepare(
    ram: &GuestRam,
    layout: &Layout,
    entry: u64,
    header: Option<setup_header>,
    told: &Told,
    reset: &kvm_sregs,
) -> Result<Entry, BootError> {
    let mut header = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HDRS,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = CMDLINE_ADDRESS as u32;
    header.cmdline_size = header.cmdline_size.max(told.cmdline_len as u32);
    if let Some(initrd) = told.initrd {
        // Both lie below the hole at 3 GiB.
        header.ramdisk_image = initrd.start as u32;
        header.ramdisk_size = initrd.len as u32;
    }
    let mut zero_page = boot_params { hdr: header, acpi_rsdp_addr: told.rsdp, ..Default::default() };
    let map = map(layout);
    for (entry, piece) in zero_page.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: piece.start, size: piece.len, r#type: piece.kind };
    }
    zero_page.e820_entries = map.len() as u8;
    ram.write_obj(zero_page, GuestAddress(ZERO_PAGE))?;
    write_page_tables(ram)?;

    let regs = kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() };
    let sregs = kvm_sregs {
        cs: code_64(),
        ds: data(),
        es: data(),
        fs: data(),
        gs: data(),
        ss: data(),
        tr: task(),
        gdt: gdt(),
        cr0: CR0_PG_ET_PE,
        cr3: PML4,
        cr4: CR4_PAE,
        efer: EFER_LMA_LME,
        ..*reset
    };
    Ok(Entry { regs, sregs })
}

fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    ram.write_obj(PDPT | ENTRY_PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..MAPPED_GIB {
        let table = PD + gib * 0x1000;
        ram.write_obj(table | ENTRY_PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        for index in 0..512 {
            let page = (gib << 30) | (index << 21);
            let entry = page | ENTRY_LARGE | ENTRY_PRESENT_WRITABLE;
            ram.write_obj(entry, GuestAddress(table + index * 8))?;
        }
    }
    Ok(())
}
