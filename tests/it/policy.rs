//! Who is dealt with, how often they may ask, and what they may do, on the real binary. Against real neighbours: `real::policy`.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::{Answer, Call};
use crate::support::dns::Dns;
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;
use crate::support::{unique_room, wait_until};

const BLOCKED: &str = "LIVEKIT_BLOCKED_HOMESERVERS";
const ALLOWED: &str = "LIVEKIT_ALLOWED_HOMESERVERS";
const USER: &str = "LIVEKIT_RATE_LIMIT_USER";
const HOMESERVER: &str = "LIVEKIT_RATE_LIMIT_HOMESERVER";

/// The four routes on which anybody may come, for a user of `home`, with `server` as the name of the homeserver.
fn on_every_route(home: &Homeserver, server: &str) -> [Call; 4] {
    let named = |body: Value| with(&body, "/openid_token/matrix_server_name", Some(json!(server)));
    let token_source = format!("/token_source?matrix_server_name={server}&device_id=DEVICE");
    [
        Call::json("/get_token", &named(bodies::get_token_of(home, "eve", &unique_room()))),
        Call::json("/sfu/get", &named(bodies::sfu_get_of(home, "eve", &unique_room()))),
        Call::json(
            "/delegate_delayed_leave",
            &named(bodies::delegate_of(home, "eve", &unique_room(), "id", 10_000)),
        ),
        Call::json(&token_source, &json!({"room_name": unique_room()})).header("Authorization", &format!("Bearer {}", home.token("eve"))),
    ]
}

#[track_caller]
fn assert_blocked(service: &Service, call: &Call) {
    let answer = service.call(call);
    answer.assert_error(403, "M_FORBIDDEN", "This service is not for users of that homeserver");
    assert_eq!(answer.field("reason"), "blocked_homeserver", "{}", answer.text());
}

/// Neither DNS, nor its files, nor the homeserver itself.
#[test]
fn nobody_is_asked_about_a_blocked_homeserver() {
    let (sfu, home, dns) = (Sfu::start(), Homeserver::start(), Dns::start());
    let evil = Homeserver::builder().named("matrix.evil.test").start();
    let port = evil.http.address().port();
    let at = evil.http.address().ip();
    for name in ["matrix.evil.test", "evil.test"] {
        dns.address(name, &[at]);
    }
    let setup = Setup::new(&sfu).full_access(&[&home]).env(BLOCKED, "evil.test, *.evil.test");
    let service = dns.serving(setup).start();
    let asked = dns.questions().len();
    for server in [
        "matrix.evil.test".to_owned(),
        "evil.test".to_owned(),
        format!("matrix.evil.test:{port}"),
        format!("MATRIX.Evil.test.:{port}"),
    ] {
        for call in on_every_route(&evil, &server) {
            assert_blocked(&service, &call);
        }
    }
    let line = service.wait_line(&[("target", "request"), ("level", "INFO"), ("outcome", "blocked_homeserver")]);
    line.says(&["evil.test"]);
    let about_evil = |name: &str| name.ends_with("evil.test");
    let questions = dns.questions().split_off(asked);
    assert!(!questions.iter().any(|question| about_evil(&question.name)), "{questions:?}");
    assert!(evil.http.connections().is_empty(), "the blocked homeserver was dialled");
    assert_eq!(sfu.creations(), 0);
    let answer = service.post("/get_token", &bodies::get_token_of(&home, "alice", &unique_room()));
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[test]
fn only_allowed_homeservers_are_asked_and_those_with_full_access_always_are() {
    let (sfu, home, friend, stranger) = (Sfu::start(), Homeserver::start(), Homeserver::start(), Homeserver::start());
    let ip = |of: &Homeserver| of.http.address().ip().to_string();
    assert!(
        ip(&friend) != ip(&stranger) && ip(&home) != ip(&friend),
        "each has an address of its own"
    );
    let setup = Setup::new(&sfu).full_access(&[&home]).env(ALLOWED, &ip(&friend));
    let service = setup.start();
    for (of, status) in [(&home, 200), (&friend, 200)] {
        let answer = service.post("/get_token", &bodies::get_token_of(of, "alice", &unique_room()));
        assert_eq!(answer.status, status, "{}", answer.text());
    }
    for call in on_every_route(&stranger, &stranger.name) {
        assert_blocked(&service, &call);
    }
    assert!(stranger.http.connections().is_empty());
    let is_private = |ip: IpAddr| ip.is_loopback();
    assert!(is_private(stranger.http.address().ip()), "the guard would have let it be dialled");
}

/// Leaves that were delegated before live on: who was let in is reported when they go.
#[test]
fn leaves_of_a_homeserver_that_is_blocked_later_live_on() {
    let directory = crate::support::process::directory("policy");
    let state = directory.to_string_lossy().into_owned();
    let scene = Scene::with(|setup| setup.env("LIVEKIT_STATE_PATH", &state));
    scene.delegate(Duration::from_secs(600));
    let session = scene.join();
    scene.wait_restarts(1);
    let Scene {
        service,
        sfu,
        home,
        api,
        delay_id,
        ..
    } = scene;
    service.signal("TERM");
    service.wait_exit(TIMEOUT);
    drop(service);
    let ip = home.http.address().ip().to_string();
    let service = Setup::new(&sfu)
        .env("LIVEKIT_STATE_PATH", &state)
        .env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home))
        .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
        .env(BLOCKED, &ip)
        .start();
    assert_blocked(&service, &on_every_route(&home, &home.name)[0]);
    sfu.leave(&session.room, &session.identity);
    wait_until("the leave", TIMEOUT * 3, || api.count("send", &delay_id) == 1);
}

fn ask(service: &Service, of: &Homeserver, user: &str) -> Answer {
    service.post("/get_token", &bodies::get_token_of(of, user, &unique_room()))
}

#[track_caller]
fn assert_limited(answer: &Answer, at_most_seconds: u64) {
    answer.assert_error(429, "M_LIMIT_EXCEEDED", "Too many requests, try again later");
    assert_eq!(answer.field("reason"), "rate_limited");
    let seconds: u64 = answer
        .header("retry-after")
        .and_then(|text| text.parse().ok())
        .expect("Retry-After");
    assert!((1..=at_most_seconds).contains(&seconds), "{seconds}");
    assert_eq!(answer.json()["retry_after_ms"], seconds * 1000);
}

/// Three a minute: the fourth would be held for twenty seconds, which is longer than any request is.
#[test]
fn who_asks_too_often_gets_429_and_a_delegation_is_the_last_to_be_refused() {
    let (sfu, home) = (Sfu::start(), Homeserver::start());
    let setup = Setup::new(&sfu)
        .full_access(&[&home])
        .env(USER, "3")
        .env("LIVEKIT_METRICS_BIND", "main");
    let api = crate::support::client_api::ClientApi::start();
    let service = setup.env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home)).start();
    // Whoever is not verified counts for nobody.
    let made_up = bodies::get_token(&unique_room(), &home.name, "made-up", &home.user("alice"));
    for _ in 0..10 {
        assert_eq!(service.post("/get_token", &made_up).status, 401);
    }
    for _ in 0..3 {
        assert_eq!(ask(&service, &home, "alice").status, 200);
    }
    assert_limited(&ask(&service, &home, "alice"), 20);
    let legacy = service.post("/sfu/get", &bodies::sfu_get_of(&home, "alice", &unique_room()));
    assert_limited(&legacy, 20);
    assert_eq!(ask(&service, &home, "bob").status, 200, "another user behind the same address");
    let delegate = bodies::delegate_of(&home, "alice", &unique_room(), "id", 600_000);
    let answer = service.post("/delegate_delayed_leave", &delegate);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let metrics = service.get("/metrics").text();
    assert!(metrics.contains("\nlk_jwt_limit_hits_total{limit=\"user_rate\"} 2\n"), "{metrics}");
    let line = service.wait_line(&[("target", "request"), ("level", "INFO"), ("outcome", "rate_limited")]);
    line.says(&["asks more often than LIVEKIT_RATE_LIMIT_USER allows"]);
}

/// Twelve a minute: the thirteenth may go on five seconds after the first.
#[test]
fn who_asks_too_often_is_held_first() {
    let (sfu, home) = (Sfu::start(), Homeserver::start());
    let service = Setup::new(&sfu).full_access(&[&home]).env(USER, "12").start();
    let began = Instant::now();
    for n in 0..13 {
        let answer = ask(&service, &home, "alice");
        assert_eq!(answer.status, 200, "{n}: {}", answer.text());
    }
    assert!(began.elapsed() >= Duration::from_secs(5), "{:?}", began.elapsed());
    wait_until("a request that was held", TIMEOUT, || {
        let lines = service.lines(&[("target", "request"), ("outcome", "ok")]);
        lines.iter().any(|line| !line.field("rate_limit_ms").is_empty())
    });
}

#[test]
fn a_homeserver_that_is_not_listed_is_limited_with_all_its_users() {
    let (sfu, home, away) = (Sfu::start(), Homeserver::start(), Homeserver::start());
    let setup = Setup::new(&sfu).full_access(&[&home]).env(USER, "off").env(HOMESERVER, "3");
    let service = setup.env("LIVEKIT_METRICS_BIND", "main").start();
    for user in ["a", "b", "c"] {
        assert_eq!(ask(&service, &away, user).status, 200);
    }
    assert_limited(&ask(&service, &away, "d"), 20);
    for _ in 0..70 {
        assert_eq!(ask(&service, &home, "alice").status, 200, "listed, and the users' rate is off");
    }
    let metrics = service.get("/metrics").text();
    assert!(
        metrics.contains("\nlk_jwt_limit_hits_total{limit=\"homeserver_rate\"} 1\n"),
        "{metrics}"
    );
}

/// An office: a call of two hundred begins, and all of them are behind one address. The homeserver takes 0.3 s for each.
#[test]
fn an_office_behind_one_address_comes_in_within_ten_seconds() {
    let (sfu, home) = (Sfu::start(), Homeserver::start());
    home.change_userinfo(|known| known.unwrap_or(Reply::Close).after(Duration::from_millis(300)));
    let service = Setup::new(&sfu).full_access(&[&home]).unset(USER).start();
    let room = unique_room();
    let calls: Vec<_> = (0..200)
        .map(|n| Call::json("/get_token", &bodies::get_token_of(&home, &format!("user{n}"), &room)))
        .collect();
    let answers = service.flood(&calls, 200);
    let slowest = answers.iter().map(|answer| answer.took).max().expect("answers");
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
}

#[test]
fn tokens_name_the_sources_that_may_be_published() {
    let (sfu, home, away) = (Sfu::start(), Homeserver::start(), Homeserver::start());
    let setup = Setup::new(&sfu)
        .full_access(&[&home])
        .env("LIVEKIT_PUBLISH_SOURCES", "microphone screen_share");
    let service = setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "nobody.example.org").start();
    for (of, sources) in [(&home, json!(["microphone", "screen_share"])), (&away, Value::Null)] {
        let answer = ask(&service, of, "alice").json();
        let claims = Jwt::decode(answer["jwt"].as_str().expect("jwt")).expect("a JWT").claims;
        assert_eq!(claims["video"]["canPublishSources"], sources);
    }
}

/// When it is opened, opened once more since it ended under somebody on the way (decision T6b), and opened again after the SFU forgot
/// it (decision L13).
fn openings(change: impl FnOnce(Setup) -> Setup) -> Vec<u32> {
    let scene = Scene::with(|setup| change(setup.env("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS", "1")));
    let creations = || scene.sfu.creations_of(&scene.alias);
    let opened = scene
        .service
        .post("/get_token", &bodies::get_token_of(&scene.home, "alice", &scene.room));
    assert_eq!((opened.status, creations()), (200, 1), "{}", opened.text());
    scene.send_webhook(&json!({"event": "room_finished", "room": {"name": scene.alias, "sid": "RM_1"}, "id": "EV_finished"}));
    wait_until("the room to be opened once more", TIMEOUT, || creations() == 2);
    scene.delegate(Duration::from_secs(600));
    scene.joined();
    let before = creations();
    scene.sfu.forget_rooms();
    wait_until("the room to be opened again", TIMEOUT * 2, || creations() > before);
    let asked = scene.sfu.asked_to_create(&scene.alias).into_iter();
    asked.map(|creation| creation.max_participants).collect()
}

#[test]
fn every_room_that_is_opened_has_the_number_of_participants() {
    let numbers = openings(|setup| setup.env("LIVEKIT_MAX_PARTICIPANTS", "10"));
    assert!(numbers.iter().all(|number| *number == 10), "{numbers:?}");
}

/// 0 is what livekit-server takes for what its own configuration says.
#[test]
fn where_no_number_is_set_none_is_asked_for() {
    let numbers = openings(|setup| setup.unset("LIVEKIT_MAX_PARTICIPANTS"));
    assert!(numbers.iter().all(|number| *number == 0), "{numbers:?}");
}
