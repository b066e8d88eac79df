//! The bodies of the API. What Firecracker has is as Firecracker has it.

use mirror::shell::{primary, standby};
use serde::{Deserialize, Serialize};

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

/// Firecracker's Error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What is wrong.
    pub fault_message: String,
}
