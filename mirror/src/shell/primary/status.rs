//! What a primary is doing, in figures, for whoever asks.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::guest::DiskSync;
use crate::ids::{Epoch, Guid, Term};
use crate::link::Address;
use crate::shell::metrics::PauseSummary;
use crate::wire::message::Sense;

/// What a primary is doing, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = PrimaryStatus))]
pub struct Status {
    /// "primary".
    pub role: String,
    /// The state machine's phase.
    pub phase: String,
    /// The guest.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub guid: Guid,
    /// Its term.
    pub term: Term,
    /// The last epoch that is committed.
    pub epoch: Epoch,
    /// Where the standby is; the first, if there are several.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub standby: Address,
    /// Whether a witness is configured.
    pub witness: bool,
    /// Seeding round, counted from 1.
    pub round: u32,
    /// Pages of this round.
    pub round_pages: u64,
    /// How many of them have been sent.
    pub round_sent: u64,
    /// Pages of guest memory.
    pub pages: u64,
    /// Pages sent while seeding.
    pub seed_pages: u64,
    /// Bytes sent while seeding.
    pub seed_bytes: u64,
    /// Pages sent in epochs.
    pub epoch_pages: u64,
    /// Bytes sent in epochs.
    pub epoch_bytes: u64,
    /// Epochs that did not fit staging, so that their pause had to wait for the link.
    pub epochs_stalled: u64,
    /// Output that waits for its epoch, in bytes.
    pub held_bytes: u64,
    /// How far the standby's own disk images are.
    pub disk_sync: DiskSync,
    /// What the standby last said of itself.
    pub standby_sense: Sense,
    /// Each of its standbys.
    #[serde(default)]
    pub standbys: Vec<StandbyFigures>,
    /// The pause, its phases, and the commit.
    #[serde(flatten)]
    pub times: PauseSummary,
}

/// What a primary has with one of its standbys. Its fields have names of their own, for those who look for a name in text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct StandbyFigures {
    /// Where it is.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub address: Address,
    /// How far it is: joining, seeding, ready, following, releasing.
    pub standing: String,
    /// The last epoch that it has acknowledged.
    pub acknowledged: Epoch,
    /// Whether the second link to it is there; `null` if it names none.
    #[serde(default)]
    pub second_link_up: Option<bool>,
    /// Its seeding round, counted from 1.
    pub seeding_round: u32,
    /// Pages of this round.
    pub seeding_pages: u64,
    /// How many of them have been sent.
    pub seeding_sent: u64,
}

/// Where the driver leaves its status for others.
#[derive(Debug, Default)]
pub(super) struct Shared {
    status: Mutex<Option<Status>>,
}

impl Shared {
    pub(super) fn publish(&self, status: Status) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
    }
}

/// Reads a primary's status; can be cloned and outlives the mirror.
#[derive(Clone, Debug)]
pub struct StatusHandle(Arc<Shared>);

impl StatusHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// What the primary is doing; `None` before its first step.
    pub fn status(&self) -> Option<Status> {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
