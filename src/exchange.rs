//! THE PIPELINE: who is asking -> what they may do -> room -> token. Every token route ends here, and delegations share
//! its first half.
//!
//! Refuse before side effects (decision T7): nothing is asked before the request is complete, nobody is watched and no room is opened
//! before the user is known and the delegation can be carried out, and no token leaves before the room stands and the job
//! exists.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::{Instant, timeout_at};

use crate::access::{Access, Homeservers as PolicyList, Policy};
use crate::admission::Client;
use crate::config::changes;
use crate::delayed_leave::CapacityError;
use crate::driver::{Delegation, Leaves};
use crate::federation::Failure;
use crate::hold::{ENDS, HOLD, TOKEN_SOURCE_ENDS, TOKEN_SOURCE_HOLD};
use crate::homeserver::{Homeservers, OwnError, OwnHomeserver, Subject};
use crate::identity::Seat;
use crate::kick::KickOnLeave;
use crate::members::Members;
use crate::metrics::{Limit, METRICS, TokenAccess};
use crate::openid::{OpenId, Unverified, VerifiedUser};
use crate::outcome::Outcome;
use crate::request_line::{Step, note, step};
use crate::server_name::ServerName;
use crate::sfu::{Sfu, SfuError};
use crate::store::JobRecord;
use crate::token::{MintError, Minter};
use crate::wire::{DelayedEvent, DelegationRequest, SeatRequest, TokenRequest, UnverifiedOpenIdToken};

/// When a request arrived, and from whom.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// When, and what follows from that.
    pub patience: Patience,
    /// Sender of the request, as far as that can be told.
    pub client: Client,
}

/// How long a request may take (decision T7a).
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// When the head of the request was there.
    pub received: Instant,
    /// Until when that which may pass is tried again.
    pub held_until: Instant,
    /// When no answer of a neighbour is waited for any more.
    pub ends: Instant,
}

impl Patience {
    /// For a request to any route but `/token_source`.
    #[must_use]
    pub fn since(received: Instant) -> Self {
        Self {
            received,
            held_until: received + HOLD,
            ends: received + ENDS,
        }
    }

    /// For a request to `/token_source`.
    #[must_use]
    pub fn of_token_source(received: Instant) -> Self {
        Self {
            received,
            held_until: received + TOKEN_SOURCE_HOLD,
            ends: received + TOKEN_SOURCE_ENDS,
        }
    }
}

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// `matrix_server_name` is not a server name.
    #[error("matrix_server_name is not a server name")]
    BadServerName,
    /// No homeserver vouches for the user.
    #[error("{0}")]
    Unverified(#[from] Unverified),
    /// The token belongs to another user than the one claimed.
    #[error("the token belongs to another user than claimed_user_id")]
    UserMismatch,
    /// The user may not delegate.
    #[error("only full-access users may delegate delayed events")]
    DelegationDenied,
    /// The record of the delegated leave would be too long.
    #[error("the names of the delegation are too long together")]
    DelegationTooLong,
    /// There are too many delegated leaves.
    #[error("too many delegated leaves: {0:?}")]
    DelegationLimit(CapacityError),
    /// The homeserver's client-server API cannot be found.
    #[error("{0}")]
    ClientApi(Failure),
    /// Delegations are not taken: the service has just started, or is stopping.
    #[error("delegations are not taken at the moment")]
    NotReady,
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
    Remote(RemoteRefusal),
    /// The user, the homeserver, or all together hold more tokens than can be watched.
    #[error("too many tokens are watched already, of this user, this homeserver or in all")]
    TooManyTokens,
    /// The time for an answer is over.
    #[error("it takes too long")]
    OutOfTime,
}

/// How another homeserver's service refused (the rows of the error table that may be passed on).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RemoteRefusal {
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
    /// Opens rooms on the SFU.
    pub sfu: Arc<Sfu>,
    /// Finds the client-server APIs that delayed events are managed on.
    pub homeservers: Arc<Homeservers>,
    /// Watches delegated leaves.
    pub leaves: Leaves,
    /// Signs tokens for the SFU.
    pub minter: Arc<Minter>,
    /// Our own homeserver, where there is one.
    pub own: Option<Arc<OwnHomeserver>>,
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
const TYPO: usize = 2;

impl Unlisted {
    fn seen(&self, server: &ServerName, full_access: &PolicyList) {
        let PolicyList::Listed(listed) = full_access else { return };
        if listed.contains(server) {
            self.a_listed_one_was_seen.store(true, Relaxed);
        }
        if self.a_listed_one_was_seen.load(Relaxed) {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= MAX_UNLISTED || !told.insert(server.clone()) {
            return;
        }
        drop(told);
        let is_meant = |name: &&ServerName| {
            let (name, server) = (name.as_str().to_ascii_lowercase(), server.as_str());
            let host = |text: &str| text.split(':').next().unwrap_or_default().to_owned();
            // A delegated host such as matrix.example.com is often listed in place of example.com.
            changes(&name, server) <= TYPO || host(&name) == host(server) || name.ends_with(&format!(".{server}"))
        };
        let meant = listed.iter().find(is_meant).map(ServerName::as_str);
        let server = server.as_str();
        match meant {
            Some(meant) => {
                let remedy = format!(
                    "did you mean {server} where LIVEKIT_FULL_ACCESS_HOMESERVERS has {meant}? It lists names as in user ids, not hosts"
                );
                tracing::warn!(
                    server,
                    remedy,
                    "users of a homeserver without full access come, and of none that has it"
                );
            }
            None => tracing::info!(
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
    pub async fn exchange(&self, request: TokenRequest, arrival: Arrival, verified: impl FnOnce()) -> Result<String, Refusal> {
        let patience = arrival.patience;
        note(|line| {
            line.matrix_room = Some(request.seat.room_id().into());
            line.delegated = Some(request.event.is_some());
        });
        let user = self
            .verify(&request.openid_token, request.claimed_user_id.as_deref(), arrival)
            .await?;
        verified();
        let admitted = Admitted {
            is_member: self.must_be_joined(&user, &request.seat, patience).await?,
            access: self.policy.of(&user.server),
            user: &user,
        };
        // Boxed: whoever waits to be verified does not carry what comes after it.
        Box::pin(self.issue(&admitted, &request.seat, request.event.as_ref(), patience)).await
    }

    /// Takes over a delayed leave event. `verified` is called when the user is known.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn delegate(&self, request: DelegationRequest, arrival: Arrival, verified: impl FnOnce()) -> Result<(), Refusal> {
        let patience = arrival.patience;
        note(|line| line.matrix_room = Some(request.seat.room_id().into()));
        let user = self.verify(&request.openid_token, Some(&request.claimed_user_id), arrival).await?;
        verified();
        self.must_be_joined(&user, &request.seat, patience).await?;
        if !self.policy.of(&user.server).creates_rooms {
            return Err(Refusal::DelegationDenied);
        }
        Box::pin(self.take_over(&user, &request.seat, &request.event, patience)).await
    }

    /// Takes over a delayed leave event of a user who may delegate.
    pub(crate) async fn take_over(
        &self,
        user: &VerifiedUser,
        seat: &SeatRequest,
        event: &DelayedEvent,
        patience: Patience,
    ) -> Result<(), Refusal> {
        let seat = seat.seat(&user.id);
        note(|line| {
            line.livekit_room = Some(seat.room.as_str().into());
            line.delegated = Some(true);
        });
        let leave = self.leave(user, &seat, event, patience).await?;
        self.hand_over(&leave).await
    }

    /// Verifies who is asking.
    async fn verify(
        &self,
        token: &UnverifiedOpenIdToken,
        claimed_user_id: Option<&str>,
        arrival: Arrival,
    ) -> Result<VerifiedUser, Refusal> {
        let server = ServerName::parse(&token.unverified_server_name).map_err(|_| Refusal::BadServerName)?;
        let asking = self
            .openid
            .verify(&server, &token.access_token, arrival.client, arrival.patience.held_until);
        let asked = step(Step::Verify, pin!(asking)).await;
        METRICS.verified(asked.as_ref().map_or_else(Unverified::outcome, |_| Outcome::Ok));
        let user = asked?;
        if claimed_user_id.is_some_and(|claimed| claimed != user.id) {
            return Err(Refusal::UserMismatch);
        }
        note(|line| (line.is_proven, line.user) = (true, Some(user.id.as_str().into())));
        self.unlisted.seen(&user.server, &self.policy.full_access);
        Ok(user)
    }

    /// Whether it was checked that the user is in the Matrix room: where tokens are for members only.
    async fn must_be_joined(&self, user: &VerifiedUser, seat: &SeatRequest, patience: Patience) -> Result<bool, Refusal> {
        let Some(members) = &self.members else { return Ok(false) };
        must_be_joined(members, seat.room_id(), Subject::User(&user.id), patience).await?;
        Ok(true)
    }

    /// Opens the room, takes the delegation over and signs the token for a user who is known. A homeserver that has done its own
    /// authentication enters here.
    pub(crate) async fn issue(
        &self,
        admitted: &Admitted<'_>,
        request: &SeatRequest,
        event: Option<&DelayedEvent>,
        patience: Patience,
    ) -> Result<String, Refusal> {
        let Admitted { user, access, is_member } = *admitted;
        let seat = request.seat(&user.id);
        note(|line| {
            line.livekit_room = Some(seat.room.as_str().into());
            (line.opens_rooms, line.publishes) = (Some(access.creates_rooms), Some(access.publishes));
        });
        let leave = match event {
            Some(_) if !access.creates_rooms => return Err(Refusal::DelegationDenied),
            Some(event) => Some(self.leave(user, &seat, event, patience).await?),
            None => None,
        };
        // Before the token leaves: whoever has it is watched. Nobody gets one who could not be removed.
        if let Some(kick) = &self.kick
            && !kick.on_token(request.room_id(), &user.id, &seat, self.minter.ttl(), is_member)
        {
            METRICS.limit_hit(Limit::Tokens);
            return Err(Refusal::TooManyTokens);
        }
        if access.creates_rooms {
            let room = timeout_at(patience.ends, self.sfu.ensure_room(&seat.room, patience.held_until));
            step(Step::Sfu, pin!(room)).await.unwrap_or(Err(SfuError::Timeout))?;
            self.sfu.expect(&seat);
        }
        if let Some(leave) = &leave {
            self.hand_over(leave).await?;
        }
        let jwt = self.minter.mint(&seat, access)?;
        METRICS.token(match (access.creates_rooms, access.publishes) {
            (true, _) => TokenAccess::Full,
            (false, true) => TokenAccess::Restricted,
            (false, false) => TokenAccess::ListenOnly,
        });
        Ok(jwt)
    }

    async fn hand_over(&self, leave: &Delegation<'_>) -> Result<(), Refusal> {
        let handed_over = step(Step::Store, pin!(self.leaves.delegate(leave))).await;
        handed_over.map_err(limit_reached)
    }

    /// A delegation that can be carried out.
    async fn leave<'a>(
        &self,
        user: &'a VerifiedUser,
        seat: &'a Seat,
        event: &'a DelayedEvent,
        patience: Patience,
    ) -> Result<Delegation<'a>, Refusal> {
        // In the user's name where our own homeserver can be asked in it (decision A6).
        let own = self.own.as_ref().filter(|own| own.authority(&user.server, &user.id).is_some());
        let record = JobRecord {
            room: seat.room.as_str().into(),
            identity: seat.identity.as_str().into(),
            delay_id: event.id.as_str().into(),
            delay_ms: i64::try_from(event.delay.as_millis()).unwrap_or(i64::MAX),
            homeserver: user.server.as_str().into(),
            user: user.id.as_str().into(),
            as_user: own.is_some(),
            ..JobRecord::default()
        };
        if !record.fits() {
            return Err(Refusal::DelegationTooLong);
        }
        let delegation = Delegation {
            seat,
            user: &user.id,
            homeserver: user.server.as_str(),
            delay_id: &event.id,
            delay: event.delay,
            received: patience.received,
            as_user: own.is_some(),
        };
        let deadline = patience.held_until;
        if !self.leaves.ready(deadline).await {
            return Err(Refusal::NotReady);
        }
        self.leaves.admit(&delegation).map_err(limit_reached)?;
        let found = match own {
            Some(own) => own.resolve(deadline).await,
            None => self.homeservers.resolve(&user.server, deadline).await,
        };
        found.map_err(Refusal::ClientApi)?;
        Ok(delegation)
    }
}

/// Counts a limit that was met.
fn limit_reached(error: CapacityError) -> Refusal {
    if error != CapacityError::Stopping {
        METRICS.limit_hit(Limit::Jobs);
    }
    Refusal::DelegationLimit(error)
}

/// Stops whoever is not in the Matrix room.
pub(crate) async fn must_be_joined(members: &Members, room_id: &str, subject: Subject<'_>, patience: Patience) -> Result<(), Refusal> {
    // Boxed: of use only where tokens are for members only.
    let asking = Box::pin(members.is_joined(room_id, subject, patience.held_until, patience.ends));
    match step(Step::Members, asking).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::NotJoined),
        Err(error) => Err(Refusal::Membership(error)),
    }
}
