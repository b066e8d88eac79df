//! The machine of a standby: created early, so that taking over is no more than setting state and running.

use std::fs;
use std::sync::Arc;

use mirror::console::Console;
use mirror::guest::{GuestError, StandbyMachine};
use mirror::memory::{GuestRam, Layout};
use thiserror::Error;

use crate::config::{HostResources, UnknownDevice};
use crate::exit::ExitHandle;
use crate::host::Host;
use crate::machine::{CreateError, Machine, MachineError};
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
    exit: ExitHandle,
    machine: Option<Machine>,
    resources: HostResources,
}

impl StandbyHost {
    /// A standby whose guest, should it ever run, writes to `console`.
    pub fn new(console: Arc<Console>) -> Self {
        Self {
            host: None,
            console,
            exit: ExitHandle::default(),
            machine: None,
            resources: HostResources::default(),
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

    /// Tells when and how the guest's run ends here.
    pub fn exit_handle(&self) -> ExitHandle {
        self.exit.clone()
    }

    /// The machine that is held.
    pub fn machine(&mut self) -> Option<&mut Machine> {
        self.machine.as_mut()
    }

    /// Takes the machine out, for instance to mirror it to another standby once it runs here.
    pub fn into_machine(self) -> Option<Machine> {
        self.machine
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

    fn create(&mut self, description: &[u8], layout: &Layout) -> Result<Arc<GuestRam>, StandbyError> {
        if self.machine.is_some() {
            return Err(StandbyError::Taken);
        }
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
        let machine = Machine::create_with_exit(host, &config, Arc::clone(&self.console), self.exit.clone())?;
        let missing = processor.missing_in(&machine.processor());
        if !missing.is_empty() {
            return Err(StandbyError::Processor(missing));
        }
        let ram = Arc::clone(mirror::guest::Guest::ram(&machine));
        self.machine = Some(machine);
        Ok(ram)
    }
}

impl StandbyMachine for StandbyHost {
    /// What the kernel thinks can be had without swapping.
    fn space(&self) -> u64 {
        let text = fs::read_to_string(MEMINFO).unwrap_or_default();
        available(&text)
    }

    fn allocate(&mut self, description: &[u8], layout: &Layout) -> Result<Arc<GuestRam>, GuestError> {
        Ok(self.create(description, layout)?)
    }

    fn prepare(&mut self, state: &[u8]) -> Result<(), GuestError> {
        Ok(self.restore(state)?)
    }

    fn activate(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.restore(state)?;
        if let Some(machine) = &mut self.machine {
            machine.start();
        }
        Ok(())
    }

    fn release(&mut self) {
        self.machine = None;
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
