//! The small messages: everything but pages.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::header::MAX_PAYLOAD;
use crate::ids::{Epoch, Guid, Term};
use crate::memory::Layout;

/// Longest piece of state or output in one message, in bytes.
pub const PIECE: usize = 1 << 20;

/// Most bytes of machine state in an epoch.
pub const MAX_STATE: usize = 64 << 20;

/// Most bytes of held output that a standby keeps: the primary's hold limit, once produced and once in flight.
pub const MAX_OUTPUT: usize = 4 << 20;

/// Most bytes of the write log of an epoch or a seeding round, over all disks.
pub const MAX_LOG: usize = 256 << 20;

/// How a side holds an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// It has the memory, and has promised nothing.
    None,
    /// Shared and read-only: a standby.
    Read,
    /// Exclusive: the running side.
    Write,
}

/// What an allocation promises for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Unit of transfer in bytes; 4096 today.
    pub block_size: u32,
}

/// What a standby says of an allocation when its header is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocationHeader {
    /// Where its memory lies in the guest.
    pub layout: Layout,
    /// Its name.
    pub guid: Guid,
    /// The last complete epoch.
    pub epoch: Epoch,
    /// What was agreed for it.
    pub policy: Policy,
}

/// Health and counters of a standby.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Sense {
    /// The last complete epoch.
    pub epoch: Epoch,
    /// Seeding rounds received.
    pub rounds: u64,
    /// Epochs committed.
    pub epochs: u64,
    /// Pages received, all rounds and epochs.
    pub pages: u64,
    /// Frames refused because their term was stale.
    pub stale_frames: u64,
}

/// Why a request is not granted, and what to do.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The standby has a newer term than the sender.
    #[error("the sender's term is stale: term {newest} is known here; another side is or was live since")]
    StaleTerm {
        /// The newest term known.
        newest: Term,
    },
    /// The request does not fit the state of the link or of the allocation.
    #[error("{request} is not possible while the standby is {phase}")]
    WrongPhase {
        /// What was asked.
        request: String,
        /// What the standby is doing.
        phase: String,
    },
    /// There is no such allocation here.
    #[error("there is no allocation {0} here")]
    UnknownAllocation(Guid),
    /// The machine cannot be built here.
    #[error("the standby cannot build this machine: {0}")]
    Machine(String),
    /// The witness of the standby does not say what the primary says.
    #[error("the standby's witness does not confirm the primary: {0}; give both sides the same witness")]
    Witness(String),
    /// An epoch did not arrive whole.
    #[error("epoch {epoch} is not whole: {reason}")]
    TornEpoch {
        /// Which.
        epoch: Epoch,
        /// What differs.
        reason: String,
    },
    /// The bytes are not what they should be.
    #[error("protocol violation: {0}")]
    Protocol(String),
}

/// Answer to a space request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Space {
    /// The sender may allocate.
    Granted,
    /// Wait: the answer comes when those before have gone.
    Queued {
        /// How many are before.
        before: u32,
    },
    /// There is no room.
    Denied {
        /// Bytes that could be had.
        available: u64,
        /// Why.
        reason: String,
    },
}

/// What an epoch must have been for the standby to commit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Pages sent in it.
    pub pages: u64,
    /// Digest over all its frames, see `Digest`.
    pub digest: u64,
    /// Position after the last byte of output that the guest had produced.
    pub output_end: u64,
    /// Position after the last byte of output that has left the primary.
    pub released: u64,
}

/// Everything that is not pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Each is documented in the table of the module above; the fields here.
pub enum Message {
    /// Is there room for `bytes` of guest memory? `wait`: in a queue, if not now.
    SpaceRequest {
        bytes: u64,
        wait: bool,
    },
    SpaceResponse(Space),
    /// `machine` is opaque. `heartbeat_ms` and `misses`: when either side counts the other as lost.
    Allocate {
        layout: Layout,
        policy: Policy,
        machine: Vec<u8>,
        heartbeat_ms: u32,
        misses: u32,
    },
    Allocated,
    LockRequest,
    /// `owner` is the term's holder as this side knows it; `access` is this side's own.
    LockResponse {
        term: Term,
        owner: String,
        access: Access,
    },
    HeaderRequest,
    HeaderResponse(AllocationHeader),
    SenseRequest,
    SenseResponse(Sense),
    AllocateRead,
    /// Before `AllocateReadResponse`: what the sender has of the guest's memory, from page `first` on
    /// ([`crate::resync`]).
    Digests {
        first: u64,
        digests: Vec<u8>,
    },
    AllocateReadResponse,
    AllocateWrite,
    AllocateWriteResponse,
    /// Ends a seeding round.
    RoundEnd {
        round: u32,
        pages: u64,
        digest: u64,
    },
    RoundAck {
        round: u32,
    },
    /// The next piece of the machine state of the epoch.
    WriteState(Vec<u8>),
    /// Output of the epoch from position `start` on.
    WriteOutput {
        start: u64,
        bytes: Vec<u8>,
    },
    Commit(Commit),
    /// The standby holds the whole epoch of this frame's header.
    CommitAck,
    ReleaseMemory {
        reason: String,
    },
    MemoryReleased,
    /// Output up to `released` has left the sender. A primary's next epoch makes progress within `epoch_within_ms`.
    Heartbeat {
        released: u64,
        epoch_within_ms: u32,
    },
    Refused(Refusal),
    /// Hand-over: the epoch of this frame's header is the sender's last, all its output up to `released` has left, and
    /// nothing of it is still being carried out. The receiver owns the guest once the witness has granted it.
    ReleasePointer {
        released: u64,
    },
    /// Before `Allocated`: what the standby has of the guest's disks. Opaque to the mirror.
    Disks(Vec<u8>),
    /// The next piece of the write log of the epoch or round: what was written to disks. Opaque to the mirror.
    WriteLog(Vec<u8>),
    /// The receiver has acknowledged the epoch, and another standby has not yet: the sender waits for that, which is no
    /// standstill of its own.
    Waiting,
    /// The sender is about to ask the witness for `term`, the next one, in which the receiver follows it as before.
    Renew {
        term: Term,
    },
    /// From now on the receiver of this may run the guest in `term`, and its sender can take over from it.
    Renewed {
        term: Term,
    },
    /// Before `Allocated`: where the sender wants to hear the receiver's heartbeats as well, on a link of their own.
    SecondLink {
        address: String,
    },
}

impl Message {
    /// The message as payload.
    pub fn encode(&self) -> Vec<u8> {
        // Writing to a vector cannot fail, and no message has a type that postcard cannot write.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Reads a payload back.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(payload: &[u8]) -> Result<Self, String> {
        match postcard::take_from_bytes(payload) {
            Ok((message, [])) => Ok(message),
            Ok((_, rest)) => Err(format!("{} bytes too many", rest.len())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Its name, for messages to people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SpaceRequest { .. } => "SpaceRequest",
            Self::SpaceResponse(_) => "SpaceResponse",
            Self::Allocate { .. } => "Allocate",
            Self::Allocated => "Allocated",
            Self::LockRequest => "LockRequest",
            Self::LockResponse { .. } => "LockResponse",
            Self::HeaderRequest => "HeaderRequest",
            Self::HeaderResponse(_) => "HeaderResponse",
            Self::SenseRequest => "SenseRequest",
            Self::SenseResponse(_) => "SenseResponse",
            Self::AllocateRead => "AllocateRead",
            Self::Digests { .. } => "Digests",
            Self::AllocateReadResponse => "AllocateReadResponse",
            Self::AllocateWrite => "AllocateWrite",
            Self::AllocateWriteResponse => "AllocateWriteResponse",
            Self::RoundEnd { .. } => "RoundEnd",
            Self::RoundAck { .. } => "RoundAck",
            Self::WriteState(_) => "WriteState",
            Self::WriteOutput { .. } => "WriteOutput",
            Self::Commit(_) => "Commit",
            Self::CommitAck => "CommitAck",
            Self::ReleasePointer { .. } => "ReleasePointer",
            Self::Disks(_) => "Disks",
            Self::WriteLog(_) => "WriteLog",
            Self::Waiting => "Waiting",
            Self::Renew { .. } => "Renew",
            Self::Renewed { .. } => "Renewed",
            Self::SecondLink { .. } => "SecondLink",
            Self::ReleaseMemory { .. } => "ReleaseMemory",
            Self::MemoryReleased => "MemoryReleased",
            Self::Heartbeat { .. } => "Heartbeat",
            Self::Refused(_) => "Refused",
        }
    }
}

/// What a frame held.
#[derive(Debug)]
pub enum Body {
    /// A small message.
    Message(Message),
    /// A batch of pages, not yet checked against an allocation.
    Pages(super::pages::PooledBuffer),
}

const _: () = assert!(PIECE + 64 <= MAX_PAYLOAD, "a piece with its length and position fits a frame");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn message_survives_the_wire() {
        let message = Message::WriteOutput { start: 7, bytes: b"abc".to_vec() };
        assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let payload = [Message::Allocated.encode(), vec![0]].concat();
        assert!(Message::decode(&payload).is_err());
    }

    proptest! {
        #[test]
        fn hostile_payload_is_an_error_not_a_crash(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(&bytes);
        }
    }
}
