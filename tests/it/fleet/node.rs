//! One replica of a simulated fleet: the pure cores, and around them what the driver does, in the driver's order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use lk_jwt_service::internals::core::{Action, Core, Delegation, Fact, SUSPENDED_AFTER_MS, Settings};
use lk_jwt_service::internals::delayed_event::DelayedEventAction;
use lk_jwt_service::internals::delayed_leave::{CapacityError, Handover, HomeserverId, LeaveId};
use lk_jwt_service::internals::fleet::{Answer, Entry, Fleet, Hearing, Kept, NodeId, Output, Own, Position, Takeover, Watch};
use lk_jwt_service::internals::livekit;
use lk_jwt_service::internals::presence::Question;
use lk_jwt_service::internals::store::{JobRecord, News};
use lk_jwt_service::internals::time::{Delay, Time, WallClock};

use super::outside::{Outside, Reach, Webhook};

pub(super) const STEP_MS: u64 = 50;
/// Time for an answer of Redis.
const COMMAND_TIMEOUT_MS: u64 = 1_000;
/// A reader whose connection is silent for so long makes a new one.
const READER_TIMEOUT_MS: u64 = 2_000;
const HAND_OVER_INTERVAL_MS: u64 = 1_000;
const FLUSH_TIMEOUT_MS: u64 = 1_000;
/// A stopping node hands over for so long at most.
const HAND_OVER_TIME_MS: u64 = 3_000;
/// A delegation waits so long to be written.
const WRITE_TIMEOUT_MS: u64 = 3_000;
/// How long a store takes to write.
const WRITE_MS: u64 = 250;
const MESSAGES_AT_ONCE: usize = 256;
/// Records that a reading brings in one step.
const RECORDS_AT_ONCE: usize = 3;

/// The way of a node to Redis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    Open,
    Cut,
    /// What is sent arrives, and nothing comes back.
    Unanswered,
    /// An answer takes that long.
    Slow(u64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Life {
    Runs,
    /// Was told to stop then, and says that it is leaving.
    Stops(u64, bool),
    Dead,
}

enum What {
    Beat(Entry, Option<Watch>, Vec<NodeId>),
    Change(Option<Watch>, Watch),
}

enum Said {
    Beat(Answer),
    Change(Option<Watch>),
}

/// A command on its way.
struct Call {
    what: What,
    asked: u64,
    said: Option<Said>,
    answered_at: Option<u64>,
}

/// A reading of all records.
struct Scan {
    fields: VecDeque<String>,
    touched: HashSet<String>,
    seen: BTreeMap<String, i64>,
}

struct PendingCall {
    leave: LeaveId,
    homeserver: HomeserverId,
    action: DelayedEventAction,
    sent: Time,
    delay_id: String,
}

/// A delegation that is not answered yet.
pub(super) struct Held {
    pub(super) who: usize,
    pub(super) delay_id: String,
    until: u64,
    /// Waits for this field to be written; else it is taken as a guest then.
    field: Option<String>,
}

pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) fleet: Fleet,
    pub(super) kept: Kept<JobRecord<'static>>,
    pub(super) core: Core,
    pub(super) life: Life,
    pub(super) way: Way,
    pub(super) is_paused: bool,
    pub(super) is_reader_frozen: bool,
    pub(super) reaches_sfu: bool,
    pub(super) is_open: bool,
    /// Its connections were closed, and it has made new ones.
    pub(super) is_renewed: bool,
    pub(super) takeovers: Vec<(u64, Takeover)>,
    fence: Option<Watch>,
    void: BTreeSet<String>,
    queue: BTreeMap<String, (u64, Option<String>)>,
    changes: u64,
    scan: Option<Scan>,
    is_scan_due: bool,
    is_continuous: bool,
    position: Position,
    /// The reader has no connection since then.
    deaf_since: Option<u64>,
    call: Option<Call>,
    outputs: VecDeque<Output>,
    next_beat: u64,
    began_beat: u64,
    next_hand_over: u64,
    next_probe: u64,
    last_step: u64,
    questions: Vec<Question>,
    calls: Vec<PendingCall>,
    held: Vec<Held>,
    /// Messages that it has taken in while it worked, and the last change that was made by then.
    heard: HashMap<u64, u64>,
    wall_offset: i64,
    was_cut_off: bool,
    next_write: u64,
}

impl Node {
    pub(super) fn new(id: u64, now: u64, wall_offset: i64) -> Self {
        let own = Own {
            node: NodeId(id),
            fingerprint: 1,
            host: "h".into(),
        };
        Self {
            id: NodeId(id),
            fleet: Fleet::new(own),
            kept: Kept::default(),
            core: Core::new(Settings::default(), id, Time::START.after(now)),
            life: Life::Runs,
            way: Way::Open,
            is_paused: false,
            is_reader_frozen: false,
            reaches_sfu: true,
            is_open: false,
            is_renewed: false,
            takeovers: Vec::new(),
            fence: None,
            void: BTreeSet::new(),
            queue: BTreeMap::new(),
            changes: 0,
            scan: None,
            is_scan_due: false,
            is_continuous: false,
            position: Position::FIRST,
            deaf_since: None,
            call: None,
            outputs: VecDeque::new(),
            next_beat: now,
            began_beat: now,
            next_hand_over: now,
            next_probe: now,
            last_step: now,
            questions: Vec::new(),
            calls: Vec::new(),
            held: Vec::new(),
            heard: HashMap::new(),
            wall_offset,
            was_cut_off: false,
            next_write: now,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.life != Life::Dead
    }

    /// Whether it runs and is not stopped in its tracks.
    pub(super) fn is_awake(&self) -> bool {
        self.is_alive() && !self.is_paused
    }

    /// Whether it takes requests.
    pub(super) fn serves(&self) -> bool {
        self.is_awake() && self.is_open
    }

    /// Its connections are gone, whatever its way is.
    pub(super) fn lose_connections(&mut self) {
        self.position = Position::FIRST;
        self.is_renewed = true;
    }

    fn stored_clock(&self, outside: &Outside) -> WallClock {
        match self.fleet.redis_clock() {
            Some((at, millis)) => WallClock::new(at, millis),
            None => WallClock::new(outside.time(), outside.wall() + self.wall_offset),
        }
    }

    /// The leaves that it watches: delayed event by field.
    pub(super) fn records(&self, outside: &Outside) -> BTreeMap<String, String> {
        let clock = self.stored_clock(outside);
        let records = self.core.leaves().all().filter_map(|leave| self.core.record(leave, &clock));
        let current = records.filter(|record| {
            let current = self
                .core
                .find(&record.room, &record.identity)
                .and_then(|id| self.core.leaves().get(id));
            current.is_some_and(|current| current.delay_id() == record.delay_id)
        });
        current.map(|record| (record.field(), record.delay_id.into_owned())).collect()
    }

    /// Everything that is known here of a delayed event.
    pub(super) fn holds(&self, outside: &Outside, delay_id: &str) -> bool {
        let clock = self.stored_clock(outside);
        let names =
            |record: &JobRecord<'_>| record.delay_id == delay_id || record.replaces.iter().any(|replaced| replaced.delay_id == delay_id);
        let mut leaves = self.core.leaves().all().filter_map(|leave| self.core.record(leave, &clock));
        leaves.any(|record| names(&record)) || self.kept.all().any(names)
    }

    pub(super) fn step(&mut self, outside: &mut Outside) {
        if !self.is_awake() {
            return;
        }
        let (now, time) = (outside.now, outside.time());
        if now.saturating_sub(self.last_step) > SUSPENDED_AFTER_MS {
            self.feed(outside, Fact::Woke(0));
        }
        self.last_step = now;
        self.answers(outside);
        if self.core.next_deadline().is_some_and(|at| at <= time) {
            self.feed(outside, Fact::Time);
        }
        self.fleet.on_timer(time);
        if now >= self.next_probe {
            self.next_probe = now + 1_000;
            self.is_continuous &= self.reaches_sfu;
            self.fleet.on_sfu(self.reaches_sfu, time);
        }
        self.read(outside);
        self.write(outside);
        self.scan(outside);
        self.command(outside);
        let is_cut_off = self.fleet.is_cut_off(time);
        if is_cut_off != self.was_cut_off {
            self.was_cut_off = is_cut_off;
            self.feed(outside, Fact::Shared(is_cut_off));
        }
        if now >= self.next_hand_over {
            self.next_hand_over = now + HAND_OVER_INTERVAL_MS;
            if self.fleet.may_hand_over(time) {
                self.hand_all_over(outside);
            }
        }
        self.let_wait(outside);
        if let Life::Stops(since, is_leaving) = self.life {
            self.stop(outside, since, is_leaving);
        }
    }

    // --- the leaves ---

    fn feed(&mut self, outside: &mut Outside, fact: Fact<'_>) {
        let actions = self.core.handle(fact, outside.time());
        self.act(outside, actions);
    }

    fn act(&mut self, outside: &mut Outside, actions: Vec<Action>) {
        let clock = self.stored_clock(outside);
        for action in actions {
            match action {
                Action::Ask(question) => self.questions.push(question),
                Action::Call {
                    leave,
                    homeserver,
                    action,
                    sent,
                } => {
                    let delay_id = self
                        .core
                        .leaves()
                        .get(leave)
                        .map(|job| job.delay_id().to_owned())
                        .unwrap_or_default();
                    self.calls.push(PendingCall {
                        leave,
                        homeserver,
                        action,
                        sent,
                        delay_id,
                    });
                }
                Action::Store(leave) => {
                    if let Some(record) = self.core.record(leave, &clock) {
                        let (field, value) = (record.field(), record.value());
                        self.change(field, Some(value));
                    }
                }
                Action::Forget(room, identity) => {
                    let field = lk_jwt_service::internals::store::field(&room, &identity);
                    self.change(field, None);
                }
                Action::Finished { .. } | Action::SfuSilent(_) | Action::NoWebhooks | Action::Overloaded { .. } => {}
            }
        }
    }

    /// What was asked in the last step is answered.
    fn answers(&mut self, outside: &mut Outside) {
        for question in std::mem::take(&mut self.questions) {
            self.ask(outside, &question);
        }
        for call in std::mem::take(&mut self.calls) {
            let outcome = outside.manage(&call.delay_id, call.action);
            outside.detail(|| format!("{}: {:?} {}: {outcome:?}", self.id, call.action, call.delay_id));
            self.feed(
                outside,
                Fact::Called {
                    leave: call.leave,
                    homeserver: call.homeserver,
                    action: call.action,
                    sent: call.sent,
                    outcome,
                },
            );
        }
    }

    fn ask(&mut self, outside: &mut Outside, question: &Question) {
        let unreachable = !self.reaches_sfu;
        let presence = self.core.presence();
        match question {
            Question::Participant { participant, asked, .. } => {
                let found = presence.get(*participant).zip(presence.room_of(*participant));
                let Some((identity, room)) = found.map(|(found, room)| (found.identity().to_owned(), room.to_string())) else {
                    return;
                };
                let guest = outside.guest(&room, &identity);
                outside.detail(|| format!("{}: asks about {identity}: {guest:?}", self.id));
                let answer = match &guest {
                    _ if unreachable => livekit::Answer::Unreachable,
                    None => livekit::Answer::No,
                    Some(guest) => livekit::Answer::Yes(row(&identity, guest)),
                };
                self.feed(outside, Fact::Participant(*participant, *asked, answer));
            }
            Question::Participants { room, asked, .. } => {
                let Some(name) = presence.room_name(*room).map(ToString::to_string) else {
                    return;
                };
                let guests = outside.guests(&name);
                let rows: Vec<_> = guests.iter().map(|(identity, guest)| row(identity, guest)).collect();
                let answer = if unreachable {
                    livekit::Answer::Unreachable
                } else {
                    livekit::Answer::Yes(&rows[..])
                };
                self.feed(outside, Fact::Participants(*room, *asked, answer));
            }
            Question::Rooms { rooms, asked } => {
                let names = rooms.iter().filter_map(|&room| presence.room_name(room).map(ToString::to_string));
                let found: Vec<_> = names.filter_map(|name| outside.room(&name)).collect();
                let rows: Vec<_> = found
                    .iter()
                    .map(|(name, sid, num_participants)| livekit::RoomRow {
                        name,
                        sid,
                        num_participants: *num_participants,
                        departure_timeout: 20,
                    })
                    .collect();
                let answer = if unreachable {
                    livekit::Answer::Unreachable
                } else {
                    livekit::Answer::Yes(&rows[..])
                };
                self.feed(outside, Fact::Rooms(rooms, *asked, answer));
            }
            // Nobody loses a room here.
            Question::CreateRoom { room } => self.feed(outside, Fact::Created(*room, livekit::Answer::Unclear)),
            Question::Probe => {
                let reach = if unreachable {
                    livekit::Reach::Unreachable
                } else {
                    livekit::Reach::Answered
                };
                self.feed(outside, Fact::Probed(reach));
            }
        }
    }

    fn adopt(&mut self, outside: &mut Outside, record: &JobRecord<'_>) {
        outside.detail(|| format!("{}: adopts {record:?}", self.id));
        let clock = self.stored_clock(outside);
        let actions = self.core.adopt(record, self.is_continuous, true, &clock, outside.time());
        self.act(outside, actions);
    }

    // --- what comes from outside ---

    /// Takes a delegation, or holds it for a while. Whether it is answered by now.
    pub(super) fn delegate(&mut self, outside: &mut Outside, who: usize, delay_id: &str) -> Result<bool, CapacityError> {
        let record = outside.record_of(who, delay_id, &self.stored_clock(outside));
        if self.fleet.has_read() {
            self.take(outside, &record)?;
            let field = record.field();
            if !self.queue.contains_key(&field) {
                return Ok(true);
            }
            self.hold(who, delay_id, outside.now + WRITE_TIMEOUT_MS, Some(field));
            return Ok(false);
        }
        let is_guest = self.core.find(&record.room, &record.identity).is_some();
        if is_guest || !self.fleet.may_delegate(outside.time()) {
            self.take(outside, &record)?;
            self.next_hand_over = outside.now;
            return Ok(true);
        }
        match self.hand_over(outside, &record) {
            Some(at) => {
                self.kept.keep(at, record);
                Ok(true)
            }
            None => {
                self.hold(who, delay_id, outside.now + COMMAND_TIMEOUT_MS, None);
                Ok(false)
            }
        }
    }

    fn hold(&mut self, who: usize, delay_id: &str, until: u64, field: Option<String>) {
        self.held.push(Held {
            who,
            delay_id: delay_id.to_owned(),
            until,
            field,
        });
    }

    /// Answers the delegations that have waited long enough.
    fn let_wait(&mut self, outside: &mut Outside) {
        let mut waiting = Vec::new();
        for held in std::mem::take(&mut self.held) {
            let is_over = outside.now >= held.until;
            match &held.field {
                Some(field) if !is_over && self.queue.contains_key(field) => waiting.push(held),
                Some(_) => outside.answered(held.who, &held.delay_id),
                None if !is_over => waiting.push(held),
                None => {
                    let record = outside.record_of(held.who, &held.delay_id, &self.stored_clock(outside));
                    if self.take(outside, &record).is_ok() {
                        self.next_hand_over = outside.now;
                        outside.answered(held.who, &held.delay_id);
                    }
                }
            }
        }
        self.held.extend(waiting);
    }

    fn take(&mut self, outside: &mut Outside, record: &JobRecord<'_>) -> Result<(), CapacityError> {
        let time = outside.time();
        let mut actions = self.core.handle(Fact::Time, time);
        let delegation = Delegation {
            room: &record.room,
            identity: &record.identity,
            handover: Handover {
                user: &record.user,
                homeserver: &record.homeserver,
                delay_id: &record.delay_id,
                delay: Delay::from_millis(record.delay_ms.unsigned_abs()).expect("a delay"),
                arrived: time,
                listed: true,
                as_user: false,
            },
        };
        let (_, more) = self.core.delegate(&delegation, time)?;
        actions.extend(more);
        self.act(outside, actions);
        Ok(())
    }

    /// Whether the webhook is taken: else it has to be told again.
    pub(super) fn webhook(&mut self, outside: &mut Outside, webhook: &Webhook) -> bool {
        outside.detail(|| format!("{}: is told {:?}", self.id, webhook.event()));
        let acts = !self.fleet.works() || self.fleet.takes_in();
        if acts {
            self.feed(outside, Fact::Date(outside.seconds(), outside.time()));
            self.feed(outside, Fact::Event(&webhook.event()));
        }
        let is_told = match outside.reach(self.way) {
            Reach::Nothing => false,
            _ if outside.redis.is_full => false,
            reach @ (Reach::Answers | Reach::Heard) => {
                outside.redis.tell(News::Webhook(self.id, webhook.text()));
                reach == Reach::Answers
            }
        };
        is_told || (acts && self.core.find(&webhook.room, &webhook.identity).is_some())
    }

    // --- the store ---

    fn change(&mut self, field: String, value: Option<String>) {
        if let Some(scan) = &mut self.scan {
            scan.touched.insert(field.clone());
        }
        if self.queue.is_empty() {
            self.next_write = self.last_step + WRITE_MS;
        }
        let number = match self.queue.remove(&field) {
            Some((number, _)) => number,
            None => {
                self.changes += 1;
                self.changes
            }
        };
        self.queue.insert(field, (number, value));
    }

    fn written(&self) -> u64 {
        let first = self.queue.values().map(|(number, _)| *number).min();
        first.map_or(self.changes, |first| first - 1)
    }

    fn write(&mut self, outside: &mut Outside) {
        if self.queue.is_empty() || outside.now < self.next_write {
            return;
        }
        let Some(watch) = self.fence else {
            self.queue.clear();
            return;
        };
        let reach = outside.reach(self.way);
        if reach == Reach::Nothing {
            return;
        }
        let removes = self.queue.values().any(|(_, value)| value.is_none());
        // A script that has removed something may go on.
        if outside.redis.is_full && !removes {
            return;
        }
        let is_ours = outside.redis.model.watch == Some(watch);
        if is_ours {
            for (field, (_, value)) in &self.queue {
                match value {
                    Some(value) => outside.redis.model.jobs.insert(field.clone(), value.clone()),
                    None => outside.redis.model.jobs.remove(field),
                };
            }
        }
        if reach == Reach::Answers {
            if !is_ours {
                self.void.extend(self.queue.keys().cloned());
                self.next_beat = outside.now;
            }
            self.queue.clear();
        }
    }

    fn scan(&mut self, outside: &mut Outside) {
        if outside.reach(self.way) != Reach::Answers {
            // Begins anew when Redis is back.
            self.is_scan_due |= self.scan.take().is_some();
            return;
        }
        if self.scan.is_none() && std::mem::take(&mut self.is_scan_due) {
            self.scan = Some(Scan {
                fields: outside.redis.model.jobs.keys().cloned().collect(),
                touched: self.queue.keys().cloned().collect(),
                seen: BTreeMap::new(),
            });
        }
        for _ in 0..RECORDS_AT_ONCE {
            let Some(scan) = &mut self.scan else { return };
            let Some(field) = scan.fields.pop_front() else { break };
            let Some(value) = outside.redis.model.jobs.get(&field) else {
                continue;
            };
            if scan.touched.contains(&field) {
                continue;
            }
            let record = JobRecord::read(field.as_bytes(), value.as_bytes()).expect("a record");
            scan.seen.insert(field, record.restarted_at_ms);
            if self.fleet.works() {
                self.fleet.on_record(outside.time());
                self.adopt(outside, &record);
            }
        }
        if self.scan.as_ref().is_none_or(|scan| !scan.fields.is_empty()) {
            return;
        }
        let Some(scan) = self.scan.take() else { return };
        self.is_open = true;
        if let Some(own) = self.fleet.own_watch() {
            for record in self.kept.take() {
                self.adopt(outside, &record);
            }
            // What was made before is dropped, as everything is that is written while nothing is to be.
            if self.fence.is_none() {
                self.queue.clear();
            }
            self.fence = Some(own);
        }
        self.fleet.on_records_read();
        self.next_beat = self.next_beat.min(outside.now + STEP_MS);
        let clock = self.stored_clock(outside);
        let records: Vec<_> = self
            .core
            .leaves()
            .all()
            .filter_map(|leave| self.core.record(leave, &clock))
            .collect();
        let lacking = records.iter().filter(|record| {
            let stored = scan.seen.get(&record.field());
            stored.is_none_or(|stored| stored.saturating_add(1_000) < record.restarted_at_ms)
        });
        let lacking: Vec<_> = lacking.map(|record| (record.field(), record.value())).collect();
        for (field, value) in lacking {
            self.change(field, Some(value));
        }
    }

    // --- messages ---

    fn read(&mut self, outside: &mut Outside) {
        if outside.reach(self.way) != Reach::Answers || self.is_reader_frozen {
            let since = *self.deaf_since.get_or_insert(outside.now);
            if self.way == Way::Cut || outside.now - since >= READER_TIMEOUT_MS {
                self.position = Position::FIRST;
            }
            return;
        }
        self.deaf_since = None;
        let before = self.fleet.reading();
        if self.fleet.takes_from_the_first() {
            self.position = Position::FIRST;
        }
        let messages = outside.redis.model.messages.iter().filter(|message| message.at > self.position);
        let messages: Vec<_> = messages.take(MESSAGES_AT_ONCE).cloned().collect();
        self.fleet.on_read(outside.time());
        if !self.fleet.is_connected(outside.time()) {
            self.position = Position::FIRST;
            return;
        }
        let reading = if self.position == Position::FIRST {
            self.fleet.on_reading_anew()
        } else {
            before
        };
        let Some(last) = messages.last().map(|message| message.at) else {
            return;
        };
        self.position = last;
        for message in messages {
            let works = self.fleet.takes_in();
            match &message.news {
                News::Job(field, value) if works => {
                    if let Ok(record) = JobRecord::read(field, value) {
                        self.adopt(outside, &record);
                    }
                }
                News::Webhook(_, text) => {
                    let webhook = outside.webhook(text);
                    let hearing = self.fleet.hearing(message.at);
                    outside.detail(|| format!("{}: hears, works {works}, as {hearing:?}: {:?}", self.id, webhook.event()));
                    match hearing {
                        Hearing::News => {
                            self.feed(outside, Fact::Date(outside.seconds(), outside.time()));
                            self.feed(outside, Fact::Event(&webhook.event()));
                        }
                        Hearing::Past => self.feed(outside, Fact::PastEvent(&webhook.event())),
                        Hearing::Ignored => {}
                    }
                }
                News::Job(..) | News::Other => {}
            }
            if works && let Some(&serial) = outside.redis.serials.get(&message.at) {
                self.heard.entry(serial).or_insert(self.changes);
            }
        }
        self.fleet.on_taken_in(reading, last, self.changes, outside.time());
    }

    // --- beats ---

    fn command(&mut self, outside: &mut Outside) {
        loop {
            if self.call.is_some() {
                if !self.call_on(outside) {
                    return;
                }
            } else if let Some(output) = self.outputs.pop_front() {
                self.carry_out(outside, output);
            } else if outside.now >= self.next_beat {
                self.beat(outside);
            } else {
                return;
            }
        }
    }

    fn beat(&mut self, outside: &Outside) {
        let shortest = self.core.leaves().shortest_delay();
        let shortest = shortest.and_then(|delay| u32::try_from(delay.as_millis()).ok());
        self.fleet.on_progress(self.written(), shortest);
        let entry = self.fleet.beat(outside.time());
        let own = self.fleet.own_watch().filter(|_| entry.watching);
        let remove = self.fleet.to_remove();
        self.began_beat = outside.now;
        self.call(outside, What::Beat(entry, own, remove));
    }

    fn call(&mut self, outside: &Outside, what: What) {
        self.call = Some(Call {
            what,
            asked: outside.now,
            said: None,
            answered_at: None,
        });
    }

    /// Whether the command is over.
    fn call_on(&mut self, outside: &mut Outside) -> bool {
        let Some(mut call) = self.call.take() else { return true };
        let reach = outside.reach(self.way);
        if call.said.is_none() && reach != Reach::Nothing {
            call.said = Some(match &call.what {
                What::Beat(entry, own, remove) => {
                    let before: Vec<_> = outside.redis.model.messages.iter().map(|message| message.at).collect();
                    let answer = outside.redis.model.beat(self.id, entry, *own, entry.dealt, remove);
                    self.judge_trim(outside, &before);
                    Said::Beat(answer)
                }
                What::Change(seen, wanted) => Said::Change(outside.change(*seen, *wanted)),
            });
            let takes = if let Way::Slow(millis) = self.way { millis } else { 0 };
            call.answered_at = Some(outside.now + takes);
        }
        let is_over = outside.now >= call.asked + COMMAND_TIMEOUT_MS || self.way == Way::Cut;
        let is_answered = reach == Reach::Answers && call.answered_at.is_some_and(|at| outside.now >= at);
        let asked = Time::START.after(call.asked);
        match (is_answered, call.said, is_over) {
            (true, Some(Said::Beat(answer)), _) => {
                if std::mem::take(&mut self.is_renewed) {
                    self.fleet.on_no_answer();
                }
                let outputs = self.fleet.on_answer(&answer, asked, outside.time());
                self.outputs.extend(outputs);
                self.is_open = true;
                let is_writing = !self.queue.is_empty();
                let leaves = self.core.leaves().current();
                let is_due = self.fleet.is_reading_due(answer.counts, leaves, is_writing, outside.time());
                assert!(
                    !is_due || self.fleet.works(),
                    "{}: {} reads, and does not watch",
                    outside.told(),
                    self.id
                );
                self.is_scan_due |= is_due;
                self.kept.on_dealt(self.fleet.dealt());
                self.next_beat = self.began_beat + self.fleet.pace_ms();
            }
            (true, Some(Said::Change(watch)), _) => {
                let outputs = self.fleet.on_changed(watch);
                self.outputs.extend(outputs);
            }
            (_, _, true) => {
                if matches!(call.what, What::Beat(..)) {
                    self.fleet.on_no_answer();
                    self.next_beat = (self.began_beat + self.fleet.pace_ms()).max(outside.now + STEP_MS);
                }
            }
            (_, said, false) => {
                self.call = Some(Call { said, ..call });
                return false;
            }
        }
        true
    }

    /// Nothing goes that was not dealt with by whoever trims.
    fn judge_trim(&self, outside: &mut Outside, before: &[Position]) {
        for at in before {
            if outside.redis.model.messages.iter().any(|message| message.at == *at) {
                break;
            }
            let Some(serial) = outside.redis.serials.remove(at) else { continue };
            let change = self.heard.get(&serial);
            assert!(
                change.is_some_and(|change| *change <= self.written()),
                "{}: {} trims {at}, which it has not dealt with: {change:?} of {:?}",
                outside.told(),
                self.id,
                self.queue
            );
        }
    }

    fn carry_out(&mut self, outside: &mut Outside, output: Output) {
        match output {
            Output::Change { seen, wanted } => self.call(outside, What::Change(seen, wanted)),
            Output::Watching { how, continuous } => self.begin_watch(outside, how, continuous),
            Output::PutAgain => self.is_scan_due = true,
            Output::WriteAgain => self.store_all(outside),
            Output::Yield { given } => {
                // Redis has what was written, but for what is still to be put there.
                if given && !self.is_scan_due && self.scan.is_none() {
                    self.let_go_of_written(outside);
                }
                self.fence = None;
                self.void.clear();
                self.next_hand_over = outside.now;
            }
            Output::HandOverAgain => {
                self.kept.hand_over_again();
                self.next_hand_over = outside.now;
                self.is_scan_due |= self.fleet.works();
            }
        }
    }

    fn begin_watch(&mut self, outside: &mut Outside, how: Takeover, continuous: bool) {
        if self.fleet.own_watch().is_none() {
            return;
        }
        self.takeovers.push((outside.now, how));
        self.heard.clear();
        self.fence = None;
        self.void.clear();
        self.is_continuous = continuous;
        self.kept.hand_over_again();
        self.is_scan_due = true;
    }

    fn store_all(&mut self, outside: &Outside) {
        let clock = self.stored_clock(outside);
        let records = self.core.leaves().all().filter_map(|leave| self.core.record(leave, &clock));
        let records: Vec<_> = records.map(|record| (record.field(), record.value())).collect();
        for (field, value) in records {
            self.change(field, Some(value));
        }
    }

    fn let_go_of_written(&mut self, outside: &Outside) {
        let clock = self.stored_clock(outside);
        for leave in self.core.leaves().all().collect::<Vec<_>>() {
            let field = self.core.record(leave, &clock).map(|record| record.field());
            if field.is_some_and(|field| !self.void.contains(&field) && !self.queue.contains_key(&field)) {
                self.core.let_go(leave, outside.time());
            }
        }
    }

    // --- handing over ---

    /// The message by which it was handed over, where Redis took it and said so.
    fn hand_over(&mut self, outside: &mut Outside, record: &JobRecord<'_>) -> Option<Position> {
        let reach = outside.reach(self.way);
        if reach == Reach::Nothing || outside.redis.is_full {
            return None;
        }
        let at = outside.redis.delegate(record)?;
        (reach == Reach::Answers).then_some(at)
    }

    fn hand_all_over(&mut self, outside: &mut Outside) {
        let mut again = self.kept.take().into_iter();
        while let Some(record) = again.next() {
            match self.hand_over(outside, &record) {
                Some(at) => self.kept.keep(at, record),
                None => {
                    self.kept.give_back([record].into_iter().chain(again));
                    return;
                }
            }
        }
        let clock = self.stored_clock(outside);
        for guest in self.core.leaves().all().collect::<Vec<_>>() {
            let Some(record) = self.core.record(guest, &clock).map(JobRecord::into_owned) else {
                continue;
            };
            let Some(at) = self.hand_over(outside, &record) else { return };
            if self.core.find(&record.room, &record.identity) == Some(guest) && !self.fleet.works() {
                self.core.let_go(guest, outside.time());
                self.kept.keep(at, record);
            }
        }
    }

    fn stop(&mut self, outside: &mut Outside, since: u64, is_leaving: bool) {
        let is_flushed = self.queue.is_empty() || outside.now >= since + FLUSH_TIMEOUT_MS || !self.fleet.works();
        if !is_leaving && is_flushed {
            self.fleet.on_stopping();
            self.life = Life::Stops(since, true);
            (self.next_beat, self.next_hand_over) = (outside.now, outside.now);
            return;
        }
        let has_handed_over = self.fleet.is_alone() || (!self.fleet.works() && self.core.leaves().is_empty() && self.kept.is_handed_over());
        if is_leaving && self.held.is_empty() && (has_handed_over || outside.now >= since + HAND_OVER_TIME_MS) {
            self.next_write = outside.now;
            self.write(outside);
            self.life = Life::Dead;
            outside.ended(self, !has_handed_over);
        }
    }
}

fn row<'a>(identity: &'a str, guest: &'a crate::simulation::sfu::Guest) -> livekit::ParticipantRow<'a> {
    livekit::ParticipantRow {
        identity,
        sid: &guest.sid,
        joined_at_ms: guest.joined_at_ms,
        active: true,
    }
}
