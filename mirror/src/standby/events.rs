//! What happens to a standby, what it orders, and what it is doing.

use crate::ids::{Epoch, Guid, Term};
use crate::memory::Layout;
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Body, Message};
use crate::wire::pages::PageBatch;
use crate::witness::{Claim, Record};

use super::LinkId;

/// What can happen to a standby.
#[derive(Debug)]
pub enum Event {
    /// A frame arrived on a link.
    Received {
        /// On which link.
        link: LinkId,
        /// Its header, verified.
        header: Header,
        /// What it held.
        body: Body,
    },
    /// A link closed, broke, or carried something that is no frame.
    LinkLost {
        /// Which.
        link: LinkId,
        /// How.
        reason: String,
    },
    /// Time has passed.
    Tick,
    /// Answer to [`Action::Allocate`].
    Allocated {
        /// Whether the machine could be built, and what it has of the guest's disks.
        machine: Result<Vec<u8>, String>,
        /// What the witness says.
        witness: WitnessView,
    },
    /// Answer to [`Action::Apply`]: while pages were written nothing could be heard, so time counts from now.
    Applied,
    /// Answer to [`Action::KeepLog`].
    LogKept {
        /// Which.
        number: u64,
        /// Whether it is durable.
        outcome: Result<(), String>,
    },
    /// Answer to [`Action::Prepare`]: whether the guest can be run here.
    Prepared(Result<(), String>),
    /// Answer to [`Action::Claim`]: what the witness decided.
    Claimed(Claim),
    /// Answer to [`Action::Activate`].
    Activated(Result<(), String>),
    /// An operator says that this side shall run the guest.
    Promote,
    /// This side runs a guest that it did not get as a standby: there is no space for another.
    Occupied,
    /// The guest that ran here has gone: this side is a standby again.
    Vacated {
        /// Bytes for guest memory that there are now.
        space: u64,
    },
}

/// What the standby's witness says when an allocation is made.
#[derive(Clone, Debug)]
pub enum WitnessView {
    /// No witness is configured.
    None,
    /// Its record, if it has one.
    Record(Option<Record>),
    /// It could not be read.
    Failed(String),
}

/// What the shell around the state machine has to do, in this order.
#[derive(Debug)]
pub enum Action {
    /// Send a message.
    Send {
        /// To whom.
        link: LinkId,
        /// GUID, term and epoch of the header.
        stamp: (Guid, Term, Epoch),
        /// What.
        message: Message,
    },
    /// Close a link, after what was sent on it has gone.
    Close(LinkId),
    /// Build the twin machine, ask the witness for its record, and answer with [`Event::Allocated`].
    Allocate {
        /// The machine's description.
        machine: Vec<u8>,
        /// Its memory.
        layout: Layout,
    },
    /// Tell the primary what guest memory holds, if it holds anything ([`crate::resync::tell`]), by
    /// [`Message::Digests`].
    TellHeld {
        /// To whom.
        link: LinkId,
        /// GUID, term and epoch of the headers.
        stamp: (Guid, Term, Epoch),
    },
    /// Write these pages to guest memory: nothing complete is there yet that they could tear.
    Write(PageBatch),
    /// Write a whole epoch to guest memory and answer with [`Event::Applied`].
    Apply(Vec<PageBatch>),
    /// Make a write log durable and answer with [`Event::LogKept`]; heartbeats go on meanwhile.
    KeepLog {
        /// Counts them.
        number: u64,
        /// Of which epoch; [`Epoch::NONE`] while seeding.
        epoch: Epoch,
        /// The log.
        log: Vec<u8>,
    },
    /// Ask the witness for the term after `expected` and answer with [`Event::Claimed`].
    Claim {
        /// The guest.
        guid: Guid,
        /// The newest term known.
        expected: Term,
    },
    /// Make sure that a guest of this machine state can be run here, without running it, and answer with
    /// [`Event::Prepared`].
    Prepare {
        /// The machine state.
        state: Vec<u8>,
    },
    /// Make sure that no other side can touch what both reach, run the guest, and answer with [`Event::Activated`].
    Activate {
        /// The machine state.
        state: Vec<u8>,
        /// Position of the first byte of `output`.
        output_start: u64,
        /// Committed output that is not known to have been seen.
        output: Vec<u8>,
        /// The primary has given the guest up by itself.
        handed_over: bool,
    },
    /// Give the machine and its memory back.
    Release,
    /// Tell whoever watches.
    Report(Report),
}

/// What a standby is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing; a primary may come.
    Waiting,
    /// Space is promised to a link.
    Reserved,
    /// The machine is being built.
    Allocating,
    /// The machine is there.
    Allocated,
    /// Seeding rounds arrive.
    Receiving,
    /// It holds a complete epoch and receives the next.
    Shadowing,
    /// The primary is lost, the witness is asked.
    Claiming,
    /// The primary is lost, there is no witness, an operator must promote.
    Orphaned,
    /// A guest runs here.
    Active,
}

impl Phase {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Reserved => "reserved",
            Self::Allocating => "allocating",
            Self::Allocated => "allocated",
            Self::Receiving => "receiving",
            Self::Shadowing => "shadowing",
            Self::Claiming => "claiming",
            Self::Orphaned => "orphaned",
            Self::Active => "active",
        }
    }
}
