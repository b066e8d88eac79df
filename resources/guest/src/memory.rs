//! All RAM behind the image, as one contiguous range of virtual addresses, wherever its pieces are.
//!
//! Ring 0 maps only the first GiB, which holds the image and what the VMM left at boot. The rest of the page tables is
//! written here in ring 3, where it costs nothing: they are ordinary memory, not yet used by the processor.

use core::{ptr, slice};

use crate::boot_info::BootInfo;
use crate::per_cpu::PerCpu;
use crate::protocol::Page;

/// Where the pool begins: the second entry of the top table, which `ring0.s` points at `pool_directory_pointers`.
const POOL: usize = 1 << 39;
const PAGE: usize = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE: u64 = 0x80;
const ENTRIES: usize = 512;
/// Of 1 GiB each: 64 GiB of RAM are used at most.
const DIRECTORIES: usize = 64;

#[repr(C, align(4096))]
struct Table<const N: usize>([[u64; ENTRIES]; N]);

#[unsafe(no_mangle)]
static pool_directory_pointers: PerCpu<Table<1>, 1> = PerCpu::new([Table([[0; ENTRIES]])]);
static DIRECTORIES_OF_POOL: PerCpu<Table<DIRECTORIES>, 1> = PerCpu::new([Table([[0; ENTRIES]; DIRECTORIES])]);

unsafe extern "C" {
    /// First address behind the image, from the linker script.
    static image_end: u8;
}

/// 2 MiB of memory whose physical addresses are known, given out piece by piece.
pub struct Frame {
    next: usize,
    end: usize,
    physical: u64,
}

impl Frame {
    /// The next `bytes` bytes, zeroed, as an address that is a multiple of `align` (a power of two).
    fn take(&mut self, bytes: usize, align: usize) -> Option<usize> {
        let at = self.next.next_multiple_of(align);
        self.next = at.checked_add(bytes).filter(|end| *end <= self.end)?;
        // SAFETY: mapped RAM that nobody else has, by the contract of `take_frame`.
        unsafe { ptr::write_bytes(ptr::with_exposed_provenance_mut::<u8>(at), 0, bytes) };
        Some(at)
    }

    /// Memory for `count` values, each made by `make`.
    pub fn place<T>(&mut self, count: usize, mut make: impl FnMut() -> T) -> Option<&'static mut [T]> {
        let at = self.take(count.checked_mul(size_of::<T>())?, align_of::<T>())?;
        let first = ptr::with_exposed_provenance_mut::<T>(at);
        for index in 0..count {
            // SAFETY: inside of what was taken, and aligned.
            unsafe { first.add(index).write(make()) };
        }
        // SAFETY: taken here and given to the caller alone; all of it was just initialised.
        Some(unsafe { slice::from_raw_parts_mut(first, count) })
    }

    /// How to find physical addresses of what was taken.
    pub fn addresses(&self) -> Addresses {
        Addresses { begin: self.end - LARGE_PAGE as usize, physical: self.physical }
    }
}

/// Where a [`Frame`] is for devices.
#[derive(Clone, Copy)]
pub struct Addresses {
    begin: usize,
    physical: u64,
}

impl Addresses {
    /// The physical address of something in the frame.
    pub fn physical<T: ?Sized>(self, of: *const T) -> u64 {
        self.physical + (of.addr() - self.begin) as u64
    }
}

/// The mapped range.
pub struct Pool {
    bytes: usize,
    /// Physical address of the last page.
    last: u64,
}

impl Pool {
    /// Maps the whole 2 MiB pages of RAM behind the image. To be called once, on vCPU 0.
    pub fn map(boot_info: &BootInfo) -> Self {
        // SAFETY: used here alone, and this is called once.
        let pointers = unsafe { &mut pool_directory_pointers.take(0).0[0] };
        // SAFETY: as above.
        let directories = unsafe { &mut DIRECTORIES_OF_POOL.take(0).0 };
        let first = (&raw const image_end) as u64;
        let frames = boot_info.ram().flat_map(|(begin, end)| {
            let begin = begin.max(first).checked_next_multiple_of(LARGE_PAGE).unwrap_or(u64::MAX);
            (begin / LARGE_PAGE..end / LARGE_PAGE).map(|frame| frame * LARGE_PAGE)
        });
        let mut mapped = 0_usize;
        for (slot, frame) in directories.as_flattened_mut().iter_mut().zip(frames) {
            *slot = frame | LARGE | PRESENT_WRITABLE_USER;
            mapped += 1;
        }
        // Full directories are put in place last: the processor never sees an entry change.
        for (slot, directory) in pointers.iter_mut().zip(directories.iter()).take(mapped.div_ceil(ENTRIES)) {
            *slot = directory.as_ptr() as u64 | PRESENT_WRITABLE_USER;
        }
        let last = directories
            .as_flattened()
            .get(mapped.wrapping_sub(1))
            .map_or(0, |entry| entry & !(LARGE_PAGE - 1));
        Self { bytes: mapped * LARGE_PAGE as usize, last }
    }

    /// Takes the last 2 MiB away, for devices to write to. To be called once, before all else.
    pub fn take_frame(&mut self) -> Option<Frame> {
        self.bytes = self.bytes.checked_sub(LARGE_PAGE as usize)?;
        Some(Frame {
            next: POOL + self.bytes,
            end: POOL + self.bytes + LARGE_PAGE as usize,
            physical: self.last,
        })
    }

    /// Pages of a working set of `wanted` pages, or of most of the pool; `None` if they do not fit.
    pub fn pages_for(&self, wanted: Option<usize>) -> Option<usize> {
        let fit = self.bytes / (PAGE + size_of::<u32>());
        let pages = wanted.unwrap_or(fit - fit / 16);
        (pages <= fit).then_some(pages)
    }

    /// The pages of `cpu` and the generations that they have, if each vCPU has `pages_per_cpu`.
    ///
    /// # Safety
    /// To be called once for each `cpu`, with the same `pages_per_cpu`, which times the vCPUs must fit the pool as
    /// [`pages_for`](Self::pages_for) says.
    pub unsafe fn share(&self, cpu: u32, pages_per_cpu: usize) -> (&'static mut [Page], &'static mut [u32]) {
        let first = cpu as usize * pages_per_cpu;
        // Pages from the bottom, generations from the top.
        let pages = ptr::with_exposed_provenance_mut::<Page>(POOL + first * PAGE);
        let end = POOL + self.bytes - first * size_of::<u32>();
        let generations = ptr::with_exposed_provenance_mut::<u32>(end - pages_per_cpu * size_of::<u32>());
        // SAFETY: mapped RAM, and no share overlaps another, by the contract.
        let pages = unsafe { slice::from_raw_parts_mut(pages, pages_per_cpu) };
        // SAFETY: as above; pages and generations do not meet, or they would not fit the pool.
        let generations = unsafe { slice::from_raw_parts_mut(generations, pages_per_cpu) };
        (pages, generations)
    }
}
