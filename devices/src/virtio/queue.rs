//! A virtqueue as a device uses it: chains come out, used chains go back, and the driver is told when it wants to be.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, ChainError};
use super::{GuestRam, Interrupt};

/// Flag in the available ring: the driver wants no interrupts (virtio 1.2, 2.7.7).
const NO_INTERRUPT: u16 = 1;

/// Where a queue lies and how far it is worked off (virtio 1.2, 2.7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Descriptors, a power of two up to what the device offers.
    pub size: u16,
    /// Whether the driver has made it ready.
    pub ready: bool,
    /// Guest physical address of the descriptor table, a multiple of 16.
    pub table: u64,
    /// Guest physical address of the available ring, a multiple of 2.
    pub available: u64,
    /// Guest physical address of the used ring, a multiple of 4.
    pub used: u64,
    /// Chains taken from the available ring, modulo 65,536.
    pub next_available: u16,
    /// Chains put into the used ring, modulo 65,536.
    pub next_used: u16,
}

/// What a driver has done to a queue that no correct driver does.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// Size or addresses cannot be.
    #[error("a queue of {size} at {table:#x}, {available:#x} and {used:#x} cannot be", size = .0.size, table = .0.table, available = .0.available, used = .0.used)]
    Shape(RingState),
    /// Its index in the available ring is further on than the queue is long, or the ring cannot be read.
    #[error("the available ring's index cannot be")]
    Index,
    /// A chain.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A chain is said to be in flight in a queue that the driver has not set up.
    #[error("chain {0} of a queue that is not ready")]
    NotReady(u16),
    /// The used ring cannot be written.
    #[error("chain {0} cannot be put into the used ring")]
    Used(u16),
}

/// A queue that its driver has set up, or left alone: then it is empty for good.
pub struct VirtQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    interrupt: Interrupt,
    doorbell: Doorbell,
}

/// One of a device's doorbells.
#[derive(Clone)]
pub(super) struct Doorbell {
    pub(super) all: Arc<[EventFd]>,
    pub(super) index: usize,
}

impl VirtQueue {
    /// The queue that `ring` describes, of at most `max` descriptors.
    ///
    /// # Errors
    /// [`QueueError::Shape`] unless size and addresses are sound and the three parts lie in guest memory, apart.
    pub(super) fn new(
        ring: &RingState,
        max: u16,
        event_idx: bool,
        ram: &Arc<GuestRam>,
        interrupt: &Interrupt,
        doorbell: Doorbell,
    ) -> Result<Self, QueueError> {
        let shape = QueueError::Shape(*ring);
        let mut queue = Queue::new(max).map_err(|_| shape)?;
        if ring.ready {
            queue.try_set_size(ring.size).map_err(|_| shape)?;
            queue.try_set_desc_table_address(GuestAddress(ring.table)).map_err(|_| shape)?;
            queue.try_set_avail_ring_address(GuestAddress(ring.available)).map_err(|_| shape)?;
            queue.try_set_used_ring_address(GuestAddress(ring.used)).map_err(|_| shape)?;
            queue.set_next_avail(ring.next_available);
            queue.set_next_used(ring.next_used);
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            if !parts_are_sound(ring, ram) {
                return Err(shape);
            }
        }
        Ok(Self { queue, ram: Arc::clone(ram), interrupt: interrupt.clone(), doorbell })
    }

    /// The next chain that the driver has made available.
    ///
    /// # Errors
    /// [`QueueError`]: the device needs a reset.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let head = self.queue.iter(&*self.ram).map_err(|_| QueueError::Index)?.next();
        let Some(head) = head.map(|chain| chain.head_index()) else { return Ok(None) };
        Ok(Some(self.chain(head)?))
    }

    /// Puts the chain that was popped last back: it is popped again next.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// The chain that begins at descriptor `head`, once more: one that was in flight when its device was saved.
    ///
    /// # Errors
    /// [`QueueError::Chain`], [`QueueError::NotReady`]
    pub fn chain(&self, head: u16) -> Result<Chain, QueueError> {
        if !self.queue.ready() {
            return Err(QueueError::NotReady(head));
        }
        Ok(Chain::walk(&self.ram, GuestAddress(self.queue.desc_table()), self.queue.size(), head)?)
    }

    /// Gives the chain of `head` back to the driver with `written` bytes in its writable buffers. The driver hears of it
    /// at the next [`notify`](Self::notify).
    ///
    /// # Errors
    /// [`QueueError::Used`], [`QueueError::NotReady`]
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Err(QueueError::NotReady(head));
        }
        self.queue.add_used(&*self.ram, head, written).map_err(|_| QueueError::Used(head))
    }

    /// Raises the interrupt if the driver wants to hear of what was completed since the last call.
    ///
    /// # Errors
    /// [`QueueError::Index`] if the ring cannot be read.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.ram).map_err(|_| QueueError::Index)?
        } else {
            let flags: u16 = self
                .ram
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)
                .map_err(|_| QueueError::Index)?;
            u16::from_le(flags) & NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the driver to ring no doorbell for what it makes available. It may ring all the same.
    ///
    /// # Errors
    /// [`QueueError::Index`] if the ring cannot be written.
    pub fn silence(&mut self) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue.disable_notification(&*self.ram).map_err(|_| QueueError::Index)
    }

    /// Asks the driver to ring the doorbell for what it makes available from now on, and says whether there is something
    /// already.
    ///
    /// # Errors
    /// [`QueueError::Index`] if the ring cannot be written.
    pub fn listen(&mut self) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.queue.enable_notification(&*self.ram).map_err(|_| QueueError::Index)
    }

    /// Rings the queue's own doorbell: the device is called again for it, after others have had their turn. For a device
    /// that has done enough for now: a guest may add requests as fast as they are served.
    pub fn come_back(&self) {
        if let Some(doorbell) = self.doorbell.all.get(self.doorbell.index) {
            // It fails only if the counter is full: then the device is being called as it is.
            let _ = doorbell.write(1);
        }
    }

    /// The device's interrupt, for what is not about a queue.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Descriptors; also the most chains that can be in flight.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Where it lies and how far it is worked off.
    pub fn state(&self) -> RingState {
        RingState {
            size: self.queue.size(),
            ready: self.queue.ready(),
            table: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }
}

/// Whether the three parts lie in guest memory and not over each other.
fn parts_are_sound(ring: &RingState, ram: &GuestRam) -> bool {
    let size = u64::from(ring.size);
    // With the event fields at their ends, which are there whether or not they are used (virtio 1.2, 2.7).
    let mut parts = [(ring.table, 16 * size), (ring.available, 6 + 2 * size), (ring.used, 6 + 8 * size)];
    parts.sort_unstable();
    let inside = parts.iter().all(|&(start, len)| {
        start.checked_add(len).is_some() && ram.check_range(GuestAddress(start), len as usize)
    });
    inside && parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
}
