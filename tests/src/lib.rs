//! What whole-system tests, drills and benchmarks share.

pub mod client;
pub mod counting;
pub mod etcd;
pub mod http;
pub mod lan;
pub mod pair;
pub mod process;
pub mod tracer;
