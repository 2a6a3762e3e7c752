//! Who is known to the SFU under the job's identity: one session, told from others by its sid (L2).

use super::Participant;
use crate::text::Text;
use crate::time::Time;
use std::sync::Arc;

const REMEMBERED_EVENTS: usize = 4;
/// LiveKit's sids have 15 bytes; in place these take no more than an allocation for those would.
const SID: usize = 46;

/// The last session that the SFU showed or told of.
#[derive(Clone, Debug, Default)]
pub struct Session {
    sid: Option<Text<SID>>,
    joined_at_ms: u64,
    room_sid: Option<Arc<str>>,
    last_sighted: Option<Time>,
    seen: bool,
    was_seen: bool,
    left: bool,
    events: [u64; REMEMBERED_EVENTS],
}

impl Session {
    /// A session as it was stored.
    #[must_use]
    pub fn restored(sid: Option<&str>, joined_at_ms: u64, room_sid: Option<Arc<str>>, last_sighted: Option<Time>, seen: bool) -> Self {
        Self {
            sid: sid.map(Text::new),
            joined_at_ms,
            room_sid,
            last_sighted,
            seen,
            was_seen: seen,
            left: false,
            events: Default::default(),
        }
    }

    /// The participant's sid.
    #[must_use]
    pub fn sid(&self) -> Option<&str> {
        self.sid.as_ref().map(Text::as_str)
    }

    /// When it joined, by the SFU's clock.
    #[must_use]
    pub fn joined_at_ms(&self) -> u64 {
        self.joined_at_ms
    }

    /// The sid that the room had when the participant was last sighted.
    #[must_use]
    pub fn room_sid(&self) -> Option<&Arc<str>> {
        self.room_sid.as_ref()
    }

    /// When the participant was last sighted.
    #[must_use]
    pub fn last_sighted(&self) -> Option<Time> {
        self.last_sighted
    }

    /// Whether this session or one before it was seen.
    #[must_use]
    pub fn was_seen(&self) -> bool {
        self.was_seen
    }

    pub(super) fn is_seen(&self) -> bool {
        self.seen
    }

    pub(super) fn is_known(&self) -> bool {
        self.sid.is_some()
    }

    pub(super) fn is(&self, sid: &str) -> bool {
        self.sid.as_ref().is_some_and(|known| known.as_bytes() == sid.as_bytes())
    }

    pub(super) fn has_left(&self) -> bool {
        self.left
    }

    /// Whether a session that joined then is a later one. Where the SFU does not say, order of arrival decides.
    pub(super) fn is_older_than(&self, joined_at_ms: u64) -> bool {
        joined_at_ms == 0 || self.joined_at_ms == 0 || joined_at_ms > self.joined_at_ms
    }

    /// Whether an answer about another session is out of date.
    pub(super) fn is_overtaken(&self, joined_at_ms: u64, asked: Time) -> bool {
        match (joined_at_ms, self.joined_at_ms) {
            (0, _) | (_, 0) => self.is_sighted_after(asked),
            (theirs, ours) => theirs < ours,
        }
    }

    pub(super) fn is_sighted_after(&self, asked: Time) -> bool {
        self.last_sighted.is_some_and(|sighted| sighted > asked)
    }

    pub(super) fn see(&mut self) {
        self.seen = true;
        self.was_seen = true;
    }

    pub(super) fn leave(&mut self) {
        self.left = true;
    }

    /// Takes a sighting in; says whether that is worth storing.
    pub(super) fn sighted(&mut self, participant: Participant<'_>, room_sid: Option<&Arc<str>>, now: Time) -> bool {
        let mut news = false;
        if !participant.sid.is_empty() && !self.is(participant.sid) {
            self.sid = Some(Text::new(participant.sid));
            self.joined_at_ms = participant.joined_at_ms;
            self.seen = false;
            news = true;
        }
        self.left = false;
        self.last_sighted = Some(self.last_sighted.map_or(now, |sighted| sighted.max(now)));
        if let Some(room_sid) = room_sid
            && self.room_sid.as_ref() != Some(room_sid)
        {
            // Stored with the next restart: a record that lags here is judged with care (L11).
            self.room_sid = Some(Arc::clone(room_sid));
        }
        if participant.active && !self.seen {
            self.see();
            news = true;
        }
        news
    }

    /// Whether an event comes for the first time, as far as the last few are remembered.
    pub(super) fn first_time(&mut self, id: Option<u64>) -> bool {
        let Some(id) = id else { return true };
        if self.events.contains(&id) {
            return false;
        }
        self.events.rotate_right(1);
        self.events[0] = id;
        true
    }
}
