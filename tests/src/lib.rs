//! What whole-system tests, drills and benchmarks share.

pub mod http;
pub mod pair;
pub mod process;
