//! One standby of a primary: its link, what it has not been sent yet, and the rounds that it is seeded by.

use std::net::Shutdown;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::thread;

use super::handle::Input;
use crate::dirty::DirtySet;
use crate::ids::LinkId;
use crate::link::frames::Stamp;
use crate::link::{Address, FrameReader, FrameWriter, Stream};
use crate::memory::PageMemory;
use crate::report::Report;
use crate::resync::Held;
use crate::shell::Watcher;
use crate::shell::pulse::hurry;
use crate::shell::seeding::Seeder;
use crate::shell::write_log::SentLog;
use crate::wire::message::{Body, Message};
use crate::wire::pages::BufferPool;

/// Pages between two reports of a round's progress.
const PROGRESS_PAGES: u64 = 4096;

/// One standby.
pub(super) struct Peer {
    pub(super) address: Address,
    pub(super) writer: FrameWriter,
    /// What it has of the guest's memory before it is sent any.
    pub(super) held: Held,
    /// Pages dirtied and not yet on their way to it.
    pub(super) dirty: DirtySet,
    /// Position up to which it knows the output.
    pub(super) output_known: Option<u64>,
    /// It has disk images of its own.
    pub(super) has_disks: bool,
    /// Pages of the round that is being sent.
    pub(super) round_pages: u64,
    /// How many of them have been sent.
    pub(super) round_sent: Arc<AtomicU64>,
    /// Unless it is at work.
    seeder: Option<Seeder>,
    /// The round that is being sent is of no more use.
    stopped: Arc<AtomicBool>,
}

impl Peer {
    pub(super) fn new(address: Address, writer: FrameWriter, pages: u64) -> Self {
        Self {
            address,
            writer,
            held: Held::default(),
            dirty: DirtySet::new(pages),
            output_known: None,
            has_disks: false,
            round_pages: 0,
            round_sent: Arc::default(),
            seeder: Some(Seeder::default()),
            stopped: Arc::default(),
        }
    }

    /// Closes the link, after what was sent on it has gone.
    pub(super) fn close(&self, how: Shutdown) {
        self.stopped.store(true, Ordering::Relaxed);
        self.writer.close(how);
    }

    /// Sends a round of all that is dirty in a thread of its own, after `log`, blocks of disks: whoever follows does not wait for
    /// it. Its end is told as [`Input::RoundSent`].
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn send_round(
        &mut self,
        link: LinkId,
        round: u32,
        memory: PageMemory,
        stamp: Stamp,
        log: Vec<u8>,
        (inputs, watcher): (Sender<Input>, Watcher),
    ) -> std::io::Result<()> {
        let set = std::mem::replace(&mut self.dirty, DirtySet::new(memory.layout().pages()));
        let pages = set.count();
        self.round_pages = pages;
        self.round_sent.store(0, Ordering::Relaxed);
        let (counter, stopped) = (Arc::clone(&self.round_sent), Arc::clone(&self.stopped));
        let mut writer = self.writer.clone();
        let mut seeder = self.seeder.take().unwrap_or_default();
        let send = move || {
            // Signs of life wait for what it sends.
            hurry();
            let mut reported = 0;
            let progress = |sent| {
                counter.store(sent, Ordering::Relaxed);
                if sent - reported >= PROGRESS_PAGES || sent == pages {
                    reported = sent;
                    watcher(Report::RoundProgress { round, sent, pages });
                }
                if stopped.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            };
            let outcome = SentLog::send(&log, &mut writer, stamp).and_then(|log| {
                let sent = seeder.send_round(&memory, &set, &mut writer, stamp, log.digest, progress)?;
                if sent.whole {
                    let message = Message::RoundEnd { round, pages: sent.pages, digest: sent.digest.value() };
                    writer.send(stamp, &message)?;
                }
                Ok((sent.pages, log.bytes + sent.bytes))
            });
            // A driver that has finished has no more use for it.
            let _ = inputs.send(Input::RoundSent { link, outcome, seeder });
        };
        thread::Builder::new().name("mirror-seed".into()).spawn(send)?;
        Ok(())
    }

    /// The round has ended; what was used for it can be used again.
    pub(super) fn take_seeder(&mut self, seeder: Seeder) {
        self.seeder = Some(seeder);
    }
}

/// Tells the driver of everything that comes on `stream`.
///
/// # Errors
/// The thread cannot be started.
pub(super) fn start_reader(link: LinkId, stream: Arc<Stream>, inputs: Sender<Input>) -> std::io::Result<()> {
    thread::Builder::new().name("mirror-reader".into()).spawn(move || {
        hurry();
        let mut reader = FrameReader::new(stream, BufferPool::default());
        loop {
            let input = match reader.receive() {
                Ok(Some(frame)) => match frame.body {
                    Body::Message(message) => Input::Frame(link, frame.header, message),
                    Body::Pages(_) => {
                        Input::LinkLost(link, "the standby sent pages: a protocol violation".into())
                    }
                },
                Ok(None) => continue,
                Err(error) => Input::LinkLost(link, error.to_string()),
            };
            let last = matches!(input, Input::LinkLost(..));
            if inputs.send(input).is_err() || last {
                return;
            }
        }
    })?;
    Ok(())
}
