//! How late everybody is on this machine. What the service may take is what it may take on a machine that lets it run.

use std::collections::VecDeque;
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

const NAP: Duration = Duration::from_millis(5);
/// Longer than any test looks back.
const REMEMBERED: Duration = Duration::from_secs(600);

static LATE: Mutex<VecDeque<(Instant, Duration)>> = Mutex::new(VecDeque::new());

/// How much longer than asked somebody slept who sleeps 5 ms at a time, at worst since then: by so much at least was
/// everybody else late too.
pub(crate) fn since(began: Instant) -> Duration {
    let late = LATE.lock().unwrap_or_else(PoisonError::into_inner);
    let of_then = late.iter().filter(|(at, _)| *at >= began);
    of_then.map(|(_, late)| *late).max().unwrap_or_default()
}

/// Starts to measure, once per process.
pub(crate) fn measure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            let mut last = Instant::now();
            loop {
                std::thread::sleep(NAP);
                let now = Instant::now();
                let late = (now - last).saturating_sub(NAP);
                last = now;
                if late > NAP {
                    let mut all = LATE.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push_back((now, late));
                    while all.front().is_some_and(|(at, _)| now - *at > REMEMBERED) {
                        all.pop_front();
                    }
                }
            }
        });
    });
}
