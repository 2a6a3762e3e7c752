//! Knows who is joined to which Matrix room, as our own homeserver says (MSC4502).
//!
//! A yes is remembered for 5 seconds, and all who ask the same at the same time share one call, so that a call that starts
//! asks once per user. A no is never remembered: who was refused and joins is let in at once. A yes that is 5 seconds old is
//! harmless: a token outlives it by far, and who leaves is removed from the call (`kick.rs`).
#![expect(clippy::disallowed_methods, reason = "an adapter: asks, waits and remembers")]

use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::cache::bounded;
use crate::homeserver::{OwnError, OwnHomeserver, Subject};
use crate::retry::{ANSWER_TIMEOUT, Deadline, RETRY_BUDGET};
use crate::single_flight::SingleFlight;

/// How long a yes is believed (decision A8).
const REMEMBERED_FOR: Duration = Duration::from_secs(5);
/// How many are remembered: a few hundred bytes each.
const MAX_REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// For how long an answer is waited for after there was no time left to ask again.
const LAST_QUESTION_TIMEOUT: Duration = Duration::from_secs(5);
const _: () = assert!(
    RETRY_BUDGET.as_millis() + LAST_QUESTION_TIMEOUT.as_millis() < ANSWER_TIMEOUT.as_millis(),
    "the last answer is there in time"
);

/// Asks our own homeserver.
pub struct Members {
    own: Arc<OwnHomeserver>,
    joined: Mutex<LruCache<Box<str>, Instant>>,
    calls: SingleFlight<Box<str>, Result<bool, OwnError>>,
}

impl Members {
    /// Makes an empty memory; the homeserver is asked at the first question.
    #[must_use]
    pub fn new(own: Arc<OwnHomeserver>) -> Self {
        Self {
            own,
            joined: Mutex::new(bounded(MAX_REMEMBERED)),
            calls: SingleFlight::new(),
        }
    }

    /// Whether somebody is joined to a room: what may pass is tried again, and nothing is waited for after the end of `deadline`.
    ///
    /// # Errors
    /// When the homeserver does not say it.
    pub async fn is_joined(&self, room_id: &str, subject: Subject<'_>, deadline: Deadline) -> Result<bool, OwnError> {
        let retry_until = deadline.retry_until;
        let deadline = deadline.answer_by.min(retry_until + LAST_QUESTION_TIMEOUT);
        let came = Instant::now();
        // Neither names of users nor of servers hold a NUL, whatever stands in the room's id.
        let key = match subject {
            Subject::User(user) => format!("{room_id}\0{user}"),
            Subject::Server(server) => format!("{room_id}\0{server}"),
        };
        loop {
            if self.remembers(&key) {
                return Ok(true);
            }
            let call = pin!(self.own.is_joined(room_id, subject, retry_until, deadline));
            // Somebody else's call may have longer than we have.
            let Ok((answer, asked)) = timeout_at(deadline, self.calls.run(key.as_str().into(), call)).await else {
                return Err(OwnError::Timeout);
            };
            let answer = match answer {
                // An id that is none: nobody is joined there, and nobody is they.
                Err(OwnError::NoId) => Ok(false),
                answer => answer,
            };
            let is_fresh = asked >= came || Instant::now() >= deadline;
            match answer {
                Ok(true) => {
                    self.remember(&key, asked);
                    return Ok(true);
                }
                // A pause that the homeserver asks for is for all.
                Err(error) if is_fresh || error.retry_after().is_some() => return Err(error),
                Ok(false) if is_fresh => return Ok(false),
                // What was asked before we came says nothing about us: somebody may have joined since.
                Ok(false) | Err(_) => {}
            }
        }
    }

    fn remembers(&self, key: &str) -> bool {
        let mut joined = self.joined.lock();
        joined.get(key).is_some_and(|asked| asked.elapsed() < REMEMBERED_FOR)
    }

    fn remember(&self, key: &str, asked: Instant) {
        let mut joined = self.joined.lock();
        joined.put(key.into(), asked);
    }
}
