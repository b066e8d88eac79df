//! What a block device is made from.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::rate_limiter::RateLimiterConfig;

/// A virtio disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// Its name; the guest reads the first 20 bytes of it as the disk's serial number.
    pub id: String,
    /// The image, or a block device.
    pub path: PathBuf,
    /// How the image is made.
    pub format: ImageFormat,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether the guest's root file system is on it.
    pub root: bool,
    /// What becomes of a flush.
    pub cache: CacheType,
    /// Who carries requests out.
    pub engine: EngineKind,
    /// Limits on what the guest reads and writes.
    pub limits: Option<RateLimiterConfig>,
    /// Which image the standby of a mirrored guest has.
    pub replication: Replication,
}

/// Which image the standby of a mirrored guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Replication {
    /// The same: it lies where both sides reach it, behind a fence.
    Shared(FenceConfig),
    /// One of its own, which is made and kept equal.
    Replicated,
}

impl Default for Replication {
    fn default() -> Self {
        Self::Shared(FenceConfig::default())
    }
}

/// What keeps a side that has lost its guest from writing to an image that both sides reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceConfig {
    /// A lock on the image, which a new owner takes over, if need be by killing the old one.
    #[default]
    Lock,
    /// A watchdog of the host, whose time a new owner waits out.
    Watchdog(WatchdogConfig),
}

/// A watchdog device, which resets its host when it is not petted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogConfig {
    /// Where it is, on each host.
    pub device: PathBuf,
    /// Seconds after which it resets the host.
    pub timeout_s: u32,
}

impl WatchdogConfig {
    /// The time after which it resets the host.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s.into())
    }
}

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageFormat {
    /// Raw, unless the file begins like a qcow2 image.
    #[default]
    Detect,
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// What becomes of a flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The guest is told that there is no need to flush: what it has written may be lost when the host loses power.
    #[default]
    Unsafe,
    /// A flush returns when everything written before is on stable storage.
    Writeback,
}

/// Who carries requests out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineKind {
    /// io_uring where the kernel has it and the image is raw, threads otherwise.
    #[default]
    Auto,
    /// Threads.
    Threads,
    /// io_uring; an error where it cannot be had.
    IoUring,
}
