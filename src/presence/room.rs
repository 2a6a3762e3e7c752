//! A room on the SFU, as far as it is known: its sid, who was last sighted in it, how it went (decision L13), and what is planned
//! for it: a check of whether it stands, a sweep of who is in it (L3), its creation.

use std::sync::Arc;

use super::participant::Participant;
use crate::backoff::{Jitter, Schedule};
use crate::livekit::RoomRow;
use crate::slab::Id;
use crate::time::Time;

/// The SFU's count of participants lags: within `departure_timeout` less this of a sighting a room cannot have ended by itself.
const LAG_MS: u64 = 7_000;
/// An event of another room is a former one's if it happened this long before: the clocks of nodes differ by seconds.
const FORMER_MS: u64 = 10_000;
const DEFAULT_DEPARTURE_TIMEOUT_MS: u64 = 20_000;
/// Former sids of a room whose end is remembered.
const MAX_FORMER_SIDS: usize = 3;
/// After a list that did not come, participants are asked about one by one for this long (L3).
const NO_LISTS_FOR_MS: u64 = 10 * 60_000;
const LATE_LISTS_FOR_MS: u64 = 2_000;

/// How a room stands, seen from somebody who was sighted in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RoomStatus {
    /// The room stands under the same sid, or the SFU refuses to say.
    Open,
    /// The room ended in the way rooms end: everybody had left.
    Closed,
    /// The SFU has forgotten the room.
    Lost,
}

/// Meaning of a piece of news for those in a room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum News {
    /// The room stands as it did.
    Same,
    /// The room stands and shows nobody.
    Empty,
    /// The status of the room has changed, for some of those in it at least.
    Changed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Creation {
    Idle,
    At(Time, u8),
    InFlight(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Check {
    Idle,
    At(Time),
    InFlight,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    pub(super) check: bool,
    pub(super) create: bool,
    pub(super) sweep: bool,
}

/// Member of a room. Where another one is looked for, the first bytes of the identity mostly tell: a participant of a hundred
/// thousand is far away in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) prefix: u32,
    pub(super) id: Id<Participant>,
}

/// The first bytes of an identity, in whose order identities are.
pub(super) fn prefix(identity: &str) -> u32 {
    let mut bytes = [0; 4];
    for (byte, of) in bytes.iter_mut().zip(identity.bytes()) {
        *byte = of;
    }
    u32::from_be_bytes(bytes)
}

/// A room that is kept in mind.
#[derive(Debug)]
pub struct Room {
    pub(super) name: Arc<str>,
    /// In the order of their identities.
    pub(super) members: Vec<Member>,
    /// Members who are thought to be there, or to come back.
    pub(super) swept: u32,
    /// Members whose reported departure is being looked into.
    pub(super) reported: u32,
    pub(super) sid: Option<Arc<str>>,
    /// When that sid, or that it is missing, was learnt.
    sid_since: Time,
    known_since: Time,
    /// When it was last known to stand under that sid.
    stood: Option<Time>,
    last_sighted: Option<Time>,
    departure_timeout_ms: u64,
    /// `room_finished` came for that sid.
    pub(super) finished: bool,
    /// Whether what is known stems from the store: the SFU may have gone down together with this process (L11).
    restored: bool,
    missing: bool,
    /// How the room went the last time.
    last_end: RoomStatus,
    past: Vec<(Arc<str>, RoomStatus)>,
    creation: Creation,
    check: Check,
    /// Moment at or after which a question must be asked whose answer is waited for.
    wanted: Option<Time>,
    check_tries: u8,
    sweep_at: Option<Time>,
    sweeping: bool,
    /// A sweep was planned: the next one keeps its distance.
    placed: bool,
    no_lists_until: Option<Time>,
    pub(super) timer: Option<Time>,
}

impl Room {
    pub(super) const fn new(name: Arc<str>, now: Time) -> Self {
        Self {
            name,
            members: Vec::new(),
            swept: 0,
            reported: 0,
            sid: None,
            sid_since: now,
            known_since: now,
            stood: None,
            last_sighted: None,
            departure_timeout_ms: DEFAULT_DEPARTURE_TIMEOUT_MS,
            finished: false,
            restored: false,
            missing: false,
            last_end: RoomStatus::Lost,
            past: Vec::new(),
            creation: Creation::Idle,
            check: Check::Idle,
            wanted: None,
            check_tries: 0,
            sweep_at: None,
            sweeping: false,
            placed: false,
            no_lists_until: None,
            timer: None,
        }
    }

    /// Takes in what the store says of the room; `continuous` where the SFU is known not to have gone down meanwhile.
    pub(super) fn restore(&mut self, sid: Option<&Arc<str>>, sighted: Option<Time>, continuous: bool, now: Time) {
        let is_over = sid.is_some_and(|sid| self.is_past(sid));
        if !is_over && (self.sid.is_none() || (self.restored && self.last_sighted < sighted)) {
            self.sid = sid.cloned();
            self.sid_since = now;
            if sid.is_some() {
                (self.missing, self.finished) = (false, false);
            }
        }
        self.restored = self.stood.is_none() && !continuous;
        self.last_sighted = self.last_sighted.max(sighted);
    }

    /// Takes in what the store says of a room that is over: the one at hand, or one before it.
    pub(super) fn restore_over(&mut self, sid: &Arc<str>, now: Time) -> News {
        if self.sid.as_ref() == Some(sid) || self.is_past(sid) {
            return self.on_finished(sid, now);
        }
        self.finished |= self.sid.is_none() && !self.missing;
        self.past.insert(0, (Arc::clone(sid), RoomStatus::Closed));
        self.past.truncate(MAX_FORMER_SIDS);
        News::Same
    }

    /// Shares a copy of the room's sid among all who are in it.
    pub(super) fn intern(&self, sid: &str) -> Arc<str> {
        match &self.sid {
            Some(known) if **known == *sid => Arc::clone(known),
            Some(_) | None => sid.into(),
        }
    }

    /// Takes in that nobody is thought to be in the room any more.
    pub(super) const fn is_left(&mut self) {
        self.sweep_at = None;
        self.creation = Creation::Idle;
    }

    // --- news ---

    /// Whether a room under this sid is known to have gone.
    pub(super) fn is_past(&self, sid: &str) -> bool {
        self.past.iter().any(|(past, _)| **past == *sid)
    }

    /// Whether an event under this sid is of a former room: one that is known to have gone, or one that nobody remembers, if it
    /// happened well before the room at hand was known to stand.
    pub(super) fn is_of_former(&self, sid: &str, happened: Option<Time>) -> bool {
        let is_other = self.sid.as_ref().is_some_and(|known| **known != *sid);
        let is_before = || {
            happened
                .zip(self.stood)
                .is_some_and(|(happened, stood)| happened.after(FORMER_MS) < stood)
        };
        self.is_past(sid) || (is_other && is_before())
    }

    /// An event that happened then, if that is known, names the room with a sid, and perhaps somebody in it.
    pub(super) fn on_event(&mut self, sid: &str, happened: Option<Time>, sighted: Option<Time>, trouble: Option<Time>, now: Time) -> News {
        let stood = self.stood;
        let news = self.stands_as(sid, trouble, now);
        // The last words of an SFU that was killed come after the trouble that this makes.
        self.stood = stood.max(happened);
        self.on_sighting(sighted);
        news
    }

    pub(super) fn on_finished(&mut self, sid: &str, now: Time) -> News {
        // It was missed before this was told: it was not lost.
        if let Some(place) = self.past.iter().position(|(past, _)| **past == *sid) {
            if self.missing && place == 0 {
                (self.last_end, self.finished) = (RoomStatus::Closed, true);
            }
            let was_lost = std::mem::replace(&mut self.past[place].1, RoomStatus::Closed) == RoomStatus::Lost;
            return if was_lost { News::Changed } else { News::Same };
        }
        if self.missing || self.sid.as_ref().is_some_and(|known| **known != *sid) {
            return News::Same;
        }
        self.sid = Some(sid.into());
        self.finished = true;
        self.end(RoomStatus::Closed, now);
        News::Changed
    }

    pub(super) fn on_sighting(&mut self, at: Option<Time>) {
        self.last_sighted = self.last_sighted.max(at);
    }

    /// The SFU shows somebody in the room. Of a room that was missing or over it is asked under which sid it stands by now: until then all that
    /// is told of it is taken to be about a former one.
    pub(super) fn on_seen(&mut self, asked: Time, now: Time) {
        self.on_sighting(Some(asked));
        if self.missing && self.check == Check::Idle {
            self.check = Check::At(now);
        }
    }

    /// `ListRooms` was asked for it then, and showed it or did not.
    pub(super) fn on_listed(&mut self, row: Option<&RoomRow<'_>>, asked: Time, trouble: Option<Time>, now: Time) -> News {
        self.check = Check::Idle;
        // First seen, or learnt otherwise, after the question was sent: not judged by its answer.
        let too_old = self.known_since > asked || (self.sid_since > asked && (self.sid.is_some() || self.missing));
        if too_old || self.wanted.is_some_and(|wanted| wanted > asked) {
            self.check = self.wanted.map_or(Check::Idle, |_| Check::At(now));
        } else {
            self.wanted = None;
        }
        if too_old {
            return News::Same;
        }
        self.check_tries = 0;
        let news = match row {
            Some(row) => {
                self.learn(row);
                let news = self.stands_as(row.sid, trouble, now);
                self.stood = Some(asked);
                if row.num_participants > 0 {
                    self.on_sighting(Some(asked));
                }
                match news {
                    News::Same if row.num_participants == 0 => News::Empty,
                    News::Same | News::Empty | News::Changed => news,
                }
            }
            None if self.missing => News::Same,
            None => {
                let status = self.how_it_went(trouble, asked);
                self.end(status, now);
                News::Changed
            }
        };
        if self.missing && !self.finished && self.swept > 0 && self.creation == Creation::Idle {
            self.creation = Creation::At(now, 0);
        }
        news
    }

    /// `ListRooms` brought no answer: it is asked again where somebody waits for one.
    pub(super) fn on_not_listed(&mut self, now: Time, jitter: &mut Jitter) {
        self.check = Check::Idle;
        if self.wanted.is_some() {
            self.check_tries = self.check_tries.saturating_add(1);
            self.check = Check::At(now.after(Schedule::ROOM.pause(self.check_tries, jitter)));
        }
    }

    /// The SFU, or a proxy before it, refuses to list rooms: it is taken to say that the room stands.
    pub(super) const fn on_list_refused(&mut self) {
        self.check = Check::Idle;
        self.wanted = None;
    }

    pub(super) fn on_created(&mut self, row: Option<&RoomRow<'_>>, trouble: Option<Time>, now: Time, jitter: &mut Jitter) -> News {
        let tries = match self.creation {
            Creation::InFlight(tries) | Creation::At(_, tries) => tries.saturating_add(1),
            Creation::Idle => 1,
        };
        self.creation = Creation::Idle;
        let Some(row) = row else {
            if self.missing && self.swept > 0 {
                self.creation = Creation::At(now.after(Schedule::ROOM.pause(tries, jitter)), tries);
            }
            return News::Same;
        };
        self.learn(row);
        self.stands_as(row.sid, trouble, now)
    }

    /// How the room stands for somebody who was sighted under that sid then.
    pub(super) fn status(&self, known: Option<&Arc<str>>, sighted: Option<Time>, trouble: Option<Time>) -> RoomStatus {
        match (&self.sid, known) {
            (Some(current), Some(known)) if current == known => RoomStatus::Open,
            // A sid that is not remembered was never seen to end: it is not given up lightly.
            (Some(_) | None, Some(known)) => {
                let past = self.past.iter().find(|(past, _)| past == known);
                past.map_or(RoomStatus::Lost, |&(_, status)| status)
            }
            (Some(_), None) if trouble.is_some_and(|trouble| sighted.is_some_and(|sighted| sighted < trouble)) => RoomStatus::Lost,
            (None, None) if self.missing => self.last_end,
            (Some(_) | None, None) => RoomStatus::Open,
        }
    }

    // --- what is planned ---

    pub(super) fn want_check(&mut self, now: Time) {
        self.wanted = Some(now);
        if self.check == Check::Idle {
            self.check = Check::At(now);
        }
    }

    /// Whether somebody waits to know whether the room stands.
    pub(super) const fn is_awaited(&self) -> bool {
        self.wanted.is_some()
    }

    /// Notes that the room is being asked for, together with others.
    pub(super) const fn checking(&mut self) {
        self.check = Check::InFlight;
    }

    /// A sweep out of turn; the next one is anywhere in the interval again, or rooms that were restored together would be swept
    /// together for ever.
    pub(super) fn sweep_soon(&mut self, at: Time) {
        self.placed = false;
        if !self.sweeping {
            self.sweep_at = Some(self.sweep_at.map_or(at, |planned| planned.min(at)));
        }
    }

    /// The first sweep is anywhere in the interval, the others keep their distance.
    pub(super) fn plan_sweep(&mut self, first: Time, next: Time) {
        self.sweep_at = Some(if self.placed { next } else { first });
        self.placed = true;
    }

    pub(super) const fn needs_sweep(&self) -> bool {
        self.swept > 0 && self.sweep_at.is_none() && !self.sweeping
    }

    pub(super) const fn sweeping(&mut self) {
        self.sweeping = true;
    }

    pub(super) const fn on_swept(&mut self) {
        self.sweeping = false;
    }

    pub(super) fn takes_lists(&self, now: Time) -> bool {
        self.no_lists_until.is_none_or(|until| until <= now)
    }

    /// A list did not come. Where it was only late, lists are tried again soon.
    pub(super) fn on_no_list(&mut self, now: Time, late: bool) {
        self.no_lists_until = Some(now.after(if late { LATE_LISTS_FOR_MS } else { NO_LISTS_FOR_MS }));
    }

    pub(super) fn settle(&mut self, now: Time) -> Due {
        let mut due = Due::default();
        if matches!(self.check, Check::At(at) if at <= now) {
            self.check = Check::InFlight;
            due.check = true;
        }
        if let Creation::At(at, tries) = self.creation
            && at <= now
        {
            self.creation = Creation::InFlight(tries);
            due.create = true;
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep_at = None;
            due.sweep = true;
        }
        due
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let creation = match self.creation {
            Creation::At(at, _) => Some(at),
            Creation::Idle | Creation::InFlight(_) => None,
        };
        let check = match self.check {
            Check::At(at) => Some(at),
            Check::Idle | Check::InFlight => None,
        };
        [creation, check, self.sweep_at].into_iter().flatten().min()
    }

    // --- how it stands ---

    fn learn(&mut self, row: &RoomRow<'_>) {
        if row.departure_timeout > 0 {
            self.departure_timeout_ms = u64::from(row.departure_timeout) * 1_000;
        }
    }

    fn stands_as(&mut self, sid: &str, trouble: Option<Time>, now: Time) -> News {
        let news = match &self.sid {
            Some(known) if **known != *sid => {
                let status = self.how_it_went(trouble, now);
                self.end(status, now);
                News::Changed
            }
            Some(_) | None => News::Same,
        };
        if self.sid.is_none() {
            // What seemed to be a former room, since an event of an older one came late, is the one that stands.
            self.past.retain(|(past, _)| **past != *sid);
            self.sid = Some(sid.into());
            self.sid_since = now;
            self.finished = false;
        }
        self.missing = false;
        self.restored = false;
        self.stood = Some(now);
        if !matches!(self.creation, Creation::InFlight(_)) {
            self.creation = Creation::Idle;
        }
        news
    }

    /// How a room must have gone that is not there any more, or has another sid.
    fn how_it_went(&self, trouble: Option<Time>, asked: Time) -> RoomStatus {
        if self.finished {
            return RoomStatus::Closed;
        }
        let unreachable_since = trouble.is_some_and(|trouble| self.stood.is_none_or(|stood| trouble >= stood));
        let could_not_end = self
            .last_sighted
            .is_some_and(|sighted| asked.since(sighted) < self.departure_timeout_ms.saturating_sub(LAG_MS));
        if self.restored || unreachable_since || could_not_end {
            RoomStatus::Lost
        } else {
            RoomStatus::Closed
        }
    }

    fn end(&mut self, status: RoomStatus, now: Time) {
        if let Some(sid) = self.sid.take() {
            self.past.insert(0, (sid, status));
            self.past.truncate(MAX_FORMER_SIDS);
        }
        self.sid_since = now;
        self.missing = true;
        self.last_end = status;
        self.restored = false;
    }
}

#[cfg(test)]
mod tests;
