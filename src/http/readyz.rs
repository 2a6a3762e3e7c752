//! `GET /readyz` (decision H8): send requests here? No once the service is stopping. Neighbours do not count: while they are away
//! requests are held, which serves clients better than an address without a server behind it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::State;
use http::StatusCode;

use super::App;

pub(super) async fn get(State(app): State<Arc<App>>) -> StatusCode {
    if app.stopping.load(Ordering::Relaxed) {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    }
}
