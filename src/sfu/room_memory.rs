//! How long a room need not be asked for again (decision T6a): only while LiveKit cannot have closed it by itself. Pure.

use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use livekit_protocol::Room;
use lru::LruCache;

use crate::cache::bounded;

/// Rooms remembered at a time.
const MAX_ROOMS: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
const MAX_LIFE: Duration = Duration::from_secs(10);
/// Margin for clocks and rounding.
const EMPTY_MARGIN_MS: i64 = 2_000;
/// `num_participants` lags by up to five seconds, both ways; LiveKit counts whole seconds since the last one left, so a room
/// may close one early; whoever has the token needs a second to come; and a busy machine is late in all of it (seen: with a
/// margin of seven seconds, one token of 639 for a room of nine).
const OCCUPIED_MARGIN_MS: i64 = 8_000;

/// How long after the question was sent the room stands for certain. `answered_at` is the `Date` of the answer in
/// seconds since 1970, on the SFU's clock like `creation_time_ms`.
pub(super) fn stands_for(room: &Room, answered_at: Option<u64>) -> Duration {
    let Some(age_ms) = answered_at.and_then(|seconds| age_ms(room, seconds)) else {
        return Duration::ZERO;
    };
    let shortest = i64::from(room.departure_timeout.min(room.empty_timeout)) * 1000;
    let left = if room.num_participants == 0 {
        shortest - EMPTY_MARGIN_MS - age_ms
    } else {
        shortest - OCCUPIED_MARGIN_MS
    };
    Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(MAX_LIFE)
}

/// Age at the end of the second that the answer names; `None` when the clock makes no sense.
fn age_ms(room: &Room, answered_at: u64) -> Option<i64> {
    let end_of_second = i64::try_from(answered_at).ok()?.checked_add(1)?.checked_mul(1000)?;
    let created = if room.creation_time_ms > 0 {
        room.creation_time_ms
    } else {
        room.creation_time.checked_mul(1000)?
    };
    end_of_second.checked_sub(created).filter(|age| created > 0 && *age >= 0)
}

/// The rooms that stand for certain.
pub(super) struct RoomMemory(LruCache<Box<str>, Instant>);

impl RoomMemory {
    pub(super) fn new() -> Self {
        Self(bounded(MAX_ROOMS))
    }

    pub(super) fn stands(&mut self, room: &str, now: Instant) -> bool {
        match self.0.get(room) {
            Some(until) if now < *until => true,
            Some(_) => {
                self.0.pop(room);
                false
            }
            None => false,
        }
    }

    pub(super) fn remember(&mut self, room: &str, until: Instant) {
        self.0.put(room.into(), until);
    }

    pub(super) fn forget(&mut self, room: &str) {
        self.0.pop(room);
    }

    pub(super) fn forget_all(&mut self) {
        self.0.clear();
    }
}

/// How long after a token was made its holder may still be on the way into the room (decision T6b).
const EXPECTED_FOR: Duration = Duration::from_secs(15);
/// Holders remembered for one room.
const MAX_HOLDERS: usize = 64;

/// Holders of fresh full-access tokens who were not seen in their rooms yet. Identities may be long and are many, so only
/// their hashes are kept, with a key of this process.
pub(super) struct Expected {
    rooms: LruCache<Box<str>, Vec<(u64, Instant)>>,
    hasher: RandomState,
}

impl Expected {
    pub(super) fn new() -> Self {
        Self {
            rooms: bounded(MAX_ROOMS),
            hasher: RandomState::new(),
        }
    }

    /// `identity` got a token for `room`.
    pub(super) fn expect(&mut self, room: &str, identity: &str, now: Instant) {
        let identity = self.hasher.hash_one(identity);
        let holders = self.rooms.get_or_insert_mut(room.into(), Vec::new);
        holders.retain(|(other, since)| *other != identity && now < *since + EXPECTED_FOR);
        if holders.len() == MAX_HOLDERS {
            holders.remove(0);
        }
        holders.push((identity, now));
    }

    /// Takes in that `identity` is in `room`.
    pub(super) fn arrived(&mut self, room: &str, identity: &str) {
        let identity = self.hasher.hash_one(identity);
        if let Some(holders) = self.rooms.get_mut(room) {
            holders.retain(|(other, _)| *other != identity);
        }
    }

    /// `room` has ended: whether somebody is still on the way into it.
    pub(super) fn anybody(&mut self, room: &str, now: Instant) -> bool {
        self.rooms
            .pop(room)
            .is_some_and(|holders| holders.iter().any(|(_, since)| now < *since + EXPECTED_FOR))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_795_241_149;

    fn room(age_ms: i64, participants: u32, departure: u32, empty: u32) -> Room {
        Room {
            creation_time_ms: i64::try_from(NOW + 1).unwrap() * 1000 - age_ms,
            num_participants: participants,
            departure_timeout: departure,
            empty_timeout: empty,
            ..Room::default()
        }
    }

    #[test]
    fn an_empty_room_stands_from_its_creation_on() {
        for (age, seconds) in [(0, 10_000), (7_999, 10_000), (8_500, 9_500), (17_999, 1), (18_000, 0), (99_000, 0)] {
            assert_eq!(stands_for(&room(age, 0, 20, 300), Some(NOW)).as_millis(), seconds, "age {age}");
        }
        assert_eq!(
            stands_for(&room(1_000, 0, 300, 20), Some(NOW)),
            MAX_LIFE,
            "the smaller timeout counts"
        );
    }

    #[test]
    fn an_occupied_room_stands_for_its_departure_timeout() {
        assert_eq!(stands_for(&room(9_999_999, 3, 20, 300), Some(NOW)), MAX_LIFE);
        assert_eq!(stands_for(&room(0, 1, 9, 300), Some(NOW)).as_millis(), 1_000);
        assert_eq!(stands_for(&room(0, 1, 8, 300), Some(NOW)), Duration::ZERO);
    }

    #[test]
    fn nothing_is_remembered_without_a_clock_that_makes_sense() {
        assert_eq!(stands_for(&room(0, 0, 20, 300), None), Duration::ZERO);
        assert_eq!(
            stands_for(&room(-1, 0, 20, 300), Some(NOW)),
            Duration::ZERO,
            "created in the future"
        );
        assert_eq!(stands_for(&room(-1, 5, 20, 300), Some(NOW)), Duration::ZERO);
        let undated = Room {
            num_participants: 1,
            departure_timeout: 20,
            empty_timeout: 300,
            ..Room::default()
        };
        assert_eq!(stands_for(&undated, Some(NOW)), Duration::ZERO);
        assert_eq!(stands_for(&room(0, 0, 20, 300), Some(u64::MAX)), Duration::ZERO);
        assert_eq!(stands_for(&room(0, 0, 2, 300), Some(NOW)), Duration::ZERO);
        assert_eq!(stands_for(&room(0, 0, 0, 300), Some(NOW)), Duration::ZERO);
    }

    #[test]
    fn seconds_serve_where_an_old_server_has_no_milliseconds() {
        let old = Room {
            creation_time: i64::try_from(NOW).unwrap() - 1,
            departure_timeout: 20,
            empty_timeout: 300,
            ..Room::default()
        };
        assert_eq!(stands_for(&old, Some(NOW)), MAX_LIFE);
    }

    #[test]
    fn a_room_is_missed_by_those_on_the_way_only() {
        let (mut expected, now) = (Expected::new(), Instant::now());
        assert!(!expected.anybody("r", now));
        expected.expect("r", "a", now);
        assert!(!expected.anybody("other", now));
        assert!(expected.anybody("r", now + EXPECTED_FOR / 2));
        assert!(!expected.anybody("r", now), "asked once");
        expected.expect("r", "a", now);
        assert!(!expected.anybody("r", now + EXPECTED_FOR));
        expected.expect("r", "a", now);
        expected.expect("r", "b", now);
        expected.arrived("r", "a");
        assert!(expected.anybody("r", now));
        expected.expect("r", "a", now);
        expected.arrived("r", "a");
        assert!(!expected.anybody("r", now));
        for n in 0..1000 {
            expected.expect("r", &n.to_string(), now);
        }
        assert_eq!(expected.rooms.peek("r").map(Vec::len), Some(MAX_HOLDERS));
    }

    #[test]
    fn memory_ends_and_is_bounded() {
        let (mut memory, now) = (RoomMemory::new(), Instant::now());
        memory.remember("a", now + MAX_LIFE);
        assert!(memory.stands("a", now) && !memory.stands("b", now) && !memory.stands("a", now + MAX_LIFE));
        for n in 0..10_000 {
            memory.remember(&n.to_string(), now + MAX_LIFE);
        }
        assert_eq!(memory.0.len(), MAX_ROOMS.get());
        memory.forget_all();
        assert!(!memory.stands("9999", now));
    }
}
