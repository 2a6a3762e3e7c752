//! The SFU as it is known: who is there, which rooms stand, whether it answers; and who must be asked next. Pure.
//!
//! Facts come in, questions and findings go out. Whoever is kept in mind is a [`Participant`] of a [`Room`]; what a finding leads to
//! (a leave, a removal) is not known here.
//!
//! ```text
//! participant.rs   one participant: the session at hand, and whether somebody is there; the state chart is there
//! room.rs          one room: its sid, whether it stands, ended or was lost; when it is swept, checked and created again
//! health.rs        whether the SFU answers
//! event.rs         webhooks: repeats, and the SFU's clock
//! ```

mod event;
mod health;
mod participant;
mod room;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::iter;
use std::sync::Arc;
use std::time::Duration;

pub use event::{EventKind, SfuEvent};
pub use participant::{
    DepartureCause, DepartureEvidence, FRESH_MS, LOST_GRACE_MS, Next, Participant, Presence as State, SessionRecord, Suspicion,
};
pub use room::{Room, RoomStatus};

use crate::backoff::Jitter;
use crate::livekit::{Answer, ParticipantRow, Reach, RoomRow};
use crate::slab::{Id, Slab};
use crate::time::{Delay, Time};
use crate::timers::Timers;
use event::{Event, RecentEvents, SfuClock};
use health::{SfuHealth, TOGETHER_MS};
use participant::{Around, Effect};
use room::{Member, News, prefix};

/// While no webhook has been verified, rooms are swept at least this often (L9a).
const SWEEP_WITHOUT_WEBHOOKS_MS: u64 = 30_000;
/// Two sweeps of a room are this far apart at least.
const MIN_SWEEP_GAP_MS: u64 = 1_000;
/// After a start, the SFU has this long to tell something before its silence is worth a warning.
const WEBHOOKS_WITHIN_MS: u64 = 10_000;
/// Where so many of a room are asked about within so short a time, one list asks for all of them (L2a).
const BULK_QUERY_FROM: u32 = 3;
const BULK_QUERY_WITHIN_MS: u64 = 50;
/// Time for the answer to such a list.
const BULK_QUERY_TIMEOUT: Duration = Duration::from_millis(400);
/// Time for any other list.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);
/// Participants that are looked at in one go.
const AT_ONCE: usize = 16;
/// Rooms that are asked for in one call at most.
pub const MAX_ROOMS_PER_CALL: usize = 500;

/// The id of a participant that is kept in mind.
pub type ParticipantId = Id<Participant>;
/// The id of a room that is kept in mind.
pub type RoomId = Id<Room>;

/// Intervals between questions to the SFU.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Milliseconds between two sweeps of a room; `None` is `LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS=0` (L3, L9a).
    pub sweep_ms: Option<u64>,
    /// Milliseconds between two questions for all rooms; `None` switches L13 off.
    pub list_rooms_ms: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sweep_ms: Some(30_000),
            list_rooms_ms: Some(30_000),
        }
    }
}

/// A question to the SFU. Each is answered, whatever happens to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Question {
    /// A call of `GetParticipant`, answered by [`Presence::on_participant`].
    Participant {
        /// Participant that is asked about.
        participant: ParticipantId,
        /// When the question was asked; given back with the answer.
        asked: Time,
        /// Time for the answer.
        within: Duration,
    },
    /// A call of `ListParticipants`, answered by [`Presence::on_participants`].
    Participants {
        /// Room whose participants are listed.
        room: RoomId,
        /// When the question was asked; given back with the answer.
        asked: Time,
        /// Time for the answer.
        within: Duration,
    },
    /// A call of `ListRooms`, answered by [`Presence::on_rooms`].
    Rooms {
        /// Rooms to ask for, at most [`MAX_ROOMS_PER_CALL`].
        rooms: Vec<RoomId>,
        /// When the question was asked; given back with the answer.
        asked: Time,
    },
    /// `CreateRoom` with an `empty_timeout` of 60 s: [`Presence::on_created`].
    CreateRoom {
        /// Room to create.
        room: RoomId,
    },
    /// `GET` of the SFU's base address on a connection of its own, within a second: [`Presence::on_probed`].
    Probe,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Put a question to the SFU.
    Ask(Question),
    /// The stored part of a session has changed.
    Changed(ParticipantId),
    Present(ParticipantId),
    Gone(ParticipantId, DepartureEvidence),
    /// The first attempt to join failed for good; nobody was ever there.
    JoinFailed(ParticipantId),
    /// The SFU counts as silent now, or does so no more (L13a).
    Silent(bool),
    /// A warning: the SFU has been silent for that many milliseconds.
    SfuSilent(u64),
    /// A warning, once: no webhook came, so rooms are swept although that is switched off (L9a).
    NoWebhooks,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Timer {
    Participant(ParticipantId),
    Room(RoomId),
}

/// The SFU as it is known: rooms, participants, and whether it answers.
#[derive(Debug)]
pub struct Presence {
    settings: Settings,
    rooms: Slab<Room>,
    by_name: HashMap<Arc<str>, RoomId>,
    participants: Slab<Participant>,
    health: SfuHealth,
    clock: SfuClock,
    recent: RecentEvents,
    timers: Timers<Timer>,
    jitter: Jitter,
    webhooks_work: bool,
    /// When to warn that no webhook came; `None` once that was done.
    warn_at: Option<Time>,
    stopping: bool,
    /// Rooms in which somebody is thought to be.
    occupied: usize,
    /// Participants whose reported departure is being looked into.
    reported: usize,
    /// Rooms to be asked for together.
    checks: Vec<RoomId>,
    out: Vec<Output>,
}

impl Presence {
    pub fn new(settings: Settings, seed: u64, now: Time) -> Self {
        Self {
            health: SfuHealth::new(settings.list_rooms_ms, now),
            settings,
            rooms: Slab::default(),
            by_name: HashMap::new(),
            participants: Slab::default(),
            clock: SfuClock::default(),
            recent: RecentEvents::default(),
            timers: Timers::default(),
            jitter: Jitter::new(seed),
            webhooks_work: false,
            warn_at: Some(now.after(WEBHOOKS_WITHIN_MS)),
            stopping: false,
            occupied: 0,
            reported: 0,
            checks: Vec::new(),
            out: Vec::new(),
        }
    }

    // --- whom to keep in mind ---

    /// The participant of a room and identity, as far as it is kept in mind.
    pub fn find(&self, room: &str, identity: &str) -> Option<ParticipantId> {
        self.place(*self.by_name.get(room)?, identity).ok()
    }

    pub fn get(&self, id: ParticipantId) -> Option<&Participant> {
        self.participants.get(id)
    }

    pub fn room_name(&self, room: RoomId) -> Option<&Arc<str>> {
        self.rooms.get(room).map(|room| &room.name)
    }

    pub fn room_of(&self, id: ParticipantId) -> Option<&Arc<str>> {
        self.room_name(self.participants.get(id)?.room)
    }

    /// Whether nobody's reported departure is being looked into: a stopping service waits for those (L12).
    pub const fn is_at_rest(&self) -> bool {
        self.reported == 0
    }

    /// Keeps a participant in mind from a delegation on that arrived then, of an event with that delay; asks about whoever is not
    /// known to be there.
    pub fn track(&mut self, room: &str, identity: &str, arrived: Time, delay: Delay, now: Time) -> ParticipantId {
        let room = self.enter(room, now);
        match self.place(room, identity) {
            Ok(id) => {
                self.with(id, now, |participant, around, _| participant.delegated(arrived, delay, around.now));
                id
            }
            Err(place) => {
                let id = self.participants.insert(Participant::new(room, identity, arrived, delay));
                if let Some(room) = self.rooms.get_mut(room) {
                    let prefix = prefix(identity);
                    room.members.insert(place, Member { prefix, id });
                }
                self.sync(id, false, false, now);
                id
            }
        }
    }

    /// Takes over what was stored of a participant that was just tracked (L11). Where the SFU is known not to have gone down since somebody
    /// else looked after them, a room that is missing has ended, and was not lost.
    pub fn restore(&mut self, id: ParticipantId, stored: &SessionRecord<'_>, continuous: bool, now: Time) {
        let Some(room) = self
            .participants
            .get(id)
            .and_then(|participant| self.rooms.get_mut(participant.room))
        else {
            return;
        };
        let room_sid = stored.room_sid.map(|sid| room.intern(sid));
        let news = match &room_sid {
            Some(sid) if stored.room_over => room.restore_over(sid, now),
            Some(_) | None => {
                room.restore(room_sid.as_ref(), stored.last_sighted, continuous, now);
                News::Same
            }
        };
        self.with(id, now, |participant, around, _| participant.restore(stored, room_sid, around.now));
        let Some(room) = self.participants.get(id).map(|participant| participant.room) else {
            return;
        };
        if stored.seen {
            if let Some(room) = self.rooms.get_mut(room) {
                room.sweep_soon(now.after(TOGETHER_MS));
            }
            self.health.list_soon(now);
        }
        self.spread(room, news, false, Time::EARLIEST, now);
    }

    /// Forgets a participant, and its room with the last one.
    pub fn forget(&mut self, id: ParticipantId, now: Time) {
        let Some(participant) = self.participants.get(id) else { return };
        let (room, was_swept, was_reported) = (participant.room, participant.is_swept(), participant.is_reported());
        self.count(room, (was_swept, false), (was_reported, false), now);
        self.participants.remove(id);
        let Some(found) = self.rooms.get_mut(room) else { return };
        found.members.retain(|member| member.id != id);
        if found.members.is_empty()
            && let Some(room) = self.rooms.remove(room)
        {
            self.by_name.remove(&room.name);
            if self.by_name.capacity() > 4 * self.by_name.len() + 64 {
                self.by_name.shrink_to(2 * self.by_name.len());
            }
        }
    }

    /// Until when somebody is waited for, and the delay of the event that runs out then.
    pub fn waits_until(&mut self, id: ParticipantId, ends: Time, delay: Delay) {
        if let Some(participant) = self.participants.get_mut(id) {
            participant.waits_until(ends, delay);
        }
    }

    /// Sweeps a participant's room soon: somebody else may know more of a departure than is told here.
    pub fn sweep_soon(&mut self, id: ParticipantId, now: Time) {
        let room = self.participants.get(id).map(|participant| participant.room);
        let Some(room) = room.filter(|_| !self.stopping) else { return };
        if let Some(room) = self.rooms.get_mut(room) {
            room.sweep_soon(now.after(TOGETHER_MS));
        }
        self.sync_room(room);
    }

    /// Asks again about somebody, since what is known has grown old (L5a).
    pub fn confirm(&mut self, id: ParticipantId, now: Time) {
        self.with(id, now, |participant, around, _| participant.confirm(around.now));
    }

    // --- facts ---

    pub fn on_event(&mut self, event: &SfuEvent<'_>, now: Time) {
        let happened = self.clock.place(event.created_at, now);
        self.clock.learn(event.issued_at, now);
        self.webhooks_work = true;
        self.health.on_webhook(now);
        // What is told of somebody who is not known yet counts when it is told again.
        let is_known = if event.identity.is_empty() {
            self.by_name.contains_key(event.room)
        } else {
            self.find(event.room, event.identity).is_some()
        };
        if is_known && self.recent.is_repeat(event, now) {
            return;
        }
        let Some(&id) = self.by_name.get(event.room) else { return };
        let trouble = self.health.last_trouble();
        let Some(room) = self.rooms.get_mut(id) else { return };
        let departs = matches!(event.kind, EventKind::Left(_) | EventKind::Aborted(_));
        let other = room.sid.as_ref().is_some_and(|known| **known != *event.room_sid);
        if event.kind == EventKind::RoomFinished {
            return self.on_finished(id, event.room_sid, now);
        }
        if !event.room_sid.is_empty() {
            if room.is_of_former(event.room_sid, happened) || (other && departs) {
                return;
            }
            let somebody = !event.identity.is_empty() && !departs;
            let sighted = somebody.then(|| happened.unwrap_or(now));
            let news = room.on_event(event.room_sid, happened, sighted, trouble, now);
            self.spread(id, news, false, now, now);
        }
        let Some(participant) = self.find(event.room, event.identity) else {
            return;
        };
        let room_sid = (!event.room_sid.is_empty()).then(|| self.rooms.get(id).map(|room| room.intern(event.room_sid)));
        let about = Event {
            sid: event.sid,
            joined_at_ms: event.joined_at_ms,
            happened,
            room_sid: room_sid.flatten(),
        };
        self.with(participant, now, |participant, around, out| match event.kind {
            EventKind::Joined => participant.on_joined(&about, around, out),
            EventKind::Left(reason) => participant.on_left(&about, reason, around, out),
            EventKind::Aborted(reason) => participant.on_aborted(&about, reason, around, out),
            EventKind::RoomStarted | EventKind::RoomFinished | EventKind::Track | EventKind::Other => {}
        });
    }

    /// Takes in an event from before this node watched. Where somebody is waited for, it may be about the session before the delegation,
    /// which is known here from the record only: then it is asked about, not believed.
    pub fn on_past_event(&mut self, event: &SfuEvent<'_>, now: Time) {
        let happened = self.clock.place(event.created_at, now);
        let participant = self.find(event.room, event.identity);
        let about = participant.and_then(|id| Some((id, self.participants.get(id)?)));
        if let Some((id, _)) = about.filter(|(_, participant)| participant.may_be_of_before(event, happened)) {
            return self.with(id, now, |participant, around, out| participant.ask_now(around.now, out));
        }
        match event.kind {
            EventKind::Joined | EventKind::Left(_) | EventKind::Aborted(_) | EventKind::RoomFinished => self.on_event(event, now),
            EventKind::RoomStarted | EventKind::Track | EventKind::Other => {}
        }
    }

    fn on_finished(&mut self, id: RoomId, sid: &str, now: Time) {
        let Some(room) = self.rooms.get_mut(id) else { return };
        // Without a sid it is about the room at hand.
        let sid = if sid.is_empty() { room.sid.clone() } else { Some(sid.into()) };
        let news = room.on_finished(sid.as_deref().unwrap_or_default(), now);
        // It says nothing of the room that may stand by now.
        self.spread(id, news, false, Time::EARLIEST, now);
    }

    /// The SFU's clock showed these seconds when it answered, not long before `now`.
    pub fn on_date(&mut self, seconds: i64, now: Time) {
        self.clock.learn(seconds, now);
    }

    pub fn on_participant(&mut self, id: ParticipantId, asked: Time, answer: &Answer<ParticipantRow<'_>>, now: Time) {
        self.health.on_call(answer.reach(), now);
        let Some(room) = self.participants.get(id).map(|participant| participant.room) else {
            return;
        };
        if let (Answer::Yes(_), Some(room)) = (answer, self.rooms.get_mut(room)) {
            room.on_seen(asked, now);
        }
        self.with(id, now, |participant, around, out| {
            participant.on_answered();
            match answer {
                Answer::Yes(row) => participant.on_yes(row, asked, around, out),
                Answer::No => participant.on_no(asked, false, around, out),
                Answer::Refused | Answer::TooLarge | Answer::Unclear | Answer::TimedOut | Answer::Unreachable => {
                    participant.on_unclear(asked, around);
                }
            }
        });
        self.plan_sweep(room, now);
    }

    pub fn on_participants(&mut self, id: RoomId, asked: Time, answer: &Answer<&[ParticipantRow<'_>]>, now: Time) {
        self.health.on_call(answer.reach(), now);
        let Some(room) = self.rooms.get_mut(id) else { return };
        room.on_swept();
        if let Some(rows) = answer.yes() {
            room.on_sighting((!rows.is_empty()).then_some(asked));
            self.read_list(id, asked, rows, now);
        } else {
            // It may only have come late.
            let late = matches!(answer, Answer::TimedOut | Answer::Unreachable | Answer::Unclear);
            room.on_no_list(now, late);
            self.with_all(id, now, |participant, around, out| {
                participant.on_no_list(asked, around.now);
                if !late {
                    participant.on_sweep(out);
                }
            });
        }
        self.plan_sweep(id, now);
    }

    fn read_list(&mut self, id: RoomId, asked: Time, rows: &[ParticipantRow<'_>], now: Time) {
        // Members are in the order of their identities; a large room has too many rows for a map to be made of them.
        let mut rows: Vec<_> = rows.iter().collect();
        rows.sort_by_key(|row| row.identity);
        let is_empty = rows.is_empty();
        let mut rows = rows.into_iter().peekable();
        self.with_all(id, now, |participant, around, out| {
            let identity = participant.identity();
            while rows.next_if(|row| row.identity < identity).is_some() {}
            match iter::from_fn(|| rows.next_if(|row| row.identity == identity)).last() {
                Some(row) => participant.on_yes(row, asked, around, out),
                None if is_empty => participant.on_empty_list(asked, around, out),
                None => participant.on_no(asked, true, around, out),
            }
        });
    }

    pub fn on_rooms(&mut self, ids: &[RoomId], asked: Time, answer: &Answer<&[RoomRow<'_>]>, now: Time) {
        self.health.on_call(answer.reach(), now);
        let rows = answer.yes().copied().unwrap_or_default();
        let rows: HashMap<&str, &RoomRow<'_>> = rows.iter().map(|row| (row.name, row)).collect();
        let trouble = self.health.last_trouble();
        for &id in ids {
            let Some(room) = self.rooms.get_mut(id) else { continue };
            match answer {
                Answer::Yes(_) => {
                    let row = rows.get(&*room.name).copied();
                    let is_awaited = room.is_awaited();
                    let news = room.on_listed(row, asked, trouble, now);
                    if row.is_none() && news == News::Changed {
                        self.health.rooms_were_lost();
                    }
                    self.spread(id, news, is_awaited, asked, now);
                }
                Answer::Refused => {
                    room.on_list_refused();
                    self.with_all(id, now, |participant, around, out| {
                        if participant.room_decides() {
                            participant.on_room(RoomStatus::Open, around.now, around, out);
                        }
                    });
                }
                Answer::No | Answer::TooLarge | Answer::Unclear | Answer::TimedOut | Answer::Unreachable => {
                    room.on_not_listed(now, &mut self.jitter);
                }
            }
            self.sync_room(id);
        }
    }

    pub fn on_created(&mut self, id: RoomId, answer: &Answer<RoomRow<'_>>, now: Time) {
        self.health.on_call(answer.reach(), now);
        let trouble = self.health.last_trouble();
        let Some(room) = self.rooms.get_mut(id) else { return };
        let news = room.on_created(answer.yes(), trouble, now, &mut self.jitter);
        self.spread(id, news, false, now, now);
    }

    pub fn on_probed(&mut self, reach: Reach, now: Time) {
        self.health.on_probe(reach, now);
    }

    /// The probe's own connection was closed.
    pub fn on_probe_closed(&mut self, now: Time) {
        self.health.on_closed(now);
    }

    /// Takes in that this process stood still: what was about to be concluded is asked about first (L5a).
    pub fn on_woke(&mut self, now: Time) {
        for id in self.participants.iter().map(|(id, _)| id).collect::<Vec<_>>() {
            self.with(id, now, |participant, around, _| participant.woke(around.now));
        }
    }

    /// The service is stopping: nobody is looked for any more but those who were reported gone (L12).
    pub fn on_stopping(&mut self) {
        self.stopping = true;
    }

    // --- time ---

    pub fn next_deadline(&mut self) -> Option<Time> {
        let timer = self.next_timer().map(|(at, _)| at);
        [timer, self.health.next_deadline()].into_iter().flatten().min()
    }

    /// Does what is due, and hands over what was asked and found since the last time.
    pub fn settle(&mut self, now: Time) -> Vec<Output> {
        self.run_timers(now);
        self.health.need(self.occupied > 0 && !self.stopping, now);
        if self.participants.is_empty() {
            self.health.rest();
        }
        let mut due = Vec::new();
        self.health.settle(now, &mut due);
        for due in due {
            match due {
                health::Due::Probe => self.out.push(Output::Ask(Question::Probe)),
                health::Due::ListRooms => {
                    // Beside those that are being asked for already.
                    let occupied = self.rooms.iter().filter(|(_, room)| room.swept > 0);
                    self.checks.extend(occupied.map(|(id, _)| id));
                    self.checks.sort_unstable();
                    self.checks.dedup();
                }
                health::Due::Warn(millis) => self.out.push(Output::SfuSilent(millis)),
                health::Due::Silent(silent) => self.out.push(Output::Silent(silent)),
                health::Due::Answering => {
                    let lost = self
                        .participants
                        .iter()
                        .filter(|(_, found)| matches!(found.next(), Some(Next::Grace(_))));
                    for id in lost.map(|(id, _)| id).collect::<Vec<_>>() {
                        self.with(id, now, |_, _, _| {});
                    }
                }
            }
        }
        self.run_timers(now);
        let checks = std::mem::take(&mut self.checks);
        for rooms in checks.chunks(MAX_ROOMS_PER_CALL) {
            for &id in rooms {
                if let Some(room) = self.rooms.get_mut(id) {
                    room.checking();
                }
                self.sync_room(id);
            }
            let rooms = rooms.to_vec();
            self.out.push(Output::Ask(Question::Rooms { rooms, asked: now }));
        }
        std::mem::take(&mut self.out)
    }

    fn run_timers(&mut self, now: Time) {
        while let Some((at, timer)) = self.next_timer()
            && at <= now
        {
            self.timers.pop();
            match timer {
                Timer::Participant(id) => {
                    if let Some(participant) = self.participants.get_mut(id) {
                        participant.timer = None;
                    }
                    if !self.ask_together(id, now) {
                        self.with(id, now, |participant, around, out| participant.on_time(around, out));
                    }
                }
                Timer::Room(id) => {
                    if let Some(room) = self.rooms.get_mut(id) {
                        room.timer = None;
                    }
                    self.settle_room(id, now);
                }
            }
        }
    }

    /// Asks about several of a room by one list, where several departures were reported (L2a).
    fn ask_together(&mut self, id: ParticipantId, now: Time) -> bool {
        let Some(participant) = self.participants.get(id).filter(|participant| participant.is_reported()) else {
            return false;
        };
        let id = participant.room;
        let Some(room) = self.rooms.get(id) else { return false };
        if room.reported < BULK_QUERY_FROM || !room.takes_lists(now) {
            return false;
        }
        let soon = now.after(BULK_QUERY_WITHIN_MS);
        let asked: Vec<_> = room
            .members
            .iter()
            .map(|member| member.id)
            .filter(|&id| {
                let found = self.participants.get(id);
                found.is_some_and(|found| found.is_reported() && found.asks_by(soon))
            })
            .collect();
        if asked.len() < BULK_QUERY_FROM as usize {
            return false;
        }
        for id in asked {
            self.with(id, now, |participant, around, _| participant.asking(around.now));
        }
        self.out.push(Output::Ask(Question::Participants {
            room: id,
            asked: now,
            within: BULK_QUERY_TIMEOUT,
        }));
        true
    }

    fn settle_room(&mut self, id: RoomId, now: Time) {
        let Some(room) = self.rooms.get_mut(id) else { return };
        let due = room.settle(now);
        if due.check {
            self.checks.push(id);
        }
        if due.create {
            self.out.push(Output::Ask(Question::CreateRoom { room: id }));
        }
        if due.sweep {
            self.sweep(id, now);
        }
        self.sync_room(id);
    }

    fn sweep(&mut self, id: RoomId, now: Time) {
        if self.settings.sweep_ms.is_none() && !self.webhooks_work && self.warn_at.is_some_and(|at| at <= now) {
            self.warn_at = None;
            self.out.push(Output::NoWebhooks);
        }
        let Some(room) = self.rooms.get_mut(id) else { return };
        if room.swept > 1 && room.takes_lists(now) {
            room.sweeping();
            self.out.push(Output::Ask(Question::Participants {
                room: id,
                asked: now,
                within: LIST_TIMEOUT,
            }));
        } else {
            self.with_all(id, now, |participant, _, out| participant.on_sweep(out));
            self.plan_sweep(id, now);
        }
    }

    /// Spreads the sweeps of the rooms over the interval; each keeps its place from then on.
    fn plan_sweep(&mut self, id: RoomId, now: Time) {
        let Some(room) = self.rooms.get_mut(id) else { return };
        let every = match self.settings.sweep_ms {
            Some(every) => Some(every.max(MIN_SWEEP_GAP_MS)),
            None if self.webhooks_work => None,
            None => Some(SWEEP_WITHOUT_WEBHOOKS_MS),
        };
        if let Some(every) = every
            && room.needs_sweep()
            && !self.stopping
        {
            let first = MIN_SWEEP_GAP_MS + self.jitter.up_to(every - MIN_SWEEP_GAP_MS);
            room.plan_sweep(now.after(first), now.after(every));
        }
        self.sync_room(id);
    }

    // --- the parts together ---

    /// Tells those in a room what an answer to a question of that moment means for each of them; some may have waited for it.
    fn spread(&mut self, id: RoomId, news: News, is_awaited: bool, asked: Time, now: Time) {
        let Some(room) = self.rooms.get(id) else { return };
        // Most webhooks and most lists say what is known: a large room is not gone through for them.
        if news == News::Same && !is_awaited {
            return self.sync_room(id);
        }
        for member in room.members.clone() {
            let (Some(room), Some(participant)) = (self.rooms.get(id), self.participants.get(member.id)) else {
                continue;
            };
            let decides = participant.room_decides();
            let status = self.status(room, participant);
            self.with(member.id, now, |participant, around, out| match news {
                News::Changed => participant.on_room(status, asked, around, out),
                News::Same | News::Empty if decides => participant.on_room(status, asked, around, out),
                News::Empty => participant.on_sweep(out),
                News::Same => {}
            });
        }
        self.sync_room(id);
    }

    fn status(&self, room: &Room, participant: &Participant) -> RoomStatus {
        let status = room.status(participant.room_sid.as_ref(), participant.last_sighted, self.health.last_trouble());
        // Where lost rooms are not looked for, nobody creates them again: nothing is known of them but that they are not there.
        if status == RoomStatus::Lost && !self.health.is_on() {
            RoomStatus::Closed
        } else {
            status
        }
    }

    /// Lets a fact happen to everybody in a room, in the order of their identities.
    fn with_all(&mut self, id: RoomId, now: Time, mut happens: impl FnMut(&mut Participant, &mut Around<'_>, &mut Vec<Effect>)) {
        let members = self.rooms.get(id).map(|room| room.members.clone()).unwrap_or_default();
        for some in members.chunks(AT_ONCE) {
            // Each is far away in memory where there are many: looked at in one go, they are waited for together.
            let near = some.iter().filter_map(|member| self.participants.get(member.id));
            std::hint::black_box(near.filter(|participant| participant.is_swept()).count());
            for member in some {
                self.with(member.id, now, &mut happens);
            }
        }
    }

    /// Lets a fact happen to a participant, and brings everything around it in line.
    fn with(&mut self, id: ParticipantId, now: Time, happens: impl FnOnce(&mut Participant, &mut Around<'_>, &mut Vec<Effect>)) {
        let Some((participant, room)) = self
            .participants
            .get(id)
            .and_then(|participant| Some((participant, self.rooms.get(participant.room)?)))
        else {
            return;
        };
        let (was_swept, was_reported) = (participant.is_swept(), participant.is_reported());
        let room_closed = self.status(room, participant) == RoomStatus::Closed;
        let mut around = Around {
            now,
            answering_ms: self.health.answering_ms(now),
            sweep_ms: self.settings.sweep_ms.unwrap_or(SWEEP_WITHOUT_WEBHOOKS_MS).max(MIN_SWEEP_GAP_MS),
            webhooks_work: self.webhooks_work,
            room_sid: room.sid.clone(),
            room_closed,
            room_finished: room.finished,
            jitter: &mut self.jitter,
        };
        let mut effects = Vec::new();
        if let Some(participant) = self.participants.get_mut(id) {
            happens(participant, &mut around, &mut effects);
        }
        for effect in effects {
            let output = match effect {
                Effect::Ask { within } => Output::Ask(Question::Participant {
                    participant: id,
                    asked: now,
                    within,
                }),
                Effect::CheckRoom => {
                    let room = self.participants.get(id).map(|participant| participant.room);
                    if let Some(room) = room.and_then(|id| self.rooms.get_mut(id)) {
                        room.want_check(now);
                    }
                    continue;
                }
                Effect::Changed => Output::Changed(id),
                Effect::Present => Output::Present(id),
                Effect::Gone(evidence) => Output::Gone(id, evidence),
                Effect::JoinFailed => Output::JoinFailed(id),
            };
            self.out.push(output);
        }
        self.sync(id, was_swept, was_reported, now);
    }

    /// Brings counts and timers in line with what a participant is now.
    fn sync(&mut self, id: ParticipantId, was_swept: bool, was_reported: bool, now: Time) {
        let (answering, answering_ms) = (self.health.is_answering(), self.health.answering_ms(now));
        let Some(participant) = self.participants.get_mut(id) else { return };
        let next = participant.next_deadline(now, answering, answering_ms);
        self.timers.set(&mut participant.timer, next, Timer::Participant(id));
        let (room, swept, reported) = (participant.room, participant.is_swept(), participant.is_reported());
        self.count(room, (was_swept, swept), (was_reported, reported), now);
        self.sync_room(room);
    }

    fn count(&mut self, id: RoomId, swept: (bool, bool), reported: (bool, bool), now: Time) {
        let Some(room) = self.rooms.get_mut(id) else { return };
        match reported {
            (false, true) => (room.reported, self.reported) = (room.reported + 1, self.reported + 1),
            (true, false) => (room.reported, self.reported) = (room.reported - 1, self.reported - 1),
            (false, false) | (true, true) => {}
        }
        match swept {
            (false, true) => {
                room.swept += 1;
                if room.swept == 1 {
                    self.occupied += 1;
                }
                self.plan_sweep(id, now);
            }
            (true, false) => {
                room.swept -= 1;
                if room.swept == 0 {
                    room.is_left();
                    self.occupied -= 1;
                }
            }
            (false, false) | (true, true) => {}
        }
    }

    fn sync_room(&mut self, id: RoomId) {
        let Some(room) = self.rooms.get_mut(id) else { return };
        let next = room.next_deadline();
        self.timers.set(&mut room.timer, next, Timer::Room(id));
    }

    fn next_timer(&mut self) -> Option<(Time, Timer)> {
        let things = self.participants.len() + self.rooms.len();
        self.timers.first(things, |timer| match timer {
            Timer::Participant(id) => self.participants.get(id).and_then(|participant| participant.timer),
            Timer::Room(id) => self.rooms.get(id).and_then(|room| room.timer),
        })
    }

    fn enter(&mut self, name: &str, now: Time) -> RoomId {
        if let Some(&id) = self.by_name.get(name) {
            return id;
        }
        let name: Arc<str> = name.into();
        let id = self.rooms.insert(Room::new(Arc::clone(&name), now));
        self.by_name.insert(name, id);
        id
    }

    /// Finds the participant of a room with that identity, or the place among the members that is free for it.
    fn place(&self, room: RoomId, identity: &str) -> Result<ParticipantId, usize> {
        let members = self.rooms.get(room).map_or(&[][..], |room| &room.members);
        let wanted = prefix(identity);
        let place = members.binary_search_by(|member| {
            let by_identity = || {
                let member = self.participants.get(member.id);
                member.map_or(Ordering::Less, |member| member.identity().cmp(identity))
            };
            member.prefix.cmp(&wanted).then_with(by_identity)
        })?;
        Ok(members[place].id)
    }
}

#[cfg(test)]
mod tests;
