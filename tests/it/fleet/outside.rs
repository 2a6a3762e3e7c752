//! What is around the replicas of a simulated fleet: Redis with its faults, an SFU, a homeserver and the people in calls, all in virtual
//! time. What must always hold of them is judged where it happens.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use lk_jwt_service::internals::delayed_event::{DelayedEventAction, Outcome};
use lk_jwt_service::internals::fleet::{Position, Watch};
use lk_jwt_service::internals::livekit::DisconnectReason;
use lk_jwt_service::internals::presence::{EventKind, SfuEvent};
use lk_jwt_service::internals::store::{JobRecord, News};
use lk_jwt_service::internals::time::{Time, WallClock};

use super::model::Model;
use super::node::{Node, Way};
use crate::simulation::sfu::{Guest, Sfu, WALL};

/// How often a state of Redis is remembered that a failover may bring back, and how many.
const SNAPSHOT_INTERVAL_MS: u64 = 500;
const SNAPSHOTS: usize = 7;
/// Trouble with Redis explains that a node alone knew of a delegation for so long.
const TROUBLE_MS: u64 = 15_000;

/// What becomes of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reach {
    Answers,
    /// It is carried out, and the answer is lost.
    Heard,
    Nothing,
}

/// Redis, and what tests know of its messages.
#[derive(Clone, Default)]
pub(super) struct Redis {
    pub(super) model: Model,
    pub(super) is_away: bool,
    /// Takes no write but what frees.
    pub(super) is_full: bool,
    /// Each message that was ever sent has a number of its own.
    pub(super) serials: BTreeMap<Position, u64>,
    next_serial: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Runs(u64),
    Fired(u64),
    Sent(u64),
    Cancelled(u64),
}

pub(super) struct Event {
    pub(super) who: usize,
    pub(super) fate: Fate,
    /// A delegation of it was answered with 200 then.
    pub(super) answered: Option<u64>,
    /// Two faults together have lost it.
    pub(super) is_excused: bool,
}

pub(super) struct Person {
    pub(super) room: String,
    pub(super) identity: String,
    pub(super) delay_ms: u64,
    pub(super) is_there: bool,
    pub(super) departed: Option<u64>,
}

#[derive(Clone)]
pub(super) struct Webhook {
    pub(super) room: String,
    pub(super) identity: String,
    room_sid: String,
    kind: EventKind,
    serial: u64,
    seconds: i64,
    sid: String,
    joined_at_ms: u64,
}

pub(super) struct Outside {
    pub(super) now: u64,
    pub(super) seed: u64,
    pub(super) redis: Redis,
    snapshots: VecDeque<(u64, Redis)>,
    pub(super) sfu: Sfu,
    pub(super) people: Vec<Person>,
    pub(super) events: BTreeMap<String, Event>,
    webhooks: BTreeMap<u64, Webhook>,
    next_webhook: u64,
    /// When Redis was last not well, or reached by all.
    pub(super) trouble: Option<u64>,
    /// When writes were last lost.
    pub(super) lost: Option<u64>,
    /// When a node last died, was paused or cut off.
    pub(super) node_trouble: Option<u64>,
    /// Who watches under which epoch, unless writes were lost since.
    epochs: BTreeMap<u64, Watch>,
    /// Nodes that have ended, with leaves that nobody took over or without.
    ended: Vec<(u64, bool)>,
    pub(super) story: Vec<String>,
    pub(super) restarts: usize,
    /// The story is told alone, with all details.
    pub(super) is_alone: bool,
}

impl Redis {
    pub(super) fn tell(&mut self, news: News) -> Position {
        let at = self.model.tell(news);
        self.next_serial += 1;
        self.serials.insert(at, self.next_serial);
        at
    }

    /// The message by which it was handed over; `None` where the record is somebody else's.
    pub(super) fn delegate(&mut self, record: &JobRecord<'_>) -> Option<Position> {
        self.model.delegate(record, &[])?;
        let (field, value) = (record.field(), self.model.jobs[&record.field()].clone());
        Some(self.tell(News::Job(field.into_bytes().into(), value.into_bytes().into())))
    }
}

impl Webhook {
    pub(super) fn event(&self) -> SfuEvent<'_> {
        SfuEvent {
            kind: self.kind,
            digest: self.serial,
            issued_at: self.seconds,
            id: "",
            created_at: self.seconds,
            room: &self.room,
            room_sid: &self.room_sid,
            identity: &self.identity,
            sid: &self.sid,
            joined_at_ms: self.joined_at_ms,
        }
    }

    pub(super) fn text(&self) -> Box<[u8]> {
        self.serial.to_string().into_bytes().into()
    }
}

impl Outside {
    pub(super) fn new(seed: u64) -> Self {
        let mut redis = Redis::default();
        redis.model.now_ms = WALL;
        Self {
            now: 0,
            seed,
            redis,
            snapshots: VecDeque::new(),
            sfu: Sfu::new(vec![0]),
            people: Vec::new(),
            events: BTreeMap::new(),
            webhooks: BTreeMap::new(),
            next_webhook: 1,
            trouble: None,
            lost: None,
            node_trouble: None,
            epochs: BTreeMap::new(),
            ended: Vec::new(),
            story: Vec::new(),
            restarts: 0,
            is_alone: false,
        }
    }

    /// One more person, who has a room for themselves and does not come before they are told to.
    pub(super) fn newcomer(&mut self, delay_ms: u64) {
        let who = self.people.len();
        self.people.push(Person {
            room: format!("room{who}"),
            identity: format!("p{who}"),
            delay_ms,
            is_there: false,
            departed: None,
        });
    }

    pub(super) fn time(&self) -> Time {
        Time::START.after(self.now)
    }

    pub(super) fn wall(&self) -> i64 {
        WALL + self.now.cast_signed()
    }

    /// Seconds that the SFU's clock shows.
    pub(super) fn seconds(&self) -> i64 {
        self.sfu.unix_millis(0, self.now).div_euclid(1_000)
    }

    /// The story so far, for a message.
    pub(super) fn told(&self) -> String {
        format!("seed {} at {} ms:\n{}\n", self.seed, self.now, self.story.join("\n"))
    }

    /// What nobody wants to know but of one story alone.
    pub(super) fn detail(&mut self, what: impl FnOnce() -> String) {
        if self.is_alone {
            let what = what();
            self.note(&what);
        }
    }

    pub(super) fn note(&mut self, what: &str) {
        self.story.push(format!("{:>7} {what}", self.now));
    }

    pub(super) fn pass(&mut self, millis: u64) {
        self.now += millis;
        self.redis.model.now_ms += millis.cast_signed();
        if self.now.is_multiple_of(SNAPSHOT_INTERVAL_MS) {
            self.snapshots.push_back((self.now, self.redis.clone()));
            if self.snapshots.len() > SNAPSHOTS {
                self.snapshots.pop_front();
            }
        }
        for (name, room) in self.sfu.expire(self.now) {
            self.tell_room_over(&name, &room.sid);
        }
        let now = self.now;
        for event in self.events.values_mut() {
            if let Fate::Runs(until) = event.fate
                && until <= now
            {
                event.fate = Fate::Fired(now);
            }
        }
    }

    pub(super) fn reach(&self, way: Way) -> Reach {
        match way {
            _ if self.redis.is_away => Reach::Nothing,
            Way::Cut => Reach::Nothing,
            Way::Unanswered => Reach::Heard,
            Way::Open | Way::Slow(_) => Reach::Answers,
        }
    }

    /// Redis as it was so long ago, by a clock that is behind by so much.
    pub(super) fn fail_over(&mut self, lost_ms: u64, behind_ms: i64) {
        let until = self.now.saturating_sub(lost_ms);
        let older = self
            .snapshots
            .iter()
            .rev()
            .find(|(at, _)| *at <= until)
            .or_else(|| self.snapshots.front());
        let Some((_, older)) = older.cloned() else { return };
        let now_ms = self.redis.model.now_ms - behind_ms;
        let next_serial = self.redis.next_serial;
        self.redis = Redis {
            next_serial,
            is_away: self.redis.is_away,
            is_full: self.redis.is_full,
            ..older
        };
        self.redis.model.now_ms = now_ms;
        self.forgets();
    }

    pub(super) fn empty(&mut self) {
        let now_ms = self.redis.model.now_ms;
        self.redis.model = Model {
            now_ms,
            ..Model::default()
        };
        self.redis.serials.clear();
        self.forgets();
    }

    fn forgets(&mut self) {
        self.snapshots.clear();
        self.epochs.clear();
        (self.lost, self.trouble) = (Some(self.now), Some(self.now));
    }

    pub(super) fn change(&mut self, seen: Option<Watch>, wanted: Watch) -> Option<Watch> {
        let before = self.redis.model.watch;
        let after = self.redis.model.change(seen, wanted);
        if after == Some(wanted) && before != after {
            let is_higher = before.is_none_or(|before| before.epoch < wanted.epoch);
            assert!(is_higher || self.lost.is_some(), "{}: {before:?} becomes {after:?}", self.told());
            let other = self.epochs.insert(wanted.epoch, wanted);
            assert!(
                other.is_none_or(|other| other == wanted),
                "{}: two watch under one epoch: {other:?} and {wanted:?}",
                self.told()
            );
            self.note(&format!("the watch is {wanted}, was {before:?}"));
        }
        after
    }

    // --- the SFU ---

    pub(super) fn guest(&self, room: &str, identity: &str) -> Option<Guest> {
        self.sfu.rooms.get(room)?.guests.get(identity).cloned()
    }

    pub(super) fn guests(&self, room: &str) -> BTreeMap<String, Guest> {
        self.sfu.rooms.get(room).map(|room| room.guests.clone()).unwrap_or_default()
    }

    pub(super) fn room(&self, name: &str) -> Option<(String, String, u32)> {
        let room = self.sfu.rooms.get(name)?;
        Some((name.to_owned(), room.sid.clone(), room.shown(self.now)))
    }

    fn tell_of(&mut self, kind: EventKind, room: &str, room_sid: &str, identity: &str, guest: Option<&Guest>) -> u64 {
        let serial = self.next_webhook;
        self.next_webhook += 1;
        let webhook = Webhook {
            room: room.to_owned(),
            identity: identity.to_owned(),
            room_sid: room_sid.to_owned(),
            kind,
            serial,
            seconds: self.seconds(),
            sid: guest.map(|guest| guest.sid.clone()).unwrap_or_default(),
            joined_at_ms: guest.map_or(0, |guest| guest.joined_at_ms),
        };
        self.webhooks.insert(serial, webhook);
        serial
    }

    fn tell_room_over(&mut self, room: &str, sid: &str) {
        self.tell_of(EventKind::RoomFinished, room, sid, "", None);
    }

    /// A webhook, by its number in a message.
    pub(super) fn webhook(&self, text: &[u8]) -> Webhook {
        let serial = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        self.webhooks[&serial].clone()
    }

    /// The webhooks that were sent since that one.
    pub(super) fn webhooks_since(&self, serial: u64) -> Vec<u64> {
        self.webhooks.range(serial..).map(|(serial, _)| *serial).collect()
    }

    pub(super) fn enter(&mut self, who: usize) {
        let (room, identity) = (self.people[who].room.clone(), self.people[who].identity.clone());
        self.sfu.open(&room, self.now);
        self.sfu.enter(&room, &identity, self.now);
        (self.people[who].is_there, self.people[who].departed) = (true, None);
        let (guest, sid) = (self.guest(&room, &identity), self.sfu.rooms[&room].sid.clone());
        self.tell_of(EventKind::Joined, &room, &sid, &identity, guest.as_ref());
    }

    pub(super) fn leave(&mut self, who: usize) {
        let (room, identity) = (self.people[who].room.clone(), self.people[who].identity.clone());
        let sid = self.sfu.rooms.get(&room).map(|room| room.sid.clone()).unwrap_or_default();
        let guest = self.sfu.remove(&room, &identity, self.now);
        self.people[who].is_there = false;
        self.people[who].departed = Some(self.now);
        self.tell_of(
            EventKind::Left(DisconnectReason::ClientInitiated),
            &room,
            &sid,
            &identity,
            guest.as_ref(),
        );
    }

    // --- the homeserver ---

    pub(super) fn schedule(&mut self, who: usize, delay_id: &str) {
        let fate = Fate::Runs(self.now + self.people[who].delay_ms);
        let event = Event {
            who,
            fate,
            answered: None,
            is_excused: false,
        };
        self.events.insert(delay_id.to_owned(), event);
    }

    /// A client restarts its own event while nobody has taken it.
    pub(super) fn keep_alive(&mut self, delay_id: &str) {
        let (now, people) = (self.now, &self.people);
        let event = self.events.get_mut(delay_id).expect("an event");
        if let Fate::Runs(_) = event.fate {
            event.fate = Fate::Runs(now + people[event.who].delay_ms);
        }
    }

    pub(super) fn manage(&mut self, delay_id: &str, action: DelayedEventAction) -> Outcome {
        let now = self.now;
        let Some((who, fate)) = self.events.get(delay_id).map(|event| (event.who, event.fate)) else {
            return Outcome::NotFound;
        };
        if !matches!(fate, Fate::Runs(_)) {
            return Outcome::NotFound;
        }
        let fate = match action {
            DelayedEventAction::Restart => {
                self.restarts += 1;
                Fate::Runs(now + self.people[who].delay_ms)
            }
            DelayedEventAction::Send => {
                assert!(
                    !self.people[who].is_there,
                    "{}: {delay_id} is sent, and {who} is there",
                    self.told()
                );
                Fate::Sent(now)
            }
            DelayedEventAction::Cancel => {
                let is_other = |(id, event): (&String, &Event)| id != delay_id && event.who == who && matches!(event.fate, Fate::Runs(_));
                let lives_on = self.events.iter().any(is_other);
                assert!(
                    lives_on || !self.people[who].is_there,
                    "{}: {delay_id} is cancelled, the only living event of {who}",
                    self.told()
                );
                Fate::Cancelled(now)
            }
        };
        self.events.get_mut(delay_id).expect("just found").fate = fate;
        if action != DelayedEventAction::Restart {
            self.note(&format!("{who}: {action:?} {delay_id}"));
        }
        Outcome::Done
    }

    // --- delegations ---

    pub(super) fn record_of(&self, who: usize, delay_id: &str, clock: &WallClock) -> JobRecord<'static> {
        let (person, arrived) = (&self.people[who], clock.unix_millis(self.time()));
        JobRecord {
            room: person.room.clone().into(),
            identity: person.identity.clone().into(),
            delay_id: delay_id.to_owned().into(),
            delay_ms: person.delay_ms.cast_signed(),
            homeserver: "hs.example".into(),
            user: format!("@{}:hs.example", person.identity).into(),
            delegated_at_ms: Some(arrived),
            restarted_at_ms: arrived,
            ..JobRecord::default()
        }
    }

    pub(super) fn answered(&mut self, who: usize, delay_id: &str) {
        let now = self.now;
        self.events.get_mut(delay_id).expect("an event").answered.get_or_insert(now);
        self.note(&format!("{who}: the delegation of {delay_id} is answered"));
    }

    pub(super) fn ended(&mut self, node: &Node, is_forced: bool) {
        self.note(&format!("{} has ended, forced: {is_forced}", node.id));
        self.ended.push((self.now, is_forced));
    }

    /// Nodes that ended with leaves that nobody took over, while nothing was wrong with Redis.
    pub(super) fn take_ended(&mut self) -> Vec<(u64, bool)> {
        std::mem::take(&mut self.ended)
    }

    /// Whether Redis knows of a delayed event.
    pub(super) fn stores(&self, delay_id: &str) -> bool {
        self.redis.model.jobs.iter().any(|(field, value)| {
            let record = JobRecord::read(field.as_bytes(), value.as_bytes()).expect("a record");
            record.delay_id == delay_id || record.replaces.iter().any(|replaced| replaced.delay_id == delay_id)
        })
    }

    /// Events of people who are there, that run and of which a delegation was answered; all that are not excused.
    pub(super) fn due(&self) -> BTreeSet<String> {
        let all = self.unreported().into_iter();
        all.filter_map(|(delay_id, is_there)| is_there.then_some(delay_id)).collect()
    }

    /// The same of people who have left, too; and whether they are there.
    pub(super) fn unreported(&self) -> BTreeMap<String, bool> {
        let is_due = |event: &Event| matches!(event.fate, Fate::Runs(_)) && event.answered.is_some() && !event.is_excused;
        let due = self.events.iter().filter(|(_, event)| is_due(event));
        due.map(|(id, event)| (id.clone(), self.people[event.who].is_there)).collect()
    }

    pub(super) fn had_trouble(&self) -> bool {
        self.trouble.is_some_and(|at| self.now.saturating_sub(at) <= TROUBLE_MS)
    }

    pub(super) fn had_node_trouble(&self) -> bool {
        self.node_trouble.is_some_and(|at| self.now.saturating_sub(at) <= TROUBLE_MS)
    }
}
