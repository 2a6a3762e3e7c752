//! What is known of each room on the SFU: its sid, who was last sighted in it, whether it stands, ended or was lost (L13); when its
//! participants are asked for (L3) and when it is created again.
//!
//! It knows jobs only as members to be counted, and makes no call.

use crate::backoff::{Jitter, Schedule};

use crate::delayed_leave::machine::Verdict;

use crate::time::Time;

use crate::delayed_leave::watch::SOON;
use std::{collections::BTreeMap, sync::Arc};

/// The count of participants lags, and so may we: within `departure_timeout` less this of a sighting a room cannot have ended (L13).
const LAG: u64 = 7_000;
const DEFAULT_DEPARTURE_TIMEOUT: u64 = 20_000;
/// Former sids of a room whose fate is remembered.
const REMEMBERED: usize = 3;
/// At most so many rooms are asked for in one call.
pub const PORTION: usize = 500;

/// A room that jobs are in, known by its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RoomId(pub(crate) u32);

/// A room as the SFU shows it.
#[derive(Clone, Copy, Debug)]
pub struct RoomRow<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its sid.
    pub sid: &'a str,
    /// How many are in it: up to 5 s old.
    pub num_participants: u32,
    /// Seconds from the last departure to its end; 0 where it is not said.
    pub departure_timeout: u32,
}

/// What a piece of news means for the jobs in a room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum News {
    /// Nothing.
    None,
    /// It stands and shows nobody.
    Empty,
    /// Its fate is known: the verdict is to be read for each job.
    Judged,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Creation {
    Idle,
    At(Time, u8),
    InFlight(u8),
}

#[derive(Debug)]
struct Room {
    name: Arc<str>,
    /// The slots of its jobs, ordered by identity.
    members: Vec<u32>,
    /// All jobs that refer to it, those that only cancel their event included.
    jobs: u32,
    /// Members who are thought to be there, or to come back.
    connected: u32,
    /// Those of them for whose sake it is created again.
    creators: u32,
    sid: Option<Arc<str>>,
    /// When that sid, or the lack of one, was learnt.
    sid_since: Time,
    known_since: Time,
    /// When it was last known to stand under that sid.
    stood: Option<Time>,
    last_sighted: Option<Time>,
    departure_timeout: u64,
    /// `room_finished` came for that sid.
    finished: bool,
    /// What is known stems from the store: the SFU may have gone down together with us (L11).
    restored: bool,
    missing: bool,
    /// How it went the last time, also where its sid was never learnt.
    fate: Verdict,
    past: Vec<(Arc<str>, Verdict)>,
    creation: Creation,
    /// A verdict is wanted from a question asked at that moment or later.
    judge: Option<Time>,
    judge_at: Option<Time>,
    judging: bool,
    judge_tries: u8,
    sweep_at: Option<Time>,
    sweeping: bool,
    swept: bool,
    timer: Option<Time>,
}

/// All rooms.
#[derive(Debug, Default)]
pub struct Rooms {
    rooms: Vec<Option<Room>>,
    free: Vec<u32>,
    by_name: BTreeMap<Arc<str>, RoomId>,
    connected: usize,
}

impl Rooms {
    /// The room of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<RoomId> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self, id: RoomId) -> Option<&Arc<str>> {
        self.get(id).map(|room| &room.name)
    }

    /// Its sid, as far as it is known.
    #[must_use]
    pub fn sid(&self, id: RoomId) -> Option<&Arc<str>> {
        self.get(id).and_then(|room| room.sid.as_ref())
    }

    /// Whether any room has connected jobs.
    #[must_use]
    pub fn any_connected(&self) -> bool {
        self.connected > 0
    }

    /// How many of its members are thought to be there.
    #[must_use]
    pub fn connected(&self, id: RoomId) -> u32 {
        self.get(id).map_or(0, |room| room.connected)
    }

    /// All rooms with connected jobs.
    pub fn with_connected(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rooms.iter().flatten().filter(|room| room.connected > 0).map(|room| &room.name)
    }

    pub(crate) fn members(&self, id: RoomId) -> &[u32] {
        self.get(id).map_or(&[], |room| &room.members)
    }

    pub(crate) fn members_mut(&mut self, id: RoomId) -> Option<&mut Vec<u32>> {
        self.get_mut(id).map(|room| &mut room.members)
    }

    pub(crate) fn enter(&mut self, name: &str, now: Time) -> RoomId {
        if let Some(id) = self.find(name) {
            return id;
        }
        let name: Arc<str> = name.into();
        let room = Room {
            name: Arc::clone(&name),
            members: Vec::new(),
            jobs: 0,
            connected: 0,
            creators: 0,
            sid: None,
            sid_since: now,
            known_since: now,
            stood: None,
            last_sighted: None,
            departure_timeout: DEFAULT_DEPARTURE_TIMEOUT,
            finished: false,
            restored: false,
            missing: false,
            fate: Verdict::Lost,
            past: Vec::new(),
            creation: Creation::Idle,
            judge: None,
            judge_at: None,
            judging: false,
            judge_tries: 0,
            sweep_at: None,
            sweeping: false,
            swept: false,
            timer: None,
        };
        let id = if let Some(slot) = self.free.pop() {
            self.rooms[slot as usize] = Some(room);
            RoomId(slot)
        } else {
            self.rooms.push(Some(room));
            RoomId(self.rooms.len() as u32 - 1)
        };
        self.by_name.insert(name, id);
        id
    }

    pub(crate) fn join(&mut self, id: RoomId) {
        if let Some(room) = self.get_mut(id) {
            room.jobs += 1;
        }
    }

    /// One job less; forgets the room with its last one.
    pub(crate) fn leave(&mut self, id: RoomId) {
        let Some(room) = self.get_mut(id) else { return };
        room.jobs -= 1;
        if room.jobs == 0
            && let Some(room) = self.rooms[id.0 as usize].take()
        {
            self.by_name.remove(&room.name);
            self.free.push(id.0);
        }
    }

    pub(crate) fn count(&mut self, id: RoomId, was: bool, is: bool, creates: bool) {
        let Some(room) = self.get_mut(id) else { return };
        let before = room.connected > 0;
        match (was, is) {
            (false, true) => {
                room.connected += 1;
                room.creators += u32::from(creates);
            }
            (true, false) => {
                room.connected -= 1;
                room.creators -= u32::from(creates);
            }
            (false, false) | (true, true) => return,
        }
        let after = room.connected > 0;
        if !after {
            room.sweep_at = None;
            room.creation = Creation::Idle;
        }
        match (before, after) {
            (false, true) => self.connected += 1,
            (true, false) => self.connected -= 1,
            (false, false) | (true, true) => {}
        }
    }

    /// What the store says of it.
    pub(crate) fn restore(&mut self, id: RoomId, sid: Option<&Arc<str>>, sighted: Option<Time>, now: Time) {
        let Some(room) = self.get_mut(id) else { return };
        if room.sid.is_none() || (room.restored && room.last_sighted < sighted) {
            room.sid = sid.cloned();
            room.sid_since = now;
        }
        room.restored = room.stood.is_none();
        room.last_sighted = room.last_sighted.max(sighted);
    }

    /// One copy of a room's sid for all who are in it.
    pub(crate) fn intern(&self, id: RoomId, sid: &str) -> Arc<str> {
        match self.get(id).and_then(|room| room.sid.as_ref()) {
            Some(known) if **known == *sid => Arc::clone(known),
            Some(_) | None => sid.into(),
        }
    }

    // --- news ---

    /// A webhook names the room with a sid, and perhaps a participant in it. An event of a former room changes nothing.
    pub(crate) fn told(&mut self, id: RoomId, sid: &str, somebody: bool, trouble: Option<Time>, happened: Time, now: Time) -> News {
        let Some(room) = self.get_mut(id) else { return News::None };
        if room.past.iter().any(|(past, _)| **past == *sid) {
            return News::None;
        }
        let news = room.stands_as(sid, trouble, now);
        if somebody {
            room.last_sighted = room.last_sighted.max(Some(happened));
        }
        news
    }

    /// `room_finished` came.
    pub(crate) fn finished(&mut self, id: RoomId, sid: &str, now: Time) -> News {
        let Some(room) = self.get_mut(id) else { return News::None };
        match &room.sid {
            Some(known) if **known != *sid => return News::None,
            Some(_) | None => {}
        }
        if room.missing {
            return News::None;
        }
        room.sid = Some(sid.into());
        room.finished = true;
        room.end(Verdict::Ended, now);
        News::Judged
    }

    /// `GetParticipant` or a list showed somebody in it.
    pub(crate) fn sighted(&mut self, id: RoomId, asked: Time) {
        if let Some(room) = self.get_mut(id) {
            room.last_sighted = room.last_sighted.max(Some(asked));
        }
    }

    /// `ListRooms` was asked for it, and showed it or did not.
    pub(crate) fn listed(&mut self, id: RoomId, row: Option<RoomRow<'_>>, asked: Time, trouble: Option<Time>, now: Time) -> News {
        let Some(room) = self.get_mut(id) else { return News::None };
        room.judging = false;
        // First seen, or learnt otherwise, after the question was sent: not judged by its answer.
        if room.known_since > asked || (room.sid_since > asked && (room.sid.is_some() || room.missing)) {
            room.judge_at = room.judge.map(|_| now);
            return News::None;
        }
        room.judge_tries = 0;
        room.judge_at = None;
        if room.judge.is_some_and(|wanted| wanted <= asked) {
            room.judge = None;
        } else if room.judge.is_some() {
            room.judge_at = Some(now);
        }
        let news = match row {
            Some(row) => {
                room.learn(&row);
                let news = room.stands_as(row.sid, trouble, now);
                room.stood = Some(asked);
                if row.num_participants > 0 {
                    room.last_sighted = room.last_sighted.max(Some(asked));
                }
                match news {
                    News::None if row.num_participants == 0 => News::Empty,
                    News::None | News::Empty | News::Judged => news,
                }
            }
            None if room.missing => News::None,
            None => {
                let fate = room.fate(trouble, asked);
                room.end(fate, now);
                News::Judged
            }
        };
        if room.missing && !room.finished && room.creators > 0 && room.creation == Creation::Idle {
            room.creation = Creation::At(now, 0);
        }
        news
    }

    /// `ListRooms` brought no answer: it is asked again where a verdict is wanted.
    pub(crate) fn unlisted(&mut self, id: RoomId, now: Time, jitter: &mut Jitter) {
        let Some(room) = self.get_mut(id) else { return };
        room.judging = false;
        if room.judge.is_some() {
            room.judge_tries = room.judge_tries.saturating_add(1);
            room.judge_at = Some(now.after(Schedule::ROOM.pause(room.judge_tries, jitter)));
        }
    }

    /// The SFU refuses to list rooms: it is taken to say that the room stands.
    pub(crate) fn refused(&mut self, id: RoomId) {
        if let Some(room) = self.get_mut(id) {
            room.judging = false;
            room.judge = None;
            room.judge_at = None;
        }
    }

    /// `CreateRoom` ended.
    pub(crate) fn created(&mut self, id: RoomId, row: Option<RoomRow<'_>>, trouble: Option<Time>, now: Time, jitter: &mut Jitter) -> News {
        let Some(room) = self.get_mut(id) else { return News::None };
        let tries = match room.creation {
            Creation::InFlight(tries) | Creation::At(_, tries) => tries,
            Creation::Idle => 0,
        };
        match row {
            Some(row) => {
                room.creation = Creation::Idle;
                room.learn(&row);
                room.stands_as(row.sid, trouble, now)
            }
            None => {
                let tries = tries.saturating_add(1);
                let again = room.missing && room.creators > 0;
                room.creation = if again {
                    Creation::At(now.after(Schedule::ROOM.pause(tries, jitter)), tries)
                } else {
                    Creation::Idle
                };
                News::None
            }
        }
    }

    /// What became of the room in which a participant was sighted then, under that sid.
    #[must_use]
    pub fn verdict(&self, id: RoomId, known: Option<&Arc<str>>, sighted: Option<Time>, trouble: Option<Time>) -> Verdict {
        let Some(room) = self.get(id) else { return Verdict::Ended };
        match (&room.sid, known) {
            (Some(current), Some(known)) if current == known => Verdict::Stands,
            (Some(_) | None, Some(known)) => {
                // A sid that is not remembered was never seen to end: it is not given up lightly.
                room.past
                    .iter()
                    .find(|(past, _)| past == known)
                    .map_or(Verdict::Lost, |&(_, verdict)| verdict)
            }
            (Some(_), None) if trouble.is_some_and(|trouble| sighted.is_some_and(|sighted| sighted < trouble)) => Verdict::Lost,
            (Some(_), None) => Verdict::Stands,
            (None, None) if room.missing => room.fate,
            (None, None) => Verdict::Stands,
        }
    }

    // --- what is due ---

    pub(crate) fn want_verdict(&mut self, id: RoomId, now: Time) {
        if let Some(room) = self.get_mut(id) {
            room.judge = Some(now);
            if !room.judging && room.judge_at.is_none() {
                room.judge_at = Some(now);
            }
        }
    }

    pub(crate) fn sweep_now(&mut self, id: RoomId, now: Time) {
        if let Some(room) = self.get_mut(id)
            && !room.sweeping
        {
            let soon = now.after(SOON);
            room.sweep_at = Some(room.sweep_at.map_or(soon, |at| at.min(soon)));
            room.swept = true;
        }
    }

    /// The first sweep is anywhere in the interval, the others keep their distance.
    pub(crate) fn plan_sweep(&mut self, id: RoomId, first: Time, next: Time) {
        if let Some(room) = self.get_mut(id) {
            room.sweep_at = Some(if room.swept { next } else { first });
            room.swept = true;
        }
    }

    pub(crate) fn needs_sweep(&self, id: RoomId) -> bool {
        self.get(id)
            .is_some_and(|room| room.connected > 0 && room.sweep_at.is_none() && !room.sweeping)
    }

    pub(crate) fn sweep_ended(&mut self, id: RoomId) {
        if let Some(room) = self.get_mut(id) {
            room.sweeping = false;
        }
    }

    /// Takes what is due for a room.
    pub(crate) fn settle(&mut self, id: RoomId, now: Time) -> Due {
        let mut due = Due::default();
        let Some(room) = self.get_mut(id) else { return due };
        if room.judge_at.is_some_and(|at| at <= now) && !room.judging {
            room.judge_at = None;
            room.judging = true;
            due.judge = true;
        }
        if let Creation::At(at, tries) = room.creation
            && at <= now
        {
            room.creation = Creation::InFlight(tries);
            due.create = true;
        }
        if room.sweep_at.is_some_and(|at| at <= now) {
            room.sweep_at = None;
            due.sweep = true;
        }
        due
    }

    pub(crate) fn sweeping(&mut self, id: RoomId) {
        if let Some(room) = self.get_mut(id) {
            room.sweeping = true;
        }
    }

    /// Marks rooms as being asked for, so that a verdict waits for that answer.
    pub(crate) fn judging(&mut self, id: RoomId) {
        if let Some(room) = self.get_mut(id) {
            room.judge_at = None;
            room.judging = true;
        }
    }

    /// The room's timer as it is set and as it should be.
    pub(crate) fn timer(&mut self, id: RoomId) -> Option<(&mut Option<Time>, Option<Time>)> {
        let room = self.get_mut(id)?;
        let creation = match room.creation {
            Creation::At(at, _) => Some(at),
            Creation::Idle | Creation::InFlight(_) => None,
        };
        let judge = room.judge_at.filter(|_| !room.judging);
        let next = [creation, judge, room.sweep_at].into_iter().flatten().min();
        Some((&mut room.timer, next))
    }

    /// When the room's timer is set.
    pub(crate) fn timer_is(&self, id: RoomId) -> Option<Time> {
        self.get(id).and_then(|room| room.timer)
    }

    fn get(&self, id: RoomId) -> Option<&Room> {
        self.rooms.get(id.0 as usize)?.as_ref()
    }

    fn get_mut(&mut self, id: RoomId) -> Option<&mut Room> {
        self.rooms.get_mut(id.0 as usize)?.as_mut()
    }
}

/// What is due for a room.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Due {
    pub(crate) judge: bool,
    pub(crate) create: bool,
    pub(crate) sweep: bool,
}

impl Room {
    fn learn(&mut self, row: &RoomRow<'_>) {
        if row.departure_timeout > 0 {
            self.departure_timeout = u64::from(row.departure_timeout) * 1000;
        }
    }

    fn stands_as(&mut self, sid: &str, trouble: Option<Time>, now: Time) -> News {
        let mut news = News::None;
        match &self.sid {
            Some(known) if **known == *sid => {}
            Some(_) => {
                let fate = self.fate(trouble, now);
                self.end(fate, now);
                news = News::Judged;
            }
            None => {}
        }
        if self.sid.is_none() {
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

    /// How a room that is not there any more, or has another sid, must have gone.
    fn fate(&self, trouble: Option<Time>, asked: Time) -> Verdict {
        if self.finished {
            return Verdict::Ended;
        }
        let unreachable_since = match (trouble, self.stood) {
            (Some(trouble), Some(stood)) => trouble >= stood,
            (Some(_), None) => true,
            (None, Some(_) | None) => false,
        };
        let could_not_end = self
            .last_sighted
            .is_some_and(|sighted| asked.since(sighted) < self.departure_timeout.saturating_sub(LAG));
        if self.restored || unreachable_since || could_not_end {
            Verdict::Lost
        } else {
            Verdict::Ended
        }
    }

    fn end(&mut self, verdict: Verdict, now: Time) {
        if let Some(sid) = self.sid.take() {
            self.past.insert(0, (sid, verdict));
            self.past.truncate(REMEMBERED);
        }
        self.sid_since = now;
        self.missing = true;
        self.fate = verdict;
        self.restored = false;
    }
}

#[cfg(test)]
mod tests;
