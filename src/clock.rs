//! The two clocks of this process, for the drivers of the pure cores.
#![expect(clippy::disallowed_methods, reason = "the clock of this process")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::time::{Time, WallClock};

/// Whole seconds of the time of day since 1970.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Milliseconds of the time of day since 1970.
#[must_use]
pub fn unix_millis() -> i64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(unix.as_millis()).unwrap_or(i64::MAX)
}

/// Counts from the moment at which it was made.
pub struct Clock {
    started: Instant,
}

impl Clock {
    /// Starts the clock at the present moment.
    #[must_use]
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Time {
        self.at(Instant::now())
    }

    /// The time on this clock at a moment that was measured elsewhere.
    #[must_use]
    pub fn at(&self, moment: Instant) -> Time {
        let since = moment.saturating_duration_since(self.started);
        Time::START.after(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// When a timer for `time` has to fire.
    #[must_use]
    pub fn instant(&self, time: Time) -> Instant {
        // The cores count whole milliseconds: one more, so that its moment has come when the timer fires.
        self.started + Duration::from_millis(time.since(Time::START).saturating_add(1))
    }

    /// The time of day, for what is stored.
    #[must_use]
    pub fn wall(&self) -> WallClock {
        WallClock::new(self.now(), unix_millis())
    }
}

/// Processor time that this thread has had, as the scheduler counts it: to within some milliseconds, however busy the machine is.
#[cfg(test)]
pub(crate) fn cpu_time() -> Duration {
    let counts = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(counts.split(' ').next().unwrap().parse().unwrap())
}
