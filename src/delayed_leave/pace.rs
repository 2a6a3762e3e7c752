//! Whose call to a homeserver is next (L4a): one queue per homeserver, sends first, then the nearest deadline.
//!
//! It knows no job but by its id, and makes no call: it grants turns.

use crate::backoff::{self, Jitter, LEAST_PAUSE, Schedule};

use crate::delayed_leave::jobs::JobId;

use crate::delayed_leave::machine::{Outcome, Wish};

use crate::time::Time;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The distance that calls keep after a 429: it grows with each one, towards what the homeserver was seen to grant, and
/// shrinks with each success, down to none.
const FIRST_GAP: u64 = 50;
const MOST_GAP: u64 = 5_000;
/// Where calls follow each other at that distance, it is gone after about so many milliseconds.
const SHRINKS_WITHIN: u64 = 10_000;
/// After a 429 a homeserver counts as limiting for this long.
const LIMITED_FOR: u64 = 120_000;
/// While a homeserver pauses, whoever has less than this left still gets a turn, one at a time.
const LAST_CHANCE: u64 = 1_000;
/// The same in a pause that is longer than this itself. Where the homeserver takes that call, the pause is over: what it
/// said of one call is no reason to lose the leaves of all.
const LONG_PAUSE: u64 = 4_000;
/// While a homeserver limits, a restart with less than this left goes before the sends: one who stays would be reported
/// gone because others leave, where a leave would only be late (L1).
const URGENT: u64 = 3_000;

/// A homeserver that jobs call, known by its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HomeserverId(u32);

impl HomeserverId {
    pub(crate) const NONE: Self = Self(u32::MAX);
}

/// How many calls may be under way.
#[derive(Clone, Copy, Debug)]
pub struct Concurrency {
    /// To one homeserver.
    pub per_homeserver: u32,
    /// To all.
    pub total: u32,
    /// To all those together that are not named in full access.
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

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Class {
    Send,
    Other,
}

#[derive(Debug)]
struct Homeserver {
    name: Arc<str>,
    jobs: u32,
    /// Not named in full access.
    stranger: bool,
    in_flight: u32,
    ready: BTreeSet<(Class, Time, JobId)>,
    /// Restarts that wait for their later moment while the homeserver limits.
    relaxed: BTreeSet<(Time, Time, JobId)>,
    paused_until: Option<Time>,
    limited_until: Option<Time>,
    last_chance: Option<Time>,
    limits_in_a_row: u8,
    gap: u64,
    /// When the last pause began, and how many calls were taken since.
    emptied: Option<Time>,
    taken: u32,
    /// What is under way was granted in the pause.
    probing: bool,
    spaced: Option<Time>,
    /// When a restart may go ahead of its later moment. A few always do, or those that began together would all be due together.
    early: Option<Time>,
    agenda: Option<Time>,
}

/// All queues.
#[derive(Debug)]
pub struct Pace {
    concurrency: Concurrency,
    homeservers: Vec<Option<Homeserver>>,
    free: Vec<u32>,
    by_name: BTreeMap<Arc<str>, HomeserverId>,
    /// When which homeserver may have a turn to grant: those that are named, and the strangers.
    agendas: [BTreeSet<(Time, HomeserverId)>; 2],
    in_flight: [u32; 2],
}

impl Pace {
    /// No queues yet.
    #[must_use]
    pub fn new(concurrency: Concurrency) -> Self {
        Self {
            concurrency,
            homeservers: Vec::new(),
            free: Vec::new(),
            by_name: BTreeMap::new(),
            agendas: [BTreeSet::new(), BTreeSet::new()],
            in_flight: [0; 2],
        }
    }

    /// How many jobs a homeserver has.
    #[must_use]
    pub fn jobs(&self, name: &str) -> u32 {
        self.by_name
            .get(name)
            .and_then(|&id| self.get(id))
            .map_or(0, |homeserver| homeserver.jobs)
    }

    /// The name of a homeserver.
    #[must_use]
    pub fn name(&self, id: HomeserverId) -> Option<&Arc<str>> {
        self.get(id).map(|homeserver| &homeserver.name)
    }

    /// Counts one more job of a homeserver, which is named in full access or not.
    pub fn enter(&mut self, name: &str, named: bool) -> HomeserverId {
        let id = self.by_name.get(name).copied().unwrap_or_else(|| self.insert(name, !named));
        if let Some(homeserver) = self.get_mut(id) {
            homeserver.jobs += 1;
        }
        id
    }

    /// Counts one less.
    pub fn leave(&mut self, id: HomeserverId) {
        if let Some(homeserver) = self.get_mut(id) {
            homeserver.jobs -= 1;
        }
        self.forget_if_idle(id);
    }

    /// A job stands in line.
    pub fn want(&mut self, id: HomeserverId, job: JobId, wish: Wish, now: Time) {
        if let Some(homeserver) = self.get_mut(id) {
            homeserver.want(job, wish, now);
        }
        self.plan(id, now);
    }

    /// It does not any more. The wish is the one it stood in line with.
    pub fn unwant(&mut self, id: HomeserverId, job: JobId, wish: Wish, now: Time) {
        if let Some(homeserver) = self.get_mut(id) {
            homeserver.unwant(job, wish);
        }
        self.plan(id, now);
    }

    /// Grants the next turn, if one is due. The job is out of the line then, and its call under way until [`Self::ended`].
    #[must_use]
    pub fn next_turn(&mut self, now: Time) -> Option<(HomeserverId, JobId)> {
        while let Some((at, id)) = self.first() {
            if at > now {
                return None;
            }
            let turn = self.get_mut(id).and_then(|homeserver| homeserver.pop(now));
            if turn.is_some() {
                self.in_flight[self.side(id)] += 1;
            }
            self.plan(id, now);
            if let Some(job) = turn {
                return Some((id, job));
            }
        }
        None
    }

    /// A granted turn came to nothing: the job did not want it any more.
    pub fn declined(&mut self, id: HomeserverId, now: Time) {
        self.over(id, now);
    }

    /// The call of a granted turn has ended.
    pub fn ended(&mut self, id: HomeserverId, outcome: Outcome, now: Time, jitter: &mut Jitter) {
        if let Some(homeserver) = self.get_mut(id) {
            match outcome {
                Outcome::Limited(hint) => {
                    homeserver.limits_in_a_row = homeserver.limits_in_a_row.saturating_add(1);
                    let pause = hint.map_or_else(|| Schedule::LIMITED.pause(homeserver.limits_in_a_row, jitter), backoff::as_millis);
                    homeserver.limit(now, pause.max(LEAST_PAUSE));
                }
                Outcome::Done | Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden | Outcome::Transient(_) => {
                    homeserver.limits_in_a_row = 0;
                    homeserver.gap -= (homeserver.gap * homeserver.gap / SHRINKS_WITHIN).max(1).min(homeserver.gap);
                    homeserver.taken = homeserver.taken.saturating_add(1);
                    if outcome == Outcome::Done && std::mem::take(&mut homeserver.probing) {
                        homeserver.paused_until = None;
                    }
                }
            }
        }
        self.over(id, now);
    }

    /// When the next turn may be due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.first().map(|(at, _)| at)
    }

    /// Which homeserver may have the next turn to grant, as far as there is room for a call.
    fn first(&self) -> Option<(Time, HomeserverId)> {
        let [named, strangers] = self.in_flight;
        if named + strangers >= self.concurrency.total {
            return None;
        }
        let [named, others] = [0, 1].map(|side: usize| self.agendas[side].first().copied());
        let others = others.filter(|_| strangers < self.concurrency.strangers);
        [named, others].into_iter().flatten().min()
    }

    fn side(&self, id: HomeserverId) -> usize {
        self.get(id).map_or(1, |homeserver| usize::from(homeserver.stranger))
    }

    fn over(&mut self, id: HomeserverId, now: Time) {
        let side = self.side(id);
        self.in_flight[side] = self.in_flight[side].saturating_sub(1);
        if let Some(homeserver) = self.get_mut(id) {
            homeserver.in_flight = homeserver.in_flight.saturating_sub(1);
        }
        self.plan(id, now);
        self.forget_if_idle(id);
    }

    fn plan(&mut self, id: HomeserverId, now: Time) {
        let bound = self.concurrency.per_homeserver;
        let Some(homeserver) = self.get_mut(id) else { return };
        let old = homeserver.agenda;
        homeserver.agenda = if homeserver.in_flight < bound { homeserver.due(now) } else { None };
        let (new, side) = (homeserver.agenda, usize::from(homeserver.stranger));
        if old != new {
            if let Some(old) = old {
                self.agendas[side].remove(&(old, id));
            }
            if let Some(new) = new {
                self.agendas[side].insert((new, id));
            }
        }
    }

    fn insert(&mut self, name: &str, stranger: bool) -> HomeserverId {
        let name: Arc<str> = name.into();
        let homeserver = Homeserver {
            name: Arc::clone(&name),
            jobs: 0,
            stranger,
            in_flight: 0,
            ready: BTreeSet::new(),
            relaxed: BTreeSet::new(),
            paused_until: None,
            limited_until: None,
            last_chance: None,
            limits_in_a_row: 0,
            gap: 0,
            emptied: None,
            taken: 0,
            probing: false,
            spaced: None,
            early: None,
            agenda: None,
        };
        let id = if let Some(slot) = self.free.pop() {
            self.homeservers[slot as usize] = Some(homeserver);
            HomeserverId(slot)
        } else {
            self.homeservers.push(Some(homeserver));
            HomeserverId(self.homeservers.len() as u32 - 1)
        };
        self.by_name.insert(name, id);
        id
    }

    fn forget_if_idle(&mut self, id: HomeserverId) {
        if self
            .get(id)
            .is_some_and(|homeserver| homeserver.jobs == 0 && homeserver.in_flight == 0)
            && let Some(homeserver) = self.homeservers[id.0 as usize].take()
        {
            if let Some(at) = homeserver.agenda {
                self.agendas[usize::from(homeserver.stranger)].remove(&(at, id));
            }
            self.by_name.remove(&homeserver.name);
            self.free.push(id.0);
        }
    }

    fn get(&self, id: HomeserverId) -> Option<&Homeserver> {
        self.homeservers.get(id.0 as usize)?.as_ref()
    }

    fn get_mut(&mut self, id: HomeserverId) -> Option<&mut Homeserver> {
        self.homeservers.get_mut(id.0 as usize)?.as_mut()
    }
}

impl Homeserver {
    fn want(&mut self, job: JobId, wish: Wish, now: Time) {
        match wish {
            Wish::Send { until } => self.ready.insert((Class::Send, until, job)),
            Wish::Cancel { until } => self.ready.insert((Class::Other, until, job)),
            Wish::Restart { until, relaxed } if relaxed > now => self.relaxed.insert((relaxed, until, job)),
            Wish::Restart { until, .. } => self.ready.insert((Class::Other, until, job)),
        };
        if self.limited_until.is_none() {
            self.make_ready(None);
        }
    }

    fn unwant(&mut self, job: JobId, wish: Wish) {
        match wish {
            Wish::Send { until } => {
                self.ready.remove(&(Class::Send, until, job));
            }
            Wish::Cancel { until } => {
                self.ready.remove(&(Class::Other, until, job));
            }
            Wish::Restart { until, relaxed } => {
                if !self.ready.remove(&(Class::Other, until, job)) {
                    self.relaxed.remove(&(relaxed, until, job));
                }
            }
        }
    }

    /// Moves the restarts whose later moment has come, or all of them, to the others.
    fn make_ready(&mut self, until: Option<Time>) {
        while let Some(&(relaxed, deadline, job)) = self.relaxed.first()
            && until.is_none_or(|until| relaxed <= until)
        {
            self.relaxed.pop_first();
            self.ready.insert((Class::Other, deadline, job));
        }
    }

    fn limit(&mut self, now: Time, pause: u64) {
        let pause = pause.min(LIMITED_FOR);
        // Several calls that were under way together are one refusal.
        if self.paused_until.is_none_or(|paused| paused <= now) {
            // A lower bound where the calls came as fast as they were granted; where they came seldom, it says too much.
            let granted = self.emptied.map_or(0, |emptied| now.since(emptied) / (u64::from(self.taken) + 1));
            self.gap = (self.gap + self.gap / 4).max(granted.min(pause)).clamp(FIRST_GAP, MOST_GAP);
            self.emptied = Some(now);
            self.taken = 0;
        }
        self.probing = false;
        self.paused_until = Some(now.after(pause));
        self.limited_until = Some(now.after(LIMITED_FOR + pause));
    }

    /// Whose time runs out first.
    fn nearest(&self) -> Option<(Class, Time, JobId)> {
        let send = self.ready.first().copied();
        [send, self.first_other()].into_iter().flatten().min_by_key(|&(_, until, _)| until)
    }

    fn first_other(&self) -> Option<(Class, Time, JobId)> {
        self.ready.range((Class::Other, Time::EARLIEST, JobId::FIRST)..).next().copied()
    }

    /// When somebody who stands in line while the homeserver pauses gets a turn all the same.
    fn chance(&self) -> Option<Time> {
        let (_, until, _) = self.nearest()?;
        let long = self
            .emptied
            .zip(self.paused_until)
            .is_some_and(|(began, paused)| paused.since(began) > LONG_PAUSE);
        let at = until.before(if long { LONG_PAUSE } else { LAST_CHANCE });
        Some(self.last_chance.map_or(at, |last| at.max(last.after(LAST_CHANCE))))
    }

    fn due(&self, now: Time) -> Option<Time> {
        if let Some(paused) = self.paused_until.filter(|&paused| paused > now) {
            // Whoever has waited for long enough is looked after during the pause too: its last chance may come in it.
            let relaxed = self.relaxed.first().map(|&(relaxed, _, _)| relaxed.min(paused));
            let chance = self.chance().map(|chance| chance.min(paused));
            return [relaxed, chance].into_iter().flatten().min();
        }
        let limited = self.limited_until.filter(|&limited| limited > now);
        let spaced = self.spaced.filter(|_| limited.is_some()).map_or(now, |spaced| spaced.max(now));
        let prompt = if self.in_flight > 0 { spaced } else { now };
        let other = self.first_other().map(|(_, until, _)| until.before(URGENT).max(prompt).min(spaced));
        let send = self.ready.first().filter(|&&(class, _, _)| class == Class::Send).map(|_| prompt);
        let ready = [send, other].into_iter().flatten().min();
        let relaxed = self.relaxed.first().map(|&(relaxed, _, _)| match limited {
            Some(limited) => relaxed.min(limited).min(self.early.map_or(spaced, |early| early.max(spaced))),
            None => now,
        });
        [relaxed, ready].into_iter().flatten().min()
    }

    fn pop(&mut self, now: Time) -> Option<JobId> {
        if self.limited_until.is_some_and(|limited| limited <= now) {
            self.limited_until = None;
            self.emptied = None;
            self.gap = 0;
        }
        self.make_ready(self.limited_until.map(|_| now));
        let job = if self.paused_until.is_some_and(|paused| paused > now) {
            self.chance().filter(|&chance| chance <= now)?;
            self.last_chance = Some(now);
            self.probing |= self.in_flight == 0;
            let turn = self.nearest()?;
            self.ready.remove(&turn);
            turn.2
        } else {
            self.paused_until = None;
            self.pop_ready(now)?
        };
        self.in_flight += 1;
        Some(job)
    }

    /// While the homeserver limits, one call follows the other, so that what it still grants goes to those who need it most
    /// and not to whoever comes first; where answers take long, calls keep their distance instead.
    fn pop_ready(&mut self, now: Time) -> Option<JobId> {
        let limited = self.limited_until.is_some();
        let early = limited && self.spaced.is_some_and(|spaced| spaced > now);
        if early && self.in_flight > 0 {
            return None;
        }
        let urgent = self.first_other().filter(|&(_, until, _)| limited && until <= now.after(URGENT));
        let job = match urgent.or_else(|| self.ready.first().copied()) {
            Some(turn @ (class, _, job)) if class == Class::Send || urgent.is_some() || !early => {
                self.ready.remove(&turn);
                job
            }
            _ if early || self.early.is_some_and(|early| early > now) => return None,
            _ => {
                self.early = Some(now.after(self.gap * 2));
                self.relaxed.pop_first()?.2
            }
        };
        self.spaced = Some(now.after(self.gap));
        Some(job)
    }
}

#[cfg(test)]
mod tests;
