//! `POST /get_token` (MSC4195), and what both token routes do: parse, exchange, answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;

use super::App;
use super::error::{ApiError, Route};
use super::refused::log;
use super::request::{Received, json_reply};
use crate::wire::{BadRequest, TokenReply, TokenRequest};

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    answer(&app, request, TokenRequest::get_token).await
}

/// The whole of a token route, but for the shape of its body.
pub(super) async fn answer(
    app: &App,
    request: Request<Body>,
    parse: fn(&[u8]) -> Result<TokenRequest, BadRequest>,
) -> Result<Response, ApiError> {
    let (received, request) = Received::parse(app, request, parse).await?;
    let server = request.openid_token.unverified_server_name.clone();
    match app.exchange.exchange(request, received.at).await {
        Ok(jwt) => json_reply(&TokenReply { url: Some(&app.url), jwt }),
        Err(refusal) => {
            log(&refusal, &server, app.exchange.homeservers.class(&server), received.id());
            Err(ApiError::of(&refusal, Route::Token))
        }
    }
}
