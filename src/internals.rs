//! Parts that the tests in `tests/` look into: the pure cores, and the store by itself. What is named neither here nor by a public
//! module is private, so that the compiler tells what nobody uses.

pub mod backoff {
    pub use crate::backoff::{Jitter, READ_AFTER_SECONDS};
}
pub mod delayed_event {
    pub use crate::delayed_event::{DelayedEventAction, Outcome};
}
pub mod delayed_leave {
    pub use crate::delayed_leave::leave::Returned;
    pub use crate::delayed_leave::{Bounds, CapacityError, Delegated, FinishReason, Handover, HomeserverId, LeaveId, Phase};
}
pub mod dns {
    pub use crate::dns::Dns;
}
pub mod doctor {
    pub use crate::doctor::{Group, TicketKey, Use, Wishes, fault};
}
pub mod core {
    pub use crate::driver::core::{Action, Core, Delegation, Fact, Settings};
    pub use crate::driver::{CLOCK_CHECK_INTERVAL_MS, RESTORE_TIMEOUT, SUSPENDED_AFTER_MS};
}
pub mod fleet {
    pub use crate::fleet::{Answer, Counts, Entry, Fleet, Hearing, Kept, NodeId, NodeState, Output, Own, Position, Takeover, Watch};
}
pub mod livekit {
    pub use crate::livekit::{Answer, DisconnectReason, ParticipantRow, Reach, RoomRow};
}
pub mod metrics {
    pub use crate::metrics::{Gauges, METRICS};
    pub use crate::outcome::Outcome;
}
pub mod presence {
    pub use crate::presence::{DepartureCause, EventKind, FRESH_MS, Next, ParticipantId, Question, RoomId, Settings, SfuEvent, State};
}
pub mod store {
    pub use crate::store::record::field;
    pub use crate::store::shared::{Fence, Handed, Message, News, Shared, SharedStore};
    pub use crate::store::token::{self, StoredToken};
    pub use crate::store::{JobRecord, Jobs, Part, Replaced, Seen, Store, StoreError, Stored, StoredJobs, VerifiedHomeservers};
}
pub mod time {
    pub use crate::time::{Delay, Time, WallClock};
}
pub mod tls {
    pub use crate::tls::{Given, Tls};
}
