//! Chooses which connections give way where there are too many, and which bodies. Pure.
//!
//! Paid for is what has come. Whoever is silent goes before whoever is slow, and nobody goes whose request is complete.

use std::cmp::Reverse;
use std::time::Duration;

/// A connection that was silent for so long is nobody who is just about to send.
const SILENT_AFTER: Duration = Duration::from_millis(250);
/// A body that has been coming for so long shows how fast it comes.
const SLOW_AFTER: Duration = Duration::from_secs(1);
/// Time after which bodies that wait for memory may be waiting for each other.
const ENTANGLED_AFTER: Duration = Duration::from_secs(3);

/// Phase that a connection is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No byte has come since the connection was opened, or since the last answer.
    Silent,
    /// The head of a request is on its way.
    Head,
    /// The body is coming.
    Body,
    /// The request is complete and will be answered.
    Complete,
}

/// How a connection looks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Phase that the connection is in.
    pub phase: Phase,
    /// Time since the phase began.
    pub age: Duration,
    /// Part of that time in which nothing was read, since there was no memory: that is no fault of the client's.
    pub kept_waiting: Duration,
    /// How many bytes came in that time.
    pub bytes: u64,
}

impl Look {
    /// Time in which the client could send.
    fn read_for(self) -> Duration {
        self.age.saturating_sub(self.kept_waiting)
    }

    /// Bytes that come in a second.
    fn rate(self) -> u64 {
        let millis = u64::try_from(self.read_for().as_millis()).unwrap_or(u64::MAX).max(1);
        self.bytes.saturating_mul(1000) / millis
    }

    /// The lower, the sooner this one gives way; `None` never does.
    fn rank(self) -> Option<(u8, u64, Reverse<Duration>)> {
        let young = self.age < SILENT_AFTER;
        match (self.phase, young) {
            (Phase::Silent, false) => Some((0, 0, Reverse(self.age))),
            (Phase::Head | Phase::Body, false) => Some((1, self.rate(), Reverse(self.age))),
            // In a burst everybody is young: whoever came last has the longest time to go on.
            (Phase::Silent | Phase::Head | Phase::Body, true) => Some((2, 0, Reverse(self.age))),
            (Phase::Complete, _) => None,
        }
    }
}

/// Chooses `wanted` of these connections to give way; fewer where the others' requests are complete.
pub fn give_way<K: Copy>(crowd: impl Iterator<Item = (K, Look)>, wanted: usize) -> Vec<K> {
    let mut ranked: Vec<_> = crowd.filter_map(|(key, look)| Some((look.rank()?, key))).collect();
    if wanted == 0 || ranked.is_empty() {
        return Vec::new();
    }
    let last = wanted.min(ranked.len()) - 1;
    ranked.select_nth_unstable_by_key(last, |(rank, _)| *rank);
    ranked.truncate(last + 1);
    ranked.into_iter().map(|(_, key)| key).collect()
}

/// Chooses the one of these that gives up what it holds, where that kind of memory has run out: the slowest of those that have been
/// coming for a while. Whoever was kept waiting for memory and has just got some has a moment to send, unless all wait for each
/// other.
pub fn slowest<K: Copy>(crowd: impl Iterator<Item = (K, Look)>) -> Option<K> {
    crowd
        .filter(|(_, look)| matches!(look.phase, Phase::Head | Phase::Body) && look.age >= SLOW_AFTER)
        .filter(|(_, look)| look.read_for() >= SILENT_AFTER || look.age >= ENTANGLED_AFTER)
        .min_by_key(|(_, look)| look.rate())
        .map(|(key, _)| key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(phase: Phase, millis: u64, bytes: u64) -> Look {
        Look {
            phase,
            age: Duration::from_millis(millis),
            kept_waiting: Duration::ZERO,
            bytes,
        }
    }

    /// Lists those who give way, one after the other.
    fn order(crowd: &[Look]) -> Vec<usize> {
        (1..=crowd.len())
            .map(|wanted| give_way(crowd.iter().copied().enumerate(), wanted))
            .scan(Vec::new(), |gone: &mut Vec<usize>, now| {
                let next = now.iter().copied().find(|key| !gone.contains(key));
                gone.extend(next);
                next
            })
            .collect()
    }

    #[test]
    fn the_silent_go_first_and_then_the_slow() {
        let crowd = [
            look(Phase::Complete, 60_000, 0),
            look(Phase::Head, 10, 500),
            look(Phase::Body, 3_000, 30_000),
            look(Phase::Silent, 100, 0),
            look(Phase::Head, 3_000, 80),
            look(Phase::Silent, 300, 0),
            look(Phase::Body, 300, 63_000),
            look(Phase::Silent, 9_000, 0),
        ];
        assert_eq!(order(&crowd), [7, 5, 4, 2, 6, 3, 1]);
    }

    #[test]
    fn nobody_goes_whose_request_is_complete() {
        let crowd = [look(Phase::Complete, 60_000, 0); 5];
        assert_eq!(order(&crowd), [0; 0]);
        assert_eq!(give_way(crowd.iter().copied().enumerate(), 0), [0; 0]);
    }

    #[test]
    fn of_bodies_the_slowest_goes_and_no_young_one() {
        let crowd = [
            look(Phase::Body, 900, 1),
            look(Phase::Body, 2_000, 64_000),
            look(Phase::Body, 8_000, 63_000),
            look(Phase::Silent, 90_000, 0),
            look(Phase::Complete, 90_000, 1),
        ];
        assert_eq!(slowest(crowd.iter().copied().enumerate()), Some(2));
        assert_eq!(slowest(crowd[..1].iter().copied().enumerate()), None);
    }

    /// Of whoever waits for memory nothing is read, which looks slow and is not.
    #[test]
    fn whoever_was_kept_waiting_has_a_moment_to_send() {
        let waits = |millis| Look {
            kept_waiting: Duration::from_millis(millis - 100),
            ..look(Phase::Body, millis, 8_000)
        };
        let stalls = look(Phase::Body, 1_100, 64_500);
        assert_eq!(slowest([waits(1_050), stalls].into_iter().enumerate()), Some(1));
        // Nobody keeps the memory by waiting for more.
        assert_eq!(slowest([waits(1_050)].into_iter().enumerate()), None);
        assert_eq!(slowest([waits(3_000)].into_iter().enumerate()), Some(0));
    }
}
