//! What stands behind the `understudy` command: configuration, running a primary or a standby, the API, the demo.

pub mod attach;
pub mod cli;
pub mod client;
pub mod config;
pub mod demo;
pub mod events;
pub mod exit;
pub mod flags;
pub mod guest;
mod guest_run;
pub mod log;
mod long;
pub mod metrics;
pub mod pages;
pub mod process;
pub mod progress;
pub mod run;
pub mod server;
mod sink;
pub mod snapshot;
mod stage;
pub mod standby;
pub mod status;
pub mod switchover;
pub mod top;
mod waiting;
