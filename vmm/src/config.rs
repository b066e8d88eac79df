//! What a machine is made of.

use devices::virtio::block::BlockConfig;
use devices::virtio::net::NetConfig;
use serde::{Deserialize, Serialize};
use thiserror::Error;

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
}

impl DevicesConfig {
    /// No devices.
    pub const NONE: Self = Self { drives: Vec::new(), nets: Vec::new() };
}

impl MachineConfig {
    /// A machine of ordinary pages, logged only while they are tracked, without virtio devices.
    pub const fn new(vcpu_count: u8, mem_size_mib: u32) -> Self {
        Self {
            vcpu_count,
            mem_size_mib,
            huge_pages: false,
            track_dirty_pages: false,
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
    use super::*;

    const GOOD: MachineConfig = MachineConfig::new(1, 2);

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
