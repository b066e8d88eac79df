//! The client of the API.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
pub use hyper::Method;
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use crate::server::types::{Fault, Vm, VmState};
use crate::server::{MirrorStatus, Switchover, SwitchoverOrder};
use mirror::link::Address;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a pause may take to come about.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take until another side runs the guest.
const ORDER_PATIENCE: Duration = Duration::from_mins(1);

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves there.
    #[error("nobody serves an API on {path}: {source}; start a primary or standby with --api-sock {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The answer is an error.
    #[error("{path} answers {status}: {message}")]
    Fault {
        /// The socket.
        path: PathBuf,
        /// HTTP status.
        status: u16,
        /// What is wrong.
        message: String,
    },
    /// There is no whole answer, or none that is understood.
    #[error("{path} does not answer as an API of this program does: {reason}")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Asks the API on the socket `path` for `resource` (such as `/mirror`).
///
/// # Errors
/// [`ClientError`]
pub fn get<T: DeserializeOwned>(path: &Path, resource: &str) -> Result<T, ClientError> {
    request(path, Method::GET, resource, Vec::new(), PATIENCE)
}

/// Sends `body` to `resource` at the API on the socket `path`, which answers with nothing and may take `patience`.
///
/// # Errors
/// [`ClientError`]
pub fn send(
    path: &Path,
    method: Method,
    resource: &str,
    body: &impl Serialize,
    patience: Duration,
) -> Result<(), ClientError> {
    let body = serde_json::to_vec(body)
        .map_err(|error| ClientError::Answer { path: path.into(), reason: error.to_string() })?;
    request(path, method, resource, body, patience)
}

/// How the mirror of the process at the socket `path` is; `None` if there is none.
///
/// # Errors
/// [`ClientError`]
pub fn mirror(path: &Path) -> Result<Option<MirrorStatus>, ClientError> {
    match get(path, "/mirror") {
        Err(ClientError::Fault { status: 404, .. }) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Lets the guest of the process at the socket `path` stand still or go on.
///
/// # Errors
/// [`ClientError`]
pub fn set_state(path: &Path, state: VmState) -> Result<(), ClientError> {
    send(path, Method::PATCH, "/vm", &Vm { state }, PAUSE_PATIENCE)
}

/// Has the guest of the primary at the socket `path` handed over to its standby, or to the one at `to`.
///
/// # Errors
/// [`ClientError`]: also why it was not.
pub fn switchover(path: &Path, to: Option<&Address>) -> Result<Switchover, ClientError> {
    let order = SwitchoverOrder { to: to.cloned() };
    let body = serde_json::to_vec(&order)
        .map_err(|error| ClientError::Answer { path: path.into(), reason: error.to_string() })?;
    request(path, Method::PUT, "/mirror/switchover", body, ORDER_PATIENCE)
}

/// Has the standby at the socket `path`, whose primary is lost, run the guest.
///
/// # Errors
/// [`ClientError`]: also why it does not.
pub fn promote(path: &Path) -> Result<(), ClientError> {
    send(path, Method::PUT, "/mirror/failover", &(), ORDER_PATIENCE)
}

/// Asks the API on the socket `path` for `resource`, which is text.
///
/// # Errors
/// [`ClientError`]
pub fn text(path: &Path, resource: &str) -> Result<String, ClientError> {
    let (_, body) = exchange(path, Method::GET, resource, Vec::new(), PATIENCE)?;
    String::from_utf8(body.into())
        .map_err(|error| ClientError::Answer { path: path.into(), reason: error.to_string() })
}

/// The same place as seen by another process, which has a folder of its own.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

fn request<T: DeserializeOwned>(
    path: &Path,
    method: Method,
    resource: &str,
    body: Vec<u8>,
    patience: Duration,
) -> Result<T, ClientError> {
    let (status, body) = exchange(path, method, resource, body, patience)?;
    // Nothing, in JSON.
    let json = if status == 204 { &b"null"[..] } else { &body };
    serde_json::from_slice(json)
        .map_err(|error| ClientError::Answer { path: path.into(), reason: error.to_string() })
}

/// The status and the body of an answer that is no error.
fn exchange(
    path: &Path,
    method: Method,
    resource: &str,
    body: Vec<u8>,
    patience: Duration,
) -> Result<(u16, Bytes), ClientError> {
    let answer = |reason: String| ClientError::Answer { path: path.into(), reason };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| answer(error.to_string()))?;
    let (status, body) = runtime.block_on(async {
        let within = tokio::time::timeout(patience, ask(path, method, resource, body)).await;
        within.unwrap_or_else(|_| Err(answer(format!("nothing came within {} s", patience.as_secs()))))
    })?;
    if matches!(status, 200 | 204) {
        return Ok((status, body));
    }
    let message = serde_json::from_slice::<Fault>(&body)
        .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |fault| fault.fault_message);
    Err(ClientError::Fault { path: path.into(), status, message })
}

async fn ask(
    path: &Path,
    method: Method,
    resource: &str,
    body: Vec<u8>,
) -> Result<(u16, Bytes), ClientError> {
    let answer = |reason: String| ClientError::Answer { path: path.into(), reason };
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| ClientError::Connect { path: path.into(), source })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| answer(error.to_string()))?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(resource)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| answer(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| answer(error.to_string()))?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    connection.abort();
    Ok((status, body.map_err(|error| answer(error.to_string()))?.to_bytes()))
}
