//! The device sections of a configuration file. Names, types and defaults are Firecracker's (`firecracker.yaml`).

use std::path::PathBuf;

use devices::virtio::block::{BlockConfig, CacheType, EngineKind, ImageFormat};
use serde::{Deserialize, Serialize};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, by which other requests and the standby's options call it.
    pub drive_id: String,
    /// The image, raw or qcow2.
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
}

/// What becomes of a flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DriveCache {
    /// The guest sees no need to flush.
    #[default]
    Unsafe,
    /// What was flushed is on stable storage.
    Writeback,
}

/// Who carries requests out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
        }
    }

    /// What the kernel's command line says of a root device.
    pub fn root_argument(&self) -> Option<String> {
        let access = if self.is_read_only { "ro" } else { "rw" };
        let place = self.partuuid.as_ref().map_or("/dev/vda".into(), |uuid| format!("PARTUUID={uuid}"));
        self.is_root_device.then(|| format!("root={place} {access}"))
    }
}

/// Puts the root device first, where the kernel's command line says it is, and checks names.
pub(super) fn order(drives: &mut [Drive]) -> Result<(), (&'static str, String)> {
    if drives.iter().filter(|drive| drive.is_root_device).count() > 1 {
        return Err(("drives.is_root_device", "is true of two drives; a guest has one root device".into()));
    }
    for (index, drive) in drives.iter().enumerate() {
        let id = &drive.drive_id;
        if id.is_empty() || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let reason = format!("{id:?} is no name; use letters, digits and underscores");
            return Err(("drives.drive_id", reason));
        }
        if drives[..index].iter().any(|other| other.drive_id == *id) {
            return Err(("drives.drive_id", format!("{id:?} is the name of two drives; give each its own")));
        }
    }
    drives.sort_by_key(|drive| !drive.is_root_device);
    Ok(())
}
