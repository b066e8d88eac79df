//! The bare machine, as the workload sees it.

use crate::protocol::{EXIT_PORT, Platform};
use crate::time::{self, Scale};
use crate::{lapic, port, serial};

/// One vCPU of this machine.
pub struct GuestPlatform {
    scale: Scale,
    last_ticks: u64,
    now_ns: u64,
}

impl GuestPlatform {
    /// Its clock starts at 0, now.
    pub fn new(scale: Scale) -> Self {
        Self { scale, last_ticks: time::ticks(), now_ns: 0 }
    }
}

impl Platform for GuestPlatform {
    fn now_ns(&mut self) -> u64 {
        let ticks = time::ticks();
        let passed = ticks.saturating_sub(self.last_ticks);
        self.last_ticks = ticks;
        self.now_ns = self.now_ns.saturating_add(self.scale.ns(passed));
        self.now_ns
    }

    fn print(&mut self, line: &[u8]) {
        serial::print(line);
    }

    fn idle_for(&mut self, ns: u64) {
        lapic::idle_for(ns.min(u64::from(u32::MAX)) as u32);
    }

    fn exit(&mut self, code: u8) -> ! {
        exit(code)
    }
}

/// Ends the machine; where no one listens at the exit port, stops this vCPU.
pub fn exit(code: u8) -> ! {
    port::write(EXIT_PORT, code);
    loop {
        lapic::idle_for(u32::MAX);
    }
}
