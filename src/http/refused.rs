//! Logs a line per refused request: a client's fault at debug or info, a neighbour's at warn, ours at error. A line about a
//! neighbour names what can be done about it.
//!
//! Who is refused is often unknown, so from `info` on lines are throttled by the class of the homeserver: whoever makes
//! homeservers up neither fills the log nor hides the lines about those that the operator wrote down.

use crate::admission::Class;
use crate::exchange::{Refusal, RemoteRefusal};
use crate::federation::Failure;
use crate::homeserver::OwnError;
use crate::log_throttle::LogThrottle;
use crate::openid::Unverified;

static LISTED: LogThrottle = LogThrottle::ten_a_second();
/// Junk for a listed homeserver must not hide that a neighbour does not do its part.
static NEIGHBOURS: LogThrottle = LogThrottle::ten_a_second();
static VERIFIED: LogThrottle = LogThrottle::ten_a_second();
static STRANGERS: LogThrottle = LogThrottle::ten_a_second();

/// Bytes of a reason, and of a name that may be none, that are shown.
const MAX_TEXT: usize = 512;

#[derive(Clone, Copy)]
enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

/// Logs why a request of a user of `server`, which is of `class`, is refused.
pub(super) fn log(refusal: &Refusal, server: &str, class: Class, request_id: &str) {
    let (level, message, remedy) = words(refusal);
    // The other end chooses some of it: the names in a certificate, for one.
    let reason = refusal.to_string();
    let (reason, server) = (beginning(&reason, MAX_TEXT), beginning(server, MAX_TEXT));
    let throttle = match (class, level) {
        (Class::Listed, Level::Debug | Level::Info) => &LISTED,
        (Class::Listed, Level::Warn | Level::Error) => &NEIGHBOURS,
        (Class::Verified, _) => &VERIFIED,
        (Class::Stranger, _) => &STRANGERS,
    };
    macro_rules! throttled {
        ($level:ident) => {
            // What is not shown anyway must not use up the lines of what is.
            if tracing::enabled!(tracing::Level::$level) {
                throttle.log(|count| {
                    let hidden = count - 1;
                    if hidden > 0 {
                        tracing::event!(tracing::Level::$level, ?class, "{hidden} more refusals not shown");
                    }
                    tracing::event!(tracing::Level::$level, request_id, server, reason, remedy, "{message}");
                });
            }
        };
    }
    match level {
        Level::Debug => tracing::debug!(request_id, server, reason, "{message}"),
        Level::Info => throttled!(INFO),
        Level::Warn => throttled!(WARN),
        Level::Error => throttled!(ERROR),
    }
}

/// Says whose fault a refusal is, what happened, and what can be done about it.
fn words(refusal: &Refusal) -> (Level, &'static str, Option<&'static str>) {
    match refusal {
        Refusal::BadServerName
        | Refusal::DelegationDenied
        | Refusal::DelegationTooLong
        | Refusal::NotReady
        | Refusal::NotJoined
        | Refusal::BadUserId
        | Refusal::ForeignUser
        | Refusal::ClaimedUser
        | Refusal::BadDestination
        | Refusal::NoSuchEvent
        | Refusal::Remote(RemoteRefusal::Forbidden | RemoteRefusal::InvalidParam) => (Level::Debug, "refused", None),
        // Of a client's own making, or a sign that the homeserver's list of transports names another address than ours.
        Refusal::OtherSfu => (
            Level::Info,
            "refused: a token for another SFU",
            Some("the homeserver's matrix_rtc.transports must give clients the same address as LIVEKIT_URL"),
        ),
        Refusal::NotOurUser(_) => (
            Level::Warn,
            "refused: the homeserver is not the one that is configured",
            Some("LIVEKIT_HS_SERVER_NAME must be the server_name of the homeserver that has our registration"),
        ),
        Refusal::OwnClientApi(failure) => (
            Level::Warn,
            "refused: our homeserver's client-server API cannot be found",
            Some(failure.remedy()),
        ),
        Refusal::Relay(error @ (OwnError::Relay(_) | OwnError::RelayBusy { .. })) => (
            Level::Info,
            "refused: the other homeserver's service gives no answer",
            Some(error.remedy()),
        ),
        Refusal::TooManyTokens => (Level::Warn, "refused: a token that could not be watched", None),
        Refusal::OutOfTime => (
            Level::Warn,
            "refused: no answer in time",
            Some("look for the homeserver or the SFU that is slow in the lines before"),
        ),
        Refusal::Membership(error) | Refusal::Event(error) | Refusal::Relay(error) => {
            (Level::Warn, "refused: our homeserver did not do its part", Some(error.remedy()))
        }
        Refusal::Remote(RemoteRefusal::Unusable(_)) => (
            Level::Info,
            "refused: no token from the other homeserver's service",
            Some("the other homeserver's service is out of order, or too old or too new for ours"),
        ),
        Refusal::UserMismatch | Refusal::Unverified(Unverified::Rejected | Unverified::ForeignUser) => {
            (Level::Info, "refused: the user could not be verified", None)
        }
        // Names come from strangers, and most of those that lead nowhere are probes: no warnings for these. The first
        // refusal of an address is told by `federation.rs`.
        Refusal::Unverified(Unverified::Unreachable { failure, known }) => {
            let level = if *known && !matches!(failure, Failure::Refused { .. }) {
                Level::Warn
            } else {
                Level::Info
            };
            (level, "refused: the homeserver could not be reached", Some(failure.remedy()))
        }
        Refusal::Unverified(Unverified::Unusable { known, .. }) => (
            if *known { Level::Warn } else { Level::Info },
            "refused: the homeserver's answer is unusable",
            Some(
                "check that /_matrix/federation/v1/openid is routed to that homeserver and enabled there (a listener's `openid` resource)",
            ),
        ),
        Refusal::Unverified(Unverified::Busy) => (Level::Warn, "refused: overloaded", Some(Failure::Busy.remedy())),
        Refusal::DelegationLimit(_) => (Level::Warn, "refused: delegation", None),
        Refusal::ClientApi(failure) => (
            Level::Warn,
            "refused: the homeserver's client-server API cannot be found",
            Some(failure.remedy()),
        ),
        Refusal::Sfu(error) => (
            Level::Warn,
            "refused: the room could not be opened on the SFU",
            Some(error.remedy()),
        ),
        Refusal::Mint(_) => (Level::Error, "refused: the token could not be signed", None),
    }
}

fn beginning(text: &str, bytes: usize) -> &str {
    let end = text
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|end| *end <= bytes)
        .last();
    text.get(..end.unwrap_or(0)).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_between_characters() {
        for (text, expected) in [
            ("", ""),
            ("abc", "abc"),
            ("abcd", "abcd"),
            ("abcde", "abcd"),
            ("abcä", "abc"),
            ("ää", "ää"),
        ] {
            assert_eq!(beginning(text, 4), expected, "{text}");
        }
    }
}
