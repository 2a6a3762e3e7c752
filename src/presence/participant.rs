//! A participant, as far as it is known: the session at hand, and whether somebody is there (decisions L2 to L3, L13).
//!
//! ```text
//!             seen, listed or joined                reported gone, denied by the SFU, room lost
//!  Unknown ─────────────────────────▶ Present ────────────────────────────────────▶ Suspected(why, next)
//!     │                               ▲  ▲                                            │     │
//!     │ reported gone                 │  └──────── another session, or a clear yes ───┘     │ clear noes
//!     └───────────────────────────────┼────▶ Suspected                                      ▼
//!                                     └──── came back ───────────────────────────────────  Gone(evidence)
//!
//!  Reported   asked 0.8 s and 1.5 s after the event; where not both answers are a no: Missing
//!  Missing    a no, a second one three seconds later, then the room: Open or Closed ▶ Gone; Lost ▶ RoomLost
//!  RoomLost   a minute of an answering SFU to come back in, then asked until a clear yes or no
//!  Stale      gone once, but the evidence grew old before the leave got through: asked again (L5a)
//! ```
//!
//! A suspicion always has a next step: a [`Next`] is part of it.

use std::sync::Arc;
use std::time::Duration;

use super::event::{Event, EventKind, SfuEvent};
use super::room::{Room, RoomStatus};
use crate::backoff::{Jitter, MIN_PAUSE_MS, Schedule};
use crate::livekit::{DisconnectReason, ParticipantRow};
use crate::outcome::words;
use crate::slab::Id;
use crate::text::Text;
use crate::time::{Delay, Time};

/// When a reported departure is asked about, after the event (L2a).
const FIRST_QUESTION_MS: u64 = 800;
const SECOND_QUESTION_MS: u64 = 1_500;
/// Between the two, however late the report seems: where nodes' clocks differ, it may have happened just now.
const QUESTION_GAP_MS: u64 = 500;
/// Time for the answer to such a question.
const QUICK_TIMEOUT: Duration = Duration::from_millis(400);
/// Time for any other answer (T6).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// From a report with a reason that people come back from to the question, and from one no to the next (L2a, L3).
const SECOND_THOUGHT_MS: u64 = 3_000;
/// After an aborted attempt of somebody who was never seen.
const NEXT_ATTEMPT_MS: u64 = 30_000;
/// Time that the participants of a lost room have to come back, counted while the SFU answers (L13).
pub const LOST_GRACE_MS: u64 = 60_000;
/// A report of a departure from longer than this before the delegation changes nothing (L2).
const OLD_NEWS_MS: u64 = 2_000;
/// `createdAt` is cut to whole seconds.
const CREATED_AT_STEP_MS: u64 = 1_000;
/// Evidence older than this is asked for again before anything is done (L5a).
pub const FRESH_MS: u64 = 10_000;
/// When somebody who never came is asked for in any case, before the end of the wait (L8).
const BEFORE_THE_END_MS: [u64; 4] = [45_000, 15_000, 4_000, 900];

/// Whether somebody is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The participant has not come yet, or is waited for again.
    Unknown {
        /// The next question to the SFU.
        next: Next,
        /// The wait for the participant.
        wait: Wait,
    },
    /// The participant is there.
    Present,
    /// The participant may be gone.
    Suspected {
        /// Kind of the suspicion.
        why: Suspicion,
        /// Moment at which the suspicion arose.
        since: Time,
        /// Next step in looking into the suspicion.
        next: Next,
    },
    /// The participant is gone.
    Gone(DepartureEvidence),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    ends: Time,
    /// The delay of the event that runs out then.
    delay: Delay,
    /// The last question that was answered with a no.
    last_no: Option<Time>,
}

/// Kinds of suspicion, and how far each has been looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// The SFU reported a departure, with a reason that is usually final.
    Reported {
        /// When the second question is due.
        second: Time,
        /// The question that the SFU answered with a no.
        denied: Option<Time>,
    },
    /// The participant was not found, or is to be looked for.
    Missing {
        /// Clear noes so far.
        denials: u8,
    },
    /// The SFU has forgotten the room.
    RoomLost,
    /// The evidence of a departure grew old.
    Stale,
}

/// The next step of a suspicion or of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The SFU is to be asked at that moment.
    AskAt(Time),
    /// The SFU was asked then; an answer comes in any case.
    Asking(Time),
    /// The room is being checked. The no that led to it was asked for then.
    RoomDecides(Time),
    /// The grace ends when the SFU has been answering for that many milliseconds.
    Grace(u64),
}

/// Why somebody counts as gone, and how old that knowledge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DepartureEvidence {
    /// Cause of the question.
    pub cause: DepartureCause,
    /// When the question was asked that the SFU answered with a no.
    pub asked: Time,
}

words! {
    /// Causes of a departure.
    DepartureCause {
        /// The SFU reported the departure.
        Reported = "reported",
        /// The SFU denied the participant twice, in a room that stands.
        Missing = "missing",
        /// The room ended.
        RoomClosed = "room_closed",
        /// The SFU forgot the room, and the participant did not come back.
        RoomLost = "room_lost",
        /// The participant never came.
        NeverJoined = "never_joined",
    }
}

/// Requests of a participant, or changes of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// `GetParticipant`, by a question of this moment.
    Ask {
        within: Duration,
    },
    /// `ListRooms` for the room: [`Next::RoomDecides`].
    CheckRoom,
    /// The stored part of the session has changed.
    Changed,
    /// The participant is there.
    Present,
    Gone(DepartureEvidence),
    JoinFailed,
}

pub(super) struct Around<'a> {
    pub(super) now: Time,
    pub(super) jitter: &'a mut Jitter,
    /// Since when the SFU has been answering, in all.
    pub(super) answering_ms: u64,
    /// Between two sweeps of the room.
    pub(super) sweep_ms: u64,
    pub(super) webhooks_work: bool,
    /// The room's sid as it is known now.
    pub(super) room_sid: Option<Arc<str>>,
    /// How the room stands for somebody sighted under this sid at that moment.
    pub(super) room_closed: bool,
    /// The SFU has told that the last room of that name is over.
    pub(super) room_finished: bool,
}

/// The stored part of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionRecord<'a> {
    pub sid: Option<&'a str>,
    /// When it joined, by the SFU's clock; 0 where that is not known.
    pub joined_at_ms: u64,
    /// The room's sid at the last sighting.
    pub room_sid: Option<&'a str>,
    /// Whether the SFU has told that this room is over.
    pub room_over: bool,
    pub last_sighted: Option<Time>,
    pub seen: bool,
}

/// A participant that is kept in mind.
#[derive(Debug)]
pub struct Participant {
    pub(super) room: Id<Room>,
    identity: Text<46>,
    // Three times as long as LiveKit's own: one small allocation for each of a hundred thousand cost more than its bytes (measured).
    sid: Option<Text<46>>,
    joined_at_ms: u64,
    pub(super) room_sid: Option<Arc<str>>,
    pub(super) last_sighted: Option<Time>,
    /// The session at hand was seen; any session was.
    seen: bool,
    was_seen: bool,
    /// The session at hand was reported gone.
    left: bool,
    /// The room of the session at hand is over, as the SFU has told.
    room_over: bool,
    /// A record alone says that somebody is there.
    is_by_record: bool,
    /// When a request last delegated an event.
    delegated: Time,
    /// When the grace of a lost room ends, counted in all since the last sighting; 0 while no room was lost.
    grace: u64,
    asks: u8,
    /// A sweep's question waits for its answer: while the SFU swallows them, one waits for each participant and not one more with
    /// every sweep.
    is_swept_for: bool,
    state: Presence,
    pub(super) timer: Option<Time>,
}

impl Wait {
    /// The wait that begins with a delegation that arrived then.
    const fn from(arrived: Time, delay: Delay) -> Self {
        Self {
            ends: arrived.after(delay.as_millis()),
            delay,
            last_no: None,
        }
    }
}

impl Participant {
    pub(super) fn new(room: Id<Room>, identity: &str, delegated: Time, delay: Delay) -> Self {
        Self {
            room,
            identity: Text::new(identity),
            sid: None,
            joined_at_ms: 0,
            room_sid: None,
            last_sighted: None,
            seen: false,
            was_seen: false,
            left: false,
            room_over: false,
            is_by_record: false,
            delegated,
            grace: 0,
            asks: 0,
            is_swept_for: false,
            state: Presence::Unknown {
                next: Next::AskAt(delegated),
                wait: Wait::from(delegated, delay),
            },
            timer: None,
        }
    }

    /// Takes over what was stored. Whoever had been seen is thought to be there until the SFU says otherwise.
    pub(super) fn restore(&mut self, stored: &SessionRecord<'_>, room_sid: Option<Arc<str>>, now: Time) {
        self.sid = stored.sid.map(Text::new);
        self.joined_at_ms = stored.joined_at_ms;
        self.room_sid = room_sid;
        self.last_sighted = stored.last_sighted;
        // A session that has a name was seen, if only before the delegation.
        (self.seen, self.was_seen) = (stored.seen || stored.sid.is_some(), stored.seen);
        self.is_by_record = stored.seen;
        self.room_over = stored.room_over;
        if stored.seen && stored.room_over {
            self.was_closed(now);
        } else if stored.seen {
            self.state = Presence::Present;
        } else {
            self.plan(Next::AskAt(now));
        }
    }

    pub fn identity(&self) -> &str {
        self.identity.as_str()
    }

    /// Whether somebody is there.
    pub const fn presence(&self) -> &Presence {
        &self.state
    }

    /// The part of the session at hand that is stored.
    pub fn session(&self) -> SessionRecord<'_> {
        SessionRecord {
            sid: self.sid.as_ref().map(Text::as_str),
            joined_at_ms: self.joined_at_ms,
            room_sid: self.room_sid.as_deref(),
            room_over: self.room_over,
            last_sighted: self.last_sighted,
            seen: self.was_seen,
        }
    }

    /// When the SFU was asked last that answered with a no while nobody had come.
    pub const fn last_no(&self) -> Option<Time> {
        if let Presence::Unknown { wait, .. } = self.state {
            wait.last_no
        } else {
            None
        }
    }

    /// Whether an event that happened then, before this node watched, may be about the session before the delegation.
    pub(super) fn may_be_of_before(&self, event: &SfuEvent<'_>, happened: Option<Time>) -> bool {
        let is_since = happened.is_some_and(|happened| happened >= self.delegated.after(CREATED_AT_STEP_MS));
        let is_awaited = matches!(self.state, Presence::Unknown { .. }) && !is_since;
        match event.kind {
            EventKind::Joined => is_awaited && self.is(event.sid),
            EventKind::Left(_) | EventKind::Aborted(_) => is_awaited,
            EventKind::RoomStarted | EventKind::RoomFinished | EventKind::Track | EventKind::Other => false,
        }
    }

    /// Whether sweeps ask for this participant: somebody is thought to be there, or to come back.
    pub(super) const fn is_swept(&self) -> bool {
        matches!(self.state, Presence::Present | Presence::Suspected { .. })
    }

    /// Whether the SFU reported a departure that is still being looked into.
    pub(super) const fn is_reported(&self) -> bool {
        matches!(
            self.state,
            Presence::Suspected {
                why: Suspicion::Reported { .. },
                ..
            }
        )
    }

    pub(super) const fn room_decides(&self) -> bool {
        matches!(
            self.state,
            Presence::Suspected {
                next: Next::RoomDecides(_),
                ..
            }
        )
    }

    pub(super) const fn next(&self) -> Option<Next> {
        match self.state {
            Presence::Unknown { next, .. } | Presence::Suspected { next, .. } => Some(next),
            Presence::Present | Presence::Gone(_) => None,
        }
    }

    /// When [`Self::on_time`] is due, on a clock on which the SFU has been answering for `answering_ms` at `now`, and goes on so.
    pub(super) fn next_deadline(&self, now: Time, answering: bool, answering_ms: u64) -> Option<Time> {
        match self.next()? {
            Next::AskAt(at) => Some(at),
            Next::Grace(until) => answering.then(|| now.after(until.saturating_sub(answering_ms))),
            Next::Asking(_) | Next::RoomDecides(_) => None,
        }
    }

    /// Whether a question about this participant is due by then.
    pub(super) fn asks_by(&self, at: Time) -> bool {
        matches!(self.next(), Some(Next::AskAt(due)) if due <= at)
    }

    /// The question that was due is under way.
    pub(super) fn asking(&mut self, asked: Time) {
        self.plan(Next::Asking(asked));
    }

    const fn answer_timeout(&self) -> Duration {
        if self.is_reported() { QUICK_TIMEOUT } else { ANSWER_TIMEOUT }
    }

    // --- what happens to the delegation ---

    /// Delegated anew. Whoever was reported gone before that request arrived is about to come back, and is waited for; whoever was
    /// only missed is missed anew.
    pub(super) fn delegated(&mut self, arrived: Time, delay: Delay, now: Time) {
        // An earlier request that took longer says nothing new.
        if arrived < self.delegated {
            return;
        }
        self.delegated = arrived;
        match &mut self.state {
            Presence::Suspected {
                why: Suspicion::Reported { .. } | Suspicion::Stale,
                since,
                ..
            } if arrived < *since => {}
            Presence::Suspected {
                why: Suspicion::Missing { denials },
                since,
                next,
            } => {
                if arrived >= *since {
                    (*denials, *next) = (0, Next::AskAt(now.after(SECOND_THOUGHT_MS)));
                }
            }
            // Whoever delegates may have left since the record was written.
            Presence::Present if !self.is_by_record => {}
            Presence::Suspected {
                why: Suspicion::RoomLost, ..
            } => {}
            Presence::Present | Presence::Unknown { .. } | Presence::Suspected { .. } | Presence::Gone(_) => {
                self.asks = 0;
                self.state = Presence::Unknown {
                    next: Next::AskAt(now),
                    wait: Wait::from(arrived, delay),
                };
            }
        }
    }

    /// Until when somebody is waited for, and the delay of the event that runs out then.
    pub(super) fn waits_until(&mut self, until: Time, of: Delay) {
        if let Presence::Unknown { wait, .. } = &mut self.state {
            (wait.ends, wait.delay) = (until, of);
        }
    }

    /// Asks again, since what is known has grown old (L5a).
    pub(super) fn confirm(&mut self, now: Time) {
        self.asks = 0;
        match &self.state {
            Presence::Unknown { .. } | Presence::Gone(_) => {
                self.state = Presence::Suspected {
                    why: Suspicion::Stale,
                    since: now,
                    next: Next::AskAt(now),
                };
            }
            Presence::Present | Presence::Suspected { .. } => {}
        }
    }

    /// Takes in that this process stood still: what was about to be concluded is asked about first. An answer to a question from
    /// before is old.
    pub(super) fn woke(&mut self, now: Time) {
        match &mut self.state {
            Presence::Suspected { why, next, .. } => {
                match next {
                    Next::AskAt(at) => *at = (*at).max(now),
                    Next::Asking(_) | Next::RoomDecides(_) => *next = Next::AskAt(now),
                    Next::Grace(_) => {}
                }
                if let Suspicion::Reported { denied, .. } = why {
                    *denied = None;
                }
            }
            Presence::Unknown { wait, .. } => wait.last_no = None,
            Presence::Present | Presence::Gone(_) => {}
        }
    }

    // --- what the SFU tells by itself ---

    pub(super) fn on_joined(&mut self, event: &Event<'_>, around: &Around<'_>, out: &mut Vec<Effect>) {
        let happened = event.happened.unwrap_or(around.now);
        // Who came before the delegation that waits for them may have left again since.
        if matches!(self.state, Presence::Unknown { .. }) && happened.after(CREATED_AT_STEP_MS) < self.delegated {
            return;
        }
        if event.sid.is_empty() || self.is(event.sid) {
            // Told late, it says nothing against a departure that was told or found since.
            let late = match &self.state {
                Presence::Suspected { since, why, .. } => {
                    happened < *since || (!event.sid.is_empty() && matches!(why, Suspicion::Reported { .. }))
                }
                Presence::Gone(evidence) => !event.sid.is_empty() || happened < evidence.asked,
                Presence::Unknown { .. } if self.left && !event.sid.is_empty() && !self.seen => {
                    // It came, and has left: whether another one is there, the SFU says.
                    (self.seen, self.was_seen) = (true, true);
                    return self.suspect(Suspicion::Missing { denials: 0 }, around.now, around.now);
                }
                Presence::Unknown { .. } => self.left && !event.sid.is_empty(),
                Presence::Present => false,
            };
            if late {
                return;
            }
        } else if !self.is_older_than(event.joined_at_ms) {
            return;
        }
        let row = ParticipantRow {
            identity: "",
            sid: event.sid,
            joined_at_ms: event.joined_at_ms,
            active: true,
        };
        self.sighted(&row, event.room_sid.clone(), around.now, out);
    }

    pub(super) fn on_left(&mut self, event: &Event<'_>, reason: DisconnectReason, around: &Around<'_>, out: &mut Vec<Effect>) {
        if self.is_old_news(event) {
            return;
        }
        if !event.sid.is_empty() && !self.is(event.sid) {
            if self.sid.is_some() && (event.joined_at_ms == 0 || !self.is_older_than(event.joined_at_ms)) {
                return;
            }
            match &self.state {
                // Nobody saw that session: it proves nothing (L2), until it is told that it was there.
                Presence::Unknown { .. } => {
                    self.enter(event.sid, event.joined_at_ms);
                    self.left = true;
                    return self.ask_now(around.now, out);
                }
                Presence::Gone(_) => return,
                Presence::Present | Presence::Suspected { .. } => {}
            }
            self.enter(event.sid, event.joined_at_ms);
            self.last_sighted = self.last_sighted.max(event.happened);
            out.push(Effect::Changed);
        } else if matches!(self.state, Presence::Unknown { .. }) && !self.seen {
            return self.ask_now(around.now, out);
        }
        (self.seen, self.was_seen) = (true, true);
        self.reported(event, reason, around, out);
    }

    pub(super) fn on_aborted(&mut self, event: &Event<'_>, reason: DisconnectReason, around: &Around<'_>, out: &mut Vec<Effect>) {
        if self.is_old_news(event) {
            return;
        }
        match &self.state {
            Presence::Unknown { .. } => {
                if reason == DisconnectReason::JoinFailure && self.sid.is_none() {
                    out.push(Effect::JoinFailed);
                }
            }
            Presence::Present | Presence::Suspected { .. } if event.sid.is_empty() || self.is(event.sid) => {
                if self.seen {
                    self.reported(event, reason, around, out);
                } else if self.state == Presence::Present {
                    let pause = if self.was_seen { SECOND_THOUGHT_MS } else { NEXT_ATTEMPT_MS };
                    self.suspect(Suspicion::Missing { denials: 0 }, around.now, around.now.after(pause));
                }
            }
            Presence::Present | Presence::Suspected { .. } | Presence::Gone(_) => {}
        }
    }

    fn reported(&mut self, event: &Event<'_>, reason: DisconnectReason, around: &Around<'_>, out: &mut Vec<Effect>) {
        let now = around.now;
        // Without a clock to place it on, an event starts a question and nothing else.
        let Some(happened) = event.happened else {
            return self.ask_now(now, out);
        };
        // Who left before the delegation is about to come back.
        if matches!(self.state, Presence::Unknown { .. }) && happened.after(CREATED_AT_STEP_MS) <= self.delegated {
            return self.ask_now(now, out);
        }
        if matches!(self.state, Presence::Gone(_)) || self.is_reported() || (self.left && matches!(self.state, Presence::Unknown { .. })) {
            return;
        }
        self.left = true;
        // Counted from `createdAt` alone, the questions would come up to a second early.
        let base = happened.after(CREATED_AT_STEP_MS).min(now);
        // Whoever was there when they delegated, and had left before that, is about to come back, too: a page that was reloaded.
        let comes_back = happened.after(CREATED_AT_STEP_MS) <= self.delegated;
        if reason.is_usually_final() && !comes_back {
            let first = base.after(FIRST_QUESTION_MS).max(now);
            let second = base.after(SECOND_QUESTION_MS).max(first.after(QUESTION_GAP_MS));
            // Delegations from after the departure are those of people who come back, whenever it is told.
            self.suspect(Suspicion::Reported { second, denied: None }, base, first);
        } else if matches!(self.state, Presence::Present | Presence::Unknown { .. }) {
            let was_unknown = matches!(self.state, Presence::Unknown { .. });
            self.suspect(Suspicion::Missing { denials: 0 }, now, base.after(SECOND_THOUGHT_MS).max(now));
            if was_unknown {
                // People come back from such a departure: the event is kept alive meanwhile.
                out.push(Effect::Present);
            }
        }
    }

    fn is_old_news(&self, event: &Event<'_>) -> bool {
        event.happened.is_some_and(|happened| happened.after(OLD_NEWS_MS) < self.delegated)
    }

    // --- what the SFU answers ---

    /// A list, or an answer to a question about this participant alone, shows somebody.
    pub(super) fn on_yes(&mut self, row: &ParticipantRow<'_>, asked: Time, around: &mut Around<'_>, out: &mut Vec<Effect>) {
        let same = row.sid.is_empty() || self.is(row.sid);
        // Asked before the last sighting, it may be of a former session; asked after it, it is the truth whatever clocks say.
        if !same && self.was_sighted_since(asked) && !self.is_older_than(row.joined_at_ms) {
            return self.on_unclear(asked, around);
        }
        if same {
            match &self.state {
                // The SFU may not have forgotten yet whom it reported gone: three seconds later it has.
                Presence::Suspected {
                    why: Suspicion::Reported { .. },
                    ..
                } => return self.on_unclear(asked, around),
                Presence::Suspected { since, .. } if asked < *since => return,
                Presence::Gone(evidence) if asked <= evidence.asked => return,
                Presence::Unknown { .. } if self.left && !row.sid.is_empty() && asked < self.delegated.after(SECOND_THOUGHT_MS) => {
                    return self.on_unclear(asked, around);
                }
                Presence::Unknown { .. } | Presence::Present | Presence::Suspected { .. } | Presence::Gone(_) => {}
            }
        }
        self.sighted(row, around.room_sid.clone(), around.now, out);
    }

    /// The SFU denies the participant. A list that does is confirmed by a question about this participant alone.
    pub(super) fn on_no(&mut self, asked: Time, listed: bool, around: &mut Around<'_>, out: &mut Vec<Effect>) {
        let now = around.now;
        let was_asked = self.next() == Some(Next::Asking(asked));
        if self.was_sighted_since(asked) {
            // It says nothing: what waits for it asks again.
            if was_asked {
                self.plan(Next::AskAt(now.after(1)));
            }
            return;
        }
        let second = now.after(SECOND_THOUGHT_MS.min(around.sweep_ms));
        match &mut self.state {
            Presence::Unknown { wait, .. } => {
                wait.last_no = wait.last_no.max(Some(asked));
                if was_asked {
                    self.wait_on(around.webhooks_work, around);
                }
            }
            Presence::Present if listed && self.delegated <= asked => self.on_sweep(out),
            Presence::Present if listed => {}
            Presence::Present => self.suspect(Suspicion::Missing { denials: 1 }, now, second),
            Presence::Suspected { why, next, .. } if *next == Next::Asking(asked) => match why {
                Suspicion::Reported { second, denied } => {
                    if asked >= *second {
                        return self.gone(DepartureCause::Reported, asked, out);
                    }
                    *denied = Some(asked);
                    *next = Next::AskAt((*second).max(now));
                }
                Suspicion::Missing { denials } => {
                    *denials = denials.saturating_add(1);
                    if *denials < 2 {
                        *next = Next::AskAt(second);
                    } else if around.room_closed {
                        self.gone(DepartureCause::RoomClosed, asked, out);
                    } else {
                        *next = Next::RoomDecides(asked);
                        out.push(Effect::CheckRoom);
                    }
                }
                Suspicion::RoomLost => self.gone(DepartureCause::RoomLost, asked, out),
                Suspicion::Stale => self.gone(DepartureCause::Missing, asked, out),
            },
            Presence::Gone(evidence) => evidence.asked = evidence.asked.max(asked),
            Presence::Suspected { .. } => {}
        }
    }

    /// An answer that is neither a clear yes nor a clear no, or none at all.
    pub(super) fn on_unclear(&mut self, asked: Time, around: &mut Around<'_>) {
        if self.next() != Some(Next::Asking(asked)) {
            return;
        }
        let now = around.now;
        match &mut self.state {
            // Whoever came meanwhile may not have been told of: a question that was lost is asked again soon.
            Presence::Unknown { .. } => self.wait_on(false, around),
            Presence::Suspected { why, next, .. } => match why {
                Suspicion::Reported { second, .. } if asked < *second => *next = Next::AskAt((*second).max(now)),
                // Not both were answered with a no: judged like an absence that was found by asking, of which the one no is a part.
                Suspicion::Reported { denied, .. } => {
                    let (denials, since) = denied.map_or((0, now), |denied| (1, denied));
                    self.suspect(Suspicion::Missing { denials }, now, since.after(SECOND_THOUGHT_MS));
                }
                Suspicion::Missing { .. } | Suspicion::RoomLost | Suspicion::Stale => {
                    self.asks = self.asks.saturating_add(1);
                    let schedule = if *why == Suspicion::Stale {
                        Schedule::CONFIRM
                    } else {
                        Schedule::PARTICIPANT
                    };
                    *next = Next::AskAt(now.after(schedule.pause(self.asks, around.jitter)));
                }
            },
            Presence::Present | Presence::Gone(_) => {}
        }
    }

    /// The list that was asked for does not come: the SFU is asked about this participant alone.
    pub(super) fn on_no_list(&mut self, asked: Time, now: Time) {
        if self.next() == Some(Next::Asking(asked)) {
            self.plan(Next::AskAt(now));
        }
    }

    /// A list of nobody says that nobody is there if the room stands, or has ended.
    pub(super) fn on_empty_list(&mut self, asked: Time, around: &mut Around<'_>, out: &mut Vec<Effect>) {
        if self.next() != Some(Next::Asking(asked)) || self.was_sighted_since(asked) {
            return self.on_no(asked, true, around, out);
        }
        match &mut self.state {
            Presence::Suspected {
                why: Suspicion::Reported { second, denied },
                next,
                ..
            } => {
                if asked < *second {
                    *next = Next::AskAt((*second).max(around.now));
                } else if around.room_closed {
                    self.gone(DepartureCause::RoomClosed, asked, out);
                } else {
                    *denied = Some(asked);
                    *next = Next::RoomDecides(asked);
                    out.push(Effect::CheckRoom);
                }
            }
            Presence::Suspected { .. } | Presence::Unknown { .. } | Presence::Present | Presence::Gone(_) => {
                self.on_no_list(asked, around.now);
            }
        }
    }

    // --- what is known of the room ---

    /// Takes in what became of the room in which the participant was last sighted, by an answer to a question of that moment.
    pub(super) fn on_room(&mut self, status: RoomStatus, asked: Time, around: &Around<'_>, out: &mut Vec<Effect>) {
        let now = around.now;
        let was_there = self.is_swept() || matches!(self.state, Presence::Gone(_));
        if was_there && status == RoomStatus::Closed && around.room_finished && !std::mem::replace(&mut self.room_over, true) {
            // Whoever looks after this from now on knows it, too: else the room would be missing.
            out.push(Effect::Changed);
        }
        match (&mut self.state, status) {
            (
                Presence::Present
                | Presence::Suspected {
                    why: Suspicion::RoomLost,
                    next: Next::Grace(_),
                    ..
                },
                RoomStatus::Closed,
            ) => {
                if around.room_finished {
                    self.was_closed(now);
                } else {
                    self.suspect(Suspicion::Missing { denials: 0 }, now, now);
                }
            }
            (Presence::Present, RoomStatus::Lost) => self.lose_room(around),
            (Presence::Suspected { why, next, .. }, _) => {
                let decided = match *next {
                    Next::RoomDecides(denied) => Some(denied),
                    Next::AskAt(_) | Next::Asking(_) | Next::Grace(_) => None,
                };
                match (status, decided) {
                    (RoomStatus::Lost, _) => match why {
                        Suspicion::Missing { .. } => self.lose_room(around),
                        Suspicion::Reported { .. } if decided.is_some() => self.lose_room(around),
                        Suspicion::Reported { .. } | Suspicion::RoomLost | Suspicion::Stale => {}
                    },
                    // An answer to a question from before that no says nothing.
                    (RoomStatus::Open, Some(denied)) if asked < denied => {}
                    (RoomStatus::Open | RoomStatus::Closed, Some(denied)) if now.since(denied) < FRESH_MS => {
                        let cause = match (status, why) {
                            (RoomStatus::Closed | RoomStatus::Lost, _) => DepartureCause::RoomClosed,
                            (RoomStatus::Open, Suspicion::Reported { .. }) => DepartureCause::Reported,
                            (RoomStatus::Open, _) => DepartureCause::Missing,
                        };
                        self.gone(cause, denied, out);
                    }
                    (RoomStatus::Open | RoomStatus::Closed, Some(_)) => {
                        (*why, *next) = (Suspicion::Stale, Next::AskAt(now));
                    }
                    (RoomStatus::Open | RoomStatus::Closed, None) => {}
                }
            }
            (Presence::Present, RoomStatus::Open) | (Presence::Unknown { .. } | Presence::Gone(_), _) => {}
        }
    }

    /// The SFU has told that the room is over, and so that everybody has left it.
    fn was_closed(&mut self, now: Time) {
        let second = now.after(QUESTION_GAP_MS);
        self.suspect(Suspicion::Reported { second, denied: None }, now, now);
    }

    fn lose_room(&mut self, around: &Around<'_>) {
        if self.grace == 0 {
            self.grace = around.answering_ms.saturating_add(LOST_GRACE_MS);
        }
        self.asks = 0;
        self.state = Presence::Suspected {
            why: Suspicion::RoomLost,
            since: around.now,
            next: Next::Grace(self.grace),
        };
    }

    // --- time ---

    pub(super) fn on_time(&mut self, around: &Around<'_>, out: &mut Vec<Effect>) {
        match self.next() {
            Some(Next::AskAt(at)) if at <= around.now => {
                let within = match self.state {
                    // One question that hangs must not take up the end of the wait.
                    Presence::Unknown { wait, .. } => {
                        let part = Duration::from_millis(wait.ends.since(around.now) / 8);
                        part.clamp(QUICK_TIMEOUT, ANSWER_TIMEOUT)
                    }
                    Presence::Suspected { .. } | Presence::Present | Presence::Gone(_) => self.answer_timeout(),
                };
                self.asking(around.now);
                out.push(Effect::Ask { within });
            }
            Some(Next::Grace(until)) if until <= around.answering_ms => {
                self.asking(around.now);
                out.push(Effect::Ask { within: ANSWER_TIMEOUT });
            }
            Some(Next::AskAt(_) | Next::Grace(_) | Next::Asking(_) | Next::RoomDecides(_)) | None => {}
        }
    }

    /// A sweep of the room, or another reason to ask for whoever is thought to be there.
    pub(super) fn on_sweep(&mut self, out: &mut Vec<Effect>) {
        let asks = match &self.state {
            Presence::Present => true,
            Presence::Suspected { next, .. } => matches!(next, Next::Grace(_)),
            Presence::Unknown { .. } | Presence::Gone(_) => false,
        };
        if asks && !std::mem::replace(&mut self.is_swept_for, true) {
            out.push(Effect::Ask { within: ANSWER_TIMEOUT });
        }
    }

    /// A question about the participant was answered, or will not be.
    pub(super) const fn on_answered(&mut self) {
        self.is_swept_for = false;
    }

    // --- states ---

    /// Asks as soon as may be, where no question is under way.
    pub(super) fn ask_now(&mut self, now: Time, out: &mut Vec<Effect>) {
        match &mut self.state {
            Presence::Present => out.push(Effect::Ask { within: ANSWER_TIMEOUT }),
            Presence::Unknown { next, .. } | Presence::Suspected { next, .. } => match next {
                Next::AskAt(at) => *at = (*at).min(now),
                Next::Asking(_) | Next::RoomDecides(_) | Next::Grace(_) => {}
            },
            Presence::Gone(_) => {}
        }
    }

    fn plan(&mut self, step: Next) {
        if let Presence::Unknown { next, .. } | Presence::Suspected { next, .. } = &mut self.state {
            *next = step;
        }
    }

    fn suspect(&mut self, why: Suspicion, since: Time, at: Time) {
        self.asks = 0;
        self.state = Presence::Suspected {
            why,
            since,
            next: Next::AskAt(at),
        };
    }

    fn gone(&mut self, cause: DepartureCause, asked: Time, out: &mut Vec<Effect>) {
        let evidence = DepartureEvidence { cause, asked };
        self.state = Presence::Gone(evidence);
        out.push(Effect::Gone(evidence));
    }

    /// Plans the next question about somebody who has not come.
    fn wait_on(&mut self, patient: bool, around: &mut Around<'_>) {
        let Presence::Unknown { next, wait } = &mut self.state else {
            return;
        };
        let now = around.now;
        self.asks = self.asks.saturating_add(1);
        let at = if patient {
            let pause = Schedule::NEWCOMER.pause(self.asks, around.jitter);
            let before = BEFORE_THE_END_MS.map(|ms| wait.ends.before(ms)).into_iter().find(|&at| at > now);
            let at = now.after(pause);
            before.map_or(at, |before| before.min(at))
        } else {
            // A short delay has no room for long pauses, and the end of a wait none at all.
            let dense = (wait.delay.as_millis() / 6).max(1_000);
            let closer = (wait.ends.since(now) / 2).max(MIN_PAUSE_MS).min(dense);
            now.after(Schedule::PARTICIPANT.pause(self.asks, around.jitter).min(closer))
        };
        *next = Next::AskAt(at);
    }

    /// Takes in that the participant is there: whatever was feared did not happen.
    fn sighted(&mut self, row: &ParticipantRow<'_>, room_sid: Option<Arc<str>>, now: Time, out: &mut Vec<Effect>) {
        let mut changed = false;
        if !row.sid.is_empty() && !self.is(row.sid) {
            self.enter(row.sid, row.joined_at_ms);
            changed = true;
        }
        changed |= std::mem::replace(&mut self.room_over, false);
        (self.left, self.is_by_record) = (false, false);
        self.grace = 0;
        self.last_sighted = self.last_sighted.max(Some(now));
        if room_sid.is_some() {
            // Stored with the next restart: a record that lags here is judged with care (L11).
            self.room_sid = room_sid;
        }
        if row.active && !(self.seen && self.was_seen) {
            (self.seen, self.was_seen) = (true, true);
            changed = true;
        }
        if changed {
            out.push(Effect::Changed);
        }
        self.state = Presence::Present;
        out.push(Effect::Present);
    }

    // --- the session at hand ---

    fn enter(&mut self, sid: &str, joined_at_ms: u64) {
        self.sid = Some(Text::new(sid));
        self.joined_at_ms = joined_at_ms;
        self.seen = false;
    }

    fn is(&self, sid: &str) -> bool {
        self.sid.as_ref().is_some_and(|known| known.as_bytes() == sid.as_bytes())
    }

    /// Whether a session that joined then is a later one. Where the SFU does not say, the order of arrival decides.
    const fn is_older_than(&self, joined_at_ms: u64) -> bool {
        joined_at_ms == 0 || self.joined_at_ms == 0 || joined_at_ms > self.joined_at_ms
    }

    /// Whether there was a sighting at that moment or later: of the same millisecond nothing is known.
    fn was_sighted_since(&self, asked: Time) -> bool {
        self.last_sighted.is_some_and(|sighted| sighted >= asked)
    }
}
