//! The primary's threads: a driver that owns the guest and performs what the state machine orders, and a reader.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Watcher;
use super::metrics::{PauseSummary, PauseTimes};
use super::pause::{EpochError, EpochInFlight};
use super::seeding::Seeder;
use crate::console::Console;
use crate::dirty::DirtySet;
use crate::guest::{Guest, GuestError};
use crate::ids::{Epoch, Guid, Term};
use crate::link::{Address, FrameReader, FrameWriter, LinkError, Stream};
use crate::memory::{LayoutError, PageMemory};
use crate::primary::{Action, Event, Pacing, Phase, Primary, Settings};
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Body, Message, Sense};
use crate::wire::pages::BufferPool;
use crate::witness::{Claim, FileWitness, Witness, WitnessError};

/// How often the driver looks whether output waits or many pages are dirty.
const POLL: Duration = Duration::from_millis(2);

/// How long an ended guest's standby may take to hear of it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long output that may leave may take to do so before the guest is handed over.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Pages between two reports of a round's progress.
const PROGRESS_PAGES: u64 = 4096;

/// What a primary needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to mirror.
    pub settings: Settings,
    /// The guest.
    pub guid: Guid,
    /// The name that the witness will know this side by; no other side may have it.
    pub name: String,
    /// The term in which this side runs the guest already, if it has been mirrored before.
    pub term: Option<Term>,
    /// Who decides which side lives; without one there is no automatic failover.
    pub witness: Option<FileWitness>,
    /// Where the standby listens.
    pub standby: Address,
    /// Pages that fit into staging: what an epoch may have without stalling.
    pub staging_pages: usize,
}

/// Why a guest is not mirrored. The guest itself is unharmed.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The witness gives no answer.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// The guest is or was live elsewhere.
    #[error(
        "the witness knows guest {guid} already: term {term}, owner {owner}; a guest that is live elsewhere cannot be started here"
    )]
    NotOwner {
        /// The guest.
        guid: Guid,
        /// Its term.
        term: Term,
        /// Its owner.
        owner: String,
    },
    /// No standby answers.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Guest memory cannot be mirrored.
    #[error("the guest's memory cannot be mirrored: {0}")]
    Layout(#[from] LayoutError),
    /// A thread cannot be started.
    #[error("cannot start the mirror's threads: {0}")]
    Thread(#[from] std::io::Error),
}

/// A failed attempt, with the guest that goes on without protection.
#[derive(Debug)]
pub struct AttachFailure<G> {
    /// Why.
    pub error: AttachError,
    /// The guest.
    pub guest: G,
}

/// How mirroring ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The standby is gone, and this side is the live one in this term.
    Solo(Term),
    /// Another side is live; the guest stands still for good.
    Frozen,
    /// The standby runs the guest, as it was asked to.
    HandedOver,
    /// The guest has ended.
    Ended,
}

/// What a primary is doing, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = PrimaryStatus))]
pub struct Status {
    /// "primary".
    pub role: String,
    /// The state machine's phase.
    pub phase: String,
    /// The guest.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub guid: Guid,
    /// Its term.
    pub term: Term,
    /// The last epoch that the standby has acknowledged.
    pub epoch: Epoch,
    /// Where the standby is.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub standby: Address,
    /// Whether a witness is configured.
    pub witness: bool,
    /// Seeding round, counted from 1.
    pub round: u32,
    /// Pages of this round.
    pub round_pages: u64,
    /// How many of them have been sent.
    pub round_sent: u64,
    /// Pages of guest memory.
    pub pages: u64,
    /// Pages sent while seeding.
    pub seed_pages: u64,
    /// Bytes sent while seeding.
    pub seed_bytes: u64,
    /// Pages sent in epochs.
    pub epoch_pages: u64,
    /// Bytes sent in epochs.
    pub epoch_bytes: u64,
    /// Epochs that did not fit staging, so that their pause had to wait for the link.
    pub epochs_stalled: u64,
    /// Output that waits for its epoch, in bytes.
    pub held_bytes: u64,
    /// What the standby last said of itself.
    pub standby_sense: Sense,
    /// The pause, its phases, and the commit.
    #[serde(flatten)]
    pub times: PauseSummary,
}

/// What the driver is told from outside.
enum Input {
    Frame(Header, Message),
    LinkLost(String),
    GuestEnded(String),
    Switchover(Sender<Result<Duration, String>>),
    Detach(Sender<Result<(), String>>),
    Retune(Pacing),
    Quiesce(Sender<Epoch>),
    Unquiesce,
}

/// Counters that the driver keeps and others read.
#[derive(Debug, Default)]
struct Shared {
    status: Mutex<Option<Status>>,
}

impl Shared {
    /// So many pages of the round have been sent, while the driver is busy with it.
    fn round_sent(&self, pages: u64) {
        if let Some(status) = &mut *self.status.lock().unwrap_or_else(PoisonError::into_inner) {
            status.round_sent = pages;
        }
    }
}

/// Reads a primary's status; can be cloned and outlives the mirror.
#[derive(Clone, Debug)]
pub struct StatusHandle(Arc<Shared>);

impl StatusHandle {
    /// What the primary is doing; `None` before its first step.
    pub fn status(&self) -> Option<Status> {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A mirrored guest.
pub struct Handle<G> {
    inputs: Sender<Input>,
    shared: Arc<Shared>,
    driver: JoinHandle<(Outcome, G)>,
}

/// Tells the driver of a mirrored guest what happened to it; can be cloned.
#[derive(Clone)]
pub struct Notifier(Sender<Input>);

impl Notifier {
    /// The guest has ended by itself: what it has said is committed and released, and the standby forgets it.
    pub fn guest_ended(&self, reason: impl Into<String>) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::GuestEnded(reason.into()));
    }

    /// Lets the standby forget the guest, which goes on here alone; returns when it has, and when [`Handle::wait`] is
    /// about to return.
    ///
    /// # Errors
    /// Why it was not to be had; where the guest is then, [`Handle::wait`] and the reports tell.
    pub fn detach(&self) -> Result<(), String> {
        let over = || "the guest is no longer mirrored".to_owned();
        let (sender, outcome) = channel();
        self.0.send(Input::Detach(sender)).map_err(|_| over())?;
        outcome.recv().map_err(|_| over())?
    }

    /// As [`Handle::quiesce`].
    pub fn quiesce(&self) -> Option<Epoch> {
        let (sender, done) = channel();
        self.0.send(Input::Quiesce(sender)).ok()?;
        done.recv().ok()
    }

    /// As [`Handle::unquiesce`].
    pub fn unquiesce(&self) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::Unquiesce);
    }

    /// Lets epochs end otherwise from now on.
    pub fn retune(&self, pacing: Pacing) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::Retune(pacing));
    }

    /// As [`Handle::switchover`].
    ///
    /// # Errors
    /// As there.
    pub fn switchover(&self) -> Result<Duration, String> {
        let over = || "the guest is no longer mirrored".to_owned();
        let (sender, outcome) = channel();
        self.0.send(Input::Switchover(sender)).map_err(|_| over())?;
        outcome.recv().map_err(|_| over())?
    }
}

impl<G> Handle<G> {
    /// What the primary is doing.
    pub fn status_handle(&self) -> StatusHandle {
        StatusHandle(Arc::clone(&self.shared))
    }

    /// For whoever learns of the guest's end.
    pub fn notifier(&self) -> Notifier {
        Notifier(self.inputs.clone())
    }

    /// Lets the standby run the guest from now on, and returns how long the guest ran on neither side.
    ///
    /// # Errors
    /// Why the standby does not run it; where the guest is then, [`Self::wait`] and the reports tell.
    pub fn switchover(&self) -> Result<Duration, String> {
        self.notifier().switchover()
    }

    /// Stops the guest at an epoch and returns once the standby has committed it: both sides hold the same then.
    /// `None` if there is no lockstep any more.
    pub fn quiesce(&self) -> Option<Epoch> {
        self.notifier().quiesce()
    }

    /// Lets a quiesced guest run again.
    pub fn unquiesce(&self) {
        self.notifier().unquiesce();
    }

    /// Waits until mirroring has ended and gives the guest back: running if this side is live.
    pub fn wait(self) -> (Outcome, G) {
        match self.driver.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Begins to mirror `guest`: takes its first term at the witness, connects to the standby, and goes on in a thread.
///
/// # Errors
/// [`AttachFailure`]: the guest is handed back as it was.
pub fn attach<G: Guest + 'static>(
    guest: G,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
) -> Result<Handle<G>, AttachFailure<G>> {
    match prepare(&guest, &options) {
        Ok((term, memory, stream)) => Driver::start(guest, console, options, watcher, term, memory, stream),
        Err(error) => Err(AttachFailure { error, guest }),
    }
}

fn prepare<G: Guest>(guest: &G, options: &Options) -> Result<(Term, PageMemory, Stream), AttachError> {
    let memory = PageMemory::new(Arc::clone(guest.ram()))?;
    let stream = Stream::connect(&options.standby)?;
    let patience = options.settings.heartbeat * options.settings.misses;
    stream.set_write_timeout(patience).map_err(LinkError::Setup)?;
    let guid = options.guid;
    let term = match &options.witness {
        None => options.term.unwrap_or(Term(0)).next(),
        Some(witness) => match witness.claim(guid, options.term.unwrap_or(Term(0)), &options.name)? {
            Claim::Granted(term) => term,
            Claim::Refused { term, owner } => return Err(AttachError::NotOwner { guid, term, owner }),
            Claim::Unreachable(reason) => return Err(std::io::Error::other(reason).into()),
        },
    };
    Ok((term, memory, stream))
}

struct Driver<G> {
    guest: G,
    core: Primary,
    memory: PageMemory,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
    shared: Arc<Shared>,
    inputs: Receiver<Input>,
    /// Inputs that came while a round was being sent.
    backlog: VecDeque<Input>,
    writer: FrameWriter,
    linked: bool,
    seeder: Seeder,
    /// Pages dirtied and not yet on their way.
    dirty: DirtySet,
    flight: EpochInFlight,
    /// Position up to which the standby knows the output.
    output_known: Option<u64>,
    /// Since when output waits that no epoch knows of, as far as was looked.
    output_since: Option<Instant>,
    quiesce: Option<Sender<Epoch>>,
    quiesced: bool,
    /// The guest does not go on after a pause.
    standing: bool,
    /// Who waits for the end of a switchover.
    switchover: Option<Sender<Result<Duration, String>>>,
    /// Who waits for the standby to forget the guest.
    detach: Option<Sender<Result<(), String>>>,
    began: Instant,
    times: PauseTimes,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    round_pages: u64,
    round_sent: u64,
    seed_pages: u64,
    seed_bytes: u64,
    epoch_pages: u64,
    epoch_bytes: u64,
    epochs_stalled: u64,
}

impl<G: Guest + 'static> Driver<G> {
    fn start(
        guest: G,
        console: Arc<Console>,
        options: Options,
        watcher: Watcher,
        term: Term,
        memory: PageMemory,
        stream: Stream,
    ) -> Result<Handle<G>, AttachFailure<G>> {
        let (sender, inputs) = channel();
        let stream = Arc::new(stream);
        if let Err(error) = start_reader(Arc::clone(&stream), sender.clone()) {
            return Err(AttachFailure { error: error.into(), guest });
        }
        let pages = memory.layout().pages();
        let settings = Settings { has_witness: options.witness.is_some(), ..options.settings.clone() };
        let shared = Arc::new(Shared::default());
        let driver = Self {
            core: Primary::new(settings, options.guid, term, memory.layout().clone(), guest.describe()),
            guest,
            memory,
            console,
            watcher,
            shared: Arc::clone(&shared),
            inputs,
            backlog: VecDeque::new(),
            writer: FrameWriter::new(stream),
            linked: true,
            seeder: Seeder::default(),
            dirty: DirtySet::new(pages),
            flight: EpochInFlight::new(pages, options.staging_pages),
            options,
            output_known: None,
            output_since: None,
            quiesce: None,
            quiesced: false,
            standing: false,
            switchover: None,
            detach: None,
            began: Instant::now(),
            times: PauseTimes::default(),
            counters: Counters::default(),
        };
        // The guest moves into the thread by a channel, so that a thread that cannot be started does not take it along.
        let (hand_over, handed_over) = channel::<Self>();
        let spawned = thread::Builder::new()
            .name("mirror".into())
            .spawn(move || handed_over.recv().expect("the driver is handed over at once").run());
        match spawned {
            Ok(thread) => {
                let _ = hand_over.send(driver);
                Ok(Handle { inputs: sender, shared, driver: thread })
            }
            Err(error) => Err(AttachFailure { error: error.into(), guest: driver.guest }),
        }
    }

    fn run(mut self) -> (Outcome, G) {
        self.feed(Event::Connected);
        loop {
            let input = match self.backlog.pop_front() {
                Some(input) => Some(input),
                None => match self.inputs.recv_timeout(self.patience()) {
                    Ok(input) => Some(input),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => break,
                },
            };
            if let Some(input) = input {
                self.take(input);
            }
            // Everything that has come is heard before time passes: being busy is not the standby's silence.
            while let Some(input) = self.backlog.pop_front().or_else(|| self.inputs.try_recv().ok()) {
                self.take(input);
            }
            self.tick();
            self.publish();
            if matches!(self.core.phase(), Phase::Solo | Phase::HandedOver | Phase::Frozen | Phase::Ended) {
                break;
            }
        }
        self.finish()
    }

    fn patience(&self) -> Duration {
        let heartbeat = self.options.settings.heartbeat / 2;
        if self.core.is_running_epoch() { POLL.min(heartbeat) } else { heartbeat }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Frame(header, message) => self.feed(Event::Received { header, message }),
            Input::LinkLost(reason) => self.feed(Event::LinkLost { reason }),
            Input::GuestEnded(reason) => self.feed(Event::GuestEnded { reason }),
            Input::Switchover(done) => {
                self.switchover = Some(done);
                self.feed(Event::Switchover);
            }
            Input::Detach(done) => {
                self.detach = Some(done);
                self.feed(Event::Detach);
            }
            Input::Retune(pacing) => self.feed(Event::Retune(pacing)),
            Input::Quiesce(done) => self.quiesce = Some(done),
            Input::Unquiesce => {
                self.quiesced = false;
                if let Err(error) = self.guest.resume() {
                    self.feed(Event::Failed { reason: error.to_string() });
                }
            }
        }
    }

    fn tick(&mut self) {
        let dirty = if self.core.is_running_epoch() { self.guest.peek_dirty() } else { Ok(None) };
        match dirty {
            Ok(dirty) => {
                let (produced, released) = (self.console.produced(), self.console.written());
                let waits = self.guest.output_waits();
                if self.output_since.is_none() && (waits || produced > self.flight.output_end) {
                    self.output_since = Some(Instant::now());
                }
                self.feed(Event::Tick { produced, released, waits, dirty });
            }
            Err(error) => {
                self.feed(Event::Failed { reason: format!("the dirty log cannot be read: {error}") });
            }
        }
    }

    /// Feeds the state machine and performs what it orders, until nothing more follows.
    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.core.handle(self.began.elapsed(), event, &mut actions);
            for action in actions.drain(..) {
                match self.perform(action) {
                    Ok(answer) => events.extend(answer),
                    Err(Failure::Link(reason)) => events.push_back(Event::LinkLost { reason }),
                    Err(Failure::Machine(reason)) => events.push_back(Event::Failed { reason }),
                }
            }
        }
    }

    /// Performs an action and gives the event that answers it, if one does.
    fn perform(&mut self, action: Action) -> Result<Option<Event>, Failure> {
        match action {
            Action::Send { epoch, message } if self.linked => {
                let stamp = (self.core.guid(), self.core.term(), epoch);
                self.writer.send(stamp, &message)?;
            }
            Action::Send { .. } => {}
            Action::StartTracking => {
                self.guest.start_tracking()?;
                self.guest.populated(&mut self.dirty)?;
                return Ok(Some(Event::Tracking { pages: self.dirty.count() }));
            }
            Action::StopTracking => self.guest.stop_tracking()?,
            Action::SendRound { round } => return self.send_round(round).map(Some),
            Action::Harvest => {
                self.guest.harvest(&mut self.dirty)?;
                self.flight.note_given_back(&mut self.guest, &self.dirty);
                return Ok(Some(Event::Harvested { pages: self.dirty.count() }));
            }
            Action::Hold => {
                // What was said before has left.
                self.output_since = None;
                self.console.hold();
                self.guest.hold_output();
            }
            Action::TakeEpoch { epoch } => return self.take_epoch(epoch).map(Some),
            Action::SendEpoch { epoch } => self.send_epoch(epoch)?,
            Action::Release { epoch, output_end } => self.release(epoch, output_end),
            Action::PutBack => self.dirty.union(&self.flight.pages),
            Action::Claim { expected } => return Ok(Some(Event::Claimed(self.claim(expected)))),
            Action::PassOutput => {
                self.console.pass();
                self.guest.pass_output();
            }
            Action::Freeze => {
                self.console.freeze();
                self.guest.freeze_output();
                self.guest.pause()?;
            }
            Action::Close => {
                self.linked = false;
                let how = if self.core.phase() == Phase::Ended { Shutdown::Write } else { Shutdown::Both };
                self.writer.close(how);
            }
            Action::StandStill => self.standing = true,
            Action::Drain => return self.drain().map(Some),
            Action::Resume => {
                self.standing = false;
                self.guest.resume()?;
            }
            Action::Report(report) => self.report(report),
        }
        Ok(None)
    }

    fn report(&mut self, report: Report) {
        if let Report::DetachFailed { reason } = &report
            && let Some(asked) = self.detach.take()
        {
            // Whoever asked may have gone; so below.
            let _ = asked.send(Err(reason.clone()));
        }
        let outcome = match &report {
            Report::HandedOver { pause_us, .. } => Some(Ok(Duration::from_micros(*pause_us))),
            Report::SwitchoverFailed { reason } => Some(Err(reason.clone())),
            _ => None,
        };
        (self.watcher)(report);
        if let Some(outcome) = outcome
            && let Some(asked) = self.switchover.take()
        {
            let _ = asked.send(outcome);
        }
    }

    /// The guest stands still, and everything that it has printed may leave.
    fn drain(&mut self) -> Result<Event, Failure> {
        self.guest.drain()?;
        let released = if self.console.flush_within(DRAIN_PATIENCE) {
            Ok(self.console.written())
        } else {
            Err("what the guest has printed cannot leave: whoever reads its console does not".into())
        };
        Ok(Event::Drained(released))
    }

    fn send_round(&mut self, round: u32) -> Result<Event, Failure> {
        let set = std::mem::replace(&mut self.dirty, DirtySet::new(self.memory.layout().pages()));
        let pages = set.count();
        (self.counters.round_pages, self.counters.round_sent) = (pages, 0);
        self.publish();
        let stamp = (self.core.guid(), self.core.term(), Epoch::NONE);
        let mut reported = 0;
        let outcome = self.seeder.send_round(&self.memory, &set, &mut self.writer, stamp, |sent| {
            if sent - reported >= PROGRESS_PAGES || sent == pages {
                reported = sent;
                self.shared.round_sent(sent);
                (self.watcher)(Report::RoundProgress { round, sent, pages });
            }
            while let Ok(input) = self.inputs.try_recv() {
                let urgent = matches!(input, Input::LinkLost(_) | Input::GuestEnded(_) | Input::Detach(_));
                self.backlog.push_back(input);
                if urgent {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        let sent = outcome?;
        self.counters.round_sent = sent.pages;
        self.counters.seed_pages += sent.pages;
        self.counters.seed_bytes += sent.bytes;
        if sent.whole {
            let message = Message::RoundEnd { round, pages: sent.pages, digest: sent.digest.value() };
            self.writer.send(stamp, &message)?;
        }
        Ok(Event::RoundSent { pages: sent.pages, bytes: sent.bytes })
    }

    fn take_epoch(&mut self, epoch: Epoch) -> Result<Event, Failure> {
        let stamp = (self.core.guid(), self.core.term(), epoch);
        let keep_paused = self.standing || self.quiesced || self.quiesce.is_some();
        self.flight.take(
            &mut self.guest,
            &self.memory,
            &mut self.dirty,
            &self.console,
            (&mut self.writer, stamp),
            keep_paused,
        )?;
        self.quiesced = keep_paused && !self.standing;
        self.flight.output_since = self.output_since.take();
        Ok(Event::Staged { output_end: self.flight.output_end })
    }

    fn send_epoch(&mut self, epoch: Epoch) -> Result<(), Failure> {
        let stamp = (self.core.guid(), self.core.term(), epoch);
        let Self { flight, guest, console, writer, output_known, .. } = self;
        flight.send(guest, console, *output_known, writer, stamp)?;
        *output_known = Some(flight.output_end);
        Ok(())
    }

    fn release(&mut self, epoch: Epoch, output_end: u64) {
        self.console.allow(output_end);
        self.guest.release_output();
        let commit_us = self.flight.resumed.elapsed().as_micros() as u64;
        self.times.record_pause(&self.flight.pause);
        self.times.record_commit(commit_us);
        self.counters.epoch_pages += self.flight.sent_pages;
        self.counters.epoch_bytes += self.flight.sent_bytes;
        self.counters.epochs_stalled += u64::from(self.flight.stalled);
        (self.watcher)(Report::Committed {
            epoch,
            pages: self.flight.sent_pages,
            bytes: self.flight.sent_bytes,
            pause: self.flight.pause,
            commit_us,
            released: output_end,
            held_us: self.flight.output_since.take().map(|since| since.elapsed().as_micros() as u64),
            stalled: self.flight.stalled,
        });
        // A question that came after this epoch's pause is answered by the next.
        if self.quiesced
            && let Some(done) = self.quiesce.take()
        {
            // Whoever asked may have gone.
            let _ = done.send(epoch);
        }
    }

    fn claim(&self, expected: Term) -> Claim {
        match &self.options.witness {
            None => Claim::Granted(expected.next()),
            Some(witness) => witness
                .claim(self.core.guid(), expected, &self.options.name)
                .unwrap_or_else(|error| Claim::Unreachable(error.to_string())),
        }
    }

    fn publish(&self) {
        let status = Status {
            role: "primary".into(),
            phase: self.core.phase().name().into(),
            guid: self.core.guid(),
            term: self.core.term(),
            epoch: self.core.epoch(),
            standby: self.options.standby.clone(),
            witness: self.options.witness.is_some(),
            round: self.core.round(),
            round_pages: self.counters.round_pages,
            round_sent: self.counters.round_sent,
            pages: self.memory.layout().pages(),
            seed_pages: self.counters.seed_pages,
            seed_bytes: self.counters.seed_bytes,
            epoch_pages: self.counters.epoch_pages,
            epoch_bytes: self.counters.epoch_bytes,
            epochs_stalled: self.counters.epochs_stalled,
            held_bytes: self.console.held(),
            standby_sense: self.core.sense().clone(),
            times: self.times.summary(),
        };
        *self.shared.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
    }

    fn finish(mut self) -> (Outcome, G) {
        let outcome = match self.core.phase() {
            Phase::Frozen => Outcome::Frozen,
            Phase::HandedOver => Outcome::HandedOver,
            Phase::Ended => {
                self.await_farewell();
                Outcome::Ended
            }
            _ => Outcome::Solo(self.core.term()),
        };
        self.writer.close(Shutdown::Both);
        self.publish();
        if let Some(asked) = self.detach.take() {
            let alone = !matches!(outcome, Outcome::Frozen | Outcome::HandedOver);
            let _ = asked.send(if alone { Ok(()) } else { Err("another side runs the guest".into()) });
        }
        (outcome, self.guest)
    }

    /// Closing a socket with unread data would destroy what was sent last; so the standby's close is awaited.
    fn await_farewell(&mut self) {
        let until = Instant::now() + FAREWELL;
        while let Ok(input) = self.inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
            if matches!(input, Input::LinkLost(_)) {
                return;
            }
        }
    }
}

/// Why an action could not be performed.
enum Failure {
    Link(String),
    Machine(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Link(error.to_string())
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::Machine(error.to_string())
    }
}

impl From<EpochError> for Failure {
    fn from(error: EpochError) -> Self {
        match error {
            EpochError::Guest(error) => error.into(),
            EpochError::Link(error) => error.into(),
        }
    }
}

fn start_reader(stream: Arc<Stream>, inputs: Sender<Input>) -> std::io::Result<()> {
    thread::Builder::new().name("mirror-reader".into()).spawn(move || {
        let mut reader = FrameReader::new(stream, BufferPool::default());
        loop {
            let input = match reader.receive() {
                Ok(Some(frame)) => match frame.body {
                    Body::Message(message) => Input::Frame(frame.header, message),
                    Body::Pages(_) => Input::LinkLost("the standby sent pages: a protocol violation".into()),
                },
                Ok(None) => continue,
                Err(error) => Input::LinkLost(error.to_string()),
            };
            let last = matches!(input, Input::LinkLost(_));
            if inputs.send(input).is_err() || last {
                return;
            }
        }
    })?;
    Ok(())
}
