//! `understudy snapshot` and `restore`.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mirror::console::Console;
use vmm::snapshot::{RestoreError, RestoreMode, RestoreSource, Snapshot};
use vmm::{Host, HostResources, Machine};

use crate::cli::{RestoreOptions, SnapshotOptions};
use crate::client::{self, ClientError, Method};
use crate::exit::ExitStatus;
use crate::guest_run::run_on;
use crate::long::{Interrupt, watched};
use crate::progress;
use crate::run::{Beginning, Ready, RunError};
use crate::server::types::{Progress, SnapshotCreate, SnapshotType};
use crate::stage::Stage;

/// How long it may take to break a snapshot off.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to write a guest to files.
const LONG: Duration = Duration::from_hours(24);

/// Takes a snapshot. Ctrl-C breaks it off: the guest runs on, and nothing appears under the names of its files.
///
/// # Errors
/// [`ClientError`]
pub fn snapshot(options: &SnapshotOptions) -> Result<ExitStatus, ClientError> {
    let socket = &options.api_sock;
    let body = SnapshotCreate {
        snapshot_type: if options.diff { SnapshotType::Diff } else { SnapshotType::Full },
        snapshot_path: client::absolute(&options.state),
        mem_file_path: client::absolute(&options.memory),
    };
    // Where signals cannot be watched, Ctrl-C ends this process, and the snapshot is taken to its end.
    let interrupt = Interrupt::watch().unwrap_or_default();
    let mut progress = progress::Progress::new(options.progress);
    let mut cancelled = false;
    let taken = watched(
        || client::send(socket, Method::PUT, "/snapshot/create", &body, LONG),
        || {
            if interrupt.asked() {
                // One that has not begun is cancelled when it has.
                cancelled |= client::send(socket, Method::DELETE, "/snapshot/create", &(), PATIENCE).is_ok();
            } else if let Ok(Progress { done, pages, .. }) = client::get(socket, "/snapshot/create") {
                progress.tell("snapshot", done, pages);
            }
        },
    );
    progress.finish();
    match taken {
        Ok(()) => Ok(ExitStatus::Success),
        Err(ClientError::Fault { .. }) if cancelled => {
            eprintln!("broken off: the guest runs on, and no file was written");
            Ok(ExitStatus::Interrupted)
        }
        Err(error) => Err(error),
    }
}

/// Runs a guest from a snapshot until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn restore(options: &RestoreOptions) -> Result<ExitStatus, RunError> {
    // First of all: it is what notices that the process is to end.
    let Some(mut stage) = Stage::open(&options.instance, "primary")? else {
        return Ok(ExitStatus::Interrupted);
    };
    let console = Console::new(io::stdout())?;
    let mut progress = progress::Progress::new(options.progress);
    let ending = Arc::clone(&stage.ending);
    let mut tell = |done, pages| {
        progress.tell("memory", done, pages);
        if ending.load(Ordering::Acquire) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let machine = match open(options, Arc::clone(&console), &mut tell) {
        Err(RestoreError::Cancelled) => return Ok(ExitStatus::Interrupted),
        machine => machine?,
    };
    progress.finish();
    let beginning = if options.paused { Beginning::Paused } else { Beginning::Running };
    run_on(&mut stage, Ready { machine, console, beginning }, &options.instance, None)
}

fn open(
    options: &RestoreOptions,
    console: Arc<Console>,
    progress: vmm::snapshot::Progress<'_>,
) -> Result<Machine, RestoreError> {
    let mut chain = vec![Snapshot::open(&options.state, &options.memory)?];
    for (state, memory) in &options.diffs {
        chain.push(Snapshot::open(state, memory)?);
    }
    let mode = if options.on_demand {
        RestoreMode::OnDemand { eager: true }
    } else if options.copy || !options.diffs.is_empty() {
        RestoreMode::Copy
    } else {
        RestoreMode::Map
    };
    let source = RestoreSource {
        chain,
        mode,
        resources: HostResources {
            drives: options.drives.iter().map(|(id, path)| (id.clone(), path.into())).collect(),
            nets: options.nets.iter().cloned().collect(),
            vsock: options.vsock.clone(),
            console: options.console.clone(),
        },
        track_dirty_pages: options.track_dirty_pages,
    };
    let host = Host::open().map_err(vmm::CreateError::Host)?;
    Machine::from_snapshot_telling(&host, &source, console, progress)
}
