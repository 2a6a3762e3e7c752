//! The thin driver around the pure core: reads the clocks, asks the homeserver and the SFU what the core wants to know,
//! removes whom it wants removed, and feeds back what came of it. Nothing is decided here.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use livekit_protocol::participant_info::State as ParticipantState;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::membership::{
    Action, IssuedToken, MembershipAnswer, MembershipQuery, MembershipTracker, ParticipantKey, QueryScope, RemovalOutcome, StoredState,
};
use super::name::Name;
use super::{EndDelegatedLeave, Settings};
use crate::backoff::as_millis;
use crate::clock::Clock;
use crate::homeserver::{OwnError, OwnHomeserver, Subject};
use crate::identity::Seat;
use crate::log_throttle::LogThrottle;
use crate::sfu::webhook::{Kind, Webhook};
use crate::sfu::{ParticipantInfo, Sfu, SfuError};
use crate::store::token;
use crate::time::Time;

/// No token lasts longer, whatever a record says.
const MAX_TTL_MS: u64 = 24 * 60 * 60 * 1000;
/// A timer that is later than this: the process stood still.
const WOKE_MS: u64 = 3_000;
/// Time for a question about one user, and for one about all members of a room.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const LIST_TIMEOUT: Duration = Duration::from_secs(10);

/// The driver.
pub(super) struct Driver {
    core: Mutex<Core>,
    clock: Clock,
    own: Arc<OwnHomeserver>,
    sfu: Arc<Sfu>,
    store: token::Queue,
    end_delegated_leave: EndDelegatedLeave,
    /// The timer sleeps for another moment now.
    rearm: Notify,
    unclear: LogThrottle,
    failing: LogThrottle,
    full: LogThrottle,
    removed: LogThrottle,
}

struct Core {
    tracker: MembershipTracker,
    /// What the timer sleeps for.
    armed: Option<Time>,
}

impl Driver {
    pub(super) fn new(settings: Settings) -> Self {
        let clock = Clock::start();
        let own = settings.own.name().as_str().into();
        let tracker = MembershipTracker::new(as_millis(settings.interval), own, settings.max_tokens, clock.now());
        Self {
            core: Mutex::new(Core { tracker, armed: None }),
            clock,
            own: settings.own,
            sfu: settings.sfu,
            store: settings.store,
            end_delegated_leave: settings.end_delegated_leave,
            rearm: Notify::new(),
            unclear: LogThrottle::once_a_minute(),
            failing: LogThrottle::once_a_minute(),
            full: LogThrottle::once_a_minute(),
            removed: LogThrottle::ten_a_second(),
        }
    }

    // --- from outside ---

    pub(super) fn on_token(self: &Arc<Self>, room_id: &str, user_id: &str, seat: &Seat, ttl: Duration, checked: bool) -> bool {
        let now = self.clock.now();
        let token = IssuedToken {
            room_id,
            user_id,
            room: &seat.room,
            identity: &seat.identity,
            end: now.after(as_millis(ttl)),
            checked,
        };
        let mut refused = None;
        self.feed(|tracker| {
            tracker.on_token(&token, now).unwrap_or_else(|error| {
                refused = Some(error);
                Vec::new()
            })
        });
        let Some(error) = refused else { return true };
        tracing::debug!(user = user_id, room = &*seat.room, "a token cannot be watched");
        self.full.log(|count| {
            let reason = error.to_string();
            let remedy = "a shorter LIVEKIT_JWT_TTL_SECONDS lets tokens be forgotten sooner";
            tracing::warn!(reason, count, remedy, "tokens are refused: who holds too many could not be removed");
        });
        false
    }

    pub(super) fn handle_webhook(self: &Arc<Self>, webhook: &Webhook) {
        let Some(room) = webhook.room.as_ref().map(|room| &*room.name) else {
            return;
        };
        let identity = webhook.participant.as_ref().map(|participant| &*participant.identity);
        let now = self.clock.now();
        self.feed(|tracker| {
            tracker.on_webhook(room);
            match (webhook.kind, identity) {
                (Kind::ParticipantJoined | Kind::TrackPublished, Some(identity)) => return tracker.on_present(room, identity, now),
                (Kind::ParticipantLeft | Kind::ParticipantConnectionAborted, Some(identity)) => tracker.on_gone(room, identity, now),
                (Kind::RoomFinished, _) => tracker.on_room_finished(room, now),
                (Kind::ParticipantJoined | Kind::ParticipantLeft | Kind::ParticipantConnectionAborted | Kind::TrackPublished, None)
                | (Kind::RoomStarted | Kind::TrackUnpublished | Kind::Other, _) => {}
            }
            Vec::new()
        });
    }

    pub(super) fn handle_list(self: &Arc<Self>, room: &str, identities: &[&str], asked: Instant) {
        let present: BTreeSet<Name> = identities.iter().map(|&identity| Name::from(identity)).collect();
        let (asked, now) = (self.clock.at(asked), self.clock.now());
        self.feed(|tracker| tracker.on_list(&Name::from(room), Some(&|identity| present.contains(identity)), asked, now));
    }

    /// Writes what is not written yet, until `deadline`. Nothing is stored after it.
    pub(super) async fn close_store(&self, deadline: Instant) {
        self.store.stop(deadline).await;
    }

    // --- tasks ---

    /// Takes in what the store has, which waits for one that is away.
    pub(super) async fn restore(self: Arc<Self>, mut restored: token::Restored) {
        let mut count = 0_usize;
        while let Some(stored) = restored.next().await {
            self.take_in(&stored);
            count += 1;
        }
        if count > 0 {
            tracing::info!(count, "tokens restored: those who left the Matrix room meanwhile are removed");
        }
    }

    fn take_in(self: &Arc<Self>, token::StoredToken { room, identity, value }: &token::StoredToken<'_>) {
        let wall = self.clock.wall();
        let now = self.clock.now();
        let token = IssuedToken {
            room_id: &value.room_id,
            user_id: &value.user_id,
            room,
            identity,
            end: wall.time(value.expires_at).min(now.after(MAX_TTL_MS)),
            checked: value.member,
        };
        let state = StoredState {
            member: value.member,
            left: value.left,
            seen: value.last_seen.map(|at| wall.time(at)),
        };
        self.feed(|tracker| {
            tracker.restore(&token, state, now);
            Vec::new()
        });
    }

    /// Tells the core that its next moment has come.
    pub(super) async fn keep_time(self: Arc<Self>) {
        loop {
            let rearm = self.rearm.notified();
            let next = {
                let mut core = self.lock();
                core.armed = core.tracker.next_deadline();
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
                let now = self.clock.now();
                if now.since(at) > WOKE_MS {
                    self.lock().tracker.on_woke(now);
                }
            }
            let now = self.clock.now();
            self.feed(|tracker| tracker.on_time(now));
            // A core with much to do must not keep the others from running.
            tokio::task::yield_now().await;
        }
    }

    // --- the loop: facts in, actions out ---

    fn feed(self: &Arc<Self>, fact: impl FnOnce(&mut MembershipTracker) -> Vec<Action>) {
        let mut core = self.lock();
        for action in fact(&mut core.tracker) {
            match action {
                Action::Persist(key) => self.persist(&core.tracker, &key),
                Action::Forget(key) if self.store.keeps() => self.store.remove(&key.room.to_string(), &key.identity.to_string()),
                Action::Forget(_) => {}
                Action::EndDelegatedLeave(key) => {
                    (self.end_delegated_leave)(&key.room.to_string(), &key.identity.to_string());
                }
                Action::Ask(query) => drop(tokio::spawn(self.clone().ask(query))),
                Action::List(room) => drop(tokio::spawn(self.clone().list(room))),
                Action::Remove(key) => drop(tokio::spawn(self.clone().remove(key))),
            }
        }
        let next = core.tracker.next_deadline();
        if next.is_some_and(|next| core.armed.is_none_or(|armed| next < armed)) {
            self.rearm.notify_one();
        }
    }

    fn persist(&self, tracker: &MembershipTracker, key: &ParticipantKey) {
        let Some(stored) = tracker.stored(key).filter(|_| self.store.keeps()) else {
            return;
        };
        let wall = self.clock.wall();
        self.store.put(&token::StoredToken {
            room: key.room.to_string().into(),
            identity: key.identity.to_string().into(),
            value: token::Value {
                room_id: (&*stored.room_id).into(),
                user_id: (&*stored.user_id).into(),
                expires_at: wall.unix_millis(stored.end),
                last_seen: stored.state.seen.map(|seen| wall.unix_millis(seen)),
                member: stored.state.member,
                left: stored.state.left,
            },
        });
    }

    /// Asked once: the core knows when to ask again.
    async fn ask(self: Arc<Self>, query: MembershipQuery) {
        let (asked, begun) = (self.clock.now(), Instant::now());
        let (room_id, own) = (&*query.room_id, &self.own);
        let members;
        let contains;
        let answer = match &query.scope {
            QueryScope::Members => match own.joined_members(room_id, begun + LIST_TIMEOUT).await {
                Ok(Some(list)) => {
                    members = list;
                    contains = |user: &str| members.contains(user);
                    MembershipAnswer::Members(&contains)
                }
                Ok(None) => MembershipAnswer::NoList,
                Err(error) => self.unclear(&error),
            },
            QueryScope::User(user) => self.joined(own.is_joined(room_id, Subject::User(user), begun, begun + QUERY_TIMEOUT).await),
            QueryScope::OwnServer => {
                let subject = Subject::Server(own.name());
                self.joined(own.is_joined(room_id, subject, begun, begun + QUERY_TIMEOUT).await)
            }
        };
        let now = self.clock.now();
        self.feed(|tracker| tracker.on_membership(&query, answer, asked, now));
    }

    fn joined(&self, answer: Result<bool, OwnError>) -> MembershipAnswer<'static> {
        match answer {
            Ok(joined) => MembershipAnswer::Joined(joined),
            Err(error) => self.unclear(&error),
        }
    }

    fn unclear(&self, error: &OwnError) -> MembershipAnswer<'static> {
        self.unclear.log(|count| {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::warn!(
                reason,
                count,
                remedy,
                "our homeserver does not say who is in a Matrix room: nobody is removed from the LiveKit room until it does"
            );
        });
        if matches!(error, OwnError::Timeout) {
            MembershipAnswer::TimedOut
        } else if error.may_pass() {
            let retry_after_ms = error.retry_after().map(as_millis);
            MembershipAnswer::Unavailable { retry_after_ms }
        } else {
            MembershipAnswer::Refused
        }
    }

    async fn list(self: Arc<Self>, room: Name) {
        let asked = self.clock.now();
        let listed = self.sfu.participants(&room.to_string(), LIST_TIMEOUT).await;
        let now = self.clock.now();
        match listed {
            Ok(participants) => {
                let present: BTreeSet<Name> = participants.iter().filter_map(present).map(Name::from).collect();
                self.feed(|tracker| tracker.on_list(&room, Some(&|identity| present.contains(identity)), asked, now));
            }
            Err(error) => {
                self.failing(&error);
                self.feed(|tracker| tracker.on_list(&room, None, asked, now));
            }
        }
    }

    async fn remove(self: Arc<Self>, key: Arc<ParticipantKey>) {
        let asked = self.clock.now();
        let (room, identity) = (key.room.to_string(), key.identity.to_string());
        let outcome = match self.sfu.remove(&room, &identity).await {
            Ok(()) => {
                // The identity of `/sfu/get` is the user's id and device.
                self.removed.log(|count| {
                    tracing::info!(room, count, "removed participant from LiveKit: user left the Matrix room");
                });
                tracing::debug!(room, identity, "removed");
                RemovalOutcome::Removed
            }
            Err(SfuError::NotFound) => RemovalOutcome::NotThere,
            Err(error) => {
                self.failing(&error);
                RemovalOutcome::Failed
            }
        };
        let now = self.clock.now();
        self.feed(|tracker| tracker.on_removed(&key, outcome, asked, now));
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
