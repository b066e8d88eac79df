//! How long a guest that has failed over is without protection once there is a standby for it: a new one, or the old primary.

use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

use mirror::report::Report;
use rustix::process::Signal;
use serde::Serialize;
use tests::http::request;
use tests::pair::await_report;
use tests::process::Process;

use crate::figures::{median, quantile};

const RUNS: usize = 5;
const MEM_MIB: u32 = 1024;
/// Pages that the guest writes per second meanwhile.
const DIRTY_RATE: u32 = 5000;
/// What is measured does not hang on how soon a loss is noticed, and a busy machine is not to look like one.
const HEARTBEAT_MS: u32 = 100;
const HEARTBEAT_MISSES: u32 = 10;

/// From when a standby is there, or the old primary knows that it is one, until the guest is protected.
#[derive(Debug, Serialize)]
pub(crate) struct Reprotect {
    /// `new`: it has nothing of the guest; `returned`: it is the old primary, which was stopped and has come back.
    standby: &'static str,
    runs: usize,
    mem_mib: u32,
    dirty_pages_per_s: u32,
    p50_s_per_gib: f64,
    max_s_per_gib: f64,
    /// Of all seeding rounds, median.
    sent_mib: f64,
}

/// Measures processes with a guest of 1 GiB, most of it filled with random content.
pub(crate) fn measure() -> Vec<Reprotect> {
    [("new", by_a_new_one as fn(&Path) -> (f64, f64)), ("returned", by_the_old_primary)]
        .map(|(standby, one)| {
            let runs = (0..RUNS).map(|_| one(tempfile::tempdir().expect("a folder").path()));
            let (mut times, mut sent): (Vec<f64>, Vec<f64>) = runs.unzip();
            let gib = f64::from(MEM_MIB) / 1024.0;
            Reprotect {
                standby,
                runs: RUNS,
                mem_mib: MEM_MIB,
                dirty_pages_per_s: DIRTY_RATE,
                p50_s_per_gib: median(&mut times) / gib,
                max_s_per_gib: quantile(&mut times, 1.0) / gib,
                sent_mib: median(&mut sent),
            }
        })
        .into()
}

/// Seconds, and MiB sent.
fn by_a_new_one(folder: &Path) -> (f64, f64) {
    let (primary, standby) = pair(folder);
    primary.signal(Signal::KILL);
    await_report(&standby.reports, |report| matches!(report, Report::Active { .. }));
    drop(primary);
    let _next = standby_at(folder, "a", &[]);
    await_protection(&standby, Instant::now())
}

/// As [`by_a_new_one`].
fn by_the_old_primary(folder: &Path) -> (f64, f64) {
    let (primary, standby) = pair(folder);
    primary.signal(Signal::STOP);
    await_report(&standby.reports, |report| matches!(report, Report::Active { .. }));
    primary.signal(Signal::CONT);
    await_report(&primary.reports, |report| matches!(report, Report::Frozen { .. }));
    await_protection(&standby, Instant::now())
}

/// A guest in lockstep: what is lost of the pair waits where the other one seeks a standby.
fn pair(folder: &Path) -> (Process, Process) {
    let seeks = [
        "--standby",
        &link(folder, "a"),
        "--heartbeat-ms",
        &HEARTBEAT_MS.to_string(),
        "--heartbeat-misses",
        &HEARTBEAT_MISSES.to_string(),
    ];
    let standby = standby_at(folder, "b", &seeks);
    let config = folder.join("vm.json");
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "embedded:guest",
            "boot_args": "workload=dirty dirty.rate={DIRTY_RATE} dirty.content=random"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": {MEM_MIB}}}}}"#
    );
    std::fs::write(&config, text).expect("a configuration");
    let (config, api) = (config.display().to_string(), folder.join("a.sock"));
    let primary = Process::start(&["run", "--config-file", &config, "--api-sock", &shown(folder, "a.sock")]);
    primary.console.await_text(|text| text.contains("ready cpu=0"));
    primary.await_api(&api);
    let (to, listen, witness) = (link(folder, "b"), link(folder, "a"), shown(folder, "witness"));
    let body = format!(
        r#"{{"standby": "{to}", "listen": "{listen}", "witness": "{witness}", "heartbeat_ms": {HEARTBEAT_MS}, "heartbeat_misses": {HEARTBEAT_MISSES}}}"#
    );
    let (status, answer) = request(&api, "PUT", "/mirror", &body).expect("it answers");
    assert_eq!(status, 204, "PUT /mirror: {answer}");
    await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
    (primary, standby)
}

fn standby_at(folder: &Path, place: &str, more: &[&str]) -> Process {
    let witness = shown(folder, "witness");
    Process::standby_with(&link(folder, place), &[&["--witness", &witness], more].concat())
}

/// Seconds since `began`, and MiB sent in rounds.
fn await_protection(side: &Process, began: Instant) -> (f64, f64) {
    let sent = Cell::new(0);
    await_report(&side.reports, |report| {
        if let Report::RoundDone { bytes, .. } = report {
            sent.set(sent.get() + bytes);
        }
        matches!(report, Report::Protected { .. })
    });
    (began.elapsed().as_secs_f64(), sent.get() as f64 / f64::from(1 << 20))
}

fn link(folder: &Path, place: &str) -> String {
    format!("unix:{}", folder.join(place).display())
}

fn shown(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}
