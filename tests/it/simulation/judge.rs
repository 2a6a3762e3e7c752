//! What must hold, at every step: checked against what is true in the world, which the core can only guess at.

use super::homeserver::Fate;
use super::world::{Client, Trouble, World, name};
use crate::leave::world::agree;
use lk_jwt_service::internals::core::Action;
use lk_jwt_service::internals::presence::{DepartureCause, FRESH_MS, Next, State};
use lk_jwt_service::internals::time::Time;

/// From an arrival, or a delegation, to the restart of an event that is about to end: less than this cannot be asked for.
const LATE_MS: u64 = 2_500;
/// No call about an event is repeated sooner.
const LEAST_PAUSE_MS: u64 = 250;

/// How somebody came to be out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Departure {
    /// The SFU tells of it, if webhooks get through.
    Told,
    /// The SFU was restarted, and was back then.
    SfuRestart { back: u64 },
}

/// A time during which somebody was in the room without a gap.
#[derive(Clone, Debug)]
pub(super) struct Stay {
    pub(super) from: u64,
    pub(super) until: Option<u64>,
    how: Departure,
    /// The service was shown it, or told of it.
    noticed: bool,
    /// It had media.
    active: bool,
    /// The session that ended it, when the service was told of that, and whether it could believe it.
    sid: String,
    told: Option<(u64, bool)>,
    /// When the SFU first answered a question that they are not there any more.
    missed: Option<u64>,
}

/// What an answer of the SFU showed: when it was asked for on the process's clock and in truth, and when the SFU looked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) asked: Time,
    pub(super) asked_at: u64,
    pub(super) sampled: u64,
}

/// One of the people, and what the service knows of them.
#[derive(Default)]
pub(super) struct Person {
    pub(super) client: Client,
    pub(super) generation: u64,
    pub(super) stays: Vec<Stay>,
    pub(super) events: Vec<usize>,
    /// What the store was to know of them was lost together with the process.
    pub(super) unwritten: bool,
    denied: Option<Sample>,
    shown: Option<Sample>,
    /// Leaves that were sent since the last stay: the SFU's look, and for how long a comeback is waited for.
    sends: Vec<(u64, DepartureCause, usize)>,
    restarted: Option<(usize, u64)>,
}

impl Person {
    /// Comes, or has a new session beside the one that is there.
    pub(super) fn arrives(&mut self, now: u64, continues: bool) {
        if let Some(stay) = self.stays.last_mut().filter(|stay| continues && stay.until.is_none()) {
            stay.active = false;
            return;
        }
        self.stays.push(Stay {
            from: now,
            until: None,
            how: Departure::Told,
            noticed: false,
            active: false,
            sid: String::new(),
            told: None,
            missed: None,
        });
    }

    pub(super) fn is_active(&mut self) {
        if let Some(stay) = self.stays.last_mut() {
            stay.active = true;
        }
    }

    pub(super) fn departs(&mut self, now: u64, how: Departure, sid: &str) -> Option<usize> {
        let stay = self.stays.last_mut().filter(|stay| stay.until.is_none())?;
        (stay.until, stay.how, stay.sid) = (Some(now), how, sid.into());
        Some(self.stays.len() - 1)
    }

    pub(super) fn is_told(&mut self, sid: &str, now: u64, believed: bool) {
        if let Some(stay) = self.stays.iter_mut().find(|stay| stay.sid == sid) {
            stay.told.get_or_insert((now, believed));
        }
    }

    pub(super) fn is_shown_by_webhook(&mut self, sid: &str, present: Option<&str>) {
        if present == Some(sid)
            && let Some(stay) = self.stays.last_mut()
        {
            stay.noticed = true;
        }
    }

    pub(super) fn is_shown(&mut self, sample: Sample) {
        if self.shown.is_none_or(|shown| shown.asked < sample.asked) {
            self.shown = Some(sample);
        }
        let stays = self.stays.iter_mut();
        for stay in stays.filter(|stay| stay.from <= sample.sampled && stay.until.is_none_or(|until| sample.sampled < until)) {
            stay.noticed = true;
        }
    }

    pub(super) fn is_denied(&mut self, sample: Sample) {
        if self.denied.is_none_or(|denied| denied.asked < sample.asked) {
            self.denied = Some(sample);
        }
        if let Some(stay) = self
            .stays
            .last_mut()
            .filter(|stay| stay.until.is_some_and(|until| until <= sample.sampled))
        {
            stay.missed.get_or_insert(sample.sampled);
        }
    }

    /// What was told of somebody whom nobody watched is not known.
    pub(super) fn is_not_noticed(&mut self) {
        if let Some(stay) = self.stays.last_mut() {
            stay.noticed = false;
        }
    }

    /// A new process knows nothing.
    pub(super) fn is_unknown(&mut self) {
        (self.denied, self.shown, self.restarted) = (None, None, None);
    }

    pub(super) fn is_restarted(&mut self, event: usize, now: u64) {
        if let Some((last, at)) = self.restarted.replace((event, now)) {
            assert!(
                last != event || now >= at + LEAST_PAUSE_MS,
                "e{event} is restarted again after {} ms",
                now - at
            );
        }
    }
}

impl World {
    fn fails(&self, what: &str) -> ! {
        panic!("{:.3} s: {what}", self.now as f64 / 1_000.0);
    }

    /// Whether an event's place on our clock is certain: one node, whose clock was never other than ours by more or less.
    fn has_one_clock(&self) -> bool {
        let which = |what: Trouble| matches!(what, Trouble::ProcessSuspended | Trouble::ClockSet);
        !self.sfu.is_skewed() && self.trouble(which, self.now.saturating_sub(660_000), self.now) == 0
    }

    // --- nobody who is there is reported gone ---

    /// A leave is about to be sent.
    pub(super) fn check_send(&mut self, event: usize, cause: DepartureCause) {
        let who = self.events[event].who;
        let Some(denied) = self.people[who].denied else {
            self.fails(&format!(
                "e{event} is sent, but no question about {} was answered with a no",
                name(who)
            ))
        };
        let age = self.core_now().since(denied.asked);
        if age >= FRESH_MS {
            self.fails(&format!("e{event} is sent on evidence that is {age} ms old"));
        }
        if let Some(shown) = self.people[who].shown
            && shown.asked_at > denied.sampled
        {
            self.fails(&format!("e{event} is sent, but the SFU showed {} to a later question", name(who)));
        }
        // A later try of the same leave has one more no (L5a).
        if self.people[who].sends.iter().all(|&(.., of)| of != event) {
            self.people[who].sends.push((denied.sampled, cause, event));
        }
        self.check_return(who);
    }

    /// Whoever was sent away was not about to come back.
    pub(super) fn check_return(&mut self, who: usize) {
        let sends = std::mem::take(&mut self.people[who].sends);
        for &(sampled, cause, event) in &sends {
            let stays = &self.people[who].stays;
            let Some(back) = stays.iter().map(|stay| stay.from).find(|&from| from > sampled) else {
                continue;
            };
            let Some(left) = stays.iter().filter_map(|stay| stay.until).rfind(|&until| until <= sampled) else {
                continue;
            };
            let comeback = self.comeback_ms(who, sampled, cause);
            if back - left < comeback {
                self.fails(&format!(
                    "e{event} was sent ({cause:?}, seen {} ms after the departure), but {} came back after {} ms of {comeback}",
                    sampled - left,
                    name(who),
                    back - left
                ));
            }
        }
        let back = self.people[who].stays.last().map_or(0, |stay| stay.from);
        self.people[who].sends = sends.into_iter().filter(|(sampled, ..)| *sampled >= back).collect();
    }

    /// Within what time whoever left may come back without being reported.
    fn comeback_ms(&self, who: usize, sampled: u64, cause: DepartureCause) -> u64 {
        let stays = &self.people[who].stays;
        let Some(stay) = stays.iter().rfind(|stay| stay.until.is_some_and(|until| until <= sampled)) else {
            return 0;
        };
        let left = stay.until.unwrap_or(0);
        // Evidence that grew old is replaced by one clear no (L5a): what was found before counts.
        let slow = |what: Trouble| what.of_process() || what == Trouble::ClockSet || what.of_homeserver(self.story.people[who].homeserver);
        if self.trouble(slow, left.saturating_sub(30_000), self.now) > 0 {
            return 0;
        }
        let quick = if self.has_one_clock() { 1_400 } else { 450 };
        // Each of two noes was true of whoever left twice.
        let twice = stays
            .iter()
            .filter_map(|stay| stay.until)
            .any(|until| until < left && until + 4_000 > left);
        if twice {
            return 0;
        }
        // An SFU that refuses to list rooms cannot be seen to have forgotten them: a double fault.
        let lists = self.trouble(|what| what == Trouble::SfuRefusesLists, left.saturating_sub(30_000), self.now) == 0;
        match (stay.how, cause) {
            // Where rooms are not watched, an SFU that was restarted is not told from one that everybody left (L13).
            (Departure::SfuRestart { back }, _) if self.story.watches_rooms && stay.noticed && lists && !self.people[who].unwritten => {
                back - left + 58_000
            }
            (_, DepartureCause::NeverJoined) => 0,
            (_, DepartureCause::Reported | DepartureCause::RoomClosed) => quick.min(self.story.sweep_ms),
            (_, DepartureCause::Missing | DepartureCause::RoomLost) => 2_900.min(self.story.sweep_ms - 50).min(quick),
        }
    }

    /// A homeserver's timer has ended an event.
    pub(super) fn check_fired(&self, event: usize) {
        let found = &self.events[event];
        let who = found.who;
        let (Some((delegated, _)), Some(stay)) = (found.delegated, self.stay_of(who)) else {
            return;
        };
        if stay.until.is_some() || self.people[who].unwritten || found.lost {
            return;
        }
        let hs = found.homeserver;
        let troubled = |which: &dyn Fn(Trouble) -> bool, from: u64| self.trouble(which, from, self.now);
        let late = if troubled(&|what| what.of_webhooks() || what.of_sfu(), stay.from.saturating_sub(30_000)) > 0 {
            20_000
        } else {
            LATE_MS
        };
        if stay.from + late > self.now || delegated + LATE_MS > self.now || found.replaced.is_some_and(|at| at + LATE_MS > self.now) {
            return;
        }
        let of_ours = |what: Trouble| what.of_process() || what.of_homeserver(hs);
        let allowance = if found.delay_ms < 8_000 { 0 } else { found.delay_ms / 4 };
        if troubled(&of_ours, found.restarted) > allowance {
            return;
        }
        if !stay.noticed
            && troubled(
                &|what| what.of_webhooks() || what.of_sfu() || of_ours(what),
                stay.from.saturating_sub(30_000),
            ) > 0
        {
            return;
        }
        let leaves = self.core().leaves();
        let job = leaves
            .all()
            .filter_map(|id| leaves.get(id))
            .find(|job| job.delay_id() == format!("e{event}"));
        self.fails(&format!(
            "e{event} fires, but {} is there since {:.3} s: {found:?}, {:?}",
            name(who),
            stay.from as f64 / 1_000.0,
            job.map(|job| job.leave())
        ));
    }

    /// Nothing more is done about an event: its homeserver could not be reached, or not in the little time that seemed to be left when
    /// the clock was set.
    pub(super) fn check_given_up(&mut self, event: usize) {
        let found = &self.events[event];
        let of_ours = |what: Trouble| what.of_process() || what.of_homeserver(found.homeserver) || what == Trouble::ClockSet;
        let allowance = if found.delay_ms < 8_000 { 0 } else { found.delay_ms / 4 };
        let was_set = self.trouble(|what| what == Trouble::ClockSet, found.restarted, self.now) > 0;
        let troubled = self.trouble(of_ours, found.restarted, self.now);
        if troubled > allowance || (was_set && troubled > 0) {
            self.events[event].lost = true;
        }
    }

    /// An event is about to be cancelled: another one was delegated in its place, and is known to run (L14).
    pub(super) fn check_cancel(&self, event: usize) {
        let found = &self.events[event];
        if !self.is_there(found.who) || self.people[found.who].unwritten {
            return;
        }
        // Of whoever was removed from the Matrix room, nothing can be ended any more.
        let Some((_, arrived)) = found.delegated else { return };
        let heir = self.events.iter().enumerate().find(|(other, heir)| {
            *other != event && heir.who == found.who && heir.granted && heir.delegated.is_some_and(|(_, other)| other >= arrived)
        });
        if heir.is_none() {
            self.fails(&format!("e{event} is cancelled, but nothing that was granted takes its place"));
        }
    }

    /// An event was cancelled: whoever is there has another one.
    pub(super) fn check_cancelled(&self, event: usize) {
        let found = &self.events[event];
        let who = found.who;
        let hs = found.homeserver;
        let others = self.events.iter().filter(|other| other.who == who && other.delegated.is_some());
        if self.is_there(who)
            && others.clone().all(|other| !other.is_running())
            && !self.people[who].unwritten
            && self.trouble(|what| what.of_process() || what.of_homeserver(hs), found.restarted, self.now) == 0
            && others.clone().all(|other| !matches!(other.fate, Fate::Fired(_) | Fate::Sent(_)))
        {
            self.fails(&format!("e{event} was cancelled, and {} has no other", name(who)));
        }
    }

    fn is_there(&self, who: usize) -> bool {
        self.stay_of(who).is_some_and(|stay| stay.until.is_none())
    }

    // --- nobody who is gone is forgotten ---

    /// Looks at a departure: it is reported by now, or has time.
    pub(super) fn check_departure(&mut self, who: usize, stay: usize) {
        if self.people[who].stays.len() > stay + 1 {
            return;
        }
        let left = self.people[who].stays[stay].until.unwrap_or(self.now);
        let running: Vec<_> = self
            .events
            .iter()
            .enumerate()
            .filter(|(_, event)| event.who == who && event.is_running() && event.delegated.is_some() && !event.lost)
            .collect();
        // What nobody knows of any more is the homeserver's.
        if running.is_empty() || self.people[who].unwritten {
            return;
        }
        let delay = running.iter().map(|(_, event)| event.delay_ms).max().unwrap_or(0);
        // Whoever asks for a token comes, whatever has become of the event that they hand over.
        let delegated = self
            .events
            .iter()
            .filter(|event| event.who == who)
            .filter_map(|event| event.delegated);
        let delegated = delegated.map(|(at, _)| at).max().unwrap_or(0);
        let hs = self.story.people[who].homeserver;
        let found = &self.people[who].stays[stay];
        // While clocks differ, a departure that seems to be older than the delegation is found by asking only (L2).
        let is_placed = self.has_one_clock() || delegated + 12_000 < left;
        let told = found.told.filter(|_| is_placed);
        // Where rooms are not swept, whoever is not believed to have gone is missed when the room is empty, at last.
        let believed = told.is_some_and(|(_, believed)| believed);
        if !(self.story.sweeps || found.noticed && found.active && believed) {
            return;
        }
        let latency = 3 * self.story.sfu_latency.1 + 3 * self.story.homeserver_latency.1;
        let sweep = self.story.sweep_ms;
        let trouble = |what: Trouble| what.of_process() || what.of_sfu() || what.of_homeserver(hs) || what == Trouble::ClockSet;
        let troubled = self.trouble(trouble, left.saturating_sub(60_000), self.now);
        // Where the end of the room was not told, or somebody deleted it, and others are in it again, the SFU seems to have forgotten it (L13).
        let untold = |what: Trouble| what.of_webhooks() || what == Trouble::RoomDeleted;
        let untold = self.trouble(untold, left.saturating_sub(60_000), self.now) > 0;
        let grace = if untold { 75_000 } else { 0 };
        let bound = if !found.noticed || delegated > left {
            // Waited for, as for anybody who has not come (L2b).
            left.max(delegated) + 60_000 + 2 * delay + 30_000
        } else if !found.active {
            // A failed attempt changes nothing for half a minute: clients try again.
            left + sweep.max(30_000) + 3_000 + 8_000 + latency
        } else if let Some((told, believed)) = told {
            let due = told + if believed { 2_200 } else { 3_000 + 3_000 + 1_500 };
            // Found missing before that was told: the second question comes 3 s after the first (L3).
            let missed = found.missed.filter(|&missed| missed < told).map_or(0, |missed| missed + 4_500);
            due.max(missed) + latency
        } else {
            left + sweep.max(3_000) + 8_000 + 3_000 + latency
        };
        let limited = if self.homeservers[hs].is_limited() { 10_000 } else { 0 };
        let slack = if troubled > 0 { 3 * troubled + 110_000 + 2 * delay } else { 0 };
        let bound = bound + grace + slack + limited;
        if self.now < bound {
            return self.check_at(bound, who, stay);
        }
        let events: Vec<_> = running.iter().map(|(event, _)| format!("e{event}")).collect();
        let found = self.core().presence().find(&self.story.people[who].room, name(who));
        let found = found.and_then(|id| self.core().presence().get(id));
        self.fails(&format!(
            "{} left at {:.3} s, and {events:?} are not reported: {:?}",
            name(who),
            left as f64 / 1_000.0,
            found.map(|found| found.presence())
        ));
    }

    // --- what others have stored is taken in, and nothing else of it ---

    /// The record of an event was read while the leave of its room and identity, if any, was that of `before` (L11).
    pub(super) fn check_taken_in(&self, key: &(String, String), delay_id: &str, before: Option<usize>, actions: &[Action]) {
        let now = self.current(key);
        let is_over = actions
            .iter()
            .any(|action| matches!(action, Action::Forget(room, identity) if (&**room, &**identity) == (&*key.0, &*key.1)));
        match before {
            Some(event) if now.is_some_and(|now| now != event) => {
                self.fails(&format!("a record of {delay_id} takes the place of e{event}, which is known"));
            }
            None if now.is_none() && !is_over => self.fails(&format!("{delay_id} was read and is not taken in")),
            Some(_) | None => {}
        }
    }

    // --- every suspicion has a next step ---

    pub(super) fn check_step(&mut self) {
        agree(self.core());
        let now = self.core_now();
        if !self.runs() {
            return;
        }
        let next = self.core_mut().next_deadline();
        if next.is_some_and(|next| next < now) {
            self.fails(&format!("what was due at {next:?} was not done at {now:?}"));
        }
        let mut is_waited_for = false;
        for who in 0..self.people.len() {
            let room = &self.story.people[who].room;
            let presence = self.core().presence();
            let Some(found) = presence.find(room, name(who)).and_then(|id| presence.get(id)) else {
                continue;
            };
            let (step, most) = match found.presence() {
                State::Unknown { next, .. } => (*next, 900_000),
                State::Suspected { next, .. } => (*next, 62_000),
                State::Present | State::Gone(_) => continue,
            };
            let holds = match step {
                Next::AskAt(at) => {
                    is_waited_for = true;
                    at >= now && at.since(now) <= most && next.is_some_and(|next| next <= at)
                }
                Next::Asking(asked) => self.is_asked(name(who), asked) || self.is_asked(room, asked),
                Next::RoomDecides(_) => self.is_listed(room) || next.is_some_and(|next| next.since(now) <= 10_000),
                Next::Grace(_) => self.is_stopping() || next.is_some(),
            };
            if !holds {
                self.fails(&format!("{} has no next step at {now:?}: {found:?}", name(who)));
            }
        }
        if is_waited_for && next.is_none() {
            self.fails("nothing is due, though somebody is waited for");
        }
        let leaves = self.core().leaves();
        for job in leaves.all().filter_map(|id| leaves.get(id)) {
            if job.leave().next_deadline(false).is_none() {
                self.fails(&format!("{} has no next step: {:?}", job.delay_id(), job.leave()));
            }
        }
        // --- nothing grows ---
        if self.questions() > 8 * self.people.len() + 8 {
            self.fails(&format!("{} questions wait for an answer", self.questions()));
        }
    }

    pub(super) fn check_all(&mut self) {
        if self.core().leaves().len() > self.events.len() {
            self.fails(&format!("{} leaves of {} events", self.core().leaves().len(), self.events.len()));
        }
    }

    /// Everybody went home long ago: nobody is watched, and nothing is kept.
    pub(super) fn check_end(&mut self) {
        for (n, event) in self.events.iter().enumerate() {
            if event.is_running() && event.delegated.is_some() {
                self.fails(&format!("e{n} is still running: {event:?}"));
            }
        }
        if !self.core().leaves().is_empty() || self.records() > 0 || self.questions() > 0 {
            let (leaves, records, questions) = (self.core().leaves().len(), self.records(), self.questions());
            self.fails(&format!("{leaves} leaves, {records} records, {questions} questions are left"));
        }
        // Webhooks are remembered for ten minutes, and given up with the next one.
        self.is_told_of_nobody();
        let left = format!("{:?}", self.core());
        if left.len() > 6_000 {
            self.fails(&format!("{} bytes are left: {}", left.len(), left));
        }
    }
}
