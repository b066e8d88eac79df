//! Threads, sockets and clocks around the state machines.
//!
//! A primary has a driver thread, which owns the guest, and a reader thread. A standby has a thread that accepts
//! links, one for each link, and one that ticks.

use std::sync::Arc;

use crate::report::Report;

pub mod metrics;
mod pause;
pub mod primary;
mod seeding;
pub mod standby;

/// Is told what happens; never called inside a pause.
pub type Watcher = Arc<dyn Fn(Report) + Send + Sync>;
