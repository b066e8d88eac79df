//! The embedded guest on two sides, with etcd as the witness.

use mirror::ids::Guid;
use mirror::report::Report;
use rustix::process::Signal;
use tests::etcd::Cluster;
use tests::pair::await_report;
use tests::process::{Process, configuration};

const GUID: &str = "00000000-0000-4000-8000-0000000000e7";

/// A primary process and a standby process in lockstep.
struct Two {
    primary: Process,
    standby: Process,
    cluster: Cluster,
}

impl Two {
    fn start() -> Self {
        let cluster = Cluster::start(3);
        let folder = cluster.folder();
        let address = cluster.address().to_string();
        let listen = format!("unix:{}", folder.join("standby").display());
        let standby = Process::start(&["standby", "--listen", &listen, "--witness", &address]);
        standby.errors.await_text(|text| text.contains("listening on"));
        let mirror = format!(r#""standby": "{listen}", "guid": "{GUID}", "witness": "{address}""#);
        let config = configuration(folder, "embedded:guest", Some(&mirror));
        let primary = Process::start(&["run", "--config-file", &config]);
        await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
        primary.console.await_text(|text| text.contains("count cpu=0 n=20 "));
        Self { primary, standby, cluster }
    }

    fn owner(&self) -> (u64, String) {
        let guid: Guid = GUID.parse().unwrap();
        let record = self.cluster.witness().read(guid).unwrap().expect("a record");
        (record.term.0, record.owner)
    }
}

fn expect_to_go_on(side: &Process) {
    let lines = side.console.text().lines().count();
    side.console.await_text(|text| text.lines().count() > lines + 20);
}

/// What the guest has counted.
fn numbers(console: &str) -> Vec<u64> {
    // The last line may not be whole.
    let whole = &console[..console.rfind('\n').map_or(0, |end| end + 1)];
    let counts = whole.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
    counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

#[test]
fn standby_takes_over_when_the_primary_is_killed() {
    let two = Two::start();

    two.primary.signal(Signal::KILL);

    let active = await_report(&two.standby.reports, |report| matches!(report, Report::Active { .. }));
    let Report::Active { output_start, term, .. } = active else { unreachable!() };
    expect_to_go_on(&two.standby);
    let (owned, owner) = two.owner();
    assert!(owned == 2 && term.0 == 2 && owner.starts_with("standby"), "term {owned}, owner {owner}");
    let before = two.primary.console.text();
    let whole = before[..output_start as usize].to_owned() + &two.standby.console.text();
    let numbers = numbers(&whole);
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

#[test]
fn primary_without_standby_and_witness_releases_nothing_until_the_witness_is_back() {
    let mut two = Two::start();
    two.cluster.kill(0);
    two.cluster.kill(1);

    two.standby.signal(Signal::KILL);

    let silent = |report: &Report| matches!(report, Report::WitnessSilent { .. });
    // What was committed before has come by then.
    (0..3).for_each(|_| drop(await_report(&two.primary.reports, silent)));
    let before = two.primary.console.text();
    (0..5).for_each(|_| drop(await_report(&two.primary.reports, silent)));
    assert_eq!(two.primary.console.text(), before, "output was released by nobody's word");

    two.cluster.restart(0);
    two.cluster.restart(1);

    await_report(&two.primary.reports, |report| matches!(report, Report::Solo { term } if term.0 == 2));
    expect_to_go_on(&two.primary);
    let (term, owner) = two.owner();
    assert!(term == 2 && owner.starts_with("primary"), "term {term}, owner {owner}");
    let numbers = numbers(&two.primary.console.text());
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

#[test]
fn sides_that_lost_each_other_and_the_witness_do_not_both_go_on_when_it_is_back() {
    let mut two = Two::start();
    two.cluster.kill(0);
    two.cluster.kill(1);
    // Both sides live, and each takes the other for dead.
    two.primary.signal(Signal::STOP);
    let silent = |report: &Report| matches!(report, Report::WitnessSilent { .. });
    await_report(&two.standby.reports, silent);
    two.primary.signal(Signal::CONT);
    (0..3).for_each(|_| drop(await_report(&two.primary.reports, silent)));
    let before = two.primary.console.text();
    (0..5).for_each(|_| drop(await_report(&two.primary.reports, silent)));
    await_report(&two.standby.reports, silent);
    assert_eq!(two.primary.console.text(), before, "output was released by nobody's word");
    assert_eq!(two.standby.console.text(), "");

    two.cluster.restart(0);
    two.cluster.restart(1);

    let decided = |report: &Report| {
        matches!(
            report,
            Report::Solo { .. } | Report::Frozen { .. } | Report::Active { .. } | Report::Refused { .. }
        )
    };
    let primary = await_report(&two.primary.reports, decided);
    let standby = await_report(&two.standby.reports, decided);
    let (term, owner) = two.owner();
    assert_eq!(term, 2);
    match (primary, standby) {
        (Report::Solo { .. }, Report::Refused { .. }) => {
            assert!(owner.starts_with("primary"), "{owner}");
            expect_to_go_on(&two.primary);
        }
        (Report::Frozen { .. }, Report::Active { .. }) => {
            assert!(owner.starts_with("standby"), "{owner}");
            expect_to_go_on(&two.standby);
        }
        other => panic!("{other:?}"),
    }
}
