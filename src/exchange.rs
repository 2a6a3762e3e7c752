//! THE PIPELINE: who is asking -> what they may do -> room -> token. Every token route ends here, and delegations share
//! its first half.
//!
//! Refuse before side effects: nothing is asked before the request is complete, nobody is watched and no room is opened
//! before the user is known and the delegation can be carried out, and no token leaves before the room stands and the job
//! exists.

use std::sync::Arc;

use tokio::time::Instant;

use crate::access::{Access, Policy};
use crate::delayed_leave::{self, Delegation, Leaves};
use crate::federation::Failure;
use crate::hold::HOLD;
use crate::homeserver::Homeservers;
use crate::identity::Seat;
use crate::openid::{OpenId, Unverified, VerifiedUser};
use crate::server_name::ServerName;
use crate::sfu::{Sfu, SfuError};
use crate::token::{MintError, Minter};
use crate::wire::{DelayedEvent, DelegationRequest, SeatRequest, TokenRequest, UnverifiedOpenIdToken};

/// Why a request is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// `matrix_server_name` is not a server name.
    #[error("matrix_server_name is not a server name")]
    BadServerName,
    /// Nobody vouches for the user.
    #[error("{0}")]
    Unverified(#[from] Unverified),
    /// The token belongs to another user than the one claimed.
    #[error("the token belongs to another user than claimed_user_id")]
    UserMismatch,
    /// The user may not delegate.
    #[error("only full-access users may delegate delayed events")]
    DelegationDenied,
    /// There are too many delegated leaves.
    #[error("too many delegated leaves: {0:?}")]
    DelegationLimit(delayed_leave::Refusal),
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
}

/// The pipeline with what it needs.
pub struct Exchange {
    /// Who is asking.
    pub openid: OpenId,
    /// What they may do.
    pub policy: Policy,
    /// Rooms.
    pub sfu: Arc<Sfu>,
    /// Delayed events.
    pub homeservers: Arc<Homeservers>,
    /// Delegated leaves.
    pub leaves: Leaves,
    /// Tokens.
    pub minter: Arc<Minter>,
}

impl Exchange {
    /// Exchanges a Matrix OpenID token for a LiveKit token.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn exchange(&self, request: TokenRequest, received: Instant) -> Result<String, Refusal> {
        let user = self
            .verify(&request.openid_token, request.claimed_user_id.as_deref(), received)
            .await?;
        self.issue(&user, &request.seat, request.event.as_ref(), received).await
    }

    /// Takes over a delayed leave event.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn delegate(&self, request: DelegationRequest, received: Instant) -> Result<(), Refusal> {
        let user = self.verify(&request.openid_token, Some(&request.claimed_user_id), received).await?;
        let access = self.policy.of(&user.server);
        let seat = request.seat.seat(&user.id);
        let leave = self.leave(&user, access, &seat, &request.event, received).await?;
        self.leaves.delegate(&leave).await.map_err(Refusal::DelegationLimit)
    }

    /// Who is asking.
    async fn verify(
        &self,
        token: &UnverifiedOpenIdToken,
        claimed_user_id: Option<&str>,
        received: Instant,
    ) -> Result<VerifiedUser, Refusal> {
        let server = ServerName::parse(&token.unverified_server_name).map_err(|_| Refusal::BadServerName)?;
        let user = self.openid.verify(&server, &token.access_token, received + HOLD).await?;
        if claimed_user_id.is_some_and(|claimed| claimed != user.id) {
            return Err(Refusal::UserMismatch);
        }
        Ok(user)
    }

    /// What follows once the user is known. A homeserver that has done its own authentication enters here.
    async fn issue(
        &self,
        user: &VerifiedUser,
        seat: &SeatRequest,
        event: Option<&DelayedEvent>,
        received: Instant,
    ) -> Result<String, Refusal> {
        let access = self.policy.of(&user.server);
        let seat = seat.seat(&user.id);
        let leave = match event {
            Some(event) => Some(self.leave(user, access, &seat, event, received).await?),
            None => None,
        };
        if access.creates_rooms {
            self.sfu.ensure_room(&seat.room, received + HOLD).await?;
            self.sfu.expect(&seat);
        }
        if let Some(leave) = &leave {
            self.leaves.delegate(leave).await.map_err(Refusal::DelegationLimit)?;
        }
        let jwt = self.minter.mint(&seat, access)?;
        tracing::debug!(
            user = user.id.as_str(),
            room = seat.room.as_str(),
            identity = seat.identity.as_str(),
            full_access = access.creates_rooms,
            publishes = access.publishes,
            delegates = leave.is_some(),
            "token issued"
        );
        Ok(jwt)
    }

    /// A delegation that may be made and can be carried out.
    async fn leave<'a>(
        &self,
        user: &'a VerifiedUser,
        access: Access,
        seat: &'a Seat,
        event: &'a DelayedEvent,
        received: Instant,
    ) -> Result<Delegation<'a>, Refusal> {
        if !access.creates_rooms {
            return Err(Refusal::DelegationDenied);
        }
        let delegation = Delegation {
            seat,
            user: &user.id,
            homeserver: user.server.as_str(),
            delay_id: &event.id,
            delay: event.delay,
            received,
        };
        if !self.leaves.ready(received + HOLD).await {
            return Err(Refusal::NotReady);
        }
        self.leaves.admit(&delegation).map_err(Refusal::DelegationLimit)?;
        self.homeservers
            .resolve(&user.server, received + HOLD)
            .await
            .map_err(Refusal::ClientApi)?;
        Ok(delegation)
    }
}
