//! Each moment of an epoch and of seeding, and what becomes of the guest when a side is lost at that moment.

mod sim;

use std::time::Duration;

use mirror::ids::Epoch;
use mirror::report::Report;
use mirror::{primary, standby};

use sim::Side;
use sim::primary_host::{FIRST, Job};
use sim::standby_host;
use sim::world::{Outcome, World};

/// A moment at which a side is lost.
struct Point {
    name: &'static str,
    /// Whether the world has come to it.
    reached: fn(&World) -> bool,
    /// The epoch from which the standby goes on when the primary is lost with all that is on the wire; 0: it refuses.
    without_wire: u64,
    /// The same, if what is on the wire still arrives.
    with_wire: u64,
    /// Whether the primary must ask the witness when the standby is lost.
    asks: bool,
}

const fn point(
    name: &'static str,
    reached: fn(&World) -> bool,
    (without_wire, with_wire): (u64, u64),
    asks: bool,
) -> Point {
    Point { name, reached, without_wire, with_wire, asks }
}

fn joining(world: &World, phase: standby::Phase) -> bool {
    world.primary.core.phase() == primary::Phase::Joining && world.standby.core.phase() == phase
}

fn seeding(world: &World, round: u32) -> bool {
    world.primary.core.phase() == primary::Phase::Seeding && world.primary.round() == round
}

fn half_sent(world: &World, round: u32) -> bool {
    seeding(world, round) && !world.primary.end.outgoing.is_empty() && !world.to_standby.frames.is_empty()
}

fn sent(world: &World, round: u32) -> bool {
    seeding(world, round)
        && world.standby.core.sense().rounds + 1 == u64::from(round)
        && world.primary.jobs.is_empty()
        && world.primary.end.outgoing.is_empty()
        && !world.to_standby.frames.is_empty()
}

fn acknowledged(world: &World, round: u32) -> bool {
    let harvest = |job: &Job| matches!(job, Job::Act(primary::Action::Harvest { .. }));
    seeding(world, round) && world.primary.jobs.iter().any(harvest)
}

/// The primary has `acked`, the standby holds `held`.
fn epochs(world: &World, acked: u64, held: u64) -> bool {
    (world.primary.core.epoch(), world.standby.core.epoch()) == (Epoch(acked), Epoch(held))
}

fn resumed(world: &World) -> bool {
    world.primary.is_captured() && !world.primary.guest.paused && world.primary.jobs.is_empty()
}

fn half_sent_epoch(world: &World, acked: u64) -> bool {
    epochs(world, acked, acked)
        && resumed(world)
        && world.primary.answers.is_empty()
        && world.primary.end.outgoing.len() > 1
        && !world.to_standby.frames.is_empty()
}

fn commit_sent(world: &World, acked: u64) -> bool {
    epochs(world, acked, acked)
        && resumed(world)
        && world.primary.answers.is_empty()
        && world.primary.end.outgoing.is_empty()
        && !world.to_standby.frames.is_empty()
}

/// All but the last pages of the epoch are in memory; its answer has long been sent.
fn applying(world: &World, epoch: u64) -> bool {
    let jobs = &world.standby.jobs;
    let is_page = |job: &standby_host::Job| matches!(job, standby_host::Job::Apply(..));
    let left = jobs.iter().filter(|job| is_page(job)).count();
    world.standby.core.epoch() == Epoch(epoch) && jobs.front().is_some_and(is_page) && left <= 2
}

fn releasing(world: &World) -> bool {
    let release = |job: &Job| matches!(job, Job::Act(primary::Action::Release { .. }));
    epochs(world, 4, 4) && world.primary.jobs.iter().any(release)
}

/// Epoch 4 is the one that the names speak of.
const POINTS: &[Point] = &[
    point("before space is granted", |w| joining(w, standby::Phase::Waiting), (0, 0), false),
    point("before memory is allocated", |w| joining(w, standby::Phase::Reserved), (0, 0), false),
    point("after allocation", |w| joining(w, standby::Phase::Allocated), (0, 0), false),
    point("in the middle of seeding round 1", |w| half_sent(w, 1), (0, 0), false),
    point("after sending round 1, before its answer", |w| sent(w, 1), (0, 0), false),
    point("after the answer to round 1", |w| acknowledged(w, 1), (0, 0), false),
    point("in the middle of seeding round 2", |w| half_sent(w, 2), (0, 0), false),
    point("after sending round 2, before its answer", |w| sent(w, 2), (0, 0), false),
    point("after the answer to round 2", |w| acknowledged(w, 2), (0, 0), false),
    point("in the middle of seeding round 3", |w| half_sent(w, 3), (0, 0), false),
    point("after sending round 3, before its answer", |w| sent(w, 3), (0, 0), false),
    point("after the answer to round 3", |w| acknowledged(w, 3), (0, 0), false),
    point(
        "in the final pause of seeding",
        |w| epochs(w, 0, 0) && w.primary.guest.paused && w.primary.pages_copied() > 0,
        (0, 0),
        false,
    ),
    point("in the middle of sending the first epoch", |w| half_sent_epoch(w, 0), (0, 0), true),
    point("after sending the first commit, before it arrives", |w| commit_sent(w, 0), (0, 1), true),
    point("in the application of the first epoch", |w| applying(w, 1), (1, 1), true),
    point("after the first commit, before its answer arrives", |w| epochs(w, 0, 1), (1, 1), true),
    point(
        "before the pause",
        |w| epochs(w, 3, 3) && w.primary.core.is_running_epoch() && w.primary.jobs.is_empty(),
        (3, 3),
        true,
    ),
    point(
        "in the pause, before the harvest",
        |w| {
            let harvest = matches!(w.primary.jobs.front(), Some(Job::Harvest));
            epochs(w, 3, 3) && w.primary.guest.paused && harvest
        },
        (3, 3),
        true,
    ),
    point(
        "in the copy",
        |w| {
            let copy = matches!(w.primary.jobs.front(), Some(Job::Copy(_)));
            epochs(w, 3, 3) && copy && w.primary.pages_copied() > 0
        },
        (3, 3),
        true,
    ),
    point(
        "after the copy, before the guest goes on",
        |w| epochs(w, 3, 3) && w.primary.guest.paused && w.primary.is_captured(),
        (3, 3),
        true,
    ),
    point("after the pause, before sending", |w| epochs(w, 3, 3) && resumed(w), (3, 3), true),
    point("in the middle of sending", |w| half_sent_epoch(w, 3), (3, 3), true),
    point("after sending the commit, before it arrives", |w| commit_sent(w, 3), (3, 4), true),
    point("after the commit, before its answer arrives", |w| epochs(w, 3, 4), (4, 4), true),
    point("in the application of the epoch", |w| applying(w, 4), (4, 4), true),
    point(
        "with the answer on the wire",
        |w| epochs(w, 3, 4) && !w.to_primary.frames.is_empty(),
        (4, 4),
        true,
    ),
    point("after the answer, before the release", releasing, (4, 4), true),
    point(
        "in the middle of the release",
        |w| epochs(w, 4, 4) && w.primary.console.allowed() > w.primary.console.written(),
        (4, 4),
        true,
    ),
    point(
        "after the release",
        |w| {
            let console = &w.primary.console;
            epochs(w, 4, 4) && w.primary.jobs.is_empty() && console.allowed() == console.written()
        },
        (4, 4),
        true,
    ),
];

/// A world that has come to `point`, with the guest printing and writing.
fn world_at(point: &Point) -> World {
    let mut world = World::new(u64::MAX, Duration::ZERO);
    let reached = world.run_until(60_000, point.reached);
    assert_eq!(reached, Ok(true), "{}: the world never came to this point", point.name);
    world
}

fn resumption(epoch: u64) -> Outcome {
    if epoch == 0 { Outcome::Refused } else { Outcome::Active(Epoch(epoch)) }
}

#[test]
fn lost_primary_is_followed_by_the_standby_from_the_last_whole_epoch() {
    for point in POINTS {
        for (arriving, epoch) in [(0, point.without_wire), (usize::MAX, point.with_wire)] {
            for noticed in [true, false] {
                let case = format!("{}, {arriving} frames arrive, noticed: {noticed}", point.name);
                let mut world = world_at(point);
                world.kill(Side::Primary, arriving, noticed);
                assert_eq!(world.settle(), Ok(resumption(epoch)), "{case}");
                let says_why =
                    world.standby.reports.iter().any(|report| matches!(report, Report::Refused { .. }));
                let joined =
                    world.standby.reports.iter().any(|report| matches!(report, Report::Joined { .. }));
                assert_eq!(says_why, epoch == 0 && joined, "{case}: {:?}", world.standby.reports);
            }
        }
    }
}

#[test]
fn lost_standby_leaves_the_primary_alone_with_nothing_lost() {
    for point in POINTS {
        for (arriving, noticed) in [(0, true), (usize::MAX, true), (0, false), (usize::MAX, false)] {
            let case = format!("{}, {arriving} frames arrive, noticed: {noticed}", point.name);
            let mut world = world_at(point);
            world.kill(Side::Standby, arriving, noticed);
            assert_eq!(world.settle(), Ok(Outcome::Solo), "{case}");
            let asked = world.witness.granted(Side::Primary.name(), FIRST);
            // The pause may be over and the commit on its way before the loss is noticed: then it is asked, too.
            assert!(asked || !point.asks, "{case}: went on without asking the witness");
        }
    }
}

#[test]
fn primary_that_slept_through_its_replacement_freezes_and_releases_nothing() {
    for point in POINTS {
        let mut world = world_at(point);
        let awake = world.now + Duration::from_secs(1);
        world.stopped[Side::Primary as usize] = awake;
        assert_eq!(world.run_until(1_000_000, |w| w.now >= awake), Ok(true), "{}", point.name);
        if world.standby.core.guid().is_none() && world.standby.reports.is_empty() {
            // A standby without an allocation has no heartbeat to miss: seeding goes on.
            assert_eq!(world.settle(), Ok(Outcome::Protected), "{}", point.name);
            continue;
        }
        let expected = match point.with_wire {
            0 => Outcome::Solo,
            epoch => Outcome::Active(Epoch(epoch)),
        };
        assert_eq!(world.settle(), Ok(expected), "{}", point.name);
        assert_eq!(world.primary.frozen, point.with_wire != 0, "{}", point.name);
    }
}

#[test]
fn standby_that_slept_through_its_loss_is_fenced() {
    for point in POINTS {
        let mut world = world_at(point);
        let awake = world.now + Duration::from_secs(1);
        world.stopped[Side::Standby as usize] = awake;
        assert_eq!(world.run_until(1_000_000, |w| w.now >= awake), Ok(true), "{}", point.name);
        if !world.primary.passed {
            // The primary is patient as long as it joins; a standby that holds memory already gives it up.
            assert!(!point.asks, "{}: the loss was not noticed", point.name);
            let outcome = world.settle();
            assert!(matches!(outcome, Ok(Outcome::Protected | Outcome::Solo)), "{}: {outcome:?}", point.name);
            continue;
        }
        assert_eq!(world.settle(), Ok(Outcome::Solo), "{}", point.name);
        let later = world.now + Duration::from_secs(7);
        assert_eq!(world.run_until(2_000_000, |w| w.now >= later), Ok(true), "{}", point.name);
        assert_eq!(world.standby.core.phase(), standby::Phase::Waiting, "{}", point.name);
        assert!(world.standby.guest.is_none(), "{}", point.name);
    }
}

#[test]
fn cut_link_leaves_exactly_one_side() {
    for point in POINTS {
        for cut in [&[Side::Primary][..], &[Side::Standby], &[Side::Primary, Side::Standby]] {
            let mut world = world_at(point);
            for &side in cut {
                world.wire_to(side).cut = true;
            }
            let later = world.now + Duration::from_secs(1);
            assert_eq!(world.run_until(1_000_000, |w| w.now >= later), Ok(true), "{}, {cut:?}", point.name);
            let outcome = world.settle();
            let one = matches!(outcome, Ok(Outcome::Solo | Outcome::Active(_)));
            assert!(one, "{}, {cut:?}: {outcome:?}", point.name);
        }
    }
}

#[test]
fn either_side_may_be_lost_between_any_two_moves() {
    let mut moves = 0;
    let mut whole = World::new(u64::MAX, Duration::ZERO);
    while whole.primary.core.epoch() < Epoch(3) {
        whole.fair_move(Duration::from_micros(100)).expect("no promise is broken without a fault");
        moves += 1;
    }
    for victim in [Side::Primary, Side::Standby] {
        // Each way to die meets every third move, and together they meet every one.
        for (start, arriving, noticed) in [(0, 0, true), (1, usize::MAX, true), (2, 1, false)] {
            for at in (start..moves).step_by(3) {
                let mut world = World::new(u64::MAX, Duration::ZERO);
                for _ in 0..at {
                    world
                        .fair_move(Duration::from_micros(100))
                        .expect("no promise is broken without a fault");
                }
                world.kill(victim, arriving, noticed);
                let outcome = world.settle();
                let case =
                    format!("{victim:?} lost after move {at}, {arriving} frames arrive, noticed: {noticed}");
                match (victim, outcome) {
                    (Side::Primary, Ok(Outcome::Active(_) | Outcome::Refused)) | (_, Ok(Outcome::Solo)) => {}
                    (_, outcome) => panic!("{case}: {outcome:?}"),
                }
            }
        }
    }
}
