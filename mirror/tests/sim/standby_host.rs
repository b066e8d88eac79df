//! The shell of the standby.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use mirror::ids::{Epoch, Term};
use mirror::memory::PAGE_SIZE;
use mirror::report::Report;
use mirror::standby::{Action, Event, HEARTBEAT, Phase, Standby, WitnessView};
use mirror::wire::header::Kind;
use mirror::wire::message::{Body, Message};
use mirror::wire::pages::PageBatch;

use super::Side;
use super::console::Console;
use super::guest::{Cpu, Guest, Memory, wrong_page};
use super::link::{End, Outgoing};
use super::primary_host::{GUID, Reach};
use super::seat::header;

/// The mirror's link.
pub const LINK: u64 = 1;

/// The link on which the primary is heard besides.
pub const SECOND_LINK: u64 = 2;

/// What is left to do of what was ordered.
pub enum Job {
    /// An order of the state machine.
    Act(Action),
    /// Write page `1` of the batch to memory, as part of the application of an epoch.
    Apply(Rc<PageBatch>, usize),
    /// The epoch is in memory.
    Applied,
}

/// The standby's process.
pub struct StandbyHost {
    /// It has not been killed.
    pub alive: bool,
    /// The state machine.
    pub core: Standby,
    /// The mirrored memory, if there is an allocation.
    pub memory: Option<Memory>,
    /// The guest, once it runs here.
    pub guest: Option<Guest>,
    /// Its console.
    pub console: Console,
    /// The end of the link.
    pub end: End,
    /// What is to be done before the next event.
    pub jobs: VecDeque<Job>,
    /// Events that come from within.
    pub answers: VecDeque<Event>,
    /// What was reported.
    pub reports: Vec<Report>,
    /// Position after the last byte of the newest epoch that was ever committed here, and the epoch.
    pub committed: Option<(Epoch, u64)>,
    ends_after: u64,
    actions: Vec<Action>,
    /// Output ends of the epochs that arrive, by what their commits said.
    output_end: u64,
}

impl StandbyHost {
    /// A standby whose guest will end after so many steps.
    pub fn new(ends_after: u64) -> Self {
        Self {
            alive: true,
            core: Standby::new(Side::Standby.name(), 1 << 30),
            memory: None,
            guest: None,
            console: Console::new(0, Vec::new()),
            end: End::opened(),
            jobs: VecDeque::new(),
            answers: VecDeque::new(),
            reports: Vec::new(),
            committed: None,
            ends_after,
            actions: Vec::new(),
            output_end: 0,
        }
    }

    /// Does the next thing that was ordered.
    pub fn work(&mut self, reach: &mut Reach<'_>) -> Result<bool, String> {
        match self.jobs.pop_front() {
            None => Ok(false),
            Some(Job::Apply(batch, index)) => {
                self.write(&batch, index, 1)?;
                Ok(true)
            }
            Some(Job::Applied) => {
                self.answers.push_back(Event::Applied);
                Ok(true)
            }
            Some(Job::Act(action)) => self.act(action, reach).map(|()| true),
        }
    }

    fn write(&mut self, batch: &PageBatch, first: usize, count: usize) -> Result<(), String> {
        let memory = self.memory.as_mut().ok_or("pages are written without an allocation")?;
        for (page, body) in batch.iter().skip(first).take(count) {
            memory.page_mut(page.into()).copy_from_slice(body.unwrap_or(&[0; PAGE_SIZE]));
        }
        Ok(())
    }

    fn act(&mut self, action: Action, reach: &mut Reach<'_>) -> Result<(), String> {
        match action {
            Action::Send { link, stamp, message } if link == LINK => {
                self.end.outgoing.push_back(Outgoing::Message(stamp, message));
            }
            Action::Close(link) if link == LINK => self.end.outgoing.push_back(Outgoing::Close),
            Action::Send { .. } | Action::Close(_) => return Err("an unknown link is used".into()),
            Action::Allocate { machine, .. } => {
                self.memory = Some(Memory::zeroed());
                let machine =
                    if machine == b"machine" { Ok(Vec::new()) } else { Err("unknown machine".into()) };
                let witness = match &reach.witness {
                    witness if witness.absent => WitnessView::None,
                    witness => WitnessView::Record(witness.record.clone()),
                };
                self.answers.push_back(Event::Allocated { machine, witness });
            }
            // Its memory is always new.
            Action::TellHeld { .. } => {}
            Action::Write(batch) => self.write(&batch, 0, usize::MAX)?,
            Action::Apply(batches) => {
                self.jobs.push_front(Job::Applied);
                for batch in batches.into_iter().map(Rc::new).rev() {
                    let pages = (0..batch.len()).rev();
                    pages.for_each(|page| self.jobs.push_front(Job::Apply(batch.clone(), page)));
                }
            }
            Action::KeepLog { number, .. } => {
                self.answers.push_back(Event::LogKept { number, outcome: Ok(()) });
            }
            Action::Prepare { state } => {
                let sound = Cpu::restore(&state).map(drop).ok_or_else(|| "the state is not whole".to_owned());
                self.answers.push_back(Event::Prepared(sound));
            }
            Action::Claim { guid, expected } => {
                let claim = reach.witness.claim(guid, expected, Side::Standby.name());
                self.answers.push_back(Event::Claimed(claim));
            }
            Action::Activate { state, output_start, output, .. } => {
                self.activate(&state, output_start, output, reach)?;
                self.answers.push_back(Event::Activated(Ok(())));
            }
            Action::Release => {
                if self.guest.is_some() {
                    return Err("the memory of a running guest is released".into());
                }
                self.memory = None;
            }
            Action::Report(report) => self.reports.push(report),
        }
        Ok(())
    }

    /// Runs the guest, after a look at whether all that was promised is there.
    fn activate(
        &mut self,
        state: &[u8],
        output_start: u64,
        output: Vec<u8>,
        reach: &mut Reach<'_>,
    ) -> Result<(), String> {
        let term = self.core.term();
        if reach.witness.absent {
            // The operator's word: this world's note of who is live.
            let _ = reach.witness.claim(GUID, Term(term.0 - 1), Side::Standby.name());
        }
        let record = reach.witness.record.as_ref();
        if record.is_none_or(|record| record.owner != Side::Standby.name() || record.term != term) {
            return Err(format!("the standby went on in term {term} without a grant: {record:?}"));
        }
        let Some((epoch, known)) = self.committed else {
            return Err("the standby went on without a complete epoch".into());
        };
        if epoch != self.core.epoch() {
            return Err(format!(
                "the standby went on from epoch {}, {epoch} is committed",
                self.core.epoch()
            ));
        }
        let cpu = Cpu::restore(state).ok_or("the machine state is not whole")?;
        let memory = self.memory.take().ok_or("the standby went on without memory")?;
        if let Some(page) = wrong_page(&memory, &cpu) {
            return Err(format!("page {page} is not what it was at step {} (epoch {epoch})", cpu.step));
        }
        let end = output_start + output.len() as u64;
        if end != cpu.produced || end != known {
            return Err(format!(
                "the output ends at {end}, the state says {}, the epoch {known}",
                cpu.produced
            ));
        }
        if output_start > reach.outside.end() || reach.outside.end() > end {
            return Err(format!(
                "output up to {} was seen, the standby knows {output_start} to {end}",
                reach.outside.end()
            ));
        }
        reach.outside.agrees(output_start, &output)?;
        self.console = Console::new(output_start, output);
        self.guest = Some(Guest::revived(memory, cpu, self.ends_after));
        Ok(())
    }

    /// Gives the state machine an event.
    pub fn handle(&mut self, now: Duration, event: Event) {
        self.core.handle(now, event, &mut self.actions);
        let epoch = self.core.epoch();
        if epoch != Epoch::NONE && self.committed.is_none_or(|(last, _)| last < epoch) {
            self.committed = Some((epoch, self.output_end));
        }
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
            Some(Ok((header, body))) => {
                if let Body::Message(Message::Commit(commit)) = &body {
                    self.output_end = commit.output_end;
                }
                Event::Received { link: LINK, header, body }
            }
            Some(Err(error)) => self.lost(&error.to_string(), reach),
            None if reach.inward.closed => self.lost("the link was closed", reach),
            None => return false,
        };
        self.handle(reach.now, event);
        true
    }

    /// Handles a heartbeat of `term` that came on the second link.
    pub fn receive_beat(&mut self, now: Duration, term: Term) {
        let header = header(Kind::Message, GUID, term, Epoch::NONE, 0);
        self.handle(now, Event::Received { link: SECOND_LINK, header, body: Body::Message(HEARTBEAT) });
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
        self.handle(reach.now, Event::Tick);
        true
    }

    /// Puts one thing on the wire.
    pub fn flush(&mut self, reach: &mut Reach<'_>) -> bool {
        self.end.flush(reach.outward, None).is_some()
    }

    /// The guest does a step.
    pub fn run(&mut self) -> bool {
        let Some(guest) = self.guest.as_mut().filter(|guest| !guest.has_ended()) else { return false };
        let output = guest.step();
        self.console.push(&output);
        true
    }

    /// Lets at most `most` bytes of output leave.
    ///
    /// # Errors
    /// This side may not release, or what it releases contradicts what was seen.
    pub fn drain(&mut self, most: usize, reach: &mut Reach<'_>) -> Result<bool, String> {
        let Some((start, bytes)) = self.console.drain(most) else { return Ok(false) };
        let owner = reach.witness.record.as_ref().map_or("", |record| record.owner.as_str());
        if self.core.phase() != Phase::Active || owner != Side::Standby.name() {
            return Err(format!("the standby released output while it is {}", self.core.phase().name()));
        }
        reach.outside.see(start, &bytes)?;
        Ok(true)
    }

    /// The term in which it is the live side, if it is.
    pub fn live_term(&self) -> Option<Term> {
        (self.alive && self.core.phase() == Phase::Active).then(|| self.core.term())
    }
}
