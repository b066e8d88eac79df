//! A console.

#![no_main]

use devices::virtio::driver::fuzz::{console::ConsoleSubject, run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut ConsoleSubject::default(), bytes));
