//! `POST …/client/…/rtc/livekit/delegate_delayed_leave` (MSC4195): one of our homeserver's users hands over a delayed leave
//! event.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;
use serde_json::json;

use super::super::App;
use super::super::report::{ApiError, Route, report};
use super::super::request::json_reply;
use super::{AppServiceRoutes, USER, heard};
use crate::retry::Deadline;
use crate::wire::ClientDelegationRequest;

pub(super) async fn post(
    State(app): State<Arc<App>>,
    Extension(appservice): Extension<Arc<AppServiceRoutes>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (received, user, request) = heard(&app, &appservice, request, &USER, ClientDelegationRequest::parse).await?;
    match appservice.service.delegate(&user, request, Deadline::since(received.at)).await {
        Ok(()) => json_reply(&json!({})),
        Err(error) => Err(report(&error, Route::Delegation)),
    }
}
