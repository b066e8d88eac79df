//! What ships inside Understudy besides its own code: the embedded guest and the words it speaks.
//!
//! The guest is described in this crate's README.

#[path = "../guest/src/protocol.rs"]
pub mod protocol;

/// The embedded guest: a static PVH ELF for x86-64. It needs 8 MiB of memory and a serial port at 0x3f8, and writes its
/// exit code to [`protocol::EXIT_PORT`]. Its command line is read by [`protocol::Params::parse`].
pub const GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
