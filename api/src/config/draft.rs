//! A configuration on its way: what a file has, what the API is told piece by piece, and what `/vm/config` shows. All three
//! are the same JSON, so that what one prints the others take.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::CpuTemplate;

use super::cpu::CpuConfig;
use super::devices::{self, Balloon, Console, Drive, Entropy, NetworkInterface, Vsock};
use super::metadata::MmdsConfig;
use super::not_yet;
use super::operator::{Logger, Metrics, Serial};
use super::{BootSource, Config, MachineSection, MachineUpdate, MirrorSection};

/// The field at fault, with its section, and what is wrong with it and what to write instead.
pub type BadValue = (&'static str, String);

/// A configuration; sections may still be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Draft {
    /// What to boot.
    #[serde(default, rename = "boot-source", skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootSource>,
    /// On what.
    #[serde(default, rename = "machine-config")]
    pub machine: MachineSection,
    /// Where to mirror it; without it the guest is not mirrored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorSection>,
    /// Disks; the root device comes first.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// Network cards.
    #[serde(default, rename = "network-interfaces")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A source of random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// A memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A console beside the serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// What the guest's processors offer: a file's path, or what would be in the file.
    #[serde(default, rename = "cpu-config", skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuSource>,
    /// Where messages go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where metrics go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Where the serial port's output goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The metadata service.
    #[serde(default, rename = "mmds-config", skip_serializing_if = "Option::is_none")]
    pub mmds: Option<MmdsConfig>,
    // What nothing stands behind yet may be there empty.
    #[serde(default, skip_serializing, deserialize_with = "not_yet::pmem")]
    #[schema(ignore)]
    pmem: (),
    #[serde(
        default,
        rename = "memory-hotplug",
        skip_serializing,
        deserialize_with = "not_yet::memory_hotplug"
    )]
    #[schema(ignore)]
    memory_hotplug: (),
}

/// A CPU template, or where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum CpuSource {
    /// A file.
    #[schema(value_type = String)]
    File(PathBuf),
    /// The template.
    Template(CpuConfig),
}

/// A section that the API puts.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "named as the sections of `Draft`")]
pub enum Section {
    Boot(BootSource),
    Machine(MachineSection),
    MachineUpdate(MachineUpdate),
    Drive(Drive),
    NetworkInterface(NetworkInterface),
    Vsock(Vsock),
    Entropy(Entropy),
    Balloon(Balloon),
    Console(Console),
    Cpu(CpuConfig),
    Logger(Logger),
    Metrics(Metrics),
    Serial(Serial),
    Mmds(MmdsConfig),
    Mirror(MirrorSection),
}

impl Draft {
    /// Takes `section` over, in place of what was there of it.
    ///
    /// # Errors
    /// [`BadValue`]; nothing has changed then.
    pub fn put(&mut self, section: Section) -> Result<(), BadValue> {
        let mut next = self.clone();
        match section {
            Section::Boot(boot) => next.boot = Some(boot),
            Section::Machine(machine) => next.machine = machine,
            Section::MachineUpdate(update) => update.apply(&mut next.machine),
            Section::Drive(drive) => {
                place(&mut next.drives, drive, |a, b| a.drive_id == b.drive_id);
            }
            Section::NetworkInterface(net) => {
                place(&mut next.network_interfaces, net, |a, b| a.iface_id == b.iface_id);
            }
            Section::Vsock(vsock) => next.vsock = Some(vsock),
            Section::Entropy(entropy) => next.entropy = Some(entropy),
            Section::Balloon(balloon) => next.balloon = Some(balloon),
            Section::Console(console) => next.console = Some(console),
            Section::Cpu(cpu) => next.cpu_config = Some(CpuSource::Template(cpu)),
            Section::Logger(logger) => next.logger = Some(logger.over(next.logger.take())),
            Section::Metrics(metrics) => next.metrics = Some(metrics),
            Section::Serial(serial) => next.serial = Some(serial),
            Section::Mmds(mmds) => next.mmds = Some(mmds),
            Section::Mirror(mirror) => next.mirror = Some(mirror),
        }
        next.check()?;
        *self = next;
        Ok(())
    }

    /// Checks what is there.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&mut self) -> Result<(), BadValue> {
        devices::order(&mut self.drives)?;
        devices::check_interfaces(&self.network_interfaces)?;
        self.mmds.as_ref().map_or(Ok(()), |mmds| mmds.check(&self.network_interfaces))?;
        self.vsock.as_ref().map_or(Ok(()), Vsock::check)?;
        self.console.as_ref().map_or(Ok(()), Console::check)?;
        if let Some(CpuSource::Template(template)) = &self.cpu_config {
            template.check()?;
        }
        if self.serial.as_ref().is_some_and(|serial| serial.rate_limiter.is_some()) {
            return Err(("serial.rate_limiter", "is not supported; leave it out".into()));
        }
        self.machine.check()?;
        self.boot.as_ref().map_or(Ok(()), BootSource::check)?;
        self.mirror.as_ref().map_or(Ok(()), MirrorSection::check)
    }

    /// The machine that it asks for; `template` is what a CPU template's file holds.
    ///
    /// # Errors
    /// It says nothing to boot.
    pub fn finish(self, template: CpuTemplate) -> Result<Config, BadValue> {
        let missing = || ("boot-source", "is missing; say what kernel to boot".into());
        let cpu_template = match &self.cpu_config {
            Some(CpuSource::Template(config)) => config.template(),
            _ => template,
        };
        Ok(Config {
            boot: self.boot.ok_or_else(missing)?,
            machine: self.machine,
            mirror: self.mirror,
            drives: self.drives,
            network_interfaces: self.network_interfaces,
            vsock: self.vsock,
            entropy: self.entropy,
            balloon: self.balloon,
            console: self.console,
            cpu_template,
            logger: self.logger,
            metrics: self.metrics,
            serial: self.serial,
            mmds: self.mmds,
        })
    }
}

/// Puts `item` where the one of its name is, or behind all.
fn place<T>(list: &mut Vec<T>, item: T, same: impl Fn(&T, &T) -> bool) {
    match list.iter().position(|other| same(other, &item)) {
        Some(index) => list[index] = item,
        None => list.push(item),
    }
}
