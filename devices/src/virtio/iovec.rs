//! The buffers of a chain as the kernel takes them: for readv, writev and io_uring, without a copy.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::GuestRam;
use super::chain::{Buffer, Chain, pieces};

/// Part of a chain's buffers as an array of `iovec`.
///
/// The kernel writes to guest memory behind the back of the dirty bitmap: whoever lets it must call
/// [`mark_dirty`](Self::mark_dirty) for what it wrote before the driver is told.
pub struct IoVecs {
    vectors: Vec<libc::iovec>,
    buffers: Vec<Buffer>,
    /// The vectors point into it.
    ram: Arc<GuestRam>,
}

// SAFETY: the pointers lead to the mapping of guest memory, which `ram` keeps and every thread may use.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// The `len` bytes behind the first `offset` that the device reads, as far as there are.
    pub fn readable(chain: &Chain, offset: u32, len: u32) -> Self {
        Self::new(chain, chain.readable(), offset, len)
    }

    /// The `len` bytes behind the first `offset` that the device writes, as far as there are.
    pub fn writable(chain: &Chain, offset: u32, len: u32) -> Self {
        Self::new(chain, chain.writable(), offset, len)
    }

    fn new(chain: &Chain, buffers: &[Buffer], offset: u32, len: u32) -> Self {
        let ram = Arc::clone(chain.ram());
        let mut this = Self { vectors: Vec::new(), buffers: Vec::new(), ram };
        this.extend(buffers, offset, len);
        this
    }

    /// Adds what the device writes of `chain`, which lies in the same memory.
    pub fn append(&mut self, chain: &Chain) {
        debug_assert!(Arc::ptr_eq(&self.ram, chain.ram()));
        self.extend(chain.writable(), 0, u32::MAX);
    }

    fn extend(&mut self, buffers: &[Buffer], offset: u32, len: u32) {
        for (address, len) in pieces(buffers, offset, len) {
            self.buffers.push(Buffer { address, len });
            // A buffer may go from one region to the next; the range was checked.
            for slice in self.ram.get_slices(address, len as usize).flatten() {
                self.vectors.push(vector(&slice));
            }
        }
    }

    /// The vectors. They are valid as long as this is.
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Bytes in all of them.
    pub fn len(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// Whether there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Notes that the first `len` bytes have been written.
    pub fn mark_dirty(&self, len: usize) {
        for (address, len) in pieces(&self.buffers, 0, len as u32) {
            for slice in self.ram.get_slices(address, len as usize).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
}

fn vector<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}
