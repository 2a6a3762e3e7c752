//! Tracks who holds a LiveKit token and has left the Matrix room, and says what is to be done about it (decisions A8, L5a). Pure.
//!
//! ```text
//!            a yes, or a checked token             a clear no, asked some seconds after it
//!  Unknown ----------------------------> Member ----------------------------------------> Left
//!                                           ^                                               |
//!                                           +---------- a yes, or a checked token ----------+
//!
//!  Unknown   never removed: the homeserver never named this user as joined
//!  Left      removed as long as they are in the call, and whenever they come back
//! ```
//!
//! * Presence first: the homeserver is asked about users who are in the call, at every sweep, and about whoever comes in. Where two
//!   or more are there, one list of the Matrix room's members answers for all of them.
//! * An answer that is neither a clear yes nor a clear no changes nothing.
//! * A participant is removed only on a no that was asked for less than [`EVIDENCE_MS`] ago. An older one is asked for again, also
//!   before a removal that failed is tried again.
//! * Where our own homeserver is no longer in the Matrix room, it knows nothing about remote users any more: its no counts for local
//!   users only.
//! * A question that fails for one user concerns that user. A homeserver that cannot be reached ends the sweep; the next one begins
//!   with the room where that happened, or behind it if it was the same one twice.
//! * There are two sweeps with places of their own, about local and about remote users: the answers about the latter may have to wait
//!   for other homeservers, and a hostile one must not keep local users from being removed.
//! * The SFU is asked who is in a LiveKit room where webhooks say nothing about it, where somebody who left could come back, and every
//!   ten minutes where tokens are out that nobody seems to use; once per room and sweep at most.
//! * A token is forgotten when it has expired, ten minutes have passed since somebody was last seen on it (the SFU renews the tokens of
//!   those inside), and the SFU does not list them. Somebody who was not seen leaving may have left just before that list: it only
//!   starts the ten minutes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::name::Name;
use super::shares::{CapacityError, Origin, Shares, server};
use crate::store::token::StoredToken;
use crate::time::{Time, WallClock};

/// Questions to the homeserver at a time in each sweep, and calls to the SFU.
pub(super) const MAX_CALLS: usize = 8;
/// How long a no may be acted upon.
pub(super) const EVIDENCE_MS: u64 = 10_000;
/// For how long a no does not count after a yes, at most: the processes of a homeserver may disagree for a moment.
const SETTLE_MS: u64 = 5_000;
/// A departure that is reported so soon after an arrival may be that of the session before.
const OLD_SESSION_MS: u64 = 10_000;
/// No token lasts longer, whatever a record says.
const MAX_TTL_MS: u64 = 24 * 60 * 60_000;
/// The SFU takes a token for this long after its end.
const LEEWAY_MS: u64 = 60_000;
/// For how long the SFU renews the token of somebody inside.
const RENEWED_MS: u64 = 10 * 60_000;
/// How long a token is kept that might be forgotten, while the SFU does not say whether somebody is there.
const UNCLEAR_MS: u64 = 6 * 60 * 60_000;
/// How often a LiveKit room is listed that webhooks tell about.
const LIST_AGAIN_MS: u64 = 10 * 60_000;
/// Up to so many users of a Matrix room are asked about by name.
const BULK_QUERY_ABOVE: usize = 1;
/// How long a member list is not asked for that was too long or not for us to see, or did not come.
const NO_LIST_MS: u64 = 60 * 60_000;
const FAILED_LIST_MS: u64 = 10 * 60_000;
/// The longest pause that the homeserver can ask for.
const MAX_PAUSE_MS: u64 = 60 * 60_000;
/// The longest pause before a removal is tried again.
const MAX_RETRY_MS: u64 = 30_000;
/// Between two sweeps at least.
const MIN_SWEEP_GAP_MS: u64 = 1_000;
/// Matrix rooms looked at in one go.
const MAX_ROOMS_PER_STEP: usize = 1_000;
/// Bytes of all names of a token.
const MAX_NAME_BYTES: usize = 2 * 1024;

/// A LiveKit token that was issued, for the LiveKit room that belongs to the Matrix room `room_id`.
#[derive(Clone, Copy, Debug)]
pub(super) struct IssuedToken<'a> {
    pub(super) room_id: &'a str,
    pub(super) user_id: &'a str,
    pub(super) room: &'a str,
    pub(super) identity: &'a str,
    pub(super) end: Time,
    /// When the homeserver said that the user is joined, if it was asked for this token.
    pub(super) checked: Option<Time>,
}

/// The [`ParticipantKey`](crate::identity::ParticipantKey) of a token, in little space: one for each token that is watched.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct TokenKey {
    pub(super) room: Name,
    pub(super) identity: Name,
}

/// An action to take. The method that is named takes the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ask the homeserver, once: [`MembershipTracker::on_membership`].
    Ask(MembershipQuery),
    /// Ask the SFU who is in a LiveKit room: [`MembershipTracker::on_list`].
    List(Name),
    /// Remove a participant, at once or not at all: [`MembershipTracker::on_removed`].
    Remove(Arc<TokenKey>),
    /// The participant was removed from the Matrix room: a delegated leave has nothing left to send, its job ends without a call (L6).
    EndDelegatedLeave(Arc<TokenKey>),
    /// Store a token that is issued.
    Issued(Arc<TokenKey>),
    /// Store what is known of a user by now with their token.
    Mark(Arc<TokenKey>),
    Forget(Arc<TokenKey>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MembershipQuery {
    pub(super) room_id: Arc<str>,
    pub(super) scope: QueryScope,
    /// Sweep whose place the question takes.
    pub(super) origin: Origin,
    pub(super) is_sweep: bool,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum QueryScope {
    /// All members of the room: one list.
    Members,
    /// Whether this user is joined.
    User(Arc<str>),
    /// Whether our homeserver has a user in the room.
    OwnServer,
}

#[derive(Clone, Copy)]
pub(super) enum MembershipAnswer<'a> {
    /// Test of whether a user is on the list of members.
    Members(&'a dyn Fn(&str) -> bool),
    /// Whether the user is joined, or our homeserver in the room.
    Joined(bool),
    /// The list is longer than is read, or not for us to see.
    NoList,
    /// No answer to this question, while others may well be answered: any other 4xx, or something unreadable.
    Refused,
    TimedOut,
    /// Unreachable, 5xx or 429, with the pause that the homeserver asks for.
    Unavailable {
        retry_after_ms: Option<u64>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RemovalOutcome {
    Removed,
    NotThere,
    /// The participant may still be there.
    Failed,
}

/// All watched tokens, and what is known of their holders.
#[derive(Debug)]
pub(super) struct MembershipTracker {
    interval_ms: u64,
    began: Time,
    /// Moment since which the process runs: an answer to a question from before is no evidence.
    awake_since: Time,
    /// The homeserver wants no question before.
    paused_until: Time,
    tokens: BTreeMap<Arc<TokenKey>, Token>,
    calls: BTreeMap<Name, Call>,
    /// Matrix rooms, and until when their member lists are not asked for.
    rooms: BTreeMap<Arc<str>, Option<Time>>,
    users: BTreeMap<UserKey, User>,
    shares: Shares,
    /// Sweeps by [`Origin`].
    sweeps: [Sweep; 2],
    /// Questions that are under way or wait.
    open: BTreeSet<(Arc<str>, QueryScope)>,
    /// Users who are to be asked about apart from sweeps.
    due: BTreeSet<(Time, UserKey)>,
    /// The first sweep was brought forward, for those who were restored.
    is_hurried: bool,
    /// Calls to the SFU under way, and those that wait.
    removing: usize,
    listing: BTreeSet<Name>,
    removals: VecDeque<Arc<TokenKey>>,
    lists: VecDeque<Name>,
    /// Lists of members that sweeps wait for, and whether one is being read.
    member_lists: VecDeque<MembershipQuery>,
    is_reading_list: bool,
    /// Actions that [`Self::step`] gives beside what it finds.
    out: Vec<Action>,
}

/// A token: who may be in a LiveKit room under one identity.
#[derive(Debug)]
struct Token {
    user: Arc<str>,
    end: Time,
    /// When somebody was last known to be there, or may have been.
    seen: Option<Time>,
    presence: Presence,
    /// Whether somebody was seen on the token.
    is_used: bool,
    /// Being removed, or about to be.
    is_removing: bool,
    failures: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Presence {
    /// The token was issued, and nobody was seen coming; perhaps nobody looked.
    Issued,
    /// The participant is there, or may be while the SFU does not say it.
    Present,
    Gone,
}

/// A LiveKit room with the tokens for it.
#[derive(Debug)]
struct Call {
    room_id: Arc<str>,
    /// When it was last asked for who is there, with an answer.
    listed: Option<Time>,
    /// Being asked for that, or about to be.
    is_listing: bool,
    /// Whether a webhook has named the room.
    has_webhooks: bool,
    /// A departure was reported that may be an old one.
    is_unsure: bool,
}

type UserKey = (Arc<str>, Arc<str>);

#[derive(Debug, Default)]
struct User {
    membership: Membership,
    /// When a no was asked for that counts only if our homeserver is in the room.
    no: Option<Time>,
    keys: Vec<Arc<TokenKey>>,
    /// When the user is to be asked about apart from sweeps.
    due: Option<Time>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
enum Membership {
    #[default]
    Unknown,
    /// When the last yes was asked for.
    Member(Time),
    /// When the last no was asked for.
    Left(Time),
}

#[derive(Debug, Default)]
struct Sweep {
    /// When it began, or the next one will; none where there is nobody to ask about.
    at: Option<Time>,
    is_running: bool,
    /// The rooms of this sweep that it has not come to, the next one last.
    rooms: Vec<Arc<str>>,
    /// Homeservers about whose users nothing came in this sweep.
    hanging: BTreeSet<Box<str>>,
    /// The room that it began with because the homeserver could not be asked there in the sweep before.
    first: Option<Arc<str>>,
    /// The room in which the homeserver could not be asked, and whether the next sweep begins behind it.
    failed: Option<(Arc<str>, bool)>,
    asking: usize,
    queue: VecDeque<MembershipQuery>,
}

impl TokenKey {
    pub(super) fn new(room: &str, identity: &str) -> Self {
        Self {
            room: room.into(),
            identity: identity.into(),
        }
    }
}

impl Token {
    /// When the token may be forgotten.
    fn end_of_use(&self) -> Time {
        let end = self.end.after(LEEWAY_MS);
        self.seen.map_or(end, |seen| end.max(seen.after(RENEWED_MS)))
    }
}

impl Membership {
    /// Returns the membership that is known after an answer.
    fn after(self, joined: bool, asked: Time, settle_ms: u64) -> Self {
        match (self, joined) {
            (Self::Left(no), true) if asked < no => self,
            (Self::Member(yes), true) => Self::Member(yes.max(asked)),
            (Self::Unknown | Self::Left(_), true) => Self::Member(asked),
            (Self::Unknown, false) => self,
            (Self::Member(yes), false) if asked < yes.after(settle_ms) => self,
            (Self::Member(_), false) => Self::Left(asked),
            (Self::Left(no), false) => Self::Left(no.max(asked)),
        }
    }

    /// Whether the user was ever known to be a member, and whether they have left.
    const fn as_stored(self) -> (bool, bool) {
        match self {
            Self::Unknown => (false, false),
            Self::Member(_) => (true, false),
            Self::Left(_) => (true, true),
        }
    }
}

impl MembershipTracker {
    /// Makes an empty tracker; sweeps are `interval_ms` apart.
    pub(super) fn new(interval_ms: u64, shares: Shares, now: Time) -> Self {
        Self {
            shares,
            interval_ms,
            began: now,
            awake_since: Time::EARLIEST,
            paused_until: Time::EARLIEST,
            tokens: BTreeMap::new(),
            calls: BTreeMap::new(),
            rooms: BTreeMap::new(),
            users: BTreeMap::new(),
            sweeps: <[Sweep; 2]>::default(),
            open: BTreeSet::new(),
            due: BTreeSet::new(),
            is_hurried: false,
            removing: 0,
            listing: BTreeSet::new(),
            removals: VecDeque::new(),
            lists: VecDeque::new(),
            member_lists: VecDeque::new(),
            is_reading_list: false,
            out: Vec::new(),
        }
    }

    // --- facts ---

    /// Whether a token could be watched that is wanted, and is issued only if all else is well.
    ///
    /// # Errors
    /// When there is no place for it.
    pub(super) fn check(&self, wanted: &IssuedToken<'_>) -> Result<(), CapacityError> {
        let (key, user_key) = self.keys_of(wanted)?;
        if self.tokens.get(&key).is_some_and(|token| token.user == user_key.1) {
            return Ok(());
        }
        self.shares.check(&user_key.0, &user_key.1, false)
    }

    /// A token is about to be issued.
    ///
    /// # Errors
    /// When it cannot be watched: whoever held it could not be removed.
    pub(super) fn on_token(&mut self, issued: &IssuedToken<'_>, now: Time) -> Result<(), CapacityError> {
        let (key, user_key) = self.enter(issued, false)?;
        self.plan(now.after(self.interval_ms));
        self.out.push(Action::Issued(key));
        if let Some(asked) = issued.checked {
            self.hear(&user_key, true, asked);
        }
        Ok(())
    }

    /// Takes in the record of a token that was issued before the start, or by another instance; whether it was not known. What is known of
    /// the user is newer where anything is, but another instance may have renewed the token.
    pub(super) fn restore(&mut self, stored: &StoredToken<'_>, clocks: &WallClock, now: Time) -> bool {
        let issued = IssuedToken {
            room_id: &stored.room_id,
            user_id: &stored.user_id,
            room: &stored.room,
            identity: &stored.identity,
            end: clocks.time(stored.expires_at).min(now.after(MAX_TTL_MS)),
            checked: None,
        };
        let key = TokenKey::new(issued.room, issued.identity);
        if let Some(token) = self.tokens.get_mut(&key) {
            if *token.user == *stored.user_id {
                token.end = token.end.max(issued.end);
                self.write_again(key, stored);
            }
            return false;
        }
        let Ok((key, user_key)) = self.enter(&issued, true) else {
            return false;
        };
        if let Some(token) = self.tokens.get_mut(&*key) {
            token.seen = stored.last_seen.map(|seen| clocks.time(seen).min(now));
        }
        self.recall(&user_key, stored);
        // Who left while nobody watched has been inside for long enough.
        if !std::mem::replace(&mut self.is_hurried, true) {
            for sweep in self.sweeps.iter_mut().filter(|sweep| !sweep.is_running) {
                sweep.at = Some(now.after(MIN_SWEEP_GAP_MS));
            }
        }
        self.plan(now.after(self.interval_ms));
        true
    }

    /// Takes over what a record says of its user: it was known then, and is older than any question from now on.
    fn recall(&mut self, user_key: &UserKey, stored: &StoredToken<'_>) {
        let Some(user) = self.users.get_mut(user_key) else { return };
        let is_restored = matches!(user.membership, Membership::Member(yes) if yes == Time::EARLIEST);
        let is_unknown = user.membership == Membership::Unknown;
        if stored.left && (is_unknown || is_restored) {
            user.membership = Membership::Left(Time::EARLIEST);
        } else if stored.member && is_unknown {
            user.membership = Membership::Member(Time::EARLIEST);
        }
    }

    /// Writes again what is known of a token's user where the instance that renewed it knew something else.
    fn write_again(&mut self, key: TokenKey, stored: &StoredToken<'_>) {
        let Some(user_key) = self.user_key(&key) else { return };
        self.recall(&user_key, stored);
        let known = self.users.get(&user_key).map(|user| user.membership.as_stored());
        if known.is_some_and(|known| known != (stored.member, stored.left)) {
            self.out.push(Action::Mark(Arc::new(key)));
        }
    }

    pub(super) fn keys(&self) -> Vec<Arc<TokenKey>> {
        self.tokens.keys().cloned().collect()
    }

    /// A verified webhook named a LiveKit room: webhooks tell who is in it.
    pub(super) fn on_webhook(&mut self, room: &str) {
        if let Some(call) = self.calls.get_mut(&Name::from(room)) {
            call.has_webhooks = true;
        }
    }

    pub(super) fn on_present(&mut self, room: &str, identity: &str, now: Time) {
        self.mark_present(&TokenKey::new(room, identity), now, now);
    }

    pub(super) fn on_gone(&mut self, room: &str, identity: &str, now: Time) {
        self.mark_left(&TokenKey::new(room, identity), now);
    }

    pub(super) fn on_room_finished(&mut self, room: &str, now: Time) {
        let room = room.into();
        let here = tokens_of(&self.tokens, &room).filter(|(_, token)| token.presence != Presence::Gone);
        let keys: Vec<_> = here.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.mark_left(&key, now);
        }
    }

    /// Takes in who is in a LiveKit room, as the SFU said when it was asked, by whomever. Where it did not say it, whoever may be
    /// there is taken to be there.
    pub(super) fn on_list(&mut self, room: &Name, present: Option<&BTreeSet<Name>>, asked: Time, now: Time) {
        self.listing.remove(room);
        if let Some(call) = self.calls.get_mut(room) {
            call.is_listing = false;
            if present.is_some() {
                (call.listed, call.is_unsure) = (call.listed.max(Some(asked)), false);
            }
        }
        let keys: Vec<_> = tokens_of(&self.tokens, room).map(|(key, _)| key.clone()).collect();
        for key in keys {
            match (present.map(|present| present.contains(&key.identity)), self.tokens.get_mut(&*key)) {
                (Some(true), _) => self.mark_present(&key, asked, now),
                (Some(false), _) => self.mark_absent(&key, asked),
                (None, Some(token)) if token.presence == Presence::Issued => token.presence = Presence::Present,
                (None, _) => {}
            }
        }
    }

    /// Takes in the homeserver's answer to a question that was asked at `asked`.
    pub(super) fn on_membership(&mut self, query: &MembershipQuery, answer: MembershipAnswer<'_>, asked: Time, now: Time) {
        let sweep = self.sweep(query.origin);
        sweep.asking = sweep.asking.saturating_sub(1);
        self.open.remove(&(query.room_id.clone(), query.scope.clone()));
        self.is_reading_list &= query.scope != QueryScope::Members;
        match (&query.scope, answer) {
            (_, MembershipAnswer::Unavailable { retry_after_ms }) => self.is_away(query, retry_after_ms, now),
            (QueryScope::User(user_id), MembershipAnswer::TimedOut) if query.origin == Origin::Remote => self.hangs(query, user_id),
            (QueryScope::User(_) | QueryScope::OwnServer, MembershipAnswer::TimedOut) => self.is_away(query, None, now),
            (QueryScope::Members, MembershipAnswer::Members(is_joined)) => {
                for user_key in self.users_of(&query.room_id) {
                    self.hear(&user_key, is_joined(&user_key.1), asked);
                }
            }
            (QueryScope::Members, MembershipAnswer::Joined(_) | MembershipAnswer::Refused | MembershipAnswer::TimedOut) => {
                self.ask_each(query, now.after(FAILED_LIST_MS));
            }
            (QueryScope::Members, MembershipAnswer::NoList) => self.ask_each(query, now.after(NO_LIST_MS)),
            (QueryScope::User(user_id), MembershipAnswer::Joined(joined)) => {
                let user_key = (query.room_id.clone(), user_id.clone());
                if joined || query.origin == Origin::Local {
                    self.hear(&user_key, joined, asked);
                } else if let Some(user) = self.users.get_mut(&user_key).filter(|user| user.membership != Membership::Unknown) {
                    // It counts only if our homeserver is in the room, and so knows who else is.
                    user.no = Some(asked);
                    self.enqueue(&query.room_id, QueryScope::OwnServer, query.origin, query.is_sweep);
                }
            }
            (QueryScope::OwnServer, MembershipAnswer::Joined(is_in)) => {
                for user_key in self.users_of(&query.room_id) {
                    let no = self.users.get_mut(&user_key).and_then(|user| user.no.take());
                    if let Some(no) = no.filter(|no| is_in && self.is_fresh(*no, now)) {
                        self.hear(&user_key, false, no);
                    }
                }
            }
            (
                QueryScope::User(_) | QueryScope::OwnServer,
                MembershipAnswer::Members(_) | MembershipAnswer::NoList | MembershipAnswer::Refused,
            ) => {}
        }
    }

    /// Takes in the outcome of a removal that was asked for at `asked`.
    pub(super) fn on_removed(&mut self, key: &Arc<TokenKey>, outcome: RemovalOutcome, asked: Time, now: Time) {
        self.removing = self.removing.saturating_sub(1);
        let (Some(user_key), Some(token)) = (self.user_key(key), self.tokens.get_mut(&**key)) else {
            return;
        };
        // Somebody who came back meanwhile may be there again.
        let came_back = token.presence == Presence::Present && token.seen.is_some_and(|seen| seen > asked);
        let failures = std::mem::take(&mut token.failures);
        token.is_removing = false;
        match outcome {
            RemovalOutcome::Failed => {
                token.failures = failures.saturating_add(1);
                self.ask_at(&user_key, now.after((1_000_u64 << failures.min(6)).min(MAX_RETRY_MS)));
            }
            RemovalOutcome::Removed | RemovalOutcome::NotThere if came_back => self.ask_at(&user_key, now),
            RemovalOutcome::Removed | RemovalOutcome::NotThere => {
                // Somebody who joined again meanwhile may have delegated anew.
                let has_left = |user: &User| matches!(user.membership, Membership::Left(_));
                if self.users.get(&user_key).is_some_and(has_left) {
                    self.out.push(Action::EndDelegatedLeave(key.clone()));
                }
                self.mark_absent(key, if outcome == RemovalOutcome::Removed { now } else { asked });
            }
        }
    }

    /// The process stood still: whatever was asked before is no evidence any more (L5a).
    pub(super) const fn on_woke(&mut self, now: Time) {
        self.awake_since = now;
    }

    /// When there is something to be done next.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        // While all places are taken, answers keep a sweep going.
        let sweeps = self.sweeps.iter().zip(Origin::BOTH);
        let free = sweeps.filter(|(sweep, _)| sweep.asking < MAX_CALLS);
        let next = free.filter_map(|(sweep, origin)| {
            let has_work = sweep.is_running || !sweep.queue.is_empty() || self.has_list_for(origin);
            let at = if has_work { Some(Time::EARLIEST) } else { sweep.at };
            at.map(|at| at.max(self.paused_until))
        });
        next.chain(self.due.first().map(|(at, _)| *at)).min()
    }

    /// A token as it is to be stored.
    pub(super) fn record(&self, key: &TokenKey, clocks: &WallClock) -> Option<StoredToken<'_>> {
        let (token, call) = (self.tokens.get(key)?, self.calls.get(&key.room)?);
        let (member, left) = self.users.get(&self.user_key(key)?)?.membership.as_stored();
        Some(StoredToken {
            room: key.room.to_string().into(),
            identity: key.identity.to_string().into(),
            room_id: (&*call.room_id).into(),
            user_id: (&*token.user).into(),
            expires_at: clocks.unix_millis(token.end),
            last_seen: token.seen.map(|seen| clocks.unix_millis(seen)),
            member,
            left,
        })
    }

    // --- tokens come and go ---

    /// The key of a token, and of its user.
    fn keys_of(&self, issued: &IssuedToken<'_>) -> Result<(TokenKey, UserKey), CapacityError> {
        if issued.room_id.len() + issued.user_id.len() + issued.room.len() + issued.identity.len() > MAX_NAME_BYTES {
            return Err(CapacityError::NameTooLong);
        }
        let key = TokenKey::new(issued.room, issued.identity);
        // Names are kept once.
        let room_id = self.rooms.get_key_value(issued.room_id).map(|(room_id, _)| room_id.clone());
        let room_id = self.calls.get(&key.room).map(|call| call.room_id.clone()).or(room_id);
        let room_id = room_id.unwrap_or_else(|| issued.room_id.into());
        let user_key = (room_id.clone(), issued.user_id.into());
        let user_key = self
            .users
            .get_key_value(&user_key)
            .map_or(user_key, |(user_key, _)| user_key.clone());
        Ok((key, user_key))
    }

    fn enter(&mut self, issued: &IssuedToken<'_>, restored: bool) -> Result<(Arc<TokenKey>, UserKey), CapacityError> {
        let (key, user_key) = self.keys_of(issued)?;
        let room_id = user_key.0.clone();
        if let Some(token) = self.tokens.get_mut(&key).filter(|token| token.user == user_key.1) {
            token.end = token.end.max(issued.end);
            if token.presence == Presence::Gone {
                token.presence = Presence::Issued;
            }
            return Ok((Arc::new(key), user_key));
        }
        self.shares.take(&room_id, &user_key.1, restored)?;
        let mut token = Token {
            user: user_key.1.clone(),
            end: issued.end,
            seen: None,
            presence: Presence::Issued,
            // Whether somebody came in on it is not known any more: nobody waits for a place because of a restart.
            is_used: restored,
            is_removing: false,
            failures: 0,
        };
        // Two users can be named so that they share a plain identity: what is known of the one is not known of the other.
        if let Some(before) = self.leave(&key) {
            (token.end, token.seen) = (token.end.max(before.end), before.seen);
            (token.presence, token.is_removing) = (before.presence, before.is_removing);
        }
        let key = Arc::new(key);
        self.calls.entry(key.room.clone()).or_insert_with(|| Call {
            room_id: room_id.clone(),
            listed: None,
            is_listing: false,
            has_webhooks: false,
            is_unsure: false,
        });
        self.rooms.entry(room_id).or_default();
        let user = self.users.entry(user_key.clone()).or_default();
        user.keys.reserve_exact(1);
        user.keys.push(key.clone());
        self.tokens.insert(key.clone(), token);
        Ok((key, user_key))
    }

    fn leave(&mut self, key: &TokenKey) -> Option<Token> {
        let token = self.tokens.remove(key)?;
        let user_key = (self.calls.get(&key.room)?.room_id.clone(), token.user.clone());
        if tokens_of(&self.tokens, &key.room).next().is_none() {
            self.calls.remove(&key.room);
        }
        self.shares.give_back(&user_key.0, &user_key.1, token.is_used);
        let user = self.users.get_mut(&user_key)?;
        user.keys.retain(|other| **other != *key);
        if user.keys.is_empty() {
            if let Some(due) = user.due {
                self.due.remove(&(due, user_key.clone()));
            }
            self.users.remove(&user_key);
            if users_of(&self.users, &user_key.0).next().is_none() {
                self.rooms.remove(&user_key.0);
            }
        }
        Some(token)
    }

    // --- who is in the call ---

    /// Notes that the participant was there at `seen`. Whoever came in just now is asked about.
    fn mark_present(&mut self, key: &TokenKey, seen: Time, now: Time) {
        let Some(token) = self.tokens.get_mut(key) else { return };
        // They left after that.
        if token.presence == Presence::Gone && token.seen.is_some_and(|last| last > seen) {
            return;
        }
        token.seen = token.seen.max(Some(seen));
        if !std::mem::replace(&mut token.is_used, true) {
            self.shares.seen(&token.user);
        }
        let was_there = std::mem::replace(&mut token.presence, Presence::Present) == Presence::Present;
        // A removal that is under way or failed has its own pace.
        let is_handled = token.is_removing || token.failures > 0;
        let Some(user_key) = self.user_key(key) else { return };
        let ask = match self.users.get(&user_key).map(|user| user.membership) {
            Some(Membership::Unknown) => !was_there,
            Some(Membership::Member(yes)) => !was_there && !self.is_fresh(yes, now),
            Some(Membership::Left(_)) => !is_handled,
            None => false,
        };
        if ask {
            self.ask_at(&user_key, now);
        }
    }

    fn mark_left(&mut self, key: &TokenKey, now: Time) {
        let Some(token) = self.tokens.get_mut(key) else { return };
        if token.presence == Presence::Present && token.seen.is_some_and(|seen| now.since(seen) < OLD_SESSION_MS) {
            if let Some(call) = self.calls.get_mut(&key.room) {
                call.is_unsure = true;
            }
            return;
        }
        (token.presence, token.seen) = (Presence::Gone, Some(now));
    }

    /// Notes that the participant was not there at that time, as the SFU says.
    fn mark_absent(&mut self, key: &TokenKey, asked: Time) {
        let Some(token) = self.tokens.get_mut(key) else { return };
        // They came after the question.
        if token.seen.is_some_and(|seen| seen > asked) {
            return;
        }
        if token.presence != Presence::Gone {
            (token.presence, token.seen) = (Presence::Gone, Some(asked));
        } else if token.end_of_use() <= asked && !token.is_removing {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: &TokenKey) {
        if self.leave(key).is_some() {
            self.out.push(Action::Forget(Arc::new(key.clone())));
        }
    }

    // --- who is in the Matrix room ---

    /// The homeserver said something about a user that counts.
    fn hear(&mut self, user_key: &UserKey, joined: bool, asked: Time) {
        let settle = SETTLE_MS.min(self.interval_ms);
        let Some(user) = self.users.get_mut(user_key) else { return };
        let before = user.membership;
        user.membership = before.after(joined, asked, settle);
        if joined {
            user.no = None;
        }
        if std::mem::discriminant(&before) != std::mem::discriminant(&user.membership) {
            self.out.extend(user.keys.iter().cloned().map(Action::Mark));
        }
        if joined || !matches!(user.membership, Membership::Left(_)) {
            return;
        }
        for key in &user.keys {
            let Some(token) = self.tokens.get_mut(&**key) else { continue };
            if token.presence == Presence::Present && !std::mem::replace(&mut token.is_removing, true) {
                self.removals.push_back(key.clone());
            }
        }
    }

    /// Leaves the users of a homeserver about whom nothing comes out of the rest of the sweep. It may be the room that is to blame: the next
    /// sweep begins behind it.
    fn hangs(&mut self, query: &MembershipQuery, user_id: &str) {
        let server = server(user_id);
        let (sweep, open) = (&mut self.sweeps[query.origin as usize], &mut self.open);
        if !query.is_sweep || !sweep.is_running {
            return;
        }
        sweep.failed = Some((query.room_id.clone(), true));
        sweep.hanging.insert(server.into());
        sweep.queue.retain(|query| {
            let is_about = matches!(&query.scope, QueryScope::User(user) if self::server(user) == server);
            let is_left_out = query.is_sweep && is_about && open.remove(&(query.room_id.clone(), query.scope.clone()));
            !is_left_out
        });
    }

    fn is_away(&mut self, query: &MembershipQuery, retry_after_ms: Option<u64>, now: Time) {
        if let Some(pause) = retry_after_ms {
            self.paused_until = self.paused_until.max(now.after(pause.min(MAX_PAUSE_MS)));
        }
        let (sweep, open) = (&mut self.sweeps[query.origin as usize], &mut self.open);
        if !query.is_sweep || !sweep.is_running {
            return;
        }
        sweep.failed = Some((query.room_id.clone(), sweep.first.as_ref() == Some(&query.room_id)));
        sweep.rooms.clear();
        let origin = query.origin;
        let mut stays = |query: &MembershipQuery| {
            let is_left_out = query.is_sweep && query.origin == origin && open.remove(&(query.room_id.clone(), query.scope.clone()));
            !is_left_out
        };
        sweep.queue.retain(&mut stays);
        self.member_lists.retain(&mut stays);
    }

    fn is_fresh(&self, asked: Time, now: Time) -> bool {
        asked >= self.awake_since && now.since(asked) < EVIDENCE_MS
    }

    fn user_key(&self, key: &TokenKey) -> Option<UserKey> {
        let (token, call) = (self.tokens.get(key)?, self.calls.get(&key.room)?);
        Some((call.room_id.clone(), token.user.clone()))
    }

    fn users_of(&self, room_id: &Arc<str>) -> Vec<UserKey> {
        users_of(&self.users, room_id).map(|(user_key, _)| user_key.clone()).collect()
    }

    fn is_present(&self, user: &User) -> bool {
        let mut tokens = user.keys.iter().filter_map(|key| self.tokens.get(&**key));
        tokens.any(|token| token.presence == Presence::Present)
    }

    /// The users of a Matrix room who are in the call.
    fn present_in(&self, room_id: &Arc<str>) -> Vec<Arc<str>> {
        let users = users_of(&self.users, room_id).filter(|(_, user)| self.is_present(user));
        users.map(|((_, user_id), _)| user_id.clone()).collect()
    }

    // --- questions ---

    fn sweep(&mut self, origin: Origin) -> &mut Sweep {
        &mut self.sweeps[origin as usize]
    }

    /// Where nothing is planned yet.
    fn plan(&mut self, at: Time) {
        for sweep in &mut self.sweeps {
            sweep.at.get_or_insert(at);
        }
    }

    /// The user is to be asked about then.
    fn ask_at(&mut self, user_key: &UserKey, at: Time) {
        let Some(user) = self.users.get_mut(user_key) else { return };
        if user.due.is_some_and(|due| due <= at) {
            return;
        }
        if let Some(due) = user.due.replace(at) {
            self.due.remove(&(due, user_key.clone()));
        }
        self.due.insert((at, user_key.clone()));
    }

    /// The question waits for a place, unless it is being asked already.
    fn enqueue(&mut self, room_id: &Arc<str>, scope: QueryScope, origin: Origin, is_sweep: bool) {
        let room_id = room_id.clone();
        if !self.open.insert((room_id.clone(), scope.clone())) {
            return;
        }
        let queue = match scope {
            QueryScope::Members => &mut self.member_lists,
            QueryScope::User(_) | QueryScope::OwnServer => &mut self.sweep(origin).queue,
        };
        let query = MembershipQuery {
            room_id,
            scope,
            origin,
            is_sweep,
        };
        // What a sweep asks can wait.
        if is_sweep {
            queue.push_back(query);
        } else {
            queue.push_front(query);
        }
    }

    /// Asks by name about these users of a Matrix room.
    fn ask_by_name(&mut self, room_id: &Arc<str>, users: Vec<Arc<str>>, is_sweep: bool) {
        for user in users {
            let origin = self.shares.origin(&user);
            if is_sweep && self.sweep(origin).hanging.contains(server(&user)) {
                continue;
            }
            self.enqueue(room_id, QueryScope::User(user), origin, is_sweep);
        }
    }

    /// The list of members does not help, and will not until then.
    fn ask_each(&mut self, query: &MembershipQuery, no_list_until: Time) {
        if let Some(until) = self.rooms.get_mut(&query.room_id) {
            *until = Some(no_list_until);
        }
        let users = self.present_in(&query.room_id);
        self.ask_by_name(&query.room_id, users, query.is_sweep);
    }

    /// Asks about `users`, by one list where that is possible. In a sweep of one origin, about the users of that only.
    fn ask_about(&mut self, room_id: &Arc<str>, mut users: Vec<Arc<str>>, swept: Option<Origin>, now: Time) {
        let has_list = self.rooms.get(room_id).is_some_and(|until| until.is_none_or(|until| until <= now));
        if users.len() > BULK_QUERY_ABOVE && has_list {
            let has_local = users.iter().any(|user| self.shares.origin(user) == Origin::Local);
            let origin = if has_local { Origin::Local } else { Origin::Remote };
            // The list is for all: the sweep about local users asks for it where there are any.
            if swept.is_some_and(|swept| swept != origin) {
                return;
            }
            // A list that was asked for before somebody came says nothing about them, and one that has waited since the last sweep may wait
            // for longer: behind others, which a hostile homeserver has us wait for.
            if !self.open.contains(&(room_id.clone(), QueryScope::Members)) {
                return self.enqueue(room_id, QueryScope::Members, origin, swept.is_some());
            }
            return self.ask_by_name(room_id, users, swept.is_some());
        }
        users.retain(|user| swept.is_none_or(|swept| swept == self.shares.origin(user)));
        self.ask_by_name(room_id, users, swept.is_some());
    }

    // --- what comes next ---

    /// Returns the actions that are due now: to be asked for after every fact, and when the moment of [`Self::next_deadline`] has
    /// come.
    #[must_use]
    pub(super) fn step(&mut self, now: Time) -> Vec<Action> {
        self.call_sfu(now);
        let mut due = BTreeMap::<_, Vec<_>>::new();
        while self.due.first().is_some_and(|(at, _)| *at <= now)
            && let Some((_, user_key)) = self.due.pop_first()
        {
            if let Some(user) = self.users.get_mut(&user_key) {
                user.due = None;
            }
            if self.users.get(&user_key).is_some_and(|user| self.is_present(user)) {
                due.entry(user_key.0).or_default().push(user_key.1);
            }
        }
        for (room_id, users) in due {
            self.ask_about(&room_id, users, None, now);
        }
        for origin in Origin::BOTH {
            self.ask_next(origin, now);
        }
        self.call_sfu(now);
        std::mem::take(&mut self.out)
    }

    /// Fills the free places of a sweep.
    fn ask_next(&mut self, origin: Origin, now: Time) {
        let mut rooms_left = MAX_ROOMS_PER_STEP;
        while now >= self.paused_until && self.sweep(origin).asking < MAX_CALLS {
            let next = self.sweep(origin).queue.pop_front().or_else(|| self.next_list(origin));
            let sweep = self.sweep(origin);
            if let Some(query) = next {
                sweep.asking += 1;
                self.out.push(Action::Ask(query));
            } else if !sweep.is_running {
                if sweep.at.is_none_or(|at| at > now) {
                    return;
                }
                self.begin_sweep(origin, now);
            } else if let Some(room_id) = sweep.rooms.pop() {
                if origin == Origin::Local {
                    self.look_after(&room_id, now);
                }
                let users = self.present_in(&room_id);
                self.ask_about(&room_id, users, Some(origin), now);
                rooms_left -= 1;
                if rooms_left == 0 {
                    return;
                }
            } else {
                sweep.is_running = false;
                let next = sweep.at.map(|began| began.after(self.interval_ms).max(now.after(MIN_SWEEP_GAP_MS)));
                self.sweep(origin).at = next.filter(|_| !self.tokens.is_empty());
                return;
            }
        }
    }

    /// Whether it is the turn of a list that a sweep of this origin waits for. It may have megabytes: one is in memory at a time, and what
    /// waits for it holds nobody's place.
    fn has_list_for(&self, origin: Origin) -> bool {
        !self.is_reading_list && self.member_lists.front().is_some_and(|query| query.origin == origin)
    }

    fn next_list(&mut self, origin: Origin) -> Option<MembershipQuery> {
        if !self.has_list_for(origin) {
            return None;
        }
        self.is_reading_list = true;
        self.member_lists.pop_front()
    }

    fn begin_sweep(&mut self, origin: Origin, now: Time) {
        let mut rooms: Vec<_> = self.rooms.keys().rev().cloned().collect();
        let sweep = self.sweep(origin);
        sweep.first = None;
        sweep.hanging.clear();
        if let Some((room_id, is_behind)) = sweep.failed.take() {
            // The next one is the last one: the room, or the one behind it.
            let before = rooms.partition_point(|room| if is_behind { *room > room_id } else { *room >= room_id });
            rooms.rotate_left(before);
            sweep.first = Some(room_id).filter(|_| !is_behind);
        }
        (sweep.at, sweep.is_running, sweep.rooms) = (Some(now), true, rooms);
    }

    /// Has the LiveKit rooms of a Matrix room listed where that is necessary, and forgets what nobody will ever tell anything about.
    fn look_after(&mut self, room_id: &Arc<str>, now: Time) {
        let mut unclear = Vec::new();
        for (_, user) in users_of(&self.users, room_id) {
            for key in &user.keys {
                let (Some(token), Some(call)) = (self.tokens.get(&**key), self.calls.get_mut(&key.room)) else {
                    continue;
                };
                let end_of_use = token.end_of_use();
                let is_over = end_of_use <= now;
                if is_over && !token.is_removing && now.since(end_of_use.max(self.began)) >= UNCLEAR_MS {
                    unclear.push(key.clone());
                    continue;
                }
                let is_away = token.presence != Presence::Present;
                let could_come_back = is_away && !is_over && matches!(user.membership, Membership::Left(_));
                let gap = if call.is_unsure || !call.has_webhooks || could_come_back {
                    self.interval_ms / 2
                } else if is_away || is_over {
                    LIST_AGAIN_MS.max(self.interval_ms / 2)
                } else {
                    continue;
                };
                let is_time = call.listed.is_none_or(|listed| now.since(listed) >= gap);
                if is_time && !std::mem::replace(&mut call.is_listing, true) {
                    self.lists.push_back(key.room.clone());
                }
            }
        }
        for key in unclear {
            self.forget(&key);
        }
    }

    /// Fills the free places for calls to the SFU.
    fn call_sfu(&mut self, now: Time) {
        while self.removing + self.listing.len() < MAX_CALLS {
            if let Some(key) = self.removals.pop_front() {
                if self.is_to_be_removed(&key, now) {
                    self.removing += 1;
                    self.out.push(Action::Remove(key));
                }
            } else if let Some(room) = self.lists.pop_front() {
                // Somebody else may have asked for it meanwhile.
                if self.calls.get(&room).is_some_and(|call| call.is_listing) && self.listing.insert(room.clone()) {
                    self.out.push(Action::List(room));
                }
            } else {
                return;
            }
        }
    }

    /// Whether the no still counts; one that waited for too long is asked for again.
    fn is_to_be_removed(&mut self, key: &TokenKey, now: Time) -> bool {
        let Some(user_key) = self.user_key(key) else { return false };
        if let Some(Membership::Left(asked)) = self.users.get(&user_key).map(|user| user.membership) {
            if self.is_fresh(asked, now) {
                return true;
            }
            self.ask_at(&user_key, now);
        }
        if let Some(token) = self.tokens.get_mut(key) {
            token.is_removing = false;
        }
        false
    }
}

fn tokens_of<'a>(tokens: &'a BTreeMap<Arc<TokenKey>, Token>, room: &Name) -> impl Iterator<Item = (&'a Arc<TokenKey>, &'a Token)> {
    let first = TokenKey {
        room: room.clone(),
        identity: Name::FIRST,
    };
    let from = tokens.range::<TokenKey, _>(&first..);
    from.take_while(move |(key, _)| key.room == first.room)
}

fn users_of<'a>(users: &'a BTreeMap<UserKey, User>, room_id: &Arc<str>) -> impl Iterator<Item = (&'a UserKey, &'a User)> {
    let first = (room_id.clone(), Arc::from(""));
    let room_id = room_id.clone();
    users.range(first..).take_while(move |((room, _), _)| *room == room_id)
}

#[cfg(test)]
mod tests;
