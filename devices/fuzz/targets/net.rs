//! A network card; needs /dev/net/tun and the right to make a network namespace.

#![no_main]

use std::sync::{LazyLock, Mutex};

use devices::virtio::driver::fuzz::{net::NetSubject, run};
use devices::virtio::driver::tap::leave;

/// One tap for all cases: it takes the kernel long to remove one.
static SUBJECT: LazyLock<Mutex<NetSubject>> = LazyLock::new(|| {
    leave();
    Mutex::new(NetSubject::new())
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| run(&mut *SUBJECT.lock().unwrap(), bytes));
