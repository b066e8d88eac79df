//! The bare machine, as the workload sees it.

use crate::protocol::{EXIT_PORT, Platform};
use crate::service::Service;
use crate::time::{self, Scale};
use crate::{lapic, port, serial};

/// One vCPU of this machine.
pub struct GuestPlatform {
    scale: Scale,
    last_ticks: u64,
    now_ns: u64,
    service: Option<&'static mut Service>,
}

impl GuestPlatform {
    /// Its clock starts at 0, now.
    pub fn new(scale: Scale) -> Self {
        Self { scale, last_ticks: time::ticks(), now_ns: 0, service: None }
    }

    /// The same, with a service to tend. For vCPU 0.
    pub fn with(self, service: Option<&'static mut Service>) -> Self {
        Self { service, ..self }
    }

    fn serve_for(&mut self, ns: u64) -> bool {
        let Some(service) = self.service.take() else { return false };
        service.serve_for(ns, || self.now_ns());
        self.service = Some(service);
        true
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
        if !self.serve_for(ns) {
            lapic::idle_for(ns.min(u64::from(u32::MAX)) as u32);
        }
    }

    fn tend(&mut self) {
        self.serve_for(0);
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
