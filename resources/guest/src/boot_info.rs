//! What the VMM hands over: the command line and the memory map (xen/include/public/arch-x86/hvm/start_info.h).

use core::{ptr, slice, str};

/// Everything the VMM left must lie below this: the part of memory that `ring0.s` maps.
const MAPPED: u64 = 0x3fe0_0000;
const MAGIC: u32 = 0x336e_c578;
const LONGEST_COMMAND_LINE: usize = 4096;
const MOST_ENTRIES: u32 = 128;
const RAM: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    /// Since version 1.
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A validated view of it.
pub struct BootInfo {
    command_line: &'static [u8],
    memory_map: &'static [MemoryMapEntry],
}

impl BootInfo {
    /// Reads the hvm_start_info at this physical address; what is missing or out of reach is empty.
    pub fn read(address: u32) -> Self {
        let mut boot_info = Self { command_line: &[], memory_map: &[] };
        let Some(info) = reach::<StartInfo>(u64::from(address), 1) else { return boot_info };
        // SAFETY: `reach` found it mapped and aligned; all bit patterns are valid.
        let info = unsafe { ptr::read(info) };
        if info.magic != MAGIC {
            return boot_info;
        }
        if let Some(text) = reach::<u8>(info.command_line, LONGEST_COMMAND_LINE) {
            // SAFETY: mapped for this length; nothing writes it until it was parsed.
            let text = unsafe { slice::from_raw_parts(text, LONGEST_COMMAND_LINE) };
            boot_info.command_line = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
        }
        let entries = info.memory_map_entries.min(MOST_ENTRIES) as usize;
        if let (1.., Some(map)) = (info.version, reach::<MemoryMapEntry>(info.memory_map, entries)) {
            // SAFETY: mapped and aligned for this many; nothing writes it until it was used.
            boot_info.memory_map = unsafe { slice::from_raw_parts(map, entries) };
        }
        boot_info
    }

    /// The command line, as far as it is text.
    pub fn command_line(&self) -> &str {
        self.command_line.utf8_chunks().next().map_or("", |chunk| chunk.valid())
    }

    /// Begin and end of each piece of RAM.
    pub fn ram(&self) -> impl Iterator<Item = (u64, u64)> {
        let ram = self.memory_map.iter().filter(|entry| entry.kind == RAM);
        ram.map(|entry| (entry.address, entry.address.saturating_add(entry.size)))
    }
}

/// A pointer to `count` items at a physical address, if that is aligned, not null, and mapped.
fn reach<T>(address: u64, count: usize) -> Option<*const T> {
    let bytes = (count * size_of::<T>()) as u64;
    let fits = address != 0 && address <= MAPPED - bytes && address.is_multiple_of(align_of::<T>() as u64);
    fits.then_some(ptr::with_exposed_provenance(address as usize))
}
