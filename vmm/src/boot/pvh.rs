//! The PVH entry: 32-bit protected mode, and a structure that tells the rest.
//!
//! Xen documentation, x86/HVM direct boot ABI (`docs/misc/pvh.pandoc`).

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use mirror::memory::{GuestRam, Layout};
use vm_memory::{Bytes, GuestAddress};

use super::map::map;
use super::segments::{code_32, data, gdt, task};
use super::{BootError, CMDLINE_ADDRESS, Entry, Told};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;

/// Protected mode; extension type, which is hard-wired.
const CR0_PE_ET: u64 = 0x11;
const RFLAGS_RESERVED: u64 = 2;

/// Writes what the guest is told, and says how it starts.
pub(super) fn prepare(
    ram: &GuestRam,
    layout: &Layout,
    entry: u64,
    told: &Told,
    reset: &kvm_sregs,
) -> Result<Entry, BootError> {
    let map = map(layout);
    let initrd = told.initrd;
    for (index, piece) in map.iter().enumerate() {
        let entry =
            hvm_memmap_table_entry { addr: piece.start, size: piece.len, type_: piece.kind, reserved: 0 };
        ram.write_obj(entry, GuestAddress(MEMORY_MAP + (index * size_of_val(&entry)) as u64))?;
    }
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.len, ..Default::default() };
        ram.write_obj(module, GuestAddress(MODULES))?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: CMDLINE_ADDRESS,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        rsdp_paddr: told.rsdp,
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(START_INFO))?;

    let regs = kvm_regs { rip: entry, rbx: START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() };
    let sregs = kvm_sregs {
        cs: code_32(),
        ds: data(),
        es: data(),
        fs: data(),
        gs: data(),
        ss: data(),
        tr: task(),
        gdt: gdt(),
        cr0: CR0_PE_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..*reset
    };
    Ok(Entry { regs, sregs })
}
