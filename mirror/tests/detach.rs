//! A guest is to go on without its standby: each moment of that, and what becomes of it when a side or the link is lost then.

mod sim;

use std::time::Duration;

use mirror::ids::Epoch;
use mirror::primary;
use mirror::report::Report;
use mirror::standby;

use sim::Side;
use sim::world::{Outcome, World};

/// A moment.
struct Point {
    name: &'static str,
    reached: fn(&World) -> bool,
    /// Whether the standby has forgotten the guest by then.
    forgotten: bool,
}

fn releasing(world: &World) -> bool {
    world.primary.core.phase() == primary::Phase::Releasing
}

fn forgotten(world: &World) -> bool {
    world.standby.core.phase() == standby::Phase::Waiting
}

const POINTS: &[Point] = &[
    Point {
        name: "before the standby is told",
        reached: |w| releasing(w) && (!w.primary.jobs.is_empty() || !w.primary.end.outgoing.is_empty()),
        forgotten: false,
    },
    Point {
        name: "while it is being told",
        reached: |w| releasing(w) && w.primary.end.outgoing.is_empty() && !w.to_standby.frames.is_empty(),
        forgotten: false,
    },
    Point {
        name: "when it has forgotten and the primary does not know",
        reached: |w| releasing(w) && forgotten(w),
        forgotten: true,
    },
];

/// A world in which the standby was wanted no longer after epoch 3, while nothing was under way.
fn asked(mut world: World) -> World {
    let reached = world.run_until(60_000, |w| {
        w.primary.core.epoch() == Epoch(3) && w.primary.core.is_running_epoch() && w.primary.jobs.is_empty()
    });
    assert_eq!(reached, Ok(true));
    assert!(world.detach());
    world
}

fn world_at(point: &Point) -> World {
    let mut world = asked(World::new(u64::MAX, Duration::ZERO));
    assert_eq!(world.run_until(60_000, point.reached), Ok(true), "{}: never reached", point.name);
    world
}

fn detached(world: &World) -> bool {
    world.primary.reports.iter().any(|report| matches!(report, Report::Detached { .. }))
}

#[test]
fn guest_goes_on_alone_and_the_standby_forgets_it() {
    for world in [World::new(u64::MAX, Duration::ZERO), World::without_witness(u64::MAX, Duration::ZERO)] {
        let mut world = asked(world);
        assert_eq!(world.settle(), Ok(Outcome::Solo));
        assert!(detached(&world) && forgotten(&world));
        assert!(
            world.primary.reports.iter().all(|report| !matches!(report, Report::Solo { .. })),
            "asked nobody"
        );
    }
}

#[test]
fn seeding_is_broken_off_and_the_guest_runs_on() {
    let mut world = World::new(u64::MAX, Duration::ZERO);
    let seeding = |w: &World| w.primary.round() == 2 && w.primary.jobs.is_empty();
    assert_eq!(world.run_until(60_000, seeding), Ok(true));
    assert!(world.detach());
    assert_eq!(world.settle(), Ok(Outcome::Solo));
    assert!(detached(&world));
    let step = world.primary.guest.cpu.step;
    assert_eq!(world.run_until(60_000, |w| w.primary.guest.cpu.step > step + 10), Ok(true));
}

#[test]
fn epoch_that_is_under_way_is_committed_first() {
    let mut world = World::new(u64::MAX, Duration::ZERO);
    let under_way = |w: &World| {
        w.primary.core.epoch() == Epoch(3) && !w.primary.core.is_running_epoch() && w.primary.jobs.is_empty()
    };
    assert_eq!(world.run_until(60_000, under_way), Ok(true));
    assert!(world.detach());
    assert_eq!(world.settle(), Ok(Outcome::Solo));
    assert!(detached(&world));
    assert_eq!(world.primary.core.epoch(), Epoch(4));
}

#[test]
fn lost_primary_is_taken_over_unless_the_standby_was_told_to_forget() {
    for point in POINTS {
        for (arriving, noticed) in [(0, true), (usize::MAX, true), (0, false), (usize::MAX, false)] {
            let case = format!("{}, {arriving} frames arrive, noticed: {noticed}", point.name);
            let mut world = world_at(point);
            world.kill(Side::Primary, arriving, noticed);
            let outcome = world.settle();
            let told = point.forgotten || arriving > 0;
            let fine = matches!(outcome, Ok(Outcome::Active(Epoch(3))) if !point.forgotten)
                || matches!(outcome, Ok(Outcome::Refused | Outcome::Dead) if told);
            assert!(fine, "{case}: {outcome:?}");
        }
    }
}

#[test]
fn lost_standby_leaves_the_guest_alone_as_was_wished() {
    for point in POINTS {
        for (arriving, noticed) in [(0, true), (usize::MAX, true), (0, false), (usize::MAX, false)] {
            let mut world = world_at(point);
            world.kill(Side::Standby, arriving, noticed);
            assert_eq!(world.settle(), Ok(Outcome::Solo), "{}, {arriving} frames, {noticed}", point.name);
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
            let outcome = world.settle();
            let one = matches!(outcome, Ok(Outcome::Solo | Outcome::Active(_)));
            assert!(one, "{}, {cut:?}: {outcome:?}", point.name);
        }
    }
}

#[test]
fn nothing_to_detach_from_is_said() {
    let mut world = asked(World::new(u64::MAX, Duration::ZERO));
    assert_eq!(world.settle(), Ok(Outcome::Solo));
    assert_eq!(world.run_until(1000, |w| w.primary.jobs.is_empty()), Ok(true));
    assert!(world.detach());
    assert_eq!(world.run_until(1000, |w| w.primary.jobs.is_empty()), Ok(true));
    let failed = |report: &Report| matches!(report, Report::DetachFailed { .. });
    assert!(world.primary.reports.iter().any(failed));
}
