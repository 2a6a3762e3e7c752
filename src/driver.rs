//! The one driver of the pure cores: reads the clocks, makes the calls that the core asks for, each with a time-out, and feeds back
//! what they brought. Nothing is decided here.
//!
//! [`Leaves`] is the handle for everybody else.
#![expect(clippy::disallowed_methods, reason = "the driver of presence and leaves")]

pub mod core;
pub mod fleet;
mod reservation;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use livekit_protocol::Room;
use livekit_protocol::participant_info::State as ParticipantState;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

pub use reservation::{Delegation, DelegationError, Reservation};

use crate::clock::Clock;
use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::delayed_leave::{CapacityError, Delegated, FinishReason, HomeserverId, LeaveId, Phase};
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::livekit::{Answer, ParticipantRow, RoomRow};
use crate::log_throttle::LogThrottle;
use crate::metrics::{Gauges, JobEnd, METRICS};
use crate::presence::{DepartureCause, EventKind, ParticipantId, Question, RoomId, SfuEvent};
use crate::server_name::ServerName;
use crate::sfu::webhook::{Kind, Verified, Webhook};
use crate::sfu::{Participant, Probe, Sfu, SfuError};
use crate::store::{self, JobRecord, Seen, Stored, StoredJobs, Written};
use crate::time::{Time, WallClock};
use core::{Action, Core, Fact};

/// How long jobs may take to be restored before webhooks and delegations are taken all the same (decision L11).
pub const RESTORE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a delegation waits for its record to be written (decision L10).
const WRITE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for one call to a homeserver: a late answer is worth something (decision L4).
const HOMESERVER_CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the answer to a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Calls to the SFU in flight in each lane; the others wait in a queue, a few bytes each.
const MAX_SFU_CALLS: usize = 64;
const URGENT: usize = 0;
const ORDINARY: usize = 1;
/// A question that has to be answered within less than this does not wait behind others.
const URGENT_BELOW: Duration = Duration::from_secs(1);
/// How often the clocks are compared while there are leaves.
pub const CLOCK_CHECK_INTERVAL_MS: u64 = 1_000;
/// Standstill of the process, or jump of a clock, after which the SFU is asked before anything is concluded (decision L5a).
pub const SUSPENDED_AFTER_MS: u64 = 3_000;

/// Leaves that are worth the whole time in which records are put again.
const MANY_LEAVES: usize = 1_000;

/// Events of which it is remembered how calls fail.
const MAX_FAILING: usize = 4096;
/// A pause that is worth a line.
const LONG_PAUSE: Duration = Duration::from_secs(5);
/// Setting of a homeserver that lets more calls through.
const LIMITS: &str =
    "raise rc_delayed_event_mgmt in Synapse's homeserver.yaml, as `rc_delayed_event_mgmt: { per_second: 20, burst_count: 100 }`";

/// Remedy for a homeserver that asks for a pause by another status than 429.
const OVERLOADED: &str = "the homeserver, or the proxy before it, has too much to do or is being restarted: see that both run";

static UNWRITTEN: LogThrottle = LogThrottle::once_a_minute();

/// Parts that the driver works with.
pub struct Settings {
    /// Bounds and intervals.
    pub core: core::Settings,
    /// SFU that is asked who is there.
    pub sfu: Arc<Sfu>,
    /// Homeservers on which the events are managed.
    pub homeservers: Arc<Homeservers>,
    /// The one among them that can be called in a user's name.
    pub own: Option<Arc<OwnHomeserver>>,
    /// Where jobs are kept.
    pub store: store::Jobs,
    /// Homeservers that the operator listed (decision H7a).
    pub listed: Box<dyn Fn(&str) -> bool + Send + Sync>,
    /// The fleet that this node is in, where several replicas share a Redis.
    pub fleet: Option<fleet::Settings>,
}

/// Told of a room, the identities in it, and when the SFU was asked.
pub type OnList = Box<dyn Fn(&str, &[&str], Instant) + Send + Sync>;

/// The handle to all delegated leaves.
#[derive(Clone)]
pub struct Leaves(Arc<Driver>);

impl Leaves {
    /// Starts with nothing; [`Self::restore`] reads the store.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let driver = Arc::new(Driver::new(settings));
        let known = Arc::downgrade(&driver);
        let has_leaves = move |server: &str| {
            known
                .upgrade()
                .is_some_and(|driver| driver.state.lock().cores.leaves().has_any_of(server))
        };
        driver.homeservers.keep_those_with_leaves(Box::new(has_leaves));
        tokio::spawn(driver.clone().keep_time());
        tokio::spawn(driver.clone().notice_closing());
        driver.join();
        Self(driver)
    }

    /// Shares each list of a room's participants that comes, once.
    pub fn share_lists(&self, on_list: OnList) {
        // Set once, by the wiring.
        let _ = self.0.on_list.set(on_list);
    }

    /// Takes in what the store has; from then on, but after five seconds in any case, webhooks and delegations are taken.
    pub fn restore(&self, stored: StoredJobs) {
        tokio::spawn(self.0.clone().restore(stored));
    }

    /// Waits until jobs are restored, or given up waiting for.
    pub async fn restored(&self) {
        self.0.open().await;
    }

    /// Whether webhooks can be acted upon: not while jobs are not restored yet, nor while the service is stopping.
    #[must_use]
    pub fn takes_webhooks(&self) -> bool {
        self.0.is_open()
    }

    /// Acts upon a verified webhook, unless it has to wait for messages from before it: as one of them it comes back.
    #[must_use]
    pub fn webhook(&self, verified: Verified, webhook: &Webhook) -> bool {
        if self.0.fleet.as_ref().is_some_and(fleet::Link::is_reading) {
            return false;
        }
        self.0.event(verified, webhook);
        true
    }

    /// The user of this participant was removed from the Matrix room, and from the call by this service: there is no leave to send.
    pub fn kicked(&self, room: &str, identity: &str) {
        self.0.feed(Fact::Kicked(room, identity));
    }

    /// Whether a leave of this room and identity is watched here.
    #[must_use]
    pub fn knows(&self, room: &str, identity: &str) -> bool {
        self.0.state.lock().cores.find(room, identity).is_some()
    }

    /// How many there are, and what of them is not stored yet.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        let (all, waiting) = self.0.state.lock().cores.leaves().counts();
        Gauges {
            jobs_waiting: waiting,
            jobs_watched: all.saturating_sub(waiting),
            store_pending_writes: self.0.store.waiting(),
        }
    }

    /// Restarts or sends what has to be before the end, until `deadline`.
    pub async fn stop(&self, deadline: Instant) {
        let driver = &self.0;
        driver.gate.send_replace(Gate::Stopping);
        driver.feed(Fact::Stopping);
        let rest = async {
            loop {
                let progress = driver.progress.notified();
                if driver.state.lock().cores.is_at_rest() {
                    return;
                }
                progress.await;
            }
        };
        if timeout_at(deadline, rest).await.is_err() {
            tracing::warn!(name: "leaves_unfinished",
                "not every delayed event could be restarted or sent before the end; the homeserver's own timers go on"
            );
        }
    }

    /// Writes what is not written yet, until `deadline`; the last thing to be done.
    pub async fn close_store(&self, deadline: Instant) {
        self.0.store.stop(deadline).await;
    }
}

struct Driver {
    state: Mutex<Driven>,
    clock: Clock,
    sfu: Arc<Sfu>,
    homeservers: Arc<Homeservers>,
    own: Option<Arc<OwnHomeserver>>,
    store: store::Jobs,
    listed: Box<dyn Fn(&str) -> bool + Send + Sync>,
    fleet: Option<fleet::Link>,
    /// Callback that is told who is in a room, whenever a list says it.
    on_list: OnceLock<OnList>,
    probe: AsyncMutex<Probe>,
    closed: Arc<Notify>,
    /// The timer sleeps for another moment now.
    rearm: Notify,
    /// Signal that something happened that a stopping service waits for.
    progress: Notify,
    gate: watch::Sender<Gate>,
    finished: LogThrottle,
    recreated: LogThrottle,
    paused: LogThrottle,
    /// How calls fail, by delayed event.
    failing: Mutex<HashMap<Box<str>, Failing>>,
}

/// How calls about a delayed event failed last.
#[derive(Default)]
struct Failing {
    server: Box<str>,
    answer: &'static str,
    /// How often in a row.
    times: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Restoring,
    Open,
    Stopping,
}

struct Driven {
    cores: Core,
    /// Calls to the SFU: those that cannot wait behind sweeps, and the others.
    lanes: [Lane; 2],
    /// Moment that the timer sleeps for.
    armed: Option<Time>,
    /// Readings of both clocks when the core was last told of anything.
    clocks: WallClock,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Question>,
    calls: usize,
}

impl Driver {
    fn new(settings: Settings) -> Self {
        if settings.core.presence.sweep_ms.is_none() {
            tracing::warn!(name: "polling_until_webhook",
                remedy = "send livekit-server's webhooks to /sfu_webhook",
                "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS is 0: until a webhook has arrived, rooms are asked every 30 s all the same"
            );
        }
        let clock = Clock::start();
        let probe = settings.sfu.probe();
        Self {
            state: Mutex::new(Driven {
                cores: Core::new(settings.core, rand::random(), clock.now()),
                lanes: [Lane::default(), Lane::default()],
                armed: None,
                clocks: clock.wall(),
            }),
            clock,
            closed: probe.closed(),
            probe: AsyncMutex::new(probe),
            sfu: settings.sfu,
            homeservers: settings.homeservers,
            own: settings.own,
            store: settings.store,
            listed: settings.listed,
            fleet: settings.fleet.map(fleet::Link::new),
            on_list: OnceLock::new(),
            rearm: Notify::new(),
            progress: Notify::new(),
            gate: watch::Sender::new(Gate::Restoring),
            finished: LogThrottle::ten_a_second(),
            recreated: LogThrottle::ten_a_second(),
            paused: LogThrottle::once_a_minute(),
            failing: Mutex::default(),
        }
    }

    // --- from outside ---

    fn is_open(&self) -> bool {
        *self.gate.borrow() == Gate::Open
    }

    async fn open(&self) {
        // The sender lives in this very value.
        let _ = self.gate.subscribe().wait_for(|gate| *gate != Gate::Restoring).await;
    }

    /// Takes the delegation, and says when it is written.
    fn delegate(self: &Arc<Self>, delegation: &core::Delegation<'_>) -> Result<Option<Written>, CapacityError> {
        let mut state = self.state.lock();
        // Another fact like any other; one that may be refused.
        let (now, mut actions) = self.look_at_clocks(&mut state);
        actions.extend(state.cores.handle(Fact::Time, now));
        let delegated = state.cores.delegate(delegation, now).map(|(delegated, more)| {
            actions.extend(more);
            delegated
        });
        let (told, outcome) = match delegated {
            Ok(Delegated::New(leave)) => (Some(leave), "new"),
            Ok(Delegated::Renewed(leave)) => (Some(leave), "renewed"),
            Ok(Delegated::Overtaken) => (None, "overtaken by a later one"),
            Err(_) => (None, "refused"),
        };
        let written = self.act(state, actions, told);
        delegated?;
        let core::Delegation { room, identity, handover } = delegation;
        tracing::debug!(room, identity, delay_ms = handover.delay.as_millis(), outcome, "leave delegated");
        Ok(written)
    }

    // --- tasks ---

    /// Tells the core that its next moment has come.
    async fn keep_time(self: Arc<Self>) {
        loop {
            let rearm = self.rearm.notified();
            let armed = {
                let mut state = self.state.lock();
                let now = self.clock.now();
                let look = (!state.cores.leaves().is_empty()).then(|| now.after(CLOCK_CHECK_INTERVAL_MS));
                let beat = self.fleet.as_ref().map(|link| {
                    link.on_timer(now);
                    now.after(link.beat_ms())
                });
                let next = state.cores.next_deadline();
                // Not in the past: how late the timer is counts from here.
                state.armed = [next, look, beat].into_iter().flatten().min().map(|at| at.max(now));
                state.armed
            };
            let Some(at) = armed else {
                rearm.await;
                continue;
            };
            tokio::select! {
                () = sleep_until(self.clock.instant(at)) => {
                    self.feed(Fact::Time);
                    // A core that asks for the past again and again must not keep the others from running.
                    tokio::task::yield_now().await;
                }
                () = rearm => {}
            }
        }
    }

    /// Reads the clocks, under the lock, so that the core never sees time run backwards, and compares them before every fact: what
    /// comes first after the process stood still must not be acted upon with what was known before (decision L5a).
    fn look_at_clocks(&self, state: &mut Driven) -> (Time, Vec<Action>) {
        let clocks = self.clock.wall();
        let now = clocks.monotonic();
        let jumped = std::mem::replace(&mut state.clocks, clocks).drift_ms(&clocks);
        let late = state.armed.map_or(0, |at| now.since(at));
        if late <= SUSPENDED_AFTER_MS && jumped.unsigned_abs() <= SUSPENDED_AFTER_MS {
            return (now, Vec::new());
        }
        state.armed = None;
        tracing::warn!(name: "stood_still",
            late_ms = late,
            clock_jumped_ms = jumped,
            "this process stood still, or the clock was set: the SFU is asked before anything is concluded"
        );
        (now, state.cores.handle(Fact::Woke(u64::try_from(jumped).unwrap_or(0)), now))
    }

    /// Tells the core that the probe's own connection to the SFU was closed.
    async fn notice_closing(self: Arc<Self>) {
        loop {
            self.closed.notified().await;
            self.sfu.forget_rooms();
            self.feed(Fact::ProbeClosed);
        }
    }

    /// Takes in what the store has, now and later. A store that is away is waited for; after [`RESTORE_TIMEOUT`] the others do not wait
    /// any more.
    async fn restore(self: Arc<Self>, mut stored: StoredJobs) {
        let deadline = Instant::now() + RESTORE_TIMEOUT;
        let mut count = 0_usize;
        loop {
            let next = if self.is_restoring() {
                timeout_at(deadline, stored.next()).await
            } else {
                Ok(stored.next().await)
            };
            match next {
                Ok(Some(Stored::Record(job) | Stored::Newer(job))) if self.fleet.is_some() => {
                    // A node that does not watch (any more) reads no records.
                    if let Some(link) = self.fleet.as_ref().filter(|link| link.works()) {
                        link.on_record(self.clock.now());
                        count += usize::from(self.adopt(link, &job));
                    }
                }
                Ok(Some(Stored::Record(job))) => count += usize::from(self.take(&job, false)),
                Ok(Some(Stored::Newer(job))) => drop(self.take(&job, true)),
                Ok(Some(Stored::End(seen))) => {
                    if count > 0 {
                        tracing::info!(name: "leaves_restored", count, "delegated leaves restored");
                    }
                    count = 0;
                    self.open_gate();
                    if let Some(link) = &self.fleet {
                        self.on_records_read(link);
                    }
                    if let Some(seen) = seen {
                        self.put_again(seen).await;
                    }
                    if let Some(link) = &self.fleet {
                        link.on_put_again();
                    }
                }
                Ok(None) => return self.open_gate(),
                // A node that only serves has nothing to read, and is open since its first beat.
                Err(_) if self.fleet.is_some() && !self.is_restoring() => {}
                Err(_) => {
                    self.open_gate();
                    tracing::warn!(name: "leaves_not_restored",
                        "the store does not answer: leaves that were delegated before the start are not watched until it does"
                    );
                }
            }
        }
    }

    /// Whether the job is one that nobody here knew.
    fn take(self: &Arc<Self>, job: &JobRecord<'_>, is_newer: bool) -> bool {
        // What comes that late stays in the store for the next start.
        if *self.gate.borrow() == Gate::Stopping {
            return false;
        }
        let listed = (self.listed)(&job.homeserver);
        let mut state = self.state.lock();
        let is_known = state.cores.find(&job.room, &job.identity).is_some();
        let (now, mut actions) = self.look_at_clocks(&mut state);
        let clocks = state.clocks;
        actions.extend(state.cores.restore(job, is_newer, listed, &clocks, now));
        let _ = self.act(state, actions, None);
        !is_known
    }

    /// Stores again what a store lacks that was away.
    async fn put_again(&self, mut seen: Seen) {
        let leaves: Vec<_> = self.state.lock().cores.leaves().all().collect();
        // Where others read them, a few do not take as long as many.
        let of = if self.fleet.is_some() {
            leaves.len().max(MANY_LEAVES)
        } else {
            leaves.len()
        };
        for &leave in &leaves {
            // Many of them take some milliseconds.
            tokio::task::yield_now().await;
            if !self.with_record(leave, |record| seen.lacks(record)) {
                continue;
            }
            seen.spread(of).await;
            self.with_record(leave, |record| {
                self.store.put(record);
                true
            });
        }
    }

    /// Has somebody look at a leave as it is to be stored; what they say, or that it is over.
    fn with_record(&self, leave: LeaveId, look: impl FnOnce(&JobRecord<'_>) -> bool) -> bool {
        let clock = self.stored_clock(&self.clock.wall());
        let state = self.state.lock();
        state.cores.record(leave, &clock).is_some_and(|record| look(&record))
    }

    /// The clock by which times are stored.
    fn stored_clock(&self, ours: &WallClock) -> WallClock {
        self.fleet.as_ref().map_or(*ours, |link| link.stored_clock(ours))
    }

    fn is_restoring(&self) -> bool {
        *self.gate.borrow() == Gate::Restoring
    }

    fn open_gate(&self) {
        self.gate.send_if_modified(|gate| {
            let restoring = *gate == Gate::Restoring;
            if restoring {
                *gate = Gate::Open;
            }
            restoring
        });
    }

    // --- the loop: facts in, calls out ---

    /// A webhook that has just been taken, here or elsewhere.
    fn event(self: &Arc<Self>, verified: Verified, webhook: &Webhook) {
        if let Some((at, seconds)) = self.sfu.last_date() {
            self.feed(Fact::Date(seconds, self.clock.at(at)));
        }
        self.feed(Fact::Event(&sfu_event(verified, webhook)));
    }

    fn feed(self: &Arc<Self>, fact: Fact<'_>) {
        let mut state = self.state.lock();
        let (now, mut actions) = self.look_at_clocks(&mut state);
        actions.extend(state.cores.handle(fact, now));
        let _ = self.act(state, actions, None);
    }

    /// Does what the core asks for, and logs what it wants to be known once the core is free again; says when the record of
    /// `told` is written, if it is to be.
    fn act(self: &Arc<Self>, mut guard: MutexGuard<'_, Driven>, actions: Vec<Action>, told: Option<LeaveId>) -> Option<Written> {
        let state = &mut *guard;
        let mut written = None;
        let mut news = Vec::new();
        for action in actions {
            match action {
                Action::Ask(Question::Probe) => {
                    let driver = self.clone();
                    tokio::spawn(async move {
                        let reach = driver.probe.lock().await.ask(PROBE_TIMEOUT).await;
                        driver.feed(Fact::Probed(reach));
                    });
                }
                Action::Ask(question) => state.lanes[lane(&question)].waiting.push_back(question),
                Action::Call {
                    leave,
                    homeserver,
                    action,
                    sent,
                } => self.call(&state.cores, leave, homeserver, action, sent),
                Action::Store(leave) => {
                    let tell = told == Some(leave) && written.is_none();
                    written = self.store(state, leave, tell).or(written);
                }
                Action::Forget(room, identity) => {
                    self.store.remove(&room, &identity);
                }
                Action::Finished { .. } | Action::SfuSilent(_) | Action::NoWebhooks | Action::Overloaded { .. } => news.push(action),
            }
        }
        for lane in [URGENT, ORDINARY] {
            while state.lanes[lane].calls < MAX_SFU_CALLS
                && let Some(question) = state.lanes[lane].waiting.pop_front()
            {
                state.lanes[lane].calls += 1;
                // Boxed: on its way to the runtime a task is moved a dozen times.
                tokio::spawn(Box::pin(self.clone().work(question, lane)));
            }
        }
        let next = state.cores.next_deadline();
        if next.is_some_and(|next| state.armed.is_none_or(|armed| next < armed)) {
            self.rearm.notify_one();
        }
        self.progress.notify_one();
        drop(guard);
        news.iter().for_each(|action| self.log(action));
        written
    }

    fn log(&self, action: &Action) {
        match action {
            // Not the event's id: where homeservers let anybody manage delayed events, it is all that it takes.
            Action::Finished { room, reason, delay_id } => {
                METRICS.job_ended(job_end(*reason));
                let failing = self.failing.lock().remove(delay_id);
                if matches!(
                    reason,
                    FinishReason::GivenUp | FinishReason::NotSent(_) | FinishReason::Refused | FinishReason::SfuSilent
                ) {
                    return self.given_up(room, *reason, failing.unwrap_or_default());
                }
                let (reason, cause) = (job_end(*reason).word(), reason.cause().map(DepartureCause::word));
                self.finished.log(|count| {
                    let hidden = count - 1;
                    if hidden > 0 {
                        tracing::info!(name: "leaves_over", "{hidden} more delegated leaves are over");
                    }
                    tracing::info!(name: "leave_over", room = &**room, reason, cause, "delegated leave is over");
                });
            }
            Action::SfuSilent(silence) => {
                tracing::warn!(name: "sfu_silent",
                    seconds = silence.as_secs(),
                    remedy = "check livekit-server, and that LIVEKIT_URL or LIVEKIT_API_URL leads to it",
                    "the SFU has not answered for long: delayed events are not restarted until it does"
                );
            }
            Action::NoWebhooks => {
                tracing::warn!(name: "polling_without_webhooks",
                    remedy = "name this service's /sfu_webhook in webhook.urls of livekit-server's configuration, with webhook.api_key",
                    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS is 0, but no webhook of the SFU has been verified: rooms are asked every 30 s until one is"
                );
            }
            Action::Overloaded { server, room, leaves } => {
                tracing::warn!(name: "homeserver_limits",
                    server = &**server,
                    room = &**room,
                    leaves,
                    remedy = "raise rc_delayed_event_mgmt in Synapse's homeserver.yaml: per_second at least one for every ten participants",
                    "a homeserver limits so much that these delayed events cannot be restarted in time: participants will seem to leave"
                );
            }
            Action::Ask(_) | Action::Call { .. } | Action::Store(_) | Action::Forget(..) => {}
        }
    }

    /// Remembers how calls about a delayed event failed last, for the line about its end, and tells of long pauses.
    fn note_answer(&self, server: &ServerName, delay_id: &str, action: DelayedEventAction, outcome: Outcome) {
        let mut all = self.failing.lock();
        let (answer, pause) = match outcome {
            Outcome::Done => {
                all.remove(delay_id);
                return;
            }
            Outcome::Limited(pause) => ("429", pause),
            Outcome::NotFound => ("404", None),
            Outcome::Conflict => ("409", None),
            Outcome::Forbidden => ("401 or 403", None),
            Outcome::Transient(pause) => ("no usable answer", pause),
        };
        // What is beyond it ends without a cause in the log.
        if all.len() < MAX_FAILING || all.contains_key(delay_id) {
            let failing = all.entry(delay_id.into()).or_default();
            failing.times = if failing.answer == answer { failing.times + 1 } else { 1 };
            failing.answer = answer;
            failing.server = server.as_str().into();
        }
        drop(all);
        if let Some(pause) = pause.filter(|pause| *pause > LONG_PAUSE) {
            self.paused.log(|count| {
                tracing::warn!(name: "homeserver_pause",
                    server = server.as_str(),
                    action = action.word(),
                    answer,
                    pause_seconds = pause.as_secs(),
                    count,
                    remedy = if answer == "429" { LIMITS } else { OVERLOADED },
                    "a homeserver asks for a pause: delayed events wait"
                );
            });
        }
    }

    /// A leave that nobody will send any more.
    fn given_up(&self, room: &str, reason: FinishReason, failing: Failing) {
        let Failing { server, answer, times } = failing;
        let remedy = match (reason, answer) {
            (FinishReason::SfuSilent, _) => "check livekit-server, and that LIVEKIT_URL or LIVEKIT_API_URL leads to it",
            (_, "429") => LIMITS,
            (_, "401 or 403") => "the homeserver does not let this service manage delayed events: see the lines about that homeserver",
            _ => {
                "check that the homeserver's client-server API is reached from here; LIVEKIT_CS_API_URL_OVERRIDES can name an internal address"
            }
        };
        self.finished.log(|count| {
            tracing::warn!(name: "leave_given_up",
                room,
                server = &*server,
                reason = job_end(reason).word(),
                cause = reason.cause().map(DepartureCause::word),
                last_answer = if answer.is_empty() { "none" } else { answer },
                times,
                count,
                remedy,
                "delegated leave is over: it is given up, and somebody may seem to be in the call until their event fires by itself"
            );
        });
    }

    /// Asks the SFU one question after the other, as long as there are any.
    async fn work(self: Arc<Self>, first: Question, lane: usize) {
        let mut next = Some(first);
        while let Some(question) = next {
            self.ask(question).await;
            let mut state = self.state.lock();
            let lane = &mut state.lanes[lane];
            next = lane.waiting.pop_front();
            if next.is_none() {
                lane.calls -= 1;
                // What a start with all its questions needed is not needed any more.
                lane.waiting.shrink_to(MAX_SFU_CALLS);
            }
        }
    }

    async fn ask(self: &Arc<Self>, question: Question) {
        match question {
            Question::Participant {
                participant,
                asked,
                within,
            } => self.ask_participant(participant, asked, within).await,
            Question::Participants { room, asked, within } => self.ask_participants(room, asked, within).await,
            Question::Rooms { rooms, asked } => {
                let names = {
                    let state = self.state.lock();
                    let names = rooms.iter().filter_map(|&room| state.cores.presence().room_name(room));
                    names.map(ToString::to_string).collect::<Vec<_>>()
                };
                // No names would ask for all rooms of the SFU.
                if names.is_empty() {
                    return;
                }
                let answer = self.sfu.list_rooms(names).await;
                let rows: Vec<_> = answer.iter().flatten().map(room_row).collect();
                self.feed(Fact::Rooms(&rooms, asked, read(&answer, |_| rows.as_slice())));
            }
            Question::CreateRoom { room } => {
                let Some(name) = self.state.lock().cores.presence().room_name(room).cloned() else {
                    return;
                };
                let answer = self.sfu.create_again(&name).await;
                self.recreated.log(|count| {
                    let created = answer.is_ok();
                    tracing::info!(name: "room_forgotten", room = &*name, created, count, "the SFU has forgotten a room with people in it");
                });
                self.feed(Fact::Created(room, read(&answer, room_row)));
            }
            Question::Probe => {}
        }
    }

    async fn ask_participant(self: &Arc<Self>, participant: ParticipantId, asked: Time, within: Duration) {
        let found = {
            let state = self.state.lock();
            let presence = state.cores.presence();
            presence.get(participant).and_then(|found| {
                let room = presence.room_of(participant)?.clone();
                Some((room, found.identity().to_owned()))
            })
        };
        let Some((room, identity)) = found else { return };
        let answer = self.sfu.participant(&room, &identity, within).await;
        if let Err(error) = &answer {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::debug!(reason, remedy, "the SFU does not show a participant");
        }
        self.feed(Fact::Participant(participant, asked, read(&answer, participant_row)));
    }

    async fn ask_participants(self: &Arc<Self>, room: RoomId, asked: Time, within: Duration) {
        let Some(name) = self.state.lock().cores.presence().room_name(room).cloned() else {
            return;
        };
        let answer = self.sfu.participants(&name, within).await;
        let rows: Vec<_> = answer.iter().flatten().map(participant_row).collect();
        if let (Some(on_list), false) = (self.on_list.get(), rows.is_empty()) {
            let identities: Vec<_> = rows.iter().map(|row| row.identity).collect();
            on_list(&name, &identities, self.clock.instant(asked));
        }
        self.feed(Fact::Participants(room, asked, read(&answer, |_| rows.as_slice())));
    }

    fn call(self: &Arc<Self>, cores: &Core, leave: LeaveId, homeserver: HomeserverId, action: DelayedEventAction, sent: Time) {
        let found = cores.leaves().get(leave).map(|found| {
            let user = found.is_as_user().then(|| found.user().to_owned());
            (found.delay_id().to_owned(), user)
        });
        let gone_since = match cores.leaves().get(leave).map(|found| found.leave().phase()) {
            Some(Phase::Sending { evidence, .. }) => evidence.filter(|_| action == DelayedEventAction::Send),
            _ => None,
        };
        let name = cores.leaves().homeserver(homeserver).and_then(|name| ServerName::parse(name).ok());
        let driver = self.clone();
        tokio::spawn(Box::pin(async move {
            let outcome = match (name, found) {
                (Some(server), Some((delay_id, user))) => {
                    if let Some(link) = &driver.fleet {
                        link.on_call(&server, driver.clock.now());
                    }
                    let own = driver.own.as_ref();
                    let authority = user.as_deref().and_then(|user| own?.authority(&server, user));
                    let managed = driver
                        .homeservers
                        .manage(&server, &delay_id, action, authority, HOMESERVER_CALL_TIMEOUT);
                    let outcome = managed.await;
                    driver.note_answer(&server, &delay_id, action, outcome);
                    if let Some(link) = &driver.fleet {
                        link.on_called(&server, outcome);
                    }
                    if let (Some(since), Outcome::Done) = (gone_since, outcome) {
                        METRICS.leave_lag.observe(Duration::from_millis(driver.clock.now().since(since)));
                    }
                    tracing::debug!(name: "delayed_event_managed", server = server.as_str(), what = action.word(), ?outcome,
                        "delayed event managed"
                    );
                    outcome
                }
                // A record that names no server: nobody can be called.
                (None, _) | (_, None) => Outcome::Forbidden,
            };
            driver.feed(Fact::Called {
                leave,
                homeserver,
                action,
                sent,
                outcome,
            });
        }));
    }

    fn store(&self, state: &Driven, leave: LeaveId, tell: bool) -> Option<Written> {
        let record = state.cores.record(leave, &self.stored_clock(&state.clocks))?;
        if record.seen {
            self.homeservers.has_participant(&record.homeserver);
        }
        if tell {
            return Some(self.store.put_and_tell(&record));
        }
        self.store.put(&record);
        None
    }
}

const fn job_end(reason: FinishReason) -> JobEnd {
    match reason {
        FinishReason::Sent(_) => JobEnd::Sent,
        FinishReason::NotSent(_) => JobEnd::NotSent,
        FinishReason::EventGone => JobEnd::EventGone,
        FinishReason::Refused => JobEnd::Refused,
        FinishReason::GivenUp => JobEnd::GivenUp,
        FinishReason::SfuSilent => JobEnd::SfuSilent,
        FinishReason::JoinFailed => JobEnd::JoinFailed,
        FinishReason::NeverJoined => JobEnd::NeverJoined,
        FinishReason::Replaced => JobEnd::Replaced,
        FinishReason::Kicked => JobEnd::Kicked,
        FinishReason::Evicted => JobEnd::Evicted,
    }
}

/// The lane of a question: those that are checks of a reported departure, and those about rooms, do not wait behind sweeps.
fn lane(question: &Question) -> usize {
    match question {
        Question::Participant { within, .. } | Question::Participants { within, .. } if *within >= URGENT_BELOW => ORDINARY,
        Question::Participant { .. } | Question::Participants { .. } => URGENT,
        Question::Rooms { .. } | Question::CreateRoom { .. } | Question::Probe => URGENT,
    }
}

/// A webhook in the core's terms. One without a room or a participant still shows that webhooks work.
fn sfu_event(verified: Verified, webhook: &Webhook) -> SfuEvent<'_> {
    let room = webhook.room.as_ref();
    let participant = webhook.participant.as_ref();
    let reason = participant.map(|participant| participant.disconnect_reason).unwrap_or_default();
    SfuEvent {
        kind: match webhook.kind {
            Kind::RoomStarted => EventKind::RoomStarted,
            Kind::RoomFinished => EventKind::RoomFinished,
            Kind::ParticipantJoined => EventKind::Joined,
            Kind::ParticipantLeft => EventKind::Left(reason),
            Kind::ParticipantConnectionAborted => EventKind::Aborted(reason),
            Kind::TrackPublished | Kind::TrackUnpublished => EventKind::Track,
            Kind::Other => EventKind::Other,
        },
        digest: verified.digest,
        issued_at: verified.issued_at.unwrap_or(0),
        id: &webhook.id,
        created_at: webhook.created_at.unwrap_or(0),
        room: room.map_or("", |room| &room.name),
        room_sid: room.map_or("", |room| &room.sid),
        identity: participant.map_or("", |participant| &participant.identity),
        sid: participant.map_or("", |participant| &participant.sid),
        joined_at_ms: participant.map_or(0, |participant| joined_at_ms(participant.joined_at_ms, participant.joined_at)),
    }
}

/// When a participant joined; older SFUs say it in seconds only.
const fn joined_at_ms(ms: u64, seconds: u64) -> u64 {
    if ms == 0 { seconds.saturating_mul(1000) } else { ms }
}

fn participant_row(participant: &Participant) -> ParticipantRow<'_> {
    let [ms, seconds] = [participant.joined_at_ms, participant.joined_at].map(|at| u64::try_from(at).unwrap_or(0));
    ParticipantRow {
        identity: &participant.identity,
        sid: &participant.sid,
        joined_at_ms: joined_at_ms(ms, seconds),
        active: participant.state == ParticipantState::Active as i32,
    }
}

fn room_row(room: &Room) -> RoomRow<'_> {
    RoomRow {
        name: &room.name,
        sid: &room.sid,
        num_participants: room.num_participants,
        departure_timeout: room.departure_timeout,
    }
}

/// Reads an answer of the SFU.
fn read<'a, T, R>(answer: &'a Result<T, SfuError>, yes: impl FnOnce(&'a T) -> R) -> Answer<R> {
    match answer {
        Ok(answer) => Answer::Yes(yes(answer)),
        Err(SfuError::NotFound) => Answer::No,
        Err(SfuError::Timeout) => Answer::TimedOut,
        Err(SfuError::TooLarge) => Answer::TooLarge,
        Err(error) if error.connection_failed() => Answer::Unreachable,
        Err(error) if error.is_refusal() => Answer::Refused,
        Err(_) => Answer::Unclear,
    }
}
