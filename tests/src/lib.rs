//! What whole-system tests, drills and benchmarks share.

pub mod client;
pub mod http;
pub mod lan;
pub mod pair;
pub mod process;
