//! Step 1, who is asking: the homeserver's word for an OpenID token
//! ([server-server API, "OpenID"](https://spec.matrix.org/v1.16/server-server-api/#openid)).
//!
//! The `sub` in the answer is believed only as far as the homeserver that was asked may speak: its user part can be
//! anything, its server part must be that homeserver, byte for byte.
#![expect(clippy::disallowed_methods, reason = "an adapter: asks, waits and remembers")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use lru::LruCache;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use url::form_urlencoded;

use crate::admission::{Class, Client, Who};
use crate::cache::bounded;
use crate::clock::unix_seconds;
use crate::federation::{Caller, Failure, Federation, Get, Homeserver};
use crate::metrics::{CallResult, METRICS, NeighbourCall};
use crate::outcome::Outcome;
use crate::request_line::neighbour_said;
use crate::retry::{MIN_REMAINING, backoff};
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::single_flight::SingleFlight;
use crate::wire::{errcode, text_in};

/// Longest user ID in bytes.
const MAX_USER_ID_BYTES: usize = 255;
/// Largest answer that is read.
const MAX_REPLY_BYTES: usize = 64 * 1024;
/// Tries per request for a homeserver that is neither listed nor ever verified a token here (decision T7a).
const STRANGER_TRIES: u32 = 3;

/// How long a homeserver's no to a token is remembered (decision H7b); a failure never is.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// How many such tokens: some forty bytes each.
const MAX_REFUSED: NonZeroUsize = NonZeroUsize::new(8192).unwrap();

/// A user whose homeserver vouched for the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedUser {
    /// Full user ID, `@local:server`.
    pub id: String,
    /// The user's homeserver, the one that was asked.
    pub server: ServerName,
}

/// Reasons for which a token proves nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenIdError {
    /// The homeserver does not know the token.
    #[error("the homeserver rejected the OpenID token")]
    Rejected,
    /// The homeserver could not be asked.
    #[error("{failure}")]
    Unreachable {
        /// Reason for which the homeserver could not be asked.
        failure: Failure,
        /// Whether the homeserver is listed, or has verified a token here.
        known: bool,
    },
    /// The homeserver answered something else than the specification says.
    #[error("the homeserver answered userinfo with {answer}")]
    Unusable {
        /// Answer that the homeserver gave.
        answer: Answer,
        /// Whether the homeserver is listed, or has verified a token here.
        known: bool,
    },
    /// The homeserver vouched for a user that is not its own, or not a user at all.
    #[error("the homeserver vouched for something that is not a user of its own")]
    ForeignUser,
    /// Too many requests wait already.
    #[error("too many requests are waiting for homeservers")]
    Busy,
}

/// An answer that is neither yes nor no.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Answer {
    /// Any other status, with a JSON object as all that a homeserver says.
    #[error("status {0}")]
    Status(u16),
    /// Any status with something else: what answers is no homeserver.
    #[error("status {0} and no JSON")]
    NoJson(u16),
    /// 200 without a usable body.
    #[error("200 and no `sub`")]
    NoSub,
}

/// Verifies OpenID tokens.
pub struct OpenId {
    federation: Arc<Federation>,
    /// Questions under way, one for each server and token.
    questions: SingleFlight<u128, Result<VerifiedUser, OpenIdError>>,
    /// Tokens that their homeserver did not know, hashed with the key of this process, and since when.
    refused: Mutex<LruCache<u128, Instant>>,
}

impl OpenId {
    /// Asks through `federation`.
    #[must_use]
    pub fn new(federation: Arc<Federation>) -> Self {
        Self {
            federation,
            questions: SingleFlight::new(),
            refused: Mutex::new(bounded(MAX_REFUSED)),
        }
    }

    /// Returns the name of the place where `server` was asked last: where it delegates, another one.
    #[must_use]
    pub fn asked_at(&self, server: &ServerName) -> Option<String> {
        self.federation.homeserver(server).asked_at()
    }

    /// Returns the marks that tell `server` from others, with its class.
    #[must_use]
    pub fn who(&self, server: &ServerName) -> Who {
        self.federation.who(server)
    }

    /// Asks `server` whose token this is, on behalf of `client`. What may pass is tried again until `deadline`.
    ///
    /// # Errors
    /// When nobody vouches for it.
    pub async fn verify(
        &self,
        server: &ServerName,
        token: &Secret,
        client: Client,
        deadline: Instant,
    ) -> Result<VerifiedUser, OpenIdError> {
        // A server name holds no slash.
        let question = self.federation.fingerprint(&format!("{server}/{}", token.expose()));
        if self
            .refused
            .lock()
            .get(&question)
            .is_some_and(|since| since.elapsed() < REFUSED_FOR)
        {
            return Err(OpenIdError::Rejected);
        }
        let homeserver = self.federation.homeserver(server);
        // Boxed: it is moved about until it runs.
        let asked = Box::pin(self.ask(&homeserver, token, client, deadline));
        let outcome = self.questions.run_until(question, deadline, asked).await;
        let outcome = outcome.unwrap_or_else(|| Err(unreachable(&homeserver, Failure::Timeout)));
        if matches!(outcome, Err(OpenIdError::Rejected)) {
            self.refused.lock().put(question, Instant::now());
        }
        outcome
    }

    async fn ask(
        &self,
        homeserver: &Arc<Homeserver>,
        token: &Secret,
        client: Client,
        deadline: Instant,
    ) -> Result<VerifiedUser, OpenIdError> {
        let query: String = form_urlencoded::Serializer::new(String::new())
            .append_pair("access_token", token.expose())
            .finish();
        let path = format!("/_matrix/federation/v1/openid/userinfo?{query}");
        let is_verified = homeserver.class(unix_seconds()) == Class::Verified;
        let budget = self.federation.budget(homeserver);
        let caller = Caller {
            client,
            budget: &budget,
            deadline,
        };
        let mut tries = 1;
        let mut cause = None;
        let mut looked_again = false;
        loop {
            let (used, dials) = (Instant::now(), budget.dials_left());
            match self.ask_once(homeserver, &path, tries > 1, &caller).await {
                outcome @ (Ok(_) | Err(OpenIdError::Rejected)) => return outcome,
                Err(error) => {
                    // A try that the deadline or the budget cut short says less than the one before it.
                    let error = cause.take().filter(|_| error.says_nothing()).unwrap_or(error);
                    let no_name = matches!(&error, OpenIdError::Unreachable { failure, .. } if failure.is_no_name());
                    let is_last_word = budget.is_spent() || (no_name && !homeserver.is_known());
                    // What may pass is tried again anyway: that does not wait for its turn to look.
                    let waits = !error.may_pass();
                    let looks = !looked_again && !is_last_word && error.may_be_elsewhere();
                    if looks && self.federation.look_again(homeserver, &caller, used, waits).await {
                        (looked_again, cause) = (true, Some(error));
                        tries += 1;
                        continue;
                    }
                    if !error.may_pass() || is_last_word {
                        return Err(error);
                    }
                    let mut pause = backoff(tries);
                    if is_verified {
                        // Eight connections have to last for the whole time.
                        let left = deadline.saturating_duration_since(Instant::now() + MIN_REMAINING * 2);
                        let cost = dials.saturating_sub(budget.dials_left());
                        let tries_left = budget.dials_left().div_ceil(cost.max(1)).max(1);
                        let each = if cost == 0 { Duration::ZERO } else { left / tries_left };
                        pause = (pause * 2).max(each.saturating_sub(used.elapsed()));
                    }
                    let spent = !homeserver.is_known() && tries >= STRANGER_TRIES;
                    if spent || Instant::now() + pause + MIN_REMAINING >= deadline {
                        return Err(error);
                    }
                    let reason = error.to_string();
                    neighbour_said(&reason);
                    tracing::debug!(name: "retry", server = homeserver.name().as_str(), reason, tries, "trying the homeserver again");
                    cause = Some(error);
                    sleep(pause).await;
                    tries += 1;
                }
            }
        }
    }

    async fn ask_once(
        &self,
        homeserver: &Arc<Homeserver>,
        path: &str,
        again: bool,
        caller: &Caller<'_>,
    ) -> Result<VerifiedUser, OpenIdError> {
        let began = Instant::now();
        let get = Get {
            path,
            limit: MAX_REPLY_BYTES,
            again,
        };
        let outcome = match self.federation.get(homeserver, &get, caller).await {
            Ok(reply) => check_answer(reply.status, &reply.body, homeserver),
            Err(Failure::Busy) => Err(OpenIdError::Busy),
            Err(failure) => Err(unreachable(homeserver, failure)),
        };
        METRICS.called(NeighbourCall::Userinfo, call_result(&outcome), began.elapsed());
        if matches!(outcome, Ok(_) | Err(OpenIdError::Rejected)) {
            self.federation.has_answered(homeserver);
        }
        outcome
    }
}

fn unreachable(homeserver: &Homeserver, failure: Failure) -> OpenIdError {
    OpenIdError::Unreachable {
        failure,
        known: homeserver.is_known(),
    }
}

fn call_result(outcome: &Result<VerifiedUser, OpenIdError>) -> CallResult {
    match outcome {
        Ok(_) => CallResult::Ok,
        Err(OpenIdError::Rejected | OpenIdError::ForeignUser) => CallResult::Refused,
        Err(OpenIdError::Unreachable { .. } | OpenIdError::Unusable { .. } | OpenIdError::Busy) => CallResult::Failed,
    }
}

impl OpenIdError {
    /// The word for it.
    #[must_use]
    pub const fn outcome(&self) -> Outcome {
        match self {
            Self::Rejected => Outcome::TokenRejected,
            Self::Unreachable { .. } => Outcome::HomeserverUnreachable,
            Self::Unusable { .. } => Outcome::HomeserverError,
            Self::ForeignUser => Outcome::UserMismatch,
            Self::Busy => Outcome::Busy,
        }
    }

    fn says_nothing(&self) -> bool {
        matches!(
            self,
            Self::Unreachable {
                failure: Failure::Timeout | Failure::Spent,
                ..
            }
        )
    }

    /// Whether that which was asked may not be the homeserver, or not any more (decision O2).
    fn may_be_elsewhere(&self) -> bool {
        match self {
            Self::Unreachable { failure, .. } => failure.may_be_elsewhere(),
            Self::Unusable { answer, .. } => match answer {
                Answer::NoJson(status) => *status != 429,
                Answer::Status(status) => *status == 404,
                Answer::NoSub => true,
            },
            Self::Rejected | Self::ForeignUser | Self::Busy => false,
        }
    }

    fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { failure, .. } => failure.may_pass(),
            Self::Unusable {
                answer: Answer::Status(status) | Answer::NoJson(status),
                ..
            } => matches!(status, 408 | 425 | 429 | 500..),
            Self::Rejected | Self::Unusable { answer: Answer::NoSub, .. } | Self::ForeignUser | Self::Busy => false,
        }
    }
}

fn check_answer(status: StatusCode, body: &[u8], homeserver: &Homeserver) -> Result<VerifiedUser, OpenIdError> {
    let unusable = |answer| OpenIdError::Unusable {
        answer,
        known: homeserver.is_known(),
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if is_own_no(status, body) => Err(OpenIdError::Rejected),
        status if status.is_success() => {
            let sub = text_in(body, "sub").map_err(|_| unusable(Answer::NoJson(status.as_u16())))?;
            let sub = sub.ok_or_else(|| unusable(Answer::NoSub))?;
            user_of(homeserver.name(), sub).ok_or(OpenIdError::ForeignUser)
        }
        status => Err(unusable(match serde_json::from_slice(body) {
            Ok(Value::Object(_)) => Answer::Status(status.as_u16()),
            Ok(_) | Err(_) => Answer::NoJson(status.as_u16()),
        })),
    }
}

/// Whether the homeserver itself says that it does not know the token, and not a page of something in front of it (decision O3).
fn is_own_no(status: StatusCode, body: &[u8]) -> bool {
    let Some(errcode) = errcode(body) else { return false };
    status == StatusCode::UNAUTHORIZED || matches!(errcode.as_str(), "M_UNKNOWN_TOKEN" | "M_MISSING_TOKEN")
}

impl VerifiedUser {
    /// A user for whom our own homeserver vouches, or one of its peers: by the id, if it is one.
    #[must_use]
    pub fn vouched_for(id: String) -> Option<Self> {
        let server = ServerName::parse(id.split_once(':')?.1).ok()?;
        user_of(&server, id)
    }
}

/// `sub` as a user of `server`, if it is one ([user identifiers](https://spec.matrix.org/v1.16/appendices/#user-identifiers),
/// historical characters included).
fn user_of(server: &ServerName, sub: String) -> Option<VerifiedUser> {
    let (local, domain) = sub.strip_prefix('@')?.split_once(':')?;
    let valid = !local.is_empty() && !local.contains('\0') && sub.len() <= MAX_USER_ID_BYTES && domain == server.as_str();
    valid.then(|| VerifiedUser {
        server: server.clone(),
        id: sub,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(server: &str, sub: &str) -> Option<String> {
        user_of(&ServerName::parse(server).unwrap(), sub.to_owned()).map(|user| user.id)
    }

    #[test]
    fn believes_a_homeserver_only_about_its_own_users() {
        for (server, sub) in [
            ("example.com", "@alice:example.com"),
            ("example.com:8448", "@alice:example.com:8448"),
            ("[::1]:8448", "@alice:[::1]:8448"),
            ("example.com", "@Älice!/=~ \u{1f600}:example.com"),
            ("example.com", "@@:example.com"),
        ] {
            assert_eq!(user(server, sub).as_deref(), Some(sub));
        }
        let long = format!("@{}:example.com", "a".repeat(243));
        assert_eq!(long.len(), 256);
        for (server, sub) in [
            ("a.example", "@alice:b.example"),
            ("example.com", "@alice:Example.com"),
            ("example.com", "@alice:example.com:8448"),
            ("example.com:8448", "@alice:example.com"),
            ("example.com", "@alice:evil:example.com"),
            ("example.com", "alice:example.com"),
            ("example.com", "@:example.com"),
            ("example.com", ":example.com"),
            ("example.com", "@alice"),
            ("example.com", ""),
            ("example.com", "@a\0b:example.com"),
            ("example.com", "@alice:example.com\n"),
            ("example.com", &long),
        ] {
            assert_eq!(user(server, sub), None, "{sub:?} of {server}");
        }
        assert!(
            user("example.com", &long[..1].replace('@', &long.replacen('a', "", 1))).is_some(),
            "255 bytes are allowed"
        );
    }

    #[test]
    fn checks_answers() {
        let homeserver = Homeserver::listed(ServerName::parse("x.example").unwrap());
        let check = |status: u16, body: &str| check_answer(StatusCode::from_u16(status).unwrap(), body.as_bytes(), &homeserver);
        assert!(check(200, r#"{"sub":"@a:x.example","extra":[1]}"#).is_ok());
        assert!(matches!(check(200, r#"{"sub":"@a:y.example"}"#), Err(OpenIdError::ForeignUser)));
        for (body, expected) in [
            ("", Answer::NoJson(200)),
            ("[]", Answer::NoJson(200)),
            (r#"["@a:x.example"]"#, Answer::NoJson(200)),
            ("<html>", Answer::NoJson(200)),
            ("{}", Answer::NoSub),
            (r#"{"sub":5}"#, Answer::NoSub),
        ] {
            assert!(
                matches!(check(200, body), Err(OpenIdError::Unusable { answer, .. }) if answer == expected),
                "{body}"
            );
            assert!(!check(200, body).unwrap_err().may_pass(), "{body}");
        }
        for (status, body, is_elsewhere) in [
            (404, r#"{"errcode":"M_UNRECOGNIZED"}"#, true),
            (404, "<html>", true),
            (403, "<html>challenge</html>", true),
            (502, "<html>", true),
            (200, "<html>", true),
            (403, r#"{"errcode":"M_FORBIDDEN"}"#, false),
            (401, r#"{"errcode":"M_UNKNOWN_TOKEN"}"#, false),
            (500, r#"{"errcode":"M_UNKNOWN"}"#, false),
            (429, "<html>slow down</html>", false),
        ] {
            assert_eq!(check(status, body).unwrap_err().may_be_elsewhere(), is_elsewhere, "{status} {body}");
        }
        for (status, may_pass) in [(302, false), (404, false), (400, false), (429, true), (500, true), (502, true)] {
            assert_eq!(check(status, "").unwrap_err().may_pass(), may_pass, "{status}");
        }
        for (status, body) in [
            (401, r#"{"errcode":"M_UNKNOWN_TOKEN","error":"x"}"#),
            (401, r#"{"errcode":"M_FORBIDDEN"}"#),
            (403, r#"{"errcode":"M_UNKNOWN_TOKEN"}"#),
            (403, r#"{"errcode":"M_MISSING_TOKEN"}"#),
        ] {
            assert!(matches!(check(status, body), Err(OpenIdError::Rejected)), "{status} {body}");
        }
        for (status, body) in [
            (401, "<html>who are you?</html>"),
            (401, "{}"),
            (401, r#"{"errcode":5}"#),
            (401, r#"["errcode"]"#),
            (403, "<html>challenge</html>"),
            (403, r#"{"errcode":"M_FORBIDDEN","error":"Federation is disabled"}"#),
        ] {
            let error = check(status, body).unwrap_err();
            assert!(
                matches!(error, OpenIdError::Unusable { answer: Answer::Status(s) | Answer::NoJson(s), .. } if s == status),
                "{body}"
            );
            assert!(!error.may_pass(), "{status} {body}");
        }
    }
}
