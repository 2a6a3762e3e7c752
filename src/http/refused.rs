//! One log line per refused request: a client's fault at debug or info, a neighbour's at warn, ours at error. A line about
//! a neighbour names what can be done about it.

use crate::exchange::{Refusal, RemoteRefusal};
use crate::federation::Failure;
use crate::homeserver::OwnError;
use crate::openid::Unverified;

pub(super) fn log(refusal: &Refusal, server: &str, request_id: &str) {
    let reason = refusal.to_string();
    match refusal {
        Refusal::BadServerName
        | Refusal::DelegationDenied
        | Refusal::NotReady
        | Refusal::NotJoined
        | Refusal::BadUserId
        | Refusal::ForeignUser
        | Refusal::ClaimedUser
        | Refusal::BadDestination
        | Refusal::NoSuchEvent
        | Refusal::Remote(RemoteRefusal::Forbidden | RemoteRefusal::InvalidParam) => {
            tracing::debug!(request_id, server, reason, "refused");
        }
        // Of a client's own making, or a sign that the homeserver's list of transports names another address than ours.
        Refusal::OtherSfu => {
            let remedy = "the homeserver's matrix_rtc.transports must give clients the same address as LIVEKIT_URL";
            tracing::info!(request_id, server, reason, remedy, "refused: a token for another SFU");
        }
        Refusal::NotOurUser(_) => {
            let remedy = "LIVEKIT_HS_SERVER_NAME must be the server_name of the homeserver that has our registration";
            tracing::warn!(
                request_id,
                server,
                reason,
                remedy,
                "refused: the homeserver is not the one that is configured"
            );
        }
        Refusal::OwnClientApi(failure) => {
            let remedy = failure.remedy();
            tracing::warn!(
                request_id,
                server,
                reason,
                remedy,
                "refused: our homeserver's client-server API cannot be found"
            );
        }
        Refusal::Relay(error @ OwnError::Relay(_)) => {
            let remedy = error.remedy();
            tracing::info!(
                request_id,
                server,
                reason,
                remedy,
                "refused: the other homeserver's service gives no answer"
            );
        }
        Refusal::TooManyTokens => tracing::warn!(request_id, server, reason, "refused: a token that could not be watched"),
        Refusal::OutOfTime => {
            let remedy = "look for the homeserver or the SFU that is slow in the lines before";
            tracing::warn!(request_id, server, reason, remedy, "refused: no answer in time");
        }
        Refusal::Membership(error) | Refusal::Event(error) | Refusal::Relay(error) => {
            let remedy = error.remedy();
            tracing::warn!(request_id, server, reason, remedy, "refused: our homeserver did not do its part");
        }
        Refusal::Remote(RemoteRefusal::Unusable(_)) => {
            let remedy = "the other homeserver's service is out of order, or too old or too new for ours";
            tracing::info!(
                request_id,
                server,
                reason,
                remedy,
                "refused: no token from the other homeserver's service"
            );
        }
        Refusal::UserMismatch | Refusal::Unverified(Unverified::Rejected | Unverified::ForeignUser) => {
            tracing::info!(request_id, server, reason, "refused: the user could not be verified");
        }
        // Names come from strangers, and most of those that lead nowhere are probes: no warnings for these. The first
        // refusal of an address is told by `federation.rs`.
        Refusal::Unverified(Unverified::Unreachable { failure, known }) => {
            let remedy = failure.remedy();
            if *known && !matches!(failure, Failure::Refused { .. }) {
                tracing::warn!(request_id, server, reason, remedy, "refused: the homeserver could not be reached");
            } else {
                tracing::info!(request_id, server, reason, remedy, "refused: the homeserver could not be reached");
            }
        }
        Refusal::Unverified(Unverified::Unusable { known, .. }) => {
            let remedy =
                "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)";
            if *known {
                tracing::warn!(request_id, server, reason, remedy, "refused: the homeserver's answer is unusable");
            } else {
                tracing::info!(request_id, server, reason, remedy, "refused: the homeserver's answer is unusable");
            }
        }
        Refusal::Unverified(Unverified::Busy) => {
            let remedy = Failure::Busy.remedy();
            tracing::warn!(request_id, server, reason, remedy, "refused: overloaded");
        }
        Refusal::DelegationLimit(_) => tracing::warn!(request_id, server, reason, "refused: delegation"),
        Refusal::ClientApi(failure) => {
            let remedy = failure.remedy();
            tracing::warn!(
                request_id,
                server,
                reason,
                remedy,
                "refused: the homeserver's client-server API cannot be found"
            );
        }
        Refusal::Sfu(error) => {
            let remedy = error.remedy();
            tracing::warn!(request_id, reason, remedy, "refused: the room could not be opened on the SFU");
        }
        Refusal::Mint(_) => tracing::error!(request_id, reason, "refused: the token could not be signed"),
    }
}
