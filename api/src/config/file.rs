//! A whole configuration.

use serde::Serialize;
use vmm::CpuTemplate;

use super::devices::{Balloon, Console, Drive, Entropy, NetworkInterface, Vsock};
use super::metadata::MmdsConfig;
use super::operator::{Logger, Metrics, Serial};
use super::{BootSource, MachineSection, MirrorSection};

/// A whole configuration, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// What to boot.
    #[serde(rename = "boot-source")]
    pub boot: BootSource,
    /// On what.
    #[serde(rename = "machine-config")]
    pub machine: MachineSection,
    /// Where to mirror it; without it the guest is not mirrored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorSection>,
    /// Disks; the root device comes first.
    pub drives: Vec<Drive>,
    /// Network cards.
    #[serde(rename = "network-interfaces")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Sockets between guest and host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A source of random numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// A memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// A console beside the serial port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
    /// What the guest's processors offer.
    #[serde(skip)]
    pub cpu_template: CpuTemplate,
    /// Where messages go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where metrics go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Where the serial port's output goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The metadata service.
    #[serde(rename = "mmds-config", skip_serializing_if = "Option::is_none")]
    pub mmds: Option<MmdsConfig>,
}

impl Config {
    /// A mirrored machine without devices.
    pub fn plain(boot: BootSource, machine: MachineSection, mirror: MirrorSection) -> Self {
        Self {
            boot,
            machine,
            mirror: Some(mirror),
            drives: Vec::new(),
            network_interfaces: Vec::new(),
            vsock: None,
            entropy: None,
            balloon: None,
            console: None,
            cpu_template: CpuTemplate::NONE,
            logger: None,
            metrics: None,
            serial: None,
            mmds: None,
        }
    }
}
