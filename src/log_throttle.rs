//! Bounds how often the same thing is logged: what strangers can cause must not fill the log.
#![expect(clippy::disallowed_methods, reason = "counts by the time at which something is logged")]

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lets so many lines through in each span of time, and counts the others.
pub struct LogThrottle {
    lines: u32,
    per: Duration,
    state: Mutex<Span>,
}

/// The span of time that is running.
#[derive(Debug)]
struct Span {
    began: Option<Instant>,
    shown: u32,
    /// Lines that were not shown since the last one that was.
    hidden: u64,
}

impl LogThrottle {
    /// A throttle for `lines` lines in each `per`, which begins with the first line after the last one was over.
    #[must_use]
    pub const fn new(lines: u32, per: Duration) -> Self {
        let span = Span {
            began: None,
            shown: 0,
            hidden: 0,
        };
        Self {
            lines,
            per,
            state: Mutex::new(span),
        }
    }

    /// A throttle for trouble that lasts: one line a minute.
    #[must_use]
    pub const fn once_a_minute() -> Self {
        Self::new(1, Duration::from_secs(60))
    }

    /// A throttle for single events, each of which is of interest unless there are many: ten lines a second.
    #[must_use]
    pub const fn ten_a_second() -> Self {
        Self::new(10, Duration::from_secs(1))
    }

    /// Calls `say` where there is room for a line, with the number of times that there was something to say since the last
    /// line, this one included.
    pub fn log(&self, say: impl FnOnce(u64)) {
        let mut span = self.state.lock();
        let count = span.count(Instant::now(), self.lines, self.per);
        drop(span);
        if let Some(count) = count {
            say(count);
        }
    }
}

impl Span {
    fn count(&mut self, now: Instant, lines: u32, per: Duration) -> Option<u64> {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= per) {
            (self.began, self.shown) = (Some(now), 0);
        }
        if self.shown >= lines {
            self.hidden += 1;
            return None;
        }
        self.shown += 1;
        Some(std::mem::take(&mut self.hidden) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_and_then_a_count() {
        let mut span = LogThrottle::ten_a_second().state.into_inner();
        let began = Instant::now();
        let mut shown = Vec::new();
        // 100 a second for three seconds.
        for n in 0..300 {
            let at = began + Duration::from_millis(10 * n);
            shown.extend(span.count(at, 10, Duration::from_secs(1)));
        }
        let mut expected = vec![1; 30];
        (expected[10], expected[20]) = (91, 91);
        assert_eq!(shown, expected);
        assert_eq!(span.count(began + Duration::from_secs(60), 10, Duration::from_secs(1)), Some(91));
    }

    #[test]
    fn one_of_many() {
        let (throttle, mut told) = (LogThrottle::once_a_minute(), Vec::new());
        for _ in 0..100 {
            throttle.log(|count| told.push(count));
        }
        assert_eq!(told, [1]);
    }
}
