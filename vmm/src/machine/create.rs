//! Creating a machine: VM, memory, vCPUs, devices and threads, with nothing in them yet.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::thread;

use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use mirror::console::Console;
use mirror::memory::LayoutError;
use thiserror::Error;

use super::{Machine, PausePhases};
use crate::config::{ConfigError, MachineConfig};
use crate::cpu_template::{CpuTemplate, TemplateError};
use crate::cpuid;
use crate::crew::Crew;
use crate::dirty;
use crate::exit::ExitHandle;
use crate::host::{Host, HostError};
use crate::kick::Kick;
use crate::memory::{self, KeptMemory, Memory, MemoryError, Slots};
use crate::msrs::{MsrBuffer, MsrError};
use crate::platform::{DevicesCapture, Platform, PlatformError};
use crate::processor::Processor;
use crate::snapshot::take::SnapshotTracking;
use crate::vcpu::{ExitCounters, Shared, Vcpu};
use crate::vcpu_state::{VcpuCapture, VcpuStateError};
use crate::vm_state::VmCapture;

/// Pages in the hole below 4 GiB that an Intel host needs to run a guest in real mode: one, then three for a task state.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;

/// The local APIC's lines to the PIC and to the NMI button, and how a PC's firmware sets them.
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// Why a machine cannot be created.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The configuration is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host has no KVM for us.
    #[error(transparent)]
    Host(#[from] HostError),
    /// So much memory cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refuses a request.
    #[error("{request}: {cause}")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What KVM answered.
        cause: kvm_ioctls::Error,
    },
    /// CPUID has more entries than KVM takes.
    #[error("the host's processor has more CPUID entries than KVM takes")]
    Cpuid,
    /// The CPU template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Model-specific registers.
    #[error(transparent)]
    Msrs(#[from] MsrError),
    /// Buffers for the state of a vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// Devices.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Threads and their signal.
    #[error("starting the vCPU threads: {0}")]
    Threads(io::Error),
}

fn request<T>(request: &'static str, answer: Result<T, kvm_ioctls::Error>) -> Result<T, CreateError> {
    answer.map_err(|cause| CreateError::Request { request, cause })
}

impl Machine {
    /// Creates a machine on the host's KVM; its serial output goes to `console`.
    ///
    /// # Errors
    /// [`CreateError`]
    pub fn create(config: &MachineConfig, console: Arc<Console>) -> Result<Self, CreateError> {
        Self::create_on(&Host::open()?, config, console)
    }

    /// Creates a machine on the KVM of `host`.
    ///
    /// # Errors
    /// [`CreateError`]
    pub fn create_on(
        host: &Host,
        config: &MachineConfig,
        console: Arc<Console>,
    ) -> Result<Self, CreateError> {
        config.check()?;
        let memory = Memory::new(memory::layout(config.mem_size_mib)?, config.huge_pages)?;
        Self::create_in(host, config, console, memory)
    }

    /// As [`Self::create_on`], with memory as it was left by a guest that is no more.
    ///
    /// # Errors
    /// [`CreateError`]
    pub(crate) fn create_with(
        host: &Host,
        config: &MachineConfig,
        console: Arc<Console>,
        memory: KeptMemory,
    ) -> Result<Self, CreateError> {
        config.check()?;
        Self::create_in(host, config, console, Memory::on(memory)?)
    }

    /// As [`Self::create_on`], with `memory`, which is laid out as `config` says.
    pub(crate) fn create_in(
        host: &Host,
        config: &MachineConfig,
        console: Arc<Console>,
        memory: Memory,
    ) -> Result<Self, CreateError> {
        config.check()?;
        let vm = Arc::new(create_vm(host)?);
        let slots = Slots::register(&vm, &memory, config.track_dirty_pages)?;
        // After the slots: with the controllers on its buses, KVM takes 4 to 8 ms longer to register a slot.
        create_interrupt_controllers(&vm)?;
        let tracker = request("KVM_ENABLE_CAP", dirty::tracker(host.tracker(), &vm, &slots))?;
        let (vcpus, kicks) = create_vcpus(host, &vm, config.vcpu_count, &config.cpu_template)?;
        let platform = Platform::new(&config.devices, &vm, memory.ram(), &console, memory.returned())?;
        let shared = Arc::new(Shared {
            vcpus,
            crew: Crew::new(kicks),
            platform,
            console,
            ram: Arc::clone(memory.ram()),
            exit: ExitHandle::default(),
            tsc_control: host.tsc_control(),
            exits: ExitCounters::default(),
            pager: memory.pager().cloned(),
        });
        let mut machine = Self {
            config: config.clone(),
            memory,
            slots,
            tracker,
            vm,
            shared,
            threads: Vec::new(),
            vm_capture: VmCapture::default(),
            devices_capture: DevicesCapture::default(),
            ended_at_capture: None,
            tracking: false,
            snapshots: SnapshotTracking::default(),
            phases: PausePhases::default(),
        };
        // In the machine already: if one thread cannot be started, dropping the machine ends the others.
        for index in 0..machine.shared.vcpus.len() {
            let shared = Arc::clone(&machine.shared);
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || shared.work(index))
                .map_err(CreateError::Threads)?;
            machine.threads.push(thread);
        }
        Ok(machine)
    }
}

fn create_vm(host: &Host) -> Result<VmFd, CreateError> {
    let vm = loop {
        match host.kvm().create_vm() {
            // The kernel gives up on any signal.
            Err(cause) if cause.errno() == libc::EINTR => {}
            answer => break request("KVM_CREATE_VM", answer)?,
        }
    };
    request("KVM_SET_IDENTITY_MAP_ADDR", vm.set_identity_map_address(IDENTITY_MAP))?;
    request("KVM_SET_TSS_ADDR", vm.set_tss_address(TASK_STATE))?;
    Ok(vm)
}

fn create_interrupt_controllers(vm: &VmFd) -> Result<(), CreateError> {
    request("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
    // The dummy answers port 0x61 in the kernel, which guests read to calibrate their clocks.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    request("KVM_CREATE_PIT2", vm.create_pit2(pit))
}

fn create_vcpus(
    host: &Host,
    vm: &VmFd,
    count: u8,
    template: &CpuTemplate,
) -> Result<(Vec<Vcpu>, Vec<Kick>), CreateError> {
    let supported = supported_cpuid(host, template)?;
    let mut listed = host.msr_indices()?;
    listed.extend(template.msrs.iter().map(|change| change.index));
    let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let (mut vcpus, mut kicks, mut msrs) = (Vec::new(), Vec::new(), None);
    for index in 0..count {
        let fd = request("KVM_CREATE_VCPU", vm.create_vcpu(u64::from(index)))?;
        let cpuid = cpuid::for_vcpu(host, &supported, index, count).map_err(|_| CreateError::Cpuid)?;
        request("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid))?;
        template.set_msrs(&fd)?;
        if index == 0 {
            connect_local_interrupts(&fd)?;
        }
        let msrs = match &msrs {
            Some(msrs) => MsrBuffer::clone(msrs),
            None => msrs.insert(MsrBuffer::probe(&fd, &listed, cpuid.as_slice())?).clone(),
        };
        // SAFETY: the descriptor is borrowed from `fd`, which lives longer than the call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        kicks.push(Kick::new(borrowed).map_err(CreateError::Threads)?);
        let capture = VcpuCapture::new(&fd, cpuid, msrs, xsave_bytes)?;
        vcpus.push(Vcpu {
            fd: Mutex::new(fd),
            capture: Mutex::new(capture),
            incoming: Mutex::new(None),
            failed: Mutex::new(None),
        });
    }
    Ok((vcpus, kicks))
}

/// What `template` leaves of what the host supports, and no more than that.
fn supported_cpuid(host: &Host, template: &CpuTemplate) -> Result<CpuId, CreateError> {
    let supported = host.supported_cpuid()?;
    if *template == CpuTemplate::NONE {
        return Ok(supported);
    }
    template.check_capabilities(host.kvm())?;
    let mut changed = supported.clone();
    template.change_cpuid(&mut changed)?;
    let processor = |cpuid| {
        let cpuid = cpuid::for_vcpu(host, cpuid, 0, 1).map_err(|_| CreateError::Cpuid)?;
        Ok::<_, CreateError>(Processor::new(cpuid.as_slice(), Vec::new()))
    };
    let missing = processor(&changed)?.missing_in(&processor(&supported)?);
    if missing.is_empty() { Ok(changed) } else { Err(TemplateError::Features(missing).into()) }
}

/// Connects the first processor's local APIC to the PIC, as firmware leaves it.
fn connect_local_interrupts(vcpu: &VcpuFd) -> Result<(), CreateError> {
    let mut lapic = request("KVM_GET_LAPIC", vcpu.get_lapic())?;
    for (register, mode) in [(LAPIC_LINT0, DELIVER_EXTINT), (LAPIC_LINT1, DELIVER_NMI)] {
        for (offset, byte) in mode.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + offset] = byte as _;
        }
    }
    request("KVM_SET_LAPIC", vcpu.set_lapic(&lapic))
}
