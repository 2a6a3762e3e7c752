//! THE PIPELINE: who is asking -> what they may do -> room -> token. Every token route ends here, and delegations share
//! its first half.
//!
//! Refuse before side effects (decision T7): nothing is asked before the request is complete, nobody is watched and no room is opened
//! before the user is known and the delegation can be carried out, and no token leaves before the room stands and the job
//! exists.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use parking_lot::Mutex;
use tokio::time::{sleep_until, timeout_at};

use crate::access::{Access, Homeservers as PolicyList, Policy};
use crate::admission::Client;
use crate::admission::rate_limiter::RateLimiter;
use crate::admission::rates::RateExceeded;
use crate::config::changes;
use crate::driver::{Delegation, DelegationError, Leaves, Reservation};
use crate::federation::Failure;
use crate::homeserver::{OwnError, Subject};
use crate::identity::ParticipantKey;
use crate::kick::KickOnLeave;
use crate::members::Members;
use crate::metrics::{Limit, METRICS, TokenAccess};
use crate::openid::{OpenId, OpenIdError, VerifiedUser};
use crate::outcome::Outcome;
use crate::request_line::{Step, note, step};
use crate::retry::Deadline;
use crate::server_name::ServerName;
use crate::sfu::{Sfu, SfuError};
use crate::token::{MintError, Minter};
use crate::wire::{DelayedEvent, DelegationRequest, ParticipantRequest, TokenRequest, UnverifiedOpenIdToken};

/// When a request arrived, and from whom.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When, and what follows from that.
    pub deadline: Deadline,
    /// Sender of the request, as far as that can be told.
    pub client: Client,
}

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// `matrix_server_name` is not a server name.
    #[error("matrix_server_name is not a server name")]
    BadServerName,
    /// The operator does not deal with the homeserver.
    #[error("the homeserver is not dealt with: LIVEKIT_BLOCKED_HOMESERVERS, or LIVEKIT_ALLOWED_HOMESERVERS")]
    BlockedHomeserver,
    /// No homeserver vouches for the user.
    #[error("{0}")]
    OpenId(#[from] OpenIdError),
    /// The token belongs to another user than the one claimed.
    #[error("the token belongs to another user than claimed_user_id")]
    UserMismatch,
    /// The user, or the homeserver, asks too often.
    #[error("{0}")]
    RateExceeded(#[from] RateExceeded),
    /// The user may not delegate.
    #[error("only full-access users may delegate delayed events")]
    DelegationDenied,
    /// The delegation is not taken.
    #[error("{0}")]
    Delegation(#[from] DelegationError),
    /// The room could not be opened.
    #[error("{0}")]
    Sfu(#[from] SfuError),
    /// The token could not be signed.
    #[error("{0}")]
    Mint(#[from] MintError),
    /// The user is not in the Matrix room, or a homeserver is not.
    #[error("not joined to the Matrix room")]
    NotJoined,
    /// Our homeserver does not say who is in the Matrix room.
    #[error("our homeserver does not say who is in the room: {0}")]
    Membership(OwnError),
    /// The client-server API of our homeserver cannot be found.
    #[error("{0}")]
    OwnClientApi(Failure),
    /// `url` is not the SFU of this service.
    #[error("url is not LIVEKIT_URL")]
    OtherSfu,
    /// The homeserver sent an invalid user ID.
    #[error("that is not the id of a user")]
    BadUserId,
    /// Our homeserver speaks for a user of another one.
    #[error("the homeserver speaks for a user of {0}")]
    NotOurUser(ServerName),
    /// Another homeserver speaks for a user who is not its own.
    #[error("the homeserver speaks for a user who is not its own")]
    ForeignUser,
    /// The field `member.claimed_user_id` names somebody else.
    #[error("claimed_user_id is somebody else")]
    ClaimedUser,
    /// `server_name` is not a server name.
    #[error("server_name is not a server name")]
    BadDestination,
    /// The user has no such delayed event in that room.
    #[error("the user has no such delayed event in that room")]
    NoSuchEvent,
    /// Our homeserver does not say whose delayed event that is.
    #[error("our homeserver does not say whose event that is: {0}")]
    Event(OwnError),
    /// Our homeserver does not relay the request.
    #[error("our homeserver does not relay it: {0}")]
    Relay(OwnError),
    /// The other homeserver's service refuses.
    #[error("{0}")]
    Remote(RemoteTokenError),
    /// The user, the homeserver, or all together hold more tokens than can be watched.
    #[error("too many tokens are watched already, of this user, this homeserver or in all")]
    TooManyTokens,
    /// The time for an answer is over.
    #[error("it takes too long")]
    OutOfTime,
}

/// How another homeserver's service refused (the rows of the error table that may be passed on).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RemoteTokenError {
    /// The other service answered 403 `M_FORBIDDEN`.
    #[error("the other homeserver's service refuses it")]
    Forbidden,
    /// The other service answered 400 `M_INVALID_PARAM`.
    #[error("the other homeserver's service does not take these parameters")]
    InvalidParam,
    /// The other service gave any other answer without a token.
    #[error("the other homeserver's service answers with status {0} and no token")]
    Unusable(u16),
}

/// A user who is known, with the rights that follow.
pub(crate) struct Admitted<'a> {
    pub(crate) user: &'a VerifiedUser,
    pub(crate) access: Access,
    /// Whether it was checked that the user is in the Matrix room.
    pub(crate) is_member: bool,
}

/// The pipeline with the parts that it needs.
pub struct Exchange {
    /// Verifies who is asking.
    pub openid: OpenId,
    /// Says what a verified user may do.
    pub policy: Policy,
    /// Holds requests of those who ask too often.
    pub rates: RateLimiter,
    /// Opens rooms on the SFU.
    pub sfu: Arc<Sfu>,
    /// Watches delegated leaves.
    pub leaves: Leaves,
    /// Signs tokens for the SFU.
    pub minter: Arc<Minter>,
    /// Memberships of Matrix rooms, where tokens are for members only (decision A7).
    pub members: Option<Arc<Members>>,
    /// Removes from the call who leaves the Matrix room (decision A8).
    pub kick: Option<KickOnLeave>,
    /// Users who came although nobody listed their homeserver.
    pub unlisted: Unlisted,
}

/// Verified users of homeservers without full access, while none of those that have it was ever seen: a list with a typo looks
/// just like that.
#[derive(Debug, Default)]
pub struct Unlisted {
    a_listed_one_was_seen: AtomicBool,
    told: Mutex<BTreeSet<ServerName>>,
}

/// Homeservers of which it is told.
const MAX_UNLISTED: usize = 32;
/// Changes of letters that a typo may have.
const MAX_TYPO_CHANGES: usize = 2;

impl Unlisted {
    fn seen(&self, server: &ServerName, full_access: &PolicyList, asked_at: impl FnOnce() -> Option<String>) {
        let PolicyList::Listed(listed) = full_access else { return };
        if listed.contains(server) {
            self.a_listed_one_was_seen.store(true, Relaxed);
        }
        if self.a_listed_one_was_seen.load(Relaxed) {
            return;
        }
        let mut told = self.told.lock();
        if told.len() >= MAX_UNLISTED || !told.insert(server.clone()) {
            return;
        }
        drop(told);
        let asked_at = asked_at().unwrap_or_default();
        let is_meant = |name: &&ServerName| {
            let (name, server) = (name.as_str().to_ascii_lowercase(), server.as_str());
            let host = |text: &str| text.split(':').next().unwrap_or_default().to_owned();
            // A delegated host such as matrix.example.com is often listed in place of example.com.
            let is_delegated = host(&name) == host(&asked_at) || name.ends_with(&format!(".{server}"));
            changes(&name, server) <= MAX_TYPO_CHANGES || host(&name) == host(server) || is_delegated
        };
        let meant = listed.iter().find(is_meant).map(ServerName::as_str);
        let server = server.as_str();
        match meant {
            Some(meant) => {
                let remedy = format!(
                    "did you mean {server} where LIVEKIT_FULL_ACCESS_HOMESERVERS has {meant}? It lists names as in user ids, not hosts"
                );
                tracing::warn!(name: "only_unlisted_users",
                    server,
                    remedy,
                    "users of a homeserver without full access come, and of none that has it"
                );
            }
            None => tracing::info!(name: "only_unlisted_users",
                server,
                remedy = "if it is yours, add it to LIVEKIT_FULL_ACCESS_HOMESERVERS: until then its users only join rooms that stand",
                "users of a homeserver without full access come, and of none that has it"
            ),
        }
    }
}

impl Exchange {
    /// Exchanges a Matrix OpenID token for a LiveKit token. `verified` is called when the user is known.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn exchange(&self, request: TokenRequest, arrival: Arrival, verified: impl FnOnce()) -> Result<String, TokenError> {
        let deadline = arrival.deadline;
        note(|line| {
            line.matrix_room = Some(request.participant.room_id().into());
            line.delegated = Some(request.event.is_some());
        });
        let user = self
            .verify(&request.openid_token, request.claimed_user_id.as_deref(), arrival)
            .await?;
        self.limit_rate(&user, request.event.is_some(), deadline).await?;
        verified();
        let admitted = Admitted {
            is_member: self.must_be_joined(&user, &request.participant, deadline).await?,
            access: self.policy.of(&user.server),
            user: &user,
        };
        // Boxed: whoever waits to be verified does not carry what comes after it.
        Box::pin(self.issue(&admitted, &request.participant, request.event.as_ref(), deadline)).await
    }

    /// Takes over a delayed leave event. `verified` is called when the user is known.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn delegate(&self, request: DelegationRequest, arrival: Arrival, verified: impl FnOnce()) -> Result<(), TokenError> {
        let deadline = arrival.deadline;
        note(|line| line.matrix_room = Some(request.participant.room_id().into()));
        let user = self.verify(&request.openid_token, Some(&request.claimed_user_id), arrival).await?;
        self.limit_rate(&user, true, deadline).await?;
        verified();
        self.must_be_joined(&user, &request.participant, deadline).await?;
        if !self.policy.of(&user.server).creates_rooms {
            return Err(TokenError::DelegationDenied);
        }
        Box::pin(self.take_over(&user, &request.participant, &request.event, deadline)).await
    }

    /// Takes over a delayed leave event of a user who may delegate.
    pub(crate) async fn take_over(
        &self,
        user: &VerifiedUser,
        participant: &ParticipantRequest,
        event: &DelayedEvent,
        deadline: Deadline,
    ) -> Result<(), TokenError> {
        let key = participant.key(&user.id);
        note(|line| {
            line.livekit_room = Some(key.room.as_str().into());
            line.delegated = Some(true);
        });
        let reservation = self.reserve(user, &key, event, deadline).await?;
        Ok(step(Step::Store, pin!(reservation.commit())).await?)
    }

    /// Verifies who is asking.
    async fn verify(
        &self,
        token: &UnverifiedOpenIdToken,
        claimed_user_id: Option<&str>,
        arrival: Arrival,
    ) -> Result<VerifiedUser, TokenError> {
        let server = ServerName::parse(&token.unverified_server_name).map_err(|_| TokenError::BadServerName)?;
        self.must_be_admitted(&server)?;
        let asking = self
            .openid
            .verify(&server, &token.access_token, arrival.client, arrival.deadline.retry_until);
        let asked = step(Step::Verify, pin!(asking)).await;
        METRICS.verified(asked.as_ref().map_or_else(OpenIdError::outcome, |_| Outcome::Ok));
        let user = asked?;
        if claimed_user_id.is_some_and(|claimed| claimed != user.id) {
            return Err(TokenError::UserMismatch);
        }
        note(|line| (line.is_proven, line.user) = (true, Some(user.id.as_str().into())));
        self.unlisted
            .seen(&user.server, &self.policy.full_access, || self.openid.asked_at(&user.server));
        Ok(user)
    }

    /// Stops whoever is of a homeserver that the operator does not deal with, before anybody is asked.
    pub(crate) fn must_be_admitted(&self, server: &ServerName) -> Result<(), TokenError> {
        if self.policy.admits(server) {
            Ok(())
        } else {
            Err(TokenError::BlockedHomeserver)
        }
    }

    /// Holds the request of a user who is known, where they or their homeserver ask more often than they may.
    pub(crate) async fn limit_rate(&self, user: &VerifiedUser, delegates: bool, deadline: Deadline) -> Result<(), TokenError> {
        let homeserver = || self.openid.who(&user.server);
        let taken = self.rates.take(&user.id, homeserver, delegates, deadline.retry_until);
        let goes_at = taken.inspect_err(|exceeded| METRICS.limit_hit(exceeded.limit.into()))?;
        if let Some(goes_at) = goes_at {
            step(Step::Rate, Box::pin(sleep_until(goes_at))).await;
        }
        Ok(())
    }

    /// Whether it was checked that the user is in the Matrix room: where tokens are for members only.
    async fn must_be_joined(&self, user: &VerifiedUser, participant: &ParticipantRequest, deadline: Deadline) -> Result<bool, TokenError> {
        let Some(members) = &self.members else { return Ok(false) };
        must_be_joined(members, participant.room_id(), Subject::User(&user.id), deadline).await?;
        Ok(true)
    }

    /// Opens the room, takes the delegation over and signs the token for a user who is known. A homeserver that has done its own
    /// authentication enters here.
    pub(crate) async fn issue(
        &self,
        admitted: &Admitted<'_>,
        participant: &ParticipantRequest,
        event: Option<&DelayedEvent>,
        deadline: Deadline,
    ) -> Result<String, TokenError> {
        let Admitted { user, access, is_member } = *admitted;
        let key = participant.key(&user.id);
        note(|line| {
            line.livekit_room = Some(key.room.as_str().into());
            (line.opens_rooms, line.publishes) = (Some(access.creates_rooms), Some(access.publishes));
        });
        let reservation = match event {
            Some(_) if !access.creates_rooms => return Err(TokenError::DelegationDenied),
            Some(event) => Some(self.reserve(user, &key, event, deadline).await?),
            None => None,
        };
        // Nobody gets a token who could not be removed. Refused before anything is done for it, and watched once all is done: what was
        // refused for another reason takes nobody's place.
        let (room_id, ttl) = (participant.room_id(), self.minter.ttl());
        let wanted = self
            .kick
            .as_ref()
            .map(|kick| kick.place_for(room_id, &user.id, &key, ttl, is_member));
        let wanted = wanted.map(|place| place.ok_or_else(too_many_tokens)).transpose()?;
        if access.creates_rooms {
            let room = timeout_at(deadline.answer_by, self.sfu.ensure_room(&key.room, deadline.retry_until));
            step(Step::Sfu, pin!(room)).await.unwrap_or(Err(SfuError::Timeout))?;
            self.sfu.expect(&key);
        }
        if let Some(reservation) = reservation {
            step(Step::Store, pin!(reservation.commit())).await?;
        }
        if wanted.is_some_and(|wanted| !wanted.begin()) {
            return Err(too_many_tokens());
        }
        let jwt = self.minter.mint(&key, access)?;
        METRICS.token(match (access.creates_rooms, access.publishes) {
            (true, _) => TokenAccess::Full,
            (false, true) => TokenAccess::Restricted,
            (false, false) => TokenAccess::ListenOnly,
        });
        Ok(jwt)
    }

    /// Checks whether a delegation can be carried out.
    async fn reserve<'a>(
        &'a self,
        user: &'a VerifiedUser,
        key: &'a ParticipantKey,
        event: &'a DelayedEvent,
        deadline: Deadline,
    ) -> Result<Reservation<'a>, DelegationError> {
        let delegation = Delegation {
            participant: key,
            user: &user.id,
            homeserver: &user.server,
            delay_id: &event.id,
            delay: event.delay,
        };
        self.leaves.reserve(&delegation, deadline).await
    }
}

fn too_many_tokens() -> TokenError {
    METRICS.limit_hit(Limit::Tokens);
    TokenError::TooManyTokens
}

/// Stops whoever is not in the Matrix room.
pub(crate) async fn must_be_joined(members: &Members, room_id: &str, subject: Subject<'_>, deadline: Deadline) -> Result<(), TokenError> {
    // Boxed: of use only where tokens are for members only.
    let asking = Box::pin(members.is_joined(room_id, subject, deadline));
    match step(Step::Members, asking).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(TokenError::NotJoined),
        Err(error) => Err(TokenError::Membership(error)),
    }
}
