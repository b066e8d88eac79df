//! Both sides, the link, the witness and the clock; and the promises, checked after every move.

use std::collections::VecDeque;
use std::time::Duration;

use mirror::ids::{Epoch, Term};
use mirror::report::Report;
use mirror::standby::Standby;
use mirror::witness::{Claim, Record};
use mirror::{primary, standby};

use super::Side;
use super::guest::wrong_page;
use super::link::Wire;
use super::outside::Outside;
use super::primary_host::{FIRST, GUID, PrimaryHost, Reach as Reachable};
use super::standby_host::StandbyHost;
use super::witness::{Reach, SimWitness};

/// One small thing that a side can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// Handle an answer to something that was ordered.
    Answer,
    /// Do the next thing that was ordered.
    Work,
    /// Handle what the link brings.
    Receive,
    /// Put one thing on the wire.
    Flush,
    /// One step of the guest.
    Run,
    /// Let some output leave.
    Drain,
    /// Notice the time.
    Tick,
}

impl Move {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Answer, Self::Work, Self::Receive, Self::Flush, Self::Run, Self::Drain, Self::Tick];
}

/// How it went in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The primary runs the guest alone, or the guest has ended there.
    Solo,
    /// The standby runs the guest, from the end of this epoch.
    Active(Epoch),
    /// Both are there and epochs flow.
    Protected,
    /// The standby refuses to run what is not complete, and the primary is dead.
    Refused,
    /// Whoever had the word is dead.
    Dead,
}

/// Longest simulated time from the end of the last fault to a decision: the primary's patience while it joins.
const DECISION: Duration = Duration::from_secs(12);

/// Time between two ticks of a shell.
const TICK: Duration = Duration::from_millis(5);

/// Most bytes that leave in one move.
const DRAIN: usize = 24;

/// Time between two heartbeats on the second link.
const BEAT: Duration = Duration::from_millis(50);

/// The link on which the standby hears that the primary lives.
#[derive(Default)]
pub struct SecondLink {
    /// What is sent vanishes.
    pub cut: bool,
    /// The terms of the heartbeats on their way.
    beats: VecDeque<Term>,
    next: Duration,
}

/// The world.
pub struct World {
    /// The time.
    pub now: Duration,
    /// The primary's process.
    pub primary: PrimaryHost,
    /// The standby's process.
    pub standby: StandbyHost,
    /// From the primary to the standby.
    pub to_standby: Wire,
    /// From the standby to the primary.
    pub to_primary: Wire,
    /// Who decides.
    pub witness: SimWitness,
    /// Who watches.
    pub outside: Outside,
    /// Until when each side stands still, as after SIGSTOP.
    pub stopped: [Duration; 2],
    /// Until when nothing arrives at each side.
    pub delayed: [Duration; 2],
    /// Until when each side notices no time.
    pub timeless: [Duration; 2],
    /// The second link, if the standby listens on one.
    pub second: SecondLink,
    next_tick: [Duration; 2],
    cursor: usize,
    rotations: u64,
    live: Vec<(Term, Side)>,
}

impl World {
    /// A world whose guest ends after so many steps. A final pause that may cost nothing makes for many rounds.
    pub fn new(ends_after: u64, pause_budget: Duration) -> Self {
        let record =
            Some(Record { guid: GUID, term: FIRST, owner: Side::Primary.name().into(), revision: 1 });
        Self {
            now: Duration::from_secs(1),
            primary: PrimaryHost::new(ends_after, pause_budget, true),
            standby: StandbyHost::new(ends_after),
            to_standby: Wire::default(),
            to_primary: Wire::default(),
            witness: SimWitness { record, reach: Reach::Answers, absent: false },
            outside: Outside::default(),
            stopped: [Duration::ZERO; 2],
            delayed: [Duration::ZERO; 2],
            timeless: [Duration::ZERO; 2],
            second: SecondLink::default(),
            next_tick: [Duration::ZERO; 2],
            cursor: 0,
            rotations: 0,
            live: Vec::new(),
        }
    }

    /// As [`Self::new`], without a witness.
    pub fn without_witness(ends_after: u64, pause_budget: Duration) -> Self {
        let mut world = Self::new(ends_after, pause_budget);
        world.witness.absent = true;
        world.primary = PrimaryHost::new(ends_after, pause_budget, false);
        world
    }

    /// The standby, which nobody has spoken to, listens on a second link.
    pub fn open_second_link(&mut self) {
        self.standby.core =
            Standby::new(Side::Standby.name(), 1 << 30).with_second_link(Some("second".into()));
    }

    /// What comes after `outcome`: the live side mirrors its guest anew, to a process that knows nothing. `None` if there
    /// is no guest to be mirrored.
    ///
    /// # Errors
    /// The witness does not know the live side.
    pub fn next_life(self, outcome: Outcome, pause_budget: Duration) -> Result<Option<Self>, String> {
        let Self { now, primary, standby, witness, outside, live, .. } = self;
        let (guest, console, term) = match outcome {
            Outcome::Active(_) => match standby.guest {
                Some(guest) => (guest, standby.console, standby.core.term()),
                None => return Err("the active side has no guest".into()),
            },
            Outcome::Solo => (primary.guest, primary.console, primary.core.term()),
            Outcome::Protected | Outcome::Refused | Outcome::Dead => return Ok(None),
        };
        if guest.has_ended() {
            return Ok(None);
        }
        let (has_witness, ends_after) = (!witness.absent, guest.ends_after);
        let mut next = Self::new(ends_after, pause_budget);
        (next.now, next.witness, next.outside, next.live) = (now, witness, outside, live);
        // Without a witness its note of who is live goes on as well.
        let Claim::Granted(term) = next.witness.claim(GUID, term, Side::Primary.name()) else {
            return Err(format!(
                "the live side of term {term} is not the witness's: {:?}",
                next.witness.record
            ));
        };
        next.primary = PrimaryHost::of(guest, console, term, pause_budget, has_witness);
        Ok(Some(next))
    }

    /// An operator asks the primary for a switchover. Tells whether it could be asked.
    pub fn switch_over(&mut self) -> bool {
        let able = self.primary.alive && self.primary.jobs.is_empty();
        if able {
            self.primary.handle(self.now, primary::Event::Switchover { to: None });
        }
        able
    }

    /// An operator wants the primary to go on without its standby. Tells whether it could be asked.
    pub fn detach(&mut self) -> bool {
        let able = self.primary.alive && self.primary.jobs.is_empty();
        if able {
            self.primary.handle(self.now, primary::Event::Detach);
        }
        able
    }

    /// Whether `side` has not been killed.
    pub fn alive(&self, side: Side) -> bool {
        match side {
            Side::Primary => self.primary.alive,
            Side::Standby => self.standby.alive,
        }
    }

    /// Kills `side`. The first `arriving` of its frames that are on the wire still arrive; `noticed`: its kernel lives on
    /// and closes the link.
    pub fn kill(&mut self, side: Side, arriving: usize, noticed: bool) {
        let wire = match side {
            Side::Primary => {
                self.primary.alive = false;
                &mut self.to_standby
            }
            Side::Standby => {
                self.standby.alive = false;
                &mut self.to_primary
            }
        };
        wire.frames.truncate(arriving);
        wire.closed |= noticed && !wire.cut;
    }

    /// The wire that leads to `side`.
    pub fn wire_to(&mut self, side: Side) -> &mut Wire {
        match side {
            Side::Primary => &mut self.to_primary,
            Side::Standby => &mut self.to_standby,
        }
    }

    /// `side` notices that its link is broken; the other one may not.
    pub fn break_link(&mut self, side: Side) {
        let (now, witness, outside) = (self.now, &mut self.witness, &mut self.outside);
        match side {
            Side::Primary if self.primary.end.open && self.primary.jobs.is_empty() => {
                let (outward, inward) = (&mut self.to_standby, &mut self.to_primary);
                let mut reach = Reachable { now, outward, inward, witness, outside };
                let event = self.primary.lost("connection reset", &mut reach);
                self.primary.handle(now, event);
            }
            Side::Standby if self.standby.end.open && self.standby.jobs.is_empty() => {
                let (outward, inward) = (&mut self.to_primary, &mut self.to_standby);
                let mut reach = Reachable { now, outward, inward, witness, outside };
                let event = self.standby.lost("connection reset", &mut reach);
                self.standby.handle(now, event);
            }
            _ => {}
        }
    }

    /// Does `step` on `side`, if it is possible; tells whether it was.
    ///
    /// # Errors
    /// The promise that was broken.
    pub fn make(&mut self, side: Side, step: Move) -> Result<bool, String> {
        let index = side as usize;
        if !self.alive(side)
            || self.now < self.stopped[index]
            || (step == Move::Receive && self.now < self.delayed[index])
            || (step == Move::Tick && self.now < self.timeless[index].max(self.next_tick[index]))
        {
            return Ok(false);
        }
        if (side, step) == (Side::Primary, Move::Tick) {
            self.beat();
        }
        if (side, step) == (Side::Standby, Move::Receive)
            && self.standby.jobs.is_empty()
            && let Some(term) = self.second.beats.pop_front()
        {
            self.standby.receive_beat(self.now, term);
            return Ok(true);
        }
        let (now, witness, outside) = (self.now, &mut self.witness, &mut self.outside);
        let done = match side {
            Side::Primary => {
                let (outward, inward) = (&mut self.to_standby, &mut self.to_primary);
                let reach = &mut Reachable { now, outward, inward, witness, outside };
                // A primary may say that it is detached only if the standby has forgotten the guest, and then the
                // standby need know nothing.
                let detached = |report: &Report| matches!(report, Report::Detached { .. });
                let forgot = self.standby.core.guid().is_none() && self.primary.reports.iter().any(detached);
                let committed = self.standby.committed.map(|(_, output_end)| output_end);
                let known = if forgot { Some(u64::MAX) } else { committed };
                let host = &mut self.primary;
                match step {
                    Move::Answer => host.answer(reach),
                    Move::Work => host.work(reach)?,
                    Move::Receive => host.receive(reach),
                    Move::Flush => host.flush(reach),
                    Move::Run => host.run(),
                    Move::Drain => host.drain(DRAIN, known, reach)?,
                    Move::Tick => host.tick(reach),
                }
            }
            Side::Standby => {
                let (outward, inward) = (&mut self.to_primary, &mut self.to_standby);
                let reach = &mut Reachable { now, outward, inward, witness, outside };
                let host = &mut self.standby;
                match step {
                    Move::Answer => host.answer(reach),
                    Move::Work => host.work(reach)?,
                    Move::Receive => host.receive(reach),
                    Move::Flush => host.flush(reach),
                    Move::Run => host.run(),
                    Move::Drain => host.drain(DRAIN, reach)?,
                    Move::Tick => host.tick(reach),
                }
            }
        };
        if done && step == Move::Tick {
            self.next_tick[index] = now + TICK;
        }
        if done {
            self.check_live_sides()?;
        }
        Ok(done)
    }

    /// A shell beats on the second link by a thread of its own.
    fn beat(&mut self) {
        let link = &mut self.second;
        if self.primary.beats() && self.now >= link.next {
            link.next = self.now + BEAT;
            if !link.cut {
                link.beats.push_back(self.primary.core.term());
            }
        }
    }

    fn check_live_sides(&mut self) -> Result<(), String> {
        let sides = [(Side::Primary, self.primary.live_term()), (Side::Standby, self.standby.live_term())];
        for (side, term) in sides {
            let Some(term) = term else { continue };
            match self.live.iter().find(|(known, _)| *known == term) {
                None => self.live.push((term, side)),
                Some((_, owner)) if *owner == side => {}
                Some((_, owner)) => return Err(format!("{owner:?} and {side:?} were live in term {term}")),
            }
        }
        if self.primary.alive
            && self.primary.core.phase() == primary::Phase::Solo
            && self.standby.live_term().is_some()
        {
            return Err("the primary goes on alone while the standby runs the guest".into());
        }
        Ok(())
    }

    /// Does the next thing that is possible, both sides in turn; time passes when nothing is.
    ///
    /// # Errors
    /// The promise that was broken.
    pub fn fair_move(&mut self, pace: Duration) -> Result<(), String> {
        loop {
            let moves = Move::ALL.len() * 2;
            let (side, step) = match self.cursor {
                at if at < Move::ALL.len() => (Side::Primary, Move::ALL[at]),
                at => (Side::Standby, Move::ALL[at - Move::ALL.len()]),
            };
            self.cursor = (self.cursor + 1) % moves;
            let rested = self.cursor == 0;
            if rested {
                self.rotations += 1;
                self.now += pace;
            }
            let skip = side == Side::Primary && step == Move::Run && !self.guest_may_run();
            if (!skip && self.make(side, step)?) || rested {
                return Ok(());
            }
        }
    }

    /// While seeding the guest dirties less from round to round, so that several rounds are worth their while.
    fn guest_may_run(&self) -> bool {
        if self.primary.core.phase() == primary::Phase::Seeding {
            let most = [40, 24, 14, 8, 4].get(self.primary.round() as usize).copied().unwrap_or(3);
            return self.primary.guest.dirty().count() < most;
        }
        self.rotations.is_multiple_of(8)
    }

    /// Goes on in turn until `reached`; tells whether it was, within so many moves.
    ///
    /// # Errors
    /// The promise that was broken.
    pub fn run_until(&mut self, most: usize, reached: impl Fn(&Self) -> bool) -> Result<bool, String> {
        for _ in 0..most {
            if reached(self) {
                return Ok(true);
            }
            self.fair_move(Duration::from_micros(100))?;
        }
        Ok(reached(self))
    }

    /// Ends all faults and waits for a decision.
    ///
    /// # Errors
    /// The promise that was broken; that nothing was decided in time is one.
    pub fn settle(&mut self) -> Result<Outcome, String> {
        (self.stopped, self.delayed, self.timeless) = Default::default();
        (self.to_primary.cut, self.to_standby.cut, self.second.cut) = (false, false, false);
        self.witness.reach = Reach::Answers;
        let since = self.now;
        let started_at = self.primary.core.epoch();
        while self.now < since + DECISION {
            if let Some(outcome) = self.decided(started_at)? {
                self.drained(outcome)?;
                return Ok(outcome);
            }
            self.promote_if_an_operator_would();
            self.fair_move(Duration::from_millis(1))?;
        }
        Err(format!(
            "nobody is live {DECISION:?} after the last fault: primary {}{}, standby {}{}, witness {:?}",
            self.primary.core.phase().name(),
            if self.primary.alive { "" } else { " (dead)" },
            self.standby.core.phase().name(),
            if self.standby.alive { "" } else { " (dead)" },
            self.witness.record
        ))
    }

    /// Without a witness somebody has to look whether the primary is dead, or has given its guest up.
    fn promote_if_an_operator_would(&mut self) {
        let orphaned = self.standby.alive && self.standby.core.phase() == standby::Phase::Orphaned;
        let gone = !self.primary.alive || self.primary.frozen;
        if orphaned && gone && self.standby.jobs.is_empty() {
            self.standby.handle(self.now, standby::Event::Promote);
        }
    }

    fn decided(&self, started_at: Epoch) -> Result<Option<Outcome>, String> {
        use primary::Phase as P;
        use standby::Phase as S;
        let (primary, standby) = (&self.primary.core, &self.standby.core);
        let owner = self.witness.record.as_ref().map_or("", |record| record.owner.as_str());
        if owner == Side::Standby.name() {
            let running = self.standby.guest.is_some() && standby.phase() == S::Active;
            let stopped = self.primary.frozen || primary.phase() == P::Ended;
            let frozen = !self.primary.alive || stopped;
            return Ok(match self.standby.alive {
                // An old primary has to learn of it too, before everything counts as decided.
                true if running && frozen => Some(Outcome::Active(standby.epoch())),
                true => None,
                false => Some(Outcome::Dead),
            });
        }
        if self.primary.alive {
            return match primary.phase() {
                P::Solo | P::Ended if self.primary.passed => Ok(Some(Outcome::Solo)),
                // It gave the guest up, and nobody can say whether the standby ran it before it died.
                P::Frozen if self.witness.absent => Ok((!self.standby.alive).then_some(Outcome::Dead)),
                P::Frozen => Err("the primary is frozen and nobody else is live".into()),
                P::Lockstep if primary.epoch().0 > started_at.0 + 3 => Ok(Some(Outcome::Protected)),
                _ => Ok(None),
            };
        }
        if self.witness.granted(Side::Primary.name(), self.primary.first) || !self.standby.alive {
            return Ok(Some(Outcome::Dead));
        }
        let host = &self.standby;
        let idle = host.jobs.is_empty() && host.answers.is_empty();
        let heard = self.to_standby.frames.is_empty() || !host.end.open;
        match standby.phase() {
            S::Waiting if idle && heard => self.refused(),
            _ => Ok(None),
        }
    }

    /// The primary is dead, nobody else won, and the standby runs nothing.
    fn refused(&self) -> Result<Option<Outcome>, String> {
        let reports = &self.standby.reports;
        let ended = reports.iter().any(|report| matches!(report, Report::Ended { .. }));
        let refused = reports.iter().any(|report| matches!(report, Report::Refused { .. }));
        let joined = reports.iter().any(|report| matches!(report, Report::Joined { .. }));
        match self.standby.committed {
            Some((epoch, _)) if !ended => Err(format!("the standby gave up although it holds epoch {epoch}")),
            None if joined && !refused && !ended => Err("the standby gave up without saying why".into()),
            _ => Ok(Some(Outcome::Refused)),
        }
    }

    /// All that the live side's guest has printed comes out, and its memory is what it must be.
    fn drained(&mut self, outcome: Outcome) -> Result<(), String> {
        let (side, produced) = match outcome {
            Outcome::Solo => (Side::Primary, self.primary.console.produced()),
            Outcome::Active(_) => (Side::Standby, self.standby.console.produced()),
            Outcome::Protected | Outcome::Refused | Outcome::Dead => return Ok(()),
        };
        for _ in 0..produced.saturating_sub(self.outside.end()) / DRAIN as u64 * 20 + 2000 {
            if self.outside.end() >= produced {
                break;
            }
            self.fair_move(Duration::from_millis(1))?;
        }
        if self.outside.end() < produced {
            return Err(format!("the live side printed up to {produced}, seen is {}", self.outside.end()));
        }
        let (guest, console) = match side {
            Side::Primary => (Some(&self.primary.guest), &self.primary.console),
            Side::Standby => (self.standby.guest.as_ref(), &self.standby.console),
        };
        let (start, known) = console.known(0);
        self.outside.agrees(start, known)?;
        match guest.and_then(|guest| wrong_page(&guest.memory, &guest.cpu)) {
            Some(page) => Err(format!("page {page} of the live side is wrong")),
            None => Ok(()),
        }
    }
}
