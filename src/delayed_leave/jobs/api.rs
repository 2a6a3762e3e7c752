//! What the driver tells and is told: facts from the network in, calls to make out.

use super::{Answered, Call, JobId};
use crate::delayed_leave::machine::{LeaveReason, Outcome, Reason};
use crate::delayed_leave::pace::{Concurrency, HomeserverId};
use crate::delayed_leave::rooms::{RoomId, RoomRow};
use crate::livekit::Reach;
use crate::time::{Delay, Time};
use std::{sync::Arc, time::Duration};

/// Bounds and intervals.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Between two sweeps of a room; `None` is `LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS=0` (L3, L9a).
    pub sweep_every: Option<Duration>,
    /// Between two questions for all rooms; `None` switches L13 off.
    pub list_rooms_every: Option<Duration>,
    /// Jobs of one user.
    pub per_user: u32,
    /// Jobs in all.
    pub total: u32,
    /// Jobs of one homeserver that is not exempt.
    pub per_homeserver: u32,
    /// Calls to homeservers under way.
    pub concurrency: Concurrency,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sweep_every: Some(Duration::from_secs(30)),
            list_rooms_every: Some(Duration::from_secs(30)),
            per_user: 100,
            total: 200_000,
            per_homeserver: 10_000,
            concurrency: Concurrency::default(),
        }
    }
}

/// A request to watch a participant and to send a leave.
#[derive(Clone, Copy, Debug)]
pub struct Delegation<'a> {
    /// The room's name on the SFU.
    pub room: &'a str,
    /// The participant's identity there.
    pub identity: &'a str,
    /// The Matrix user.
    pub user: &'a str,
    /// Its homeserver.
    pub homeserver: &'a str,
    /// The delayed event.
    pub delay_id: &'a str,
    /// Its delay.
    pub delay: Delay,
    /// When the request arrived; what counts where two of them compete (L14).
    pub arrived: Time,
    /// The homeserver is named in full access (L8).
    pub exempt: bool,
    /// The room may be created for this user's sake (L13).
    pub creates_room: bool,
    /// Calls carry the as_token and the user.
    pub as_user: bool,
}

/// Why a delegation is not taken (L8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The user has too many.
    UserFull,
    /// The homeserver has too many.
    HomeserverFull,
    /// There are too many.
    Full,
    /// The service is stopping: nobody would watch.
    Stopping,
}

/// What became of a delegation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delegated {
    /// A new job. It is to be stored before the request is answered.
    New(JobId),
    /// The job of the same delayed event goes on.
    Renewed(JobId),
    /// A later request has been served already: this event is being cancelled.
    Overtaken,
}

/// A job as it was stored.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What was asked for. `arrived` is the delegation's, or `restarted` where that is not stored.
    pub delegation: Delegation<'a>,
    /// When the event last began to run (`RestartedAt`).
    pub restarted: Time,
    /// The participant's sid.
    pub sid: Option<&'a str>,
    /// When that session joined, by the SFU's clock.
    pub joined_at_ms: u64,
    /// The room's sid at the last sighting.
    pub room_sid: Option<&'a str>,
    /// The last sighting.
    pub last_sighted: Option<Time>,
    /// Whether the participant was seen (L2).
    pub seen: bool,
}

/// A fact.
#[derive(Clone, Copy, Debug)]
pub enum Fact<'a> {
    /// A verified webhook.
    Webhook(Webhook<'a>),
    /// The answer to [`Output::LookUp`].
    LookedUp {
        /// The job that asked.
        job: JobId,
        /// As it was in the output.
        asked: Time,
        /// What came back.
        answer: Looked<'a>,
    },
    /// The answer to [`Output::ListParticipants`].
    Listed {
        /// The room that was asked for.
        room: RoomId,
        /// As it was in the output.
        asked: Time,
        /// What came back.
        answer: Answered<&'a [Row<'a>]>,
    },
    /// The answer to [`Output::ListRooms`].
    RoomsListed {
        /// The names that were asked for.
        names: &'a [Arc<str>],
        /// As it was in the output.
        asked: Time,
        /// What came back.
        answer: Answered<&'a [RoomRow<'a>]>,
    },
    /// The answer to [`Output::CreateRoom`].
    RoomCreated {
        /// The room.
        room: RoomId,
        /// What came back.
        answer: Answered<RoomRow<'a>>,
    },
    /// The answer to [`Output::Probe`].
    Probed(Reach),
    /// The watch's own connection was closed.
    WatchClosed,
    /// The answer to [`Output::Call`].
    Called {
        /// The job.
        job: JobId,
        /// As it was in the output.
        homeserver: HomeserverId,
        /// Which of the three.
        call: Call,
        /// How it ended.
        outcome: Outcome,
    },
    /// SIGTERM (L12).
    Stopping,
    /// Nothing but time has passed.
    Time,
}

/// What `GetParticipant` brought.
#[derive(Clone, Copy, Debug)]
pub enum Looked<'a> {
    /// A participant in a state other than DISCONNECTED.
    Present(Row<'a>),
    /// Twirp JSON with `code` `not_found`, or DISCONNECTED.
    Absent,
    /// An answer that is neither.
    Unclear,
    /// Nothing in time.
    TimedOut,
    /// Refused, reset, closed, or 502 to 504.
    Unreachable,
}

/// A participant that the SFU lists, in a state other than DISCONNECTED.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Its identity.
    pub identity: &'a str,
    /// Its sid.
    pub sid: &'a str,
    /// When it joined, by the SFU's clock; 0 where it is not said.
    pub joined_at_ms: u64,
    /// Whether its state is ACTIVE.
    pub active: bool,
}

/// A verified webhook, reduced to what is used.
#[derive(Clone, Copy, Debug)]
pub struct Webhook<'a> {
    /// What happened.
    pub kind: WebhookKind,
    /// The event's id; empty where it is missing.
    pub id: &'a str,
    /// When it happened on our clock ([`crate::time::event_time`]).
    pub happened: Time,
    /// The room's name.
    pub room: &'a str,
    /// The room's sid; empty where it is missing.
    pub room_sid: &'a str,
    /// The participant's identity; empty where there is none.
    pub identity: &'a str,
    /// The participant's sid.
    pub sid: &'a str,
    /// When it joined, by the SFU's clock; 0 where it is not said.
    pub joined_at_ms: u64,
}

/// The kinds of webhooks that matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WebhookKind {
    /// `room_started`.
    RoomStarted,
    /// `room_finished`.
    RoomFinished,
    /// `participant_joined`.
    Joined,
    /// `participant_left`.
    Left(LeaveReason),
    /// `participant_connection_aborted`.
    Aborted(LeaveReason),
    /// `track_*`, and whatever else shows that somebody is in the room.
    Track,
    /// What is not known here.
    Other,
}

/// What the driver is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// `GetParticipant` for a job.
    LookUp {
        /// The job.
        job: JobId,
        /// To be given back.
        asked: Time,
        /// How long the answer may take.
        within: Duration,
    },
    /// `ListParticipants` for a room.
    ListParticipants {
        /// The room.
        room: RoomId,
        /// To be given back.
        asked: Time,
    },
    /// `ListRooms` with these names.
    ListRooms {
        /// At most 500 names.
        names: Vec<Arc<str>>,
        /// To be given back.
        asked: Time,
    },
    /// `CreateRoom` with `empty_timeout` 60 s.
    CreateRoom {
        /// The room.
        room: RoomId,
    },
    /// `GET` of the SFU's base address on the watch's own connection.
    Probe {
        /// How long the answer may take.
        within: Duration,
    },
    /// A call to a homeserver about the job's delayed event.
    Call {
        /// The job.
        job: JobId,
        /// To be given back.
        homeserver: HomeserverId,
        /// Which call.
        call: Call,
    },
    /// Store the job as it is now.
    Persist {
        /// The job.
        job: JobId,
    },
    /// Remove the record of a room and identity.
    Forget {
        /// The room's name.
        room: Arc<str>,
        /// The identity.
        identity: Box<str>,
    },
    /// A job is over; for the one line in the log.
    Finished {
        /// The job.
        job: JobId,
        /// The room's name.
        room: Arc<str>,
        /// The delayed event.
        delay_id: Box<str>,
        /// How it ended.
        reason: Reason,
    },
    /// A warning: the SFU has been silent for that long, restarts pause (L13a).
    SfuSilent {
        /// In milliseconds.
        for_millis: u64,
    },
    /// A warning, once: no webhook came, so rooms are asked although that is switched off (L9a).
    Unwired,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
#[must_use]
pub struct Outputs(pub(super) Vec<Output>);

impl Outputs {
    pub(super) fn push(&mut self, output: Output) {
        self.0.push(output);
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl IntoIterator for Outputs {
    type Item = Output;
    type IntoIter = std::vec::IntoIter<Output>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
