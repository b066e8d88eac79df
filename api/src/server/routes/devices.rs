//! Disks, network cards and the balloon, before the guest is started and while it runs.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::{Body, Name, Shared, ask, fault, same, sentence};
use crate::config::Section;
use crate::config::devices::{Balloon, Drive, NetworkInterface, RateLimiter};
use crate::server::types::{
    BalloonStats, BalloonStatsUpdate, BalloonUpdate, Fault, PartialDrive, PartialNetworkInterface,
};
use crate::server::{DriveChange, Request};

/// A disk
#[utoipa::path(put, path = "/drives/{drive_id}", tag = "devices", params(("drive_id" = String, Path)), request_body = Drive, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn put_drive(State(instance): Shared, Name(id): Name, Body(drive): Body<Drive>) -> Response {
    match same(&id, &drive.drive_id) {
        Ok(()) => ask(instance, Request::Configure(Box::new(Section::Drive(drive)))).await,
        Err(response) => response,
    }
}

/// Another image or other limits for a disk of the running guest
#[utoipa::path(patch, path = "/drives/{drive_id}", tag = "devices", params(("drive_id" = String, Path)), request_body = PartialDrive, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch_drive(
    State(instance): Shared,
    Name(id): Name,
    Body(drive): Body<PartialDrive>,
) -> Response {
    if let Err(response) = same(&id, &drive.drive_id) {
        return response;
    }
    let limits = drive.rate_limiter.map(|limiter| limiter.limits()).unwrap_or_default();
    ask(instance, Request::Drive(DriveChange { id, image: drive.path_on_host, limits })).await
}

/// A network card
#[utoipa::path(put, path = "/network-interfaces/{iface_id}", tag = "devices", params(("iface_id" = String, Path)), request_body = NetworkInterface, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn put_net(
    State(instance): Shared,
    Name(id): Name,
    Body(net): Body<NetworkInterface>,
) -> Response {
    match same(&id, &net.iface_id) {
        Ok(()) => ask(instance, Request::Configure(Box::new(Section::NetworkInterface(net)))).await,
        Err(response) => response,
    }
}

/// Other limits for a network card of the running guest
#[utoipa::path(patch, path = "/network-interfaces/{iface_id}", tag = "devices", params(("iface_id" = String, Path)), request_body = PartialNetworkInterface, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch_net(
    State(instance): Shared,
    Name(id): Name,
    Body(net): Body<PartialNetworkInterface>,
) -> Response {
    if let Err(response) = same(&id, &net.iface_id) {
        return response;
    }
    let limits = |limiter: Option<RateLimiter>| limiter.map(|it| it.limits()).unwrap_or_default();
    let (receive, send) = (limits(net.rx_rate_limiter), limits(net.tx_rate_limiter));
    ask(instance, Request::Net { id, receive, send }).await
}

const NO_BALLOON: &str = "There is no balloon; put one before the guest is started.";

/// The balloon
#[utoipa::path(get, path = "/balloon", tag = "devices", responses((status = 200, body = Balloon), (status = 400, body = Fault)))]
pub(super) async fn balloon(State(instance): Shared) -> Response {
    instance.draft().balloon.map_or_else(|| fault(NO_BALLOON), |balloon| Json(balloon).into_response())
}

/// A balloon
#[utoipa::path(put, path = "/balloon", tag = "devices", request_body = Balloon, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn put_balloon(State(instance): Shared, Body(balloon): Body<Balloon>) -> Response {
    ask(instance, Request::Configure(Box::new(Section::Balloon(balloon)))).await
}

/// Ask the running guest to give back more or less
#[utoipa::path(patch, path = "/balloon", tag = "devices", request_body = BalloonUpdate, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch_balloon(State(instance): Shared, Body(update): Body<BalloonUpdate>) -> Response {
    ask(instance, Request::Balloon(update.amount_mib)).await
}

/// What the guest tells of its memory
#[utoipa::path(get, path = "/balloon/statistics", tag = "devices", responses((status = 200, body = BalloonStats), (status = 400, body = Fault)))]
pub(super) async fn balloon_statistics(State(instance): Shared) -> Response {
    match instance.balloon_statistics() {
        Ok(statistics) => Json(statistics).into_response(),
        Err(reason) => fault(sentence(reason)),
    }
}

/// How often the guest is asked for it
#[utoipa::path(patch, path = "/balloon/statistics", tag = "devices", request_body = BalloonStatsUpdate, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch_balloon_statistics(
    State(instance): Shared,
    Body(update): Body<BalloonStatsUpdate>,
) -> Response {
    ask(instance, Request::BalloonStatistics(update.stats_polling_interval_s)).await
}
