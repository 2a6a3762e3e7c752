//! `GET /metrics` on the main port, where `LIVEKIT_METRICS_BIND=main` asks for it: in this spelling only, never below the prefix,
//! and not for what came through a proxy.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, header};

use super::report::ApiError;
use super::{App, came_through_a_proxy};
use crate::metrics::{CONTENT_TYPE, METRICS};

pub(super) async fn get(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, ApiError> {
    if !app.serves_metrics || came_through_a_proxy(&headers) {
        return Err(ApiError::NOT_FOUND);
    }
    let mut response = app.metrics().into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    Ok(response)
}

impl App {
    /// All metrics as Prometheus reads them.
    #[must_use]
    pub fn metrics(&self) -> String {
        METRICS.text(&self.exchange.leaves.gauges())
    }
}
