//! The machine's clock, which Synapse, the browsers and these tests share.

use std::collections::VecDeque;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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

/// How much longer than asked somebody slept who slept 5 ms at a time, at worst since then: by so much at least was
/// everybody else late too on this machine. What the service may take is what it may take on a machine that lets it run.
pub(super) fn lateness_since(since: u64) -> u64 {
    let late = LATE.lock().unwrap_or_else(PoisonError::into_inner);
    late.iter()
        .filter(|(at, _)| *at >= since)
        .map(|(_, late)| *late)
        .max()
        .unwrap_or_default()
}

static LATE: Mutex<VecDeque<(u64, u64)>> = Mutex::new(VecDeque::new());

/// Starts to measure.
pub(super) fn measure_lateness() {
    static ONCE: Once = Once::new();
    const NAP: u64 = 5;
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            let mut last = now_ms();
            loop {
                std::thread::sleep(Duration::from_millis(NAP));
                let now = now_ms();
                let late = now.saturating_sub(last + NAP);
                last = now;
                if late > NAP {
                    let mut all = LATE.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push_back((now, late));
                    while all.front().is_some_and(|(at, _)| at + 600_000 < now) {
                        all.pop_front();
                    }
                }
            }
        });
    });
}
