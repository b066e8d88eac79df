//! The machine of a standby: created early, so that taking over is no more than setting state and running.

use std::fs;
use std::sync::Arc;
use std::time::Instant;

use devices::virtio::block::fence::FenceError;
use mirror::console::Console;
use mirror::dirty::DirtySet;
use mirror::guest::{FenceOut, GuestError, LogKept, StandbyMachine};
use mirror::ids::Epoch;
use mirror::ids::Guid;
use mirror::memory::{GuestRam, Layout};
use thiserror::Error;

use crate::config::{HostResources, UnknownDevice};
use crate::host::Host;
use crate::machine::{CreateError, Machine, MachineError};
use crate::memory::KeptMemory;
use crate::state::{self, MachineState, StateError};

/// Where the kernel tells how much memory there is.
const MEMINFO: &str = "/proc/meminfo";

/// Why a standby cannot hold or run a machine.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// The description or state cannot be decoded.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine cannot be created.
    #[error("creating the standby's machine: {0}")]
    Create(#[from] CreateError),
    /// The machine cannot be restored.
    #[error("restoring the standby's machine: {0}")]
    Restore(#[from] MachineError),
    /// The memory that was announced is not that of the machine described.
    #[error(
        "the layout announced ({announced:?}) is not that of a machine of {mib} MiB ({expected:?}): both sides must run the same version"
    )]
    Layout {
        /// What the primary announced.
        announced: Layout,
        /// What this program would lay out.
        expected: Layout,
        /// Size described.
        mib: u32,
    },
    /// This standby was told where to find a device that the guest has not.
    #[error("this standby's options: {0}")]
    Unknown(#[from] UnknownDevice),
    /// The guest has seen features that this host has not.
    #[error(
        "this host cannot run the guest: its processor or KVM lacks {}; start the guest without them, or take another standby",
        .0.join(", ")
    )]
    Processor(Vec<String>),
    /// What would keep the primary from writing to a shared disk late.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// There is a machine already.
    #[error("the standby holds a machine already")]
    Taken,
    /// There is no machine.
    #[error("the standby holds no machine")]
    Empty,
}

/// Holds a machine for a primary elsewhere.
pub struct StandbyHost {
    host: Option<Host>,
    console: Arc<Console>,
    machine: Option<Machine>,
    resources: HostResources,
    /// The guest of the machine.
    guid: Guid,
    /// What the memory of a guest held that was here last.
    kept: Option<(Guid, KeptMemory)>,
    /// The machine's memory is as this guest left it here.
    reused: bool,
}

impl StandbyHost {
    /// A standby whose guest, should it ever run, writes to `console`.
    pub fn new(console: Arc<Console>) -> Self {
        Self {
            host: None,
            console,
            machine: None,
            resources: HostResources::default(),
            guid: Guid::nil(),
            kept: None,
            reused: false,
        }
    }

    /// As [`Self::new`], on the KVM of `host`.
    pub fn on(host: Host, console: Arc<Console>) -> Self {
        Self { host: Some(host), ..Self::new(console) }
    }

    /// Finds devices of the guest where `resources` says instead of where they are at the primary.
    #[must_use]
    pub fn with_resources(self, resources: HostResources) -> Self {
        Self { resources, ..self }
    }

    /// The machine that is held.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.as_mut()
    }

    /// Takes the machine out, once it runs here: from then on it is no standby's.
    pub fn take_machine(&mut self) -> Option<Machine> {
        self.machine.take()
    }

    /// The guest `guid`, whose `machine` ran here, has gone to another side. Its memory is kept: should it come back, only
    /// what differs need be sent.
    pub fn remember(&mut self, guid: Guid, machine: Machine) {
        self.kept = machine.into_memory().map(|memory| (guid, memory));
    }

    /// As [`StandbyMachine::activate`], but the guest does not run.
    ///
    /// # Errors
    /// [`StandbyError`]
    pub fn restore(&mut self, state: &[u8]) -> Result<(), StandbyError> {
        let machine = self.machine.as_mut().ok_or(StandbyError::Empty)?;
        machine.restore(&MachineState::decode(state)?)?;
        Ok(())
    }

    fn create(
        &mut self,
        guid: Guid,
        description: &[u8],
        layout: &Layout,
    ) -> Result<Arc<GuestRam>, StandbyError> {
        if self.machine.is_some() {
            return Err(StandbyError::Taken);
        }
        // Another guest must not see it, and there may be no room for both.
        let kept = self.kept.take().filter(|(theirs, memory)| *theirs == guid && memory.layout() == layout);
        let (mut config, processor) = state::read_description(description)?;
        config.devices.relocate(&self.resources)?;
        let mib = config.mem_size_mib;
        let expected = crate::memory::layout(mib).map_err(CreateError::Layout)?;
        if expected != *layout {
            return Err(StandbyError::Layout { announced: layout.clone(), expected, mib });
        }
        let host = match &mut self.host {
            Some(host) => host,
            none => none.insert(Host::open().map_err(CreateError::Host)?),
        };
        let console = Arc::clone(&self.console);
        let kept = kept.map(|(_, memory)| memory).filter(|memory| memory.huge() == config.huge_pages);
        self.reused = kept.is_some();
        self.guid = guid;
        let machine = match kept {
            Some(memory) => Machine::create_with(host, &config, console, memory)?,
            None => Machine::create_on(host, &config, console)?,
        };
        let missing = processor.missing_in(&machine.processor());
        if !missing.is_empty() {
            return Err(StandbyError::Processor(missing));
        }
        machine.fences().check()?;
        let ram = Arc::clone(mirror::guest::Guest::ram(&machine));
        self.machine = Some(machine);
        Ok(ram)
    }
}

impl StandbyMachine for StandbyHost {
    /// What the kernel thinks can be had without swapping, and what is only kept for a guest that may come back.
    fn space(&self) -> u64 {
        let text = fs::read_to_string(MEMINFO).unwrap_or_default();
        available(&text) + self.kept.as_ref().map_or(0, |(_, memory)| memory.layout().bytes())
    }

    fn allocate(
        &mut self,
        guid: Guid,
        description: &[u8],
        layout: &Layout,
    ) -> Result<Arc<GuestRam>, GuestError> {
        Ok(self.create(guid, description, layout)?)
    }

    fn held(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        match &self.machine {
            Some(machine) if self.reused => Ok(machine.populated_pages(into)?),
            _ => Ok(()),
        }
    }

    fn disks(&mut self) -> Vec<u8> {
        self.machine.as_ref().map(Machine::answer_about_disks).unwrap_or_default()
    }

    fn keep_log(&mut self, epoch: Epoch, log: Vec<u8>, kept: LogKept) -> Result<(), GuestError> {
        let machine = self.machine.as_ref().ok_or(StandbyError::Empty)?;
        Ok(machine.keep_disk_log(epoch, log, kept)?)
    }

    fn prepare(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let machine = self.machine.as_ref().ok_or(StandbyError::Empty)?;
        machine.check_disks()?;
        Ok(self.restore(state)?)
    }

    fn fence_out(&mut self, handed_over: bool) -> Option<FenceOut> {
        let fences = self.machine.as_ref()?.fences();
        if fences.is_empty() {
            return None;
        }
        let (fences, since) = (Arc::clone(fences), Instant::now());
        Some(Box::new(move |tell| Ok(fences.take_over(since, handed_over, tell)?)))
    }

    fn activate(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let machine = self.machine.as_ref().ok_or(StandbyError::Empty)?;
        machine.take_over_disks()?;
        self.restore(state)?;
        if let Some(machine) = &mut self.machine {
            machine.start();
        }
        Ok(())
    }

    fn release(&mut self) {
        if let Some(machine) = self.machine.take() {
            self.remember(self.guid, machine);
        }
    }
}

/// `MemAvailable` of `meminfo` in bytes; nothing if it is not there.
fn available(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .map_or(0, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_what_the_kernel_says_is_available() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    2048 kB\n"), 2 << 20);
        assert_eq!(available("rubbish"), 0);
    }
}
