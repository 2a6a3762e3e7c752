//! One delegated leave as a value: facts in, actions out. It promises that a participant who is gone is reported and that one who is
//! there is not (L1); the rules are those of the decisions L2 to L6, L12, L13 (judging), L13a and L14.
//!
//! It knows no other job, no room beyond the verdict it is given, and no queue: that it wants to call its homeserver is a [`Wish`],
//! and it calls when it is given its [`Input::Turn`].
//!
//! ```text
//!            present or joined                     reported gone, denied by the SFU, room lost or ended
//!  Waiting ───────────────────▶ Connected ───────────────────────────────────────────▶ Doubted(why, until)
//!   │  │                        ▲  ▲  │                                                 │      │
//!   │  │ left                   │  └──┼─────────── seen again, or by another sid ───────┘      │ believed
//!   │  └────────────────────────┼─────┼──────▶ Doubted(Reported)                              ▼
//!   │ one delay without a sign  │     │                                                    Leaving
//!   ├───────────────────────────┼─────┼─────────────────────────────────────────────────▶  │   │
//!   │                           └─────┼──── came back before the leave was on its way ─────┘   │
//!   ▼                                 ▼                                                        ▼
//!  Finished(never came)        Finished(gone, refused, given up)              Finished(sent, not sent, replaced)
//!
//!  Doubted:  Reported ── second question ──▶ leave          Suspected ── no ──▶ Absent ── no, 3 s later ──▶ Unplaced
//!            Unplaced ── room stands or ended ──▶ leave     Unplaced ── room lost ──▶ Lost ── 60 s of the SFU ──▶ Overdue ── no ──▶ leave
//! ```
//!
//! Restarts go on in all states but the last two. Replaced by another delegation, a job leaves by cancelling its event.

use crate::backoff::{Jitter, LEAST_PAUSE};

use crate::time::{Delay, Time};
use std::time::Duration;

#[cfg(test)]
mod tests;

mod calls;
mod inputs;
mod session;
mod sfu;
mod state;

pub use crate::delayed_event::Outcome;
pub use inputs::{Action, Answer, Event, Input, LeaveReason, Participant, Sfu, Verdict};
pub use session::Session;
pub use state::{Cause, Doubt, Errand, Reason, State, Step, Wish};

/// Shorter delays are not restarted before somebody is seen (L2b).
const RESTARTED_WHILE_WAITING: u64 = 5_000;
/// For how long after the delegation the event of somebody who has not come is restarted (L2b).
const SLOW_ICE: u64 = 60_000;
/// A wait longer than this ends with a send only after a clear no within as much (L2b).
const LONG_WAIT: u64 = 60_000;
/// How long an answer may take while a reported departure is checked (L2a).
const QUICK_ANSWER: u64 = 400;
/// The bounds of the window in which a leave is sent (L5).
const SEND_AT_LEAST: u64 = 30_000;
const SEND_AT_MOST: u64 = 3_600_000;
/// How long an ordinary question to the SFU may take (T6).
const ANSWER: u64 = 5_000;

/// One job.
#[derive(Clone, Debug)]
pub struct Machine {
    delay: Delay,
    delegated: Time,
    /// The last answer that says the event runs anew: the homeserver is given up one delay after it.
    answered: Time,
    /// When that restart was sent: the next one is counted from here.
    counted_from: Time,
    restart: Step,
    restart_started: Option<Time>,
    failures: u8,
    look_at: Option<Time>,
    looking: bool,
    looks: u8,
    last_no: Option<Time>,
    sfu: Sfu,
    stopping: bool,
    session: Session,
    state: State,
}

impl Machine {
    /// The job of a delegation that arrived at `arrived`.
    #[must_use]
    pub fn new(delay: Delay, arrived: Time, sfu: Sfu) -> Self {
        let mut machine = Self {
            delay,
            delegated: arrived,
            answered: arrived,
            counted_from: arrived,
            restart: Step::Idle,
            restart_started: None,
            failures: 0,
            look_at: Some(arrived),
            looking: false,
            looks: 0,
            last_no: None,
            sfu,
            stopping: false,
            session: Session::default(),
            state: State::Waiting,
        };
        machine.restart = machine.restart_while_waiting();
        machine
    }

    /// The job that takes the place of this one: what is known of the participant stays known (L2). Whoever was there is there; a
    /// client that delegates anew after it was reported gone is about to come, and is waited for.
    #[must_use]
    pub fn successor(&self, delay: Delay, arrived: Time) -> Self {
        let mut next = Self::new(delay, arrived, self.sfu);
        next.session = self.session.clone();
        next.stopping = self.stopping;
        match &self.state {
            State::Waiting | State::Leaving { .. } | State::Finished(_) => {}
            State::Connected => {
                next.state = State::Connected;
                next.look_at = None;
                next.restart = Step::At(arrived);
            }
            State::Doubted { why, since, from, until } => match why {
                Doubt::Reported => {}
                Doubt::Suspected { .. } | Doubt::Absent { .. } | Doubt::Unplaced | Doubt::Lost { .. } | Doubt::Overdue => {
                    next.state = State::Doubted {
                        why: *why,
                        since: *since,
                        from: *from,
                        until: *until,
                    };
                    next.look_at = if matches!(why, Doubt::Lost { .. }) {
                        None
                    } else {
                        self.look_at.or_else(|| Some((*from).max(arrived)))
                    };
                    next.restart = Step::At(arrived);
                    if matches!(why, Doubt::Unplaced) {
                        next.suspect(*since, arrived, false);
                    }
                }
            },
        }
        next
    }

    /// A job read from the store, with the time that is left of it (L11). `restarted` is when its event last began to run.
    #[must_use]
    pub fn restored(delay: Delay, delegated: Option<Time>, restarted: Time, session: Session, now: Time, sfu: Sfu) -> Self {
        let mut machine = Self::new(delay, delegated.unwrap_or(restarted).min(restarted), sfu);
        machine.answered = restarted;
        machine.counted_from = restarted;
        if session.was_seen() {
            machine.state = State::Connected;
            machine.look_at = None;
            machine.restart = Step::At(machine.half(&mut Jitter::new(restarted.as_millis())).max(now));
        } else {
            machine.look_at = Some(now);
            machine.restart = machine.restart_while_waiting();
        }
        machine.session = session;
        machine
    }

    /// Takes a fact, and says what is to be done about it.
    #[must_use]
    pub fn step(&mut self, input: Input<'_>, now: Time, jitter: &mut Jitter) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.state, State::Finished(_)) {
            return actions;
        }
        self.take(input, now, jitter, &mut actions);
        self.settle(now, &mut actions);
        actions
    }

    /// When [`Input::Time`] is due next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let state = match &self.state {
            State::Finished(_) => return None,
            State::Leaving { step, until, .. } => {
                return match step {
                    Step::At(at) => Some((*at).min(*until)),
                    Step::Wanted => Some(*until),
                    Step::Idle | Step::InFlight(_) => None,
                };
            }
            State::Doubted { until, .. } => *until,
            State::Waiting | State::Connected => None,
        };
        let restart = match self.restart {
            Step::At(at) if self.sfu != Sfu::Silent => Some(at),
            Step::At(_) | Step::Idle | Step::Wanted | Step::InFlight(_) => None,
        };
        let given_up = (!matches!(self.restart, Step::InFlight(_))).then(|| self.deadline());
        let look = self.look_at.filter(|_| !self.looking || self.asks_quickly());
        [state, restart, given_up, look].into_iter().flatten().min()
    }

    /// Which call to its homeserver the job wants to make, if any. It makes it on [`Input::Turn`].
    #[must_use]
    pub fn wish(&self) -> Option<Wish> {
        match &self.state {
            State::Finished(_) => None,
            State::Leaving { errand, step, until, .. } => match (step, errand) {
                (Step::Wanted, Errand::Send { .. }) => Some(Wish::Send { until: *until }),
                (Step::Wanted, Errand::Cancel) => Some(Wish::Cancel { until: *until }),
                (Step::Idle | Step::At(_) | Step::InFlight(_), Errand::Send { .. } | Errand::Cancel) => None,
            },
            State::Waiting | State::Connected | State::Doubted { .. } => (self.restart == Step::Wanted).then(|| Wish::Restart {
                until: self.deadline(),
                relaxed: self.relaxed(),
            }),
        }
    }

    /// Where the job stands.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What is known of the participant.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The delay of the event.
    #[must_use]
    pub fn delay(&self) -> Delay {
        self.delay
    }

    /// When the delegation arrived.
    #[must_use]
    pub fn delegated(&self) -> Time {
        self.delegated
    }

    /// When the event last began to run: what a store calls `RestartedAt`.
    #[must_use]
    pub fn restarted(&self) -> Time {
        self.answered
    }

    /// When the homeserver sends the leave by itself, as far as we know.
    #[must_use]
    pub fn deadline(&self) -> Time {
        self.answered.after(self.delay.as_millis())
    }

    /// Whether the sweeps ask for this participant: somebody is thought to be there, or to come back.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        match &self.state {
            State::Connected | State::Doubted { .. } => true,
            State::Waiting | State::Leaving { .. } | State::Finished(_) => false,
        }
    }

    /// Whether the verdict on its room is awaited.
    #[must_use]
    pub fn is_unplaced(&self) -> bool {
        matches!(self.state, State::Doubted { why: Doubt::Unplaced, .. })
    }

    /// Whether a stopping service has nothing more to do here (L12).
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        let leaving = match &self.state {
            State::Doubted { why: Doubt::Reported, .. } | State::Leaving { .. } => true,
            State::Doubted { .. } | State::Waiting | State::Connected | State::Finished(_) => false,
        };
        !leaving && matches!(self.restart, Step::Idle)
    }

    fn take(&mut self, input: Input<'_>, now: Time, jitter: &mut Jitter, actions: &mut Vec<Action>) {
        match input {
            Input::Joined(event) => self.joined(event, now, actions),
            Input::Left(event, reason) => self.left(event, reason, now, actions),
            Input::Aborted(event, reason) => self.aborted(event, reason, now, actions),
            Input::LookedUp { asked, answer, room_sid } => {
                self.looking = false;
                match answer {
                    Answer::Present(participant) => self.present(participant, asked, room_sid, now, jitter, actions),
                    Answer::Absent => self.absent(asked, now, jitter, actions),
                    Answer::Unclear => self.unclear(asked, now, jitter),
                }
            }
            Input::Listed {
                asked,
                participant,
                room_sid,
            } => self.present(participant, asked, room_sid, now, jitter, actions),
            Input::Ask => self.ask(now),
            Input::Room { asked, verdict } => self.judged(asked, verdict, now),
            Input::Sfu(sfu) => self.sfu(sfu, now),
            Input::Turn => self.turn(now, actions),
            Input::Restarted(outcome) => self.restarted_with(outcome, now, jitter, actions),
            Input::Sent(outcome) => self.sent_with(outcome, now, jitter, actions),
            Input::Cancelled(outcome) => self.cancelled_with(outcome, now, jitter, actions),
            Input::Renewed { delay, arrived } => self.renewed(delay, arrived, now, actions),
            Input::Replaced => self.replaced(),
            Input::Stopping => self.stop(now),
            Input::Time => {}
        }
    }

    // --- time ---

    fn settle(&mut self, now: Time, actions: &mut Vec<Action>) {
        if let State::Doubted {
            why, until: Some(until), ..
        } = &self.state
            && *until <= now
        {
            match why {
                Doubt::Reported => self.leave(Cause::Reported, now),
                Doubt::Lost { .. } => {
                    self.state = State::Doubted {
                        why: Doubt::Overdue,
                        since: now,
                        from: now,
                        until: None,
                    };
                    self.look_at = Some(now);
                }
                Doubt::Suspected { .. } | Doubt::Absent { .. } | Doubt::Unplaced | Doubt::Overdue => {}
            }
        }
        match &mut self.state {
            State::Finished(_) => return,
            State::Leaving {
                errand,
                cause,
                step,
                until,
                ..
            } => {
                if matches!(step, Step::InFlight(_)) {
                    return;
                }
                if let Step::At(at) = step
                    && *at <= now
                {
                    *step = Step::Wanted;
                }
                if *until <= now {
                    let reason = match errand {
                        Errand::Send { .. } => Reason::NotSent(*cause),
                        Errand::Cancel => Reason::Replaced,
                    };
                    self.finish(reason, actions);
                }
                return;
            }
            State::Waiting | State::Connected | State::Doubted { .. } => {}
        }
        if now >= self.deadline() && !matches!(self.restart, Step::InFlight(_)) {
            return self.give_up(now, actions);
        }
        if let Some(at) = self.look_at
            && at <= now
            && (!self.looking || self.asks_quickly())
        {
            self.look_at = None;
            self.looking = true;
            let within = match &self.state {
                State::Doubted { why: Doubt::Reported, .. } => QUICK_ANSWER,
                // One question that hangs must not take up the end of the wait.
                State::Waiting => (self.deadline().since(now) / 2).clamp(QUICK_ANSWER, ANSWER),
                State::Connected | State::Doubted { .. } | State::Leaving { .. } | State::Finished(_) => ANSWER,
            };
            let within = Duration::from_millis(within);
            if let State::Doubted {
                why: Doubt::Reported,
                from,
                ..
            } = &self.state
                && now < *from
            {
                self.look_at = Some(*from);
            }
            actions.push(Action::LookUp { within });
        }
        if let Step::At(at) = self.restart
            && at <= now
            && self.sfu != Sfu::Silent
        {
            self.restart = Step::Wanted;
        }
    }

    /// The event has run out at the homeserver.
    fn give_up(&mut self, now: Time, actions: &mut Vec<Action>) {
        match &self.state {
            State::Waiting => {
                let asked_in_vain = self.last_no.is_none_or(|no| now.since(no) > LONG_WAIT);
                if now.since(self.delegated) > LONG_WAIT && asked_in_vain {
                    self.finish(Reason::NeverCame, actions);
                } else {
                    self.leave(Cause::NeverCame, now);
                }
            }
            State::Connected | State::Doubted { .. } => {
                let reason = if self.sfu == Sfu::Silent {
                    Reason::SfuSilent
                } else {
                    Reason::GivenUp
                };
                self.finish(reason, actions);
            }
            State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    fn leave(&mut self, cause: Cause, now: Time) {
        self.drop_restart();
        self.look_at = None;
        self.state = State::Leaving {
            errand: Errand::Send { returned: false },
            cause,
            step: Step::Wanted,
            until: self.deadline().clamp(now.after(SEND_AT_LEAST), now.after(SEND_AT_MOST)),
            once: cause == Cause::NeverCame,
            failures: 0,
        };
    }

    fn finish(&mut self, reason: Reason, actions: &mut Vec<Action>) {
        self.state = State::Finished(reason);
        self.restart = Step::Idle;
        self.look_at = None;
        actions.push(Action::Finish(reason));
    }

    /// A restart at once, for somebody who was waited for.
    fn start_restarts(&mut self, now: Time) {
        self.failures = 0;
        self.want_restart(now);
    }

    fn want_restart(&mut self, now: Time) {
        if !matches!(self.restart, Step::InFlight(_)) {
            self.restart = Step::At(self.spaced(now));
        }
    }

    fn drop_restart(&mut self) {
        if !matches!(self.restart, Step::InFlight(_)) {
            self.restart = Step::Idle;
        }
    }

    fn restart_while_waiting(&self) -> Step {
        let at = self.spaced(self.counted_from.after(self.delay.as_millis() / 2));
        let wanted = self.delay.as_millis() >= RESTARTED_WHILE_WAITING && at <= self.delegated.after(SLOW_ICE) && !self.stopping;
        if wanted { Step::At(at) } else { Step::Idle }
    }

    /// Half of the delay after the last restart was sent, up to a tenth of it earlier.
    fn half(&self, jitter: &mut Jitter) -> Time {
        let half = self.delay.as_millis() / 2;
        self.counted_from.after(half - jitter.up_to(half / 10))
    }

    /// Where a restart moves while its homeserver limits (L4a).
    fn relaxed(&self) -> Time {
        self.counted_from.after(self.delay.as_millis() / 5 * 4)
    }

    fn spaced(&self, at: Time) -> Time {
        self.restart_started.map_or(at, |started| at.max(started.after(LEAST_PAUSE)))
    }

    fn asks_quickly(&self) -> bool {
        matches!(self.state, State::Doubted { why: Doubt::Reported, .. })
    }
}
