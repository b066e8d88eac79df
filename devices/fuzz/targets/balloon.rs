//! A memory balloon.

#![no_main]

use devices::virtio::driver::fuzz::{balloon::BalloonSubject, run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut BalloonSubject::default(), bytes));
