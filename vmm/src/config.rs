//! What a machine is made of.

use std::collections::BTreeMap;
use std::path::PathBuf;

use devices::metadata::MetadataConfig;
use devices::virtio::balloon::BalloonConfig;
use devices::virtio::block::BlockConfig;
use devices::virtio::console::ConsoleConfig;
use devices::virtio::net::NetConfig;
use devices::virtio::rng::RngConfig;
use devices::virtio::vsock::VsockConfig;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cpu_template::CpuTemplate;

/// Most vCPUs that a machine may have.
pub const MAX_VCPUS: u8 = 32;

/// Least guest memory in MiB: one for what a PC keeps below the first MiB, one for a kernel.
pub const MIN_MEM_MIB: u32 = 2;

/// What a machine is made of. The standby builds its twin from the same words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory in MiB, at least [`MIN_MEM_MIB`]; even with huge pages.
    pub mem_size_mib: u32,
    /// Whether guest memory is made of 2 MiB pages, which the host must have reserved (`vm.nr_hugepages`).
    pub huge_pages: bool,
    /// Whether pages written are logged from the start, and not just from the start of tracking on.
    pub track_dirty_pages: bool,
    /// How the processors differ from the host's.
    pub cpu_template: CpuTemplate,
    /// Virtio devices.
    pub devices: DevicesConfig,
}

/// The virtio devices of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesConfig {
    /// Disks.
    pub drives: Vec<BlockConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A source of random numbers.
    pub entropy: Option<RngConfig>,
    /// A memory balloon.
    pub balloon: Option<BalloonConfig>,
    /// A console beside the serial port.
    pub console: Option<ConsoleConfig>,
    /// The metadata service on network cards.
    pub metadata: Option<MetadataConfig>,
}

impl DevicesConfig {
    /// No devices.
    pub const NONE: Self = Self {
        drives: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        entropy: None,
        balloon: None,
        console: None,
        metadata: None,
    };
}

/// What of a machine's devices lies elsewhere on this host than where its configuration says: by the device's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostResources {
    /// Disk images.
    pub drives: BTreeMap<String, PathBuf>,
    /// Taps.
    pub nets: BTreeMap<String, String>,
    /// The socket of the vsock device.
    pub vsock: Option<PathBuf>,
    /// The socket or output of the console.
    pub console: Option<PathBuf>,
}

/// A name that no device has.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the guest has no {kind} {name:?}; it has {known}")]
pub struct UnknownDevice {
    /// Of what kind.
    pub kind: &'static str,
    /// The name.
    pub name: String,
    /// The names that there are.
    pub known: String,
}

impl DevicesConfig {
    /// Where they are on this host: for the same guest, should it come back.
    pub fn places(&self) -> HostResources {
        HostResources {
            drives: self.drives.iter().map(|drive| (drive.id.clone(), drive.path.clone())).collect(),
            nets: self.nets.iter().map(|net| (net.id.clone(), net.tap.clone())).collect(),
            vsock: self.vsock.as_ref().map(|vsock| vsock.uds_path.clone()),
            console: self.console.as_ref().map(|console| console.place.path().into()),
        }
    }

    /// Puts `here` in the place of what the configuration says.
    ///
    /// # Errors
    /// [`UnknownDevice`] if a name is none of the devices; nothing is changed then.
    pub fn relocate(&mut self, here: &HostResources) -> Result<(), UnknownDevice> {
        let drives: Vec<&str> = self.drives.iter().map(|drive| drive.id.as_str()).collect();
        let nets: Vec<&str> = self.nets.iter().map(|net| net.id.as_str()).collect();
        check_names("drive", here.drives.keys().map(String::as_str), &drives)?;
        check_names("network interface", here.nets.keys().map(String::as_str), &nets)?;
        let sockets: &[&str] = if self.vsock.is_some() { &["vsock"] } else { &[] };
        check_names("device", here.vsock.iter().map(|_| "vsock"), sockets)?;
        let consoles: &[&str] = if self.console.is_some() { &["console"] } else { &[] };
        check_names("device", here.console.iter().map(|_| "console"), consoles)?;
        if let (Some(console), Some(path)) = (&mut self.console, &here.console) {
            console.place.path_mut().clone_from(path);
        }
        if let (Some(vsock), Some(path)) = (&mut self.vsock, &here.vsock) {
            vsock.uds_path.clone_from(path);
        }
        for drive in &mut self.drives {
            if let Some(path) = here.drives.get(&drive.id) {
                drive.path.clone_from(path);
            }
        }
        for net in &mut self.nets {
            if let Some(tap) = here.nets.get(&net.id) {
                net.tap.clone_from(tap);
            }
        }
        Ok(())
    }
}

fn check_names<'a>(
    kind: &'static str,
    mut names: impl Iterator<Item = &'a str>,
    known: &[&str],
) -> Result<(), UnknownDevice> {
    names.try_for_each(|name| UnknownDevice::find(kind, name, known).map(drop))
}

impl UnknownDevice {
    /// The place of the device `name` among those that are `known`.
    pub(crate) fn find<T: AsRef<str>>(kind: &'static str, name: &str, known: &[T]) -> Result<usize, Self> {
        known.iter().position(|other| other.as_ref() == name).ok_or_else(|| {
            let known: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            Self { kind, name: name.into(), known }
        })
    }
}

impl MachineConfig {
    /// A machine of ordinary pages, logged only while they are tracked, without virtio devices.
    pub const fn new(vcpu_count: u8, mem_size_mib: u32) -> Self {
        Self {
            vcpu_count,
            mem_size_mib,
            huge_pages: false,
            track_dirty_pages: false,
            cpu_template: CpuTemplate::NONE,
            devices: DevicesConfig::NONE,
        }
    }

    /// The same, logged from the start.
    #[must_use]
    pub const fn tracked(mut self) -> Self {
        self.track_dirty_pages = true;
        self
    }
}

/// A configuration that no machine can have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Too few or too many vCPUs.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    VcpuCount(u8),
    /// Too little memory.
    #[error("a machine has at least {MIN_MEM_MIB} MiB of memory, not {0}")]
    TooSmall(u32),
    /// Half a huge page.
    #[error("memory of 2 MiB pages must be an even number of MiB, not {0}")]
    OddHuge(u32),
}

impl MachineConfig {
    /// Checks the ranges that the fields promise.
    ///
    /// # Errors
    /// [`ConfigError`] names the first field out of its range.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        if self.mem_size_mib < MIN_MEM_MIB {
            return Err(ConfigError::TooSmall(self.mem_size_mib));
        }
        if self.huge_pages && !self.mem_size_mib.is_multiple_of(2) {
            return Err(ConfigError::OddHuge(self.mem_size_mib));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::net::Mac;

    use super::*;

    const GOOD: MachineConfig = MachineConfig::new(1, 2);

    #[test]
    fn devices_are_found_elsewhere_by_name_and_unknown_names_are_refused() {
        let net = |id: &str, tap: &str| NetConfig {
            id: id.into(),
            tap: tap.into(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: None,
            queue_pairs: 1,
            receive_limits: None,
            send_limits: None,
        };
        let before = DevicesConfig {
            drives: vec![],
            nets: vec![net("a", "tap0"), net("b", "tap1")],
            ..DevicesConfig::NONE
        };
        let mut devices = before.clone();
        let mut here = HostResources::default();
        here.nets.insert("b".into(), "tap7".into());
        devices.relocate(&here).unwrap();
        assert_eq!(devices.nets, [net("a", "tap0"), net("b", "tap7")]);
        here.nets.insert("c".into(), "tap8".into());
        let mut devices = before.clone();
        let error = devices.relocate(&here).unwrap_err();
        assert_eq!(error.to_string(), "the guest has no network interface \"c\"; it has a, b");
        assert_eq!(devices, before);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        assert_eq!(GOOD.check(), Ok(()));
        for count in [0, 33, 255] {
            assert_eq!(
                MachineConfig { vcpu_count: count, ..GOOD }.check(),
                Err(ConfigError::VcpuCount(count))
            );
        }
        assert_eq!(MachineConfig { mem_size_mib: 1, ..GOOD }.check(), Err(ConfigError::TooSmall(1)));
        let odd = MachineConfig { mem_size_mib: 3, huge_pages: true, ..GOOD };
        assert_eq!(odd.check(), Err(ConfigError::OddHuge(3)));
    }
}
