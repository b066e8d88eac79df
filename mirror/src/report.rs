//! What happens, for whoever watches: the command's display, logs, metrics, tests.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Guid, Term};

/// Durations of the phases of one pause, in microseconds. Their sum is the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PausePhases {
    /// Stopping all vCPUs.
    pub stop_us: u64,
    /// Taking the dirty set.
    pub harvest_us: u64,
    /// Copying dirty pages to staging.
    pub copy_us: u64,
    /// Capturing vCPU, VM and device state.
    pub capture_us: u64,
    /// Letting the vCPUs run again.
    pub resume_us: u64,
}

impl PausePhases {
    /// The whole pause in microseconds.
    pub fn total_us(&self) -> u64 {
        self.stop_us + self.harvest_us + self.copy_us + self.capture_us + self.resume_us
    }
}

/// Something for the whole pause and for each of its phases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as the fields of `PausePhases`")]
pub struct PerPhase<T> {
    /// For the whole pause.
    pub total: T,
    pub stop: T,
    pub harvest: T,
    pub copy: T,
    pub capture: T,
    pub resume: T,
}

impl<T> PerPhase<T> {
    /// Adds a pause: each time in microseconds to its own, by `add`.
    pub fn record(&mut self, phases: &PausePhases, add: impl Fn(&mut T, u64)) {
        add(&mut self.total, phases.total_us());
        add(&mut self.stop, phases.stop_us);
        add(&mut self.harvest, phases.harvest_us);
        add(&mut self.copy, phases.copy_us);
        add(&mut self.capture, phases.capture_us);
        add(&mut self.resume, phases.resume_us);
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Report {
    /// A standby listens.
    Listening {
        /// Where.
        address: String,
    },
    /// Primary and standby agreed on an allocation.
    Joined {
        /// Its name.
        guid: Guid,
        /// The primary's term.
        term: Term,
        /// Pages of guest memory.
        pages: u64,
    },
    /// A seeding round begins.
    RoundStarted {
        /// Counted from 1.
        round: u32,
        /// Pages to send.
        pages: u64,
    },
    /// So much of a round has been sent.
    RoundProgress {
        /// Which round.
        round: u32,
        /// Pages sent of it.
        sent: u64,
        /// Pages of it.
        pages: u64,
    },
    /// So much of the guest's disks is still to be sent to the standby, which has images of its own.
    DiskSync {
        /// Bytes of these disks.
        bytes: u64,
        /// Bytes to be sent.
        left: u64,
    },
    /// The standby has received a round.
    RoundDone {
        /// Which round.
        round: u32,
        /// Pages sent.
        pages: u64,
        /// Bytes on the wire.
        bytes: u64,
        /// Microseconds from its first page to the standby's answer.
        micros: u64,
        /// Pages that the guest dirtied meanwhile.
        dirtied: u64,
    },
    /// An epoch is committed.
    Committed {
        /// Which.
        epoch: Epoch,
        /// Pages in it.
        pages: u64,
        /// Bytes on the wire.
        bytes: u64,
        /// The pause that began its successor.
        pause: PausePhases,
        /// Microseconds from the end of the pause to the standby's answer.
        commit_us: u64,
        /// Position up to which output may leave.
        released: u64,
        /// Microseconds for which the first output of the epoch was held, as far as the driver saw it; `None` without output.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        held_us: Option<u64>,
        /// Whether it did not fit staging, so that its pause had to wait for the link.
        #[serde(default)]
        stalled: bool,
    },
    /// The guest stands still, and what it has output is held, until it is known that it may go on.
    Suspended {
        /// What is missing.
        reason: String,
    },
    /// It goes on.
    Thawed {
        /// The term in which this side runs it.
        term: Term,
    },
    /// A guest without protection is to have a standby again, and none takes it yet.
    Seeking {
        /// What came of it.
        reason: String,
    },
    /// The standby can take over from now on.
    Protected {
        /// The epoch it holds.
        epoch: Epoch,
    },
    /// One more standby can take over from now on.
    StandbyGained {
        /// The epoch it holds.
        epoch: Epoch,
        /// How many can.
        standbys: u32,
    },
    /// One of several standbys is lost; the others go on.
    StandbyLeft {
        /// How that was noticed.
        reason: String,
        /// Microseconds since its last sign of life.
        silent_us: u64,
        /// How many can take over now.
        standbys: u32,
    },
    /// The witness has shut out a standby that was lost: this side goes on in a new term with those that are left.
    Renewed {
        /// The term.
        term: Term,
        /// How many are left.
        standbys: u32,
    },
    /// The guest goes on without protection.
    Unprotected {
        /// Why.
        reason: String,
    },
    /// The standby is lost; the witness is asked.
    StandbyLost {
        /// How that was noticed.
        reason: String,
        /// Microseconds since its last sign of life.
        #[serde(default)]
        silent_us: u64,
    },
    /// The primary is lost.
    PrimaryLost {
        /// How that was noticed.
        reason: String,
        /// The last complete epoch.
        epoch: Epoch,
        /// Microseconds since its last sign of life.
        #[serde(default)]
        silent_us: u64,
    },
    /// The mirror's link tells nothing of the primary any more, which lives by the second link: it is given time to go on.
    HeardElsewhere {
        /// How the link was lost.
        reason: String,
    },
    /// The second link, on which the standby hears that this side lives, is there from now on, or is not.
    SecondLink {
        /// Where the standby listens on it.
        address: String,
        /// Whether it is there.
        up: bool,
    },
    /// The standby does not run the guest.
    Refused {
        /// Why not.
        reason: String,
    },
    /// No automatic failover: an operator must decide.
    AwaitingPromotion {
        /// Why.
        reason: String,
    },
    /// The witness made this side the live one.
    Won {
        /// In this term.
        term: Term,
    },
    /// The guest is this side's, and does not run before the old primary is kept from writing to what both reach.
    Fencing {
        /// What is being done about that, or what it waits for.
        reason: String,
    },
    /// The witness gave no answer; it is asked again.
    WitnessSilent {
        /// Why.
        reason: String,
    },
    /// The primary goes on alone.
    Solo {
        /// Its term.
        term: Term,
    },
    /// Another side is live: this one has stopped its guest and releases nothing.
    Frozen {
        /// Why.
        reason: String,
    },
    /// The standby runs the guest.
    Active {
        /// From the end of this epoch.
        epoch: Epoch,
        /// In this term.
        term: Term,
        /// Its output goes on at this position.
        output_start: u64,
    },
    /// The standby runs the guest by this side's own wish: this one has stopped it and is done.
    HandedOver {
        /// In this term.
        term: Term,
        /// Microseconds for which the guest ran on neither side: from its last pause here to the standby's answer.
        pause_us: u64,
    },
    /// A switchover was asked for and did not come about; the guest goes on here unless another report says otherwise.
    SwitchoverFailed {
        /// Why.
        reason: String,
    },
    /// The guest goes on without its standby, which has forgotten it, as was wished.
    Detached {
        /// This side's term.
        term: Term,
    },
    /// A standby was to be detached and is not.
    DetachFailed {
        /// Why.
        reason: String,
    },
    /// The guest's memory comes from a snapshot while it runs.
    MemoryArriving {
        /// Pages that are there.
        there: u64,
        /// Pages that the snapshot has.
        pages: u64,
    },
    /// All of the guest's memory has come from the snapshot.
    MemoryComplete {
        /// Pages that the snapshot has.
        pages: u64,
        /// Microseconds that it took.
        micros: u64,
    },
    /// The guest has ended.
    Ended {
        /// How.
        reason: String,
    },
    /// Something failed that does not end the guest.
    Failed {
        /// What.
        reason: String,
    },
}

/// A report with the time at which it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamped {
    /// Microseconds of the host's monotonic clock: comparable between processes of one host.
    pub at_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub report: Report,
}

impl Stamped {
    /// Stamps `report` with the time now.
    pub fn now(report: Report) -> Self {
        Self { at_us: monotonic_us(), report }
    }
}

/// Microseconds of the host's monotonic clock.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}
