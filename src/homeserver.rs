//! A homeserver's client-server API: where it is, and the delayed events of MSC4140 on it.
//!
//! * Base URL: `LIVEKIT_CS_API_URL_OVERRIDES`, else what `/.well-known/matrix/client` says, remembered as long as that says.
//! * Path: `/versions` decides between the stable and the unstable one (decision L7). Without a token the unstable path is
//!   preferred while it is offered: the stable one wants authentication.
//!
//! One call here is one attempt; when to try again is decided in `delayed_leave/`.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use lru::LruCache;
use serde_json::Value;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use url::Url;
use url::form_urlencoded;

use crate::delayed_leave::backoff::hint;
use crate::delayed_leave::machine::Outcome;
use crate::federation::{ClientApi, Failure, Federation, Reply};
use crate::hold::pause;
use crate::secret::Secret;
use crate::seldom::Seldom;
use crate::server_name::ServerName;

/// Homeservers remembered. Delegations come from full-access users, but with `*` that is everybody.
const HOMESERVERS: NonZeroUsize = NonZeroUsize::new(2048).unwrap();
const MAX_REPLY: usize = 64 * 1024;
const VERSIONS_TIMEOUT: Duration = Duration::from_secs(4);
const VERSIONS_LIFE: Duration = Duration::from_secs(3600);
const VERSIONS_FAILURE_LIFE: Duration = Duration::from_secs(60);
/// How long an old address is used before the well-known file is asked again.
const FAILURE_LIFE: Duration = Duration::from_secs(60);
/// How long a failure to find any address is believed.
const FAILURE_SHARED: Duration = Duration::from_secs(1);

const STABLE: &str = "/_matrix/client/v1/delayed_events/";
const UNSTABLE: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";

/// What to do with a delayed event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Management {
    /// Let its delay run anew.
    Restart,
    /// Send it now.
    Send,
    /// Never send it.
    Cancel,
}

impl Management {
    fn word(self) -> &'static str {
        match self {
            Self::Restart => "restart",
            Self::Send => "send",
            Self::Cancel => "cancel",
        }
    }
}

/// In whose name a call is made, where it is made in anybody's.
pub struct Authority<'a> {
    /// `LIVEKIT_AS_TOKEN`.
    pub as_token: &'a Secret,
    /// The user that the event belongs to.
    pub user: &'a str,
}

/// The client-server APIs of all homeservers.
pub struct Homeservers {
    federation: Arc<Federation>,
    overrides: BTreeMap<ServerName, Url>,
    table: Mutex<LruCache<ServerName, Arc<AsyncMutex<Known>>>>,
    lost: Seldom,
    denied: Seldom,
}

#[derive(Default)]
struct Known {
    api: Option<(Arc<ClientApi>, Url)>,
    /// Until when the address may be believed; for ever where the operator wrote it down.
    until: Option<Instant>,
    paths: Option<(Paths, Instant)>,
    /// Until when a failure to find the address is not tried again.
    failed: Option<(Instant, Failure)>,
}

/// What `/versions` says about delayed events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Paths {
    Stable,
    Unstable,
    Both,
    /// It says nothing, or could not be asked.
    Unknown,
}

impl Paths {
    fn read(body: &[u8]) -> Self {
        let Ok(Value::Object(answer)) = serde_json::from_slice(body) else {
            return Self::Unknown;
        };
        let has = |flag: &str| answer.get("unstable_features").and_then(|f| f.get(flag)) == Some(&Value::Bool(true));
        match (has("org.matrix.msc4140.stable"), has("org.matrix.msc4140")) {
            (true, true) => Self::Both,
            (true, false) => Self::Stable,
            (false, true) => Self::Unstable,
            (false, false) => Self::Unknown,
        }
    }

    /// The path to try first and the one to try when that is unknown there.
    fn order(self, authenticated: bool) -> [&'static str; 2] {
        match self {
            Self::Stable => [STABLE, UNSTABLE],
            Self::Both if authenticated => [STABLE, UNSTABLE],
            Self::Both | Self::Unstable | Self::Unknown => [UNSTABLE, STABLE],
        }
    }
}

impl Homeservers {
    /// `overrides` is `LIVEKIT_CS_API_URL_OVERRIDES`.
    #[must_use]
    pub fn new(federation: Arc<Federation>, overrides: BTreeMap<ServerName, Url>) -> Self {
        let mut table = LruCache::unbounded();
        table.resize(HOMESERVERS);
        Self {
            federation,
            overrides,
            table: Mutex::new(table),
            lost: Seldom::new(),
            denied: Seldom::new(),
        }
    }

    /// Finds the API of `server`; what may pass is tried again until `deadline`.
    ///
    /// # Errors
    /// When it cannot be found.
    pub async fn resolve(&self, server: &ServerName, deadline: Instant) -> Result<(), Failure> {
        let mut tries = 1;
        loop {
            let found = timeout_at(deadline, self.api(server)).await.unwrap_or(Err(Failure::Timeout));
            let Err(failure) = found else {
                return Ok(());
            };
            let pause = pause(tries);
            if !failure.may_pass() || Instant::now() + pause >= deadline {
                return Err(failure);
            }
            sleep(pause).await;
            tries += 1;
        }
    }

    /// Manages a delayed event: one attempt, over within `within`.
    pub async fn manage(
        &self,
        server: &ServerName,
        delay_id: &str,
        what: Management,
        authority: Option<Authority<'_>>,
        within: Duration,
    ) -> Outcome {
        let attempt = self.attempt(server, delay_id, what, authority);
        timeout(within, attempt).await.unwrap_or_else(|_| {
            tracing::debug!(
                server = server.as_str(),
                action = what.word(),
                "the homeserver did not answer in time"
            );
            Outcome::Transient(None)
        })
    }

    async fn attempt(&self, server: &ServerName, delay_id: &str, what: Management, authority: Option<Authority<'_>>) -> Outcome {
        let (api, paths) = match self.api(server).await {
            Ok(found) => found,
            Err(failure) => {
                self.lost.tell(|count| {
                    let (reason, remedy) = (failure.to_string(), failure.remedy());
                    let server = server.as_str();
                    tracing::warn!(server, reason, count, remedy, "the client-server API cannot be found");
                });
                return Outcome::Transient(None);
            }
        };
        let [first, second] = paths.order(authority.is_some());
        let tail = tail(delay_id, what, authority.as_ref());
        let token = authority.as_ref().map(|authority| authority.as_token);
        let call = async |path: &str| match api
            .post(&format!("{path}{tail}"), token, Bytes::from_static(b"{}"), MAX_REPLY)
            .await
        {
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
            Answer::Is(outcome) => outcome,
            Answer::UnknownPath => {
                // It may have been updated since it was asked.
                self.forget_versions(server).await;
                call(second).await.last_word(server, &self.denied)
            }
            Answer::Denied => call(second).await.last_word(server, &self.denied),
        }
    }

    async fn api(&self, server: &ServerName) -> Result<(Arc<ClientApi>, Paths), Failure> {
        let entry = self.known(server);
        let mut known = entry.lock().await;
        let api = self.client_api(server, &mut known).await?;
        let now = Instant::now();
        let paths = match known.paths {
            Some((paths, until)) => {
                if now >= until {
                    // What was true an hour ago will do meanwhile: a restart that is due must not wait for it.
                    known.paths = Some((paths, now + VERSIONS_FAILURE_LIFE));
                    tokio::spawn(refresh(api.clone(), entry.clone()));
                }
                paths
            }
            None => {
                let (paths, life) = versions(&api).await?;
                known.paths = Some((paths, Instant::now() + life));
                paths
            }
        };
        Ok((api, paths))
    }

    async fn client_api(&self, server: &ServerName, known: &mut Known) -> Result<Arc<ClientApi>, Failure> {
        let now = Instant::now();
        if let Some((api, _)) = known.api.as_ref().filter(|_| known.until.is_none_or(|until| now < until)) {
            return Ok(api.clone());
        }
        if let Some(url) = self.overrides.get(server) {
            let api = Arc::new(self.federation.client_api(server, url, true)?);
            known.api = Some((api.clone(), url.clone()));
            return Ok(api);
        }
        // All who wait for the file share its failure, too.
        if let Some((_, failure)) = known.failed.as_ref().filter(|(until, _)| now < *until) {
            return Err(failure.clone());
        }
        let base = match self.federation.client_base_url(server).await {
            Ok(base) => base,
            Err(failure) => {
                // An address that has worked is better than none, and must not be waited for again and again.
                if let Some((api, _)) = &known.api {
                    known.until = Some(Instant::now() + FAILURE_LIFE);
                    return Ok(api.clone());
                }
                known.failed = Some((Instant::now() + FAILURE_SHARED, failure.clone()));
                return Err(failure);
            }
        };
        known.failed = None;
        known.until = Some(Instant::now() + base.life);
        if let Some((api, url)) = &known.api
            && *url == base.url
        {
            return Ok(api.clone());
        }
        let api = Arc::new(self.federation.client_api(server, &base.url, false)?);
        known.paths = None;
        known.api = Some((api.clone(), base.url));
        Ok(api)
    }

    async fn forget_versions(&self, server: &ServerName) {
        self.known(server).lock().await.paths = None;
    }

    fn known(&self, server: &ServerName) -> Arc<AsyncMutex<Known>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.get_or_insert(server.clone(), Arc::default).clone()
    }
}

async fn refresh(api: Arc<ClientApi>, entry: Arc<AsyncMutex<Known>>) {
    let asked = versions(&api).await;
    let mut known = entry.lock().await;
    // An answer that says nothing is no reason to forget one that said something.
    if let Ok((paths, life)) = asked
        && paths != Paths::Unknown
    {
        known.paths = Some((paths, Instant::now() + life));
    }
}

async fn versions(api: &ClientApi) -> Result<(Paths, Duration), Failure> {
    match timeout(VERSIONS_TIMEOUT, api.get("/_matrix/client/versions", None, MAX_REPLY)).await {
        Ok(Ok(reply)) if reply.status == StatusCode::OK => Ok((Paths::read(&reply.body), VERSIONS_LIFE)),
        // Nobody will ever be called there (decision O5): said now, while there is somebody to hear it.
        Ok(Err(failure @ Failure::Refused { .. })) => Err(failure),
        // The call itself will tell whether the homeserver is there.
        Ok(Ok(_) | Err(_)) | Err(_) => Ok((Paths::Unknown, VERSIONS_FAILURE_LIFE)),
    }
}

/// What an answer means, the path aside.
enum Answer {
    Is(Outcome),
    /// The homeserver does not know this path: perhaps the other one.
    UnknownPath,
    /// It denies the call on this path: perhaps not on the other one.
    Denied,
}

impl Answer {
    /// After both paths were tried.
    fn last_word(self, server: &ServerName, denied: &Seldom) -> Outcome {
        let server = server.as_str();
        match self {
            Self::Is(outcome) => outcome,
            Self::UnknownPath => {
                denied.tell(|count| {
                    let remedy = "switch delayed events on (Synapse: max_event_delay_duration)";
                    tracing::warn!(server, count, remedy, "the homeserver has no delayed events");
                });
                Outcome::NotFound
            }
            Self::Denied => {
                denied.tell(|count| {
                    let remedy = "newer homeservers let only application services manage delayed events";
                    tracing::warn!(
                        server,
                        count,
                        remedy,
                        "the homeserver does not let this service manage delayed events"
                    );
                });
                Outcome::Forbidden
            }
        }
    }
}

/// Decision L6.
fn read(reply: &Reply) -> Answer {
    match reply.status.as_u16() {
        200..=299 => Answer::Is(Outcome::Done),
        404 => match serde_json::from_slice(&reply.body) {
            Ok(Value::Object(error)) if error.get("errcode") == Some(&Value::from("M_UNRECOGNIZED")) => Answer::UnknownPath,
            Ok(Value::Object(_)) => Answer::Is(Outcome::NotFound),
            // A proxy's page while the homeserver restarts.
            Ok(_) | Err(_) => Answer::Is(Outcome::Transient(None)),
        },
        409 => Answer::Is(Outcome::Conflict),
        401 | 403 => Answer::Denied,
        429 => Answer::Is(Outcome::Limited(retry_after(&reply.headers, &reply.body, SystemTime::now()))),
        _ => Answer::Is(Outcome::Transient(retry_after(&reply.headers, &reply.body, SystemTime::now()))),
    }
}

/// What the homeserver says about when to come back; it is clamped where it is used.
fn retry_after(headers: &HeaderMap, body: &[u8], now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let date = text.and_then(|text| httpdate::parse_http_date(text.trim()).ok());
    let until_date = date.map(|date| date.duration_since(now).unwrap_or_default());
    let from_body = || serde_json::from_slice::<Value>(body).ok()?.get("retry_after_ms")?.as_u64();
    hint(text, until_date, from_body())
}

/// The id as one segment, whatever is in it.
fn tail(delay_id: &str, what: Management, authority: Option<&Authority<'_>>) -> String {
    let mut tail = String::with_capacity(delay_id.len() + 16);
    for byte in delay_id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            tail.push(char::from(byte));
        } else {
            const HEX: &[u8; 16] = b"0123456789ABCDEF";
            tail.push('%');
            tail.push(char::from(HEX[usize::from(byte >> 4)]));
            tail.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    tail.push('/');
    tail.push_str(what.word());
    if let Some(authority) = authority {
        let query: String = form_urlencoded::Serializer::new(String::new())
            .append_pair("user_id", authority.user)
            .finish();
        tail.push('?');
        tail.push_str(&query);
    }
    tail
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, retry_after: Option<&str>, body: &str) -> Reply {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(header::RETRY_AFTER, value.parse().unwrap());
        }
        Reply {
            status: StatusCode::from_u16(status).unwrap(),
            headers,
            body: Bytes::copy_from_slice(body.as_bytes()),
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
            (404, "<html>", Outcome::Transient(None)),
            (404, "", Outcome::Transient(None)),
            (409, r#"{"errcode":"M_UNKNOWN"}"#, Outcome::Conflict),
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
        assert!(matches!(read(&reply(401, None, "{}")), Answer::Denied));
        assert!(matches!(read(&reply(403, None, "{}")), Answer::Denied));
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
            assert_eq!(tail(id, Management::Send, None), expected);
        }
        let as_token = Secret::new("t");
        let authority = Authority {
            as_token: &as_token,
            user: "@a+b:x",
        };
        assert_eq!(tail("i", Management::Restart, Some(&authority)), "i/restart?user_id=%40a%2Bb%3Ax");
    }

    #[test]
    fn versions_decide_the_path() {
        let read = |flags: &str| Paths::read(format!("{{\"versions\":[],\"unstable_features\":{{{flags}}}}}").as_bytes());
        assert_eq!(read(r#""org.matrix.msc4140":true"#).order(true), [UNSTABLE, STABLE]);
        assert_eq!(
            read(r#""org.matrix.msc4140":true,"org.matrix.msc4140.stable":true"#).order(false),
            [UNSTABLE, STABLE]
        );
        assert_eq!(
            read(r#""org.matrix.msc4140":true,"org.matrix.msc4140.stable":true"#).order(true),
            [STABLE, UNSTABLE]
        );
        assert_eq!(read(r#""org.matrix.msc4140.stable":true"#).order(false), [STABLE, UNSTABLE]);
        assert_eq!(read(r#""org.matrix.msc4140":"yes""#).order(false), [UNSTABLE, STABLE]);
        assert_eq!(Paths::read(b"<html>").order(true), [UNSTABLE, STABLE]);
    }
}
