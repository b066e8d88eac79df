//! From configuration to machine.

use std::borrow::Cow;
use std::sync::Arc;

use mirror::dirty::DirtySet;
use mirror::guest::{Guest, GuestError};
use mirror::memory::GuestRam;
use vmm::{Boot, DevicesConfig, Exit, KernelImage, Machine, MachineConfig};

use crate::config::devices::{Balloon, Console, Drive, Entropy, Vsock};
use crate::config::metadata::MmdsConfig;
use crate::config::{Config, EMBEDDED_GUEST, HugePages};
use crate::exit::ExitStatus;

/// The machine that `config` asks for.
pub fn machine_config(config: &Config) -> MachineConfig {
    let machine = &config.machine;
    MachineConfig {
        vcpu_count: machine.vcpu_count,
        mem_size_mib: machine.mem_size_mib,
        huge_pages: machine.huge_pages == HugePages::TwoMib,
        track_dirty_pages: machine.track_dirty_pages,
        cpu_template: config.cpu_template.clone(),
        devices: DevicesConfig {
            drives: config.drives.iter().map(Drive::device).collect(),
            nets: config.network_interfaces.iter().map(|net| net.device(machine.vcpu_count)).collect(),
            vsock: config.vsock.as_ref().map(Vsock::device),
            entropy: config.entropy.as_ref().map(Entropy::device),
            balloon: config.balloon.as_ref().map(Balloon::device),
            console: config.console.as_ref().map(Console::device),
            metadata: config.mmds.as_ref().map(MmdsConfig::service),
        },
    }
}

/// What `config` says to boot.
pub fn boot(config: &Config) -> Boot {
    let source = &config.boot;
    let kernel = if source.kernel_image_path == EMBEDDED_GUEST {
        KernelImage::Bytes(Cow::Borrowed(resources::GUEST_ELF))
    } else {
        KernelImage::Path(source.kernel_image_path.clone().into())
    };
    let words = source.boot_args.iter().cloned().chain(config.drives.iter().filter_map(Drive::root_argument));
    let cmdline = words.collect::<Vec<_>>().join(" ");
    Boot { kernel, initrd: source.initrd_path.clone(), cmdline }
}

/// The exit status that tells of a guest's end.
pub fn exit_status(exit: &Exit) -> ExitStatus {
    match exit {
        // A reset is how a Linux guest on a machine without ACPI switches off.
        Exit::Code(0) | Exit::Reset | Exit::PowerOff => ExitStatus::Success,
        Exit::Code(_) => ExitStatus::GuestFailed,
        Exit::Shutdown | Exit::Error(_) => ExitStatus::GuestCrashed,
    }
}

/// A guest that runs its first instruction once a standby has agreed to mirror it, and is tracked from there on: a guest
/// that is not admitted, or that is live elsewhere, never runs.
pub struct StartsMirrored(pub Machine);

impl Guest for StartsMirrored {
    fn ram(&self) -> &Arc<GuestRam> {
        self.0.ram()
    }

    fn describe(&self) -> Vec<u8> {
        self.0.describe()
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.0.start_tracking()?;
        self.0.start();
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.0.stop_tracking()
    }

    fn populated(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.0.populated(into)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.0.harvest(into)
    }

    fn peek_dirty(&mut self) -> Result<Option<u64>, GuestError> {
        self.0.peek_dirty()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.pause()
    }

    fn capture(&mut self) -> Result<(), GuestError> {
        self.0.capture()
    }

    fn encode_captured(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.0.encode_captured(out)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.0.resume()
    }

    fn freed(&mut self, into: &mut DirtySet) {
        self.0.freed(into);
    }

    fn hold_output(&mut self) {
        self.0.hold_output();
    }

    fn release_output(&mut self) {
        self.0.release_output();
    }

    fn pass_output(&mut self) {
        self.0.pass_output();
    }

    fn freeze_output(&mut self) {
        self.0.freeze_output();
    }

    fn output_waits(&self) -> bool {
        self.0.output_waits()
    }

    fn drain(&mut self) -> Result<(), GuestError> {
        self.0.drain()
    }
}
