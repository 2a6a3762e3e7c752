//! All delegated leaves: routes facts to jobs, replaces, restores, forgets and bounds them; one timer queue for all.
//!
//! It makes no call and reads no clock; what a job does with a fact is `machine`'s.

use crate::backoff::{self, Jitter};

use crate::delayed_leave::machine::{Action, Input, Machine, Reason, Session, State};

use crate::delayed_leave::pace::{HomeserverId, Pace};

use crate::delayed_leave::rooms::{PORTION, RoomId, Rooms};

use crate::time::Time;

use crate::delayed_leave::watch::{Wanted, Watch};
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

mod api;
mod facts;
mod table;

pub use crate::delayed_event::DelayedEventAction as Call;
pub use crate::livekit::Answered;
pub use api::{Config, Delegated, Delegation, Fact, Looked, Output, Outputs, Record, Refusal, Row, Webhook, WebhookKind};
pub use table::{Job, JobId};
use table::{Names, Table};

/// While no webhook has been verified, rooms are asked at least this often (L9a).
const SWEEP_WITHOUT_WEBHOOKS: u64 = 30_000;
/// After a start, the SFU has this long to tell something before its silence is worth a warning.
const WEBHOOKS_WITHIN: u64 = 10_000;
const PROBE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Timer {
    /// By its place.
    Job(u32),
    Room(RoomId),
}

/// All jobs.
#[derive(Debug)]
pub struct Jobs {
    config: Config,
    table: Table,
    /// Jobs of each user, known by a number that nobody can guess.
    users: HashMap<u64, u32>,
    seed: u64,
    rooms: Rooms,
    pace: Pace,
    watch: Watch,
    /// When what is due. What was set anew meanwhile is left where it is, and found out of date when its time comes.
    timers: BinaryHeap<Reverse<(Time, Timer)>>,
    jitter: Jitter,
    webhooks_work: bool,
    /// When to warn that no webhook came; `None` once that was done.
    warn_unwired: Option<Time>,
    stopping: bool,
    /// Rooms for which a question was decided on while facts were taken in; they are asked for together.
    judge: Vec<Arc<str>>,
}

impl Jobs {
    /// No jobs.
    #[must_use]
    pub fn new(config: Config, seed: u64, now: Time) -> Self {
        Self {
            watch: Watch::new(config.list_rooms_every.map(backoff::as_millis), now),
            pace: Pace::new(config.concurrency),
            config,
            table: Table::default(),
            users: HashMap::new(),
            seed,
            rooms: Rooms::default(),
            timers: BinaryHeap::new(),
            jitter: Jitter::new(seed),
            webhooks_work: false,
            warn_unwired: Some(now.after(WEBHOOKS_WITHIN)),
            stopping: false,
            judge: Vec::new(),
        }
    }

    /// How many jobs there are, replaced ones that still cancel their event included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A job, as long as it is not over.
    #[must_use]
    pub fn get(&self, job: JobId) -> Option<&Job> {
        self.table.get(job)
    }

    /// A job as it is to be stored: what [`Self::restore`] takes.
    #[must_use]
    pub fn record(&self, job: JobId) -> Option<Record<'_>> {
        let job = self.table.get(job)?;
        let session = job.machine.session();
        Some(Record {
            delegation: Delegation {
                room: self.rooms.name(job.room)?,
                identity: job.identity(),
                user: job.user(),
                homeserver: self.pace.name(job.homeserver)?,
                delay_id: job.delay_id(),
                delay: job.machine.delay(),
                arrived: job.machine.delegated(),
                exempt: true,
                creates_room: job.creates_room,
                as_user: job.as_user,
            },
            restarted: job.machine.restarted(),
            sid: session.sid(),
            joined_at_ms: session.joined_at_ms(),
            room_sid: session.room_sid().map(|sid| &**sid),
            last_sighted: session.last_sighted(),
            seen: session.was_seen(),
        })
    }

    /// All jobs that were not replaced.
    pub fn current(&self) -> impl Iterator<Item = JobId> {
        self.table.ids().filter(|&id| self.table.get(id).is_some_and(|job| job.current))
    }

    /// The job of a room and identity.
    #[must_use]
    pub fn find(&self, room: &str, identity: &str) -> Option<JobId> {
        let room = self.rooms.find(room)?;
        let at = self.place(room, identity).ok()?;
        self.rooms
            .members(room)
            .get(at)
            .and_then(|&slot| self.table.in_slot(slot))
            .map(|(id, _)| id)
    }

    /// The name of a room.
    #[must_use]
    pub fn room_name(&self, room: RoomId) -> Option<&Arc<str>> {
        self.rooms.name(room)
    }

    /// The name of a homeserver.
    #[must_use]
    pub fn homeserver_name(&self, homeserver: HomeserverId) -> Option<&Arc<str>> {
        self.pace.name(homeserver)
    }

    /// Whether a stopping service has nothing more to wait for (L12).
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.table
            .ids()
            .all(|id| self.table.get(id).is_none_or(|job| job.machine.is_at_rest()))
    }

    /// When [`Fact::Time`] is due next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let timers = self.timers.peek().map(|&Reverse((at, _))| at);
        [timers, self.pace.next_deadline(), self.watch.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether a delegation would be taken: to be asked before anything is done for it, and true again when it is made.
    pub fn admit(&self, delegation: &Delegation<'_>) -> Result<(), Refusal> {
        self.admit_beside(self.find(delegation.room, delegation.identity), delegation)
    }

    fn admit_beside(&self, old: Option<JobId>, delegation: &Delegation<'_>) -> Result<(), Refusal> {
        if self.stopping {
            return Err(Refusal::Stopping);
        }
        if let Some(job) = old.and_then(|id| self.table.get(id))
            && job.delay_id() == delegation.delay_id
        {
            return Ok(());
        }
        if self
            .users
            .get(&self.number_of(delegation.user))
            .is_some_and(|&jobs| jobs >= self.config.per_user)
        {
            return Err(Refusal::UserFull);
        }
        if !delegation.exempt && self.pace.jobs(delegation.homeserver) >= self.config.per_homeserver {
            return Err(Refusal::HomeserverFull);
        }
        if self.table.len() >= self.config.total as usize {
            return Err(Refusal::Full);
        }
        Ok(())
    }

    /// Takes a delegation whose checks are done.
    pub fn delegate(&mut self, delegation: &Delegation<'_>, now: Time) -> Result<(Delegated, Outputs), Refusal> {
        let old = self.find(delegation.room, delegation.identity);
        self.admit_beside(old, delegation)?;
        let mut out = Outputs::default();
        let delegated = match old.and_then(|id| self.table.get(id).map(|job| (id, job))) {
            Some((id, job)) if job.delay_id() == delegation.delay_id => {
                let arrived = delegation.arrived;
                if let Some(job) = self.table.get_mut(id) {
                    job.arrived = job.arrived.max(arrived);
                }
                self.step(
                    id,
                    Input::Renewed {
                        delay: delegation.delay,
                        arrived,
                    },
                    now,
                    &mut out,
                );
                Delegated::Renewed(id)
            }
            Some((_, job)) if job.arrived > delegation.arrived => {
                let machine = Machine::new(delegation.delay, delegation.arrived, self.watch.sfu());
                let room = job.room;
                let id = self.insert(delegation, machine, room);
                self.step(id, Input::Replaced, now, &mut out);
                Delegated::Overtaken
            }
            Some((old, job)) => {
                let machine = job.machine.successor(delegation.delay, delegation.arrived);
                self.detach(old);
                self.step(old, Input::Replaced, now, &mut out);
                Delegated::New(self.start(delegation, machine, now, &mut out))
            }
            None => {
                let machine = Machine::new(delegation.delay, delegation.arrived, self.watch.sfu());
                Delegated::New(self.start(delegation, machine, now, &mut out))
            }
        };
        self.settle(now, &mut out);
        Ok((delegated, out))
    }

    /// Takes a job from the store, unless its key has a newer one or its delay is over (L11).
    pub fn restore(&mut self, record: &Record<'_>, now: Time) -> Outputs {
        let mut out = Outputs::default();
        let delegation = &record.delegation;
        if self.find(delegation.room, delegation.identity).is_some() {
            return out;
        }
        if record.restarted.after(delegation.delay.as_millis()) <= now || self.table.len() >= self.config.total as usize {
            out.push(Output::Forget {
                room: delegation.room.into(),
                identity: delegation.identity.into(),
            });
            return out;
        }
        let room = self.rooms.enter(delegation.room, now);
        let room_sid = record.room_sid.map(|sid| self.rooms.intern(room, sid));
        self.rooms.restore(room, room_sid.as_ref(), record.last_sighted, now);
        let session = Session::restored(record.sid, record.joined_at_ms, room_sid, record.last_sighted, record.seen);
        let machine = Machine::restored(
            delegation.delay,
            Some(delegation.arrived),
            record.restarted,
            session,
            now,
            self.watch.sfu(),
        );
        let id = self.insert(delegation, machine, room);
        self.enrol(id, room, now);
        if record.seen {
            self.rooms.sweep_now(room, now);
            self.sync_room(room);
            self.watch.list_soon(now);
        }
        self.step(id, Input::Time, now, &mut out);
        self.settle(now, &mut out);
        out
    }

    /// Takes a fact, and says what is to be done about it.
    pub fn handle(&mut self, fact: Fact<'_>, now: Time) -> Outputs {
        let mut out = Outputs::default();
        match fact {
            Fact::Webhook(webhook) => self.webhook(&webhook, now, &mut out),
            Fact::LookedUp { job, asked, answer } => self.looked_up(job, asked, answer, now, &mut out),
            Fact::Listed { room, asked, answer } => self.listed(room, asked, answer, now, &mut out),
            Fact::RoomsListed { names, asked, answer } => self.rooms_listed(names, asked, answer, now, &mut out),
            Fact::RoomCreated { room, answer } => self.room_created(room, answer, now, &mut out),
            Fact::Probed(reach) => self.watch.probed(reach, now),
            Fact::WatchClosed => self.watch.closed(now),
            Fact::Called {
                job,
                homeserver,
                call,
                outcome,
            } => {
                self.pace.ended(homeserver, outcome, now, &mut self.jitter);
                let input = match call {
                    Call::Restart => Input::Restarted(outcome),
                    Call::Send => Input::Sent(outcome),
                    Call::Cancel => Input::Cancelled(outcome),
                };
                self.step(job, input, now, &mut out);
            }
            Fact::Stopping => {
                self.stopping = true;
                self.tell_all(Input::Stopping, now, &mut out);
            }
            Fact::Time => {}
        }
        self.settle(now, &mut out);
        out
    }

    // --- one step of one job ---

    fn step(&mut self, id: JobId, input: Input<'_>, now: Time, out: &mut Outputs) {
        let Some(job) = self.table.get_mut(id) else { return };
        let was_swept = job.current && job.machine.is_swept();
        let room = job.room;
        for action in job.machine.step(input, now, &mut self.jitter) {
            let output = match action {
                Action::LookUp { within } => Output::LookUp {
                    job: id,
                    asked: now,
                    within,
                },
                Action::JudgeRoom => {
                    self.rooms.want_verdict(room, now);
                    self.sync_room(room);
                    continue;
                }
                Action::Restart => self.call(id, Call::Restart),
                Action::Send => self.call(id, Call::Send),
                Action::Cancel => self.call(id, Call::Cancel),
                Action::Persist => Output::Persist { job: id },
                Action::Finish(reason) => return self.finish(id, was_swept, reason, now, out),
            };
            out.push(output);
        }
        self.sync(id, was_swept, now);
    }

    fn call(&self, job: JobId, call: Call) -> Output {
        let homeserver = self.table.get(job).map_or(HomeserverId::NONE, |job| job.homeserver);
        Output::Call { job, homeserver, call }
    }

    /// Brings the queues in line with what the job wants now.
    fn sync(&mut self, id: JobId, was_swept: bool, now: Time) {
        let Some(job) = self.table.get_mut(id) else { return };
        let (room, homeserver, creates) = (job.room, job.homeserver, job.creates_room);
        let timer = job.machine.next_deadline();
        if timer != job.timer {
            job.timer = timer;
            if let Some(at) = timer {
                self.timers.push(Reverse((at, Timer::Job(id.slot()))));
            }
        }
        let wish = job.machine.wish();
        if wish != job.in_line {
            if let Some(old) = job.in_line {
                self.pace.unwant(homeserver, id, old, now);
            }
            if let Some(new) = wish {
                self.pace.want(homeserver, id, new, now);
            }
            job.in_line = wish;
        }
        let is_swept = job.current && job.machine.is_swept();
        if was_swept != is_swept {
            self.rooms.count(room, was_swept, is_swept, creates);
            self.plan_sweep(room, now);
        }
    }

    fn finish(&mut self, id: JobId, was_swept: bool, reason: Reason, now: Time, out: &mut Outputs) {
        let Some(job) = self.table.get(id) else { return };
        let room = job.room;
        let name = self.rooms.name(room).cloned().unwrap_or_else(|| "".into());
        if job.current {
            if was_swept {
                let creates = job.creates_room;
                self.rooms.count(room, true, false, creates);
            }
            self.detach(id);
        }
        let Some(job) = self.table.remove(id) else { return };
        if let Some(wish) = job.in_line {
            self.pace.unwant(job.homeserver, id, wish, now);
        }
        self.pace.leave(job.homeserver);
        self.rooms.leave(room);
        let user = self.number_of(job.user());
        if let Some(jobs) = self.users.get_mut(&user) {
            *jobs -= 1;
            if *jobs == 0 {
                self.users.remove(&user);
                if self.users.capacity() > 4 * self.users.len() + 1_024 {
                    self.users.shrink_to(2 * self.users.len());
                }
            }
        }
        out.push(Output::Finished {
            job: id,
            room: Arc::clone(&name),
            delay_id: job.delay_id().into(),
            reason,
        });
        if job.current {
            out.push(Output::Forget {
                room: name,
                identity: job.identity().into(),
            });
        }
    }

    // --- coming and going ---

    fn start(&mut self, delegation: &Delegation<'_>, machine: Machine, now: Time, out: &mut Outputs) -> JobId {
        let room = self.rooms.enter(delegation.room, now);
        let id = self.insert(delegation, machine, room);
        self.enrol(id, room, now);
        out.push(Output::Persist { job: id });
        self.step(id, Input::Time, now, out);
        id
    }

    fn insert(&mut self, delegation: &Delegation<'_>, machine: Machine, room: RoomId) -> JobId {
        *self.users.entry(self.number_of(delegation.user)).or_insert(0) += 1;
        let homeserver = self.pace.enter(delegation.homeserver, delegation.exempt);
        self.rooms.join(room);
        self.table.insert(Job {
            machine,
            room,
            homeserver,
            names: Names::new(delegation.identity, delegation.delay_id, delegation.user),
            arrived: delegation.arrived,
            timer: None,
            in_line: None,
            creates_room: delegation.creates_room,
            as_user: delegation.as_user,
            current: false,
        })
    }

    /// From now on facts about its room and identity are the job's.
    fn enrol(&mut self, id: JobId, room: RoomId, now: Time) {
        let Some(job) = self.table.get(id) else { return };
        let (Ok(at) | Err(at)) = self.place(room, job.identity());
        if let Some(members) = self.rooms.members_mut(room) {
            members.insert(at, id.slot());
        }
        if let Some(job) = self.table.get_mut(id) {
            job.current = true;
            let (is_swept, creates) = (job.machine.is_swept(), job.creates_room);
            self.rooms.count(room, false, is_swept, creates);
        }
        self.plan_sweep(room, now);
    }

    /// From now on they are not. The job itself stays.
    fn detach(&mut self, id: JobId) {
        let Some(job) = self.table.get_mut(id) else { return };
        let (room, was_current) = (job.room, job.current);
        if was_current {
            if !matches!(job.machine.state(), State::Finished(_)) {
                job.current = false;
                if job.machine.is_swept() {
                    let creates = job.creates_room;
                    self.rooms.count(room, true, false, creates);
                }
            }
            if let Some(members) = self.rooms.members_mut(room) {
                members.retain(|&slot| slot != id.slot());
            }
        }
        self.sync_room(room);
    }

    fn number_of(&self, user: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, user).hash(&mut hasher);
        hasher.finish()
    }

    fn place(&self, room: RoomId, identity: &str) -> Result<usize, usize> {
        self.rooms.members(room).binary_search_by(|&slot| {
            self.table
                .in_slot(slot)
                .map_or(std::cmp::Ordering::Less, |(_, job)| job.identity().cmp(identity))
        })
    }

    // --- time ---

    fn settle(&mut self, now: Time, out: &mut Outputs) {
        self.run_timers(now, out);
        self.watch.need(self.rooms.any_connected() && !self.stopping, now);
        let mut wanted = Vec::new();
        self.watch.settle(now, &mut wanted);
        for wanted in wanted {
            match wanted {
                Wanted::Probe => out.push(Output::Probe { within: PROBE }),
                Wanted::ListRooms => {
                    self.judge.clear();
                    self.judge.extend(self.rooms.with_connected().cloned());
                }
                Wanted::Warn(for_millis) => out.push(Output::SfuSilent { for_millis }),
                Wanted::Tell(sfu) => self.tell_all(Input::Sfu(sfu), now, out),
            }
        }
        self.run_timers(now, out);
        self.list_rooms(now, out);
        while let Some((homeserver, id)) = self.pace.next_turn(now) {
            let before = out.0.len();
            if let Some(job) = self.table.get_mut(id) {
                job.in_line = None;
            }
            self.step(id, Input::Turn, now, out);
            let called = out.0[before..].iter().any(|output| matches!(output, Output::Call { .. }));
            if !called {
                self.pace.declined(homeserver, now);
            }
        }
        self.next_timer();
    }

    fn run_timers(&mut self, now: Time, out: &mut Outputs) {
        while let Some((at, timer)) = self.next_timer()
            && at <= now
        {
            self.timers.pop();
            match timer {
                Timer::Job(slot) => {
                    let Some((id, _)) = self.table.in_slot(slot) else { continue };
                    if let Some(job) = self.table.get_mut(id) {
                        job.timer = None;
                    }
                    self.step(id, Input::Time, now, out);
                }
                Timer::Room(room) => {
                    if let Some((timer, _)) = self.rooms.timer(room) {
                        *timer = None;
                    }
                    self.settle_room(room, now, out);
                }
            }
        }
    }

    /// The next timer that is still set. Those that are not are dropped.
    fn next_timer(&mut self) -> Option<(Time, Timer)> {
        let Self { timers, table, rooms, .. } = self;
        let is_set = |&Reverse((at, timer)): &Reverse<(Time, Timer)>| {
            let set = match timer {
                Timer::Job(slot) => table.in_slot(slot).and_then(|(_, job)| job.timer),
                Timer::Room(room) => rooms.timer_is(room),
            };
            set == Some(at)
        };
        while let Some(first) = timers.peek() {
            if is_set(first) {
                break;
            }
            timers.pop();
        }
        // Each job and each room has one at most.
        if timers.len() > 2 * (table.len() + rooms.len()) + 64 {
            let mut set = std::mem::take(timers).into_vec();
            set.retain(is_set);
            set.sort_unstable();
            set.dedup();
            set.shrink_to(set.len() * 2);
            *timers = set.into();
        }
        timers.peek().map(|&Reverse(timer)| timer)
    }

    fn settle_room(&mut self, room: RoomId, now: Time, out: &mut Outputs) {
        let due = self.rooms.settle(room, now);
        if due.judge
            && let Some(name) = self.rooms.name(room)
        {
            self.judge.push(Arc::clone(name));
        }
        if due.create {
            out.push(Output::CreateRoom { room });
        }
        if due.sweep {
            self.sweep(room, now, out);
        }
        self.sync_room(room);
    }

    fn sweep(&mut self, room: RoomId, now: Time, out: &mut Outputs) {
        if self.config.sweep_every.is_none() && !self.webhooks_work && self.warn_unwired.is_some_and(|at| at <= now) {
            self.warn_unwired = None;
            out.push(Output::Unwired);
        }
        if self.rooms.connected(room) > 1 {
            self.rooms.sweeping(room);
            out.push(Output::ListParticipants { room, asked: now });
        } else {
            for id in self.in_room(room) {
                self.step(id, Input::Ask, now, out);
            }
            self.plan_sweep(room, now);
        }
    }

    /// Spreads the sweeps of the rooms over the interval; each keeps its place from then on.
    fn plan_sweep(&mut self, room: RoomId, now: Time) {
        let every = match self.config.sweep_every {
            Some(every) => Some(backoff::as_millis(every).max(1_000)),
            None if self.webhooks_work => None,
            None => Some(SWEEP_WITHOUT_WEBHOOKS),
        };
        if let Some(every) = every
            && self.rooms.needs_sweep(room)
            && !self.stopping
        {
            let first = 1_000 + self.jitter.up_to(every - 1_000);
            self.rooms.plan_sweep(room, now.after(first), now.after(every));
        }
        self.sync_room(room);
    }

    fn list_rooms(&mut self, now: Time, out: &mut Outputs) {
        let names = std::mem::take(&mut self.judge);
        for portion in names.chunks(PORTION) {
            for name in portion {
                if let Some(room) = self.rooms.find(name) {
                    self.rooms.judging(room);
                    self.sync_room(room);
                }
            }
            out.push(Output::ListRooms {
                names: portion.to_vec(),
                asked: now,
            });
        }
    }

    fn sync_room(&mut self, room: RoomId) {
        let Some((timer, next)) = self.rooms.timer(room) else { return };
        let old = std::mem::replace(timer, next);
        if old != next
            && let Some(at) = next
        {
            self.timers.push(Reverse((at, Timer::Room(room))));
        }
    }
}

#[cfg(test)]
mod tests;
