//! A rate limit as homeservers have it.

use std::sync::Mutex;
use std::time::Instant;

use serde_json::json;

use super::neighbour::Reply;

/// So many calls a second, after a burst.
pub(crate) struct Bucket {
    per_second: f64,
    burst: f64,
    /// How many calls it has left, and since when.
    left: Mutex<(f64, Instant)>,
}

impl Bucket {
    pub(crate) fn new(per_second: f64, burst: f64) -> Self {
        Self {
            per_second,
            burst,
            left: Mutex::new((burst, Instant::now())),
        }
    }

    /// Counts a call; the answer to one that is too many.
    pub(crate) fn refuses(&self) -> Option<Reply> {
        let (mut left, now) = (self.left.lock().unwrap(), Instant::now());
        left.0 = ((now - left.1).as_secs_f64().mul_add(self.per_second, left.0)).min(self.burst);
        left.1 = now;
        if left.0 < 1.0 {
            let millis = ((1.0 - left.0) / self.per_second * 1000.0).ceil();
            return Some(Reply::json(
                429,
                &json!({"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": millis as u64}),
            ));
        }
        left.0 -= 1.0;
        None
    }
}
