//! Figures.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::Shared;
use crate::metrics::Reading;
use crate::metrics::prometheus::{OPENMETRICS, PLAIN, openmetrics, plain};

/// All figures, for Prometheus: in its own text format, or in that of OpenMetrics if it is accepted
#[utoipa::path(get, path = "/metrics/prometheus", tag = "metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn prometheus(State(instance): Shared, headers: HeaderMap) -> Response {
    let accepts = |value: &axum::http::HeaderValue| {
        value.to_str().is_ok_and(|value| value.contains("application/openmetrics-text"))
    };
    let reading = Reading::of(&*instance);
    if headers.get_all(ACCEPT).iter().any(accepts) {
        ([(CONTENT_TYPE, OPENMETRICS)], openmetrics(reading)).into_response()
    } else {
        ([(CONTENT_TYPE, PLAIN)], plain(reading)).into_response()
    }
}
