//! Kick on leave (decision A8): whoever is in a call and leaves its Matrix room, or is banned from it, is removed from the LiveKit
//! room, and again when they come back with the old token, which the SFU goes on accepting.
//!
//! Fails open: nobody is removed without a clear no of our own homeserver about somebody of whom it had said yes.
//!
//! ```text
//! kick.rs         the handle and the only clock: makes the calls and feeds back what they brought; decides nothing
//! membership.rs   who is in the call and has left the Matrix room, pure: facts in, actions out; the rules are there
//! shares.rs       how many tokens are watched, and whose, pure
//! name.rs         names on the SFU, kept in little space, pure
//! ```
//!
//! * Only ever one participant is removed, never a room: users of other homeservers publish in it too.
//! * A removal is told at `info`, with the LiveKit room. Names of Matrix users and rooms are told at `debug` only.
#![expect(clippy::disallowed_methods, reason = "the driver of kick on leave")]

mod membership;
mod name;
mod shares;

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use crate::backoff::as_millis;
use crate::clock::Clock;
use crate::homeserver::{OwnError, OwnHomeserver, Subject};
use crate::identity::ParticipantKey;
use crate::log_throttle::LogThrottle;
use crate::metrics::METRICS;
use crate::presence::FRESH_MS;
use crate::sfu::webhook::{Kind, Webhook};
use crate::sfu::{Sfu, SfuError};
use crate::store::token;
use crate::time::Time;
use membership::{Action, IssuedToken, MembershipAnswer, MembershipQuery, MembershipTracker, QueryScope, RemovalOutcome, TokenKey};
use name::Name;
pub use shares::IsListed;
use shares::{CapacityError, Shares};

/// A timer that is later than this: the process stood still.
const WOKE_MS: u64 = 3_000;
const _: () = assert!(
    membership::EVIDENCE_MS == FRESH_MS,
    "a leave and a removal follow from evidence of the same age"
);
/// Time for a question about one user, and for one about all members of a room.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const LIST_TIMEOUT: Duration = Duration::from_secs(10);

pub type EndDelegatedLeave = Box<dyn Fn(&str, &str) + Send + Sync>;

pub struct Settings {
    /// Our homeserver, which knows who is joined.
    pub own: Arc<OwnHomeserver>,
    /// SFU that participants are removed from.
    pub sfu: Arc<Sfu>,
    /// Store of the tokens.
    pub store: token::Queue,
    pub interval: Duration,
    pub max_tokens: usize,
    /// `None` where no other homeserver than our own is listed.
    pub is_listed: Option<IsListed>,
    /// Whether the records of all tokens are this process' business: no other replica watches.
    pub is_ours: Box<dyn Fn() -> bool + Send + Sync>,
    /// Told of who left the Matrix room: there is no leave to send for them (decision L6).
    pub end_delegated_leave: EndDelegatedLeave,
}

/// A token that could be watched, and is not yet: it may be refused for another reason.
pub struct Wanted<'a> {
    kick: &'a KickOnLeave,
    token: IssuedToken<'a>,
    ttl: Duration,
}

impl Wanted<'_> {
    /// Watches the token, which is about to be issued. `false` where others have taken the places meanwhile.
    #[must_use]
    pub fn begin(self) -> bool {
        let issued = self.kick.feed(|tracker, now| {
            let token = IssuedToken {
                end: now.after(as_millis(self.ttl)),
                ..self.token
            };
            tracker.on_token(&token, now)
        });
        self.kick.is_taken(&self.token, issued)
    }
}

/// The handle to all tokens that are watched.
#[derive(Clone)]
pub struct KickOnLeave(Arc<Driver>);

struct Driver {
    tracker: Mutex<MembershipTracker>,
    clock: Clock,
    settings: Settings,
    /// The timer may have to sleep for another moment now.
    rearm: Notify,
    unclear: LogThrottle,
    failing: LogThrottle,
    full: LogThrottle,
    removed: LogThrottle,
}

impl KickOnLeave {
    /// Starts with nothing; [`Self::restore`] reads the store.
    #[must_use]
    pub fn new(mut settings: Settings) -> Self {
        let clock = Clock::start();
        let own = settings.own.name().as_str().into();
        let shares = Shares::new(own, settings.is_listed.take(), settings.max_tokens);
        let tracker = MembershipTracker::new(as_millis(settings.interval), shares, clock.now());
        let kick = Self(Arc::new(Driver {
            tracker: Mutex::new(tracker),
            clock,
            settings,
            rearm: Notify::new(),
            unclear: LogThrottle::once_a_minute(),
            failing: LogThrottle::once_a_minute(),
            full: LogThrottle::once_a_minute(),
            removed: LogThrottle::ten_a_second(),
        }));
        tokio::spawn(kick.clone().keep_time());
        kick
    }

    // --- from outside ---

    /// Takes in what the store has, which waits for one that is away, and what another instance writes there while this one follows it. What
    /// it has lost is put there again.
    pub fn restore(&self, mut restored: token::Restored) -> JoinHandle<()> {
        let kick = self.clone();
        tokio::spawn(async move {
            let (mut count, mut seen) = (0_usize, HashSet::new());
            let hasher = RandomState::new();
            while let Some(found) = restored.next().await {
                match found {
                    token::Found::Token(stored) => {
                        seen.insert(hasher.hash_one(TokenKey::new(&stored.room, &stored.identity)));
                        let is_new = kick.feed(|tracker, now| tracker.restore(&stored, &kick.0.clock.wall(), now));
                        count += usize::from(is_new);
                    }
                    token::Found::Anew => seen.clear(),
                    token::Found::All { again } => {
                        let (count, seen) = (std::mem::take(&mut count), std::mem::take(&mut seen));
                        if again && (kick.0.settings.is_ours)() {
                            kick.put_again(|key| !seen.contains(&hasher.hash_one(key))).await;
                        }
                        if count > 0 {
                            tracing::info!(name: "tokens_restored", count, "tokens restored: those who left the Matrix room meanwhile are removed");
                        }
                    }
                }
            }
        })
    }

    /// Stores those tokens that the store lacks.
    async fn put_again(&self, is_lacking: impl Fn(&TokenKey) -> bool) {
        let keys = self.0.tracker.lock().keys();
        for keys in keys.chunks(256) {
            {
                let tracker = self.0.tracker.lock();
                for key in keys.iter().filter(|key| is_lacking(key)) {
                    self.put(&tracker, key);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn put(&self, tracker: &MembershipTracker, key: &TokenKey) {
        if let Some(record) = tracker.record(key, &self.0.clock.wall()) {
            self.0.settings.store.put(&record);
        }
    }

    /// A token for `participant` is wanted, which is valid for `ttl`; `checked` where our homeserver has just said that the user is joined.
    /// None where it could not be watched, so that its holder could not be removed.
    #[must_use]
    pub fn place_for<'a>(
        &'a self,
        room_id: &'a str,
        user_id: &'a str,
        participant: &'a ParticipantKey,
        ttl: Duration,
        checked: bool,
    ) -> Option<Wanted<'a>> {
        let now = self.0.clock.now();
        let token = IssuedToken {
            room_id,
            user_id,
            room: &participant.room,
            identity: &participant.identity,
            end: now.after(as_millis(ttl)),
            checked: checked.then_some(now),
        };
        let free = self.0.tracker.lock().check(&token);
        self.is_taken(&token, free).then_some(Wanted { kick: self, token, ttl })
    }

    fn is_taken(&self, token: &IssuedToken<'_>, result: Result<(), CapacityError>) -> bool {
        let Err(error) = result else { return true };
        tracing::debug!(user = token.user_id, room = token.room, "a token cannot be watched");
        self.0.full.log(|count| {
            let reason = error.to_string();
            let remedy = "a shorter LIVEKIT_JWT_TTL_SECONDS lets tokens be forgotten sooner";
            tracing::warn!(name: "tokens_refused", reason, count, remedy, "tokens are refused: who holds too many could not be removed");
        });
        false
    }

    pub fn handle_webhook(&self, webhook: &Webhook) {
        let Some(room) = webhook.room.as_ref().map(|room| &*room.name) else {
            return;
        };
        let identity = webhook.participant.as_ref().map(|participant| &*participant.identity);
        self.feed(|tracker, now| {
            tracker.on_webhook(room);
            match (webhook.kind, identity) {
                (Kind::ParticipantJoined | Kind::TrackPublished, Some(identity)) => tracker.on_present(room, identity, now),
                (Kind::ParticipantLeft | Kind::ParticipantConnectionAborted, Some(identity)) => tracker.on_gone(room, identity, now),
                (Kind::RoomFinished, _) => tracker.on_room_finished(room, now),
                (Kind::ParticipantJoined | Kind::ParticipantLeft | Kind::ParticipantConnectionAborted | Kind::TrackPublished, None)
                | (Kind::RoomStarted | Kind::TrackUnpublished | Kind::Other, _) => {}
            }
        });
    }

    /// Takes in who is in a LiveKit room, as the SFU said when somebody else asked it then.
    pub fn handle_list(&self, room: &str, identities: &[&str], asked: Instant) {
        let present = identities.iter().map(|&identity| identity.into()).collect();
        let asked = self.0.clock.at(asked);
        self.feed(|tracker, now| tracker.on_list(&room.into(), Some(&present), asked, now));
    }

    /// Writes what is not written yet, until `deadline`; the last thing to be done.
    pub async fn close_store(&self, deadline: Instant) {
        self.0.settings.store.stop(deadline).await;
    }

    // --- the loop: facts in, actions out ---

    async fn keep_time(self) {
        let clock = &self.0.clock;
        loop {
            let Some(at) = self.0.tracker.lock().next_deadline() else {
                self.0.rearm.notified().await;
                continue;
            };
            if at > clock.now() {
                let _ = timeout_at(clock.instant(at), self.0.rearm.notified()).await;
                let now = clock.now();
                if now.since(at) > WOKE_MS {
                    self.0.tracker.lock().on_woke(now);
                }
                // Another moment may come first now.
                if now < at {
                    continue;
                }
            }
            self.feed(|_, _| {});
            // A core with much to do must not keep the others from running.
            tokio::task::yield_now().await;
        }
    }

    fn feed<T>(&self, fact: impl FnOnce(&mut MembershipTracker, Time) -> T) -> T {
        let Driver { clock, settings, .. } = &*self.0;
        let mut tracker = self.0.tracker.lock();
        // Read under the lock, so that the core never sees time run backwards.
        let now = clock.now();
        let result = fact(&mut tracker, now);
        for action in tracker.step(now) {
            match action {
                Action::Issued(key) => self.put(&tracker, &key),
                // Another replica may have issued a newer token of the same participant: the watcher knows all.
                Action::Mark(_) | Action::Forget(_) if !(settings.is_ours)() => {}
                Action::Mark(key) => self.put(&tracker, &key),
                Action::Forget(key) => settings.store.remove(&key.room.to_string(), &key.identity.to_string()),
                Action::EndDelegatedLeave(key) => (settings.end_delegated_leave)(&key.room.to_string(), &key.identity.to_string()),
                Action::Ask(query) => drop(tokio::spawn(self.clone().ask(query))),
                Action::List(room) => drop(tokio::spawn(self.clone().list(room))),
                Action::Remove(key) => drop(tokio::spawn(self.clone().remove(key))),
            }
        }
        self.0.rearm.notify_one();
        result
    }

    /// Asked once: the core knows when to ask again.
    async fn ask(self, query: MembershipQuery) {
        let (asked, begun) = (self.0.clock.now(), Instant::now());
        let (room_id, own) = (&*query.room_id, &self.0.settings.own);
        let members;
        let contains;
        let subject = match &query.scope {
            QueryScope::Members => None,
            QueryScope::User(user) => Some(Subject::User(user)),
            QueryScope::OwnServer => Some(Subject::Server(own.name())),
        };
        let answer = if let Some(subject) = subject {
            let joined = own.is_joined(room_id, subject, begun, begun + QUERY_TIMEOUT).await;
            joined.map(MembershipAnswer::Joined)
        } else {
            match own.joined_members(room_id, begun + LIST_TIMEOUT).await {
                Ok(Some(list)) => {
                    members = list;
                    contains = |user: &str| members.contains(user);
                    Ok(MembershipAnswer::Members(&contains))
                }
                Ok(None) => Ok(MembershipAnswer::NoList),
                Err(error) => Err(error),
            }
        };
        let answer = answer.unwrap_or_else(|error| self.unclear(&error));
        self.feed(|tracker, now| tracker.on_membership(&query, answer, asked, now));
    }

    fn unclear(&self, error: &OwnError) -> MembershipAnswer<'static> {
        self.0.unclear.log(|count| {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::warn!(name: "members_unknown",
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

    async fn list(self, room: Name) {
        let asked = self.0.clock.now();
        let listed = self.0.settings.sfu.participants(&room.to_string(), LIST_TIMEOUT).await;
        let listed = listed.inspect_err(|error| self.failing(error)).ok();
        let present = listed.map(|participants| participants.iter().map(|row| row.identity.as_str().into()).collect());
        self.feed(|tracker, now| tracker.on_list(&room, present.as_ref(), asked, now));
    }

    async fn remove(self, key: Arc<TokenKey>) {
        let asked = self.0.clock.now();
        let (room, identity) = (key.room.to_string(), key.identity.to_string());
        let outcome = match self.0.settings.sfu.remove(&room, &identity).await {
            Ok(()) => {
                METRICS.kicks.up();
                // The identity of `/sfu/get` is the user's id and device.
                self.0.removed.log(|count| {
                    tracing::info!(name: "participant_removed", room, count, "removed participant from LiveKit: user left the Matrix room");
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
        self.feed(|tracker, now| tracker.on_removed(&key, outcome, asked, now));
    }

    fn failing(&self, error: &SfuError) {
        self.0.failing.log(|count| {
            let (reason, remedy) = (error.to_string(), error.remedy());
            tracing::warn!(name: "removals_fail",
                reason,
                count,
                remedy,
                "the SFU does not remove, or does not show, those who hold tokens; it is tried again"
            );
        });
    }
}
