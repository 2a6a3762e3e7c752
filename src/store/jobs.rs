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
//!   [`Seen::spread`], and put it again where [`Seen::lacks`] says so.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use super::queue::{Changes, Entries, Written};
use super::record::{JobRecord, MAX_REPLACED, field};
use super::{Part, Store};
use crate::clock::unix_millis;
use crate::log_throttle::LogThrottle;

/// Age beyond which a record that is over is dropped unread (decision L11).
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// In which time all jobs are put again, where that is necessary (decision L10).
const SPREAD_OVER: Duration = Duration::from_secs(10);
/// Waits that are shorter are left out.
const MIN_WAIT: Duration = Duration::from_millis(50);
/// A record is not older than a job for so little: two readings of the wall clock differ.
const CLOCK_TOLERANCE_MS: i64 = 1000;
/// Memory for what others have in their records beside the jobs. What there is no room for is lost with the next change.
const MAX_FOREIGN_BYTES: usize = 32 * 1024 * 1024;
/// Records of one reading that are remembered. What is beyond counts as missing.
const MAX_SEEN: usize = 1_000_000;

static TOO_MANY: LogThrottle = LogThrottle::once_a_minute();

/// The handle. All clones write to one store.
#[derive(Clone)]
pub struct Jobs {
    changes: Changes,
    foreign: Arc<Mutex<Foreign>>,
    is_shared: bool,
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
    spread: u32,
}

/// The records that do not stand in the store as [`JobRecord`] writes them, by the field as [`field`] spells it.
#[derive(Default)]
struct Foreign {
    known: HashMap<Box<str>, Known>,
    bytes: usize,
}

/// Place and value that are needed to write such a record, or to remove it.
#[derive(Default)]
struct Known {
    /// The fields under which the job stands. The last one counts; older records are under the others.
    fields: Vec<Box<str>>,
    /// The value, where it holds what is no part of a job; else nothing.
    value: Box<str>,
}

impl Jobs {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, StoredJobs) {
        let is_shared = store.is_shared();
        let (changes, entries) = Changes::start(store);
        let jobs = Self {
            changes,
            foreign: Arc::default(),
            is_shared,
        };
        let seen = Seen::default();
        (jobs.clone(), StoredJobs { entries, jobs, seen })
    }

    /// Stores a job as it is now.
    pub fn put(&self, job: &JobRecord<'_>) {
        let _ = self.put_and_tell(job);
    }

    /// Stores a job as it is now, and tells when that is done.
    #[must_use]
    pub fn put_and_tell(&self, job: &JobRecord<'_>) -> Written {
        if !self.changes.are_kept() {
            return Written::DONE;
        }
        if job.replaces.len() > MAX_REPLACED {
            TOO_MANY.log(|count| {
                tracing::warn!(name: "replaced_too_often",
                    count,
                    most = MAX_REPLACED,
                    "a delegated leave was replaced so often that the store does not name all events that are still to be cancelled"
                );
            });
        }
        let (field, value) = self.written(job);
        self.changes.make(field, Some(value))
    }

    /// Removes a job's record. It need not be there.
    pub fn remove(&self, room: &str, identity: &str) {
        if self.changes.are_kept() {
            let field = field(room, identity);
            let known = self.foreign.lock().take(&field);
            self.remove_all(known.map_or_else(|| vec![field.into()], |known| known.fields));
        }
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.changes.waiting()
    }

    /// Whether the table is being read.
    #[must_use]
    pub fn is_reading(&self) -> bool {
        self.changes.is_reading()
    }

    /// Reads a shared table now.
    pub fn read_now(&self) {
        self.changes.read_now();
    }

    /// Fields of the changes that are not known to be in the store.
    #[must_use]
    pub fn unwritten(&self) -> Vec<Arc<str>> {
        self.changes.unwritten()
    }

    /// Number of the last change that was made, and of the last of those that are all known to be in the store.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        self.changes.progress()
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        self.changes.stop(deadline).await
    }

    /// The job's field, as it was read, and its value.
    fn written(&self, job: &JobRecord<'_>) -> (String, String) {
        let field = job.field();
        let mut foreign = self.foreign.lock();
        let Some(mut known) = foreign.take(&field) else {
            drop(foreign);
            return (field, job.value());
        };
        let value = job.value_over(&known.value);
        let place = known.fields.pop().unwrap_or_else(|| field.clone().into());
        let is_plain = value == job.value();
        let now = Known {
            fields: vec![place.clone()],
            value: if is_plain { Box::default() } else { value.as_str().into() },
        };
        foreign.put(field, now);
        drop(foreign);
        self.remove_all(known.fields);
        (place.into(), value)
    }

    fn remove_all(&self, fields: Vec<Box<str>>) {
        for field in fields {
            self.changes.make(field.into(), None);
        }
    }
}

impl StoredJobs {
    /// Returns the next news; `None` when nothing will come any more. Waits for a store that is away. What cannot be read stays
    /// where it is, and what is over for a day is removed, unless several replicas share the store.
    pub async fn next(&mut self) -> Option<Stored> {
        loop {
            let entry = match self.entries.found().await? {
                Part::Record(entry) => entry,
                Part::Anew => {
                    self.seen = Seen::default();
                    continue;
                }
                Part::End { again, .. } => {
                    let seen = std::mem::take(&mut self.seen);
                    return Some(Stored::End(again.then_some(seen)));
                }
            };
            match JobRecord::read_with(&entry.field, &entry.value) {
                Ok((job, value)) => {
                    // What was read as a job is UTF-8.
                    if let Some(stored) = self.take(job, &String::from_utf8_lossy(&entry.field), value) {
                        return Some(stored);
                    }
                }
                Err(error) => self.entries.leave(error),
            }
        }
    }

    /// Notes that the job stands under `place`, with a value that is named where it holds more than the job.
    fn take(&mut self, job: JobRecord<'static>, place: &str, value: &str) -> Option<Stored> {
        let field = job.field();
        // Where several replicas share them, times are of Redis's clock, and nobody goes by ours: one more restart tells.
        let is_over = !self.jobs.is_shared && job.expires_at_ms().saturating_add(DAY_MS) < unix_millis();
        if is_over || (place != field && self.entries.is_touched(field.as_bytes())) {
            self.jobs.changes.make(place.to_owned(), None);
            return None;
        }
        let hash = self.seen.hasher.hash_one(&field);
        let first = self.seen.restarted.get(&hash).copied();
        let mut foreign = self.jobs.foreign.lock();
        let mut known = foreign.take(&field).unwrap_or_default();
        if first.is_some() && known.fields.is_empty() {
            // Where it was not remembered it stands as it should.
            known.fields.push(field.as_str().into());
        }
        // A reading may bring a record twice.
        let is_same = first.is_some() && known.fields.last().is_some_and(|last| **last == *place);
        let counts = !is_same && first.is_none_or(|first| first < job.restarted_at_ms);
        if !is_same {
            known.fields.retain(|older| **older != *place);
            let at = if counts { known.fields.len() } else { 0 };
            known.fields.insert(at, place.into());
        }
        if counts {
            if self.seen.restarted.len() < MAX_SEEN {
                self.seen.restarted.insert(hash, job.restarted_at_ms);
            }
            known.value = value.into();
        }
        foreign.put(field, known);
        drop(foreign);
        let stored = if first.is_none() { Stored::Record } else { Stored::Newer };
        counts.then(|| stored(Box::new(job)))
    }
}

impl Seen {
    /// Whether the store has no record of the job, or an older one.
    #[must_use]
    pub fn lacks(&self, job: &JobRecord<'_>) -> bool {
        let stored = self.restarted.get(&self.hasher.hash_one(job.field()));
        stored.is_none_or(|stored| stored.saturating_add(CLOCK_TOLERANCE_MS) < job.restarted_at_ms)
    }

    /// Waits before the next one of so many jobs, which together take ten seconds.
    pub async fn spread(&mut self, of: usize) {
        let share = SPREAD_OVER.mul_f64(f64::from(self.spread) / f64::from(u32::try_from(of.max(1)).unwrap_or(u32::MAX)));
        self.spread = self.spread.saturating_add(1);
        let due = *self.began.get_or_insert_with(Instant::now) + share.min(SPREAD_OVER);
        if due.saturating_duration_since(Instant::now()) > MIN_WAIT {
            sleep_until(due).await;
        }
    }
}

impl Foreign {
    /// Remembers how the record of this field stands, where that is worth it and there is room.
    fn put(&mut self, field: String, known: Known) {
        let bytes = known.bytes(&field);
        let is_foreign = !known.value.is_empty() || known.fields.iter().any(|place| **place != *field);
        if is_foreign && self.bytes + bytes <= MAX_FOREIGN_BYTES {
            self.bytes += bytes;
            self.known.insert(field.into(), known);
        }
    }

    fn take(&mut self, field: &str) -> Option<Known> {
        let known = self.known.remove(field)?;
        self.bytes -= known.bytes(field);
        Some(known)
    }
}

impl Known {
    /// About how much memory it takes.
    fn bytes(&self, field: &str) -> usize {
        let fields = self.fields.iter().map(|field| 16 + field.len()).sum::<usize>();
        size_of::<Self>() + field.len() + fields + self.value.len()
    }
}

#[cfg(test)]
mod tests;
