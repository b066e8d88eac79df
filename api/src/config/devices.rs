//! The device sections of a configuration file. Names, types and defaults of what Firecracker has are Firecracker's
//! (`firecracker.yaml`).

use std::path::PathBuf;

use devices::rate_limiter::{RateLimiterConfig, TokenBucketConfig};
use devices::virtio::balloon::BalloonConfig;
use devices::virtio::block::{
    BlockConfig, CacheType, EngineKind, FenceConfig, ImageFormat, Replication, WatchdogConfig,
};
use devices::virtio::console::{COLUMNS, ConsoleConfig, ConsolePlace, ROWS};
use devices::virtio::net::{Mac, NetConfig, queue_pairs};
use devices::virtio::rng::RngConfig;
use devices::virtio::vsock::VsockConfig;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, by which other requests and the standby's options call it.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub drive_id: String,
    /// The image, raw or qcow2.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
    /// Whether the guest's root file system is on it: the kernel is then told so.
    pub is_root_device: bool,
    /// Whether the guest may only read.
    #[serde(default)]
    pub is_read_only: bool,
    /// The partition with the root file system, if it is not the whole disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// What becomes of a flush.
    #[serde(default)]
    pub cache_type: DriveCache,
    /// Who carries requests out; by default io_uring where it can be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Which image the standby of a mirrored guest has.
    #[serde(default, skip_serializing_if = "DriveReplication::is_default")]
    pub replication: DriveReplication,
}

/// Which image the standby of a mirrored guest has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveReplication {
    /// Whether it is the same one, or one of its own.
    #[serde(default)]
    pub mode: ReplicationMode,
    /// What keeps an old primary from writing late to an image that is shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<DriveFence>,
    /// The watchdog, if that is the fence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<DriveWatchdog>,
}

/// What keeps an old primary from writing late to an image that is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriveFence {
    /// A lock on the image, which the standby must be able to see. A standby that takes over kills a process of its own host
    /// that still has it, and waits for one of another host.
    #[default]
    Lock,
    /// A watchdog of each host, which resets the host of a primary that makes no progress. A standby that takes over waits
    /// two and a half times its time.
    Watchdog,
}

/// A watchdog of each host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveWatchdog {
    /// Its device.
    #[serde(default = "watchdog_device")]
    #[schema(value_type = String)]
    pub device: PathBuf,
    /// Seconds after which it resets the host, 1 to 600.
    #[serde(default = "watchdog_timeout")]
    #[schema(minimum = 1, maximum = 600)]
    pub timeout_s: u32,
}

fn watchdog_device() -> PathBuf {
    "/dev/watchdog".into()
}

fn watchdog_timeout() -> u32 {
    10
}

impl Default for DriveWatchdog {
    fn default() -> Self {
        Self { device: watchdog_device(), timeout_s: watchdog_timeout() }
    }
}

/// Which image the standby of a mirrored guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReplicationMode {
    /// The same, which lies where both sides reach it, behind a fence: what the guest writes waits until the standby knows of
    /// it.
    #[default]
    Shared,
    /// One of its own, which is made and kept equal: what the guest writes goes to the local image at once, and to the
    /// standby with the epoch. Raw images only.
    Replicated,
}

impl DriveReplication {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.mode == ReplicationMode::Replicated && self.fence.is_some() {
            let reason = "is for a shared image; each side of a replicated drive has its own, and needs none";
            return Err(("drives.replication.fence", reason.into()));
        }
        let Some(watchdog) = &self.watchdog else { return Ok(()) };
        if self.fence != Some(DriveFence::Watchdog) {
            let reason = "is only used with \"fence\": \"watchdog\"";
            return Err(("drives.replication.watchdog", reason.into()));
        }
        if !(1..=600).contains(&watchdog.timeout_s) {
            let reason = format!("{} is out of range; give 1 to 600 seconds", watchdog.timeout_s);
            return Err(("drives.replication.watchdog.timeout_s", reason));
        }
        Ok(())
    }

    fn fence(&self) -> FenceConfig {
        match self.fence.unwrap_or_default() {
            DriveFence::Lock => FenceConfig::Lock,
            DriveFence::Watchdog => {
                let DriveWatchdog { device, timeout_s } = self.watchdog.clone().unwrap_or_default();
                FenceConfig::Watchdog(WatchdogConfig { device, timeout_s })
            }
        }
    }
}

/// What becomes of a flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum DriveCache {
    /// The guest sees no need to flush.
    #[default]
    Unsafe,
    /// What was flushed is on stable storage.
    Writeback,
}

/// Who carries requests out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum IoEngine {
    /// Threads.
    Sync,
    /// io_uring.
    Async,
}

impl Drive {
    /// The device that it asks for.
    pub fn device(&self) -> BlockConfig {
        BlockConfig {
            id: self.drive_id.clone(),
            path: self.path_on_host.clone(),
            format: ImageFormat::Detect,
            read_only: self.is_read_only,
            root: self.is_root_device,
            cache: match self.cache_type {
                DriveCache::Unsafe => CacheType::Unsafe,
                DriveCache::Writeback => CacheType::Writeback,
            },
            engine: match self.io_engine {
                None => EngineKind::Auto,
                Some(IoEngine::Sync) => EngineKind::Threads,
                Some(IoEngine::Async) => EngineKind::IoUring,
            },
            limits: self.rate_limiter.as_ref().map(RateLimiter::limits),
            replication: match self.replication.mode {
                ReplicationMode::Shared => Replication::Shared(self.replication.fence()),
                // What is never written is equal for ever.
                ReplicationMode::Replicated if self.is_read_only => Replication::default(),
                ReplicationMode::Replicated => Replication::Replicated,
            },
        }
    }

    /// What the kernel's command line says of a root device.
    pub fn root_argument(&self) -> Option<String> {
        let access = if self.is_read_only { "ro" } else { "rw" };
        let place = self.partuuid.as_ref().map_or("/dev/vda".into(), |uuid| format!("PARTUUID={uuid}"));
        self.is_root_device.then(|| format!("root={place} {access}"))
    }
}

/// A network card on a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name, by which other requests and the standby's options call it.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub iface_id: String,
    /// The tap on the host; created if there is none. If it takes several readers (`multi_queue`), the card has a pair of
    /// queues for each vCPU.
    pub host_dev_name: String,
    /// Its address; made up if not given.
    #[serde(default = "made_up", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$")]
    pub guest_mac: Option<Mac>,
    /// Longest packet in bytes, 68 to 65535.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 65_535)]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// An address for a card that was given none: it stays with the guest wherever it goes.
fn made_up() -> Option<Mac> {
    Mac::random().ok()
}

impl NetworkInterface {
    /// The device that it asks for, in a machine of `vcpus` vCPUs.
    pub fn device(&self, vcpus: u8) -> NetConfig {
        NetConfig {
            id: self.iface_id.clone(),
            tap: self.host_dev_name.clone(),
            mac: self.guest_mac.or_else(made_up).unwrap_or(Mac([2, 0, 0, 0, 0, 1])),
            mtu: self.mtu,
            queue_pairs: queue_pairs(&self.host_dev_name, vcpus),
            receive_limits: self.rx_rate_limiter.as_ref().map(RateLimiter::limits),
            send_limits: self.tx_rate_limiter.as_ref().map(RateLimiter::limits),
        }
    }
}

/// Limits on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// On bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// On operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of tokens (bytes or operations).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// What it holds.
    pub size: u64,
    /// What there is once beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which it fills.
    pub refill_time: u64,
}

impl RateLimiter {
    /// The limits that it asks for.
    pub fn limits(&self) -> RateLimiterConfig {
        let bucket = |bucket: TokenBucket| TokenBucketConfig {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or(0),
            refill_time: bucket.refill_time,
        };
        RateLimiterConfig { bandwidth: self.bandwidth.map(bucket), ops: self.ops.map(bucket) }
    }
}

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address, from 3 on.
    #[schema(minimum = 3, maximum = 4_294_967_294_u32)]
    pub guest_cid: u32,
    /// The Unix socket for programs that connect to the guest.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
    /// A name that nobody uses any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl Vsock {
    /// The device that it asks for.
    pub fn device(&self) -> VsockConfig {
        VsockConfig { guest_cid: self.guest_cid, uds_path: self.uds_path.clone() }
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.guest_cid < 3 || self.guest_cid == u32::MAX {
            let reason = format!("{} is out of range; give 3 to 4294967294", self.guest_cid);
            return Err(("vsock.guest_cid", reason));
        }
        Ok(())
    }
}

/// A source of random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

impl Entropy {
    /// The device that it asks for.
    pub fn device(&self) -> RngConfig {
        RngConfig { limits: self.rate_limiter.as_ref().map(RateLimiter::limits) }
    }
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// MiB that the guest is asked to give back.
    #[schema(maximum = 4_294_967_295_u32)]
    pub amount_mib: u32,
    /// Whether the guest may take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; 0: none.
    #[serde(default)]
    #[schema(maximum = 65_535)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest tells of pages that it does not need.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl Balloon {
    /// The device that it asks for.
    pub fn device(&self) -> BalloonConfig {
        BalloonConfig {
            amount_mib: self.amount_mib,
            deflate_on_oom: self.deflate_on_oom,
            statistics_interval_s: self.stats_polling_interval_s,
            free_page_reporting: self.free_page_reporting,
        }
    }
}

/// A console beside the serial port, which Linux calls `hvc0`. Its other end is a socket or an output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// A Unix socket, on which one program at a time reads and writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket_path: Option<PathBuf>,
    /// A file, FIFO or terminal that is written to; a terminal is read from as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub output_path: Option<PathBuf>,
    /// Characters in a row.
    #[serde(default = "columns")]
    #[schema(maximum = 65_535)]
    pub columns: u16,
    /// Rows.
    #[serde(default = "rows")]
    #[schema(maximum = 65_535)]
    pub rows: u16,
}

fn columns() -> u16 {
    COLUMNS
}

fn rows() -> u16 {
    ROWS
}

impl Console {
    /// The device that it asks for.
    pub fn device(&self) -> ConsoleConfig {
        let place = match &self.socket_path {
            Some(path) => ConsolePlace::Socket(path.clone()),
            None => ConsolePlace::Output(self.output_path.clone().unwrap_or_default()),
        };
        ConsoleConfig { place, columns: self.columns, rows: self.rows }
    }

    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.socket_path.is_some() == self.output_path.is_some() {
            return Err(("console", "give either socket_path or output_path".into()));
        }
        Ok(())
    }
}

fn check_name(field: &'static str, id: &str) -> Result<(), (&'static str, String)> {
    if id.is_empty() || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err((field, format!("{id:?} is no name; use letters, digits and underscores")));
    }
    Ok(())
}

/// Checks names, and that no two cards want the same tap or address.
pub(super) fn check_interfaces(list: &[NetworkInterface]) -> Result<(), (&'static str, String)> {
    for (index, net) in list.iter().enumerate() {
        check_name("network-interfaces.iface_id", &net.iface_id)?;
        let others = &list[..index];
        if others.iter().any(|other| other.iface_id == net.iface_id) {
            let reason = format!("{:?} is the name of two interfaces; give each its own", net.iface_id);
            return Err(("network-interfaces.iface_id", reason));
        }
        if others.iter().any(|other| other.host_dev_name == net.host_dev_name) {
            let reason = format!("{:?} is used by two interfaces; give each its own", net.host_dev_name);
            return Err(("network-interfaces.host_dev_name", reason));
        }
        if net.guest_mac.is_some() && others.iter().any(|other| other.guest_mac == net.guest_mac) {
            return Err(("network-interfaces.guest_mac", "two interfaces have the same address".into()));
        }
        if net.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(("network-interfaces.mtu", "is out of range; give 68 to 65535 bytes".into()));
        }
    }
    Ok(())
}

/// Puts the root device first, where the kernel's command line says it is, and checks names.
pub(super) fn order(drives: &mut [Drive]) -> Result<(), (&'static str, String)> {
    if drives.iter().filter(|drive| drive.is_root_device).count() > 1 {
        return Err(("drives.is_root_device", "is true of two drives; a guest has one root device".into()));
    }
    for (index, drive) in drives.iter().enumerate() {
        let id = &drive.drive_id;
        check_name("drives.drive_id", id)?;
        if drives[..index].iter().any(|other| other.drive_id == *id) {
            return Err(("drives.drive_id", format!("{id:?} is the name of two drives; give each its own")));
        }
        drive.replication.check()?;
    }
    drives.sort_by_key(|drive| !drive.is_root_device);
    Ok(())
}
