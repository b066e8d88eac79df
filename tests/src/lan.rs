//! A network of a test's own: a bridge with an address, and taps on it for guests.

use std::process::Command;
use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The bridge's address, which is the outside's: `10.9.0.1/24`.
pub const OUTSIDE: &str = "10.9.0.1/24";
/// An address for a guest, with its prefix.
pub const GUEST: &str = "10.9.0.2/24";

/// The network of the thread that [`alone`] runs.
pub struct Lan(());

/// Runs `test` in a thread of its own, in a network namespace of its own. Threads and processes that it starts are in it
/// too; it is gone with the last of them.
///
/// # Panics
/// As `test` does, and if the namespace or the bridge cannot be made: only root can.
pub fn alone<T: Send>(test: impl FnOnce(&Lan) -> T + Send) -> T {
    let run = || {
        // SAFETY: no file descriptor changes, only this thread's view of the network, and it ends with the test.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace");
        // Else the kernel has things of its own to say on each new interface.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("a setting");
        ip("link set lo up");
        ip("link add lan type bridge forward_delay 0");
        ip(&format!("address add {OUTSIDE} dev lan"));
        ip("link set lan up");
        test(&Lan(()))
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

impl Lan {
    /// Makes a tap on the bridge.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_tap(&self, name: &str) {
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        ip(&format!("link set {name} master lan up"));
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip (iproute2) is there");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}
