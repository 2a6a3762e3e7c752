//! A small world around the core: an SFU and homeservers in memory, and a clock that jumps from one moment to the next.

#![allow(dead_code, reason = "each test binary uses its part")]

use lk_jwt_service::backoff::Jitter;

use lk_jwt_service::delayed_leave::jobs::{
    Answered, Call, Config, Delegated, Delegation, Fact, JobId, Jobs, Looked, Output, Outputs, Record, Refusal, Row, Webhook, WebhookKind,
};

use lk_jwt_service::delayed_leave::machine::{LeaveReason, Outcome, Reason};

use lk_jwt_service::delayed_leave::pace::HomeserverId;

use lk_jwt_service::delayed_leave::rooms::{RoomId, RoomRow};

use lk_jwt_service::time::{Delay, Time};

use lk_jwt_service::livekit::Reach;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

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

enum Pending {
    LookUp {
        job: JobId,
        asked: Time,
        lost: bool,
    },
    List {
        room: RoomId,
        asked: Time,
    },
    ListRooms {
        names: Vec<Arc<str>>,
        asked: Time,
    },
    Create {
        room: RoomId,
    },
    Webhook {
        kind: WebhookKind,
        id: String,
        happened: Time,
        room: String,
        room_sid: String,
        identity: String,
        sid: String,
        joined_at_ms: u64,
    },
    Probe,
    Arrive {
        job: JobId,
        homeserver: HomeserverId,
        call: Call,
        sent: Time,
    },
    Answer {
        job: JobId,
        homeserver: HomeserverId,
        call: Call,
        outcome: Outcome,
    },
}

#[derive(Clone, Debug)]
struct Stored {
    user: String,
    homeserver: String,
    delay_id: String,
    delay: Delay,
    arrived: Time,
    restarted: Time,
    sid: Option<String>,
    joined_at_ms: u64,
    room_sid: Option<String>,
    last_sighted: Option<Time>,
    seen: bool,
}

pub(super) struct World {
    config: Config,
    store: BTreeMap<(String, String), Stored>,
    pub(super) now: Time,
    pub(super) jobs: Jobs,
    pending: BTreeMap<(Time, u64), Pending>,
    serial: u64,
    pub(super) sfu_up: bool,
    pub(super) sfu_hangs: bool,
    pub(super) sfu_errors: bool,
    pub(super) latency: u64,
    pub(super) rooms: BTreeMap<String, SimRoom>,
    pub(super) next_sid: VecDeque<String>,
    sids: u64,
    pub(super) events: BTreeMap<String, (Fate, Delay)>,
    pub(super) homeserver_latency: u64,
    pub(super) homeserver_down: bool,
    /// Tokens left, tokens per second: Synapse's limiter.
    pub(super) limiter: Option<(f64, f64, f64, Time)>,
    pub(super) calls: Vec<(Time, JobId, String, Call, Outcome)>,
    pub(super) finished: Vec<(Time, JobId, String, Reason)>,
    pub(super) created: Vec<(Time, String)>,
    pub(super) sfu_calls: BTreeMap<&'static str, u32>,
    pub(super) warnings: u32,
    pub(super) webhook_delay: u64,
    pub(super) webhooks_twice: bool,
    pub(super) chance: Jitter,
    /// One answer in so many is lost.
    pub(super) lossy: Option<u64>,
}

impl World {
    pub(super) fn new(config: Config, seed: u64) -> Self {
        Self {
            config,
            store: BTreeMap::new(),
            now: Time::START,
            jobs: Jobs::new(config, seed, Time::START),
            pending: BTreeMap::new(),
            serial: 0,
            sfu_up: true,
            sfu_hangs: false,
            sfu_errors: false,
            latency: 5,
            rooms: BTreeMap::new(),
            next_sid: VecDeque::new(),
            sids: 0,
            events: BTreeMap::new(),
            homeserver_latency: 20,
            homeserver_down: false,
            limiter: None,
            calls: Vec::new(),
            finished: Vec::new(),
            created: Vec::new(),
            sfu_calls: BTreeMap::new(),
            warnings: 0,
            webhook_delay: 0,
            webhooks_twice: false,
            chance: Jitter::new(seed ^ 0x5eed),
            lossy: None,
        }
    }

    pub(super) fn at(millis: u64) -> Time {
        Time::START.after(millis)
    }

    pub(super) fn delegate(&mut self, room: &str, identity: &str, delay_id: &str, delay_ms: u64) -> Result<Delegated, Refusal> {
        self.delegate_arrived(room, identity, delay_id, delay_ms, self.now)
    }

    pub(super) fn delegate_arrived(
        &mut self,
        room: &str,
        identity: &str,
        delay_id: &str,
        delay_ms: u64,
        arrived: Time,
    ) -> Result<Delegated, Refusal> {
        let delay = Delay::from_millis(delay_ms).unwrap();
        self.events.entry(delay_id.into()).or_insert_with(|| {
            let fires = self.now.after(delay_ms);
            (Fate::Scheduled { fires }, delay)
        });
        let user = format!("@{identity}");
        let delegation = Delegation {
            room,
            identity,
            user: &user,
            homeserver: "hs.example",
            delay_id,
            delay,
            arrived,
            exempt: true,
            creates_room: true,
            as_user: false,
        };
        let (delegated, outputs) = self.jobs.delegate(&delegation, self.now)?;
        self.run(outputs);
        Ok(delegated)
    }

    pub(super) fn fact(&mut self, fact: Fact<'_>) {
        let outputs = self.jobs.handle(fact, self.now);
        self.run(outputs);
    }

    pub(super) fn advance_to(&mut self, until: Time) {
        let mut spins = 0;
        loop {
            let timer = self.jobs.next_deadline();
            let result = self.pending.first_key_value().map(|(&(at, _), _)| at);
            let Some(next) = [timer, result].into_iter().flatten().min().filter(|&next| next <= until) else {
                break;
            };
            let next = next.max(self.now);
            spins = if next == self.now { spins + 1 } else { 0 };
            assert!(spins < 100_000, "no progress at {:?}: {timer:?}", self.now);
            self.now = next;
            self.fire();
            if result.is_some_and(|at| at <= next) {
                let (_, pending) = self.pending.pop_first().unwrap();
                self.resolve(pending);
            } else {
                self.fact(Fact::Time);
            }
        }
        self.now = self.now.max(until);
        self.fire();
    }

    pub(super) fn advance(&mut self, millis: u64) {
        self.advance_to(self.now.after(millis));
    }

    fn fire(&mut self) {
        for (fate, _) in self.events.values_mut() {
            if let Fate::Scheduled { fires } = fate
                && *fires <= self.now
            {
                *fate = Fate::Fired(*fires);
            }
        }
    }

    pub(super) fn fate(&self, delay_id: &str) -> Fate {
        self.events[delay_id].0
    }

    pub(super) fn count(&self, call: Call, delay_id: &str) -> usize {
        self.calls
            .iter()
            .filter(|(_, _, id, made, _)| *made == call && id == delay_id)
            .count()
    }

    fn later(&mut self, after: u64, pending: Pending) {
        self.serial += 1;
        self.pending.insert((self.now.after(after), self.serial), pending);
    }

    pub(super) fn run(&mut self, outputs: Outputs) {
        for output in outputs {
            match output {
                Output::LookUp { job, asked, within } => {
                    *self.sfu_calls.entry("GetParticipant").or_default() += 1;
                    let lost = self.sfu_hangs || self.lossy.is_some_and(|one_in| self.chance.up_to(one_in) == 0);
                    let after = if lost {
                        u64::try_from(within.as_millis()).unwrap()
                    } else {
                        self.latency
                    };
                    self.later(after, Pending::LookUp { job, asked, lost });
                }
                Output::ListParticipants { room, asked } => {
                    *self.sfu_calls.entry("ListParticipants").or_default() += 1;
                    self.later(self.latency, Pending::List { room, asked });
                }
                Output::ListRooms { names, asked } => {
                    *self.sfu_calls.entry("ListRooms").or_default() += 1;
                    self.later(self.latency, Pending::ListRooms { names, asked });
                }
                Output::CreateRoom { room } => self.later(self.latency, Pending::Create { room }),
                Output::Probe { .. } => {
                    let after = if self.sfu_hangs { 1000 } else { self.latency };
                    self.later(after, Pending::Probe);
                }
                Output::Call { job, homeserver, call } => {
                    self.later(
                        self.homeserver_latency / 2,
                        Pending::Arrive {
                            job,
                            homeserver,
                            call,
                            sent: self.now,
                        },
                    );
                }
                Output::Persist { job } => self.persist(job),
                Output::Forget { room, identity } => {
                    self.store.remove(&(room.to_string(), identity.to_string()));
                }
                Output::Finished { job, delay_id, reason, .. } => self.finished.push((self.now, job, delay_id.into(), reason)),
                Output::SfuSilent { .. } => self.warnings += 1,
                Output::Unwired => {}
            }
        }
    }

    fn resolve(&mut self, pending: Pending) {
        match pending {
            Pending::LookUp { job, asked, lost } => {
                let guest = self.jobs.get(job).and_then(|found| {
                    let room = self.rooms.get(&**self.jobs.room_name(found.room())?)?;
                    room.guests.get(found.identity()).cloned()
                });
                let answer = match &guest {
                    _ if lost => Looked::TimedOut,
                    _ if !self.sfu_up => Looked::Unreachable,
                    _ if self.sfu_errors => Looked::Unclear,
                    Some(guest) => Looked::Present(Row {
                        identity: "",
                        sid: &guest.sid,
                        joined_at_ms: guest.joined_at_ms,
                        active: guest.active,
                    }),
                    None => Looked::Absent,
                };
                self.fact(Fact::LookedUp { job, asked, answer });
            }
            Pending::List { room, asked } => {
                let name = self.jobs.room_name(room).cloned();
                let guests = name
                    .and_then(|name| self.rooms.get(&*name))
                    .map(|room| room.guests.clone())
                    .unwrap_or_default();
                let rows: Vec<Row<'_>> = guests
                    .iter()
                    .map(|(identity, guest)| Row {
                        identity,
                        sid: &guest.sid,
                        joined_at_ms: guest.joined_at_ms,
                        active: guest.active,
                    })
                    .collect();
                let answer = self.answered(&rows[..]);
                self.fact(Fact::Listed { room, asked, answer });
            }
            Pending::ListRooms { names, asked } => {
                let rooms = self.rooms.clone();
                let rows: Vec<RoomRow<'_>> = names
                    .iter()
                    .filter_map(|name| rooms.get_key_value(&**name))
                    .map(|(name, room)| row(name, room))
                    .collect();
                let answer = self.answered(&rows[..]);
                self.fact(Fact::RoomsListed {
                    names: &names,
                    asked,
                    answer,
                });
            }
            Pending::Create { room } => {
                let Some(name) = self.jobs.room_name(room).map(ToString::to_string) else {
                    return;
                };
                if self.sfu_up && !self.sfu_errors {
                    self.open(&name);
                }
                let shown = self.rooms.get(&name).cloned().unwrap_or_default();
                self.created.push((self.now, name.clone()));
                let answer = self.answered(row(&name, &shown));
                self.fact(Fact::RoomCreated { room, answer });
            }
            Pending::Webhook {
                kind,
                id,
                happened,
                room,
                room_sid,
                identity,
                sid,
                joined_at_ms,
            } => {
                let webhook = Webhook {
                    kind,
                    id: &id,
                    happened,
                    room: &room,
                    room_sid: &room_sid,
                    identity: &identity,
                    sid: &sid,
                    joined_at_ms,
                };
                self.fact(Fact::Webhook(webhook));
            }
            Pending::Probe => {
                let reach = if self.sfu_hangs {
                    Reach::TimedOut
                } else if self.sfu_up {
                    Reach::Answered
                } else {
                    Reach::Unreachable
                };
                self.fact(Fact::Probed(reach));
            }
            Pending::Arrive {
                job,
                homeserver,
                call,
                sent,
            } => {
                let Some(delay_id) = self.jobs.get(job).map(|job| job.delay_id().to_owned()) else {
                    return self.fact(Fact::Called {
                        job,
                        homeserver,
                        call,
                        outcome: Outcome::Transient(None),
                    });
                };
                let outcome = self.serve(&delay_id, call);
                self.calls.push((sent, job, delay_id, call, outcome));
                self.later(
                    self.homeserver_latency - self.homeserver_latency / 2,
                    Pending::Answer {
                        job,
                        homeserver,
                        call,
                        outcome,
                    },
                );
            }
            Pending::Answer {
                job,
                homeserver,
                call,
                outcome,
            } => self.fact(Fact::Called {
                job,
                homeserver,
                call,
                outcome,
            }),
        }
    }

    fn answered<T>(&self, yes: T) -> Answered<T> {
        if self.sfu_hangs {
            Answered::TimedOut
        } else if !self.sfu_up {
            Answered::Unreachable
        } else if self.sfu_errors {
            Answered::Unclear
        } else {
            Answered::Yes(yes)
        }
    }

    fn serve(&mut self, delay_id: &str, call: Call) -> Outcome {
        if self.homeserver_down {
            return Outcome::Transient(None);
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
            (Fate::Scheduled { .. }, Call::Restart) => {
                *fate = Fate::Scheduled {
                    fires: now.after(delay.as_millis()),
                }
            }
            (Fate::Scheduled { .. }, Call::Send) => *fate = Fate::Sent(now),
            (Fate::Scheduled { .. }, Call::Cancel) => *fate = Fate::Cancelled(now),
            (Fate::Fired(_) | Fate::Sent(_) | Fate::Cancelled(_), _) => return Outcome::NotFound,
        }
        Outcome::Done
    }

    fn persist(&mut self, job: JobId) {
        let Some(record) = self.jobs.record(job) else { return };
        let delegation = record.delegation;
        let stored = Stored {
            user: delegation.user.into(),
            homeserver: delegation.homeserver.into(),
            delay_id: delegation.delay_id.into(),
            delay: delegation.delay,
            arrived: delegation.arrived,
            restarted: record.restarted,
            sid: record.sid.map(Into::into),
            joined_at_ms: record.joined_at_ms,
            room_sid: record.room_sid.map(Into::into),
            last_sighted: record.last_sighted,
            seen: record.seen,
        };
        self.store.insert((delegation.room.into(), delegation.identity.into()), stored);
    }

    /// kill -9 and, so much later, a new process that finds what was stored. Nothing of what was under way comes back.
    pub(super) fn crash(&mut self, down_for: u64) {
        self.pending.clear();
        self.jobs = Jobs::new(self.config, self.serial, self.now);
        self.now = self.now.after(down_for);
        self.fire();
        self.jobs = Jobs::new(self.config, self.serial, self.now);
        for ((room, identity), stored) in self.store.clone() {
            let record = Record {
                delegation: Delegation {
                    room: &room,
                    identity: &identity,
                    user: &stored.user,
                    homeserver: &stored.homeserver,
                    delay_id: &stored.delay_id,
                    delay: stored.delay,
                    arrived: stored.arrived,
                    exempt: true,
                    creates_room: true,
                    as_user: false,
                },
                restarted: stored.restarted,
                sid: stored.sid.as_deref(),
                joined_at_ms: stored.joined_at_ms,
                room_sid: stored.room_sid.as_deref(),
                last_sighted: stored.last_sighted,
                seen: stored.seen,
            };
            let outputs = self.jobs.restore(&record, self.now);
            self.run(outputs);
        }
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
        self.fact(Fact::WatchClosed);
    }

    /// Joins and says so, if `told`.
    pub(super) fn join(&mut self, room: &str, identity: &str, told: bool) -> Option<String> {
        if !self.rooms.contains_key(room) {
            return None;
        }
        self.sids += 1;
        let sid = format!("PA_{}", self.sids);
        let joined_at_ms = self.now.as_millis();
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
                WebhookKind::Left(LeaveReason::DuplicateIdentity),
                room,
                identity,
                &old.sid,
                old.joined_at_ms,
            );
        }
        if told {
            self.tell(WebhookKind::Joined, room, identity, &sid, joined_at_ms);
        }
        Some(sid)
    }

    pub(super) fn part(&mut self, room: &str, identity: &str, reason: LeaveReason, told: bool) {
        let Some(guest) = self.rooms.get_mut(room).and_then(|room| room.guests.remove(identity)) else {
            return;
        };
        if told {
            self.tell(WebhookKind::Left(reason), room, identity, &guest.sid, guest.joined_at_ms);
        }
    }

    pub(super) fn tell(&mut self, kind: WebhookKind, room: &str, identity: &str, sid: &str, joined_at_ms: u64) {
        self.serial += 1;
        let id = format!("EV_{}", self.serial);
        let room_sid = self.rooms.get(room).map(|room| room.sid.clone()).unwrap_or_default();
        // `createdAt` and `iat` are cut to whole seconds.
        let (created, issued) = (self.now.as_millis() / 1000, self.now.after(self.webhook_delay).as_millis() / 1000);
        let happened = self.now.after(self.webhook_delay).before((issued - created) * 1000);
        for delivery in 0..if self.webhooks_twice { 2 } else { 1 } {
            let (id, room, room_sid) = (id.clone(), room.to_owned(), room_sid.clone());
            let webhook = Pending::Webhook {
                kind,
                id,
                happened,
                room,
                room_sid,
                identity: identity.into(),
                sid: sid.into(),
                joined_at_ms,
            };
            if self.webhook_delay == 0 && delivery == 0 {
                self.resolve(webhook);
            } else {
                self.later(self.webhook_delay + delivery * 700, webhook);
            }
        }
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
