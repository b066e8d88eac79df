//! How a primary mirrors.

use std::time::Duration;

/// How a primary mirrors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Time between two signs of life.
    pub heartbeat: Duration,
    /// Missed signs of life after which the other side counts as lost.
    pub misses: u32,
    /// Time beyond the interval of epochs after which a side whose epochs stand still counts as lost, although it is heard
    /// of: a stuck processor or disk does not keep heartbeats from going.
    pub stall: Duration,
    /// When epochs end.
    pub pacing: Pacing,
    /// Whether to wait in the standby's queue if it has no space now.
    pub wait_for_space: bool,
    /// Whether there is a witness to ask which side lives.
    pub has_witness: bool,
    /// What becomes of a guest that was protected and is this side's alone.
    pub alone: Alone,
    /// The guest stands still, and its output is held, until it is protected: so it was left when a standby was lost.
    pub suspended: bool,
    /// How many standbys the guest is to have at once.
    pub standbys: u32,
    /// How many of several standbys are to acknowledge an epoch before those that lag behind are done without; all, if
    /// not given.
    pub quorum: Option<u32>,
}

impl Settings {
    /// Within which time of an epoch the next one makes progress, or something is wrong with this side.
    pub fn epoch_within(&self) -> Duration {
        self.pacing.interval + self.stall
    }

    /// How long the other side may be silent.
    pub(super) fn patience(&self) -> Duration {
        self.heartbeat * self.misses
    }
}

/// What becomes of a guest that is the live one and has no standby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alone {
    /// It goes on.
    #[default]
    Solo,
    /// It stands still, and what it has output is held.
    Suspended,
}

/// When an epoch ends. It can be changed at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pacing {
    /// Longest time between two epochs: so long they last while nobody outside waits.
    pub interval: Duration,
    /// Shortest time between two epochs: output that waits ends an epoch early, but not earlier than this, nor before the
    /// guest has run four times as long as a pause takes. The same as `interval`: epochs last just as long.
    pub min_interval: Duration,
    /// What the final pause of seeding may cost.
    pub pause_budget: Duration,
    /// Dirty pages that end an epoch early, so that its pause stays short.
    pub dirty_budget: u64,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(25),
            min_interval: Duration::from_millis(1),
            pause_budget: Duration::from_millis(10),
            dirty_budget: 4096,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            misses: 4,
            stall: Duration::from_secs(1),
            pacing: Pacing::default(),
            wait_for_space: false,
            has_witness: false,
            alone: Alone::Solo,
            suspended: false,
            standbys: 1,
            quorum: None,
        }
    }
}
