//! Reads what the SFU, or whatever answered in its place, meant by a refusal, and what the operator can do.
//!
//! The SFU's own text may contain our token (`invalid token: <the whole token>, …`), so it is read and never passed on.

use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;

use crate::retry::{Transient, backoff};
use crate::tls;

/// Why a call to the SFU failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SfuError {
    /// No connection to the SFU.
    #[error("cannot connect to the SFU: {0}")]
    Connect(String),
    /// The SFU did not answer in time.
    #[error("the SFU did not answer in time")]
    Timeout,
    /// The connection broke, or the answer was no HTTP.
    #[error("the SFU's answer broke off: {0}")]
    Broken(String),
    /// The SFU does not know our key.
    #[error("the SFU does not know the API key")]
    UnknownKey,
    /// The SFU knows our key with another secret.
    #[error("the SFU says that the signature is wrong")]
    WrongSecret,
    /// The SFU finds our token too old or too young.
    #[error("the SFU says that the token is not valid now")]
    Clock,
    /// The SFU knows us and denies the call.
    #[error("the SFU denies the call to this key")]
    Denied,
    /// The path does not lead to the API.
    #[error("the SFU, or a proxy before it, knows no such path")]
    BadRoute,
    /// A server that is not LiveKit answered. It says nothing of our key, of a room or of anybody in it.
    #[error("something else than LiveKit answered, with status {0}")]
    NotLiveKit(u16),
    /// The SFU knows the call and says that what it is about does not exist (Twirp's `not_found`).
    #[error("the SFU says that there is no such thing")]
    NotFound,
    /// The SFU says that the request is wrong.
    #[error("the SFU refused the request ({0})")]
    Refused(&'static str),
    /// The SFU has too much to do.
    #[error("the SFU answered with status {0}")]
    Overloaded(u16),
    /// An answer that is longer than what is read.
    #[error("the SFU's answer is too long")]
    TooLarge,
    /// No token could be made for the call.
    #[error("no token could be made for the call")]
    Token,
}

/// How often what somebody else answered is tried again: for more than a second, in which DNS was asked anew (decision O2).
const TRIES_ELSEWHERE: u32 = 3;

impl Transient for SfuError {
    const NEIGHBOUR: &'static str = "the SFU";

    fn pause(&self, tries: u32) -> Option<Duration> {
        let passes = self.may_pass() || (self.is_elsewhere() && tries <= TRIES_ELSEWHERE);
        passes.then(|| backoff(tries))
    }
}

impl SfuError {
    /// Whether trying again soon may help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Timeout | Self::Broken(_) | Self::Overloaded(_) => true,
            Self::NotLiveKit(status) => *status >= 500 || matches!(status, 408 | 425 | 429),
            Self::UnknownKey
            | Self::WrongSecret
            | Self::Clock
            | Self::Denied
            | Self::BadRoute
            | Self::NotFound
            | Self::Refused(_)
            | Self::TooLarge
            | Self::Token => false,
        }
    }

    /// Whether we are not let make the call, by the SFU or by a proxy before it. Of what was asked that says nothing.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::UnknownKey | Self::WrongSecret | Self::Clock | Self::Denied | Self::BadRoute | Self::NotLiveKit(401 | 403 | 404 | 501)
        )
    }

    /// Whether it says that the SFU cannot be used, and not only that one question cannot be answered.
    #[must_use]
    pub const fn is_about_the_sfu(&self) -> bool {
        !matches!(self, Self::NotFound | Self::Refused(_) | Self::TooLarge)
    }

    /// Whether the SFU may be elsewhere by now, and its old place somebody else's.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        matches!(self, Self::NotLiveKit(_) | Self::BadRoute)
    }

    /// Whether the SFU may have been restarted: what is remembered of its rooms is worth nothing.
    #[must_use]
    pub fn connection_failed(&self) -> bool {
        matches!(self, Self::Connect(_) | Self::Broken(_) | Self::Timeout)
            || matches!(self, Self::NotLiveKit(status) | Self::Overloaded(status) if (502..=504).contains(status))
    }

    /// Advice to the operator.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Connect(error) => tls::remedy(error).unwrap_or(
                "check that livekit-server runs and is reachable from here; if LIVEKIT_URL is only reachable from outside, set LIVEKIT_API_URL to an internal address",
            ),
            Self::Timeout | Self::Broken(_) => "check livekit-server's log and the network between",
            Self::UnknownKey => "LIVEKIT_KEY must be one of the keys in livekit-server's `keys:` (have LIVEKIT_KEY and LIVEKIT_SECRET been swapped?)",
            Self::WrongSecret => {
                "LIVEKIT_SECRET must be the secret of LIVEKIT_KEY in livekit-server's `keys:`; look for stray spaces or quotes"
            }
            Self::Clock => "the clocks of this machine and of livekit-server differ by more than a minute; check NTP on both",
            Self::Denied => "check LIVEKIT_KEY and LIVEKIT_SECRET, and that the key may create rooms",
            Self::BadRoute => {
                "check the path prefix of LIVEKIT_URL: a proxy must route it to livekit-server and strip it on the way; or set LIVEKIT_API_URL to the address of livekit-server itself"
            }
            Self::NotLiveKit(301 | 302 | 307 | 308) => {
                "it redirects, which is not followed: LIVEKIT_URL (or LIVEKIT_API_URL) must be the address that it redirects to, with wss:// or https:// where that is one with TLS"
            }
            Self::NotLiveKit(_) => {
                "a proxy, a login, a firewall or another program answers in livekit-server's place: let this service's calls of /twirp through, check the address and path of LIVEKIT_URL, or set LIVEKIT_API_URL to the address of livekit-server itself"
            }
            Self::NotFound | Self::Refused(_) => "check livekit-server's log for the reason, and its version",
            Self::Overloaded(_) => "check livekit-server's log, its load and its Redis",
            Self::TooLarge => "check that LIVEKIT_URL or LIVEKIT_API_URL leads to livekit-server and to nothing else",
            Self::Token => "check LIVEKIT_KEY and LIVEKIT_SECRET",
        }
    }
}

/// Body of a 404 for a path that nobody registered with Go's HTTP server: livekit-server's for all outside its API, also Traefik's.
const GO_NOT_FOUND: &[u8] = b"404 page not found";

/// How the SFU says no: both members are always there. Of gateways that answer in JSON, few have the one and none both.
#[derive(Deserialize)]
struct TwirpError {
    code: String,
    #[serde(rename = "msg")]
    _msg: String,
}

/// Reads an answer that is no yes. `body` may be cut off. What has none of the SFU's own forms is nothing that it said.
pub(super) fn read(status: StatusCode, body: &[u8]) -> SfuError {
    let twirp = serde_json::from_slice::<TwirpError>(body);
    let own = match twirp.as_ref().map(|error| error.code.as_str()) {
        Ok(code) => said(code, status),
        Err(_) if status == StatusCode::UNAUTHORIZED => unauthorized(body),
        Err(_) if status == StatusCode::NOT_FOUND && body.trim_ascii_end() == GO_NOT_FOUND => Some(SfuError::BadRoute),
        Err(_) => None,
    };
    own.filter(|_| status.is_client_error() || status.is_server_error())
        .unwrap_or(SfuError::NotLiveKit(status.as_u16()))
}

/// Reads an error code of Twirp.
fn said(code: &str, status: StatusCode) -> Option<SfuError> {
    Some(match code {
        "bad_route" | "unimplemented" => SfuError::BadRoute,
        "unauthenticated" | "permission_denied" => SfuError::Denied,
        "resource_exhausted" | "unavailable" | "internal" | "unknown" | "deadline_exceeded" | "aborted" | "canceled" | "dataloss" => {
            SfuError::Overloaded(status.as_u16())
        }
        "invalid_argument" | "malformed" | "failed_precondition" | "out_of_range" => SfuError::Refused("invalid argument"),
        "not_found" if status == StatusCode::NOT_FOUND => SfuError::NotFound,
        "already_exists" => SfuError::Refused("already exists"),
        _ => return None,
    })
}

/// The SFU answers a bad token in plain text that begins like this.
fn unauthorized(body: &[u8]) -> Option<SfuError> {
    let text = String::from_utf8_lossy(body);
    if text.starts_with("invalid API key") {
        return Some(SfuError::UnknownKey);
    }
    let (_, error) = text.strip_prefix("invalid token: ")?.split_once(", error: ")?;
    Some(if error.contains("expired") || error.contains("not valid yet") {
        SfuError::Clock
    } else if error.contains("signature is invalid") || error.contains("error in cryptographic primitive") {
        SfuError::WrongSecret
    } else {
        SfuError::Denied
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_real_livekit_server_and_its_proxies_say() {
        for (status, body, expected) in [
            (401, "invalid API key: nobody", SfuError::UnknownKey),
            (
                401,
                "invalid token: aa.bb.cc, error: token signature is invalid: signature is invalid",
                SfuError::WrongSecret,
            ),
            (
                401,
                "invalid token: aa.bb.cc, error: token has invalid claims: token is expired",
                SfuError::Clock,
            ),
            (
                401,
                "invalid token: aa.bb.cc, error: token has invalid claims: token is not valid yet",
                SfuError::Clock,
            ),
            (401, r#"{"code":"unauthenticated","msg":"permissions denied"}"#, SfuError::Denied),
            (
                404,
                r#"{"code":"bad_route","msg":"no handler for path","meta":{"twirp_invalid_route":"POST /x"}}"#,
                SfuError::BadRoute,
            ),
            (404, "404 page not found\n", SfuError::BadRoute),
            (
                400,
                r#"{"code":"invalid_argument","msg":"room name too long"}"#,
                SfuError::Refused("invalid argument"),
            ),
            (429, r#"{"code":"resource_exhausted","msg":"x"}"#, SfuError::Overloaded(429)),
            (500, r#"{"code":"internal","msg":"x"}"#, SfuError::Overloaded(500)),
            (503, r#"{"code":"unavailable","msg":"x"}"#, SfuError::Overloaded(503)),
            (
                404,
                r#"{"code":"not_found","msg":"participant does not exist"}"#,
                SfuError::NotFound,
            ),
            (501, r#"{"code":"unimplemented","msg":"x"}"#, SfuError::BadRoute),
            // What stands before it, and does not know of it.
            (404, "<html>not found</html>", SfuError::NotLiveKit(404)),
            (502, "<html>bad gateway</html>", SfuError::NotLiveKit(502)),
            (301, "", SfuError::NotLiveKit(301)),
            (401, "", SfuError::NotLiveKit(401)),
            (401, "<html>401 Authorization Required</html>", SfuError::NotLiveKit(401)),
            (
                401,
                "<html>your session has expired: invalid API key</html>",
                SfuError::NotLiveKit(401),
            ),
            (401, "invalid token", SfuError::NotLiveKit(401)),
            (401, r#"{"message":"Unauthorized"}"#, SfuError::NotLiveKit(401)),
            (403, r#"{"code":403,"msg":"forbidden"}"#, SfuError::NotLiveKit(403)),
            (403, "<html>Just a moment...</html>", SfuError::NotLiveKit(403)),
            (404, r#"{"code":"not_found","message":"no upstream"}"#, SfuError::NotLiveKit(404)),
            (404, r#"{"code":"rest_no_route","msg":"no route"}"#, SfuError::NotLiveKit(404)),
            (503, r#"{"code":"not_found","msg":"no upstream"}"#, SfuError::NotLiveKit(503)),
            (200, "", SfuError::NotLiveKit(200)),
            (200, "<html>maintenance</html>", SfuError::NotLiveKit(200)),
            (
                200,
                r#"{"code":"not_found","msg":"participant does not exist"}"#,
                SfuError::NotLiveKit(200),
            ),
        ] {
            assert_eq!(
                read(StatusCode::from_u16(status).unwrap(), body.as_bytes()),
                expected,
                "{status} {body}"
            );
        }
    }

    #[test]
    fn no_text_repeats_the_answer() {
        let error = read(
            StatusCode::UNAUTHORIZED,
            b"invalid token: eyJSECRET.eyJ.sig, error: token signature is invalid",
        );
        assert!(!format!("{error} {error:?} {}", error.remedy()).contains("eyJ"));
    }

    #[test]
    fn a_clear_no_is_not_tried_again() {
        for error in [
            SfuError::UnknownKey,
            SfuError::WrongSecret,
            SfuError::BadRoute,
            SfuError::NotLiveKit(404),
            SfuError::Denied,
        ] {
            assert!(!error.may_pass(), "{error}");
        }
        for error in [
            SfuError::NotLiveKit(502),
            SfuError::Overloaded(500),
            SfuError::Timeout,
            SfuError::Connect(String::new()),
        ] {
            assert!(error.may_pass(), "{error}");
        }
    }
}
