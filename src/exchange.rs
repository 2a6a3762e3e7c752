//! THE PIPELINE: who is asking -> what they may do -> room -> token. Every token route ends here.
//!
//! Refuse before side effects: nothing is asked before the request is complete, the SFU is not asked before the user is
//! known, and no token leaves before the room stands.

use std::sync::Arc;

use tokio::time::Instant;

use crate::access::Policy;
use crate::hold::HOLD;
use crate::openid::{OpenId, Unverified, VerifiedUser};
use crate::server_name::ServerName;
use crate::sfu::{Sfu, SfuError};
use crate::token::{MintError, Minter};
use crate::wire::TokenRequest;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request asks to delegate its delayed leave event.
    #[error("delegation of delayed events is not supported")]
    Delegation,
    /// `matrix_server_name` is not a server name.
    #[error("matrix_server_name is not a server name")]
    BadServerName,
    /// Nobody vouches for the user.
    #[error("{0}")]
    Unverified(#[from] Unverified),
    /// The token belongs to another user than the one claimed.
    #[error("the token belongs to another user than claimed_user_id")]
    UserMismatch,
    /// The room could not be opened.
    #[error("{0}")]
    Sfu(#[from] SfuError),
    /// The token could not be signed.
    #[error("{0}")]
    Mint(#[from] MintError),
}

/// The pipeline with what it needs.
pub struct Exchange {
    openid: OpenId,
    policy: Policy,
    sfu: Arc<Sfu>,
    minter: Arc<Minter>,
}

impl Exchange {
    /// Puts the steps together.
    #[must_use]
    pub fn new(openid: OpenId, policy: Policy, sfu: Arc<Sfu>, minter: Arc<Minter>) -> Self {
        Self {
            openid,
            policy,
            sfu,
            minter,
        }
    }

    /// Exchanges a Matrix OpenID token for a LiveKit token.
    ///
    /// # Errors
    /// With the first step that refused.
    pub async fn exchange(&self, request: TokenRequest, received: Instant) -> Result<String, Refusal> {
        if request.delegates {
            return Err(Refusal::Delegation);
        }
        let deadline = received + HOLD;
        let token = &request.openid_token;
        let server = ServerName::parse(&token.unverified_server_name).map_err(|_| Refusal::BadServerName)?;
        let user = self.openid.verify(&server, &token.access_token, deadline).await?;
        if request.claimed_user_id.as_ref().is_some_and(|claimed| *claimed != user.id) {
            return Err(Refusal::UserMismatch);
        }
        self.issue(&user, &request, deadline).await
    }

    /// The part that a homeserver that has done its own authentication enters at.
    async fn issue(&self, user: &VerifiedUser, request: &TokenRequest, deadline: Instant) -> Result<String, Refusal> {
        let access = self.policy.of(&user.server);
        let seat = request.seat.seat(&user.id);
        if access.creates_rooms {
            self.sfu.ensure_room(&seat.room, deadline).await?;
        }
        let jwt = self.minter.mint(&seat, access)?;
        tracing::debug!(
            user = user.id.as_str(),
            room = seat.room.as_str(),
            identity = seat.identity.as_str(),
            full_access = access.creates_rooms,
            publishes = access.publishes,
            "token issued"
        );
        Ok(jwt)
    }
}
