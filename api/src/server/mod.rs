//! The API server: HTTP on a Unix socket, in a thread of its own.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::umask;
use thiserror::Error;
use tokio::sync::oneshot;
use vmm::DeviceLimits;

pub mod firecracker;
mod request;
mod routes;
pub mod types;

pub use request::{DriveChange, Request, TOO_EARLY, TOO_LATE, When};
pub use routes::openapi;
use types::{BalloonStats, Progress};
pub use types::{InstanceInfo, InstanceState, MirrorStatus, Switchover, SwitchoverOrder, Version};

use crate::config::Draft;
use crate::metrics::Meters;
use mirror::link::Address;

/// Longest body that is taken unless the command line says otherwise, in bytes; Firecracker's.
pub const MAX_BODY: usize = 51_200;

/// What the API tells about and changes.
pub trait Instance: Send + Sync {
    /// Who it is and whether its guest runs.
    fn info(&self) -> InstanceInfo;

    /// What it is configured to run.
    fn draft(&self) -> Draft;

    /// How its mirror is; `None` if there is none.
    fn mirror(&self) -> Option<MirrorStatus>;

    /// What its process counts.
    fn meters(&self) -> &Meters;

    /// The guest that it has, for what its devices count; `None` if there is none.
    fn guest(&self) -> Option<DeviceLimits> {
        None
    }

    /// How far the snapshot is that is being taken; `None` if there is none.
    fn snapshot_progress(&self) -> Option<Progress> {
        None
    }

    /// What the guest tells of its memory.
    ///
    /// # Errors
    /// Why it tells nothing.
    fn balloon_statistics(&self) -> Result<BalloonStats, String>;

    /// The metadata that was put; `None` if there is none.
    fn metadata(&self) -> Option<serde_json::Value> {
        None
    }

    /// Has something done; returns when it is.
    ///
    /// # Errors
    /// Why it is not; nothing has changed then.
    fn ask(&self, request: Request) -> Result<(), String>;

    /// Lets the standby run the guest from now on; returns how long the guest ran on neither side.
    ///
    /// # Errors
    /// Why it does not.
    fn switchover(&self, to: Option<Address>) -> Result<Duration, String>;
}

/// Why there is no API server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Another process serves there.
    #[error("cannot serve the API on {0}: another process does; end it or name another socket")]
    InUse(PathBuf),
    /// There is something else.
    #[error(
        "cannot serve the API on {0}: something that is no unused socket is there; name another path, or remove it"
    )]
    NoSocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot serve the API on {path}: {source}")]
    Bind {
        /// Which socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// How long the answers may take that are under way when a server ends.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// A running API server. When this is dropped its socket is removed, and who waits for an answer gets it.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    end: Option<oneshot::Sender<()>>,
    ended: Receiver<()>,
}

impl Server {
    /// Serves `instance` on a Unix socket at `path`, for this user alone (mode 0600), with bodies of at most `max_body` bytes. A socket that a process left
    /// behind is replaced.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn start(path: &Path, instance: Arc<dyn Instance>, max_body: usize) -> Result<Self, ServerError> {
        let listener = bind(path)?;
        let (end, told) = oneshot::channel();
        let (over, ended) = channel();
        let server = Self { path: path.into(), end: Some(end), ended };
        let fail = |source| ServerError::Bind { path: path.into(), source };
        listener.set_nonblocking(true).map_err(fail)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(fail)?;
        let serve = move || {
            let outcome: io::Result<()> = runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                // Also when nobody can tell any more.
                let told = async { drop(told.await) };
                axum::serve(listener, routes::router(instance, max_body)).with_graceful_shutdown(told).await
            });
            // Whoever ended the server does not wait for ever.
            let _ = over.send(());
            runtime.shutdown_background();
            if let Err(error) = outcome {
                eprintln!("api: the server has ended: {error}");
            }
        };
        thread::Builder::new().name("api".into()).spawn(serve).map_err(fail)?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
        // The process may end with this: of a switchover, for instance, the answer is still on its way.
        if let Some(end) = self.end.take().filter(|end| !end.is_closed()) {
            let _ = end.send(());
            let _ = self.ended.recv_timeout(LAST_ANSWERS);
        }
    }
}

fn is_socket(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_socket())
}

fn bind(path: &Path) -> Result<UnixListener, ServerError> {
    let fail = |source| ServerError::Bind { path: path.into(), source };
    match UnixStream::connect(path) {
        Ok(_) => return Err(ServerError::InUse(path.into())),
        // A file that is no socket refuses, too; it is somebody's.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path) => {
            std::fs::remove_file(path).map_err(fail)?;
        }
        Err(_) if path.exists() => return Err(ServerError::NoSocket(path.into())),
        Err(_) => {}
    }
    // The mask makes the socket private from its first moment on.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound.map_err(fail)
}

#[cfg(test)]
mod tests;
