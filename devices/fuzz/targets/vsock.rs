//! A socket device.

#![no_main]

use devices::virtio::driver::fuzz::{run, vsock::VsockSubject};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut VsockSubject::default(), bytes));
