//! The primary's state machine: events in, actions out; no clock, no socket, no thread.
//!
//! ```text
//! idle -> joining -> seeding(round) -> lockstep(epoch) -> [last standby lost] -> deciding -> solo | suspended | frozen
//! ```
//! It may have several standbys, each with a session of its own, which joins, is seeded, and follows from its first epoch
//! on; epochs are common to all that follow.
//!
//! The one rule behind everything: output of an epoch is released when every standby that may be the live side next has
//! acknowledged the epoch, and those that have not are shut out by the witness' word. Never before. While this side has
//! neither standby nor witness the guest stands still: what it did would be seen by nobody, and might have to be thrown
//! away.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::{Epoch, Guid, LinkId, Term};
use crate::memory::Layout;
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Message, Refusal};

pub mod convergence;
mod deciding;
mod epochs;
mod events;
mod pace;
mod parting;
mod session;
mod settings;

use epochs::Flow;
pub use events::{Action, Event, Phase};
use pace::Pace;
pub use session::{Session, Standing};
pub use settings::{Alone, Pacing, Settings};

/// Where the guest as a whole stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is mirrored, as far as its standbys are.
    Mirroring,
    /// The guest stands still and is this standby's; its answer is awaited.
    HandingOver(LinkId),
    /// The last standby is lost, the witness is asked.
    Deciding,
    Solo,
    Suspended,
    HandedOver,
    Frozen,
    Ended,
}

/// The state machine.
#[derive(Debug)]
pub struct Primary {
    settings: Settings,
    guid: Guid,
    term: Term,
    layout: Layout,
    machine: Vec<u8>,
    stage: Stage,
    now: Duration,
    sessions: BTreeMap<LinkId, Session>,
    /// The last epoch that is committed.
    epoch: Epoch,
    flow: Flow,
    pace: Pace,
    /// The epoch that is being taken or committed is the guest's last.
    last: bool,
    /// Position after the output of the epoch that was staged last.
    output_end: u64,
    /// Output is held.
    holding: bool,
    /// The newest term that a standby knows which was lost and may be live next: this side goes on in one after that.
    shut_out: Term,
    /// One that may be live next was lost, and those who follow are to go on in the next term.
    renewing: bool,
    /// The guest's end, told to the standbys once everything before it is committed.
    ended: Option<String>,
    /// Since when the guest stands still for a standby to run it, if so.
    standing: Option<Duration>,
    /// The guest stands still because nobody knows whose it is, or until it is protected.
    suspended: bool,
    /// This standby is to run the guest.
    switching: Option<LinkId>,
    /// The standbys are wanted no longer.
    detaching: bool,
    /// When the witness was last asked.
    asked: Duration,
}

impl Primary {
    /// A primary of the guest `guid` in `term`, which it owns by the witness' word.
    pub fn new(settings: Settings, guid: Guid, term: Term, layout: Layout, machine: Vec<u8>) -> Self {
        let zero = Duration::ZERO;
        Self {
            suspended: settings.suspended,
            settings,
            guid,
            term,
            layout,
            machine,
            stage: Stage::Mirroring,
            now: zero,
            sessions: BTreeMap::new(),
            epoch: Epoch::NONE,
            flow: Flow::Running { since: zero },
            pace: Pace::default(),
            last: false,
            output_end: 0,
            holding: false,
            shut_out: Term(0),
            renewing: false,
            ended: None,
            standing: None,
            switching: None,
            detaching: false,
            asked: zero,
        }
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        match self.stage {
            Stage::HandingOver(_) => Phase::HandingOver,
            Stage::Deciding => Phase::Deciding,
            Stage::Solo => Phase::Solo,
            Stage::Suspended => Phase::Suspended,
            Stage::HandedOver => Phase::HandedOver,
            Stage::Frozen => Phase::Frozen,
            Stage::Ended => Phase::Ended,
            Stage::Mirroring => {
                let furthest = self.sessions.values().map(|session| match session.standing {
                    Standing::Joining => Phase::Joining,
                    Standing::Seeding | Standing::Ready => Phase::Seeding,
                    Standing::Releasing => Phase::Releasing,
                    Standing::Following => Phase::Lockstep,
                });
                furthest.max_by_key(|phase| phase.rank()).unwrap_or(Phase::Idle)
            }
        }
    }

    /// Its term.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The guest.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// The last epoch that is committed.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What it has with each of its standbys.
    pub fn sessions(&self) -> &BTreeMap<LinkId, Session> {
        &self.sessions
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether it is not known yet who goes on.
    pub fn is_deciding(&self) -> bool {
        self.stage == Stage::Deciding || self.renewing
    }

    /// Whether the current epoch may end now; then the shell's ticks decide when.
    pub fn is_running_epoch(&self) -> bool {
        self.phase() == Phase::Lockstep && matches!(self.flow, Flow::Running { .. })
    }

    /// In which time from `now` on the current epoch ends, if nothing happens; `None` if it cannot end now.
    pub fn epoch_ends_in(&self, now: Duration) -> Option<Duration> {
        match self.flow {
            Flow::Running { since } if self.phase() == Phase::Lockstep && !self.renewing => {
                Some(self.pace.left(&self.settings.pacing, now.saturating_sub(since)))
            }
            _ => None,
        }
    }

    /// Takes an event at time `now`, counted from any fixed moment; what is to be done is appended to `actions`.
    pub fn handle(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        self.now = now;
        match event {
            Event::Connected { link } => self.join(link, actions),
            Event::Received { link, header, message } => self.received(link, &header, message, actions),
            Event::LinkLost { link, reason } => self.lose(link, reason, actions),
            Event::Tick { produced, released, waits, dirty } => {
                let waits = waits || produced > self.output_end;
                self.tick(waits, released, dirty, actions);
            }
            Event::Tracking { link, pages } => self.begin_round(link, pages, actions),
            Event::RoundSent { link, pages, bytes } => self.round_sent(link, pages, bytes, actions),
            Event::Harvested { link, pages, disks_lag } => self.harvested(link, pages, disks_lag, actions),
            Event::Staged { output_end } => self.staged(output_end, actions),
            Event::EpochSent { link } => self.epoch_sent(link),
            Event::Claimed(claim) => self.claimed(claim, actions),
            Event::Switchover { to } => self.switch_over(to, actions),
            Event::Detach => self.detach(actions),
            Event::Retune(pacing) => {
                self.settings.pacing = pacing;
                // Before the first epoch that takes longer.
                for link in self.sessions.keys().copied().collect::<Vec<_>>() {
                    if self.sessions.get(&link).is_some_and(|session| session.standing != Standing::Joining) {
                        self.beat(link, 0, actions);
                    }
                }
            }
            Event::Drained(released) => self.drained(released, actions),
            Event::GuestEnded { reason } => self.guest_ended(&reason, actions),
            Event::Failed { reason } => {
                actions.push(Action::Report(Report::Failed { reason: reason.clone() }));
                self.lose_all(reason, actions);
            }
        }
    }

    fn received(&mut self, link: LinkId, header: &Header, message: Message, actions: &mut Vec<Action>) {
        if header.guid == self.guid && header.term > self.term && message == Message::AllocateWrite {
            match self.stage {
                Stage::HandingOver(to) if to == link => self.handed_over(header.term, actions),
                _ => self.replaced(header.term, actions),
            }
            return;
        }
        let stage = self.stage;
        let Some(session) = self.sessions.get_mut(&link) else { return };
        session.heard = self.now;
        if header.guid != self.guid {
            self.distrust(link, "a message about another guest", actions);
            return;
        }
        if header.term > self.term {
            let reason = format!("the other side is in term {}, this one in {}", header.term, self.term);
            self.superseded(link, reason, actions);
            return;
        }
        match (session.standing, message) {
            (Standing::Releasing, Message::MemoryReleased) => self.released(link, actions),
            (_, Message::Heartbeat { .. } | Message::MemoryReleased) => {}
            (_, Message::SenseResponse(sense)) => session.sense = sense,
            (_, Message::Refused(Refusal::StaleTerm { newest })) if newest > self.term => {
                self.superseded(link, format!("the standby knows term {newest}"), actions);
            }
            // It says so itself: it does not run the guest.
            (_, Message::Refused(refusal)) if stage == Stage::HandingOver(link) => {
                if let Some(session) = self.leave(link, actions) {
                    self.take_back(&session, refusal.to_string(), actions);
                }
            }
            (_, Message::Refused(refusal)) => self.lose(link, refusal.to_string(), actions),
            (_, Message::Renewed { term }) => self.renewed(link, term, actions),
            (Standing::Joining, message) => self.joining(link, message, actions),
            (Standing::Seeding, Message::RoundAck { round }) => self.round_received(link, round, actions),
            (Standing::Ready | Standing::Following, Message::CommitAck) => {
                self.acknowledged(link, header.epoch, actions);
            }
            (_, message) => self.distrust(link, message.name(), actions),
        }
    }

    /// Whether the guest is mirrored, or about to be.
    fn mirrors(&self) -> bool {
        self.stage == Stage::Mirroring
    }

    /// Whether a standby holds an epoch.
    fn follows(&self) -> bool {
        self.following() > 0
    }

    /// How many standbys hold an epoch.
    fn following(&self) -> u32 {
        self.sessions.values().filter(|session| session.standing == Standing::Following).count() as u32
    }

    fn close_all(&mut self, actions: &mut Vec<Action>) {
        actions.extend(std::mem::take(&mut self.sessions).into_keys().map(Action::Close));
    }

    fn beat(&mut self, link: LinkId, released: u64, actions: &mut Vec<Action>) {
        let epoch_within_ms = self.settings.epoch_within().as_millis() as u32;
        self.send(link, Message::Heartbeat { released, epoch_within_ms }, actions);
    }

    fn distrust(&mut self, link: LinkId, what: &str, actions: &mut Vec<Action>) {
        let reason = format!(
            "the standby sent {what} while the primary is {}: a protocol violation",
            self.phase().name()
        );
        self.lose(link, reason, actions);
    }

    fn send(&mut self, link: LinkId, message: Message, actions: &mut Vec<Action>) {
        if let Some(session) = self.sessions.get_mut(&link) {
            session.spoke = self.now;
            actions.push(Action::Send { link, epoch: self.epoch, message });
        }
    }
}
