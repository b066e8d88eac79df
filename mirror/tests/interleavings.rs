//! Random interleavings of everything that can go wrong, with the promises checked after every move.
//!
//! `UNDERSTUDY_SCHEDULES=1000000` (or `PROPTEST_CASES`) runs more of them; a schedule that breaks a promise is printed
//! in the form in which it can be kept below as a test.

mod sim;

use std::thread;
use std::time::Duration;

use mirror::ids::Epoch;
use mirror::report::Report;
use mirror::{primary, standby};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use sim::Side;
use sim::schedule::{Fault, Schedule, schedules};
use sim::witness::Reach;
use sim::world::{Outcome, World};

/// Schedules of an ordinary run.
const SCHEDULES: u32 = 10_000;

fn wanted() -> u32 {
    let number = |name| std::env::var(name).ok().and_then(|value: String| value.parse().ok());
    number("UNDERSTUDY_SCHEDULES").or_else(|| number("PROPTEST_CASES")).unwrap_or(SCHEDULES)
}

#[test]
fn no_interleaving_breaks_a_promise() {
    let threads = thread::available_parallelism().map_or(2, usize::from).min(8) as u32;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let cases = wanted().div_ceil(threads);
                let mut runner =
                    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
                let outcome = runner
                    .run(&schedules(), |schedule| schedule.run().map(drop).map_err(TestCaseError::fail));
                if let Err(broken) = outcome {
                    panic!("{broken}");
                }
            });
        }
    });
}

/// A test of the test: schedules that all came to nothing would keep every promise.
#[test]
fn schedules_come_to_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let (mut solo, mut active, mut later, mut protected, mut refused, mut dead) = (0, 0, 0, 0, 0, 0);
    for _ in 0..600 {
        let schedule = schedules().new_tree(&mut runner).expect("no filter rejects a schedule").current();
        match schedule.run().unwrap_or_else(|broken| panic!("{broken}: {schedule:?}")) {
            Outcome::Solo => solo += 1,
            Outcome::Active(Epoch(1)) => active += 1,
            Outcome::Active(_) => later += 1,
            Outcome::Protected => protected += 1,
            Outcome::Refused => refused += 1,
            Outcome::Dead => dead += 1,
        }
    }
    let counts = [solo, active, later, protected, refused, dead];
    assert!(counts.iter().all(|&count| count >= 10), "of 600 schedules came to each outcome: {counts:?}");
}

/// A schedule that breaks a promise when the rule that its test is named after is taken away.
fn kept(
    seed: u64,
    protected: bool,
    moves: u16,
    pause_budget_us: u64,
    witness: bool,
    faults: Vec<(u16, Fault)>,
) {
    let schedule = Schedule {
        seed,
        protected,
        moves,
        ends_after: u64::MAX,
        pause_budget_us,
        witness,
        second_link: false,
        faults,
        later: Vec::new(),
    };
    if let Err(broken) = schedule.run() {
        panic!("{broken}: {schedule:?}");
    }
}

#[test]
fn cut_of_the_mirror_link_alone_leaves_the_guest_where_it_is() {
    let mut world = World::new(u64::MAX, Duration::from_millis(10));
    world.open_second_link();
    assert!(world.run_until(20_000, |world| world.primary.core.epoch() > Epoch(2)).unwrap());
    (world.to_primary.cut, world.to_standby.cut) = (true, true);
    let decided = |world: &World| {
        world.primary.core.phase() == primary::Phase::Solo
            && world.standby.core.phase() == standby::Phase::Waiting
    };
    assert!(world.run_until(200_000, decided).unwrap(), "standby {}", world.standby.core.phase().name());
    let heard = |report: &Report| matches!(report, Report::HeardElsewhere { .. });
    assert!(world.standby.reports.iter().any(heard), "{:?}", world.standby.reports);
}

#[test]
fn standby_that_asks_a_silent_witness_acknowledges_nothing() {
    let faults = vec![(0, Fault::Witness(Reach::Gone)), (22, Fault::Stop(Side::Primary, 228))];
    kept(2_304_602_203_364_877_573, true, 6579, 10_000, true, faults);
}

#[test]
fn flipped_bit_in_a_page_loses_the_link_and_not_the_page() {
    let faults =
        vec![(720, Fault::Flip(Side::Standby, 1, 1056)), (767, Fault::Kill(Side::Primary, 2, false))];
    kept(10_672_239_850_356_678_622, false, 12_406, 0, false, faults);
}
