//! What the API can be asked to change, and when.

use std::path::PathBuf;

use devices::rate_limiter::RateLimiterConfig;
use serde_json::{Map, Value};
use vmm::snapshot::SnapshotRequest;

use super::types::SnapshotLoad;
use crate::config::{MirrorSection, MirrorUpdate, Section};

/// A change.
#[derive(Clone, Debug)]
pub enum Request {
    /// A section of the configuration.
    Configure(Box<Section>),
    /// Run the guest that is configured.
    Start,
    /// Go on with a guest from a snapshot.
    Load(Box<SnapshotLoad>),
    /// Let it stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Take a snapshot.
    Snapshot(SnapshotRequest),
    /// Break off the snapshot that is being taken.
    CancelSnapshot,
    /// Change a disk.
    Drive(DriveChange),
    /// Change the limits on a network card; what is not named stays as it is.
    Net {
        /// Its name.
        id: String,
        /// On what the guest receives.
        receive: RateLimiterConfig,
        /// On what it sends.
        send: RateLimiterConfig,
    },
    /// Ask the guest to give back so many MiB.
    Balloon(u32),
    /// Look at the guest's statistics so often, in seconds.
    BalloonStatistics(u16),
    /// Put metadata in the place of what is there.
    PutMetadata(Map<String, Value>),
    /// Change some of it (RFC 7386).
    PatchMetadata(Map<String, Value>),
    /// Mirror the guest.
    Attach(Box<MirrorSection>),
    /// Mirror it otherwise.
    Retune(MirrorUpdate),
    /// Mirror it no longer.
    Detach,
    /// Run the guest on this side, whose primary is lost.
    Failover,
    /// Write metrics now.
    FlushMetrics,
    /// Press the three keys.
    CtrlAltDel,
}

/// What is to become of a disk.
#[derive(Clone, Debug)]
pub struct DriveChange {
    /// Its name.
    pub id: String,
    /// Another image.
    pub image: Option<PathBuf>,
    /// Other limits; what is not named stays as it is.
    pub limits: RateLimiterConfig,
}

/// When a request is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the guest has started.
    Before,
    /// After that.
    After,
    /// Always.
    Always,
}

/// Why a request comes at the wrong time, in Firecracker's words.
pub const TOO_LATE: &str = "The requested operation is not supported after starting the microVM";
/// As [`TOO_LATE`].
pub const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM";

impl Request {
    /// When it is possible.
    pub fn when(&self) -> When {
        match self {
            // A guest may be mirrored from its first instruction on, or later.
            Self::Attach(_) | Self::Failover | Self::PutMetadata(_) | Self::PatchMetadata(_) => When::Always,
            Self::Configure(_) | Self::Start | Self::Load(_) => When::Before,
            _ => When::After,
        }
    }

    /// Checks that it is possible, with or without a guest that has been started.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, started: bool) -> Result<(), String> {
        match (self.when(), started) {
            (When::Before, true) => Err(TOO_LATE.into()),
            (When::After, false) => Err(TOO_EARLY.into()),
            _ => Ok(()),
        }
    }
}
