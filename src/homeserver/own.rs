//! The homeserver that this service belongs to, as its application service: who is in which room (MSC4502), whose delayed
//! event that is (MSC4140), and the way to other homeservers' services (MSC4512).
//!
//! This is the only place that has the `as_token`. It is sent to the client-server API of `LIVEKIT_HS_SERVER_NAME` and to
//! nobody else: the server is never derived from what a caller says, redirects are not followed, and an address that was
//! only discovered has to be https.

mod trial;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::StatusCode;
use parking_lot::RwLock;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::delayed_events::{self, Authority, retry_after};
use super::question_limiter::QuestionLimiter;
use super::versions::{Offer, Offers, Paths};
use super::{Call, Homeservers, MAX_REPLY_BYTES, is_error, segment};
use crate::federation::{Failure, Reply};
use crate::metrics::{CallResult, METRICS, Neighbour, NeighbourCall};
use crate::retry::{self, Transient, backoff};
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::state::{Age, Change, State};
use crate::time::Delay;
use crate::wire::errcode;

const IS_JOINED: Paths = Paths {
    stable: "/_matrix/client/v3/rooms/",
    unstable: "/_matrix/client/unstable/io.element.msc4502/rooms/",
};
const FED_PROXY: Paths = Paths {
    stable: "/_matrix/client/v1/appservice/fed_proxy",
    unstable: "/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy",
};
/// The specification has it for a long time.
const JOINED_MEMBERS: Paths = Paths {
    stable: "/_matrix/client/v3/rooms/",
    unstable: "/_matrix/client/v3/rooms/",
};
const WHOAMI: Paths = Paths {
    stable: "/_matrix/client/v3/account/whoami",
    unstable: "/_matrix/client/v3/account/whoami",
};
/// Longest room id in bytes.
const MAX_ROOM_ID_BYTES: usize = 255;
/// Time for one question about a membership.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for one question about a delayed event.
const EVENT_QUESTION_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a homeserver that starts together with us is waited for before something is said.
const STARTUP_GRACE: Duration = Duration::from_secs(30);
/// Largest list of members that is read: some ten thousand of them.
const MAX_MEMBERS_BYTES: usize = 8 * 1024 * 1024;

/// The homeserver that this service belongs to.
pub struct OwnHomeserver {
    homeservers: Arc<Homeservers>,
    name: ServerName,
    as_token: RwLock<Secret>,
    questions: QuestionLimiter,
    state: State,
}

/// Subject of a question about membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject<'a> {
    /// The membership of a user.
    User(&'a str),
    /// A homeserver's: whether any user of it is in the room.
    Server(&'a ServerName),
}

/// A delayed event that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    /// The room that it will be sent to.
    pub room_id: String,
    /// Delay of the event; one of more than a day counts as a day.
    pub delay: Delay,
}

/// Answer of another homeserver's service.
#[derive(Debug, Clone, PartialEq)]
pub struct Relayed {
    /// HTTP status of the answer.
    pub status: u16,
    /// Body of the answer; empty where that was no JSON object.
    pub content: Map<String, Value>,
}

/// The homeserver cannot say it, or cannot do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OwnError {
    /// The client-server API of our homeserver cannot be found.
    #[error("its client-server API cannot be found: {0}")]
    NoApi(Failure),
    /// Our homeserver cannot be reached.
    #[error("{0}")]
    Unreachable(Failure),
    /// Our homeserver does not answer.
    #[error("it does not answer in time")]
    Timeout,
    /// Our homeserver has no such endpoint.
    #[error("it does not know {0}")]
    NoEndpoint(&'static str),
    /// Our homeserver does not know the `as_token`.
    #[error("it does not accept the as_token")]
    Token,
    /// Our homeserver knows us, and denies the call.
    #[error("it does not allow it ({0})")]
    Forbidden(&'static str),
    /// Our homeserver refuses to relay, cannot reach the other homeserver, or that has trouble.
    #[error("the other homeserver cannot be reached, or its service is out of order (status {0})")]
    Relay(u16),
    /// The other homeserver's service wants to be asked later.
    #[error("the other homeserver's service answers with status {status} and asks for a pause of {} s", retry_after.as_secs())]
    RelayBusy {
        /// HTTP status of the refusal.
        status: u16,
        /// Pause that is asked for.
        retry_after: Duration,
    },
    /// Our homeserver answers with another status.
    #[error("it answers with status {0}")]
    Status(u16),
    /// The homeserver wants to be asked later.
    #[error("it answers with status {status} and asks for a pause of {} s", retry_after.as_secs())]
    Busy {
        /// HTTP status of the refusal.
        status: u16,
        /// Pause that is asked for.
        retry_after: Duration,
    },
    /// An answer that means nothing.
    #[error("its answer cannot be read")]
    Unreadable,
    /// Our homeserver was asked about something that is no room's, no user's or no server's id.
    #[error("that is the id of no room, user or server")]
    NoId,
}

impl OwnError {
    /// Whether trying again soon may help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoApi(failure) | Self::Unreachable(failure) => failure.may_pass(),
            Self::Timeout => true,
            Self::Relay(status) | Self::Status(status) | Self::RelayBusy { status, .. } | Self::Busy { status, .. } => {
                *status == 429 || *status >= 500
            }
            Self::NoEndpoint(_) | Self::Token | Self::Forbidden(_) | Self::Unreadable | Self::NoId => false,
        }
    }

    /// The pause that was asked for.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RelayBusy { retry_after, .. } | Self::Busy { retry_after, .. } => Some(*retry_after),
            Self::NoApi(_)
            | Self::Unreachable(_)
            | Self::Timeout
            | Self::NoEndpoint(_)
            | Self::Token
            | Self::Forbidden(_)
            | Self::Relay(_)
            | Self::Status(_)
            | Self::Unreadable
            | Self::NoId => None,
        }
    }

    /// How long a rate limit still holds, where that is the reason.
    #[must_use]
    pub fn limited_for(&self) -> Option<Duration> {
        let is_limit = matches!(self, Self::RelayBusy { status: 429, .. } | Self::Busy { status: 429, .. });
        self.retry_after().filter(|_| is_limit)
    }

    /// How often what led to it is tried in all: the homeserver has tried a relayed call three times itself (A9).
    const fn max_tries(&self) -> u32 {
        if matches!(self, Self::Relay(500..) | Self::RelayBusy { status: 500.., .. }) {
            2
        } else {
            u32::MAX
        }
    }

    /// Advice to the operator.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoApi(failure) => failure.remedy(),
            Self::Busy { status: 429, .. } => {
                "the homeserver limits its application service: set `rate_limited: false` in the registration, as `lk-jwt-service \
                 generate-registration` does, and raise rc_message"
            }
            Self::Unreachable(_) | Self::Timeout | Self::Status(_) | Self::Busy { .. } | Self::Unreadable => {
                "check that the homeserver runs, and that its client-server API is reached from here; \
                 LIVEKIT_CS_API_URL_OVERRIDES can name an internal address"
            }
            Self::NoEndpoint(_) => {
                "switch the proposal on in the homeserver (Synapse: experimental_features msc4502_enabled and msc4512_enabled, \
                 max_event_delay_duration), and see that no proxy keeps /_matrix/client/unstable from it"
            }
            Self::Token => {
                "the homeserver and this service must have the same registration: add it to app_service_config_files, restart the \
                 homeserver, and see that LIVEKIT_HS_SERVER_NAME is that homeserver"
            }
            Self::Forbidden(_) => {
                "the registration lacks a scope, or its namespaces.users does not match the homeserver's users; \
                 `lk-jwt-service generate-registration` prints one that has all"
            }
            Self::NoId => "this is a client's mistake",
            Self::Relay(_) | Self::RelayBusy { .. } => {
                "check that the homeservers federate, and that the other one has MatrixRTC endpoints"
            }
        }
    }
}

impl OwnHomeserver {
    /// The homeserver `name`, which knows us by `as_token`.
    #[must_use]
    pub fn new(homeservers: Arc<Homeservers>, name: ServerName, as_token: Secret) -> Self {
        Self {
            homeservers,
            name,
            as_token: RwLock::new(as_token),
            questions: QuestionLimiter::new(),
            state: State::new(Neighbour::Homeserver),
        }
    }

    /// Server name of our homeserver.
    #[must_use]
    pub const fn name(&self) -> &ServerName {
        &self.name
    }

    /// Proves who we are by `as_token` from now on.
    pub fn use_token(&self, as_token: Secret) {
        *self.as_token.write() = as_token;
    }

    fn as_token(&self) -> Secret {
        self.as_token.read().clone()
    }

    /// Finds its client-server API; what may pass is tried again until `deadline`.
    ///
    /// # Errors
    /// When it cannot be found, or the `as_token` must not be sent there.
    pub async fn resolve(&self, deadline: Instant) -> Result<(), Failure> {
        self.homeservers.resolve_for(&self.name, true, deadline).await
    }

    /// Asks a cheap question and logs what is wrong: a wrong registration is told at the start and not by the first user.
    pub async fn check(&self, retry_for: Duration) {
        // No room: the answer is no whatever goes on there. The homeserver may be starting, too.
        let room = format!("!lk-jwt-service:{}", self.name);
        let now = Instant::now();
        let asked = self.is_joined(
            &room,
            Subject::Server(&self.name),
            now + retry_for,
            now + retry_for + QUESTION_TIMEOUT,
        );
        let error = asked.await.err();
        self.state
            .seen(error.as_ref().map(OwnError::remedy), |change| match (change, &error) {
                (Change::Good, _) => {
                    tracing::info!(name: "homeserver_up", "our homeserver accepts the as_token and tells who is in a room");
                }
                (Change::Back(after), _) => {
                    tracing::info!(name: "homeserver_back", "our homeserver tells who is in a room again, after {}", Age(after));
                }
                (Change::Bad, error) => {
                    let reason = error.as_ref().map(ToString::to_string);
                    let (server, remedy) = (self.name.as_str(), error.as_ref().map(OwnError::remedy));
                    tracing::warn!(name: "homeserver_down",
                        server,
                        reason,
                        remedy,
                        "our homeserver cannot be asked; its MatrixRTC endpoints will fail until it can"
                    );
                }
            });
        self.check_name().await;
    }

    /// Checks it now and for ever, each `interval` while it fails, a tenth as often while it does not.
    pub async fn watch(&self, interval: Duration) {
        let mut retry_for = STARTUP_GRACE;
        loop {
            self.check(retry_for).await;
            // It is not starting any more.
            retry_for = Duration::ZERO;
            sleep(self.state.next_check(interval)).await;
        }
    }

    /// Asks the homeserver which one it is (decision A10). Where it cannot say it, the other question tells why.
    async fn check_name(&self) {
        let Ok(user_id) = self.whoami().await else { return };
        let Some((_, its_name)) = user_id.split_once(':') else { return };
        if its_name != self.name.as_str() {
            tracing::error!(name: "wrong_server_name",
                configured = self.name.as_str(),
                its_name,
                remedy = "set LIVEKIT_HS_SERVER_NAME to the server_name of that homeserver, or correct LIVEKIT_CS_API_URL_OVERRIDES",
                "LIVEKIT_HS_SERVER_NAME is not the homeserver that has our registration: its users get no tokens"
            );
        }
    }

    /// To manage a delayed event of `user` on `server`: given where both are ours.
    #[must_use]
    pub fn authority<'a>(&'a self, server: &ServerName, user: &'a str) -> Option<Authority<'a>> {
        let ours = *server == self.name && user.split_once(':').is_some_and(|(_, domain)| domain == self.name.as_str());
        ours.then(|| Authority::new(self.as_token(), user))
    }

    /// Whether somebody is joined to a room. What may pass is tried again until `retry_until`, and the last try may
    /// take until `deadline`.
    ///
    /// # Errors
    /// When the homeserver does not say it.
    pub async fn is_joined(&self, room_id: &str, subject: Subject<'_>, retry_until: Instant, deadline: Instant) -> Result<bool, OwnError> {
        if !is_room_id(room_id) {
            return Err(OwnError::NoId);
        }
        let (query, foreign) = match subject {
            Subject::User(user) => {
                let domain = user.split_once(':').map_or("", |(_, domain)| domain);
                (
                    format!("mxid={}", segment(user)),
                    Some(domain).filter(|domain| *domain != self.name.as_str()),
                )
            }
            Subject::Server(server) => (format!("server_name={}", segment(server.as_str())), None),
        };
        let tail = format!("{}/is_joined?{query}", segment(room_id));
        let ask = || async {
            let _permit = self.questions.take(foreign).await;
            let began = Instant::now();
            let reply = self
                .get(|offers| offers.is_joined, IS_JOINED, &tail, MAX_REPLY_BYTES, QUESTION_TIMEOUT)
                .await;
            let result = match &reply {
                Ok(reply) if reply.status.is_success() || reply.status.as_u16() == 404 => CallResult::Ok,
                Ok(_) => CallResult::Refused,
                Err(_) => CallResult::Failed,
            };
            METRICS.called(NeighbourCall::IsJoined, result, began.elapsed());
            let reply = reply?;
            match reply.status.as_u16() {
                200..=299 => {
                    let answer: Map<String, Value> = serde_json::from_slice(&reply.body).map_err(|_| OwnError::Unreadable)?;
                    // A proxy's page must not count as "not joined".
                    answer.get("joined").and_then(Value::as_bool).ok_or(OwnError::Unreadable)
                }
                400 if is_error(&reply.body, "M_INVALID_PARAM") => Err(OwnError::NoId),
                // Of a room that it does not know.
                404 if is_error(&reply.body, "M_NOT_FOUND") => Ok(false),
                _ => Err(refused(&reply, "rooms/{room_id}/is_joined (MSC4502)")),
            }
        };
        until_answered(ask, retry_until, deadline).await
    }

    /// Lists all who are joined to a room; `None` where the list is longer than is read, or not for us to see: no user of this
    /// homeserver is joined any more, or the registration does not cover them.
    ///
    /// # Errors
    /// When the homeserver does not say it.
    pub async fn joined_members(&self, room_id: &str, deadline: Instant) -> Result<Option<JoinedMembers>, OwnError> {
        if !is_room_id(room_id) {
            return Err(OwnError::NoId);
        }
        let tail = format!("{}/joined_members", segment(room_id));
        let asked = async {
            let _permit = self.questions.take(None).await;
            self.get(|_| Offer::Stable, JOINED_MEMBERS, &tail, MAX_MEMBERS_BYTES, QUESTION_TIMEOUT)
                .await
        };
        let reply = match timeout_at(deadline, asked).await.unwrap_or(Err(OwnError::Timeout)) {
            Ok(reply) => reply,
            Err(OwnError::Unreachable(Failure::TooLarge(_))) => return Ok(None),
            Err(error) => return Err(error),
        };
        match reply.status.as_u16() {
            200..=299 => serde_json::from_slice(&reply.body).map(Some).map_err(|_| OwnError::Unreadable),
            403 => Ok(None),
            _ => Err(refused(&reply, "rooms/{room_id}/joined_members")),
        }
    }

    /// The delayed event of `user` with that id; `None` where there is none of theirs that waits.
    ///
    /// # Errors
    /// When the homeserver does not say it.
    pub async fn delayed_event(
        &self,
        delay_id: &str,
        user: &str,
        retry_until: Instant,
        deadline: Instant,
    ) -> Result<Option<Scheduled>, OwnError> {
        let tail = format!("{}?user_id={}", segment(delay_id), segment(user));
        let ask = || async {
            let _permit = self.questions.take(None).await;
            let asked = self.get(
                |offers| offers.delayed_events,
                delayed_events::PATHS,
                &tail,
                MAX_REPLY_BYTES,
                EVENT_QUESTION_TIMEOUT,
            );
            let reply = asked.await?;
            match reply.status.as_u16() {
                200..=299 => scheduled(&reply.body).ok_or(OwnError::Unreadable),
                404 if errcode(&reply.body).is_some_and(|errcode| errcode != "M_UNRECOGNIZED") => Ok(None),
                _ => Err(refused(&reply, "delayed_events (MSC4140)")),
            }
        };
        until_answered(ask, retry_until, deadline).await
    }

    /// POSTs `body` to the federation endpoint `path` of another homeserver's service.
    ///
    /// # Errors
    /// When the homeserver does not relay it.
    pub async fn relay(
        &self,
        destination: &ServerName,
        path: &str,
        body: &Value,
        retry_until: Instant,
        deadline: Instant,
    ) -> Result<Relayed, OwnError> {
        let json = json!({"destination": destination.as_str(), "method": "POST", "path": path, "body": body});
        let json = Bytes::from(json.to_string());
        let ask = || async {
            let reply = self.post(|offers| offers.fed_proxy, FED_PROXY, json.clone()).await?;
            match reply.status.as_u16() {
                200..=299 => {
                    let answer: Answer = serde_json::from_slice(&reply.body).map_err(|_| OwnError::Unreadable)?;
                    let relayed = Relayed {
                        status: answer.status,
                        content: match answer.content {
                            Value::Object(content) => content,
                            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => Map::new(),
                        },
                    };
                    // What is wrong over there may pass, too.
                    if relayed.status == 429 || relayed.status >= 500 {
                        let status = relayed.status;
                        let pause = relayed.content.get("retry_after_ms").and_then(Value::as_u64);
                        return Err(pause.map_or(OwnError::Relay(status), |millis| OwnError::RelayBusy {
                            status,
                            retry_after: Duration::from_millis(millis),
                        }));
                    }
                    Ok(relayed)
                }
                status @ (403 | 502) if errcode(&reply.body).is_some_and(|errcode| is_fed_proxy(&errcode)) => Err(OwnError::Relay(status)),
                _ => Err(refused(&reply, "appservice/fed_proxy (MSC4512)")),
            }
        };
        until_answered(ask, retry_until, deadline).await
    }

    async fn get(&self, offer: fn(Offers) -> Offer, paths: Paths, tail: &str, limit: usize, within: Duration) -> Result<Reply, OwnError> {
        let as_token = self.as_token();
        let call = Call {
            tail,
            token: Some(&as_token),
            json: None,
            limit,
        };
        timeout(within, self.call(offer, paths, &call))
            .await
            .unwrap_or(Err(OwnError::Timeout))
    }

    async fn post(&self, offer: fn(Offers) -> Offer, paths: Paths, json: Bytes) -> Result<Reply, OwnError> {
        let as_token = self.as_token();
        let call = Call {
            tail: "",
            token: Some(&as_token),
            json: Some(json),
            limit: MAX_REPLY_BYTES,
        };
        self.call(offer, paths, &call).await
    }

    /// On the path that the homeserver offers; where it does not know that, on the other one.
    async fn call(&self, offer: fn(Offers) -> Offer, paths: Paths, call: &Call<'_>) -> Result<Reply, OwnError> {
        let (api, offers) = self.homeservers.api_for(&self.name, true).await.map_err(OwnError::NoApi)?;
        let [first, second] = offer(offers).order(paths, true);
        let at = async |path| {
            let asked = Box::pin(self.homeservers.ask(&self.name, &api, call, path)).await;
            asked.map_err(OwnError::Unreachable)
        };
        let reply = at(first).await?;
        let unknown = reply.status == StatusCode::NOT_FOUND && is_error(&reply.body, "M_UNRECOGNIZED");
        if !unknown || first == second {
            return Ok(reply);
        }
        self.homeservers.doubt_versions(&self.name, &api).await;
        at(second).await
    }
}

impl Transient for OwnError {
    const NEIGHBOUR: &'static str = "our homeserver";

    /// A pause that is asked for is kept, or the answer is given now (decision A9).
    fn pause(&self, tries: u32) -> Option<Duration> {
        let pause = backoff(tries).max(self.retry_after().unwrap_or_default());
        (self.may_pass() && tries < self.max_tries()).then_some(pause)
    }

    fn says_nothing(&self) -> bool {
        matches!(self, Self::Timeout)
    }
}

/// Asks until there is an answer, or `retry_until` is over (decision T7a); the last try ends at `deadline`.
async fn until_answered<T, F: Future<Output = Result<T, OwnError>>>(
    ask: impl Fn() -> F,
    retry_until: Instant,
    deadline: Instant,
) -> Result<T, OwnError> {
    let ask = || async { timeout_at(deadline, ask()).await.unwrap_or(Err(OwnError::Timeout)) };
    retry::until(retry_until, ask).await
}

/// Reads a status that none of the calls expects.
fn refused(reply: &Reply, endpoint: &'static str) -> OwnError {
    match reply.status.as_u16() {
        401 => OwnError::Token,
        403 => OwnError::Forbidden(endpoint),
        404 if is_error(&reply.body, "M_UNRECOGNIZED") => OwnError::NoEndpoint(endpoint),
        // A proxy's page while the homeserver restarts.
        404 => OwnError::Status(503),
        status => match retry_after(&reply.headers, &reply.body, SystemTime::now()) {
            Some(retry_after) if status == 429 || status >= 500 => OwnError::Busy { status, retry_after },
            Some(_) | None => OwnError::Status(status),
        },
    }
}

fn is_fed_proxy(errcode: &str) -> bool {
    errcode.contains("M_FEDPROXY_")
}

/// Whether it can be a room's id: what becomes a part of a path is looked at first
/// ([room ids](https://spec.matrix.org/v1.16/appendices/#room-ids); since room version 12 without a server name).
fn is_room_id(room_id: &str) -> bool {
    room_id.len() <= MAX_ROOM_ID_BYTES && room_id.len() > 1 && room_id.starts_with('!')
}

/// Reads a delayed event; `None` where the body holds none. Of one without a usable delay, the delay is absent and so is the event.
fn scheduled(body: &[u8]) -> Option<Option<Scheduled>> {
    const DAY: f64 = 86_400_000.0;
    let event: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let room_id = event.get("room_id").and_then(Value::as_str).unwrap_or_default().to_owned();
    let positive = |key: &str| event.get(key).and_then(Value::as_f64).filter(|millis| *millis >= 1.0);
    let millis = positive("delay_ms").or_else(|| positive("delay"));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between one and a day")]
    let delay = millis.and_then(|millis| Delay::from_millis(millis.min(DAY) as u64));
    Some(delay.map(|delay| Scheduled { room_id, delay }))
}

/// An answer of `fed_proxy`.
#[derive(Deserialize)]
struct Answer {
    status: u16,
    #[serde(default)]
    content: Value,
}

/// Members of a room, as the homeserver lists them.
#[derive(Deserialize)]
pub struct JoinedMembers {
    joined: std::collections::BTreeMap<Box<str>, IgnoredAny>,
}

impl JoinedMembers {
    /// Whether `user` is one of the members.
    #[must_use]
    pub fn contains(&self, user: &str) -> bool {
        self.joined.contains_key(user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_a_room_becomes_a_part_of_a_path() {
        for room in ["!r:example.com", "!5rbKGZO6JYeO2UuSXMpZKshWxVwYTgSNWgGE78AL3nc", "!../x"] {
            assert!(is_room_id(room), "{room}");
        }
        for none in ["", "!", ".", "..", "#alias:example.com", "room", &format!("!{}", "r".repeat(255))] {
            assert!(!is_room_id(none), "{none}");
        }
    }

    #[test]
    fn a_delayed_event_needs_a_delay() {
        let read = |body: &str| scheduled(body.as_bytes());
        let delay = |millis| Delay::from_millis(millis).unwrap();
        let event = |millis| {
            Some(Some(Scheduled {
                room_id: "!r".into(),
                delay: delay(millis),
            }))
        };
        assert_eq!(read(r#"{"room_id":"!r","delay_ms":8000,"delay":1}"#), event(8000));
        assert_eq!(read(r#"{"room_id":"!r","delay_ms":0,"delay":7000}"#), event(7000));
        assert_eq!(read(r#"{"room_id":"!r","delay_ms":1e300}"#), event(86_400_000));
        for none in [
            r#"{"room_id":"!r"}"#,
            r#"{"delay_ms":0}"#,
            r#"{"delay_ms":-5}"#,
            r#"{"delay_ms":"5"}"#,
        ] {
            assert_eq!(read(none), Some(None), "{none}");
        }
        for other in ["", "[]", "<html>"] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
