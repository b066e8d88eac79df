//! Failover as clients of a service feel it: from the end of the primary to the first request that is answered again.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use mirror::primary::Settings;
use serde::Serialize;
use serde_json::Value;

use crate::figures::quantile;

const RUNS: usize = 100;

/// Milliseconds from the fault on.
#[derive(Debug, Serialize)]
pub(crate) struct ServiceFailover {
    /// How the primary's end is noticed.
    detection: &'static str,
    fault: &'static str,
    heartbeat_ms: u64,
    heartbeat_misses: u32,
    runs: usize,
    survived: usize,
    violations: usize,
    detect_p50_ms: f64,
    detect_p99_ms: f64,
    /// The standby runs the guest.
    resume_p50_ms: f64,
    resume_p99_ms: f64,
    first_answer_p50_ms: f64,
    first_answer_p99_ms: f64,
    first_answer_max_ms: f64,
}

/// Measures `understudy drill kill`, where the link closes, and `understudy drill stop`, where it stays and is silent.
pub(crate) fn measure(understudy: &Path) -> Vec<ServiceFailover> {
    [("link closed", "SIGKILL", "kill"), ("heartbeats missed", "SIGSTOP", "stop")]
        .map(|(detection, fault, drill)| with(understudy, detection, fault, drill))
        .into()
}

fn with(understudy: &Path, detection: &'static str, fault: &'static str, drill: &str) -> ServiceFailover {
    let mut child = Command::new(understudy)
        .args(["drill", drill, "--json", "--runs", &RUNS.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("understudy starts");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let mut runs: Vec<Value> = Vec::new();
    for line in lines {
        let line = line.expect("the drill reports");
        runs.push(serde_json::from_str(&line).expect("the drill reports in JSON"));
        if runs.len().is_multiple_of(10) {
            eprintln!("bench: drill {drill}: {} of {RUNS}", runs.len());
        }
    }
    child.wait().expect("the child is ours");
    let survived = runs.iter().filter(|run| run["outcome"] == "survived").count();
    let violations = runs.iter().filter_map(|run| run["violations"].as_array()).map(Vec::len).sum();
    let at = |key: &str, q: f64| {
        let mut series: Vec<f64> = runs.iter().filter_map(|run| Some(run[key].as_f64()? / 1000.0)).collect();
        quantile(&mut series, q)
    };
    let Settings { heartbeat, misses, .. } = Settings::default();
    ServiceFailover {
        detection,
        fault,
        heartbeat_ms: heartbeat.as_millis() as u64,
        heartbeat_misses: misses,
        runs: runs.len(),
        survived,
        violations,
        detect_p50_ms: at("detected_us", 0.5),
        detect_p99_ms: at("detected_us", 0.99),
        resume_p50_ms: at("resumed_us", 0.5),
        resume_p99_ms: at("resumed_us", 0.99),
        first_answer_p50_ms: at("answered_us", 0.5),
        first_answer_p99_ms: at("answered_us", 0.99),
        first_answer_max_ms: at("answered_us", 1.0),
    }
}
