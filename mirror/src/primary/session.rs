//! What a primary has with one standby: the agreement, then seeding rounds while the guest runs.

use std::time::Duration;

use crate::ids::{Epoch, LinkId, Term};
use crate::memory::PAGE_SIZE;
use crate::report::Report;
use crate::wire::message::{Message, Policy, Sense, Space};

use super::convergence::{Round, judge};
use super::{Action, Primary};

/// How far a standby is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Agreeing on an allocation.
    Joining,
    /// It is sent memory while the guest runs.
    Seeding,
    /// It has been sent enough: the next epoch is its first.
    Ready,
    /// It holds an epoch, and follows.
    Following,
    /// It is to forget the guest; its answer is awaited.
    Releasing,
}

impl Standing {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Seeding => "seeding",
            Self::Ready => "ready",
            Self::Following => "following",
            Self::Releasing => "releasing",
        }
    }
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

/// What a primary has with one standby.
#[derive(Debug)]
pub struct Session {
    pub(super) standing: Standing,
    pub(super) heard: Duration,
    pub(super) spoke: Duration,
    pub(super) sensed: Duration,
    step: Step,
    /// The standby has us wait for space.
    pub(super) queued: bool,
    /// It has named a second link.
    second_link: bool,
    round: u32,
    /// The answer to the round is awaited.
    round_open: bool,
    round_started: Duration,
    /// Pages and bytes of the round, once all of it has been sent: that may be told after the standby has answered.
    round_sent: Option<(u64, u64)>,
    round_took: Duration,
    /// Pages that the round before left.
    remaining: u64,
    /// It takes part in the epoch that is being taken or committed.
    pub(super) takes_part: bool,
    /// When the epoch that is being committed had been sent to it.
    pub(super) sent: Option<Duration>,
    /// The last epoch that it has acknowledged.
    pub(super) acknowledged: Epoch,
    /// A commit has been sent: from then on it may hold a complete epoch and may be live without us.
    pub(super) exposed: bool,
    /// The newest term that it has been told of beforehand.
    pub(super) told: Term,
    /// The newest one of which it has said that it knows.
    pub(super) knows: Term,
    pub(super) sense: Sense,
}

impl Session {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            standing: Standing::Joining,
            heard: now,
            spoke: now,
            sensed: Duration::ZERO,
            step: Step::Space,
            queued: false,
            second_link: false,
            round: 0,
            round_open: false,
            round_started: Duration::ZERO,
            round_sent: None,
            round_took: Duration::ZERO,
            remaining: 0,
            takes_part: false,
            sent: None,
            acknowledged: Epoch::NONE,
            exposed: false,
            told: Term(0),
            knows: Term(0),
            sense: Sense::default(),
        }
    }

    /// How far it is.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Its seeding round, counted from 1.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// The last epoch that it has acknowledged.
    pub fn acknowledged(&self) -> Epoch {
        self.acknowledged
    }

    /// What it last said of itself.
    pub fn sense(&self) -> &Sense {
        &self.sense
    }
}

impl Primary {
    pub(super) fn join(&mut self, link: LinkId, actions: &mut Vec<Action>) {
        if !self.mirrors() || self.detaching || self.switching.is_some() || self.ended.is_some() {
            actions.push(Action::Close(link));
            return;
        }
        self.sessions.insert(link, Session::new(self.now));
        let message =
            Message::SpaceRequest { bytes: self.layout.bytes(), wait: self.settings.wait_for_space };
        self.send(link, message, actions);
    }

    /// The steps of the agreement, each answered before the next.
    pub(super) fn joining(&mut self, link: LinkId, message: Message, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        match (session.step, message) {
            (Step::Space, Message::SpaceResponse(Space::Granted)) => {
                session.queued = false;
                session.step = Step::Allocation;
                let message = Message::Allocate {
                    layout: self.layout.clone(),
                    policy: Policy { block_size: PAGE_SIZE as u32 },
                    machine: self.machine.clone(),
                    heartbeat_ms: self.settings.heartbeat.as_millis() as u32,
                    misses: self.settings.misses,
                };
                self.send(link, message, actions);
            }
            (Step::Space, Message::SpaceResponse(Space::Queued { .. })) => session.queued = true,
            (Step::Space, Message::SpaceResponse(Space::Denied { available, reason })) => {
                let reason = format!(
                    "the standby has no space for {} bytes of guest memory ({available} available): {reason}",
                    self.layout.bytes()
                );
                self.lose(link, reason, actions);
            }
            (Step::Allocation, Message::Disks(disks)) => actions.push(Action::Agree { link, disks }),
            (Step::Allocation, Message::SecondLink { address }) if !session.second_link => {
                session.second_link = true;
                actions.push(Action::BeatAt { link, address });
            }
            (Step::Allocation, Message::Allocated) => {
                session.step = Step::Lock;
                self.send(link, Message::LockRequest, actions);
            }
            (Step::Lock, Message::LockResponse { term, .. }) if term == self.term => {
                session.step = Step::Header;
                self.send(link, Message::HeaderRequest, actions);
            }
            (Step::Lock, Message::LockResponse { term, owner, .. }) => {
                let reason = format!("the standby says that {owner} owns the guest in term {term}");
                if term > self.term {
                    self.superseded(link, reason, actions);
                } else {
                    self.lose(link, reason, actions);
                }
            }
            (Step::Header, Message::HeaderResponse(header))
                if header.layout == self.layout
                    && header.policy.block_size as usize == PAGE_SIZE
                    && header.epoch == Epoch::NONE =>
            {
                session.step = Step::Read;
                self.send(link, Message::AllocateRead, actions);
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
                self.lose(link, reason, actions);
            }
            (Step::Read, Message::Digests { first, digests }) => {
                actions.push(Action::Note { link, first, digests });
            }
            (Step::Read, Message::AllocateReadResponse) => {
                session.standing = Standing::Seeding;
                let (guid, term, pages) = (self.guid, self.term, self.layout.pages());
                actions.push(Action::Report(Report::Joined { guid, term, pages }));
                // It is to know early how long an epoch may take.
                self.beat(link, 0, actions);
                actions.push(Action::StartTracking { link });
            }
            (_, message) => self.distrust(link, message.name(), actions),
        }
    }

    pub(super) fn begin_round(&mut self, link: LinkId, pages: u64, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        if session.standing != Standing::Seeding {
            return;
        }
        session.round += 1;
        session.round_open = true;
        session.round_sent = None;
        session.remaining = pages;
        session.round_started = self.now;
        let round = session.round;
        actions.push(Action::Report(Report::RoundStarted { round, pages }));
        actions.push(Action::SendRound { link, round });
    }

    pub(super) fn round_sent(&mut self, link: LinkId, pages: u64, bytes: u64, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        session.round_sent = Some((pages, bytes));
        // Who takes data lives; its heartbeats may be late behind so much of it.
        session.heard = self.now;
        if !session.round_open {
            actions.push(Action::Harvest { link });
        }
    }

    pub(super) fn round_received(&mut self, link: LinkId, round: u32, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        if !session.round_open || round != session.round {
            self.distrust(link, "RoundAck", actions);
            return;
        }
        session.round_open = false;
        session.round_took = self.now.saturating_sub(session.round_started);
        if session.round_sent.is_some() {
            actions.push(Action::Harvest { link });
        }
    }

    pub(super) fn harvested(
        &mut self,
        link: LinkId,
        remaining: u64,
        disks_lag: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        if session.standing != Standing::Seeding {
            return;
        }
        let (pages, bytes) = session.round_sent.unwrap_or_default();
        let (round, took) = (session.round, session.round_took);
        let micros = took.as_micros() as u64;
        actions.push(Action::Report(Report::RoundDone { round, pages, bytes, micros, dirtied: remaining }));
        let outcome = Round { pages, took, remaining };
        let verdict = judge(round, outcome, session.remaining, self.settings.pacing.pause_budget);
        if verdict.is_final() && !disks_lag {
            session.standing = Standing::Ready;
            self.welcome(actions);
        } else {
            self.begin_round(link, remaining, actions);
        }
    }
}
