//! `POST /get_token` (MSC4195), and what both token routes do: parse, exchange, answer.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, Request, header};
use tokio::time::Instant;

use super::App;
use super::body;
use super::edge::RequestId;
use super::error::ApiError;
use crate::exchange::Refusal;
use crate::federation::Failure;
use crate::openid::Unverified;
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
    let received = Instant::now();
    let (head, body) = request.into_parts();
    let body = body::read(app, &head.headers, body).await?;
    let id = head.extensions.get::<RequestId>().map_or("", RequestId::as_str);
    let request = parse(&body).inspect_err(|bad| tracing::debug!(request_id = id, reason = bad.to_string(), "bad request"))?;
    drop(body);
    let server = request.openid_token.unverified_server_name.clone();
    match app.exchange.exchange(request, received).await {
        Ok(jwt) => reply(&TokenReply { url: &app.url, jwt }),
        Err(refusal) => {
            log(&refusal, &server, id);
            Err(ApiError::from(&refusal))
        }
    }
}

fn reply(reply: &TokenReply<'_>) -> Result<Response, ApiError> {
    let mut json = serde_json::to_vec(reply).map_err(|_| ApiError::INTERNAL)?;
    json.push(b'\n');
    let mut response = json.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// One line per refusal: a client's fault at debug or info, a neighbour's at warn, ours at error.
fn log(refusal: &Refusal, server: &str, request_id: &str) {
    let reason = refusal.to_string();
    match refusal {
        Refusal::Delegation | Refusal::BadServerName => tracing::debug!(request_id, server, reason, "no token"),
        Refusal::UserMismatch | Refusal::Unverified(Unverified::Rejected | Unverified::ForeignUser) => {
            tracing::info!(request_id, server, reason, "no token: the user could not be verified");
        }
        // Names come from strangers, and most of those that lead nowhere are probes: no warnings for these. The first
        // refusal of an address is told by `federation.rs`.
        Refusal::Unverified(Unverified::Unreachable { failure, known }) => {
            let remedy = failure.remedy();
            if *known && !matches!(failure, Failure::Refused { .. }) {
                tracing::warn!(request_id, server, reason, remedy, "no token: the homeserver could not be reached");
            } else {
                tracing::info!(request_id, server, reason, remedy, "no token: the homeserver could not be reached");
            }
        }
        Refusal::Unverified(Unverified::Unusable { known, .. }) => {
            let remedy =
                "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)";
            if *known {
                tracing::warn!(request_id, server, reason, remedy, "no token: the homeserver's answer is unusable");
            } else {
                tracing::info!(request_id, server, reason, remedy, "no token: the homeserver's answer is unusable");
            }
        }
        Refusal::Unverified(Unverified::Busy) => {
            let remedy = Failure::Busy.remedy();
            tracing::warn!(request_id, server, reason, remedy, "no token: overloaded");
        }
        Refusal::Sfu(error) => {
            let remedy = error.remedy();
            tracing::warn!(request_id, reason, remedy, "no token: the room could not be opened on the SFU");
        }
        Refusal::Mint(_) => tracing::error!(request_id, reason, "no token: it could not be signed"),
    }
}
