//! The thin driver around the pure core: reads the clocks, asks the homeserver and the SFU what the core wants to know,
//! removes whom it wants removed, and feeds back what came of it. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use livekit_protocol::participant_info::State as ParticipantState;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::name::Name;
use super::watch::{About, Config, Key, Outcome, Output, Past, Person, Question, Said, Token, Watch};
use super::{Issued, Settings};
use crate::backoff::as_millis;
use crate::clock::Clock;
use crate::homeserver::{OwnError, OwnHomeserver, Whose};
use crate::log_throttle::LogThrottle;
use crate::sfu::webhook::{Kind, Webhook};
use crate::sfu::{ParticipantInfo, Sfu, SfuError};
use crate::store::token::{Queue, Restored, StoredToken, Value};
use crate::time::Time;

/// No token lasts longer, whatever a record says.
const LONGEST: u64 = 24 * 60 * 60 * 1000;
/// Of one user: what many devices need within an hour, and not enough to crowd out the others.
const MOST_PER_USER: u32 = 500;
/// Up to so many users of a room are asked about one by one.
const FEW: usize = 8;
/// Time for a question about one user, and for one about all members of a room.
const QUESTION: Duration = Duration::from_secs(5);
const LONG_QUESTION: Duration = Duration::from_secs(10);
/// Time for a question about one participant.
const LOOK: Duration = Duration::from_secs(5);

/// The driver.
pub(super) struct Driver {
    core: Mutex<Core>,
    clock: Clock,
    own: Arc<OwnHomeserver>,
    sfu: Arc<Sfu>,
    store: Queue,
    /// The timer sleeps for another moment now.
    rearm: Notify,
    unclear: LogThrottle,
    failing: LogThrottle,
    max_tokens: usize,
    full: LogThrottle,
    kicked: LogThrottle,
}

struct Core {
    watch: Watch,
    /// What the timer sleeps for.
    armed: Option<Time>,
}

impl Driver {
    pub(super) fn new(settings: Settings) -> Self {
        let Settings {
            own,
            sfu,
            store,
            interval,
            max_tokens,
        } = settings;
        let config = Config {
            interval: as_millis(interval),
            own: own.name().as_str().into(),
            most: max_tokens,
            most_per_user: MOST_PER_USER,
        };
        let clock = Clock::start();
        Self {
            core: Mutex::new(Core {
                watch: Watch::new(config, rand::random(), clock.now()),
                armed: None,
            }),
            clock,
            max_tokens,
            own,
            sfu,
            store,
            rearm: Notify::new(),
            unclear: LogThrottle::once_a_minute(),
            failing: LogThrottle::once_a_minute(),
            full: LogThrottle::once_a_minute(),
            kicked: LogThrottle::ten_a_second(),
        }
    }

    // --- from outside ---

    pub(super) fn issued(self: &Arc<Self>, issued: &Issued<'_>) -> bool {
        let now = self.clock.now();
        let token = Token {
            room_id: issued.room_id,
            user_id: issued.user_id,
            room: &issued.seat.room,
            identity: &issued.seat.identity,
            end: now.after(as_millis(issued.ttl)),
            checked: issued.checked,
        };
        let mut tracked = true;
        self.feed(|watch| {
            watch.issued(&token, now).unwrap_or_else(|| {
                tracked = false;
                Vec::new()
            })
        });
        if !tracked {
            tracing::debug!(user = issued.user_id, room = &*issued.seat.room, "a token is not kept in mind");
            self.full.log(|count| {
                tracing::warn!(
                    count,
                    most = self.max_tokens,
                    most_per_user = MOST_PER_USER,
                    remedy = "a shorter LIVEKIT_JWT_TTL_SECONDS lets tokens be forgotten sooner",
                    "too many tokens, in all or of one user: members are refused more, and others are not removed when they leave"
                );
            });
        }
        tracked
    }

    pub(super) fn told(self: &Arc<Self>, webhook: &Webhook) {
        let Some(room) = webhook.room.as_ref().map(|room| &*room.name) else {
            return;
        };
        let identity = webhook.participant.as_ref().map(|participant| &*participant.identity);
        let now = self.clock.now();
        match (webhook.kind, identity) {
            (Kind::ParticipantJoined, Some(identity)) => self.feed(|watch| watch.came(room, identity, now)),
            (Kind::ParticipantLeft | Kind::ParticipantConnectionAborted, Some(identity)) => self.lock().watch.went(room, identity, now),
            (Kind::RoomFinished, _) => self.lock().watch.ended(room, now),
            (Kind::ParticipantJoined | Kind::ParticipantLeft | Kind::ParticipantConnectionAborted, None)
            | (Kind::RoomStarted | Kind::TrackPublished | Kind::TrackUnpublished | Kind::Other, _) => {}
        }
    }

    /// Writes what is not written yet, until `deadline`. Nothing is stored after it.
    pub(super) async fn close_store(&self, deadline: Instant) {
        self.store.stop(deadline).await;
    }

    // --- tasks ---

    /// Takes in what the store has, which waits for one that is away.
    pub(super) async fn restore(self: Arc<Self>, mut restored: Restored) {
        let mut count = 0_usize;
        while let Some(stored) = restored.next().await {
            self.take(&stored);
            count += 1;
        }
        if count > 0 {
            tracing::info!(count, "tokens restored: those who left the Matrix room meanwhile are removed");
        }
    }

    fn take(self: &Arc<Self>, StoredToken { room, identity, value }: &StoredToken<'_>) {
        let wall = self.clock.wall();
        let now = self.clock.now();
        let token = Token {
            room_id: &value.room_id,
            user_id: &value.user_id,
            room,
            identity,
            end: wall.time(value.expires_at).min(now.after(LONGEST)),
            checked: value.member,
        };
        let past = Past {
            member: value.member,
            left: value.left,
            seen: value.last_seen.map(|at| wall.time(at)),
        };
        self.feed(|watch| {
            watch.restore(&token, past, now);
            Vec::new()
        });
    }

    /// Tells the core that its next moment has come.
    pub(super) async fn keep_time(self: Arc<Self>) {
        loop {
            let rearm = self.rearm.notified();
            let next = {
                let mut core = self.lock();
                core.armed = core.watch.next_deadline();
                core.armed
            };
            let Some(at) = next else {
                rearm.await;
                continue;
            };
            if at > self.clock.now() {
                tokio::select! {
                    () = sleep_until(self.clock.instant(at)) => {}
                    () = rearm => continue,
                }
            }
            let now = self.clock.now();
            self.feed(|watch| watch.time(now));
            // A core with much to do must not keep the others from running.
            tokio::task::yield_now().await;
        }
    }

    // --- the loop: facts in, calls out ---

    fn feed(self: &Arc<Self>, fact: impl FnOnce(&mut Watch) -> Vec<Output>) {
        let mut core = self.lock();
        let outputs = fact(&mut core.watch);
        for output in outputs {
            match output {
                Output::Persist(key) => self.persist(&core.watch, &key),
                Output::Forget(key) if self.store.keeps() => self.store.remove(&key.room.to_string(), &key.identity.to_string()),
                Output::Forget(_) => {}
                Output::Ask(_) | Output::List(_) | Output::Get(_) | Output::Remove(_) => {
                    tokio::spawn(self.clone().carry_out(output));
                }
            }
        }
        let next = core.watch.next_deadline();
        if next.is_some_and(|next| core.armed.is_none_or(|armed| next < armed)) {
            self.rearm.notify_one();
        }
    }

    fn persist(&self, watch: &Watch, key: &Key) {
        let Some(row) = watch.row(key).filter(|_| self.store.keeps()) else {
            return;
        };
        let wall = self.clock.wall();
        self.store.put(&StoredToken {
            room: key.room.to_string().into(),
            identity: key.identity.to_string().into(),
            value: Value {
                room_id: (&*row.room_id).into(),
                user_id: (&*row.user_id).into(),
                expires_at: wall.unix_millis(row.end),
                last_seen: row.past.seen.map(|seen| wall.unix_millis(seen)),
                member: row.past.member,
                left: row.past.left,
            },
        });
    }

    async fn carry_out(self: Arc<Self>, output: Output) {
        match output {
            Output::Ask(question) => {
                self.ask(&question).await;
                let now = self.clock.now();
                self.feed(|watch| watch.over(&question.about, now));
            }
            Output::List(room) => self.list(&room).await,
            Output::Get(key) => self.get(&key).await,
            Output::Remove(key) => self.remove(&key).await,
            Output::Persist(_) | Output::Forget(_) => {}
        }
    }

    // --- the homeserver ---

    async fn ask(self: &Arc<Self>, question: &Question) {
        if question.people.len() > FEW {
            match self.ask_about_all(question).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => return self.unclear(&error),
            }
        }
        self.ask_one_by_one(question).await;
    }

    /// By one question for all; `false` where that does not tell, and each has to be asked about.
    async fn ask_about_all(self: &Arc<Self>, question: &Question) -> Result<bool, OwnError> {
        let asked = self.clock.now();
        let members = self.own.joined_members(&question.room_id, Instant::now() + LONG_QUESTION).await?;
        if let Some(members) = members {
            let said = |user: &str| {
                let joined = members.contains(user);
                Some(Said { joined, asked })
            };
            self.answered(&question.about, &said, Some(true));
            return Ok(true);
        }
        // The list is too long, or not for us to see, or nobody of ours is there any more.
        let asked = self.clock.now();
        if self.own_is_in(&question.room_id).await? {
            return Ok(false);
        }
        self.answered(&question.about, &|_| Some(Said { joined: false, asked }), Some(false));
        Ok(true)
    }

    async fn ask_one_by_one(self: &Arc<Self>, question: &Question) {
        for people in question.people.chunks(FEW) {
            let mut answers = BTreeMap::new();
            let (mut doubtful, mut failed) = (false, false);
            for Person { user_id, doubtful: doubt } in people {
                let asked = self.clock.now();
                match self.is_joined(&question.room_id, Whose::User(user_id)).await {
                    Ok(joined) => {
                        doubtful |= *doubt && !joined;
                        answers.insert(&**user_id, Said { joined, asked });
                    }
                    // The others would fare no better, and would have to wait for it.
                    Err(error) => {
                        self.unclear(&error);
                        failed = true;
                        break;
                    }
                }
            }
            let own_is_in = if doubtful {
                match self.own_is_in(&question.room_id).await {
                    Ok(is_in) => Some(is_in),
                    Err(error) => {
                        self.unclear(&error);
                        None
                    }
                }
            } else {
                None
            };
            self.answered(&question.about, &|user| answers.get(user).copied(), own_is_in);
            if failed {
                return;
            }
        }
    }

    async fn own_is_in(&self, room_id: &str) -> Result<bool, OwnError> {
        self.is_joined(room_id, Whose::Server(self.own.name())).await
    }

    /// Asked once: the next sweep asks again.
    async fn is_joined(&self, room_id: &str, whose: Whose<'_>) -> Result<bool, OwnError> {
        let now = Instant::now();
        self.own.is_joined(room_id, whose, now, now + QUESTION).await
    }

    fn answered(self: &Arc<Self>, about: &About, said: &dyn Fn(&str) -> Option<Said>, own_is_in: Option<bool>) {
        let now = self.clock.now();
        self.feed(|watch| watch.answered(about, said, own_is_in, now));
    }

    fn unclear(&self, error: &OwnError) {
        self.unclear.log(|count| {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::warn!(
                reason,
                count,
                remedy,
                "our homeserver does not say who is in a Matrix room: nobody is removed from the LiveKit room until it does"
            );
        });
    }

    // --- the SFU ---

    async fn list(self: &Arc<Self>, room: &Name) {
        let asked = self.clock.now();
        let listed = self.sfu.participants(&room.to_string(), LOOK).await;
        let now = self.clock.now();
        match listed {
            Ok(participants) => {
                let there: BTreeSet<Name> = participants.iter().filter_map(present).map(Name::from).collect();
                self.feed(|watch| watch.listed(room, Some(&|identity| there.contains(identity)), asked, now));
            }
            Err(error) => {
                self.failing(&error);
                self.feed(|watch| watch.listed(room, None, asked, now));
            }
        }
    }

    async fn get(self: &Arc<Self>, key: &Key) {
        let asked = self.clock.now();
        let (room, identity) = (key.room.to_string(), key.identity.to_string());
        let is_there = match self.sfu.participant(&room, &identity, LOOK).await {
            Ok(participant) => Some(present(&participant).is_some()),
            Err(SfuError::NotFound) => Some(false),
            Err(error) => {
                self.failing(&error);
                None
            }
        };
        let now = self.clock.now();
        self.feed(|watch| watch.got(key, is_there, asked, now));
    }

    async fn remove(self: &Arc<Self>, key: &Key) {
        let asked = self.clock.now();
        let (room, identity) = (key.room.to_string(), key.identity.to_string());
        let outcome = match self.sfu.remove(&room, &identity).await {
            Ok(()) => {
                // The identity of `/sfu/get` is the user's id and device.
                self.kicked.log(|count| {
                    tracing::info!(room, count, "somebody was removed from the LiveKit room: they left the Matrix room");
                });
                tracing::debug!(room, identity, "removed");
                Outcome::Removed
            }
            Err(SfuError::NotFound) => Outcome::NotThere,
            Err(error) => {
                self.failing(&error);
                if error.may_pass() || error.is_elsewhere() {
                    Outcome::Failed
                } else {
                    Outcome::Refused
                }
            }
        };
        let now = self.clock.now();
        self.feed(|watch| watch.removed(key, outcome, asked, now));
    }

    fn failing(&self, error: &SfuError) {
        self.failing.log(|count| {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::warn!(
                reason,
                count,
                remedy,
                "the SFU does not remove, or does not show, those who hold tokens; it is tried again"
            );
        });
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The identity of a participant who is there.
fn present(participant: &ParticipantInfo) -> Option<&str> {
    (participant.state != ParticipantState::Disconnected as i32).then_some(&participant.identity)
}
