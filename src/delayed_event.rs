//! Delayed events ([MSC4140](https://github.com/matrix-org/matrix-spec-proposals/pull/4140)) as values: what can be done with one,
//! and what a homeserver made of it. Pure.

use std::time::Duration;

/// Action on a delayed event: MSC4140's `action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DelayedEventAction {
    /// Let the delay of the event run anew.
    Restart,
    /// Send the event now.
    Send,
    /// Cancel the event, so that it is never sent.
    Cancel,
}

impl DelayedEventAction {
    /// The word in the path of a request.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Send => "send",
            Self::Cancel => "cancel",
        }
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
