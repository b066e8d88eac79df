//! Several standbys of one guest: random schedules in which sides die, stand still, are cut off and come back, with the
//! promises checked at every step.
//!
//! Each schedule follows from a number; one that breaks a promise is told by it, and kept below as a test.
//! `UNDERSTUDY_SCHEDULES=1000000` runs more of them.

mod sim;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use mirror::digest::Digest;
use mirror::ids::{Epoch, LinkId, Term};
use mirror::primary::{self, Pacing, Phase, Primary, Settings};
use mirror::standby::{self, Standby, WitnessView};
use mirror::wire::header::{Header, Kind};
use mirror::wire::message::{Body, Commit, Message};
use mirror::witness::Record;

use sim::guest::{layout, mix};
use sim::primary_host::{FIRST, GUID};
use sim::seat::header;
use sim::witness::{Reach, SimWitness};

/// Schedules of an ordinary run.
const SCHEDULES: u64 = 20_000;

/// Most standbys.
const STANDBYS: usize = 3;

const PRIMARY: &str = "primary";

/// What is on its way in one direction, and whether the end of the link is next.
#[derive(Default)]
struct Wire {
    frames: VecDeque<(Header, Message)>,
    closed: bool,
    /// What is sent vanishes.
    cut: bool,
}

/// A standby's process.
struct Side {
    name: String,
    core: Standby,
    alive: bool,
    stopped: Duration,
    /// Its link to the primary, by the name that the primary has for it.
    link: Option<LinkId>,
    there: Wire,
    back: Wire,
    events: VecDeque<standby::Event>,
    /// In which epoch it went on, if it did.
    active: Option<Epoch>,
}

/// The primary's process.
struct Live {
    core: Primary,
    alive: bool,
    stopped: Duration,
    events: VecDeque<primary::Event>,
    /// Who takes part in the epoch.
    outlets: Vec<LinkId>,
    /// Position up to which each standby knows the output.
    known: BTreeMap<LinkId, u64>,
    produced: u64,
    released: u64,
    frozen: bool,
    passed: bool,
    next_link: LinkId,
}

struct World {
    seed: u64,
    thrown: u64,
    now: Duration,
    primary: Live,
    sides: Vec<Side>,
    witness: SimWitness,
    /// The newest epoch whose output has left.
    released: Epoch,
    outcomes: Outcomes,
    /// A side that had taken over is dead.
    over: bool,
    /// Tell everything that happens.
    trace: bool,
}

/// How often it came to what: schedules that all came to nothing would keep every promise.
#[derive(Clone, Copy, Debug, Default)]
struct Outcomes {
    protected_by_several: u64,
    renewed: u64,
    taken_over: u64,
    taken_over_in_the_announced_term: u64,
    alone: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let pacing = Pacing { interval: Duration::from_millis(10), ..Pacing::default() };
        let quorum = seed.is_multiple_of(3).then_some(1);
        let settings = Settings { pacing, has_witness: true, quorum, ..Settings::default() };
        let side = |number| Side {
            name: format!("standby {number}"),
            core: Standby::new(format!("standby {number}"), 1 << 30),
            alive: true,
            stopped: Duration::ZERO,
            link: None,
            there: Wire::default(),
            back: Wire::default(),
            events: VecDeque::new(),
            active: None,
        };
        let record = Some(Record { guid: GUID, term: FIRST, owner: PRIMARY.into(), revision: 1 });
        Self {
            seed,
            thrown: 0,
            now: Duration::from_secs(1),
            primary: Live {
                core: Primary::new(settings, GUID, FIRST, layout(), b"machine".to_vec()),
                alive: true,
                stopped: Duration::ZERO,
                events: VecDeque::new(),
                outlets: Vec::new(),
                known: BTreeMap::new(),
                produced: 0,
                released: 0,
                frozen: false,
                passed: false,
                next_link: 0,
            },
            sides: (0..STANDBYS).map(side).collect(),
            witness: SimWitness { record, reach: Reach::Answers, absent: false },
            released: Epoch::NONE,
            outcomes: Outcomes::default(),
            over: false,
            trace: false,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.thrown += 1;
        mix(self.seed, self.thrown, 3) % limit
    }

    fn runs_elsewhere(&self) -> bool {
        self.sides.iter().any(|side| side.active.is_some())
    }

    /// A standby that has no link and waits is reached by the primary.
    fn join(&mut self, index: usize) {
        let (side, primary) = (&mut self.sides[index], &mut self.primary);
        let waits = side.alive && side.link.is_none() && side.core.phase() == standby::Phase::Waiting;
        let mirrors = !matches!(
            primary.core.phase(),
            Phase::Solo
                | Phase::Deciding
                | Phase::Frozen
                | Phase::HandedOver
                | Phase::Suspended
                | Phase::Ended
        );
        if waits && primary.alive && mirrors {
            let link = primary.next_link;
            primary.next_link += 1;
            side.link = Some(link);
            (side.there, side.back) = (Wire::default(), Wire::default());
            primary.events.push_back(primary::Event::Connected { link });
        }
    }

    fn step_primary(&mut self) -> Result<(), String> {
        if !self.primary.alive || self.primary.stopped > self.now {
            return Ok(());
        }
        let event = match self.primary.events.pop_front() {
            Some(event) => event,
            None => match self.below(3) {
                0 => {
                    self.primary.produced += self.thrown % 20;
                    let (produced, released) = (self.primary.produced, self.primary.released);
                    primary::Event::Tick { produced, released, waits: false, dirty: None }
                }
                _ => match self.hear() {
                    Some(event) => event,
                    None => return Ok(()),
                },
            },
        };
        let mut actions = Vec::new();
        let trace = self.trace && !matches!(event, primary::Event::Tick { .. });
        let told = format!("{event:?}");
        self.primary.core.handle(self.now, event, &mut actions);
        if trace || self.trace && !actions.is_empty() {
            eprintln!("{:?} primary (term {}): {told} -> {actions:?}", self.now, self.primary.core.term());
        }
        actions.into_iter().try_for_each(|action| self.perform(action))
    }

    /// What a link brings to the primary.
    fn hear(&mut self) -> Option<primary::Event> {
        let index = self.below(STANDBYS as u64) as usize;
        let side = &mut self.sides[index];
        let link = side.link?;
        if let Some((header, message)) = side.back.frames.pop_front() {
            return Some(primary::Event::Received { link, header, message });
        }
        std::mem::take(&mut side.back.closed)
            .then(|| primary::Event::LinkLost { link, reason: "closed".into() })
    }

    fn to(&mut self, link: LinkId) -> Option<&mut Wire> {
        let side = self.sides.iter_mut().find(|side| side.link == Some(link))?;
        (!side.there.closed && !side.there.cut).then_some(&mut side.there)
    }

    fn perform(&mut self, action: primary::Action) -> Result<(), String> {
        use primary::{Action, Event};
        let term = self.primary.core.term();
        match action {
            Action::Send { link, epoch, message } => self.send(link, term, epoch, message),
            Action::StartTracking { link } => {
                self.primary.events.push_back(Event::Tracking { link, pages: 0 });
            }
            Action::SendRound { link, round } => {
                let digest = Digest::default().value();
                self.send(link, term, Epoch::NONE, Message::RoundEnd { round, pages: 0, digest });
                self.primary.events.push_back(Event::RoundSent { link, pages: 0, bytes: 0 });
            }
            Action::Harvest { link } => {
                self.primary.events.push_back(Event::Harvested { link, pages: 0, disks_lag: false });
            }
            Action::TakeEpoch { links, .. } => {
                self.primary.outlets = links;
                let output_end = self.primary.produced;
                self.primary.events.push_back(Event::Staged { output_end });
            }
            Action::SendEpoch { epoch } => self.send_epoch(term, epoch),
            Action::Release { epoch, output_end } => self.release(epoch, output_end)?,
            Action::Claim { expected } => {
                let claim = self.witness.claim(GUID, expected, PRIMARY);
                self.primary.events.push_back(Event::Claimed(claim));
            }
            Action::PassOutput => {
                self.primary.passed = true;
                self.outcomes.alone += 1;
                if self.runs_elsewhere() {
                    return Err("the primary goes on alone while a standby runs the guest".into());
                }
            }
            Action::Freeze => self.primary.frozen = true,
            Action::Close(link) => {
                if let Some(side) = self.sides.iter_mut().find(|side| side.link == Some(link)) {
                    side.there.closed = true;
                }
            }
            Action::Drain => {
                self.primary.events.push_back(Event::Drained(Ok(self.primary.released)));
            }
            Action::Report(mirror::report::Report::Renewed { .. }) => self.outcomes.renewed += 1,
            Action::Agree { .. }
            | Action::BeatAt { .. }
            | Action::Note { .. }
            | Action::StopTracking
            | Action::Hold
            | Action::StandStill
            | Action::Suspend
            | Action::Resume
            | Action::PutBack
            | Action::Report(_) => {}
        }
        Ok(())
    }

    fn send(&mut self, link: LinkId, term: Term, epoch: Epoch, message: Message) {
        let header = header(Kind::Message, GUID, term, epoch, 1);
        if let Some(wire) = self.to(link) {
            wire.frames.push_back((header, message));
        }
    }

    fn send_epoch(&mut self, term: Term, epoch: Epoch) {
        let (end, released) = (self.primary.produced, self.primary.released);
        for link in self.primary.outlets.clone() {
            let start = self.primary.known.get(&link).copied().unwrap_or(released);
            let mut digest = Digest::default();
            let parts = [
                Message::WriteState(epoch.0.to_le_bytes().to_vec()),
                Message::WriteOutput { start, bytes: vec![b'x'; (end - start) as usize] },
            ];
            for part in parts {
                digest.add(1);
                self.send(link, term, epoch, part);
            }
            let commit = Commit { pages: 0, digest: digest.value(), output_end: end, released };
            self.send(link, term, epoch, Message::Commit(commit));
            self.primary.known.insert(link, end);
            self.primary.events.push_back(primary::Event::EpochSent { link });
        }
    }

    fn release(&mut self, epoch: Epoch, output_end: u64) -> Result<(), String> {
        if self.primary.frozen {
            return Err(format!("a frozen primary releases epoch {epoch}"));
        }
        let behind = |side: &&Side| {
            side.active.is_some_and(|active| active < epoch)
                || self.could_win(side) && side.core.epoch() < epoch
        };
        if let Some(side) = self.sides.iter().find(behind) {
            return Err(format!(
                "epoch {epoch} is released, and {} ({}) may go on from epoch {}",
                side.name,
                side.core.phase().name(),
                side.core.epoch()
            ));
        }
        self.primary.released = output_end;
        self.released = epoch;
        let follow = |session: &primary::Session| session.standing() == primary::Standing::Following;
        let following = self.primary.core.sessions().values().filter(|session| follow(session)).count();
        self.outcomes.protected_by_several += u64::from(following > 1);
        Ok(())
    }

    /// Whether the witness would make this standby the live side if it asked now, in the term that it knows.
    fn could_win(&self, side: &Side) -> bool {
        let record = self.witness.record.as_ref();
        side.alive
            && side.core.epoch() != Epoch::NONE
            && side.active.is_none()
            && record.is_some_and(|record| {
                record.term == side.core.term()
                    || record.owner == PRIMARY && side.core.announced() == Some(record.term)
            })
    }

    fn step_standby(&mut self, index: usize) -> Result<(), String> {
        let now = self.now;
        let tick = self.below(3) == 0;
        let side = &mut self.sides[index];
        if !side.alive || side.stopped > now {
            return Ok(());
        }
        let event = match side.events.pop_front() {
            Some(event) => event,
            None if tick => standby::Event::Tick,
            None => match (side.link, side.there.frames.pop_front()) {
                (Some(link), Some((header, message))) => {
                    standby::Event::Received { link, header, body: Body::Message(message) }
                }
                (Some(link), None) if side.there.closed => {
                    side.link = None;
                    standby::Event::LinkLost { link, reason: "closed".into() }
                }
                _ => return Ok(()),
            },
        };
        let mut actions = Vec::new();
        let told = format!("{event:?}");
        side.core.handle(now, event, &mut actions);
        if self.trace && !actions.is_empty() {
            eprintln!("{now:?} {} (term {}): {told} -> {actions:?}", side.name, side.core.term());
        }
        actions.into_iter().try_for_each(|action| self.obey(index, action))
    }

    fn obey(&mut self, index: usize, action: standby::Action) -> Result<(), String> {
        use standby::{Action, Event};
        let record = self.witness.record.clone();
        let (released, passed) = (self.released, self.primary.passed);
        let elsewhere = self.runs_elsewhere();
        let side = &mut self.sides[index];
        match action {
            Action::Send { link, stamp: (guid, term, epoch), message } => {
                if side.link == Some(link) && !side.back.closed && !side.back.cut {
                    side.back.frames.push_back((header(Kind::Message, guid, term, epoch, 1), message));
                }
            }
            Action::Close(link) => {
                if side.link == Some(link) {
                    side.back.closed = true;
                }
            }
            Action::Allocate { .. } => {
                let witness = match self.witness.reach {
                    Reach::Answers => WitnessView::Record(record),
                    _ => WitnessView::Failed("out of reach".into()),
                };
                side.events.push_back(Event::Allocated { machine: Ok(Vec::new()), witness });
            }
            Action::Apply(_) => side.events.push_back(Event::Applied),
            Action::KeepLog { number, .. } => {
                side.events.push_back(Event::LogKept { number, outcome: Ok(()) });
            }
            Action::Prepare { .. } => side.events.push_back(Event::Prepared(Ok(()))),
            Action::Claim { guid, expected } => {
                let claim = self.witness.claim(guid, expected, &side.name);
                side.events.push_back(Event::Claimed(claim));
            }
            Action::Activate { .. } => {
                let (epoch, term) = (side.core.epoch(), side.core.term());
                side.active = Some(epoch);
                let name = side.name.clone();
                side.events.push_back(Event::Activated(Ok(())));
                self.outcomes.taken_over += 1;
                self.outcomes.taken_over_in_the_announced_term += u64::from(term > FIRST.next());
                if record.is_none_or(|record| record.owner != name || record.term != term) {
                    return Err(format!("{name} goes on in term {term} without a grant"));
                }
                if epoch < released {
                    return Err(format!("{name} goes on from epoch {epoch}, {released} was seen outside"));
                }
                if passed || elsewhere {
                    return Err(format!("{name} goes on while another side is live"));
                }
            }
            Action::TellHeld { .. } | Action::Write(_) | Action::Release | Action::Report(_) => {}
        }
        Ok(())
    }

    fn strike(&mut self) {
        let index = self.below(STANDBYS as u64) as usize;
        let later = self.now + Duration::from_millis(self.below(600));
        match self.below(16) {
            0 => self.kill_primary(),
            1 | 2 => self.kill(index),
            3 => self.primary.stopped = later,
            4 | 5 => self.sides[index].stopped = later,
            6 => self.sides[index].there.cut = true,
            7 => self.sides[index].back.cut = true,
            8 => (self.sides[index].there.closed, self.sides[index].back.closed) = (true, true),
            9 => self.witness.reach = [Reach::Gone, Reach::Mute, Reach::Answers][self.below(3) as usize],
            10 => self.now = later,
            11 => {
                let to = self.sides[index].link;
                self.primary.events.push_back(primary::Event::Switchover { to });
            }
            _ => {}
        }
    }

    fn kill_primary(&mut self) {
        self.primary.alive = false;
        for side in &mut self.sides {
            // Some of what it has sent arrives.
            side.there.closed = true;
        }
        let index = self.below(STANDBYS as u64) as usize;
        let kept = self.below(6) as usize;
        self.sides[index].there.frames.truncate(kept);
    }

    fn kill(&mut self, index: usize) {
        let side = &mut self.sides[index];
        self.over |= side.active.is_some();
        (side.alive, side.back.closed) = (false, true);
        side.active = None;
    }

    fn round(&mut self, pace: u64) -> Result<(), String> {
        match self.below(1 + STANDBYS as u64) as usize {
            0 => self.step_primary()?,
            number => self.step_standby(number - 1)?,
        }
        let passed = self.below(pace);
        self.now += Duration::from_micros(passed);
        Ok(())
    }

    fn run(mut self) -> Result<Outcomes, String> {
        let faults = self.below(7);
        let moves = 1000 + self.below(6000);
        let pace = 1 + self.below(400);
        let mut due: Vec<u64> = (0..faults).map(|_| self.below(moves)).collect();
        due.sort_unstable();
        for number in 0..moves {
            while due.first() == Some(&number) {
                due.remove(0);
                self.strike();
            }
            if self.below(100) == 0 || number < 10 {
                let index = self.below(STANDBYS as u64) as usize;
                self.join(index);
            }
            self.round(pace)?;
        }
        let candidates: Vec<usize> = (0..STANDBYS).filter(|&at| self.could_win(&self.sides[at])).collect();
        self.settle(Duration::from_secs(12))?;
        if !self.someone_runs_it() {
            // A side that was not heard for as long as is too long, by chance, may have been lost just now.
            self.settle(Duration::from_secs(2))?;
        }
        let someone = self.someone_runs_it();
        if self.primary.alive && !someone {
            let sides: Vec<_> = self
                .sides
                .iter()
                .map(|side| (&side.name, side.alive, side.core.phase(), side.core.term()))
                .collect();
            return Err(format!(
                "nobody runs the guest; the primary is {}, {sides:?}, {:?}",
                self.primary.core.phase().name(),
                self.witness.record
            ));
        }
        if !self.primary.alive && !candidates.is_empty() && !someone {
            return Err(format!("the primary is dead, and none of {candidates:?} went on"));
        }
        Ok(self.outcomes)
    }

    /// Whether the guest runs, or did on a side that is dead.
    fn someone_runs_it(&mut self) -> bool {
        // Whoever had the word is dead.
        let owner = self.witness.record.as_ref().map_or("", |record| record.owner.as_str());
        self.over |= self.sides.iter().any(|side| side.name == owner && !side.alive);
        self.over || self.runs_elsewhere() || self.primary.alive && !self.primary.frozen
    }

    /// All faults end, and `time` passes.
    fn settle(&mut self, time: Duration) -> Result<(), String> {
        self.witness.reach = Reach::Answers;
        for side in &mut self.sides {
            if side.there.cut || side.back.cut {
                (side.there.closed, side.back.closed) = (true, true);
            }
        }
        let until = self.now + time;
        while self.now < until {
            self.round(4000)?;
        }
        Ok(())
    }
}

fn schedule(seed: u64) -> Outcomes {
    World::new(seed).run().unwrap_or_else(|broken| panic!("schedule {seed}: {broken}"))
}

fn wanted() -> u64 {
    let number = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    number("UNDERSTUDY_SCHEDULES").unwrap_or(SCHEDULES)
}

/// Tells everything that happens in the schedule `UNDERSTUDY_SCHEDULE`.
#[test]
fn schedule_that_is_asked_for_is_told() {
    let asked = std::env::var("UNDERSTUDY_SCHEDULE").ok().and_then(|value| value.parse().ok());
    if let Some(seed) = asked {
        let mut world = World::new(seed);
        world.trace = true;
        world.run().unwrap_or_else(|broken| panic!("schedule {seed}: {broken}"));
    }
}

/// A standby was lost in the last milliseconds of it, and the one that took over had not heard of its grant yet.
#[test]
fn schedule_may_end_only_when_the_word_of_the_witness_is_heard() {
    schedule(1_882_518_660_910_693);
}

#[test]
fn no_schedule_of_several_standbys_breaks_a_promise() {
    let threads = std::thread::available_parallelism().map_or(2, usize::from).min(8) as u64;
    let first = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs() << 20);
    println!("schedules from {first} on");
    let total = std::sync::Mutex::new(Outcomes::default());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let total = &total;
            scope.spawn(move || {
                for number in 0..wanted().div_ceil(threads) {
                    let outcomes = schedule(first + number * threads + thread);
                    let mut total = total.lock().unwrap();
                    total.protected_by_several += u64::from(outcomes.protected_by_several > 0);
                    total.renewed += u64::from(outcomes.renewed > 0);
                    total.taken_over += u64::from(outcomes.taken_over > 0);
                    total.taken_over_in_the_announced_term +=
                        u64::from(outcomes.taken_over_in_the_announced_term > 0);
                    total.alone += u64::from(outcomes.alone > 0);
                }
            });
        }
    });
    let total = total.into_inner().unwrap();
    println!("{total:?}");
    let counts = [
        total.protected_by_several,
        total.renewed,
        total.taken_over,
        total.taken_over_in_the_announced_term,
        total.alone,
    ];
    let least = wanted() / 1000;
    assert!(
        counts.iter().all(|&count| count >= least),
        "of {} schedules came to each outcome: {total:?}",
        wanted()
    );
}
