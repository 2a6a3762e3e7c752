//! LiveKit's words, as far as the pure code uses them: why somebody left, and what an answer of its API says. Pure.

use livekit_protocol as proto;

/// Why a participant left, by LiveKit's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "LiveKit's names")]
pub enum DisconnectReason {
    ClientInitiated,
    DuplicateIdentity,
    ServerShutdown,
    ParticipantRemoved,
    RoomDeleted,
    StateMismatch,
    JoinFailure,
    Migration,
    SignalClose,
    RoomClosed,
    UserUnavailable,
    UserRejected,
    SipTrunkFailure,
    ConnectionTimeout,
    MediaFailure,
    AgentError,
    /// `UNKNOWN_REASON`, absent, or not known here.
    #[default]
    Unknown,
}

impl DisconnectReason {
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

impl From<proto::DisconnectReason> for DisconnectReason {
    fn from(reason: proto::DisconnectReason) -> Self {
        use proto::DisconnectReason as Theirs;
        match reason {
            Theirs::UnknownReason => Self::Unknown,
            Theirs::ClientInitiated => Self::ClientInitiated,
            Theirs::DuplicateIdentity => Self::DuplicateIdentity,
            Theirs::ServerShutdown => Self::ServerShutdown,
            Theirs::ParticipantRemoved => Self::ParticipantRemoved,
            Theirs::RoomDeleted => Self::RoomDeleted,
            Theirs::StateMismatch => Self::StateMismatch,
            Theirs::JoinFailure => Self::JoinFailure,
            Theirs::Migration => Self::Migration,
            Theirs::SignalClose => Self::SignalClose,
            Theirs::RoomClosed => Self::RoomClosed,
            Theirs::UserUnavailable => Self::UserUnavailable,
            Theirs::UserRejected => Self::UserRejected,
            Theirs::SipTrunkFailure => Self::SipTrunkFailure,
            Theirs::ConnectionTimeout => Self::ConnectionTimeout,
            Theirs::MediaFailure => Self::MediaFailure,
            Theirs::AgentError => Self::AgentError,
        }
    }
}

/// What a question to the SFU brought.
#[derive(Clone, Copy, Debug)]
pub enum Answered<T> {
    /// What was asked for.
    Yes(T),
    /// A clear refusal: 401, 403, 404.
    Refused,
    /// More than is read.
    TooMuch,
    /// Another answer.
    Unclear,
    /// Nothing in time.
    TimedOut,
    /// Refused, reset, closed, or 502 to 504.
    Unreachable,
}

impl<T> Answered<T> {
    /// What the answer says of the SFU as a whole.
    #[must_use]
    pub fn reach(&self) -> Reach {
        match self {
            Self::Yes(_) | Self::Refused | Self::TooMuch | Self::Unclear => Reach::Answered,
            Self::TimedOut => Reach::TimedOut,
            Self::Unreachable => Reach::Unreachable,
        }
    }
}

/// How a call to the SFU ended, as far as the SFU as a whole is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Any HTTP answer but 502 to 504.
    Answered,
    /// Nothing within the time that was given.
    TimedOut,
    /// Refused, reset, closed, or 502 to 504 from a proxy.
    Unreachable,
}
