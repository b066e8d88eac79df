//! A disk on a qcow2 image; needs qemu-img.

#![no_main]

use devices::virtio::driver::fuzz::{block::BlockSubject, run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut BlockSubject::qcow2(), bytes));
