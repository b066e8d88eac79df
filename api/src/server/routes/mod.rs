//! The routes of the API, and the OpenAPI document that describes them.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http_body_util::BodyExt;
use hyper::body::Frame;
use serde::de::DeserializeOwned;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::firecracker::why_missing;
use super::types::Fault;
use super::{Instance, Request};
use crate::metrics::count_requests;

mod configuration;
mod devices;
mod machine;
mod metadata;
mod metrics;
mod mirror;
mod snapshot;

type Shared = State<Arc<dyn Instance>>;

/// What describes the API as a whole.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Understudy",
        description = "Virtual machines that survive the death of their host. Served over a Unix socket. What Firecracker \
                       has is as Firecracker has it; `/mirror` and what is below it is Understudy's own.",
        license(name = "Apache-2.0 OR MIT")
    ),
    tags(
        (name = "instance", description = "The process and its guest"),
        (name = "configuration", description = "What to run, before it runs"),
        (name = "devices", description = "Devices, also while the guest runs"),
        (name = "metadata", description = "What the guest reads from its metadata service"),
        (name = "snapshot", description = "The guest in files"),
        (name = "mirror", description = "The guest's standby"),
        (name = "metrics", description = "Figures")
    )
)]
struct Description;

fn everything() -> OpenApiRouter<Arc<dyn Instance>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(machine::info))
        .routes(routes!(machine::version))
        .routes(routes!(machine::act))
        .routes(routes!(machine::set_state))
        .routes(routes!(machine::configuration))
        .routes(routes!(configuration::boot_source))
        .routes(routes!(configuration::machine, configuration::put_machine, configuration::patch_machine))
        .routes(routes!(configuration::cpu))
        .routes(routes!(configuration::logger))
        .routes(routes!(configuration::metrics))
        .routes(routes!(configuration::serial))
        .routes(routes!(configuration::entropy))
        .routes(routes!(configuration::vsock))
        .routes(routes!(configuration::console))
        .routes(routes!(devices::put_drive, devices::patch_drive))
        .routes(routes!(devices::put_net, devices::patch_net))
        .routes(routes!(devices::balloon, devices::put_balloon, devices::patch_balloon))
        .routes(routes!(devices::balloon_statistics, devices::patch_balloon_statistics))
        .routes(routes!(metadata::metadata, metadata::put, metadata::patch))
        .routes(routes!(metadata::configure))
        .routes(routes!(snapshot::create, snapshot::progress, snapshot::cancel))
        .routes(routes!(snapshot::load))
        .routes(routes!(mirror::status, mirror::attach, mirror::retune, mirror::detach))
        .routes(routes!(mirror::switchover))
        .routes(routes!(mirror::failover))
        .routes(routes!(metrics::prometheus))
}

/// The OpenAPI document, in JSON.
pub fn openapi() -> String {
    let mut text = everything().into_openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// All routes, answering for `instance`, which take bodies of at most `limit` bytes.
pub(super) fn router(instance: Arc<dyn Instance>, limit: usize) -> Router {
    let (router, document) = everything().split_for_parts();
    router
        .route("/openapi.json", get(|| async move { Json(document) }))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(limit, with_whole_body))
        .layer(middleware::from_fn_with_state(Arc::clone(&instance), count_requests))
        .with_state(instance)
}

/// Of a body over the limit, so much is read and dropped before it is refused, in bytes.
const MAX_DROPPED: usize = 16 << 20;

/// Reads the body, of at most `limit` bytes, before anything is answered: the answer would be lost with the connection if what
/// came was left unread.
async fn with_whole_body(
    State(limit): State<usize>,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let (parts, mut body) = request.into_parts();
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => {
                total += data.len();
                if total <= limit {
                    bytes.extend_from_slice(&data);
                } else if total > MAX_DROPPED {
                    break;
                }
            }
            // Trailers say nothing here.
            Ok(Err(_)) => {}
            Err(error) => return fault(format!("The body of the request cannot be read: {error}.")),
        }
    }
    if total > limit {
        return fault(format!(
            "The body of the request has more than {limit} bytes, which this server does not take; send less, or start it \
             with a larger --http-api-max-payload-size."
        ));
    }
    next.run(axum::extract::Request::from_parts(parts, bytes.into())).await
}

/// A body in JSON. What is wrong with one is told by its field, its value and what to write instead.
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Response> {
        parse(&read(request, state).await?).map(Self).map_err(fault)
    }
}

/// As [`Body`], where none means what is said by default.
struct MaybeBody<T>(T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for MaybeBody<T> {
    type Rejection = Response;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Response> {
        let bytes = read(request, state).await?;
        if bytes.is_empty() { Ok(Self(T::default())) } else { parse(&bytes).map(Self).map_err(fault) }
    }
}

async fn read<S: Send + Sync>(
    request: axum::extract::Request,
    state: &S,
) -> Result<axum::body::Bytes, Response> {
    axum::body::Bytes::from_request(request, state)
        .await
        .map_err(|problem| fault(format!("The body of the request cannot be read: {problem}.")))
}

/// What is wrong with a body is a sentence.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let wrong =
        |what: String| format!("An error occurred when deserializing the json body of a request: {what}.");
    // What reads an object takes its fields in a list, too; no client means that.
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(wrong("it is a list; send an object".into()));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { format!("{path}: ") };
        wrong(format!("{field}{}", error.into_inner()))
    })?;
    json.end().map_err(|error| wrong(error.to_string()))?;
    Ok(parsed)
}

/// The name in a path.
struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let name = Path::<String>::from_request_parts(parts, state).await;
        let wrong = |_| fault(format!("{} has a name that is no text in UTF-8.", parts.uri.path()));
        name.map(|Path(name)| Self(name)).map_err(wrong)
    }
}

/// Has `request` done, which may take its time.
async fn ask(instance: Arc<dyn Instance>, request: Request) -> Response {
    match tokio::task::spawn_blocking(move || instance.ask(request)).await {
        Ok(Ok(())) => StatusCode::NO_CONTENT.into_response(),
        Ok(Err(reason)) => fault(sentence(reason)),
        Err(error) => fault(format!("The request was not carried out: {error}.")),
    }
}

fn sentence(mut text: String) -> String {
    if !text.ends_with('.') {
        text.push('.');
    }
    text
}

/// The name in the path and the one in the body are to be the same.
#[allow(clippy::result_large_err, reason = "it is the answer")]
fn same(path: &str, body: &str) -> Result<(), Response> {
    if path == body {
        return Ok(());
    }
    Err(fault(format!("The id from the path [{path}] does not match the id from the body [{body}]!")))
}

/// In Firecracker's words, which its clients know.
async fn unknown(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    fault(match why_missing(method.as_str(), path) {
        Some(why) => format!("{method} {path} is not supported: {why}."),
        None => format!("Invalid request method and/or path: {method} {path}."),
    })
}

fn fault(message: impl Into<String>) -> Response {
    (StatusCode::BAD_REQUEST, Json(Fault { fault_message: message.into() })).into_response()
}
