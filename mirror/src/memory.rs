//! Guest memory as the mirror sees it: numbered pages.
//!
//! Page numbers count through the regions of the layout in order, without the holes between them, so that a page
//! has one number on both sides although the two processes map it at different addresses.

use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Size of a guest page in bytes: the unit of dirty tracking and of transfer.
pub const PAGE_SIZE: usize = 4096;

/// Most pages that an allocation may have: page numbers travel as 32 bits (16 TiB of guest memory).
pub const MAX_PAGES: u64 = u32::MAX as u64;

/// Most regions that a layout may have (KVM gives at least 32 slots to users).
pub const MAX_REGIONS: usize = 32;

/// The memory of a guest, with the bitmap that notes what the VMM itself writes to it.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// One contiguous piece of guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address of the first byte; a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Length in pages; a multiple of 64, so that the dirty words of two regions never share a word.
    pub pages: u64,
}

/// Where the memory of a guest lies in its physical address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Region>", into = "Vec<Region>")]
pub struct Layout {
    regions: Vec<Region>,
    pages: u64,
}

/// Why a list of regions is not a layout.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// No region, or more than [`MAX_REGIONS`].
    #[error("a memory layout has 1 to {MAX_REGIONS} regions, this one has {0}")]
    RegionCount(usize),
    /// A region is empty or not aligned.
    #[error(
        "region {index} (start {start:#x}, {pages} pages) must start on a page and have a multiple of 64 pages"
    )]
    Unaligned {
        /// Which region, counted from 0.
        index: usize,
        /// Its guest physical start.
        start: u64,
        /// Its length in pages.
        pages: u64,
    },
    /// Regions overlap, are out of order, or leave the 64-bit address space.
    #[error("region {0} overlaps the one before it, is out of order, or ends beyond the address space")]
    Overlap(usize),
    /// More pages than page numbers can name.
    #[error("the layout has {0} pages, more than {MAX_PAGES}")]
    TooLarge(u64),
}

impl Layout {
    /// Checks `regions` and makes a layout of them.
    ///
    /// # Errors
    /// [`LayoutError`] names the first rule that `regions` breaks.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LayoutError::RegionCount(regions.len()));
        }
        let mut pages = 0_u64;
        let mut free_from = 0_u64;
        for (index, region) in regions.iter().enumerate() {
            let &Region { start, pages: len } = region;
            if start % PAGE_SIZE as u64 != 0 || len == 0 || len % 64 != 0 {
                return Err(LayoutError::Unaligned { index, start, pages: len });
            }
            let end = len.checked_mul(PAGE_SIZE as u64).and_then(|bytes| start.checked_add(bytes));
            match end {
                Some(end) if start >= free_from => free_from = end,
                _ => return Err(LayoutError::Overlap(index)),
            }
            pages += len;
            if pages > MAX_PAGES {
                return Err(LayoutError::TooLarge(pages));
            }
        }
        Ok(Self { regions, pages })
    }

    /// The layout of memory that is mapped already.
    ///
    /// # Errors
    /// [`LayoutError`] if its regions are not whole, aligned pages.
    pub fn of(ram: &GuestRam) -> Result<Self, LayoutError> {
        Self::new(
            ram.iter()
                .map(|region| Region { start: region.start_addr().0, pages: region.len() / PAGE_SIZE as u64 })
                .collect(),
        )
    }

    /// The regions, in the order of their addresses.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Pages in all regions.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes in all regions.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }

    /// Guest physical address of page `page`; `None` beyond the last page.
    pub fn address(&self, page: u64) -> Option<u64> {
        let mut first = 0;
        for region in &self.regions {
            if page < first + region.pages {
                return Some(region.start + (page - first) * PAGE_SIZE as u64);
            }
            first += region.pages;
        }
        None
    }
}

impl TryFrom<Vec<Region>> for Layout {
    type Error = LayoutError;

    fn try_from(regions: Vec<Region>) -> Result<Self, LayoutError> {
        Self::new(regions)
    }
}

impl From<Layout> for Vec<Region> {
    fn from(layout: Layout) -> Self {
        layout.regions
    }
}

/// A page number or a buffer that does not fit the memory.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("page {page} of {pages} cannot be copied to or from {len} bytes")]
pub struct PageError {
    /// The page asked for.
    pub page: u64,
    /// Pages that there are.
    pub pages: u64,
    /// Length of the caller's buffer, which must be [`PAGE_SIZE`].
    pub len: usize,
}

/// Guest memory, read and written by page number.
#[derive(Clone, Debug)]
pub struct PageMemory {
    ram: Arc<GuestRam>,
    layout: Layout,
}

impl PageMemory {
    /// Numbers the pages of `ram`.
    ///
    /// # Errors
    /// [`LayoutError`] if its regions are not whole, aligned pages.
    pub fn new(ram: Arc<GuestRam>) -> Result<Self, LayoutError> {
        let layout = Layout::of(&ram)?;
        Ok(Self { ram, layout })
    }

    /// Where the pages lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory itself.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Copies page `page` into `into`, which must be one page long. A guest that runs may change the page meanwhile.
    ///
    /// # Errors
    /// [`PageError`] if there is no such page or the buffer is not a page.
    pub fn read(&self, page: u64, into: &mut [u8]) -> Result<(), PageError> {
        let address = self.checked(page, into.len())?;
        self.ram.read_slice(into, address).map_err(|_| self.error(page, into.len()))
    }

    /// Replaces page `page` by `from`, which must be one page long.
    ///
    /// # Errors
    /// [`PageError`] if there is no such page or the buffer is not a page.
    pub fn write(&self, page: u64, from: &[u8]) -> Result<(), PageError> {
        let address = self.checked(page, from.len())?;
        self.ram.write_slice(from, address).map_err(|_| self.error(page, from.len()))
    }

    /// Makes `count` pages from `first` on zeros that need no memory, and says whether it did: pages that are no file's, and
    /// parts of huge pages, stay as they are.
    pub fn discard(&self, first: u64, count: u64) -> bool {
        let (mut before, mut whole) = (0, true);
        for region in self.ram.iter() {
            let pages = region.len() / PAGE_SIZE as u64;
            let (from, to) = (first.max(before), first.saturating_add(count).min(before + pages));
            if from < to {
                let place = region.file_offset().filter(|_| region.is_hugetlbfs() != Some(true));
                whole &= place.is_some_and(|place| {
                    let at = place.start() + (from - before) * PAGE_SIZE as u64;
                    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(place.file(), how, at, (to - from) * PAGE_SIZE as u64).is_ok()
                });
            }
            before += pages;
        }
        whole
    }

    fn checked(&self, page: u64, len: usize) -> Result<GuestAddress, PageError> {
        match self.layout.address(page) {
            Some(address) if len == PAGE_SIZE => Ok(GuestAddress(address)),
            _ => Err(self.error(page, len)),
        }
    }

    fn error(&self, page: u64, len: usize) -> PageError {
        PageError { page, pages: self.layout.pages, len }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::FileOffset;

    use super::*;

    fn regions(list: &[(u64, u64)]) -> Vec<Region> {
        list.iter().map(|&(start, pages)| Region { start, pages }).collect()
    }

    #[test]
    fn layout_rejects_overlap_disorder_and_misalignment() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::RegionCount(0)));
        assert_eq!(Layout::new(regions(&[(0, 64), (0x1000, 64)])), Err(LayoutError::Overlap(1)));
        assert_eq!(Layout::new(regions(&[(0x10_0000, 64), (0, 64)])), Err(LayoutError::Overlap(1)));
        assert!(matches!(Layout::new(regions(&[(0, 63)])), Err(LayoutError::Unaligned { .. })));
        assert_eq!(Layout::new(regions(&[(u64::MAX - 0xfff, 64)])), Err(LayoutError::Overlap(0)));
    }

    #[test]
    fn page_numbers_skip_the_hole_between_regions() {
        let layout = Layout::new(regions(&[(0, 64), (0x1_0000_0000, 128)])).unwrap();
        assert_eq!(layout.pages(), 192);
        assert_eq!(layout.address(63), Some(63 * 4096));
        assert_eq!(layout.address(64), Some(0x1_0000_0000));
        assert_eq!(layout.address(192), None);
    }

    #[test]
    fn pages_that_are_discarded_are_zeros_and_need_no_memory() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(128 * PAGE_SIZE as u64).unwrap();
        let place = |start| Some(FileOffset::new(file.try_clone().unwrap(), start));
        let len = 64 * PAGE_SIZE;
        let ranges = [(GuestAddress(0), len, place(0)), (GuestAddress(1 << 32), len, place(len as u64))];
        let memory =
            PageMemory::new(Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())).unwrap();
        for page in 0..128 {
            memory.write(page, &[7; PAGE_SIZE]).unwrap();
        }
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        assert!(memory.discard(60, 10));
        let mut page = [0; PAGE_SIZE];
        for (number, content) in [(59, 7), (60, 0), (64, 0), (69, 0), (70, 7)] {
            memory.read(number, &mut page).unwrap();
            assert_eq!(page, [content; PAGE_SIZE], "page {number}");
        }
        assert!(file.metadata().unwrap().blocks() < before);
        let anonymous = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
        assert!(!PageMemory::new(Arc::new(anonymous)).unwrap().discard(0, 1));
    }

    #[test]
    fn layout_from_a_peer_is_checked_on_decoding() {
        let bytes = postcard::to_stdvec(&regions(&[(0, 64), (0, 64)])).unwrap();
        assert!(postcard::from_bytes::<Layout>(&bytes).is_err());
    }
}
