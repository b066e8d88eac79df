//! From configuration to machine.

use std::borrow::Cow;
use std::sync::Arc;

use mirror::dirty::DirtySet;
use mirror::guest::{DiskSync, Guest, GuestError};
use mirror::ids::LinkId;
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
pub struct StartsMirrored {
    /// Its machine.
    pub machine: Machine,
    /// It stands still until it is protected; the mirror then lets it go on.
    pub suspended: bool,
}

impl Guest for StartsMirrored {
    fn ram(&self) -> &Arc<GuestRam> {
        self.machine.ram()
    }

    fn describe(&self) -> Vec<u8> {
        self.machine.describe()
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.machine.start_tracking()?;
        if !self.suspended {
            self.machine.start();
        }
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.machine.stop_tracking()
    }

    fn populated(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.machine.populated(into)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.machine.harvest(into)
    }

    fn peek_dirty(&mut self) -> Result<Option<u64>, GuestError> {
        self.machine.peek_dirty()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.machine.pause()
    }

    fn capture(&mut self) -> Result<(), GuestError> {
        self.machine.capture()
    }

    fn encode_captured(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.machine.encode_captured(out)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.resume()
    }

    fn freed(&mut self, into: &mut DirtySet) {
        self.machine.freed(into);
    }

    fn hold_output(&mut self) {
        self.machine.hold_output();
    }

    fn release_output(&mut self) {
        self.machine.release_output();
    }

    fn pass_output(&mut self) {
        self.machine.pass_output();
    }

    fn freeze_output(&mut self) {
        self.machine.freeze_output();
    }

    fn output_waits(&self) -> bool {
        self.machine.output_waits()
    }

    fn tell_of_output(&mut self, tell: Box<dyn Fn() + Send + Sync>) {
        self.machine.tell_of_output(tell);
    }

    fn drain(&mut self) -> Result<(), GuestError> {
        self.machine.drain()
    }

    fn agree(&mut self, link: LinkId, disks: &[u8]) -> Result<(), GuestError> {
        self.machine.agree(link, disks)
    }

    fn follow(&mut self, links: &[LinkId]) -> Result<(), GuestError> {
        self.machine.follow(links)
    }

    fn part(&mut self, link: LinkId) {
        self.machine.part(link);
    }

    fn encode_log(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.machine.encode_log(link, out)
    }

    fn sync_disks(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.machine.sync_disks(link, out)
    }

    fn disk_sync(&self, link: Option<LinkId>) -> DiskSync {
        self.machine.disk_sync(link)
    }
}
