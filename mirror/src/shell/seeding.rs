//! Sends a round of pages while the guest runs: one thread copies and encodes, the caller's sends.

use std::io;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::pulse::take_turns;
use crate::digest::Digest;
use crate::dirty::DirtySet;
use crate::link::FrameWriter;
use crate::link::frames::Stamp;
use crate::memory::{PAGE_SIZE, PageMemory};
use crate::wire::pages::{BATCH_PAGES, BatchEncoder};

/// Batches on their way between the two threads.
const IN_FLIGHT: usize = 6;

/// A batch that is filled, sent, and filled again.
struct Batch {
    pages: Vec<u32>,
    bodies: Vec<u8>,
    encoder: BatchEncoder,
}

impl Batch {
    fn new() -> Self {
        Self {
            pages: Vec::with_capacity(BATCH_PAGES),
            bodies: vec![0; BATCH_PAGES * PAGE_SIZE],
            encoder: BatchEncoder::new(),
        }
    }

    /// Copies the next pages. The copy is what is sealed and sent, so that a page may change meanwhile.
    fn fill(&mut self, memory: &PageMemory, pages: &mut impl Iterator<Item = u64>) -> bool {
        self.pages.clear();
        for (page, body) in pages.by_ref().take(BATCH_PAGES).zip(self.bodies.chunks_exact_mut(PAGE_SIZE)) {
            if memory.read(page, body).is_ok() {
                self.pages.push(page as u32);
            }
        }
        self.encoder.encode(&self.pages, &self.bodies[..self.pages.len() * PAGE_SIZE]);
        !self.pages.is_empty()
    }

    fn sent_bodies(&self) -> &[u8] {
        &self.bodies[..self.pages.len() * PAGE_SIZE]
    }
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RoundSent {
    /// Pages sent.
    pub(super) pages: u64,
    /// Bytes on the wire.
    pub(super) bytes: u64,
    /// Digest over its frames.
    pub(super) digest: Digest,
    /// Whether all of it was sent.
    pub(super) whole: bool,
}

/// Sends rounds; its batches are used again from one round to the next.
#[derive(Default)]
pub(super) struct Seeder {
    spare: Vec<Batch>,
}

impl Seeder {
    /// Sends the pages of `set`, going on with `digest`. After each batch `progress` is told how many pages have gone, and may break off.
    pub(super) fn send_round(
        &mut self,
        memory: &PageMemory,
        set: &DirtySet,
        writer: &mut FrameWriter,
        stamp: Stamp,
        digest: Digest,
        mut progress: impl FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<RoundSent> {
        let wanted = (set.count().div_ceil(BATCH_PAGES as u64) as usize).clamp(1, IN_FLIGHT);
        while self.spare.len() < wanted {
            self.spare.push(Batch::new());
        }
        let (full_sender, full) = sync_channel::<Batch>(IN_FLIGHT);
        let (empty_sender, empty) = sync_channel::<Batch>(IN_FLIGHT);
        for batch in self.spare.drain(..) {
            // The channel has room for all of them.
            let _ = empty_sender.send(batch);
        }
        thread::scope(|scope| {
            let encoder = thread::Builder::new().name("encoder".into()).spawn_scoped(scope, move || {
                take_turns();
                let mut pages = set.iter();
                while let Ok(mut batch) = empty.recv() {
                    if !batch.fill(memory, &mut pages) || full_sender.send(batch).is_err() {
                        break;
                    }
                }
                drop(full_sender);
                empty.into_iter().collect::<Vec<_>>()
            })?;
            let outcome = send_batches(full, &empty_sender, writer, stamp, digest, &mut progress);
            drop(empty_sender);
            // A panic there has been reported; the batches are then made anew.
            self.spare = encoder.join().unwrap_or_default();
            outcome
        })
    }
}

fn send_batches(
    full: Receiver<Batch>,
    empty: &SyncSender<Batch>,
    writer: &mut FrameWriter,
    stamp: Stamp,
    digest: Digest,
    progress: &mut impl FnMut(u64) -> ControlFlow<()>,
) -> io::Result<RoundSent> {
    let mut round = RoundSent { digest, ..RoundSent::default() };
    for batch in full {
        let sent = writer.send_pages(stamp, &batch.encoder, batch.sent_bodies())?;
        round.pages += batch.pages.len() as u64;
        round.bytes += sent.bytes;
        round.digest.add(sent.checksum);
        if progress(round.pages).is_break() {
            return Ok(round);
        }
        // At the end of the round nobody takes it any more.
        let _ = empty.send(batch);
    }
    round.whole = true;
    Ok(round)
}
