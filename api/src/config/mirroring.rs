//! Where and how to mirror a guest.

use std::path::PathBuf;
use std::time::Duration;

use mirror::ids::Guid;
use mirror::link::Address;
use mirror::primary::{Pacing, Settings};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::BadValue;

/// Where and how to mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorSection {
    /// Where the standby listens: `unix:PATH` or `tcp:HOST:PORT`.
    #[schema(value_type = String, pattern = "^(unix:.+|tcp:.+:[0-9]{1,5})$")]
    pub standby: Address,
    /// The witness, a file on storage that both sides share; without it there is no automatic failover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub witness: Option<PathBuf>,
    /// Names the guest to standby and witness; without it a new one is made at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = "uuid")]
    pub guid: Option<Guid>,
    /// How long the guest runs before it is mirrored. 0: it is mirrored from its first instruction on, and does not run
    /// if it cannot be; otherwise it runs on, unprotected, if it cannot be.
    #[serde(default)]
    #[schema(maximum = 4_294_967_295_u32)]
    pub delay_ms: u32,
    /// Longest time between two epochs.
    #[serde(default = "interval_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub interval_ms: u32,
    /// Shortest time between two epochs.
    #[serde(default = "min_interval_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub min_interval_ms: u32,
    /// What the final pause of seeding may cost.
    #[serde(default = "pause_budget_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub pause_budget_ms: u32,
    /// Dirty pages that end an epoch early.
    #[serde(default = "dirty_budget_pages")]
    #[schema(minimum = 1)]
    pub dirty_budget_pages: u64,
    /// Time between two signs of life.
    #[serde(default = "heartbeat_ms")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub heartbeat_ms: u32,
    /// Missed signs of life after which the other side counts as lost.
    #[serde(default = "heartbeat_misses")]
    #[schema(minimum = 1, maximum = 1000)]
    pub heartbeat_misses: u32,
    /// Room for pages copied aside in a pause.
    #[serde(default = "staging_mib")]
    #[schema(minimum = 1, maximum = 65_536)]
    pub staging_mib: u32,
    /// Whether to wait in the standby's queue if it has no space now.
    #[serde(default)]
    pub wait_for_space: bool,
}

impl MirrorSection {
    /// Mirrors to `standby`, all else as by default.
    pub fn to(standby: Address) -> Self {
        Self {
            standby,
            witness: None,
            guid: None,
            delay_ms: 0,
            interval_ms: interval_ms(),
            min_interval_ms: min_interval_ms(),
            pause_budget_ms: pause_budget_ms(),
            dirty_budget_pages: dirty_budget_pages(),
            heartbeat_ms: heartbeat_ms(),
            heartbeat_misses: heartbeat_misses(),
            staging_mib: staging_mib(),
            wait_for_space: false,
        }
    }
}

impl MirrorSection {
    pub(super) fn check(&self) -> Result<(), BadValue> {
        let positive = [
            ("mirror.interval_ms", self.interval_ms),
            ("mirror.min_interval_ms", self.min_interval_ms),
            ("mirror.pause_budget_ms", self.pause_budget_ms),
            ("mirror.heartbeat_ms", self.heartbeat_ms),
        ];
        if let Some((field, value)) = positive.into_iter().find(|(_, value)| !(1..=60_000).contains(value)) {
            return Err((field, format!("{value} is out of range; give 1 to 60000 ms")));
        }
        if self.min_interval_ms > self.interval_ms {
            let reason = format!(
                "{} is more than interval_ms, which is {}; give less, or raise interval_ms",
                self.min_interval_ms, self.interval_ms
            );
            return Err(("mirror.min_interval_ms", reason));
        }
        if !(1..=1000).contains(&self.heartbeat_misses) {
            let reason = format!("{} is out of range; give 1 to 1000", self.heartbeat_misses);
            return Err(("mirror.heartbeat_misses", reason));
        }
        if self.dirty_budget_pages == 0 {
            return Err(("mirror.dirty_budget_pages", "0 is out of range; give at least 1 page".into()));
        }
        if !(1..=65_536).contains(&self.staging_mib) {
            return Err((
                "mirror.staging_mib",
                format!("{} is out of range; give 1 to 65536 MiB", self.staging_mib),
            ));
        }
        Ok(())
    }

    /// The settings of the mirror.
    pub fn settings(&self) -> Settings {
        Settings {
            heartbeat: Duration::from_millis(self.heartbeat_ms.into()),
            misses: self.heartbeat_misses,
            pacing: self.pacing(),
            wait_for_space: self.wait_for_space,
            has_witness: self.witness.is_some(),
        }
    }

    /// When epochs end.
    pub fn pacing(&self) -> Pacing {
        Pacing {
            interval: Duration::from_millis(self.interval_ms.into()),
            min_interval: Duration::from_millis(self.min_interval_ms.into()),
            pause_budget: Duration::from_millis(self.pause_budget_ms.into()),
            dirty_budget: self.dirty_budget_pages,
        }
    }

    /// Room for pages copied aside in a pause, in pages.
    pub fn staging_pages(&self) -> usize {
        self.staging_mib as usize * ((1 << 20) / mirror::memory::PAGE_SIZE)
    }
}

/// What is to be otherwise while a guest is mirrored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MirrorUpdate {
    /// Longest time between two epochs, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub interval_ms: Option<u32>,
    /// Shortest time between two epochs, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub min_interval_ms: Option<u32>,
    /// What the final pause of seeding may cost, 1 to 60000 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 60_000)]
    pub pause_budget_ms: Option<u32>,
    /// Dirty pages that end an epoch early, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub dirty_budget_pages: Option<u64>,
}

impl MirrorUpdate {
    /// Changes `section`.
    ///
    /// # Errors
    /// What would be wrong with it then; it has not changed.
    pub fn apply(&self, section: &mut MirrorSection) -> Result<(), BadValue> {
        let next = MirrorSection {
            interval_ms: self.interval_ms.unwrap_or(section.interval_ms),
            min_interval_ms: self.min_interval_ms.unwrap_or(section.min_interval_ms),
            pause_budget_ms: self.pause_budget_ms.unwrap_or(section.pause_budget_ms),
            dirty_budget_pages: self.dirty_budget_pages.unwrap_or(section.dirty_budget_pages),
            ..section.clone()
        };
        next.check()?;
        *section = next;
        Ok(())
    }
}

// The defaults are those of the mirror itself, told here in the file's units.

fn interval_ms() -> u32 {
    Pacing::default().interval.as_millis() as u32
}

fn min_interval_ms() -> u32 {
    Pacing::default().min_interval.as_millis() as u32
}

fn pause_budget_ms() -> u32 {
    Pacing::default().pause_budget.as_millis() as u32
}

fn dirty_budget_pages() -> u64 {
    Pacing::default().dirty_budget
}

fn heartbeat_ms() -> u32 {
    Settings::default().heartbeat.as_millis() as u32
}

fn heartbeat_misses() -> u32 {
    Settings::default().misses
}

fn staging_mib() -> u32 {
    64
}
