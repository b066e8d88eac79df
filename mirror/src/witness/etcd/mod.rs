//! The witness for two or more machines: a record for each guest in etcd.
//!
//! A claim is one transaction: it puts the next term if the record is still at the revision at which it was last seen.
//! Whatever was lost, delayed or sent twice on the way, of several puts that name one revision etcd carries out one.
//! What was seen may come from an earlier answer, so that a claim usually takes one question; an answer that nothing is
//! to be put for is given by a fresh, linearizable read only.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Claim, Record, WitnessAccess, WitnessError, decide};
use crate::ids::{Guid, Term};

mod access;
mod gateway;
mod protocol;

use gateway::{Deadline, Gateway};
use protocol::{Base64, KeyValue, Range, RangeAnswer, Txn, TxnAnswer};

/// Longest record that is read, in bytes.
const MAX_RECORD: usize = 64 << 10;

/// A witness in etcd (3.4 or newer), asked by its JSON gateway.
#[derive(Debug)]
pub struct EtcdWitness {
    gateway: Gateway,
    prefix: String,
    /// What was last seen, and of which guest.
    seen: Mutex<Option<(Guid, Seen)>>,
}

/// A guest's record at one moment.
#[derive(Clone, Debug)]
struct Seen {
    /// Of the key's last change; 0 if there is no record.
    revision: i64,
    record: Option<Record>,
}

impl EtcdWitness {
    /// The witness in the cluster with these members (`HOST:PORT`), its records under `prefix`. Nobody is asked yet.
    ///
    /// # Errors
    /// [`WitnessError::Access`]: a file that `access` names cannot be used.
    pub fn new(endpoints: &[String], prefix: &str, access: &WitnessAccess) -> Result<Self, WitnessError> {
        let gateway = Gateway::new(endpoints, prefix, access)?;
        Ok(Self { gateway, prefix: prefix.into(), seen: Mutex::default() })
    }

    fn key(&self, guid: Guid) -> String {
        format!("{}/{guid}", self.prefix)
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(Duration::from_millis(self.gateway.timeout_ms().into()))
    }

    fn seen(&self) -> MutexGuard<'_, Option<(Guid, Seen)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, guid: Guid, until: Deadline) -> Result<Seen, WitnessError> {
        let question = Range { key: self.key(guid).into() };
        let answer: RangeAnswer = self.gateway.ask("kv/range", &question, until)?;
        self.note(guid, answer.kvs.first())
    }

    /// Puts `record` if the one that is there is still `before`; if not, gives the one that is.
    fn replace(
        &self,
        before: &Seen,
        record: &Record,
        until: Deadline,
    ) -> Result<Result<(), Seen>, WitnessError> {
        let guid = record.guid;
        let value = serde_json::to_vec(record).map_err(|error| self.damaged(guid, error.to_string()))?;
        let question = Txn::replace(self.key(guid).into(), before.revision, Base64(value));
        let answer: TxnAnswer = self.gateway.ask("kv/txn", &question, until)?;
        if answer.succeeded {
            let revision = answer.header.revision;
            *self.seen() = Some((guid, Seen { revision, record: Some(record.clone()) }));
            return Ok(Ok(()));
        }
        let now = answer.responses.first().and_then(|response| response.response_range.as_ref());
        self.note(guid, now.and_then(|range| range.kvs.first())).map(Err)
    }

    /// Takes notice of what is there.
    fn note(&self, guid: Guid, found: Option<&KeyValue>) -> Result<Seen, WitnessError> {
        // What is damaged now need not be what it was.
        *self.seen() = None;
        let seen = match found {
            None => Seen { revision: 0, record: None },
            Some(found) => Seen { revision: found.mod_revision, record: Some(self.record(guid, found)?) },
        };
        *self.seen() = Some((guid, seen.clone()));
        Ok(seen)
    }

    fn record(&self, guid: Guid, found: &KeyValue) -> Result<Record, WitnessError> {
        let Base64(bytes) = &found.value;
        if bytes.len() > MAX_RECORD {
            return Err(self.damaged(guid, format!("{} bytes", bytes.len())));
        }
        let record: Record =
            serde_json::from_slice(bytes).map_err(|error| self.damaged(guid, error.to_string()))?;
        if record.guid != guid {
            let Record { guid: theirs, term, owner, .. } = record;
            return Err(WitnessError::OtherGuest {
                witness: self.name(guid),
                theirs,
                ours: guid,
                term,
                owner,
            });
        }
        Ok(Record { revision: found.mod_revision as u64, ..record })
    }

    fn name(&self, guid: Guid) -> String {
        format!("{} ({})", self.gateway.name(), self.key(guid))
    }

    fn damaged(&self, guid: Guid, reason: String) -> WitnessError {
        WitnessError::Damaged { witness: self.name(guid), reason }
    }
}

impl super::Witness for EtcdWitness {
    fn claim(&self, guid: Guid, expected: Term, owner: &str) -> Result<Claim, WitnessError> {
        let until = self.deadline();
        let remembered = self.seen().clone().filter(|(whose, _)| *whose == guid);
        let (mut seen, mut fresh) = match remembered {
            Some((_, seen)) => (seen, false),
            None => (self.look(guid, until)?, true),
        };
        loop {
            let (claim, record) = decide(seen.record.as_ref(), guid, expected, owner);
            seen = match record {
                None if fresh => return Ok(claim),
                None => self.look(guid, until)?,
                Some(record) => match self.replace(&seen, &record, until)? {
                    Ok(()) => return Ok(claim),
                    Err(now) => now,
                },
            };
            fresh = true;
        }
    }

    fn read(&self, guid: Guid) -> Result<Option<Record>, WitnessError> {
        Ok(self.look(guid, self.deadline())?.record)
    }
}

#[cfg(test)]
mod tests;
