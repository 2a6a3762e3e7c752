//! When to try again: growing pauses with seeded jitter, hints of a server clamped, never past the end of a window (L5).
//!
//! It knows neither what is tried nor who is asked.

use crate::time::Time;
use std::time::Duration;

/// No call is repeated sooner than this, whatever a server or a client asks for.
pub const MIN_PAUSE_MS: u64 = 250;

/// How many seconds after a beginning all records of a shared store are read: at once, and again while others may still write what this
/// process does not know (L11).
pub const READ_AFTER_SECONDS: [u64; 5] = [0, 15, 60, 180, 600];

/// The only source of chance here: a seeded generator (splitmix64), so that a run can be repeated.
#[derive(Clone, Debug)]
pub struct Jitter(u64);

impl Jitter {
    /// A generator that gives the same numbers for the same seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `most`, both included.
    #[must_use]
    pub fn up_to(&mut self, most: u64) -> u64 {
        match most.checked_add(1) {
            Some(count) => self.next() % count,
            None => self.next(),
        }
    }
}

/// Growing pauses: the first one, then half as long again each time, up to a cap; each shortened by up to a fifth at random.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    first: u64,
    cap: u64,
}

impl Schedule {
    /// For restarts: several tries fit in half of a short delay, and a homeserver that is away for long is not beleaguered.
    pub const RESTART: Self = Self { first: 500, cap: 60_000 };
    /// For sends and cancellations: somebody is shown as present who is gone.
    pub const SEND: Self = Self { first: 500, cap: 15_000 };
    /// For questions about one participant. The cap keeps a clear no within the last minute of a long wait (L2b).
    pub const PARTICIPANT: Self = Self { first: 500, cap: 20_000 };
    /// For questions about somebody who has not come, where webhooks tell of whoever comes (L8).
    pub const NEWCOMER: Self = Self { first: 500, cap: 900_000 };
    /// For questions about somebody whose departure was certain once (L5a).
    pub const CONFIRM: Self = Self { first: 1_000, cap: 30_000 };
    /// For questions about a room, and for its creation.
    pub const ROOM: Self = Self { first: 300, cap: 10_000 };
    /// For a homeserver that limits without saying for how long.
    pub const LIMITED: Self = Self { first: 1_000, cap: 30_000 };

    /// The pause after so many failures in a row (1 = the first).
    #[must_use]
    pub fn pause(self, failures: u8, jitter: &mut Jitter) -> u64 {
        let mut pause = self.first;
        for _ in 1..failures {
            pause = (pause + pause / 2).min(self.cap);
            if pause == self.cap {
                break;
            }
        }
        (pause - jitter.up_to(pause / 5)).max(MIN_PAUSE_MS)
    }

    /// When the next try starts, or `None` when the window has no room for one. A hint of the server replaces the schedule; both are
    /// clamped to 250 ms … what is left, so that a long one waits for the rest of the window instead of giving it up. The last try
    /// keeps the least pause from the end: timers are late, and a try after the end would be one too many.
    #[must_use]
    pub fn next_try(self, failures: u8, hint: Option<Duration>, now: Time, until: Time, jitter: &mut Jitter) -> Option<Time> {
        let left = until.since(now).checked_sub(MIN_PAUSE_MS).filter(|&left| left >= MIN_PAUSE_MS)?;
        let pause = hint.map_or_else(|| self.pause(failures, jitter), as_millis);
        Some(now.after(pause.clamp(MIN_PAUSE_MS, left)))
    }
}

/// Reads a server's hint about when to come back: a `Retry-After` of whole seconds, one that is a date (turned into a duration by
/// the caller, zero if past), or `retry_after_ms` of the body. The first that is there and makes sense is taken.
#[must_use]
pub fn hint(retry_after: Option<&str>, until_date: Option<Duration>, retry_after_ms: Option<u64>) -> Option<Duration> {
    let seconds = retry_after.map(str::trim).and_then(|text| {
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            None
        } else if text.starts_with('-') {
            Some(Duration::ZERO)
        } else {
            Some(Duration::from_secs(digits.parse().unwrap_or(u64::MAX)))
        }
    });
    seconds.or(until_date).or_else(|| retry_after_ms.map(Duration::from_millis))
}

pub(crate) fn as_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
