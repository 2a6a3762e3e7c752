//! Delayed events ([MSC4140](https://github.com/matrix-org/matrix-spec-proposals/pull/4140)) as values: what can be done with one,
//! and what a homeserver made of it. Pure.

use std::time::Duration;

use crate::outcome::words;

words! {
    /// Action on a delayed event: MSC4140's `action`, the word in the path of a request.
    DelayedEventAction {
        /// Let the delay of the event run anew.
        Restart = "restart",
        /// Send the event now.
        Send = "send",
        /// Cancel the event, so that it is never sent.
        Cancel = "cancel",
    }
}

/// How a call to the homeserver ended, its path already settled (L6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The homeserver did it: 200 or 204.
    Done,
    /// 404 with a JSON object that is not about an unknown path.
    NotFound,
    /// 409: finalised otherwise.
    Conflict,
    /// 401 or 403 on both paths.
    Forbidden,
    /// 429, with the server's hint, which pauses the homeserver and not the job.
    Limited(Option<Duration>),
    /// The failure may pass: 5xx, a 404 that is no JSON, transport, an unresolved base URL; with the server's hint.
    Transient(Option<Duration>),
}
