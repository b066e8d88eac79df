//! The guest's standby.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::{Body, MaybeBody, Shared, ask, fault};
use crate::config::{MirrorSection, MirrorUpdate};
use crate::server::Request;
use crate::server::types::{Fault, MirrorStatus, Switchover, SwitchoverOrder};

/// How the mirror is, as the side sees it that is asked
#[utoipa::path(get, path = "/mirror", tag = "mirror", responses((status = 200, body = MirrorStatus), (status = 404, body = Fault)))]
pub(super) async fn status(State(instance): Shared) -> Response {
    let none = || {
        let fault_message = "This guest is not mirrored; PUT /mirror with the address of a standby.".into();
        (StatusCode::NOT_FOUND, Json(Fault { fault_message })).into_response()
    };
    instance.mirror().map_or_else(none, |status| Json(status).into_response())
}

/// Mirror the guest: from its first instruction on, or from now on if it runs; answered when a standby has been reached
#[utoipa::path(put, path = "/mirror", tag = "mirror", request_body = MirrorSection, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn attach(State(instance): Shared, Body(section): Body<MirrorSection>) -> Response {
    ask(instance, Request::Attach(Box::new(section))).await
}

/// Let epochs end otherwise
#[utoipa::path(patch, path = "/mirror", tag = "mirror", request_body = MirrorUpdate, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn retune(State(instance): Shared, Body(update): Body<MirrorUpdate>) -> Response {
    ask(instance, Request::Retune(update)).await
}

/// Mirror the guest no longer: it runs on without protection; breaks seeding off if it has not come to its end
#[utoipa::path(delete, path = "/mirror", tag = "mirror", responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn detach(State(instance): Shared) -> Response {
    ask(instance, Request::Detach).await
}

/// Let the standby run the guest from now on, with nothing lost; asked of the primary
#[utoipa::path(put, path = "/mirror/switchover", tag = "mirror", request_body = Option<SwitchoverOrder>, responses((status = 200, body = Switchover), (status = 400, body = Fault)))]
pub(super) async fn switchover(
    State(instance): Shared,
    MaybeBody(SwitchoverOrder { to }): MaybeBody<SwitchoverOrder>,
) -> Response {
    match tokio::task::spawn_blocking(move || instance.switchover(to)).await {
        Ok(Ok(pause)) => Json(Switchover { pause_us: pause.as_micros() as u64 }).into_response(),
        Ok(Err(reason)) => fault(format!("The guest was not handed over: {reason}.")),
        Err(error) => fault(format!("The request was not carried out: {error}.")),
    }
}

/// Run the guest here because its primary is lost; asked of a standby that waits for an operator's word
#[utoipa::path(put, path = "/mirror/failover", tag = "mirror", responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn failover(State(instance): Shared) -> Response {
    ask(instance, Request::Failover).await
}
