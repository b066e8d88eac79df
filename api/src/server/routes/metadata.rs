//! What the guest reads from the metadata service, and where.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::{Body, Shared, ask};
use crate::config::Section;
use crate::config::metadata::MmdsConfig;
use crate::server::Request;
use crate::server::types::Fault;

/// The metadata
#[utoipa::path(get, path = "/mmds", tag = "metadata", responses((status = 200, body = Object), (status = 404, body = Fault)))]
pub(super) async fn metadata(State(instance): Shared) -> Response {
    let none = || {
        let fault_message =
            "The MMDS data store is not initialized: there is no metadata; PUT /mmds with some.".into();
        (StatusCode::NOT_FOUND, Json(Fault { fault_message })).into_response()
    };
    instance.metadata().map_or_else(none, |document| Json(document).into_response())
}

/// Metadata, in place of what is there; also while the guest runs
#[utoipa::path(put, path = "/mmds", tag = "metadata", request_body = Object, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn put(State(instance): Shared, Body(document): Body<Map<String, Value>>) -> Response {
    ask(instance, Request::PutMetadata(document)).await
}

/// A change of the metadata (JSON merge patch, RFC 7386); also while the guest runs
#[utoipa::path(patch, path = "/mmds", tag = "metadata", request_body = Object, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch(State(instance): Shared, Body(patch): Body<Map<String, Value>>) -> Response {
    ask(instance, Request::PatchMetadata(patch)).await
}

/// Where and how the guest reads the metadata
#[utoipa::path(put, path = "/mmds/config", tag = "metadata", request_body = MmdsConfig, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn configure(State(instance): Shared, Body(config): Body<MmdsConfig>) -> Response {
    ask(instance, Request::Configure(Box::new(Section::Mmds(config)))).await
}
