//! When a watcher reads all records again (decision L11): some times after its watch began, whenever their number is not its own, and
//! while delegations may be stored without a message.

use super::MAX_MESSAGES;
use crate::backoff::READ_AFTER_SECONDS;
use crate::time::Time;

/// Between two readings that a wrong number of records asks for.
const RECOUNT_INTERVAL_MS: u64 = 15_000;

/// How much Redis has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of records.
    pub records: u64,
    /// Number of messages.
    pub messages: u64,
}

#[derive(Debug)]
pub(super) struct Readings {
    began: Time,
    done: usize,
    recounted: Time,
    /// There were so many messages that delegations may be stored without one.
    had_too_many: bool,
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
            had_too_many: false,
        }
    }

    /// Whether the records are to be read, where Redis has so much and there are so many leaves.
    pub(super) fn is_due(&mut self, counts: Counts, leaves: usize, is_writing: bool, now: Time) -> bool {
        let is_due = READ_AFTER_SECONDS
            .get(self.done)
            .is_some_and(|&seconds| now.since(self.began) >= 1000 * seconds);
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let difference = number(counts.records) - number(leaves as u64);
        let is_time = now.since(self.recounted) >= RECOUNT_INTERVAL_MS;
        // What is stored without a message may replace what is known, so that their numbers tell nothing: again and again while there are
        // too many, and once after that.
        let has_too_many = counts.messages >= MAX_MESSAGES;
        self.had_too_many |= has_too_many;
        let is_untold = is_time && self.had_too_many;
        if is_untold {
            self.had_too_many = has_too_many;
        }
        // What cannot be read stays there, and is looked into once.
        let is_wrong = is_untold || (difference != self.difference && !is_writing && is_time);
        if is_due || is_wrong {
            self.done += usize::from(is_due);
            (self.recounted, self.difference) = (now, difference);
        }
        is_due || is_wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_there_are_too_many_messages_records_are_read_again_and_again_and_once_more() {
        let at = |millis| Time::START.after(millis);
        // The last of the readings that go by the clock is over.
        let late = 1000 * READ_AFTER_SECONDS.last().expect("readings");
        let mut readings = Readings::new(Time::START);
        let mut read = |from: u64, to: u64, messages: u64| {
            let counts = Counts { records: 7, messages };
            (from..to)
                .step_by(1_000)
                .filter(|second| readings.is_due(counts, 7, false, at(*second)))
                .count()
        };
        read(0, late + 1_000, 0);
        assert_eq!(read(late + 1_000, late + 301_000, MAX_MESSAGES - 1), 0);
        assert_eq!(read(late + 301_000, late + 361_000, MAX_MESSAGES), 4);
        assert_eq!(read(late + 361_000, late + 421_000, 0), 1);
        assert_eq!(read(late + 421_000, late + 600_000, 0), 0);
    }
}
