//! `POST …/client/…/rtc/livekit/get_token` (MSC4195): a token for one of our homeserver's users.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;

use super::super::App;
use super::super::error::{ApiError, Route};
use super::super::refused::log;
use super::super::request::{Received, json_reply};
use super::{Appservice, USER, identity};
use crate::wire::{ClientTokenRequest, TokenReply};

pub(super) async fn post(
    State(app): State<Arc<App>>,
    Extension(appservice): Extension<Arc<Appservice>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    appservice.admit(request.headers())?;
    let user = identity(request.headers(), &USER);
    let (received, request) = Received::parse(&app, request, ClientTokenRequest::parse).await?;
    let user = user.ok_or(ApiError::NO_IDENTITY)?;
    match appservice.service.client_token(&user, &request, received.at).await {
        Ok(jwt) => json_reply(&TokenReply {
            url: Some(&request.wanted.url),
            jwt,
        }),
        Err(refusal) => {
            log(&refusal, request.server_name.as_deref().unwrap_or_default(), received.id());
            Err(ApiError::of(&refusal, Route::Delegation))
        }
    }
}
