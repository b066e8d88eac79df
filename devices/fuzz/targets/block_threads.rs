//! A disk on a raw image, served by threads.

#![no_main]

use devices::virtio::block::EngineKind;
use devices::virtio::driver::fuzz::{block::BlockSubject, run};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut BlockSubject::raw(EngineKind::Threads), bytes));
