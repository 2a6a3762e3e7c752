//! When that which is remembered of a server is asked for again, because it could not be used (decision O2). Pure.

use std::time::Duration;

use tokio::time::Instant;

/// Least time between two questions about a server, for all requests together.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// When the way to one server was asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rediscovery {
    /// When the question was asked for the first time.
    first: Option<Instant>,
    /// Last time, for whatever reason.
    asked: Option<Instant>,
    /// Last time because it could not be used.
    again: Option<Instant>,
    /// When that began, whether or not it came to an end.
    began: Option<Instant>,
}

/// Next step of a request that has used what was remembered, without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The request asks for it anew.
    Ask,
    /// Another request has asked meanwhile: this one uses what it found.
    Use,
    /// The request asks at that moment: another one asked just before.
    Wait(Instant),
    /// The file was read while it tried: DNS and the open connections are left to be doubted.
    Doubt,
    /// The request gives up: what it has tried was found while it tried.
    GiveUp,
}

impl Rediscovery {
    /// For a request that began to use what was remembered at `used`.
    pub(crate) fn next(&self, used: Instant, now: Instant) -> Next {
        if self.again.is_some_and(|again| again > used) {
            Next::Use
        } else if self.first.is_some_and(|first| first >= used) {
            Next::GiveUp
        } else if self.asked.is_some_and(|asked| asked >= used) {
            Next::Doubt
        } else {
            let due = self.asked.map(|asked| asked + MIN_INTERVAL);
            due.filter(|due| now < *due).map_or(Next::Ask, Next::Wait)
        }
    }

    /// Whether the question may be asked again.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.asked.max(self.began).is_none_or(|asked| now >= asked + MIN_INTERVAL)
    }

    /// Whether nothing was found out for so long, although it may have been asked for.
    pub(crate) fn is_overdue(&self, now: Instant) -> bool {
        self.asked.is_none_or(|asked| now >= asked + MIN_INTERVAL)
    }

    /// Notes that a request is asking now.
    pub(crate) fn begins(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// Notes a question that was due since nothing was remembered, or for too long.
    pub(crate) fn asked(&mut self, now: Instant) {
        self.first.get_or_insert(now);
        self.asked = Some(now);
    }

    /// Notes a question after what was remembered could not be used.
    pub(crate) fn asked_again(&mut self, now: Instant) {
        self.asked(now);
        self.again = Some(now);
    }

    /// Notes that the way is used anew without a question.
    pub(crate) fn doubted(&mut self, now: Instant) {
        self.again = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_asks_and_those_who_failed_meanwhile_use_what_it_found() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut known = Rediscovery::default();
        assert_eq!(
            known.next(at(0), at(0)),
            Next::Ask,
            "the operator wrote it down: it was never asked for"
        );
        known.asked(at(5));
        assert_eq!(known.next(at(0), at(20)), Next::GiveUp, "the request itself has just found it");
        assert_eq!(known.next(at(10), at(20)), Next::Wait(at(1005)));
        assert_eq!(known.next(at(10), at(1005)), Next::Ask);
        known.asked_again(at(1100));
        assert_eq!(known.next(at(1050), at(1110)), Next::Use);
        assert_eq!(known.next(at(1110), at(1120)), Next::Wait(at(2100)));
        assert_eq!(known.next(at(1200), at(2100)), Next::Ask);
        known.begins(at(2100));
        assert!(!known.is_due(at(2200)));
        assert_eq!(known.next(at(1200), at(2200)), Next::Ask, "whoever asked may have gone");
        known.asked(at(9000));
        assert_eq!(known.next(at(8900), at(9100)), Next::Doubt, "the file was due");
        known.doubted(at(9100));
        assert_eq!(known.next(at(8900), at(9200)), Next::Use);
        assert_eq!(known.next(at(9150), at(9200)), Next::Wait(at(10_000)));
    }
}
