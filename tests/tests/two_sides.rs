//! Of two sides that lost each other exactly one goes on: real processes, stopped and continued by signals.

use std::path::PathBuf;
use std::process::Command;

use mirror::report::Report;
use mirror::witness::Record;
use rustix::process::Signal;
use tests::pair::await_report;
use tests::process::{Process, configuration, understudy};

/// The exit status of a side that is frozen.
const FROZEN: i32 = 5;

/// A primary process and a standby process in lockstep.
struct Two {
    primary: Process,
    standby: Process,
    witness: PathBuf,
    api: PathBuf,
    _folder: tempfile::TempDir,
}

impl Two {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let witness = folder.path().join("witness");
        let listen = format!("unix:{}", folder.path().join("standby").display());
        let standby = Process::standby(&listen, &witness);
        let mirror = format!(r#""standby": "{listen}", "witness": "{}""#, witness.display());
        let config = configuration(folder.path(), "embedded:guest", Some(&mirror));
        let api = folder.path().join("api.sock");
        let api_sock = api.display().to_string();
        let primary = Process::start(&["run", "--config-file", &config, "--api-sock", &api_sock]);
        await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
        primary.console.await_text(|text| text.contains("count cpu=0 n=20 "));
        Self { primary, standby, witness, api, _folder: folder }
    }

    fn term(&self) -> (u64, String) {
        let record: Record = serde_json::from_slice(&std::fs::read(&self.witness).unwrap()).unwrap();
        (record.term.0, record.owner)
    }
}

mod kvm {
    use super::*;

    #[test]
    fn primary_that_slept_past_its_time_freezes_and_releases_nothing() {
        let mut two = Two::start();
        two.primary.signal(Signal::STOP);
        let active = await_report(&two.standby.reports, |report| matches!(report, Report::Active { .. }));
        let Report::Active { output_start, term, .. } = active else { unreachable!() };
        assert_eq!(term.0, 2);
        let standby_says = two.standby.console.await_text(|text| text.lines().count() > 20);
        let before = two.primary.console.text();
        assert!(output_start as usize <= before.len(), "released output was lost");

        two.primary.signal(Signal::CONT);

        await_report(&two.primary.reports, |report| matches!(report, Report::Frozen { .. }));
        assert_eq!(two.primary.wait().code(), Some(FROZEN), "{}", two.primary.errors.text());
        let after = two.primary.console.text();
        // What was committed before the primary slept may still come; the standby knows all of it, and it is the same.
        let known = &after[output_start as usize..];
        assert!(standby_says.starts_with(known), "released, but not known to the live side: {known:?}");
        let (term, owner) = two.term();
        assert!(term == 2 && owner.starts_with("standby"), "term {term}, owner {owner}");
        // The live side goes on.
        let lines = two.standby.console.text().lines().count();
        two.standby.console.await_text(|text| text.lines().count() > lines + 20);
    }

    #[test]
    fn standby_that_slept_past_its_time_is_fenced_and_the_primary_goes_on_alone() {
        let two = Two::start();
        two.standby.signal(Signal::STOP);
        await_report(&two.primary.reports, |report| matches!(report, Report::Solo { term } if term.0 == 2));
        let lines = two.primary.console.text().lines().count();
        two.primary.console.await_text(|text| text.lines().count() > lines + 20);

        two.standby.signal(Signal::CONT);

        await_report(&two.standby.reports, |report| {
            assert!(!matches!(report, Report::Active { .. }), "two sides are live");
            matches!(report, Report::Refused { .. })
        });
        assert_eq!(two.standby.console.text(), "");
        let (term, owner) = two.term();
        // It has asked for a standby again since, in terms of its own.
        assert!(term >= 2 && owner.starts_with("primary"), "term {term}, owner {owner}");
    }

    #[test]
    fn switchover_moves_the_guest_with_no_output_lost_or_repeated() {
        let mut two = Two::start();

        let asked = Command::new(understudy())
            .args(["switchover", "--json", "--api-sock"])
            .arg(&two.api)
            .output()
            .unwrap();

        let said = String::from_utf8(asked.stdout).unwrap();
        assert!(asked.status.success(), "{said}{}", String::from_utf8_lossy(&asked.stderr));
        let answer: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert!(answer["pause_us"].as_u64().unwrap() > 0, "{said}");
        assert_eq!(two.primary.wait().code(), Some(0), "{}", two.primary.errors.text());
        await_report(&two.primary.reports, |report| matches!(report, Report::HandedOver { .. }));
        let (term, owner) = two.term();
        assert!(term == 2 && owner.starts_with("standby"), "term {term}, owner {owner}");
        let lines = two.standby.console.text().lines().count();
        two.standby.console.await_text(|text| text.lines().count() > lines + 20);
        let whole = two.primary.console.text() + &two.standby.console.text();
        let counts = whole.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
        let numbers: Vec<u64> = counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    }

    #[test]
    fn primary_goes_on_alone_when_its_standby_is_killed() {
        let two = Two::start();

        two.standby.signal(Signal::KILL);

        await_report(&two.primary.reports, |report| matches!(report, Report::Solo { term } if term.0 == 2));
        let lines = two.primary.console.text().lines().count();
        two.primary.console.await_text(|text| text.lines().count() > lines + 20);
    }
}
