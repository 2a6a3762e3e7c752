//! What is remembered of each homeserver. Bounded: the names come from strangers.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, SemaphorePermit};
use tokio::time::Instant;
use url::Url;

use super::dial::{Attempt, Dialer};
use super::discovery::discover;
use super::failure::Failure;
use super::guard::Trust;
use super::route::Link;
use super::well_known::failure_life;
use crate::admission::Class;
use crate::admission::budget::Budget;
use crate::server_name::ServerName;

/// Homeservers that are listed or have verified a token here.
const KNOWN: NonZeroUsize = NonZeroUsize::new(2048).unwrap();
/// The others. A flood of made-up names turns over this table and not the one above.
const STRANGERS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Requests in flight to one homeserver, and requests that wait for their turn (decision O4).
const IN_FLIGHT: usize = 32;
const STRANGER_IN_FLIGHT: usize = 4;
const WAITING: usize = 2048;

/// A remembered failure is not asked again more often than this, however many requests want it.
const FAILURE_MIN_AGE: Duration = Duration::from_secs(1);

/// One homeserver.
pub(super) struct Homeserver {
    name: ServerName,
    trust: Trust,
    known: bool,
    turns: Semaphore,
    waiting: AtomicUsize,
    link: AsyncMutex<Remembered>,
    refused: AtomicBool,
}

#[derive(Default)]
struct Remembered {
    link: Option<Arc<Link>>,
    asked: Option<Instant>,
    until: Option<Instant>,
    failures: u32,
    /// Discovery itself failed, and is not repeated until then.
    refused: Option<(Instant, Failure)>,
}

impl Homeserver {
    pub(super) fn new(name: ServerName, trust: Trust, known: bool) -> Self {
        Self {
            name,
            trust,
            known,
            turns: Semaphore::new(if known { IN_FLIGHT } else { STRANGER_IN_FLIGHT }),
            waiting: AtomicUsize::new(0),
            link: AsyncMutex::default(),
            refused: AtomicBool::new(false),
        }
    }

    /// Waits for its turn; `None` when the homeserver has become known in the meantime and another entry took over.
    pub(super) async fn turn(&self) -> Result<Option<SemaphorePermit<'_>>, Failure> {
        if let Ok(turn) = self.turns.try_acquire() {
            return Ok(Some(turn));
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(Failure::Busy);
        }
        let _leave = Leave(&self.waiting);
        Ok(self.turns.acquire().await.ok())
    }

    /// The way to it: the remembered one while it is good, else discovery. Requests that come meanwhile wait for it.
    pub(super) async fn link(
        &self,
        dialer: &Arc<Dialer>,
        overrides: &BTreeMap<ServerName, Url>,
        again: bool,
        budget: &Budget,
    ) -> Result<Arc<Link>, Failure> {
        let mut remembered = self.link.lock().await;
        let now = Instant::now();
        let stale_failure = again && remembered.failures > 0 && remembered.asked.is_none_or(|asked| now > asked + FAILURE_MIN_AGE);
        let fresh = remembered.until.is_none_or(|until| now < until) && !stale_failure;
        if let Some(link) = remembered.link.as_ref().filter(|_| fresh) {
            return Ok(link.clone());
        }
        if let Some(failure) = remembered
            .refused
            .as_ref()
            .filter(|(until, _)| now < *until)
            .map(|(_, failure)| failure)
        {
            return Err(failure.clone());
        }
        let class = match (self.trust, self.known) {
            (Trust::Listed, _) => Class::Listed,
            (Trust::Stranger, true) => Class::Verified,
            (Trust::Stranger, false) => Class::Stranger,
        };
        let attempt = Attempt {
            who: dialer.names.who(&self.name, class),
            budget,
            queued: &Notify::new(),
        };
        let found = match Box::pin(discover(dialer, overrides, &self.name, self.trust, &attempt)).await {
            // It is about this request, and not about the homeserver: what is remembered may do.
            Err(Failure::Spent) => return remembered.link.clone().ok_or(Failure::Spent),
            Ok(found) => found,
            Err(failure) => {
                remembered.refused = Some((Instant::now() + FAILURE_MIN_AGE, failure.clone()));
                return Err(failure);
            }
        };
        remembered.refused = None;
        if found.fallback {
            let life = failure_life(remembered.failures, self.known);
            remembered.until = Some(Instant::now() + life);
            remembered.failures = remembered.failures.saturating_add(1);
        } else {
            remembered.until = found.life.map(|life| Instant::now() + life);
            remembered.failures = 0;
        }
        remembered.asked = Some(Instant::now());
        if let Some(link) = remembered.link.as_ref().filter(|link| *link.route == found.route) {
            return Ok(link.clone());
        }
        tracing::debug!(
            server = self.name.as_str(),
            step = found.step,
            host = found.route.host_header.as_str(),
            "homeserver found"
        );
        let link = Arc::new(Link::new(dialer.clone(), Arc::new(found.route), attempt.who));
        remembered.link = Some(link.clone());
        Ok(link)
    }
}

struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All homeservers.
pub(super) struct Table {
    entries: Mutex<Entries>,
}

struct Entries {
    known: LruCache<ServerName, Arc<Homeserver>>,
    strangers: LruCache<ServerName, Arc<Homeserver>>,
}

impl Table {
    pub(super) fn new() -> Self {
        let empty = |bound| {
            let mut cache = LruCache::unbounded();
            cache.resize(bound);
            cache
        };
        Self {
            entries: Mutex::new(Entries {
                known: empty(KNOWN),
                strangers: empty(STRANGERS),
            }),
        }
    }

    pub(super) fn get(&self, name: &ServerName, make: impl FnOnce() -> Homeserver) -> Arc<Homeserver> {
        let mut entries = self.lock();
        if let Some(found) = entries.known.get(name) {
            return found.clone();
        }
        if let Some(found) = entries.strangers.get(name) {
            return found.clone();
        }
        let made = Arc::new(make());
        let table = if made.known { &mut entries.known } else { &mut entries.strangers };
        table.put(name.clone(), made.clone());
        made
    }

    pub(super) fn knows(&self, name: &ServerName) -> bool {
        self.lock().known.contains(name)
    }

    pub(super) fn promote(&self, name: &ServerName) {
        let mut entries = self.lock();
        if entries.known.get(name).is_some() {
            return;
        }
        let old = entries.strangers.pop(name);
        let trust = old.as_ref().map_or(Trust::Stranger, |old| old.trust);
        entries
            .known
            .put(name.clone(), Arc::new(Homeserver::new(name.clone(), trust, true)));
        drop(entries);
        if let Some(old) = old {
            old.turns.close();
        }
    }

    pub(super) fn first_refusal(&self, name: &ServerName) -> bool {
        let mut entries = self.lock();
        let found = entries.known.get(name).cloned().or_else(|| entries.strangers.get(name).cloned());
        drop(entries);
        found.is_some_and(|homeserver| !homeserver.refused.swap(true, Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> ServerName {
        ServerName::parse(&format!("n{n}.example")).unwrap()
    }

    fn get(table: &Table, n: usize) -> Arc<Homeserver> {
        table.get(&name(n), || Homeserver::new(name(n), Trust::Stranger, false))
    }

    #[test]
    fn a_flood_of_names_neither_grows_the_table_nor_displaces_who_is_known() {
        let table = Table::new();
        get(&table, 0);
        table.promote(&name(0));
        for n in 1..10_000 {
            get(&table, n);
        }
        assert!(table.knows(&name(0)));
        assert_eq!(table.lock().strangers.len(), STRANGERS.get());
    }

    #[tokio::test]
    async fn who_waits_for_a_stranger_is_sent_to_the_new_entry() {
        let table = Table::new();
        let stranger = get(&table, 1);
        let held: Vec<_> = (0..STRANGER_IN_FLIGHT).map(|_| stranger.turns.try_acquire().unwrap()).collect();
        let (turn, ()) = tokio::join!(stranger.turn(), async { table.promote(&name(1)) });
        assert!(turn.unwrap().is_none());
        drop(held);
        assert_eq!(get(&table, 1).turns.available_permits(), IN_FLIGHT);
    }

    #[tokio::test]
    async fn only_so_many_wait() {
        let homeserver = Homeserver::new(name(1), Trust::Listed, true);
        homeserver.waiting.store(WAITING, Ordering::Relaxed);
        let _held: Vec<_> = (0..IN_FLIGHT).map(|_| homeserver.turns.try_acquire().unwrap()).collect();
        assert!(matches!(homeserver.turn().await, Err(Failure::Busy)));
        assert_eq!(homeserver.waiting.load(Ordering::Relaxed), WAITING);
    }

    #[test]
    fn the_first_refusal_is_told_once() {
        let table = Table::new();
        assert!(!table.first_refusal(&name(1)), "nothing is known of it");
        get(&table, 1);
        assert!(table.first_refusal(&name(1)));
        assert!(!table.first_refusal(&name(1)));
    }
}
