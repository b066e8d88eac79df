//! The mirror subsystem: keeps a standby's copy of a guest one committed epoch behind the primary.
//!
//! It knows guest memory as numbered pages and everything else as opaque state; nothing of KVM.

pub mod console;
pub mod dirty;
pub mod guest;
pub mod memory;
