//! Tries again rather than refuse (decision T7a): Element Call shows a fatal page at the first error of a token route, and
//! waits without complaint for a slow answer. So what may pass is tried again inside. Pure.

use std::time::Duration;

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

    #[test]
    fn pauses_grow_to_a_second() {
        let pauses: Vec<_> = [1, 2, 3, 4, 99].map(|tries| backoff(tries).as_millis()).into();
        assert_eq!(pauses, [200, 400, 800, 1000, 1000]);
    }
}
