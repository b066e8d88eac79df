//! Counts what the API is asked.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;

use crate::server::Instance;
use crate::stage::lock;

/// What stands for a path that there is none of: whoever asks must not be able to make up labels.
const NO_ROUTE: &str = "none";

/// Counts the request by its method, route and status, and logs it.
pub(crate) async fn count_requests(
    State(instance): State<Arc<dyn Instance>>,
    request: Request,
    next: Next,
) -> Response {
    let method = match request.method().as_str() {
        known @ ("GET" | "PUT" | "PATCH" | "DELETE") => known.to_owned(),
        _ => "other".into(),
    };
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().map_or(NO_ROUTE, MatchedPath::as_str).to_owned();
    tracing::info!("The API server received a {method} request on {path:?}.");
    let response = next.run(request).await;
    let status = response.status();
    if status.is_success() {
        tracing::debug!("The {method} request on {path:?} was answered by {status}.");
    } else {
        tracing::error!("The {method} request on {path:?} was answered by {status}.");
    }
    *lock(&instance.meters().own).requests.entry((method, route, status.as_u16())).or_default() += 1;
    response
}
