//! What protection costs those who ask: the guest's TCP service without a mirror and with one, at several paces of epochs.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use mirror::primary::Pacing;
use mirror::report::Report;
use serde::Serialize;
use tests::client::{Client, SERVICE, load};
use tests::http::request;
use tests::lan::{GUEST, alone};
use tests::pair::await_report;
use tests::process::Process;

use crate::figures::{median, quantile};

/// All paces are measured in each round, one after the other.
const ROUNDS: u32 = 3;
/// Of a load, at each pace and number of connections.
const TIME: Duration = Duration::from_secs(2);
const CONNECTIONS: [u64; 3] = [1, 4, 16];
const MEM_MIB: u32 = 64;
/// Pages that the guest writes per second beside what clients ask of it.
const DIRTY_RATE: u32 = 5000;
/// Bytes of a download without a mirror, and with one: each epoch lets no more through than fits a connection's buffers.
const DOWNLOADS: [u64; 2] = [128 << 20, 4 << 20];

/// When epochs end, in milliseconds: the shortest and the longest time between two.
#[derive(Clone, Copy, PartialEq)]
struct Pace(u64, u64);

/// Epochs of fixed length, and as they are by default: they end early for output that waits.
fn paces() -> [Option<Pace>; 5] {
    let default = Pacing::default();
    let adaptive = Pace(default.min_interval.as_millis() as u64, default.interval.as_millis() as u64);
    [None, Some(Pace(2, 2)), Some(Pace(5, 5)), Some(Pace(25, 25)), Some(adaptive)]
}

/// So many connections, each with one request at a time, at one pace.
#[derive(Debug, Serialize)]
pub(crate) struct Protection {
    /// `none`: without a mirror.
    epoch_target: String,
    shortest_epoch_ms: u64,
    longest_epoch_ms: u64,
    connections: u64,
    runs: u32,
    mem_mib: u32,
    dirty_pages_per_s: u32,
    requests: usize,
    requests_per_s: f64,
    /// Of what the same guest answered without a mirror in the same run.
    share_of_unprotected: f64,
    p50_us: f64,
    p99_us: f64,
    added_p50_us: f64,
    added_p99_us: f64,
    epochs_per_s: f64,
    pause_p50_us: f64,
    /// One connection that downloads, median; the same for all numbers of connections.
    download_mb_per_s: f64,
    download_share_of_unprotected: f64,
}

/// What was seen at one pace.
#[derive(Default)]
struct Seen {
    /// For each number of connections.
    loads: [Series; CONNECTIONS.len()],
    downloads_mb_per_s: Vec<f64>,
}

#[derive(Default)]
struct Series {
    times_us: Vec<f64>,
    took: Duration,
    epochs: usize,
    pauses_us: Vec<f64>,
}

/// Measures pairs of processes, a pair for each round.
pub(crate) fn measure() -> Vec<Protection> {
    let mut seen: [Seen; 5] = Default::default();
    for number in 0..ROUNDS {
        alone(|lan| {
            lan.add_tap("tap0");
            lan.add_tap("tap1");
            round(number, &mut seen);
        });
    }
    rows(&mut seen)
}

fn round(number: u32, seen: &mut [Seen]) {
    let folder = tempfile::tempdir().expect("a folder");
    let (config, api) = (folder.path().join("vm.json"), folder.path().join("api.sock"));
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "embedded:guest",
            "boot_args": "workload=dirty dirty.rate={DIRTY_RATE} net.ip={GUEST}"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": {MEM_MIB}}},
            "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tap0"}}]}}"#
    );
    std::fs::write(&config, text).expect("a configuration");
    let (config, api_sock) = (config.display().to_string(), api.display().to_string());
    let primary = Process::start(&["run", "--config-file", &config, "--api-sock", &api_sock]);
    primary.console.await_text(|text| text.contains("ready cpu=0"));
    let _standby = protect(&primary, folder.path(), &api, seen);
    // Each pace has its turn to be the first.
    let mut order: Vec<usize> = (1..seen.len()).collect();
    order.rotate_left(number as usize % (seen.len() - 1));
    for index in order {
        if let Some(Pace(shortest, longest)) = paces()[index] {
            order_of(
                &api,
                "PATCH",
                &format!(r#"{{"min_interval_ms": {shortest}, "interval_ms": {longest}}}"#),
            );
            look(&primary, &mut seen[index], DOWNLOADS[1]);
        }
    }
}

/// Measures the guest without a mirror, and then gives it a standby.
fn protect(primary: &Process, folder: &Path, api: &Path, seen: &mut [Seen]) -> Process {
    primary.await_api(api);
    look(primary, &mut seen[0], DOWNLOADS[0]);
    let (link, witness) = (format!("unix:{}", folder.join("link").display()), folder.join("witness"));
    let witness = witness.display().to_string();
    let standby = Process::standby_with(&link, &["--net", "net=tap1", "--witness", &witness]);
    // A busy machine is not to look like a loss.
    let mirror = format!(
        r#"{{"standby": "{link}", "witness": "{witness}", "heartbeat_ms": 100, "heartbeat_misses": 20}}"#
    );
    order_of(api, "PUT", &mirror);
    await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
    standby
}

fn order_of(api: &Path, method: &str, body: &str) {
    let answer = request(api, method, "/mirror", body).expect("the primary answers");
    assert_eq!(answer.0, 204, "{method} /mirror {body}: {}", answer.1);
}

fn look(primary: &Process, seen: &mut Seen, download: u64) {
    let guest: SocketAddr = SERVICE.parse().expect("an address");
    for (connections, series) in CONNECTIONS.into_iter().zip(&mut seen.loads) {
        // What came before is none of its epochs.
        primary.reports.try_iter().for_each(drop);
        let load = load(guest, connections, TIME).expect("the guest serves");
        series.times_us.extend(load.times.iter().map(|time| time.as_secs_f64() * 1e6));
        series.took += load.took;
        for report in primary.reports.try_iter() {
            match report {
                Report::Committed { pause, .. } => {
                    series.epochs += 1;
                    series.pauses_us.push(pause.total_us() as f64);
                }
                Report::StandbyLost { reason, .. } => {
                    panic!("the guest was not protected all the time: {reason}")
                }
                _ => {}
            }
        }
    }
    let began = Instant::now();
    Client::connect(guest).and_then(|mut client| client.download(download, |_| {})).expect("a download");
    seen.downloads_mb_per_s.push(download as f64 / 1e6 / began.elapsed().as_secs_f64());
}

fn rows(seen: &mut [Seen]) -> Vec<Protection> {
    let mut rows: Vec<Protection> = Vec::new();
    for (pace, seen) in paces().into_iter().zip(seen) {
        let download = median(&mut seen.downloads_mb_per_s);
        for (index, (connections, series)) in CONNECTIONS.into_iter().zip(&mut seen.loads).enumerate() {
            let seconds = series.took.as_secs_f64();
            let rate = series.times_us.len() as f64 / seconds;
            let (p50, p99) = (median(&mut series.times_us), quantile(&mut series.times_us, 0.99));
            // The first rows are those without a mirror.
            let alone = rows
                .get(index)
                .map(|row| (row.requests_per_s, row.p50_us, row.p99_us, row.download_mb_per_s));
            let (alone_rate, alone_p50, alone_p99, alone_download) =
                alone.unwrap_or((rate, p50, p99, download));
            let (shortest, longest) = pace.map_or((0, 0), |Pace(shortest, longest)| (shortest, longest));
            rows.push(Protection {
                epoch_target: match pace {
                    None => "none".into(),
                    Some(Pace(shortest, longest)) if shortest == longest => format!("{longest} ms"),
                    Some(_) => "adaptive".into(),
                },
                shortest_epoch_ms: shortest,
                longest_epoch_ms: longest,
                connections,
                runs: ROUNDS,
                mem_mib: MEM_MIB,
                dirty_pages_per_s: DIRTY_RATE,
                requests: series.times_us.len(),
                requests_per_s: rate,
                share_of_unprotected: rate / alone_rate,
                p50_us: p50,
                p99_us: p99,
                added_p50_us: p50 - alone_p50,
                added_p99_us: p99 - alone_p99,
                epochs_per_s: series.epochs as f64 / seconds,
                pause_p50_us: median(&mut series.pauses_us),
                download_mb_per_s: download,
                download_share_of_unprotected: download / alone_download,
            });
        }
    }
    rows
}
