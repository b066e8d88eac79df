//! A virtio disk (virtio 1.2, 5.2), in blocks of 4 KiB, many requests at a time.

use super::queue::Buffer;
use super::{Queue, Window};
use crate::memory::{Addresses, Frame};
use crate::protocol::BLOCK_BYTES;

/// In the numbers of virtio 1.2, section 5.
pub const KIND: u32 = 2;

const FLUSH: u64 = 1 << 9;
const DESCRIPTORS: usize = 64;
/// Header, data, status.
const CHAIN: usize = 3;
/// Requests that can be under way.
pub const SLOTS: usize = DESCRIPTORS / (CHAIN + 1);
const SECTOR_BYTES: u64 = 512;

/// What a disk is asked to do.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Operation {
    /// Read the block into the slot's data.
    Read = 0,
    /// Write the slot's data to the block.
    Write = 1,
    /// Make sure that what was written stays.
    Flush = 4,
}

/// How it went.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Done,
    /// The disk says that it did not.
    Failed,
}

/// A request that has come to its end.
pub struct Done {
    /// Where it was.
    pub slot: usize,
    /// How it went.
    pub outcome: Outcome,
}

#[repr(C, align(4096))]
struct Slot {
    data: [u8; BLOCK_BYTES],
    operation: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

/// A disk at work.
pub struct Disk {
    window: Window,
    addresses: Addresses,
    queue: Queue<DESCRIPTORS>,
    slots: *mut Slot,
    blocks: u64,
    has_cache: bool,
}

impl Disk {
    /// The disk behind `window`. `None` if it refuses, or `frame` is full.
    pub fn new(window: Window, frame: &mut Frame) -> Option<Self> {
        let features = window.negotiate(0, FLUSH)?;
        let addresses = frame.addresses();
        let queue = Queue::new(frame)?;
        if !window.set_up(0, &queue, addresses) {
            return None;
        }
        let empty = || Slot { data: [0; BLOCK_BYTES], operation: 0, reserved: 0, sector: 0, status: 0 };
        let slots = frame.place(SLOTS, empty)?.as_mut_ptr();
        let sectors = u64::from_le_bytes(core::array::from_fn(|index| window.read_config(index)));
        window.begin();
        let blocks = sectors / (BLOCK_BYTES as u64 / SECTOR_BYTES);
        Some(Self { window, addresses, queue, slots, blocks, has_cache: features & FLUSH != 0 })
    }

    /// Blocks that it has.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether what was written needs a flush to stay.
    pub fn has_cache(&self) -> bool {
        self.has_cache
    }

    /// The data of a slot, below [`SLOTS`], in which no request is under way.
    pub fn data(&mut self, slot: usize) -> &mut [u8; BLOCK_BYTES] {
        // SAFETY: one of our slots, and by the contract of `begin` the device does not have it.
        unsafe { &mut (*self.slots.wrapping_add(slot % SLOTS)).data }
    }

    /// Begins a request in a slot, in which none must be under way.
    pub fn begin(&mut self, slot: usize, operation: Operation, block: u64) {
        let slot = slot % SLOTS;
        let at = self.slots.wrapping_add(slot);
        // SAFETY: one of our slots, which the device does not have, by the contract.
        let (header, data, status) = unsafe {
            (*at).operation = operation as u32;
            (*at).reserved = 0;
            (*at).sector =
                if operation == Operation::Flush { 0 } else { block * (BLOCK_BYTES as u64 / SECTOR_BYTES) };
            (*at).status = 0xff;
            (&raw const (*at).operation, &raw const (*at).data, &raw const (*at).status)
        };
        let buffer = |address, len, writable| Buffer { address, len, writable };
        let header = buffer(self.addresses.physical(header), 16, false);
        let data = buffer(self.addresses.physical(data), BLOCK_BYTES as u32, operation == Operation::Read);
        let status = buffer(self.addresses.physical(status), 1, true);
        let head = (slot * (CHAIN + 1)) as u16;
        if operation == Operation::Flush {
            self.queue.add(head, &[header, status]);
        } else {
            self.queue.add(head, &[header, data, status]);
        }
    }

    /// Tells the device of what was begun.
    pub fn notify(&mut self) {
        if self.queue.must_notify() {
            self.window.notify(0);
        }
    }

    /// A request that has come to its end.
    pub fn take_done(&mut self) -> Option<Done> {
        let (head, _) = self.queue.take_used()?;
        let slot = usize::from(head) / (CHAIN + 1) % SLOTS;
        // SAFETY: one of our slots, which the device has given back.
        let status = unsafe { (&raw const (*self.slots.wrapping_add(slot)).status).read_volatile() };
        Some(Done { slot, outcome: if status == 0 { Outcome::Done } else { Outcome::Failed } })
    }

    /// Asks for an interrupt when a request comes to its end. False if one has already.
    pub fn listen(&self) -> bool {
        self.queue.listen()
    }

    /// Asks for no interrupts.
    pub fn silence(&self) {
        self.queue.silence();
    }
}
