//! bzImage kernels, by the 64-bit boot protocol. Linux documentation, arch/x86/boot.rst.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use mirror::memory::{GuestRam, Layout};
use vm_memory::{GuestAddress, ReadVolatile};

use super::map::{HIGH_START, low_memory_end};
use super::{BootError, Loaded, Protocol};

/// Where the setup header begins in the file, and the part of it looked at ends.
const HEADER: u64 = 0x1f1;
const HEADER_END: u64 = 0x268;
const MAGIC: [u8; 4] = *b"HdrS";
/// First version of the boot protocol with `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
/// The kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry lies in the part of the kernel that is loaded.
const ENTRY_64: u64 = 0x200;

/// Loads a bzImage of `len` bytes.
pub(super) fn load<F>(image: &mut F, len: u64, ram: &GuestRam, layout: &Layout) -> Result<Loaded, BootError>
where
    F: Read + ReadVolatile + Seek,
{
    if len < HEADER_END {
        return Err(BootError::NotAKernel(format!("it has {len} bytes and does not begin like an ELF file")));
    }
    let mut magic = [0; 4];
    image.seek(SeekFrom::Start(0x202))?;
    image.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(BootError::NotAKernel("it begins like neither".into()));
    }
    let mut field = [0; 4];
    image.seek(SeekFrom::Start(HEADER))?;
    image.read_exact(&mut field[..1])?;
    let setup_sectors = if field[0] == 0 { 4 } else { u64::from(field[0]) };
    image.seek(SeekFrom::Start(0x1f4))?;
    image.read_exact(&mut field)?;
    // In units of 16 bytes.
    let code_len = u64::from(u32::from_le_bytes(field)) * 16;
    let needed = (setup_sectors + 1) * 512 + code_len;
    if len < needed {
        return Err(BootError::Truncated(format!("it has {len} bytes, its header tells of {needed}")));
    }
    // The image is checked to fit before it is loaded, so that the error says more than that it does not.
    let memory_end = low_memory_end(layout);
    let room = || format!("{HIGH_START:#x} to {memory_end:#x} for it");
    let load_end = HIGH_START + (len - (setup_sectors + 1) * 512);
    if load_end > memory_end {
        return Err(BootError::KernelFit { start: HIGH_START, end: load_end, room: room() });
    }
    let loaded = BzImage::load(ram, Some(GuestAddress(HIGH_START)), image, None)?;
    let Some(header) = loaded.setup_header else {
        return Err(BootError::NotAKernel("it has no setup header".into()));
    };
    let (version, flags) = (header.version, header.xloadflags);
    if version < VERSION_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { version, flags });
    }
    // The kernel unpacks itself to its preferred address, or where it lies if that is higher, and needs `init_size` there.
    let unpacked = header.pref_address.max(HIGH_START);
    let end = unpacked.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    if end > memory_end {
        return Err(BootError::KernelFit { start: unpacked, end, room: room() });
    }
    Ok(Loaded { protocol: Protocol::Linux64 { entry: HIGH_START + ENTRY_64, header: Some(header) }, end })
}
