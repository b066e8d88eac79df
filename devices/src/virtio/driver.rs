//! The other side of a virtio device: a driver, for tests and fuzzers. It sets a device up through its registers and
//! works its queues in a small guest memory.

use std::num::NonZeroUsize;
use std::sync::Arc;

use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap,
};

use super::device::{VERSION_1, VirtioDevice};
use super::state::VirtioState;
use super::{GuestRam, Interrupt, VirtioMmio, VirtioSlot};
use crate::bus::BusDevice;

const PAGE: usize = 4096;
/// Two regions with a hole between them.
pub const REGIONS: [(u64, usize); 2] = [(0, 4 << 20), (8 << 20, 4 << 20)];
/// Each queue has this much room for its rings, from 64 KiB on.
const QUEUE_ROOM: u64 = 0x1_0000;
/// Where buffers begin.
const BUFFERS: u64 = 1 << 20;

/// Guest memory in two regions, with a bitmap of what devices write.
pub fn memory() -> Arc<GuestRam> {
    let region = |(start, len)| {
        let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(PAGE).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    };
    Arc::new(GuestRegionCollection::from_regions(REGIONS.map(region).into()).unwrap())
}

/// One queue, seen from the driver.
struct Ring {
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

/// A driver with its device.
pub struct Driver {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The device's registers.
    pub mmio: VirtioMmio,
    rings: Vec<Ring>,
    free: u64,
    /// What memory held when its changes were last checked.
    before: Vec<Vec<u8>>,
}

/// A request's buffers: where they are, so that a test can look.
#[derive(Clone, Debug)]
pub struct Request {
    /// Number of its first descriptor.
    pub head: u16,
    /// Guest physical addresses of its writable buffers.
    pub writable: Vec<(u64, usize)>,
}

impl Driver {
    /// Drives `device` with all the features that it offers but `without`, each queue at its full size.
    pub fn start(device: Box<dyn VirtioDevice>, without: u64) -> Self {
        Self::start_in(memory(), device, without)
    }

    /// As [`Self::start`], in memory that exists already.
    pub fn start_in(ram: Arc<GuestRam>, device: Box<dyn VirtioDevice>, without: u64) -> Self {
        let mut this = Self::idle(ram, device);
        this.negotiate(!without);
        this
    }

    /// A device that no driver has touched yet.
    pub fn idle(ram: Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> Self {
        let interrupt = Interrupt::new().unwrap();
        let slot = VirtioSlot::new(device, &ram, &interrupt).unwrap();
        let mut this = Self {
            ram,
            mmio: VirtioMmio::new(slot),
            rings: Vec::new(),
            free: BUFFERS,
            before: REGIONS.map(|(_, len)| vec![0; len]).into(),
        };
        this.check_changes_are_marked();
        this
    }

    /// Initialises the device (virtio 1.2, 3.1.1), accepting those of its features that are in `wanted`.
    pub fn negotiate(&mut self, wanted: u64) {
        self.set(register::VIRTIO_MMIO_STATUS, 0);
        self.set(register::VIRTIO_MMIO_STATUS, 1);
        self.set(register::VIRTIO_MMIO_STATUS, 3);
        let features = self.offered() & (wanted | VERSION_1);
        for half in 0..2 {
            self.set(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(register::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.set(register::VIRTIO_MMIO_STATUS, 0xb);
        assert_eq!(self.get(register::VIRTIO_MMIO_STATUS), 0xb, "the device takes its own features");
        self.rings.clear();
        for index in 0.. {
            self.set(register::VIRTIO_MMIO_QUEUE_SEL, index);
            let size = self.get(register::VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            if size == 0 {
                break;
            }
            let base = QUEUE_ROOM * u64::from(index + 1);
            let (table, available, used) = (base, base + 0x4000, base + 0x6000);
            // A ring that was used before begins anew.
            self.ram.write_slice(&vec![0; QUEUE_ROOM as usize], GuestAddress(base)).unwrap();
            self.set(register::VIRTIO_MMIO_QUEUE_NUM, u32::from(size));
            self.set(register::VIRTIO_MMIO_QUEUE_DESC_LOW, table as u32);
            self.set(register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available as u32);
            self.set(register::VIRTIO_MMIO_QUEUE_USED_LOW, used as u32);
            self.set(register::VIRTIO_MMIO_QUEUE_READY, 1);
            let (next_descriptor, next_available, next_used) = (0, 0, 0);
            self.rings.push(Ring {
                size,
                table,
                available,
                used,
                next_descriptor,
                next_available,
                next_used,
            });
        }
        self.set(register::VIRTIO_MMIO_STATUS, 0xf);
    }

    /// Features that the device offers.
    pub fn offered(&mut self) -> u64 {
        (0..2).fold(0, |features, half| {
            self.set(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            features | u64::from(self.get(register::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// Reads a register.
    pub fn get(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn set(&mut self, register: u32, value: u32) {
        self.mmio.write(u64::from(register), &value.to_le_bytes());
    }

    /// Reads `len` bytes of the configuration space.
    pub fn config(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mmio.read(u64::from(register::VIRTIO_MMIO_CONFIG) + offset, &mut data);
        data
    }

    /// Writes to the configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.mmio.write(u64::from(register::VIRTIO_MMIO_CONFIG) + offset, data);
    }

    /// Room for `len` bytes in guest memory.
    pub fn allocate(&mut self, len: usize) -> u64 {
        let address = self.free;
        self.free += (len as u64).next_multiple_of(16).max(16);
        if self.free > REGIONS[0].0 + REGIONS[0].1 as u64 {
            // Tests are short; one that is not goes around.
            self.free = BUFFERS;
            return self.allocate(len);
        }
        address
    }

    /// Makes a request available: buffers with the bytes of `readable`, then room for `writable` bytes each.
    pub fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> Request {
        let mut descriptors = Vec::new();
        let mut room = Vec::new();
        for bytes in readable {
            let address = self.allocate(bytes.len());
            self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
            descriptors.push((address, bytes.len() as u32, 0));
        }
        for &len in writable {
            let address = self.allocate(len);
            room.push((address, len));
            descriptors.push((address, len as u32, VRING_DESC_F_WRITE as u16));
        }
        let head = self.add_chain(queue, &descriptors);
        Request { head, writable: room }
    }

    /// Makes a chain of (address, length, flags) available; NEXT is set where one follows. Returns its head.
    pub fn add_chain(&mut self, queue: usize, descriptors: &[(u64, u32, u16)]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (index, &(address, len, flags)) in descriptors.iter().enumerate() {
            let at = ring.next_descriptor;
            ring.next_descriptor = (at + 1) % ring.size;
            let last = index + 1 == descriptors.len();
            let flags = flags | if last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let descriptor = Descriptor::new(address, len, flags, ring.next_descriptor);
            self.ram.write_obj(descriptor, GuestAddress(ring.table + 16 * u64::from(at))).unwrap();
        }
        self.make_available(queue, head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let entry = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        self.ram.write_obj(ring.next_available, GuestAddress(ring.available + 2)).unwrap();
    }

    /// Guest physical addresses of descriptor table, available and used ring of a queue.
    pub fn ring_addresses(&self, queue: usize) -> (u64, u64, u64) {
        let ring = &self.rings[queue];
        (ring.table, ring.available, ring.used)
    }

    /// Queues that the device has.
    pub fn queue_count(&self) -> usize {
        self.rings.len()
    }

    /// Rings the doorbell of a queue, and lets the device hear it.
    pub fn ring(&mut self, queue: usize) {
        self.set(register::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        self.mmio.slot().doorbell(queue);
    }

    /// The chains that the device has used since the last call: head and bytes written.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let end: u16 = self.ram.read_obj(GuestAddress(ring.used + 2)).unwrap();
        let mut used = Vec::new();
        while ring.next_used != end {
            let entry = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
            let [head, len]: [u32; 2] = [
                self.ram.read_obj(GuestAddress(entry)).unwrap(),
                self.ram.read_obj(GuestAddress(entry + 4)).unwrap(),
            ];
            used.push((head as u16, len));
            ring.next_used = ring.next_used.wrapping_add(1);
        }
        // Asks for an interrupt at the next (virtio 1.2, 2.7.10), used_event.
        let event = ring.available + 4 + 2 * u64::from(ring.size);
        self.ram.write_obj(ring.next_used, GuestAddress(event)).unwrap();
        used
    }

    /// `len` bytes of guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Acknowledges and returns what the interrupt is for; zero if it was not raised.
    pub fn take_interrupt(&mut self) -> u32 {
        let raised = self.mmio.slot().interrupt().line().read().is_ok();
        let status = self.get(register::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.set(register::VIRTIO_MMIO_INTERRUPT_ACK, status);
        if raised { status } else { 0 }
    }

    /// Whether the device says that it needs a reset.
    pub fn needs_reset(&mut self) -> bool {
        self.get(register::VIRTIO_MMIO_STATUS) & 0x40 != 0
    }

    /// Forgets which pages are dirty, so that a later [`check_changes_are_marked`](Self::check_changes_are_marked) tells
    /// of what the device does from now on.
    pub fn begin_watch(&mut self) {
        self.check_changes_are_marked();
    }

    /// Checks that every page whose content has changed since the last call is marked dirty, and returns how many are
    /// both. What the driver itself writes is marked as well: watch only what the device does.
    pub fn check_changes_are_marked(&mut self) -> usize {
        let mut count = 0;
        for (region, before) in self.ram.iter().zip(&mut self.before) {
            let words = region.get_mmap().bitmap().get_and_reset();
            let mut now = vec![0; before.len()];
            region.read_slice(&mut now, vm_memory::MemoryRegionAddress(0)).unwrap();
            for (page, (old, new)) in before.chunks(PAGE).zip(now.chunks(PAGE)).enumerate() {
                if old != new {
                    let marked = words[page / 64] & 1 << (page % 64) != 0;
                    let address = region.start_addr().0 + (page * PAGE) as u64;
                    assert!(marked, "the page at {address:#x} was written and not marked dirty");
                    count += 1;
                }
            }
            *before = now;
        }
        count
    }

    /// Saves the device and goes on with it in `successor`, a fresh device of the same kind: as a standby that takes over.
    #[must_use]
    pub fn fail_over(mut self, successor: Box<dyn VirtioDevice>) -> Self {
        let mut state = VirtioState::default();
        self.mmio.save(&mut state);
        let mut next = Self::idle(Arc::clone(&self.ram), successor);
        next.mmio.restore(&state).unwrap();
        next.rings = self.rings;
        next.free = self.free;
        next.mmio.slot().moved();
        next.mmio.resume();
        next.mmio.slot().attend();
        next
    }
}
