//! The bodies of the API. What Firecracker has is as Firecracker has it.

use std::path::PathBuf;

use mirror::shell::{primary, standby};
use serde::{Deserialize, Serialize};

use crate::config::devices::RateLimiter;

/// Firecracker's InstanceInfo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The program.
    pub app_name: String,
    /// The instance.
    pub id: String,
    /// What its guest does.
    pub state: InstanceState,
    /// The program's version.
    pub vmm_version: String,
}

impl InstanceInfo {
    /// This program's info.
    pub fn new(id: &str, state: InstanceState) -> Self {
        Self {
            app_name: "Understudy".into(),
            id: id.into(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// There is none that runs yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// It stands still.
    Paused,
    /// It runs.
    Running,
}

/// Firecracker's FirecrackerVersion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The program's version; the name is Firecracker's, for its clients' sake.
    pub firecracker_version: String,
}

/// How a mirror is, as the side tells that is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MirrorStatus {
    /// The side that runs, or ran, the guest from its start.
    Primary(Box<primary::Status>),
    /// The side that waits, holds the mirror, or has taken over.
    Standby(Box<standby::Status>),
}

/// What a switchover cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switchover {
    /// Microseconds for which the guest ran on neither side.
    pub pause_us: u64,
}

/// Firecracker's SnapshotCreateParams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Full or Diff.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes.
    pub snapshot_path: PathBuf,
    /// Where memory goes.
    pub mem_file_path: PathBuf,
}

/// What of memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the snapshot before.
    Diff,
}

/// Firecracker's Vm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What the guest is to do.
    pub state: VmState,
}

/// What a guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Stand still.
    Paused,
    /// Go on.
    Resumed,
}

/// Firecracker's PartialDrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// The disk's name.
    pub drive_id: String,
    /// Another image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Other limits; a bucket that is not given stays as it is, one of size or time 0 is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Firecracker's PartialNetworkInterface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// The card's name.
    pub iface_id: String,
    /// Other limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits on what it sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Firecracker's Error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What is wrong.
    pub fault_message: String,
}
