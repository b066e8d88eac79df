use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use devices::virtio::counters::{BlockCounters, NetCounters, VsockCounters};
use mirror::ids::{Epoch, Guid, Term};
use mirror::report::{PausePhases, Report};
use mirror::shell::metrics::PauseSummary;
use mirror::shell::{primary, standby};
use mirror::wire::message::Sense;
use serde_json::Value;

use super::firecracker::MetricsFile;
use super::prometheus::{openmetrics, plain, table};
use super::*;
use crate::server::InstanceState;

/// Where the table of all metrics is documented; `UNDERSTUDY_WRITE_DOCS=1` has it written there.
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");

fn sense() -> Sense {
    Sense { epoch: Epoch(41), rounds: 2, epochs: 40, pages: 900, stale_frames: 1 }
}

fn primary() -> MirrorStatus {
    MirrorStatus::Primary(Box::new(primary::Status {
        role: "primary".into(),
        phase: "lockstep".into(),
        guid: Guid::nil(),
        term: Term(3),
        epoch: Epoch(42),
        standby: "unix:/s".parse().unwrap(),
        witness: true,
        round: 2,
        round_pages: 100,
        round_sent: 100,
        pages: 16_384,
        seed_pages: 200,
        seed_bytes: 800_000,
        epoch_pages: 77,
        epoch_bytes: 300_000,
        epochs_stalled: 0,
        held_bytes: 12,
        disk_sync: mirror::guest::DiskSync { bytes: 1 << 20, left: 4096, lags: false },
        standby_sense: sense(),
        standbys: vec![primary::StandbyFigures {
            address: "unix:/s".parse().unwrap(),
            standing: "following".into(),
            acknowledged: Epoch(42),
            second_link_up: Some(true),
            seeding_round: 2,
            seeding_pages: 0,
            seeding_sent: 0,
        }],
        times: PauseSummary::default(),
    }))
}

fn standby() -> MirrorStatus {
    MirrorStatus::Standby(Box::new(standby::Status {
        role: "standby".into(),
        phase: "shadowing".into(),
        listen: "unix:/s".parse().unwrap(),
        second_listen: None,
        guid: None,
        term: Term(3),
        epoch: Epoch(42),
        witness: false,
        sense: sense(),
    }))
}

/// One of everything.
fn reading(status: Option<MirrorStatus>) -> Reading {
    let (block, net, vsock) =
        (Arc::<BlockCounters>::default(), Arc::<NetCounters>::default(), Arc::<VsockCounters>::default());
    block.reads.add(3);
    block.read_bytes.add(1536);
    net.sent_bytes.add(60);
    vsock.from_host.add(2);
    vsock.from_guest.add(1);
    vsock.closed.add(1);
    let mut mirror = Figures::default();
    let pause = PausePhases { stop_us: 40, harvest_us: 30, copy_us: 200, capture_us: 90, resume_us: 20 };
    for report in [
        Report::Joined { guid: Guid::nil(), term: Term(3), pages: 16_384 },
        Report::Committed {
            epoch: Epoch(1),
            pages: 5,
            bytes: 900,
            pause,
            commit_us: 700,
            released: 0,
            held_us: Some(1200),
            stalled: false,
        },
        Report::Protected { epoch: Epoch(1) },
        Report::MemoryArriving { there: 5, pages: 10 },
    ] {
        mirror.note(&Stamped { at_us: 1_000, report });
    }
    let own = Own {
        requests: BTreeMap::from([
            (("GET".into(), "/".into(), 200), 4),
            (("PUT".into(), "/drives/{drive_id}".into(), 204), 2),
            (("PUT".into(), "/drives/{drive_id}".into(), 400), 1),
            (("GET".into(), "none".into(), 400), 1),
        ]),
        snapshots: BTreeMap::from([("full", Snapshots::default()), ("diff", Snapshots::default())]),
        latencies: BTreeMap::from([("pause_vm", 345)]),
        ..Own::default()
    };
    Reading {
        info: InstanceInfo::new("vm \"7\"\n", InstanceState::Running),
        uptime: Duration::from_millis(1500),
        mirror,
        status,
        devices: vec![
            ("rootfs".into(), DeviceCounters::Block(block)),
            ("eth0".into(), DeviceCounters::Net(net)),
            ("vsock".into(), DeviceCounters::Vsock(vsock)),
        ],
        exits: vec![("io_in", 1), ("io_out", 2), ("mmio_read", 3), ("mmio_write", 4)],
        snapshot: Some(Progress { done: 1, pages: 2, elapsed_ms: 3 }),
        own,
        log_lines_lost: 0,
    }
}

/// The families that `text` tells of, by name: type, and the names of the labels of all its values.
fn families(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut families: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(help.ends_with('.'), "{line}");
            helped.insert(name.to_owned());
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(helped.contains(name), "{name} has no help");
            let before = families.insert(name.into(), (kind.into(), BTreeSet::new()));
            assert!(before.is_none(), "{name} is there twice");
        } else {
            assert!(!line.starts_with('#'), "{line}");
            let (series, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let family = families
                .iter_mut()
                .find(|(family, (kind, _))| {
                    let histogram = ["_sum", "_count", "_bucket"].map(|end| format!("{family}{end}"));
                    if kind == "histogram" {
                        histogram.iter().any(|full| full == name)
                    } else {
                        *family == name
                    }
                })
                .unwrap_or_else(|| panic!("{line} belongs to no family"));
            let labels = labels.trim_end_matches('}').split("\",").filter_map(|label| label.split_once('='));
            family.1.1.extend(labels.map(|(name, _)| name.to_owned()).filter(|name| name != "le"));
        }
    }
    families
}

#[test]
fn exposition_is_what_the_catalogue_says_and_all_of_it() {
    let found = families(&plain(reading(Some(primary()))));
    for metric in catalogue::ALL {
        let (kind, labels) = &found[&metric.full_name()];
        assert_eq!(kind, metric.kind.as_str(), "{metric:?}");
        assert_eq!(*labels, metric.labels.iter().map(|&label| label.to_owned()).collect(), "{metric:?}");
    }
    assert_eq!(found.len(), catalogue::ALL.len());
}

#[test]
fn names_end_with_their_unit_and_counters_with_total() {
    for metric in catalogue::ALL {
        let name = metric.full_name();
        assert!(name.starts_with("understudy_") && name == name.to_lowercase(), "{name}");
        let timed = ["duration", "interval", "uptime"].iter().any(|word| name.contains(word));
        assert_eq!(timed, name.ends_with("_seconds"), "{name}");
        let counter = matches!(metric.kind, prometheus_client::metrics::MetricType::Counter);
        assert_eq!(counter, name.ends_with("_total"), "{name}");
        assert!(!name.contains("_wire") || name.ends_with("_bytes_total"), "{name}");
    }
}

#[test]
fn standby_and_unmirrored_guest_are_told_of_too() {
    let standby = plain(reading(Some(standby())));
    assert!(standby.contains(r#"understudy_mirror_phase{role="standby",phase="shadowing"} 1"#), "{standby}");
    assert!(standby.contains("understudy_standby_pages_total 900\n"), "{standby}");
    let alone = plain(reading(None));
    assert!(!alone.contains("understudy_mirror_phase"), "{alone}");
    assert!(alone.contains(r#"understudy_guest_state{state="running"} 1"#), "{alone}");
}

#[test]
fn values_are_what_was_counted_and_histograms_are_cumulative() {
    let text = plain(reading(Some(primary())));
    for line in [
        r#"understudy_device_requests_total{device="rootfs",operation="read"} 3"#,
        r#"understudy_device_bytes_total{device="rootfs",operation="read"} 1536"#,
        "understudy_vsock_connections_open 2.0",
        r#"understudy_api_requests_total{method="PUT",route="/drives/{drive_id}",status="400"} 1"#,
        r#"understudy_vcpu_exits_total{reason="mmio_write"} 4"#,
        "understudy_pause_duration_seconds_sum 0.00038",
        "understudy_pause_duration_seconds_count 1",
        r#"understudy_pause_duration_seconds_bucket{le="0.00025"} 0"#,
        r#"understudy_pause_duration_seconds_bucket{le="0.0005"} 1"#,
        r#"understudy_pause_duration_seconds_bucket{le="+Inf"} 1"#,
        r#"understudy_pause_phase_duration_seconds_sum{phase="copy"} 0.0002"#,
        "understudy_output_hold_duration_seconds_sum 0.0012",
        "understudy_protected 1.0",
        "understudy_uptime_seconds 1.5",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[test]
fn openmetrics_has_units_and_an_end() {
    let text = openmetrics(reading(None));
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# UNIT understudy_pause_duration_seconds seconds\n"), "{text}");
    assert!(text.contains("# TYPE understudy_epochs counter\n"), "{text}");
}

#[test]
fn table_in_the_documents_is_that_of_the_catalogue() {
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = document.split_once("| name |").unwrap();
    let (_, after) = rest.split_once("\n\n").unwrap();
    let current = format!("{before}{}\n{after}", table());
    if std::env::var_os("UNDERSTUDY_WRITE_DOCS").is_some() {
        std::fs::write(DOCUMENT, current).unwrap();
    } else {
        assert!(
            document == current,
            "docs/metrics.md is not current: UNDERSTUDY_WRITE_DOCS=1 cargo test -p understudy"
        );
    }
}

/// A file for lines of metrics, and what it is made from.
fn file(section: Value) -> (tempfile::TempDir, MetricsFile, impl Fn() -> Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics");
    let mut section = section;
    section["metrics_path"] = path.display().to_string().into();
    let file = MetricsFile::open(&serde_json::from_value(section).unwrap()).unwrap();
    let read = move || {
        let text = std::fs::read_to_string(&path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    (folder, file, read)
}

#[test]
fn lines_have_firecrackers_keys_and_the_mirror() {
    let (_folder, mut file, lines) = file(serde_json::json!({}));
    file.write(&reading(Some(primary()))).unwrap();
    let line = &lines()[0];
    let at = |place: &str| {
        line.pointer(place).and_then(Value::as_u64).unwrap_or_else(|| panic!("{place} in {line}"))
    };
    assert!(at("/utc_timestamp_ms") > 1_700_000_000_000);
    assert_eq!((at("/block/read_count"), at("/block_rootfs/read_bytes")), (3, 1536));
    assert_eq!((at("/net/tx_bytes_count"), at("/net_eth0/rx_packets_count")), (60, 0));
    assert_eq!((at("/vsock/conns_added"), at("/vcpu/exit_io_out")), (3, 2));
    assert_eq!((at("/put_api_requests/drive_count"), at("/put_api_requests/drive_fails")), (3, 1));
    assert_eq!((at("/get_api_requests/instance_info_count"), at("/put_api_requests/actions_count")), (4, 0));
    assert_eq!((at("/latencies_us/pause_vm"), at("/latencies_us/load_snapshot")), (345, 0));
    assert_eq!((at("/mirror/epochs"), at("/mirror/pause_sum_us"), at("/mirror/epoch")), (1, 380, 42));
    assert_eq!(line["mirror"]["role"], "primary");
    assert!(line.get("id").is_none() && line.get("properties").is_none(), "{line}");
}

#[test]
fn what_is_counted_is_told_as_the_difference_to_the_line_before() {
    let (_folder, mut file, lines) = file(serde_json::json!({}));
    let reading = reading(Some(primary()));
    file.write(&reading).unwrap();
    let DeviceCounters::Block(block) = &reading.devices[0].1 else { panic!() };
    block.reads.add(10);
    file.write(&reading).unwrap();
    let lines = lines();
    assert_eq!((&lines[0]["block"]["read_count"], &lines[1]["block"]["read_count"]), (&3.into(), &10.into()));
    assert_eq!(lines[1]["block"]["read_bytes"], 0);
    assert_eq!(lines[1]["latencies_us"]["pause_vm"], 345);
}

#[test]
fn identity_and_properties_are_told_when_they_are_asked_for() {
    let (_folder, mut file, lines) = file(serde_json::json!({"emit_id": true, "properties": {"rack": 7}}));
    file.write(&reading(None)).unwrap();
    let line = &lines()[0];
    assert_eq!(line["id"], "vm \"7\"\n");
    assert_eq!(line["properties"]["rack"], 7);
    assert_eq!(line["mirror"]["role"], "none");
}
