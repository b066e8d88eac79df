//! One epoch: the pause in which it is taken, and the sending of it afterwards.
//!
//! The pause allocates nothing, logs nothing and does no I/O, with one exception: an epoch with more dirty pages than
//! staging holds is sent in part while the guest stands still, because memory is bounded and a torn epoch is no
//! epoch. The dirty budget ends epochs early so that this stays rare; it is counted.

use std::io;
use std::time::Instant;

use crate::console::Console;
use crate::digest::Digest;
use crate::dirty::DirtySet;
use crate::guest::{Guest, GuestError};
use crate::link::FrameWriter;
use crate::link::frames::{Sent, Stamp};
use crate::memory::PageMemory;
use crate::report::PausePhases;
use crate::staging::Staging;
use crate::wire::message::{Commit, Message, PIECE};
use crate::wire::pages::{BATCH_PAGES, BatchEncoder};

/// Why an epoch was not taken or not sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum EpochError {
    /// The machine failed; the link is whole.
    #[error("the epoch could not be taken: {0}")]
    Guest(GuestError),
    /// The link failed.
    #[error("the epoch could not be sent: {0}")]
    Link(#[from] io::Error),
}

/// The epoch that is being taken, sent or acknowledged. Its buffers are used again for the next.
pub(super) struct EpochInFlight {
    staging: Staging,
    /// All its pages, to be put back if it is not acknowledged.
    pub(super) pages: DirtySet,
    /// Pages that the guest has given back and not written since, and that the standby has not been told of.
    given_back: DirtySet,
    encoder: BatchEncoder,
    state: Vec<u8>,
    digest: Digest,
    /// Pages sent.
    pub(super) sent_pages: u64,
    /// Bytes on the wire.
    pub(super) sent_bytes: u64,
    /// How long the guest stood still.
    pub(super) pause: PausePhases,
    /// When it went on.
    pub(super) resumed: Instant,
    /// Whether part of it was sent inside the pause.
    pub(super) stalled: bool,
    /// Position after its output.
    pub(super) output_end: u64,
    /// Since when the first of its output waits, if it has any.
    pub(super) output_since: Option<Instant>,
}

impl EpochInFlight {
    pub(super) fn new(pages: u64, staging_pages: usize) -> Self {
        Self {
            staging: Staging::new(staging_pages),
            pages: DirtySet::new(pages),
            given_back: DirtySet::new(pages),
            encoder: BatchEncoder::new(),
            state: Vec::with_capacity(PIECE),
            digest: Digest::default(),
            sent_pages: 0,
            sent_bytes: 0,
            pause: PausePhases::default(),
            resumed: Instant::now(),
            stalled: false,
            output_end: 0,
            output_since: None,
        }
    }

    /// The pause: stop, harvest, copy, capture, resume. `dirty` is taken over and left empty; `keep_paused` leaves the
    /// guest standing.
    pub(super) fn take<G: Guest>(
        &mut self,
        guest: &mut G,
        memory: &PageMemory,
        dirty: &mut DirtySet,
        console: &Console,
        (writer, stamp): (&mut FrameWriter, Stamp),
        keep_paused: bool,
    ) -> Result<(), EpochError> {
        self.pages.clear();
        self.digest = Digest::default();
        (self.sent_pages, self.sent_bytes, self.stalled) = (0, 0, false);
        let outcome = self.stand_still(guest, memory, dirty, console, (writer, stamp));
        let captured = Instant::now();
        if !keep_paused {
            guest.resume().map_err(EpochError::Guest)?;
        }
        self.resumed = Instant::now();
        self.pause.resume_us = (self.resumed - captured).as_micros() as u64;
        outcome
    }

    fn stand_still<G: Guest>(
        &mut self,
        guest: &mut G,
        memory: &PageMemory,
        dirty: &mut DirtySet,
        console: &Console,
        (writer, stamp): (&mut FrameWriter, Stamp),
    ) -> Result<(), EpochError> {
        let began = Instant::now();
        guest.pause().map_err(EpochError::Guest)?;
        let stopped = Instant::now();
        let harvested = guest.harvest(dirty);
        std::mem::swap(dirty, &mut self.pages);
        harvested.map_err(EpochError::Guest)?;
        guest.freed(&mut self.given_back);
        let taken = Instant::now();
        // The set is lent out so that staging and encoder can be used beside it.
        let pages = std::mem::take(&mut self.pages);
        let copied = self.copy(memory, &pages, writer, stamp);
        self.pages = pages;
        copied?;
        self.output_end = console.produced();
        let copied = Instant::now();
        guest.capture().map_err(EpochError::Guest)?;
        let micros = |from: Instant, to: Instant| (to - from).as_micros() as u64;
        self.pause = PausePhases {
            stop_us: micros(began, stopped),
            harvest_us: micros(stopped, taken),
            copy_us: micros(taken, copied),
            capture_us: micros(copied, Instant::now()),
            resume_us: 0,
        };
        Ok(())
    }

    fn copy(
        &mut self,
        memory: &PageMemory,
        pages: &DirtySet,
        writer: &mut FrameWriter,
        stamp: Stamp,
    ) -> Result<(), EpochError> {
        let mut left = pages.count();
        let mut pages = pages.iter();
        loop {
            self.staging.fill(memory, &mut pages).map_err(|error| EpochError::Guest(error.into()))?;
            left -= self.staging.len() as u64;
            if left == 0 {
                return Ok(());
            }
            self.stalled = true;
            self.send_staged(writer, stamp)?;
        }
    }

    fn send_staged(&mut self, writer: &mut FrameWriter, stamp: Stamp) -> io::Result<()> {
        for (pages, bodies) in self.staging.batches(BATCH_PAGES) {
            self.encoder.encode(pages, bodies);
            let sent = writer.send_pages(stamp, &self.encoder, bodies)?;
            self.sent_pages += pages.len() as u64;
            self.sent_bytes += sent.bytes;
            self.digest.add(sent.checksum);
        }
        Ok(())
    }

    /// After a harvest into `dirty`: what the guest has given back by now. What it has written meanwhile is its own again.
    pub(super) fn note_given_back<G: Guest>(&mut self, guest: &mut G, dirty: &DirtySet) {
        guest.freed(&mut self.given_back);
        self.given_back.subtract(dirty);
    }

    /// Tells of the pages that were given back; their content is not looked at, which would take memory for it again.
    fn send_given_back(&mut self, writer: &mut FrameWriter, stamp: Stamp) -> io::Result<()> {
        self.given_back.subtract(&self.pages);
        let mut pages = self.given_back.iter().map(|page| page as u32);
        loop {
            let batch: Vec<u32> = pages.by_ref().take(BATCH_PAGES).collect();
            if batch.is_empty() {
                break;
            }
            self.encoder.encode_given_back(&batch);
            let sent = writer.send_pages(stamp, &self.encoder, &[])?;
            self.sent_pages += batch.len() as u64;
            self.sent_bytes += sent.bytes;
            self.digest.add(sent.checksum);
        }
        drop(pages);
        // Part of the epoch from here on.
        self.pages.union(&self.given_back);
        self.given_back.clear();
        Ok(())
    }

    /// After the pause: pages, state, output, commit. `output_start` is where the standby's knowledge of the output
    /// ends.
    pub(super) fn send<G: Guest>(
        &mut self,
        guest: &mut G,
        console: &Console,
        output_start: Option<u64>,
        writer: &mut FrameWriter,
        stamp: Stamp,
    ) -> Result<(), EpochError> {
        self.send_staged(writer, stamp)?;
        self.send_given_back(writer, stamp)?;
        self.state.clear();
        guest.encode_captured(&mut self.state).map_err(EpochError::Guest)?;
        let state = std::mem::take(&mut self.state);
        for piece in state.chunks(PIECE) {
            let sent = writer.send(stamp, &Message::WriteState(piece.to_vec()))?;
            self.note(sent);
        }
        self.state = state;
        // A standby that knows nothing yet is told of everything that has not left this process.
        let (mut start, output) =
            console.copy(output_start.unwrap_or_else(|| console.written()), self.output_end);
        for piece in output.chunks(PIECE) {
            let sent = writer.send(stamp, &Message::WriteOutput { start, bytes: piece.to_vec() })?;
            self.note(sent);
            start += piece.len() as u64;
        }
        let commit = Commit {
            pages: self.sent_pages,
            digest: self.digest.value(),
            output_end: self.output_end,
            released: console.written(),
        };
        let sent = writer.send(stamp, &Message::Commit(commit))?;
        self.sent_bytes += sent.bytes;
        Ok(())
    }

    fn note(&mut self, sent: Sent) {
        self.sent_bytes += sent.bytes;
        self.digest.add(sent.checksum);
    }
}
