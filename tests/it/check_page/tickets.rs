//! Tickets of links: who may use one, how often, and what a stranger can make of it (nothing).

use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lk_jwt_service::internals::doctor::{TicketKey, Use, Wishes};
use lk_jwt_service::secret::Secret;
use serde_json::{Value, json};

use crate::support::client::{Answer, Call};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::scene::TIMEOUT;
use crate::support::service::{Service, Setup, binary};
use crate::support::sfu::Sfu;
use crate::support::{unique, wait_until};

const DENIED: &str = "The request could not be authorised.";
const USED_UP: &str = "The link was used as often as it may be";
const LATER: &str = "One at a time, twenty a minute for all links";

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

fn jti() -> String {
    format!("ticket-of-a-test-{:016}", unique())
}

/// A ticket as `doctor --link` makes it, at another time.
pub(super) fn ticket(secret: &str, now: u64, seconds: u64) -> String {
    TicketKey::of_links(&Secret::new(secret)).sign_link(&jti(), now, seconds)
}

/// The same link with a ticket whose time is over.
pub(super) fn expired(link: &str, secret: &str) -> String {
    let (page, _) = link.split_once("#t=").expect("a ticket");
    format!("{page}#t={}", ticket(secret, now() - 3600, 1800))
}

fn service(sfu: &Sfu) -> Service {
    Setup::new(sfu).env("LIVEKIT_CHECK_PAGE", "on").start()
}

pub(super) fn post(path: &str, ticket: &str) -> Call {
    Call::post(path, "").header("Authorization", &format!("Bearer {ticket}"))
}

fn report(ticket: &str, body: &Value) -> Call {
    Call::json("/check/report", body).header("Authorization", &format!("Bearer {ticket}"))
}

/// The claims of the token that an answer brings.
fn claims(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    Jwt::decode(answer.json()["token"].as_str().expect("a token"))
        .expect("a JWT")
        .claims
}

#[test]
fn a_ticket_is_used_five_times_and_not_six() {
    let sfu = Sfu::start();
    let service = service(&sfu);
    let good = ticket(sfu.secret(), now(), 1800);
    for left in (0..5).rev() {
        let answer = service.call(&post("/check/token", &good));
        let claims = claims(&answer);
        let body = answer.json();
        assert_eq!((body["uses_left"].as_u64(), body["url"].is_string()), (Some(left), true));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        let room = format!("check-{}", body["jti"].as_str().expect("jti"));
        let video = json!({
            "roomJoin": true, "room": room, "canSubscribe": false, "canPublish": false, "canPublishData": false,
            "canUpdateOwnMetadata": false, "hidden": true,
        });
        for (name, value) in claims["video"].as_object().expect("grants") {
            let is_nothing = matches!(value, Value::Bool(false) | Value::Null) || value == "" || value == &json!([]);
            assert!(video.get(name) == Some(value) || is_nothing, "{name} is {value}");
        }
        let life = claims["exp"].as_u64().expect("exp").saturating_sub(now());
        assert!((55..=60).contains(&life), "{life}");
    }
    service.call(&post("/check/token", &good)).assert_error(403, "M_FORBIDDEN", USED_UP);
    // Below the prefix too; and another ticket is another one.
    let other = ticket(sfu.secret(), now(), 1800);
    assert_eq!(service.call(&post("/livekit/jwt/check/token", &other)).status, 200);
}

#[test]
fn all_links_together_are_used_twenty_times_a_minute() {
    let sfu = Sfu::start();
    let service = service(&sfu);
    for _ in 0..20 {
        assert_eq!(service.call(&post("/check/token", &ticket(sfu.secret(), now(), 60))).status, 200);
    }
    let late = ticket(sfu.secret(), now(), 60);
    let refused = service.call(&post("/check/token", &late));
    refused.assert_error(429, "M_LIMIT_EXCEEDED", LATER);
    assert!(
        refused
            .header("retry-after")
            .is_some_and(|wait| (1..=60).contains(&wait.parse().unwrap_or(0)))
    );
}

#[test]
fn nobody_else_makes_it_do_anything() {
    let (sfu, stranger) = (Sfu::start(), Homeserver::start());
    let service = service(&sfu);
    let secret = sfu.secret();
    let claims = json!({"aud": "lk-jwt-service/check", "iat": now(), "exp": now() + 60, "jti": "0123456789abcdef0123", "wishes": {}});
    let good = ticket(secret, now(), 1800);
    let (unsigned, signature) = good.rsplit_once('.').expect("a JWT");
    let none = {
        use base64::Engine as _;
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.", encode(r#"{"alg":"none","typ":"JWT"}"#), encode(&claims.to_string()))
    };
    let forged = [
        String::new(),
        "nonsense".to_owned(),
        Jwt::sign(&claims, secret),
        none,
        unsigned.to_owned(),
        format!("{unsigned}."),
        good[..good.len() - 3].to_owned(),
        format!("{unsigned}x.{signature}"),
        ticket("another service's secret that is long enough", now(), 1800),
        ticket(secret, now() - 1801, 1800),
        ticket(secret, now() + 120, 1800),
        ticket(secret, now(), 4 * 60 * 60 + 1),
        TicketKey::derive(&Secret::new(secret)).sign(Use::Link, &jti(), &Wishes::default(), now()),
        TicketKey::derive(&Secret::new(secret)).sign(Use::Run, &jti(), &Wishes::default(), now()),
    ];
    service.wait_event("sfu_up");
    let (creations, body) = (
        sfu.creations(),
        json!({"url": format!("https://{}", stranger.name), "server": stranger.name}),
    );
    for forged in &forged {
        for path in ["/check/token", "/livekit/jwt/check/token/", "/check/report"] {
            let call = Call::json(path, &body).header("Authorization", &format!("Bearer {forged}"));
            service.call(&call).assert_error(401, "M_UNAUTHORIZED", DENIED);
        }
    }
    // A body that never comes is not waited for, nor one that is too long read.
    for path in ["/check/token", "/check/report"] {
        let mut connection = service.connect();
        connection.send(format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n").as_bytes());
        let began = Instant::now();
        assert_eq!(connection.answer().map(|answer| answer.status), Some(401));
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    // Not even the holder of a ticket names anybody that is called.
    let call = Call::json("/check/token", &body).header("Authorization", &format!("Bearer {good}"));
    assert_eq!(service.call(&call).status, 200);
    assert_eq!(service.call(&report(&good, &body)).status, 200);
    for path in ["/check?server=", "/check/frame?url=https://", "/check/faults.json?"] {
        assert_eq!(service.get(&format!("{path}{}", stranger.name)).status, 200);
    }
    assert_eq!(
        (stranger.http.connections().len(), sfu.creations()),
        (0, creations + 1),
        "somebody was called"
    );
    // A ticket opens nothing on the other routes, nor is it for `doctor`.
    let ask = post("/doctor", &good);
    service.call(&ask).assert_error(401, "M_UNAUTHORIZED", DENIED);
}

#[test]
fn a_report_is_one_line_once_a_use() {
    let sfu = Sfu::start();
    let service = service(&sfu);
    let good = ticket(sfu.secret(), now(), 1800);
    let body = json!({
        "server": "example.org",
        "browser": "Firefox",
        "checks": [{"check": "udp", "result": "fail", "fault": "sfu-udp", "saw": "no way to \u{1b}[31m8.8.4.10\nERROR forged"}],
        "addresses": ["192.0.2.77"],
        "unknown": "field",
    });
    // Before a use there is nothing to report.
    service.call(&report(&good, &body)).assert_error(403, "M_FORBIDDEN", USED_UP);
    let jti = service.call(&post("/check/token", &good)).json()["jti"]
        .as_str()
        .expect("jti")
        .to_owned();
    assert_eq!(service.call(&report(&good, &body)).status, 200);
    let line = service.wait_line(&[("event", "check_report"), ("jti", &jti), ("target", "check")]);
    let text = "addresses 192.0.2.77; browser Firefox; server example.org; udp fail sfu-udp (no way to  [31m8.8.4.10 ERROR forged)";
    assert_eq!(line.field("report"), text);
    service.call(&report(&good, &body)).assert_error(403, "M_FORBIDDEN", USED_UP);
    // The next use may report again: known fields of JSON, 8 KiB at most, of which 2 KiB are kept.
    let again = || assert_eq!(service.call(&post("/check/token", &good)).status, 200);
    again();
    let long = json!({"checks": [{"check": "x", "result": "ok", "saw": "y".repeat(9_000)}]});
    service.call(&report(&good, &long)).assert_errcode(413, "M_TOO_LARGE");
    again();
    let full = json!({"checks": [{"check": "x", "result": "ok", "saw": "y".repeat(8_000)}]});
    assert_eq!(service.call(&report(&good, &full)).status, 200);
    let reports = || service.lines(&[("event", "check_report")]);
    wait_until("the second report", TIMEOUT, || reports().len() == 2);
    assert_eq!(reports()[1].field("report").len(), 2_048);
    again();
    service.call(&report(&good, &json!([]))).assert_errcode(400, "M_NOT_JSON");
}

#[test]
fn a_report_shows_no_people_where_the_log_shows_none() {
    let sfu = Sfu::start();
    for users in ["hash", "none"] {
        let setup = Setup::new(&sfu).env("LIVEKIT_CHECK_PAGE", "on").env("LIVEKIT_LOG_USERS", users);
        let service = setup.start();
        let good = ticket(sfu.secret(), now(), 1800);
        assert_eq!(service.call(&post("/check/token", &good)).status, 200);
        let body =
            json!({"server": "example.org", "addresses": ["192.0.2.77"], "checks": [{"check": "udp", "result": "ok", "saw": "8.8.8.8"}]});
        assert_eq!(service.call(&report(&good, &body)).status, 200);
        assert_eq!(service.wait_event("check_report").field("report"), "udp ok");
    }
}

#[test]
fn tickets_count_only_where_the_page_is_on_and_in_dev_mode_on_this_machine() {
    let sfu = Sfu::start();
    for (page, status) in [("off", 404), ("basic", 404)] {
        let service = Setup::new(&sfu).env("LIVEKIT_CHECK_PAGE", page).start();
        for path in ["/check/token", "/check/report"] {
            assert_eq!(
                service.call(&post(path, &ticket(sfu.secret(), now(), 60))).status,
                status,
                "{page} {path}"
            );
        }
    }
    let service = Setup::new(&sfu)
        .env("LIVEKIT_SECRET", "secret")
        .env("LIVEKIT_CHECK_PAGE", "on")
        .argument("--dev")
        .secret("no such text")
        .start();
    let ask = |client: Option<&str>| {
        let call = post("/check/token", &ticket("secret", now(), 60));
        service.call(&client.into_iter().fold(call, |call, client| call.header("X-Forwarded-For", client)))
    };
    assert_eq!(ask(Some("8.8.4.4")).status, 401, "through a proxy on this machine");
    assert_ne!(ask(None).status, 401);
}

#[test]
fn doctor_prints_a_link_for_one_user() {
    let sfu = Sfu::start();
    let service = service(&sfu);
    let env = [
        ("LIVEKIT_URL", "wss://livekit.example.org"),
        ("LIVEKIT_KEY", sfu.key()),
        ("LIVEKIT_SECRET", sfu.secret()),
        ("LIVEKIT_CHECK_PAGE", "on"),
    ];
    let doctor = |env: &[(&str, &str)], arguments: &[&str]| {
        let output = Command::new(binary())
            .args(["doctor", "--link"])
            .args(arguments)
            .env_clear()
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .output()
            .expect("the service's binary");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let url = "https://livekit.example.org/livekit/jwt";
    let (code, link, about) = doctor(&env, &["--url", url, "--for", "2h"]);
    assert_eq!(code, Some(0), "{about}");
    let ticket = link.trim().strip_prefix(&format!("{url}/check#t=")).expect("a link");
    let answer = service.call(&post("/check/token", ticket));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let jti = answer.json()["jti"].as_str().expect("jti").to_owned();
    assert!(about.contains(&jti) && about.contains("120 minutes"), "{about}");
    let claims = Jwt::decode(ticket).expect("a JWT").claims;
    assert_eq!(claims["exp"].as_u64().expect("exp") - claims["iat"].as_u64().expect("iat"), 7200);
    for (env, arguments, why) in [
        (&env[..3], &["--url", url][..], "LIVEKIT_CHECK_PAGE=on"),
        (&env, &[], "--url"),
        (&env, &["--url", "http://livekit.example.org"], "https"),
        (&env, &["--for", "5h"], "4h at most"),
    ] {
        let (code, stdout, stderr) = doctor(env, arguments);
        assert!(
            code == Some(2) && stdout.is_empty() && stderr.contains(why),
            "{arguments:?}: {stderr}"
        );
    }
}
