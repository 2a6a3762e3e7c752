//! Step 1, who is asking: the homeserver's word for an OpenID token
//! ([server-server API, "OpenID"](https://spec.matrix.org/v1.16/server-server-api/#openid)).
//!
//! The `sub` in the answer is believed only as far as the homeserver that was asked may speak: its user part can be
//! anything, its server part must be that homeserver, byte for byte.

use std::sync::Arc;

use http::StatusCode;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};
use url::form_urlencoded;

use crate::admission::Class;
use crate::admission::budget::Budget;
use crate::federation::{Failure, Federation};
use crate::hold::{TOO_LATE, pause};
use crate::secret::Secret;
use crate::server_name::ServerName;

/// Longest user ID in bytes.
const MAX_USER_ID: usize = 255;
/// Largest answer that is read.
const MAX_REPLY: usize = 64 * 1024;
/// Tries per request for a homeserver that is neither listed nor ever verified a token here (decision T7a).
const STRANGER_TRIES: u32 = 3;

/// A user whose homeserver vouched for the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedUser {
    /// Full user ID.
    pub id: String,
    /// Its homeserver, the one that was asked.
    pub server: ServerName,
}

/// The token proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum Unverified {
    /// The homeserver does not know the token.
    #[error("the homeserver rejected the OpenID token")]
    Rejected,
    /// The homeserver could not be asked.
    #[error("{failure}")]
    Unreachable {
        /// Why.
        failure: Failure,
        /// It is listed, or has verified a token here.
        known: bool,
    },
    /// The homeserver answered something else than the specification says.
    #[error("the homeserver answered userinfo with {answer}")]
    Unusable {
        /// What it answered.
        answer: Answer,
        /// It is listed, or has verified a token here.
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
    /// Any other status.
    #[error("status {0}")]
    Status(u16),
    /// 200 without a usable body.
    #[error("200 and a body without `sub`")]
    Body,
}

/// Verifies OpenID tokens.
pub struct OpenId {
    federation: Arc<Federation>,
}

impl OpenId {
    /// Asks through `federation`.
    #[must_use]
    pub fn new(federation: Arc<Federation>) -> Self {
        Self { federation }
    }

    /// Asks `server` whose token this is. What may pass is tried again until `deadline`.
    ///
    /// # Errors
    /// When nobody vouches for it.
    pub async fn verify(&self, server: &ServerName, token: &Secret, deadline: Instant) -> Result<VerifiedUser, Unverified> {
        let query: String = form_urlencoded::Serializer::new(String::new())
            .append_pair("access_token", token.expose())
            .finish();
        let path = format!("/_matrix/federation/v1/openid/userinfo?{query}");
        let class = self.federation.class(server);
        let budget = Budget::of(class);
        let mut tries = 1;
        let mut cause = None;
        loop {
            let outcome = self.federation.get(server, &path, MAX_REPLY, tries > 1, deadline, &budget).await;
            let known = self.federation.knows(server);
            let outcome = match outcome {
                Ok(reply) => judge(reply.status, &reply.body, server, known),
                Err(Failure::Busy) => Err(Unverified::Busy),
                Err(failure) => Err(Unverified::Unreachable { failure, known }),
            };
            match outcome {
                Ok(user) => {
                    self.federation.has_verified(server);
                    return Ok(user);
                }
                Err(error) => {
                    // A try that the deadline or the budget cut short says less than the one before it.
                    let error = cause.take().filter(|_| error.says_nothing()).unwrap_or(error);
                    if !error.may_pass() || budget.is_spent() {
                        return Err(error);
                    }
                    // Eight connections have to last for the whole time.
                    let pause = pause(tries) * if class == Class::Verified { 2 } else { 1 };
                    let no_name = matches!(&error, Unverified::Unreachable { failure, .. } if failure.is_no_name());
                    let spent = !known && (no_name || tries >= STRANGER_TRIES);
                    if spent || Instant::now() + pause + TOO_LATE >= deadline {
                        return Err(error);
                    }
                    tracing::debug!(
                        server = server.as_str(),
                        reason = error.to_string(),
                        tries,
                        "trying the homeserver again"
                    );
                    cause = Some(error);
                    sleep(pause).await;
                    tries += 1;
                }
            }
        }
    }
}

impl Unverified {
    fn says_nothing(&self) -> bool {
        matches!(
            self,
            Self::Unreachable {
                failure: Failure::Timeout | Failure::Spent,
                ..
            }
        )
    }

    fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { failure, .. } => failure.may_pass(),
            Self::Unusable {
                answer: Answer::Status(status),
                ..
            } => *status == 429 || *status >= 500,
            Self::Rejected | Self::Unusable { answer: Answer::Body, .. } | Self::ForeignUser | Self::Busy => false,
        }
    }
}

fn judge(status: StatusCode, body: &[u8], server: &ServerName, known: bool) -> Result<VerifiedUser, Unverified> {
    let unusable = |answer| Unverified::Unusable { answer, known };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Unverified::Rejected),
        status if status.is_success() => {
            // A map and not a derived struct: that would take `["@alice:example.org"]` for an object too.
            let mut info: Map<String, Value> = serde_json::from_slice(body).map_err(|_| unusable(Answer::Body))?;
            let Some(Value::String(sub)) = info.remove("sub") else {
                return Err(unusable(Answer::Body));
            };
            user_of(server, sub).ok_or(Unverified::ForeignUser)
        }
        status => Err(unusable(Answer::Status(status.as_u16()))),
    }
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
    let valid = !local.is_empty() && !local.contains('\0') && sub.len() <= MAX_USER_ID && domain == server.as_str();
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
    fn judges_answers() {
        let server = ServerName::parse("x.example").unwrap();
        let judge = |status: u16, body: &str| judge(StatusCode::from_u16(status).unwrap(), body.as_bytes(), &server, true);
        assert!(judge(200, r#"{"sub":"@a:x.example","extra":[1]}"#).is_ok());
        assert!(matches!(judge(200, r#"{"sub":"@a:y.example"}"#), Err(Unverified::ForeignUser)));
        for body in ["", "{}", "[]", r#"{"sub":5}"#, r#"["@a:x.example"]"#, "<html>"] {
            assert!(
                matches!(judge(200, body), Err(Unverified::Unusable { answer: Answer::Body, .. })),
                "{body}"
            );
        }
        for (status, may_pass) in [(302, false), (404, false), (400, false), (429, true), (500, true), (502, true)] {
            assert_eq!(judge(status, "").unwrap_err().may_pass(), may_pass, "{status}");
        }
        assert!(matches!(judge(401, "{}"), Err(Unverified::Rejected)));
        assert!(matches!(judge(403, "{}"), Err(Unverified::Rejected)));
    }
}
