//! Delegations that are checked before anything is done for them (decision T7): whether there is room, and whether the homeserver's
//! client-server API is found.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::{Driver, Leaves, UNWRITTEN, WRITE_TIMEOUT, core};
use crate::delayed_leave::{CapacityError, Handover};
use crate::federation::Failure;
use crate::identity::ParticipantKey;
use crate::metrics::{Limit, METRICS};
use crate::retry::Deadline;
use crate::server_name::ServerName;
use crate::store::JobRecord;
use crate::time::Delay;

/// A delayed leave event that a user hands over.
pub struct Delegation<'a> {
    /// The participant that is watched.
    pub participant: &'a ParticipantKey,
    /// The Matrix user.
    pub user: &'a str,
    /// The user's homeserver.
    pub homeserver: &'a ServerName,
    /// Id of the delayed event.
    pub delay_id: &'a str,
    /// Delay of the event.
    pub delay: Delay,
}

/// Why a delegation is not taken.
#[derive(Debug, thiserror::Error)]
pub enum DelegationError {
    /// The record of the delegated leave would be too long.
    #[error("the names of the delegation are too long together")]
    TooLong,
    /// Delegations are not taken: the service has just started, or is stopping.
    #[error("delegations are not taken at the moment")]
    NotReady,
    /// There are too many delegated leaves.
    #[error("too many delegated leaves: {0:?}")]
    Limit(CapacityError),
    /// The homeserver's client-server API cannot be found.
    #[error("{0}")]
    ClientApi(Failure),
}

impl From<CapacityError> for DelegationError {
    /// Counts a limit that was met, too.
    fn from(error: CapacityError) -> Self {
        if error != CapacityError::Stopping {
            METRICS.limit_hit(Limit::Jobs);
        }
        Self::Limit(error)
    }
}

/// A delegation that can be carried out. Nothing was done for it yet.
#[must_use = "nothing is watched before the reservation is committed"]
pub struct Reservation<'a> {
    driver: &'a Arc<Driver>,
    delegation: core::Delegation<'a>,
}

impl Leaves {
    /// Checks whether `delegation` can be carried out. What may pass is tried again until `deadline` says.
    ///
    /// # Errors
    /// When it cannot.
    pub async fn reserve<'a>(&'a self, delegation: &Delegation<'a>, deadline: Deadline) -> Result<Reservation<'a>, DelegationError> {
        let (driver, server) = (&self.0, delegation.homeserver);
        // In the user's name where our own homeserver can be asked in it (decision A6).
        let own = driver.own.as_ref().filter(|own| own.authority(server, delegation.user).is_some());
        if !record(delegation, own.is_some()).fits() {
            return Err(DelegationError::TooLong);
        }
        let until = deadline.retry_until;
        if !driver.ready(until).await {
            return Err(DelegationError::NotReady);
        }
        let delegation = core::Delegation {
            room: &delegation.participant.room,
            identity: &delegation.participant.identity,
            handover: Handover {
                user: delegation.user,
                homeserver: server.as_str(),
                delay_id: delegation.delay_id,
                delay: delegation.delay,
                arrived: driver.clock.at(deadline.received),
                listed: (driver.listed)(server.as_str()),
                as_user: own.is_some(),
            },
        };
        driver.state.lock().cores.admit(&delegation)?;
        let found = match own {
            Some(own) => own.resolve(until).await,
            None => driver.homeservers.resolve(server, until).await,
        };
        found.map_err(DelegationError::ClientApi)?;
        Ok(Reservation { driver, delegation })
    }
}

impl Reservation<'_> {
    /// Takes the delegation, and waits a little for its record to be written.
    ///
    /// # Errors
    /// When others have taken the room meanwhile.
    pub async fn commit(self) -> Result<(), DelegationError> {
        if let Some(link) = self.driver.fleet.as_ref().filter(|link| !link.has_read()) {
            return Ok(self.driver.delegate_elsewhere(link, &self.delegation).await?);
        }
        if let Some(written) = self.driver.delegate(&self.delegation)?
            && !written.within(WRITE_TIMEOUT).await
        {
            UNWRITTEN.log(|count| {
                tracing::warn!(name: "store_slow", count, "the store is slow or away: a delegation lives in memory until it answers");
            });
        }
        Ok(())
    }
}

impl Driver {
    /// Waits until delegations are taken; `false` when that does not happen before `deadline`.
    async fn ready(&self, deadline: Instant) -> bool {
        timeout_at(deadline, self.open()).await.is_ok() && self.is_open()
    }
}

/// The record that the delegation will have.
fn record<'a>(delegation: &Delegation<'a>, as_user: bool) -> JobRecord<'a> {
    JobRecord {
        room: delegation.participant.room.as_str().into(),
        identity: delegation.participant.identity.as_str().into(),
        delay_id: delegation.delay_id.into(),
        delay_ms: i64::try_from(delegation.delay.as_millis()).unwrap_or(i64::MAX),
        homeserver: delegation.homeserver.as_str().into(),
        user: delegation.user.into(),
        as_user,
        ..JobRecord::default()
    }
}
