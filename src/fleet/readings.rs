//! When a watcher reads all records again (decision L11): some times after its watch began, and whenever their number is not its own.

use crate::backoff::READ_AFTER_SECONDS;
use crate::time::Time;

/// Between two readings that a wrong number of records asks for.
const RECOUNT_INTERVAL_MS: u64 = 15_000;

#[derive(Debug)]
pub(super) struct Readings {
    began: Time,
    done: usize,
    recounted: Time,
    /// By how much the number of records differed from that of leaves when that was looked into.
    difference: i64,
}

impl Readings {
    pub(super) const fn new(now: Time) -> Self {
        Self {
            began: now,
            // That one begins with the watch.
            done: 1,
            recounted: now,
            difference: 0,
        }
    }

    /// Whether the records are to be read, where there are so many of them and so many leaves.
    pub(super) fn is_due(&mut self, records: u64, leaves: usize, is_writing: bool, now: Time) -> bool {
        let is_due = READ_AFTER_SECONDS
            .get(self.done)
            .is_some_and(|&seconds| now.since(self.began) >= 1000 * seconds);
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let difference = number(records) - number(leaves as u64);
        // What cannot be read stays there, and is looked into once.
        let is_wrong = difference != self.difference && !is_writing && now.since(self.recounted) >= RECOUNT_INTERVAL_MS;
        if is_due || is_wrong {
            self.done += usize::from(is_due);
            (self.recounted, self.difference) = (now, difference);
        }
        is_due || is_wrong
    }
}
