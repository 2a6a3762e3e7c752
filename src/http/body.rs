//! Reads request bodies, bounded in size, in time, and in what all of them together may hold.

use std::time::Duration;

use axum::body::Body;
use http::{HeaderMap, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use tokio::time::{sleep, timeout};

use super::report::{ApiError, busy};
use crate::connections::{Connection, Pot, Taken};

/// Bytes that every body may have besides the pot: longer than an honest one, so that none waits for greedy ones.
const OWN_BYTES: usize = 2 * 1024;
/// Time for a body to arrive.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Where the pot is empty and nobody is slow yet.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// The length that a request announces.
pub(super) fn declared(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// A whole body. Drop it as soon as it was parsed.
pub(super) struct Whole<'a> {
    bytes: Vec<u8>,
    connection: &'a Connection,
    pot: Pot,
    taken: usize,
}

/// Reads a body of at most `most` bytes.
pub(super) async fn read(
    connection: &Connection,
    pot: Pot,
    declared: Option<usize>,
    body: Body,
    most: usize,
) -> Result<Whole<'_>, ApiError> {
    if declared.is_some_and(|length| length > most) {
        return Err(ApiError::TOO_LARGE);
    }
    let mut whole = Whole {
        bytes: Vec::new(),
        connection,
        pot,
        taken: 0,
    };
    let reading = timeout(TIMEOUT, whole.fill(body, declared.unwrap_or(most), most));
    tokio::select! {
        biased;
        read = reading => read.unwrap_or(Err(ApiError::BODY_TIMEOUT))?,
        () = connection.told_to_answer_busy() => return Err(busy("it was the slowest to send its body, and others needed the place")),
    }
    connection.request_is_complete();
    Ok(whole)
}

impl Whole<'_> {
    async fn fill(&mut self, body: Body, expected: usize, most: usize) -> Result<(), ApiError> {
        let mut body = Limited::new(body, most);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    ApiError::TOO_LARGE
                } else {
                    ApiError::BODY_BROKEN
                }
            })?;
            let Ok(data) = frame.into_data() else { continue };
            let (has, needs) = (self.bytes.capacity(), self.bytes.len() + data.len());
            if needs > has {
                // For what has come, not for what was announced: announcing costs a client nothing.
                let grown = needs.max((2 * has).min(expected));
                self.take(grown).await?;
                self.bytes.reserve_exact(grown - self.bytes.len());
            }
            self.bytes.extend_from_slice(&data);
        }
        Ok(())
    }

    /// Room for `capacity` bytes in all.
    async fn take(&mut self, capacity: usize) -> Result<(), ApiError> {
        let wanted = capacity.saturating_sub(OWN_BYTES) - self.taken;
        if wanted == 0 {
            return Ok(());
        }
        loop {
            match self.connection.take(self.pot, wanted) {
                Taken::Yes => break,
                Taken::NotYet => {
                    sleep(RETRY_PAUSE).await;
                    self.connection.was_kept_waiting(RETRY_PAUSE);
                }
                Taken::GiveWay => return Err(busy("the memory for bodies is taken")),
            }
        }
        self.taken += wanted;
        Ok(())
    }
}

impl std::ops::Deref for Whole<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        self.connection.give_back(self.pot, self.taken);
    }
}
