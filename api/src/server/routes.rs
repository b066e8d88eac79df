//! The routes of the API.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};

use super::Instance;
use super::types::{Fault, Switchover, Version};

type Shared = State<Arc<dyn Instance>>;

/// All routes, answering for `instance`.
pub(super) fn router(instance: Arc<dyn Instance>) -> Router {
    Router::new()
        .route("/", get(info))
        .route("/version", get(version))
        .route("/mirror", get(mirror))
        .route("/mirror/switchover", put(switchover))
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

/// In Firecracker's words, which its clients know.
async fn unknown(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    fault(StatusCode::BAD_REQUEST, format!("Invalid request method and/or path: {method} {path}."))
}

fn fault(status: StatusCode, fault_message: String) -> Response {
    (status, Json(Fault { fault_message })).into_response()
}
