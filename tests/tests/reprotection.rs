//! A guest whose side was lost or given up is protected again, without a restart; and one that nobody vouches for stands
//! still. Real processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use mirror::report::Report;
use rustix::process::Signal;
use tests::counting::{assert_nothing_missing, await_active, await_protection, counts, counts_on, joined};
use tests::pair::{PATIENCE, await_report};
use tests::process::{Process, configuration};
use understudy::drill::relay::Way;
use understudy::server::{InstanceInfo, InstanceState};

/// As `primary` has it: what is tried here does not hang on how soon a loss is noticed.
const PATIENT: [&str; 4] = ["--heartbeat-ms", "200", "--heartbeat-misses", "25"];

/// Two places, `a` and `b`, at each of which a side listens, and a witness.
struct Places(tempfile::TempDir);

impl Places {
    fn new() -> Self {
        let places = Self(tempfile::tempdir().unwrap());
        fs::create_dir(places.path("shared")).unwrap();
        places
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn link(&self, place: &str) -> String {
        format!("unix:{}", self.path(place).display())
    }

    fn witness(&self) -> String {
        self.path("shared/witness").display().to_string()
    }

    /// A side that waits at `place`, and mirrors a guest that it runs to `other`.
    fn standby(&self, place: &str, other: &str) -> Process {
        self.standby_with(place, other, &[])
    }

    fn standby_with(&self, place: &str, other: &str, more: &[&str]) -> Process {
        let (other, witness) = (self.link(other), self.witness());
        let arguments = [&["--standby", &other, "--witness", &witness], &PATIENT[..], more].concat();
        Process::standby_with(&self.link(place), &arguments)
    }

    /// A guest at `a`, mirrored to `b`, which waits at `a` once it runs at `b`.
    fn primary(&self, more: &str) -> Process {
        let mirror = format!(
            r#""standby": "{}", "witness": "{}", "heartbeat_ms": 200, "heartbeat_misses": 25{more}"#,
            self.link("b"),
            self.witness()
        );
        let config = configuration(self.0.path(), "embedded:guest", Some(&mirror));
        let api = self.path("a.sock").display().to_string();
        Process::start(&["run", "--config-file", &config, "--listen", &self.link("a"), "--api-sock", &api])
    }

    /// A guest in lockstep.
    fn pair(&self, more: &str) -> (Process, Process) {
        let standby = self.standby("b", "a");
        let primary = self.primary(more);
        await_protection(&primary);
        await_protection(&standby);
        primary.console.await_text(|text| counts(text).len() > 20);
        (primary, standby)
    }
}

/// Waits until the side at the API socket `api` says that its guest stands still.
fn await_standstill(api: &Path) {
    let until = Instant::now() + PATIENCE;
    loop {
        let info: InstanceInfo = understudy::client::get(api, "/").unwrap();
        if info.state == InstanceState::Paused {
            return;
        }
        assert!(Instant::now() < until, "it is {:?}", info.state);
        thread::yield_now();
    }
}

mod kvm {
    use super::*;

    #[test]
    fn guest_survives_first_one_host_and_then_the_other() {
        let places = Places::new();
        let (mut primary, second) = places.pair("");

        primary.signal(Signal::KILL);
        primary.wait();
        let start = await_active(&second);
        let first_saw = primary.console.text();
        // The host comes back, as a standby.
        let third = places.standby("a", "b");
        await_protection(&second);
        await_protection(&third);
        counts_on(&second);
        second.signal(Signal::KILL);
        let again = await_active(&third);
        counts_on(&third);

        let seen = joined(&first_saw, start, &second.console.text());
        assert_nothing_missing(&joined(&seen, again, &third.console.text()));
    }

    #[test]
    fn guest_is_switched_over_again_and_again_and_stays_protected() {
        let places = Places::new();
        let standby_api = places.path("b.sock").display().to_string();
        let b = places.standby_with("b", "a", &["--api-sock", &standby_api]);
        let a = places.primary("");
        await_protection(&a);
        let turns = [(&a, &b, "a.sock"), (&b, &a, "b.sock"), (&a, &b, "a.sock")].map(|(from, to, api)| {
            counts_on(from);
            understudy::client::switchover(&places.path(api), None).unwrap();
            let start = await_active(to);
            await_protection(to);
            counts_on(to);
            start
        });

        // Each side has printed its stretches one after the other, and a switchover repeats nothing.
        let [first, second, third] = turns;
        let (a, b) = (a.console.text(), b.console.text());
        let b_turns = second - first;
        assert_eq!(a.len(), first + (third - second), "the first side has printed more than its stretches");
        assert_nothing_missing(&[&a[..first], &b[..b_turns], &a[first..], &b[b_turns..]].concat());
    }

    #[test]
    fn primary_that_slept_past_its_time_becomes_the_standby() {
        let places = Places::new();
        let (primary, second) = places.pair("");

        primary.signal(Signal::STOP);
        await_active(&second);
        primary.signal(Signal::CONT);

        await_report(&primary.reports, |report| matches!(report, Report::Frozen { .. }));
        await_protection(&primary);
        second.signal(Signal::KILL);
        await_active(&primary);
        counts_on(&primary);
    }

    #[test]
    fn standby_that_was_cut_off_is_the_standby_again() {
        let places = Places::new();
        let (primary, standby) = places.pair("");

        standby.signal(Signal::STOP);
        await_report(&primary.reports, |report| matches!(report, Report::Solo { .. }));
        standby.signal(Signal::CONT);

        await_report(&standby.reports, |report| {
            assert!(!matches!(report, Report::Active { .. }), "two sides are live");
            matches!(report, Report::Protected { .. })
        });
        await_protection(&primary);
    }

    #[test]
    fn guest_stays_where_it_is_when_only_the_mirror_link_is_cut() {
        let places = Places::new();
        let any = "tcp:127.0.0.1:0";
        let standby = Process::standby_with(any, &["--second-listen", any, "--witness", &places.witness()]);
        let way = standby.relay();
        let quick = r#", "heartbeat_ms": 50, "heartbeat_misses": 20, "stall_ms": 60000"#;
        let mirror =
            format!(r#""standby": "tcp:{}", "witness": "{}"{quick}"#, way.address(), places.witness());
        let config = configuration(places.0.path(), "embedded:guest", Some(&mirror));
        let primary = Process::start(&["run", "--config-file", &config]);
        await_report(&primary.reports, |report| matches!(report, Report::SecondLink { up: true, .. }));
        await_protection(&primary);
        await_protection(&standby);

        // The standby hears nothing by it any more, and would take the guest over.
        way.cut(Way::Forth);
        await_report(&standby.reports, |report| matches!(report, Report::HeardElsewhere { .. }));
        await_report(&primary.reports, |report| {
            assert!(!matches!(report, Report::Frozen { .. }), "the guest has moved");
            matches!(report, Report::Solo { .. })
        });
        way.heal();

        await_report(&standby.reports, |report| {
            assert!(!matches!(report, Report::Active { .. }), "two sides are live");
            matches!(report, Report::Protected { .. })
        });
        await_protection(&primary);
        counts_on(&primary);
        assert_nothing_missing(&primary.console.text());
    }

    #[test]
    fn standby_that_has_no_space_is_passed_over() {
        let places = Places::new();
        let (_primary, _busy) = places.pair("");
        let other = Places::new();
        let free = other.standby("b", "a");
        let mirror = format!(
            r#""standby": ["{}", "{}"], "witness": "{}""#,
            places.link("b"),
            other.link("b"),
            other.witness()
        );
        let config = configuration(other.0.path(), "embedded:guest", Some(&mirror));

        let primary = Process::start(&["run", "--config-file", &config]);

        await_protection(&primary);
        await_protection(&free);
        counts_on(&primary);
    }

    #[test]
    fn guest_stands_still_without_standby_and_witness_and_thaws_when_the_witness_is_back() {
        let places = Places::new();
        let (primary, standby) = places.pair("");

        fs::rename(places.path("shared"), places.path("away")).unwrap();
        standby.signal(Signal::KILL);
        await_report(&primary.reports, |report| matches!(report, Report::Suspended { .. }));
        let held = primary.console.text().len();
        await_report(&primary.reports, |report| matches!(report, Report::WitnessSilent { .. }));
        assert!(primary.console.text().len() <= held + 4096, "the guest goes on by nobody's word");
        fs::rename(places.path("away"), places.path("shared")).unwrap();

        await_report(&primary.reports, |report| matches!(report, Report::Thawed { .. }));
        counts_on(&primary);
        assert_nothing_missing(&primary.console.text());
    }

    #[test]
    fn guest_that_may_not_run_alone_waits_for_its_next_standby() {
        let places = Places::new();
        let (primary, mut standby) = places.pair(r#", "standby_lost": "freeze""#);

        standby.signal(Signal::KILL);
        standby.wait();
        await_report(&primary.reports, |report| matches!(report, Report::Suspended { .. }));
        let lines = counts(&primary.console.text()).len();
        let next = places.standby("b", "a");
        await_protection(&primary);
        await_report(&primary.reports, |report| matches!(report, Report::Thawed { .. }));

        primary.console.await_text(|text| counts(text).len() > lines + 20);
        assert_nothing_missing(&primary.console.text());
        drop(next);
    }

    #[test]
    fn operator_lets_a_guest_go_on_that_may_not_run_alone() {
        let places = Places::new();
        let (primary, standby) = places.pair(r#", "standby_lost": "freeze""#);
        standby.signal(Signal::KILL);
        await_report(&primary.reports, |report| matches!(report, Report::Suspended { .. }));
        await_standstill(&places.path("a.sock"));

        let resumed = understudy::client::set_state(
            &places.path("a.sock"),
            understudy::server::types::VmState::Resumed,
        );
        assert!(resumed.unwrap_err().to_string().contains("has no standby"));
        understudy::client::promote(&places.path("a.sock")).unwrap();

        counts_on(&primary);
        assert_nothing_missing(&primary.console.text());
    }
}
