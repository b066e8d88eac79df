//! A descriptor chain: the buffers of one request, as the guest's driver describes them.
//!
//! The whole chain is read and checked once, before a device sees anything of it (virtio 1.2, 2.7.5). A device then works
//! with buffers that lie in guest memory, end, and do not lie over each other.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::GuestRam;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = size_of::<Descriptor>() as u64;

/// Most descriptors in an indirect table: as many as the largest queue of any device here may have in a chain.
const MAX_INDIRECT: u64 = 1024;

/// One buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its first byte.
    pub address: GuestAddress,
    /// Its length in bytes, not zero.
    pub len: u32,
}

impl Buffer {
    fn end(self) -> u64 {
        self.address.0 + u64::from(self.len)
    }

    fn overlaps(self, other: Self) -> bool {
        self.address.0 < other.end() && other.address.0 < self.end()
    }
}

/// A chain that no correct driver makes.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor's number is none of its table.
    #[error("descriptor {index} of a table of {size}")]
    Index {
        /// The number.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// More descriptors than the table has: the chain comes back to itself.
    #[error("the chain from descriptor {0} loops")]
    Loop(u16),
    /// A descriptor or buffer is not in guest memory.
    #[error("{len} bytes at {address:#x} are not in guest memory")]
    Outside {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A buffer for the device to read follows one for it to write.
    #[error("the chain from descriptor {0} has a buffer to read behind one to write")]
    Order(u16),
    /// An indirect table that is empty, no multiple of a descriptor, too long, nested, or chained.
    #[error("the chain from descriptor {0} has an indirect table that is none")]
    Indirect(u16),
    /// More bytes than a chain may have.
    #[error("the chain from descriptor {0} has 4 GiB or more")]
    TooLong(u16),
    /// A buffer that the device writes lies over another of the same chain.
    #[error("the chain from descriptor {0} has a buffer to write over another")]
    Overlap(u16),
}

/// The buffers of one request.
#[derive(Clone)]
pub struct Chain {
    ram: Arc<GuestRam>,
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Reads the chain that begins at descriptor `head` of the `size` descriptors at `table`.
    ///
    /// # Errors
    /// [`ChainError`]
    pub(super) fn walk(
        ram: &Arc<GuestRam>,
        table: GuestAddress,
        size: u16,
        head: u16,
    ) -> Result<Self, ChainError> {
        let mut chain = Self { ram: Arc::clone(ram), head, readable: Vec::new(), writable: Vec::new() };
        let mut at = (table, size);
        let mut index = head;
        let mut left = size;
        let mut total = 0_u64;
        let mut indirect = false;
        loop {
            if left == 0 {
                return Err(ChainError::Loop(head));
            }
            left -= 1;
            let descriptor = read(ram, at, index)?;
            if descriptor.refers_to_indirect_table() {
                let (address, len) = (descriptor.addr(), u64::from(descriptor.len()));
                let count = len / DESCRIPTOR;
                let sound = len % DESCRIPTOR == 0 && (1..=MAX_INDIRECT).contains(&count);
                if indirect || descriptor.has_next() || !sound {
                    return Err(ChainError::Indirect(head));
                }
                indirect = true;
                at = (address, count as u16);
                (index, left) = (0, count as u16);
                continue;
            }
            chain.add(&descriptor)?;
            total += u64::from(descriptor.len());
            if total > u64::from(u32::MAX) {
                return Err(ChainError::TooLong(head));
            }
            if !descriptor.has_next() {
                break;
            }
            index = descriptor.next();
        }
        chain.check_overlap()?;
        Ok(chain)
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let buffer = Buffer { address: descriptor.addr(), len: descriptor.len() };
        if !descriptor.is_write_only() && !self.writable.is_empty() {
            return Err(ChainError::Order(self.head));
        }
        if buffer.len == 0 {
            return Ok(());
        }
        let inside = buffer.address.checked_add(u64::from(buffer.len)).is_some()
            && self.ram.check_range(buffer.address, buffer.len as usize);
        if !inside {
            return Err(ChainError::Outside { address: buffer.address.0, len: u64::from(buffer.len) });
        }
        let list = if descriptor.is_write_only() { &mut self.writable } else { &mut self.readable };
        list.push(buffer);
        Ok(())
    }

    fn check_overlap(&self) -> Result<(), ChainError> {
        // Chains of a driver are short or in ascending runs; a hostile one costs its own guest's time, and not much:
        // sorted, each buffer is compared with its neighbour alone.
        let error = Err(ChainError::Overlap(self.head));
        match self.writable[..] {
            [] => return Ok(()),
            [only] => {
                return if self.readable.iter().any(|&other| other.overlaps(only)) { error } else { Ok(()) };
            }
            _ => {}
        }
        let mut sorted = self.writable.clone();
        sorted.sort_unstable_by_key(|buffer| buffer.address);
        if sorted.windows(2).any(|pair| pair[0].overlaps(pair[1])) {
            return error;
        }
        let hit = |readable: &Buffer| {
            let next = sorted.partition_point(|buffer| buffer.end() <= readable.address.0);
            sorted.get(next).is_some_and(|buffer| buffer.overlaps(*readable))
        };
        if self.readable.iter().any(hit) { error } else { Ok(()) }
    }

    /// The descriptor that the chain begins with: its name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The memory that it lies in.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the device reads.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// What the device writes.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes for the device to read.
    pub fn readable_len(&self) -> u32 {
        total(&self.readable)
    }

    /// Bytes for the device to write.
    pub fn writable_len(&self) -> u32 {
        total(&self.writable)
    }

    /// Copies from the readable bytes behind the first `offset` to `into` and says how many there were, at most.
    pub fn read(&self, offset: u32, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (address, len) in pieces(&self.readable, offset, into.len() as u32) {
            // The range was checked, and guest memory does not go away.
            let _ = self.ram.read_slice(&mut into[done..done + len as usize], address);
            done += len as usize;
        }
        done
    }

    /// Copies `from` to the writable bytes behind the first `offset` and says how many found room. They are marked
    /// dirty.
    pub fn write(&self, offset: u32, from: &[u8]) -> usize {
        let mut done = 0;
        for (address, len) in pieces(&self.writable, offset, from.len() as u32) {
            let _ = self.ram.write_slice(&from[done..done + len as usize], address);
            done += len as usize;
        }
        done
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("readable", &self.readable)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

fn total(buffers: &[Buffer]) -> u32 {
    buffers.iter().map(|buffer| buffer.len).sum()
}

/// The parts of `buffers` that hold the `len` bytes behind the first `offset`, as far as there are.
pub(super) fn pieces(
    buffers: &[Buffer],
    offset: u32,
    len: u32,
) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
    let (mut skip, mut left) = (offset, len);
    buffers.iter().filter_map(move |buffer| {
        let skipped = skip.min(buffer.len);
        skip -= skipped;
        let len = (buffer.len - skipped).min(left);
        left -= len;
        (len > 0).then(|| (GuestAddress(buffer.address.0 + u64::from(skipped)), len))
    })
}

fn read(ram: &GuestRam, (table, size): (GuestAddress, u16), index: u16) -> Result<Descriptor, ChainError> {
    if index >= size {
        return Err(ChainError::Index { index, size });
    }
    // The entry was made available before its index was read.
    fence(Ordering::Acquire);
    let outside = ChainError::Outside { address: table.0, len: u64::from(size) * DESCRIPTOR };
    let address = table.checked_add(u64::from(index) * DESCRIPTOR).ok_or(outside)?;
    ram.read_obj(address).map_err(|_| outside)
}
