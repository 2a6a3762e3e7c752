//! LiveKit's words, as far as the pure code uses them: why somebody left, and what an answer of its API says. Pure.

use livekit_protocol as proto;

/// Why a participant left, by LiveKit's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
    /// LiveKit's name of the reason.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClientInitiated => "CLIENT_INITIATED",
            Self::DuplicateIdentity => "DUPLICATE_IDENTITY",
            Self::ServerShutdown => "SERVER_SHUTDOWN",
            Self::ParticipantRemoved => "PARTICIPANT_REMOVED",
            Self::RoomDeleted => "ROOM_DELETED",
            Self::StateMismatch => "STATE_MISMATCH",
            Self::JoinFailure => "JOIN_FAILURE",
            Self::Migration => "MIGRATION",
            Self::SignalClose => "SIGNAL_CLOSE",
            Self::RoomClosed => "ROOM_CLOSED",
            Self::UserUnavailable => "USER_UNAVAILABLE",
            Self::UserRejected => "USER_REJECTED",
            Self::SipTrunkFailure => "SIP_TRUNK_FAILURE",
            Self::ConnectionTimeout => "CONNECTION_TIMEOUT",
            Self::MediaFailure => "MEDIA_FAILURE",
            Self::AgentError => "AGENT_ERROR",
            Self::Unknown => "UNKNOWN_REASON",
        }
    }

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

/// Result of a question to the SFU.
#[derive(Clone, Copy, Debug)]
pub enum Answer<T> {
    /// The SFU gave what was asked for.
    Yes(T),
    /// The SFU's own `not_found`, or a participant in the state DISCONNECTED. Lists never bring it.
    No,
    /// The SFU, or a proxy before it, does not let us ask.
    Refused,
    /// The answer is larger than what is read.
    TooLarge,
    /// The answer is neither a yes nor a no.
    Unclear,
    /// No answer in time.
    TimedOut,
    /// Refused at the connection, reset, closed, or 502 to 504.
    Unreachable,
}

impl<T> Answer<T> {
    /// Answer that was asked for, if it came.
    pub const fn yes(&self) -> Option<&T> {
        match self {
            Self::Yes(answer) => Some(answer),
            Self::No | Self::Refused | Self::TooLarge | Self::Unclear | Self::TimedOut | Self::Unreachable => None,
        }
    }

    /// Says what the answer shows of the SFU as a whole.
    #[must_use]
    pub const fn reach(&self) -> Reach {
        match self {
            Self::Yes(_) | Self::No | Self::Refused | Self::TooLarge | Self::Unclear => Reach::Answered,
            Self::TimedOut => Reach::TimedOut,
            Self::Unreachable => Reach::Unreachable,
        }
    }
}

/// A participant that the SFU shows, in a state other than DISCONNECTED.
#[derive(Clone, Copy, Debug)]
pub struct ParticipantRow<'a> {
    /// Identity of the participant.
    pub identity: &'a str,
    /// Sid of the session.
    pub sid: &'a str,
    /// When it joined, by the SFU's clock; 0 where that is not said.
    pub joined_at_ms: u64,
    /// Whether the state is ACTIVE.
    pub active: bool,
}

/// A room that the SFU shows.
#[derive(Clone, Copy, Debug)]
pub struct RoomRow<'a> {
    /// Name of the room.
    pub name: &'a str,
    /// Sid of the room.
    pub sid: &'a str,
    /// How many are in it: up to 5 s old.
    pub num_participants: u32,
    /// Seconds from the last departure to the room's end; 0 where that is not said.
    pub departure_timeout: u32,
}

/// How a call to the SFU ended, as far as the SFU as a whole is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Any HTTP answer but 502 to 504.
    Answered,
    /// No answer within the time that was given.
    TimedOut,
    /// Refused, reset, closed, or 502 to 504 from a proxy.
    Unreachable,
}
