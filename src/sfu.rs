//! Step 3, LiveKit: opens rooms, and tells who is in them.
//!
//! LiveKit's RoomService over our own pooled client: `livekit-api`'s `RoomClient` drops the path prefix of `LIVEKIT_URL`
//! and takes no client. `api.rs` makes the calls, `endpoint.rs` knows where the SFU is, `refusal.rs` says what a refusal means,
//! `room_memory.rs` when a room need not be asked for, `probe.rs` whether the SFU is there at all.
#![expect(clippy::disallowed_methods, reason = "an adapter: asks, waits and remembers")]

mod api;
mod endpoint;
mod probe;
mod refusal;
mod room_memory;
mod trial;
pub mod webhook;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant as StdInstant};

use parking_lot::Mutex;

pub use livekit_protocol::Room;
use livekit_protocol::participant_info::State as ParticipantState;
use tokio::time::{Instant, sleep};
use url::Url;

pub use api::Participant;
pub use probe::Probe;
pub use refusal::SfuError;

use crate::dns::Dns;
use crate::identity::ParticipantKey;
use crate::log_throttle::LogThrottle;
use crate::metrics::{METRICS, Neighbour, RoomResult};
use crate::presence::LOST_GRACE_MS;
use crate::retry;
use crate::single_flight::SingleFlight;
use crate::state::{Age, Change, State};
use crate::tls::Tls;
use crate::token::Minter;
use api::{Api, CALL_TIMEOUT};
use endpoint::Endpoint;
use room_memory::{Expected, RoomMemory, stands_for};
use webhook::{Kind, Webhook};

/// Seconds until a room that nobody enters is closed.
const EMPTY_TIMEOUT_SECONDS: u32 = 300;
/// Seconds until a room that was created again after a restart of the SFU is closed, if nobody enters it (decision L13).
const EMPTY_TIMEOUT_AGAIN_SECONDS: u32 = 60;
const _: () = assert!(
    EMPTY_TIMEOUT_AGAIN_SECONDS as u64 * 1_000 >= LOST_GRACE_MS,
    "a room that is created again stands as long as its participants have to come back"
);

static LOST_ROOMS: LogThrottle = LogThrottle::ten_a_second();

/// The SFU's RoomService, with the memory of its rooms.
pub struct Sfu {
    api: Api,
    endpoint: Arc<Endpoint>,
    /// How often the SFU had moved at the last call.
    moves: AtomicU64,
    rooms: Mutex<RoomMemory>,
    expected: Mutex<Expected>,
    creations: SingleFlight<Box<str>, Result<(), SfuError>>,
    state: State,
    told_of_auto_create: AtomicBool,
    /// Rooms are asked for each time.
    remembers_nothing: AtomicBool,
}

impl Sfu {
    /// `base` is the address of the API, path prefix included; `max_participants` is for the rooms that are opened, 0 is no limit.
    #[must_use]
    pub fn new(base: &Url, max_participants: u32, minter: Arc<Minter>, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        let endpoint = Arc::new(Endpoint::new(base, tls, dns));
        Self {
            api: Api::new(base, endpoint.clone(), minter, max_participants),
            endpoint,
            moves: AtomicU64::new(0),
            rooms: Mutex::new(RoomMemory::new()),
            expected: Mutex::new(Expected::new()),
            creations: SingleFlight::new(),
            state: State::new(Neighbour::Sfu),
            told_of_auto_create: AtomicBool::new(false),
            remembers_nothing: AtomicBool::new(false),
        }
    }

    /// Remembers no room from now on: webhooks may come to somebody else, or late.
    pub fn remember_nothing(&self) {
        self.remembers_nothing.store(true, Relaxed);
    }

    /// Sees to it that `room` stands. What may pass is tried again until `deadline`; one try is made in any case.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn ensure_room(&self, room: &str, deadline: Instant) -> Result<(), SfuError> {
        if self.rooms.lock().stands(room, StdInstant::now()) {
            METRICS.room(RoomResult::Remembered);
            return Ok(());
        }
        // Boxed: nearly every room stands.
        let opened = retry::until(deadline, || Box::pin(self.create_once(room))).await;
        METRICS.room(if opened.is_ok() { RoomResult::Opened } else { RoomResult::Failed });
        opened
    }

    /// All who want the same room at the same time share one call.
    async fn create_once(&self, room: &str) -> Result<(), SfuError> {
        self.creations.run(room.into(), pin!(self.create(room))).await.0
    }

    async fn create(&self, room: &str) -> Result<(), SfuError> {
        let asked = StdInstant::now();
        let (created, answered_at) = self.seen(self.api.create_room(room, EMPTY_TIMEOUT_SECONDS).await)?;
        let stands = stands_for(&created, answered_at);
        if !stands.is_zero() && !self.remembers_nothing.load(Relaxed) {
            self.rooms.lock().remember(room, asked + stands);
        }
        Ok(())
    }

    /// Creates a room that the SFU has forgotten.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn create_again(&self, room: &str) -> Result<Room, SfuError> {
        Ok(self.seen(self.api.create_room(room, EMPTY_TIMEOUT_AGAIN_SECONDS).await)?.0)
    }

    /// When the SFU last said what its clock shows, and what that was in seconds since 1970.
    #[must_use]
    pub fn last_date(&self) -> Option<(Instant, i64)> {
        self.api.last_date()
    }

    /// Asks about a participant. One in the state DISCONNECTED is nobody, here and in lists.
    ///
    /// # Errors
    /// [`SfuError::NotFound`] where the SFU knows no such room or participant; anything else says nothing about it.
    pub async fn participant(&self, room: &str, identity: &str, within: Duration) -> Result<Participant, SfuError> {
        let found = self.seen_within(self.api.get_participant(room, identity, within).await, within)?;
        if is_there(&found) { Ok(found) } else { Err(SfuError::NotFound) }
    }

    /// All participants of a room; none where it does not exist.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn participants(&self, room: &str, within: Duration) -> Result<Vec<Participant>, SfuError> {
        let mut all = self.seen_within(self.api.list_participants(room, within).await, within)?;
        all.retain(is_there);
        Ok(all)
    }

    /// Ends a participant's session. Their token still lets them in again.
    ///
    /// # Errors
    /// [`SfuError::NotFound`] where the SFU knows no such room or participant; after any other, they may still be there.
    pub async fn remove(&self, room: &str, identity: &str) -> Result<(), SfuError> {
        self.seen(self.api.remove_participant(room, identity).await)
    }

    /// Lists those of `names` that exist.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn list_rooms(&self, names: Vec<String>) -> Result<Vec<Room>, SfuError> {
        self.seen(self.api.list_rooms(names).await)
    }

    /// A connection of one's own, to ask whether the SFU is there.
    #[must_use]
    pub fn probe(&self) -> Probe {
        Probe::new(self.endpoint.clone())
    }

    /// Notes that this participant may open rooms and is on the way.
    pub fn expect(&self, participant: &ParticipantKey) {
        self.expected
            .lock()
            .expect(&participant.room, &participant.identity, StdInstant::now());
    }

    /// Takes in what the SFU says by itself. A room that ended under somebody on the way into it is created once more
    /// (decision T6b).
    pub fn handle_webhook(self: &Arc<Self>, webhook: &Webhook) {
        let Some(room) = webhook.room.as_ref().map(|room| room.name.clone()) else {
            return;
        };
        match webhook.kind {
            Kind::RoomFinished => {
                self.rooms.lock().forget(&room);
                if self.expected.lock().anybody(&room, StdInstant::now()) {
                    tokio::spawn(self.clone().create_once_more(room));
                }
            }
            Kind::ParticipantJoined => {
                if let Some(participant) = &webhook.participant {
                    self.expected.lock().arrived(&room, &participant.identity);
                }
            }
            Kind::RoomStarted
            | Kind::ParticipantLeft
            | Kind::ParticipantConnectionAborted
            | Kind::TrackPublished
            | Kind::TrackUnpublished
            | Kind::Other => {}
        }
    }

    async fn create_once_more(self: Arc<Self>, room: Box<str>) {
        tracing::debug!(room = &*room, "a room ended under somebody on the way into it");
        if let Err(error) = self.create_once(&room).await {
            LOST_ROOMS.log(|count| {
                let (reason, remedy) = (error.to_string(), error.remedy());
                tracing::warn!(name: "room_not_reopened",
                    room = &*room,
                    reason,
                    count,
                    remedy,
                    "a room that ended too early could not be created again"
                );
            });
        }
    }

    /// Tokens for its API are made anew: they are signed with another key from now on.
    pub fn forget_tokens(&self) {
        self.api.forget_tokens();
    }

    /// The SFU may have been restarted.
    pub fn forget_rooms(&self) {
        self.rooms.lock().forget_all();
    }

    /// Asks a cheap question and logs what is wrong: a wrong key or path is told at the start and not by the first user.
    pub async fn check(&self) {
        // Reading the CA bundle takes some milliseconds, in which the service has to answer already.
        let tls = self.endpoint.tls.clone();
        let _ = tokio::task::spawn_blocking(move || tls.config().map(drop)).await;
        if self.try_key().await.is_ok() {
            self.check_auto_create().await;
        }
    }

    /// Asks a cheap question with the key.
    ///
    /// # Errors
    /// When the SFU cannot be used.
    pub async fn try_key(&self) -> Result<(), SfuError> {
        // The name of no room: the answer is empty whatever goes on there.
        self.list_rooms(vec!["-".to_owned()]).await.map(drop)
    }

    /// Where anybody opens rooms by joining, full access means nothing. Asked without opening one.
    async fn check_auto_create(&self) {
        let opens = self.api.opens_rooms_by_joining().await;
        if opens == Some(true) && !self.told_of_auto_create.swap(true, Relaxed) {
            tracing::warn!(name: "auto_create_on",
                remedy = "set `room: { auto_create: false }` in livekit-server's config.yaml",
                "the SFU opens rooms for whoever joins (auto_create is on): users without full access can open rooms, too"
            );
        }
        if opens == Some(false) && self.told_of_auto_create.swap(false, Relaxed) {
            tracing::info!(name: "auto_create_off", "the SFU does not open rooms for whoever joins any more");
        }
    }

    /// Checks it now and for ever, each `interval` while it fails, a tenth as often while it does not.
    pub async fn watch(&self, interval: Duration) {
        loop {
            self.check().await;
            sleep(self.state.next_check(interval)).await;
        }
    }

    /// Logs one line for each change, whichever call shows it.
    fn note_state<T>(&self, outcome: &Result<T, SfuError>, within: Duration) {
        // Some questions have little time, and one of them says nothing of the SFU.
        if within < CALL_TIMEOUT && matches!(outcome, Err(SfuError::Timeout)) {
            return;
        }
        // Nor does what is wrong with one question.
        let error = outcome.as_ref().err().filter(|error| error.is_about_the_sfu());
        self.state.seen(error.map(SfuError::remedy), |change| match (change, error) {
            (Change::Good, _) => tracing::info!(name: "sfu_up", "the SFU answers and accepts the key"),
            (Change::Back(after), _) => tracing::info!(name: "sfu_back", "the SFU answers again, after {}", Age(after)),
            (Change::Bad, error) => {
                let (reason, remedy) = (error.map(ToString::to_string), error.map(SfuError::remedy));
                tracing::warn!(name: "sfu_down",
                    reason,
                    remedy,
                    "the SFU cannot be used; requests that open a room will fail until it can"
                );
            }
        });
    }

    /// A call that fails at the connection, or an SFU that is elsewhere by now, may mean that it was restarted: what is
    /// remembered is worth nothing then.
    fn seen<T>(&self, outcome: Result<T, SfuError>) -> Result<T, SfuError> {
        self.seen_within(outcome, CALL_TIMEOUT)
    }

    fn seen_within<T>(&self, outcome: Result<T, SfuError>, within: Duration) -> Result<T, SfuError> {
        self.note_state(&outcome, within);
        let moves = self.endpoint.moves();
        if self.moves.swap(moves, Relaxed) != moves || outcome.as_ref().is_err_and(SfuError::connection_failed) {
            self.forget_rooms();
        }
        outcome
    }
}

fn is_there(participant: &Participant) -> bool {
    participant.state != ParticipantState::Disconnected as i32
}
