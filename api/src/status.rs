//! `understudy status`: how a primary or standby is.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use mirror::guest::DiskSync;
use mirror::shell::metrics::PauseSummary;
use mirror::shell::primary::StandbyFigures;
use mirror::shell::{primary, standby};
use serde::Serialize;

use crate::cli::StatusOptions;
use crate::client::{self, ClientError};
use crate::exit::ExitStatus;
use crate::long::{GLANCE, Interrupt};
use crate::progress::bytes;
use crate::server::{InstanceInfo, InstanceState, MirrorStatus};

/// Everything that there is to tell.
#[derive(Debug, Serialize)]
struct Everything {
    instance: InstanceInfo,
    mirror: Option<MirrorStatus>,
}

/// Why nobody takes over by himself, and what to do.
const NO_WITNESS: &str = "none: nothing would prove that the primary is dead, so no standby takes over by itself; give both sides \
                          the same --witness, or use `understudy promote` when the primary is lost";

/// Time between two questions.
const AGAIN: Duration = Duration::from_secs(1);

/// Moves to the upper left corner and clears the rest of each line on the way down, so that nothing flickers.
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K\n";
const REST_OF_SCREEN: &str = "\x1b[J";

/// Asks, and prints what is answered; again and again if so wished.
///
/// # Errors
/// [`ClientError`]
pub fn status(options: &StatusOptions) -> Result<ExitStatus, ClientError> {
    let first = ask(&options.api_sock)?;
    if !options.watch {
        show(&first, options.json, false);
        return Ok(ExitStatus::Success);
    }
    // Where signals cannot be watched, Ctrl-C ends the process as it does any other.
    let interrupt = Interrupt::watch().unwrap_or_default();
    let clear = !options.json && io::stdout().is_terminal();
    if clear {
        print!("\x1b[2J");
    }
    let mut everything = first;
    loop {
        if !show(&everything, options.json, clear) {
            // Whoever read it has gone.
            return Ok(ExitStatus::Success);
        }
        let next = Instant::now() + AGAIN;
        while Instant::now() < next {
            if interrupt.asked() {
                return Ok(ExitStatus::Interrupted);
            }
            thread::sleep(GLANCE);
        }
        everything = ask(&options.api_sock)?;
    }
}

fn ask(socket: &Path) -> Result<Everything, ClientError> {
    Ok(Everything { instance: client::get(socket, "/")?, mirror: client::mirror(socket)? })
}

/// Prints it, in place of what is on the screen if it is to `clear` that; says whether anybody reads it.
fn show(everything: &Everything, json: bool, clear: bool) -> bool {
    let text = if json { format!("{}\n", serde_json::json!(everything)) } else { text(everything) };
    let text =
        if clear { format!("{HOME}{}{REST_OF_SCREEN}", text.replace('\n', REST_OF_LINE)) } else { text };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
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
    match &status.standbys[..] {
        [] | [_] => row("standby", status.standby.to_string()),
        several => {
            for StandbyFigures { address, standing, acknowledged, .. } in several {
                row("standby", format!("{address}, {standing}, epoch {acknowledged}"));
            }
        }
    }
    let second_links = status.standbys.iter().filter_map(|standby| standby.second_link_up);
    for is_up in second_links {
        row("second link", if is_up { "there" } else { "LOST" }.into());
    }
    row("term, epoch", format!("{}, {}", status.term, status.epoch));
    row("witness", if status.witness { "yes" } else { NO_WITNESS }.into());
    row("seeding", seeding(status));
    if status.disk_sync.bytes > 0 {
        row("disks", disks(status.disk_sync));
    }
    row("epochs", format!("{} pages, {} sent", status.epoch_pages, bytes(status.epoch_bytes)));
    row("held output", bytes(status.held_bytes));
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
    if let Some(second) = &status.second_listen {
        row("second link on", second.to_string());
    }
    row("term, epoch", format!("{}, {}", status.term, status.epoch));
    row("witness", if status.witness { "yes" } else { NO_WITNESS }.into());
    let sense = &status.sense;
    row("received", format!("{} rounds, {} epochs, {} pages", sense.rounds, sense.epochs, sense.pages));
}

fn disks(sync: DiskSync) -> String {
    match sync {
        DiskSync { bytes: all, left, lags: true } => {
            format!("{} of {} still to be sent to the standby", bytes(left), bytes(all))
        }
        DiskSync { bytes: all, .. } => format!("{}, the standby has all of it", bytes(all)),
    }
}

fn seeding(status: &primary::Status) -> String {
    let primary::Status { round, round_sent, round_pages, seed_pages, seed_bytes, .. } = status;
    if status.phase == "seeding" {
        let percent = round_sent * 100 / round_pages.max(&1);
        return format!("round {round}, {percent}% of {round_pages} pages");
    }
    format!("{round} rounds, {seed_pages} pages, {} sent", bytes(*seed_bytes))
}
