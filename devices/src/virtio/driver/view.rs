//! Guest memory as the guest itself sees it, and a watch on what devices do to it.

use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap, MemoryRegionAddress,
};

use crate::virtio::GuestRam;

const PAGE: usize = 4096;

/// Guest memory, seen by the guest: what it writes is no device's doing and marks nothing dirty.
pub struct GuestView {
    memory: GuestMemoryMmap<()>,
    /// What memory holds as far as the guest knows: what it was when last checked, and what the guest has written since.
    known: Vec<Vec<u8>>,
    /// The mappings of `memory` are those of this.
    ram: Arc<GuestRam>,
}

impl GuestView {
    /// A view of `ram`, whose content and dirty pages of this moment are taken as they are.
    pub fn new(ram: &Arc<GuestRam>) -> Self {
        let alias = |region: &GuestRegionMmap<_>| {
            let mapping: &MmapRegion<_> = region;
            // SAFETY: the mapping lives as long as `ram`, which is kept beside the alias, and guest memory is accessed
            // volatilely through either.
            let alias = unsafe {
                MmapRegion::build_raw(mapping.as_ptr(), mapping.size(), mapping.prot(), mapping.flags())
            };
            GuestRegionMmap::new(alias.unwrap(), region.start_addr()).unwrap()
        };
        let regions = ram.iter().map(alias).collect();
        let mut this = Self {
            memory: GuestRegionCollection::from_regions(regions).unwrap(),
            known: ram.iter().map(|region| vec![0; region.size()]).collect(),
            ram: Arc::clone(ram),
        };
        this.forget();
        this
    }

    /// Writes `bytes` to guest physical `address`, as a processor of the guest does. Says whether they lie in memory.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> bool {
        let address = GuestAddress(address);
        if !self.memory.check_range(address, bytes.len()) || self.memory.write_slice(bytes, address).is_err()
        {
            return false;
        }
        let mut done = 0;
        for (region, known) in self.memory.iter().zip(&mut self.known) {
            let at = GuestAddress(address.0 + done as u64);
            if let Some(MemoryRegionAddress(offset)) = region.to_region_addr(at) {
                let offset = offset as usize;
                let len = (known.len() - offset).min(bytes.len() - done);
                known[offset..offset + len].copy_from_slice(&bytes[done..done + len]);
                done += len;
            }
        }
        true
    }

    /// The `len` bytes at guest physical `address`; none if they do not lie in memory.
    pub fn read(&self, address: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).ok()?;
        Some(bytes)
    }

    /// Takes what memory holds, and what is dirty, as it is.
    pub fn forget(&mut self) {
        self.changes(|_, _| {});
    }

    /// Checks that every page that holds something else than the guest knows of is marked dirty, and returns how many
    /// there are. From then on the guest knows of them, and nothing is dirty.
    pub fn check(&mut self) -> usize {
        let mut count = 0;
        self.changes(|address, marked| {
            assert!(marked, "the page at {address:#x} was written and not marked dirty");
            count += 1;
        });
        count
    }

    /// Calls `found` with the address of each page that has changed, and whether it is marked.
    fn changes(&mut self, mut found: impl FnMut(u64, bool)) {
        let mut page = [0; PAGE];
        for (region, known) in self.ram.iter().zip(&mut self.known) {
            let marks = region.get_mmap().bitmap().get_and_reset();
            for (index, known) in known.chunks_mut(PAGE).enumerate() {
                let page = &mut page[..known.len()];
                region.read_slice(page, MemoryRegionAddress((index * PAGE) as u64)).unwrap();
                if page != known {
                    known.copy_from_slice(page);
                    let address = region.start_addr().0 + (index * PAGE) as u64;
                    found(address, marks[index / 64] & 1 << (index % 64) != 0);
                }
            }
        }
    }
}
