//! A small world around the core: an SFU and homeservers in memory, and a clock that jumps from one moment to the next.

#![allow(dead_code, reason = "each test binary uses its part")]

use lk_jwt_service::internals::backoff::Jitter;
use lk_jwt_service::internals::core::{Action, Core, Delegation, Fact, Settings};
use lk_jwt_service::internals::delayed_event::{DelayedEventAction, Outcome};
use lk_jwt_service::internals::delayed_leave::Returned;
use lk_jwt_service::internals::delayed_leave::{CapacityError, Delegated, FinishReason, Handover, HomeserverId, LeaveId, Phase};
use lk_jwt_service::internals::livekit::{Answer, DisconnectReason, ParticipantRow, Reach, RoomRow};
use lk_jwt_service::internals::presence::{EventKind, ParticipantId, Question, RoomId, SfuEvent, State};
use lk_jwt_service::internals::store::JobRecord;
use lk_jwt_service::internals::time::{Delay, Time, WallClock};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

/// What the wall clock shows when the world begins, in milliseconds since 1970.
const WALL: i64 = 1_700_000_000_000;

#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) sid: String,
    pub(super) joined_at_ms: u64,
    pub(super) active: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct SimRoom {
    pub(super) sid: String,
    pub(super) guests: BTreeMap<String, Guest>,
    pub(super) empty_since: Option<Time>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Scheduled { fires: Time },
    Fired(Time),
    Sent(Time),
    Cancelled(Time),
}

/// An event as it is told.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) kind: EventKind,
    pub(super) digest: u64,
    pub(super) issued_at: i64,
    pub(super) id: String,
    pub(super) created_at: i64,
    pub(super) room: String,
    pub(super) room_sid: String,
    pub(super) identity: String,
    pub(super) sid: String,
    pub(super) joined_at_ms: u64,
}

enum Pending {
    Participant {
        participant: ParticipantId,
        asked: Time,
        lost: bool,
    },
    Participants {
        room: RoomId,
        asked: Time,
    },
    Rooms {
        rooms: Vec<RoomId>,
        asked: Time,
    },
    Create {
        room: RoomId,
    },
    Webhook(Told),
    Probe,
    Arrive {
        leave: LeaveId,
        /// As it was when the call was made: the leave may be over when the call arrives.
        delay_id: Option<String>,
        homeserver: HomeserverId,
        action: DelayedEventAction,
        sent: Time,
    },
    Answer {
        leave: LeaveId,
        homeserver: HomeserverId,
        action: DelayedEventAction,
        sent: Time,
        outcome: Outcome,
    },
}

pub(super) struct World {
    settings: Settings,
    store: BTreeMap<(String, String), JobRecord<'static>>,
    pub(super) has_store: bool,
    pub(super) now: Time,
    pub(super) core: Core,
    pending: BTreeMap<(Time, u64), Pending>,
    serial: u64,
    pub(super) sfu_up: bool,
    pub(super) sfu_hangs: bool,
    pub(super) sfu_errors: bool,
    /// What calls of that name bring instead of the SFU's answer: a proxy's page, a refusal.
    pub(super) instead: BTreeMap<&'static str, Answer<()>>,
    /// Every second call reaches a backend that is dead.
    pub(super) half_dead: bool,
    /// How far ahead the clock of the SFU's node is that tells of things, in milliseconds.
    pub(super) sfu_ahead: i64,
    pub(super) latency: u64,
    pub(super) rooms: BTreeMap<String, SimRoom>,
    pub(super) next_sid: VecDeque<String>,
    sids: u64,
    pub(super) events: BTreeMap<String, (Fate, Delay)>,
    pub(super) homeserver_latency: u64,
    pub(super) homeserver_down: bool,
    /// What every call brings instead of the homeserver's answer: a page, a 503 with a hint.
    pub(super) homeserver_instead: Option<Outcome>,
    /// So many of the next calls get lost: they end after ten seconds.
    pub(super) silent_calls: u32,
    /// Homeservers that hold each call for so long.
    pub(super) holds: BTreeMap<String, u64>,
    pub(super) send_latency: Option<u64>,
    /// Tokens left, tokens per second: Synapse's limiter.
    pub(super) limiter: Option<(f64, f64, f64, Time)>,
    pub(super) calls: Vec<(Time, LeaveId, String, DelayedEventAction, Outcome)>,
    pub(super) finished: Vec<(Time, String, FinishReason)>,
    pub(super) created: Vec<(Time, String)>,
    pub(super) sfu_calls: BTreeMap<&'static str, u32>,
    /// When `GetParticipant` was called.
    pub(super) looked_up: Vec<Time>,
    /// The last `ListParticipants`.
    pub(super) last_list: Option<(RoomId, Time)>,
    pub(super) warnings: u32,
    pub(super) webhook_delay: u64,
    pub(super) webhooks_twice: bool,
    /// Webhooks leave out what other programs leave out: `createdAt`, both sids, ids of their own.
    pub(super) webhooks_bare: bool,
    pub(super) chance: Jitter,
    /// One answer in so many is lost.
    pub(super) lossy: Option<u64>,
}

impl World {
    pub(super) fn new(settings: Settings, seed: u64) -> Self {
        Self {
            settings,
            store: BTreeMap::new(),
            has_store: true,
            now: Time::START,
            core: Core::new(settings, seed, Time::START),
            pending: BTreeMap::new(),
            serial: 0,
            sfu_up: true,
            sfu_hangs: false,
            sfu_errors: false,
            instead: BTreeMap::new(),
            half_dead: false,
            sfu_ahead: 0,
            latency: 5,
            rooms: BTreeMap::new(),
            next_sid: VecDeque::new(),
            sids: 0,
            events: BTreeMap::new(),
            homeserver_latency: 20,
            homeserver_down: false,
            homeserver_instead: None,
            silent_calls: 0,
            holds: BTreeMap::new(),
            send_latency: None,
            limiter: None,
            calls: Vec::new(),
            finished: Vec::new(),
            created: Vec::new(),
            sfu_calls: BTreeMap::new(),
            looked_up: Vec::new(),
            last_list: None,
            warnings: 0,
            webhook_delay: 0,
            webhooks_twice: false,
            webhooks_bare: false,
            chance: Jitter::new(seed ^ 0x5eed),
            lossy: None,
        }
    }

    pub(super) fn at(millis: u64) -> Time {
        Time::START.after(millis)
    }

    pub(super) fn delegate(&mut self, room: &str, identity: &str, delay_id: &str, delay_ms: u64) -> Result<Delegated, CapacityError> {
        let user = format!("@{identity}");
        self.delegate_of(&user, "hs.example", room, identity, delay_id, delay_ms, self.now)
    }

    /// Of any user and homeserver; the operator listed hs.example and nobody else.
    #[expect(clippy::too_many_arguments, reason = "as many as a delegation has")]
    pub(super) fn delegate_of(
        &mut self,
        user: &str,
        homeserver: &str,
        room: &str,
        identity: &str,
        delay_id: &str,
        delay_ms: u64,
        arrived: Time,
    ) -> Result<Delegated, CapacityError> {
        let delay = Delay::from_millis(delay_ms).unwrap();
        self.events.entry(delay_id.into()).or_insert_with(|| {
            let fires = self.now.after(delay_ms);
            (Fate::Scheduled { fires }, delay)
        });
        let delegation = Delegation {
            room,
            identity,
            handover: Handover {
                user,
                homeserver,
                delay_id,
                delay,
                arrived,
                listed: homeserver == "hs.example",
                as_user: false,
            },
        };
        let (delegated, actions) = self.core.delegate(&delegation, self.now)?;
        self.run(actions);
        Ok(delegated)
    }

    /// The wall clock and the core's.
    pub(super) fn clocks(&self) -> WallClock {
        WallClock::new(Time::START, WALL)
    }

    /// What the SFU's clock shows, in whole seconds.
    pub(super) fn seconds(&self, at: Time) -> i64 {
        (self.clocks().unix_millis(at) + self.sfu_ahead).div_euclid(1_000)
    }

    pub(super) fn fact(&mut self, fact: Fact<'_>) {
        let actions = self.core.handle(fact, self.now);
        self.run(actions);
    }

    pub(super) fn advance_to(&mut self, until: Time) {
        let mut spins = 0;
        loop {
            let timer = self.core.next_deadline();
            let result = self.pending.first_key_value().map(|(&(at, _), _)| at);
            let Some(next) = [timer, result].into_iter().flatten().min().filter(|&next| next <= until) else {
                break;
            };
            let next = next.max(self.now);
            spins = if next == self.now { spins + 1 } else { 0 };
            assert!(spins < 100_000, "no progress at {:?}: {timer:?}", self.now);
            self.now = next;
            if result.is_some_and(|at| at <= next) {
                let (_, pending) = self.pending.pop_first().unwrap();
                self.resolve(pending);
            } else {
                self.fact(Fact::Time);
            }
        }
        self.now = self.now.max(until);
    }

    pub(super) fn advance(&mut self, millis: u64) {
        self.advance_to(self.now.after(millis));
    }

    /// This process stands still for so long. Its clock goes on, or it stops as it does on a suspended host.
    pub(super) fn stand_still(&mut self, millis: u64, clock_stops: bool) {
        if clock_stops {
            for (fate, _) in self.events.values_mut() {
                if let Fate::Scheduled { fires } = fate {
                    *fires = fires.before(millis);
                }
            }
        } else {
            self.now = self.now.after(millis);
        }
        self.fact(Fact::Woke(if clock_stops { millis } else { 0 }));
    }

    pub(super) fn fate(&self, delay_id: &str) -> Fate {
        match self.events[delay_id].0 {
            Fate::Scheduled { fires } if fires <= self.now => Fate::Fired(fires),
            fate @ (Fate::Scheduled { .. } | Fate::Fired(_) | Fate::Sent(_) | Fate::Cancelled(_)) => fate,
        }
    }

    pub(super) fn count(&self, call: DelayedEventAction, delay_id: &str) -> usize {
        self.calls
            .iter()
            .filter(|(_, _, id, made, _)| *made == call && id == delay_id)
            .count()
    }

    fn later(&mut self, after: u64, pending: Pending) {
        self.serial += 1;
        self.pending.insert((self.now.after(after), self.serial), pending);
    }

    pub(super) fn run(&mut self, actions: Vec<Action>) {
        agree(&self.core);
        for action in actions {
            match action {
                Action::Ask(question) => self.ask(question),
                Action::Call {
                    leave,
                    homeserver,
                    action,
                    sent,
                } => {
                    assert_eq!(sent, self.now);
                    let arrive = Pending::Arrive {
                        leave,
                        delay_id: self.core.leaves().get(leave).map(|job| job.delay_id().to_owned()),
                        homeserver,
                        action,
                        sent,
                    };
                    let latency = self.latency_of(homeserver, action);
                    if self.silent_calls > 0 {
                        self.silent_calls -= 1;
                        let outcome = Outcome::Transient(None);
                        self.later(
                            10_000,
                            Pending::Answer {
                                leave,
                                homeserver,
                                action,
                                sent,
                                outcome,
                            },
                        );
                    } else {
                        self.later(latency / 2, arrive);
                    }
                }
                Action::Store(leave) => {
                    if let Some(record) = self.core.record(leave, &self.clocks()).filter(|_| self.has_store) {
                        let (field, value) = (record.field(), record.value());
                        let key = (record.room.to_string(), record.identity.to_string());
                        let stored = JobRecord::read(field.as_bytes(), value.as_bytes()).unwrap();
                        self.store.insert(key, stored);
                    }
                }
                Action::Forget(room, identity) => {
                    self.store.remove(&(room.to_string(), identity.to_string()));
                }
                Action::Finished { delay_id, reason, .. } => self.finished.push((self.now, delay_id.into(), reason)),
                Action::SfuSilent(_) => self.warnings += 1,
                Action::NoWebhooks | Action::Overloaded { .. } => {}
            }
        }
    }

    fn latency_of(&self, homeserver: HomeserverId, action: DelayedEventAction) -> u64 {
        let held = self
            .core
            .leaves()
            .homeserver(homeserver)
            .and_then(|name| self.holds.get(&**name).copied());
        let send = self.send_latency.filter(|_| action == DelayedEventAction::Send);
        held.or(send).unwrap_or(self.homeserver_latency)
    }

    fn ask(&mut self, question: Question) {
        let name = match question {
            Question::Participant { .. } => "GetParticipant",
            Question::Participants { .. } => "ListParticipants",
            Question::Rooms { .. } => "ListRooms",
            Question::CreateRoom { .. } => "CreateRoom",
            Question::Probe => "GET",
        };
        *self.sfu_calls.entry(name).or_default() += 1;
        match question {
            Question::Participant {
                participant,
                asked,
                within,
            } => {
                self.looked_up.push(self.now);
                let lost = self.sfu_hangs || self.lossy.is_some_and(|one_in| self.chance.up_to(one_in) == 0);
                let after = if lost {
                    u64::try_from(within.as_millis()).unwrap()
                } else {
                    self.latency
                };
                self.later(after, Pending::Participant { participant, asked, lost });
            }
            Question::Participants { room, asked, .. } => {
                self.last_list = Some((room, asked));
                self.later(self.latency, Pending::Participants { room, asked });
            }
            Question::Rooms { rooms, asked } => self.later(self.latency, Pending::Rooms { rooms, asked }),
            Question::CreateRoom { room } => self.later(self.latency, Pending::Create { room }),
            Question::Probe => {
                let after = if self.sfu_hangs { 1000 } else { self.latency };
                self.later(after, Pending::Probe);
            }
        }
    }

    fn resolve(&mut self, pending: Pending) {
        match pending {
            Pending::Participant { participant, asked, lost } => {
                let guest = self.core.presence().get(participant).and_then(|found| {
                    let room = self.rooms.get(&**self.core.presence().room_of(participant)?)?;
                    room.guests.get(found.identity()).cloned()
                });
                let answer = match &guest {
                    _ if lost => Answer::TimedOut,
                    Some(guest) => self.answered(
                        "GetParticipant",
                        ParticipantRow {
                            identity: "",
                            sid: &guest.sid,
                            joined_at_ms: guest.joined_at_ms,
                            active: guest.active,
                        },
                    ),
                    None => match self.answered("GetParticipant", ()) {
                        Answer::Yes(()) => Answer::No,
                        Answer::No => Answer::No,
                        Answer::Refused => Answer::Refused,
                        Answer::TooLarge => Answer::TooLarge,
                        Answer::Unclear => Answer::Unclear,
                        Answer::TimedOut => Answer::TimedOut,
                        Answer::Unreachable => Answer::Unreachable,
                    },
                };
                self.fact(Fact::Participant(participant, asked, answer));
            }
            Pending::Participants { room, asked } => {
                let name = self.core.presence().room_name(room).cloned();
                let guests = name
                    .and_then(|name| self.rooms.get(&*name))
                    .map(|room| room.guests.clone())
                    .unwrap_or_default();
                let rows: Vec<ParticipantRow<'_>> = guests
                    .iter()
                    .map(|(identity, guest)| ParticipantRow {
                        identity,
                        sid: &guest.sid,
                        joined_at_ms: guest.joined_at_ms,
                        active: guest.active,
                    })
                    .collect();
                let answer = self.answered("ListParticipants", &rows[..]);
                self.fact(Fact::Participants(room, asked, answer));
            }
            Pending::Rooms { rooms: ids, asked } => {
                let rooms = self.rooms.clone();
                let names: Vec<Arc<str>> = ids.iter().filter_map(|&id| self.core.presence().room_name(id).cloned()).collect();
                let rows: Vec<RoomRow<'_>> = names
                    .iter()
                    .filter_map(|name| rooms.get_key_value(&**name))
                    .map(|(name, room)| row(name, room))
                    .collect();
                let answer = self.answered("ListRooms", &rows[..]);
                self.fact(Fact::Rooms(&ids, asked, answer));
            }
            Pending::Create { room } => {
                let Some(name) = self.core.presence().room_name(room).map(ToString::to_string) else {
                    return;
                };
                if matches!(self.answered("CreateRoom", ()), Answer::Yes(())) {
                    self.open(&name);
                }
                let shown = self.rooms.get(&name).cloned().unwrap_or_default();
                self.created.push((self.now, name.clone()));
                let answer = self.answered("CreateRoom", row(&name, &shown));
                self.fact(Fact::Created(room, answer));
            }
            Pending::Webhook(told) => self.deliver(&told),
            Pending::Probe => {
                let reach = if self.sfu_hangs {
                    Reach::TimedOut
                } else if self.sfu_up && !self.reaches_the_dead_backend() {
                    Reach::Answered
                } else {
                    Reach::Unreachable
                };
                self.fact(Fact::Probed(reach));
            }
            Pending::Arrive {
                leave,
                delay_id,
                homeserver,
                action,
                sent,
            } => {
                let outcome = match delay_id {
                    Some(delay_id) => {
                        let outcome = self.serve(&delay_id, action);
                        self.calls.push((sent, leave, delay_id, action, outcome));
                        outcome
                    }
                    None => Outcome::Transient(None),
                };
                let latency = self.latency_of(homeserver, action);
                self.later(
                    latency - latency / 2,
                    Pending::Answer {
                        leave,
                        homeserver,
                        action,
                        sent,
                        outcome,
                    },
                );
            }
            Pending::Answer {
                leave,
                homeserver,
                action,
                sent,
                outcome,
            } => self.fact(Fact::Called {
                leave,
                homeserver,
                action,
                sent,
                outcome,
            }),
        }
    }

    /// An event is told as it is.
    pub(super) fn deliver(&mut self, told: &Told) {
        self.fact(Fact::Event(&SfuEvent {
            kind: told.kind,
            digest: told.digest,
            issued_at: told.issued_at,
            id: &told.id,
            created_at: told.created_at,
            room: &told.room,
            room_sid: &told.room_sid,
            identity: &told.identity,
            sid: &told.sid,
            joined_at_ms: told.joined_at_ms,
        }));
    }

    fn answered<T>(&self, name: &str, yes: T) -> Answer<T> {
        if self.sfu_hangs {
            return Answer::TimedOut;
        }
        if !self.sfu_up || self.reaches_the_dead_backend() {
            return Answer::Unreachable;
        }
        if self.sfu_errors {
            return Answer::Unclear;
        }
        match self.instead.get(name) {
            None | Some(Answer::Yes(())) => Answer::Yes(yes),
            Some(Answer::No) => Answer::No,
            Some(Answer::Refused) => Answer::Refused,
            Some(Answer::TooLarge) => Answer::TooLarge,
            Some(Answer::Unclear) => Answer::Unclear,
            Some(Answer::TimedOut) => Answer::TimedOut,
            Some(Answer::Unreachable) => Answer::Unreachable,
        }
    }

    fn reaches_the_dead_backend(&self) -> bool {
        self.half_dead && self.serial.is_multiple_of(2)
    }

    fn serve(&mut self, delay_id: &str, call: DelayedEventAction) -> Outcome {
        if self.homeserver_down {
            return Outcome::Transient(None);
        }
        if let Some(outcome) = self.homeserver_instead {
            return outcome;
        }
        if let Some((tokens, burst, per_second, last)) = &mut self.limiter {
            *tokens = (*tokens + self.now.since(*last) as f64 / 1000.0 * *per_second).min(*burst);
            *last = self.now;
            if *tokens < 1.0 {
                return Outcome::Limited(Some(Duration::from_millis(((1.0 - *tokens) / *per_second * 1000.0) as u64)));
            }
            *tokens -= 1.0;
        }
        let now = self.now;
        let Some((fate, delay)) = self.events.get_mut(delay_id) else {
            return Outcome::NotFound;
        };
        match (*fate, call) {
            (Fate::Scheduled { fires }, _) if fires <= now => {
                *fate = Fate::Fired(fires);
                return Outcome::NotFound;
            }
            (Fate::Scheduled { .. }, DelayedEventAction::Restart) => {
                *fate = Fate::Scheduled {
                    fires: now.after(delay.as_millis()),
                }
            }
            (Fate::Scheduled { .. }, DelayedEventAction::Send) => *fate = Fate::Sent(now),
            (Fate::Scheduled { .. }, DelayedEventAction::Cancel) => *fate = Fate::Cancelled(now),
            (Fate::Fired(_) | Fate::Sent(_) | Fate::Cancelled(_), _) => return Outcome::NotFound,
        }
        Outcome::Done
    }

    /// kill -9 and, so much later, a new process that finds what was stored. Nothing of what was under way comes back.
    pub(super) fn crash(&mut self, down_for: u64) {
        self.pending.clear();
        self.now = self.now.after(down_for);
        self.core = Core::new(self.settings, self.serial, self.now);
        for stored in self.store.clone().into_values() {
            self.restore(&stored);
        }
    }

    pub(super) fn restore(&mut self, stored: &JobRecord<'_>) {
        let actions = self
            .core
            .restore(stored, false, stored.homeserver == "hs.example", &self.clocks(), self.now);
        self.run(actions);
    }

    // --- the SFU's side ---

    pub(super) fn open(&mut self, room: &str) {
        if !self.rooms.contains_key(room) {
            self.sids += 1;
            let sid = self.next_sid.pop_front().unwrap_or_else(|| format!("RM_{}", self.sids));
            self.rooms.insert(
                room.into(),
                SimRoom {
                    sid,
                    guests: BTreeMap::new(),
                    empty_since: Some(self.now),
                },
            );
        }
    }

    pub(super) fn kill_sfu(&mut self) {
        self.sfu_up = false;
        self.rooms.clear();
        self.fact(Fact::ProbeClosed);
    }

    /// Joins and says so, if `told`.
    pub(super) fn join(&mut self, room: &str, identity: &str, told: bool) -> Option<String> {
        if !self.rooms.contains_key(room) {
            return None;
        }
        self.sids += 1;
        let sid = format!("PA_{}", self.sids);
        let joined_at_ms = self.now.as_millis().saturating_add_signed(self.sfu_ahead);
        let old = self.rooms.get_mut(room)?.guests.insert(
            identity.into(),
            Guest {
                sid: sid.clone(),
                joined_at_ms,
                active: true,
            },
        );
        if let Some(old) = old.filter(|_| told) {
            self.tell(
                EventKind::Left(DisconnectReason::DuplicateIdentity),
                room,
                identity,
                &old.sid,
                old.joined_at_ms,
            );
        }
        if told {
            self.tell(EventKind::Joined, room, identity, &sid, joined_at_ms);
        }
        Some(sid)
    }

    pub(super) fn part(&mut self, room: &str, identity: &str, reason: DisconnectReason, told: bool) {
        let Some(guest) = self.rooms.get_mut(room).and_then(|room| room.guests.remove(identity)) else {
            return;
        };
        if told {
            self.tell(EventKind::Left(reason), room, identity, &guest.sid, guest.joined_at_ms);
        }
    }

    pub(super) fn tell(&mut self, kind: EventKind, room: &str, identity: &str, sid: &str, joined_at_ms: u64) {
        self.serial += 1;
        let id = format!("EV_{}", self.serial);
        let room_sid = self.rooms.get(room).map(|room| room.sid.clone()).unwrap_or_default();
        // `createdAt` and `iat` are cut to whole seconds.
        let issued_at = self.seconds(self.now.after(self.webhook_delay));
        let told = Told {
            kind,
            digest: self.serial,
            issued_at,
            id,
            created_at: self.seconds(self.now),
            room: room.to_owned(),
            room_sid,
            identity: identity.into(),
            sid: sid.into(),
            joined_at_ms,
        };
        let told = if self.webhooks_bare {
            Told {
                id: "EV".into(),
                created_at: 0,
                room_sid: String::new(),
                sid: String::new(),
                ..told
            }
        } else {
            told
        };
        for delivery in 0..if self.webhooks_twice { 2 } else { 1 } {
            if self.webhook_delay == 0 && delivery == 0 {
                self.deliver(&told);
            } else {
                self.later(self.webhook_delay + delivery * 700, Pending::Webhook(told.clone()));
            }
        }
    }
}

/// Presence and the leaves agree on who is there, at every moment: where they did not, a leave was kept for ever.
pub(crate) fn agree(core: &Core) {
    let leaves = core.leaves();
    if leaves.len() > 50 {
        return;
    }
    for job in leaves.all().filter_map(|id| leaves.get(id)) {
        let phase = job.leave().phase();
        let found = core.presence().get(job.participant()).expect("who has a leave is kept in mind");
        let agrees = match (found.presence(), phase) {
            (_, Phase::Cancelling { .. }) => true,
            (State::Unknown { .. }, phase) => matches!(phase, Phase::AwaitingJoin | Phase::Sending { .. }),
            (State::Present, Phase::Sending { returned, .. }) => returned == Some(Returned::Present),
            (State::Present, phase) => phase == Phase::Active,
            (State::Suspected { .. }, phase) => matches!(phase, Phase::AwaitingJoin | Phase::Active | Phase::Sending { .. }),
            (State::Gone(_), phase) => matches!(phase, Phase::Sending { .. }),
        };
        assert!(agrees, "{}: {phase:?} but {found:?}", job.delay_id());
    }
}

fn row<'a>(name: &'a str, room: &'a SimRoom) -> RoomRow<'a> {
    RoomRow {
        name,
        sid: &room.sid,
        num_participants: room.guests.len() as u32,
        departure_timeout: 20,
    }
}
