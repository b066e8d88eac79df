//! A process without a guest: the API says what to run, or loads a snapshot.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirror::console::Console;
use vmm::snapshot::{RestoreMode, RestoreSource, Snapshot};
use vmm::{Host, HostResources, Machine};

use crate::cli::InstanceOptions;
use crate::config::Draft;
use crate::exit::ExitStatus;
use crate::guest_run::run_on;
use crate::run::{Beginning, Ready, RunError};
use crate::server::types::{
    HugePagesOverride, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotLoad,
};
use crate::server::{Request, TOO_EARLY};
use crate::stage::{Happening, Stage};

/// Serves the API, with `draft` configured, until it is told to run a guest, runs that until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: there is no API then.
pub(crate) fn wait_and_run(draft: Draft, options: &InstanceOptions) -> Result<ExitStatus, RunError> {
    let Some(mut stage) = Stage::open(options, "primary")? else { return Ok(ExitStatus::Interrupted) };
    stage.configure(draft)?;
    stage.serve(options.api_sock.as_deref(), options.http_api_max_payload_size)?;
    while let Ok(happening) = stage.happenings.recv() {
        let Happening::Asked(request, answer) = happening else { return Ok(ExitStatus::Interrupted) };
        let ready = match request {
            Request::Start => configured(stage.draft()).map_err(|error| error.to_string()),
            Request::Load(load) => restore(&load).map_err(|reason| format!("Load snapshot error: {reason}")),
            _ => Err(TOO_EARLY.into()),
        };
        let begun = match ready {
            Ok(ready) => run_on(&mut stage, ready, options, Some(&answer)).map_err(|error| error.to_string()),
            Err(reason) => Err(reason),
        };
        match begun {
            Ok(status) => return Ok(status),
            // Whoever asked may have gone, or ask for something else.
            Err(reason) => drop(answer.send(Err(reason))),
        }
    }
    Ok(ExitStatus::Failure)
}

/// The machine that the API has asked for.
fn configured(draft: Draft) -> Result<Ready, RunError> {
    let template = draft.template()?;
    let unfinished = |(field, reason)| RunError::Unfinished(format!("{field} {reason}"));
    Ready::new(draft.finish(template).map_err(unfinished)?)
}

fn restore(load: &SnapshotLoad) -> Result<Ready, String> {
    let (memory, on_demand) = memory(load)?;
    if load.clock_realtime {
        return Err("clock_realtime is not supported: the guest's clock goes on where it stood".into());
    }
    if !matches!(load.huge_pages, None | Some(HugePagesOverride::Snapshot)) {
        return Err("huge_pages can only be as in the snapshot: leave it out".into());
    }
    let snapshot = Snapshot::open(&load.snapshot_path, memory).map_err(|error| error.to_string())?;
    let mode = if on_demand {
        RestoreMode::OnDemand { eager: true }
    } else if snapshot.config().huge_pages {
        RestoreMode::Copy
    } else {
        RestoreMode::Map
    };
    let net = |net: &NetworkOverride| (net.iface_id.clone(), net.host_dev_name.clone());
    let resources = HostResources {
        nets: load.network_overrides.iter().map(net).collect(),
        vsock: load.vsock_override.as_ref().map(|vsock| vsock.uds_path.clone()),
        ..HostResources::default()
    };
    let track_dirty_pages = load.track_dirty_pages || load.enable_diff_snapshots;
    let source = RestoreSource { chain: vec![snapshot], mode, resources, track_dirty_pages };
    let host = Host::open().map_err(|error| error.to_string())?;
    let console = Console::new(io::stdout()).map_err(|error| error.to_string())?;
    let machine =
        Machine::from_snapshot(&host, &source, Arc::clone(&console)).map_err(|error| error.to_string())?;
    let beginning = if load.resume_vm { Beginning::Running } else { Beginning::Paused };
    Ok(Ready { machine, console, beginning })
}

/// The memory file, and whether its pages come on demand.
fn memory(load: &SnapshotLoad) -> Result<(&PathBuf, bool), String> {
    match (&load.mem_file_path, &load.mem_backend) {
        (Some(path), None) => Ok((path, false)),
        (None, Some(MemoryBackend { backend_type: MemoryBackendType::File, backend_path })) => {
            Ok((backend_path, false))
        }
        (None, Some(MemoryBackend { backend_path, .. })) if is_socket(backend_path) => Err(format!(
            "{} is a socket, and no outside process can provide memory here: name the memory file, whose pages then come on demand",
            backend_path.display()
        )),
        (None, Some(MemoryBackend { backend_path, .. })) => Ok((backend_path, true)),
        (None, None) => Err("missing field: either `mem_backend` or `mem_file_path` is required".into()),
        (Some(_), Some(_)) => {
            Err("too many fields: either `mem_backend` or `mem_file_path` exclusively is required".into())
        }
    }
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}
