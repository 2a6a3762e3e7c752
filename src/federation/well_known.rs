//! `https://<name>/.well-known/matrix/server`: fetched through the guard, remembered as long as it says
//! ([server-server API, "Resolving server names"](https://spec.matrix.org/v1.16/server-server-api/#resolving-server-names)).

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, header};
use serde_json::Value;
use tokio::time::timeout;

use super::dial::{Attempt, Dialer};
use super::failure::Failure;
use super::follow;
use super::guard::Trust;
use crate::log_throttle::LogThrottle;
use crate::server_name::{Host, ServerName};

static UNUSABLE: LogThrottle = LogThrottle::once_a_minute();

const MAX_BODY_BYTES: usize = 50 * 1024;
/// All of it, redirects included: the verification has ten seconds.
const TIMEOUT: Duration = Duration::from_secs(4);

const MIN_LIFE: Duration = Duration::from_secs(3600);
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
const FIRST_FAILURE_LIFE: Duration = Duration::from_secs(10);
const KNOWN_FAILURE_LIFE: Duration = Duration::from_secs(60);

/// Content of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WellKnown {
    /// The file delegates, and the answer may be kept so long.
    Delegated(ServerName, Duration),
    /// The file is there and names something impossible: the specification's fallbacks do not apply.
    Invalid,
    /// The server has no usable file.
    None,
    /// The server did not answer, or with a failure that may pass: what the file said before may still be so.
    Unreachable,
}

/// How long a missing file is believed to be missing: longer each time, a minute at most for a homeserver that is
/// listed here or has verified a token here.
pub(super) fn failure_life(failures_before: u32, known: bool) -> Duration {
    let life = FIRST_FAILURE_LIFE.saturating_mul(1 << failures_before.min(9)).min(MIN_LIFE);
    if known { life.min(KNOWN_FAILURE_LIFE) } else { life }
}

/// Asks `name` for the file.
///
/// # Errors
/// Only when the guard refused, or the request's budget is spent: what else goes wrong means that there is no file.
pub(super) async fn fetch<'a>(dialer: &'a Dialer, name: &str, trust: Trust, attempt: &Attempt<'a>) -> Result<WellKnown, Failure> {
    let (host, path) = (Host::Name(name.into()), "/.well-known/matrix/server");
    let file = follow::get(dialer, host, None, path, trust, MAX_BODY_BYTES, attempt);
    match timeout(TIMEOUT, file).await {
        Ok(Ok(Some(reply))) => {
            let file = read(reply.status, &reply.headers, &reply.body, SystemTime::now());
            if file == WellKnown::None && reply.status == StatusCode::OK && trust != Trust::Stranger {
                UNUSABLE.log(|count| {
                    tracing::warn!(name: "well_known_unusable",
                        server = name,
                        count,
                        remedy = "serve it as a JSON object with `m.server`, as {\"m.server\": \"matrix.example.com:443\"}, or answer 404",
                        "/.well-known/matrix/server is there and cannot be used: the homeserver is looked for at port 8448"
                    );
                });
            }
            Ok(file)
        }
        Ok(Ok(None)) => Ok(WellKnown::None),
        Ok(Err(Failure::TooLarge(_))) => Ok(WellKnown::None),
        Ok(Err(refused @ (Failure::AddressDenied { .. } | Failure::Spent))) => Err(refused),
        Ok(Err(failure)) => {
            tracing::debug!(server = name, reason = failure.to_string(), "no well-known file");
            Ok(WellKnown::Unreachable)
        }
        Err(_) => {
            tracing::debug!(server = name, "the well-known file did not come in time");
            Ok(WellKnown::Unreachable)
        }
    }
}

fn read(status: StatusCode, headers: &HeaderMap, body: &[u8], now: SystemTime) -> WellKnown {
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return WellKnown::Unreachable;
    }
    if status != StatusCode::OK {
        return WellKnown::None;
    }
    let Ok(Value::Object(file)) = serde_json::from_slice(body) else {
        return WellKnown::None;
    };
    let Some(Value::String(server)) = file.get("m.server") else {
        return WellKnown::None;
    };
    ServerName::parse(server).map_or(WellKnown::Invalid, |delegated| WellKnown::Delegated(delegated, life(headers, now)))
}

/// `Cache-Control` before `Expires`, RFC 9111; a day where neither is there.
pub(super) fn life(headers: &HeaderMap, now: SystemTime) -> Duration {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let cache_control = text(header::CACHE_CONTROL).and_then(|value| {
        value.split(',').find_map(|directive| {
            let (name, argument) = directive.split_once('=').unwrap_or((directive, "0"));
            match name.trim().to_ascii_lowercase().as_str() {
                "max-age" => argument.trim().trim_matches('"').parse().ok().map(Duration::from_secs),
                "no-store" | "no-cache" => Some(Duration::ZERO),
                _ => None,
            }
        })
    });
    let expires = || {
        let at = httpdate::parse_http_date(text(header::EXPIRES)?).unwrap_or(SystemTime::UNIX_EPOCH);
        Some(at.duration_since(now).unwrap_or_default())
    };
    cache_control.or_else(expires).unwrap_or(MAX_LIFE).clamp(MIN_LIFE, MAX_LIFE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const HOUR: u64 = 3600;

    fn headers(pairs: &[(header::HeaderName, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn reads_the_file() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let ok = |body: &str| read(StatusCode::OK, &HeaderMap::new(), body.as_bytes(), now);
        let name = ServerName::parse("matrix.example.com:443").unwrap();
        assert_eq!(
            ok(r#"{"m.server":"matrix.example.com:443","x":1}"#),
            WellKnown::Delegated(name, MAX_LIFE)
        );
        for body in ["", "[]", "{}", r#"{"m.server":5}"#, "<html>"] {
            assert_eq!(ok(body), WellKnown::None, "{body}");
        }
        for body in [r#"{"m.server":""}"#, r#"{"m.server":"https://x.example"}"#, r#"{"m.server":"a b"}"#] {
            assert_eq!(ok(body), WellKnown::Invalid, "{body}");
        }
        assert_eq!(read(StatusCode::BAD_GATEWAY, &HeaderMap::new(), b"", now), WellKnown::Unreachable);
        assert_eq!(
            read(StatusCode::NOT_FOUND, &HeaderMap::new(), br#"{"m.server":"x.example"}"#, now),
            WellKnown::None
        );
    }

    #[test]
    fn keeps_it_between_an_hour_and_a_day() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (pairs, seconds) in [
            (vec![], 24 * HOUR),
            (vec![(header::CACHE_CONTROL, "public, max-age=7200")], 2 * HOUR),
            (vec![(header::CACHE_CONTROL, "max-age=\"7200\"")], 2 * HOUR),
            (vec![(header::CACHE_CONTROL, "max-age=5")], HOUR),
            (vec![(header::CACHE_CONTROL, "no-store")], HOUR),
            (vec![(header::CACHE_CONTROL, "max-age=99999999999")], 24 * HOUR),
            (vec![(header::EXPIRES, "Sun, 06 Nov 1994 11:49:37 GMT")], 3 * HOUR),
            (vec![(header::EXPIRES, "0")], HOUR),
            (vec![(header::CACHE_CONTROL, "max-age=7200"), (header::EXPIRES, "0")], 2 * HOUR),
        ] {
            assert_eq!(life(&headers(&pairs), now).as_secs(), seconds, "{pairs:?}");
        }
    }

    #[test]
    fn failures_are_believed_longer_each_time() {
        let seconds = |n, known| failure_life(n, known).as_secs();
        assert_eq!(
            [
                seconds(0, false),
                seconds(1, false),
                seconds(8, false),
                seconds(9, false),
                seconds(99, false)
            ],
            [10, 20, 2560, 3600, 3600]
        );
        assert_eq!([seconds(0, true), seconds(2, true), seconds(99, true)], [10, 40, 60]);
    }
}
