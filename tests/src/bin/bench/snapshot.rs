//! Snapshots of a guest that runs: its pause and the whole time. Restores: process start to first guest output.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mirror::report::Report;
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};
use tests::pair::{await_report, start_guest};
use tests::process::Process;
use vmm::snapshot::{Kind, SnapshotReport, SnapshotRequest};
use vmm::{Machine, MachineConfig};

use crate::figures::{median, quantile};

/// Guest memory in MiB; most of it filled with random content.
const MEM_MIB: u32 = 512;
/// Pages dirtied a second, before and while a snapshot is taken.
const DIRTY_RATE: u64 = 20_000;
const RUNS: usize = 5;
const MEMORY: &str = "/dev/shm";
const PAGE: f64 = 4096.0;

struct Files {
    state: PathBuf,
    memory: PathBuf,
}

impl Files {
    fn new(folder: &Path, name: &str) -> Self {
        Self { state: folder.join(format!("{name}.state")), memory: folder.join(format!("{name}.memory")) }
    }

    fn arguments(&self) -> [String; 4] {
        let text = |path: &Path| path.display().to_string();
        ["--state".into(), text(&self.state), "--memory".into(), text(&self.memory)]
    }

    /// The next to read it reads it from the disk.
    fn forget(&self) {
        for path in [&self.state, &self.memory] {
            let file = File::open(path).expect("the snapshot");
            file.sync_all().expect("the disk");
            fadvise(&file, 0, None, Advice::DontNeed).expect("advice");
        }
    }
}

/// Rows: full snapshots, differential ones of several sizes, and restores in each way, of files that are in the page
/// cache and of files that are not.
pub(crate) fn measure() -> Vec<Value> {
    // Taken to memory: a disk's patience is not ours to measure, and the guest dirties pages as long as it takes.
    let in_memory = tempfile::tempdir_in(MEMORY).expect("a folder in memory");
    let folder = tempfile::tempdir().expect("a folder");
    let config = MachineConfig::new(1, MEM_MIB).tracked();
    let cmdline =
        format!("workload=count,dirty count.rate=1000 dirty.rate={DIRTY_RATE} dirty.content=random");
    let (mut machine, _console, screen) = start_guest(&config, &cmdline);
    screen.await_text(|screen| screen.contains("ready cpu=0"));
    let files = Files::new(in_memory.path(), "full");
    let mut rows = vec![row("full", &series(&mut machine, Kind::Full, &files, Duration::ZERO), &files)];
    let diff = Files::new(in_memory.path(), "diff");
    for pages in [1000, 10_000, 30_000] {
        let wait = Duration::from_micros(pages * 1_000_000 / DIRTY_RATE);
        rows.push(row("differential", &series(&mut machine, Kind::Diff, &diff, wait), &diff));
    }
    drop(in_memory);
    let files = Files::new(folder.path(), "full");
    take(&mut machine, Kind::Full, &files);
    drop(machine);
    for cached in [true, false] {
        for how in ["map", "copy", "on-demand"] {
            rows.push(restore(how, cached, &files));
        }
    }
    rows
}

fn take(machine: &mut Machine, kind: Kind, files: &Files) -> SnapshotReport {
    let request = SnapshotRequest { kind, state: files.state.clone(), memory: files.memory.clone() };
    machine.snapshot(&request, &mut |_, _| ControlFlow::Continue(())).expect("a snapshot")
}

/// Snapshots, each `wait` after the one before.
fn series(machine: &mut Machine, kind: Kind, files: &Files, wait: Duration) -> Vec<SnapshotReport> {
    let mut next = || {
        thread::sleep(wait);
        take(machine, kind, files)
    };
    // The first has what was dirtied before.
    next();
    (0..RUNS).map(|_| next()).collect()
}

fn row(what: &str, reports: &[SnapshotReport], files: &Files) -> Value {
    let figures = |of: fn(&SnapshotReport) -> f64| reports.iter().map(of).collect::<Vec<_>>();
    let pages = median(&mut figures(|report| report.pages as f64));
    let total = median(&mut figures(|report| millis(report.took)));
    let raw = raw_write(pages as usize * PAGE as usize, &files.memory.with_extension("raw"));
    json!({
        "what": what,
        "runs": reports.len(),
        "mem_mib": MEM_MIB,
        "pages": pages,
        "rounds": median(&mut figures(|report| f64::from(report.rounds))),
        "pause_p50_ms": median(&mut figures(|report| millis(report.pause))),
        "pause_max_ms": quantile(&mut figures(|report| millis(report.pause)), 1.0),
        "stop_ms": median(&mut figures(|report| millis(report.stop))),
        "harvest_ms": median(&mut figures(|report| millis(report.harvest))),
        "copied_pages": median(&mut figures(|report| report.staged as f64)),
        "copy_ms": median(&mut figures(|report| millis(report.copy))),
        "capture_ms": median(&mut figures(|report| millis(report.capture))),
        "resume_ms": median(&mut figures(|report| millis(report.resume))),
        "total_ms": total,
        "raw_write_ms": raw,
        "total_to_raw": total / raw,
    })
}

/// Milliseconds that it takes to write `bytes` to `path` and to stable storage.
fn raw_write(bytes: usize, path: &Path) -> f64 {
    let body = vec![0x5a; 1 << 20];
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let began = Instant::now();
            let mut file = File::create(path).expect("a file");
            let mut left = bytes;
            while left > 0 {
                let count = left.min(body.len());
                file.write_all(&body[..count]).expect("room");
                left -= count;
            }
            file.sync_all().expect("the disk");
            let took = millis(began.elapsed());
            fs::remove_file(path).expect("our own file");
            took
        })
        .collect();
    median(&mut times)
}

fn restore(how: &str, cached: bool, files: &Files) -> Value {
    let mut firsts = Vec::new();
    let mut wholes = Vec::new();
    for _ in 0..RUNS {
        if cached {
            drop(fs::read(&files.memory).expect("the snapshot"));
        } else {
            files.forget();
        }
        let mut arguments = vec!["restore".to_owned()];
        arguments.extend(files.arguments());
        if how != "map" {
            arguments.push(format!("--{how}"));
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let began = Instant::now();
        let restored = Process::start(&arguments);
        restored.console.await_text(|text| !text.is_empty());
        firsts.push(millis(began.elapsed()));
        if how == "on-demand" {
            let whole = |report: &Report| matches!(report, Report::MemoryComplete { .. });
            if let Report::MemoryComplete { micros, .. } = await_report(&restored.reports, whole) {
                wholes.push(micros as f64 / 1000.0);
            }
        }
    }
    let mut row = json!({
        "what": format!("restore by {how}"),
        "runs": RUNS,
        "mem_mib": MEM_MIB,
        "cached": u8::from(cached),
        "first_output_ms": median(&mut firsts),
    });
    if !wholes.is_empty() {
        row["all_memory_ms"] = median(&mut wholes).into();
    }
    row
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
