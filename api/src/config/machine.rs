//! What to boot, and on what. Names, types and defaults are Firecracker's (BootSource, MachineConfiguration).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{BadValue, EMBEDDED_GUEST, MAX_MEM_MIB, MAX_VCPUS, MIN_MEM_MIB};

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// Path of a bzImage or ELF kernel, or [`super::EMBEDDED_GUEST`].
    #[schema(min_length = 1)]
    pub kernel_image_path: String,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Path of an initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineSection {
    /// vCPUs, 1 to [`super::MAX_VCPUS`].
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: u8,
    /// Guest memory in MiB, [`super::MIN_MEM_MIB`] to [`super::MAX_MEM_MIB`].
    #[schema(minimum = 2, maximum = 1_048_576)]
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
    #[schema(pattern = "^None$")]
    pub cpu_template: Option<String>,
}

/// What guest memory is made of on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    None,
    /// 2 MiB pages, which the host must have reserved.
    #[serde(rename = "2M")]
    TwoMib,
}

impl Default for MachineSection {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        }
    }
}

impl BootSource {
    pub(super) fn check(&self) -> Result<(), BadValue> {
        if self.kernel_image_path.is_empty() {
            let reason = format!("is empty; give the path of a kernel, or {EMBEDDED_GUEST:?}");
            return Err(("boot-source.kernel_image_path", reason));
        }
        Ok(())
    }
}

impl MachineSection {
    pub(super) fn check(&self) -> Result<(), BadValue> {
        let MachineSection { vcpu_count, mem_size_mib, smt, ref cpu_template, huge_pages, .. } = *self;
        if !(1..=MAX_VCPUS).contains(&vcpu_count) {
            let reason = format!("{vcpu_count} is out of range; give 1 to {MAX_VCPUS} vCPUs");
            return Err(("machine-config.vcpu_count", reason));
        }
        if !(MIN_MEM_MIB..=MAX_MEM_MIB).contains(&mem_size_mib) {
            let reason = format!("{mem_size_mib} is out of range; give {MIN_MEM_MIB} to {MAX_MEM_MIB} MiB");
            return Err(("machine-config.mem_size_mib", reason));
        }
        if huge_pages == HugePages::TwoMib && mem_size_mib % 2 != 0 {
            let reason = format!("{mem_size_mib} is odd; memory of 2 MiB pages needs an even number of MiB");
            return Err(("machine-config.mem_size_mib", reason));
        }
        if smt {
            let reason = "true is not supported yet; every vCPU is a core of its own, so leave it out".into();
            return Err(("machine-config.smt", reason));
        }
        if cpu_template.as_deref().is_some_and(|name| name != "None") {
            let reason = "there are no templates by name; give one of your own in cpu-config".into();
            return Err(("machine-config.cpu_template", reason));
        }
        Ok(())
    }
}

/// What is to be otherwise; what is not named stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineUpdate {
    /// vCPUs.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: Option<u8>,
    /// Guest memory in MiB.
    #[serde(default)]
    #[schema(minimum = 2, maximum = 1_048_576)]
    pub mem_size_mib: Option<u32>,
    /// Two vCPUs to a core.
    #[serde(default)]
    pub smt: Option<bool>,
    /// Whether pages written are logged from the start.
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// What guest memory is made of.
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
    /// Only `"None"`.
    #[serde(default)]
    #[schema(pattern = "^None$")]
    pub cpu_template: Option<String>,
}

impl MachineUpdate {
    pub(super) fn apply(self, machine: &mut MachineSection) {
        *machine = MachineSection {
            vcpu_count: self.vcpu_count.unwrap_or(machine.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(machine.mem_size_mib),
            smt: self.smt.unwrap_or(machine.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(machine.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(machine.huge_pages),
            cpu_template: self.cpu_template.or(machine.cpu_template.take()),
        };
    }
}
