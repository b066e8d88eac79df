//! What happens to a primary, what it orders, and what it is doing.

use super::Pacing;
use crate::ids::{Epoch, LinkId, Term};
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::Message;
use crate::witness::Claim;

/// What can happen to a primary.
#[derive(Debug)]
pub enum Event {
    /// The link to a standby is up.
    Connected {
        /// Which.
        link: LinkId,
    },
    /// A message arrived, its header verified.
    Received {
        /// On which link.
        link: LinkId,
        /// Its header.
        header: Header,
        /// What it said.
        message: Message,
    },
    /// The link closed, broke, or carried something that is no message.
    LinkLost {
        /// Which.
        link: LinkId,
        /// How.
        reason: String,
    },
    /// Time has passed.
    Tick {
        /// Position after the last byte of output that the guest has produced.
        produced: u64,
        /// Position after the last byte of output that has left.
        released: u64,
        /// Whether other output waits that no epoch knows of.
        waits: bool,
        /// Pages dirty so far in this epoch, if known.
        dirty: Option<u64>,
    },
    /// Tracking is on and the populated pages are known; answer to [`Action::StartTracking`].
    Tracking {
        /// Of which standby.
        link: LinkId,
        /// How many pages there are to send.
        pages: u64,
    },
    /// Answer to [`Action::SendRound`].
    RoundSent {
        /// Of which standby.
        link: LinkId,
        /// Pages sent.
        pages: u64,
        /// Bytes sent.
        bytes: u64,
    },
    /// Answer to [`Action::Harvest`].
    Harvested {
        /// Of which standby.
        link: LinkId,
        /// Pages dirtied since.
        pages: u64,
        /// Whether the standby's disks are too far behind for an epoch to be taken.
        disks_lag: bool,
    },
    /// The pause is over; answer to [`Action::TakeEpoch`].
    Staged {
        /// Position after the last byte of output of the epoch.
        output_end: u64,
    },
    /// Answer to [`Action::SendEpoch`], once for each standby.
    EpochSent {
        /// Of which standby.
        link: LinkId,
    },
    /// Answer to [`Action::Claim`].
    Claimed(Claim),
    /// An operator wants a standby to run the guest.
    Switchover {
        /// Which; any that follows, if not given.
        to: Option<LinkId>,
    },
    /// An operator wants the guest to be mirrored no longer.
    Detach,
    /// Epochs are to end otherwise from now on.
    Retune(Pacing),
    /// Answer to [`Action::Drain`]: the position after the last byte of output that has left, or why not all has.
    Drained(Result<u64, String>),
    /// The guest has ended by itself; its vCPUs stand still.
    GuestEnded {
        /// How.
        reason: String,
    },
    /// The machine failed in something that mirroring needs.
    Failed {
        /// What.
        reason: String,
    },
}

/// What the shell around the state machine has to do, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send a message; the header carries the guest's GUID, this side's term, and `epoch`.
    Send {
        /// To whom.
        link: LinkId,
        /// The epoch of the header.
        epoch: Epoch,
        /// What.
        message: Message,
    },
    /// Agree with the standby's disks ([`crate::guest::Guest::agree`]); a failure is answered with [`Event::Failed`].
    Agree {
        /// Of which standby.
        link: LinkId,
        /// What it has of the guest's disks.
        disks: Vec<u8>,
    },
    /// Let a standby hear that this side lives on a link of its own as well, until it is closed and nothing is left to be
    /// decided ([`super::Primary::is_deciding`]).
    BeatAt {
        /// Which standby.
        link: LinkId,
        /// Where it listens.
        address: String,
    },
    /// Note what the standby has of the guest's memory: pages that are the same when tracking has started need not be sent.
    Note {
        /// Of which standby.
        link: LinkId,
        /// The first page.
        first: u64,
        /// Digests from there on.
        digests: Vec<u8>,
    },
    /// Start dirty tracking, find the populated pages, and answer with [`Event::Tracking`].
    StartTracking {
        /// For which standby.
        link: LinkId,
    },
    /// Stop dirty tracking.
    StopTracking,
    /// Send the pages of the dirty set, then `RoundEnd`, and answer with [`Event::RoundSent`].
    SendRound {
        /// To whom.
        link: LinkId,
        /// Counted from 1.
        round: u32,
    },
    /// Harvest while the guest runs and answer with [`Event::Harvested`].
    Harvest {
        /// For which standby.
        link: LinkId,
    },
    /// Hold what the guest outputs from now on.
    Hold,
    /// Pause, harvest, stage, capture, resume; answer with [`Event::Staged`].
    TakeEpoch {
        /// Which.
        epoch: Epoch,
        /// Who takes part in it: it holds what each of these has not been sent yet. Whoever is still being seeded owes what
        /// is in it.
        links: Vec<LinkId>,
    },
    /// From now on the guest does not go on after a pause, until [`Self::Resume`].
    StandStill,
    /// Wait until nothing that the guest asked for is still being carried out here, and all output that may leave has
    /// left; answer with [`Event::Drained`].
    Drain,
    /// The guest stands still at once, until [`Self::Resume`]; what it has output stays held.
    Suspend,
    /// Let a guest that stands still go on.
    Resume,
    /// Send the staged epoch, ending with its commit, to those who take part in it, and answer with
    /// [`Event::EpochSent`].
    SendEpoch {
        /// Which.
        epoch: Epoch,
    },
    /// The epoch is committed: what was staged is no longer needed, output up to here may leave.
    Release {
        /// Which.
        epoch: Epoch,
        /// Position.
        output_end: u64,
    },
    /// The staged epoch will not be acknowledged: its pages are dirty again.
    PutBack,
    /// Ask the witness for the term after `expected` and answer with [`Event::Claimed`]. A shell without witness
    /// answers that it is granted: without one no standby goes on by itself.
    Claim {
        /// The newest term known.
        expected: Term,
    },
    /// Nobody mirrors this guest any more, and it is the live one: release all output, now and later.
    PassOutput,
    /// Another side is live: stop the guest for good and release nothing more.
    Freeze,
    /// Close a link.
    Close(LinkId),
    /// Tell whoever watches.
    Report(Report),
}

/// What a primary is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing yet.
    Idle,
    /// Agreeing with the standby on an allocation.
    Joining,
    /// Copying memory while the guest runs.
    Seeding,
    /// Epochs are flowing.
    Lockstep,
    /// The standby is lost, the witness is asked.
    Deciding,
    /// The live side, alone.
    Solo,
    /// The live side, alone, and as long as it is alone the guest stands still.
    Suspended,
    /// The guest stands still and is the standby's; its answer is awaited.
    HandingOver,
    /// The standby runs the guest, as it was asked to.
    HandedOver,
    /// The standby is to forget the guest; its answer is awaited while the guest runs.
    Releasing,
    /// Another side is live.
    Frozen,
    /// The guest has ended.
    Ended,
}

impl Phase {
    /// Of the phases that single standbys are in, the one that counts for all is the furthest.
    pub(super) fn rank(self) -> u8 {
        match self {
            Self::Joining => 1,
            Self::Seeding => 2,
            Self::Releasing => 3,
            Self::Lockstep => 4,
            _ => 0,
        }
    }

    /// Whether nothing is left to be mirrored or decided: the guest is this side's alone, is another's, or has ended.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Solo | Self::Suspended | Self::HandedOver | Self::Frozen | Self::Ended)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Joining => "joining",
            Self::Seeding => "seeding",
            Self::Lockstep => "lockstep",
            Self::Deciding => "deciding",
            Self::Solo => "solo",
            Self::Suspended => "suspended",
            Self::HandingOver => "handing over",
            Self::HandedOver => "handed over",
            Self::Releasing => "releasing",
            Self::Frozen => "frozen",
            Self::Ended => "ended",
        }
    }
}
