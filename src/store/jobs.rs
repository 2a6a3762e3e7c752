//! The table of delegated leaves.

use super::Store;
use super::queue::{Changes, Entries, Written};
use crate::store::record::{self, Origin, StoredJob};
use tokio::time::Instant;

/// The handle. All clones write to one store.
#[derive(Clone)]
pub struct Queue(Changes);

/// The records that were there at the start. Dropping it ends the reading.
pub struct Restored {
    entries: Entries,
    unreadable: usize,
}

/// A job as it was stored, and what is needed to store it again without loss.
#[derive(Debug)]
pub struct RestoredJob {
    /// The job.
    pub job: StoredJob<'static>,
    /// To be given back with every change of this record.
    pub origin: Option<Box<Origin>>,
}

impl Queue {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, Restored) {
        let (changes, entries) = Changes::start(store);
        (Self(changes), Restored { entries, unreadable: 0 })
    }

    /// Stores a job as it is now.
    pub fn put(&self, job: &StoredJob<'_>, origin: Option<&Origin>) {
        if self.0.are_kept() {
            let field = record::field_of(&job.room, &job.identity, origin);
            self.0.make(field, Some(job.value(origin)));
        }
    }

    /// Stores a job as it is now, and tells when that is done.
    pub fn put_and_tell(&self, job: &StoredJob<'_>, origin: Option<&Origin>) -> Written {
        if !self.0.are_kept() {
            return Written::DONE;
        }
        let field = record::field_of(&job.room, &job.identity, origin);
        self.0.make_and_tell(field, Some(job.value(origin)))
    }

    /// Removes a job's record. It need not be there.
    pub fn remove(&self, room: &str, identity: &str, origin: Option<&Origin>) {
        if self.0.are_kept() {
            self.0.make(record::field_of(room, identity, origin), None);
        }
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting()
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        self.0.stop(deadline).await
    }
}

impl Restored {
    /// The next record; none when all were read, which waits for a store that is away. A record may come twice; one whose
    /// field was changed since the start does not come any more. What cannot be read stays where it is.
    pub async fn next(&mut self) -> Option<RestoredJob> {
        while let Some(entry) = self.entries.next().await {
            match StoredJob::read(&entry.field, &entry.value) {
                Ok((job, origin)) => return Some(RestoredJob { job, origin }),
                Err(error) => {
                    self.unreadable += 1;
                    tracing::debug!(error = error.to_string(), "a record cannot be read");
                }
            }
        }
        Entries::tell_unreadable(std::mem::take(&mut self.unreadable));
        None
    }
}
