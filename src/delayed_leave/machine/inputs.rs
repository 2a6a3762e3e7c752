//! What a job is told, and what it asks for.

use super::{Outcome, Reason};
use crate::time::{Delay, Time};
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

pub use crate::livekit::DisconnectReason as LeaveReason;

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
