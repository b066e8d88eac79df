//! Threads, sockets and clocks around the state machines.
//!
//! A primary has a driver thread, which owns the guest, and for each standby one that reads, one for heartbeats, one for the
//! second link if there is one, and one for each seeding round. A standby has a thread that accepts links at each of its
//! addresses, one for each link, and one that ticks.

use std::sync::Arc;

use crate::report::Report;

pub mod metrics;
mod outlets;
mod pause;
pub mod primary;
mod pulse;
mod second_link;
mod seeding;
pub mod standby;
mod write_log;

/// Is told what happens; never called inside a pause.
pub type Watcher = Arc<dyn Fn(Report) + Send + Sync>;
