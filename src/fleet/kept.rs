//! A delegation that was handed over is kept until the watcher has dealt with it, and handed over again after every trouble.

use std::collections::VecDeque;

use super::Position;

/// Delegations that are kept at most.
const MAX_KEPT: usize = 20_000;

/// Delegations that were handed over.
#[derive(Debug)]
pub struct Kept<R> {
    /// Delegations of which the watcher does not show yet that it has dealt with their messages.
    told: VecDeque<(Position, R)>,
    /// Delegations that are to be handed over again.
    again: VecDeque<R>,
}

impl<R> Default for Kept<R> {
    fn default() -> Self {
        Self {
            told: VecDeque::new(),
            again: VecDeque::new(),
        }
    }
}

impl<R> Kept<R> {
    /// Keeps what was handed over by this message.
    pub fn keep(&mut self, at: Position, record: R) {
        self.told.push_back((at, record));
        if self.told.len() > MAX_KEPT {
            self.told.pop_front();
        }
    }

    /// Drops what the watcher has dealt with.
    pub fn on_dealt(&mut self, dealt: Position) {
        self.told.retain(|(at, _)| *at > dealt);
        // A node that gave away many leaves has no use for all that room.
        if self.told.capacity() > 4 * self.told.len() + 1_024 {
            self.told.shrink_to(2 * self.told.len());
        }
    }

    /// Marks everything that is kept as to be handed over again.
    pub fn hand_over_again(&mut self) {
        self.again.extend(self.told.drain(..).map(|(_, record)| record));
    }

    /// Takes what is to be handed over again.
    pub fn take(&mut self) -> VecDeque<R> {
        std::mem::take(&mut self.again)
    }

    /// Gives back what could not be handed over.
    pub fn give_back(&mut self, records: impl IntoIterator<Item = R>) {
        self.again.extend(records);
    }

    /// Whether nothing waits to be handed over.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        self.again.is_empty()
    }

    /// All that is kept.
    pub fn all(&self) -> impl Iterator<Item = &R> {
        self.told.iter().map(|(_, record)| record).chain(&self.again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dealt_with_takes_no_memory() {
        let mut kept = Kept::default();
        let at = |millis| Position { millis, number: 0 };
        (1..=30_000).for_each(|millis| kept.keep(at(millis), millis));
        assert_eq!(kept.all().count(), MAX_KEPT);
        kept.on_dealt(at(29_990));
        assert_eq!(kept.all().copied().collect::<Vec<_>>(), (29_991..=30_000).collect::<Vec<_>>());
        kept.on_dealt(at(30_000));
        assert!(kept.told.capacity() <= 1_024, "{}", kept.told.capacity());
    }
}
