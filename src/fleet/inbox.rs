//! Messages as far as they are dealt with: taken in by the core and, where that changed a record, written.

use std::collections::VecDeque;

use super::Position;
use crate::time::Time;

/// An heir hears this long of messages again: what follows from a departure or from the end of a room takes that long to find out, and
/// stands nowhere else meanwhile.
const HEARD_AGAIN_MS: u64 = 6_000;

/// The messages that a watcher has taken in since it last began with the first one.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Counts the beginnings. What was read before the last one says nothing about the messages that are there now.
    reading: u64,
    /// The last message of each batch that was taken in, the last change of a record that was made by then, and when the first such
    /// batch came.
    taken_in: VecDeque<(Position, u64, Time)>,
    dealt: Position,
    /// The messages up to which all was dealt with at the last beats, and since when.
    lately: VecDeque<(Position, Time)>,
    before: Position,
}

impl Inbox {
    pub(super) const fn reading(&self) -> u64 {
        self.reading
    }

    /// All messages are read again: those that are there by now may have lower ids than those that were read.
    pub(super) fn begin(&mut self) -> u64 {
        *self = Self {
            reading: self.reading + 1,
            ..Self::default()
        };
        self.reading
    }

    pub(super) fn take_in(&mut self, reading: u64, last: Position, change: u64, now: Time) {
        if reading != self.reading {
            return;
        }
        match self.taken_in.back_mut() {
            Some((at, same, _)) if *same == change => *at = last,
            Some(_) | None => self.taken_in.push_back((last, change, now)),
        }
    }

    /// The message up to which all is dealt with, where all changes up to `written` are.
    pub(super) fn dealt(&mut self, written: u64) -> Position {
        while let Some(&(at, change, _)) = self.taken_in.front()
            && change <= written
        {
            self.dealt = at;
            self.taken_in.pop_front();
        }
        self.dealt
    }

    /// The message before which all may go, since it was dealt with for long enough. Asked at each beat.
    pub(super) fn before(&mut self, now: Time) -> Position {
        if self.lately.back().is_none_or(|(at, _)| *at != self.dealt) {
            self.lately.push_back((self.dealt, now));
        }
        while let Some(&(at, since)) = self.lately.front()
            && now.since(since) >= HEARD_AGAIN_MS
        {
            self.before = at;
            self.lately.pop_front();
        }
        self.before
    }

    /// Since when the first message waits that is not dealt with.
    pub(super) fn waits_since(&self) -> Option<Time> {
        self.taken_in.front().map(|(_, _, since)| *since)
    }
}
