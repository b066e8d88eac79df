//! The routes of the API.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, put};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use vmm::snapshot::{Kind, SnapshotRequest};

use super::types::{
    Fault, PartialDrive, PartialNetworkInterface, SnapshotCreate, SnapshotLoad, SnapshotType, Switchover,
    Version, Vm, VmState,
};
use super::{DriveChange, Instance, Order};
use crate::config::devices::RateLimiter;

type Shared = State<Arc<dyn Instance>>;

/// All routes, answering for `instance`.
pub(super) fn router(instance: Arc<dyn Instance>) -> Router {
    Router::new()
        .route("/", get(info))
        .route("/version", get(version))
        .route("/mirror", get(mirror))
        .route("/mirror/switchover", put(switchover))
        .route("/snapshot/create", put(create_snapshot))
        .route("/snapshot/load", put(load_snapshot))
        .route("/drives/{id}", patch(change_drive))
        .route("/network-interfaces/{id}", patch(change_net))
        .route("/vm", patch(set_state))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(instance)
}

async fn info(State(instance): Shared) -> Response {
    Json(instance.info()).into_response()
}

async fn version() -> Response {
    Json(Version { firecracker_version: env!("CARGO_PKG_VERSION").into() }).into_response()
}

async fn mirror(State(instance): Shared) -> Response {
    match instance.mirror() {
        Some(status) => Json(status).into_response(),
        None => fault(StatusCode::NOT_FOUND, "this guest is not mirrored".into()),
    }
}

async fn switchover(State(instance): Shared) -> Response {
    let waiting = tokio::task::spawn_blocking(move || instance.switchover());
    match waiting.await {
        Ok(Ok(pause)) => Json(Switchover { pause_us: pause.as_micros() as u64 }).into_response(),
        Ok(Err(reason)) => {
            fault(StatusCode::BAD_REQUEST, format!("The guest was not handed over: {reason}."))
        }
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

async fn create_snapshot(State(instance): Shared, body: Bytes) -> Response {
    match parse::<SnapshotCreate>(&body) {
        Ok(SnapshotCreate { snapshot_type, snapshot_path, mem_file_path }) => {
            let kind = match snapshot_type {
                SnapshotType::Full => Kind::Full,
                SnapshotType::Diff => Kind::Diff,
            };
            let request = SnapshotRequest { kind, state: snapshot_path, memory: mem_file_path };
            order(instance, Order::Snapshot(request)).await
        }
        Err(response) => *response,
    }
}

async fn load_snapshot(State(instance): Shared, body: Bytes) -> Response {
    match parse::<SnapshotLoad>(&body) {
        Ok(load) => answer(move || instance.load(load)).await,
        Err(response) => *response,
    }
}

async fn set_state(State(instance): Shared, body: Bytes) -> Response {
    match parse::<Vm>(&body) {
        Ok(Vm { state: VmState::Paused }) => order(instance, Order::Pause).await,
        Ok(Vm { state: VmState::Resumed }) => order(instance, Order::Resume).await,
        Err(response) => *response,
    }
}

async fn change_drive(State(instance): Shared, Path(id): Path<String>, body: Bytes) -> Response {
    match parse::<PartialDrive>(&body) {
        Ok(PartialDrive { drive_id, .. }) if drive_id != id => other_id(),
        Ok(PartialDrive { path_on_host, rate_limiter, .. }) => {
            let limits = rate_limiter.map(|limiter| limiter.limits()).unwrap_or_default();
            order(instance, Order::Drive(DriveChange { id, image: path_on_host, limits })).await
        }
        Err(response) => *response,
    }
}

async fn change_net(State(instance): Shared, Path(id): Path<String>, body: Bytes) -> Response {
    match parse::<PartialNetworkInterface>(&body) {
        Ok(PartialNetworkInterface { iface_id, .. }) if iface_id != id => other_id(),
        Ok(PartialNetworkInterface { rx_rate_limiter, tx_rate_limiter, .. }) => {
            let limits = |limiter: Option<RateLimiter>| limiter.map(|it| it.limits()).unwrap_or_default();
            let (receive, send) = (limits(rx_rate_limiter), limits(tx_rate_limiter));
            order(instance, Order::Net { id, receive, send }).await
        }
        Err(response) => *response,
    }
}

fn other_id() -> Response {
    let message = "The id from the path does not match the id from the body!";
    fault(StatusCode::BAD_REQUEST, message.into())
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        let message = format!("An error occurred when deserializing the json body of a request: {error}.");
        Box::new(fault(StatusCode::BAD_REQUEST, message))
    })
}

async fn order(instance: Arc<dyn Instance>, order: Order) -> Response {
    answer(move || instance.order(order)).await
}

/// What comes of `work`, which may take its time.
async fn answer(work: impl FnOnce() -> Result<(), String> + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => StatusCode::NO_CONTENT.into_response(),
        Ok(Err(reason)) => fault(StatusCode::BAD_REQUEST, format!("{reason}.")),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// In Firecracker's words, which its clients know.
async fn unknown(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    fault(StatusCode::BAD_REQUEST, format!("Invalid request method and/or path: {method} {path}."))
}

fn fault(status: StatusCode, fault_message: String) -> Response {
    (status, Json(Fault { fault_message })).into_response()
}
