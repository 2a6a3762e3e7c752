//! Tries again rather than refuse (decision T7a): Element Call shows a fatal page at the first error of a token route, and waits
//! without complaint for a slow answer. So what may pass is tried again inside.

#![expect(clippy::disallowed_methods, reason = "waits between tries, until a deadline")]

use std::fmt::Display;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::request_line::neighbour_said;

/// How long after its arrival a request is held before what may pass is answered with an error.
pub const RETRY_BUDGET: Duration = Duration::from_secs(10);
/// Hold of a request to `/token_source`, shorter: LiveKit's SDK for Android waits for 10 s in all.
pub const TOKEN_SOURCE_RETRY_BUDGET: Duration = Duration::from_secs(8);
/// When a request to `/token_source` is answered, whatever a neighbour is still about to say.
pub const TOKEN_SOURCE_ANSWER_TIMEOUT: Duration = Duration::from_secs(9);
/// End of a request to any other route, whatever a neighbour is still about to say: proxies in front are to wait that long.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(25);

const _: () = assert!(
    RETRY_BUDGET.as_millis() < ANSWER_TIMEOUT.as_millis()
        && TOKEN_SOURCE_RETRY_BUDGET.as_millis() < TOKEN_SOURCE_ANSWER_TIMEOUT.as_millis(),
    "what was held has some time left for its last answer"
);

/// Least time that a request must have left for a neighbour to be asked on its behalf.
pub const MIN_REMAINING: Duration = Duration::from_millis(250);

/// How long a request may take (decision T7a).
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// When the head of the request was there.
    pub received: Instant,
    /// Until when that which may pass is tried again.
    pub retry_until: Instant,
    /// When no answer of a neighbour is waited for any more.
    pub answer_by: Instant,
}

impl Deadline {
    /// For a request to any route but `/token_source`.
    #[must_use]
    pub fn since(received: Instant) -> Self {
        Self {
            received,
            retry_until: received + RETRY_BUDGET,
            answer_by: received + ANSWER_TIMEOUT,
        }
    }

    /// For a request to `/token_source`.
    #[must_use]
    pub fn of_token_source(received: Instant) -> Self {
        Self {
            received,
            retry_until: received + TOKEN_SOURCE_RETRY_BUDGET,
            answer_by: received + TOKEN_SOURCE_ANSWER_TIMEOUT,
        }
    }
}

/// An error after which a neighbour may be asked again.
pub trait Transient: Display {
    /// Name of the neighbour in the log.
    const NEIGHBOUR: &'static str;

    /// Pause before another try, after so many; `None` where one would bring nothing else.
    fn pause(&self, tries: u32) -> Option<Duration>;

    /// Whether the try was only cut short, so that the one before it says more.
    fn says_nothing(&self) -> bool {
        false
    }
}

/// Asks until there is an answer, or an error that does not pass; asks no more after `deadline`, but once in any case.
///
/// # Errors
/// With the last error that says something.
pub async fn until<T, E: Transient, F: Future<Output = Result<T, E>>>(deadline: Instant, mut ask: impl FnMut() -> F) -> Result<T, E> {
    let mut tries = 1;
    let mut former: Option<E> = None;
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => former.take().filter(|_| error.says_nothing()).unwrap_or(error),
        };
        let reason = error.to_string();
        neighbour_said(&reason);
        let again_at = error.pause(tries).and_then(|pause| Instant::now().checked_add(pause));
        let Some(again_at) = again_at.filter(|at| *at < deadline) else {
            return Err(error);
        };
        tracing::debug!(name: "retry", reason, tries, "trying {} again", E::NEIGHBOUR);
        former = Some(error);
        sleep_until(again_at).await;
        tries += 1;
    }
}

/// Pause after so many tries: 0.2 s, doubled up to a second.
#[must_use]
pub fn backoff(tries: u32) -> Duration {
    Duration::from_millis(200)
        .saturating_mul(1 << tries.saturating_sub(1).min(8))
        .min(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("{self:?}")]
    enum Trouble {
        Passes(u32),
        CutShort,
        Stays,
    }

    impl Transient for Trouble {
        const NEIGHBOUR: &'static str = "the test";

        fn pause(&self, tries: u32) -> Option<Duration> {
            (*self != Self::Stays).then(|| backoff(tries))
        }

        fn says_nothing(&self) -> bool {
            *self == Self::CutShort
        }
    }

    #[test]
    fn pauses_grow_to_a_second() {
        let pauses: Vec<_> = [1, 2, 3, 4, 99].map(|tries| backoff(tries).as_millis()).into();
        assert_eq!(pauses, [200, 400, 800, 1000, 1000]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_tried_until_the_deadline_and_what_stays_once() {
        let began = Instant::now();
        for (deadline, errors, outcome, at) in [
            (3, vec![Trouble::Passes(1), Trouble::Passes(2)], Ok(()), 600),
            (3, vec![Trouble::Passes(1), Trouble::Stays], Err(Trouble::Stays), 200),
            (
                1,
                vec![Trouble::Passes(1), Trouble::Passes(2), Trouble::Passes(3)],
                Err(Trouble::Passes(3)),
                600,
            ),
            (
                1,
                vec![Trouble::Passes(1), Trouble::Passes(2), Trouble::CutShort],
                Err(Trouble::Passes(2)),
                600,
            ),
            (0, vec![], Ok(()), 0),
            (0, vec![Trouble::CutShort], Err(Trouble::CutShort), 0),
        ] {
            let (start, mut errors) = (Instant::now(), errors.into_iter());
            let ask = || std::future::ready(errors.next().map_or(Ok(()), Err));
            assert_eq!(
                until(start + Duration::from_secs(deadline), ask).await,
                outcome,
                "after {:?}",
                began.elapsed()
            );
            assert_eq!(start.elapsed().as_millis(), at, "{outcome:?}");
        }
    }
}
