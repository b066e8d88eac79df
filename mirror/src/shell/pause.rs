//! One epoch: the pause in which it is taken, and the sending of it afterwards.
//!
//! The pause allocates nothing, logs nothing and does no I/O, with one exception: an epoch with more dirty pages than
//! staging holds is sent in part while the guest stands still, because memory is bounded and a torn epoch is no
//! epoch. The dirty budget ends epochs early so that this stays rare; it is counted.

use std::time::Instant;

use super::outlets::Outlet;
use crate::console::Console;
use crate::dirty::DirtySet;
use crate::guest::{Guest, GuestError};
use crate::link::frames::Stamp;
use crate::memory::PageMemory;
use crate::report::PausePhases;
use crate::staging::Staging;
use crate::wire::message::{Commit, Message, PIECE};
use crate::wire::pages::{BATCH_PAGES, BatchEncoder};

/// The epoch that is being taken, sent or acknowledged. Its buffers are used again for the next.
pub(super) struct EpochInFlight {
    staging: Staging,
    /// All its pages. Before the pause: those that are to be in it in any case. Whoever does not take part still owes them.
    pub(super) pages: DirtySet,
    /// Pages that the guest has given back and not written since, and that the standby has not been told of.
    given_back: DirtySet,
    encoder: BatchEncoder,
    state: Vec<u8>,
    log: Vec<u8>,
    /// Pages sent.
    pub(super) sent_pages: u64,
    /// Bytes on the wire, to all standbys.
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
            log: Vec::new(),
            sent_pages: 0,
            sent_bytes: 0,
            pause: PausePhases::default(),
            resumed: Instant::now(),
            stalled: false,
            output_end: 0,
            output_since: None,
        }
    }

    /// The pause: stop, harvest, copy, capture, resume. To be sent are, besides what is harvested, the `pages` that are set
    /// already; `keep_paused` leaves the guest standing.
    pub(super) fn take<G: Guest>(
        &mut self,
        guest: &mut G,
        memory: &PageMemory,
        console: &Console,
        (outlets, stamp): (&mut [Outlet], Stamp),
        keep_paused: bool,
    ) -> Result<(), GuestError> {
        (self.sent_pages, self.sent_bytes, self.stalled) = (0, 0, false);
        let outcome = self.stand_still(guest, memory, console, (outlets, stamp));
        let captured = Instant::now();
        if !keep_paused {
            guest.resume()?;
        }
        self.resumed = Instant::now();
        self.pause.resume_us = (self.resumed - captured).as_micros() as u64;
        outcome
    }

    fn stand_still<G: Guest>(
        &mut self,
        guest: &mut G,
        memory: &PageMemory,
        console: &Console,
        (outlets, stamp): (&mut [Outlet], Stamp),
    ) -> Result<(), GuestError> {
        let began = Instant::now();
        guest.pause()?;
        let stopped = Instant::now();
        guest.harvest(&mut self.pages)?;
        guest.freed(&mut self.given_back);
        let taken = Instant::now();
        // The set is lent out so that staging and encoder can be used beside it.
        let pages = std::mem::take(&mut self.pages);
        let copied = self.copy(memory, &pages, outlets, stamp);
        self.pages = pages;
        copied?;
        self.output_end = console.produced();
        let copied = Instant::now();
        guest.capture()?;
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
        outlets: &mut [Outlet],
        stamp: Stamp,
    ) -> Result<(), GuestError> {
        let mut left = pages.count();
        let mut pages = pages.iter();
        loop {
            self.staging.fill(memory, &mut pages)?;
            left -= self.staging.len() as u64;
            if left == 0 {
                return Ok(());
            }
            self.stalled = true;
            self.send_staged(outlets, stamp);
        }
    }

    fn send_staged(&mut self, outlets: &mut [Outlet], stamp: Stamp) {
        for (pages, bodies) in self.staging.batches(BATCH_PAGES) {
            self.encoder.encode(pages, bodies);
            for outlet in &mut *outlets {
                outlet.send_pages(stamp, &self.encoder, bodies);
            }
            self.sent_pages += pages.len() as u64;
        }
    }

    /// After a harvest into `dirty`: what the guest has given back by now. What it has written meanwhile is its own again.
    pub(super) fn note_given_back<G: Guest>(&mut self, guest: &mut G, dirty: &DirtySet) {
        guest.freed(&mut self.given_back);
        self.given_back.subtract(dirty);
    }

    /// Tells of the pages that were given back; their content is not looked at, which would take memory for it again.
    fn send_given_back(&mut self, outlets: &mut [Outlet], stamp: Stamp) {
        self.given_back.subtract(&self.pages);
        let mut pages = self.given_back.iter().map(|page| page as u32);
        loop {
            let batch: Vec<u32> = pages.by_ref().take(BATCH_PAGES).collect();
            if batch.is_empty() {
                break;
            }
            self.encoder.encode_given_back(&batch);
            for outlet in &mut *outlets {
                outlet.send_pages(stamp, &self.encoder, &[]);
            }
            self.sent_pages += batch.len() as u64;
        }
        drop(pages);
        // Part of the epoch from here on.
        self.pages.union(&self.given_back);
        self.given_back.clear();
    }

    /// After the pause: pages, state, output, commit, to everyone who takes part. A link that fails is noted in its outlet.
    pub(super) fn send<G: Guest>(
        &mut self,
        guest: &mut G,
        console: &Console,
        outlets: &mut [Outlet],
        stamp: Stamp,
    ) -> Result<(), GuestError> {
        self.send_staged(outlets, stamp);
        self.send_given_back(outlets, stamp);
        self.state.clear();
        guest.encode_captured(&mut self.state)?;
        send_pieces(&self.state, Message::WriteState, outlets, stamp);
        for outlet in outlets {
            self.log.clear();
            guest.encode_log(outlet.link, &mut self.log)?;
            send_pieces(&self.log, Message::WriteLog, std::slice::from_mut(outlet), stamp);
            self.finish(console, outlet, stamp);
            self.sent_bytes += outlet.bytes();
        }
        Ok(())
    }

    /// Sends what of the output this standby does not know, and the commit.
    fn finish(&self, console: &Console, outlet: &mut Outlet, stamp: Stamp) {
        // A standby that knows nothing yet is told of everything that has not left this process.
        let (mut start, output) =
            console.copy(outlet.output_known.unwrap_or_else(|| console.written()), self.output_end);
        for piece in output.chunks(PIECE) {
            outlet.send(stamp, &Message::WriteOutput { start, bytes: piece.to_vec() });
            start += piece.len() as u64;
        }
        let commit = Commit {
            pages: self.sent_pages,
            digest: outlet.digest(),
            output_end: self.output_end,
            released: console.written(),
        };
        outlet.send(stamp, &Message::Commit(commit));
        outlet.output_known = Some(self.output_end);
    }
}

fn send_pieces(bytes: &[u8], message: fn(Vec<u8>) -> Message, outlets: &mut [Outlet], stamp: Stamp) {
    for piece in bytes.chunks(PIECE) {
        let message = message(piece.to_vec());
        for outlet in &mut *outlets {
            outlet.send(stamp, &message);
        }
    }
}
