//! Failover time: kill -9 of a primary process to the first released output of the standby.

use std::path::Path;
use std::process::Command;

use serde::Serialize;
use serde_json::Value;

use crate::figures::{median, quantile};

const RUNS: usize = 10;

/// Quantiles in milliseconds, from the kill on.
#[derive(Debug, Serialize)]
// The figures are named as they are reported.
#[allow(clippy::struct_field_names)]
pub(crate) struct Failover {
    vcpus: u8,
    runs: usize,
    survived: usize,
    detect_p50_ms: f64,
    detect_max_ms: f64,
    /// From the detection to the running guest.
    resume_p50_ms: f64,
    resume_max_ms: f64,
    failover_p50_ms: f64,
    failover_max_ms: f64,
}

/// Measures `understudy demo` with one and two vCPUs: 512 MiB, 20,000 pages dirtied a second.
pub(crate) fn measure(understudy: &Path) -> Vec<Failover> {
    [1, 2].map(|vcpus| with(understudy, vcpus)).into()
}

fn with(understudy: &Path, vcpus: u8) -> Failover {
    let mut reports: Vec<Value> = Vec::new();
    for _ in 0..RUNS {
        // One by one: each is then killed in lockstep.
        let output = Command::new(understudy)
            .args(["demo", "--json", "--vcpus", &vcpus.to_string()])
            .output()
            .expect("understudy starts");
        reports.push(serde_json::from_slice(&output.stdout).expect("the demo reports in JSON"));
    }
    let survived = reports.iter().filter(|report| report["outcome"] == "survived").count();
    let series = |key: &str| reports.iter().filter_map(|report| report[key].as_f64()).collect::<Vec<_>>();
    Failover {
        vcpus,
        runs: RUNS,
        survived,
        detect_p50_ms: median(&mut series("detect_ms")),
        detect_max_ms: quantile(&mut series("detect_ms"), 1.0),
        resume_p50_ms: median(&mut series("resume_ms")),
        resume_max_ms: quantile(&mut series("resume_ms"), 1.0),
        failover_p50_ms: median(&mut series("failover_ms")),
        failover_max_ms: quantile(&mut series("failover_ms"), 1.0),
    }
}
