//! Virtio devices (virtio 1.2) behind memory-mapped registers.
//!
//! [`transport`] is what the guest's driver sees, [`slot`] holds a device with its queues, [`queue`] and [`chain`] check
//! everything that the guest says of its memory, and [`held`] is the rule by which no effect is seen outside before the
//! epoch that knows of it is committed. A device implements [`VirtioDevice`] and nothing else.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod counters;
pub mod device;
pub mod held;
pub mod interrupt;
pub mod iovec;
mod listener;
pub mod net;
pub mod queue;
pub mod rng;
pub mod slot;
pub mod state;
pub mod transport;
pub mod vsock;

#[cfg(any(test, feature = "driver"))]
pub mod driver;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory, with the bitmap that notes what devices write to it.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

pub use chain::{Buffer, Chain, ChainError};
pub use counters::DeviceCounters;
pub use device::{DeviceError, DeviceType, Source, VirtioDevice};
pub use held::{Held, OutputPolicy};
pub use interrupt::Interrupt;
pub use iovec::IoVecs;
pub use queue::{QueueError, VirtQueue};
pub use slot::{RestoreError, VirtioSlot};
pub use state::{DeviceState, TransportState, VirtioState};
pub use transport::VirtioMmio;
