//! Moments of the driver's monotonic clock, and how they relate to the wall clock of stored records.
//!
//! It reads no clock: the driver does, in one place.

use std::num::NonZeroU64;

/// A moment, in milliseconds of the driver's monotonic clock. `Option<Time>` is as small as `Time`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Time(NonZeroU64);

impl Time {
    /// The moment at which the driver's clock begins: far enough from zero that stored moments from before the start have a place.
    pub const START: Self = Self::from_millis(10_000_000_000);
    /// The latest moment there is.
    pub const LATEST: Self = Self(NonZeroU64::MAX);
    /// The earliest moment there is.
    pub const EARLIEST: Self = Self(NonZeroU64::MIN);

    /// The moment this many milliseconds after the clock's zero.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(NonZeroU64::MIN.saturating_add(millis))
    }

    /// Milliseconds since the clock's zero.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0.get() - 1
    }

    /// The moment so many milliseconds later.
    #[must_use]
    pub const fn after(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }

    /// The moment so many milliseconds earlier.
    #[must_use]
    pub const fn before(self, millis: u64) -> Self {
        Self::from_millis(self.as_millis().saturating_sub(millis))
    }

    /// Milliseconds since `earlier`, zero where that lies in the future.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.get().saturating_sub(earlier.0.get())
    }
}

/// How the monotonic clock and the wall clock stood to each other when both were read.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    monotonic: Time,
    unix_millis: i64,
}

impl WallClock {
    /// Pairs the readings of both clocks at the same moment.
    #[must_use]
    pub const fn new(monotonic: Time, unix_millis: i64) -> Self {
        Self { monotonic, unix_millis }
    }

    /// Moment that the monotonic clock showed.
    #[must_use]
    pub const fn monotonic(&self) -> Time {
        self.monotonic
    }

    /// By how many milliseconds the wall clock has run ahead of the monotonic one until `later`; negative where it was set back.
    #[must_use]
    pub fn drift_ms(&self, later: &Self) -> i64 {
        later.unix_millis.saturating_sub(self.unix_millis(later.monotonic))
    }

    /// Milliseconds since 1970 that the wall clock shows at `time`.
    #[must_use]
    pub fn unix_millis(&self, time: Time) -> i64 {
        let moved = i128::from(time.as_millis()) - i128::from(self.monotonic.as_millis()) + i128::from(self.unix_millis);
        i64::try_from(moved).unwrap_or(if moved < 0 { i64::MIN } else { i64::MAX })
    }

    /// The moment at which the wall clock shows `unix_millis`.
    #[must_use]
    pub fn time(&self, unix_millis: i64) -> Time {
        let moved = i128::from(unix_millis) - i128::from(self.unix_millis) + i128::from(self.monotonic.as_millis());
        u64::try_from(moved).map_or(
            if moved < 0 { Time::EARLIEST } else { Time::from_millis(u64::MAX) },
            Time::from_millis,
        )
    }
}

/// A delay of a delayed event: 1 ms to 24 h (L8).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Delay(u32);

impl Delay {
    /// The longest delay that is taken.
    pub const MAX: Self = Self(24 * 60 * 60 * 1000);

    /// A delay of that many milliseconds, if it is one that is taken.
    #[must_use]
    pub fn from_millis(millis: u64) -> Option<Self> {
        u32::try_from(millis).ok().filter(|&ms| (1..=Self::MAX.0).contains(&ms)).map(Self)
    }

    /// The delay in milliseconds.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0 as u64
    }
}

#[cfg(test)]
mod tests;
