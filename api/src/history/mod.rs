//! What outside clients asked and were answered, and whether it can be so: the checker of every drill.
//!
//! A history is a text of JSON lines, an [`Operation`] each, in any order. Times are microseconds of one clock that all its
//! clients share, taken just before the request was sent and just after its answer had come:
//!
//! ```text
//! {"connection":1,"start_us":100,"end_us":180,"op":"incr","key":"7","value":1}
//! {"connection":2,"start_us":110,"end_us":190,"op":"set","key":"8","value":41}
//! {"connection":3,"start_us":200,"end_us":260,"op":"get","key":"8","value":41}
//! {"connection":4,"start_us":120,"end_us":900,"op":"stream","bytes":1000,"got":1000}
//! {"connection":2,"start_us":300,"op":"set","key":"block/3","value":42}
//! ```
//!
//! Without `end_us` there was no answer: the request may have been carried out, at any time after its start, or not. A
//! client keeps these rules, so that judging is exact and cheap (each key is judged alone, in n log n):
//!
//! - A key is a counter (only `incr` and `get`, any number of clients) or a register (only `set` and `get`). It is 0 at first.
//! - All that is set in a register is new there, and one request is under way at a time. After a `set` without an answer
//!   there is no other to that register.
//! - When the service has been attacked, each key is read once more.
//! - `block/N` is block N of a disk as the embedded guest writes it: its image can be checked, too ([`image`]).

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub mod image;
mod key;
#[cfg(test)]
mod tests;

/// Most violations that are told in words; all are counted.
const MAX_TOLD: usize = 20;

/// A request and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// On which connection.
    pub connection: u32,
    /// When it was sent.
    pub start_us: u64,
    /// When the answer had come; `None` if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_us: Option<u64>,
    /// What was asked and answered.
    #[serde(flatten)]
    pub what: What,
}

/// What was asked and answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum What {
    /// A register is given a value that it never had.
    Set {
        /// Which.
        key: String,
        /// What it becomes.
        value: u64,
    },
    /// A register or counter is read.
    Get {
        /// Which.
        key: String,
        /// What it held; `None` with an answer: nothing at all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<u64>,
    },
    /// A counter goes up by one.
    Incr {
        /// Which.
        key: String,
        /// Its new value.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<u64>,
    },
    /// So many bytes were asked for, each of which is known by its position.
    Stream {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that came.
        got: u64,
        /// The first of them that was not what it had to be.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wrong_at: Option<u64>,
    },
    /// What came is no answer to what was asked on this connection.
    Garbled {
        /// What came.
        answer: String,
    },
    /// The connection was lost.
    Lost {
        /// How.
        reason: String,
    },
}

/// What is wrong, in words for as many as are of use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Violations {
    /// How many there are.
    pub count: u64,
    /// The first of them.
    pub told: Vec<String>,
}

impl Violations {
    /// Adds one.
    pub fn add(&mut self, text: impl fmt::Display) {
        self.count += 1;
        if self.told.len() < MAX_TOLD {
            self.told.push(text.to_string());
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Requests.
    pub operations: u64,
    /// Requests that were answered.
    pub answered: u64,
    /// Writes (`set`, `incr`) that were answered: promised, and looked for.
    pub acknowledged: u64,
    /// Registers and counters.
    pub keys: u64,
    /// Bytes of streams that were compared.
    pub stream_bytes: u64,
    /// Connections that were lost: no violation by itself.
    pub connections_lost: u64,
    /// What cannot be.
    pub violations: Violations,
}

/// Why there is no history.
#[derive(Debug, Error)]
pub enum HistoryError {
    /// A line is none.
    #[error(
        "line {line} is no operation: {reason}; the help of `understudy drill check` shows what one looks like"
    )]
    Line {
        /// Which, from 1.
        line: usize,
        /// Why not.
        reason: String,
    },
    /// It cannot be read.
    #[error("cannot read the history: {0}")]
    Read(#[from] io::Error),
}

/// Reads a history; empty lines mean nothing.
///
/// # Errors
/// [`HistoryError`]
pub fn read(from: impl BufRead) -> Result<Vec<Operation>, HistoryError> {
    let mut history = Vec::new();
    for (index, line) in from.lines().enumerate() {
        let line = line?;
        if !line.trim().is_empty() {
            let parsed = serde_json::from_str(&line);
            let failed =
                |error: serde_json::Error| HistoryError::Line { line: index + 1, reason: error.to_string() };
            history.push(parsed.map_err(failed)?);
        }
    }
    Ok(history)
}

/// Writes a history as [`read`] reads it.
///
/// # Errors
/// Those of `to`.
pub fn write(history: &[Operation], mut to: impl Write) -> io::Result<()> {
    for operation in history {
        serde_json::to_writer(&mut to, operation)?;
        to.write_all(b"\n")?;
    }
    to.flush()
}

/// Judges `history`.
///
/// A register or counter must be linearizable: there must be an order of the requests, in which each takes place between
/// its start and its end, that explains all answers. So every acknowledged write is there, and no read goes back in time.
pub fn check(history: &[Operation]) -> Findings {
    let mut findings = Findings { operations: history.len() as u64, ..Findings::default() };
    let mut keys: BTreeMap<&str, key::Key<'_>> = BTreeMap::new();
    for operation in history {
        if operation.end_us.is_some_and(|end_us| end_us < operation.start_us) {
            findings
                .violations
                .add(format_args!("connection {}: an answer before its request", operation.connection));
        }
        findings.answered += u64::from(operation.end_us.is_some());
        match &operation.what {
            What::Set { key, .. } | What::Incr { key, .. } => {
                findings.acknowledged += u64::from(operation.end_us.is_some());
                keys.entry(key).or_default().push(operation);
            }
            What::Get { key, .. } => keys.entry(key).or_default().push(operation),
            What::Stream { bytes, got, wrong_at } => {
                findings.stream_bytes += got;
                stream(operation, *bytes, *got, *wrong_at, &mut findings.violations);
            }
            What::Garbled { answer } => findings.violations.add(format_args!(
                "connection {}: '{answer}' is no answer to what was asked",
                operation.connection
            )),
            What::Lost { .. } => findings.connections_lost += 1,
        }
    }
    findings.keys = keys.len() as u64;
    for (name, key) in keys {
        key.judge(name, &mut findings.violations);
    }
    findings
}

fn stream(operation: &Operation, bytes: u64, got: u64, wrong_at: Option<u64>, violations: &mut Violations) {
    let connection = operation.connection;
    if let Some(at) = wrong_at {
        violations.add(format_args!("connection {connection}: byte {at} of a stream is wrong"));
    } else if got > bytes || (operation.end_us.is_some() && got < bytes) {
        violations.add(format_args!("connection {connection}: {got} bytes came of a stream of {bytes}"));
    }
}
