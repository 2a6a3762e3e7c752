//! What a job makes of the SFU's reports and answers: doubts are raised, confirmed and laid to rest here (L2 to L3, L13).

use super::{Action, Cause, Doubt, Errand, Event, LeaveReason, Machine, Participant, Reason, Sfu, State, Step, Verdict};
use crate::backoff::{Jitter, LEAST_PAUSE, Schedule};
use crate::time::Time;
use std::sync::Arc;

/// A departure reported with a reason that is usually final: when to ask, and when to stop waiting for answers (L2a).
const FIRST_QUESTION: u64 = 800;
const SECOND_QUESTION: u64 = 1_500;
const BELIEVED: u64 = 1_950;
/// A departure reported with a reason that people come back from (L2a), and the pause between two noes (L3).
const SECOND_THOUGHT: u64 = 3_000;
/// An aborted attempt of somebody who was only ever present: asked again when the sweep would.
const NEXT_ATTEMPT: u64 = 30_000;
/// What the participants of a lost room have to come back, in time of an answering SFU (L13).
const LOST_GRACE: u32 = 60_000;
/// Reports of a departure from before the delegation, allowing for so much, change nothing (L2).
const OLD_NEWS: u64 = 2_000;

impl Machine {
    // --- what the SFU tells by itself ---

    pub(super) fn joined(&mut self, event: Event<'_>, now: Time, actions: &mut Vec<Action>) {
        if !self.session.first_time(event.id) || event.sid.is_empty() {
            return;
        }
        if self.session.is(event.sid) {
            // Told late, it says nothing against a departure that was told or found since.
            let stale = match &self.state {
                State::Doubted {
                    why: Doubt::Reported | Doubt::Suspected { .. },
                    ..
                }
                | State::Leaving { .. } => true,
                State::Doubted { since, .. } => event.happened < *since,
                State::Waiting => self.session.has_left(),
                State::Connected | State::Finished(_) => false,
            };
            if stale {
                return;
            }
        } else if !self.session.is_older_than(event.joined_at_ms) {
            return;
        }
        self.sighted(
            Participant {
                sid: event.sid,
                joined_at_ms: event.joined_at_ms,
                active: true,
            },
            event.room_sid,
            now,
            actions,
        );
    }

    pub(super) fn left(&mut self, event: Event<'_>, reason: LeaveReason, now: Time, actions: &mut Vec<Action>) {
        if !self.session.first_time(event.id) || self.is_old_news(event) {
            return;
        }
        if !self.session.is(event.sid) {
            if event.sid.is_empty()
                || (self.session.is_known() && (event.joined_at_ms == 0 || !self.session.is_older_than(event.joined_at_ms)))
            {
                return;
            }
            if let State::Leaving { .. } = self.state {
                return;
            }
            let participant = Participant {
                sid: event.sid,
                joined_at_ms: event.joined_at_ms,
                active: true,
            };
            self.session.sighted(participant, event.room_sid, now);
            actions.push(Action::Persist);
        }
        self.session.see();
        self.reported(event, reason, now);
    }

    pub(super) fn aborted(&mut self, event: Event<'_>, reason: LeaveReason, now: Time, actions: &mut Vec<Action>) {
        if !self.session.first_time(event.id) || self.is_old_news(event) {
            return;
        }
        match &self.state {
            State::Waiting => {
                if reason == LeaveReason::JoinFailure && !self.session.is_known() {
                    self.finish(Reason::JoinFailed, actions);
                }
            }
            State::Connected | State::Doubted { .. } => {
                if !self.session.is(event.sid) {
                    return;
                }
                if self.session.is_seen() {
                    self.reported(event, reason, now);
                } else if matches!(self.state, State::Connected) {
                    let pause = if self.session.was_seen() { SECOND_THOUGHT } else { NEXT_ATTEMPT };
                    self.suspect(now, now.after(pause), false);
                }
            }
            State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    pub(super) fn is_old_news(&self, event: Event<'_>) -> bool {
        event.happened.after(OLD_NEWS) < self.delegated
    }

    pub(super) fn reported(&mut self, event: Event<'_>, reason: LeaveReason, now: Time) {
        match &mut self.state {
            State::Waiting if self.session.has_left() => return,
            State::Leaving {
                errand: Errand::Send { returned },
                ..
            } => {
                *returned = false;
                return;
            }
            State::Doubted { why: Doubt::Reported, .. } | State::Leaving { .. } | State::Finished(_) => return,
            State::Waiting | State::Connected | State::Doubted { .. } => {}
        }
        self.session.leave();
        // `createdAt` is cut to whole seconds: counted from it alone, the questions would come up to a second early.
        let base = event.happened.after(1_000).min(now);
        if reason.is_usually_final() {
            let second = base.after(SECOND_QUESTION);
            let (from, until) = if second <= now {
                (now, now.after(super::QUICK_ANSWER + 50))
            } else {
                (second, base.after(BELIEVED))
            };
            self.state = State::Doubted {
                why: Doubt::Reported,
                since: now,
                from,
                until: Some(until),
            };
            self.look_at = Some(base.after(FIRST_QUESTION).max(now).min(from));
            self.looks = 0;
        } else {
            match &self.state {
                State::Waiting => {
                    self.start_restarts(now);
                    self.suspect(now, base.after(SECOND_THOUGHT).max(now), false);
                }
                State::Connected => self.suspect(now, base.after(SECOND_THOUGHT).max(now), false),
                State::Doubted { .. } | State::Leaving { .. } | State::Finished(_) => {}
            }
        }
    }

    // --- what the SFU answers ---

    pub(super) fn present(
        &mut self,
        participant: Participant<'_>,
        asked: Time,
        room_sid: Option<&Arc<str>>,
        now: Time,
        jitter: &mut Jitter,
        actions: &mut Vec<Action>,
    ) {
        let same = participant.sid.is_empty() || self.session.is(participant.sid);
        if !same && self.session.is_overtaken(participant.joined_at_ms, asked) {
            return;
        }
        if same {
            match &self.state {
                State::Doubted { why: Doubt::Reported, .. } => return self.absent(asked, now, jitter, actions),
                State::Doubted {
                    why: Doubt::Suspected { .. },
                    from,
                    ..
                } if asked < *from => return,
                State::Doubted { since, .. } if asked < *since => return,
                State::Leaving { .. } | State::Finished(_) => return,
                State::Waiting if self.session.has_left() && !participant.sid.is_empty() => return self.unclear(asked, now, jitter),
                State::Waiting | State::Connected | State::Doubted { .. } => {}
            }
        }
        self.sighted(participant, room_sid, now, actions);
    }

    pub(super) fn absent(&mut self, asked: Time, now: Time, jitter: &mut Jitter, actions: &mut Vec<Action>) {
        if self.session.is_sighted_after(asked) {
            return;
        }
        match &mut self.state {
            State::Waiting => {
                self.last_no = Some(now);
                self.look_again(now, jitter);
            }
            State::Connected => self.doubt_absent(now, false),
            State::Doubted { why, since, from, until } => match why {
                Doubt::Reported if asked >= *from => self.leave(Cause::Reported, now),
                Doubt::Suspected { room_over } if asked >= *from => {
                    let room_over = *room_over;
                    self.doubt_absent(now, room_over);
                }
                Doubt::Absent { room_over: true } if asked >= *from => self.leave(Cause::RoomOver, now),
                Doubt::Absent { room_over: false } if asked >= *from => {
                    *why = Doubt::Unplaced;
                    *since = now;
                    *until = None;
                    actions.push(Action::JudgeRoom);
                }
                Doubt::Overdue if asked >= *since => self.leave(Cause::RoomLost, now),
                Doubt::Absent { .. } | Doubt::Suspected { .. } | Doubt::Overdue => {
                    self.look_at = self.look_at.or_else(|| Some((*from).max(now)));
                }
                Doubt::Reported | Doubt::Unplaced | Doubt::Lost { .. } => {}
            },
            State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    pub(super) fn unclear(&mut self, asked: Time, now: Time, jitter: &mut Jitter) {
        match &self.state {
            State::Waiting => self.look_again(now, jitter),
            State::Doubted { why, from, .. } => match why {
                Doubt::Reported => {
                    if asked >= *from {
                        self.leave(Cause::Reported, now);
                    }
                }
                Doubt::Suspected { .. } | Doubt::Absent { .. } | Doubt::Overdue => {
                    if self.look_at.is_none() {
                        self.look_again(now, jitter);
                    }
                }
                Doubt::Unplaced | Doubt::Lost { .. } => {}
            },
            State::Connected | State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    pub(super) fn ask(&mut self, now: Time) {
        match &self.state {
            State::Connected
            | State::Doubted {
                why: Doubt::Lost { .. }, ..
            } => self.look_at = Some(now),
            State::Doubted { .. } | State::Waiting | State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    /// Present or joined: whatever was feared did not happen.
    pub(super) fn sighted(&mut self, participant: Participant<'_>, room_sid: Option<&Arc<str>>, now: Time, actions: &mut Vec<Action>) {
        if self.session.sighted(participant, room_sid, now) {
            actions.push(Action::Persist);
        }
        match &mut self.state {
            State::Waiting => self.start_restarts(now),
            State::Connected | State::Doubted { .. } => {
                // A stopping service has made its last restart, or is about to (L12).
                if self.restart == Step::Idle && !self.stopping {
                    self.start_restarts(now);
                }
            }
            State::Leaving {
                errand: Errand::Send { returned },
                step,
                ..
            } => {
                if matches!(step, Step::InFlight(_)) {
                    *returned = true;
                    return;
                }
                self.start_restarts(now);
            }
            State::Leaving {
                errand: Errand::Cancel, ..
            }
            | State::Finished(_) => return,
        }
        self.connect();
    }

    pub(super) fn connect(&mut self) {
        self.state = State::Connected;
        self.look_at = None;
        self.looks = 0;
    }

    pub(super) fn suspect(&mut self, now: Time, first: Time, room_over: bool) {
        self.state = State::Doubted {
            why: Doubt::Suspected { room_over },
            since: now,
            from: first,
            until: None,
        };
        self.look_at = Some(first);
        self.looks = 0;
    }

    pub(super) fn doubt_absent(&mut self, now: Time, room_over: bool) {
        let second = now.after(SECOND_THOUGHT);
        self.state = State::Doubted {
            why: Doubt::Absent { room_over },
            since: now,
            from: second,
            until: None,
        };
        self.look_at = Some(second);
        self.looks = 0;
    }

    pub(super) fn look_again(&mut self, now: Time, jitter: &mut Jitter) {
        self.looks = self.looks.saturating_add(1);
        // A short delay has no room for long pauses, and the end of a wait none at all: whoever comes late must not be taken for absent.
        let dense = (self.delay().as_millis() / 6).max(1_000);
        let closer = (self.deadline().since(now) / 2).max(LEAST_PAUSE).min(dense);
        self.look_at = Some(now.after(Schedule::PARTICIPANT.pause(self.looks, jitter).min(closer)));
    }

    // --- what is known of the room and of the SFU ---

    pub(super) fn judged(&mut self, asked: Time, verdict: Verdict, now: Time) {
        match &mut self.state {
            State::Connected => match verdict {
                Verdict::Stands => {}
                Verdict::Ended => self.suspect(now, now, true),
                Verdict::Lost => self.lose_room(now),
            },
            State::Doubted { why, since, .. } => match (why, verdict) {
                (Doubt::Unplaced, Verdict::Stands) => {
                    if asked >= *since {
                        self.leave(Cause::Absent, now);
                    }
                }
                (Doubt::Unplaced, Verdict::Ended) => self.leave(Cause::RoomOver, now),
                (Doubt::Suspected { room_over } | Doubt::Absent { room_over }, Verdict::Ended) => *room_over = true,
                (Doubt::Suspected { .. } | Doubt::Absent { .. } | Doubt::Unplaced, Verdict::Lost) => self.lose_room(now),
                (Doubt::Suspected { .. } | Doubt::Absent { .. }, Verdict::Stands)
                | (Doubt::Reported | Doubt::Lost { .. } | Doubt::Overdue, Verdict::Stands | Verdict::Ended | Verdict::Lost) => {}
            },
            State::Waiting | State::Leaving { .. } | State::Finished(_) => {}
        }
    }

    pub(super) fn lose_room(&mut self, now: Time) {
        let until = (self.sfu == Sfu::Answering).then(|| now.after(u64::from(LOST_GRACE)));
        self.state = State::Doubted {
            why: Doubt::Lost { left: LOST_GRACE },
            since: now,
            from: now,
            until,
        };
        self.look_at = None;
        self.looks = 0;
    }

    pub(super) fn sfu(&mut self, sfu: Sfu, now: Time) {
        if sfu == self.sfu {
            return;
        }
        self.sfu = sfu;
        if let State::Doubted {
            why: Doubt::Lost { left },
            until,
            ..
        } = &mut self.state
        {
            if let Some(end) = until {
                *left = u32::try_from(end.since(now)).unwrap_or(*left);
            }
            *until = (sfu == Sfu::Answering).then(|| now.after(u64::from(*left)));
        }
        if sfu == Sfu::Silent && self.restart == Step::Wanted {
            self.restart = Step::At(now);
        }
    }
}
