//! The primary's threads: a driver that owns the guest and performs what the state machine orders, and for each standby
//! one that reads, one for heartbeats, and one for each seeding round.

use std::sync::Arc;

use thiserror::Error;

use super::Watcher;
use crate::console::Console;
use crate::guest::{Guest, GuestError};
use crate::ids::{Guid, Term};
use crate::link::{Address, LinkError, Stream};
use crate::memory::{LayoutError, PageMemory};
use crate::primary::Settings;
use crate::witness::{Claim, Witness, WitnessError};

mod driver;
mod handle;
mod peer;
mod status;

use driver::Driver;
pub use handle::{Handle, Notifier};
pub use status::{StandbyFigures, Status, StatusHandle};

/// What a primary needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to mirror.
    pub settings: Settings,
    /// The guest.
    pub guid: Guid,
    /// The name that the witness will know this side by; no other side may have it.
    pub name: String,
    /// The term in which this side runs the guest already, if it has been mirrored before.
    pub term: Option<Term>,
    /// Who decides which side lives; without one there is no automatic failover.
    pub witness: Option<Arc<dyn Witness>>,
    /// Where the first standby listens.
    pub standby: Address,
    /// Pages that fit into staging: what an epoch may have without stalling.
    pub staging_pages: usize,
}

/// Why a guest is not mirrored. The guest itself is unharmed.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The witness gives no answer.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// The guest is or was live elsewhere.
    #[error(
        "the witness knows guest {guid} already: term {term}, owner {owner}; a guest that is live elsewhere cannot be started here"
    )]
    NotOwner {
        /// The guest.
        guid: Guid,
        /// Its term.
        term: Term,
        /// Its owner.
        owner: String,
    },
    /// No standby answers.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Guest memory cannot be mirrored.
    #[error("the guest's memory cannot be mirrored: {0}")]
    Layout(#[from] LayoutError),
    /// A thread cannot be started.
    #[error("cannot start the mirror's threads: {0}")]
    Thread(#[from] std::io::Error),
    /// The guest itself.
    #[error("the guest cannot be mirrored: {0}")]
    Guest(GuestError),
}

/// A failed attempt, with the guest that goes on without protection.
#[derive(Debug)]
pub struct AttachFailure<G> {
    /// Why.
    pub error: AttachError,
    /// The guest.
    pub guest: G,
}

/// How mirroring ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The standby is gone, and this side is the live one in this term.
    Solo(Term),
    /// As was wished, the standby has forgotten the guest; this side is the live one in this term.
    Detached(Term),
    /// The standby is gone, and this side is the live one in this term; the guest stands still, and its output is held.
    Suspended(Term),
    /// Another side is live; the guest stands still for good.
    Frozen,
    /// The standby runs the guest, as it was asked to.
    HandedOver,
    /// The guest has ended.
    Ended,
}

/// Begins to mirror `guest`: takes its first term at the witness, connects to the standby, and goes on in a thread.
///
/// # Errors
/// [`AttachFailure`]: the guest is handed back as it was.
pub fn attach<G: Guest + 'static>(
    guest: G,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
) -> Result<Handle<G>, AttachFailure<G>> {
    match Stream::connect(&options.standby) {
        Ok(stream) => attach_over(stream, guest, console, options, watcher),
        Err(error) => Err(AttachFailure { error: error.into(), guest }),
    }
}

/// As [`attach`], over a connection to the standby that there is already.
///
/// # Errors
/// As there.
pub fn attach_over<G: Guest + 'static>(
    stream: Stream,
    guest: G,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
) -> Result<Handle<G>, AttachFailure<G>> {
    match prepare(&guest, &stream, &options) {
        Ok((term, memory)) => Driver::start(guest, console, options, watcher, term, memory, stream),
        Err(error) => Err(AttachFailure { error, guest }),
    }
}

fn prepare<G: Guest>(
    guest: &G,
    stream: &Stream,
    options: &Options,
) -> Result<(Term, PageMemory), AttachError> {
    let memory = PageMemory::new(Arc::clone(guest.ram()))?;
    driver::limit_patience(stream, &options.settings).map_err(LinkError::Setup)?;
    let guid = options.guid;
    let term = match &options.witness {
        None => options.term.unwrap_or(Term(0)).next(),
        Some(witness) => match witness.claim(guid, options.term.unwrap_or(Term(0)), &options.name)? {
            Claim::Granted(term) => term,
            Claim::Refused { term, owner } => return Err(AttachError::NotOwner { guid, term, owner }),
            Claim::Unreachable(reason) => return Err(std::io::Error::other(reason).into()),
        },
    };
    Ok((term, memory))
}
