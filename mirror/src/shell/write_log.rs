//! Sends what was written to disks.

use std::io;

use crate::digest::Digest;
use crate::link::FrameWriter;
use crate::link::frames::Stamp;
use crate::wire::message::{Message, PIECE};

/// What of a log has been sent.
#[derive(Default)]
pub(super) struct SentLog {
    /// Bytes on the wire.
    pub(super) bytes: u64,
    /// Goes on over its frames.
    pub(super) digest: Digest,
}

impl SentLog {
    /// Sends `log` in pieces.
    pub(super) fn send(log: &[u8], writer: &mut FrameWriter, stamp: Stamp) -> io::Result<Self> {
        let mut this = Self::default();
        for piece in log.chunks(PIECE) {
            let sent = writer.send(stamp, &Message::WriteLog(piece.to_vec()))?;
            this.bytes += sent.bytes;
            this.digest.add(sent.checksum);
        }
        Ok(this)
    }
}
