//! The order of delegations for one participant (decision L14): each has one current leave, and perhaps some that it replaces, whose
//! events must not outlive it. What counts is when a request arrived; what is replaced is cancelled only once the current one was
//! granted, and is the job again where that never was. Pure.

use super::leave::{Leave, Phase};
use super::{Delegated, FinishReason, Handover, Input, Job, LeaveId, Leaves, Output, Replaced};
use crate::presence::{DepartureEvidence, ParticipantId};
use crate::time::{Delay, Time};

impl Leaves {
    /// Takes a delegation that was admitted, for a participant who is thought to be there or not, and was seen at some time or not.
    pub fn delegate(&mut self, participant: ParticipantId, handover: &Handover<'_>, is_there: bool, seen: bool, now: Time) -> Delegated {
        let leave = Leave::new(handover.delay, handover.arrived, now);
        let Some((old, job)) = self.of(participant).and_then(|id| Some((id, self.jobs.get(id)?))) else {
            let id = self.install(participant, handover, leave, seen, now);
            self.step(id, Input::Time, now);
            self.tell(id, is_there, now);
            return Delegated::New(id);
        };
        if job.delay_id() == handover.delay_id {
            self.renew(old, handover.delay, handover.arrived, now);
            self.tell(old, is_there, now);
            return Delegated::Renewed(old);
        }
        let overtaken = job.leave.delegated() > handover.arrived;
        let is_same = |id: &LeaveId| self.jobs.get(*id).is_some_and(|job| job.delay_id() == handover.delay_id);
        let former = self.replaces(old).iter().copied().find(is_same);
        if overtaken {
            if former.is_none() {
                self.insert_behind(old, handover, leave, seen, now);
            }
            self.awaits(old);
            return Delegated::Overtaken;
        }
        let id = if let Some(id) = former {
            self.put_in_front(participant, id, now);
            self.renew(id, handover.delay, handover.arrived, now);
            id
        } else {
            self.install(participant, handover, leave, seen, now)
        };
        self.step(id, Input::Installed, now);
        self.tell(id, is_there, now);
        Delegated::New(id)
    }

    /// The current leave of a participant replaces these events, too: those that are not known yet.
    pub fn replaces_also(&mut self, participant: ParticipantId, handover: &Handover<'_>, replaced: &[Replaced<'_>], now: Time) {
        let Some(current) = self.of(participant) else { return };
        for replaced in replaced {
            let is_same = |job: &Job| job.delay_id() == replaced.delay_id;
            let is_known = self.replaced_jobs(current).chain(self.jobs.get(current)).any(is_same);
            let left = Delay::from_millis(replaced.until.since(now).min(Delay::MAX.as_millis()));
            let Some(delay) = left.filter(|_| !is_known) else { continue };
            let handover = Handover {
                delay_id: replaced.delay_id,
                ..*handover
            };
            let seen = self.jobs.get(current).is_some_and(|job| job.seen);
            self.insert_behind(current, &handover, Leave::new(delay, now, now), seen, now);
        }
    }

    /// A new leave that the current one replaces from the beginning.
    fn insert_behind(&mut self, current: LeaveId, handover: &Handover<'_>, leave: Leave, seen: bool, now: Time) {
        let Some(job) = self.jobs.get(current) else { return };
        let (participant, granted) = (job.participant, job.leave.was_granted());
        let id = self.insert(participant, handover, leave, seen, now);
        self.replaced.entry(participant).or_default().push(id);
        self.step(id, if granted { Input::Superseded } else { Input::Replaced }, now);
        self.sync(current, now);
        self.out.push(Output::Store(current));
    }

    /// The events that a leave replaces and that may still fire.
    pub fn replaced(&self, id: LeaveId) -> impl Iterator<Item = Replaced<'_>> {
        self.replaced_jobs(id).map(|job| Replaced {
            delay_id: job.delay_id(),
            until: job.leave.runs_until(),
        })
    }

    /// Finds an heir when the current leave is over: an event that the homeserver never granted may never have been, and gives its
    /// place and what was to be done back to the one before (L14); any other takes those that it replaces with it.
    pub(super) fn succeed(&mut self, over: &Job, reason: FinishReason, was: Phase, now: Time) {
        let participant = over.participant;
        let Some(left) = self.replaced.get(&participant) else { return };
        let never_was = !over.leave.was_granted() && !matches!(reason, FinishReason::Replaced | FinishReason::Kicked);
        let waiting = left.iter().filter_map(|&id| Some((self.jobs.get(id)?, id)));
        let youngest = waiting
            .filter(|(job, _)| never_was && job.leave.phase() == Phase::Replaced)
            .max_by_key(|(job, _)| job.leave.delegated())
            .map(|(_, id)| id);
        // Somebody has to be the current one until all are cancelled.
        let Some(heir) = youngest.or_else(|| left.last().copied()) else {
            return;
        };
        self.put_in_front(participant, heir, now);
        self.out.push(Output::Store(heir));
        if youngest.is_none() {
            for id in self.replaces(heir).to_vec().into_iter().chain([heir]) {
                self.step(id, Input::Superseded, now);
            }
            return;
        }
        self.step(heir, Input::Installed, now);
        self.tell(heir, over.is_there, now);
        if let Phase::Sending {
            cause,
            evidence,
            returned: None,
            ..
        } = was
        {
            let asked = evidence.unwrap_or(Time::EARLIEST);
            self.step(heir, Input::Gone(DepartureEvidence { cause, asked }), now);
        }
    }

    /// Makes a leave the current one of its participant; the one that was, if any, is replaced by it.
    pub(super) fn put_in_front(&mut self, participant: ParticipantId, id: LeaveId, now: Time) {
        self.take_out(participant, id);
        let former = self.of(participant);
        self.set_current(participant, Some(id));
        if let Some(former) = former {
            self.replaced.entry(participant).or_default().push(former);
            self.step(former, Input::Replaced, now);
        }
    }

    /// The leave is no replaced one any more.
    pub(super) fn take_out(&mut self, participant: ParticipantId, id: LeaveId) {
        if let Some(replaced) = self.replaced.get_mut(&participant) {
            replaced.retain(|&other| other != id);
            if replaced.is_empty() {
                self.replaced.remove(&participant);
            }
        }
    }

    /// Until when a leave has to be restarted so that what it replaces does not fire before it is cancelled, and until when that may
    /// wait while the homeserver limits (L14).
    pub(super) fn first_replaced(&self, id: LeaveId) -> Option<(Time, Time)> {
        let replaced = self.replaced_jobs(id).filter(|job| job.leave.phase() == Phase::Replaced);
        replaced.map(|job| (job.leave.deadline(), job.leave.relaxed())).min()
    }

    /// The leaves that this one replaces: where it is the current one, and few are.
    pub(super) fn replaces(&self, id: LeaveId) -> &[LeaveId] {
        if self.replaced.is_empty() {
            return &[];
        }
        let participant = self.jobs.get(id).map(Job::participant);
        let participant = participant.filter(|&participant| self.of(participant) == Some(id));
        participant
            .and_then(|participant| self.replaced.get(&participant))
            .map_or(&[], Vec::as_slice)
    }

    pub(super) fn replaced_jobs(&self, id: LeaveId) -> impl Iterator<Item = &Job> {
        self.replaces(id).iter().filter_map(|&id| self.jobs.get(id))
    }
}
