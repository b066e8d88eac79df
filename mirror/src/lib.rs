//! The mirror subsystem: keeps a standby's copy of a guest one committed epoch behind the primary.
//!
//! It knows guest memory as numbered pages and everything else as opaque state; nothing of KVM. Its heart is a pair
//! of state machines, [`primary`] and [`standby`], without I/O and without a clock; [`shell`] drives them with
//! threads and sockets. The way of the data: guest page ([`memory`]) -> dirty set ([`dirty`]) -> staging
//! ([`staging`]) -> encoder ([`wire::pages`]) -> stream ([`link`]) -> standby ([`standby::inbox`]) -> commit.

pub mod console;
pub mod digest;
pub mod dirty;
pub mod figures;
pub mod guest;
pub mod ids;
pub mod link;
pub mod memory;
pub mod primary;
pub mod report;
pub mod resync;
pub mod shell;
pub mod staging;
pub mod standby;
pub mod wire;
pub mod witness;
