//! Whose question is put to our homeserver next, so that none of them keeps the others waiting.
//!
//! About its own users and about servers a homeserver answers by itself. About the users of another one it answers when it
//! knows the whole room, for which it depends on other homeservers, and a hostile one can keep it waiting for as long as it
//! likes. So those questions have few places, and the users of each homeserver have a part of these.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// Questions under way.
const PLACES: usize = 64;
/// The same about users of other homeservers.
const FOREIGN: usize = 16;
/// The same about users of one of them.
const PER_SERVER: usize = 4;
/// From so many homeservers on, those that nobody asks about are forgotten.
const SERVERS: usize = 256;

pub(super) struct Turns {
    places: Semaphore,
    foreign: Semaphore,
    servers: Mutex<HashMap<Box<str>, Arc<Semaphore>>>,
}

/// A place, given back when it is dropped. None of the semaphores is ever closed.
pub(super) struct Turn<'a> {
    _server: Option<OwnedSemaphorePermit>,
    _place: Option<SemaphorePermit<'a>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            places: Semaphore::new(PLACES),
            foreign: Semaphore::new(FOREIGN),
            servers: Mutex::default(),
        }
    }

    /// Waits for a place for a question about the homeserver's own, or about a user of `foreign`.
    pub(super) async fn take(&self, foreign: Option<&str>) -> Turn<'_> {
        let (server, places) = match foreign {
            // First its own part, so that those who wait for that hold no place.
            Some(server) => (self.server(server).acquire_owned().await.ok(), &self.foreign),
            None => (None, &self.places),
        };
        Turn {
            _server: server,
            _place: places.acquire().await.ok(),
        }
    }

    fn server(&self, name: &str) -> Arc<Semaphore> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if servers.len() >= SERVERS {
            servers.retain(|_, places| Arc::strong_count(places) > 1);
        }
        servers
            .entry(name.into())
            .or_insert_with(|| Arc::new(Semaphore::new(PER_SERVER)))
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn has_to_wait(turns: &Turns, foreign: Option<&str>) -> bool {
        timeout(Duration::from_millis(1), turns.take(foreign)).await.is_err()
    }

    #[tokio::test]
    async fn strangers_leave_room_for_our_own_and_for_each_other() {
        let turns = Turns::new();
        let mut taken = Vec::new();
        for _ in 0..PER_SERVER {
            taken.push(turns.take(Some("evil.example")).await);
        }
        assert!(has_to_wait(&turns, Some("evil.example")).await);
        for n in 0..FOREIGN - PER_SERVER {
            taken.push(turns.take(Some(&format!("n{n}.example"))).await);
        }
        assert!(has_to_wait(&turns, Some("good.example")).await);
        for _ in 0..PLACES {
            taken.push(turns.take(None).await);
        }
        assert!(has_to_wait(&turns, None).await);
        drop(taken);
        assert!(!has_to_wait(&turns, Some("evil.example")).await && !has_to_wait(&turns, None).await);
    }

    #[tokio::test]
    async fn many_names_are_not_remembered() {
        let turns = Turns::new();
        for n in 0..10 * SERVERS {
            drop(turns.take(Some(&format!("n{n}.example"))).await);
        }
        assert!(turns.servers.lock().unwrap().len() <= SERVERS);
    }
}
