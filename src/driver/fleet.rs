//! The driver's side of a fleet: beats, messages, takeovers, and the one path by which leaves are handed over.
//!
//! A leave in the core of a node that does not watch is a *guest*: the node looks after it in full until the watcher has it. Guests come
//! from delegations while Redis was away, and from the watch itself when it went to another node. What was handed over is kept until the
//! watcher has dealt with it, and handed over again after every trouble.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Driver, Fact, Gate, Leaves, sfu_event};
use crate::delayed_event::Outcome;
use crate::delayed_leave::{CapacityError, LeaveId};
use crate::fleet::{Counts, Fleet, Hearing, Kept, NodeState, Output, Own, Position, Takeover, Watch};
use crate::livekit::Reach;
use crate::log_throttle::LogThrottle;
use crate::metrics::METRICS;
use crate::server_name::ServerName;
use crate::sfu::webhook::{Kind, Verified, Webhook};
use crate::store::JobRecord;
use crate::store::shared::{Handed, Message, News, SharedStore};
use crate::time::{Time, WallClock};

/// Time for a delegation to be written (decision L10).
const DELEGATE_TIMEOUT: Duration = Duration::from_secs(3);
/// Guests that are handed over at once.
const GUESTS_AT_ONCE: usize = 64;
/// Between two tries to hand over, and to read messages.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
const READ_PAUSE: Duration = Duration::from_millis(100);
/// How often the SFU's base address is asked.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Homeservers of which it is remembered since when calls fail.
const MAX_FAILING: usize = 1_024;
/// Names of users and homeservers at their bound that are told, and the name of a watcher that has no room for any leave.
const MAX_FULL: usize = 1_000;
const FULL_ALL: &str = "all";
/// How often others are told of the watch.
const TELL_INTERVAL: Duration = Duration::from_secs(60);
/// Time for changes to be written before the watch is given away.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Told of a webhook that another node has received.
pub type OnWebhook = Box<dyn Fn(&Webhook) + Send + Sync>;
/// Told that this node watches: when it begins to, and once a minute.
pub type OnWatch = Box<dyn Fn() + Send + Sync>;

/// Parts that a node in a fleet has beside its leaves.
pub struct Settings {
    /// Identity of the node.
    pub own: Own,
    /// Where the fleet is.
    pub store: SharedStore,
}

pub(super) struct Link {
    store: SharedStore,
    fleet: Mutex<Fleet>,
    /// Delegations that were handed over.
    kept: Mutex<Kept<JobRecord<'static>>>,
    told: OnceLock<(OnWebhook, OnWatch)>,
    /// There may be something to hand over.
    hand_over: Notify,
    /// There is something to say that others wait for.
    beat_now: Notify,
    continuous: AtomicBool,
    /// Readings that have to end before Redis is known to have all that is known here.
    unput: AtomicU32,
    /// Homeservers of which no call was answered, and since when.
    failing: Mutex<HashMap<ServerName, Time>>,
    away: LogThrottle,
    waits: LogThrottle,
    guests: LogThrottle,
    /// Since when this node has guests.
    guests_since: Mutex<Option<Instant>>,
}

/// Whether nodes find each other, for those who want to know.
#[derive(Clone, Debug, serde::Serialize)]
pub struct FleetReport {
    /// Id of this node.
    pub node: String,
    /// Id of the node that watches; empty where nobody does.
    pub watcher: String,
    /// Epoch of the watch.
    pub epoch: u64,
    /// Whether this node watches.
    pub watches: bool,
    /// Whether Redis answers this node.
    pub redis: bool,
    /// How many milliseconds ago the watcher last showed a sign of life here.
    pub watcher_seen_ms: Option<u64>,
    /// Leaves that this node looks after although another one watches.
    pub guests: usize,
    /// For how many seconds it has had any.
    pub guests_seconds: u64,
    /// Nodes of the fleet, this one included.
    pub nodes: Vec<NodeReport>,
}

/// A node, as this one sees it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NodeReport {
    /// Id of the node.
    pub node: String,
    /// Name of its host.
    pub host: Box<str>,
    /// State of the node: `up`, `waiting`, `leaving` or `dead`.
    pub state: &'static str,
    /// Whether it works on the leaves.
    pub watching: bool,
    /// Whether it serves the same SFU and homeserver as this one.
    pub alike: bool,
    /// Whether the SFU answers it.
    pub sfu: bool,
}

impl Link {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            store: settings.store,
            fleet: Mutex::new(Fleet::new(settings.own)),
            kept: Mutex::default(),
            told: OnceLock::new(),
            hand_over: Notify::new(),
            beat_now: Notify::new(),
            continuous: AtomicBool::new(false),
            unput: AtomicU32::new(0),
            failing: Mutex::default(),
            away: LogThrottle::once_a_minute(),
            waits: LogThrottle::once_a_minute(),
            guests: LogThrottle::once_a_minute(),
            guests_since: Mutex::default(),
        }
    }

    /// Whether this node works on the leaves.
    pub(super) fn works(&self) -> bool {
        self.fleet.lock().works()
    }

    /// Whether this node works on the leaves, and knows all of them.
    pub(super) fn has_read(&self) -> bool {
        self.fleet.lock().has_read()
    }

    /// Whether this node works on the leaves, and has not come to the messages yet.
    pub(super) fn is_reading(&self) -> bool {
        let fleet = self.fleet.lock();
        fleet.works() && !fleet.takes_in()
    }

    /// Time from one beat to the next.
    pub(super) fn beat_ms(&self) -> u64 {
        self.fleet.lock().beat_ms()
    }

    pub(super) fn on_timer(&self, now: Time) {
        self.fleet.lock().on_timer(now);
    }

    /// A homeserver is called: since then, unless it was before, no call is answered.
    pub(super) fn on_call(&self, server: &ServerName, now: Time) {
        let mut failing = self.failing.lock();
        if !failing.contains_key(server) {
            // Those that never answer again must not keep others from being noticed.
            if failing.len() >= MAX_FAILING {
                failing.clear();
            }
            failing.insert(server.clone(), now);
        }
    }

    pub(super) fn on_called(&self, server: &ServerName, outcome: Outcome) {
        if !matches!(outcome, Outcome::Transient(_)) {
            self.failing.lock().remove(server);
        }
    }

    /// A record was read.
    pub(super) fn on_record(&self, now: Time) {
        self.fleet.lock().on_record(now);
    }

    /// Notes that what a reading has shown Redis to lack was put there.
    pub(super) fn on_put_again(&self) {
        let _ = self
            .unput
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |unput| unput.checked_sub(1));
    }

    pub(super) fn is_continuous(&self) -> bool {
        self.continuous.load(Ordering::Relaxed)
    }

    /// Redis's clock, by which all times are stored; ours, until Redis has answered.
    pub(super) fn stored_clock(&self, ours: &WallClock) -> WallClock {
        let redis = self.fleet.lock().redis_clock();
        redis.map_or(*ours, |(at, millis)| WallClock::new(at, millis))
    }

    fn tell_watch(&self) {
        if let Some((_, on_watch)) = self.told.get() {
            on_watch();
        }
    }
}

/// The names under which the watcher, a user and a homeserver are told to be at their bound.
fn full_names(user: &str, homeserver: &str) -> [String; 3] {
    [FULL_ALL.to_owned(), full_user(user), full_server(homeserver)]
}

fn full_user(user: &str) -> String {
    let digest = Sha256::digest(user.as_bytes());
    let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("user:{digest}")
}

fn full_server(homeserver: &str) -> String {
    format!("homeserver:{homeserver}")
}

/// A webhook as nodes tell it to each other: what is used of it, in LiveKit's own form, and what its token said.
fn told(verified: Verified, webhook: &Webhook) -> Option<String> {
    match webhook.kind {
        Kind::RoomStarted | Kind::RoomFinished | Kind::ParticipantJoined | Kind::ParticipantLeft | Kind::ParticipantConnectionAborted => {
            let mut told = webhook.to_json();
            told["iat"] = verified.issued_at.into();
            told["digest"] = format!("{:016x}", verified.digest).into();
            Some(told.to_string())
        }
        Kind::TrackPublished | Kind::TrackUnpublished | Kind::Other => None,
    }
}

fn hear(told: &[u8]) -> Option<(Verified, Webhook)> {
    #[derive(serde::Deserialize)]
    struct Token {
        iat: Option<i64>,
        digest: String,
    }
    let token: Token = serde_json::from_slice(told).ok()?;
    let verified = Verified {
        issued_at: token.iat,
        digest: u64::from_str_radix(&token.digest, 16).ok()?,
    };
    Some((verified, Webhook::parse(told).ok()?))
}

impl Leaves {
    /// Tells this node's fleet, if it is in one, of a webhook that was taken here, and acted upon or not. `false` where nobody else could be
    /// told, and nobody here looks after its participant: LiveKit has to send it again.
    pub async fn tell(&self, verified: Verified, webhook: &Webhook, was_acted_upon: bool) -> bool {
        let driver = &self.0;
        let Some(link) = &driver.fleet else { return true };
        let Some(text) = told(verified, webhook) else { return true };
        let node = link.fleet.lock().node();
        if matches!(link.store.shared.tell_webhook(node, &text).await, Ok(true)) {
            return true;
        }
        let room = webhook.room.as_ref().map(|room| &*room.name).unwrap_or_default();
        let identity = webhook.participant.as_ref().map(|participant| &*participant.identity);
        was_acted_upon && identity.is_some_and(|identity| self.knows(room, identity))
    }

    /// Whether no other replica watches: this process is alone, or it is the watcher.
    #[must_use]
    pub fn watches_all(&self) -> bool {
        self.0.fleet.as_ref().is_none_or(Link::works)
    }

    /// Has others told of webhooks that other nodes have received, and of this node's watch.
    pub fn share_fleet(&self, on_webhook: OnWebhook, on_watch: OnWatch) {
        if let Some(link) = &self.0.fleet {
            // Set once, by the wiring.
            let _ = link.told.set((on_webhook, on_watch));
        }
    }

    /// The fleet as this node sees it; `None` where it is in none.
    #[must_use]
    pub fn fleet(&self) -> Option<FleetReport> {
        let link = self.0.fleet.as_ref()?;
        let guests = if link.works() {
            0
        } else {
            self.0.state.lock().cores.leaves().len()
        };
        let now = self.0.clock.now();
        let fleet = link.fleet.lock();
        let nodes = fleet.nodes().map(|(id, entry, is_alive)| NodeReport {
            node: id.to_string(),
            host: entry.host.clone(),
            watching: entry.watching,
            alike: fleet.is_alike(entry),
            state: match (is_alive, entry.state) {
                (false, _) => "dead",
                (true, NodeState::Up) => "up",
                (true, NodeState::Waiting) => "waiting",
                (true, NodeState::Leaving) => "leaving",
            },
            sfu: entry.sfu,
        });
        Some(FleetReport {
            node: fleet.node().to_string(),
            watcher: fleet.watch().map(|watch| watch.node.to_string()).unwrap_or_default(),
            epoch: fleet.epoch(),
            watches: fleet.own_watch().is_some(),
            redis: fleet.is_connected(now),
            watcher_seen_ms: fleet.watcher_seen_ms(now),
            guests,
            guests_seconds: link.guests_since.lock().map_or(0, |since| since.elapsed().as_secs()),
            nodes: nodes.collect(),
        })
    }

    /// Whether this node is on its way out of its fleet: new requests had better go to another one.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let link = self.0.fleet.as_ref();
        link.is_some_and(|link| link.fleet.lock().is_leaving())
    }

    /// Gives the watch to another node, and hands over what this one looks after, `within` that time. Meanwhile everything goes on.
    pub async fn hand_over(&self, within: Duration) {
        let driver = &self.0;
        let Some(link) = &driver.fleet else { return };
        let deadline = Instant::now() + within;
        if link.works() {
            let flushed = async {
                while driver.store.waiting() > 0 {
                    sleep(POLL_INTERVAL).await;
                }
            };
            let _ = timeout(FLUSH_TIMEOUT, flushed).await;
        }
        link.fleet.lock().on_stopping();
        link.beat_now.notify_one();
        link.hand_over.notify_one();
        while Instant::now() < deadline && !driver.has_handed_over(link) {
            sleep(POLL_INTERVAL).await;
        }
        if !driver.state.lock().cores.leaves().is_empty() {
            tracing::warn!(name: "watch_not_handed_over", "no other replica took all leaves over: they are restarted once more and left to the homeservers' timers");
        }
    }
}

impl Driver {
    pub(super) fn join(self: &Arc<Self>) {
        if self.fleet.is_some() {
            tokio::spawn(self.clone().keep_beating());
            tokio::spawn(self.clone().keep_reading());
            tokio::spawn(self.clone().keep_handing_over());
            tokio::spawn(self.clone().keep_probing());
        }
    }

    fn has_handed_over(&self, link: &Link) -> bool {
        let is_alone = link.fleet.lock().is_alone();
        is_alone || (!link.works() && self.state.lock().cores.leaves().is_empty() && link.kept.lock().is_handed_over())
    }

    // --- beats ---

    async fn keep_beating(self: Arc<Self>) {
        let Some(link) = &self.fleet else { return };
        let (mut last_full, mut told, mut was_cut_off) = (None, None, false);
        loop {
            let asked = self.clock.now();
            let began = Instant::now();
            let is_first = link.fleet.lock().redis_clock().is_none();
            let answered = self.beat(link, asked).await;
            if let Some(counts) = answered {
                self.read_again_when_due(link, counts);
            }
            let is_cut_off = link.fleet.lock().is_cut_off(self.clock.now());
            if is_cut_off != was_cut_off {
                was_cut_off = is_cut_off;
                self.feed(Fact::Shared(is_cut_off));
            }
            if !link.works() {
                told = None;
            } else if told.is_none_or(|told| began.duration_since(told) >= TELL_INTERVAL) {
                told = Some(began);
                link.tell_watch();
            }
            self.tell_bounds(link, &mut last_full).await;
            self.observe(link);
            // A newcomer is nobody before its second beat.
            if !(is_first && answered.is_some()) {
                let pace = Duration::from_millis(link.fleet.lock().pace_ms());
                tokio::select! {
                    () = sleep_until(began + pace) => {}
                    () = link.store.fence.refused() => {}
                    () = link.beat_now.notified() => {}
                }
            }
        }
    }

    /// Sends a beat; how much Redis has, where it was answered.
    async fn beat(self: &Arc<Self>, link: &Link, asked: Time) -> Option<Counts> {
        let (_, written) = self.store.progress();
        let shortest = self.state.lock().cores.leaves().shortest_delay();
        let shortest = shortest.and_then(|delay| u32::try_from(delay.as_millis()).ok());
        let (node, entry, own, remove) = {
            let mut fleet = link.fleet.lock();
            fleet.on_progress(written, shortest);
            let entry = fleet.beat(asked);
            let own = fleet.own_watch().filter(|_| entry.watching);
            (fleet.node(), entry, own, fleet.to_remove())
        };
        let answer = link.store.shared.beat(node, &entry, own, entry.dealt, &remove).await;
        let now = self.clock.now();
        let (outputs, counts) = match answer {
            Ok(answer) => {
                let mut fleet = link.fleet.lock();
                if link.store.shared.was_renewed() {
                    fleet.on_no_answer();
                }
                (fleet.on_answer(&answer, asked, now), answer.counts)
            }
            Err(error) => {
                link.fleet.lock().on_no_answer();
                link.away.log(|count| {
                    let (reason, remedy) = (error.to_string(), error.remedy());
                    tracing::warn!(
                        name: "redis_silent",
                        reason,
                        remedy,
                        count,
                        "Redis does not answer: this replica goes on by itself until it does"
                    );
                });
                return None;
            }
        };
        self.open_gate();
        if let Some((other, entry)) = link.fleet.lock().waits_for() {
            link.waits.log(|_| {
                tracing::error!(
                    name: "other_sfu_on_this_redis",
                    other = other.to_string(),
                    host = &*entry.host,
                    remedy = "give all replicas on one Redis the same LIVEKIT_URL and homeserver, or a Redis database of their own",
                    "another replica on this Redis serves another SFU: this one serves, and does not watch until that one has ended"
                );
            });
        }
        let mut outputs = VecDeque::from(outputs);
        while let Some(output) = outputs.pop_front() {
            outputs.extend(self.carry_out(link, output).await);
        }
        let dealt = link.fleet.lock().dealt();
        link.kept.lock().on_dealt(dealt);
        Some(counts)
    }

    async fn carry_out(self: &Arc<Self>, link: &Link, output: Output) -> Vec<Output> {
        match output {
            Output::Change { seen, wanted } => match link.store.shared.change(seen, wanted).await {
                Ok(watch) => return link.fleet.lock().on_changed(watch),
                Err(error) => tracing::debug!(error = error.to_string(), "the watch could not be changed"),
            },
            Output::Watching { how, continuous } => self.begin_watch(link, how, continuous),
            Output::PutAgain => {
                tracing::warn!(name: "redis_emptied", "Redis has lost what was written: all delegated leaves are written again");
                self.put_all_again(link);
            }
            Output::WriteAgain => self.store_all(),
            Output::Yield { given } => {
                // Redis has what was written, but for what is still to be put there.
                if given && link.unput.load(Ordering::Relaxed) == 0 {
                    self.let_go_of_written(link);
                }
                link.store.fence.set(None);
                let leaves = self.state.lock().cores.leaves().len();
                tracing::info!(name: "watch_lost", leaves, "another replica watches now: leaves are handed over");
                link.hand_over.notify_one();
            }
            Output::HandOverAgain => {
                link.kept.lock().hand_over_again();
                link.hand_over.notify_one();
                if link.works() {
                    self.put_all_again(link);
                }
            }
        }
        Vec::new()
    }

    fn begin_watch(self: &Arc<Self>, link: &Link, how: Takeover, continuous: bool) {
        let Some(watch) = link.fleet.lock().own_watch() else { return };
        // Until the records are read, what is written here could replace what says more.
        link.store.fence.set(None);
        link.continuous.store(continuous, Ordering::Relaxed);
        METRICS.fleet_takeover(how as usize);
        tracing::info!(name: "watch_taken", epoch = watch.epoch, ?how, continuous, "this replica watches now");
        link.kept.lock().hand_over_again();
        self.put_all_again(link);
    }

    /// Reads the records, and puts those that Redis lacks. A reading that is under way may have come past them.
    fn put_all_again(&self, link: &Link) {
        link.unput.store(1 + u32::from(self.store.is_reading()), Ordering::Relaxed);
        self.store.read_now();
    }

    /// All records were read. What was handed over and Redis has lost is taken from where it is kept; where it has the record, that says
    /// more of the participant.
    pub(super) fn on_records_read(self: &Arc<Self>, link: &Link) {
        let own = link.fleet.lock().own_watch();
        if let Some(own) = own {
            let kept = link.kept.lock().take();
            for record in kept {
                self.adopt(link, &record);
            }
            link.store.fence.set(Some(own));
        }
        link.fleet.lock().on_records_read();
        link.beat_now.notify_one();
    }

    fn store_all(&self) {
        let leaves: Vec<_> = self.state.lock().cores.leaves().all().collect();
        for leave in leaves {
            let state = self.state.lock();
            let _ = self.store(&state, leave, false);
        }
    }

    /// Drops the leaves whose records the heir has read as they are; the others are handed over one by one.
    fn let_go_of_written(&self, link: &Link) {
        let mut state = self.state.lock();
        // In this order: what is refused meanwhile goes from the one to the other.
        let mut unwritten: HashSet<_> = self.store.unwritten().into_iter().collect();
        unwritten.extend(link.store.fence.void());
        let (now, clock) = (self.clock.now(), link.stored_clock(&state.clocks));
        for leave in state.cores.leaves().all().collect::<Vec<_>>() {
            let field = state.cores.record(leave, &clock).map(|record| record.field());
            if field.is_some_and(|field| !unwritten.contains(&*field)) {
                state.cores.let_go(leave, now);
            }
        }
    }

    fn read_again_when_due(&self, link: &Link, counts: Counts) {
        let leaves = self.state.lock().cores.leaves().current();
        let is_writing = self.store.waiting() > 0;
        if link.fleet.lock().is_reading_due(counts, leaves, is_writing, self.clock.now()) {
            self.store.read_now();
        }
    }

    /// The watcher tells who is at their bound, where that has changed.
    async fn tell_bounds(&self, link: &Link, last: &mut Option<(Watch, Vec<String>)>) {
        let Some(own) = link.fleet.lock().own_watch() else { return };
        let full: Vec<_> = {
            let state = self.state.lock();
            let leaves = state.cores.leaves();
            let (users, servers) = leaves.full(MAX_FULL);
            let servers = servers.into_iter().filter(|server| !(self.listed)(server));
            let all = leaves.is_full().then(|| FULL_ALL.to_owned());
            all.into_iter()
                .chain(users.into_iter().map(full_user))
                .chain(servers.map(full_server))
                .collect()
        };
        let told = (own, full);
        if last.as_ref() != Some(&told) && link.store.shared.bound(own, &told.1).await.is_ok() {
            *last = Some(told);
        }
    }

    fn observe(&self, link: &Link) {
        let guests = if link.works() { 0 } else { self.state.lock().cores.leaves().len() };
        let fleet = link.fleet.lock();
        let counts = [NodeState::Up, NodeState::Waiting, NodeState::Leaving].map(|state| {
            fleet
                .nodes()
                .filter(|(_, entry, is_alive)| *is_alive && entry.state == state)
                .count()
        });
        METRICS.fleet(
            counts,
            fleet.own_watch().is_some(),
            fleet.epoch(),
            guests,
            fleet.unread_ms(self.clock.now()),
        );
        drop(fleet);
        let mut since = link.guests_since.lock();
        *since = (guests > 0).then(|| since.unwrap_or_else(Instant::now));
        drop(since);
        if guests > 0 {
            link.guests.log(|_| {
                tracing::debug!(guests, "leaves that this replica looks after until the watcher has them");
            });
        }
    }

    // --- messages ---

    async fn keep_reading(self: Arc<Self>) {
        let Some(link) = &self.fleet else { return };
        loop {
            let block = Duration::from_millis(link.beat_ms());
            let (before, from_the_first) = {
                let mut fleet = link.fleet.lock();
                (fleet.reading(), fleet.takes_from_the_first())
            };
            if from_the_first {
                link.store.shared.read_from_the_first().await;
            }
            let Ok((from, messages)) = link.store.shared.read(block).await else {
                sleep(READ_PAUSE).await;
                continue;
            };
            let reading = {
                let mut fleet = link.fleet.lock();
                let now = self.clock.now();
                fleet.on_read(now);
                // What was asleep or cut off knows neither who watches nor what Redis's clock shows, by which it would read.
                let is_connected = fleet.is_connected(now);
                is_connected.then(|| if from == Position::FIRST { fleet.on_reading_anew() } else { before })
            };
            let Some(reading) = reading else {
                link.store.shared.read_from_the_first().await;
                sleep(READ_PAUSE).await;
                continue;
            };
            let Some(last) = messages.last().map(|message| message.at) else {
                continue;
            };
            for message in messages {
                self.hear(link, message);
            }
            let (change, _) = self.store.progress();
            link.fleet.lock().on_taken_in(reading, last, change, self.clock.now());
            tokio::task::yield_now().await;
        }
    }

    fn hear(self: &Arc<Self>, link: &Link, message: Message) {
        match message.news {
            News::Job(field, value) if link.fleet.lock().takes_in() => {
                let Ok(record) = JobRecord::read(&field, &value) else { return };
                let is_new = self.adopt(link, &record);
                if !is_new && record.seen {
                    let mut state = self.state.lock();
                    let actions = state.cores.ask_again(&record.room, &record.identity, self.clock.now());
                    let _ = self.act(state, actions, None);
                }
            }
            News::Webhook(from, text) => {
                let Some((verified, webhook)) = hear(&text) else { return };
                let (hearing, is_for_all) = {
                    let fleet = link.fleet.lock();
                    (fleet.hearing(message.at), from != fleet.node() && !fleet.is_stale(message.at))
                };
                match hearing {
                    Hearing::News => self.event(verified, &webhook),
                    Hearing::Past => self.feed(Fact::PastEvent(&sfu_event(verified, &webhook))),
                    Hearing::Ignored => {}
                }
                if let (Some((on_webhook, _)), true) = (link.told.get(), is_for_all) {
                    on_webhook(&webhook);
                }
            }
            News::Job(..) | News::Other => {}
        }
    }

    /// Takes in a job of another node.
    pub(super) fn adopt(self: &Arc<Self>, link: &Link, record: &JobRecord<'_>) -> bool {
        if *self.gate.borrow() == Gate::Stopping {
            return false;
        }
        let listed = (self.listed)(&record.homeserver);
        let mut state = self.state.lock();
        let is_known = state.cores.find(&record.room, &record.identity).is_some();
        let (now, mut actions) = self.look_at_clocks(&mut state);
        let clocks = link.stored_clock(&state.clocks);
        actions.extend(state.cores.adopt(record, link.is_continuous(), listed, &clocks, now));
        let _ = self.act(state, actions, None);
        !is_known
    }

    // --- handing over ---

    /// Takes a delegation on a node that does not know all leaves: hands it over, or looks after it as a guest while Redis is away.
    pub(super) async fn delegate_elsewhere(
        self: &Arc<Self>,
        link: &Link,
        delegation: &super::core::Delegation<'_>,
    ) -> Result<(), CapacityError> {
        let record = {
            let state = self.state.lock();
            let clock = link.stored_clock(&state.clocks);
            let handover = &delegation.handover;
            let arrived = clock.unix_millis(handover.arrived);
            JobRecord {
                room: delegation.room.to_owned().into(),
                identity: delegation.identity.to_owned().into(),
                delay_id: handover.delay_id.to_owned().into(),
                delay_ms: i64::try_from(handover.delay.as_millis()).unwrap_or(i64::MAX),
                homeserver: handover.homeserver.to_owned().into(),
                user: handover.user.to_owned().into(),
                as_user: handover.as_user,
                delegated_at_ms: Some(arrived),
                restarted_at_ms: arrived,
                ..JobRecord::default()
            }
        };
        let full = full_names(delegation.handover.user, delegation.handover.homeserver);
        let may_be_full = if delegation.handover.listed { &full[..2] } else { &full[..] };
        let is_guest = self.state.lock().cores.find(delegation.room, delegation.identity).is_some();
        if !is_guest && link.fleet.lock().may_delegate(self.clock.now()) {
            match link
                .store
                .shared
                .delegate(&record, may_be_full, Instant::now() + DELEGATE_TIMEOUT)
                .await
            {
                Ok(Handed::Done(at)) => {
                    link.kept.lock().keep(at, record);
                    return Ok(());
                }
                Ok(Handed::Full) => return Err(CapacityError::Full),
                Ok(Handed::Foreign) => return Err(CapacityError::UserFull),
                Err(error) => tracing::debug!(error = error.to_string(), "a delegation cannot be handed over yet"),
            }
        }
        self.delegate(delegation)?;
        link.hand_over.notify_one();
        Ok(())
    }

    async fn keep_handing_over(self: Arc<Self>) {
        let Some(link) = &self.fleet else { return };
        loop {
            let _ = timeout(RETRY_PAUSE, link.hand_over.notified()).await;
            let may = link.fleet.lock().may_hand_over(self.clock.now());
            if may {
                self.hand_all_over(link).await;
            }
        }
    }

    async fn hand_all_over(self: &Arc<Self>, link: &Link) {
        let mut again = link.kept.lock().take().into_iter();
        while let Some(record) = again.next() {
            let handed = link.store.shared.delegate(&record, &[], Instant::now() + DELEGATE_TIMEOUT).await;
            match handed {
                Ok(Handed::Done(at)) => link.kept.lock().keep(at, record),
                // It was taken once: looked after here until there is room.
                Ok(Handed::Full) => drop(self.adopt(link, &record)),
                Ok(Handed::Foreign) => {}
                Err(_) => {
                    link.kept.lock().give_back([record].into_iter().chain(again));
                    return;
                }
            }
        }
        let guests: Vec<_> = self.state.lock().cores.leaves().all().collect();
        for guests in guests.chunks(GUESTS_AT_ONCE) {
            if link.works() {
                return;
            }
            let records = guests.iter().map(|&guest| Some((guest, self.guest(link, guest)?)));
            let (guests, records): (Vec<_>, Vec<_>) = records.flatten().unzip();
            let until = Instant::now() + DELEGATE_TIMEOUT;
            let Ok(handed) = link.store.shared.delegate_all(&records, until).await else {
                return;
            };
            for ((guest, record), handed) in guests.into_iter().zip(records).zip(handed) {
                let handed = match handed {
                    Some(handed) => handed,
                    None => match link.store.shared.delegate(&record, &[], Instant::now() + DELEGATE_TIMEOUT).await {
                        Ok(handed) => handed,
                        Err(_) => return,
                    },
                };
                if let Handed::Done(at) = handed {
                    self.has_gone(link, guest, at, record);
                }
            }
        }
    }

    /// A guest was handed over: this node looks after it no more.
    fn has_gone(&self, link: &Link, guest: LeaveId, at: Position, record: JobRecord<'static>) {
        let mut state = self.state.lock();
        let clock = link.stored_clock(&state.clocks);
        // Replaced, or seen meanwhile, or has replaced another one that came late: handed over in its turn.
        let is_current = state.cores.find(&record.room, &record.identity) == Some(guest);
        let is_as_handed = state.cores.record(guest, &clock).is_some_and(|now| now.is_covered_by(&record));
        if is_current && is_as_handed && !link.works() {
            state.cores.let_go(guest, self.clock.now());
            drop(state);
            link.kept.lock().keep(at, record);
        }
    }

    fn guest(&self, link: &Link, guest: LeaveId) -> Option<JobRecord<'static>> {
        let state = self.state.lock();
        let clock = link.stored_clock(&state.clocks);
        state.cores.record(guest, &clock).map(JobRecord::into_owned)
    }

    // --- the SFU ---

    async fn keep_probing(self: Arc<Self>) {
        let Some(link) = &self.fleet else { return };
        let mut probe = self.sfu.probe();
        let closed = probe.closed();
        loop {
            let reach = probe.ask(PROBE_TIMEOUT).await;
            if reach != Reach::Answered {
                link.continuous.store(false, Ordering::Relaxed);
            }
            link.fleet.lock().on_sfu(reach == Reach::Answered, self.clock.now());
            self.look_for_homeserver(link).await;
            if timeout(PROBE_INTERVAL, closed.notified()).await.is_ok() {
                link.continuous.store(false, Ordering::Relaxed);
                link.fleet.lock().on_sfu(false, self.clock.now());
            }
        }
    }

    /// A watcher asks the homeserver with most leaves whether it is there when calls to it fail; the others ask the one that the watcher
    /// lacks.
    async fn look_for_homeserver(&self, link: &Link) {
        let works = link.works();
        let name = if works {
            let largest = self.state.lock().cores.leaves().largest_homeserver().cloned();
            let largest = largest.and_then(|name| ServerName::parse(&name).ok());
            // Soon enough for another one to restart what is due at half of the shortest delay.
            let life = link.fleet.lock().life_ms();
            largest.filter(|name| {
                let since = link.failing.lock().get(name).copied();
                since.is_some_and(|since| self.clock.now().since(since) >= life)
            })
        } else {
            link.failing.lock().clear();
            ServerName::parse(link.fleet.lock().asked_about()).ok()
        };
        let (mut lacks, mut reaches) = ("", "");
        if let Some(name) = &name {
            let answers = self.homeservers.answers(name, PROBE_TIMEOUT).await;
            if works && !answers {
                lacks = name.as_str();
            } else if !works && answers {
                reaches = name.as_str();
            }
        }
        if link.fleet.lock().on_homeserver(lacks, reaches) {
            link.beat_now.notify_one();
        }
    }
}
