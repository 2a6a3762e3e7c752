//! `POST /sfu_webhook`: whose events are believed, and what becomes of those that cannot be used.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::Call;
use crate::support::jwt::Jwt;
use crate::support::neighbour::{Greeting, Neighbour, Reply};
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::webhook::{self, claims, event, joined, left, signed, with_token};
use crate::support::{Shared, unique, unique_loopback, wait_until};

const ROUTE: &str = "/sfu_webhook";

fn shared() -> Arc<Scene> {
    static SHARED: Shared<Scene> = Shared::new();
    SHARED.get(Scene::new)
}

fn some_event(scene: &Scene) -> String {
    joined(&scene.sfu.join(&format!("room{}", unique()), "somebody")).to_string()
}

/// Signed with `claims`, changed.
fn changed(scene: &Scene, body: &str, change: impl FnOnce(&mut Value)) -> Call {
    let mut claims = claims(&scene.sfu, body.as_bytes());
    change(&mut claims);
    with_token(body, &Jwt::sign(&claims, scene.sfu.secret()))
}

#[test]
fn only_posts_are_taken() {
    let scene = shared();
    for method in ["GET", "PUT", "DELETE", "PATCH"] {
        let answer = scene.service.call(&Call::new(method, ROUTE));
        answer.assert_errcode(405, "M_UNRECOGNIZED");
        assert!(answer.header("allow").is_some_and(|a| a.contains("POST")));
    }
    assert_eq!(scene.service.call(&Call::new("HEAD", ROUTE)).status, 405);
}

#[test]
fn the_token_may_come_with_or_without_a_scheme() {
    let scene = shared();
    let body = some_event(&scene);
    let token = Jwt::sign(&claims(&scene.sfu, body.as_bytes()), scene.sfu.secret());
    for authorization in [token.clone(), format!("Bearer {token}"), format!("bearer {token}")] {
        let answer = scene.service.call(&with_token(body.clone(), &authorization));
        assert_eq!((answer.status, answer.text().as_str()), (200, ""));
    }
    for path in ["/sfu_webhook/", "//sfu_webhook", "/livekit/jwt/sfu_webhook"] {
        let call = Call::post(path, body.clone()).header("Authorization", &token);
        assert_eq!(scene.service.call(&call).status, 200, "{path}");
    }
    let soon = webhook::now() - 30;
    for call in [
        changed(&scene, &body, |c| c["exp"] = json!(soon)),
        changed(&scene, &body, |c| c["nbf"] = json!(webhook::now() + 30)),
        changed(&scene, &body, |c| {
            c.as_object_mut().expect("claims").retain(|name, _| name != "iat" && name != "nbf");
        }),
    ] {
        assert_eq!(scene.service.call(&call).status, 200);
    }
}

#[test]
fn what_is_not_the_sfus_is_refused_with_one_line_of_the_log() {
    let scene = Scene::new();
    let body = some_event(&scene);
    let good = claims(&scene.sfu, body.as_bytes());
    let past = webhook::now() - 120;
    let mut other_key = good.clone();
    other_key["iss"] = json!("otherkey");
    let unsigned = {
        let token = Jwt::sign(&good, scene.sfu.secret());
        let payload = token.split('.').nth(1).expect("three parts").to_owned();
        format!("eyJhbGciOiJub25lIn0.{payload}.")
    };
    let calls = [
        ("no token", Call::post(ROUTE, body.clone())),
        ("an empty token", with_token(body.clone(), "")),
        ("nonsense", with_token(body.clone(), "nonsense")),
        ("no signature", with_token(body.clone(), &unsigned)),
        (
            "wrong secret",
            with_token(body.clone(), &Jwt::sign(&good, "another secret of enough characters")),
        ),
        (
            "wrong key",
            with_token(body.clone(), &Jwt::sign(&other_key, "another secret of enough characters")),
        ),
        (
            "no exp",
            changed(&scene, &body, |c| drop(c.as_object_mut().expect("claims").remove("exp"))),
        ),
        ("expired", changed(&scene, &body, |c| c["exp"] = json!(past))),
        ("not valid yet", changed(&scene, &body, |c| c["nbf"] = json!(webhook::now() + 120))),
        (
            "no hash",
            changed(&scene, &body, |c| drop(c.as_object_mut().expect("claims").remove("sha256"))),
        ),
        (
            "an empty hash, as of no body",
            with_token(
                "",
                &Jwt::sign(
                    &{
                        let mut claims = good.clone();
                        claims["sha256"] = json!("");
                        claims
                    },
                    scene.sfu.secret(),
                ),
            ),
        ),
        (
            "wrong hash",
            with_token(body.replace("somebody", "otherbody"), &Jwt::sign(&good, scene.sfu.secret())),
        ),
    ];
    for (what, call) in &calls {
        let answer = scene.service.call(call);
        assert_eq!(answer.status, 401, "{what}: {}", answer.text());
        answer.assert_errcode(401, "M_UNAUTHORIZED");
    }
    for _ in 0..50 {
        assert_eq!(scene.service.call(&calls[3].1).status, 401);
    }
    scene.service.wait_event("webhooks_refused").says(&["WARN", "reason=", "remedy="]);
    let lines = scene.service.lines(&[("event", "webhooks_refused")]).len();
    assert!(lines <= 3, "{lines} lines for {} refusals", calls.len() + 50);
}

/// Our own join tokens are signed with the same secret.
#[test]
fn a_join_token_opens_nothing() {
    let scene = shared();
    let body = crate::support::bodies::get_token_of(&scene.home, "alice", &scene.room);
    let jwt = scene.service.post("/get_token", &body).field("jwt");
    assert_eq!(scene.service.call(&with_token(some_event(&scene), &jwt)).status, 401);
}

#[test]
fn what_cannot_be_used_is_taken_and_ignored() {
    let scene = shared();
    let session = scene.sfu.join(&format!("room{}", unique()), "somebody");
    let whole = joined(&session);
    let without = |name: &str| {
        let mut event = whole.clone();
        event.as_object_mut().expect("an object").remove(name);
        event.to_string()
    };
    let set = |pointer: &str, value: Value| crate::support::bodies::with(&whole, pointer, Some(value)).to_string();
    for body in [
        without("room"),
        without("participant"),
        without("id"),
        without("createdAt"),
        without("event"),
        set("/event", json!("something_new")),
        set("/event", Value::Null),
        set("/event", json!(7)),
        set("/room", Value::Null),
        set("/room", json!("x")),
        set("/room/name", json!(5)),
        set("/participant", json!([])),
        set("/participant/state", json!("HALF_THERE")),
        set("/participant/state", json!(99)),
        set("/participant/joinedAt", json!(-1)),
        set("/participant/joinedAtMs", json!("99999999999999999999999")),
        set("/createdAt", json!("soon")),
        set("/participant/kindDetails", json!(["NEW"])),
        event("participant_left", &session, Some("A_NEW_REASON")).to_string(),
        event("participant_left", &session, None).to_string(),
        event("participant_connection_aborted", &session, Some("SIGNAL_CLOSE")).to_string(),
        "{}".into(),
        "[]".into(),
        "null".into(),
        String::new(),
        "nonsense \u{0}".into(),
        "[".repeat(100_000),
        format!("{{\"room\":{}1{}}}", "{\"a\":".repeat(50_000), "}".repeat(50_000)),
    ] {
        let answer = scene.service.call(&signed(&scene.sfu, &body));
        let start: String = body.chars().take(300).collect();
        assert_eq!((answer.status, answer.text().as_str()), (200, ""), "{start}");
    }
}

#[test]
fn a_large_webhook_is_taken_and_a_huge_one_is_not() {
    let scene = shared();
    let session = scene.sfu.join(&format!("room{}", unique()), "somebody");
    let of_size = |size: usize| {
        let mut event = joined(&session);
        event["participant"]["metadata"] = json!("");
        let empty = event.to_string().len();
        event["participant"]["metadata"] = json!("x".repeat(size - empty));
        event.to_string()
    };
    assert_eq!(scene.service.call(&signed(&scene.sfu, &of_size(1024 * 1024))).status, 200);
    scene
        .service
        .call(&signed(&scene.sfu, &of_size(1024 * 1024 + 1)))
        .assert_errcode(413, "M_TOO_LARGE");
}

/// Nobody's memory or time is spent on a stranger's body.
#[test]
fn the_body_is_not_read_before_the_token_is_verified() {
    let scene = shared();
    let head = |authorization: &str, length: usize| {
        format!("POST {ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\nContent-Length: {length}\r\n\r\n")
    };
    for length in [10, 1024 * 1024, 1024 * 1024 * 1024] {
        let began = Instant::now();
        let answer = scene
            .service
            .raw(head("nonsense", length).as_bytes())
            .expect("an answer without the body");
        assert_eq!(answer.status, 401, "{length}");
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "it waited for the body: {:?}",
            began.elapsed()
        );
    }
    // The SFU's secret has signed these, but for no body that there could be.
    let long = format!("{}=", "A".repeat(44));
    for hash in [
        "",
        "=",
        "AAAA",
        "not base64 at all",
        &"A".repeat(42),
        &"A".repeat(44),
        &long,
        &"ab".repeat(32),
    ] {
        let mut claims = claims(&scene.sfu, b"");
        claims["sha256"] = json!(hash);
        let token = Jwt::sign(&claims, scene.sfu.secret());
        let answer = scene.service.raw(head(&token, 10).as_bytes()).expect("an answer without the body");
        assert_eq!(answer.status, 401, "{hash:?}");
    }
    let token = Jwt::sign(&claims(&scene.sfu, b""), scene.sfu.secret());
    let answer = scene
        .service
        .raw(head(&token, 1024 * 1024 * 1024).as_bytes())
        .expect("an answer without the body");
    assert_eq!(answer.status, 413);
}

/// livekit-server sends a 5xx again, to whoever serves then; a 200 it would forget.
#[test]
fn while_it_stops_the_sfu_is_asked_to_come_back() {
    let scene = Scene::new();
    scene.delegate(Duration::from_secs(60));
    let session = scene.joined();
    scene.wait_restarted(&scene.delay_id);
    let body = left(&session, "CLIENT_INITIATED").to_string();
    let token = Jwt::sign(&claims(&scene.sfu, body.as_bytes()), scene.sfu.secret());
    let head = format!(
        "POST {ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        body.len()
    );
    let mut stream = TcpStream::connect(scene.service.address()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time-out");
    stream.write_all(head.as_bytes()).expect("sent");
    let mut chunk = [0; 4096];
    let n = stream.read(&mut chunk).expect("read");
    assert!(chunk[..n].starts_with(b"HTTP/1.1 100 "), "the body is not asked for");
    // The last restart hangs, so the service is still there.
    scene.api.answer(|_, _| Reply::Hang);
    scene.service.signal("TERM");
    wait_until("the last restart", TIMEOUT, || scene.restarts().len() >= 2);
    stream.write_all(body.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer while stopping");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("\r\nretry-after: "), "{answer}");
    scene.service.wait_exit(Duration::from_secs(30));
}

/// A store that hangs: for five seconds the SFU is asked to come back, then events are taken without it.
#[test]
fn while_jobs_are_restored_the_sfu_is_asked_to_come_back() {
    let store = Neighbour::start((unique_loopback(), 0).into(), None, |_| Reply::Hang);
    store.greet(Greeting::Silence);
    let url = format!("redis://{}", store.address());
    let scene = Scene::with(|setup| setup.env("LIVEKIT_REDIS_URL", &url));
    let began = Instant::now();
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    let answer = scene.tell(&joined(&session));
    answer.assert_errcode(503, "M_UNKNOWN");
    assert!(answer.header("retry-after").is_some());
    // Everything else works meanwhile.
    let body = crate::support::bodies::get_token_of(&scene.home, "alice", &scene.room);
    assert_eq!(scene.service.post("/get_token", &body).status, 200);
    // A delegation is held rather than refused.
    scene.delegate(Duration::from_secs(4));
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(scene.tell(&joined(&session)).status, 200);
    scene.wait_restarts(2);
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

#[test]
fn repeated_late_and_disordered_events_do_no_harm() {
    let delay = Duration::from_secs(3);
    let scene = Scene::new();
    scene.delegate(delay);
    let first = scene.sfu.join(&scene.alias, &scene.identity);
    let (first_joined, first_left) = (joined(&first), left(&first, "CLIENT_INITIATED"));
    scene.send_webhook(&first_joined);
    scene.wait_restarts(1);
    // It comes back; the events of the first stay are repeated and come in the wrong order.
    let second = scene.sfu.join(&scene.alias, &scene.identity);
    for event in [
        &joined(&second),
        &first_left,
        &first_joined,
        &first_left,
        &first_joined,
        &first_left,
    ] {
        scene.send_webhook(event);
    }
    let mut stranger = second.clone();
    stranger.sid = "PA_stranger".into();
    scene.send_webhook(&event("track_published", &stranger, None));
    let mut elsewhere = second.clone();
    elsewhere.room = "another".into();
    scene.send_webhook(&left(&elsewhere, "CLIENT_INITIATED"));
    scene.stays_until(Instant::now() + Duration::from_secs(6), delay);
    let at = scene.leave(&second, "CLIENT_INITIATED");
    let sent = scene.wait_sent(TIMEOUT);
    assert!(sent - at > Duration::from_millis(1_000), "believed at once");
    // After the end nothing begins again.
    for event in [&first_joined, &first_left, &joined(&second), &left(&second, "CLIENT_INITIATED")] {
        scene.send_webhook(event);
    }
    scene.wait_over(TIMEOUT);
    assert_eq!(scene.sends().len(), 1);
}
