//! The core that the driver drives: presence and the delayed leaves together. Pure: facts in, actions out.

use std::sync::Arc;
use std::time::Duration;

use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::delayed_leave::{self, Bounds, CapacityError, Delegated, FinishReason, Handover, HomeserverId, LeaveId, Leaves};
use crate::fleet::CLOCK_TOLERANCE_MS;
use crate::livekit::{Answer, ParticipantRow, Reach, RoomRow};
use crate::presence::{self, ParticipantId, Presence, Question, RoomId, SessionRecord, SfuEvent, State, Suspicion};
use crate::store::JobRecord;
use crate::store::record::Replaced;
use crate::time::{Delay, Time, WallClock};

/// An event that another replica has replaced is taken to run for so long at least, so that it is cancelled all the same.
const REPLACED_LEAST_MS: u64 = 60_000;

/// A delegation whose checks are done.
#[derive(Clone, Copy, Debug)]
pub struct Delegation<'a> {
    /// The room's name on the SFU.
    pub room: &'a str,
    /// The participant's identity there.
    pub identity: &'a str,
    /// The event that is handed over.
    pub handover: Handover<'a>,
}

/// A fact that the core is told.
#[derive(Clone, Copy, Debug)]
pub enum Fact<'a> {
    /// A verified webhook.
    Event(&'a SfuEvent<'a>),
    /// A verified webhook from before this node watched.
    PastEvent(&'a SfuEvent<'a>),
    /// The SFU's clock showed these seconds since 1970 at that moment.
    Date(i64, Time),
    /// The answer to [`Question::Participant`], and when that was asked.
    Participant(ParticipantId, Time, Answer<ParticipantRow<'a>>),
    /// The answer to [`Question::Participants`], and when that was asked.
    Participants(RoomId, Time, Answer<&'a [ParticipantRow<'a>]>),
    /// The answer to [`Question::Rooms`], and when that was asked.
    Rooms(&'a [RoomId], Time, Answer<&'a [RoomRow<'a>]>),
    /// The answer to [`Question::CreateRoom`].
    Created(RoomId, Answer<RoomRow<'a>>),
    /// The answer to [`Question::Probe`].
    Probed(Reach),
    /// The probe's own connection was closed.
    ProbeClosed,
    /// The answer to [`Action::Call`].
    Called {
        /// Leave that the call was for.
        leave: LeaveId,
        /// Homeserver that was called.
        homeserver: HomeserverId,
        /// Action of the call.
        action: DelayedEventAction,
        /// When the call was sent.
        sent: Time,
        /// How the call ended.
        outcome: Outcome,
    },
    /// The user of this room and identity was removed from the Matrix room, and from the call by this service.
    Kicked(&'a str, &'a str),
    /// The process stood still, and for that many milliseconds its clock did, too (L5a).
    Woke(u64),
    /// Another replica may look after the leaves, too, or does not any more.
    Shared(bool),
    /// The service is stopping, on SIGTERM (L12).
    Stopping,
    /// Time has passed, and nothing else has happened.
    Time,
}

/// An action that the driver is to take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Put a question to the SFU.
    Ask(Question),
    /// Call a homeserver about a delayed event.
    Call {
        /// Leave that the call is for.
        leave: LeaveId,
        /// Homeserver to call.
        homeserver: HomeserverId,
        /// Action of the call.
        action: DelayedEventAction,
        /// When the call was granted; given back with its answer.
        sent: Time,
    },
    /// Store the leave as it is now.
    Store(LeaveId),
    /// Remove the record of a room and identity.
    Forget(Arc<str>, Box<str>),
    /// A leave is over; for the one line in the log.
    Finished {
        /// The room's name.
        room: Arc<str>,
        /// Id of the delayed event.
        delay_id: Box<str>,
        /// How the leave ended.
        reason: FinishReason,
    },
    /// A warning: the SFU has been silent for that long, restarts pause (L13a).
    SfuSilent(Duration),
    /// A warning, once: no webhook came, so rooms are asked although that is switched off (L9a).
    NoWebhooks,
    /// A warning: the limit of a homeserver does not let all restarts through (L4a).
    Overloaded {
        /// Server name of the homeserver.
        server: Arc<str>,
        /// The LiveKit room of one of the participants.
        room: Arc<str>,
        /// How many leaves cannot be restarted in time.
        leaves: usize,
    },
}

/// Bounds and intervals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Settings of presence.
    pub presence: presence::Settings,
    /// Bounds of the leaves.
    pub bounds: Bounds,
}

/// The core: presence and the leaves.
#[derive(Debug)]
pub struct Core {
    presence: Presence,
    leaves: Leaves,
}

impl Core {
    /// Makes a core that knows of no participant.
    #[must_use]
    pub fn new(settings: Settings, seed: u64, now: Time) -> Self {
        Self {
            presence: Presence::new(settings.presence, seed, now),
            leaves: Leaves::new(settings.bounds, seed),
        }
    }

    /// The SFU, as it is known.
    #[must_use]
    pub const fn presence(&self) -> &Presence {
        &self.presence
    }

    /// Table of all leaves.
    #[must_use]
    pub const fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// The current leave of a room and identity.
    #[must_use]
    pub fn find(&self, room: &str, identity: &str) -> Option<LeaveId> {
        self.leaves.of(self.presence.find(room, identity)?)
    }

    /// Whether a stopping service has nothing to wait for (L12).
    #[must_use]
    pub const fn is_at_rest(&self) -> bool {
        self.presence.is_at_rest() && self.leaves.is_at_rest()
    }

    /// When [`Fact::Time`] is due next.
    #[must_use]
    pub fn next_deadline(&mut self) -> Option<Time> {
        [self.presence.next_deadline(), self.leaves.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether a delegation would be taken: to be asked before anything is done for it, and true again when it is made.
    ///
    /// # Errors
    /// When there are too many.
    pub fn admit(&self, delegation: &Delegation<'_>) -> Result<(), CapacityError> {
        let participant = self.presence.find(delegation.room, delegation.identity);
        self.leaves.admit(participant, &delegation.handover)
    }

    /// Takes a delegation whose checks are done.
    ///
    /// # Errors
    /// When there are too many.
    pub fn delegate(&mut self, delegation: &Delegation<'_>, now: Time) -> Result<(Delegated, Vec<Action>), CapacityError> {
        self.admit(delegation)?;
        let handover = &delegation.handover;
        let participant = self
            .presence
            .track(delegation.room, delegation.identity, handover.arrived, handover.delay, now);
        let (is_there, seen) = self.is_there(participant);
        let delegated = self.leaves.delegate(participant, handover, is_there, seen, now);
        Ok((delegated, self.settle(now)))
    }

    /// Takes a job from the store (L11), unless its participant has one that is newer than the record, or the record is not said to be
    /// newer. The operator listed its homeserver or not.
    pub fn restore(&mut self, job: &JobRecord<'_>, is_newer: bool, listed: bool, clock: &WallClock, now: Time) -> Vec<Action> {
        let is_known = self.find(&job.room, &job.identity).is_some();
        let Some((delegation, restarted)) = delegation_of(job, is_newer, listed, clock, now) else {
            return vec![Action::Forget((&*job.room).into(), (&*job.identity).into())];
        };
        if is_known {
            let delegated = is_newer.then(|| self.delegate(&delegation, now).ok()).flatten();
            return delegated.map(|(_, actions)| actions).unwrap_or_default();
        }
        if self.leaves.is_full() {
            return Vec::new();
        }
        let replaced = replaced_of(job, clock, now, now);
        let since = Since {
            restarted,
            continuous: false,
        };
        self.restore_new(job, &delegation.handover, since, &replaced, clock, now);
        self.settle(now)
    }

    /// Takes a job that another replica had, or was told of: in order with what is known of its participant (L14), and whatever the bounds
    /// say, since it was taken. `continuous` where the SFU is known not to have gone down since that replica looked after it.
    pub fn adopt(&mut self, job: &JobRecord<'_>, continuous: bool, listed: bool, clock: &WallClock, now: Time) -> Vec<Action> {
        let Some((delegation, restarted)) = delegation_of(job, false, listed, clock, now) else {
            return vec![Action::Forget((&*job.room).into(), (&*job.identity).into())];
        };
        let handover = &delegation.handover;
        // Other hosts' clocks, and Redis's own where it was set, may say that an event is over which is not.
        let replaced = replaced_of(job, clock, now.after(REPLACED_LEAST_MS), now);
        let known = self.find(&job.room, &job.identity).and_then(|id| self.leaves.get(id));
        let Some(known) = known else {
            self.restore_new(job, handover, Since { restarted, continuous }, &replaced, clock, now);
            return self.settle(now);
        };
        // Neither of two users ends the other's event (O3).
        if !known.user().is_empty() && known.user() != handover.user {
            return Vec::new();
        }
        let participant = known.participant();
        // The same delegation comes again and again, by times that were read over a network, and by another clock where Redis's was set.
        let is_possible = job.delegated_at_ms.is_none_or(|at| clock.time(at) <= now.after(CLOCK_TOLERANCE_MS));
        let is_later = is_possible && known.leave().delegated().after(CLOCK_TOLERANCE_MS) < handover.arrived;
        let is_news = known.delay_id() != handover.delay_id || is_later;
        if is_news {
            self.presence
                .track(delegation.room, delegation.identity, handover.arrived, handover.delay, now);
            let (is_there, seen) = self.is_there(participant);
            self.leaves.delegate(participant, handover, is_there, seen, now);
        }
        self.leaves.replaces_also(participant, handover, &replaced, now);
        self.is_seen_elsewhere(participant, job, continuous, clock, now);
        let mut actions = self.settle(now);
        // Redis may have lost the record, and have had it again from whoever took the delegation, and saw nobody.
        if !job.seen && self.presence.get(participant).is_some_and(is_known_to_be_there) {
            actions.extend(self.leaves.of(participant).map(Action::Store));
        }
        actions
    }

    /// Asks about a participant whose leave is handed over once more: whoever has looked after it may have begun to look into a departure, of
    /// which a record says nothing.
    pub fn ask_again(&mut self, room: &str, identity: &str, now: Time) -> Vec<Action> {
        if let Some(participant) = self.presence.find(room, identity) {
            self.presence.sweep_soon(participant, now);
        }
        self.settle(now)
    }

    /// Takes over that another replica has seen a participant since the delegation who is waited for here: whoever has left meanwhile is
    /// found by the next question.
    fn is_seen_elsewhere(&mut self, participant: ParticipantId, job: &JobRecord<'_>, continuous: bool, clock: &WallClock, now: Time) {
        let is_awaited = |found: &presence::Participant| matches!(found.presence(), State::Unknown { .. });
        let delegated = self
            .leaves
            .of(participant)
            .and_then(|id| self.leaves.get(id))
            .map(|job| job.leave().delegated());
        let arrived = job.delegated_at_ms.map(|at| clock.time(at).after(CLOCK_TOLERANCE_MS));
        let was_seen = job.seen && job.last_sighted_ms >= job.delegated_at_ms && arrived >= delegated;
        if was_seen && self.presence.get(participant).is_some_and(is_awaited) {
            self.presence.restore(participant, &session_of(job, clock, now), continuous, now);
            self.leaves.on_present(participant, now);
        }
    }

    /// Drops the leaves of a participant: another replica looks after them.
    pub fn let_go(&mut self, id: LeaveId, now: Time) {
        if let Some(participant) = self.leaves.get(id).map(delayed_leave::Job::participant) {
            self.leaves.let_go(participant, now);
            self.presence.forget(participant, now);
        }
    }

    fn restore_new(
        &mut self,
        job: &JobRecord<'_>,
        handover: &Handover<'_>,
        since: Since,
        replaced: &[delayed_leave::Replaced<'_>],
        clock: &WallClock,
        now: Time,
    ) {
        let session = session_of(job, clock, now);
        let participant = self.presence.track(&job.room, &job.identity, handover.arrived, handover.delay, now);
        self.presence.restore(participant, &session, since.continuous, now);
        if self
            .leaves
            .restore(participant, handover, since.restarted, job.seen, replaced, now)
            .is_none()
        {
            self.presence.forget(participant, now);
        }
    }

    /// Whether a participant is thought to be there, and was seen at some time.
    fn is_there(&self, participant: ParticipantId) -> (bool, bool) {
        self.presence.get(participant).map_or((false, false), |participant| {
            let is_there = match participant.presence() {
                State::Present => true,
                State::Suspected { why, .. } => !matches!(why, Suspicion::Reported { .. } | Suspicion::Stale),
                State::Unknown { .. } | State::Gone(_) => false,
            };
            (is_there, participant.session().seen)
        })
    }

    /// A leave as it is to be stored: what [`Self::restore`] takes.
    #[must_use]
    pub fn record(&self, id: LeaveId, clock: &WallClock) -> Option<JobRecord<'_>> {
        let job = self.leaves.get(id)?;
        let participant = self.presence.get(job.participant())?;
        let session = participant.session();
        let replaces = self.leaves.replaced(id).map(|replaced| Replaced {
            delay_id: replaced.delay_id.into(),
            until_ms: clock.unix_millis(replaced.until),
        });
        Some(JobRecord {
            room: (&**self.presence.room_of(job.participant())?).into(),
            identity: participant.identity().into(),
            delay_id: job.delay_id().into(),
            delay_ms: i64::try_from(job.leave().delay().as_millis()).unwrap_or(i64::MAX),
            homeserver: (&**self.leaves.homeserver(job.homeserver())?).into(),
            restarted_at_ms: clock.unix_millis(job.leave().restarted()),
            user: job.user().into(),
            delegated_at_ms: Some(clock.unix_millis(job.leave().delegated())),
            as_user: job.is_as_user(),
            sid: session.sid.map(Into::into),
            joined_at_ms: session.joined_at_ms,
            room_sid: session.room_sid.map(Into::into),
            room_over: session.room_over,
            last_sighted_ms: session.last_sighted.map(|at| clock.unix_millis(at)),
            seen: is_known_to_be_there(participant),
            replaces: replaces.collect(),
        })
    }

    /// Takes a fact, and says what is to be done about it.
    pub fn handle(&mut self, fact: Fact<'_>, now: Time) -> Vec<Action> {
        match fact {
            Fact::Event(event) => self.presence.on_event(event, now),
            Fact::PastEvent(event) => self.presence.on_past_event(event, now),
            Fact::Date(seconds, at) => self.presence.on_date(seconds, at),
            Fact::Participant(participant, asked, answer) => self.presence.on_participant(participant, asked, &answer, now),
            Fact::Participants(room, asked, answer) => self.presence.on_participants(room, asked, &answer, now),
            Fact::Rooms(rooms, asked, answer) => self.presence.on_rooms(rooms, asked, &answer, now),
            Fact::Created(room, answer) => self.presence.on_created(room, &answer, now),
            Fact::Probed(reach) => self.presence.on_probed(reach, now),
            Fact::ProbeClosed => self.presence.on_probe_closed(now),
            Fact::Called {
                leave,
                homeserver,
                action,
                sent,
                outcome,
            } => self.leaves.on_called(leave, homeserver, action, sent, outcome, now),
            Fact::Kicked(room, identity) => {
                if let Some(participant) = self.presence.find(room, identity) {
                    self.leaves.on_over(participant, FinishReason::Kicked, now);
                }
            }
            Fact::Woke(lost_ms) => {
                self.presence.on_woke(now);
                self.leaves.on_woke(lost_ms, now);
            }
            Fact::Shared(shared) => self.leaves.on_shared(shared, now),
            Fact::Stopping => {
                self.presence.on_stopping();
                self.leaves.on_stopping(now);
            }
            Fact::Time => {}
        }
        self.settle(now)
    }

    /// Hands findings of presence to the leaves and their questions to presence, until neither has any.
    fn settle(&mut self, now: Time) -> Vec<Action> {
        let mut actions = Vec::new();
        loop {
            for output in self.presence.settle(now) {
                match output {
                    presence::Output::Ask(question) => actions.push(Action::Ask(question)),
                    presence::Output::Changed(participant) => self.leaves.on_changed(participant),
                    presence::Output::Present(participant) => self.leaves.on_present(participant, now),
                    presence::Output::Gone(participant, evidence) => self.leaves.on_gone(participant, evidence, now),
                    presence::Output::JoinFailed(participant) => self.leaves.on_over(participant, FinishReason::JoinFailed, now),
                    presence::Output::Silent(silent) => self.leaves.on_sfu_silent(silent, now),
                    presence::Output::SfuSilent(millis) => actions.push(Action::SfuSilent(Duration::from_millis(millis))),
                    presence::Output::NoWebhooks => actions.push(Action::NoWebhooks),
                }
            }
            let Self { presence, leaves } = self;
            let last_no = |participant| presence.get(participant).and_then(presence::Participant::last_no);
            let outputs = leaves.settle(&last_no, now);
            if outputs.is_empty() {
                return actions;
            }
            for output in outputs {
                self.take(output, now, &mut actions);
            }
        }
    }

    fn take(&mut self, output: delayed_leave::Output, now: Time, actions: &mut Vec<Action>) {
        match output {
            delayed_leave::Output::Call(leave, homeserver, action) => actions.push(Action::Call {
                leave,
                homeserver,
                action,
                sent: now,
            }),
            delayed_leave::Output::Store(leave) => {
                if self.leaves.get(leave).is_some() {
                    actions.push(Action::Store(leave));
                }
            }
            delayed_leave::Output::Confirm(participant) => self.presence.confirm(participant, now),
            delayed_leave::Output::Awaits(participant, ends, delay) => self.presence.waits_until(participant, ends, delay),
            delayed_leave::Output::Overloaded(overload) => {
                let example = self.leaves.get(overload.example);
                let room = example.and_then(|job| self.presence.room_of(job.participant()).cloned());
                if let (Some(server), Some(room)) = (self.leaves.homeserver(overload.homeserver).cloned(), room) {
                    let leaves = overload.leaves;
                    actions.push(Action::Overloaded { server, room, leaves });
                }
            }
            delayed_leave::Output::Finished {
                participant,
                delay_id,
                reason,
            } => {
                let room = self.presence.room_of(participant).cloned().unwrap_or_else(|| "".into());
                actions.push(Action::Finished {
                    room: Arc::clone(&room),
                    delay_id,
                    reason,
                });
                if self.leaves.of(participant).is_none()
                    && let Some(found) = self.presence.get(participant)
                {
                    actions.push(Action::Forget(room, found.identity().into()));
                    self.presence.forget(participant, now);
                }
            }
        }
    }
}

/// Events in the life of a stored leave since it was delegated.
#[derive(Clone, Copy)]
struct Since {
    /// When its event was last restarted.
    restarted: Time,
    /// The SFU is known not to have gone down since somebody looked after it.
    continuous: bool,
}

/// A record as a delegation, and when its event was last restarted; `None` where it has no delay.
fn delegation_of<'a>(job: &'a JobRecord<'_>, is_newer: bool, listed: bool, clock: &WallClock, now: Time) -> Option<(Delegation<'a>, Time)> {
    // A longer delay than is taken is clamped, not dropped (L8).
    let millis = u64::try_from(job.delay_ms).unwrap_or(0).min(Delay::MAX.as_millis());
    let delay = Delay::from_millis(millis)?;
    let restarted = clock.time(job.restarted_at_ms);
    let arrived = match job.delegated_at_ms {
        // A wall clock that was set back, or a faster one elsewhere, must not put anything into the future.
        Some(at) if !is_newer => clock.time(at).min(now),
        Some(_) | None => restarted.min(now),
    };
    let handover = Handover {
        user: &job.user,
        homeserver: &job.homeserver,
        delay_id: &job.delay_id,
        delay,
        arrived,
        listed,
        as_user: job.as_user,
    };
    let delegation = Delegation {
        room: &job.room,
        identity: &job.identity,
        handover,
    };
    Some((delegation, restarted))
}

/// Whether somebody has been seen since the delegation: who is waited for was there before it, if ever.
fn is_known_to_be_there(participant: &presence::Participant) -> bool {
    participant.session().seen && !matches!(participant.presence(), State::Unknown { .. })
}

/// The session of a record's participant.
fn session_of<'a>(job: &'a JobRecord<'_>, clock: &WallClock, now: Time) -> SessionRecord<'a> {
    SessionRecord {
        sid: job.sid.as_deref(),
        joined_at_ms: job.joined_at_ms,
        room_sid: job.room_sid.as_deref(),
        room_over: job.room_over,
        last_sighted: job.last_sighted_ms.map(|at| clock.time(at).min(now)),
        seen: job.seen,
    }
}

/// Events that a record still has to see cancelled. Each is taken to run until `least` at the least.
fn replaced_of<'a>(job: &'a JobRecord<'_>, clock: &WallClock, least: Time, now: Time) -> Vec<delayed_leave::Replaced<'a>> {
    let replaced = job.replaces.iter().map(|replaced| delayed_leave::Replaced {
        delay_id: &replaced.delay_id,
        until: clock.time(replaced.until_ms).max(least),
    });
    // A damaged record may name its own event.
    replaced
        .filter(|replaced| replaced.until > now && replaced.delay_id != &*job.delay_id)
        .collect()
}
