//! The instance as a whole.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::{Body, Shared, ask};
use crate::config::Draft;
use crate::server::Request;
use crate::server::types::{Action, ActionType, Fault, InstanceInfo, Version, Vm, VmState};

/// Who it is and what its guest does
#[utoipa::path(get, path = "/", tag = "instance", responses((status = 200, body = InstanceInfo), (status = 400, body = Fault)))]
pub(super) async fn info(State(instance): Shared) -> Response {
    Json(instance.info()).into_response()
}

/// The program's version
#[utoipa::path(get, path = "/version", tag = "instance", responses((status = 200, body = Version), (status = 400, body = Fault)))]
pub(super) async fn version() -> Response {
    Json(Version { firecracker_version: env!("CARGO_PKG_VERSION").into() }).into_response()
}

/// Run the guest, write metrics, or press Ctrl-Alt-Del
#[utoipa::path(put, path = "/actions", tag = "instance", request_body = Action, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn act(State(instance): Shared, Body(action): Body<Action>) -> Response {
    let request = match action.action_type {
        ActionType::InstanceStart => Request::Start,
        ActionType::FlushMetrics => Request::FlushMetrics,
        ActionType::SendCtrlAltDel => Request::CtrlAltDel,
    };
    ask(instance, request).await
}

/// Let the guest stand still or go on
#[utoipa::path(patch, path = "/vm", tag = "instance", request_body = Vm, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn set_state(State(instance): Shared, Body(vm): Body<Vm>) -> Response {
    let request = match vm.state {
        VmState::Paused => Request::Pause,
        VmState::Resumed => Request::Resume,
    };
    ask(instance, request).await
}

/// The whole configuration, as a configuration file has it
#[utoipa::path(get, path = "/vm/config", tag = "instance", responses((status = 200, body = Draft), (status = 400, body = Fault)))]
pub(super) async fn configuration(State(instance): Shared) -> Response {
    Json(instance.draft()).into_response()
}
