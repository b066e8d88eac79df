//! The shell of the primary: does what the state machine says, one small thing at a time.

use std::collections::VecDeque;
use std::time::Duration;

use mirror::dirty::DirtySet;
use mirror::ids::{Epoch, Guid, LinkId, Term};
use mirror::memory::PAGE_SIZE;
use mirror::primary::{Action, Event, Pacing, Phase, Primary, Session, Settings};
use mirror::report::Report;
use mirror::wire::message::{Body, Commit, Message};

use super::Side;
use super::console::Console;
use super::guest::{Guest, PAGES, layout};
use super::link::{End, Outgoing, Sent, Stamp, Wire};
use super::outside::Outside;
use super::witness::SimWitness;

/// The guest's name.
pub const GUID: Guid = Guid::from_u128(0x5eed);

/// The primary's link to its standby.
pub const LINK: LinkId = 0;

/// The primary's first term.
pub const FIRST: Term = Term(3);

/// Pages of a batch: few, so that rounds and epochs have several frames.
const BATCH: usize = 8;

/// What is left to do of what was ordered.
pub enum Job {
    /// An order of the state machine.
    Act(Action),
    /// Harvest inside the pause.
    Harvest,
    /// Copy these pages to staging.
    Copy(Vec<u32>),
    /// Capture the machine state.
    Capture,
    /// End the pause.
    Resume,
}

/// An epoch beside the guest.
pub struct Staged {
    /// Its pages.
    pub set: DirtySet,
    numbers: Vec<u32>,
    bodies: Vec<u8>,
    state: Vec<u8>,
    output_start: u64,
    output: Vec<u8>,
}

/// What the shell can reach.
pub struct Reach<'a> {
    /// The time.
    pub now: Duration,
    /// To the standby.
    pub outward: &'a mut Wire,
    /// From the standby.
    pub inward: &'a mut Wire,
    /// The witness.
    pub witness: &'a mut SimWitness,
    /// Whoever watches.
    pub outside: &'a mut Outside,
}

/// The primary's process.
pub struct PrimaryHost {
    /// It has not been killed.
    pub alive: bool,
    /// The term in which it began to mirror.
    pub first: Term,
    /// The state machine.
    pub core: Primary,
    /// The guest.
    pub guest: Guest,
    /// Its console.
    pub console: Console,
    /// The end of the link.
    pub end: End,
    /// What is to be done before the next event.
    pub jobs: VecDeque<Job>,
    /// Events that come from within.
    pub answers: VecDeque<Event>,
    /// The epoch that is taken or sent.
    pub staged: Option<Staged>,
    /// Pages to be sent in the next round or epoch.
    pub dirty: DirtySet,
    /// What was reported.
    pub reports: Vec<Report>,
    /// Position from which on output was held.
    pub held_from: Option<u64>,
    /// A commit has been put on the wire.
    pub exposed: bool,
    /// It was told to freeze.
    pub frozen: bool,
    /// The guest does not go on after a pause.
    pub standing: bool,
    /// The guest does not go on until it is known whose it is.
    pub suspended: bool,
    /// Its guest was told to go on without a mirror.
    pub passed: bool,
    /// The standby has named a second link.
    pub has_second_link: bool,
    /// Position after the output of the epoch before.
    output_end: u64,
    actions: Vec<Action>,
}

impl PrimaryHost {
    /// A primary whose guest ends after so many steps, and whose final pause may cost so much.
    pub fn new(ends_after: u64, pause_budget: Duration, has_witness: bool) -> Self {
        let console = Console::new(0, Vec::new());
        Self::of(Guest::booted(ends_after), console, FIRST, pause_budget, has_witness)
    }

    /// A primary that has run `guest` alone, which is to be mirrored in `term`.
    pub fn of(guest: Guest, console: Console, term: Term, pause_budget: Duration, has_witness: bool) -> Self {
        let pacing = Pacing { pause_budget, ..Pacing::default() };
        let settings = Settings { pacing, has_witness, ..Settings::default() };
        Self {
            alive: true,
            first: term,
            core: Primary::new(settings, GUID, term, layout(), b"machine".to_vec()),
            guest,
            console,
            end: End::opened(),
            jobs: VecDeque::new(),
            answers: VecDeque::from([Event::Connected { link: LINK }]),
            staged: None,
            dirty: DirtySet::new(PAGES),
            reports: Vec::new(),
            held_from: None,
            exposed: false,
            frozen: false,
            standing: false,
            suspended: false,
            passed: false,
            has_second_link: false,
            output_end: 0,
            actions: Vec::new(),
        }
    }

    /// The seeding round, counted from 1.
    pub fn round(&self) -> u32 {
        self.core.sessions().get(&LINK).map_or(0, Session::round)
    }

    /// Does the next thing that was ordered.
    pub fn work(&mut self, reach: &mut Reach<'_>) -> Result<bool, String> {
        let Some(job) = self.jobs.pop_front() else { return Ok(false) };
        match job {
            Job::Act(action) => self.act(action, reach)?,
            Job::Harvest => {
                self.guest.harvest(&mut self.dirty);
                let set = std::mem::replace(&mut self.dirty, DirtySet::new(PAGES));
                let numbers: Vec<u32> = set.iter().map(|page| page as u32).collect();
                let copies: Vec<Job> = numbers.chunks(BATCH).map(|chunk| Job::Copy(chunk.into())).collect();
                copies.into_iter().rev().for_each(|copy| self.jobs.push_front(copy));
                self.staged = Some(Staged {
                    set,
                    numbers,
                    bodies: Vec::new(),
                    state: Vec::new(),
                    output_start: 0,
                    output: Vec::new(),
                });
            }
            Job::Copy(numbers) => {
                let staged = self.staged.as_mut().ok_or("a copy without staging")?;
                for page in numbers {
                    staged.bodies.extend_from_slice(self.guest.memory.page(page.into()));
                }
            }
            Job::Capture => {
                let staged = self.staged.as_mut().ok_or("a capture without staging")?;
                staged.state = self.guest.cpu.save();
                // Before the first epoch, what has not left yet is nowhere else.
                let first = self.core.epoch() == Epoch::NONE;
                staged.output_start = if first { self.console.written() } else { self.output_end };
                staged.output = self.console.copy(staged.output_start, self.console.produced());
                self.output_end = self.console.produced();
            }
            Job::Resume => {
                self.guest.paused = self.frozen || self.standing || self.suspended;
                self.answers.push_back(Event::Staged { output_end: self.output_end });
            }
        }
        Ok(true)
    }

    fn act(&mut self, action: Action, reach: &mut Reach<'_>) -> Result<(), String> {
        match action {
            Action::Send { epoch, message, .. } => {
                let stamp = (GUID, self.core.term(), epoch);
                self.end.outgoing.push_back(Outgoing::Message(stamp, message));
            }
            Action::Agree { .. } => {}
            Action::BeatAt { .. } => self.has_second_link = true,
            Action::StartTracking { .. } => {
                self.dirty = self.guest.start_tracking();
                self.answers.push_back(Event::Tracking { link: LINK, pages: self.dirty.count() });
            }
            Action::Note { .. } => return Err("a standby with new memory has told what it holds".into()),
            Action::StopTracking => self.guest.stop_tracking(),
            Action::SendRound { round, .. } => {
                let stamp = (GUID, self.core.term(), Epoch::NONE);
                let numbers: Vec<u32> = self.dirty.iter().map(|page| page as u32).collect();
                self.dirty.clear();
                self.end
                    .outgoing
                    .extend(numbers.chunks(BATCH).map(|chunk| Outgoing::Live(stamp, chunk.into())));
                self.end.outgoing.push_back(Outgoing::RoundEnd(stamp, round));
            }
            Action::Harvest { .. } => {
                self.guest.harvest(&mut self.dirty);
                self.answers.push_back(Event::Harvested {
                    link: LINK,
                    pages: self.dirty.count(),
                    disks_lag: false,
                });
            }
            Action::Hold => {
                self.console.hold();
                self.held_from.get_or_insert(self.console.produced());
            }
            Action::TakeEpoch { .. } => {
                if self.staged.is_some() {
                    return Err("an epoch is taken while another one is staged".into());
                }
                self.guest.paused = true;
                for job in [Job::Resume, Job::Capture, Job::Harvest] {
                    self.jobs.push_front(job);
                }
            }
            Action::SendEpoch { epoch } => {
                self.send_epoch((GUID, self.core.term(), epoch))?;
                self.answers.push_back(Event::EpochSent { link: LINK });
            }
            Action::Release { output_end, .. } => {
                self.staged = None;
                self.console.allow(output_end);
            }
            Action::PutBack => {
                if let Some(staged) = self.staged.take() {
                    self.dirty.union(&staged.set);
                }
            }
            Action::Claim { expected } => {
                self.nothing_forgotten()?;
                let claim = reach.witness.claim(GUID, expected, Side::Primary.name());
                self.answers.push_back(Event::Claimed(claim));
            }
            Action::PassOutput => {
                self.nothing_forgotten()?;
                self.passed = true;
                self.console.pass();
            }
            Action::Freeze => {
                self.frozen = true;
                self.guest.paused = true;
                self.console.freeze();
            }
            Action::StandStill => self.standing = true,
            Action::Drain if self.console.written() == self.console.produced() => {
                self.answers.push_back(Event::Drained(Ok(self.console.written())));
            }
            // Until all has left.
            Action::Drain => self.jobs.push_front(Job::Act(Action::Drain)),
            Action::Suspend => {
                self.suspended = true;
                self.guest.paused = true;
            }
            Action::Resume => {
                (self.standing, self.suspended) = (false, false);
                self.guest.paused = self.frozen;
            }
            Action::Close(_) => self.end.outgoing.push_back(Outgoing::Close),
            Action::Report(report) => self.reports.push(report),
        }
        Ok(())
    }

    /// Whether the epoch is staged with its machine state.
    pub fn is_captured(&self) -> bool {
        self.staged.as_ref().is_some_and(|staged| !staged.state.is_empty())
    }

    /// Pages copied to staging so far.
    pub fn pages_copied(&self) -> usize {
        self.staged.as_ref().map_or(0, |staged| staged.bodies.len() / PAGE_SIZE)
    }

    /// Once the standby is lost, no staged epoch may be left whose pages count as clean.
    fn nothing_forgotten(&self) -> Result<(), String> {
        match &self.staged {
            // A guest that has ended needs no more mirroring.
            Some(staged) if self.core.phase() != Phase::Ended => Err(format!(
                "{} pages of an epoch were neither acknowledged nor put back",
                staged.set.count()
            )),
            _ => Ok(()),
        }
    }

    fn send_epoch(&mut self, stamp: Stamp) -> Result<(), String> {
        let staged = self.staged.as_ref().ok_or("an epoch is sent that was not staged")?;
        let queue = &mut self.end.outgoing;
        for (numbers, bodies) in staged.numbers.chunks(BATCH).zip(staged.bodies.chunks(BATCH * PAGE_SIZE)) {
            queue.push_back(Outgoing::Staged(stamp, numbers.into(), bodies.into()));
        }
        // In pieces, as a large state travels.
        for piece in staged.state.chunks(16) {
            queue.push_back(Outgoing::Part(stamp, Message::WriteState(piece.into())));
        }
        // Some epochs have written to disks.
        if !stamp.2.0.is_multiple_of(3) {
            queue.push_back(Outgoing::Part(stamp, Message::WriteLog(vec![7; 5])));
        }
        let mut start = staged.output_start;
        for piece in staged.output.chunks(16) {
            queue.push_back(Outgoing::Part(stamp, Message::WriteOutput { start, bytes: piece.into() }));
            start += piece.len() as u64;
        }
        let commit = Commit { pages: 0, digest: 0, output_end: start, released: self.console.written() };
        queue.push_back(Outgoing::Commit(stamp, commit));
        Ok(())
    }

    /// Gives the state machine an event.
    pub fn handle(&mut self, now: Duration, event: Event) {
        self.core.handle(now, event, &mut self.actions);
        self.jobs.extend(self.actions.drain(..).map(Job::Act));
    }

    /// Handles an event from within.
    pub fn answer(&mut self, reach: &mut Reach<'_>) -> bool {
        if !self.jobs.is_empty() {
            return false;
        }
        let Some(event) = self.answers.pop_front() else { return false };
        self.handle(reach.now, event);
        true
    }

    /// Handles what the link brings.
    pub fn receive(&mut self, reach: &mut Reach<'_>) -> bool {
        if !self.jobs.is_empty() || !self.end.open {
            return false;
        }
        let event = match self.end.receive(reach.inward) {
            Some(Ok((header, Body::Message(message)))) => Event::Received { link: LINK, header, message },
            Some(Ok((_, Body::Pages(_)))) => self.lost("the standby sent pages", reach),
            Some(Err(error)) => self.lost(&error.to_string(), reach),
            None if reach.inward.closed => self.lost("the link was closed", reach),
            None => return false,
        };
        self.handle(reach.now, event);
        true
    }

    /// Closes the link.
    pub fn lost(&mut self, reason: &str, reach: &mut Reach<'_>) -> Event {
        self.end.close(reach.outward);
        Event::LinkLost { link: LINK, reason: reason.into() }
    }

    /// Time passes.
    pub fn tick(&mut self, reach: &mut Reach<'_>) -> bool {
        if !self.jobs.is_empty() {
            return false;
        }
        let (produced, released) = (self.console.produced(), self.console.written());
        let dirty = Some(self.guest.dirty().count());
        self.handle(reach.now, Event::Tick { produced, released, waits: false, dirty });
        true
    }

    /// Puts one thing on the wire.
    pub fn flush(&mut self, reach: &mut Reach<'_>) -> bool {
        let Some(sent) = self.end.flush(reach.outward, Some(&self.guest.memory)) else { return false };
        match sent {
            Sent::RoundEnd(pages) => {
                self.answers.push_back(Event::RoundSent {
                    link: LINK,
                    pages,
                    bytes: pages * PAGE_SIZE as u64,
                });
            }
            Sent::Commit => self.exposed = true,
            Sent::Closed | Sent::Other => {}
        }
        true
    }

    /// The guest does a step.
    pub fn run(&mut self) -> bool {
        if self.guest.paused || self.guest.has_ended() {
            return false;
        }
        let output = self.guest.step();
        self.console.push(&output);
        if self.guest.has_ended() {
            self.answers.push_back(Event::GuestEnded { reason: "it was done".into() });
        }
        true
    }

    /// Lets at most `most` bytes of output leave. `known`: position after the last byte of the newest epoch that the
    /// standby has committed, if it has any.
    ///
    /// # Errors
    /// Output leaves that the live side does not know, or may not leave here.
    pub fn drain(&mut self, most: usize, known: Option<u64>, reach: &mut Reach<'_>) -> Result<bool, String> {
        let Some((start, bytes)) = self.console.drain(most) else { return Ok(false) };
        let end = start + bytes.len() as u64;
        let granted = reach.witness.granted(Side::Primary.name(), self.first);
        // As long as no commit has left this side, no other side can hold a complete epoch.
        let free = if self.exposed { self.held_from.unwrap_or(0) } else { u64::MAX };
        let most = free.max(known.unwrap_or(0));
        if self.frozen {
            return Err(format!("a frozen primary released output from {start} to {end}"));
        }
        if !granted && end > most {
            return Err(format!(
                "the primary released output up to {end}, the standby knows it up to {most}"
            ));
        }
        reach.outside.see(start, &bytes)?;
        Ok(true)
    }

    /// Whether a shell would beat on the second link: as long as there is something to mirror or to decide.
    pub fn beats(&self) -> bool {
        self.alive && self.has_second_link && !self.core.phase().is_over()
    }

    /// The term in which it is the live side, if it is.
    pub fn live_term(&self) -> Option<Term> {
        let silent = !self.alive
            || matches!(
                self.core.phase(),
                Phase::Deciding | Phase::HandingOver | Phase::HandedOver | Phase::Frozen
            );
        (!silent).then(|| self.core.term())
    }
}
