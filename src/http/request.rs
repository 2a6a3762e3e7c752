//! Parts that the JSON routes share: a request that has arrived whole, and an answer in JSON.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, Request, header};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::body;
use super::edge::Arrived;
use super::report::{ApiError, report_mistake};
use crate::admission::Client;
use crate::connections::{Connection, Pot};
use crate::exchange::Arrival;
use crate::retry::Deadline;
use crate::wire::BadRequest;

/// Room for an ordinary answer, in bytes and in headers.
const REPLY_BYTES: usize = 1024;
const REPLY_HEADERS: usize = 12;
/// Largest body of a client route.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// When a request arrived, and on which connection it came.
pub(super) struct Received {
    pub(super) at: Instant,
    client: Client,
    pub(super) connection: Arc<Connection>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Received {
    /// Reads the body and parses it. Nothing but the fields is left of the request then.
    pub(super) async fn parse<T>(
        request: Request<Body>,
        pot: Pot,
        parse: impl FnOnce(&[u8]) -> Result<T, BadRequest>,
    ) -> Result<(Self, T), ApiError> {
        let at = Instant::now();
        let (mut head, body) = request.into_parts();
        let Arrived { connection, client, .. } = head.extensions.remove::<Arrived>().ok_or(ApiError::INTERNAL)?;
        let declared = body::declared(&head.headers);
        drop(head);
        let parsed = {
            let body = body::read(&connection, pot, declared, body, MAX_BODY_BYTES).await?;
            parse(&body).inspect_err(|bad| report_mistake(bad))?
        };
        Ok((
            Self {
                at,
                client: client.into(),
                connection,
                _place: None,
            },
            parsed,
        ))
    }

    /// The request has this place until it is answered.
    pub(super) fn with(self, place: OwnedSemaphorePermit) -> Self {
        Self {
            _place: Some(place),
            ..self
        }
    }

    /// When it came, how long it may take, and from whom it is.
    pub(super) fn arrival(&self, deadline: fn(Instant) -> Deadline) -> Arrival {
        Arrival {
            deadline: deadline(self.at),
            client: self.client,
        }
    }
}

/// 200 with one JSON object and a newline.
pub(super) fn json_reply(reply: &impl Serialize) -> Result<Response, ApiError> {
    let mut json = Vec::with_capacity(REPLY_BYTES);
    serde_json::to_writer(&mut json, reply).map_err(|_| ApiError::INTERNAL)?;
    json.push(b'\n');
    let mut response = Response::new(Body::from(json));
    // With those that every answer has: a table that grows is made anew.
    let headers = response.headers_mut();
    headers.reserve(REPLY_HEADERS);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
