//! `PUT /_matrix/app/v1/transactions/{txnId}`: events that the homeserver pushes where the registration has a `url`. They are
//! of no use here; taking them keeps the homeserver from sending them again and again.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::response::Response;
use http::Request;
use http_body_util::{BodyExt as _, Limited};
use serde_json::json;
use tokio::time::timeout;

use super::super::report::ApiError;
use super::super::request::json_reply;
use super::AppServiceRoutes;

/// Largest transaction that is heard out: a hundred events of 64 KiB, and as many to-device messages.
const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn put(Extension(appservice): Extension<Arc<AppServiceRoutes>>, request: Request<Body>) -> Result<Response, ApiError> {
    appservice.admit(request.headers())?;
    // Read to its end, so that the connection can be used again; nothing of it is kept.
    let mut body = Limited::new(request.into_body(), MAX_BODY_BYTES);
    let reading = async { while let Some(Ok(_)) = body.frame().await {} };
    if timeout(TIMEOUT, reading).await.is_err() {
        return Err(ApiError::BODY_TIMEOUT);
    }
    json_reply(&json!({}))
}
