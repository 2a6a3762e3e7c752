//! Decides whose call to a homeserver is next (decisions L4a, L8, H7a): one queue per homeserver, ordered by deadline.
//!
//! The scheduler knows a leave by its id only and makes no call: it grants permits. Pure.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::backoff::{self, Jitter, MIN_PAUSE_MS, Schedule};
use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::delayed_leave::LeaveId;
use crate::slab::{Id, Slab};
use crate::time::Time;

/// Calls of never-seen participants that may be in flight: in all (half of them to unlisted homeservers), and to one homeserver (L8).
const NEVER_SEEN_CALLS: u32 = 64;
const NEVER_SEEN_CALLS_PER_HOMESERVER: usize = 2;
/// A restart with less than this left goes before every send: somebody who stays would be reported gone because others leave, where
/// a leave would only be late (L1).
const URGENT_MS: u64 = 3_000;
/// A call that has run for this long, and for four times the usual time, gives its place at the homeserver back.
const SLOW_MS: u64 = 2_000;
const MAX_SLOW_CALLS: usize = 256;
/// How many of the last calls tell the usual time.
const MAX_SAMPLES: usize = 32;
/// The bounds of the gap between calls to a homeserver that limits.
const MIN_GAP_MS: u64 = 50;
const MAX_GAP_MS: u64 = 5_000;
/// Where calls follow each other at the gap, successes shrink it to nothing in about this time.
const GAP_SHRINKS_WITHIN_MS: u64 = 60_000;
/// After the pause that a 429 asked for, the homeserver counts as limiting for this long.
const LIMITED_FOR_MS: u64 = 120_000;
const IDLE_AFTER_MS: u64 = 500;
const MAX_PAUSE_MS: u64 = 60_000;
/// In a pause longer than this, calls with less than this left are tried as probes; in a shorter one, calls with less than
/// [`PROBE_INTERVAL_MS`] left.
const LONG_PAUSE_MS: u64 = 4_000;
const PROBE_INTERVAL_MS: u64 = 1_000;
/// Time that a refusal may take: room for one is kept before a restart that was set aside is taken back.
const REFUSAL_TIME_MS: u64 = 500;
/// How far ahead the queue of a limiting homeserver is looked at: it bounds the work of a step.
const MAX_LOOKAHEAD: usize = 256;
/// How many users with a recent call wait for the others while a homeserver limits.
const MAX_RECENT_USERS: usize = 32;
/// Of a homeserver that limits, so many calls are taken back before the next one has to wait: each is a question to the SFU.
const MAX_TAKEN_BACK: u32 = 32;
const OVERLOAD_WARNING_INTERVAL_MS: u64 = 60_000;

/// How many calls may be in flight.
#[derive(Clone, Copy, Debug)]
pub struct Concurrency {
    /// Most calls to one homeserver.
    pub per_homeserver: u32,
    /// Most calls to all homeservers.
    pub total: u32,
    /// To all unlisted homeservers together; never more than half of `total`.
    pub strangers: u32,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self {
            per_homeserver: 64,
            total: 2_048,
            strangers: 1_024,
        }
    }
}

/// The id of a homeserver that has jobs or calls.
pub type HomeserverId = Id<Homeserver>;

/// A call that a leave waits to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PendingCall {
    pub action: DelayedEventAction,
    /// When the call is too late.
    pub deadline: Time,
    /// Until when a restart may wait while the homeserver limits. Sends and cancellations do not wait.
    pub relaxed: Time,
    pub delay_ms: u32,
    /// A hash of the user.
    pub user: u64,
    /// Whether the participant was ever seen.
    pub seen: bool,
}

/// The permission to make the call of a leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permit {
    pub homeserver: HomeserverId,
    /// The leave whose call was next.
    pub leave: LeaveId,
}

/// More restarts than a homeserver's limit lets through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overload {
    pub homeserver: HomeserverId,
    /// How many leaves cannot be restarted in time.
    pub leaves: usize,
    /// Example of such a leave.
    pub example: LeaveId,
}

/// How long to wait for the answer to a restart (L4): a quarter of what is left, at least 1 s and twice the usual time, at most 10 s.
pub fn timeout_ms(left_ms: u64, usual_ms: u64) -> u32 {
    let timeout = (left_ms / 4).max(1_000).max(usual_ms.saturating_mul(2));
    u32::try_from(timeout).unwrap_or(u32::MAX).min(10_000)
}

/// The parts of a homeserver's queue.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Class {
    /// Sends and cancellations.
    Send,
    Restart,
    /// Restarts that the homeserver's limit does not let through in time, and those that were late when they came.
    Uncarried,
    NeverSeen,
}

/// When a homeserver may have a permit to give; among those due at the same time, who has waited longest.
type Position = (Time, u64);
type Key = (Class, Time, LeaveId);

#[derive(Clone, Copy, Debug)]
struct Queued {
    relaxed: Time,
    user: u64,
    delay_ms: u32,
}

#[derive(Debug)]
struct Call {
    sent: Time,
    leave: LeaveId,
    class: Class,
}

/// State of a homeserver that answered 429.
#[derive(Debug)]
struct Limit {
    gap_ms: u64,
    next_at: Time,
    probe_at: Time,
    /// `next_at` and `probe_at`, before the latest call was let through.
    before: (Time, Time),
    /// How many calls were taken back since the last one that was made.
    taken_back: u32,
    pause_until: Time,
    refused_at: Time,
    /// Since when calls came as fast as they were let through, and how many were: together the rate that is granted.
    counted_from: Time,
    let_through: u32,
    /// Number of refusals in a row.
    refusals: u8,
    recent_users: VecDeque<u64>,
}

/// A homeserver: its queue, its calls in flight, its limit.
#[derive(Debug)]
pub struct Homeserver {
    name: Arc<str>,
    jobs: u32,
    listed: bool,
    /// The calls that wait, by their class.
    queue: [BTreeMap<(Time, LeaveId), Queued>; 4],
    /// In the order in which they were sent.
    calls: VecDeque<Call>,
    call_times: VecDeque<u32>,
    usual_ms: u64,
    limit: Option<Box<Limit>>,
    /// When it may have a permit to give: to a participant who was seen, and to one who never was.
    agenda: [Option<Position>; 2],
    warn_at: Option<Time>,
}

#[derive(Debug)]
pub struct CallScheduler {
    concurrency: Concurrency,
    homeservers: Slab<Homeserver>,
    by_name: BTreeMap<Arc<str>, HomeserverId>,
    /// The homeservers' agendas and calls, each by [`pool`].
    agendas: [BTreeSet<(Position, HomeserverId)>; 4],
    in_flight: [u32; 4],
    positions: u64,
    overloaded: BTreeSet<(Time, HomeserverId)>,
    /// The latest moment that was told.
    now: Time,
}

/// Listed and unlisted homeservers' calls for participants who were seen, then the same for those who never were.
const fn pool(listed: bool, never_seen: bool) -> usize {
    !listed as usize + 2 * never_seen as usize
}

impl CallScheduler {
    pub fn new(concurrency: Concurrency) -> Self {
        Self {
            concurrency: Concurrency {
                strangers: concurrency.strangers.min(concurrency.total / 2),
                ..concurrency
            },
            homeservers: Slab::default(),
            by_name: BTreeMap::new(),
            agendas: Default::default(),
            in_flight: [0; 4],
            positions: 0,
            overloaded: BTreeSet::new(),
            now: Time::EARLIEST,
        }
    }

    /// Counts one more job of a homeserver, which the operator has listed or not as long as the process lives.
    pub fn enter(&mut self, name: &str, listed: bool) -> HomeserverId {
        let id = self.by_name.get(name).copied().unwrap_or_else(|| {
            let name: Arc<str> = name.into();
            let id = self.homeservers.insert(Homeserver::new(Arc::clone(&name), listed));
            self.by_name.insert(name, id);
            id
        });
        if let Some(homeserver) = self.homeservers.get_mut(id) {
            homeserver.jobs += 1;
        }
        id
    }

    /// Counts one job less. A homeserver without jobs and calls is forgotten.
    pub fn leave(&mut self, id: HomeserverId) {
        if let Some(homeserver) = self.homeservers.get_mut(id) {
            homeserver.jobs = homeserver.jobs.saturating_sub(1);
        }
        self.forget_if_idle(id);
    }

    pub fn jobs(&self, name: &str) -> u32 {
        let homeserver = self.by_name.get(name).and_then(|&id| self.homeservers.get(id));
        homeserver.map_or(0, |homeserver| homeserver.jobs)
    }

    /// The homeserver with most leaves.
    pub fn largest(&self) -> Option<&Arc<str>> {
        let largest = self.homeservers.iter().max_by_key(|(_, homeserver)| homeserver.jobs);
        largest.map(|(_, homeserver)| &homeserver.name)
    }

    pub fn name(&self, id: HomeserverId) -> Option<&Arc<str>> {
        self.homeservers.get(id).map(|homeserver| &homeserver.name)
    }

    /// Puts the call of a leave into the queue.
    pub fn enqueue(&mut self, id: HomeserverId, leave: LeaveId, call: PendingCall, now: Time) {
        if let Some(homeserver) = self.homeservers.get_mut(id) {
            homeserver.enqueue(leave, call, now);
        }
        self.plan(id, now);
    }

    /// Takes the call of a leave out of the queue, by the deadline that it was enqueued with.
    pub fn dequeue(&mut self, id: HomeserverId, leave: LeaveId, deadline: Time, now: Time) {
        if let Some(homeserver) = self.homeservers.get_mut(id) {
            homeserver.dequeue(leave, deadline);
        }
        self.plan(id, now);
    }

    /// The next call that may be made now. It is out of the queue, and in flight until [`Self::on_result`] or [`Self::declined`].
    pub fn next_permit(&mut self, now: Time) -> Option<Permit> {
        self.now = self.now.max(now);
        while let Some((at, id, never_seen)) = self.first() {
            if at > now {
                return None;
            }
            let homeserver = self.homeservers.get_mut(id)?;
            if homeserver.shed(now) {
                self.overloaded.insert((*homeserver.warn_at.get_or_insert(now), id));
            }
            let leave = homeserver.grant(never_seen, self.concurrency.per_homeserver, now);
            if leave.is_some() {
                let pool = pool(homeserver.listed, never_seen);
                self.in_flight[pool] += 1;
                // The others' turn is before its next one.
                if let Some(position) = homeserver.agenda[usize::from(never_seen)].take() {
                    self.agendas[pool].remove(&(position, id));
                }
            }
            self.plan(id, now);
            if let Some(leave) = leave {
                return Some(Permit { homeserver: id, leave });
            }
        }
        None
    }

    /// Takes the permit back that was given last: its leave did not want it any more. Of a homeserver that limits, the next call has
    /// its turn.
    pub fn declined(&mut self, permit: Permit, now: Time) {
        let id = permit.homeserver;
        let homeserver = self.homeservers.get_mut(id);
        let position = homeserver.and_then(|homeserver| {
            if let Some(limit) = &mut homeserver.limit {
                limit.take_back();
            }
            homeserver.calls.iter().rposition(|call| call.leave == permit.leave)
        });
        self.end(id, position);
        self.plan(id, now);
        self.forget_if_idle(id);
    }

    /// The call that was sent at that time has ended.
    pub fn on_result(&mut self, id: HomeserverId, sent: Time, outcome: Outcome, now: Time, jitter: &mut Jitter) {
        let Some(homeserver) = self.homeservers.get_mut(id) else { return };
        homeserver.took(now.since(sent));
        homeserver.on_outcome(sent, outcome, now, jitter);
        let position = homeserver.calls.partition_point(|call| call.sent <= sent).saturating_sub(1);
        self.end(id, Some(position));
        self.plan(id, now);
        self.forget_if_idle(id);
    }

    /// How long calls to a homeserver usually take: the median of the last 32, zero where there was none yet.
    pub fn usual_ms(&self, id: HomeserverId) -> u64 {
        self.homeservers.get(id).map_or(0, |homeserver| homeserver.usual_ms)
    }

    /// A homeserver that limits more than its leaves can bear: told at most once a minute for each, when the first of them is about
    /// to be lost.
    pub fn overload(&mut self, now: Time) -> Option<Overload> {
        while let Some(&(at, id)) = self.overloaded.first().filter(|&&(at, _)| at <= now) {
            self.overloaded.remove(&(at, id));
            let Some(homeserver) = self.homeservers.get_mut(id) else { continue };
            let Some((_, deadline, example)) = homeserver.first_from(Class::Uncarried, now) else {
                continue;
            };
            let leaves = homeserver.part(Class::Uncarried).filter(|((_, at, _), _)| *at >= now).count();
            let is_near = deadline.since(now) <= PROBE_INTERVAL_MS;
            let next = if is_near {
                now.after(OVERLOAD_WARNING_INTERVAL_MS)
            } else {
                deadline.before(PROBE_INTERVAL_MS)
            };
            homeserver.warn_at = Some(next);
            self.overloaded.insert((next, id));
            if is_near {
                return Some(Overload {
                    homeserver: id,
                    leaves,
                    example,
                });
            }
        }
        None
    }

    /// When the next permit may be due.
    pub fn next_deadline(&self) -> Option<Time> {
        self.first().map(|(at, _, _)| at)
    }

    /// The homeserver that may have the next permit to give, as far as there is room for a call.
    fn first(&self) -> Option<(Time, HomeserverId, bool)> {
        let [listed, strangers, listed_unseen, strangers_unseen] = self.in_flight;
        let free = listed + strangers + listed_unseen + strangers_unseen < self.concurrency.total;
        let free_strangers = strangers + strangers_unseen < self.concurrency.strangers;
        let free_unseen = listed_unseen + strangers_unseen < NEVER_SEEN_CALLS;
        let room = [
            free,
            free && free_strangers,
            free && free_unseen,
            free && free_strangers && free_unseen && strangers_unseen < NEVER_SEEN_CALLS / 2,
        ];
        let pools = room.into_iter().enumerate().filter(|&(_, room)| room);
        let first = pools.filter_map(|(pool, _)| {
            let agenda = &self.agendas[pool];
            // Few can have a quarter each, so few are passed over.
            let fair = agenda.iter().take_while(|&&((at, _), _)| at <= self.now);
            let fair = fair.copied().find(|&(_, id)| pool == 0 || !self.has_a_quarter(id));
            let ((at, _), id) = fair.or_else(|| agenda.first().copied())?;
            Some((at, id, pool >= 2))
        });
        first.min_by_key(|&(at, _, _)| at.max(self.now))
    }

    fn has_a_quarter(&self, id: HomeserverId) -> bool {
        let quarter = (self.concurrency.strangers / 4).max(1) as usize;
        self.homeservers
            .get(id)
            .is_some_and(|homeserver| !homeserver.listed && homeserver.calls.len() >= quarter)
    }

    fn end(&mut self, id: HomeserverId, position: Option<usize>) {
        let Some(homeserver) = self.homeservers.get_mut(id) else { return };
        if let Some(call) = position.and_then(|position| homeserver.calls.remove(position)) {
            self.in_flight[pool(homeserver.listed, call.class == Class::NeverSeen)] -= 1;
            if homeserver.calls.is_empty() {
                homeserver.calls = VecDeque::new();
            }
        }
    }

    fn plan(&mut self, id: HomeserverId, now: Time) {
        self.now = self.now.max(now);
        let Some(homeserver) = self.homeservers.get_mut(id) else { return };
        for never_seen in [false, true] {
            let next = homeserver.next(never_seen, self.concurrency.per_homeserver, now).map(|(at, _)| at);
            let position = &mut homeserver.agenda[usize::from(never_seen)];
            let old = position.map(|(at, _)| at);
            // What is due keeps its turn.
            if old != next && !(old.is_some_and(|at| at <= now) && next.is_some_and(|at| at <= now)) {
                let agendas = &mut self.agendas[pool(homeserver.listed, never_seen)];
                self.positions += 1;
                let new = next.map(|at| (at, self.positions));
                if let Some(old) = std::mem::replace(position, new) {
                    agendas.remove(&(old, id));
                }
                agendas.extend(new.map(|position| (position, id)));
            }
        }
    }

    fn forget_if_idle(&mut self, id: HomeserverId) {
        let idle = |homeserver: &Homeserver| homeserver.jobs == 0 && homeserver.calls.is_empty() && !homeserver.is_waited_for();
        if self.homeservers.get(id).is_some_and(idle)
            && let Some(homeserver) = self.homeservers.remove(id)
        {
            self.by_name.remove(&homeserver.name);
            if let Some(at) = homeserver.warn_at {
                self.overloaded.remove(&(at, id));
            }
        }
    }
}

impl Limit {
    fn is_paused(&self, now: Time) -> bool {
        now < self.pause_until
    }

    const fn until(&self) -> Time {
        self.pause_until.after(LIMITED_FOR_MS)
    }

    fn refused(&mut self, sent: Time, hint: Option<std::time::Duration>, now: Time, jitter: &mut Jitter) {
        // Calls that were in flight together are one refusal.
        let is_news = sent >= self.refused_at;
        self.refusals = self.refusals.saturating_add(u8::from(is_news));
        let pause = hint.map_or_else(|| Schedule::LIMITED.pause(self.refusals, jitter), backoff::as_millis);
        let pause = pause.clamp(MIN_PAUSE_MS, MAX_PAUSE_MS);
        if is_news {
            if sent >= self.pause_until {
                // What was granted between two refusals. Where the calls came seldom, it says too little.
                let granted = now.since(self.counted_from) / (u64::from(self.let_through) + 1);
                self.gap_ms = (self.gap_ms + self.gap_ms / 4)
                    .max(granted.min(pause))
                    .clamp(MIN_GAP_MS, MAX_GAP_MS);
            }
            self.refused_at = now;
            self.counted_from = now;
            self.let_through = 0;
            self.pause_until = now.after(pause);
        }
        self.pause_until = self.pause_until.max(now.after(pause));
    }

    /// A call of that user is made.
    fn let_through(&mut self, user: u64, now: Time) {
        // What could be granted meanwhile is unknown.
        if now.since(self.next_at.max(self.pause_until)) > self.gap_ms.max(IDLE_AFTER_MS) {
            self.counted_from = now;
            self.let_through = 0;
        }
        self.before = (self.next_at, self.probe_at);
        self.next_at = now.after(self.gap_ms);
        self.probe_at = now.after(PROBE_INTERVAL_MS);
        // One more than are kept, so that nobody is forgotten for a call that is taken back.
        if self.recent_users.len() > MAX_RECENT_USERS {
            self.recent_users.pop_front();
        }
        self.recent_users.push_back(user);
    }

    /// The call that was let through last is not made. After so many the next one waits for its time: what is asked about meanwhile fills
    /// it.
    fn take_back(&mut self) {
        if self.taken_back < MAX_TAKEN_BACK {
            self.taken_back += 1;
            (self.next_at, self.probe_at) = self.before;
            self.recent_users.pop_back();
        } else {
            self.taken_back = 0;
        }
    }

    fn passed(&mut self, sent: Time, is_granted: bool, now: Time) {
        (self.refusals, self.taken_back) = (0, 0);
        self.let_through = self.let_through.saturating_add(1);
        let less = self.gap_ms * self.gap_ms / GAP_SHRINKS_WITHIN_MS;
        self.gap_ms = self.gap_ms.saturating_sub(less.max(1));
        // A probe that was granted ends the pause: what the homeserver said of one call must not cost the leaves of all.
        if is_granted && sent >= self.refused_at {
            self.pause_until = self.pause_until.min(now);
        }
    }
}

impl Homeserver {
    const fn new(name: Arc<str>, listed: bool) -> Self {
        Self {
            name,
            jobs: 0,
            listed,
            queue: [const { BTreeMap::new() }; 4],
            calls: VecDeque::new(),
            call_times: VecDeque::new(),
            usual_ms: 0,
            limit: None,
            agenda: [None; 2],
            warn_at: None,
        }
    }

    fn enqueue(&mut self, leave: LeaveId, call: PendingCall, now: Time) {
        let class = match (call.seen, call.action) {
            (false, _) => Class::NeverSeen,
            (true, DelayedEventAction::Send | DelayedEventAction::Cancel) => Class::Send,
            (true, DelayedEventAction::Restart) if call.deadline <= now => Class::Uncarried,
            (true, DelayedEventAction::Restart) => Class::Restart,
        };
        let queued = Queued {
            relaxed: call.relaxed,
            user: call.user,
            delay_ms: call.delay_ms.max(1),
        };
        self.queue[class as usize].insert((call.deadline, leave), queued);
    }

    fn dequeue(&mut self, leave: LeaveId, deadline: Time) {
        for part in &mut self.queue {
            part.remove(&(deadline, leave));
        }
    }

    fn is_waited_for(&self) -> bool {
        self.queue.iter().any(|part| !part.is_empty())
    }

    /// The calls of a class, the nearest deadline first.
    fn part(&self, class: Class) -> impl Iterator<Item = (Key, &Queued)> {
        self.queue[class as usize]
            .iter()
            .map(move |(&(deadline, leave), queued)| ((class, deadline, leave), queued))
    }

    /// The first call of a class with that deadline or a later one.
    fn first_from(&self, class: Class, from: Time) -> Option<Key> {
        let mut part = self.queue[class as usize].range((from, Id::FIRST)..);
        part.next().map(|(&(deadline, leave), _)| (class, deadline, leave))
    }

    /// The first call of a class; while the homeserver limits, users take turns.
    fn first(&self, class: Class, recent_users: Option<&VecDeque<u64>>) -> Option<Key> {
        let mut first = self.part(class).take(MAX_LOOKAHEAD);
        let Some(recent) = recent_users else {
            return first.next().map(|(key, _)| key);
        };
        let mut best = None;
        for (key, queued) in first {
            let recency = recent.iter().rposition(|&user| user == queued.user).map_or(0, |at| at + 1);
            if best.is_none_or(|(least, _)| recency < least) {
                best = Some((recency, key));
            }
            if recency == 0 {
                break;
            }
        }
        best.map(|(_, key)| key)
    }

    fn limit(&self, now: Time) -> Option<&Limit> {
        self.limit.as_deref().filter(|limit| now < limit.until())
    }

    fn slow_after(&self) -> u64 {
        self.usual_ms.saturating_mul(4).max(SLOW_MS)
    }

    /// How many calls have given their place back: the oldest.
    fn slow(&self, now: Time) -> usize {
        let after = self.slow_after();
        self.calls.partition_point(|call| now.since(call.sent) >= after).min(MAX_SLOW_CALLS)
    }

    /// The calls that hold a place, by their position.
    fn held(&self, now: Time) -> impl Iterator<Item = (usize, &Call)> {
        self.calls.iter().enumerate().skip(self.slow(now))
    }

    /// When fewer than so many of these calls hold a place.
    fn place_at<'a>(&self, mut held: impl Iterator<Item = (usize, &'a Call)>, places: u32, now: Time) -> Option<Time> {
        match held.next() {
            Some((position, call)) if places <= 1 || held.nth(places as usize - 2).is_some() => {
                (position < MAX_SLOW_CALLS).then(|| call.sent.after(self.slow_after()))
            }
            Some(_) | None => Some(now),
        }
    }

    /// When the restarts must begin so that none becomes urgent, and so that none waits for longer than it may.
    fn outlook(&self, now: Time) -> (Time, Time) {
        let (gap, ahead) = self.limit(now).map_or((0, 1), |limit| (limit.gap_ms, MAX_LOOKAHEAD));
        let urgent = URGENT_MS.max(self.usual_ms * 2);
        let (mut urgent_at, mut needed_at) = (Time::LATEST, Time::LATEST);
        for (before, ((_, deadline, _), queued)) in (0..).zip(self.part(Class::Restart).take(ahead)) {
            urgent_at = urgent_at.min(deadline.before(urgent + before * gap));
            needed_at = needed_at.min(queued.relaxed.before(before * gap));
        }
        (urgent_at, needed_at)
    }

    /// The next call, and when it may be made; it is the next one only if that is now.
    fn next(&self, never_seen: bool, places: u32, now: Time) -> Option<(Time, Key)> {
        // Asked after each call, when mostly nothing waits, and in vain for each part of the queue.
        if !self.is_waited_for() {
            return None;
        }
        let limit = self.limit(now);
        let unseen = match never_seen {
            true => Some(self.first(Class::NeverSeen, limit.map(|limit| &limit.recent_users))?),
            false => None,
        };
        let place = self.place_at(self.held(now), places, now)?;
        let seen = self.next_seen(places, now).map(|(at, key)| (at.max(place), key));
        let Some(key) = unseen else { return seen };
        let calls = self.calls.iter().filter(|call| call.class == Class::NeverSeen);
        if calls.count() >= NEVER_SEEN_CALLS_PER_HOMESERVER {
            return None;
        }
        // While the homeserver limits, they get every second place that nobody else needs.
        let gap = limit.map_or(0, |limit| limit.gap_ms);
        let at = limit
            .map_or(now, |limit| limit.next_at.max(limit.pause_until).after(gap).max(now))
            .max(place);
        seen.is_none_or(|(seen, _)| at.after(gap) < seen).then_some((at, key))
    }

    fn next_seen(&self, places: u32, now: Time) -> Option<(Time, Key)> {
        let limit = self.limit(now);
        let restart = self.first(Class::Restart, None);
        let send = self.first(Class::Send, limit.map(|limit| &limit.recent_users));
        if let Some(limit) = limit.filter(|limit| limit.is_paused(now)) {
            let first_send = self.first(Class::Send, None);
            let nearest = [restart, first_send].into_iter().flatten().min_by_key(|(_, deadline, _)| *deadline);
            let Some(nearest) = nearest else {
                return Some((limit.pause_until, self.first(Class::Uncarried, None)?));
            };
            let is_long = limit.pause_until.since(limit.refused_at) > LONG_PAUSE_MS;
            let probe_at = nearest.1.before(if is_long { LONG_PAUSE_MS } else { PROBE_INTERVAL_MS });
            return Some((probe_at.max(limit.probe_at).min(limit.pause_until).max(now), nearest));
        }
        let (urgent_at, needed_at) = self.outlook(now);
        let spaced = limit.map_or(now, |limit| limit.next_at.max(now));
        // What is about to be lost does not wait for a gap that grew while all was refused.
        let probe = limit.map_or(now, |limit| limit.next_at.min(limit.probe_at).max(now));
        // A few restarts always go early: those that began together must not all be due together.
        let early = limit.map_or(now, |limit| limit.next_at.after(limit.gap_ms).max(now));
        let send_place = |_| {
            let sends = self.held(now).filter(|(_, call)| call.class == Class::Send);
            self.place_at(sends, places - places / 4, now)
        };
        let candidates = [
            restart.filter(|_| send.is_some()).map(|key| (urgent_at.max(spaced), key)),
            send.zip(send.and_then(send_place)).map(|(key, at)| (at.max(spaced), key)),
            restart.map(|key| (needed_at.clamp(probe, early), key)),
            self.first(Class::Uncarried, None).map(|key| (spaced, key)),
        ];
        candidates.into_iter().flatten().min_by_key(|&(at, _)| at)
    }

    fn grant(&mut self, never_seen: bool, places: u32, now: Time) -> Option<LeaveId> {
        let (_, key) = self.next(never_seen, places, now).filter(|&(at, _)| at <= now)?;
        let (class, deadline, leave) = key;
        let queued = self.queue[class as usize].remove(&(deadline, leave))?;
        self.calls.push_back(Call { sent: now, leave, class });
        if let Some(limit) = &mut self.limit {
            limit.let_through(queued.user, now);
        }
        Some(leave)
    }

    /// Sets restarts aside that the limit does not let through in time, and takes one back where there is room for it.
    fn shed(&mut self, now: Time) -> bool {
        let mut shed = false;
        while let Some(key) = self.too_much(now) {
            self.reclass(key, Class::Uncarried);
            shed = true;
        }
        let gap = self.limit(now).map_or(0, |limit| limit.gap_ms);
        let back = self.first_from(Class::Uncarried, now.after(gap.max(1)));
        if let Some(key) = back.filter(|_| self.too_much(now.after(gap + REFUSAL_TIME_MS)).is_none()) {
            self.reclass(key, Class::Restart);
        }
        shed
    }

    fn reclass(&mut self, key: Key, class: Class) {
        let (former, deadline, leave) = key;
        if let Some(queued) = self.queue[former as usize].remove(&(deadline, leave)) {
            self.queue[class as usize].insert((deadline, leave), queued);
        }
    }

    /// Where one of the next restarts would come too late, with those before it each made again at 80 % of its delay: of the user
    /// whose restarts cost most the one with the shortest delay.
    fn too_much(&self, now: Time) -> Option<Key> {
        let gap = self.limit(now).filter(|limit| !limit.is_paused(now))?.gap_ms as f64;
        let restarts = || self.part(Class::Restart).take(MAX_LOOKAHEAD);
        // Calls that are needed until a moment: `count + rate * moment`.
        let (mut count, mut rate) = (0.0, 0.0);
        let late = restarts().position(|((_, deadline, _), queued)| {
            let left = deadline.since(now) as f64;
            let before = (count + rate * left) * gap;
            let again = 1.25 / f64::from(queued.delay_ms);
            count += 1.0 - again * left;
            rate += again;
            // The farther ahead, the more of the last fifth of the delay is kept for refusals.
            let spare = deadline.since(queued.relaxed) as f64 / 2.0;
            self.usual_ms as f64 + before > left - spare.min(before)
        })?;
        let cost = |queued: &Queued| 1_000_000_000 / u64::from(queued.delay_ms);
        let mut costs = BTreeMap::<u64, u64>::new();
        for (_, queued) in restarts() {
            *costs.entry(queued.user).or_default() += cost(queued);
        }
        let most = restarts()
            .take(late + 1)
            .max_by_key(|(_, queued)| (costs.get(&queued.user), cost(queued)));
        most.map(|(key, _)| key)
    }

    fn took(&mut self, millis: u64) {
        if self.call_times.len() == MAX_SAMPLES {
            self.call_times.pop_front();
        }
        self.call_times.push_back(u32::try_from(millis).unwrap_or(u32::MAX));
        let (mut times, middle) = (Vec::from(self.call_times.clone()), self.call_times.len() / 2);
        self.usual_ms = u64::from(*times.select_nth_unstable(middle).1);
    }

    fn on_outcome(&mut self, sent: Time, outcome: Outcome, now: Time, jitter: &mut Jitter) {
        if self.limit(now).is_none() {
            self.limit = None;
        }
        match outcome {
            Outcome::Limited(hint) => {
                let limit = self.limit.get_or_insert_with(|| {
                    Box::new(Limit {
                        gap_ms: 0,
                        next_at: now,
                        probe_at: now,
                        before: (now, now),
                        taken_back: 0,
                        pause_until: sent,
                        refused_at: sent,
                        counted_from: now,
                        let_through: 0,
                        refusals: 0,
                        recent_users: VecDeque::new(),
                    })
                });
                limit.refused(sent, hint, now, jitter);
            }
            Outcome::Done | Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden | Outcome::Transient(_) => {
                if let Some(limit) = &mut self.limit {
                    limit.passed(sent, outcome == Outcome::Done, now);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
