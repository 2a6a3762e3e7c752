//! `GET /check` and what is below it: the page "Why does my call not work?" (`LIVEKIT_CHECK_PAGE`).
//!
//! The page and its parts are files. With a ticket in the head, `POST /check/token` gives a token for a room of the ticket's own and
//! `POST /check/report` takes what the page found; everybody else gets one and the same 401 before a byte of a body is read. None of it
//! takes a place of a call.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::extract::rejection::PathRejection;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Router, extract};
use http::{HeaderMap, HeaderValue, Request, Uri, header};
use serde::Serialize;

use super::edge::Arrived;
use super::report::{ApiError, report_sfu};
use super::request::json_reply;
use super::{App, body, doctor, method_not_allowed, not_found};
use crate::check::{Admitted, Denied, MAX_REPORT_BYTES, Report, tell};
use crate::clock::unix_seconds;
use crate::config::CheckPage;
use crate::connections::Pot;
use crate::doctor::fault;
use crate::request_line::note;

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const CSS: HeaderValue = HeaderValue::from_static("text/css; charset=utf-8");
const SCRIPT: HeaderValue = HeaderValue::from_static("text/javascript; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

const PAGE: &str = include_str!("../check/page/page.html");
const FRAME: &str = include_str!("../check/page/frame.html");
/// Made by `tests/tools/browser/bundle.mjs`; sent as it is.
const LIVEKIT_CLIENT: &[u8] = include_bytes!("../check/page/livekit-client.js.br");

/// Sources that the page may connect to: whatever the visitor names, and what the files there name.
const ANYWHERE: &str = "https: wss:";
/// Sources for a page that did not come by https.
const ANYWHERE_PLAIN: &str = "https: wss: http: ws:";

/// Adds the routes of the page, where there is one.
pub(super) fn routes(router: Router<Arc<App>>, page: CheckPage) -> Router<Arc<App>> {
    if page == CheckPage::Off {
        return router;
    }
    let router = router
        .route("/", get(root).fallback(not_found))
        .route("/check", get(self::page).fallback(method_not_allowed))
        .route("/check/{part}", get(part).fallback(not_found));
    if page == CheckPage::Basic {
        return router;
    }
    router
        .route("/check/token", post(token).fallback(method_not_allowed))
        .route("/check/report", post(report).fallback(method_not_allowed))
}

/// The page where a browser asks for one; machines are told what they were always told.
async fn root(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    let accepts = request.headers().get_all(header::ACCEPT).into_iter();
    let wants_html = accepts
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/html"));
    if !wants_html {
        return not_found(State(app), request).await.into_response();
    }
    let mut response = page(State(app), request).await;
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    response
}

async fn page(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    let asked = request.extensions().get::<Arrived>().and_then(|arrived| arrived.asked.as_ref());
    let below = below(asked.unwrap_or_else(|| request.uri()));
    let html = PAGE
        .replace("{{below}}", &escaped(&below))
        .replace("{{livekit}}", &escaped(&app.url))
        .replace("{{tickets}}", if app.check_page == CheckPage::On { "on" } else { "off" });
    let policy = format!(
        "default-src 'none'; script-src 'self'; style-src 'self'; frame-src 'self'; connect-src {}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
        reach(request.headers())
    );
    file(html, HTML, &policy)
}

/// A part of the page.
async fn part(
    State(app): State<Arc<App>>,
    part: Result<extract::Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let extract::Path(part) = part.map_err(|_| ApiError::NOT_FOUND)?;
    let nowhere = "default-src 'none'; frame-ancestors 'none'";
    Ok(match part.as_str() {
        "page.css" => file(include_str!("../check/page/page.css"), CSS, nowhere),
        "page.js" => file(include_str!("../check/page/page.js"), SCRIPT, nowhere),
        "frame.js" => file(include_str!("../check/page/frame.js"), SCRIPT, nowhere),
        "faults.json" => file(faults(), JSON, nowhere),
        // Its origin is nobody's: so it is refused what a page of another origin is refused.
        "frame" => {
            let policy = format!(
                "sandbox allow-scripts; default-src 'none'; script-src 'self'; connect-src {}; base-uri 'none'; form-action 'none'; \
                 frame-ancestors 'self'",
                reach(&headers)
            );
            file(FRAME, HTML, &policy)
        }
        "media.js" if app.check_page == CheckPage::On => file(include_str!("../check/page/media.js"), SCRIPT, nowhere),
        "livekit-client-2.23.0.js" if app.check_page == CheckPage::On => livekit_client(&headers)?,
        _ => return Err(ApiError::NOT_FOUND),
    })
}

/// The client of LiveKit, compressed as it is kept. All browsers with WebRTC take that, on pages that came by https.
fn livekit_client(headers: &HeaderMap) -> Result<Response, ApiError> {
    let encodings = headers.get_all(header::ACCEPT_ENCODING).into_iter();
    let mut accepted = encodings.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    if !accepted.any(|one| matches!(one.trim(), "br" | "*")) {
        return Err(ApiError::ONLY_BROTLI);
    }
    let mut response = file(LIVEKIT_CLIENT, SCRIPT, "default-src 'none'; frame-ancestors 'none'");
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("br"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    // Its name has its version.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=86400"));
    Ok(response)
}

fn file(body: impl Into<Body>, kind: HeaderValue, policy: &str) -> Response {
    let mut response = Response::new(body.into());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}

/// Faults as `doctor` words them, by name; and what the clock of the service shows, since proxies put a `Date` of their own.
fn faults() -> String {
    #[derive(Serialize)]
    struct Words {
        means: &'static str,
        remedy: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        snippet: Option<&'static str>,
    }
    let faults = fault::ALL.iter().map(|fault| {
        let words = Words {
            means: fault.means,
            remedy: fault.remedy,
            snippet: fault.snippet,
        };
        (fault.id, words)
    });
    let faults: BTreeMap<_, _> = faults.collect();
    serde_json::json!({"now": unix_seconds(), "faults": faults}).to_string()
}

/// Where the parts of the page are, seen from the address that was asked for: a proxy may have stripped its beginning, and a slash at
/// its end makes a difference.
fn below(asked: &Uri) -> String {
    let path = asked.path();
    let (folder, name) = path.rsplit_once('/').unwrap_or_default();
    match name {
        "" if folder.ends_with("/check") => String::new(),
        "" | "check" => "check/".to_owned(),
        name => format!("{name}/check/"),
    }
}

/// Where the page may connect to. A browser says that a page is worth its trust (`Sec-Fetch-…`), which one by http is on this machine
/// only.
fn reach(headers: &HeaderMap) -> &'static str {
    let says = |name: &str, value: &str| headers.get(name).is_some_and(|given| given.as_bytes() == value.as_bytes());
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let is_local = ["localhost", "127.", "[::1]"].iter().any(|name| host.starts_with(name));
    let is_https = says("x-forwarded-proto", "https") || (headers.contains_key("sec-fetch-mode") && !is_local);
    if is_https { ANYWHERE } else { ANYWHERE_PLAIN }
}

/// Text as an attribute of HTML holds it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('"', "&quot;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Answer to a ticket.
#[derive(Serialize)]
struct Token<'a> {
    url: &'a str,
    token: &'a str,
    jti: &'a str,
    uses_left: u8,
}

async fn token(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let is_loopback = request.extensions().get::<Arrived>().is_some_and(Arrived::is_loopback);
    let ticket = doctor::bearer(request.headers()).to_owned();
    let begun = app.check.begin(&ticket, &app.keys().signing().secret, is_loopback).await;
    let Admitted {
        jti,
        room,
        token,
        uses_left,
    } = begun.map_err(refuse)?;
    note(|line| {
        line.is_proven = true;
        line.livekit_room = Some(room.into());
    });
    let mut response = json_reply(&Token {
        url: &app.url,
        token: token.expose(),
        jti: &jti,
        uses_left,
    })?;
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

async fn report(State(app): State<Arc<App>>, request: Request<Body>) -> Result<Response, ApiError> {
    let (mut head, body) = request.into_parts();
    let arrived = head.extensions.remove::<Arrived>().ok_or(ApiError::INTERNAL)?;
    let ticket = doctor::bearer(&head.headers);
    let admitted = app.check.admit_report(ticket, &app.keys().signing().secret, arrived.is_loopback());
    let jti = admitted.map_err(refuse)?;
    note(|line| line.is_proven = true);
    let declared = body::declared(&head.headers);
    let body = body::read(&arrived.connection, Pot::Proven, declared, body, MAX_REPORT_BYTES).await?;
    tell(&jti, &Report::parse(&body).ok_or(ApiError::BODY_BROKEN)?);
    let mut response = json_reply(&serde_json::Map::new())?;
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn refuse(denied: Denied) -> ApiError {
    match denied {
        Denied::NotProven => ApiError::NOT_THE_OPERATOR,
        Denied::UsedUp => ApiError::LINK_USED_UP,
        Denied::Later(seconds) => ApiError::checked_already(seconds),
        Denied::Sfu(error) => report_sfu(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_from_wherever_the_page_was_asked_for() {
        for (asked, expected) in [
            ("/", "/check/page.js"),
            ("/check", "/check/page.js"),
            ("/check/", "/check/page.js"),
            ("/livekit/jwt", "/livekit/jwt/check/page.js"),
            ("/livekit/jwt/", "/livekit/jwt/check/page.js"),
            ("/livekit/jwt/check", "/livekit/jwt/check/page.js"),
            ("/livekit/jwt/check/", "/livekit/jwt/check/page.js"),
        ] {
            let base = url::Url::parse(&format!("https://x.example{asked}")).unwrap();
            let part = format!("{}page.js", below(&asked.parse().unwrap()));
            assert_eq!(base.join(&part).unwrap().path(), expected, "{asked}");
        }
    }

    #[test]
    fn only_a_page_that_came_by_http_connects_by_http() {
        let reach_of = |given: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in given {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            reach(&headers)
        };
        let trusted = ("sec-fetch-mode", "navigate");
        for given in [
            &[("host", "x.example"), trusted][..],
            &[("host", "x.example"), ("x-forwarded-proto", "https")],
            &[("host", "127.0.0.1:8080"), ("x-forwarded-proto", "https")],
        ] {
            assert_eq!(reach_of(given), ANYWHERE, "{given:?}");
        }
        for given in [
            &[("host", "x.example")][..],
            &[("host", "localhost:8080"), trusted],
            &[("host", "127.0.0.1:8080"), trusted],
            &[("host", "[::1]:8080"), trusted],
        ] {
            assert_eq!(reach_of(given), ANYWHERE_PLAIN, "{given:?}");
        }
    }

    #[test]
    fn page_and_bundle_are_small() {
        let parts = [
            PAGE.len(),
            FRAME.len(),
            LIVEKIT_CLIENT.len(),
            include_str!("../check/page/page.css").len(),
            include_str!("../check/page/page.js").len(),
            include_str!("../check/page/frame.js").len(),
            include_str!("../check/page/media.js").len(),
        ];
        let all: usize = parts.iter().sum();
        assert!(all <= 170_000, "{all} bytes: {parts:?}");
    }

    #[test]
    fn attributes_hold_any_text() {
        assert_eq!(escaped("wss://a\"><script>&"), "wss://a&quot;&gt;&lt;script&gt;&amp;");
    }
}
