//! `/_matrix/app/v1/ping`, and what else a homeserver may ask an application service
//! ([application-service API](https://spec.matrix.org/v1.16/application-service-api/)): we have no users, no aliases and no
//! third-party networks.

use std::sync::Arc;

use axum::Extension;
use axum::response::Response;
use http::HeaderMap;
use serde_json::json;

use super::super::report::ApiError;
use super::super::request::json_reply;
use super::AppServiceRoutes;

pub(super) async fn any(Extension(appservice): Extension<Arc<AppServiceRoutes>>, headers: HeaderMap) -> Result<Response, ApiError> {
    appservice.admit(&headers)?;
    json_reply(&json!({}))
}

pub(super) async fn nothing_of_ours(Extension(appservice): Extension<Arc<AppServiceRoutes>>, headers: HeaderMap) -> ApiError {
    appservice.admit(&headers).err().unwrap_or(ApiError::NOTHING_OF_OURS)
}
