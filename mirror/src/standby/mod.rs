//! The standby's state machine: events in, actions out; no clock, no socket, no thread.
//!
//! ```text
//! waiting -> reserved -> allocating -> allocated -> receiving -> shadowing(epoch) -> claiming -> active
//!                                                                       |                  \-> fenced
//!                                                                       \-> orphaned (no witness) -> active
//! ```
//! An active side whose guest goes away (to another side, mostly) waits again.
//!
//! A standby that has no complete epoch never runs a guest: it forgets the allocation and waits for the next.

use std::collections::VecDeque;
use std::time::Duration;

use crate::digest::Digest;
use crate::ids::{Epoch, Guid, Term};
use crate::memory::{Layout, PAGE_SIZE};
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Access, AllocationHeader, Body, Commit, Message, Policy, Refusal, Sense, Space};
use crate::wire::pages::{PageBatch, PooledBuffer};
use crate::witness::{Claim, Record};

mod detection;
mod events;
pub mod inbox;
mod keeping;

pub use crate::ids::LinkId;
pub use events::{Action, Event, Phase, WitnessView};
use inbox::{Inbox, OutputLog, WholeEpoch, add_to_log};
use keeping::Keeping;

/// Longest description of a machine that is accepted, in bytes.
const MAX_MACHINE: usize = 1 << 20;

/// Bounds of the heartbeat interval that a primary may ask for, in milliseconds.
const HEARTBEAT_MS: std::ops::RangeInclusive<u32> = 1..=60_000;

/// How long space stays promised to a link that does not allocate.
const RESERVATION: Duration = Duration::from_secs(5);

/// A standby's sign of life: it has no output and no epochs.
pub const HEARTBEAT: Message = Message::Heartbeat { released: 0, epoch_within_ms: 0 };

/// Most links that may wait for space.
const MAX_QUEUE: usize = 64;

/// A guest's mirrored memory and what is known of its primary.
#[derive(Debug)]
struct Allocation {
    guid: Guid,
    term: Term,
    layout: Layout,
    policy: Policy,
    heartbeat: Duration,
    misses: u32,
    witness: bool,
    /// The primary's name at the witness.
    owner: String,
    /// The term that the primary has said it would ask for, with this side as one that follows in it.
    announced: Option<Term>,
    round: u32,
    round_pages: u64,
    round_digest: Digest,
    round_log: Vec<u8>,
    keeping: Option<Keeping>,
    epoch: Epoch,
    /// The epoch that arrives first.
    first: Option<Epoch>,
    inbox: Inbox,
    state: Vec<u8>,
    output: OutputLog,
    sense: Sense,
    heard: Duration,
    /// When it was last heard on another link than the mirror's.
    heard_elsewhere: Option<Duration>,
    /// Why it would count as lost if it were not heard elsewhere.
    doubt: Option<String>,
    /// When an epoch last made progress.
    progressed: Duration,
    /// The primary's word for how long one may make none.
    epoch_within: Option<Duration>,
    spoke: Duration,
    /// The primary has given the guest up.
    handed_over: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Standby {
    name: String,
    space: u64,
    /// Time of the last event.
    now: Duration,
    phase: Phase,
    /// When space was last promised.
    reserved: Duration,
    /// The link that space is promised to, or whose guest is mirrored.
    owner: Option<LinkId>,
    /// Links that wait for space, with what they asked for.
    queue: VecDeque<(LinkId, Guid, u64)>,
    allocation: Option<Allocation>,
    /// Write logs that were to be made durable so far.
    logs: u64,
    /// Where a primary can be heard besides the mirror's link.
    second_link: Option<String>,
}

impl Standby {
    /// A standby called `name` (what the witness will know it by) with `space` bytes for guest memory.
    pub fn new(name: impl Into<String>, space: u64) -> Self {
        Self {
            name: name.into(),
            space,
            now: Duration::ZERO,
            phase: Phase::Waiting,
            reserved: Duration::ZERO,
            owner: None,
            queue: VecDeque::new(),
            allocation: None,
            logs: 0,
            second_link: None,
        }
    }

    /// Asks each primary to be heard at `address`, too: while it is, the mirror's link alone does not make it count as lost.
    #[must_use]
    pub fn with_second_link(mut self, address: Option<String>) -> Self {
        self.second_link = address;
        self
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The newest term that it knows.
    pub fn term(&self) -> Term {
        self.allocation.as_ref().map_or(Term(0), |allocation| allocation.term)
    }

    /// The term that its primary has said it would ask for, with this side as one that follows in it.
    pub fn announced(&self) -> Option<Term> {
        self.allocation.as_ref()?.announced
    }

    /// The last complete epoch.
    pub fn epoch(&self) -> Epoch {
        self.allocation.as_ref().map_or(Epoch::NONE, |allocation| allocation.epoch)
    }

    /// The name it claims terms by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest it holds an allocation of.
    pub fn guid(&self) -> Option<Guid> {
        self.allocation.as_ref().map(|allocation| allocation.guid)
    }

    /// Whether a silent `link` may stay: it is the primary's, or it waits for space.
    pub fn expects(&self, link: LinkId) -> bool {
        self.owner == Some(link) || self.queue.iter().any(|(waiting, ..)| *waiting == link)
    }

    /// The primary's link, with GUID, term and epoch for a header.
    pub fn primary(&self) -> Option<(LinkId, (Guid, Term, Epoch))> {
        let allocation = self.allocation.as_ref()?;
        Some((self.owner?, (allocation.guid, allocation.term, allocation.epoch)))
    }

    /// Health and counters.
    pub fn sense(&self) -> Sense {
        self.allocation.as_ref().map(|allocation| allocation.sense.clone()).unwrap_or_default()
    }

    /// When [`Event::Tick`] is due at the latest after the last event: half a heartbeat.
    pub fn tick_interval(&self) -> Duration {
        self.allocation.as_ref().map_or(Duration::from_millis(25), |allocation| allocation.heartbeat / 2)
    }

    /// Takes an event at time `now`, counted from any fixed moment; what is to be done is appended to `actions`.
    pub fn handle(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        self.now = now;
        match event {
            Event::Received { link, header, body } => self.received(link, &header, body, actions),
            Event::LinkLost { link, reason } => self.link_lost(link, reason, actions),
            Event::Tick => self.tick(actions),
            Event::Allocated { machine, witness } => self.allocated(machine, &witness, actions),
            Event::Applied => self.applied(),
            Event::LogKept { number, outcome } => self.log_kept(number, outcome, actions),
            Event::Prepared(outcome) => self.prepared(outcome, actions),
            Event::Claimed(claim) => self.claimed(claim, actions),
            Event::Activated(outcome) => self.activated(outcome, actions),
            Event::Promote if self.phase == Phase::Orphaned => self.activate(self.term().next(), actions),
            Event::Occupied if self.phase == Phase::Waiting => self.phase = Phase::Active,
            Event::Occupied => {}
            Event::Vacated { space } => self.vacated(space, actions),
            Event::Promote => actions.push(Action::Report(Report::Failed {
                reason: format!(
                    "promotion is only possible when the primary is lost; the standby is {}",
                    self.phase.name()
                ),
            })),
        }
    }

    fn received(&mut self, link: LinkId, header: &Header, body: Body, actions: &mut Vec<Action>) {
        let outcome = if self.owner == Some(link) {
            self.handle_owner(link, header, body, actions)
        } else {
            self.handle_other(link, header, body, actions)
        };
        if let Err(refusal) = outcome {
            // A stale sender may live on and ask its witness; anything else wrong means that nothing more of this
            // link can be trusted.
            let stale = matches!(refusal, Refusal::StaleTerm { .. });
            let stamp = (header.guid, self.term(), self.epoch());
            actions.push(Action::Send { link, stamp, message: Message::Refused(refusal.clone()) });
            if !stale {
                actions.push(Action::Close(link));
                self.link_lost(link, refusal.to_string(), actions);
            }
        }
    }

    /// A link that is not mirrored may ask, and may wait for space.
    fn handle_other(
        &mut self,
        link: LinkId,
        header: &Header,
        body: Body,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        if let Body::Message(Message::Heartbeat { .. }) = body {
            self.heard_elsewhere(header);
            return Ok(());
        }
        if let Some(allocation) = self.allocation.as_mut().filter(|ours| ours.guid == header.guid)
            && self.phase == Phase::Active
            && header.term < allocation.term
        {
            allocation.sense.stale_frames += 1;
            return Err(Refusal::StaleTerm { newest: allocation.term });
        }
        let Body::Message(message) = body else { return Err(self.wrong_phase("WritePages")) };
        match message {
            Message::SpaceRequest { bytes, wait } => {
                let answer = self.space_for(link, header.guid, bytes, wait);
                self.answer(link, header, Message::SpaceResponse(answer), actions);
                Ok(())
            }
            message => self.inquiry(link, header, &message, actions),
        }
    }

    /// Decides on a space request.
    fn space_for(&mut self, link: LinkId, guid: Guid, bytes: u64, wait: bool) -> Space {
        if bytes > self.space {
            let reason = "this standby has less memory than the guest".into();
            return Space::Denied { available: self.space, reason };
        }
        if self.owner.is_none() && self.phase == Phase::Waiting {
            self.owner = Some(link);
            self.phase = Phase::Reserved;
            self.reserved = self.now;
            return Space::Granted;
        }
        if let Some(place) = self.queue.iter().position(|(waiting, ..)| *waiting == link) {
            return Space::Queued { before: place as u32 };
        }
        if !wait || self.queue.len() >= MAX_QUEUE {
            let reason = format!("this standby serves another guest and is {}", self.phase.name());
            return Space::Denied { available: 0, reason };
        }
        self.queue.push_back((link, guid, bytes));
        Space::Queued { before: self.queue.len() as u32 - 1 }
    }

    /// Requests that change nothing: anybody may send them.
    fn inquiry(
        &mut self,
        link: LinkId,
        header: &Header,
        message: &Message,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let allocation = self.allocation.as_ref().filter(|allocation| allocation.guid == header.guid);
        let unknown = Refusal::UnknownAllocation(header.guid);
        let reply = match message {
            Message::LockRequest => {
                let allocation = allocation.ok_or(unknown)?;
                let access = match self.phase {
                    Phase::Active => Access::Write,
                    Phase::Receiving | Phase::Shadowing | Phase::Claiming | Phase::Orphaned => Access::Read,
                    _ => Access::None,
                };
                let owner = if access == Access::Write { self.name.clone() } else { "primary".into() };
                Message::LockResponse { term: allocation.term, owner, access }
            }
            Message::HeaderRequest => {
                let Allocation { guid, layout, epoch, policy, .. } = allocation.ok_or(unknown)?;
                let header =
                    AllocationHeader { layout: layout.clone(), guid: *guid, epoch: *epoch, policy: *policy };
                Message::HeaderResponse(header)
            }
            Message::SenseRequest => Message::SenseResponse(self.sense()),
            other => return Err(self.wrong_phase(other.name())),
        };
        self.answer(link, header, reply, actions);
        Ok(())
    }

    /// The link whose guest is mirrored here.
    fn handle_owner(
        &mut self,
        link: LinkId,
        header: &Header,
        body: Body,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        if self.phase == Phase::Reserved {
            return self.before_allocation(link, header, body, actions);
        }
        let wrong = self.wrong_phase(match &body {
            Body::Message(message) => message.name(),
            Body::Pages(_) => "WritePages",
        });
        let Some(allocation) = &mut self.allocation else { return Err(wrong) };
        if header.guid != allocation.guid {
            return Err(Refusal::UnknownAllocation(header.guid));
        }
        // It was granted what it had announced.
        if allocation.announced == Some(header.term)
            && !matches!(self.phase, Phase::Claiming | Phase::Orphaned)
        {
            allocation.term = header.term;
            allocation.announced = None;
        }
        if header.term != allocation.term {
            allocation.sense.stale_frames += 1;
            return Err(Refusal::StaleTerm { newest: allocation.term });
        }
        if matches!(self.phase, Phase::Claiming | Phase::Orphaned) {
            // Too late: this side has stopped listening, and must not acknowledge what it may not apply.
            allocation.sense.stale_frames += 1;
            return Ok(());
        }
        allocation.hear(self.now, &body);
        if allocation.keeping.is_some() && keeping::must_wait(&body) {
            return Err(Refusal::Protocol(format!("{wrong}: what was sent before is not acknowledged yet")));
        }
        let message = match body {
            Body::Pages(payload) => return self.pages(header, payload, actions),
            Body::Message(message) => message,
        };
        match (self.phase, message) {
            (_, Message::Heartbeat { released, epoch_within_ms }) => {
                allocation.output.released(released);
                allocation.epoch_within = Some(Duration::from_millis(epoch_within_ms.into()));
            }
            (_, Message::ReleaseMemory { reason }) => {
                self.answer(link, header, Message::MemoryReleased, actions);
                self.forget(actions);
                actions.push(Action::Report(Report::Ended { reason }));
                self.serve_next(actions);
            }
            // That it came is progress.
            (Phase::Shadowing, Message::Waiting) => {}
            (Phase::Receiving | Phase::Shadowing, Message::Renew { term }) => {
                if term != allocation.term.next() {
                    let known = allocation.term;
                    return Err(Refusal::Protocol(format!("term {term} does not follow term {known}")));
                }
                allocation.announced = Some(term);
                self.answer(link, header, Message::Renewed { term }, actions);
            }
            (Phase::Allocated, Message::AllocateRead) => {
                self.phase = Phase::Receiving;
                let stamp = (header.guid, header.term, header.epoch);
                actions.push(Action::TellHeld { link, stamp });
                self.answer(link, header, Message::AllocateReadResponse, actions);
            }
            (Phase::Receiving, Message::RoundEnd { round, pages, digest }) => {
                allocation.end_round(round, pages, digest)?;
                actions.push(Action::Report(Report::RoundProgress { round, sent: pages, pages }));
                self.end_of_round(link, header, round, actions);
            }
            (Phase::Receiving, Message::WriteLog(bytes)) if header.epoch == Epoch::NONE => {
                add_to_log(&mut allocation.round_log, &bytes).map_err(Refusal::Protocol)?;
                allocation.round_digest.add(header.checksum);
            }
            (Phase::Receiving | Phase::Shadowing, Message::WriteLog(bytes)) => {
                allocation.check_epoch(header.epoch)?;
                allocation.inbox.add_log(&bytes, header.checksum).map_err(Refusal::Protocol)?;
            }
            (Phase::Receiving | Phase::Shadowing, Message::WriteState(bytes)) => {
                allocation.check_epoch(header.epoch)?;
                allocation.inbox.add_state(&bytes, header.checksum).map_err(Refusal::Protocol)?;
            }
            (Phase::Receiving | Phase::Shadowing, Message::WriteOutput { start, bytes }) => {
                allocation.check_epoch(header.epoch)?;
                allocation.inbox.add_output(start, &bytes, header.checksum).map_err(Refusal::Protocol)?;
            }
            (Phase::Receiving | Phase::Shadowing, Message::Commit(commit)) => {
                self.commit(link, header, &commit, actions)?;
            }
            (Phase::Shadowing, Message::ReleasePointer { released }) => {
                if header.epoch != allocation.epoch {
                    let held = allocation.epoch;
                    return Err(Refusal::Protocol(format!(
                        "the guest is handed over at epoch {}, epoch {held} is held here",
                        header.epoch
                    )));
                }
                allocation.output.released(released);
                actions.push(Action::Prepare { state: allocation.state.clone() });
            }
            (_, message) => self.inquiry(link, header, &message, actions)?,
        }
        Ok(())
    }

    /// The primary has given the guest up. It goes on there if this side cannot run it, so that is tried before anybody
    /// decides.
    fn prepared(&mut self, outcome: Result<(), String>, actions: &mut Vec<Action>) {
        let (Phase::Shadowing, Some(allocation), Some(link)) = (self.phase, &mut self.allocation, self.owner)
        else {
            return;
        };
        allocation.handed_over = true;
        let (guid, expected, epoch) = (allocation.guid, allocation.term, allocation.epoch);
        match outcome {
            Ok(()) if allocation.witness => {
                self.phase = Phase::Claiming;
                actions.push(Action::Claim { guid, expected });
            }
            Ok(()) => self.activate(expected.next(), actions),
            Err(reason) => {
                let message = Message::Refused(Refusal::Machine(reason.clone()));
                actions.push(Action::Send { link, stamp: (guid, expected, epoch), message });
                actions.push(Action::Report(Report::Refused { reason }));
                self.drop_guest(actions);
            }
        }
    }

    fn before_allocation(
        &mut self,
        link: LinkId,
        header: &Header,
        body: Body,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        match body {
            Body::Message(Message::Allocate { layout, policy, machine, heartbeat_ms, misses }) => {
                if policy.block_size as usize != PAGE_SIZE {
                    return Err(Refusal::Protocol(format!(
                        "block size {} is not {PAGE_SIZE}",
                        policy.block_size
                    )));
                }
                if !HEARTBEAT_MS.contains(&heartbeat_ms) || misses == 0 || misses > 1000 {
                    return Err(Refusal::Protocol(format!(
                        "heartbeat of {heartbeat_ms} ms, {misses} misses"
                    )));
                }
                if layout.bytes() > self.space || machine.len() > MAX_MACHINE {
                    return Err(Refusal::Protocol("an allocation larger than agreed".into()));
                }
                if header.term == Term(0) || header.term == Term(u64::MAX) {
                    return Err(Refusal::Protocol(format!(
                        "term {} has no successor or no owner",
                        header.term
                    )));
                }
                self.phase = Phase::Allocating;
                self.allocation = Some(Allocation {
                    guid: header.guid,
                    term: header.term,
                    layout: layout.clone(),
                    policy,
                    heartbeat: Duration::from_millis(heartbeat_ms.into()),
                    misses,
                    witness: false,
                    owner: String::new(),
                    announced: None,
                    round: 0,
                    round_pages: 0,
                    round_digest: Digest::default(),
                    round_log: Vec::new(),
                    keeping: None,
                    epoch: Epoch::NONE,
                    first: None,
                    inbox: Inbox::default(),
                    state: Vec::new(),
                    output: OutputLog::default(),
                    sense: Sense::default(),
                    heard: self.now,
                    heard_elsewhere: None,
                    doubt: None,
                    progressed: self.now,
                    epoch_within: None,
                    spoke: self.now,
                    handed_over: false,
                });
                actions.push(Action::Allocate { machine, layout });
                Ok(())
            }
            Body::Message(Message::Heartbeat { .. }) => Ok(()),
            Body::Message(Message::ReleaseMemory { .. }) => {
                self.answer(link, header, Message::MemoryReleased, actions);
                self.forget(actions);
                self.serve_next(actions);
                Ok(())
            }
            Body::Message(message) => self.inquiry(link, header, &message, actions),
            Body::Pages(_) => Err(self.wrong_phase("WritePages")),
        }
    }

    fn allocated(
        &mut self,
        machine: Result<Vec<u8>, String>,
        witness: &WitnessView,
        actions: &mut Vec<Action>,
    ) {
        let (Some(link), Some(allocation), Phase::Allocating) =
            (self.owner, &mut self.allocation, self.phase)
        else {
            return;
        };
        let stamp = (allocation.guid, allocation.term, Epoch::NONE);
        let confirmed = match witness {
            WitnessView::None => Ok(false),
            WitnessView::Failed(reason) => Err(reason.clone()),
            WitnessView::Record(Some(record))
                if record.guid == allocation.guid && record.term == allocation.term =>
            {
                allocation.owner.clone_from(&record.owner);
                Ok(true)
            }
            WitnessView::Record(None) => Err("it has no record".into()),
            WitnessView::Record(Some(Record { guid, term, .. })) => {
                Err(format!("it knows guest {guid}, term {term}"))
            }
        };
        let outcome = machine
            .map_err(Refusal::Machine)
            .and_then(|disks| Ok((disks, confirmed.map_err(Refusal::Witness)?)));
        match outcome {
            Ok((disks, witness)) => {
                allocation.witness = witness;
                (allocation.heard, allocation.spoke) = (self.now, self.now);
                self.phase = Phase::Allocated;
                let (guid, term, pages) = (allocation.guid, allocation.term, allocation.layout.pages());
                if !disks.is_empty() {
                    actions.push(Action::Send { link, stamp, message: Message::Disks(disks) });
                }
                if let Some(address) = self.second_link.clone() {
                    actions.push(Action::Send { link, stamp, message: Message::SecondLink { address } });
                }
                actions.push(Action::Send { link, stamp, message: Message::Allocated });
                actions.push(Action::Report(Report::Joined { guid, term, pages }));
            }
            Err(refusal) => {
                actions.push(Action::Report(Report::Failed { reason: refusal.to_string() }));
                actions.push(Action::Send { link, stamp, message: Message::Refused(refusal) });
                actions.push(Action::Close(link));
                self.forget(actions);
                self.serve_next(actions);
            }
        }
    }

    fn pages(
        &mut self,
        header: &Header,
        payload: PooledBuffer,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let wrong = self.wrong_phase("WritePages");
        let Some(allocation) = &mut self.allocation else { return Err(wrong) };
        let all = allocation.layout.pages();
        let batch = PageBatch::parse(payload, all).map_err(|error| Refusal::Protocol(error.to_string()))?;
        allocation.sense.pages += batch.len() as u64;
        match self.phase {
            Phase::Receiving if header.epoch == Epoch::NONE => {
                allocation.round_pages += batch.len() as u64;
                allocation.round_digest.add(header.checksum);
                actions.push(Action::Write(batch));
                Ok(())
            }
            Phase::Receiving | Phase::Shadowing => {
                allocation.check_epoch(header.epoch)?;
                allocation.inbox.add_pages(batch, header.checksum, all).map_err(Refusal::Protocol)
            }
            _ => Err(wrong),
        }
    }

    /// The whole of the promise: complete and verified, acknowledged, only then applied.
    fn commit(
        &mut self,
        link: LinkId,
        header: &Header,
        commit: &Commit,
        actions: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let Some(allocation) = &mut self.allocation else { return Ok(()) };
        allocation.check_epoch(header.epoch)?;
        let epoch = header.epoch;
        if allocation.epoch == Epoch::NONE && (allocation.round == 0 || allocation.round_pages > 0) {
            let reason = "the seeding before it is not complete".into();
            return Err(Refusal::TornEpoch { epoch, reason });
        }
        // What it says of the output counts when the epoch does.
        let mut output = allocation.output.clone();
        let whole = allocation
            .inbox
            .close(commit, &mut output)
            .map_err(|reason| Refusal::TornEpoch { epoch, reason })?;
        self.keep_epoch(link, header, output, whole, actions);
        Ok(())
    }

    /// The epoch is complete, also on the disks: it is acknowledged, if there is still somebody to tell, and applied.
    fn accept(
        &mut self,
        link: LinkId,
        header: &Header,
        mut output: OutputLog,
        whole: WholeEpoch,
        actions: &mut Vec<Action>,
    ) {
        let Some(allocation) = &mut self.allocation else { return };
        let (epoch, first) = (header.epoch, allocation.epoch == Epoch::NONE);
        output.released(allocation.output.unreleased().0);
        allocation.output = output;
        allocation.epoch = epoch;
        allocation.state = whole.state;
        allocation.sense.epoch = epoch;
        allocation.sense.epochs += 1;
        self.phase = Phase::Shadowing;
        if self.owner == Some(link) {
            self.answer(link, header, Message::CommitAck, actions);
        }
        actions.push(Action::Apply(whole.batches));
        if first {
            actions.push(Action::Report(Report::Protected { epoch }));
        }
    }

    fn applied(&mut self) {
        if let Some(allocation) = &mut self.allocation {
            (allocation.heard, allocation.progressed) = (self.now, self.now);
        }
    }

    fn claimed(&mut self, claim: Claim, actions: &mut Vec<Action>) {
        if self.phase != Phase::Claiming {
            return;
        }
        match claim {
            Claim::Granted(term) => self.activate(term, actions),
            // Only a witness that has lost its record knows an older term; nobody has won by that.
            Claim::Refused { term, .. } if term < self.term() => {
                let reason =
                    format!("it knows term {term}, this side has term {}; restore its record", self.term());
                actions.push(Action::Report(Report::WitnessSilent { reason }));
            }
            // The primary has won the term in which this side was to follow it, and was lost only then: all that it has
            // released in it is here.
            Claim::Refused { term, owner } if self.is_announced(term, &owner) => {
                if let Some(allocation) = &mut self.allocation {
                    allocation.term = term;
                    allocation.announced = None;
                    actions.push(Action::Claim { guid: allocation.guid, expected: term });
                }
            }
            Claim::Refused { term, owner } => {
                actions.push(Action::Report(Report::Refused {
                    reason: format!(
                        "{owner} went on in term {term}: the primary lives, this standby is fenced"
                    ),
                }));
                self.drop_guest(actions);
            }
            Claim::Unreachable(reason) => actions.push(Action::Report(Report::WitnessSilent { reason })),
        }
    }

    fn is_announced(&self, term: Term, owner: &str) -> bool {
        self.allocation
            .as_ref()
            .is_some_and(|allocation| allocation.announced == Some(term) && allocation.owner == owner)
    }

    fn activate(&mut self, term: Term, actions: &mut Vec<Action>) {
        let Some(allocation) = &mut self.allocation else { return };
        allocation.term = term;
        let (output_start, output) = allocation.output.unreleased();
        actions.push(Action::Report(Report::Won { term }));
        actions.push(Action::Activate {
            state: std::mem::take(&mut allocation.state),
            output_start,
            output: output.to_vec(),
            handed_over: allocation.handed_over,
        });
        self.phase = Phase::Active;
        if let Some(link) = self.owner {
            // An old primary that only slept learns who is live before it sees the link close.
            let stamp = (allocation.guid, term, allocation.epoch);
            actions.push(Action::Send { link, stamp, message: Message::AllocateWrite });
            actions.push(Action::Close(link));
            self.owner = None;
        }
    }

    fn activated(&mut self, outcome: Result<(), String>, actions: &mut Vec<Action>) {
        let (Phase::Active, Some(allocation)) = (self.phase, &self.allocation) else { return };
        let report = match outcome {
            Ok(()) => Report::Active {
                epoch: allocation.epoch,
                term: allocation.term,
                output_start: allocation.output.unreleased().0,
            },
            Err(reason) => Report::Failed { reason: format!("the guest cannot be run here: {reason}") },
        };
        actions.push(Action::Report(report));
    }

    fn vacated(&mut self, space: u64, actions: &mut Vec<Action>) {
        self.space = space;
        if self.phase == Phase::Active {
            // The machine is no longer the standby's to release.
            self.allocation = None;
            self.phase = Phase::Waiting;
            self.serve_next(actions);
        }
    }

    /// Forgets the guest and closes its link.
    fn drop_guest(&mut self, actions: &mut Vec<Action>) {
        actions.extend(self.owner.map(Action::Close));
        self.forget(actions);
        self.serve_next(actions);
    }

    fn forget(&mut self, actions: &mut Vec<Action>) {
        if self.allocation.take().is_some() {
            actions.push(Action::Release);
        }
        self.owner = None;
        self.phase = Phase::Waiting;
    }

    /// Grants the first that waits.
    fn serve_next(&mut self, actions: &mut Vec<Action>) {
        if let Some((link, guid, _)) = self.queue.pop_front() {
            self.owner = Some(link);
            self.phase = Phase::Reserved;
            self.reserved = self.now;
            let message = Message::SpaceResponse(Space::Granted);
            actions.push(Action::Send { link, stamp: (guid, Term(0), Epoch::NONE), message });
        }
    }

    /// Answers in the term and epoch of the request.
    #[allow(clippy::unused_self)]
    fn answer(&self, link: LinkId, header: &Header, message: Message, actions: &mut Vec<Action>) {
        actions.push(Action::Send { link, stamp: (header.guid, header.term, header.epoch), message });
    }

    fn wrong_phase(&self, request: &str) -> Refusal {
        Refusal::WrongPhase { request: request.into(), phase: self.phase.name().into() }
    }
}

impl Allocation {
    /// Epochs come one after the other, from the one on in which this side begins to follow.
    fn check_epoch(&mut self, epoch: Epoch) -> Result<(), Refusal> {
        let next = match self.epoch {
            Epoch::NONE => *self.first.get_or_insert(epoch),
            last => last.next(),
        };
        if epoch == next && epoch != Epoch::NONE {
            return Ok(());
        }
        Err(Refusal::Protocol(format!("epoch {epoch} cannot follow epoch {}", self.epoch)))
    }

    fn end_round(&mut self, round: u32, pages: u64, digest: u64) -> Result<(), Refusal> {
        let whole = (self.round.saturating_add(1), self.round_pages, self.round_digest.value());
        if whole != (round, pages, digest) {
            let (want, got, _) = whole;
            return Err(Refusal::Protocol(format!(
                "seeding round {round} with {pages} pages does not match what arrived: round {want}, {got} pages"
            )));
        }
        (self.round, self.round_pages, self.round_digest) = (round, 0, Digest::default());
        self.sense.rounds += 1;
        Ok(())
    }
}
