//! How often users and homeservers may ask (decision T7a): whoever asks more often is delayed, and refused where the delay would
//! be longer than a request is held. Pure.
//!
//! A token bucket each, as the moment at which it is full again: that is all that has to be remembered, and nothing once the
//! moment has passed. Where more ask than are remembered, whoever asked longest ago has a full bucket again: it errs on their side.

use std::num::{NonZeroU32, NonZeroUsize};
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::cache::bounded;
use crate::metrics::Limit;

/// Users, and homeservers, whose buckets are remembered.
const MAX_BUCKETS: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();
/// Bytes that a bucket takes: key, moment, the list's two links, and its place in a table that is half empty.
const BUCKET_BYTES: usize = 80;
const _: () = assert!(
    MAX_BUCKETS.get() * BUCKET_BYTES * 2 <= 3 << 20,
    "the buckets of users and homeservers take 3 MiB at the most"
);
/// Requests with a delegated leave may be so many times as many at once: they are the last to be refused.
const DELEGATION_FACTOR: u32 = 2;

/// So many requests a minute, all of them at once or one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub NonZeroU32);

impl Rate {
    /// Time after which one more may be made.
    fn interval(self) -> Duration {
        Duration::from_secs(60) / self.0.get()
    }
}

/// How often somebody may ask; `None` is as often as they like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Rate of each user.
    pub user: Option<Rate>,
    /// Rate of all users of a homeserver that is not listed.
    pub homeserver: Option<Rate>,
}

/// A verified user who asks for something, hashed.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    /// User who asks.
    pub user: u64,
    /// The user's homeserver, where it is not listed.
    pub homeserver: Option<u64>,
    /// Whether the request brings a delegated leave.
    pub delegates: bool,
}

/// A request that is not carried out, because it would be held for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{whose} asks more often than {variable} allows", whose = .limit.whose(), variable = .limit.variable())]
pub struct RateExceeded {
    /// Limit that was met.
    pub limit: RateLimit,
    /// Time after which it would be carried out at once.
    pub wait: Duration,
}

/// Kind of rate: of a user, or of a homeserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateLimit {
    /// The rate of a user.
    User,
    /// The rate of a homeserver.
    Homeserver,
}

impl RateLimit {
    const fn whose(self) -> &'static str {
        match self {
            Self::User => "the user",
            Self::Homeserver => "the homeserver",
        }
    }

    /// Variable that sets the rate.
    #[must_use]
    pub const fn variable(self) -> &'static str {
        match self {
            Self::User => "LIVEKIT_RATE_LIMIT_USER",
            Self::Homeserver => "LIVEKIT_RATE_LIMIT_HOMESERVER",
        }
    }
}

impl From<RateLimit> for Limit {
    fn from(limit: RateLimit) -> Self {
        match limit {
            RateLimit::User => Self::UserRate,
            RateLimit::Homeserver => Self::HomeserverRate,
        }
    }
}

/// The buckets of all users, and of all homeservers.
#[derive(Debug)]
pub struct Buckets {
    users: Option<Kind>,
    homeservers: Option<Kind>,
}

#[derive(Debug)]
struct Kind {
    rate: Rate,
    /// When each bucket is full again.
    full_at: LruCache<u64, Instant>,
}

impl Buckets {
    /// Makes buckets that are all full.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        let kind = |rate| Kind {
            rate,
            full_at: bounded(MAX_BUCKETS),
        };
        Self {
            users: rates.user.map(kind),
            homeservers: rates.homeserver.map(kind),
        }
    }

    /// The moment at which a request that comes `now` may go on, which counts from now on, and not before both rates allow it.
    ///
    /// # Errors
    /// When that would be later than `until`; then it does not count.
    pub fn take(&mut self, asker: &Asker, now: Instant, until: Instant) -> Result<Instant, RateExceeded> {
        let mut kinds = [
            (self.users.as_mut().zip(Some(asker.user)), RateLimit::User),
            (self.homeservers.as_mut().zip(asker.homeserver), RateLimit::Homeserver),
        ];
        let mut goes_at = now;
        for (kind, limit) in &mut kinds {
            let Some((kind, key)) = kind else { continue };
            let at = kind.goes_at(*key, asker.delegates, now);
            if at > until {
                let wait = at.saturating_duration_since(now);
                return Err(RateExceeded { limit: *limit, wait });
            }
            goes_at = goes_at.max(at);
        }
        for (kind, key) in kinds.into_iter().filter_map(|(kind, _)| kind) {
            kind.count(key, now);
        }
        Ok(goes_at)
    }
}

impl Kind {
    fn goes_at(&mut self, key: u64, delegates: bool, now: Instant) -> Instant {
        let full_at = self.full_at.get(&key).copied().unwrap_or(now);
        let factor = if delegates { DELEGATION_FACTOR } else { 1 };
        // The last request of a burst begins this much before the bucket of the one before it is full again.
        let burst = self.rate.interval() * (self.rate.0.get() * factor).saturating_sub(1);
        full_at.checked_sub(burst).unwrap_or(now).max(now)
    }

    fn count(&mut self, key: u64, now: Instant) {
        let interval = self.rate.interval();
        let full_at = self.full_at.get_or_insert_mut(key, || now);
        *full_at = (*full_at).max(now) + interval;
    }
}

#[cfg(test)]
mod tests;
