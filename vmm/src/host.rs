//! The host's KVM: what it can do, and what is odd about it. The one place that knows of either.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

use crate::cpu_template::{CpuTemplate, TemplateError};
use crate::dirty::TrackerKind;

/// Where KVM is found.
pub const KVM_PATH: &str = "/dev/kvm";

/// The KVM API that everybody has spoken since 2007.
const API_VERSION: i32 = 12;

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` has no name in kvm-ioctls.
const CAP_MANUAL_DIRTY_LOG: u64 = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as u64;

/// MSRs that some KVM lists and reads but does not let anybody set. 0x10a is ARCH_CAPABILITIES on kvm_pvm: it
/// describes the host's processor and is no state.
const MSRS_NOT_SETTABLE: &[u32] = &[0x10a];

/// Why the host cannot run machines.
#[derive(Debug, Error)]
pub enum HostError {
    /// There is no KVM.
    #[error(
        "there is no {path}: load the module kvm-intel or kvm-amd, and allow virtualisation in the firmware"
    )]
    Missing {
        /// The path tried.
        path: PathBuf,
    },
    /// It belongs to others.
    #[error("no permission to open {path}: add the user to the group kvm, or ask for access to the file")]
    Permission {
        /// The path tried.
        path: PathBuf,
    },
    /// Something else is wrong with the file.
    #[error("cannot open {path} as KVM: {cause}")]
    Open {
        /// The path tried.
        path: PathBuf,
        /// What the kernel answered.
        cause: kvm_ioctls::Error,
    },
    /// A KVM that this program does not know.
    #[error("{path} speaks version {version} of the KVM API, not {API_VERSION}")]
    Version {
        /// The path tried.
        path: PathBuf,
        /// The version it speaks; negative if it is not KVM at all.
        version: i32,
    },
    /// A capability that everything is built on is missing.
    #[error("the host's KVM lacks {0:?}: a newer kernel is needed")]
    Capability(Cap),
    /// The host's processor cannot be described.
    #[error("KVM_GET_SUPPORTED_CPUID: {0}")]
    Cpuid(kvm_ioctls::Error),
    /// It cannot be reduced so.
    #[error(transparent)]
    Reduced(#[from] TemplateError),
    /// The list of model-specific registers cannot be had.
    #[error("KVM_GET_MSR_INDEX_LIST: {0}")]
    Msrs(kvm_ioctls::Error),
}

/// An open KVM and what it can do.
pub struct Host {
    kvm: Kvm,
    tracker: TrackerKind,
    tsc_control: bool,
    tsc_deadline: bool,
    reduced: CpuTemplate,
}

impl Host {
    /// Opens [`KVM_PATH`].
    ///
    /// # Errors
    /// [`HostError`]
    pub fn open() -> Result<Self, HostError> {
        Self::open_at(Path::new(KVM_PATH))
    }

    /// Opens the KVM at `path` and asks what it can do.
    ///
    /// # Errors
    /// [`HostError`]
    pub fn open_at(path: &Path) -> Result<Self, HostError> {
        let name = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| HostError::Missing { path: path.into() })?;
        let kvm = Kvm::new_with_path(name).map_err(|cause| match cause.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::Missing { path: path.into() },
            libc::EACCES | libc::EPERM => HostError::Permission { path: path.into() },
            _ => HostError::Open { path: path.into(), cause },
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HostError::Version { path: path.into(), version });
        }
        let needed = [
            Cap::UserMemory,
            Cap::SetTssAddr,
            Cap::Irqchip,
            Cap::Pit2,
            Cap::PitState2,
            Cap::VcpuEvents,
            Cap::MpState,
            Cap::Debugregs,
            Cap::Xsave,
            Cap::Xcrs,
            Cap::AdjustClock,
            Cap::ImmediateExit,
        ];
        if let Some(missing) = needed.into_iter().find(|&cap| !kvm.check_extension(cap)) {
            return Err(HostError::Capability(missing));
        }
        let manual = kvm.check_extension_raw(CAP_MANUAL_DIRTY_LOG) > 0;
        let tracker = if manual { TrackerKind::Manual } else { TrackerKind::Legacy };
        let tsc_control = kvm.check_extension(Cap::TscControl);
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { kvm, tracker, tsc_control, tsc_deadline, reduced: CpuTemplate::NONE })
    }

    /// Tracks dirty pages by `kind` from now on, if the host has it.
    #[must_use]
    pub fn with_tracker(mut self, kind: TrackerKind) -> Self {
        if self.tracker == TrackerKind::Manual {
            self.tracker = kind;
        }
        self
    }

    /// Passes for a host whose processor has no more than `template` leaves of this one's CPUID.
    #[must_use]
    pub fn reduced_by(mut self, template: CpuTemplate) -> Self {
        self.reduced = template;
        self
    }

    /// How dirty pages are tracked.
    pub fn tracker(&self) -> TrackerKind {
        self.tracker
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Whether a vCPU can be given another TSC frequency than the host's.
    pub(crate) fn tsc_control(&self) -> bool {
        self.tsc_control
    }

    /// Whether the local APIC timer has TSC deadline mode, which KVM_GET_SUPPORTED_CPUID does not tell.
    pub(crate) fn tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    pub(crate) fn supported_cpuid(&self) -> Result<CpuId, HostError> {
        let mut cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(HostError::Cpuid)?;
        self.reduced.change_cpuid(&mut cpuid)?;
        Ok(cpuid)
    }

    pub(crate) fn msr_indices(&self) -> Result<Vec<u32>, HostError> {
        Ok(self.kvm.get_msr_index_list().map_err(HostError::Msrs)?.as_slice().to_vec())
    }
}

/// Whether a saved value of MSR `index` need not be set: it is none of the guest's state, and some host refuses it.
pub(crate) fn msr_is_not_state(index: u32) -> bool {
    MSRS_NOT_SETTABLE.contains(&index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_kvm_says_what_to_load() {
        let error = Host::open_at(Path::new("/nonexistent/kvm")).err().unwrap();
        assert!(matches!(error, HostError::Missing { .. }));
        let text = error.to_string();
        assert!(text.contains("/nonexistent/kvm") && text.contains("kvm-intel"), "{text}");
    }

    #[test]
    fn file_that_is_not_kvm_is_refused() {
        let error = Host::open_at(Path::new("/dev/null")).err().unwrap();
        assert!(matches!(error, HostError::Version { version: -1, .. }), "{error}");
    }
}
