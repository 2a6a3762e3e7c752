//! States instead of shots: whether a neighbour can be used, since when, and one line for each change.

#![expect(clippy::disallowed_methods, reason = "tells for how long a state has lasted")]

use std::fmt;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::log_throttle::LogThrottle;
use crate::metrics::{METRICS, Neighbour};

/// Changes that are told in a minute: a neighbour that comes and goes all the time is told of no more often.
const MAX_CHANGES_PER_MINUTE: u32 = 10;

/// Whether one neighbour can be used.
pub struct State {
    neighbour: Neighbour,
    known: Mutex<Option<Known>>,
    told: LogThrottle,
}

/// Last that was seen of the neighbour.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// Remedy for the operator; nothing where all is well.
    remedy: Option<&'static str>,
    /// Since when it is so, or since when it is not well.
    since: Instant,
}

/// Change of a state that is worth a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The neighbour can be used, for the first time.
    Good,
    /// The neighbour can be used again, after so long.
    Back(Duration),
    /// The neighbour cannot be used, or for another cause than before.
    Bad,
}

impl State {
    /// A state of which nothing is known yet.
    #[must_use]
    pub const fn new(neighbour: Neighbour) -> Self {
        Self {
            neighbour,
            known: Mutex::new(None),
            told: LogThrottle::new(MAX_CHANGES_PER_MINUTE, Duration::from_secs(60)),
        }
    }

    /// Notes that the neighbour was seen to be well, or not: then with what can be done. `tell` is called where that is news.
    pub fn seen(&self, remedy: Option<&'static str>, tell: impl FnOnce(Change)) {
        let Some(change) = self.change(remedy) else { return };
        METRICS.is_up(self.neighbour, remedy.is_none());
        self.told.log(|_| tell(change));
    }

    fn change(&self, remedy: Option<&'static str>) -> Option<Change> {
        let mut known = self.known.lock();
        let now = Instant::now();
        let (change, since) = match *known {
            Some(known) if known.remedy == remedy => return None,
            Some(Known { remedy: Some(_), since }) if remedy.is_none() => (Change::Back(now - since), now),
            // Another cause of the same trouble.
            Some(Known { remedy: Some(_), since }) => (Change::Bad, since),
            Some(Known { remedy: None, .. }) => (Change::Bad, now),
            None if remedy.is_none() => (Change::Good, now),
            None => (Change::Bad, now),
        };
        *known = Some(Known { remedy, since });
        Some(change)
    }

    /// Whether it can be used, and for how long that has been so; `None` as long as nothing is known.
    #[must_use]
    pub fn now(&self) -> Option<(bool, Duration)> {
        self.known.lock().map(|known| (known.remedy.is_none(), known.since.elapsed()))
    }

    /// When it is to be looked at again: soon while it is not well.
    #[must_use]
    pub fn next_check(&self, interval: Duration) -> Duration {
        match self.now() {
            Some((true, _)) => interval * 10,
            Some((false, _)) | None => interval,
        }
    }
}

/// A span of time as people say it: `4 min 10 s`.
#[derive(Debug, Clone, Copy)]
pub struct Age(pub Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
            (0, 0, 0, seconds) => write!(f, "{seconds} s"),
            (0, 0, minutes, seconds) => write!(f, "{minutes} min {seconds} s"),
            (0, hours, minutes, _) => write!(f, "{hours} h {minutes} min"),
            (days, hours, ..) => write!(f, "{days} d {hours} h"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_once() {
        let state = State::new(Neighbour::Store);
        let mut told = Vec::new();
        for remedy in [None, None, Some("a"), Some("a"), Some("b"), None, None] {
            state.seen(remedy, |change| told.push(change));
        }
        assert!(
            matches!(told[..], [Change::Good, Change::Bad, Change::Bad, Change::Back(_)]),
            "{told:?}"
        );
        assert!(state.now().is_some_and(|(up, _)| up));
        assert_eq!(state.next_check(Duration::from_secs(60)), Duration::from_secs(600));
    }

    #[test]
    fn ages_are_said_as_people_do() {
        for (seconds, text) in [(0, "0 s"), (250, "4 min 10 s"), (7_260, "2 h 1 min"), (200_000, "2 d 7 h")] {
            assert_eq!(Age(Duration::from_secs(seconds)).to_string(), text);
        }
    }
}
