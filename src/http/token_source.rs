//! `POST /token_source`: the endpoint form of LiveKit's token sources. The participant and all that is asked for them are
//! those of `/get_token` where the query has a `member_id`, and those of `/sfu/get` where it has none.
//!
//! No error may hold the names of the two fields of the answer: an SDK takes whatever has them for a success.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{Request, StatusCode, header};

use super::App;
use super::get_token::token;
use super::report::ApiError;
use super::request::json_reply;
use crate::retry::Deadline;
use crate::wire::{TokenRequest, TokenSourceHead, TokenSourceReply};

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let authorization = request.headers().get_all(header::AUTHORIZATION).iter();
    // A body that is too large, or late, comes first: what is wrong with the head is told when it is there.
    let head = TokenSourceHead::parse(
        authorization.map(http::HeaderValue::as_bytes),
        request.uri().query().unwrap_or_default(),
    );
    let parse = |body: &[u8]| TokenRequest::token_source(head, body);
    let participant_token = token(&app, request, parse, Deadline::of_token_source).await?;
    let reply = json_reply(&TokenSourceReply {
        server_url: &app.url,
        participant_token,
    })?;
    Ok((StatusCode::CREATED, reply).into_response())
}
