//! A guest that is mirrored to two standbys at once. Real processes.

use std::fs;
use std::path::PathBuf;

use mirror::report::Report;
use rustix::process::Signal;
use tests::counting::{assert_nothing_missing, await_active, await_protection, counts, counts_on, joined};
use tests::pair::await_report;
use tests::process::{Process, configuration};

/// What is tried here does not hang on how soon a loss is noticed.
const PATIENT: [&str; 4] = ["--heartbeat-ms", "200", "--heartbeat-misses", "25"];

/// Three places at which sides listen, and a witness.
struct Places(tempfile::TempDir);

impl Places {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn link(&self, place: &str) -> String {
        format!("unix:{}", self.path(place).display())
    }

    fn witness(&self) -> String {
        self.path("witness").display().to_string()
    }

    /// A side that waits at `place`, and mirrors a guest that it runs to both others.
    fn standby(&self, place: &str) -> Process {
        let others: Vec<String> =
            ["a", "b", "c"].iter().filter(|other| **other != place).map(|other| self.link(other)).collect();
        let (witness, api) = (self.witness(), self.path(&format!("{place}.sock")).display().to_string());
        let mut arguments = vec!["--witness", &witness, "--api-sock", &api, "--standbys-at-once", "2"];
        for other in &others {
            arguments.extend(["--standby", other]);
        }
        Process::standby_with(&self.link(place), &[&arguments[..], &PATIENT[..]].concat())
    }

    /// A guest at `a`, mirrored to `b` and `c`, which waits at `a` once it runs elsewhere.
    fn primary(&self) -> Process {
        let mirror = format!(
            r#""standby": ["{}", "{}"], "standbys_at_once": 2, "witness": "{}", "heartbeat_ms": 200, "heartbeat_misses": 25"#,
            self.link("b"),
            self.link("c"),
            self.witness()
        );
        let config = configuration(self.0.path(), "embedded:guest", Some(&mirror));
        let api = self.path("a.sock").display().to_string();
        Process::start(&["run", "--config-file", &config, "--listen", &self.link("a"), "--api-sock", &api])
    }

    /// A guest in lockstep with both.
    fn three(&self) -> (Process, Process, Process) {
        let (b, c) = (self.standby("b"), self.standby("c"));
        let a = self.primary();
        await_second(&a);
        await_protection(&b);
        await_protection(&c);
        a.console.await_text(|text| counts(text).len() > 20);
        (a, b, c)
    }
}

/// Waits until two standbys hold the guest that `side` runs.
fn await_second(side: &Process) {
    await_report(&side.reports, |report| matches!(report, Report::StandbyGained { standbys: 2, .. }));
}

/// Of `sides`, the one that runs the guest, the other, and the position of the first byte that the one prints.
fn winner(sides: [&Process; 2]) -> (&Process, &Process, usize) {
    loop {
        for (side, other) in [(sides[0], sides[1]), (sides[1], sides[0])] {
            for report in side.reports.try_iter() {
                match report {
                    Report::Active { output_start, .. } => return (side, other, output_start as usize),
                    Report::Failed { reason } => panic!("{reason}"),
                    _ => {}
                }
            }
        }
        std::thread::yield_now();
    }
}

mod kvm {
    use super::*;

    #[test]
    fn guest_survives_two_hosts_one_right_after_the_other() {
        let places = Places::new();
        let (mut a, b, c) = places.three();

        a.signal(Signal::KILL);
        a.wait();
        let seen = a.console.text();
        let (second, third, start) = winner([&b, &c]);
        // The one that lost follows the one that won.
        await_protection(third);
        counts_on(second);
        second.signal(Signal::KILL);
        let again = await_active(third);
        counts_on(third);

        let seen = joined(&seen, start, &second.console.text());
        assert_nothing_missing(&joined(&seen, again, &third.console.text()));
    }

    #[test]
    fn guest_that_loses_one_of_two_standbys_stays_protected_and_gets_it_back() {
        let places = Places::new();
        let (mut a, mut b, c) = places.three();

        b.signal(Signal::KILL);
        b.wait();
        let renewed = await_report(&a.reports, |report| {
            assert!(!matches!(report, Report::Solo { .. }), "it was protected all the time");
            matches!(report, Report::Renewed { .. })
        });
        assert!(matches!(renewed, Report::Renewed { standbys: 1, .. }));
        counts_on(&a);
        let b = places.standby("b");
        await_second(&a);
        await_protection(&b);
        // Whoever goes on now knows everything.
        a.signal(Signal::KILL);
        a.wait();
        let (second, _, start) = winner([&b, &c]);
        counts_on(second);
        assert_nothing_missing(&joined(&a.console.text(), start, &second.console.text()));
    }

    #[test]
    fn guest_is_handed_over_to_the_standby_that_was_named_and_the_other_follows_it() {
        let places = Places::new();
        let (a, b, c) = places.three();
        let to = places.link("c").parse().unwrap();

        understudy::client::switchover(&places.path("a.sock"), Some(&to)).unwrap();

        let start = await_active(&c);
        await_second(&c);
        counts_on(&c);
        let seen = a.console.text();
        assert_eq!(seen.len(), start, "each byte leaves on one side");
        assert_nothing_missing(&joined(&seen, start, &c.console.text()));
        await_protection(&a);
        await_protection(&b);
    }

    #[test]
    fn standby_that_is_stopped_holds_nobody_up_for_long() {
        let places = Places::new();
        let (a, b, _c) = places.three();

        b.signal(Signal::STOP);

        await_report(&a.reports, |report| matches!(report, Report::Renewed { standbys: 1, .. }));
        counts_on(&a);
        b.signal(Signal::CONT);
        await_second(&a);
    }

    #[test]
    fn more_standbys_at_once_than_are_named_are_refused() {
        let places = Places::new();
        let mirror = format!(r#""standby": "{}", "standbys_at_once": 2"#, places.link("b"));
        let config = configuration(places.0.path(), "embedded:guest", Some(&mirror));
        let mut side = Process::start(&["run", "--config-file", &config]);
        assert!(!side.wait().success());
        side.errors.await_text(|text| text.contains("standbys_at_once"));
        fs::remove_file(config).unwrap();
    }
}
