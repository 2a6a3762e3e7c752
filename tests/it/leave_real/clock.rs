//! The machine's clock, which Synapse, the browsers and these tests share.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::support::lateness;

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_millis().try_into().expect("before the year 500 million")
}

pub(super) fn sleep_until(at_ms: u64) {
    std::thread::sleep(Duration::from_millis(at_ms.saturating_sub(now_ms())));
}

pub(super) fn sleep_s(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

/// How late the machine was at worst since then; see [`lateness`].
pub(super) fn lateness_since(since: u64) -> u64 {
    let ago = Duration::from_millis(now_ms().saturating_sub(since));
    let late = lateness::since(Instant::now().checked_sub(ago).unwrap_or_else(Instant::now));
    late.as_millis().try_into().expect("minutes at most")
}
