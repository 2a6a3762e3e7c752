//! Messages as far as they are dealt with: taken in by the core and, where that changed a record, written.

use std::collections::VecDeque;

use super::Position;
use crate::time::Time;

/// The messages that a watcher has taken in since it last began with the first one.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Counts the beginnings. What was read before the last one says nothing about the messages that are there now.
    reading: u64,
    /// The last message of each batch that was taken in, the last change of a record that was made by then, and when the first such
    /// batch came.
    taken_in: VecDeque<(Position, u64, Time)>,
    dealt: Position,
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

    /// Since when the first message waits that is not dealt with.
    pub(super) fn waits_since(&self) -> Option<Time> {
        self.taken_in.front().map(|(_, _, since)| *since)
    }
}
