//! What the JSON routes share: a request that has arrived whole, and an answer in JSON.

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, Request, header};
use serde::Serialize;
use tokio::time::Instant;

use super::App;
use super::body;
use super::edge::RequestId;
use super::error::ApiError;
use crate::wire::BadRequest;

/// Largest body of a client route.
const MAX_BODY: usize = 64 * 1024;

/// When a request arrived, and what it is called in the log.
pub(super) struct Received {
    pub(super) at: Instant,
    id: Option<RequestId>,
}

impl Received {
    /// Reads the body and parses it.
    pub(super) async fn parse<T>(
        app: &App,
        request: Request<Body>,
        parse: fn(&[u8]) -> Result<T, BadRequest>,
    ) -> Result<(Self, T), ApiError> {
        let at = Instant::now();
        let (mut head, body) = request.into_parts();
        let id = head.extensions.remove::<RequestId>();
        let received = Self { at, id };
        let body = body::read(app, &head.headers, body, MAX_BODY).await?;
        let parsed = parse(&body).inspect_err(|bad| {
            tracing::debug!(request_id = received.id(), reason = bad.to_string(), "bad request");
        })?;
        Ok((received, parsed))
    }

    /// The request's id.
    pub(super) fn id(&self) -> &str {
        self.id.as_ref().map_or("", RequestId::as_str)
    }
}

/// 200 with one JSON object and a newline.
pub(super) fn json_reply(reply: &impl Serialize) -> Result<Response, ApiError> {
    let mut json = serde_json::to_vec(reply).map_err(|_| ApiError::INTERNAL)?;
    json.push(b'\n');
    let mut response = json.into_response();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
