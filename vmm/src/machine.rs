//! A machine: it is created, loaded or restored, runs, pauses, tells its dirty pages and its state.

mod create;
mod disks;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::SerialError;
use devices::i8042::I8042RestoreError;
use devices::metadata::Metadata;
use devices::virtio::block::replica::{KeepError, ReplicaError};
use devices::virtio::{OutputPolicy, RestoreError};
use kvm_ioctls::VmFd;
use mirror::dirty::DirtySet;
use mirror::guest::{DiskSync, Guest, GuestError};
use mirror::ids::LinkId;
use mirror::memory::{GuestRam, Layout};
use thiserror::Error;

use crate::boot::{self, Boot, BootError};
use crate::config::{DevicesConfig, MachineConfig};
use crate::crew::{CrewError, Order};
use crate::dirty::{self, DirtyError, Tracker};
use crate::exit::{Exit, ExitHandle};
use crate::memory::{KeptMemory, Memory, MemoryError, Slots};
use crate::msrs::{self, MsrError};
use crate::platform::{DevicesCapture, MmioWindow, VirtioDevices};
use crate::processor::Processor;
use crate::snapshot::pager::{MemoryFill, MemoryLost, NotWhole, Pager};
use crate::snapshot::take::SnapshotTracking;
use crate::state::{self, MachineState, StateError};
use crate::update::DeviceLimits;
use crate::vcpu::{Shared, lock};
use crate::vcpu_state::VcpuStateError;
use crate::vm_state::{self, VmCapture, VmStateError};

pub use create::CreateError;

/// Why a machine cannot do what it is asked.
#[derive(Debug, Error)]
pub enum MachineError {
    /// A vCPU thread is gone.
    #[error(transparent)]
    Crew(#[from] CrewError),
    /// The state of a vCPU.
    #[error("vCPU {index}: {cause}")]
    Vcpu {
        /// Which.
        index: usize,
        /// What of it.
        cause: VcpuStateError,
    },
    /// The state of the VM.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// The serial port.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The keyboard.
    #[error(transparent)]
    Keyboard(#[from] I8042RestoreError),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] RestoreError),
    /// Dirty tracking.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// Memory slots.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The encoded form of a state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Registers of the first vCPU at boot.
    #[error("setting the registers of the first vCPU: {0}")]
    BootRegisters(kvm_ioctls::Error),
    /// Model-specific registers at boot.
    #[error(transparent)]
    BootMsrs(#[from] MsrError),
    /// The guest runs.
    #[error("the guest must be paused to {0}")]
    Running(&'static str),
    /// Nothing was captured.
    #[error("no state was captured that could be encoded")]
    NotCaptured,
    /// Memory.
    #[error(transparent)]
    Lost(#[from] MemoryLost),
    /// A replicated disk.
    #[error(transparent)]
    Disk(#[from] ReplicaError),
    /// What was kept of the disks.
    #[error(transparent)]
    Disks(#[from] KeepError),
    /// The state is that of another machine.
    #[error("the state has {state} {what} and the machine {machine}")]
    Count {
        /// Of what.
        what: &'static str,
        /// In the state.
        state: usize,
        /// Here.
        machine: usize,
    },
}

/// How long the phases of the last pause took.
#[derive(Clone, Copy, Debug, Default)]
pub struct PausePhases {
    /// From the order to pause until all vCPUs stood still.
    pub kick: Duration,
    /// Harvesting the dirty pages (the last harvest, inside a pause or not).
    pub harvest: Duration,
    /// Capturing the state, as far as it had to be waited for.
    pub capture: Duration,
    /// The order to run again.
    pub resume: Duration,
}

/// A virtual machine.
pub struct Machine {
    config: MachineConfig,
    memory: Memory,
    slots: Slots,
    tracker: Box<dyn Tracker>,
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    vm_capture: VmCapture,
    devices_capture: DevicesCapture,
    /// Whether the run had ended when the state was captured; `None` before the first capture.
    ended_at_capture: Option<bool>,
    /// Whether pauses capture the state on their own: a pause while mirroring always wants it.
    tracking: bool,
    /// Pages for the next snapshot.
    pub(crate) snapshots: SnapshotTracking,
    phases: PausePhases,
}

/// Gives a guest input on its serial port. Clones feed the same port.
#[derive(Clone)]
pub struct SerialInput(Arc<Shared>);

impl SerialInput {
    /// Takes as many of `bytes` as there is room for, and says how many.
    ///
    /// # Errors
    /// [`SerialError`] if the guest cannot be told of them.
    pub fn send(&self, bytes: &[u8]) -> Result<usize, SerialError> {
        self.0.platform.serial().input(bytes)
    }
}

impl Machine {
    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Where the guest finds its virtio devices, in the order of the configuration.
    pub fn virtio_windows(&self) -> Vec<MmioWindow> {
        self.shared.platform.virtio.windows()
    }

    /// Where its memory lies.
    pub fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    /// Loads a kernel. Before the first start.
    ///
    /// # Errors
    /// [`MachineError::Boot`] for whatever is wrong with the kernel; memory then holds part of it.
    pub fn load(&mut self, boot: &Boot) -> Result<(), MachineError> {
        self.check_paused("load a kernel")?;
        self.check_disks()?;
        let windows = self.virtio_windows();
        let hardware = (self.config.vcpu_count, &windows[..]);
        let first = lock(&self.shared.vcpus[0].fd);
        let reset = first.get_sregs().map_err(MachineError::BootRegisters)?;
        let entry = boot::load(boot, self.memory.ram(), self.memory.layout(), hardware, &reset)?;
        first.set_sregs(&entry.sregs).map_err(MachineError::BootRegisters)?;
        first.set_regs(&entry.regs).map_err(MachineError::BootRegisters)?;
        drop(first);
        for vcpu in &self.shared.vcpus {
            msrs::set_boot_values(&lock(&vcpu.fd))?;
        }
        Ok(())
    }

    /// What of the processor its guest counts on.
    pub fn processor(&self) -> Processor {
        lock(&self.shared.vcpus[0].capture).processor()
    }

    /// Runs the guest.
    pub fn start(&mut self) {
        self.run();
    }

    /// Gives the guest input on its serial port, as much as there is room for, and says how much that was.
    ///
    /// # Errors
    /// [`SerialError`] if the guest cannot be told of it.
    pub fn serial_input(&self, bytes: &[u8]) -> Result<usize, SerialError> {
        self.shared.platform.serial().input(bytes)
    }

    /// The guest's serial input, for a thread of its own.
    pub fn serial(&self) -> SerialInput {
        SerialInput(Arc::clone(&self.shared))
    }

    /// The limits on its devices, for whoever may change them.
    pub fn device_limits(&self) -> DeviceLimits {
        DeviceLimits::new(&self.shared, &self.config.devices)
    }

    /// What its guest can read of the metadata service, also while the machine belongs to somebody else.
    pub fn metadata(&self) -> Metadata {
        self.shared.platform.metadata.clone()
    }

    pub(crate) fn devices_to_change(&mut self) -> (&mut DevicesConfig, &VirtioDevices) {
        (&mut self.config.devices, &self.shared.platform.virtio)
    }

    /// Ends the machine; what its memory holds is kept, if it can be.
    pub fn into_memory(self) -> Option<KeptMemory> {
        self.memory.keep(self.config.huge_pages)
    }

    /// Tells when and how the guest's run ends, also while the machine belongs to somebody else.
    pub fn exit_handle(&self) -> ExitHandle {
        self.shared.exit.clone()
    }

    /// Waits until the guest's run ends.
    pub fn wait(&self) -> Exit {
        self.shared.exit.wait()
    }

    /// How long the phases of the last pause took.
    pub fn last_pause(&self) -> PausePhases {
        self.phases
    }

    /// Captures the state of the paused machine and returns it.
    ///
    /// # Errors
    /// [`MachineError`]
    pub fn save(&mut self) -> Result<MachineState, MachineError> {
        self.capture_state()?;
        self.captured()
    }

    /// Gives the machine, which has not run, the state `state`.
    ///
    /// # Errors
    /// What of the state cannot be restored; the machine must then not be run.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        self.check_paused("restore a state")?;
        let vcpus = &self.shared.vcpus;
        if state.vcpus.len() != vcpus.len() {
            return Err(MachineError::Count {
                what: "vCPUs",
                state: state.vcpus.len(),
                machine: vcpus.len(),
            });
        }
        let virtio = &self.shared.platform.virtio;
        if state.virtio.len() != virtio.slots().len() {
            return Err(MachineError::Count {
                what: "virtio devices",
                state: state.virtio.len(),
                machine: virtio.slots().len(),
            });
        }
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            *lock(&vcpu.incoming) = Some(state.clone());
        }
        self.shared.crew.order(Order::Restore);
        self.shared.crew.wait_done()?;
        self.check_vcpus()?;
        vm_state::restore(&self.vm, &state.vm)?;
        self.shared.platform.serial().restore(&state.serial)?;
        self.shared.platform.keyboard().restore(&state.keyboard)?;
        virtio.restore(&state.virtio)?;
        self.ended_at_capture = None;
        if let Some(exit) = &state.ended {
            self.shared.end(exit.clone());
        }
        Ok(())
    }

    fn run(&mut self) {
        let start = Instant::now();
        if self.shared.crew.current() != Order::Run {
            self.shared.platform.virtio.resume();
            self.shared.crew.order(Order::Run);
        }
        self.phases.resume = start.elapsed();
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        let start = Instant::now();
        if self.shared.crew.current() == Order::Run {
            let order = if self.tracking { Order::Capture } else { Order::Park };
            self.shared.crew.order(order);
        }
        self.shared.platform.virtio.pause();
        self.shared.crew.wait_parked()?;
        self.phases.kick = start.elapsed();
        Ok(())
    }

    fn capture_state(&mut self) -> Result<(), MachineError> {
        let start = Instant::now();
        match self.shared.crew.current() {
            Order::Run => return Err(MachineError::Running("capture its state")),
            Order::Capture => {}
            _ => self.shared.crew.order(Order::Capture),
        }
        self.shared.crew.wait_parked()?;
        // While the vCPU threads capture theirs.
        self.vm_capture.capture(&self.vm)?;
        self.shared.platform.save(&mut self.devices_capture);
        self.ended_at_capture = Some(self.shared.crew.ended());
        self.shared.crew.wait_done()?;
        self.check_vcpus()?;
        self.phases.capture = start.elapsed();
        Ok(())
    }

    /// The state that was captured last.
    fn captured(&self) -> Result<MachineState, MachineError> {
        let ended = self.ended_at_capture.ok_or(MachineError::NotCaptured)?;
        Ok(MachineState {
            vcpus: self.shared.vcpus.iter().map(|vcpu| lock(&vcpu.capture).state()).collect(),
            vm: self.vm_capture.state(),
            serial: self.devices_capture.serial.clone(),
            keyboard: self.devices_capture.keyboard,
            virtio: self.devices_capture.virtio.clone(),
            ended: ended.then(|| self.shared.exit.wait()),
        })
    }

    fn check_paused(&self, to: &'static str) -> Result<(), MachineError> {
        if self.shared.crew.current() == Order::Run {
            return Err(MachineError::Running(to));
        }
        self.shared.crew.wait_parked()?;
        Ok(())
    }

    /// Whether all vCPUs have carried out the last order.
    fn check_vcpus(&self) -> Result<(), MachineError> {
        for (index, vcpu) in self.shared.vcpus.iter().enumerate() {
            if let Some(cause) = lock(&vcpu.failed).take() {
                return Err(MachineError::Vcpu { index, cause });
            }
        }
        Ok(())
    }

    /// Tells how much of memory is there, if it comes on demand.
    pub fn memory_fill(&self) -> Option<MemoryFill> {
        self.memory.pager().map(|pager| pager.fill())
    }

    // --- for snapshots

    /// Waits until all of memory is there.
    pub(crate) fn complete_memory(
        &self,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), NotWhole> {
        self.memory.pager().map_or(Ok(()), |pager| pager.complete(progress))
    }

    /// Lets the guest run although memory is not all there yet. If it cannot be had, the run ends.
    pub(crate) fn rely_on_pager(&self) -> Result<(), MemoryLost> {
        let Some(pager) = self.memory.pager() else { return Ok(()) };
        let (shared, exit) = (Arc::downgrade(&self.shared), self.exit_handle());
        pager.arm(move |lost| match shared.upgrade() {
            Some(shared) => shared.lose(&lost),
            None => exit.set(Exit::Error(lost.to_string())),
        })
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn guest_ram(&self) -> &Arc<GuestRam> {
        self.memory.ram()
    }

    /// Whether the guest is running.
    pub fn runs(&self) -> bool {
        self.shared.crew.current() == Order::Run
    }

    /// Whether the mirror has the machine's dirty pages.
    pub(crate) fn is_mirrored(&self) -> bool {
        self.tracking
    }

    /// Whether KVM logs the pages written.
    pub(crate) fn logs(&self) -> bool {
        self.slots.logging()
    }

    /// Lets KVM log the pages written, or no longer.
    pub(crate) fn log(&mut self, logging: bool) -> Result<(), MachineError> {
        Ok(self.slots.set_logging(&self.vm, logging)?)
    }

    /// Moves to `into` the pages written since the last harvest, and those that the guest has given back: they are
    /// zeros now.
    pub(crate) fn harvest_pages(&mut self, into: &mut DirtySet) -> Result<(), MachineError> {
        self.memory.returned().take(into);
        self.move_dirty(into)
    }

    pub(crate) fn populated_pages(&self, into: &mut DirtySet) -> Result<(), MachineError> {
        Ok(self.memory.populated(into)?)
    }

    /// Stops vCPUs and devices; returns when all stand still.
    ///
    /// # Errors
    /// A vCPU thread that is gone.
    pub fn stand_still(&mut self) -> Result<(), MachineError> {
        self.stop()
    }

    pub(crate) fn description(&self) -> Vec<u8> {
        state::describe(&self.config, &self.processor())
    }

    fn move_dirty(&mut self, into: &mut DirtySet) -> Result<(), MachineError> {
        let start = Instant::now();
        if self.slots.logging() {
            self.tracker.harvest(&self.vm, &self.slots, into)?;
        }
        dirty::harvest_own_writes(self.slots.ram(), into);
        self.phases.harvest = start.elapsed();
        Ok(())
    }

    fn count_dirty(&mut self) -> Result<Option<u64>, MachineError> {
        if !self.slots.logging() {
            return Ok(None);
        }
        Ok(self.tracker.peek(&self.vm, &self.slots)?)
    }
}

impl Guest for Machine {
    fn ram(&self) -> &Arc<GuestRam> {
        self.memory.ram()
    }

    fn describe(&self) -> Vec<u8> {
        state::describe(&self.config, &self.processor())
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        // The mirror reads what it sends, also in its pauses, and must not wait for a file.
        if let Err(NotWhole::Lost(lost)) = self.complete_memory(&mut |_, _| ControlFlow::Continue(())) {
            return Err(lost.into());
        }
        self.slots.set_logging(&self.vm, true)?;
        self.tracking = true;
        // What was given back before may have been written since, and nobody has logged it.
        self.freed(&mut DirtySet::new(self.memory.layout().pages()));
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.tracking = false;
        // A machine that is to be snapshotted goes on.
        self.slots.set_logging(&self.vm, self.config.track_dirty_pages)?;
        Ok(())
    }

    fn populated(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        Ok(self.memory.populated(into)?)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let outcome = self.move_dirty(into);
        if let Some((_, dirty)) = &mut self.snapshots.since {
            // The mirror has them now; the next snapshot wants them, too.
            dirty.union(into);
        }
        Ok(outcome?)
    }

    fn peek_dirty(&mut self) -> Result<Option<u64>, GuestError> {
        Ok(self.count_dirty()?)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(self.stop()?)
    }

    fn capture(&mut self) -> Result<(), GuestError> {
        self.fences().captured();
        Ok(self.capture_state()?)
    }

    fn encode_captured(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(self.captured()?.encode(out)?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.fences().hold_again()?;
        self.run();
        Ok(())
    }

    fn freed(&mut self, into: &mut DirtySet) {
        self.memory.returned().take(into);
        if let Some((_, dirty)) = &mut self.snapshots.since {
            dirty.union(into);
        }
    }

    fn hold_output(&mut self) {
        self.fences().exposed();
        self.shared.platform.virtio.set_output(OutputPolicy::Hold);
    }

    fn release_output(&mut self) {
        self.fences().committed();
        self.shared.platform.virtio.release_output();
    }

    fn pass_output(&mut self) {
        if self.fences().hold_again().is_err() {
            // They are another side's: nothing may be written, and the guest will not run.
            return;
        }
        self.fences().alone();
        self.shared.platform.virtio.set_output(OutputPolicy::Pass);
    }

    fn freeze_output(&mut self) {
        self.fences().lost();
        self.shared.platform.virtio.set_output(OutputPolicy::Freeze);
    }

    fn output_waits(&self) -> bool {
        self.shared.platform.virtio.output_waits()
    }

    fn tell_of_output(&mut self, tell: Box<dyn Fn() + Send + Sync>) {
        self.shared.platform.virtio.tell_of_output(tell);
    }

    fn drain(&mut self) -> Result<(), GuestError> {
        self.let_go_of_disks();
        Ok(())
    }

    fn agree(&mut self, link: LinkId, disks: &[u8]) -> Result<(), GuestError> {
        Ok(self.agree_on_disks(link, disks)?)
    }

    fn follow(&mut self, links: &[LinkId]) -> Result<(), GuestError> {
        Ok(self.disks_follow(links)?)
    }

    fn part(&mut self, link: LinkId) {
        self.disks_part(link);
    }

    fn encode_log(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.encode_disk_log(link, out);
        Ok(())
    }

    fn sync_disks(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(self.synchronise_disks(link, out)?)
    }

    fn disk_sync(&self, link: Option<LinkId>) -> DiskSync {
        self.disk_progress(link)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.crew.order(Order::Quit);
        let all_quit = self.shared.crew.wait_quit(self.threads.len());
        // Nothing is carried out any more for a guest that is gone.
        self.shared.platform.virtio.pause();
        self.let_go_of_disks();
        if all_quit.is_err() || self.shared.pager.as_deref().is_some_and(Pager::is_lost) {
            // Threads wait for memory that never comes: what they use stays until the process ends.
            std::mem::forget(Arc::clone(&self.shared));
            return;
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
