//! Reads request bodies, bounded in size, in time, and in what all of them together may hold.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::time::timeout;

use super::App;
use super::error::ApiError;

/// Largest body of a client route.
const MAX_BODY: usize = 64 * 1024;
/// Time for a body to arrive.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > MAX_BODY) {
        return Err(ApiError::TOO_LARGE);
    }
    let kib = u32::try_from(declared.unwrap_or(MAX_BODY) / 1024 + 1).unwrap_or(u32::MAX);
    let reading = async {
        let _share = app.body_kib.acquire_many(kib).await;
        Limited::new(body, MAX_BODY).collect().await
    };
    match timeout(TIMEOUT, reading).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::TOO_LARGE),
        Ok(Err(_)) => Err(ApiError::BODY_BROKEN),
        Err(_) => Err(ApiError::BODY_TIMEOUT),
    }
}
