//! `understudy status`: how a primary or standby is.

use std::fmt::Write as _;

use mirror::shell::metrics::PauseSummary;
use mirror::shell::{primary, standby};
use serde::Serialize;

use crate::cli::StatusOptions;
use crate::client::{self, ClientError};
use crate::server::{InstanceInfo, InstanceState, MirrorStatus};

/// Everything that there is to tell.
#[derive(Debug, Serialize)]
struct Everything {
    instance: InstanceInfo,
    mirror: Option<MirrorStatus>,
}

/// Asks, and prints what is answered.
///
/// # Errors
/// [`ClientError`]
pub fn status(options: &StatusOptions) -> Result<(), ClientError> {
    let instance = client::get(&options.api_sock, "/")?;
    let mirror = match client::get(&options.api_sock, "/mirror") {
        Err(ClientError::Fault { status: 404, .. }) => None,
        answer => Some(answer?),
    };
    let everything = Everything { instance, mirror };
    if options.json {
        println!("{}", serde_json::json!(everything));
    } else {
        print!("{}", text(&everything));
    }
    Ok(())
}

fn text(everything: &Everything) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name:<14}{value}");
    };
    let InstanceInfo { id, state, vmm_version, .. } = &everything.instance;
    let state = match state {
        InstanceState::NotStarted => "not running here",
        InstanceState::Paused => "paused",
        InstanceState::Running => "running",
    };
    row("instance", format!("{id} (version {vmm_version})"));
    row("guest", state.into());
    match &everything.mirror {
        None => row("mirror", "none".into()),
        Some(MirrorStatus::Primary(status)) => primary_rows(status, row),
        Some(MirrorStatus::Standby(status)) => standby_rows(status, row),
    }
    out
}

fn primary_rows(status: &primary::Status, mut row: impl FnMut(&str, String)) {
    row("role", format!("{}, {}", status.role, status.phase));
    row("guid", status.guid.to_string());
    row("standby", status.standby.to_string());
    row("term, epoch", format!("{}, {}", status.term, status.epoch));
    row("witness", if status.witness { "yes" } else { "none: no automatic failover" }.into());
    row(
        "seeding",
        format!("round {}, {} pages, {} sent", status.round, status.seed_pages, mib(status.seed_bytes)),
    );
    row("epochs", format!("{} pages, {} sent", status.epoch_pages, mib(status.epoch_bytes)));
    row("held output", format!("{} bytes", status.held_bytes));
    let PauseSummary { pause_us, commit_us, .. } = status.times;
    for (name, times) in [("pause", pause_us), ("commit", commit_us)] {
        let (p50, p99, max) = (times.p50, times.p99, times.max);
        row(name, format!("p50 {p50} µs, p99 {p99} µs, max {max} µs (of {})", times.count));
    }
}

fn standby_rows(status: &standby::Status, mut row: impl FnMut(&str, String)) {
    row("role", format!("{}, {}", status.role, status.phase));
    row("guid", status.guid.map_or_else(|| "none".into(), |guid| guid.to_string()));
    row("listens on", status.listen.to_string());
    row("term, epoch", format!("{}, {}", status.term, status.epoch));
    row("witness", if status.witness { "yes" } else { "none: promotion by hand" }.into());
    let sense = &status.sense;
    row("received", format!("{} rounds, {} epochs, {} pages", sense.rounds, sense.epochs, sense.pages));
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / 1_048_576.0)
}
