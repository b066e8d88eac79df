//! Sections of the configuration, put before the guest is started.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::{Body, Shared, ask};
use crate::config::cpu::CpuConfig;
use crate::config::devices::{Console, Entropy, Vsock};
use crate::config::operator::{Logger, Metrics, Serial};
use crate::config::{BootSource, MachineSection, MachineUpdate, Section};
use crate::server::types::Fault;
use crate::server::{Instance, Request};

async fn put(instance: std::sync::Arc<dyn Instance>, section: Section) -> Response {
    ask(instance, Request::Configure(Box::new(section))).await
}

/// What to boot
#[utoipa::path(put, path = "/boot-source", tag = "configuration", request_body = BootSource, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn boot_source(State(instance): Shared, Body(boot): Body<BootSource>) -> Response {
    put(instance, Section::Boot(boot)).await
}

/// The machine
#[utoipa::path(get, path = "/machine-config", tag = "configuration", responses((status = 200, body = MachineSection), (status = 400, body = Fault)))]
pub(super) async fn machine(State(instance): Shared) -> Response {
    Json(instance.draft().machine).into_response()
}

/// The machine
#[utoipa::path(put, path = "/machine-config", tag = "configuration", request_body = MachineSection, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn put_machine(State(instance): Shared, Body(machine): Body<MachineSection>) -> Response {
    put(instance, Section::Machine(machine)).await
}

/// Some of the machine; what is not named stays as it is
#[utoipa::path(patch, path = "/machine-config", tag = "configuration", request_body = MachineUpdate, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn patch_machine(State(instance): Shared, Body(update): Body<MachineUpdate>) -> Response {
    put(instance, Section::MachineUpdate(update)).await
}

/// What the guest's processors offer
#[utoipa::path(put, path = "/cpu-config", tag = "configuration", request_body = Object, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn cpu(State(instance): Shared, Body(config): Body<CpuConfig>) -> Response {
    put(instance, Section::Cpu(config)).await
}

/// Where messages go
#[utoipa::path(put, path = "/logger", tag = "configuration", request_body = Logger, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn logger(State(instance): Shared, Body(logger): Body<Logger>) -> Response {
    put(instance, Section::Logger(logger)).await
}

/// Where metrics go
#[utoipa::path(put, path = "/metrics", tag = "configuration", request_body = Metrics, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn metrics(State(instance): Shared, Body(metrics): Body<Metrics>) -> Response {
    put(instance, Section::Metrics(metrics)).await
}

/// Where the serial port's output goes
#[utoipa::path(put, path = "/serial", tag = "configuration", request_body = Serial, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn serial(State(instance): Shared, Body(serial): Body<Serial>) -> Response {
    put(instance, Section::Serial(serial)).await
}

/// A source of random numbers
#[utoipa::path(put, path = "/entropy", tag = "devices", request_body = Entropy, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn entropy(State(instance): Shared, Body(entropy): Body<Entropy>) -> Response {
    put(instance, Section::Entropy(entropy)).await
}

/// Sockets between guest and host
#[utoipa::path(put, path = "/vsock", tag = "devices", request_body = Vsock, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn vsock(State(instance): Shared, Body(vsock): Body<Vsock>) -> Response {
    put(instance, Section::Vsock(vsock)).await
}

/// A console beside the serial port
#[utoipa::path(put, path = "/console", tag = "devices", request_body = Console, responses((status = 204), (status = 400, body = Fault)))]
pub(super) async fn console(State(instance): Shared, Body(console): Body<Console>) -> Response {
    put(instance, Section::Console(console)).await
}
