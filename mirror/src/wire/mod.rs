//! The wire protocol between a primary and a standby.
//!
//! A stream of frames in each direction: a fixed [`header`], then a payload of bounded length. Small messages carry a
//! postcard-encoded [`Message`](message::Message), batches of [`pages`] a table and the bodies. The header names the
//! allocation, the sender's term and the epoch, and counts the frames of its direction, so that a frame that is
//! stale, lost, repeated or for somebody else is noticed before its payload is looked at.
//!
//! | request | answer | meaning |
//! |---|---|---|
//! | `SpaceRequest` | `SpaceResponse` | is there room for a guest of this size; denied at once, or in a queue |
//! | `Allocate` | `Disks`, if it has any of its own; `SecondLink`, if it listens on one; `Allocated` | reserve zeroed memory of a layout under the GUID, and build the twin machine |
//! | `LockRequest` | `LockResponse` | who owns the allocation, in which term, and how this side holds it |
//! | `HeaderRequest` | `HeaderResponse` | layout, GUID, last complete epoch and policy |
//! | `SenseRequest` | `SenseResponse` | health and counters |
//! | `AllocateRead` | `Digests` of what it has of the guest's memory; `AllocateReadResponse` | become a shared, read-only holder: a standby |
//! | `AllocateWrite` | `AllocateWriteResponse` | the sender has become the exclusive holder: the running side |
//! | `WriteLog`, `WritePages` … `RoundEnd` | `RoundAck` | disk blocks and pages of a seeding round |
//! | `WriteLog`, `WritePages`, `WriteState`, `WriteOutput` … `Commit` | `CommitAck` | an epoch, whole or not at all |
//! | `ReleaseMemory` | `MemoryReleased` | the guest has ended or is no longer mirrored; forget it |
//! | `Heartbeat` | – | the sender lives, and has released output up to a position |
//! | any | `Refused` | why not, and what to do |

pub mod header;
pub mod message;
pub mod pages;
