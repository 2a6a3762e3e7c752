//! The states of a job and the reasons for them.

use crate::time::Time;

/// Where a job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody has come yet.
    Waiting,
    /// Somebody is there.
    Connected,
    /// Somebody may be gone.
    Doubted {
        /// What raised the doubt.
        why: Doubt,
        /// When it was raised.
        since: Time,
        /// From when on a question must have been asked for its no to count.
        from: Time,
        /// When it ends by itself.
        until: Option<Time>,
    },
    /// The event is being sent or cancelled.
    Leaving {
        /// Which of them.
        errand: Errand,
        /// Why.
        cause: Cause,
        /// How far it is.
        step: Step,
        /// The end of the window.
        until: Time,
        /// One try and no more.
        once: bool,
        /// Failed tries.
        failures: u8,
    },
    /// Nothing more will be done.
    Finished(Reason),
}

/// Why somebody may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The SFU said so, with a reason that is usually final.
    Reported,
    /// To be asked: the SFU said so with a reason that people come back from, or the room is over.
    Suspected {
        /// The room ended; its standing needs no asking.
        room_over: bool,
    },
    /// The SFU denied the participant once.
    Absent {
        /// The room ended; its standing needs no asking.
        room_over: bool,
    },
    /// Denied twice; whether the room stands is being asked.
    Unplaced,
    /// The SFU has forgotten the room.
    Lost {
        /// What is left of the grace whenever the SFU does not answer, in milliseconds.
        left: u32,
    },
    /// The grace of a lost room is over; a clear answer is awaited.
    Overdue,
}

/// What a leaving job does with its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Sends it.
    Send {
        /// The participant came back while the call was on its way.
        returned: bool,
    },
    /// Cancels it: another one took its place.
    Cancel,
}

/// How far a call to the homeserver is. There is one of a kind, so there is never more than one in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Not planned.
    Idle,
    /// Due at that moment.
    At(Time),
    /// Due, waiting for its turn.
    Wanted,
    /// Sent at that moment.
    InFlight(Time),
}

/// Why a leave is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The SFU reported the departure.
    Reported,
    /// The SFU denied the participant twice, in a room that stands.
    Absent,
    /// The room ended.
    RoomOver,
    /// The SFU forgot the room, and the participant did not come back.
    RoomLost,
    /// The wait was over.
    NeverCame,
    /// Another delegation took its place.
    Replaced,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The leave was sent, or the event had been finalised already.
    Sent(Cause),
    /// The window closed before the homeserver took the leave.
    NotSent(Cause),
    /// The homeserver does not know the event any more.
    EventGone,
    /// The homeserver refuses us.
    Refused,
    /// No restart got through within one delay.
    GivenUp,
    /// The same, while restarts paused because the SFU is silent.
    SfuSilent,
    /// The join failed.
    JoinFailed,
    /// Nobody came, and the SFU did not say so clearly: somebody may be there.
    NeverCame,
    /// Another delegation took its place.
    Replaced,
    /// Its delay was over before it was restored.
    Expired,
}

/// A call to the homeserver that waits for its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Send the event.
    Send {
        /// The end of the window.
        until: Time,
    },
    /// Cancel it.
    Cancel {
        /// The end of the window.
        until: Time,
    },
    /// Restart it.
    Restart {
        /// When the homeserver fires it.
        until: Time,
        /// Until when it can wait while the homeserver limits.
        relaxed: Time,
    },
}
