//! Why a witness gave no answer.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

use crate::ids::{Guid, Term};

/// Why a witness gave no answer.
#[derive(Debug, Error)]
pub enum WitnessError {
    /// The record cannot be read or written.
    #[error(
        "witness {witness}: cannot {action}: {source}; check that the storage both sides share is there and writable"
    )]
    Storage {
        /// Which witness.
        witness: String,
        /// What was tried.
        action: &'static str,
        /// What came of it.
        source: std::io::Error,
    },
    /// Another process has kept the lock for too long.
    #[error(
        "witness {witness}: its lock has been held by another process for {waited_ms} ms; if that process hangs, end it"
    )]
    Locked {
        /// Which witness.
        witness: String,
        /// How long this side waited.
        waited_ms: u128,
    },
    /// The record is no record.
    #[error(
        "witness {witness}: its content is not a record of this program ({reason}); restore it or name another witness"
    )]
    Damaged {
        /// Which witness.
        witness: String,
        /// What is wrong.
        reason: String,
    },
    /// The record is of another guest.
    #[error(
        "witness {witness} belongs to guest {theirs} (term {term}, owner {owner}), not to {ours}; one record serves one guest: name another witness, or remove this record if that guest is gone"
    )]
    OtherGuest {
        /// Which witness.
        witness: String,
        /// The guest it belongs to.
        theirs: Guid,
        /// The guest that was asked for.
        ours: Guid,
        /// Its term.
        term: Term,
        /// Its owner.
        owner: String,
    },
    /// None of the endpoints gave an answer in time.
    #[error(
        "witness {witness}: no answer within {within_ms} ms: {tried}; check that these are client addresses of etcd members, that they run, and that this host reaches them"
    )]
    Unreachable {
        /// Which witness.
        witness: String,
        /// How long it was tried.
        within_ms: u32,
        /// What came of each endpoint.
        tried: Tried,
    },
    /// Members answer, but too few of them reach each other to decide anything.
    #[error(
        "witness {witness}: its members cannot decide: {tried}; bring back as many members as a majority takes (etcdctl endpoint status)"
    )]
    NoQuorum {
        /// Which witness.
        witness: String,
        /// What came of each endpoint.
        tried: Tried,
    },
    /// The witness does not let this side in.
    #[error(
        "witness {witness}: {endpoint} refuses: {reason}; give a user with a password who may read and write keys under {prefix} (etcdctl role grant-permission --prefix=true ROLE readwrite {prefix})"
    )]
    Denied {
        /// Which witness.
        witness: String,
        /// Who refused.
        endpoint: String,
        /// What it said.
        reason: String,
        /// Where the records are.
        prefix: String,
    },
    /// An endpoint is a member of another cluster than those that answered before.
    #[error(
        "witness {witness}: {endpoint} is of cluster {theirs:x}, and this side has been answered by cluster {ours:x}; two clusters are two witnesses: name members of one. If it was restored from a backup, stop both sides and start them anew"
    )]
    OtherCluster {
        /// Which witness.
        witness: String,
        /// Who answered.
        endpoint: String,
        /// Its cluster.
        theirs: u64,
        /// The cluster that answered before.
        ours: u64,
    },
    /// What was given to reach the witness with does not fit it.
    #[error("witness {witness}: {reason}")]
    Misfit {
        /// Which witness.
        witness: String,
        /// What does not fit, and what does.
        reason: String,
    },
    /// What it takes to reach the witness cannot be used.
    #[error("witness {witness}: cannot use the {what} in {path}: {reason}")]
    Access {
        /// Which witness.
        witness: String,
        /// What was wanted of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// What came of each endpoint that was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tried(pub Vec<(String, String)>);

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (endpoint, reason)) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{endpoint} ({reason})")?;
        }
        Ok(())
    }
}
