//! The turns of [`Buckets`] by the clock, and with names hashed.
#![expect(clippy::disallowed_methods, reason = "counts by the time at which somebody asks")]

use std::hash::{BuildHasher as _, RandomState};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::rates::{Asker, Buckets, RateExceeded, Rates};
use super::{Class, Who};

/// Limits how often users and homeservers ask.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: Mutex<Buckets>,
    limits_homeservers: bool,
    /// Users come from strangers: they are hashed with a key of this process.
    hasher: RandomState,
}

impl RateLimiter {
    /// Makes a limiter that nobody has asked yet.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        Self {
            buckets: Mutex::new(Buckets::new(rates)),
            limits_homeservers: rates.homeserver.is_some(),
            hasher: RandomState::new(),
        }
    }

    /// Counts a request of `user`, and says until when it has to be held, if at all.
    ///
    /// # Errors
    /// When that would be later than `until`.
    pub fn take(
        &self,
        user: &str,
        homeserver: impl FnOnce() -> Who,
        delegates: bool,
        until: Instant,
    ) -> Result<Option<Instant>, RateExceeded> {
        let homeserver = self.limits_homeservers.then(homeserver).filter(|who| who.class != Class::Listed);
        let asker = Asker {
            user: self.hasher.hash_one(user),
            homeserver: homeserver.map(|who| who.name),
            delegates,
        };
        let now = Instant::now().into_std();
        let goes_at = self.buckets.lock().take(&asker, now, until.into_std())?;
        Ok((goes_at > now).then(|| goes_at.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::NameHasher;
    use super::super::rates::{Rate, RateLimit};
    use super::*;
    use crate::server_name::ServerName;
    use std::num::NonZeroU32;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn spellings_of_a_homeserver_are_one_and_listed_ones_are_not_counted() {
        let rate = |per_minute| NonZeroU32::new(per_minute).map(Rate);
        let limiter = RateLimiter::new(Rates {
            user: rate(60),
            homeserver: rate(2),
        });
        let (now, until) = (Instant::now(), Instant::now() + Duration::from_secs(10));
        let hasher = NameHasher::default();
        let take = |user: &str, server: &str, class: Class| {
            let server = ServerName::parse(server).unwrap();
            limiter.take(user, || hasher.who(&server, class), false, until)
        };
        assert_eq!(take("@a:x.example", "x.example", Class::Stranger), Ok(None));
        assert_eq!(take("@b:X.example.:1", "X.example.:1", Class::Verified), Ok(None));
        let refused = take("@c:x.example:2", "x.example:2", Class::Stranger).unwrap_err();
        assert_eq!((refused.limit, refused.wait), (RateLimit::Homeserver, Duration::from_secs(30)));
        for _ in 0..60 {
            assert_eq!(take("@a:listed.example", "listed.example", Class::Listed), Ok(None));
        }
        let next = take("@a:listed.example", "listed.example", Class::Listed);
        assert_eq!(next, Ok(Some(now + Duration::from_secs(1))));
    }
}
