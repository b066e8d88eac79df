//! One epoch, to everyone who takes part in it.

use std::io;

use crate::digest::Digest;
use crate::ids::LinkId;
use crate::link::FrameWriter;
use crate::link::frames::{Sent, Stamp};
use crate::wire::message::Message;
use crate::wire::pages::BatchEncoder;

/// The way to one standby, for one epoch. A link that fails is not written to any more; the others go on.
pub(super) struct Outlet {
    pub(super) link: LinkId,
    writer: FrameWriter,
    /// Position up to which it knows the output.
    pub(super) output_known: Option<u64>,
    digest: Digest,
    bytes: u64,
    pub(super) failure: Option<io::Error>,
}

impl Outlet {
    pub(super) fn new(link: LinkId, writer: FrameWriter, output_known: Option<u64>) -> Self {
        Self { link, writer, output_known, digest: Digest::default(), bytes: 0, failure: None }
    }

    /// Digest over what has been sent.
    pub(super) fn digest(&self) -> u64 {
        self.digest.value()
    }

    /// Bytes on the wire.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sends what `encoder` made of `bodies`.
    pub(super) fn send_pages(&mut self, stamp: Stamp, encoder: &BatchEncoder, bodies: &[u8]) {
        self.send_with(|writer| writer.send_pages(stamp, encoder, bodies));
    }

    /// Sends a message.
    pub(super) fn send(&mut self, stamp: Stamp, message: &Message) {
        self.send_with(|writer| writer.send(stamp, message));
    }

    fn send_with(&mut self, send: impl FnOnce(&mut FrameWriter) -> io::Result<Sent>) {
        if self.failure.is_some() {
            return;
        }
        match send(&mut self.writer) {
            Ok(sent) => {
                self.bytes += sent.bytes;
                self.digest.add(sent.checksum);
            }
            Err(error) => self.failure = Some(error),
        }
    }
}
