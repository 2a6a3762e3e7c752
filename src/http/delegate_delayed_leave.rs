//! `POST /delegate_delayed_leave` (MSC4195): hand over a delayed leave event. Clients probe it with an empty body: any
//! answer but a 404 means that delegation is supported.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;
use serde_json::json;

use super::App;
use super::place::Place;
use super::report::{ApiError, Route, report};
use super::request::{Received, json_reply};
use crate::connections::Pot;
use crate::retry::Deadline;
use crate::wire::DelegationRequest;

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let (received, request) = Received::parse(request, Pot::Strangers, DelegationRequest::parse).await?;
    let place = Place::take(&app, &received.connection, &request.openid_token.unverified_server_name)?;
    let delegate = Box::pin(app.exchange.delegate(request, received.arrival(Deadline::since), || place.keep()));
    match place.hold(delegate).await? {
        Ok(()) => json_reply(&json!({})),
        Err(error) => Err(report(&error, Route::Delegation)),
    }
}
