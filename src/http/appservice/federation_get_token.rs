//! `POST …/federation/…/rtc/livekit/get_token` (MSC4195): a token for a user of another homeserver.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;

use super::super::App;
use super::super::report::{ApiError, Route, report};
use super::super::request::json_reply;
use super::{AppServiceRoutes, ORIGIN, heard, place_for_others};
use crate::retry::Deadline;
use crate::wire::{FederationTokenRequest, TokenReply};

pub(super) async fn post(
    State(app): State<Arc<App>>,
    Extension(appservice): Extension<Arc<AppServiceRoutes>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (received, origin, request) = heard(&app, &appservice, request, &ORIGIN, FederationTokenRequest::parse).await?;
    let _place = place_for_others(&app, &received, &origin)?;
    match appservice
        .service
        .federation_token(&origin, &request, Deadline::since(received.at))
        .await
    {
        Ok(jwt) => json_reply(&TokenReply { url: None, jwt }),
        Err(error) => Err(report(&error, Route::Delegation)),
    }
}
