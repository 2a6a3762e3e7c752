//! `POST …/client/…/rtc/livekit/get_token` (MSC4195): a token for one of our homeserver's users.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;

use super::super::App;
use super::super::report::{ApiError, Route, report};
use super::super::request::json_reply;
use super::{AppServiceRoutes, USER, heard, place_for_others};
use crate::retry::Deadline;
use crate::wire::{ClientTokenRequest, TokenReply};

pub(super) async fn post(
    State(app): State<Arc<App>>,
    Extension(appservice): Extension<Arc<AppServiceRoutes>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let (received, user, request) = heard(&app, &appservice, request, &USER, ClientTokenRequest::parse).await?;
    app.doctor.arrivals().forwarded(request.wanted.participant.room_id());
    // What other homeservers have us wait for leaves places for those who ask for a token of our own SFU.
    let other = appservice.service.destination(&request);
    let _place = other.map(|other| place_for_others(&app, &received, other)).transpose()?;
    match appservice.service.client_token(&user, &request, Deadline::since(received.at)).await {
        Ok(jwt) => json_reply(&TokenReply {
            url: Some(&request.url),
            jwt,
        }),
        Err(error) => Err(report(&error, Route::Delegation)),
    }
}
