//! The devices of a virtual machine, and the bus that finds them. Each keeps its state saved and restored beside it.
//!
//! A device knows nothing of KVM: it is told of reads and writes by [`Bus`], and raises its interrupt through a
//! [`vm_superio::Trigger`] that it is given.

pub mod bus;
pub mod exit_port;
pub mod i8042;
pub mod metadata;
pub mod power_switch;
pub mod rate_limiter;
pub mod serial;
pub mod timer;
pub mod virtio;

pub use bus::{Bus, BusDevice, BusError};
pub use exit_port::ExitPort;
pub use i8042::{I8042, I8042State};
pub use serial::{Serial, SerialError, SerialState};
