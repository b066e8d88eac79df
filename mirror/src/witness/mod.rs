//! Who decides which side lives.
//!
//! A witness keeps one record for a guest: the term and who owns it. The only way to change it is an atomic
//! compare-and-set: whoever names the term that is there gets the next one. So of two sides that lost each other
//! exactly one goes on, whatever their clocks and links do.
//!
//! The term is the fencing token: it only grows, and no term ever has two owners, so whoever compares terms (the standby,
//! the journal, the witness itself) can tell an old side from the live one. [`Record::revision`] adds one thing for
//! whoever keeps a token longer than the record lives: if the record is removed, terms begin anew, etcd's revisions do not.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{Guid, Term};

mod address;
mod error;
pub mod etcd;
pub mod file;

pub use address::{WitnessAccess, WitnessAddress};
pub use error::{Tried, WitnessError};
pub use etcd::EtcdWitness;
pub use file::FileWitness;

/// What the witness holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The guest.
    pub guid: Guid,
    /// The newest term.
    pub term: Term,
    /// Who has it: a name for people.
    pub owner: String,
    /// The witness's own count of this change, not part of what is stored: etcd's `mod_revision`, which grows as long
    /// as the cluster lives; a file's is the term. 0: not stored yet.
    #[serde(skip)]
    pub revision: u64,
}

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The claimant owns this term now and is the live side.
    Granted(Term),
    /// Somebody else got there first.
    Refused {
        /// The term that is there.
        term: Term,
        /// Who owns it.
        owner: String,
    },
    /// Nobody knows; ask again. Until then the claimant is not live.
    Unreachable(String),
}

/// A keeper of terms.
pub trait Witness: fmt::Debug + Send + Sync {
    /// Atomically: if the newest term of `guid` is `expected` (0: there is none yet), makes it `expected + 1`, owned
    /// by `owner`.
    ///
    /// # Errors
    /// [`WitnessError`]; the claim may or may not have been recorded, so the claimant must ask again.
    fn claim(&self, guid: Guid, expected: Term, owner: &str) -> Result<Claim, WitnessError>;

    /// The record of `guid`, if there is one: none older than the last claim that was granted to anybody.
    ///
    /// # Errors
    /// [`WitnessError`].
    fn read(&self, guid: Guid) -> Result<Option<Record>, WitnessError>;
}

/// The rule of every witness: what a claim on `current` comes to, and the record to store if it is granted.
///
/// A claimant whose earlier claim was recorded without its hearing of it finds itself as the owner of the term it
/// wants, and is granted it: owners must therefore have names of their own.
pub fn decide(current: Option<&Record>, guid: Guid, expected: Term, owner: &str) -> (Claim, Option<Record>) {
    let term = current.map_or(Term(0), |record| record.term);
    match current {
        Some(record) if record.term == expected.next() && record.owner == owner => {
            (Claim::Granted(record.term), None)
        }
        _ if term == expected => {
            let record = Record { guid, term: expected.next(), owner: owner.into(), revision: 0 };
            (Claim::Granted(record.term), Some(record))
        }
        _ => (Claim::Refused { term, owner: current.map_or_else(String::new, |r| r.owner.clone()) }, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Guid = Guid::from_u128(1);

    fn record(term: u64, owner: &str) -> Record {
        Record { guid: GUEST, term: Term(term), owner: owner.into(), revision: 0 }
    }

    #[test]
    fn only_who_names_the_newest_term_gets_the_next() {
        let now = record(4, "a");
        assert_eq!(decide(Some(&now), GUEST, Term(4), "b"), (Claim::Granted(Term(5)), Some(record(5, "b"))));
        for stale in [0, 3, 5] {
            let refused = Claim::Refused { term: Term(4), owner: "a".into() };
            assert_eq!(decide(Some(&now), GUEST, Term(stale), "b"), (refused, None));
        }
    }

    #[test]
    fn claim_that_was_recorded_unheard_is_granted_again_to_its_owner_only() {
        let now = record(5, "b");
        assert_eq!(decide(Some(&now), GUEST, Term(4), "b"), (Claim::Granted(Term(5)), None));
        assert!(matches!(decide(Some(&now), GUEST, Term(4), "a"), (Claim::Refused { .. }, None)));
    }
}
