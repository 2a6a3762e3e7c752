//! `POST /sfu/get`: the legacy route. It takes its own body and that of `/get_token`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::Request;

use super::App;
use super::get_token::answer;
use super::report::ApiError;
use crate::wire::TokenRequest;

pub(super) async fn post(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    answer(&app, request, TokenRequest::sfu_get).await
}
