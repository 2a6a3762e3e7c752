//! Decides whose question is put to our homeserver next, so that none of them keeps the others waiting.
//!
//! About its own users and about servers a homeserver answers by itself. About the users of another one it answers when it
//! knows the whole room, for which it depends on other homeservers, and a hostile one can keep it waiting for as long as it
//! likes. So those questions have places of their own, and the users of one homeserver have a part of these.

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::admission::fair_queue::{Asker, Places};
use crate::admission::limiter::{FairLimiter, Permit};
use crate::admission::{Class, NameHasher};
use crate::server_name::ServerName;

/// Questions under way about the homeserver's own users, and about servers.
const MAX_OWN: usize = 64;
/// Questions under way about users of other homeservers.
const MAX_FOREIGN: u32 = 48;
/// Part of the places for users of other homeservers that the users of one of them may have: half of what is left.
const GROUP_PART: u32 = 2;

pub(super) struct QuestionLimiter {
    own: Semaphore,
    foreign: FairLimiter,
    hasher: NameHasher,
}

/// A place, given back when it is dropped.
pub(super) struct Place<'a> {
    /// The semaphore is never closed.
    _own: Option<SemaphorePermit<'a>>,
    _foreign: Option<Permit<'a>>,
}

impl QuestionLimiter {
    pub(super) fn new() -> Self {
        Self {
            own: Semaphore::new(MAX_OWN),
            foreign: FairLimiter::new(Places {
                total: MAX_FOREIGN,
                shares: [0, 0, MAX_FOREIGN],
                per_name: [MAX_FOREIGN; 3],
                group_part: GROUP_PART,
            }),
            hasher: NameHasher::default(),
        }
    }

    /// Waits for a place for a question about the homeserver's own, or about a user of `foreign`.
    pub(super) async fn take(&self, foreign: Option<&str>) -> Place<'_> {
        let Some(server) = foreign else {
            let _own = self.own.acquire().await.ok();
            return Place { _own, _foreign: None };
        };
        // What is no server's name is asked about all the same: the homeserver says so.
        let (name, domain) = ServerName::parse(server).map_or_else(
            |_| (self.hasher.hash(server), 0),
            |server| {
                let who = self.hasher.who(&server, Class::Stranger);
                (who.name, who.domain)
            },
        );
        let asker = Asker {
            class: Class::Stranger,
            group: domain,
            domain,
            name,
            client: 0,
        };
        Place {
            _own: None,
            _foreign: Some(self.foreign.acquire(asker).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn has_to_wait(limiter: &QuestionLimiter, foreign: Option<&str>) -> bool {
        timeout(Duration::from_millis(1), limiter.take(foreign)).await.is_err()
    }

    #[tokio::test]
    async fn others_leave_room_for_our_own_and_for_each_other() {
        let limiter = QuestionLimiter::new();
        let mut taken = Vec::new();
        while let Ok(place) = timeout(
            Duration::from_millis(1),
            limiter.take(Some(&format!("n{}.evil.example", taken.len()))),
        )
        .await
        {
            taken.push(place);
        }
        // 200 users at half a second each are through within 15 seconds.
        assert!(taken.len() >= 14, "{}", taken.len());
        assert!(!has_to_wait(&limiter, Some("good.test")).await);
        let mut own = Vec::new();
        for _ in 0..MAX_OWN {
            own.push(limiter.take(None).await);
        }
        assert!(has_to_wait(&limiter, None).await);
        drop((taken, own));
        assert!(!has_to_wait(&limiter, Some("evil.example")).await && !has_to_wait(&limiter, None).await);
    }
}
