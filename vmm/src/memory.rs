//! Guest memory: one memfd, mapped shared, in regions around the hole below 4 GiB, and KVM's memory slots for them.
//!
//! The file holds the regions one after the other, so that a page's number (see [`mirror::memory`]) times the page
//! size is its offset in the file.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::balloon::Discard;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use mirror::dirty::DirtySet;
use mirror::memory::{GuestRam, Layout, LayoutError, PAGE_SIZE, Region};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, ftruncate, memfd_create, seek};
use rustix::io::Errno;
use thiserror::Error;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionCollection, GuestRegionMmap};

use crate::snapshot::pager::Pager;

/// Where the hole for devices below 4 GiB begins.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where it ends and memory goes on.
pub const HOLE_END: u64 = 1 << 32;

/// For the bitmap of the VMM's own writes.
const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE).unwrap();
/// Size of a huge page in MiB.
const HUGE_MIB: u64 = 2;
/// Where the kernel tells of its pool of huge pages.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE as u64;

/// Why guest memory cannot be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The layout is none.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The kernel gives no memory file.
    #[error("cannot create {mib} MiB of guest memory{}: {cause}", if *.huge { " in 2 MiB pages" } else { "" })]
    Create {
        /// Size asked for.
        mib: u64,
        /// Whether of huge pages.
        huge: bool,
        /// What the kernel answered.
        cause: io::Error,
    },
    /// The memory cannot be mapped.
    #[error("cannot map guest memory at {start:#x}, {pages} pages{}: {cause}", if *.huge { " in 2 MiB pages" } else { "" })]
    Map {
        /// Guest physical start of the region.
        start: u64,
        /// Its length in pages.
        pages: u64,
        /// Whether of huge pages.
        huge: bool,
        /// What went wrong.
        cause: String,
    },
    /// The host has too few huge pages.
    #[error(
        "{mib} MiB of guest memory need {} pages of 2 MiB, of which this host has {free} to give: reserve more (vm.nr_hugepages) or leave huge_pages out",
        .mib.div_ceil(HUGE_MIB)
    )]
    Pool {
        /// Size asked for.
        mib: u64,
        /// Huge pages that are neither in use nor promised to somebody.
        free: u64,
    },
    /// KVM refuses a slot.
    #[error("KVM_SET_USER_MEMORY_REGION for slot {slot} at {start:#x}, {pages} pages: {cause}")]
    Slot {
        /// The slot.
        slot: u32,
        /// Guest physical start.
        start: u64,
        /// Length in pages.
        pages: u64,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// The file does not tell what it holds.
    #[error("cannot ask which guest pages are populated: {0}")]
    Populated(Errno),
}

/// The layout of `mib` MiB of guest memory.
///
/// # Errors
/// [`LayoutError`] if that is nothing or too much.
pub fn layout(mib: u32) -> Result<Layout, LayoutError> {
    let pages = u64::from(mib) * PAGES_PER_MIB;
    let low = pages.min(HOLE_START / PAGE_SIZE as u64);
    let mut regions = vec![Region { start: 0, pages: low }];
    if pages > low {
        regions.push(Region { start: HOLE_END, pages: pages - low });
    }
    Layout::new(regions)
}

/// What guest memory held when its machine went away.
#[derive(Clone, Debug)]
pub struct KeptMemory {
    layout: Layout,
    /// Whether of huge pages.
    huge: bool,
    file: Arc<File>,
}

impl KeptMemory {
    /// Where it lay.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether it is of huge pages.
    pub(crate) fn huge(&self) -> bool {
        self.huge
    }
}

/// Guest memory.
pub(crate) struct Memory {
    ram: Arc<GuestRam>,
    layout: Layout,
    /// The memory file; none if memory is a private mapping of somebody else's.
    file: Option<Arc<File>>,
    returned: Returned,
    /// Who provides pages that are missing still.
    pager: Option<Arc<Pager>>,
}

impl Memory {
    /// Memory of `layout`, all zeros, none of it touched.
    pub(crate) fn new(layout: Layout, huge: bool) -> Result<Self, MemoryError> {
        let file = Arc::new(create_file(&layout, huge)?);
        Self::on(KeptMemory { layout, huge, file })
    }

    /// Memory as it was left.
    pub(crate) fn on(KeptMemory { layout, huge, file }: KeptMemory) -> Result<Self, MemoryError> {
        // Huge pages are reserved now: without, one that is not to be had would kill the process at its first touch.
        let reserve = if huge { 0 } else { libc::MAP_NORESERVE };
        let ram = map(&layout, &file, 0, libc::MAP_SHARED | reserve, huge).map_err(|error| {
            let (mib, free) = (layout.bytes() >> 20, free_huge_pages());
            if huge && free < mib.div_ceil(HUGE_MIB) { MemoryError::Pool { mib, free } } else { error }
        })?;
        // A huge page that was given to the host is no longer reserved: if others have it when the guest wants it back,
        // the kernel kills the process. So the guest keeps them.
        let returned = Returned::new(&layout, (!huge).then(|| Arc::clone(&file)));
        Ok(Self { ram, layout, file: Some(file), returned, pager: None })
    }

    /// The same memory, untouched so far, whose pages `pager` provides.
    #[must_use]
    pub(crate) fn provided_by(mut self, pager: Pager) -> Self {
        let pager = Arc::new(pager);
        self.returned.pager = Some(Arc::clone(&pager));
        self.pager = Some(pager);
        self
    }

    /// Memory of `layout` whose pages are those of `file` from `offset` on until they are written; `file` is not changed.
    pub(crate) fn map_private(layout: Layout, file: &File, offset: u64) -> Result<Self, MemoryError> {
        let file = Arc::new(file.try_clone().map_err(|cause| MemoryError::Create {
            mib: layout.bytes() >> 20,
            huge: false,
            cause,
        })?);
        let ram = map(&layout, &file, offset, libc::MAP_PRIVATE | libc::MAP_NORESERVE, false)?;
        let returned = Returned::new(&layout, None);
        Ok(Self { ram, layout, file: None, returned, pager: None })
    }

    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Makes `bodies` the pages from `first` on, of memory of ordinary pages that nobody uses yet. They do not count as
    /// written.
    pub(crate) fn fill(&self, first: u64, bodies: &[u8]) -> Result<(), MemoryError> {
        let written = match &self.file {
            Some(file) => file.write_all_at(bodies, first * PAGE_SIZE as u64),
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        let mib = self.layout.bytes() >> 20;
        written.map_err(|cause| MemoryError::Create { mib, huge: false, cause })
    }

    /// Who provides pages that are missing still.
    pub(crate) fn pager(&self) -> Option<&Arc<Pager>> {
        self.pager.as_ref()
    }

    /// What it holds, for when it is gone; `None` if it is not its own, or not all there.
    pub(crate) fn keep(&self, huge: bool) -> Option<KeptMemory> {
        let file = Arc::clone(self.file.as_ref().filter(|_| self.pager.is_none())?);
        Some(KeptMemory { layout: self.layout.clone(), huge, file })
    }

    /// Where pages go that the guest gives back.
    pub(crate) fn returned(&self) -> &Returned {
        &self.returned
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Adds the pages that the file holds, or will when the pager has provided them. Asks the file and reads no page:
    /// reading a hole would fill it. Where the file cannot tell (huge pages, somebody else's file), every page counts as
    /// populated.
    pub(crate) fn populated(&self, into: &mut DirtySet) -> Result<(), MemoryError> {
        // First: what is no longer missing is in the file.
        if let Some(pager) = &self.pager {
            pager.missing(into);
        }
        let end = self.layout.bytes();
        let Some(file) = &self.file else {
            into.insert_range(0, self.layout.pages());
            return Ok(());
        };
        let mut at = 0;
        while at < end {
            let data = match seek(file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => return Ok(()),
                Err(cause) => return Err(MemoryError::Populated(cause)),
            };
            let hole = seek(file, SeekFrom::Hole(data)).map_err(MemoryError::Populated)?;
            let (first, last) = (data / PAGE_SIZE as u64, hole.min(end).div_ceil(PAGE_SIZE as u64));
            into.insert_range(first, last.saturating_sub(first));
            // A file that gives no progress would keep us here for ever.
            at = hole.max(at + PAGE_SIZE as u64);
        }
        Ok(())
    }
}

/// Pages that the guest has given back. Clones are the same.
#[derive(Clone)]
pub(crate) struct Returned {
    layout: Layout,
    /// The memory file; without one the pages are not given to the host.
    file: Option<Arc<File>>,
    /// It must not provide them again.
    pager: Option<Arc<Pager>>,
    /// Since the mirror last asked, and whether there are any.
    pages: Arc<Mutex<(DirtySet, bool)>>,
}

impl Returned {
    fn new(layout: &Layout, file: Option<Arc<File>>) -> Self {
        let pages = Arc::new(Mutex::new((DirtySet::new(layout.pages()), false)));
        Self { layout: layout.clone(), file, pager: None, pages }
    }

    /// Moves the pages to `into`.
    pub(crate) fn take(&self, into: &mut DirtySet) {
        let (pages, any) = &mut *self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        // Mostly there are none, and a large guest's set takes its time.
        if std::mem::take(any) {
            into.union(pages);
            pages.clear();
        }
    }
}

impl Discard for Returned {
    fn discard(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let mut first = 0;
        for region in self.layout.regions() {
            let region_end = region.start + region.pages * PAGE_SIZE as u64;
            let (from, to) = (start.max(region.start), end.min(region_end));
            if from < to {
                let page = first + (from - region.start) / PAGE_SIZE as u64;
                self.give_back(page, (to - from) / PAGE_SIZE as u64);
            }
            first += region.pages;
        }
    }
}

impl Returned {
    fn give_back(&self, page: u64, count: u64) {
        // Pages that stay hold what they held.
        let Some(file) = &self.file else { return };
        let (pages, any) = &mut *self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.insert_range(page, count);
        *any = true;
        let punch = || {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file that refuses keeps its pages, and nothing is lost.
            let _ = fallocate(file, flags, page * PAGE_SIZE as u64, count * PAGE_SIZE as u64);
        };
        match &self.pager {
            Some(pager) => pager.give_up(page, count, punch),
            None => punch(),
        }
    }
}

/// Huge pages of the host that are neither in use nor promised; none if the kernel does not tell.
fn free_huge_pages() -> u64 {
    let count = |name| {
        let text = fs::read_to_string(format!("{POOL}/{name}_hugepages")).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    count("free").saturating_sub(count("resv"))
}

fn create_file(layout: &Layout, huge: bool) -> Result<File, MemoryError> {
    let mut flags = MemfdFlags::CLOEXEC;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let create = || -> rustix::io::Result<OwnedFd> {
        let file = memfd_create("guest-memory", flags)?;
        ftruncate(&file, layout.bytes())?;
        Ok(file)
    };
    create().map(File::from).map_err(|cause| MemoryError::Create {
        mib: layout.bytes() >> 20,
        huge,
        cause: cause.into(),
    })
}

/// Maps the regions of `layout`, one behind the other in `file` from `offset` on.
fn map(
    layout: &Layout,
    file: &Arc<File>,
    mut offset: u64,
    flags: i32,
    huge: bool,
) -> Result<Arc<GuestRam>, MemoryError> {
    let mut regions = Vec::new();
    for &Region { start, pages } in layout.regions() {
        let bytes = pages as usize * PAGE_SIZE;
        let failed = |cause: String| MemoryError::Map { start, pages, huge, cause };
        let mapping = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::new(bytes, PAGE))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .with_hugetlbfs(huge)
            .build()
            .map_err(|cause| failed(cause.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| failed("it leaves the address space".into()))?;
        regions.push(region);
        offset += bytes as u64;
    }
    let ram = GuestRegionCollection::from_regions(regions).map_err(|cause| MemoryError::Map {
        start: 0,
        pages: layout.pages(),
        huge,
        cause: cause.to_string(),
    })?;
    Ok(Arc::new(ram))
}

/// One KVM memory slot a region.
pub(crate) struct Slots {
    list: Vec<Slot>,
    logging: bool,
    /// The slots point into it.
    ram: Arc<GuestRam>,
}

/// A KVM memory slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    /// KVM's number for it.
    pub(crate) id: u32,
    /// Number of its first page.
    pub(crate) first_page: u64,
    /// Its length in pages.
    pub(crate) pages: u64,
    start: u64,
    host: u64,
}

impl Slots {
    /// Registers `memory` with `vm`; KVM logs the pages written if `logging`.
    pub(crate) fn register(vm: &VmFd, memory: &Memory, logging: bool) -> Result<Self, MemoryError> {
        use vm_memory::GuestMemoryBackend;
        let mut first_page = 0;
        let mut list = Vec::new();
        for (index, (region, mapped)) in memory.layout.regions().iter().zip(memory.ram.iter()).enumerate() {
            list.push(Slot {
                id: index as u32,
                first_page,
                pages: region.pages,
                start: region.start,
                host: mapped.get_mmap().as_ptr() as u64,
            });
            first_page += region.pages;
        }
        let mut this = Self { list, logging, ram: Arc::clone(&memory.ram) };
        this.set(vm, logging)?;
        Ok(this)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.list.iter()
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Whether KVM logs the pages written.
    pub(crate) fn logging(&self) -> bool {
        self.logging
    }

    /// Lets KVM log the pages written, or no longer.
    pub(crate) fn set_logging(&mut self, vm: &VmFd, logging: bool) -> Result<(), MemoryError> {
        if self.logging == logging {
            return Ok(());
        }
        self.set(vm, logging)
    }

    fn set(&mut self, vm: &VmFd, logging: bool) -> Result<(), MemoryError> {
        for slot in &self.list {
            let region = kvm_userspace_memory_region {
                slot: slot.id,
                flags: if logging { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.start,
                memory_size: slot.pages * PAGE_SIZE as u64,
                userspace_addr: slot.host,
            };
            // SAFETY: the host range is the mapping of a region of `self.ram`, which is kept as long as the slots are;
            // regions do not overlap.
            unsafe { vm.set_user_memory_region(region) }.map_err(|cause| MemoryError::Slot {
                slot: slot.id,
                start: slot.start,
                pages: slot.pages,
                cause,
            })?;
        }
        self.logging = logging;
        Ok(())
    }
}

#[cfg(test)]
#[path = "../tests/common/pool.rs"]
mod pool;

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        let small = layout(64).unwrap();
        assert_eq!(small.regions(), [Region { start: 0, pages: 64 * 256 }]);
        let large = layout(4096).unwrap();
        assert_eq!(
            large.regions(),
            [Region { start: 0, pages: 3072 * 256 }, Region { start: HOLE_END, pages: 1024 * 256 }]
        );
    }

    #[test]
    fn only_pages_that_were_touched_are_populated() {
        let memory = Memory::new(layout(64).unwrap(), false).unwrap();
        let pages = [0, 5, 6, 700, 64 * 256 - 1];
        for page in pages {
            memory.ram().write_obj(1_u8, GuestAddress(page * PAGE_SIZE as u64)).unwrap();
        }
        let mut set = DirtySet::new(memory.layout().pages());
        memory.populated(&mut set).unwrap();
        assert!(set.iter().eq(pages), "{:?}", set.iter().collect::<Vec<_>>());
    }

    #[test]
    fn pages_given_back_are_zeros_unpopulated_and_told_once() {
        let memory = Memory::new(layout(3200).unwrap(), false).unwrap();
        for page in [10, 11, 12, HOLE_END / PAGE_SIZE as u64] {
            memory.ram().write_obj(7_u8, GuestAddress(page * PAGE_SIZE as u64)).unwrap();
        }
        let mut returned = memory.returned().clone();
        returned.discard(11 * PAGE_SIZE as u64, 2 * PAGE_SIZE as u64);
        // Across the hole, and beyond the end: what is memory of it.
        returned.discard(HOLE_END - PAGE_SIZE as u64, u64::MAX);
        let mut told = DirtySet::new(memory.layout().pages());
        memory.returned().take(&mut told);
        let behind = HOLE_START / PAGE_SIZE as u64;
        assert!(told.contains(11) && told.contains(12) && !told.contains(10) && told.contains(behind));
        let mut set = DirtySet::new(memory.layout().pages());
        memory.populated(&mut set).unwrap();
        assert!(set.iter().eq([10]));
        let again = &mut DirtySet::new(memory.layout().pages());
        memory.returned().take(again);
        assert!(again.is_empty());
    }

    #[test]
    fn populated_pages_behind_the_hole_have_the_numbers_that_follow() {
        let memory = Memory::new(layout(3200).unwrap(), false).unwrap();
        memory.ram().write_obj(1_u8, GuestAddress(HOLE_END + 3 * PAGE_SIZE as u64)).unwrap();
        let mut set = DirtySet::new(memory.layout().pages());
        memory.populated(&mut set).unwrap();
        assert!(set.iter().eq([HOLE_START / PAGE_SIZE as u64 + 3]));
    }

    #[test]
    fn huge_pages_that_the_host_has_not_are_a_clear_error() {
        // 1 TiB of huge pages is more than any test machine has reserved.
        let error = Memory::new(layout(1 << 20).unwrap(), true).err().unwrap();
        assert!(error.to_string().contains("need 524288 pages of 2 MiB, of which this host has"), "{error}");
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    }

    mod huge {
        use super::*;

        use super::super::pool::Pool;

        fn memory(mib: u32) -> Result<Memory, MemoryError> {
            Memory::new(layout(mib).unwrap(), true)
        }

        #[test]
        fn pool_that_is_one_page_short_is_told_with_both_numbers() {
            let _pool = Pool::of(3);
            let error = memory(8).err().unwrap().to_string();
            assert!(error.contains("8 MiB of guest memory need 4 pages of 2 MiB"), "{error}");
            assert!(error.contains("this host has 3 to give"), "{error}");
        }

        #[test]
        fn pages_that_the_guest_gives_back_stay_its_own() {
            let _pool = Pool::of(4);
            let memory = memory(8).unwrap();
            for address in (0..8 << 20).step_by(PAGE_SIZE) {
                memory.ram().write_obj(7_u8, GuestAddress(address)).unwrap();
            }
            // A small page, part of two huge ones, and whole ones.
            let mut returned = memory.returned().clone();
            for (start, len) in [(0, PAGE_SIZE as u64), (1 << 20, 2 << 20), (4 << 20, 4 << 20)] {
                returned.discard(start, len);
            }
            let mut told = DirtySet::new(memory.layout().pages());
            memory.returned().take(&mut told);
            assert!(told.is_empty(), "they hold what they held");
            // Nobody else gets them, so the guest finds all of them when it wants them back.
            assert!(matches!(self::memory(2), Err(MemoryError::Pool { free: 0, .. })));
            for address in (0..8 << 20).step_by(PAGE_SIZE) {
                memory.ram().write_obj(8_u8, GuestAddress(address)).unwrap();
            }
        }

        #[test]
        fn every_page_counts_as_populated() {
            let _pool = Pool::of(2);
            let memory = memory(4).unwrap();
            let mut set = DirtySet::new(memory.layout().pages());
            memory.populated(&mut set).unwrap();
            assert_eq!(set.count(), memory.layout().pages());
        }
    }
}
