//! `understudy pause`, `resume`, `snapshot` and `restore`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mirror::console::Console;
use vmm::snapshot::{RestoreError, RestoreMode, RestoreSource, Snapshot};
use vmm::{Host, HostResources, Machine};

use crate::cli::{RestoreOptions, SnapshotOptions, SocketOptions};
use crate::client::{self, ClientError, Method};
use crate::exit::ExitStatus;
use crate::run::{Beginning, Ready, RunError, run_machine};
use crate::server::types::{SnapshotCreate, SnapshotType, Vm, VmState};

/// How long a pause may take to come about.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to write a guest to files.
const LONG: Duration = Duration::from_hours(24);

/// Lets the guest stand still or go on.
///
/// # Errors
/// [`ClientError`]
pub fn set_state(options: &SocketOptions, state: VmState) -> Result<(), ClientError> {
    client::send(&options.api_sock, Method::PATCH, "/vm", &Vm { state }, PATIENCE)
}

/// Takes a snapshot.
///
/// # Errors
/// [`ClientError`]
pub fn snapshot(options: &SnapshotOptions) -> Result<(), ClientError> {
    // The other process has a folder of its own.
    let absolute = |path: &std::path::Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let body = SnapshotCreate {
        snapshot_type: if options.diff { SnapshotType::Diff } else { SnapshotType::Full },
        snapshot_path: absolute(&options.state),
        mem_file_path: absolute(&options.memory),
    };
    client::send(&options.api_sock, Method::PUT, "/snapshot/create", &body, LONG)
}

/// Runs a guest from a snapshot until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn restore(options: &RestoreOptions) -> Result<ExitStatus, RunError> {
    let console = Console::new(io::stdout())?;
    let machine = open(options, Arc::clone(&console))?;
    let beginning = if options.paused { Beginning::Paused } else { Beginning::Running };
    run_machine(Ready { machine, console, beginning }, &options.instance)
}

fn open(options: &RestoreOptions, console: Arc<Console>) -> Result<Machine, RestoreError> {
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
    Machine::from_snapshot(&host, &source, console)
}
