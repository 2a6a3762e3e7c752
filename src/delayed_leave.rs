//! Delegated leaves: a client hands over its delayed leave event
//! ([MSC4140](https://github.com/matrix-org/matrix-spec-proposals/pull/4140)); it is restarted while the participant is there, and
//! sent when the participant is gone. Pure: facts in, actions out.
//!
//! Two promises (decision L1): a participant who is gone is reported; a participant who is there never is.
//!
//! ```text
//! leave.rs       one delayed event; the state chart is there
//! order.rs       whose event counts where several were delegated for a participant
//! scheduler.rs   whose call to a homeserver is next
//! ```
//!
//! Here is the table of all leaves: it admits, restores and bounds them.

pub mod leave;
mod order;
pub mod scheduler;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

pub use leave::{FinishReason, Leave, Phase};
pub use scheduler::{Concurrency, HomeserverId, Overload};

use crate::backoff::Jitter;
use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::presence::{DepartureEvidence, ParticipantId};
use crate::slab::{Id, Slab};
use crate::text::Text;
use crate::time::{Delay, Time};
use crate::timers::Timers;
use leave::{Around, Input};
use scheduler::{CallScheduler, PendingCall};

/// Synapse's ids of delayed events and most user ids together.
const MAX_NAME_BYTES: usize = 62;

/// The id of a leave.
pub type LeaveId = Id<Job>;

/// Bounds of the number of leaves (L8).
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most leaves of one user.
    pub per_user: u32,
    /// Most leaves in all.
    pub total: u32,
    /// Most leaves of one homeserver that is not listed.
    pub per_homeserver: u32,
    /// Of participants whom nobody ever saw.
    pub never_seen: u32,
    /// Calls to homeservers in flight.
    pub concurrency: Concurrency,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            per_user: 100,
            total: 200_000,
            per_homeserver: 10_000,
            never_seen: 20_000,
            concurrency: Concurrency::default(),
        }
    }
}

/// A delayed event that is handed over.
#[derive(Clone, Copy, Debug)]
pub struct Handover<'a> {
    /// The Matrix user.
    pub user: &'a str,
    /// The user's homeserver.
    pub homeserver: &'a str,
    /// Id of the delayed event.
    pub delay_id: &'a str,
    /// Delay of the event.
    pub delay: Delay,
    /// When the request arrived; what counts where two of them compete (L14).
    pub arrived: Time,
    /// The operator listed the homeserver (H7a).
    pub listed: bool,
    /// Calls carry the as_token and the user.
    pub as_user: bool,
}

/// Why a delegation is not taken (L8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CapacityError {
    /// The user has too many.
    UserFull,
    /// The homeserver has too many.
    HomeserverFull,
    /// All users together have too many leaves.
    Full,
    /// The service is stopping: nobody would watch.
    Stopping,
}

/// Outcome of a delegation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delegated {
    /// A new leave. It is to be stored before the request is answered.
    New(LeaveId),
    /// The leave of the same delayed event goes on.
    Renewed(LeaveId),
    /// A later request has been served already: this event is being cancelled.
    Overtaken,
}

/// An event that a leave replaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replaced<'a> {
    /// Id of the delayed event.
    pub delay_id: &'a str,
    /// When the homeserver fires the event.
    pub until: Time,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Call a homeserver about the leave's event: [`Leaves::on_called`].
    Call(LeaveId, HomeserverId, DelayedEventAction),
    /// Store the leave as it is now.
    Store(LeaveId),
    /// Ask the SFU again whether this participant is there.
    Confirm(ParticipantId),
    /// The participant is waited for until then; the delay of the event that runs out then.
    Awaits(ParticipantId, Time, Delay),
    /// A leave is over.
    Finished {
        participant: ParticipantId,
        /// Id of the delayed event.
        delay_id: Box<str>,
        reason: FinishReason,
    },
    /// A warning: the limit of a homeserver does not let all restarts through.
    Overloaded(Overload),
}

#[derive(Debug)]
pub struct Job {
    leave: Leave,
    participant: ParticipantId,
    homeserver: HomeserverId,
    /// The delayed event and the Matrix user, side by side; the user begins there.
    names: Text<MAX_NAME_BYTES>,
    user_from: u16,
    timer: Option<Time>,
    /// The call that waits in the scheduler's queue, for somebody who was seen or not.
    queued: Option<(DelayedEventAction, bool, Time)>,
    as_user: bool,
    /// The participant was there at some time.
    seen: bool,
    /// The participant is there, as far as was told.
    is_there: bool,
}

impl Job {
    pub const fn leave(&self) -> &Leave {
        &self.leave
    }

    pub const fn participant(&self) -> ParticipantId {
        self.participant
    }

    pub const fn homeserver(&self) -> HomeserverId {
        self.homeserver
    }

    /// The Matrix user.
    pub fn user(&self) -> &str {
        self.names.as_str().get(usize::from(self.user_from)..).unwrap_or_default()
    }

    /// Id of the delayed event.
    pub fn delay_id(&self) -> &str {
        self.names.as_str().get(..usize::from(self.user_from)).unwrap_or_default()
    }

    /// Whether calls carry the as_token and the user.
    pub const fn is_as_user(&self) -> bool {
        self.as_user
    }

    /// Whether it is no news to the leave that its participant is there.
    fn is_settled(&self) -> bool {
        self.seen && self.is_there && self.leave.goes_on()
    }
}

#[derive(Debug)]
pub struct Leaves {
    bounds: Bounds,
    jobs: Slab<Job>,
    /// The current leave of each participant, by the slot of its id.
    current: Vec<Option<LeaveId>>,
    /// Whether the current leave goes on and knows that its participant is there, by the slot of the participant's id: sweeps say
    /// so of everybody again and again, and a leave of a hundred thousand is far away in memory.
    settled: Vec<bool>,
    /// Leaves that the current one replaces, the oldest first, until their events are cancelled.
    replaced: BTreeMap<ParticipantId, Vec<LeaveId>>,
    /// Leaves of each user, known by a number that nobody can guess.
    users: HashMap<u64, u32>,
    seed: u64,
    scheduler: CallScheduler,
    /// Leaves of participants whom nobody ever saw, by homeserver and age; and how many each homeserver has of them.
    never_seen: BTreeSet<(HomeserverId, Time, LeaveId)>,
    never_seen_of: HashMap<HomeserverId, u32>,
    timers: Timers<LeaveId>,
    jitter: Jitter,
    sfu_silent: bool,
    /// Another process may restart all of them, too.
    shared: bool,
    stopping: bool,
    /// Leaves that a stopping service waits for.
    busy: usize,
    out: Vec<Output>,
}

impl Leaves {
    pub fn new(bounds: Bounds, seed: u64) -> Self {
        Self {
            scheduler: CallScheduler::new(bounds.concurrency),
            bounds,
            jobs: Slab::default(),
            current: Vec::new(),
            settled: Vec::new(),
            replaced: BTreeMap::new(),
            users: HashMap::new(),
            seed,
            never_seen: BTreeSet::new(),
            never_seen_of: HashMap::new(),
            timers: Timers::default(),
            jitter: Jitter::new(seed),
            sfu_silent: false,
            shared: false,
            stopping: false,
            busy: 0,
            out: Vec::new(),
        }
    }

    /// How many there are, replaced ones included.
    pub const fn len(&self) -> usize {
        self.jobs.len()
    }

    pub const fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub fn get(&self, id: LeaveId) -> Option<&Job> {
        self.jobs.get(id)
    }

    pub fn of(&self, participant: ParticipantId) -> Option<LeaveId> {
        let id = (*self.current.get(participant.slot())?)?;
        self.jobs.get(id).is_some_and(|job| job.participant == participant).then_some(id)
    }

    /// How many current leaves there are: each has a record.
    #[must_use]
    pub fn current(&self) -> usize {
        let replaced: usize = self.replaced.values().map(Vec::len).sum();
        self.jobs.len() - replaced
    }

    /// All current leaves.
    pub fn all(&self) -> impl Iterator<Item = LeaveId> {
        self.current.iter().copied().flatten()
    }

    pub fn homeserver(&self, id: HomeserverId) -> Option<&Arc<str>> {
        self.scheduler.name(id)
    }

    /// How many there are, and how many of them are of participants who were never seen.
    pub fn counts(&self) -> (usize, usize) {
        (self.jobs.len(), self.never_seen.len())
    }

    /// Whether any is an event of that homeserver.
    pub fn has_any_of(&self, homeserver: &str) -> bool {
        self.scheduler.jobs(homeserver) > 0
    }

    /// Whether a stopping service has nothing to wait for (L12).
    pub const fn is_at_rest(&self) -> bool {
        self.busy == 0
    }

    /// Whether a delegation would be taken: to be asked before anything is done for it, and true again when it is made.
    ///
    /// # Errors
    /// When there are too many.
    pub fn admit(&self, participant: Option<ParticipantId>, handover: &Handover<'_>) -> Result<(), CapacityError> {
        if self.stopping {
            return Err(CapacityError::Stopping);
        }
        let old = participant.and_then(|participant| self.jobs.get(self.of(participant)?));
        if old.is_some_and(|job| job.delay_id() == handover.delay_id && job.user() == handover.user) {
            return Ok(());
        }
        // Two users may share an identity by the looks of it; neither ends the other's event (O3).
        if old.is_some_and(|job| !job.user().is_empty() && job.user() != handover.user) {
            return Err(CapacityError::UserFull);
        }
        if self
            .users
            .get(&self.number_of(handover.user))
            .is_some_and(|&jobs| jobs >= self.bounds.per_user)
        {
            return Err(CapacityError::UserFull);
        }
        if !handover.listed && self.scheduler.jobs(handover.homeserver) >= self.bounds.per_homeserver {
            return Err(CapacityError::HomeserverFull);
        }
        if self.is_full() {
            return Err(CapacityError::Full);
        }
        Ok(())
    }

    /// Whether there is no room for another leave, and none that could give way: somebody was seen on each.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.jobs.len() >= self.bounds.total as usize && self.never_seen.is_empty()
    }

    /// Takes a leave from the store, unless its participant has a newer one (L11), whether there is room for it or not.
    pub fn restore(
        &mut self,
        participant: ParticipantId,
        handover: &Handover<'_>,
        restarted: Time,
        seen: bool,
        replaced: &[Replaced<'_>],
        now: Time,
    ) -> Option<LeaveId> {
        if self.of(participant).is_some() {
            return None;
        }
        let leave = Leave::restored(handover.delay, handover.arrived, restarted, seen, now);
        let id = self.install(participant, handover, leave, seen, now);
        self.replaces_also(participant, handover, replaced, now);
        if !replaced.is_empty() {
            self.step(id, Input::Installed, now);
        }
        self.step(id, Input::Time, now);
        self.tell(id, seen, now);
        Some(id)
    }

    // --- facts ---

    pub fn on_present(&mut self, participant: ParticipantId, now: Time) {
        if self.settled.get(participant.slot()) == Some(&true) {
            debug_assert!(self.of(participant).and_then(|id| self.jobs.get(id)).is_some_and(Job::is_settled));
            return;
        }
        let Some(id) = self.of(participant) else { return };
        if self.jobs.get(id).is_some_and(|job| !job.seen) {
            // Those that it replaces, too: none of their events may be left to its timer now.
            for id in self.replaces(id).to_vec().into_iter().chain([id]) {
                self.is_seen(id, now);
            }
        }
        self.tell(id, true, now);
        if let Some(settled) = self.settled.get_mut(participant.slot()) {
            *settled = self.jobs.get(id).is_some_and(Job::is_settled);
        }
    }

    /// Marks that a leave of the participant may have changed.
    fn unsettle(&mut self, participant: ParticipantId) {
        if let Some(settled) = self.settled.get_mut(participant.slot()) {
            *settled = false;
        }
    }

    fn is_seen(&mut self, id: LeaveId, now: Time) {
        if let Some(job) = self.jobs.get_mut(id)
            && !std::mem::replace(&mut job.seen, true)
        {
            let (homeserver, delegated) = (job.homeserver, job.leave.delegated());
            self.was_seen(homeserver, delegated, id);
            self.sync(id, now);
        }
    }

    pub fn on_gone(&mut self, participant: ParticipantId, evidence: DepartureEvidence, now: Time) {
        let Some(id) = self.of(participant) else { return };
        self.tell(id, false, now);
        self.step(id, Input::Gone(evidence), now);
    }

    /// There is nothing to be sent for the participant any more: the join failed, or the user was removed from the Matrix room.
    pub fn on_over(&mut self, participant: ParticipantId, reason: FinishReason, now: Time) {
        if let Some(id) = self.of(participant) {
            self.step(id, Input::Over(reason), now);
        }
    }

    /// Takes in that the stored part of the session has changed.
    pub fn on_changed(&mut self, participant: ParticipantId) {
        if let Some(id) = self.of(participant) {
            self.out.push(Output::Store(id));
        }
    }

    pub fn on_called(
        &mut self,
        id: LeaveId,
        homeserver: HomeserverId,
        action: DelayedEventAction,
        sent: Time,
        outcome: Outcome,
        now: Time,
    ) {
        self.scheduler.on_result(homeserver, sent, outcome, now, &mut self.jitter);
        self.step(id, Input::Called { action, sent, outcome }, now);
    }

    /// The SFU counts as silent now, or does so no more (L13a).
    pub fn on_sfu_silent(&mut self, silent: bool, now: Time) {
        self.sfu_silent = silent;
        self.step_all(Input::Time, now);
    }

    /// The process stood still for that many milliseconds of which its clock knows nothing (L5a).
    pub fn on_woke(&mut self, lost_ms: u64, now: Time) {
        self.step_all(Input::Woke(lost_ms), now);
    }

    /// Another process may restart the events, too, or does not any more.
    pub fn on_shared(&mut self, shared: bool, now: Time) {
        if std::mem::replace(&mut self.shared, shared) != shared && shared {
            self.step_all(Input::Shared, now);
        }
    }

    /// The service is stopping (L12).
    pub fn on_stopping(&mut self, now: Time) {
        self.stopping = true;
        self.step_all(Input::Stopping, now);
    }

    // --- time ---

    pub fn next_deadline(&mut self) -> Option<Time> {
        let timer = self.next_timer().map(|(at, _)| at);
        [timer, self.scheduler.next_deadline()].into_iter().flatten().min()
    }

    /// Does what is due, and hands over what was asked for since the last time. `last_no` says of a participant who never came when the
    /// SFU was last asked that said no.
    pub fn settle(&mut self, last_no: &dyn Fn(ParticipantId) -> Option<Time>, now: Time) -> Vec<Output> {
        while let Some((at, id)) = self.next_timer()
            && at <= now
        {
            self.timers.pop();
            let Some(job) = self.jobs.get_mut(id) else { continue };
            job.timer = None;
            let last_no = last_no(job.participant);
            self.step_knowing(id, Input::Time, last_no, now);
        }
        while let Some(permit) = self.scheduler.next_permit(now) {
            if let Some(job) = self.jobs.get_mut(permit.leave) {
                job.queued = None;
            }
            let before = self.out.len();
            self.step(permit.leave, Input::Permit, now);
            let called = self.out[before..].iter().any(|output| matches!(output, Output::Call(..)));
            if !called {
                self.scheduler.declined(permit, now);
            }
        }
        if let Some(overload) = self.scheduler.overload(now) {
            self.out.push(Output::Overloaded(overload));
        }
        std::mem::take(&mut self.out)
    }

    fn next_timer(&mut self) -> Option<(Time, LeaveId)> {
        self.timers.first(self.jobs.len(), |id| self.jobs.get(id).and_then(|job| job.timer))
    }

    // --- one step of one leave ---

    /// Tells a leave whether somebody is there: at each delegation, and whenever that changes.
    fn tell(&mut self, id: LeaveId, is_there: bool, now: Time) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.is_there = is_there;
        let (participant, goes_on) = (job.participant, job.leave.goes_on());
        if !is_there {
            self.unsettle(participant);
        } else if !goes_on {
            self.step(id, Input::Present, now);
        }
    }

    fn step_all(&mut self, input: Input, now: Time) {
        for id in self.jobs.iter().map(|(id, _)| id).collect::<Vec<_>>() {
            self.step(id, input, now);
        }
    }

    fn step(&mut self, id: LeaveId, input: Input, now: Time) {
        self.step_knowing(id, input, None, now);
    }

    fn step_knowing(&mut self, id: LeaveId, input: Input, last_no: Option<Time>, now: Time) {
        let replaced_until = self.first_replaced(id).map(|(until, _)| until);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let (was_at_rest, ended, phase) = (job.leave.is_at_rest(), job.leave.deadline(), job.leave.phase());
        let mut around = Around {
            now,
            usual_ms: self.scheduler.usual_ms(job.homeserver),
            sfu_silent: self.sfu_silent,
            shared: self.shared,
            stopping: self.stopping,
            last_no,
            replaced_until,
            jitter: &mut self.jitter,
        };
        let outputs = job.leave.step(input, &mut around);
        let (participant, homeserver) = (job.participant, job.homeserver);
        match (was_at_rest, job.leave.is_at_rest()) {
            (true, false) => self.busy += 1,
            (false, true) => self.busy -= 1,
            (true, true) | (false, false) => {}
        }
        let is_prolonged = job.leave.phase() == Phase::AwaitingJoin && job.leave.deadline() != ended;
        self.unsettle(participant);
        let is_current = self.of(participant) == Some(id);
        if is_current && is_prolonged {
            self.awaits(id);
        }
        for output in outputs {
            match output {
                leave::Output::Call(action) => self.out.push(Output::Call(id, homeserver, action)),
                leave::Output::Store if is_current => self.out.push(Output::Store(id)),
                leave::Output::Store => {}
                leave::Output::Confirm => self.out.push(Output::Confirm(participant)),
                leave::Output::Granted => {
                    for replaced in self.replaces(id).to_vec() {
                        self.step(replaced, Input::Superseded, now);
                    }
                }
                leave::Output::Done(reason) => return self.finish(id, reason, phase, now),
            }
        }
        self.sync(id, now);
    }

    /// Brings the queues in line with what the leave wants now.
    fn sync(&mut self, id: LeaveId, now: Time) {
        let first = self.first_replaced(id);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let next = job.leave.next_deadline(self.sfu_silent);
        self.timers.set(&mut job.timer, next, id);
        let pending = job.leave.pending_call().map(|(action, deadline, relaxed)| PendingCall {
            action,
            deadline: first.map_or(deadline, |(first, _)| first.min(deadline)),
            relaxed: first.map_or(relaxed, |(_, first)| first.min(relaxed)),
            delay_ms: u32::try_from(job.leave.delay().as_millis()).unwrap_or(u32::MAX),
            user: number_of(self.seed, job.user()),
            seen: job.seen,
        });
        let queued = pending.map(|call| (call.action, call.seen, call.deadline));
        let former = std::mem::replace(&mut job.queued, queued);
        if queued != former {
            let homeserver = job.homeserver;
            if let Some((_, _, deadline)) = former {
                self.scheduler.dequeue(homeserver, id, deadline, now);
            }
            if let Some(call) = pending {
                self.scheduler.enqueue(homeserver, id, call, now);
            }
        }
    }

    /// Takes a leave that is over out of the table, and sees to those that it replaces. It was in that phase before.
    fn finish(&mut self, id: LeaveId, reason: FinishReason, was: Phase, now: Time) {
        let Some(job) = self.take(id, now) else { return };
        let participant = job.participant;
        if self.current.get(participant.slot()) == Some(&Some(id)) {
            self.set_current(participant, None);
            self.succeed(&job, reason, was, now);
        } else {
            self.take_out(participant, id);
            self.out.extend(self.of(participant).map(Output::Store));
        }
        self.out.push(Output::Finished {
            participant,
            delay_id: job.delay_id().into(),
            reason,
        });
    }

    /// Takes a leave out of the table and of all queues.
    fn take(&mut self, id: LeaveId, now: Time) -> Option<Job> {
        let job = self.jobs.remove(id)?;
        if let Some((_, _, deadline)) = job.queued {
            self.scheduler.dequeue(job.homeserver, id, deadline, now);
        }
        if !job.seen {
            self.was_seen(job.homeserver, job.leave.delegated(), id);
        }
        self.scheduler.leave(job.homeserver);
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
        Some(job)
    }

    /// Drops the leaves of a participant: another process looks after them. Nothing is called or removed for it.
    pub fn let_go(&mut self, participant: ParticipantId, now: Time) {
        let current = self.of(participant);
        let replaced = self.replaced.remove(&participant).unwrap_or_default();
        for id in replaced.into_iter().chain(current) {
            if let Some(job) = self.take(id, now) {
                self.busy -= usize::from(!job.leave.is_at_rest());
            }
        }
        if current.is_some() {
            self.set_current(participant, None);
        }
    }

    /// The homeserver with most of the leaves.
    #[must_use]
    pub fn largest_homeserver(&self) -> Option<&Arc<str>> {
        self.scheduler.largest()
    }

    /// The shortest delay of all leaves.
    #[must_use]
    pub fn shortest_delay(&self) -> Option<Delay> {
        self.jobs.iter().map(|(_, job)| job.leave.delay()).min()
    }

    /// Users and homeservers that are at their bound, but not more than so many of them.
    #[must_use]
    pub fn full(&self, most: usize) -> (BTreeSet<&str>, BTreeSet<&str>) {
        let is_full = |user: &str| {
            self.users
                .get(&self.number_of(user))
                .is_some_and(|&jobs| jobs >= self.bounds.per_user)
        };
        let users = if self.users.values().any(|&jobs| jobs >= self.bounds.per_user) {
            let all = self.jobs.iter().map(|(_, job)| job.user());
            all.filter(|user| is_full(user))
                .collect::<BTreeSet<_>>()
                .into_iter()
                .take(most)
                .collect()
        } else {
            BTreeSet::new()
        };
        let servers = if self.jobs.len() >= self.bounds.per_homeserver as usize {
            let names = self.jobs.iter().filter_map(|(_, job)| self.scheduler.name(job.homeserver));
            let names: BTreeSet<&str> = names.map(|name| &**name).collect();
            let is_full = |name: &&str| self.scheduler.jobs(name) >= self.bounds.per_homeserver;
            names.into_iter().filter(is_full).take(most).collect()
        } else {
            BTreeSet::new()
        };
        (users, servers)
    }

    // --- coming and going ---

    /// A new leave takes the place of the current one.
    fn install(&mut self, participant: ParticipantId, handover: &Handover<'_>, leave: Leave, seen: bool, now: Time) -> LeaveId {
        let id = self.insert(participant, handover, leave, seen, now);
        self.put_in_front(participant, id, now);
        self.awaits(id);
        self.out.push(Output::Store(id));
        id
    }

    fn insert(&mut self, participant: ParticipantId, handover: &Handover<'_>, leave: Leave, seen: bool, now: Time) -> LeaveId {
        let is_full = self.jobs.len() >= self.bounds.total as usize;
        if is_full || (!seen && self.never_seen.len() >= self.bounds.never_seen as usize) {
            self.evict(now);
        }
        *self.users.entry(self.number_of(handover.user)).or_insert(0) += 1;
        let homeserver = self.scheduler.enter(handover.homeserver, handover.listed);
        self.busy += usize::from(!leave.is_at_rest());
        let delegated = leave.delegated();
        let id = self.jobs.insert(Job {
            leave,
            participant,
            homeserver,
            names: Text::new(&[handover.delay_id, handover.user].concat()),
            // Nothing that long passes the bounds on requests and records; if it did, the user would be found empty.
            user_from: u16::try_from(handover.delay_id.len()).unwrap_or(u16::MAX),
            timer: None,
            queued: None,
            as_user: handover.as_user,
            seen,
            is_there: false,
        });
        if !seen {
            self.never_seen.insert((homeserver, delegated, id));
            *self.never_seen_of.entry(homeserver).or_insert(0) += 1;
        }
        id
    }

    /// The oldest leave of somebody who was never seen, of the homeserver that has most of them, gives way: its event is left to the
    /// homeserver's timer (L8).
    fn evict(&mut self, now: Time) {
        let Some((&homeserver, _)) = self.never_seen_of.iter().max_by_key(|&(homeserver, &jobs)| (jobs, *homeserver)) else {
            return;
        };
        let from = (homeserver, Time::EARLIEST, LeaveId::FIRST);
        if let Some(&(_, _, id)) = self.never_seen.range(from..).next() {
            self.step(id, Input::Over(FinishReason::Evicted), now);
        }
    }

    fn was_seen(&mut self, homeserver: HomeserverId, delegated: Time, id: LeaveId) {
        if self.never_seen.remove(&(homeserver, delegated, id))
            && let Some(jobs) = self.never_seen_of.get_mut(&homeserver)
        {
            *jobs -= 1;
            if *jobs == 0 {
                self.never_seen_of.remove(&homeserver);
            }
        }
    }

    /// The event of a leave was delegated again by a request that arrived then.
    fn renew(&mut self, id: LeaveId, delay: Delay, arrived: Time, now: Time) {
        let Some(job) = self.jobs.get(id) else { return };
        let (homeserver, former) = (job.homeserver, job.leave.delegated());
        if self.never_seen.remove(&(homeserver, former, id)) {
            self.never_seen.insert((homeserver, former.max(arrived), id));
        }
        self.step(id, Input::Renewed(delay, arrived), now);
        self.awaits(id);
    }

    fn set_current(&mut self, participant: ParticipantId, leave: Option<LeaveId>) {
        let slot = participant.slot();
        if slot >= self.current.len() {
            self.current.resize(slot + 1, None);
            self.settled.resize(slot + 1, false);
        }
        self.current[slot] = leave;
        self.settled[slot] = false;
    }

    /// Tells until when the participant of a leave is waited for.
    fn awaits(&mut self, id: LeaveId) {
        if let Some(Job { leave, participant, .. }) = self.jobs.get(id) {
            let awaits = Output::Awaits(*participant, leave.deadline(), leave.delay());
            self.out.push(awaits);
        }
    }

    fn number_of(&self, user: &str) -> u64 {
        number_of(self.seed, user)
    }
}

fn number_of(seed: u64, user: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, user).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
