//! Random interleavings of everything that can go wrong, with the promises checked after every move.
//!
//! `UNDERSTUDY_SCHEDULES=1000000` (or `PROPTEST_CASES`) runs more of them; a schedule that breaks a promise is printed
//! in the form in which it can be kept below as a test.

mod sim;

use std::thread;

use mirror::ids::Epoch;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use sim::schedule::schedules;
use sim::world::Outcome;

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
