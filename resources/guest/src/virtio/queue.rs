//! A split virtqueue, as a driver uses it (virtio 1.2, 2.7).

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::memory::{Addresses, Frame};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[repr(C)]
struct Descriptor {
    address: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct UsedChain {
    head: AtomicU32,
    len: AtomicU32,
}

/// What driver and device share. All of it is atomic, so that neither can upset the other.
#[repr(C, align(16))]
struct Shared<const N: usize> {
    table: [Descriptor; N],
    available_flags: AtomicU16,
    available_index: AtomicU16,
    available: [AtomicU16; N],
    /// The device interrupts when it has used the chain at this index.
    used_event: AtomicU16,
    _padding: AtomicU32,
    used_flags: AtomicU16,
    used_index: AtomicU16,
    used: [UsedChain; N],
    /// The device wants the doorbell when the chain at this index is available.
    available_event: AtomicU16,
}

impl<const N: usize> Shared<N> {
    const fn new() -> Self {
        Self {
            table: [const {
                Descriptor {
                    address: AtomicU64::new(0),
                    len: AtomicU32::new(0),
                    flags: AtomicU16::new(0),
                    next: AtomicU16::new(0),
                }
            }; N],
            available_flags: AtomicU16::new(0),
            available_index: AtomicU16::new(0),
            available: [const { AtomicU16::new(0) }; N],
            used_event: AtomicU16::new(0),
            _padding: AtomicU32::new(0),
            used_flags: AtomicU16::new(0),
            used_index: AtomicU16::new(0),
            used: [const { UsedChain { head: AtomicU32::new(0), len: AtomicU32::new(0) } }; N],
            available_event: AtomicU16::new(0),
        }
    }
}

/// A buffer of a chain: physical address and length in bytes.
#[derive(Clone, Copy)]
pub struct Buffer {
    /// Where it is for the device.
    pub address: u64,
    /// How long it is.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A queue of `N` descriptors, a power of two. Its chains are all of the same length, so a chain's first descriptor is a
/// multiple of that and no list of free ones is needed: the user says which it takes.
pub struct Queue<const N: usize> {
    shared: &'static Shared<N>,
    /// Chains made available.
    next_available: u16,
    /// Chains made available when the device was told last.
    told: u16,
    /// Chains taken back.
    next_used: u16,
}

impl<const N: usize> Queue<N> {
    /// An empty one, in memory of `frame`; `None` if that is full.
    pub fn new(frame: &mut Frame) -> Option<Self> {
        let shared = frame.place(1, Shared::new)?.first()?;
        let queue = Self { shared, next_available: 0, told: 0, next_used: 0 };
        queue.silence();
        Some(queue)
    }

    /// Physical addresses of descriptor table, available ring and used ring.
    pub fn parts(&self, addresses: Addresses) -> (u64, u64, u64) {
        (
            addresses.physical(&raw const self.shared.table),
            addresses.physical(&raw const self.shared.available_flags),
            addresses.physical(&raw const self.shared.used_flags),
        )
    }

    /// Makes a chain available: `buffers`, in the descriptors from `head` on, which the device must not have.
    pub fn add(&mut self, head: u16, buffers: &[Buffer]) {
        let last = buffers.len().wrapping_sub(1);
        for ((index, buffer), at) in buffers.iter().enumerate().zip(head..) {
            let Some(descriptor) = self.shared.table.get(usize::from(at)) else { return };
            descriptor.address.store(buffer.address, Ordering::Relaxed);
            descriptor.len.store(buffer.len, Ordering::Relaxed);
            let next = if index == last { 0 } else { NEXT };
            descriptor.flags.store(next | if buffer.writable { WRITE } else { 0 }, Ordering::Relaxed);
            descriptor.next.store(at + 1, Ordering::Relaxed);
        }
        if let Some(slot) = self.shared.available.get(usize::from(self.next_available) % N) {
            slot.store(head, Ordering::Relaxed);
        }
        self.next_available = self.next_available.wrapping_add(1);
        self.shared.available_index.store(self.next_available, Ordering::Release);
    }

    /// Whether the device wants to be told of what was added since the last call.
    pub fn must_notify(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let event = self.shared.available_event.load(Ordering::Relaxed);
        let added = self.next_available.wrapping_sub(self.told);
        self.told = self.next_available;
        self.next_available.wrapping_sub(event).wrapping_sub(1) < added
    }

    /// A chain that the device is done with: its first descriptor, and how many bytes the device wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let chain = self.shared.used.get(usize::from(self.next_used) % N)?;
        self.next_used = self.next_used.wrapping_add(1);
        Some((chain.head.load(Ordering::Relaxed) as u16, chain.len.load(Ordering::Relaxed)))
    }

    /// Whether the device is done with a chain.
    pub fn has_used(&self) -> bool {
        self.shared.used_index.load(Ordering::Acquire) != self.next_used
    }

    /// Asks for an interrupt at the next chain that the device is done with. False if there is one already.
    pub fn listen(&self) -> bool {
        self.shared.used_event.store(self.next_used, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    /// Asks for no interrupt before another 32,768 chains.
    pub fn silence(&self) {
        self.shared.used_event.store(self.next_used.wrapping_sub(1), Ordering::Relaxed);
    }
}
