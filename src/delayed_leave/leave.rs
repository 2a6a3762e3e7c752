//! A delayed leave event: restarted while somebody is there, sent on evidence that nobody is, cancelled when another one took its
//! place (decisions L4 to L6, L12, L14). Pure.
//!
//! A leave knows no sid, no room and no webhook: it is told [`Input::Present`] and [`Input::Gone`]. It knows no queue either: that it
//! waits to call its homeserver shows in [`Leave::pending_call`], and it calls when it is given its [`Input::Permit`].
//!
//! ```text
//!                   present                      gone (evidence)
//!  AwaitingJoin ─────────────▶ Active ─────────────────────────────▶ Sending
//!     │    ▲                    │  ▲  ▲                               │   │
//!     │    └─ delegated anew ───┼──┼──┼──── came back before the ─────┘   │ sent, or given up
//!     │                         │  │  └──── call got through              ▼
//!     │ replaced                │  └─── the successor's first restart     Done(reason)
//!     ▼                         ▼       was refused                       ▲
//!  Replaced ◀───────────────────┘                                        │
//!     └──── the successor's first restart was granted ──▶ Cancelling ─────┘
//! ```

use std::time::Duration;

use super::scheduler::timeout_ms;
use crate::backoff::{Jitter, MIN_PAUSE_MS, Schedule};
use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::presence::{DepartureCause, DepartureEvidence, FRESH_MS};
use crate::time::{Delay, Time};

/// Shorter delays are not restarted before somebody is there (L2b).
const RESTARTED_WHILE_WAITING_MS: u64 = 5_000;
/// For how long after the delegation the event of somebody who has not come is restarted (L2b).
const SLOW_ICE_MS: u64 = 60_000;
/// A wait longer than this ends with a send only after a clear no within as much (L2b).
const LONG_WAIT_MS: u64 = 60_000;
/// The bounds of the window in which a leave is sent (L5).
const MIN_SEND_MS: u64 = 30_000;
const MAX_SEND_MS: u64 = 3_600_000;
/// A hint moves a restart by no more than this (L4).
const MAX_HINT: Duration = Duration::from_secs(60);
/// After a final no to a restart, the homeserver is asked once more (L6).
const SECOND_OPINION_MS: u64 = 2_000;

#[derive(Clone, Debug)]
pub struct Leave {
    delay: Delay,
    delegated: Time,
    /// The last answer that says the event runs anew: it is given up one delay later.
    last_ack: Time,
    /// When that restart was sent: the next one is counted from here.
    counted_from: Time,
    phase: Phase,
    call: CallState,
    last_started: Option<Time>,
    failures: u8,
    /// The homeserver has granted a restart since the event was delegated here.
    granted: bool,
    /// Whether the homeserver has said once that the event is gone, or not ours.
    refused: bool,
    /// A restart since the last one that was granted had no answer in time: it may have been granted, too.
    unanswered: bool,
}

/// How far a leave is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The participant has not come yet.
    AwaitingJoin,
    /// The participant is there.
    Active,
    /// Another event was delegated in its place, and has not been restarted yet.
    Replaced,
    /// The event is being sent.
    Sending {
        /// Cause of the departure.
        cause: DepartureCause,
        /// When the question was asked that this follows from; none where it has to be asked anew (L5a).
        evidence: Option<Time>,
        /// News of the participant while the call was on its way.
        returned: Option<Returned>,
        /// The end of the window.
        until: Time,
    },
    /// The event is being cancelled.
    Cancelling {
        /// The end of the window.
        until: Time,
    },
    /// The leave is over.
    Done(FinishReason),
}

/// Phase to go on with when the homeserver did not take the leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returned {
    /// The event was delegated again: its participant is waited for.
    Awaited,
    /// The participant is there again.
    Present,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallState {
    Idle,
    /// The call is due at that moment.
    Scheduled(Time),
    /// The call is due, and waits for its turn.
    Queued,
    /// Sent then; waited for so many milliseconds. The answer is taken whenever it comes.
    InFlight(Time, u32),
}

/// How a leave ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The event was sent, or had been finalised already.
    Sent(DepartureCause),
    /// The window closed before the homeserver took it.
    NotSent(DepartureCause),
    /// The homeserver does not know the event any more.
    EventGone,
    /// The homeserver refuses us.
    Refused,
    /// No restart got through within one delay, and none that may have can keep the event running any longer.
    GivenUp,
    /// No restart got through within one delay, while restarts paused because the SFU is silent.
    SfuSilent,
    /// The join failed.
    JoinFailed,
    /// The participant did not come, and the SFU did not say so clearly: somebody may be there.
    NeverJoined,
    /// Another delegation took the place of this one.
    Replaced,
    /// The user was removed from the Matrix room: there is no membership left to end.
    Kicked,
    /// The leave made room for others: nobody was ever there.
    Evicted,
}

impl FinishReason {
    /// Cause of the departure that the leave was to be sent for.
    pub const fn cause(self) -> Option<DepartureCause> {
        if let Self::Sent(cause) | Self::NotSent(cause) = self {
            Some(cause)
        } else {
            None
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Input {
    /// The participant is there.
    Present,
    /// The participant is gone.
    Gone(DepartureEvidence),
    /// The leave is over for a reason that lies outside it.
    Over(FinishReason),
    /// The pending call may be made.
    Permit,
    /// A call has ended.
    Called {
        action: DelayedEventAction,
        sent: Time,
        outcome: Outcome,
    },
    /// A request that arrived then has delegated the same event again. [`Input::Present`] follows if somebody is there.
    Renewed(Delay, Time),
    /// Another event was delegated in this one's place.
    Replaced,
    /// The leave takes the place of another one, or gets its own back: it is restarted at once, to see whether the event exists.
    Installed,
    /// The event that took this one's place was restarted, or the leave was sent.
    Superseded,
    /// The process stood still for that many milliseconds of which its clock knows nothing (L5a).
    Woke(u64),
    /// Another process may restart the event, too.
    Shared,
    /// The service is stopping (L12).
    Stopping,
    /// Time has passed, and nothing else has happened.
    Time,
}

/// Requests of a leave, or its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Call the homeserver; answered by [`Input::Called`], always.
    Call(DelayedEventAction),
    /// Store what is known now.
    Store,
    /// Ask the SFU again whether somebody is there.
    Confirm,
    /// The homeserver knows the event: those that it replaces may be cancelled.
    Granted,
    /// The leave is over.
    Done(FinishReason),
}

pub struct Around<'a> {
    pub now: Time,
    pub jitter: &'a mut Jitter,
    /// How long calls to its homeserver usually take.
    pub usual_ms: u64,
    /// The SFU has been silent for so long that restarts pause (L13a).
    pub sfu_silent: bool,
    /// Another process may restart the event, too: it waits as long as it may.
    pub shared: bool,
    /// The service is stopping.
    pub stopping: bool,
    /// While nobody has come: when the last question was asked that the SFU answered with a no.
    pub last_no: Option<Time>,
    /// When the first of the events fires that this one replaces, and that are cancelled once it was restarted (L14).
    pub replaced_until: Option<Time>,
}

impl Leave {
    /// The leave of a delegation that arrived then.
    pub fn new(delay: Delay, arrived: Time, now: Time) -> Self {
        let mut leave = Self {
            delay,
            delegated: arrived,
            last_ack: arrived,
            counted_from: arrived,
            phase: Phase::AwaitingJoin,
            call: CallState::Idle,
            last_started: None,
            failures: 0,
            granted: false,
            refused: false,
            unanswered: false,
        };
        if leave.deadline() <= now {
            // Held for so long that the event may be over: the homeserver is asked first.
            leave.last_ack = now;
            leave.call = CallState::Scheduled(now);
        } else {
            leave.call = leave.restart_while_waiting();
        }
        leave
    }

    /// A leave as it was stored, with the time that is left (L11).
    pub fn restored(delay: Delay, delegated: Time, restarted: Time, seen: bool, now: Time) -> Self {
        let mut leave = Self::new(delay, delegated, delegated);
        // What lies in the future would put the next restart there, too.
        (leave.last_ack, leave.counted_from) = (restarted, restarted.min(now));
        leave.phase = if seen { Phase::Active } else { Phase::AwaitingJoin };
        leave.call = if restarted > now || leave.deadline() <= now {
            // Another clock wrote it, or it looks expired: the homeserver knows.
            leave.last_ack = now;
            CallState::Scheduled(now)
        } else if seen {
            CallState::Scheduled(leave.half(&mut Jitter::new(restarted.as_millis())).max(now))
        } else {
            leave.restart_while_waiting()
        };
        leave
    }

    pub const fn phase(&self) -> Phase {
        self.phase
    }

    pub const fn delay(&self) -> Delay {
        self.delay
    }

    /// When the delegation arrived.
    pub const fn delegated(&self) -> Time {
        self.delegated
    }

    /// When the event last began to run: what a store calls `RestartedAt`.
    pub const fn restarted(&self) -> Time {
        self.last_ack
    }

    /// When the homeserver sends the leave by itself, as far as that is known.
    pub const fn deadline(&self) -> Time {
        self.last_ack.after(self.delay.as_millis())
    }

    /// When the event can run no longer: a restart that nobody answered may have been granted (L4, L14).
    pub fn runs_until(&self) -> Time {
        let doubtful = self.last_started.filter(|_| self.unanswered).unwrap_or(self.last_ack);
        self.last_ack.max(doubtful).after(self.delay.as_millis())
    }

    /// Whether the homeserver has granted a restart since the event was delegated here.
    pub const fn was_granted(&self) -> bool {
        self.granted
    }

    /// Whether a stopping service waits for it (L12).
    pub const fn is_at_rest(&self) -> bool {
        match self.phase {
            Phase::Sending { .. } | Phase::Cancelling { .. } => false,
            Phase::AwaitingJoin | Phase::Active => matches!(self.call, CallState::Idle),
            Phase::Replaced | Phase::Done(_) => true,
        }
    }

    /// The call that waits for its turn: what is called, until when that is of use, and until when it may wait while the homeserver
    /// limits.
    pub const fn pending_call(&self) -> Option<(DelayedEventAction, Time, Time)> {
        if !matches!(self.call, CallState::Queued) {
            return None;
        }
        match self.phase {
            Phase::AwaitingJoin | Phase::Active => Some((DelayedEventAction::Restart, self.deadline(), self.relaxed())),
            Phase::Sending { until, .. } => Some((DelayedEventAction::Send, until, until)),
            Phase::Cancelling { until } => Some((DelayedEventAction::Cancel, until, until)),
            Phase::Replaced | Phase::Done(_) => None,
        }
    }

    /// When [`Input::Time`] is due next.
    pub fn next_deadline(&self, sfu_silent: bool) -> Option<Time> {
        let end = match self.phase {
            Phase::Done(_) => return None,
            Phase::Replaced => return Some(self.runs_until()),
            Phase::Sending { until, .. } | Phase::Cancelling { until } => until,
            Phase::Active if self.call == CallState::Idle => self.runs_until(),
            Phase::AwaitingJoin | Phase::Active => self.deadline(),
        };
        match self.call {
            CallState::InFlight(sent, timeout_ms) => Some(sent.after(u64::from(timeout_ms))),
            CallState::Scheduled(at) if !(sfu_silent && self.is_running()) => Some(at.min(end)),
            CallState::Scheduled(_) | CallState::Idle | CallState::Queued => Some(end),
        }
    }

    /// Takes a fact, and says what is to be done about it.
    #[must_use]
    pub fn step(&mut self, input: Input, around: &mut Around<'_>) -> Vec<Output> {
        let mut out = Vec::new();
        if matches!(self.phase, Phase::Done(_)) {
            return out;
        }
        match input {
            Input::Present => self.on_present(around),
            Input::Gone(evidence) => self.on_gone(evidence, around.now),
            Input::Over(reason) => self.finish(reason, &mut out),
            Input::Permit => self.on_permit(around, &mut out),
            Input::Called { action, sent, outcome } => match action {
                DelayedEventAction::Restart => self.on_restarted(sent, outcome, around, &mut out),
                DelayedEventAction::Send | DelayedEventAction::Cancel => self.on_ended(action, sent, outcome, around, &mut out),
            },
            Input::Renewed(delay, arrived) => self.on_renewed(delay, arrived, around, &mut out),
            Input::Replaced => {
                self.phase = Phase::Replaced;
                self.call = CallState::Idle;
                if self.deadline() <= around.now {
                    // Over, as it seems: the homeserver knows.
                    self.last_ack = around.now;
                }
            }
            Input::Installed => {
                self.phase = Phase::AwaitingJoin;
                // What it replaces now was not its to cancel when it was granted before.
                self.granted = false;
                self.call = CallState::Scheduled(self.spaced(around.now));
            }
            Input::Superseded => {
                self.phase = Phase::Cancelling { until: self.runs_until() };
                self.call = CallState::Queued;
            }
            Input::Woke(lost_ms) => self.on_woke(lost_ms, around, &mut out),
            Input::Shared => {
                if self.phase == Phase::Active
                    && self.failures == 0
                    && let CallState::Scheduled(at) = self.call
                {
                    self.call = CallState::Scheduled(at.max(self.relaxed()));
                }
            }
            Input::Stopping => self.on_stopping(around),
            Input::Time => {}
        }
        self.settle(around, &mut out);
        out
    }

    // --- what is known of the participant ---

    /// Whether it is restarted by itself, so that a participant who is still there is no news: every sweep says so of everybody.
    pub fn goes_on(&self) -> bool {
        self.phase == Phase::Active && self.call != CallState::Idle
    }

    fn on_present(&mut self, around: &Around<'_>) {
        match &mut self.phase {
            Phase::AwaitingJoin => {
                self.phase = Phase::Active;
                self.failures = 0;
                self.restart_now(around.now);
            }
            Phase::Active => {
                // A stopping service has made its last restart, or is about to (L12).
                if self.call == CallState::Idle && !around.stopping {
                    self.restart_now(around.now);
                }
            }
            Phase::Sending { returned, .. } => {
                if matches!(self.call, CallState::InFlight(..)) {
                    *returned = Some(Returned::Present);
                } else {
                    self.resume(Returned::Present, around.now);
                }
            }
            Phase::Cancelling { .. } | Phase::Replaced | Phase::Done(_) => {}
        }
    }

    fn on_gone(&mut self, found: DepartureEvidence, now: Time) {
        match &mut self.phase {
            Phase::AwaitingJoin | Phase::Active => self.send(found.cause, Some(found.asked), now),
            Phase::Sending { evidence, returned, .. } => {
                (*evidence, *returned) = (Some(found.asked), None);
                if self.call == CallState::Idle {
                    self.call = CallState::Queued;
                }
            }
            Phase::Cancelling { .. } | Phase::Replaced | Phase::Done(_) => {}
        }
    }

    fn send(&mut self, cause: DepartureCause, evidence: Option<Time>, now: Time) {
        self.failures = 0;
        self.call = if evidence.is_some() { CallState::Queued } else { CallState::Idle };
        self.phase = Phase::Sending {
            cause,
            evidence,
            returned: None,
            until: self.runs_until().clamp(now.after(MIN_SEND_MS), now.after(MAX_SEND_MS)),
        };
    }

    /// Goes on with the event of somebody who was reported gone and is back or about to come back, while the leave is not on its
    /// way.
    fn resume(&mut self, returned: Returned, now: Time) {
        self.phase = match returned {
            Returned::Awaited => Phase::AwaitingJoin,
            Returned::Present => Phase::Active,
        };
        self.failures = 0;
        self.call = CallState::Scheduled(self.spaced(now));
    }

    // --- calls to the homeserver ---

    fn on_permit(&mut self, around: &Around<'_>, out: &mut Vec<Output>) {
        let now = around.now;
        let Some((action, until, _)) = self.pending_call() else { return };
        if let Phase::Sending { evidence, .. } = self.phase
            && evidence.is_none_or(|asked| now.since(asked) >= FRESH_MS)
        {
            return self.on_stale(out);
        }
        let spaced = self.spaced(now);
        if now >= until || (action == DelayedEventAction::Restart && spaced > now) {
            self.call = CallState::Scheduled(spaced);
            return;
        }
        if action == DelayedEventAction::Restart {
            self.last_started = Some(now);
        }
        let left = until.min(around.replaced_until.unwrap_or(until)).since(now);
        self.call = CallState::InFlight(now, timeout_ms(left, around.usual_ms));
        out.push(Output::Call(action));
    }

    fn on_restarted(&mut self, sent: Time, outcome: Outcome, around: &mut Around<'_>, out: &mut Vec<Output>) {
        let now = around.now;
        let is_newest = matches!(self.call, CallState::InFlight(newest, _) if newest == sent);
        if outcome == Outcome::Done {
            self.last_ack = self.last_ack.max(now);
            (self.failures, self.refused, self.unanswered) = (0, false, false);
            out.push(Output::Store);
            // An event that was given up and delegated again may have been cancelled since an earlier try (L14).
            if sent >= self.counted_from {
                self.counted_from = sent;
                if !std::mem::replace(&mut self.granted, true) {
                    out.push(Output::Granted);
                }
            }
            let deadline = self.deadline();
            if let Phase::Sending { until, .. } | Phase::Cancelling { until } = &mut self.phase {
                *until = (*until).max(deadline);
            }
        }
        if !self.is_running() {
            return;
        }
        match outcome {
            // A late answer to an earlier try serves as well as one to the newest.
            Outcome::Done => {
                if is_newest || !matches!(self.call, CallState::InFlight(..)) {
                    self.call = if around.stopping {
                        CallState::Idle
                    } else if self.phase == Phase::AwaitingJoin {
                        self.restart_while_waiting()
                    } else {
                        let next = if around.shared { self.relaxed() } else { self.half(around.jitter) };
                        CallState::Scheduled(self.spaced(next).max(now))
                    };
                }
            }
            Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden if is_newest && self.refused => {
                let reason = if outcome == Outcome::Forbidden {
                    FinishReason::Refused
                } else {
                    FinishReason::EventGone
                };
                self.finish(reason, out);
            }
            Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden
                if is_newest || !(self.refused || matches!(self.call, CallState::InFlight(..))) =>
            {
                self.refused = true;
                let pause = SECOND_OPINION_MS.min(self.deadline().since(now) / 4).max(MIN_PAUSE_MS);
                self.call = CallState::Scheduled(now.after(pause));
            }
            // A no to an earlier try: the newer one tells, or the one after the pause.
            Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden => {}
            // The pause is the homeserver's, kept by the queue: the leave stays in line (L4a).
            Outcome::Limited(_) if is_newest => self.call = CallState::Scheduled(self.spaced(now)),
            Outcome::Transient(hint) if is_newest => {
                self.failures = self.failures.saturating_add(1);
                // What a server says about when to come back does not cost a living event.
                let mut next_try = |end: Time| {
                    let third = Duration::from_millis(end.since(now) / 3);
                    let hint = hint.map(|hint| hint.min(third).min(MAX_HINT));
                    Schedule::RESTART.next_try(self.failures, hint, now, end, around.jitter)
                };
                let next = around.replaced_until.and_then(|end| next_try(end.min(self.deadline())));
                let next = next.or_else(|| next_try(self.deadline()));
                self.call = next.map_or(CallState::Idle, CallState::Scheduled);
            }
            Outcome::Limited(_) | Outcome::Transient(_) => {}
        }
    }

    /// A send or a cancellation has ended.
    fn on_ended(&mut self, action: DelayedEventAction, sent: Time, outcome: Outcome, around: &mut Around<'_>, out: &mut Vec<Output>) {
        let now = around.now;
        let (returned, until, done, refused, failed) = match (self.phase, action) {
            (
                Phase::Sending {
                    cause, returned, until, ..
                },
                DelayedEventAction::Send,
            ) => (
                returned,
                until,
                FinishReason::Sent(cause),
                FinishReason::Refused,
                FinishReason::NotSent(cause),
            ),
            (Phase::Cancelling { until }, DelayedEventAction::Cancel) => {
                (None, until, FinishReason::Replaced, FinishReason::Replaced, FinishReason::Replaced)
            }
            _ => return,
        };
        let is_newest = matches!(self.call, CallState::InFlight(newest, _) if newest == sent);
        match (outcome, returned) {
            (Outcome::Done | Outcome::NotFound | Outcome::Conflict, _) => self.finish(done, out),
            (Outcome::Forbidden, _) => self.finish(refused, out),
            (Outcome::Limited(_) | Outcome::Transient(_), _) if !is_newest => {}
            (Outcome::Limited(_) | Outcome::Transient(_), Some(returned)) => self.resume(returned, now),
            // One attempt and no more: the homeserver's own timer is at its end, too.
            _ if failed == FinishReason::NotSent(DepartureCause::NeverJoined) => self.finish(failed, out),
            (Outcome::Limited(_), None) => self.call = CallState::Scheduled(now.after(MIN_PAUSE_MS)),
            (Outcome::Transient(hint), None) => {
                self.failures = self.failures.saturating_add(1);
                match Schedule::SEND.next_try(self.failures, hint, now, until, around.jitter) {
                    Some(at) => self.call = CallState::Scheduled(at),
                    None => self.finish(failed, out),
                }
            }
        }
    }

    // --- what happens to the delegation ---

    fn on_renewed(&mut self, delay: Delay, arrived: Time, around: &Around<'_>, out: &mut Vec<Output>) {
        self.delay = delay;
        self.delegated = self.delegated.max(arrived);
        self.last_ack = self.last_ack.max(arrived);
        out.push(Output::Store);
        match &mut self.phase {
            Phase::AwaitingJoin if matches!(self.call, CallState::InFlight(..)) => {}
            Phase::AwaitingJoin => self.call = self.restart_while_waiting(),
            // Whether somebody is there, presence says next.
            Phase::Active => {
                self.phase = Phase::AwaitingJoin;
                self.restart_now(around.now);
            }
            Phase::Sending { returned, .. } if matches!(self.call, CallState::InFlight(..)) => *returned = Some(Returned::Awaited),
            // Whoever asks is about to come, and is waited for.
            Phase::Sending { .. } | Phase::Cancelling { .. } | Phase::Replaced => {
                self.phase = Phase::AwaitingJoin;
                // Its cancellation may have got through: that is for the homeserver to say.
                (self.granted, self.refused) = (false, false);
                self.counted_from = around.now;
                self.call = CallState::Scheduled(self.spaced(around.now));
            }
            Phase::Done(_) => {}
        }
    }

    fn on_stopping(&mut self, around: &Around<'_>) {
        match self.phase {
            // While the SFU is silent nothing is restarted, and nothing is to be waited for.
            Phase::Active if !around.sfu_silent => self.restart_now(around.now),
            Phase::Active | Phase::AwaitingJoin if !matches!(self.call, CallState::InFlight(..)) => self.call = CallState::Idle,
            Phase::Active | Phase::AwaitingJoin | Phase::Replaced | Phase::Sending { .. } | Phase::Cancelling { .. } | Phase::Done(_) => {}
        }
    }

    /// Takes in that the process stood still: what was known before is old, and the homeserver's timers went on (L5a).
    fn on_woke(&mut self, lost_ms: u64, around: &Around<'_>, out: &mut Vec<Output>) {
        let (now, last_ack) = (around.now, self.last_ack);
        // One that another took the place of may only seem to be over: it is cancelled all the same.
        if self.phase != Phase::Replaced {
            (self.last_ack, self.counted_from) = (self.last_ack.before(lost_ms), self.counted_from.before(lost_ms));
        }
        if let CallState::InFlight(_, timeout_ms) = &mut self.call {
            *timeout_ms = timeout_ms.saturating_sub(u32::try_from(lost_ms).unwrap_or(u32::MAX));
        }
        if self.is_running() && self.deadline() <= now {
            // Over, as it seems: the homeserver knows. A clock that was only set has ended nothing, and a homeserver that limits needs its
            // time: nothing is given up before the event would be over had it been so.
            self.last_ack = last_ack.max(now.before(self.delay.as_millis().saturating_sub(SECOND_OPINION_MS)));
            self.restart_now(now);
        }
        match &mut self.phase {
            Phase::AwaitingJoin | Phase::Active => {
                let half_over = self.counted_from.after(self.delay.as_millis() / 2) <= now;
                if half_over && matches!(self.call, CallState::Scheduled(_)) {
                    self.restart_now(now);
                }
            }
            Phase::Sending { evidence, .. } => {
                // What is on its way may still get through; the next try follows from nothing that was known before.
                if matches!(self.call, CallState::InFlight(..)) {
                    *evidence = None;
                } else {
                    self.on_stale(out);
                }
            }
            Phase::Cancelling { .. } | Phase::Replaced | Phase::Done(_) => {}
        }
    }

    // --- time ---

    fn settle(&mut self, around: &mut Around<'_>, out: &mut Vec<Output>) {
        let now = around.now;
        if let CallState::InFlight(sent, timeout_ms) = self.call {
            if now.since(sent) < u64::from(timeout_ms) {
                return;
            }
            // Not waited for any longer; it is still taken when it comes.
            self.unanswered |= self.is_running();
            self.failures = self.failures.saturating_add(1);
            self.call = CallState::Scheduled(self.spaced(now));
            if let Phase::Sending {
                returned: Some(returned), ..
            } = self.phase
            {
                self.resume(returned, now);
            }
        }
        match self.phase {
            Phase::Done(_) => return,
            // Its own timer has ended it.
            Phase::Replaced if self.runs_until() <= now => return self.finish(FinishReason::Replaced, out),
            Phase::Cancelling { until } if until <= now => return self.finish(FinishReason::Replaced, out),
            Phase::Sending { cause, until, .. } if until <= now => return self.finish(FinishReason::NotSent(cause), out),
            Phase::AwaitingJoin if self.deadline() <= now => return self.wait_over(around, out),
            // Nothing more is tried, but as long as it may run it is there to be sent or replaced.
            Phase::Active if self.deadline() <= now && self.runs_until() > now => {
                self.call = CallState::Idle;
                return;
            }
            Phase::Active if self.deadline() <= now => {
                let reason = if around.sfu_silent {
                    FinishReason::SfuSilent
                } else {
                    FinishReason::GivenUp
                };
                return self.finish(reason, out);
            }
            Phase::Replaced | Phase::Sending { .. } | Phase::Cancelling { .. } | Phase::AwaitingJoin | Phase::Active => {}
        }
        match self.call {
            CallState::Scheduled(at) if at <= now && !(around.sfu_silent && self.is_running()) => self.call = CallState::Queued,
            CallState::Queued if around.sfu_silent && self.is_running() => self.call = CallState::Scheduled(now),
            CallState::Scheduled(_) | CallState::Queued | CallState::Idle | CallState::InFlight(..) => {}
        }
    }

    /// The evidence is old: the SFU is asked again before the leave is sent.
    fn on_stale(&mut self, out: &mut Vec<Output>) {
        if let Phase::Sending { evidence, .. } = &mut self.phase {
            *evidence = None;
            self.call = CallState::Idle;
            out.push(Output::Confirm);
        }
    }

    /// Ends a wait in which the participant did not come within one delay after the last restart (L2b).
    fn wait_over(&mut self, around: &Around<'_>, out: &mut Vec<Output>) {
        let now = around.now;
        let asked_in_vain = around.last_no.is_none_or(|asked| now.since(asked) > LONG_WAIT_MS);
        if asked_in_vain && now.since(self.delegated) > LONG_WAIT_MS {
            return self.finish(FinishReason::NeverJoined, out);
        }
        let evidence = around.last_no.filter(|&asked| now.since(asked) < FRESH_MS);
        self.send(DepartureCause::NeverJoined, evidence, now);
        if evidence.is_none() {
            out.push(Output::Confirm);
        }
    }

    fn finish(&mut self, reason: FinishReason, out: &mut Vec<Output>) {
        self.phase = Phase::Done(reason);
        self.call = CallState::Idle;
        out.push(Output::Done(reason));
    }

    fn restart_now(&mut self, now: Time) {
        if !matches!(self.call, CallState::InFlight(..)) {
            self.call = CallState::Scheduled(self.spaced(now));
        }
    }

    fn restart_while_waiting(&self) -> CallState {
        let at = self.spaced(self.counted_from.after(self.delay.as_millis() / 2));
        if self.delay.as_millis() >= RESTARTED_WHILE_WAITING_MS && at <= self.delegated.after(SLOW_ICE_MS) {
            CallState::Scheduled(at)
        } else {
            CallState::Idle
        }
    }

    const fn is_running(&self) -> bool {
        matches!(self.phase, Phase::AwaitingJoin | Phase::Active)
    }

    /// Half of the delay after the last restart was sent, up to a tenth of it earlier.
    fn half(&self, jitter: &mut Jitter) -> Time {
        let half = self.delay.as_millis() / 2;
        self.counted_from.after(half - jitter.up_to(half / 10))
    }

    /// Until when a restart may wait while its homeserver limits (L4a), or where another process restarts the event, too.
    pub const fn relaxed(&self) -> Time {
        self.counted_from.after(self.delay.as_millis() / 5 * 4)
    }

    fn spaced(&self, at: Time) -> Time {
        self.last_started.map_or(at, |started| at.max(started.after(MIN_PAUSE_MS)))
    }
}

#[cfg(test)]
mod tests;
