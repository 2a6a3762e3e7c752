//! `GET /readyz` (decision H8): send requests here? No once the service is stopping. Neighbours do not count: while they are away
//! requests are held, which serves clients better than an address without a server behind it. Where several replicas share a Redis,
//! the body says how this one sees the others.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;

use super::App;

pub(super) async fn get(State(app): State<Arc<App>>) -> Response {
    let leaves = &app.exchange.leaves;
    let status = if app.stopping.load(Ordering::Relaxed) || leaves.is_leaving() {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    match leaves.fleet() {
        // Names, numbers and switches always serialise.
        Some(fleet) => (status, serde_json::to_string(&fleet).unwrap_or_default()).into_response(),
        None => status.into_response(),
    }
}
