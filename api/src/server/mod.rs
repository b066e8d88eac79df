//! The API server: HTTP on a Unix socket, in a thread of its own.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use devices::rate_limiter::RateLimiterConfig;
use rustix::fs::Mode;
use rustix::process::umask;
use thiserror::Error;
use vmm::snapshot::SnapshotRequest;

mod routes;
pub mod types;

use types::SnapshotLoad;
pub use types::{InstanceInfo, InstanceState, MirrorStatus, Switchover, Version};

/// What a guest's process is told to do with it.
#[derive(Clone, Debug)]
pub enum Order {
    /// Let it stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Take a snapshot.
    Snapshot(SnapshotRequest),
    /// Change a disk.
    Drive(DriveChange),
    /// Change the limits on a network card; what is not named stays as it is.
    Net {
        /// Its name.
        id: String,
        /// On what the guest receives.
        receive: RateLimiterConfig,
        /// On what it sends.
        send: RateLimiterConfig,
    },
}

/// What is to become of a disk.
#[derive(Clone, Debug)]
pub struct DriveChange {
    /// Its name.
    pub id: String,
    /// Another image.
    pub image: Option<PathBuf>,
    /// Other limits; what is not named stays as it is.
    pub limits: RateLimiterConfig,
}

/// What the API tells about.
pub trait Instance: Send + Sync {
    /// Who it is and whether its guest runs.
    fn info(&self) -> InstanceInfo;

    /// How its mirror is; `None` if there is none.
    fn mirror(&self) -> Option<MirrorStatus>;

    /// Lets the guest stand still or go on, or takes a snapshot of it; returns when that is done.
    ///
    /// # Errors
    /// Why it is not done.
    fn order(&self, _order: Order) -> Result<(), String> {
        Err("this side runs no guest that could be paused or snapshotted".into())
    }

    /// Runs a guest from a snapshot, where there is none yet; returns when that is done.
    ///
    /// # Errors
    /// Why it is not done.
    fn load(&self, _load: SnapshotLoad) -> Result<(), String> {
        Err("this side waits for the guest of a primary and loads no other".into())
    }

    /// Lets the standby run the guest from now on; returns how long the guest ran on neither side.
    ///
    /// # Errors
    /// Why it does not.
    fn switchover(&self) -> Result<Duration, String> {
        Err("this side mirrors no guest that it could hand over".into())
    }
}

/// Why there is no API server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Another process serves there.
    #[error("cannot serve the API on {0}: another process does; end it or name another socket")]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("cannot serve the API on {path}: {source}")]
    Bind {
        /// Which socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A running API server. Its socket is removed when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
}

impl Server {
    /// Serves `instance` on a Unix socket at `path`, for this user alone (mode 0600). A socket that a process left
    /// behind is replaced.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn start(path: &Path, instance: Arc<dyn Instance>) -> Result<Self, ServerError> {
        let listener = bind(path)?;
        let server = Self { path: path.into() };
        let fail = |source| ServerError::Bind { path: path.into(), source };
        listener.set_nonblocking(true).map_err(fail)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(fail)?;
        let serve = move || {
            let outcome: io::Result<()> = runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                axum::serve(listener, routes::router(instance)).await
            });
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
    }
}

fn bind(path: &Path) -> Result<UnixListener, ServerError> {
    let fail = |source| ServerError::Bind { path: path.into(), source };
    match UnixStream::connect(path) {
        Ok(_) => return Err(ServerError::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(fail)?;
        }
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
