//! The table of delegated leaves: the one handle for all that is said about stored jobs.
//!
//! Those who own the jobs call [`Jobs::put`], [`Jobs::put_and_tell`] and [`Jobs::remove`], and have one task that reads
//! [`StoredJobs::next`] as long as the service runs:
//!
//! * [`Stored::Record`]: a record that was not written or removed here since its reading began. Take it unless a job of its room
//!   and identity is known. The hash is read at the start and, where it is shared, 15 s, 60 s, 3 and 10 minutes after the start
//!   and after each reconnection (decision L11): what another instance took meanwhile comes then.
//! * [`Stored::Newer`]: a second record of the job that was handed over just before, under another spelling of its field, whose
//!   event began to run later: it counts, and the other field goes with the next change.
//! * [`Stored::End`]: that were all. With a [`Seen`] where the store was away before: for each job that is known, wait for its
//!   [`Seen::turn`], and put it again where [`Seen::lacks`] says so.

use std::collections::HashMap;
use std::collections::hash_map::{Entry as Slot, RandomState};
use std::hash::BuildHasher as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::queue::{Changes, Entries, Written};
use super::record::{JobRecord, MAX_REPLACED, Origin, field};
use super::{Part, Store};
use crate::clock::unix_millis;
use crate::log_throttle::LogThrottle;

/// Age beyond which a record that is over is dropped unread (decision L11).
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// In which time all jobs are put again, where that is necessary (decision L10).
const SPREAD: Duration = Duration::from_secs(10);
/// Turns that are closer together are not waited for.
const TURN: Duration = Duration::from_millis(50);
/// A record is not older than a job for so little: two readings of the wall clock differ.
const OLDER_MS: i64 = 1000;
/// Memory for what others have in their records beside the jobs. What there is no room for is lost with the next change.
const MAX_ORIGIN_BYTES: usize = 32 * 1024 * 1024;

static TOO_MANY: LogThrottle = LogThrottle::once_a_minute();

/// The handle. All clones write to one store.
#[derive(Clone)]
pub struct Jobs {
    changes: Changes,
    origins: Arc<Mutex<Origins>>,
}

/// Records as they are read. Dropping it ends the reading.
pub struct StoredJobs {
    entries: Entries,
    jobs: Jobs,
    seen: Seen,
}

/// News from a reading.
#[derive(Debug)]
pub enum Stored {
    /// Record of a job.
    Record(Box<JobRecord<'static>>),
    /// A later record of the same job, under another field.
    Newer(Box<JobRecord<'static>>),
    /// The end of a reading, with what the store has, where it may lack something.
    End(Option<Seen>),
}

/// Jobs that one reading has shown: when the event of each began to run, by the hash of its field.
#[derive(Debug, Default)]
pub struct Seen {
    restarted: HashMap<u64, i64>,
    hasher: RandomState,
    began: Option<Instant>,
    turns: u32,
}

/// By the field as [`field`] spells it: what is needed to write or remove records that others wrote.
#[derive(Default)]
struct Origins {
    known: HashMap<Box<str>, Known>,
    bytes: usize,
}

#[derive(Default)]
struct Known {
    origin: Origin,
    /// Other spellings of the field under which there are older records.
    others: Vec<Box<str>>,
}

impl Jobs {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, StoredJobs) {
        let (changes, entries) = Changes::start(store);
        let jobs = Self {
            changes,
            origins: Arc::default(),
        };
        let seen = Seen::default();
        (jobs.clone(), StoredJobs { entries, jobs, seen })
    }

    /// Stores a job as it is now.
    pub fn put(&self, job: &JobRecord<'_>) {
        if self.changes.are_kept() {
            let (field, value) = self.written(job);
            self.changes.make(field, Some(value));
        }
    }

    /// Stores a job as it is now, and tells when that is done.
    pub fn put_and_tell(&self, job: &JobRecord<'_>) -> Written {
        if !self.changes.are_kept() {
            return Written::DONE;
        }
        let (field, value) = self.written(job);
        self.changes.make_and_tell(field, Some(value))
    }

    /// Removes a job's record. It need not be there.
    pub fn remove(&self, room: &str, identity: &str) {
        if !self.changes.are_kept() {
            return;
        }
        let field = field(room, identity);
        let Known { origin, others } = self.origins().forget(&field).unwrap_or_default();
        self.changes.make(origin.field.map_or(field, Into::into), None);
        others.into_iter().for_each(|other| self.changes.make(other.into(), None));
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.changes.waiting()
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        self.changes.stop(deadline).await
    }

    /// The job's field, as it was read, and its value.
    fn written(&self, job: &JobRecord<'_>) -> (String, String) {
        if job.replaces.len() > MAX_REPLACED {
            TOO_MANY.log(|count| {
                tracing::warn!(
                    count,
                    most = MAX_REPLACED,
                    "a delegated leave was replaced so often that the store does not name all events that are still to be cancelled"
                );
            });
        }
        let field = job.field();
        let mut origins = self.origins();
        // Few jobs have one.
        let Some(Known { mut origin, others }) = origins.forget(&field) else {
            drop(origins);
            return (field, job.value());
        };
        let value = job.value_with(&origin);
        let place = origin.field.clone();
        if origin.keep_for(job) {
            origins.remember(
                field.as_str().into(),
                Known {
                    origin,
                    others: Vec::new(),
                },
            );
        }
        drop(origins);
        others.into_iter().for_each(|other| self.changes.make(other.into(), None));
        (place.map_or(field, Into::into), value)
    }

    fn origins(&self) -> MutexGuard<'_, Origins> {
        self.origins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoredJobs {
    /// Returns the next news; `None` when nothing will come any more. Waits for a store that is away. What cannot be read stays
    /// where it is, and what is over for a day is removed.
    pub async fn next(&mut self) -> Option<Stored> {
        loop {
            let entry = match self.entries.found().await? {
                Part::Record(entry) => entry,
                Part::End { again, .. } => {
                    let seen = std::mem::take(&mut self.seen);
                    return Some(Stored::End(again.then_some(seen)));
                }
            };
            match JobRecord::read_with(&entry.field, &entry.value) {
                Ok((job, origin)) => {
                    if let Some(stored) = self.take(job, origin) {
                        return Some(stored);
                    }
                }
                Err(error) => self.entries.leave(error),
            }
        }
    }

    fn take(&mut self, job: JobRecord<'static>, origin: Origin) -> Option<Stored> {
        let field = job.field();
        let place = origin.field.as_deref().unwrap_or(&field).to_owned();
        let is_over = job.expires_at_ms().saturating_add(DAY_MS) < unix_millis();
        if is_over || (origin.field.is_some() && self.entries.is_touched(field.as_bytes())) {
            self.jobs.changes.make(place, None);
            return None;
        }
        let mut origins = self.jobs.origins();
        match self.seen.restarted.entry(self.seen.hasher.hash_one(&field)) {
            Slot::Vacant(slot) => {
                slot.insert(job.restarted_at_ms);
                let others = origins.forget(&field).map(|known| known.others).unwrap_or_default();
                if !origin.is_plain() || !others.is_empty() {
                    origins.remember(field.into(), Known { origin, others });
                }
                Some(Stored::Record(Box::new(job)))
            }
            Slot::Occupied(mut first) => {
                let mut known = origins.forget(&field).unwrap_or_default();
                let first_place = known.origin.field.as_deref().unwrap_or(&field).to_owned();
                let is_newer = place != first_place && job.restarted_at_ms > *first.get();
                // The same field may come twice.
                if is_newer {
                    first.insert(job.restarted_at_ms);
                    known.origin = origin;
                    known.others.push(first_place.into());
                } else if place != first_place {
                    known.others.push(place.into());
                }
                origins.remember(field.into(), known);
                is_newer.then(|| Stored::Newer(Box::new(job)))
            }
        }
    }
}

impl Seen {
    /// Whether the store has no record of the job, or an older one.
    #[must_use]
    pub fn lacks(&self, job: &JobRecord<'_>) -> bool {
        let stored = self.restarted.get(&self.hasher.hash_one(job.field()));
        stored.is_none_or(|stored| stored.saturating_add(OLDER_MS) < job.restarted_at_ms)
    }

    /// Waits for the turn of the next one of so many jobs, which together take ten seconds.
    pub async fn turn(&mut self, of: usize) {
        let share = SPREAD.mul_f64(f64::from(self.turns) / f64::from(u32::try_from(of.max(1)).unwrap_or(u32::MAX)));
        self.turns = self.turns.saturating_add(1);
        let due = *self.began.get_or_insert_with(Instant::now) + share.min(SPREAD);
        if due.saturating_duration_since(Instant::now()) > TURN {
            sleep_until(due).await;
        }
    }
}

impl Origins {
    fn remember(&mut self, field: Box<str>, known: Known) {
        let bytes = known.bytes(&field);
        if self.bytes + bytes <= MAX_ORIGIN_BYTES {
            self.bytes += bytes;
            self.known.insert(field, known);
        }
    }

    fn forget(&mut self, field: &str) -> Option<Known> {
        // So that a table without them costs next to nothing.
        let known = if self.known.is_empty() { None } else { self.known.remove(field) }?;
        self.bytes -= known.bytes(field);
        Some(known)
    }
}

impl Known {
    fn bytes(&self, field: &str) -> usize {
        field.len() + self.origin.bytes() + self.others.iter().map(|other| 16 + other.len()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests;
