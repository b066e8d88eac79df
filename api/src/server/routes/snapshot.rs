//! The guest in files.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use vmm::snapshot::{Kind, SnapshotRequest};

use super::{Body, Shared, ask, fault};
use crate::server::Request;
use crate::server::types::{Fault, Progress, SnapshotCreate, SnapshotLoad, SnapshotType};

/// Write the guest to files while it runs; answered when that is done
#[utoipa::path(put, path = "/snapshot/create", tag = "snapshot", request_body = SnapshotCreate, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn create(State(instance): Shared, Body(create): Body<SnapshotCreate>) -> Response {
    let SnapshotCreate { snapshot_type, snapshot_path, mem_file_path } = create;
    let kind = match snapshot_type {
        SnapshotType::Full => Kind::Full,
        SnapshotType::Diff => Kind::Diff,
    };
    let request = SnapshotRequest { kind, state: snapshot_path, memory: mem_file_path };
    ask(instance, Request::Snapshot(request)).await
}

/// How far the snapshot is that is being taken
#[utoipa::path(get, path = "/snapshot/create", tag = "snapshot", responses((status = 200, body = Progress), (status = 400, body = Fault)))]
pub(super) async fn progress(State(instance): Shared) -> Response {
    let nothing = || fault("No snapshot is being taken.");
    instance.snapshot_progress().map_or_else(nothing, |progress| Json(progress).into_response())
}

/// Break off the snapshot that is being taken; the guest runs on
#[utoipa::path(delete, path = "/snapshot/create", tag = "snapshot", responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn cancel(State(instance): Shared) -> Response {
    ask(instance, Request::CancelSnapshot).await
}

/// Go on with a guest from a snapshot
#[utoipa::path(put, path = "/snapshot/load", tag = "snapshot", request_body = SnapshotLoad, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn load(State(instance): Shared, Body(load): Body<SnapshotLoad>) -> Response {
    ask(instance, Request::Load(Box::new(load))).await
}
