//! The initial RAM disk.

use std::fs::File;
use std::io;
use std::path::Path;

use mirror::memory::{GuestRam, Layout, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::map::low_memory_end;

/// An initial RAM disk in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initrd {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Loads the file at `path` as high as memory and `limit` allow, and above `kernel_end`.
pub(super) fn load(
    path: &Path,
    ram: &GuestRam,
    layout: &Layout,
    kernel_end: u64,
    limit: u64,
) -> Result<Initrd, BootError> {
    let failed = |cause: io::Error| BootError::Initrd { path: path.into(), cause };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("it is not a file")));
    }
    let mut file = File::open(path).map_err(failed)?;
    let len = metadata.len();
    let high = low_memory_end(layout).min(limit);
    let low = kernel_end.next_multiple_of(PAGE_SIZE as u64);
    let start = high.checked_sub(len).map(|start| start & !(PAGE_SIZE as u64 - 1));
    let Some(start) = start.filter(|&start| start >= low) else {
        return Err(BootError::InitrdFit { len, low, high });
    };
    ram.read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)?;
    Ok(Initrd { start, len })
}
