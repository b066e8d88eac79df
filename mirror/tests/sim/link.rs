//! The link: real frames as bytes, one queue for each direction, and the shells' ends of it.

use std::collections::VecDeque;

use mirror::digest::Digest;
use mirror::ids::{Epoch, Guid, Term};
use mirror::memory::PAGE_SIZE;
use mirror::wire::header::{FrameError, HEADER_LEN, Header, Kind};
use mirror::wire::message::{Body, Commit, Message};
use mirror::wire::pages::{BatchEncoder, BufferPool};

use super::guest::Memory;

/// GUID, term and epoch of a header.
pub type Stamp = (Guid, Term, Epoch);

/// One direction of the link.
#[derive(Default)]
pub struct Wire {
    /// What is on its way, in the order of arrival.
    pub frames: VecDeque<Vec<u8>>,
    /// What is sent from now on vanishes.
    pub cut: bool,
    /// The sender's end is closed: the receiver notices after the last frame.
    pub closed: bool,
}

/// What a shell has to put on the wire.
pub enum Outgoing {
    /// A message.
    Message(Stamp, Message),
    /// Pages of a round, read from memory when they are sent: the guest may write meanwhile.
    Live(Stamp, Vec<u32>),
    /// The end of a round.
    RoundEnd(Stamp, u32),
    /// Staged pages of an epoch.
    Staged(Stamp, Vec<u32>, Vec<u8>),
    /// A piece of an epoch that its digest covers.
    Part(Stamp, Message),
    /// The commit of an epoch; counts and digest are filled in.
    Commit(Stamp, Commit),
    /// Close the link.
    Close,
}

/// What was put on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The end of a round of so many pages.
    RoundEnd(u64),
    /// The commit of an epoch: from now on the other side may have it.
    Commit,
    /// The link is closed.
    Closed,
    /// Something else.
    Other,
}

/// A shell's end of the link.
#[derive(Default)]
pub struct End {
    /// The shell reads and writes.
    pub open: bool,
    /// What is to be sent.
    pub outgoing: VecDeque<Outgoing>,
    next_out: u64,
    next_in: u64,
    digest: Digest,
    pages: u64,
    pool: BufferPool,
}

impl End {
    /// A fresh end.
    pub fn opened() -> Self {
        Self { open: true, ..Self::default() }
    }

    /// Puts the next thing on the wire, if there is one.
    pub fn flush(&mut self, wire: &mut Wire, memory: Option<&Memory>) -> Option<Sent> {
        if !self.open {
            return None;
        }
        let sent = match self.outgoing.pop_front()? {
            Outgoing::Message(stamp, message) => {
                self.message(stamp, &message, wire);
                Sent::Other
            }
            Outgoing::Live(stamp, numbers) => {
                let mut bodies = Vec::with_capacity(numbers.len() * PAGE_SIZE);
                for &page in &numbers {
                    bodies.extend_from_slice(memory?.page(page.into()));
                }
                self.batch(stamp, &numbers, &bodies, wire);
                Sent::Other
            }
            Outgoing::RoundEnd(stamp, round) => {
                let (pages, digest) = self.sum();
                self.message(stamp, &Message::RoundEnd { round, pages, digest }, wire);
                Sent::RoundEnd(pages)
            }
            Outgoing::Staged(stamp, numbers, bodies) => {
                self.batch(stamp, &numbers, &bodies, wire);
                Sent::Other
            }
            Outgoing::Part(stamp, message) => {
                let checksum = self.message(stamp, &message, wire);
                self.digest.add(checksum);
                Sent::Other
            }
            Outgoing::Commit(stamp, commit) => {
                let (pages, digest) = self.sum();
                self.message(stamp, &Message::Commit(Commit { pages, digest, ..commit }), wire);
                Sent::Commit
            }
            Outgoing::Close => {
                self.close(wire);
                Sent::Closed
            }
        };
        Some(sent)
    }

    /// Closes this end at once.
    pub fn close(&mut self, wire: &mut Wire) {
        self.open = false;
        self.outgoing.clear();
        wire.closed |= !wire.cut;
    }

    /// Takes the next frame from the wire. `None`: nothing is there.
    pub fn receive(&mut self, wire: &mut Wire) -> Option<Result<(Header, Body), FrameError>> {
        let frame = wire.frames.pop_front()?;
        let received = self.decode(&frame);
        self.next_in += 1;
        Some(received)
    }

    fn decode(&self, frame: &[u8]) -> Result<(Header, Body), FrameError> {
        let (head, payload) = frame.split_first_chunk::<HEADER_LEN>().ok_or(FrameError::Magic(0))?;
        let header = Header::parse(head)?;
        header.verify(self.next_in, payload)?;
        let body = match header.kind {
            Kind::Message => Body::Message(
                Message::decode(payload)
                    .map_err(|reason| FrameError::Payload { sequence: header.sequence, reason })?,
            ),
            Kind::Pages => {
                let mut buffer = self.pool.take(payload.len());
                buffer.copy_from_slice(payload);
                Body::Pages(buffer)
            }
        };
        Ok((header, body))
    }

    fn sum(&mut self) -> (u64, u64) {
        (std::mem::take(&mut self.pages), std::mem::take(&mut self.digest).value())
    }

    fn message(&mut self, stamp: Stamp, message: &Message, wire: &mut Wire) -> u64 {
        let payload = message.encode();
        self.frame(Kind::Message, stamp, std::iter::once(payload.as_slice()), wire)
    }

    fn batch(&mut self, stamp: Stamp, numbers: &[u32], bodies: &[u8], wire: &mut Wire) {
        debug_assert_eq!(numbers.len() * PAGE_SIZE, bodies.len());
        let mut encoder = BatchEncoder::new();
        encoder.encode(numbers, bodies);
        let checksum = self.frame(Kind::Pages, stamp, encoder.pieces(bodies), wire);
        self.pages += numbers.len() as u64;
        self.digest.add(checksum);
    }

    fn frame<'a>(
        &mut self,
        kind: Kind,
        stamp: Stamp,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
        wire: &mut Wire,
    ) -> u64 {
        let header = Header::seal(kind, stamp, self.next_out, pieces.clone());
        self.next_out += 1;
        if !wire.cut {
            let mut bytes = header.to_bytes().to_vec();
            pieces.for_each(|piece| bytes.extend(piece));
            wire.frames.push_back(bytes);
        }
        header.checksum
    }
}
