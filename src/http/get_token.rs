//! `POST /get_token` (MSC4195), and what all token routes do: parse, exchange, answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;
use tokio::time::Instant;

use super::App;
use super::place::Place;
use super::report::{ApiError, Route, report};
use super::request::{Received, json_reply};
use crate::connections::Pot;
use crate::retry::Deadline;
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
    let jwt = token(app, request, parse, Deadline::since).await?;
    json_reply(&TokenReply { url: Some(&app.url), jwt })
}

/// A LiveKit token for a request, or the error that it is answered with.
pub(super) async fn token(
    app: &App,
    request: Request<Body>,
    parse: impl FnOnce(&[u8]) -> Result<TokenRequest, BadRequest>,
    deadline: fn(Instant) -> Deadline,
) -> Result<String, ApiError> {
    let (received, request) = Received::parse(request, Pot::Strangers, parse).await?;
    let place = Place::take(app, &received.connection, &request.openid_token.unverified_server_name)?;
    // In memory of its own, so that a request whose body is on its way does not have it.
    let exchange = Box::pin(app.exchange.exchange(request, received.arrival(deadline), || place.keep()));
    match place.hold(exchange).await? {
        Ok(jwt) => Ok(jwt),
        Err(error) => Err(report(&error, Route::Token)),
    }
}
