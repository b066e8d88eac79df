//! ELF kernels: what linux-loader does not check before it loads one.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use mirror::memory::{GuestRam, Layout};
use vm_memory::ReadVolatile;

use super::map::{HIGH_START, low_memory_end};
use super::{BootError, Loaded, Protocol};

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// Most program headers looked at; a kernel has about five.
const MAX_SEGMENTS: u16 = 128;

/// A program header, as far as it matters here.
struct Segment {
    kind: u32,
    offset: u64,
    start: u64,
    file_len: u64,
    len: u64,
}

/// Loads an ELF file of `len` bytes.
pub(super) fn load<F>(image: &mut F, len: u64, ram: &GuestRam, layout: &Layout) -> Result<Loaded, BootError>
where
    F: Read + ReadVolatile + Seek,
{
    let mut end = 0;
    let memory_end = low_memory_end(layout);
    for segment in segments(image, len)? {
        if segment.kind == PT_LOAD && segment.len > 0 {
            let segment_end = segment.start.saturating_add(segment.len);
            if segment.start < HIGH_START || segment_end > memory_end {
                let room = format!("{HIGH_START:#x} to {memory_end:#x} for it");
                return Err(BootError::KernelFit { start: segment.start, end: segment_end, room });
            }
            end = end.max(segment_end);
        }
    }
    if end == 0 {
        return Err(BootError::NotAKernel("the ELF file has nothing to load".into()));
    }
    let loaded = Elf::load(ram, None, image, None)?;
    let (protocol, entry) = if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
        (Protocol::Pvh { entry: entry.0 }, entry.0)
    } else {
        let entry = loaded.kernel_load.0;
        (Protocol::Linux64 { entry, header: None }, entry)
    };
    if !(HIGH_START..end).contains(&entry) {
        return Err(BootError::Entry(entry));
    }
    Ok(Loaded { protocol, end })
}

/// The program headers, each checked to lie within the file.
fn segments<F: Read + Seek>(image: &mut F, len: u64) -> Result<Vec<Segment>, BootError> {
    if len < HEADER as u64 {
        return Err(BootError::Truncated(format!("it has {len} bytes, an ELF header has {HEADER}")));
    }
    let mut header = [0; HEADER];
    image.rewind()?;
    image.read_exact(&mut header)?;
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err(BootError::NotAKernel("the ELF file is for another kind of processor".into()));
    }
    let (offset, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER || count > MAX_SEGMENTS {
        return Err(BootError::NotAKernel(format!(
            "the ELF file has {count} program headers of {size} bytes"
        )));
    }
    let table_end = offset.saturating_add(u64::from(count) * PROGRAM_HEADER as u64);
    if table_end > len {
        return Err(BootError::Truncated(format!(
            "it has {len} bytes, its program headers end at {table_end}"
        )));
    }
    image.seek(SeekFrom::Start(offset))?;
    let mut segments = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let mut bytes = [0; PROGRAM_HEADER];
        image.read_exact(&mut bytes)?;
        let segment = Segment {
            kind: u32_at(&bytes, 0),
            offset: u64_at(&bytes, 8),
            start: u64_at(&bytes, 24),
            file_len: u64_at(&bytes, 32),
            len: u64_at(&bytes, 40),
        };
        let file_end = segment.offset.saturating_add(segment.file_len);
        if matches!(segment.kind, PT_LOAD | PT_NOTE) && file_end > len {
            return Err(BootError::Truncated(format!("it has {len} bytes, a segment ends at {file_end}")));
        }
        if segment.kind == PT_LOAD && segment.file_len > segment.len {
            return Err(BootError::NotAKernel("a segment is longer in the file than in memory".into()));
        }
        segments.push(segment);
    }
    Ok(segments)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
