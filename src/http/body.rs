//! Reads request bodies, bounded in size, in time, and in what all of them together may hold.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::time::timeout;

use super::App;
use super::error::ApiError;

/// Largest body of a client route.
const MAX_BODY: usize = 64 * 1024;
/// What every request may hold besides its share: longer than an honest body, so that none waits for greedy ones.
const OWN: usize = 1024;
/// Time for a body to arrive.
const TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > MAX_BODY) {
        return Err(ApiError::TOO_LARGE);
    }
    let reading = async {
        let mut body = Limited::new(body, MAX_BODY);
        let (mut whole, mut shares) = (BytesMut::new(), Vec::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    ApiError::TOO_LARGE
                } else {
                    ApiError::BODY_BROKEN
                }
            })?;
            let Ok(data) = frame.into_data() else { continue };
            let before = whole.len().max(OWN);
            whole.extend_from_slice(&data);
            // For what has come, not for what was announced: announcing costs a client nothing.
            let kib = u32::try_from(whole.len().max(OWN).div_ceil(1024) - before.div_ceil(1024)).unwrap_or(u32::MAX);
            if kib > 0 {
                shares.push(app.body_kib.try_acquire_many(kib).map_err(|_| ApiError::BUSY)?);
            }
        }
        Ok(whole.freeze())
    };
    timeout(TIMEOUT, reading).await.unwrap_or(Err(ApiError::BODY_TIMEOUT))
}
