//! `POST /doctor`: the service examines itself and its neighbours, for whoever proves that they know the secret that signs.
//!
//! The proof and all options are in the token of the head: the body is never read. Everybody else gets one and the same 401. It has
//! places of its own (one run), so that no call of a user ever waits for it, nor it for them.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, header};
use hyper::body::Frame;

use super::App;
use super::edge::Arrived;
use super::report::ApiError;
use crate::doctor::{Denied, Findings, HEADER};
use crate::request_line::note;

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let is_loopback = request.extensions().get::<Arrived>().is_some_and(Arrived::is_loopback);
    let ticket = bearer(request.headers());
    let examined = app.doctor.examine(ticket, &app.keys().signing().secret, is_loopback);
    let found = examined.map_err(|denied| match denied {
        Denied::NotProven => ApiError::NOT_THE_OPERATOR,
        Denied::Later(seconds) => ApiError::examined_already(seconds),
    })?;
    note(|line| line.is_proven = true);
    let mut response = Response::new(Body::new(Lines(found)));
    // nginx would keep it all to the end.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    let kind = HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// The token of the head; nothing where there is none.
pub(super) fn bearer(headers: &HeaderMap) -> &str {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = value
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    token.map_or("", |(_, token)| token.trim())
}

impl App {
    /// Says which instance this is to whoever asks with a ticket for that, on whatever route.
    pub(super) async fn introduction(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let ticket = headers.get(HEADER)?.to_str().ok()?;
        let keys = self.keys();
        // Boxed: of use to `doctor` only.
        let introduced = Box::pin(self.doctor.introduce(ticket, &keys.signing().secret)).await?;
        HeaderValue::try_from(introduced).ok()
    }
}

/// Findings as they come, one JSON object a line. The run ends when nobody reads them any more.
struct Lines(Findings);

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_next(context).map(|line| {
            let line = format!("{}\n", line?.to_json());
            Some(Ok(Frame::data(line.into())))
        })
    }
}
