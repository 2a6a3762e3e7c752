//! Why a request was refused, for its line in the log: a client's fault at info, a neighbour's at warn, ours at error
//! (decision P12). A line about a neighbour names what can be done about it.

use tracing::Level;

use crate::exchange::{RemoteTokenError, TokenError};
use crate::federation::Failure;
use crate::homeserver::OwnError;
use crate::openid::{Answer, OpenIdError};
use crate::request_line::{ErrorReport, note};

/// Adds to the line of the request at hand why it is refused.
pub(super) fn tell(refusal: &TokenError) {
    let (level, message, remedy) = words(refusal);
    let detail = Some(refusal.to_string().into());
    note(|line| {
        line.refuse(ErrorReport {
            level,
            message,
            detail,
            remedy,
        });
    });
}

/// Adds to the line of the request at hand what is wrong with the request itself.
pub(super) fn tell_mistake(mistake: &dyn std::fmt::Display) {
    let detail = Some(mistake.to_string().into());
    note(|line| {
        line.refuse(ErrorReport {
            level: Level::INFO,
            message: "refused",
            detail,
            remedy: None,
        });
    });
}

/// Says whose fault a refusal is, what happened, and what can be done about it.
fn words(refusal: &TokenError) -> (Level, &'static str, Option<&'static str>) {
    match refusal {
        TokenError::BadServerName
        | TokenError::DelegationDenied
        | TokenError::DelegationTooLong
        | TokenError::NotReady
        | TokenError::NotJoined
        | TokenError::BadUserId
        | TokenError::ForeignUser
        | TokenError::ClaimedUser
        | TokenError::BadDestination
        | TokenError::NoSuchEvent
        | TokenError::Remote(RemoteTokenError::Forbidden | RemoteTokenError::InvalidParam) => (Level::INFO, "refused", None),
        // Of a client's own making, or a sign that the homeserver's list of transports names another address than ours.
        TokenError::OtherSfu => (
            Level::INFO,
            "refused: a token for another SFU",
            Some("the homeserver's matrix_rtc.transports must give clients the same address as LIVEKIT_URL"),
        ),
        TokenError::NotOurUser(_) => (
            Level::WARN,
            "refused: the homeserver is not the one that is configured",
            Some("LIVEKIT_HS_SERVER_NAME must be the server_name of the homeserver that has our registration"),
        ),
        TokenError::OwnClientApi(failure) => (
            Level::WARN,
            "refused: our homeserver's client-server API cannot be found",
            Some(failure.remedy()),
        ),
        TokenError::Relay(error @ (OwnError::Relay(_) | OwnError::RelayBusy { .. })) => (
            Level::INFO,
            "refused: the other homeserver's service gives no answer",
            Some(error.remedy()),
        ),
        TokenError::TooManyTokens => (Level::WARN, "refused: a token that could not be watched", None),
        TokenError::OutOfTime => (
            Level::WARN,
            "refused: no answer in time",
            Some("look for the homeserver or the SFU that is slow in the lines before"),
        ),
        TokenError::Membership(error) | TokenError::Event(error) | TokenError::Relay(error) => {
            (Level::WARN, "refused: our homeserver did not do its part", Some(error.remedy()))
        }
        TokenError::Remote(RemoteTokenError::Unusable(_)) => (
            Level::INFO,
            "refused: no token from the other homeserver's service",
            Some("the other homeserver's service is out of order, or too old or too new for ours"),
        ),
        TokenError::UserMismatch | TokenError::OpenId(OpenIdError::Rejected | OpenIdError::ForeignUser) => {
            (Level::INFO, "refused: the user could not be verified", None)
        }
        // Names come from strangers, and most of those that lead nowhere are probes: no warnings for these. The first
        // refusal of an address is told by `federation.rs`.
        TokenError::OpenId(OpenIdError::Unreachable { failure, known }) => {
            let level = if *known && !matches!(failure, Failure::AddressDenied { .. }) {
                Level::WARN
            } else {
                Level::INFO
            };
            (level, "refused: the homeserver could not be reached", Some(failure.remedy()))
        }
        TokenError::OpenId(OpenIdError::Unusable { known, answer }) => (
            if *known { Level::WARN } else { Level::INFO },
            "refused: the homeserver's answer is unusable",
            Some(unusable(*answer)),
        ),
        TokenError::OpenId(OpenIdError::Busy) => (Level::WARN, "refused: overloaded", Some(Failure::Busy.remedy())),
        TokenError::DelegationLimit(_) => (Level::WARN, "refused: delegation", None),
        TokenError::ClientApi(failure) => (
            Level::WARN,
            "refused: the homeserver's client-server API cannot be found",
            Some(failure.remedy()),
        ),
        TokenError::Sfu(error) => (
            Level::WARN,
            "refused: the room could not be opened on the SFU",
            Some(error.remedy()),
        ),
        TokenError::Mint(_) => (Level::ERROR, "refused: the token could not be signed", None),
    }
}

/// Remedy for an answer to userinfo that is neither yes nor no.
const fn unusable(answer: Answer) -> &'static str {
    let (Answer::Status(status) | Answer::NoJson(status)) = answer else {
        return "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)";
    };
    match status {
        301 | 302 | 303 | 307 | 308 => {
            "it redirects, which is not followed: name the host that it redirects to in its .well-known/matrix/server (or in \
             LIVEKIT_FEDERATION_URL_OVERRIDES), or serve /_matrix/federation where it is asked"
        }
        403 => {
            "federation is refused: by a firewall, an allow-list, or a homeserver with federation switched off; let this service's address \
             through, and see that a listener has the `openid` resource, which needs no federation"
        }
        429 => "the homeserver, or what stands before it, limits how often it is asked: raise the limit for this service's address",
        502..=504 => {
            "the proxy before the homeserver answers and the homeserver behind it does not: see that it runs, and where the proxy sends \
             /_matrix/federation"
        }
        _ => "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)",
    }
}
