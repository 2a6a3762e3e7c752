//! What a job is told, and what it asks for.

use super::Reason;
use crate::delayed_leave::time::{Delay, Time};
use std::{sync::Arc, time::Duration};

/// A fact.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// `participant_joined`.
    Joined(Event<'a>),
    /// `participant_left`.
    Left(Event<'a>, LeaveReason),
    /// `participant_connection_aborted`.
    Aborted(Event<'a>, LeaveReason),
    /// The answer to [`Action::LookUp`], and when it was asked.
    LookedUp {
        /// When the question was sent.
        asked: Time,
        /// What came back.
        answer: Answer<'a>,
        /// The room's sid as it is known now.
        room_sid: Option<&'a Arc<str>>,
    },
    /// The participant is in a `ListParticipants` answer.
    Listed {
        /// When the question was sent.
        asked: Time,
        /// The participant's row.
        participant: Participant<'a>,
        /// The room's sid as it is known now.
        room_sid: Option<&'a Arc<str>>,
    },
    /// There is a reason to ask for this participant now: a sweep, an absence from a list, a room that shows nobody.
    Ask,
    /// What became of the room in which the participant was last sighted.
    Room {
        /// When the question was sent.
        asked: Time,
        /// The verdict.
        verdict: Verdict,
    },
    /// The SFU as a whole has begun or ceased to answer.
    Sfu(Sfu),
    /// The job's wish is granted: it may call its homeserver.
    Turn,
    /// How the restart ended.
    Restarted(Outcome),
    /// How the send ended.
    Sent(Outcome),
    /// How the cancellation ended.
    Cancelled(Outcome),
    /// The same delayed event was delegated again.
    Renewed {
        /// Its delay.
        delay: Delay,
        /// When the request arrived.
        arrived: Time,
    },
    /// Another delayed event was delegated in this one's place (L14).
    Replaced,
    /// The service is stopping (L12).
    Stopping,
    /// Nothing but time has passed.
    Time,
}

/// What the job asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Action {
    /// `GetParticipant`; answered by [`Input::LookedUp`], always.
    LookUp {
        /// How long the answer may take.
        within: Duration,
    },
    /// The verdict on the room is wanted; answered by [`Input::Room`].
    JudgeRoom,
    /// Restart the delayed event; answered by [`Input::Restarted`], always.
    Restart,
    /// Send it; answered by [`Input::Sent`], always.
    Send,
    /// Cancel it; answered by [`Input::Cancelled`], always.
    Cancel,
    /// Store what is known now.
    Persist,
    /// The job is over.
    Finish(Reason),
}

/// What a webhook about a participant says.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// A hash of the event's id.
    pub id: Option<u64>,
    /// The participant's sid.
    pub sid: &'a str,
    /// When that session joined, by the SFU's clock; 0 where it is not said.
    pub joined_at_ms: u64,
    /// When it happened, on our clock.
    pub happened: Time,
    /// The room's sid.
    pub room_sid: Option<&'a Arc<str>>,
}

/// A participant as the SFU shows it, in a state other than DISCONNECTED.
#[derive(Clone, Copy, Debug)]
pub struct Participant<'a> {
    /// Its sid.
    pub sid: &'a str,
    /// When it joined, by the SFU's clock; 0 where it is not said.
    pub joined_at_ms: u64,
    /// Whether its state is ACTIVE.
    pub active: bool,
}

/// What `GetParticipant` brought.
#[derive(Clone, Copy, Debug)]
pub enum Answer<'a> {
    /// The identity is there, in a state other than DISCONNECTED.
    Present(Participant<'a>),
    /// Twirp JSON with `code` `not_found`, or the state DISCONNECTED.
    Absent,
    /// Neither a clear yes nor a clear no, or no answer at all.
    Unclear,
}

/// Why the SFU says somebody is gone.
pub use crate::sfu::webhook::DisconnectReason as LeaveReason;

impl LeaveReason {
    /// Reads LiveKit's name or number of a reason; what is not known here is [`Self::Unknown`].
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "CLIENT_INITIATED" | "1" => Self::ClientInitiated,
            "DUPLICATE_IDENTITY" | "2" => Self::DuplicateIdentity,
            "SERVER_SHUTDOWN" | "3" => Self::ServerShutdown,
            "PARTICIPANT_REMOVED" | "4" => Self::ParticipantRemoved,
            "ROOM_DELETED" | "5" => Self::RoomDeleted,
            "STATE_MISMATCH" | "6" => Self::StateMismatch,
            "JOIN_FAILURE" | "7" => Self::JoinFailure,
            "MIGRATION" | "8" => Self::Migration,
            "SIGNAL_CLOSE" | "9" => Self::SignalClose,
            "ROOM_CLOSED" | "10" => Self::RoomClosed,
            "USER_UNAVAILABLE" | "11" => Self::UserUnavailable,
            "USER_REJECTED" | "12" => Self::UserRejected,
            "SIP_TRUNK_FAILURE" | "13" => Self::SipTrunkFailure,
            "CONNECTION_TIMEOUT" | "14" => Self::ConnectionTimeout,
            "MEDIA_FAILURE" | "15" => Self::MediaFailure,
            "AGENT_ERROR" | "16" => Self::AgentError,
            _ => Self::Unknown,
        }
    }

    /// Whether it takes two quick questions rather than an absence found by asking (L2a).
    #[must_use]
    pub fn is_usually_final(self) -> bool {
        match self {
            Self::ClientInitiated
            | Self::ConnectionTimeout
            | Self::ParticipantRemoved
            | Self::RoomDeleted
            | Self::RoomClosed
            | Self::SignalClose
            | Self::UserRejected
            | Self::UserUnavailable => true,
            Self::DuplicateIdentity
            | Self::Migration
            | Self::StateMismatch
            | Self::ServerShutdown
            | Self::JoinFailure
            | Self::SipTrunkFailure
            | Self::MediaFailure
            | Self::AgentError
            | Self::Unknown => false,
        }
    }
}

/// What became of a room, seen from a participant who was sighted in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It stands under the same sid, or the SFU refuses to say.
    Stands,
    /// It is over in the way rooms end: everybody had left.
    Ended,
    /// The SFU has forgotten it.
    Lost,
}

/// The SFU as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sfu {
    /// Its last question was answered.
    Answering,
    /// Its last question was not.
    Failing,
    /// It has not answered for so long that restarts pause (L13a).
    Silent,
}

/// How a call to the homeserver ended, its path already settled (L6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// 200 or 204.
    Done,
    /// 404 with a JSON object that is not about an unknown path.
    NotFound,
    /// 409: finalised otherwise.
    Conflict,
    /// 401 or 403 on both paths.
    Forbidden,
    /// 429, with the server's hint, which pauses the homeserver and not the job.
    Limited(Option<Duration>),
    /// Whatever may pass: 5xx, a 404 that is no JSON, transport, an unresolved base URL; with the server's hint.
    Transient(Option<Duration>),
}
