//! The bodies of the API. What Firecracker has is as Firecracker has it.

use std::path::PathBuf;

use mirror::ids::{Epoch, Term};
use mirror::link::Address;
use mirror::shell::{primary, standby};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::devices::RateLimiter;

/// Firecracker's InstanceInfo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// The program's version; the name is Firecracker's, for its clients' sake.
    pub firecracker_version: String,
}

/// How a mirror is, as the side tells that is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum MirrorStatus {
    /// The side that runs, or ran, the guest from its start.
    Primary(Box<primary::Status>),
    /// The side that waits, holds the mirror, or has taken over.
    Standby(Box<standby::Status>),
}

/// What both sides tell of where they are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) role: &'a str,
    pub(crate) phase: &'a str,
    pub(crate) term: Term,
    pub(crate) epoch: Epoch,
}

impl MirrorStatus {
    /// Where the side is, whichever it is.
    pub(crate) fn place(&self) -> Place<'_> {
        match self {
            Self::Primary(status) => {
                Place { role: &status.role, phase: &status.phase, term: status.term, epoch: status.epoch }
            }
            Self::Standby(status) => {
                Place { role: &status.role, phase: &status.phase, term: status.term, epoch: status.epoch }
            }
        }
    }

    /// What a primary tells.
    pub(crate) fn primary(self) -> Option<primary::Status> {
        match self {
            Self::Primary(status) => Some(*status),
            Self::Standby(_) => None,
        }
    }
}

/// Who is to run the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SwitchoverOrder {
    /// The standby at this address, one of several: `unix:PATH` or `tcp:HOST:PORT`; without it, any that holds all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^(unix:.+|tcp:.+:[0-9]{1,5})$")]
    pub to: Option<Address>,
}

/// What a switchover cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Switchover {
    /// Microseconds for which the guest ran on neither side.
    pub pause_us: u64,
}

impl Switchover {
    /// What is said of it.
    pub(crate) fn words(self) -> String {
        format!("the standby runs the guest; it stood still for {:.1} ms", self.pause_us as f64 / 1000.0)
    }
}

/// Firecracker's SnapshotCreateParams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Full or Diff.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where memory goes.
    #[schema(value_type = String)]
    pub mem_file_path: PathBuf,
}

/// Firecracker's SnapshotLoadParams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// Where the state is.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where memory is: it is mapped. Either this or `mem_backend`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
    /// Where memory is, and how it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// The old name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Whether pages written are logged, so that the next snapshot may be differential.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Whether the guest runs at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Taps that are others than before.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// The socket of the vsock device, if another than before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock is set to the time of day. Not to be had.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages of another size than in the snapshot. Not to be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePagesOverride>,
}

/// Firecracker's MemoryBackend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// How memory comes.
    pub backend_type: MemoryBackendType,
    /// The memory file.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
}

/// How memory comes from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MemoryBackendType {
    /// It is mapped.
    File,
    /// Its pages are read, and verified, when they are touched, and the rest meanwhile. There is no outside process that
    /// would provide them: the path is that of the memory file.
    Uffd,
}

/// Firecracker's NetworkOverride.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The card's name.
    pub iface_id: String,
    /// Its tap.
    pub host_dev_name: String,
}

/// Firecracker's VsockOverride.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
}

/// What pages memory is made of, other than the snapshot says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePagesOverride {
    /// As the snapshot says.
    Snapshot,
    /// Ordinary ones.
    None,
    /// Huge ones where the host finds some.
    Transparent,
    /// Of 2 MiB.
    #[serde(rename = "2M")]
    TwoMib,
}

/// What of memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the snapshot before.
    Diff,
}

/// Firecracker's Vm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What the guest is to do.
    pub state: VmState,
}

/// What a guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum VmState {
    /// Stand still.
    Paused,
    /// Go on.
    Resumed,
}

/// Firecracker's PartialDrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// The disk's name.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub drive_id: String,
    /// Another image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// Other limits; a bucket that is not given stays as it is, one of size or time 0 is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Firecracker's PartialNetworkInterface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// The card's name.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub iface_id: String,
    /// Other limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits on what it sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Firecracker's Error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// What is wrong.
    pub fault_message: String,
}

/// Firecracker's InstanceActionInfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// What a process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ActionType {
    /// Write metrics now.
    FlushMetrics,
    /// Run the guest.
    InstanceStart,
    /// Press the three keys.
    SendCtrlAltDel,
}

/// Firecracker's BalloonUpdate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that the guest is asked to give back.
    #[schema(maximum = 4_294_967_295_u32)]
    pub amount_mib: u32,
}

/// Firecracker's BalloonStatsUpdate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds between two looks at the guest's statistics.
    #[schema(maximum = 65_535)]
    pub stats_polling_interval_s: u16,
}

/// Firecracker's BalloonStats; what the guest does not tell is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs, reason = "named as in virtio 1.2, 5.5.6.4, in bytes or events")]
pub struct BalloonStats {
    /// Pages of 4 KiB that the guest is asked to give back.
    pub target_pages: u32,
    /// Pages that it has given.
    pub actual_pages: u32,
    /// The same in MiB.
    pub target_mib: u32,
    /// The same in MiB.
    pub actual_mib: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
}

/// How far an operation is that takes its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Pages that are done, of this round.
    pub done: u64,
    /// Pages that there are, in this round.
    pub pages: u64,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
}
