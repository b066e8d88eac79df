//! The fields of a configuration file. Names, types and defaults of what Firecracker has are Firecracker's
//! (`firecracker.yaml`: BootSource, MachineConfiguration).

use std::path::PathBuf;

use mirror::ids::Guid;
use mirror::link::Address;
use mirror::primary::{Pacing, Settings};
use serde::{Deserialize, Serialize};
use vmm::CpuTemplate;

use super::devices::{Balloon, Console, Drive, Entropy, NetworkInterface, Vsock};
use super::not_yet::WholeFile;

/// A configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WholeFile")]
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
    /// The file with the CPU template.
    #[serde(rename = "cpu-config", skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<PathBuf>,
    /// What is in it.
    #[serde(skip)]
    pub cpu_template: CpuTemplate,
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
            cpu_config: None,
            cpu_template: CpuTemplate::NONE,
        }
    }
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// Path of a bzImage or ELF kernel, or [`super::EMBEDDED_GUEST`].
    pub kernel_image_path: String,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Path of an initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSection {
    /// vCPUs, 1 to [`super::MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory in MiB, [`super::MIN_MEM_MIB`] to [`super::MAX_MEM_MIB`].
    pub mem_size_mib: u32,
    /// Two vCPUs to a core; only `false` is supported.
    #[serde(default)]
    pub smt: bool,
    /// Whether pages written are logged from the start.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What guest memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Only `"None"`: a template is given in `cpu-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
}

/// What guest memory is made of on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    None,
    /// 2 MiB pages, which the host must have reserved.
    #[serde(rename = "2M")]
    TwoMib,
}

/// Where and how to mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSection {
    /// Where the standby listens: `unix:PATH` or `tcp:HOST:PORT`.
    pub standby: Address,
    /// The witness, a file on storage that both sides share; without it there is no automatic failover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<PathBuf>,
    /// Names the guest to standby and witness; without it a new one is made at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<Guid>,
    /// How long the guest runs before it is mirrored. 0: it is mirrored from its first instruction on, and does not run
    /// if it cannot be; otherwise it runs on, unprotected, if it cannot be.
    #[serde(default)]
    pub delay_ms: u32,
    /// Longest time between two epochs.
    #[serde(default = "interval_ms")]
    pub interval_ms: u32,
    /// Shortest time between two epochs.
    #[serde(default = "min_interval_ms")]
    pub min_interval_ms: u32,
    /// What the final pause of seeding may cost.
    #[serde(default = "pause_budget_ms")]
    pub pause_budget_ms: u32,
    /// Dirty pages that end an epoch early.
    #[serde(default = "dirty_budget_pages")]
    pub dirty_budget_pages: u64,
    /// Time between two signs of life.
    #[serde(default = "heartbeat_ms")]
    pub heartbeat_ms: u32,
    /// Missed signs of life after which the other side counts as lost.
    #[serde(default = "heartbeat_misses")]
    pub heartbeat_misses: u32,
    /// Room for pages copied aside in a pause.
    #[serde(default = "staging_mib")]
    pub staging_mib: u32,
    /// Whether to wait in the standby's queue if it has no space now.
    #[serde(default)]
    pub wait_for_space: bool,
}

impl MirrorSection {
    /// Mirrors to `standby`, all else as by default.
    pub fn to(standby: Address) -> Self {
        Self {
            standby,
            witness: None,
            guid: None,
            delay_ms: 0,
            interval_ms: interval_ms(),
            min_interval_ms: min_interval_ms(),
            pause_budget_ms: pause_budget_ms(),
            dirty_budget_pages: dirty_budget_pages(),
            heartbeat_ms: heartbeat_ms(),
            heartbeat_misses: heartbeat_misses(),
            staging_mib: staging_mib(),
            wait_for_space: false,
        }
    }
}

// The defaults are those of the mirror itself, told here in the file's units.

fn interval_ms() -> u32 {
    Pacing::default().interval.as_millis() as u32
}

fn min_interval_ms() -> u32 {
    Pacing::default().min_interval.as_millis() as u32
}

fn pause_budget_ms() -> u32 {
    Pacing::default().pause_budget.as_millis() as u32
}

fn dirty_budget_pages() -> u64 {
    Pacing::default().dirty_budget
}

fn heartbeat_ms() -> u32 {
    Settings::default().heartbeat.as_millis() as u32
}

fn heartbeat_misses() -> u32 {
    Settings::default().misses
}

fn staging_mib() -> u32 {
    64
}
