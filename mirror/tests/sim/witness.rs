//! A witness in memory, with the rule of the real ones, that can be out of reach.

use mirror::ids::{Guid, Term};
use mirror::witness::{Claim, Record, decide};

/// How the witness can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It answers.
    Answers,
    /// Nothing gets there.
    Gone,
    /// It records what is claimed, but its answers are lost.
    Mute,
}

/// The witness.
pub struct SimWitness {
    /// What it holds.
    pub record: Option<Record>,
    /// How it can be reached.
    pub reach: Reach,
    /// There is none: the primary's shell grants, the standby waits for an operator. The record is then nothing but
    /// this world's own note of who is the live side.
    pub absent: bool,
}

impl SimWitness {
    /// A claim as it is answered to a shell.
    pub fn claim(&mut self, guid: Guid, expected: Term, owner: &str) -> Claim {
        if self.reach == Reach::Gone && !self.absent {
            return Claim::Unreachable("the witness is out of reach".into());
        }
        let (claim, record) = decide(self.record.as_ref(), guid, expected, owner);
        if let Some(record) = record {
            self.record = Some(record);
        }
        match self.reach {
            Reach::Mute if !self.absent => Claim::Unreachable("the witness' answer was lost".into()),
            _ => claim,
        }
    }

    /// Whether `owner` has won a term after `first`.
    pub fn granted(&self, owner: &str, first: Term) -> bool {
        self.record.as_ref().is_some_and(|record| record.owner == owner && record.term > first)
    }
}
