//! The thin driver around the pure core: reads the clocks, makes the calls that the core asks for, each with a time-out,
//! and feeds back what they brought. Nothing is decided here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use livekit_protocol::participant_info::State as ParticipantState;
use livekit_protocol::{ParticipantInfo, Room};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Delegation;
use super::jobs::{self, Answered, Call, Config, Delegated, Fact, JobId, Jobs, Looked, Output, Outputs, Record, Refusal, Row, WebhookKind};
use super::machine::{LeaveReason, Outcome};
use super::rooms::RoomRow;
use crate::clock::Clock;
use crate::homeserver::{Homeservers, OwnHomeserver};
use crate::log_throttle::LogThrottle;
use crate::server_name::ServerName;
use crate::sfu::webhook::{Kind, Verified, Webhook};
use crate::sfu::{Probe, Sfu, SfuError};
use crate::store::{self, JobRecord, Seen, Stored, StoredJobs, Written};
use crate::time::{Delay, Time, WallClock, event_time};

/// How long jobs may take to be restored before webhooks and delegations are taken all the same (decision L11).
const RESTORING: Duration = Duration::from_secs(5);
/// Time for one call to a homeserver (decision L4).
const HOMESERVER_CALL: Duration = Duration::from_secs(10);
/// Calls to the SFU under way in each lane; the others wait in a queue, a few bytes each.
const SFU_CALLS: usize = 64;
const URGENT: usize = 0;
const ORDINARY: usize = 1;
/// A question that has to be answered within less than this does not wait behind others.
const QUICK: Duration = Duration::from_secs(1);

/// What the driver works with.
pub struct Settings {
    /// Bounds and intervals.
    pub config: Config,
    /// Who is there.
    pub sfu: Arc<Sfu>,
    /// Whose events these are.
    pub homeservers: Arc<Homeservers>,
    /// The one among them that can be called in a user's name.
    pub own: Option<Arc<OwnHomeserver>>,
    /// Where jobs are kept.
    pub store: store::Jobs,
    /// Homeservers named in full access: they may have more jobs (decision L8).
    pub named: Box<dyn Fn(&str) -> bool + Send + Sync>,
}

/// The driver.
pub(super) struct Driver {
    core: Mutex<Core>,
    clock: Clock,
    sfu: Arc<Sfu>,
    homeservers: Arc<Homeservers>,
    own: Option<Arc<OwnHomeserver>>,
    store: store::Jobs,
    named: Box<dyn Fn(&str) -> bool + Send + Sync>,
    probe: AsyncMutex<Probe>,
    closed: Arc<Notify>,
    /// The timer sleeps for another moment now.
    rearm: Notify,
    /// Something happened that a stopping service waits for.
    progress: Notify,
    gate: watch::Sender<Gate>,
    finished: LogThrottle,
    recreated: LogThrottle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Restoring,
    Open,
    Stopping,
}

struct Core {
    jobs: Jobs,
    /// Calls to the SFU: those that cannot wait behind sweeps, and the others.
    lanes: [Lane; 2],
    /// What the timer sleeps for.
    armed: Option<Time>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Output>,
    calls: usize,
}

impl Driver {
    pub(super) fn new(settings: Settings) -> Self {
        let Settings {
            config,
            sfu,
            homeservers,
            own,
            store,
            named,
        } = settings;
        if config.sweep_every.is_none() {
            tracing::warn!(
                remedy = "send livekit-server's webhooks to /sfu_webhook",
                "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS is 0: until a webhook has arrived, rooms are asked every 30 s all the same"
            );
        }
        let clock = Clock::start();
        let probe = sfu.probe();
        Self {
            core: Mutex::new(Core {
                jobs: Jobs::new(config, rand::random(), clock.now()),
                lanes: [Lane::default(), Lane::default()],
                armed: None,
            }),
            clock,
            closed: probe.closed(),
            probe: AsyncMutex::new(probe),
            sfu,
            homeservers,
            own,
            store,
            named,
            rearm: Notify::new(),
            progress: Notify::new(),
            gate: watch::Sender::new(Gate::Restoring),
            finished: LogThrottle::ten_a_second(),
            recreated: LogThrottle::ten_a_second(),
        }
    }

    // --- from outside ---

    pub(super) fn is_open(&self) -> bool {
        *self.gate.borrow() == Gate::Open
    }

    pub(super) async fn open(&self) {
        // The sender lives in this very value.
        let _ = self.gate.subscribe().wait_for(|gate| *gate != Gate::Restoring).await;
    }

    pub(super) fn admit(&self, delegation: &Delegation<'_>) -> Result<(), Refusal> {
        self.lock().jobs.admit(&self.pure(delegation))
    }

    /// Takes the delegation, and says when it is written.
    pub(super) fn delegate(self: &Arc<Self>, delegation: &Delegation<'_>) -> Result<Option<Written>, Refusal> {
        let pure = self.pure(delegation);
        let now = self.clock.now();
        let mut core = self.lock();
        let (delegated, outputs) = core.jobs.delegate(&pure, now)?;
        let job = match delegated {
            Delegated::New(job) | Delegated::Renewed(job) => Some(job),
            Delegated::Overtaken => None,
        };
        let written = self.act(core, outputs, job);
        let (room, identity) = (delegation.seat.room.as_str(), delegation.seat.identity.as_str());
        tracing::debug!(
            room,
            identity,
            delay_ms = delegation.delay.as_millis(),
            outcome = match delegated {
                Delegated::New(_) => "new",
                Delegated::Renewed(_) => "renewed",
                Delegated::Overtaken => "overtaken by a later one",
            },
            "leave delegated"
        );
        Ok(written)
    }

    pub(super) fn webhook(self: &Arc<Self>, verified: Verified, webhook: &Webhook) {
        let happened = event_time(self.clock.now(), verified.issued_at, webhook.created_at);
        self.feed(Fact::Webhook(fact(webhook, happened)));
    }

    pub(super) async fn stop(self: &Arc<Self>, deadline: Instant) {
        self.gate.send_replace(Gate::Stopping);
        self.feed(Fact::Stopping);
        let rest = async {
            loop {
                let progress = self.progress.notified();
                if self.lock().jobs.is_at_rest() {
                    return;
                }
                progress.await;
            }
        };
        if timeout_at(deadline, rest).await.is_err() {
            tracing::warn!("not every delayed event could be restarted or sent before the end; the homeserver's own timers go on");
        }
    }

    /// Writes what is not written yet, until `deadline`. Nothing is stored after it.
    pub(super) async fn close_store(&self, deadline: Instant) {
        self.store.stop(deadline).await;
    }

    // --- tasks ---

    /// Tells the core that its next moment has come.
    pub(super) async fn keep_time(self: Arc<Self>) {
        loop {
            let rearm = self.rearm.notified();
            let next = {
                let mut core = self.lock();
                core.armed = core.jobs.next_deadline();
                core.armed
            };
            match next {
                Some(at) if at <= self.clock.now() => {
                    self.feed(Fact::Time);
                    // A core that asks for the past again and again must not keep the others from running.
                    tokio::task::yield_now().await;
                }
                Some(at) => {
                    tokio::select! {
                        () = sleep_until(self.clock.instant(at)) => self.feed(Fact::Time),
                        () = rearm => {}
                    }
                }
                None => rearm.await,
            }
        }
    }

    /// Tells the core that the watch's own connection to the SFU was closed.
    pub(super) async fn notice_closing(self: Arc<Self>) {
        loop {
            self.closed.notified().await;
            self.sfu.forget_rooms();
            self.feed(Fact::WatchClosed);
        }
    }

    /// Takes in what the store has, now and later. A store that is away is waited for; after [`RESTORING`] the others do not wait
    /// any more.
    pub(super) async fn restore(self: Arc<Self>, mut stored: StoredJobs) {
        let patience = Instant::now() + RESTORING;
        let mut count = 0_usize;
        loop {
            let next = if self.is_restoring() {
                timeout_at(patience, stored.next()).await
            } else {
                Ok(stored.next().await)
            };
            match next {
                Ok(Some(Stored::Record(job))) => count += usize::from(self.take(&job, false)),
                Ok(Some(Stored::Newer(job))) => drop(self.take(&job, true)),
                Ok(Some(Stored::End(seen))) => {
                    if count > 0 {
                        tracing::info!(count, "delegated leaves restored");
                    }
                    count = 0;
                    self.open_gate();
                    if let Some(seen) = seen {
                        self.put_again(seen).await;
                    }
                }
                Ok(None) => return self.open_gate(),
                Err(_) => {
                    self.open_gate();
                    tracing::warn!("the store does not answer: leaves that were delegated before the start are not watched until it does");
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
        let millis = u64::try_from(job.delay_ms).unwrap_or(0).min(Delay::MAX.as_millis());
        let Some(delay) = Delay::from_millis(millis) else {
            self.store.remove(&job.room, &job.identity);
            return false;
        };
        let wall = self.clock.wall();
        let mut core = self.lock();
        let now = self.clock.now();
        let mut record = as_record(job, delay, &wall, now);
        let is_known = core.jobs.find(&job.room, &job.identity).is_some();
        let outputs = if is_known && is_newer {
            record.delegation.arrived = record.restarted;
            let delegated = core.jobs.delegate(&record.delegation, now);
            delegated.map(|(_, outputs)| outputs).unwrap_or_default()
        } else {
            core.jobs.restore(&record, now)
        };
        let _ = self.act(core, outputs, None);
        !is_known
    }

    /// Stores again what a store lacks that was away.
    async fn put_again(&self, mut seen: Seen) {
        let jobs: Vec<_> = self.lock().jobs.current().collect();
        for &job in &jobs {
            seen.turn(jobs.len()).await;
            if let Some(record) = self.lock().jobs.record(job).map(|record| stored(&record, &self.clock.wall()))
                && seen.lacks(&record)
            {
                self.store.put(&record);
            }
        }
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

    fn feed(self: &Arc<Self>, fact: Fact<'_>) {
        let now = self.clock.now();
        let mut core = self.lock();
        let outputs = core.jobs.handle(fact, now);
        let _ = self.act(core, outputs, None);
    }

    /// Does what the core asks for, and logs what it wants to be known once the core is free again; says when the record of
    /// `told` is written, if it is to be.
    fn act(self: &Arc<Self>, mut guard: MutexGuard<'_, Core>, outputs: Outputs, told: Option<JobId>) -> Option<Written> {
        let core = &mut *guard;
        let mut written = None;
        let mut news = Vec::new();
        for output in outputs {
            match output {
                Output::ListRooms { .. } | Output::CreateRoom { .. } => core.lanes[URGENT].waiting.push_back(output),
                Output::LookUp { within, .. } => {
                    let lane = if within < QUICK { URGENT } else { ORDINARY };
                    core.lanes[lane].waiting.push_back(output);
                }
                Output::ListParticipants { .. } => core.lanes[ORDINARY].waiting.push_back(output),
                Output::Probe { within } => {
                    let driver = self.clone();
                    tokio::spawn(async move {
                        let reach = driver.probe.lock().await.ask(within).await;
                        driver.feed(Fact::Probed(reach));
                    });
                }
                Output::Call { job, homeserver, call } => self.call(&core.jobs, job, homeserver, call),
                Output::Persist { job } => {
                    let tell = told == Some(job) && written.is_none();
                    written = self.persist(core, job, tell).or(written);
                }
                Output::Forget { room, identity } => {
                    self.store.remove(&room, &identity);
                }
                Output::Finished { .. } | Output::SfuSilent { .. } | Output::Unwired => news.push(output),
            }
        }
        for lane in [URGENT, ORDINARY] {
            while core.lanes[lane].calls < SFU_CALLS
                && let Some(output) = core.lanes[lane].waiting.pop_front()
            {
                core.lanes[lane].calls += 1;
                let driver = self.clone();
                tokio::spawn(async move { driver.work(output, lane).await });
            }
        }
        let next = core.jobs.next_deadline();
        if next.is_some_and(|next| core.armed.is_none_or(|armed| next < armed)) {
            self.rearm.notify_one();
        }
        self.progress.notify_one();
        drop(guard);
        news.iter().for_each(|output| self.log(output));
        written
    }

    fn log(&self, output: &Output) {
        match output {
            // Not the event's id: where homeservers let anybody manage delayed events, it is all that it takes.
            Output::Finished { room, reason, .. } => {
                let reason = format!("{reason:?}");
                self.finished.log(|count| {
                    let hidden = count - 1;
                    if hidden > 0 {
                        tracing::info!("{hidden} more delegated leaves are over");
                    }
                    tracing::info!(room = &**room, reason, "delegated leave is over");
                });
            }
            Output::SfuSilent { for_millis } => {
                tracing::warn!(
                    seconds = for_millis / 1000,
                    remedy = "check livekit-server, and that LIVEKIT_URL or LIVEKIT_API_URL leads to it",
                    "the SFU has not answered for long: delayed events are not restarted until it does"
                );
            }
            Output::Unwired => {
                tracing::warn!(
                    remedy = "name this service's /sfu_webhook in webhook.urls of livekit-server's configuration, with webhook.api_key",
                    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS is 0, but no webhook of the SFU has been verified: rooms are asked every 30 s until one is"
                );
            }
            Output::ListRooms { .. }
            | Output::CreateRoom { .. }
            | Output::LookUp { .. }
            | Output::ListParticipants { .. }
            | Output::Probe { .. }
            | Output::Call { .. }
            | Output::Persist { .. }
            | Output::Forget { .. } => {}
        }
    }

    /// Makes one call to the SFU after the other, as long as there are any.
    async fn work(self: Arc<Self>, first: Output, lane: usize) {
        let mut next = Some(first);
        while let Some(output) = next {
            self.ask_sfu(output).await;
            let mut core = self.lock();
            let lane = &mut core.lanes[lane];
            next = lane.waiting.pop_front();
            if next.is_none() {
                lane.calls -= 1;
                // What a start with all its questions needed is not needed any more.
                lane.waiting.shrink_to(SFU_CALLS);
            }
        }
    }

    async fn ask_sfu(self: &Arc<Self>, output: Output) {
        match output {
            Output::LookUp { job, asked, within } => self.look_up(job, asked, within).await,
            Output::ListParticipants { room, asked } => {
                let Some(name) = self.lock().jobs.room_name(room).cloned() else {
                    return;
                };
                let answer = self.sfu.participants(&name).await;
                let rows: Vec<_> = answer.iter().flatten().filter_map(row).collect();
                let answer = answered(&answer, |_| rows.as_slice());
                self.feed(Fact::Listed { room, asked, answer });
            }
            Output::ListRooms { names, asked } => {
                let answer = self.sfu.list_rooms(names.iter().map(ToString::to_string).collect()).await;
                let rows: Vec<_> = answer.iter().flatten().map(room_row).collect();
                let answer = answered(&answer, |_| rows.as_slice());
                self.feed(Fact::RoomsListed {
                    names: &names,
                    asked,
                    answer,
                });
            }
            Output::CreateRoom { room } => {
                let Some(name) = self.lock().jobs.room_name(room).cloned() else {
                    return;
                };
                let answer = self.sfu.create_again(&name).await;
                self.recreated.log(|count| {
                    tracing::info!(
                        room = &*name,
                        created = answer.is_ok(),
                        count,
                        "the SFU has forgotten a room with people in it"
                    );
                });
                let answer = answered(&answer, room_row);
                self.feed(Fact::RoomCreated { room, answer });
            }
            Output::Probe { .. }
            | Output::Call { .. }
            | Output::Persist { .. }
            | Output::Forget { .. }
            | Output::Finished { .. }
            | Output::SfuSilent { .. }
            | Output::Unwired => {}
        }
    }

    async fn look_up(self: &Arc<Self>, job: JobId, asked: Time, within: Duration) {
        let found = {
            let core = self.lock();
            core.jobs.get(job).and_then(|found| {
                let room = core.jobs.room_name(found.room())?.clone();
                Some((room, found.identity().to_owned()))
            })
        };
        let Some((room, identity)) = found else { return };
        let answer = self.sfu.participant(&room, &identity, within).await;
        let answer = match &answer {
            Ok(participant) => row(participant).map_or(Looked::Absent, Looked::Present),
            Err(SfuError::NotFound) => Looked::Absent,
            Err(SfuError::Timeout) => Looked::TimedOut,
            Err(error) if error.connection_failed() => Looked::Unreachable,
            Err(error) => {
                let (reason, remedy) = (error.to_string(), error.remedy());
                tracing::debug!(reason, remedy, "the SFU does not say whether somebody is there");
                Looked::Unclear
            }
        };
        self.feed(Fact::LookedUp { job, asked, answer });
    }

    fn call(self: &Arc<Self>, jobs: &Jobs, job: JobId, homeserver: super::pace::HomeserverId, call: Call) {
        let found = jobs.get(job).map(|found| {
            let user = found.is_as_user().then(|| found.user().to_owned());
            (found.delay_id().to_owned(), user)
        });
        let name = jobs.homeserver_name(homeserver).and_then(|name| ServerName::parse(name).ok());
        let driver = self.clone();
        tokio::spawn(async move {
            let outcome = match (name, found) {
                (Some(server), Some((delay_id, user))) => {
                    let own = driver.own.as_ref();
                    let authority = user.as_deref().and_then(|user| own?.authority(&server, user));
                    let managed = driver.homeservers.manage(&server, &delay_id, call, authority, HOMESERVER_CALL);
                    let outcome = managed.await;
                    tracing::debug!(server = server.as_str(), what = ?call, ?outcome, "delayed event managed");
                    outcome
                }
                // A record that names no server: nobody can be called.
                (None, _) | (_, None) => Outcome::Forbidden,
            };
            driver.feed(Fact::Called {
                job,
                homeserver,
                call,
                outcome,
            });
        });
    }

    fn persist(&self, core: &Core, id: JobId, tell: bool) -> Option<Written> {
        let record = core.jobs.record(id)?;
        let stored = stored(&record, &self.clock.wall());
        if tell {
            return Some(self.store.put_and_tell(&stored));
        }
        self.store.put(&stored);
        None
    }

    fn pure<'a>(&self, delegation: &'a Delegation<'_>) -> jobs::Delegation<'a> {
        jobs::Delegation {
            room: &delegation.seat.room,
            identity: &delegation.seat.identity,
            user: delegation.user,
            homeserver: delegation.homeserver,
            delay_id: delegation.delay_id,
            delay: delegation.delay,
            arrived: self.clock.at(delegation.received),
            exempt: (self.named)(delegation.homeserver),
            // Only full-access users may delegate, and they may open rooms.
            creates_room: true,
            as_user: delegation.as_user,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stored<'a>(record: &Record<'a>, wall: &WallClock) -> JobRecord<'a> {
    let delegation = &record.delegation;
    JobRecord {
        room: delegation.room.into(),
        identity: delegation.identity.into(),
        delay_id: delegation.delay_id.into(),
        delay_ms: i64::try_from(delegation.delay.as_millis()).unwrap_or(i64::MAX),
        homeserver: delegation.homeserver.into(),
        restarted_at_ms: wall.unix_millis(record.restarted),
        user: delegation.user.into(),
        delegated_at_ms: Some(wall.unix_millis(delegation.arrived)),
        as_user: delegation.as_user,
        sid: record.sid.map(Into::into),
        joined_at_ms: record.joined_at_ms,
        room_sid: record.room_sid.map(Into::into),
        last_sighted_ms: record.last_sighted.map(|time| wall.unix_millis(time)),
        seen: record.seen,
        replaces: Vec::new(),
    }
}

fn as_record<'a>(job: &'a JobRecord<'_>, delay: Delay, wall: &WallClock, now: Time) -> Record<'a> {
    // A wall clock that was set back, or a faster one elsewhere, must not put anything into the future.
    let past = |at| wall.time(at).min(now);
    let restarted = past(job.restarted_at_ms);
    Record {
        delegation: jobs::Delegation {
            room: &job.room,
            identity: &job.identity,
            user: &job.user,
            homeserver: &job.homeserver,
            delay_id: &job.delay_id,
            delay,
            arrived: job.delegated_at_ms.map_or(restarted, past),
            exempt: true,
            creates_room: true,
            as_user: job.as_user,
        },
        restarted,
        sid: job.sid.as_deref(),
        joined_at_ms: job.joined_at_ms,
        room_sid: job.room_sid.as_deref(),
        last_sighted: job.last_sighted_ms.map(past),
        seen: job.seen,
    }
}

/// A webhook in the core's terms. One without a room or a participant still shows that webhooks work.
fn fact(webhook: &Webhook, happened: Time) -> jobs::Webhook<'_> {
    let room = webhook.room.as_ref();
    let participant = webhook.participant.as_ref();
    let reason = participant.map_or(LeaveReason::Unknown, |participant| participant.disconnect_reason);
    let joined_at_ms = participant.map_or(0, |participant| match participant.joined_at_ms {
        0 => participant.joined_at.saturating_mul(1000),
        joined_at_ms => joined_at_ms,
    });
    jobs::Webhook {
        kind: match webhook.kind {
            Kind::RoomStarted => WebhookKind::RoomStarted,
            Kind::RoomFinished => WebhookKind::RoomFinished,
            Kind::ParticipantJoined => WebhookKind::Joined,
            Kind::ParticipantLeft => WebhookKind::Left(reason),
            Kind::ParticipantConnectionAborted => WebhookKind::Aborted(reason),
            Kind::TrackPublished | Kind::TrackUnpublished => WebhookKind::Track,
            Kind::Other => WebhookKind::Other,
        },
        id: &webhook.id,
        happened,
        room: room.map_or("", |room| &room.name),
        room_sid: room.map_or("", |room| &room.sid),
        identity: participant.map_or("", |participant| &participant.identity),
        sid: participant.map_or("", |participant| &participant.sid),
        joined_at_ms,
    }
}

/// A participant who is there.
fn row(participant: &ParticipantInfo) -> Option<Row<'_>> {
    if participant.state == ParticipantState::Disconnected as i32 {
        return None;
    }
    let joined_at_ms = if participant.joined_at_ms > 0 {
        participant.joined_at_ms
    } else {
        participant.joined_at.saturating_mul(1000)
    };
    Some(Row {
        identity: &participant.identity,
        sid: &participant.sid,
        joined_at_ms: u64::try_from(joined_at_ms).unwrap_or(0),
        active: participant.state == ParticipantState::Active as i32,
    })
}

fn room_row(room: &Room) -> RoomRow<'_> {
    RoomRow {
        name: &room.name,
        sid: &room.sid,
        num_participants: room.num_participants,
        departure_timeout: room.departure_timeout,
    }
}

fn answered<'a, T, R>(answer: &'a Result<T, SfuError>, yes: impl FnOnce(&'a T) -> R) -> Answered<R> {
    match answer {
        Ok(answer) => Answered::Yes(yes(answer)),
        Err(SfuError::Timeout) => Answered::TimedOut,
        Err(SfuError::TooLarge) => Answered::TooMuch,
        Err(error) if error.connection_failed() => Answered::Unreachable,
        Err(error) if error.is_refusal() => Answered::Refused,
        Err(_) => Answered::Unclear,
    }
}
