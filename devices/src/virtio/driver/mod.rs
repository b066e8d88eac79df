//! The other side of a virtio device: a driver, for tests and fuzzers. It sets a device up through its registers and
//! works its queues in a small guest memory.

pub mod fuzz;
pub mod tap;
mod view;

use std::num::NonZeroUsize;
use std::sync::Arc;

use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap,
};

pub use view::GuestView;

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
pub const BUFFERS: u64 = 1 << 20;

/// Guest memory in two regions, with a bitmap of what devices write.
pub fn memory() -> Arc<GuestRam> {
    memory_of(&REGIONS)
}

/// Guest memory in regions of guest physical address and length, the first of more than [`BUFFERS`] bytes.
pub fn memory_of(regions: &[(u64, usize)]) -> Arc<GuestRam> {
    let region = |&(start, len): &(u64, usize)| {
        let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(PAGE).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(start)).unwrap()
    };
    Arc::new(GuestRegionCollection::from_regions(regions.iter().map(region).collect()).unwrap())
}

/// Where a queue lies: its descriptors, and guest physical addresses of its parts.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Descriptors.
    pub size: u16,
    /// Of the descriptor table.
    pub table: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
}

/// One queue, seen from the driver.
struct Ring {
    layout: Layout,
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
    view: GuestView,
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
        let view = GuestView::new(&ram);
        Self { mmio: registers(&ram, device), ram, rings: Vec::new(), free: BUFFERS, view }
    }

    /// Initialises the device (virtio 1.2, 3.1.1), accepting those of its features that are in `wanted`.
    pub fn negotiate(&mut self, wanted: u64) {
        self.negotiate_with(wanted, |_, layout| layout);
        assert_eq!(self.get(register::VIRTIO_MMIO_STATUS), 0xf, "the device takes sound queues");
    }

    /// As [`Self::negotiate`], with the queues where `place` wants them, which is told their number and their usual place.
    pub fn negotiate_with(&mut self, wanted: u64, place: impl Fn(u32, Layout) -> Layout) {
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
            // A ring that was used before begins anew.
            self.write(base, &vec![0; QUEUE_ROOM as usize]);
            let usual = Layout { size, table: base, available: base + 0x4000, used: base + 0x6000 };
            let ring = self.set_up_queue(place(index, usual));
            self.rings.push(ring);
        }
        self.set(register::VIRTIO_MMIO_STATUS, 0xf);
    }

    fn set_up_queue(&mut self, layout: Layout) -> Ring {
        self.set(register::VIRTIO_MMIO_QUEUE_NUM, u32::from(layout.size));
        for (register, address) in [
            (register::VIRTIO_MMIO_QUEUE_DESC_LOW, layout.table),
            (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, layout.available),
            (register::VIRTIO_MMIO_QUEUE_USED_LOW, layout.used),
        ] {
            self.set(register, address as u32);
            // The upper half is the next register.
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(register::VIRTIO_MMIO_QUEUE_READY, 1);
        Ring { layout, next_descriptor: 0, next_available: 0, next_used: 0 }
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
        let first = self.ram.iter().next().map_or(0, |region| region.start_addr().0 + region.len());
        if self.free > first {
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
            self.write(address, bytes);
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
            ring.next_descriptor = (at + 1) % ring.layout.size;
            let last = index + 1 == descriptors.len();
            let flags = flags | if last { 0 } else { VRING_DESC_F_NEXT as u16 };
            let descriptor = Descriptor::new(address, len, flags, ring.next_descriptor);
            self.view.write(ring.layout.table.wrapping_add(16 * u64::from(at)), descriptor.as_slice());
        }
        self.make_available(queue, head);
        head
    }

    /// Puts `head` into the available ring.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let Layout { size, available, .. } = ring.layout;
        let entry = available.wrapping_add(4 + 2 * u64::from(ring.next_available % size));
        ring.next_available = ring.next_available.wrapping_add(1);
        self.view.write(entry, &head.to_le_bytes());
        self.view.write(available.wrapping_add(2), &ring.next_available.to_le_bytes());
    }

    /// Where a queue lies.
    pub fn layout(&self, queue: usize) -> Layout {
        self.rings[queue].layout
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
        let Layout { size, available, used: start, .. } = ring.layout;
        let word = |address| u16::from_le_bytes(self.view.read(address, 2).unwrap().try_into().unwrap());
        let end = word(start + 2);
        let mut used = Vec::new();
        while ring.next_used != end {
            let entry = start + 4 + 8 * u64::from(ring.next_used % size);
            let len = u32::from(word(entry + 4)) | u32::from(word(entry + 6)) << 16;
            used.push((word(entry), len));
            ring.next_used = ring.next_used.wrapping_add(1);
        }
        // Asks for an interrupt at the next (virtio 1.2, 2.7.10), used_event.
        self.view.write(available + 4 + 2 * u64::from(size), &ring.next_used.to_le_bytes());
        used
    }

    /// `len` bytes of guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        self.view.read(address, len).unwrap()
    }

    /// Writes to guest memory.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        assert!(self.view.write(address, bytes), "{address:#x} is in memory");
    }

    /// Guest memory, as the driver sees it.
    pub fn view(&mut self) -> &mut GuestView {
        &mut self.view
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
        self.view.forget();
    }

    /// Checks that every page that the device has changed since the last call is marked dirty, and returns how many there
    /// are.
    pub fn check_changes_are_marked(&mut self) -> usize {
        self.view.check()
    }

    /// Saves the device and goes on with it in `successor`, a fresh device of the same kind: as a standby that takes over.
    #[must_use]
    pub fn fail_over(mut self, successor: Box<dyn VirtioDevice>) -> Self {
        let mut state = VirtioState::default();
        self.mmio.save(&mut state);
        let mut next = self.replace(|| successor);
        next.mmio.restore(&state).unwrap();
        next.go_on();
        next
    }

    /// Puts what `make` makes into the place of the device, which is gone before that. It is to be restored.
    #[must_use]
    pub fn replace(self, make: impl FnOnce() -> Box<dyn VirtioDevice>) -> Self {
        let Self { ram, mmio, .. } = self;
        drop(mmio);
        Self { mmio: registers(&ram, make()), ram, ..self }
    }

    /// The guest runs on after a restore, here.
    pub fn go_on(&mut self) {
        self.mmio.slot().moved();
        self.mmio.resume();
        self.mmio.slot().attend();
    }
}

fn registers(ram: &Arc<GuestRam>, device: Box<dyn VirtioDevice>) -> VirtioMmio {
    let interrupt = Interrupt::new().unwrap();
    VirtioMmio::new(VirtioSlot::new(device, ram, &interrupt).unwrap())
}
