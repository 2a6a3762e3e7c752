//! `POST /delegate_delayed_leave`, and the delay fields of the token routes: what is refused, what is asked first, and what
//! reaches the homeserver.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bodies::{delegate_of, get_token_of, sfu_get_of, with};
use crate::support::client::Call;
use crate::support::client_api::{ClientApi, UNSTABLE, VERSIONS};
use crate::support::homeserver::{CLIENT_WELL_KNOWN, Homeserver, USERINFO};
use crate::support::neighbour::{Neighbour, Reply, Request};
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::Setup;
use crate::support::sfu::{Fault, Sfu};
use crate::support::world::World;
use crate::support::{Shared, unique, unique_room, wait_until};

const ROUTE: &str = "/delegate_delayed_leave";
const T1: &str = "The request body is missing `room_id` or `slot_id`";
const T3: &str = "The request body `member` is missing `id`, `claimed_user_id` or `claimed_device_id`";
const T5: &str = "The request body `openid_token` is missing `access_token` or `matrix_server_name`";
const T6: &str = "The request body is missing `delay_id` or `delay_timeout`";
const NOT_FOR_YOU: &str = "Delegation of delayed events is only supported for full access users";
const NO_API: &str = "Unable to resolve client-server API";
const HOUR: u64 = 3_600_000;

/// One for the tests that only look at answers.
fn shared() -> Arc<Scene> {
    static SHARED: Shared<Scene> = Shared::new();
    SHARED.get(Scene::new)
}

fn good(scene: &Scene) -> Value {
    delegate_of(&scene.home, "alice", &unique_room(), "syd_1", HOUR)
}

#[test]
fn a_delegation_is_taken() {
    let scene = shared();
    for path in [
        ROUTE,
        "/delegate_delayed_leave/",
        "//delegate_delayed_leave",
        "/livekit/jwt/delegate_delayed_leave",
    ] {
        let answer = scene.service.post(path, &good(&scene));
        assert_eq!((answer.status, answer.text().as_str()), (200, "{}\n"), "{path}");
        assert_eq!(answer.header("content-type"), Some("application/json"));
    }
}

#[test]
fn the_probe_without_a_body_is_answered_at_once() {
    let scene = shared();
    for call in [Call::post(ROUTE, ""), Call::new("POST", ROUTE)] {
        let answer = scene.service.call(&call.header("Origin", "https://call.example.org"));
        answer.assert_error(400, "M_NOT_JSON", "Error reading request");
        assert!(answer.took < Duration::from_secs(2), "{:?}", answer.took);
    }
}

#[test]
fn what_is_missing_is_named_in_order_and_asks_nobody() {
    let scene = Scene::new();
    let body = good(&scene);
    for (pointers, text) in [
        (vec!["/room_id", "/member", "/openid_token", "/delay_id"], T1),
        (vec!["/slot_id"], T1),
        (vec!["/member", "/openid_token", "/delay_id"], T3),
        (vec!["/member/id"], T3),
        (vec!["/member/claimed_user_id"], T3),
        (vec!["/member/claimed_device_id"], T3),
        (vec!["/openid_token", "/delay_id"], T5),
        (vec!["/openid_token/access_token"], T5),
        (vec!["/openid_token/matrix_server_name"], T5),
        (vec!["/delay_id"], T6),
        (vec!["/delay_timeout"], T6),
        (vec!["/delay_id", "/delay_timeout"], T6),
    ] {
        for value in [None, Some(Value::Null)] {
            let bad = pointers
                .iter()
                .fold(body.clone(), |body, pointer| with(&body, pointer, value.clone()));
            scene.service.post(ROUTE, &bad).assert_error(400, "M_BAD_JSON", text);
        }
    }
    for text in ["[]", "nonsense", "5", "\"x\"", "{", ""] {
        scene
            .service
            .call(&Call::post(ROUTE, text))
            .assert_error(400, "M_NOT_JSON", "Error reading request");
    }
    scene
        .service
        .post(ROUTE, &with(&body, "/delay_id", Some(json!(5))))
        .assert_errcode(400, "M_BAD_JSON");
    assert_eq!(scene.home.http.requests().len(), 0);
    assert_eq!(scene.api.http.requests().len(), 0);
    assert_eq!(scene.sfu.http.count(|r| r.path.ends_with("Participant")), 0);
}

#[test]
fn other_methods_are_refused() {
    let scene = shared();
    for method in ["GET", "PUT", "DELETE", "PATCH"] {
        scene.service.call(&Call::new(method, ROUTE)).assert_errcode(405, "M_UNRECOGNIZED");
    }
}

#[test]
fn only_full_access_users_may_delegate() {
    let world = World::shared();
    let restricted = |body: Value| with(&with(&body, "/delay_id", Some(json!("syd_1"))), "/delay_timeout", Some(json!(HOUR)));
    let room = unique_room();
    let body = delegate_of(&world.away, "eve", &room, "syd_1", HOUR);
    world.service.post(ROUTE, &body).assert_error(403, "M_FORBIDDEN", NOT_FOR_YOU);
    for (path, body) in [
        ("/get_token", get_token_of(&world.away, "eve", &room)),
        ("/sfu/get", sfu_get_of(&world.away, "eve", &room)),
    ] {
        world
            .service
            .post(path, &restricted(body))
            .assert_error(400, "M_BAD_JSON", NOT_FOR_YOU);
    }
    assert_eq!(world.away.http.count(|r| r.path == CLIENT_WELL_KNOWN), 0);
}

#[test]
fn somebody_elses_token_is_refused() {
    let scene = shared();
    let body = good(&scene);
    for bad in [
        with(&body, "/member/claimed_user_id", Some(json!(scene.home.user("bob")))),
        with(&body, "/openid_token/access_token", Some(json!("unknown"))),
        with(&body, "/openid_token/matrix_server_name", Some(json!("not a name"))),
    ] {
        scene
            .service
            .post(ROUTE, &bad)
            .assert_error(401, "M_UNAUTHORIZED", "The request could not be authorised.");
    }
}

/// A homeserver without a file says no for good: nothing is tried again, no room is opened, no call is held up.
#[test]
fn without_a_client_server_api_nothing_begins() {
    let world = World::new();
    let event = |body: Value| with(&with(&body, "/delay_id", Some(json!("syd_1"))), "/delay_timeout", Some(json!(HOUR)));
    for (path, body) in [
        (ROUTE, get_token_of(&world.home, "alice", &unique_room())),
        ("/get_token", get_token_of(&world.home, "alice", &unique_room())),
        ("/sfu/get", sfu_get_of(&world.home, "alice", &unique_room())),
    ] {
        let answer = world.service.post(path, &event(body));
        answer.assert_error(400, "M_BAD_JSON", NO_API);
        assert!(answer.took < Duration::from_secs(5), "{path} took {:?}", answer.took);
    }
    assert!(world.home.http.count(|r| r.path == CLIENT_WELL_KNOWN) >= 1);
    assert_eq!(world.sfu.creations(), 0);
}

/// Table 3.4: who is asked, in which order, and never the delayed event itself.
#[test]
fn a_token_with_a_delegation_asks_in_order() {
    let world = World::new();
    let api = ClientApi::start();
    world
        .home
        .answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": format!("{}/", api.url())}})));
    for (n, (path, body)) in [
        ("/get_token", get_token_of(&world.home, "alice", &unique_room())),
        ("/sfu/get", sfu_get_of(&world.home, "alice", &unique_room())),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("syd_{}", unique());
        let body = with(&with(&body, "/delay_id", Some(json!(id))), "/delay_timeout", Some(json!(HOUR)));
        let body = with(&body, "/delay_cs_api_url", Some(json!("https://ignored.example.org")));
        let answer = world.service.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(!answer.field("jwt").is_empty());
        let last = |requests: Vec<Request>, path: &str| {
            let mine = requests.into_iter().rev().find(|r| r.path.ends_with(path));
            mine.unwrap_or_else(|| panic!("{path} was not asked")).at
        };
        let userinfo = last(world.home.http.requests(), USERINFO);
        let well_known = last(world.home.http.requests(), CLIENT_WELL_KNOWN);
        let room = last(world.sfu.http.requests(), "/CreateRoom");
        assert!(userinfo < room && well_known < room);
        // The second request finds the address in the cache.
        assert!(n > 0 || userinfo < well_known);
        assert_eq!((world.home.asked(), world.sfu.creations()), (n + 1, n + 1));
        assert_eq!(api.calls(&id), []);
        wait_until("the participant to be looked for", TIMEOUT, || {
            world.sfu.http.count(|r| r.path.ends_with("/GetParticipant")) > n
        });
    }
    assert_eq!(world.home.http.count(|r| r.path == CLIENT_WELL_KNOWN), 1);
    assert_eq!(world.sfu.complaints(), [""; 0]);
}

#[test]
fn a_room_that_cannot_be_opened_delegates_nothing() {
    let scene = Scene::new();
    scene.sfu.fail(Some(Fault::NoGrant));
    let body = delegate_of(&scene.home, "alice", &scene.room, &scene.delay_id, 1_000);
    scene.service.post("/get_token", &body).assert_errcode(500, "M_UNKNOWN");
    scene.sfu.fail(None);
    // A job of one second would have tried to send by now.
    scene.delegate_as("later", Duration::from_millis(1_500));
    wait_until("the later one to be sent", TIMEOUT, || scene.api.count("send", "later") == 1);
    assert_eq!(scene.api.calls(&scene.delay_id), []);
}

#[test]
fn every_delay_has_a_clear_answer() {
    let scene = shared();
    let body = good(&scene);
    for (timeout, expected) in [
        ("0", Err(T6)),
        ("-1", Err(T6)),
        ("null", Err(T6)),
        ("1", Ok(())),
        ("\"3600000\"", Ok(())),
        ("3600000.0", Ok(())),
        ("86400000", Ok(())),
        ("86400001", Err("")),
        ("9007199254740992", Err("")),
        ("9223372036854775807", Err("")),
        ("9223372036854775808", Err("")),
        ("1e300", Err("")),
        ("\"soon\"", Err("")),
        ("true", Err("")),
        ("[]", Err("")),
        ("0.5", Err("")),
    ] {
        let template = with(&body, "/delay_timeout", Some(json!("TIMEOUT"))).to_string();
        let text = template.replace("\"TIMEOUT\"", timeout);
        let answer = scene.service.call(&Call::post(ROUTE, text));
        match expected {
            Ok(()) => assert_eq!(answer.status, 200, "{timeout}: {}", answer.text()),
            Err("") => answer.assert_errcode(400, "M_BAD_JSON"),
            Err(text) => answer.assert_error(400, "M_BAD_JSON", text),
        }
    }
}

#[test]
fn a_delay_id_reaches_no_other_path() {
    let scene = Scene::new();
    let long = "x".repeat(255);
    for (id, raw) in [
        ("a/b", Some("a%2Fb")),
        ("../../admin", Some("..%2F..%2Fadmin")),
        ("%2e", Some("%252e")),
        ("%2e%2e", Some("%252e%252e")),
        ("%2F..%2F", Some("%252F..%252F")),
        ("a?b=c", Some("a%3Fb%3Dc")),
        ("a#b", Some("a%23b")),
        ("a b", Some("a%20b")),
        ("a\r\nX-Evil: b", Some("a%0D%0AX-Evil%3A%20b")),
        ("\\..\\", Some("%5C..%5C")),
        ("é", Some("%C3%A9")),
        ("\u{0}", Some("%00")),
        ("...", Some("...")),
        (&long, Some(&long)),
        (".", None),
        ("..", None),
    ] {
        let body = delegate_of(&scene.home, "alice", &unique_room(), id, 300);
        let answer = scene.service.post(ROUTE, &body);
        let Some(raw) = raw else {
            answer.assert_errcode(400, "M_BAD_JSON");
            continue;
        };
        assert_eq!(answer.status, 200, "{id:?}: {}", answer.text());
        wait_until(&format!("{id:?} to be sent"), TIMEOUT, || scene.api.count("send", raw) == 1);
        let target = format!("{UNSTABLE}{raw}/send");
        // The fake notes a request when it has decided on the answer.
        wait_until(&format!("{target} to be noted"), TIMEOUT, || {
            scene.api.http.count(|r| r.target == target) == 1
        });
    }
    let body = delegate_of(&scene.home, "alice", &unique_room(), &"x".repeat(64 * 1024), 300);
    scene.service.post(ROUTE, &body).assert_errcode(413, "M_TOO_LARGE");
    let body = delegate_of(&scene.home, "alice", &unique_room(), &"x".repeat(32 * 1024), 300);
    scene.service.post(ROUTE, &body).assert_errcode(400, "M_BAD_JSON");
    assert_eq!(scene.api.strays(), [""; 0]);
}

/// Decision L8: a record takes at most 2 KiB as it is stored, where one character may be six.
#[test]
fn names_that_are_too_long_together_are_refused_on_every_route() {
    let scene = Scene::new();
    let long = "<".repeat(255);
    let delegation = delegate_of(&scene.home, "alice", &unique_room(), &long, HOUR);
    let mut legacy = sfu_get_of(&scene.home, "alice", &unique_room());
    legacy["device_id"] = json!(long);
    legacy["delay_id"] = json!("syd_1");
    legacy["delay_timeout"] = json!(HOUR);
    for (route, body) in [(ROUTE, &delegation), ("/get_token", &delegation), ("/sfu/get", &legacy)] {
        let answer = scene.service.post(route, body);
        answer.assert_error(400, "M_BAD_JSON", "The request body has a field that is too long");
    }
    assert_eq!(scene.sfu.creations(), 0, "nothing was done before");
    // Without the delay the call goes on.
    legacy.as_object_mut().unwrap().remove("delay_id");
    legacy.as_object_mut().unwrap().remove("delay_timeout");
    assert_eq!(scene.service.post("/sfu/get", &legacy).status, 200);
}

/// Element Call then asks again without the delay; others hear that there are too many.
#[test]
fn a_user_may_have_a_hundred() {
    let scene = Scene::new();
    let calls: Vec<_> = (0..100)
        .map(|n| Call::json(ROUTE, &delegate_of(&scene.home, "alice", &unique_room(), &format!("syd_{n}"), HOUR)))
        .collect();
    assert!(scene.service.flood(&calls, 8).iter().all(|a| a.status == 200));
    let one_more = delegate_of(&scene.home, "alice", &unique_room(), "one_more", HOUR);
    let answer = scene.service.post(ROUTE, &one_more);
    answer.assert_errcode(429, "M_LIMIT_EXCEEDED");
    let seconds: u64 = answer.header("retry-after").and_then(|s| s.parse().ok()).expect("Retry-After");
    assert_eq!(answer.json()["retry_after_ms"], seconds * 1000);
    let rooms = scene.sfu.creations();
    for path in ["/get_token", "/sfu/get"] {
        let body = delegate_of(&scene.home, "alice", &unique_room(), "one_more", HOUR);
        scene.service.post(path, &body).assert_errcode(400, "M_BAD_JSON");
    }
    assert_eq!(scene.sfu.creations(), rooms, "a room was opened for somebody who was refused");
    // Another user may, and so may the same one again for a room that has a job.
    scene
        .service
        .post(ROUTE, &delegate_of(&scene.home, "bob", &unique_room(), "syd_1", HOUR));
    let again = &calls[0];
    assert_eq!(scene.service.call(again).status, 200);
}

/// T7a: what may pass is waited for.
#[test]
fn a_well_known_file_that_fails_for_a_moment_is_asked_for_again() {
    let world = World::new();
    world.home.answer_client_well_known(Reply::json(503, &json!({})));
    let body = delegate_of(&world.home, "alice", &unique_room(), "syd_1", HOUR);
    let request = world.service.begin(&Call::json(ROUTE, &body));
    let asked = |home: &Homeserver| home.http.count(|r| r.path == CLIENT_WELL_KNOWN);
    wait_until("the file to be asked for", TIMEOUT, || asked(&world.home) >= 2);
    world
        .home
        .answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": "https://localhost:1"}})));
    let began = Instant::now();
    let answer = request.join().expect("the request").expect("an answer");
    assert_eq!(answer.status, 200, "{} after {:?}", answer.text(), began.elapsed());
}

/// What counts is when a request arrived, not when its checks ended (L14).
#[test]
fn an_earlier_request_that_takes_longer_does_not_replace_a_later_one() {
    let scene = Scene::new();
    let slow = Reply::json(200, &json!({ "sub": scene.home.user("alice") })).after(Duration::from_secs(3));
    let body = delegate_of(&scene.home, "alice", &scene.room, "earlier", 20_000);
    let body = with(&body, "/openid_token/access_token", Some(json!(scene.home.token_with(slow))));
    let earlier = scene.service.begin(&Call::json(ROUTE, &body));
    wait_until("the earlier one to be checked", TIMEOUT, || scene.home.asked() == 1);
    scene.delegate(Duration::from_secs(4));
    let session = scene.joined();
    assert_eq!(earlier.join().expect("the request").expect("an answer").status, 200);
    wait_until("its event to be cancelled", TIMEOUT, || scene.api.count("cancel", "earlier") == 1);
    let restarts = scene.restarts().len();
    scene.wait_restarts(restarts + 2);
    assert_eq!(scene.api.calls("earlier").len(), 1);
    assert_eq!(scene.api.count("cancel", &scene.delay_id), 0);
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

/// Only the delegation cannot be taken any more: Element Call asks again without it.
#[test]
fn at_the_end_a_token_is_not_refused_for_its_delegation() {
    for (path, status, errcode) in [
        ("/get_token", 400, "M_BAD_JSON"),
        ("/sfu/get", 400, "M_BAD_JSON"),
        (ROUTE, 503, "M_UNKNOWN"),
    ] {
        let world = World::new();
        let slow = Reply::json(200, &json!({ "sub": world.home.user("alice") })).after(Duration::from_secs(2));
        let body = match path {
            "/sfu/get" => sfu_get_of(&world.home, "alice", &unique_room()),
            _ => get_token_of(&world.home, "alice", &unique_room()),
        };
        let body = with(&body, "/openid_token/access_token", Some(json!(world.home.token_with(slow))));
        let body = with(&with(&body, "/delay_id", Some(json!("syd_1"))), "/delay_timeout", Some(json!(HOUR)));
        let request = world.service.begin(&Call::json(path, &body));
        wait_until("the token to be checked", TIMEOUT, || world.home.asked() == 1);
        world.service.signal("TERM");
        let answer = request.join().expect("the request").expect("an answer");
        answer.assert_errcode(status, errcode);
        assert_eq!(world.sfu.creations(), 0);
        world.service.wait_exit(Duration::from_secs(20));
    }
}

/// O5: an address that a stranger's file names is guarded like any other.
#[test]
fn a_client_server_api_at_a_private_address_is_never_dialled() {
    let (sfu, home, api) = (Sfu::start(), Homeserver::start(), ClientApi::start());
    home.answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": api.url()}})));
    let service = Setup::new(&sfu)
        .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*")
        .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", &format!("{}/32", home.http.address().ip()))
        .start();
    let body = delegate_of(&home, "alice", &unique_room(), "syd_1", 1_000);
    let answer = service.post(ROUTE, &body);
    answer.assert_error(400, "M_BAD_JSON", NO_API);
    service.wait_line_of(&answer).says(&["WARN", "LIVEKIT_FEDERATION_ALLOWED_NETWORKS"]);
    assert_eq!(api.http.connections().len(), 0);
}

/// It would be kept for a day, for each of thousands of homeservers.
#[test]
fn a_client_server_api_with_an_address_without_end_is_not_kept() {
    let world = World::new();
    let base_url = |bytes: usize| format!("https://localhost:1/{}", "x".repeat(bytes - 20));
    for (bytes, status) in [(40_000, 400), (2_049, 400), (2_048, 200)] {
        world
            .home
            .answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": base_url(bytes)}})));
        let body = delegate_of(&world.home, "alice", &unique_room(), "syd_1", HOUR);
        // A failure is believed for a moment.
        wait_until("the file to be read", TIMEOUT, || {
            let answer = world.service.post(ROUTE, &body);
            let is_refused = answer.status == 400;
            if is_refused {
                world.service.wait_line_of(&answer).says(&["its address is too long"]);
            }
            answer.status == status
        });
    }
}

/// B21: an http address that only leads to https on the same host is that one; nobody is followed anywhere else.
#[test]
fn an_http_address_that_leads_to_https_is_followed_once() {
    let (sfu, api, other) = (Sfu::start(), ClientApi::start_with_tls(), ClientApi::start_with_tls());
    let service = Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*").start();
    for (to, followed) in [(&api, true), (&other, false)] {
        let to = format!("https://{}", to.http.address());
        let redirect = move |request: &Request| Reply::redirect(308, &format!("{to}{}", request.target));
        let plain = Neighbour::start((api.http.address().ip(), 0).into(), None, redirect);
        let base = format!("http://{}", plain.address());
        let home = Homeserver::start();
        home.answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": base}})));
        let id = format!("syd_{}", unique());
        let answer = service.post(ROUTE, &delegate_of(&home, "alice", &unique_room(), &id, 5_000));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let asked = || plain.count(|r| r.path != VERSIONS);
        wait_until("the event to be restarted", Duration::from_secs(10), || {
            asked() + api.count("restart", &id) > 0
        });
        assert_eq!((asked() == 0, api.count("restart", &id) > 0), (followed, followed));
    }
    assert_eq!(other.http.connections().len(), 0);
}
