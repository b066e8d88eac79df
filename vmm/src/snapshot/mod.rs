//! Snapshots of a machine in files: full ones, and differential ones with only the pages dirtied since the one before.
//!
//! A snapshot is two files. The *memory file* ([`pages`]) has page `p` at a fixed place, so that a full one can be
//! mapped, and an index with a checksum a page. The *state file* ([`state_file`]) has everything else. Both name the
//! snapshot they belong to, and a differential one names the snapshot that it is to be laid over.
//!
//! [`take`] writes a snapshot while the guest runs, in rounds as the mirror seeds a standby; the last pages and the
//! state are taken in one pause. The files appear under their names only when they are whole.

pub mod pager;
pub mod pages;
mod publish;
pub mod restore;
pub mod state_file;
pub mod take;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

pub use pager::{MemoryFill, MemoryLost, PagerError};
pub use restore::{RestoreError, RestoreMode, RestoreSource, Snapshot, merge};
pub use take::{Kind, Progress, SnapshotError, SnapshotReport, SnapshotRequest};

/// Version of both files. Any change of their form makes another version.
pub const VERSION: u32 = 1;

/// Names a snapshot: the same in both of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub [u8; 16]);

impl SnapshotId {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no random numbers, which no kernel has not.
    fn new() -> io::Result<Self> {
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }
}

/// What a file of a snapshot says at its beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The snapshot.
    pub id: SnapshotId,
    /// The snapshot that this one is to be laid over; none: it is full.
    pub base: Option<SnapshotId>,
}

/// A file that is no file of a snapshot, or a damaged one.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// It begins otherwise.
    #[error("{path} is no {what} file of a snapshot")]
    Kind {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
    },
    /// Another version of the program wrote it.
    #[error("{path} was written in version {found} of the format, this program reads version {VERSION}")]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It ends too early.
    #[error("{path} is truncated: it has {len} bytes and should have {wanted}")]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The length that it says it has.
        wanted: u64,
    },
    /// A checksum is wrong.
    #[error("{path} is damaged: the checksum of its {part} is wrong")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What of it.
        part: String,
    },
    /// The checksums are right and the content cannot be.
    #[error("{path} cannot be used: {reason}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// How a file of a snapshot begins: what it is, its version, and a checksummed header of `H`.
struct Preamble;

const PREAMBLE: usize = 8 + 4 + 4 + 8;

impl Preamble {
    /// Magic, version, length and checksum of `header`, and `header`.
    fn encode(magic: [u8; 8], header: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
        let body = postcard::to_stdvec(header)?;
        let mut bytes = magic.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u32).to_le_bytes());
        bytes.extend(checksum(&bytes, &body).to_le_bytes());
        bytes.extend(body);
        Ok(bytes)
    }

    /// Reads what [`Self::encode`] wrote at the beginning of `bytes`; also how long it is.
    fn decode<'a, H: Deserialize<'a>>(
        bytes: &'a [u8],
        magic: [u8; 8],
        what: &'static str,
        path: &Path,
    ) -> Result<(H, usize), FileError> {
        let kind = || FileError::Kind { path: path.into(), what };
        let (start, rest) = bytes.split_at_checked(PREAMBLE).ok_or_else(kind)?;
        if start[..8] != magic {
            return Err(kind());
        }
        let number = |at: usize| u32::from_le_bytes([start[at], start[at + 1], start[at + 2], start[at + 3]]);
        if number(8) != VERSION {
            return Err(FileError::Version { path: path.into(), found: number(8) });
        }
        let len = number(12) as usize;
        let damaged = || FileError::Damaged { path: path.into(), part: "header".into() };
        let body = rest.get(..len).ok_or_else(damaged)?;
        if start[16..] != checksum(&start[..16], body).to_le_bytes() {
            return Err(damaged());
        }
        let header = postcard::from_bytes(body)
            .map_err(|cause| FileError::Content { path: path.into(), reason: cause.to_string() })?;
        Ok((header, PREAMBLE + len))
    }
}

fn checksum(start: &[u8], body: &[u8]) -> u64 {
    xxh3_64(&[&start[..16], body].concat())
}
