//! The witness in a real etcd of three members: what it promises while members die, hang, and lose answers.

/// By its name tests/run knows what to leave out where etcd is missing.
#[path = "etcd_server/mod.rs"]
mod etcd_server;
