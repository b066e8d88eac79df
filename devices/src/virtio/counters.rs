//! What devices have done, in figures that others read without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        // Nothing else is told by it.
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a disk has done.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Reads carried out.
    pub reads: Counter,
    /// Bytes that they read.
    pub read_bytes: Counter,
    /// Writes carried out.
    pub writes: Counter,
    /// Bytes that they wrote.
    pub written_bytes: Counter,
    /// Flushes carried out.
    pub flushes: Counter,
    /// Discards and write-zeroes carried out.
    pub discards: Counter,
    /// Requests that were refused or have failed.
    pub errors: Counter,
    /// Times that the rate limiter let requests wait.
    pub limited: Counter,
}

/// What a network card has done.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames given to the guest.
    pub received: Counter,
    /// Their bytes, with the header of each.
    pub received_bytes: Counter,
    /// Frames given to the tap.
    pub sent: Counter,
    /// Their bytes, with the header of each.
    pub sent_bytes: Counter,
    /// Frames of the guest that were malformed, or that the tap did not take.
    pub errors: Counter,
    /// Times that the rate limiter let frames for the guest wait.
    pub receive_limited: Counter,
    /// Times that the rate limiter let frames of the guest wait.
    pub send_limited: Counter,
}

/// What a socket device has done.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections that programs of the host have asked for.
    pub from_host: Counter,
    /// Connections that the guest has asked for and got.
    pub from_guest: Counter,
    /// Connections that have ended.
    pub closed: Counter,
    /// Packets with data given to the guest.
    pub received: Counter,
    /// Their bytes.
    pub received_bytes: Counter,
    /// Packets with data taken from the guest.
    pub sent: Counter,
    /// Their bytes.
    pub sent_bytes: Counter,
    /// Packets and requests that were answered by a reset.
    pub errors: Counter,
}

/// What a device counts.
#[derive(Clone, Debug)]
pub enum DeviceCounters {
    /// Nothing.
    None,
    /// A disk.
    Block(Arc<BlockCounters>),
    /// A network card.
    Net(Arc<NetCounters>),
    /// A socket device.
    Vsock(Arc<VsockCounters>),
}
