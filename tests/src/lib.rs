//! What whole-system tests, drills and benchmarks share.

pub mod pair;
pub mod process;
