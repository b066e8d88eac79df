//! A source of random numbers.

#![no_main]

use devices::virtio::driver::fuzz::{rng::RngSubject, run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut RngSubject { limited: true }, bytes));
