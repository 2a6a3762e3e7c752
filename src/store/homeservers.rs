//! The table of homeservers that have verified a token (decision H7a): kept so that after a restart they are not strangers.
//!
//! The field is the homeserver's host, the value the moment in seconds since 1970. Nothing depends on this table: a store that
//! does not take it is left alone.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::queue::{Changes, Entries};
use super::{Store, Table};

/// The longest field and the longest value: as long as names in DNS may be.
pub(super) const MAX_BYTES: usize = 255;
/// Most homeservers that are kept.
const MAX_HOMESERVERS: usize = 4096;
/// Records that are read: a table that somebody else has filled is not worth more memory.
const MAX_RECORDS: usize = 4 * MAX_HOMESERVERS;
/// Seconds for which a verification counts.
const LIFE_SECONDS: u64 = 24 * 60 * 60;
/// Seconds between two looks for those that are out of date.
const TIDY_INTERVAL_SECONDS: u64 = 60 * 60;

/// The way to the store. All clones write to one table.
#[derive(Clone)]
pub struct VerifiedHomeservers {
    changes: Changes,
    kept: Arc<Mutex<Kept>>,
}

/// The homeservers that were in the store at the start. Dropping it ends the reading.
pub struct RestoredHomeservers {
    entries: Entries,
    table: VerifiedHomeservers,
    now: u64,
    records: usize,
}

/// Records that the store has, or will have.
#[derive(Default)]
struct Kept {
    homeservers: HashMap<Box<str>, u64>,
    tidied: u64,
}

impl VerifiedHomeservers {
    /// Starts to read and to write the homeservers beside the jobs of `store`; `now` is the time in seconds since 1970.
    #[must_use]
    pub fn start(store: &Store, now: u64) -> (Self, RestoredHomeservers) {
        let (changes, entries) = Changes::start(store.with(Table::Homeservers));
        let kept = Kept {
            tidied: now,
            ..Kept::default()
        };
        let kept = Arc::new(Mutex::new(kept));
        let restored = RestoredHomeservers {
            entries,
            table: Self {
                changes: changes.clone(),
                kept: kept.clone(),
            },
            now,
            records: 0,
        };
        (Self { changes, kept }, restored)
    }

    /// Stores that the homeserver on `host` has verified a token at `at`, in seconds since 1970, the present. Where the table
    /// is full nobody has to go for it: [`Self::forget`] makes room.
    pub fn remember(&self, host: &str, at: u64) {
        if !self.changes.are_kept() || !is_host(host) {
            return;
        }
        let mut kept = self.kept.lock();
        for expired in kept.tidy(at) {
            self.changes.make(expired.into(), None);
        }
        if kept.put(host, at) {
            self.changes.make(host.to_owned(), Some(at.to_string()));
        }
    }

    /// Removes the homeserver on `host`. It need not be there.
    pub fn forget(&self, host: &str) {
        if self.kept.lock().homeservers.remove(host).is_some() {
            self.changes.make(host.to_owned(), None);
        }
    }

    /// Writes what is waiting, until `deadline`.
    pub async fn stop(&self, deadline: Instant) {
        self.changes.stop(deadline).await;
    }
}

impl RestoredHomeservers {
    /// The next host and when it has verified a token, in seconds since 1970; none when all were read, which waits for a store
    /// that is away. A host may come twice. What is out of date or more than is kept is removed from the store.
    pub async fn next(&mut self) -> Option<(String, u64)> {
        let read = |host: &[u8], at: &[u8]| std::str::from_utf8(host).map(|host| (host.to_owned(), at.to_owned()));
        while self.records < MAX_RECORDS
            && let Some((host, at)) = self.entries.next(read).await
        {
            self.records += 1;
            match parse(&host, &at, self.now).filter(|at| self.table.kept.lock().put(&host, *at)) {
                Some(at) => return Some((host, at)),
                None if is_host(&host) => drop(self.table.changes.make(host, None)),
                None => {}
            }
        }
        None
    }
}

impl Kept {
    /// Keeps the record, if there is room for it, and tells whether there was.
    fn put(&mut self, host: &str, at: u64) -> bool {
        if let Some(known) = self.homeservers.get_mut(host) {
            *known = at.max(*known);
            return true;
        }
        let has_room = self.homeservers.len() < MAX_HOMESERVERS;
        if has_room {
            self.homeservers.insert(host.into(), at);
        }
        has_room
    }

    /// Takes out those that are out of date.
    fn tidy(&mut self, now: u64) -> Vec<Box<str>> {
        if now.saturating_sub(self.tidied) < TIDY_INTERVAL_SECONDS {
            return Vec::new();
        }
        self.tidied = now;
        let expired = self.homeservers.extract_if(|_, at| is_expired(*at, now));
        expired.map(|(host, _)| host).collect()
    }
}

fn is_host(host: &str) -> bool {
    (1..=MAX_BYTES).contains(&host.len())
}

const fn is_expired(at: u64, now: u64) -> bool {
    now.saturating_sub(at) > LIFE_SECONDS
}

/// The moment in a record that counts. A wall clock that was set back must not make anybody known for longer.
fn parse(host: &str, value: &[u8], now: u64) -> Option<u64> {
    let at: u64 = std::str::from_utf8(value).ok()?.parse().ok()?;
    (is_host(host) && !is_expired(at, now)).then_some(at.min(now))
}

#[cfg(test)]
mod tests;
