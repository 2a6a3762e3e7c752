//! Several replicas on one Redis: every one of them serves, one of them watches. Pure: facts in, outputs out.
//!
//! The *watcher* is whoever Redis says: it restarts and sends all delayed leaves. The others mint tokens, and hand over to it what
//! they are told. Each node says once in a *beat* that it works; a watcher whose counter stands still is dead, and the next in turn
//! claims the watch under a higher *epoch*, which fences the writes of whoever watched before.
//!
//! ```text
//! entry.rs       what nodes say of themselves, and who watches, as it stands in Redis
//! liveness.rs    whose counter stands still, on our own clock
//! inbox.rs       messages, as far as they are dealt with
//! kept.rs        what was handed over, until the watcher has dealt with it
//! readings.rs    when the records are read again
//! ```
//!
//! Nothing here makes a leave safe to send: evidence does (decision L5a). Two nodes that both believe that they watch cost restarts.

pub mod entry;
mod inbox;
mod kept;
mod liveness;
mod readings;

use std::collections::BTreeMap;

pub use entry::{Entry, NodeId, NodeState, Position, Watch};
use inbox::Inbox;
pub use kept::Kept;
use liveness::Stillness;
pub use readings::Counts;
use readings::Readings;

use crate::time::{Time, WallClock};

/// Version of what nodes say to each other.
pub const PROTOCOL: u32 = 1;
/// Bounds of the time after which a watcher whose counter stands still is dead; between them a tenth of the shortest delay.
const MIN_LIFE_MS: u64 = 2_000;
const MAX_LIFE_MS: u64 = 5_000;
/// Beats in the life of a node.
const BEATS: u64 = 5;
/// Own beats that must have been answered before anybody is called dead.
const MIN_BEATS: u32 = 4;
/// A watcher that the SFU has not answered for that long gives the watch away, once in a while.
const SFU_SILENCE_MS: u64 = 10_000;
const GIVE_INTERVAL_MS: u64 = 60_000;
/// A giver waits for a beat of its heir and that long before it gives the watch to the next one: one that stops has no more time, and
/// another one works on until its heir has read the records.
const TAKE_TIMEOUT_MS: u64 = 1_000;
const PATIENT_TAKE_TIMEOUT_MS: u64 = 5_000;
/// While a node that leaves gives the watch away, all look so often.
const GIVING_BEAT_MS: u64 = 200;
/// A watcher to which no record has come for that long cannot read them, and is as good as dead.
const READ_SILENCE_MS: u64 = 5_000;
/// From so many messages on delegations are stored without one.
pub const MAX_MESSAGES: u64 = 50_000;
/// A node that is up for less than this is given nothing while another one is.
const SETTLED_MS: i64 = 10_000;
/// Entries of nodes that are dead for that long are removed.
const REMOVE_AFTER_MS: u64 = 60_000;
/// By how much clocks may differ that were read over a network.
pub const CLOCK_TOLERANCE_MS: u64 = 1_000;
/// A message about somebody who came or went that is older than this says nothing to a node that only serves.
const STALE_MS: u64 = 20_000;

/// Identity of a node.
#[derive(Clone, Debug)]
pub struct Own {
    /// Id of the node.
    pub node: NodeId,
    /// Nodes with another fingerprint serve another SFU or homeserver: they must not watch each other's leaves.
    pub fingerprint: u64,
    /// Name of the host.
    pub host: Box<str>,
}

/// Redis's answer to a beat.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Redis's clock, in milliseconds since 1970.
    pub redis_ms: i64,
    /// Watcher and epoch.
    pub watch: Option<Watch>,
    /// How much it has.
    pub counts: Counts,
    /// All entries that can be read.
    pub entries: Vec<(NodeId, Entry)>,
}

/// How a node came to watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takeover {
    /// The first watcher of all.
    First,
    /// The former watcher is dead.
    Claimed,
    /// The former watcher gave the watch away.
    Given,
}

/// How a webhook in a message is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// As something that has just happened.
    News,
    /// As of a time before this node watched: it is asked about.
    Past,
    /// Not at all: other nodes act upon it.
    Ignored,
}

/// An action that the driver is to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Make `wanted` the watcher, if it is `seen` still: [`Fleet::on_changed`].
    Change {
        /// Watcher as it was read.
        seen: Option<Watch>,
        /// Watcher that is wanted.
        wanted: Watch,
    },
    /// Begin to watch: read the records.
    Watching {
        /// How it came to that.
        how: Takeover,
        /// Whether the SFU has answered here without a break since before the former watcher's last sign of life.
        continuous: bool,
    },
    /// Redis has lost what was written: put all records again.
    PutAgain,
    /// Redis's clock was set, or is another server's: write all records again, whose times would mean other moments.
    WriteAgain,
    /// Another node watches: hand over every leave, then drop it. Where it was `given` the watch it has read all that was written.
    Yield {
        /// Whether this node gave it the watch.
        given: bool,
    },
    /// Another watcher than before, or Redis was away: hand over again what is not dealt with yet.
    HandOverAgain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Server,
    /// The watch was given to another node then, which has not begun.
    Giving(Watch, Time),
    Watcher(Watch),
}

#[derive(Debug)]
struct Node {
    entry: Entry,
    still: Stillness,
}

/// The fleet, as one node sees it.
#[derive(Debug)]
pub struct Fleet {
    own: Own,
    entry: Entry,
    role: Role,
    nodes: BTreeMap<NodeId, Node>,
    watch: Option<Watch>,
    /// How long the watcher as it is has shown no sign of life, whether it has an entry or not.
    watcher_still: Stillness,
    /// Last sign of life of the watcher.
    watcher_moved: Option<Time>,
    /// Whether the last watcher but this node serves the same SFU and homeserver.
    is_watcher_alike: bool,
    highest_epoch: u64,
    /// When the last answered beat was asked, and when Redis's clock showed what.
    last_beat: Option<(Time, i64)>,
    last_read: Option<Time>,
    /// Time between beats at the last one.
    last_pace_ms: u64,
    last_timer: Option<Time>,
    /// When the SFU answered last, and since when without a break.
    sfu_answered: Option<Time>,
    sfu_stands_since: Option<Time>,
    given_at: Option<Time>,
    /// Heirs that have not taken what is being given away.
    passed_over: Vec<NodeId>,
    claims: Option<(Watch, Takeover)>,
    watching: bool,
    /// When a record came last, or the reading began.
    last_record: Option<Time>,
    inbox: Inbox,
    /// The reader has to begin with the first message again.
    from_the_first: bool,
    /// When the watch began, by Redis's clock.
    began_ms: i64,
    readings: Option<Readings>,
    /// Whether no beat was answered since the last one that was.
    was_away: bool,
}

impl Fleet {
    /// Makes a fleet of which nothing is known yet.
    #[must_use]
    pub fn new(own: Own) -> Self {
        let entry = Entry {
            counter: 0,
            state: NodeState::Waiting,
            watching: false,
            since_ms: 0,
            protocol: PROTOCOL,
            fingerprint: own.fingerprint,
            shortest_ms: None,
            sfu: false,
            lacks: "".into(),
            reaches: "".into(),
            dealt: Position::FIRST,
            host: own.host.clone(),
        };
        Self {
            own,
            entry,
            role: Role::Server,
            nodes: BTreeMap::new(),
            watch: None,
            watcher_still: Stillness::default(),
            watcher_moved: None,
            is_watcher_alike: false,
            highest_epoch: 0,
            last_beat: None,
            last_read: None,
            last_pace_ms: 0,
            last_timer: None,
            sfu_answered: None,
            sfu_stands_since: None,
            given_at: None,
            passed_over: Vec::new(),
            claims: None,
            watching: false,
            last_record: None,
            inbox: Inbox::default(),
            from_the_first: false,
            began_ms: 0,
            readings: None,
            was_away: false,
        }
    }

    // --- what is known ---

    /// Id of this node.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.own.node
    }

    /// The watch that this node has, and does not give away.
    #[must_use]
    pub const fn own_watch(&self) -> Option<Watch> {
        match self.role {
            Role::Watcher(watch) => Some(watch),
            Role::Server | Role::Giving(..) => None,
        }
    }

    /// Whether this node works on the leaves: it watches, or waits for its heir to begin.
    #[must_use]
    pub const fn works(&self) -> bool {
        matches!(self.role, Role::Watcher(_) | Role::Giving(..))
    }

    /// Whether this node works on the leaves and has read all records: until then it knows less of them than Redis.
    #[must_use]
    pub const fn has_read(&self) -> bool {
        self.works() && self.watching
    }

    /// Whether the service is stopping.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.entry.state == NodeState::Leaving
    }

    /// Watcher and epoch, as Redis said last.
    #[must_use]
    pub const fn watch(&self) -> Option<Watch> {
        self.watch
    }

    /// Highest epoch that was ever seen.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.highest_epoch
    }

    /// Message up to which the watcher has dealt with all.
    #[must_use]
    pub fn dealt(&self) -> Position {
        let node = self.watch.and_then(|watch| self.nodes.get(&watch.node));
        node.filter(|node| node.entry.watching)
            .map_or(Position::FIRST, |node| node.entry.dealt)
    }

    /// How a webhook in a message is heard here, whoever was told of it: what this node has acted upon already is a repeat. A node that
    /// does not watch may have guests.
    #[must_use]
    pub fn hearing(&self, at: Position) -> Hearing {
        if !self.works() {
            return if self.is_stale(at) { Hearing::Ignored } else { Hearing::News };
        }
        if !self.takes_in() {
            Hearing::Ignored
        } else if at.millis >= self.began_ms.unsigned_abs() {
            Hearing::News
        } else {
            Hearing::Past
        }
    }

    /// Whether messages are taken in by a node that watches: in their order, which begins with the first one.
    #[must_use]
    pub const fn takes_in(&self) -> bool {
        self.works() && self.watching && !self.from_the_first
    }

    /// Whether messages are to be read from the first one: once all records were read, since until then it is not known whom they are
    /// about, and where Redis has lost some.
    #[must_use]
    pub const fn takes_from_the_first(&mut self) -> bool {
        std::mem::replace(&mut self.from_the_first, false)
    }

    /// Whether a message is so old that it says nothing about the present.
    #[must_use]
    pub fn is_stale(&self, at: Position) -> bool {
        let redis = self.last_beat.map(|(_, millis)| millis.unsigned_abs());
        redis.is_none_or(|redis| at.millis.saturating_add(STALE_MS) < redis)
    }

    /// Homeserver that the watcher lacks: the others see whether it answers them. Empty where there is none.
    #[must_use]
    pub fn asked_about(&self) -> &str {
        let watcher = self.watch.filter(|watch| watch.node != self.own.node);
        let watcher = watcher.and_then(|watch| self.nodes.get(&watch.node));
        watcher.map_or("", |node| &node.entry.lacks)
    }

    /// Whether Redis takes a delegation for the watcher.
    #[must_use]
    pub fn may_delegate(&self, now: Time) -> bool {
        self.waits_for().is_none() && self.is_connected(now)
    }

    /// Whether the leaves of this node can be handed over to the watcher.
    #[must_use]
    pub fn may_hand_over(&self, now: Time) -> bool {
        !self.works() && self.may_delegate(now)
    }

    /// Whether there is nobody to hand anything over to.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let is_other = |(id, entry, is_alive): (NodeId, &Entry, bool)| is_alive && entry.state != NodeState::Leaving && id != self.own.node;
        !self.nodes().any(is_other)
    }

    /// Number of the present reading of messages, for [`Self::on_taken_in`].
    #[must_use]
    pub const fn reading(&self) -> u64 {
        self.inbox.reading()
    }

    /// A moment, and what Redis's clock showed then, in milliseconds since 1970.
    #[must_use]
    pub const fn redis_clock(&self) -> Option<(Time, i64)> {
        self.last_beat
    }

    /// Time after which a watcher whose counter stands still is dead.
    #[must_use]
    pub fn life_ms(&self) -> u64 {
        let delays = self.nodes.values().filter_map(|node| node.entry.shortest_ms);
        let shortest = delays.chain(self.entry.shortest_ms).min().unwrap_or(u32::MAX);
        (u64::from(shortest) / 10).clamp(MIN_LIFE_MS, MAX_LIFE_MS)
    }

    /// Time from one beat to the next.
    #[must_use]
    pub fn beat_ms(&self) -> u64 {
        self.life_ms() / BEATS
    }

    /// Time to the next beat. A giver is quick, to see who may have the watch and that its heir has begun; where it leaves, the others are,
    /// too, to say that they may, and to begin.
    #[must_use]
    pub fn pace_ms(&self) -> u64 {
        let is_leaving = |watch: Watch| {
            let watcher = self.nodes.get(&watch.node);
            watcher.is_some_and(|node| node.entry.state == NodeState::Leaving)
        };
        let is_given = matches!(self.role, Role::Giving(..)) || self.watch.is_some_and(is_leaving);
        if is_given {
            self.beat_ms().min(GIVING_BEAT_MS)
        } else {
            self.beat_ms()
        }
    }

    /// All nodes, whether each is alive, and whether it is this one.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Entry, bool)> {
        let life = self.life_ms();
        self.nodes
            .iter()
            .map(move |(&id, node)| (id, &node.entry, !node.still.is_over(life)))
    }

    /// A living node with another fingerprint that was here before: this one waits for its end.
    #[must_use]
    pub fn waits_for(&self) -> Option<(NodeId, &Entry)> {
        let own = (self.entry.since_ms, self.own.node);
        let mut others = self.nodes().filter(|&(id, entry, is_alive)| {
            is_alive
                && entry.fingerprint != self.own.fingerprint
                && entry.state != NodeState::Leaving
                && entry.since_ms != 0
                && (entry.since_ms, id) < own
        });
        others.next().map(|(id, entry, _)| (id, entry))
    }

    /// For how long messages have not been read here, or wait to be dealt with.
    #[must_use]
    pub fn unread_ms(&self, now: Time) -> u64 {
        let read = self.last_read.map_or(0, |at| now.since(at));
        // A reader waits for that long for the next message.
        let deaf = if read > 2 * self.beat_ms() { read } else { 0 };
        self.inbox.waits_since().map_or(0, |since| now.since(since)).max(deaf)
    }

    /// How long ago the watcher last showed a sign of life.
    #[must_use]
    pub fn watcher_seen_ms(&self, now: Time) -> Option<u64> {
        self.watcher_moved.map(|at| now.since(at))
    }

    /// Whether a node is of this fleet: it serves the same SFU and homeserver.
    #[must_use]
    pub const fn is_alike(&self, entry: &Entry) -> bool {
        entry.fingerprint == self.own.fingerprint
    }

    /// Whether Redis has answered within the life of a node.
    #[must_use]
    pub fn is_connected(&self, now: Time) -> bool {
        self.last_beat.is_some_and(|(at, _)| now.since(at) <= self.life_ms())
    }

    /// Whether this node works on without Redis, and another one may do so with it.
    #[must_use]
    pub fn is_cut_off(&self, now: Time) -> bool {
        self.works() && !self.is_connected(now)
    }

    // --- facts ---

    /// The reader of the stream has got an answer, or nothing within its time: it is not deaf.
    pub fn on_read(&mut self, now: Time) {
        self.last_read = Some(now);
    }

    /// The reader has begun with the first message again. The number of the reading.
    pub fn on_reading_anew(&mut self) -> u64 {
        self.inbox.begin()
    }

    /// Messages up to this one were taken in, by that reading; so many changes of records were made by then.
    pub fn on_taken_in(&mut self, reading: u64, last: Position, change: u64, now: Time) {
        if self.takes_in() {
            self.inbox.take_in(reading, last, change, now);
        }
    }

    /// The timer of the leaves ran.
    pub fn on_timer(&mut self, now: Time) {
        self.last_timer = Some(now);
    }

    /// Whether the SFU answered.
    pub fn on_sfu(&mut self, answered: bool, now: Time) {
        if answered {
            self.sfu_answered = Some(now);
            self.sfu_stands_since.get_or_insert(now);
        } else {
            self.sfu_stands_since = None;
        }
        self.entry.sfu = answered;
    }

    /// The homeserver with most of the leaves that does not answer this node, which watches, and the one that the watcher lacks and that
    /// answers this node; empty where there is none. Whether that is news.
    pub fn on_homeserver(&mut self, lacks: &str, reaches: &str) -> bool {
        let is_news = *self.entry.lacks != *lacks || *self.entry.reaches != *reaches;
        if is_news {
            (self.entry.lacks, self.entry.reaches) = (lacks.into(), reaches.into());
        }
        is_news
    }

    /// A record was read.
    pub const fn on_record(&mut self, now: Time) {
        self.last_record = Some(now);
    }

    /// The records were read: the watch has begun. One that is being given away has not: nothing can be written under it.
    pub fn on_records_read(&mut self) {
        if matches!(self.role, Role::Watcher(_)) && !std::mem::replace(&mut self.watching, true) {
            self.inbox.begin();
            self.from_the_first = true;
        }
    }

    /// All changes of records up to this one are written, and the shortest delay among the leaves.
    pub fn on_progress(&mut self, written: u64, shortest_ms: Option<u32>) {
        self.entry.dealt = self.inbox.dealt(written);
        self.entry.shortest_ms = shortest_ms;
    }

    /// Whether a watcher has to read all records, where Redis has so much and there are so many leaves, and changes are being written or
    /// not.
    pub fn is_reading_due(&mut self, counts: Counts, leaves: usize, is_writing: bool, now: Time) -> bool {
        let readings = self.readings.as_mut();
        readings.is_some_and(|readings| readings.is_due(counts, leaves, is_writing, now))
    }

    /// The service is stopping.
    pub fn on_stopping(&mut self) {
        self.entry.state = NodeState::Leaving;
    }

    /// The entry for the next beat. The counter goes up only where everything that makes a watcher works: what is deaf, hung or heard
    /// one way only counts as dead.
    pub fn beat(&mut self, now: Time) -> Entry {
        // What is under way now began at the pace of the last beat: a shorter delay makes nobody deaf.
        let pace = self.beat_ms();
        let within = 2 * pace.max(std::mem::replace(&mut self.last_pace_ms, pace));
        let is_recent = |at: Option<Time>| at.is_some_and(|at| now.since(at) <= within);
        let works = is_recent(self.last_beat.map(|(at, _)| at)) && is_recent(self.last_read) && is_recent(self.last_timer);
        let is_reading = matches!(self.role, Role::Watcher(_)) && !self.watching;
        let reads = !is_reading || self.last_record.is_none_or(|at| now.since(at) <= READ_SILENCE_MS);
        self.entry.counter += u64::from(works && reads);
        if self.entry.state != NodeState::Leaving {
            let is_up = self.entry.since_ms != 0 && self.waits_for().is_none();
            self.entry.state = if is_up { NodeState::Up } else { NodeState::Waiting };
        }
        self.entry.watching = self.watching && self.works();
        self.entry.clone()
    }

    /// Nodes whose entries nobody needs: only the watcher removes them.
    #[must_use]
    pub fn to_remove(&self) -> Vec<NodeId> {
        let is_over = |node: &Node| node.still.is_over(REMOVE_AFTER_MS);
        let dead = self.nodes.iter().filter(|(id, node)| **id != self.own.node && is_over(node));
        self.own_watch().map(|_| dead.map(|(&id, _)| id).collect()).unwrap_or_default()
    }

    /// A beat got no answer.
    pub const fn on_no_answer(&mut self) {
        self.was_away = true;
    }

    /// A beat that was sent at `asked` was answered.
    pub fn on_answer(&mut self, answer: &Answer, asked: Time, now: Time) -> Vec<Output> {
        let mut out = Vec::new();
        let gap = self.gap(asked);
        // Redis's clock was read somewhere between.
        let read = asked.after(now.since(asked) / 2);
        let expected = self.last_beat.map(|(at, millis)| WallClock::new(at, millis).unix_millis(read));
        let was_set = expected.is_some_and(|expected| expected.abs_diff(answer.redis_ms) > CLOCK_TOLERANCE_MS);
        if was_set && self.works() {
            out.push(Output::WriteAgain);
        }
        self.last_beat = Some((read, answer.redis_ms));
        // A new primary's clock may be behind: what it numbers now did not happen before the watch began.
        self.began_ms = self.began_ms.min(answer.redis_ms);
        if self.entry.since_ms == 0 {
            self.entry.since_ms = answer.redis_ms.max(1);
        }
        self.see(answer, gap, now);
        if std::mem::take(&mut self.was_away) {
            out.push(Output::HandOverAgain);
        }
        self.on_watch(answer.watch, &mut out);
        self.decide(now, &mut out);
        out
    }

    /// The watcher as it is after [`Output::Change`].
    pub fn on_changed(&mut self, watch: Option<Watch>) -> Vec<Output> {
        let mut out = Vec::new();
        self.on_watch(watch, &mut out);
        out
    }

    // --- rules ---

    /// Time between two answered beats, as far as it counts: a hole in our own beats says nothing about others.
    fn gap(&self, asked: Time) -> Option<u64> {
        let gap = self.last_beat.map(|(last, _)| asked.since(last));
        gap.filter(|gap| *gap <= 2 * self.beat_ms())
    }

    fn see(&mut self, answer: &Answer, gap: Option<u64>, now: Time) {
        let mut former = std::mem::take(&mut self.nodes);
        let mut watcher_moves = false;
        for (id, entry) in &answer.entries {
            let known = former.remove(id);
            let moved = known.as_ref().is_none_or(|known| known.entry.counter != entry.counter);
            let mut still = known.map(|known| known.still).unwrap_or_default();
            still.on_beat(moved, gap);
            watcher_moves |= moved && answer.watch.is_some_and(|watch| watch.node == *id);
            let entry = entry.clone();
            self.nodes.insert(*id, Node { entry, still });
        }
        let is_other = answer.watch != self.watch;
        self.watcher_still.on_beat(is_other || watcher_moves, gap);
        if watcher_moves {
            self.watcher_moved = Some(now);
            let watcher = answer.watch.filter(|watch| watch.node != self.own.node);
            if let Some(node) = watcher.and_then(|watch| self.nodes.get(&watch.node)) {
                self.is_watcher_alike = self.is_alike(&node.entry);
            }
        }
    }

    fn on_watch(&mut self, watch: Option<Watch>, out: &mut Vec<Output>) {
        let former = std::mem::replace(&mut self.watch, watch);
        if let Some(watch) = watch {
            self.highest_epoch = self.highest_epoch.max(watch.epoch);
        }
        let is_ours = watch.is_some_and(|watch| watch.node == self.own.node);
        match (self.role, watch) {
            (Role::Watcher(own), Some(watch)) if is_ours => {
                if watch.epoch >= own.epoch {
                    self.role = Role::Watcher(watch);
                } else {
                    self.assert(own, Some(watch), out);
                }
            }
            // Taken back: what is written under the former epoch is refused.
            (Role::Giving(to, _), Some(watch)) if is_ours && watch.epoch >= to.epoch => self.begin_watch(watch, out),
            (Role::Watcher(own), None) => self.assert(own, None, out),
            // Written before writes were lost.
            (Role::Watcher(own), Some(watch)) if watch.epoch < own.epoch => self.assert(own, Some(watch), out),
            (Role::Watcher(_), Some(_)) => self.yield_watch(false, out),
            (Role::Giving(to, _), Some(watch)) if watch.epoch >= to.epoch && watch != to => self.yield_watch(false, out),
            (Role::Giving(..), _) => {}
            (Role::Server, Some(watch)) if is_ours => self.begin_watch(watch, out),
            (Role::Server, _) => {
                if watch != former && former.is_some() {
                    out.push(Output::HandOverAgain);
                }
            }
        }
        if !is_ours {
            self.claims = None;
        }
    }

    fn begin_watch(&mut self, watch: Watch, out: &mut Vec<Output>) {
        let how = match self.claims.take() {
            Some((wanted, how)) if wanted == watch => how,
            Some(_) | None => Takeover::Given,
        };
        // Of another SFU nothing is known that was known before.
        let continuous = match (self.sfu_stands_since, self.watcher_moved) {
            (Some(stands), Some(moved)) => stands <= moved && self.is_watcher_alike,
            (None, _) | (_, None) => false,
        };
        self.role = Role::Watcher(watch);
        self.watching = false;
        self.last_record = self.last_beat.map(|(at, _)| at);
        self.gift_ended();
        self.entry.dealt = Position::FIRST;
        self.inbox.begin();
        if let Some((at, redis_ms)) = self.last_beat {
            self.began_ms = redis_ms;
            self.readings = Some(Readings::new(at));
        }
        out.push(Output::Watching { how, continuous });
    }

    /// Redis has lost the watch, and more. It is had again under another epoch: who found the same one in each beat would not know that what
    /// was handed over is lost, too.
    fn assert(&mut self, own: Watch, seen: Option<Watch>, out: &mut Vec<Output>) {
        let epoch = self.highest_epoch.max(own.epoch) + 1;
        out.push(Output::Change {
            seen,
            wanted: Watch { epoch, ..own },
        });
        self.from_the_first = true;
        out.push(Output::PutAgain);
    }

    fn yield_watch(&mut self, given: bool, out: &mut Vec<Output>) {
        // What was not read yet was not written either.
        let given = given && self.watching;
        self.role = Role::Server;
        self.watching = false;
        self.readings = None;
        self.gift_ended();
        out.push(Output::Yield { given });
    }

    /// The gift has ended, one way or the other: who did not take it in time may do so another time. One that leaves has no other time.
    fn gift_ended(&mut self) {
        if self.entry.state != NodeState::Leaving {
            self.passed_over.clear();
        }
    }

    fn decide(&mut self, now: Time, out: &mut Vec<Output>) {
        match self.role {
            Role::Server => self.claim(out),
            Role::Watcher(own) => {
                let silent = !self.entry.sfu && self.sfu_answered.is_none_or(|at| now.since(at) >= SFU_SILENCE_MS);
                let lacks = self.entry.lacks.clone();
                let leaving = self.entry.state == NodeState::Leaving;
                let may_give = self.given_at.is_none_or(|at| now.since(at) >= GIVE_INTERVAL_MS) && self.watching;
                let own_sfu = self.entry.sfu;
                let works =
                    |entry: &Entry| (silent && entry.sfu) || (!lacks.is_empty() && entry.reaches == lacks && (entry.sfu || !own_sfu));
                let heir = match (leaving, may_give) {
                    (true, _) => self.heir_to_give(|_| true),
                    (false, true) => self.heir_to_give(works),
                    (false, false) => None,
                };
                if let Some(heir) = heir {
                    self.give(Some(own), heir, now, out);
                }
            }
            Role::Giving(to, at) => {
                let node = self.nodes.get(&to.node);
                if node.is_some_and(|node| node.entry.watching) && self.watch == Some(to) {
                    self.yield_watch(true, out);
                } else if now.since(at) >= self.take_timeout_ms() + self.beat_ms() {
                    // Where the change was not made, the same one may still take it.
                    if self.watch == Some(to) {
                        self.passed_over.push(to.node);
                    }
                    let heir = self.heir_to_give(|_| true).unwrap_or(self.own.node);
                    self.give(self.watch, heir, now, out);
                }
            }
        }
    }

    fn take_timeout_ms(&self) -> u64 {
        if self.entry.state == NodeState::Leaving {
            TAKE_TIMEOUT_MS
        } else {
            PATIENT_TAKE_TIMEOUT_MS
        }
    }

    fn give(&mut self, seen: Option<Watch>, node: NodeId, now: Time, out: &mut Vec<Output>) {
        let wanted = Watch {
            node,
            epoch: self.highest_epoch + 1,
        };
        self.given_at = Some(now);
        self.role = Role::Giving(wanted, now);
        out.push(Output::Change { seen, wanted });
    }

    /// Chooses the node that started last among those that are up and settled: a rolling deploy moves the watch once.
    fn heir_to_give(&self, works: impl Fn(&Entry) -> bool) -> Option<NodeId> {
        let own = self.own.node;
        let redis_ms = self.last_beat.map_or(0, |(_, ms)| ms);
        let candidates = self.nodes().filter(|&(id, entry, is_alive)| {
            is_alive && id != own && entry.state == NodeState::Up && works(entry) && !self.passed_over.contains(&id)
        });
        let settled = |entry: &Entry| redis_ms.saturating_sub(entry.since_ms) >= SETTLED_MS;
        candidates
            .max_by_key(|(id, entry, _)| (entry.sfu, settled(entry), entry.since_ms, *id))
            .map(|(id, ..)| id)
    }

    /// Claims the watch of a dead watcher when it is our turn.
    fn claim(&mut self, out: &mut Vec<Output>) {
        let Some(turn) = self.turn() else { return };
        let patience = match (self.watch, self.highest_epoch) {
            // Nobody has ever watched.
            (None, 0) => 0,
            (Some(_), _) | (None, _) => self.life_ms(),
        } + turn * self.beat_ms();
        let is_never = self.watch.is_none() && self.highest_epoch == 0;
        if self.watcher_still.beats() < if is_never { 1 } else { MIN_BEATS } || self.watcher_still.millis() < patience {
            return;
        }
        let wanted = Watch {
            node: self.own.node,
            epoch: self.highest_epoch + 1,
        };
        let how = if is_never { Takeover::First } else { Takeover::Claimed };
        self.claims = Some((wanted, how));
        out.push(Output::Change { seen: self.watch, wanted });
    }

    /// How many claim before this node; `None` where it does not claim at all.
    fn turn(&self) -> Option<u64> {
        let watcher = self.watch.map(|watch| watch.node);
        let heirs = self
            .nodes()
            .filter(|&(id, entry, is_alive)| is_alive && entry.state == NodeState::Up && (Some(id) != watcher || id == self.own.node));
        let mut heirs: Vec<_> = heirs.map(|(id, entry, _)| (!entry.sfu, entry.since_ms, id)).collect();
        heirs.sort_unstable();
        let at = heirs.iter().position(|(_, _, id)| *id == self.own.node)?;
        u64::try_from(at).ok()
    }
}
