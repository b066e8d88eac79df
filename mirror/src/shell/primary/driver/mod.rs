//! The driver: owns the guest, and performs what the state machine orders.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::handle::{Handle, Input};
use super::peer::Peer;
use super::status::Shared;
use super::{AttachFailure, Options, Outcome};
use crate::console::Console;
use crate::dirty::DirtySet;
use crate::guest::{Guest, GuestError};
use crate::ids::{Epoch, LinkId, Term};
use crate::link::frames::Stamp;
use crate::link::{Address, FrameWriter, Stream};
use crate::memory::PageMemory;
use crate::primary::{Action, Event, Phase, Primary, Settings};
use crate::report::Report;
use crate::shell::Watcher;
use crate::shell::metrics::PauseTimes;
use crate::shell::outlets::Outlet;
use crate::shell::pause::EpochInFlight;
use crate::shell::pulse::hurry;
use crate::shell::second_link::Beating;
use crate::wire::message::Message;
use crate::witness::Claim;

mod epochs;
mod figures;
mod standbys;

pub(super) use standbys::limit_patience;

/// How often the driver looks whether many pages are dirty, or output waits of which it was not told.
const POLL: Duration = Duration::from_millis(2);

/// How long an ended guest's standbys may take to hear of it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long output that may leave may take to do so before the guest is handed over.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

pub(super) struct Driver<G> {
    guest: G,
    core: Primary,
    memory: PageMemory,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
    shared: Arc<Shared>,
    inputs: Receiver<Input>,
    /// For the threads of a standby.
    sender: Sender<Input>,
    /// Inputs that came while the last words of a standby were waited for.
    backlog: VecDeque<Input>,
    peers: BTreeMap<LinkId, Peer>,
    /// Links that are closed once their standbys have heard of the guest's end.
    farewells: BTreeMap<LinkId, FrameWriter>,
    next_link: LinkId,
    /// Second links to those standbys that listen on one.
    second_links: BTreeMap<LinkId, Beating>,
    /// What its heartbeats promise of its epochs.
    epoch_within_ms: Arc<AtomicU32>,
    /// The term for heartbeats.
    term: Arc<AtomicU64>,
    /// The guest is being tracked.
    tracking: bool,
    /// What a harvest finds.
    fresh: DirtySet,
    flight: EpochInFlight,
    /// To those who take part in the epoch.
    outlets: Vec<Outlet>,
    /// Since when output waits that no epoch knows of, as far as was looked.
    output_since: Option<Instant>,
    /// Somebody has told of output that waits, in this epoch.
    output_told: Arc<AtomicBool>,
    quiesce: Option<Sender<Epoch>>,
    quiesced: bool,
    /// The guest does not go on after a pause.
    standing: bool,
    /// The guest does not go on until it is known to be this side's, or is protected.
    suspended: bool,
    /// Who waits for the end of a switchover.
    switchover: Option<Sender<Result<Duration, String>>>,
    /// Who waits for the standbys to forget the guest.
    detach: Option<Sender<Result<(), String>>>,
    began: Instant,
    times: PauseTimes,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    seed_pages: u64,
    seed_bytes: u64,
    epoch_pages: u64,
    epoch_bytes: u64,
    epochs_stalled: u64,
}

impl<G: Guest + 'static> Driver<G> {
    pub(super) fn start(
        guest: G,
        console: Arc<Console>,
        options: Options,
        watcher: Watcher,
        term: Term,
        memory: PageMemory,
        stream: Stream,
    ) -> Result<Handle<G>, AttachFailure<G>> {
        let (sender, inputs) = channel();
        let pages = memory.layout().pages();
        let settings = Settings { has_witness: options.witness.is_some(), ..options.settings.clone() };
        let (shared, suspended) = (Arc::new(Shared::default()), settings.suspended);
        let mut driver = Self {
            epoch_within_ms: Arc::new(AtomicU32::new(settings.epoch_within().as_millis() as u32)),
            term: Arc::new(AtomicU64::new(term.0)),
            core: Primary::new(settings, options.guid, term, memory.layout().clone(), guest.describe()),
            guest,
            memory,
            console,
            watcher,
            shared: Arc::clone(&shared),
            inputs,
            sender: sender.clone(),
            backlog: VecDeque::new(),
            peers: BTreeMap::new(),
            farewells: BTreeMap::new(),
            next_link: 0,
            second_links: BTreeMap::new(),
            tracking: false,
            fresh: DirtySet::new(pages),
            flight: EpochInFlight::new(pages, options.staging_pages),
            outlets: Vec::new(),
            options,
            output_since: None,
            output_told: Arc::default(),
            quiesce: None,
            quiesced: false,
            standing: false,
            suspended,
            switchover: None,
            detach: None,
            began: Instant::now(),
            times: PauseTimes::default(),
            counters: Counters::default(),
        };
        let address = driver.options.standby.clone();
        let first = match driver.link_to(address, stream) {
            Ok(link) => link,
            Err(error) => return Err(AttachFailure { error: error.into(), guest: driver.guest }),
        };
        // The guest moves into the thread by a channel, so that a thread that cannot be started does not take it along.
        let (hand_over, handed_over) = channel::<Self>();
        let spawned = thread::Builder::new()
            .name("mirror".into())
            .spawn(move || handed_over.recv().expect("the driver is handed over at once").run(first));
        match spawned {
            Ok(thread) => {
                let _ = hand_over.send(driver);
                Ok(Handle { inputs: sender, shared, driver: thread })
            }
            Err(error) => Err(AttachFailure { error: error.into(), guest: driver.guest }),
        }
    }

    fn run(mut self, first: LinkId) -> (Outcome, G) {
        hurry();
        self.guest.tell_of_output(teller(&self.output_told, self.sender.clone()));
        self.feed(Event::Connected { link: first });
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
            // Everything that has come is heard before time passes: being busy is not a standby's silence.
            while let Some(input) = self.backlog.pop_front().or_else(|| self.inputs.try_recv().ok()) {
                self.take(input);
            }
            self.tick();
            if !self.core.is_deciding() {
                self.second_links.retain(|link, _| self.peers.contains_key(link));
            }
            self.publish();
            if self.core.phase().is_over() {
                break;
            }
        }
        self.finish()
    }

    fn patience(&self) -> Duration {
        let heartbeat = self.options.settings.heartbeat / 2;
        let epoch = self.core.epoch_ends_in(self.began.elapsed());
        epoch.map_or(heartbeat, |left| left.min(POLL).min(heartbeat))
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Join(address, stream) => match self.link_to(address, stream) {
                Ok(link) => self.feed(Event::Connected { link }),
                Err(error) => {
                    let reason = format!("one more standby cannot be mirrored to: {error}");
                    (self.watcher)(Report::Failed { reason });
                }
            },
            Input::Frame(link, header, message) => self.feed(Event::Received { link, header, message }),
            Input::LinkLost(link, reason) => self.feed(Event::LinkLost { link, reason }),
            Input::RoundSent { link, outcome, seeder } => {
                if let Some(peer) = self.peers.get_mut(&link) {
                    peer.take_seeder(seeder);
                }
                match outcome {
                    Ok((pages, bytes)) => {
                        self.counters.seed_pages += pages;
                        self.counters.seed_bytes += bytes;
                        self.feed(Event::RoundSent { link, pages, bytes });
                    }
                    Err(error) => {
                        for event in self.link_failed(link, &error) {
                            self.feed(event);
                        }
                    }
                }
            }
            Input::GuestEnded(reason) => self.feed(Event::GuestEnded { reason }),
            // Every input is followed by a tick, which looks.
            Input::OutputWaits => {}
            Input::Switchover(to, done) => self.switch_over(to.as_ref(), &done),
            Input::Detach(done) => {
                self.detach = Some(done);
                self.feed(Event::Detach);
            }
            Input::Retune(pacing) => {
                self.feed(Event::Retune(pacing));
                let epoch_within = self.core.settings().epoch_within().as_millis() as u32;
                self.epoch_within_ms.store(epoch_within, Ordering::Relaxed);
            }
            Input::Quiesce(done) => self.quiesce = Some(done),
            Input::Unquiesce => {
                self.quiesced = false;
                if let Err(error) = self.go_on() {
                    self.feed(Event::Failed { reason: error.to_string() });
                }
            }
        }
    }

    fn switch_over(&mut self, to: Option<&Address>, done: &Sender<Result<Duration, String>>) {
        let refusal = if self.switchover.is_some() {
            Some("a switchover is under way already".to_owned())
        } else {
            let unknown = to.filter(|to| !self.peers.values().any(|peer| peer.address == **to));
            unknown.map(|to| format!("the guest is not mirrored to {to}"))
        };
        if let Some(reason) = refusal {
            // Whoever asked may have gone.
            let _ = done.send(Err(reason));
            return;
        }
        let link = self.peers.iter().find(|(_, peer)| Some(&peer.address) == to);
        let to = link.map(|(&link, _)| link);
        self.switchover = Some(done.clone());
        self.feed(Event::Switchover { to });
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
            self.term.store(self.core.term().0, Ordering::Release);
            for action in actions.drain(..) {
                match self.perform(action, &mut events) {
                    Ok(()) => {}
                    Err(Failure::Link(link, reason)) => events.push_back(Event::LinkLost { link, reason }),
                    Err(Failure::Io(link, error)) => events.extend(self.link_failed(link, &error)),
                    Err(Failure::Machine(reason)) => events.push_back(Event::Failed { reason }),
                }
            }
        }
    }

    fn stamp(&self, epoch: Epoch) -> Stamp {
        (self.core.guid(), self.core.term(), epoch)
    }

    /// Performs an action; what answers it is added to `events`.
    fn perform(&mut self, action: Action, events: &mut VecDeque<Event>) -> Result<(), Failure> {
        match action {
            Action::Send { link, epoch, message } => {
                let stamp = self.stamp(epoch);
                if let Some(peer) = self.peers.get_mut(&link) {
                    let sent = if matches!(message, Message::Heartbeat { .. }) {
                        // A standby that is sent a round hears of this side as it is; the others are not to wait for that.
                        peer.writer.break_silence(Duration::ZERO, || stamp, &message)
                    } else {
                        peer.writer.send(stamp, &message).map(drop)
                    };
                    sent.map_err(|error| Failure::Io(link, error))?;
                }
            }
            Action::Agree { link, disks } => self.agree(link, &disks)?,
            Action::BeatAt { link, address } => self.beat_at(link, &address)?,
            Action::Note { link, first, digests } => {
                let pages = self.memory.layout().pages();
                if let Some(peer) = self.peers.get_mut(&link) {
                    peer.held.add(first, digests, pages).map_err(|reason| Failure::Link(link, reason))?;
                }
            }
            Action::StartTracking { link } => events.extend(self.track(link)?),
            Action::StopTracking => {
                self.tracking = false;
                self.guest.stop_tracking()?;
            }
            Action::SendRound { link, round } => self.send_round(link, round)?,
            Action::Harvest { link } => events.extend(self.harvest(link)?),
            Action::Hold => {
                // What was said before has left.
                self.output_since = None;
                self.console.hold();
                self.guest.hold_output();
            }
            Action::TakeEpoch { epoch, links } => events.push_back(self.take_epoch(epoch, &links)?),
            Action::SendEpoch { epoch } => self.send_epoch(epoch, events)?,
            Action::Release { epoch, output_end } => self.release(epoch, output_end),
            // Whoever does not take part owes them already; for the others this was the last epoch.
            Action::PutBack => self.outlets.clear(),
            Action::Claim { expected } => {
                // Until the witness answers nothing else is told.
                self.publish();
                events.push_back(Event::Claimed(self.claim(expected)));
            }
            Action::PassOutput => {
                self.console.pass();
                self.guest.pass_output();
            }
            Action::Freeze => {
                self.console.freeze();
                self.guest.freeze_output();
                self.guest.pause()?;
            }
            Action::Close(link) => self.close(link),
            Action::StandStill => self.standing = true,
            Action::Drain => events.push_back(self.drain()?),
            Action::Suspend => {
                self.suspended = true;
                self.guest.pause()?;
            }
            Action::Resume => {
                (self.standing, self.suspended) = (false, false);
                self.go_on()?;
            }
            Action::Report(report) => self.report(report),
        }
        Ok(())
    }

    /// Lets the guest go on, unless it stands still for another reason.
    fn go_on(&mut self) -> Result<(), GuestError> {
        if self.standing || self.suspended || self.quiesced {
            return Ok(());
        }
        self.guest.resume()
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

    fn claim(&self, expected: Term) -> Claim {
        match &self.options.witness {
            None => Claim::Granted(expected.next()),
            Some(witness) => witness
                .claim(self.core.guid(), expected, &self.options.name)
                .unwrap_or_else(|error| Claim::Unreachable(error.to_string())),
        }
    }

    fn finish(mut self) -> (Outcome, G) {
        let outcome = match self.core.phase() {
            Phase::Frozen => Outcome::Frozen,
            Phase::HandedOver => Outcome::HandedOver,
            Phase::Suspended => Outcome::Suspended(self.core.term()),
            Phase::Ended => {
                self.await_farewells();
                Outcome::Ended
            }
            _ if self.detach.is_some() => Outcome::Detached(self.core.term()),
            _ => Outcome::Solo(self.core.term()),
        };
        self.peers.values().for_each(|peer| peer.close(Shutdown::Both));
        self.publish();
        if let Some(asked) = self.detach.take() {
            let alone = matches!(outcome, Outcome::Solo(_) | Outcome::Detached(_) | Outcome::Ended);
            let _ = asked.send(if alone { Ok(()) } else { Err("another side runs the guest".into()) });
        }
        (outcome, self.guest)
    }

    /// Closing a socket with unread data would destroy what was sent last; so the standbys' close is awaited.
    fn await_farewells(&mut self) {
        let until = Instant::now() + FAREWELL;
        while !self.farewells.is_empty() {
            match self.inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Input::LinkLost(link, _)) => drop(self.farewells.remove(&link)),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.farewells.values().for_each(|writer| writer.close(Shutdown::Both));
    }
}

/// Tells the driver that output waits, once an epoch.
fn teller(told: &Arc<AtomicBool>, inputs: Sender<Input>) -> Box<dyn Fn() + Send + Sync> {
    let told = Arc::clone(told);
    Box::new(move || {
        if !told.swap(true, Ordering::Relaxed) {
            // A driver that has finished has no more use for it.
            let _ = inputs.send(Input::OutputWaits);
        }
    })
}

/// Why an action could not be performed.
enum Failure {
    /// The link is of no more use.
    Link(LinkId, String),
    /// The link could not be written to.
    Io(LinkId, io::Error),
    Machine(String),
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Self::Machine(error.to_string())
    }
}
