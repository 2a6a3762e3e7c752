//! Managing delayed events ([MSC4140](https://github.com/matrix-org/matrix-spec-proposals/pull/4140)). One call here is one
//! attempt.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, header};
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::versions::{Offers, Paths};
use super::{Call, Homeservers, MAX_REPLY_BYTES, segment};
use crate::backoff::hint;
use crate::delayed_event::{DelayedEventAction, Outcome};
use crate::federation::{ClientApi, Reply};
use crate::metrics::{CallResult, METRICS, NeighbourCall};
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::wire::errcode;

pub(super) const PATHS: Paths = Paths {
    stable: "/_matrix/client/v1/delayed_events/",
    unstable: "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/",
};

/// In whose name a call is made. Only [`super::OwnHomeserver::authority`] gives it, and only for its own users.
pub struct Authority<'a> {
    as_token: Secret,
    user: &'a str,
}

impl<'a> Authority<'a> {
    pub(super) const fn new(as_token: Secret, user: &'a str) -> Self {
        Self { as_token, user }
    }

    pub(super) const fn as_token(&self) -> &Secret {
        &self.as_token
    }

    pub(super) const fn user(&self) -> &'a str {
        self.user
    }
}

impl Homeservers {
    /// Manages a delayed event: one attempt, over within `within`.
    pub async fn manage(
        &self,
        server: &ServerName,
        delay_id: &str,
        what: DelayedEventAction,
        authority: Option<Authority<'_>>,
        within: Duration,
    ) -> Outcome {
        let began = Instant::now();
        let attempt = self.attempt(server, delay_id, what, authority);
        let outcome = timeout(within, attempt).await.unwrap_or_else(|_| {
            tracing::debug!(
                server = server.as_str(),
                action = what.word(),
                "the homeserver did not answer in time"
            );
            Outcome::Transient(None)
        });
        let call = match what {
            DelayedEventAction::Restart => NeighbourCall::RestartDelayedEvent,
            DelayedEventAction::Send => NeighbourCall::SendDelayedEvent,
            DelayedEventAction::Cancel => NeighbourCall::CancelDelayedEvent,
        };
        let result = match outcome {
            Outcome::Done => CallResult::Ok,
            Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden | Outcome::Limited(_) => CallResult::Refused,
            Outcome::Transient(_) => CallResult::Failed,
        };
        METRICS.called(call, result, began.elapsed());
        if matches!(outcome, Outcome::Limited(_)) {
            METRICS.homeserver_rate_limited.up();
        }
        outcome
    }

    async fn attempt(&self, server: &ServerName, delay_id: &str, what: DelayedEventAction, authority: Option<Authority<'_>>) -> Outcome {
        let (api, offers) = match self.api(server).await {
            Ok(found) => found,
            Err(failure) => {
                self.lost.log(|count| {
                    let (reason, remedy) = (failure.to_string(), failure.remedy());
                    let server = server.as_str();
                    tracing::warn!(name: "client_api_not_found", server, reason, count, remedy, "the client-server API cannot be found");
                });
                return Outcome::Transient(None);
            }
        };
        // Not over an address that the token may not be sent to; a restart without it is better than none.
        let authority = authority.filter(|_| api.may_carry_secrets());
        let answer = self.on_either_path(server, &api, offers, delay_id, what, authority.as_ref()).await;
        match (answer, authority) {
            (Answer::Is(outcome), _) => outcome,
            (Answer::UnknownPath, _) => {
                self.denied.log(|count| {
                    let (server, remedy) = (server.as_str(), "switch delayed events on (Synapse: max_event_delay_duration)");
                    tracing::warn!(name: "delayed_events_unsupported", server, count, remedy, "the homeserver has no delayed events");
                });
                // Who is there is not given up for it: a proxy may say so, too, while it is set up.
                Outcome::Transient(None)
            }
            (Answer::Denied, None) => {
                self.denied.log(|count| {
                    let server = server.as_str();
                    let remedy = "newer homeservers let only application services manage delayed events";
                    tracing::warn!(name: "delayed_events_refused",
                        server,
                        count,
                        remedy,
                        "the homeserver does not let this service manage delayed events"
                    );
                });
                Outcome::Forbidden
            }
            (Answer::Denied, Some(_)) => {
                self.denied.log(|count| {
                    let server = server.as_str();
                    let remedy = "the registration must be that of the homeserver, and its namespaces.users must match the homeserver's \
                                  users; `lk-jwt-service generate-registration` prints one that does";
                    tracing::warn!(name: "masquerading_refused", server, count, remedy, "our homeserver does not let us act for its users");
                });
                // Nobody who is there is to be reported gone for it: older homeservers need no token, and the registration may
                // be mended meanwhile.
                match self.on_either_path(server, &api, offers, delay_id, what, None).await {
                    Answer::Is(outcome) => outcome,
                    Answer::UnknownPath | Answer::Denied => Outcome::Transient(None),
                }
            }
        }
    }

    async fn on_either_path(
        &self,
        server: &ServerName,
        api: &Arc<ClientApi>,
        offers: Offers,
        delay_id: &str,
        what: DelayedEventAction,
        authority: Option<&Authority<'_>>,
    ) -> Answer {
        // Without a token the unstable path is preferred while it is offered: the stable one wants authentication.
        let [first, second] = offers.delayed_events.order(PATHS, authority.is_some());
        let request = Call {
            tail: &tail(delay_id, what, authority),
            token: authority.map(Authority::as_token),
            json: Some(Bytes::from_static(b"{}")),
            limit: MAX_REPLY_BYTES,
        };
        let call = async |path: &str| match self.ask(server, api, &request, path).await {
            Ok(reply) => read(&reply),
            Err(failure) => {
                let reason = failure.to_string();
                tracing::debug!(
                    server = server.as_str(),
                    action = what.word(),
                    reason,
                    "the homeserver could not be called"
                );
                Answer::Is(Outcome::Transient(None))
            }
        };
        match call(first).await {
            Answer::Is(outcome) => Answer::Is(outcome),
            Answer::UnknownPath => {
                self.doubt_versions(server, api).await;
                call(second).await
            }
            // That it does not know the other path is no answer to the question.
            Answer::Denied => match call(second).await {
                Answer::Is(outcome) => Answer::Is(outcome),
                Answer::UnknownPath | Answer::Denied => Answer::Denied,
            },
        }
    }
}

/// Meaning of an answer, the path aside.
enum Answer {
    Is(Outcome),
    /// The homeserver does not know this path: perhaps the other one.
    UnknownPath,
    /// The homeserver denies the call on this path: perhaps not on the other one.
    Denied,
}

/// Decision L6: a yes or a no counts only in the homeserver's own form. What a proxy or a firewall says, with whatever status,
/// may pass.
fn read(reply: &Reply) -> Answer {
    let errcode = errcode(&reply.body);
    match (reply.status.as_u16(), errcode.as_deref()) {
        (204, _) if reply.body.is_empty() => Answer::Is(Outcome::Done),
        (200..=299, None) if is_json_object(&reply.body) => Answer::Is(Outcome::Done),
        (404, Some("M_UNRECOGNIZED")) => Answer::UnknownPath,
        (404, Some(_)) => Answer::Is(Outcome::NotFound),
        (404, None) if reply.body.trim_ascii() == b"{}" => Answer::Is(Outcome::NotFound),
        (409, Some(_)) => Answer::Is(Outcome::Conflict),
        (401 | 403, Some(_)) => Answer::Denied,
        (429, _) => Answer::Is(Outcome::Limited(retry_after(&reply.headers, &reply.body, SystemTime::now()))),
        _ => Answer::Is(Outcome::Transient(retry_after(&reply.headers, &reply.body, SystemTime::now()))),
    }
}

fn is_json_object(body: &[u8]) -> bool {
    matches!(serde_json::from_slice(body), Ok(Value::Object(_)))
}

/// Reads the homeserver's hint about when to come back; it is clamped where it is used.
pub(super) fn retry_after(headers: &HeaderMap, body: &[u8], now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let date = text.and_then(|text| httpdate::parse_http_date(text.trim()).ok());
    let until_date = date.map(|date| date.duration_since(now).unwrap_or_default());
    let from_body = || serde_json::from_slice::<Value>(body).ok()?.get("retry_after_ms")?.as_u64();
    hint(text, until_date, from_body())
}

/// Rest of a path, behind the beginning that all delayed events share.
fn tail(delay_id: &str, what: DelayedEventAction, authority: Option<&Authority<'_>>) -> String {
    let query = authority.map_or_else(String::new, |authority| format!("?user_id={}", segment(authority.user())));
    format!("{}/{}{query}", segment(delay_id), what.word())
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;

    fn reply(status: u16, retry_after: Option<&str>, body: &str) -> Reply {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
        }
        Reply {
            status: StatusCode::from_u16(status).unwrap(),
            headers,
            body: Bytes::copy_from_slice(body.as_bytes()),
            took: Duration::ZERO,
        }
    }

    fn outcome(status: u16, body: &str) -> Option<Outcome> {
        match read(&reply(status, None, body)) {
            Answer::Is(outcome) => Some(outcome),
            Answer::UnknownPath | Answer::Denied => None,
        }
    }

    #[test]
    fn statuses_mean_what_l6_says() {
        for (status, body, expected) in [
            (200, "{}", Outcome::Done),
            (204, "", Outcome::Done),
            (404, r#"{"errcode":"M_NOT_FOUND"}"#, Outcome::NotFound),
            (404, "{}", Outcome::NotFound),
            (404, "<html>", Outcome::Transient(None)),
            (404, "", Outcome::Transient(None)),
            (404, r#"{"message":"no Route matched with those values"}"#, Outcome::Transient(None)),
            (404, r#"{"errcode":404}"#, Outcome::Transient(None)),
            (409, r#"{"errcode":"M_UNKNOWN"}"#, Outcome::Conflict),
            (409, "<html>", Outcome::Transient(None)),
            (401, "{}", Outcome::Transient(None)),
            (403, "<html>challenge</html>", Outcome::Transient(None)),
            (403, r#"{"error":"forbidden"}"#, Outcome::Transient(None)),
            (200, "", Outcome::Transient(None)),
            (200, "<html>It works!</html>", Outcome::Transient(None)),
            (200, "[]", Outcome::Transient(None)),
            (200, r#"{"errcode":"M_UNKNOWN"}"#, Outcome::Transient(None)),
            (204, "x", Outcome::Transient(None)),
            (429, "{}", Outcome::Limited(None)),
            (
                429,
                r#"{"retry_after_ms":1500}"#,
                Outcome::Limited(Some(Duration::from_millis(1500))),
            ),
            (500, "", Outcome::Transient(None)),
            (302, "", Outcome::Transient(None)),
            (400, "{}", Outcome::Transient(None)),
        ] {
            assert_eq!(outcome(status, body), Some(expected), "{status} {body}");
        }
        assert!(matches!(
            read(&reply(404, None, r#"{"errcode":"M_UNRECOGNIZED"}"#)),
            Answer::UnknownPath
        ));
        for status in [401, 403] {
            assert!(matches!(read(&reply(status, None, r#"{"errcode":"M_FORBIDDEN"}"#)), Answer::Denied));
        }
    }

    #[test]
    fn retry_after_is_read_in_all_its_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, seconds) in [
            (Some("3"), Some(3)),
            (Some("0"), Some(0)),
            (Some("-5"), Some(0)),
            (Some("99999999999999999999"), Some(u64::MAX)),
            (Some("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10)),
            (Some("Sun, 06 Nov 1994 08:49:07 GMT"), Some(0)),
            (Some("soon"), None),
            (None, None),
        ] {
            let headers = reply(429, value, "").headers;
            assert_eq!(retry_after(&headers, b"", now).map(|hint| hint.as_secs()), seconds, "{value:?}");
        }
    }

    #[test]
    fn an_id_is_one_segment() {
        for (id, expected) in [
            ("syd_abc-1.2~", "syd_abc-1.2~/send"),
            ("../../admin", "..%2F..%2Fadmin/send"),
            ("a/b?c#d e", "a%2Fb%3Fc%23d%20e/send"),
            ("%2e%2e", "%252e%252e/send"),
            ("é", "%C3%A9/send"),
        ] {
            assert_eq!(tail(id, DelayedEventAction::Send, None), expected);
        }
        let authority = Authority::new(Secret::new("t"), "@a+b:x");
        assert_eq!(
            tail("i", DelayedEventAction::Restart, Some(&authority)),
            "i/restart?user_id=%40a%2Bb%3Ax"
        );
    }
}
