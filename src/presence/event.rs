//! Events of the SFU: its webhooks in the core's terms, which of them are repeats, and when they happened on our clock (decision
//! L2).

use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use crate::livekit::DisconnectReason;
use crate::time::Time;

/// For how long an event is known as told, and how many are.
const REMEMBERED_FOR_MS: u64 = 10 * 60_000;
const MAX_REMEMBERED: usize = 65_536;
/// Offsets between the clocks are forgotten after one to two of these.
const WINDOW_MS: u64 = 5 * 60_000;

/// A verified webhook, reduced to what is used. Texts are empty and numbers 0 where the SFU leaves them out.
#[derive(Clone, Copy, Debug)]
pub struct SfuEvent<'a> {
    /// Kind of the event.
    pub kind: EventKind,
    /// A digest of the token that came with it: LiveKit sends an event again with the same token.
    pub digest: u64,
    /// The `iat` of that token, in seconds since 1970.
    pub issued_at: i64,
    /// The event's id.
    pub id: &'a str,
    /// When it happened by the SFU's clock, in seconds since 1970.
    pub created_at: i64,
    /// The room's name.
    pub room: &'a str,
    /// The room's sid.
    pub room_sid: &'a str,
    /// The participant's identity.
    pub identity: &'a str,
    /// The participant's sid.
    pub sid: &'a str,
    /// When the participant joined, by the SFU's clock.
    pub joined_at_ms: u64,
}

/// The kinds of webhooks that matter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EventKind {
    /// LiveKit's event `room_started`.
    RoomStarted,
    /// LiveKit's event `room_finished`.
    RoomFinished,
    /// LiveKit's event `participant_joined`.
    Joined,
    /// LiveKit's event `participant_left`.
    Left(DisconnectReason),
    /// LiveKit's event `participant_connection_aborted`.
    Aborted(DisconnectReason),
    /// `track_*`, and whatever else shows that somebody is in the room.
    Track,
    /// Any other kind of event.
    Other,
}

/// The part of an event that is about one participant.
#[derive(Clone, Debug)]
pub(super) struct Event<'a> {
    pub(super) sid: &'a str,
    pub(super) joined_at_ms: u64,
    /// When it happened on our clock; none where that cannot be known.
    pub(super) happened: Option<Time>,
    pub(super) room_sid: Option<Arc<str>>,
}

/// The events of the last ten minutes, by hash.
#[derive(Debug, Default)]
pub(super) struct RecentEvents {
    known: HashSet<u64>,
    order: VecDeque<(Time, u64)>,
}

impl RecentEvents {
    /// Whether this event was told before. It is known from now on.
    pub(super) fn is_repeat(&mut self, event: &SfuEvent<'_>, now: Time) -> bool {
        while let Some(&(at, hash)) = self.order.front()
            && (now.since(at) > REMEMBERED_FOR_MS || self.order.len() > MAX_REMEMBERED - 2)
        {
            self.order.pop_front();
            self.known.remove(&hash);
        }
        let complete = !event.id.is_empty() && !event.sid.is_empty() && event.created_at != 0;
        let by_id = complete.then(|| {
            let mut hasher = DefaultHasher::new();
            (event.id, event.kind, event.sid, event.created_at).hash(&mut hasher);
            hasher.finish()
        });
        let mut repeat = false;
        for hash in [Some(event.digest), by_id].into_iter().flatten() {
            if self.known.insert(hash) {
                self.order.push_back((now, hash));
            } else {
                repeat = true;
            }
        }
        if self.order.is_empty() {
            (self.known, self.order) = Default::default();
        }
        repeat
    }
}

/// How the SFU's clock and ours differ: the least of what was seen in the last minutes, since messages only ever come late.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SfuClock {
    /// Our milliseconds less the SFU's; of this window, which began then, and of the one before.
    windows: [Option<i64>; 2],
    began: Option<Time>,
}

impl SfuClock {
    /// The SFU's clock showed these seconds, not long before `now`.
    pub(super) fn learn(&mut self, seconds: i64, now: Time) {
        if seconds == 0 {
            return;
        }
        match self.began {
            Some(began) if now.since(began) < WINDOW_MS => {}
            Some(began) => {
                let last = if now.since(began) < 2 * WINDOW_MS { self.windows[0] } else { None };
                self.windows = [None, last];
                self.began = Some(now);
            }
            None => self.began = Some(now),
        }
        let offset = signed(now).saturating_sub(seconds.saturating_mul(1_000));
        self.windows[0] = Some(self.windows[0].map_or(offset, |least| least.min(offset)));
    }

    /// When our clock showed what the SFU's shows at `seconds`, at the latest now.
    pub(super) fn place(&self, seconds: i64, now: Time) -> Option<Time> {
        if seconds == 0 || self.began.is_none_or(|began| now.since(began) >= 2 * WINDOW_MS) {
            return None;
        }
        let offset = self.windows.into_iter().flatten().min()?;
        let millis = seconds.saturating_mul(1_000).saturating_add(offset);
        Some(Time::from_millis(u64::try_from(millis).unwrap_or(0)).min(now))
    }
}

fn signed(time: Time) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
