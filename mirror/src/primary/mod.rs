//! The primary's state machine: events in, actions out; no clock, no socket, no thread.
//!
//! ```text
//! idle -> joining -> seeding(round) -> lockstep(epoch) -> [standby lost] -> deciding -> solo | frozen
//! ```
//! The one rule behind everything: output of an epoch is released when the standby has acknowledged the epoch, or
//! when the witness has made this side the live one. Never before.

use std::time::Duration;

use crate::ids::{Epoch, Guid, Term};
use crate::memory::{Layout, PAGE_SIZE};
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Message, Policy, Refusal, Sense, Space};
use crate::witness::Claim;

pub mod convergence;
mod events;
mod parting;

use convergence::{Round, judge};
pub use events::{Action, Event, Phase};

/// Time between two questions about the standby's health.
const SENSE_INTERVAL: Duration = Duration::from_secs(1);

/// How long a standby may take for one step of the agreement: it builds a machine in one of them.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

/// How a primary mirrors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Time between two signs of life.
    pub heartbeat: Duration,
    /// Missed signs of life after which the other side counts as lost.
    pub misses: u32,
    /// When epochs end.
    pub pacing: Pacing,
    /// Whether to wait in the standby's queue if it has no space now.
    pub wait_for_space: bool,
    /// Whether there is a witness to ask which side lives.
    pub has_witness: bool,
}

/// When an epoch ends. It can be changed at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pacing {
    /// Longest time between two epochs.
    pub interval: Duration,
    /// Shortest time between two epochs: output that waits ends an epoch early, but not earlier than this.
    pub min_interval: Duration,
    /// What the final pause of seeding may cost.
    pub pause_budget: Duration,
    /// Dirty pages that end an epoch early, so that its pause stays short.
    pub dirty_budget: u64,
}

impl Default for Pacing {
    fn default() -> Self {
        Self {
            interval: Duration::from_millis(25),
            min_interval: Duration::from_millis(5),
            pause_budget: Duration::from_millis(10),
            dirty_budget: 4096,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            misses: 4,
            pacing: Pacing::default(),
            wait_for_space: false,
            has_witness: false,
        }
    }
}

/// Where the current epoch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// The guest runs; the epoch before was staged at `since`.
    Running { since: Duration },
    /// The pause has been ordered.
    Pausing,
    /// Sent or being sent; the acknowledgement is awaited.
    Committing { since: Duration },
    /// The last epoch before a hand-over is committed; this host finishes what it does for the guest.
    Draining,
}

/// The answer of the agreement that is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Space,
    Allocation,
    Lock,
    Header,
    Read,
}

/// The state machine.
#[derive(Debug)]
pub struct Primary {
    settings: Settings,
    guid: Guid,
    term: Term,
    layout: Layout,
    machine: Vec<u8>,
    phase: Phase,
    now: Duration,
    heard: Duration,
    spoke: Duration,
    sensed: Duration,
    step: Step,
    /// The standby has us wait for space.
    queued: bool,
    round: u32,
    /// The answer to the round is awaited.
    round_open: bool,
    round_started: Duration,
    round_sent: (u64, u64),
    round_took: Duration,
    /// Pages that the round before left.
    remaining: u64,
    /// The last epoch that the standby has acknowledged.
    epoch: Epoch,
    flow: Flow,
    /// The epoch that is being taken or committed is the guest's last.
    last: bool,
    /// Position after the output of the epoch that was staged last.
    output_end: u64,
    /// A commit has been sent: from then on the standby may hold a complete epoch and may be live without us.
    exposed: bool,
    /// The guest's end, told to the standby once everything before it is committed.
    ended: Option<String>,
    /// Since when the guest stands still for the standby to run it, if so.
    standing: Option<Duration>,
    /// A switchover is wanted.
    switching: bool,
    /// The standby is wanted no longer.
    detaching: bool,
    /// When the witness was last asked.
    asked: Duration,
    sense: Sense,
}

impl Primary {
    /// A primary of the guest `guid` in `term`, which it owns by the witness' word.
    pub fn new(settings: Settings, guid: Guid, term: Term, layout: Layout, machine: Vec<u8>) -> Self {
        let zero = Duration::ZERO;
        Self {
            settings,
            guid,
            term,
            layout,
            machine,
            phase: Phase::Idle,
            now: zero,
            heard: zero,
            spoke: zero,
            sensed: zero,
            round: 0,
            round_open: false,
            round_started: zero,
            round_sent: (0, 0),
            round_took: zero,
            remaining: 0,
            epoch: Epoch::NONE,
            flow: Flow::Running { since: zero },
            last: false,
            output_end: 0,
            step: Step::Space,
            queued: false,
            exposed: false,
            ended: None,
            standing: None,
            switching: false,
            detaching: false,
            asked: zero,
            sense: Sense::default(),
        }
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its term.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The guest.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// The last epoch that the standby has acknowledged.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The seeding round, counted from 1.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// What the standby last said of itself.
    pub fn sense(&self) -> &Sense {
        &self.sense
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether the current epoch may end now; then the shell's ticks decide when.
    pub fn is_running_epoch(&self) -> bool {
        self.phase == Phase::Lockstep && matches!(self.flow, Flow::Running { .. })
    }

    /// Takes an event at time `now`, counted from any fixed moment; what is to be done is appended to `actions`.
    pub fn handle(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        self.now = now;
        match event {
            Event::Connected => self.join(actions),
            Event::Received { header, message } => self.received(&header, message, actions),
            Event::LinkLost { reason } => self.standby_lost(reason, actions),
            Event::Tick { produced, released, waits, dirty } => {
                let waits = waits || produced > self.output_end;
                self.tick(waits, released, dirty, actions);
            }
            Event::Tracking { pages } => self.begin_round(pages, actions),
            Event::RoundSent { pages, bytes } => {
                self.round_sent = (pages, bytes);
                // Who takes data lives; its heartbeats may be late behind so much of it.
                self.heard = self.now;
            }
            Event::Harvested { pages } => self.harvested(pages, actions),
            Event::Staged { output_end } => self.staged(output_end, actions),
            Event::Claimed(claim) => self.claimed(claim, actions),
            Event::Switchover => self.switch_over(actions),
            Event::Detach => self.detach(actions),
            Event::Retune(pacing) => self.settings.pacing = pacing,
            Event::Drained(released) => self.drained(released, actions),
            Event::GuestEnded { reason } => self.guest_ended(reason, actions),
            Event::Failed { reason } => {
                actions.push(Action::Report(Report::Failed { reason: reason.clone() }));
                self.standby_lost(reason, actions);
            }
        }
    }

    fn join(&mut self, actions: &mut Vec<Action>) {
        if self.phase != Phase::Idle {
            return;
        }
        self.phase = Phase::Joining;
        self.heard = self.now;
        let message =
            Message::SpaceRequest { bytes: self.layout.bytes(), wait: self.settings.wait_for_space };
        self.send(message, actions);
    }

    fn received(&mut self, header: &Header, message: Message, actions: &mut Vec<Action>) {
        self.heard = self.now;
        if header.guid != self.guid {
            self.distrust("a message about another guest", actions);
            return;
        }
        if header.term > self.term && message == Message::AllocateWrite {
            if self.phase == Phase::HandingOver {
                self.handed_over(header.term, actions);
            } else {
                self.replaced(header.term, actions);
            }
            return;
        }
        if header.term > self.term {
            let reason = format!("the other side is in term {}, this one in {}", header.term, self.term);
            self.superseded(reason, actions);
            return;
        }
        match (self.phase, message) {
            (Phase::Releasing, Message::MemoryReleased) => self.released(actions),
            (_, Message::Heartbeat { .. } | Message::MemoryReleased) => {}
            (_, Message::SenseResponse(sense)) => self.sense = sense,
            (_, Message::Refused(Refusal::StaleTerm { newest })) if newest > self.term => {
                self.superseded(format!("the standby knows term {newest}"), actions);
            }
            // It says so itself: nobody but this side runs the guest.
            (Phase::HandingOver, Message::Refused(refusal)) => {
                actions.push(Action::Close);
                self.decide(refusal.to_string(), actions);
            }
            (_, Message::Refused(refusal)) => self.standby_lost(refusal.to_string(), actions),
            (Phase::Joining, message) => self.joining(message, actions),
            (Phase::Seeding, Message::RoundAck { round }) if self.round_open && round == self.round => {
                self.round_open = false;
                self.round_took = self.now.saturating_sub(self.round_started);
                actions.push(Action::Harvest);
            }
            (Phase::Seeding | Phase::Lockstep, Message::CommitAck) => self.committed(header.epoch, actions),
            (Phase::Deciding | Phase::Solo | Phase::HandedOver | Phase::Frozen | Phase::Ended, _) => {}
            (_, message) => self.distrust(message.name(), actions),
        }
    }

    /// The steps of the agreement, each answered before the next.
    fn joining(&mut self, message: Message, actions: &mut Vec<Action>) {
        match (self.step, message) {
            (Step::Space, Message::SpaceResponse(Space::Granted)) => {
                self.queued = false;
                self.step = Step::Allocation;
                let message = Message::Allocate {
                    layout: self.layout.clone(),
                    policy: Policy { block_size: PAGE_SIZE as u32 },
                    machine: std::mem::take(&mut self.machine),
                    heartbeat_ms: self.settings.heartbeat.as_millis() as u32,
                    misses: self.settings.misses,
                };
                self.send(message, actions);
            }
            (Step::Space, Message::SpaceResponse(Space::Queued { .. })) => self.queued = true,
            (Step::Space, Message::SpaceResponse(Space::Denied { available, reason })) => {
                let reason = format!(
                    "the standby has no space for {} bytes of guest memory ({available} available): {reason}",
                    self.layout.bytes()
                );
                self.standby_lost(reason, actions);
            }
            (Step::Allocation, Message::Allocated) => {
                self.step = Step::Lock;
                self.send(Message::LockRequest, actions);
            }
            (Step::Lock, Message::LockResponse { term, .. }) if term == self.term => {
                self.step = Step::Header;
                self.send(Message::HeaderRequest, actions);
            }
            (Step::Lock, Message::LockResponse { term, owner, .. }) => {
                let reason = format!("the standby says that {owner} owns the guest in term {term}");
                if term > self.term {
                    self.superseded(reason, actions);
                } else {
                    self.standby_lost(reason, actions);
                }
            }
            (Step::Header, Message::HeaderResponse(header))
                if header.layout == self.layout
                    && header.policy.block_size as usize == PAGE_SIZE
                    && header.epoch == Epoch::NONE =>
            {
                self.step = Step::Read;
                self.send(Message::AllocateRead, actions);
            }
            (Step::Header, Message::HeaderResponse(header)) => {
                let reason = format!(
                    "the standby's memory is laid out otherwise ({} pages in {} regions, block size {}, epoch {}) than \
                     the guest's ({} pages in {} regions); start it anew with the same release",
                    header.layout.pages(),
                    header.layout.regions().len(),
                    header.policy.block_size,
                    header.epoch,
                    self.layout.pages(),
                    self.layout.regions().len()
                );
                self.standby_lost(reason, actions);
            }
            (Step::Read, Message::AllocateReadResponse) => {
                self.phase = Phase::Seeding;
                let (guid, term, pages) = (self.guid, self.term, self.layout.pages());
                actions.push(Action::Report(Report::Joined { guid, term, pages }));
                actions.push(Action::StartTracking);
            }
            (_, message) => self.distrust(message.name(), actions),
        }
    }

    fn begin_round(&mut self, pages: u64, actions: &mut Vec<Action>) {
        if self.phase != Phase::Seeding {
            return;
        }
        self.round += 1;
        self.round_open = true;
        self.remaining = pages;
        self.round_started = self.now;
        actions.push(Action::Report(Report::RoundStarted { round: self.round, pages }));
        actions.push(Action::SendRound { round: self.round });
    }

    fn harvested(&mut self, remaining: u64, actions: &mut Vec<Action>) {
        if self.phase != Phase::Seeding {
            return;
        }
        let (pages, bytes) = self.round_sent;
        let micros = self.round_took.as_micros() as u64;
        let round = self.round;
        actions.push(Action::Report(Report::RoundDone { round, pages, bytes, micros, dirtied: remaining }));
        let outcome = Round { pages, took: self.round_took, remaining };
        if judge(self.round, outcome, self.remaining, self.settings.pacing.pause_budget).is_final() {
            actions.push(Action::Hold);
            self.take_epoch(actions);
        } else {
            self.begin_round(remaining, actions);
        }
    }

    fn take_epoch(&mut self, actions: &mut Vec<Action>) {
        self.flow = Flow::Pausing;
        self.last = self.ended.is_some();
        if self.switching && !self.last {
            self.standing = Some(self.now);
            actions.push(Action::StandStill);
        }
        actions.push(Action::TakeEpoch { epoch: self.epoch.next() });
    }

    fn staged(&mut self, output_end: u64, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Seeding | Phase::Lockstep) {
            return;
        }
        // An epoch larger than staging was sent in part meanwhile: as for a round.
        self.heard = self.now;
        self.flow = Flow::Committing { since: self.now };
        self.output_end = output_end;
        self.exposed = true;
        actions.push(Action::SendEpoch { epoch: self.epoch.next() });
    }

    fn committed(&mut self, epoch: Epoch, actions: &mut Vec<Action>) {
        let Flow::Committing { since } = self.flow else {
            self.distrust("CommitAck", actions);
            return;
        };
        if epoch != self.epoch.next() {
            self.distrust("CommitAck", actions);
            return;
        }
        self.epoch = epoch;
        actions.push(Action::Release { epoch, output_end: self.output_end });
        if self.phase == Phase::Seeding {
            self.phase = Phase::Lockstep;
            actions.push(Action::Report(Report::Protected { epoch }));
        }
        self.flow = Flow::Running { since };
        if self.standing.is_some() {
            self.flow = Flow::Draining;
            actions.push(Action::Drain);
            return;
        }
        if let (true, Some(reason)) = (self.last, self.ended.clone()) {
            self.send(Message::ReleaseMemory { reason }, actions);
            actions.push(Action::PassOutput);
            actions.push(Action::Close);
            self.phase = Phase::Ended;
        } else if self.detaching {
            self.release_standby(actions);
        }
    }

    fn tick(&mut self, waits: bool, released: u64, dirty: Option<u64>, actions: &mut Vec<Action>) {
        let Settings { heartbeat, misses, .. } = self.settings;
        let Pacing { interval, min_interval, dirty_budget, .. } = self.settings.pacing;
        match self.phase {
            Phase::Joining | Phase::Seeding | Phase::Lockstep | Phase::HandingOver | Phase::Releasing => {}
            Phase::Deciding => {
                if self.now.saturating_sub(self.asked) >= heartbeat {
                    self.ask_witness(actions);
                }
                return;
            }
            _ => return,
        }
        let silence = self.now.saturating_sub(self.heard);
        // Before the allocation is agreed the standby sends no heartbeats, and it may have us wait for space.
        let patience = match self.phase {
            Phase::Joining if self.queued => Duration::MAX,
            Phase::Joining => JOIN_PATIENCE,
            _ => heartbeat * misses,
        };
        if silence > patience {
            self.standby_lost(
                format!("nothing heard of the standby for {} ms", silence.as_millis()),
                actions,
            );
            return;
        }
        if self.phase != Phase::Joining && self.now.saturating_sub(self.spoke) >= heartbeat {
            self.send(Message::Heartbeat { released }, actions);
        }
        if self.phase == Phase::Lockstep && self.now.saturating_sub(self.sensed) >= SENSE_INTERVAL {
            self.sensed = self.now;
            self.send(Message::SenseRequest, actions);
        }
        if let (Phase::Lockstep, Flow::Running { since }) = (self.phase, self.flow) {
            let age = self.now.saturating_sub(since);
            let urgent = waits || dirty.is_some_and(|pages| pages >= dirty_budget);
            if age >= interval || (urgent && age >= min_interval) || self.ended.is_some() {
                self.take_epoch(actions);
            }
        }
    }

    /// The standby itself says that it runs the guest now, by the witness' grant or by an operator's word: then there
    /// is nothing left to ask, least of all where there is no witness.
    fn replaced(&mut self, term: Term, actions: &mut Vec<Action>) {
        if matches!(self.phase, Phase::Solo | Phase::Frozen | Phase::Ended) {
            return;
        }
        actions.push(Action::Close);
        self.freeze(&format!("the standby runs the guest in term {term}"), actions);
    }

    fn freeze(&mut self, reason: &str, actions: &mut Vec<Action>) {
        self.phase = Phase::Frozen;
        actions.push(Action::Freeze);
        if std::mem::take(&mut self.switching) {
            let reason = "the standby was lost before it answered".into();
            actions.push(Action::Report(Report::SwitchoverFailed { reason }));
        }
        let reason = format!("{reason}; this side was live in term {}", self.term);
        actions.push(Action::Report(Report::Frozen { reason }));
    }

    /// There is a newer term than this side's: somebody else may be live, and only the witness can tell. That holds
    /// even while the standby has nothing of this primary.
    fn superseded(&mut self, reason: String, actions: &mut Vec<Action>) {
        if !self.exposed && matches!(self.phase, Phase::Idle | Phase::Joining | Phase::Seeding) {
            actions.push(Action::Hold);
            self.exposed = true;
        }
        self.standby_lost(reason, actions);
    }

    /// The standby is lost, or is no longer to be trusted.
    fn standby_lost(&mut self, reason: String, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle
            | Phase::Joining
            | Phase::Seeding
            | Phase::Lockstep
            | Phase::HandingOver
            | Phase::Releasing => {}
            Phase::Deciding | Phase::Solo | Phase::HandedOver | Phase::Frozen | Phase::Ended => return,
        }
        actions.push(Action::Close);
        if self.phase == Phase::HandingOver && !self.settings.has_witness {
            let reason = format!(
                "{reason}, after the guest was given to it, and there is no witness to ask whether it runs there; look, and \
                 start it where it does not"
            );
            self.freeze(&reason, actions);
            return;
        }
        if matches!(self.flow, Flow::Committing { .. } | Flow::Pausing) {
            actions.push(Action::PutBack);
        }
        if !self.exposed {
            // The standby cannot hold a complete epoch: it cannot be live.
            self.phase = Phase::Solo;
            actions.push(Action::Report(Report::Unprotected { reason }));
            actions.push(Action::PassOutput);
            actions.push(Action::StopTracking);
            return;
        }
        self.decide(reason, actions);
    }

    fn decide(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.phase = Phase::Deciding;
        let silent_us = self.now.saturating_sub(self.heard).as_micros() as u64;
        actions.push(Action::Report(Report::StandbyLost { reason, silent_us }));
        self.ask_witness(actions);
    }

    fn ask_witness(&mut self, actions: &mut Vec<Action>) {
        self.asked = self.now;
        actions.push(Action::Claim { expected: self.term });
    }

    fn claimed(&mut self, claim: Claim, actions: &mut Vec<Action>) {
        if self.phase != Phase::Deciding {
            return;
        }
        match claim {
            Claim::Granted(term) => {
                self.term = term;
                self.phase = if self.ended.is_some() { Phase::Ended } else { Phase::Solo };
                actions.push(Action::Report(Report::Solo { term }));
                actions.push(Action::PassOutput);
                actions.push(Action::StopTracking);
                self.stand_no_longer("the standby was lost".into(), actions);
            }
            // Only a witness that has lost its record knows an older term; nobody has won by that.
            Claim::Refused { term, .. } if term < self.term => {
                let reason =
                    format!("it knows term {term}, this side has term {}; restore its record", self.term);
                actions.push(Action::Report(Report::WitnessSilent { reason }));
            }
            Claim::Refused { term, owner } => {
                self.freeze(&format!("{owner} runs the guest in term {term}"), actions);
            }
            // Not live by anyone's word: what is held stays held, and the question is asked again.
            Claim::Unreachable(reason) => actions.push(Action::Report(Report::WitnessSilent { reason })),
        }
    }

    fn guest_ended(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.ended = Some(reason.clone());
        match self.phase {
            Phase::Idle | Phase::Joining | Phase::Seeding if !self.exposed => {
                if self.phase != Phase::Idle {
                    self.send(Message::ReleaseMemory { reason }, actions);
                    actions.push(Action::Close);
                }
                self.phase = Phase::Ended;
                actions.push(Action::PassOutput);
            }
            Phase::Solo => self.phase = Phase::Ended,
            // One more epoch carries the last output; the next tick takes it.
            _ => {}
        }
    }

    fn distrust(&mut self, what: &str, actions: &mut Vec<Action>) {
        let reason = format!(
            "the standby sent {what} while the primary is {}: a protocol violation",
            self.phase.name()
        );
        self.standby_lost(reason, actions);
    }

    fn send(&mut self, message: Message, actions: &mut Vec<Action>) {
        self.spoke = self.now;
        actions.push(Action::Send { epoch: self.epoch, message });
    }
}
