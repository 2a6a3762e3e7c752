//! What a job makes of its turns, of the homeserver's answers (L4 to L6), and of what happens to its delegation (L12, L14).

use std::time::Duration;

use super::{Action, Cause, Doubt, Errand, Machine, Outcome, Reason, Sfu, State, Step};
use crate::backoff::{Jitter, LEAST_PAUSE, Schedule};
use crate::time::{Delay, Time};

/// A hint moves a restart by no more than this.
const LONGEST_HINT: Duration = Duration::from_secs(60);

impl Machine {
    // --- calls to the homeserver ---

    pub(super) fn turn(&mut self, now: Time, actions: &mut Vec<Action>) {
        match &mut self.state {
            State::Leaving { errand, step, until, .. } => {
                if *step == Step::Wanted && now < *until {
                    *step = Step::InFlight(now);
                    actions.push(match errand {
                        Errand::Send { .. } => Action::Send,
                        Errand::Cancel => Action::Cancel,
                    });
                }
            }
            State::Waiting | State::Connected | State::Doubted { .. } => {
                if self.restart != Step::Wanted || now >= self.deadline() {
                    return;
                }
                let spaced = self.spaced(now);
                if spaced > now {
                    self.restart = Step::At(spaced);
                    return;
                }
                self.restart = Step::InFlight(now);
                self.restart_started = Some(now);
                actions.push(Action::Restart);
            }
            State::Finished(_) => {}
        }
    }

    pub(super) fn restarted_with(&mut self, outcome: Outcome, now: Time, jitter: &mut Jitter, actions: &mut Vec<Action>) {
        let Step::InFlight(started) = self.restart else { return };
        self.restart = Step::Idle;
        if outcome == Outcome::Done {
            self.answered = now;
            self.counted_from = started;
            self.failures = 0;
            actions.push(Action::Persist);
        }
        let deadline = self.deadline();
        if let State::Leaving { errand, until, .. } = &mut self.state {
            if *errand == Errand::Cancel {
                *until = (*until).max(deadline);
            }
            return;
        }
        match outcome {
            Outcome::Done => {
                self.restart = if self.stopping {
                    Step::Idle
                } else if matches!(self.state, State::Waiting) {
                    self.restart_while_waiting()
                } else {
                    Step::At(self.spaced(self.half(jitter)).max(now))
                };
            }
            Outcome::NotFound | Outcome::Conflict => self.finish(Reason::EventGone, actions),
            Outcome::Forbidden => self.finish(Reason::Refused, actions),
            // The pause is the homeserver's, kept by the queue: the job stays in line (L4a).
            Outcome::Limited(_) => self.restart = Step::At(self.spaced(now)),
            Outcome::Transient(hint) => {
                self.failures = self.failures.saturating_add(1);
                // What a server says about when to come back does not cost a living event.
                let third = Duration::from_millis(self.deadline().since(now) / 3);
                let hint = hint.map(|hint| hint.min(third).min(LONGEST_HINT));
                let next = Schedule::RESTART.next_try(self.failures, hint, now, self.deadline(), jitter);
                self.restart = next.map_or(Step::Idle, Step::At);
            }
        }
    }

    pub(super) fn sent_with(&mut self, outcome: Outcome, now: Time, jitter: &mut Jitter, actions: &mut Vec<Action>) {
        let State::Leaving {
            errand,
            cause,
            step,
            until,
            once,
            failures,
        } = &mut self.state
        else {
            return;
        };
        let returned = match errand {
            Errand::Cancel => {
                if matches!(outcome, Outcome::Done | Outcome::NotFound | Outcome::Conflict) {
                    self.finish(Reason::Replaced, actions);
                }
                return;
            }
            Errand::Send { returned } => *returned,
        };
        if !matches!(step, Step::InFlight(_)) {
            return;
        }
        let (cause, once) = (*cause, *once);
        match outcome {
            Outcome::Done | Outcome::NotFound | Outcome::Conflict => self.finish(Reason::Sent(cause), actions),
            Outcome::Forbidden => self.finish(Reason::Refused, actions),
            Outcome::Limited(_) | Outcome::Transient(_) if returned => {
                self.connect();
                self.start_restarts(now);
            }
            Outcome::Limited(_) | Outcome::Transient(_) if once => self.finish(Reason::NotSent(cause), actions),
            Outcome::Limited(_) => *step = Step::At(now.after(LEAST_PAUSE)),
            Outcome::Transient(hint) => {
                *failures = failures.saturating_add(1);
                match Schedule::SEND.next_try(*failures, hint, now, *until, jitter) {
                    Some(at) => *step = Step::At(at),
                    None => self.finish(Reason::NotSent(cause), actions),
                }
            }
        }
    }

    pub(super) fn cancelled_with(&mut self, outcome: Outcome, now: Time, jitter: &mut Jitter, actions: &mut Vec<Action>) {
        let State::Leaving {
            errand: Errand::Cancel,
            step,
            until,
            failures,
            ..
        } = &mut self.state
        else {
            return;
        };
        if !matches!(step, Step::InFlight(_)) {
            return;
        }
        match outcome {
            Outcome::Done | Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden => self.finish(Reason::Replaced, actions),
            Outcome::Limited(_) => *step = Step::At(now.after(LEAST_PAUSE)),
            Outcome::Transient(hint) => {
                *failures = failures.saturating_add(1);
                match Schedule::SEND.next_try(*failures, hint, now, *until, jitter) {
                    Some(at) => *step = Step::At(at),
                    None => self.finish(Reason::Replaced, actions),
                }
            }
        }
    }

    // --- what happens to the delegation itself ---

    pub(super) fn renewed(&mut self, delay: Delay, arrived: Time, now: Time, actions: &mut Vec<Action>) {
        self.delay = delay;
        self.delegated = self.delegated.max(arrived);
        self.answered = self.answered.max(arrived);
        actions.push(Action::Persist);
        match &mut self.state {
            State::Waiting => self.wait_anew(now),
            // Whoever asks after being reported gone is about to come back.
            State::Doubted {
                why: Doubt::Reported,
                since,
                ..
            } if arrived > *since => {
                self.wait_anew(now);
                self.want_restart(now);
            }
            State::Connected | State::Doubted { .. } => self.want_restart(now),
            State::Leaving {
                errand: Errand::Send { returned },
                step,
                ..
            } => {
                if matches!(step, Step::InFlight(_)) {
                    *returned = true;
                } else {
                    self.wait_anew(now);
                }
            }
            State::Leaving {
                errand: Errand::Cancel, ..
            }
            | State::Finished(_) => {}
        }
    }

    pub(super) fn wait_anew(&mut self, now: Time) {
        self.state = State::Waiting;
        self.look_at = Some(now);
        self.looks = 0;
        if !matches!(self.restart, Step::InFlight(_)) {
            self.restart = self.restart_while_waiting();
        }
    }

    pub(super) fn replaced(&mut self) {
        self.drop_restart();
        self.look_at = None;
        self.state = State::Leaving {
            errand: Errand::Cancel,
            cause: Cause::Replaced,
            step: Step::Wanted,
            until: self.deadline(),
            once: false,
            failures: 0,
        };
    }

    pub(super) fn stop(&mut self, now: Time) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        match &self.state {
            // While the SFU is silent nothing is restarted, and nothing is to be waited for.
            State::Connected | State::Doubted { .. } if self.sfu != Sfu::Silent => self.want_restart(now),
            State::Connected | State::Doubted { .. } | State::Waiting => self.drop_restart(),
            State::Leaving { .. } | State::Finished(_) => {}
        }
    }
}
