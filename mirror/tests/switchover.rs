//! Each moment of a planned hand-over, and what becomes of the guest when a side or the link is lost at that moment.

mod sim;

use std::time::Duration;

use mirror::ids::Epoch;
use mirror::report::Report;
use mirror::{primary, standby};

use sim::Side;
use sim::primary_host::Job;
use sim::standby_host;
use sim::world::{Outcome, World};

/// The last epoch before the hand-over.
const LAST: Epoch = Epoch(4);

/// A moment of a hand-over.
struct Point {
    name: &'static str,
    reached: fn(&World) -> bool,
    /// Whether the witness has given the guest to the standby by then.
    claimed: bool,
}

fn handing_over(world: &World) -> bool {
    world.primary.core.phase() == primary::Phase::HandingOver
}

fn standby_has(world: &World, phase: standby::Phase) -> bool {
    world.standby.core.phase() == phase
}

fn prepares(world: &World) -> bool {
    let prepare =
        |job: &standby_host::Job| matches!(job, standby_host::Job::Act(standby::Action::Prepare { .. }));
    world.standby.jobs.iter().any(prepare)
}

const POINTS: &[Point] = &[
    Point {
        name: "in the last pause",
        reached: |w| w.primary.standing && w.primary.guest.paused && !w.primary.is_captured(),
        claimed: false,
    },
    Point {
        name: "in the middle of sending the last epoch",
        reached: |w| w.primary.standing && w.primary.is_captured() && w.primary.end.outgoing.len() > 1,
        claimed: false,
    },
    Point {
        name: "after the last commit, before its answer arrives",
        reached: |w| w.primary.core.epoch() < LAST && w.standby.core.epoch() == LAST,
        claimed: false,
    },
    Point {
        name: "while what is left drains",
        reached: |w| w.primary.jobs.iter().any(|job| matches!(job, Job::Act(primary::Action::Drain))),
        claimed: false,
    },
    Point {
        name: "before the guest is given up",
        reached: |w| handing_over(w) && (!w.primary.jobs.is_empty() || !w.primary.end.outgoing.is_empty()),
        claimed: false,
    },
    Point {
        name: "with the guest on the wire",
        reached: |w| handing_over(w) && w.primary.end.outgoing.is_empty() && !w.to_standby.frames.is_empty(),
        claimed: false,
    },
    Point { name: "while the standby makes sure that it can", reached: prepares, claimed: false },
    Point {
        name: "before the standby claims",
        reached: |w| standby_has(w, standby::Phase::Claiming) && !w.standby.jobs.is_empty(),
        claimed: false,
    },
    Point {
        name: "after the standby has claimed",
        reached: |w| standby_has(w, standby::Phase::Claiming) && w.standby.jobs.is_empty(),
        claimed: true,
    },
    Point {
        name: "while the guest runs on the standby and the primary does not know",
        reached: |w| standby_has(w, standby::Phase::Active) && handing_over(w),
        claimed: true,
    },
];

/// A world in which a switchover was asked for after epoch 3, with the guest printing and writing.
fn asked(mut world: World) -> World {
    let reached = world.run_until(60_000, |w| {
        w.primary.core.epoch() == Epoch(3) && w.primary.core.is_running_epoch() && w.primary.jobs.is_empty()
    });
    assert_eq!(reached, Ok(true));
    assert!(world.switch_over());
    world
}

fn world_at(point: &Point) -> World {
    let mut world = asked(World::new(u64::MAX, Duration::ZERO));
    assert_eq!(world.run_until(60_000, point.reached), Ok(true), "{}: never reached", point.name);
    world
}

/// Whether the primary, once it has done what it was ordered, has reported so.
fn reported(world: &mut World, wanted: fn(&Report) -> bool) -> bool {
    assert_eq!(world.run_until(10_000, |w| w.primary.jobs.is_empty()), Ok(true));
    world.primary.reports.iter().any(wanted)
}

fn failed(report: &Report) -> bool {
    matches!(report, Report::SwitchoverFailed { .. })
}

#[test]
fn guest_goes_on_at_the_standby_with_nothing_lost_or_repeated() {
    for world in [World::new(u64::MAX, Duration::ZERO), World::without_witness(u64::MAX, Duration::ZERO)] {
        let mut world = asked(world);
        assert_eq!(world.settle(), Ok(Outcome::Active(LAST)));
        assert_eq!(world.primary.core.phase(), primary::Phase::HandedOver);
        let told = |report: &Report| matches!(report, Report::HandedOver { pause_us, .. } if *pause_us > 0);
        assert!(reported(&mut world, told) && !reported(&mut world, failed));
        assert_eq!(world.outside.repeated, 0, "each byte left on one side");
    }
}

#[test]
fn lost_primary_changes_nothing_for_the_standby() {
    for point in POINTS {
        for (arriving, noticed) in [(0, true), (usize::MAX, true), (0, false), (usize::MAX, false)] {
            let case = format!("{}, {arriving} frames arrive, noticed: {noticed}", point.name);
            let mut world = world_at(point);
            world.kill(Side::Primary, arriving, noticed);
            let outcome = world.settle();
            assert!(matches!(outcome, Ok(Outcome::Active(Epoch(3) | LAST))), "{case}: {outcome:?}");
        }
    }
}

#[test]
fn lost_standby_gives_the_guest_back_unless_it_was_the_owner_by_then() {
    for point in POINTS {
        for (arriving, noticed) in [(0, true), (usize::MAX, true), (0, false), (usize::MAX, false)] {
            let case = format!("{}, {arriving} frames arrive, noticed: {noticed}", point.name);
            let mut world = world_at(point);
            world.kill(Side::Standby, arriving, noticed);
            let expected = if point.claimed { Outcome::Dead } else { Outcome::Solo };
            assert_eq!(world.settle(), Ok(expected), "{case}");
            if !point.claimed {
                assert!(reported(&mut world, failed), "{case}: nobody is told");
                let step = world.primary.guest.cpu.step;
                let runs = world.run_until(60_000, |w| w.primary.guest.cpu.step > step + 10);
                assert_eq!(runs, Ok(true), "{case}: the guest stands still");
            }
        }
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
fn without_a_witness_a_guest_that_was_given_up_stays_given_up() {
    let mut world = asked(World::without_witness(u64::MAX, Duration::ZERO));
    assert_eq!(world.run_until(60_000, handing_over), Ok(true));
    world.kill(Side::Standby, 0, true);
    assert_eq!(world.settle(), Ok(Outcome::Dead));
    assert!(reported(&mut world, failed) && world.primary.frozen);
}

#[test]
fn switchover_is_refused_while_there_is_nothing_to_hand_over() {
    let mut world = World::new(u64::MAX, Duration::ZERO);
    assert_eq!(world.run_until(60_000, |w| w.primary.round() == 1 && w.primary.jobs.is_empty()), Ok(true));
    assert!(world.switch_over());
    assert_eq!(world.settle(), Ok(Outcome::Protected));
    assert!(reported(&mut world, failed));
}
