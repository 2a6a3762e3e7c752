//! `/get_token`: the error table, the order of checks and calls, lenient JSON, and who is asking.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::{Answer, Call};
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::homeserver::{Homeserver, unknown_token};
use crate::support::jwt::Jwt;
use crate::support::neighbour::Reply;
use crate::support::world::World;
use crate::support::{secrets, unique_room};

const T1: &str = "The request body is missing `room_id` or `slot_id`";
const T2: &str = "The request body `member` is missing a `id`, `claimed_user_id` or `claimed_device_id`";
const T4: &str = "The request body `openid_token` is missing a `access_token` or `matrix_server_name`";
const T6: &str = "The request body is missing `delay_id` or `delay_timeout`";
const UNAUTHORISED: &str = "The request could not be authorised.";

/// What is not held takes milliseconds; the rest is for a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(5);

fn claims(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    Jwt::decode(&answer.field("jwt")).expect("a JWT").claims
}

/// Changes to a good body, and the text that each must be refused with. An empty string counts as missing, and so does null.
#[test]
fn every_missing_field_has_its_text_and_no_neighbour_hears_of_it() {
    let world = World::shared();
    let fields = [
        ("/room_id", T1),
        ("/slot_id", T1),
        ("/member", T2),
        ("/member/id", T2),
        ("/member/claimed_user_id", T2),
        ("/member/claimed_device_id", T2),
        ("/openid_token", T4),
        ("/openid_token/access_token", T4),
        ("/openid_token/matrix_server_name", T4),
    ];
    for (pointer, text) in fields {
        let is_object = ["/member", "/openid_token"].contains(&pointer);
        let empty = if is_object { json!({}) } else { json!("") };
        for value in [None, Some(Value::Null), Some(empty)] {
            let (token, room) = (world.home.token("alice"), unique_room());
            let good = bodies::get_token(&room, &world.home.name, &token, &world.home.user("alice"));
            let answer = world.service.post("/get_token", &with(&good, pointer, value.clone()));
            answer.assert_error(400, "M_BAD_JSON", text);
            assert_eq!(world.home.asked_about(&token), 0, "{pointer} {value:?}: userinfo was asked");
            assert_eq!(
                world.sfu.creations_of(&alias(&room, SLOT)),
                0,
                "{pointer} {value:?}: a room was created"
            );
        }
    }
}

#[test]
fn checks_come_in_the_order_of_the_table() {
    let world = World::shared();
    let half = json!({"delay_id": "syd_1"});
    let mut body = half.clone();
    for (additions, text) in [
        (json!({}), T1),
        (json!({"room_id": "!r:x"}), T1),
        (json!({"slot_id": SLOT}), T2),
        (
            json!({"member": {"id": "m", "claimed_user_id": "@a:x", "claimed_device_id": "D"}}),
            T4,
        ),
        (json!({"openid_token": {"access_token": "x", "matrix_server_name": "x"}}), T6),
    ] {
        body.as_object_mut()
            .expect("an object")
            .extend(additions.as_object().expect("an object").clone());
        world.service.post("/get_token", &body).assert_error(400, "M_BAD_JSON", text);
    }
    world.service.post("/get_token", &json!({})).assert_error(400, "M_BAD_JSON", T1);
}

#[test]
fn half_a_delay_pair_is_refused_before_any_call() {
    let world = World::shared();
    let halves = [
        json!({"delay_id": "syd_1"}),
        json!({"delay_timeout": 8000}),
        json!({"delay_timeout": "8000"}),
        json!({"delay_timeout": 8000.0}),
        json!({"delay_id": "syd_1", "delay_timeout": null}),
        json!({"delay_id": null, "delay_timeout": 8000}),
        json!({"delay_id": "", "delay_timeout": 8000}),
        json!({"delay_id": "syd_1", "delay_cs_api_url": "https://example.org"}),
    ];
    for half in halves {
        let token = world.home.token("alice");
        let mut body = bodies::get_token(&unique_room(), &world.home.name, &token, &world.home.user("alice"));
        body.as_object_mut()
            .expect("an object")
            .extend(half.as_object().expect("an object").clone());
        world.service.post("/get_token", &body).assert_error(400, "M_BAD_JSON", T6);
        assert_eq!(world.home.asked_about(&token), 0, "{half}: userinfo was asked");
    }
}

/// Until delegation is built. Element Call asks again without the pair.
#[test]
fn a_request_to_delegate_is_refused_and_opens_no_room() {
    let world = World::shared();
    let pairs = [
        json!({"delay_id": "syd_1", "delay_timeout": 8000}),
        json!({"delay_id": "syd_1", "delay_timeout": "3600000"}),
        json!({"delay_id": "syd_1", "delay_timeout": 3_600_000.0, "delay_cs_api_url": "https://example.org"}),
    ];
    for pair in pairs {
        for homeserver in [&world.home, &world.away] {
            let room = unique_room();
            let mut body = bodies::get_token_of(homeserver, "alice", &room);
            body.as_object_mut()
                .expect("an object")
                .extend(pair.as_object().expect("an object").clone());
            world.service.post("/get_token", &body).assert_errcode(400, "M_BAD_JSON");
            assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), 0, "{pair}: a room was created");
        }
    }
}

#[test]
fn delay_fields_that_ask_for_nothing_change_nothing() {
    let world = World::shared();
    for nothing in [
        json!({"delay_id": null, "delay_timeout": null, "delay_cs_api_url": null}),
        json!({"delay_id": ""}),
        json!({"delay_cs_api_url": "https://example.org"}),
    ] {
        let mut body = bodies::get_token_of(&world.home, "alice", &unique_room());
        body.as_object_mut()
            .expect("an object")
            .extend(nothing.as_object().expect("an object").clone());
        let answer = world.service.post("/get_token", &body);
        assert_eq!(answer.status, 200, "{nothing}: {}", answer.text());
    }
}

#[test]
fn what_is_no_json_object_is_not_json() {
    let world = World::shared();
    let deep = format!("{{\"x\":{}", "[".repeat(20_000));
    let deep_closed = format!("{{\"x\":{}{}}}", "[".repeat(30_000), "]".repeat(30_000));
    let good = bodies::get_token_of(&world.home, "alice", &unique_room()).to_string();
    let truncated = &good[..good.len() - 1];
    let bom = format!("\u{feff}{good}");
    let texts = [
        "",
        " ",
        "\n",
        "[]",
        "\"text\"",
        "5",
        "true",
        "null",
        "{",
        "{]",
        "{'room_id':1}",
        "room=1",
        "{\"room_id\":\"a\nb\"}",
        "{\"room_id\":\"\\x\"}",
        "{\"room_id\":01}",
        "{\"room_id\":NaN}",
        "{\"room_id\":\"a\",}",
        "/* */{}",
        truncated,
        &bom,
        &deep,
        &deep_closed,
    ];
    for path in ["/get_token", "/sfu/get"] {
        for text in texts {
            let answer = world.service.call(&Call::post(path, text));
            let shown = &text[..text.len().min(40)];
            assert_eq!(
                (answer.status, answer.field("errcode")),
                (400, "M_NOT_JSON".into()),
                "{path}: {shown:?}: {}",
                answer.text()
            );
            answer.assert_error(400, "M_NOT_JSON", "Error reading request");
        }
    }
}

#[test]
fn a_field_of_the_wrong_type_is_bad_json() {
    let world = World::shared();
    let good = bodies::get_token(&unique_room(), &world.home.name, "token", &world.home.user("alice"));
    let pointers = [
        "/room_id",
        "/slot_id",
        "/member",
        "/member/id",
        "/member/claimed_user_id",
        "/member/claimed_device_id",
        "/openid_token",
        "/openid_token/access_token",
        "/openid_token/matrix_server_name",
        "/delay_id",
    ];
    for pointer in pointers {
        let is_object = ["/member", "/openid_token"].contains(&pointer);
        let wrong = [json!(5), json!(true), json!([]), if is_object { json!("text") } else { json!({}) }];
        for value in wrong {
            let answer = world.service.post("/get_token", &with(&good, pointer, Some(value.clone())));
            assert_eq!(
                (answer.status, answer.field("errcode")),
                (400, "M_BAD_JSON".into()),
                "{pointer} = {value}: {}",
                answer.text()
            );
            answer.assert_errcode(400, "M_BAD_JSON");
        }
    }
    // Arrays of the right length are no objects either.
    for (pointer, array) in [
        ("/member", json!(["m", "@a:x", "D"])),
        ("/openid_token", json!(["token", "Bearer", "x", 3600])),
    ] {
        world
            .service
            .post("/get_token", &with(&good, pointer, Some(array)))
            .assert_errcode(400, "M_BAD_JSON");
    }
    for timeout in [
        json!("soon"),
        json!([]),
        json!(true),
        json!(1.5),
        json!({}),
        json!(9_223_372_036_854_775_808_u64),
        json!(-1),
        json!(0),
    ] {
        let body = with(&with(&good, "/delay_id", Some(json!("syd_1"))), "/delay_timeout", Some(timeout));
        world.service.post("/get_token", &body).assert_errcode(400, "M_BAD_JSON");
    }
    assert_eq!(world.home.asked_about("token"), 0);
}

#[test]
fn unknown_fields_are_ignored_at_every_depth() {
    let world = World::shared();
    let nested = (0..40).fold(json!(1), |inner, _| json!({ "deeper": [inner] }));
    let unknown = json!({"requested_livekit_grants": {"roomAdmin": true}, "delayed_event_id": "x", "null": null, "list": [1, {"a": "b"}], "nested": nested});
    for pointer in ["", "/openid_token", "/member"] {
        let room = unique_room();
        let mut body = bodies::get_token_of(&world.home, "alice", &room);
        let object = body.pointer_mut(pointer).and_then(Value::as_object_mut).expect("an object");
        object.extend(unknown.as_object().expect("an object").clone());
        assert_eq!(
            claims(&world.service.post("/get_token", &body))["video"]["room"],
            alias(&room, SLOT)
        );
    }
}

#[test]
fn the_token_may_come_as_any_client_sends_it() {
    let world = World::shared();
    let (server, user) = (&world.home.name, world.home.user("alice"));
    let openid = |more: Value| {
        let mut token = json!({"access_token": world.home.token("alice"), "matrix_server_name": server});
        token
            .as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("an object").clone());
        token
    };
    let good = bodies::get_token(&unique_room(), server, "replaced", &user);
    for more in [
        json!({}),
        json!({"expires_in": 3600.0}),
        json!({"expires_in": 3600}),
        json!({"expires_in": null, "token_type": null}),
        json!({"token_type": "Bearer"}),
        json!({"token_type": ""}),
        json!({"expires_in": 3600, "org.example.extra": [1]}),
    ] {
        let answer = world
            .service
            .post("/get_token", &with(&good, "/openid_token", Some(openid(more.clone()))));
        assert_eq!(answer.status, 200, "{more}: {}", answer.text());
    }
    let spelled_out = with(&good, "/openid_token", Some(openid(json!({}))));
    let exponent = spelled_out
        .to_string()
        .replacen("\"openid_token\":{", "\"openid_token\":{\"expires_in\":3.6e3,", 1);
    assert_eq!(world.service.call(&Call::post("/get_token", exponent)).status, 200);
}

#[test]
fn the_content_type_is_ignored() {
    let world = World::shared();
    let types = [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("application/json; charset=latin1"),
        Some("nonsense"),
        Some(""),
    ];
    for content_type in types {
        let body = bodies::get_token_of(&world.home, "alice", &unique_room());
        let mut call = Call::post("/get_token", body.to_string());
        if let Some(content_type) = content_type {
            call = call.header("Content-Type", content_type);
        }
        let answer = world.service.call(&call);
        assert_eq!(answer.status, 200, "{content_type:?}: {}", answer.text());
    }
}

#[test]
fn white_space_around_the_body_is_no_part_of_it() {
    let world = World::shared();
    for (before, after) in [("", "\n"), ("", "\r\n \t"), (" \n", ""), ("\t", "\n\n\n")] {
        let body = bodies::get_token_of(&world.home, "alice", &unique_room());
        let answer = world.service.call(&Call::post("/get_token", format!("{before}{body}{after}")));
        assert_eq!(answer.status, 200, "{before:?} {after:?}: {}", answer.text());
    }
}

#[test]
fn of_a_repeated_key_the_last_one_counts() {
    let world = World::shared();
    let (first, last) = (unique_room(), unique_room());
    let user = world.home.user("alice");
    let token = world.home.token("alice");
    let body = format!(
        r#"{{"room_id":"{first}","member":{{"id":"x","claimed_user_id":"@x:x","claimed_device_id":"x"}},"slot_id":"x","slot_id":"{SLOT}",
            "openid_token":{{"access_token":"x","access_token":"{token}","matrix_server_name":"{server}"}},
            "member":{{"id":"no","id":"M","claimed_user_id":"{user}","claimed_device_id":"D"}},"r\u006fom_id":"{last}"}}"#,
        server = world.home.name,
    );
    let claims = claims(&world.service.call(&Call::post("/get_token", body)));
    assert_eq!(claims["video"]["room"], alias(&last, SLOT));
    assert_eq!(claims["sub"], identity(&user, "D", "M"));
}

/// Each invalid byte becomes one U+FFFD, and so does a lone surrogate (`standalone.md` 2.2).
#[test]
fn broken_text_is_mended_as_it_always_was() {
    let world = World::shared();
    let good = bodies::get_token_of(&world.home, "alice", "ROOM").to_string();
    let place = good.find("ROOM").expect("the room");
    let with_room = |room: &[u8]| [&good.as_bytes()[..place], room, &good.as_bytes()[place + 4..]].concat();
    let cases: [(&[u8], &str); 8] = [
        (b"!a\xffb\xfe:x", "!a\u{fffd}b\u{fffd}:x"),
        (b"!\xe2\x82:x", "!\u{fffd}\u{fffd}:x"),
        (b"!\xf0\x9f\x98:x", "!\u{fffd}\u{fffd}\u{fffd}:x"),
        (b"!\xc3\xa9:x", "!é:x"),
        (b"!\\ud800:x", "!\u{fffd}:x"),
        (b"!\\udc00\\ud800:x", "!\u{fffd}\u{fffd}:x"),
        (b"!\\ud83d\\ude00:x", "!😀:x"),
        (b"!\\u0000:x", "!\0:x"),
    ];
    for (sent, meant) in cases {
        let answer = world.service.call(&Call::post("/get_token", with_room(sent)));
        assert_eq!(answer.status, 200, "{}: {}", sent.escape_ascii(), answer.text());
        assert_eq!(claims(&answer)["video"]["room"], alias(meant, SLOT), "{}", sent.escape_ascii());
    }
}

#[test]
fn success_is_url_and_jwt_and_nothing_else() {
    let world = World::shared();
    let answer = world
        .service
        .post("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room()));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let expected = format!("{{\"url\":\"{}\",\"jwt\":\"{}\"}}\n", world.sfu.url(), answer.field("jwt"));
    assert_eq!(answer.text(), expected);
}

/// The table of `standalone.md` 3.4.
#[test]
fn each_outcome_makes_its_calls_and_no_others() {
    let world = World::shared();
    let (home, away) = (&world.home, &world.away);
    let foreign = home.token_of(&away.user("alice"));
    let unknown = secrets::token();
    let cases = [
        ("full access", home, home.token("alice"), home.user("alice"), 200, 1),
        ("restricted", away, away.token("alice"), away.user("alice"), 200, 0),
        ("a token nobody knows", home, unknown, home.user("alice"), 401, 0),
        ("a foreign sub", home, foreign, home.user("alice"), 401, 0),
        ("another user claimed", home, home.token("alice"), home.user("bob"), 401, 0),
    ];
    for (case, homeserver, token, user, status, rooms) in cases {
        let room = unique_room();
        let answer = world
            .service
            .post("/get_token", &bodies::get_token(&room, &homeserver.name, &token, &user));
        assert_eq!(answer.status, status, "{case}: {}", answer.text());
        assert_eq!(homeserver.asked_about(&token), 1, "{case}: userinfo");
        assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), rooms, "{case}: CreateRoom");
    }
    assert_eq!(world.sfu.complaints(), Vec::<String>::new());
}

#[test]
fn the_token_travels_encoded_and_alone() {
    let world = World::shared();
    let token = world.home.token("alice");
    let body = bodies::get_token(&unique_room(), &world.home.name, &token, &world.home.user("alice"));
    assert_eq!(world.service.post("/get_token", &body).status, 200);
    let request = world
        .home
        .http
        .requests()
        .into_iter()
        .find(|r| r.query("access_token") == Some(&token))
        .expect("the request");
    assert_eq!(request.method, "GET");
    assert_eq!(request.query.len(), 1, "{:?}", request.query);
    assert_eq!(request.header("host"), Some(world.home.name.as_str()));
    assert_eq!(request.header("authorization"), None);
    assert_eq!(request.header("referer"), None);
    assert_eq!(request.connection.sni(), None, "an address is no server name");
    // A token with characters that a query must not hold as they are.
    let odd = format!("{} +&=%#/?\u{e9}", secrets::token());
    let body = bodies::get_token(&unique_room(), &world.home.name, &odd, &world.home.user("alice"));
    world
        .service
        .post("/get_token", &body)
        .assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
    assert_eq!(world.home.asked_about(&odd), 1, "the token did not arrive as it was sent");
}

/// Decision O3. What the homeserver says about the user is believed only if it may say so.
#[test]
fn a_sub_must_be_a_user_of_the_server_that_names_it() {
    let world = World::shared();
    let server = &world.home.name;
    let long = |bytes: usize| format!("@{}:{server}", "a".repeat(bytes - server.len() - 2));
    let bad = [
        format!("@alice:{}", world.away.name),
        "@alice:example.org".into(),
        format!("alice:{server}"),
        format!(":{server}"),
        format!("@:{server}"),
        format!("#alice:{server}"),
        format!("@alice:{server} "),
        format!("@alice:{server}."),
        format!("@alice:{server}:{server}"),
        format!("@alice:x:{server}"),
        format!("@al\0ice:{server}"),
        format!("@alice:{}", server.to_uppercase() + "x"),
        format!("@alice:{}", &server[..server.len() - 1]),
        "@alice".into(),
        "@alice:".into(),
        server.clone(),
        String::new(),
        long(256),
        long(4096),
    ];
    for sub in bad {
        let token = world.home.token_of(&sub);
        // Claimed as it is said, so that only the shape of `sub` can be the reason; but what is too long may not be claimed.
        let claimed = if (1..=255).contains(&sub.len()) {
            sub.clone()
        } else {
            "@x:x".into()
        };
        let answer = world
            .service
            .post("/get_token", &bodies::get_token(&unique_room(), server, &token, &claimed));
        assert_eq!(answer.status, 401, "{sub:?}: {}", answer.text());
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        let legacy = world
            .service
            .post("/sfu/get", &bodies::sfu_get(&unique_room(), server, &world.home.token_of(&sub)));
        legacy.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
    }
    let good = ["@alice", "@Alice", "@a", "@=-_./+", "@ALICE!~?", "@älïce", "@a b", "@#hash", "@1"].map(|l| format!("{l}:{server}"));
    for sub in good.into_iter().chain([long(255)]) {
        let room = unique_room();
        let token = world.home.token_of(&sub);
        let answer = world.service.post("/get_token", &bodies::get_token(&room, server, &token, &sub));
        assert_eq!(claims(&answer)["sub"], identity(&sub, "DEVICE", "member1"), "{sub:?}");
    }
}

#[test]
fn who_is_claimed_must_be_who_it_is() {
    let world = World::shared();
    for claimed in [
        world.home.user("bob"),
        world.home.user("Alice"),
        "alice".into(),
        world.away.user("alice"),
        format!("{} ", world.home.user("alice")),
    ] {
        let token = world.home.token("alice");
        let answer = world
            .service
            .post("/get_token", &bodies::get_token(&unique_room(), &world.home.name, &token, &claimed));
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        assert_eq!(answer.field("reason"), "user_mismatch", "{claimed}");
        assert_eq!(world.home.asked_about(&token), 1);
    }
}

#[test]
fn a_clear_no_of_the_homeserver_is_passed_on_at_once() {
    let world = World::shared();
    let refusals = [
        (unknown_token(), "token_rejected"),
        (Reply::json(401, &json!({"errcode": "M_MISSING_TOKEN"})), "token_rejected"),
        (Reply::json(403, &json!({"errcode": "M_UNKNOWN_TOKEN"})), "token_rejected"),
        // Somebody else's no: a firewall, a challenge, a homeserver that does not federate (decision O3).
        (
            Reply::json(403, &json!({"errcode": "M_FORBIDDEN", "error": "Federation is off"})),
            "homeserver_error",
        ),
        (Reply::text(401, "text/html", "<h1>no</h1>"), "homeserver_error"),
        (Reply::text(403, "text/plain", ""), "homeserver_error"),
        (Reply::json(400, &json!({"errcode": "M_UNRECOGNIZED"})), "homeserver_error"),
    ];
    for homeserver in [&world.home, &world.away] {
        for (refusal, reason) in &refusals {
            let token = homeserver.token_with(refusal.clone());
            let answer = world.service.post(
                "/get_token",
                &bodies::get_token(&unique_room(), &homeserver.name, &token, &homeserver.user("alice")),
            );
            answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
            assert_eq!(answer.field("reason"), *reason, "{refusal:?}");
            // A page may be that of somebody else, who is there now: it is looked again for the homeserver, once (decision O2).
            let is_page = matches!(refusal, Reply::Answer { headers, .. } if headers.iter().any(|(_, value)| value.starts_with("text/")));
            let asked = homeserver.asked_about(&token);
            assert!(
                (1..=if is_page { 2 } else { 1 }).contains(&asked),
                "{refusal:?}: asked {asked} times"
            );
            assert!(answer.took < AT_ONCE, "{refusal:?}: {:?}", answer.took);
        }
    }
}

/// Answers that are neither a yes nor a clear no. Some may be asked again; none may become a token, or a leak.
#[test]
fn nonsense_of_the_homeserver_is_no_identity() {
    let home = Homeserver::start();
    let elsewhere = Homeserver::start();
    let world = World::with(|setup| setup.full_access(&[&home]));
    let sub = home.user("alice");
    let stolen = format!("https://{}/_matrix/federation/v1/openid/userinfo", elsewhere.name);
    elsewhere.answer_userinfo(Some(Reply::json(200, &json!({ "sub": sub }))));
    let nonsense = [
        Reply::json(200, &json!({})),
        Reply::json(200, &json!({ "sub": null })),
        Reply::json(200, &json!({ "sub": 5 })),
        Reply::json(200, &json!({ "sub": [sub] })),
        Reply::json(200, &json!([sub])),
        Reply::json(200, &json!(sub)),
        Reply::text(200, "application/json", ""),
        Reply::text(200, "text/html", "<html>a proxy's page</html>"),
        Reply::text(200, "application/json", "{\"sub\":"),
        Reply::json(404, &json!({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})),
        Reply::json(400, &json!({"sub": sub})),
        Reply::json(201, &json!({"errcode": "M_UNKNOWN"})),
        Reply::redirect(302, &stolen),
        Reply::redirect(307, &stolen),
        Reply::redirect(301, "/elsewhere"),
        Reply::Flood(8 << 20),
        Reply::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{".to_vec()),
    ];
    let before = world.service.rss_kib();
    let waiting: Vec<_> = nonsense
        .iter()
        .map(|reply| {
            let token = home.token_with(reply.clone());
            (
                reply,
                world.service.begin(&Call::json(
                    "/get_token",
                    &bodies::get_token(&unique_room(), &home.name, &token, &sub),
                )),
            )
        })
        .collect();
    for (reply, waiting) in waiting {
        let answer = waiting
            .join()
            .expect("the request")
            .unwrap_or_else(|| panic!("no answer after {reply:?}"));
        assert_eq!(answer.status, 401, "{reply:?}: {}", answer.text());
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        answer.assert_manners();
        assert!(answer.took < Duration::from_secs(12), "{reply:?}: {:?}", answer.took);
    }
    assert_eq!(elsewhere.http.connections().len(), 0, "a redirect of userinfo was followed");
    let grown = world.service.rss_kib().saturating_sub(before);
    assert!(grown < 16 * 1024, "memory grew by {grown} KiB");
}

#[test]
fn members_of_userinfo_that_we_do_not_know_are_ignored() {
    let world = World::shared();
    let sub = world.home.user("alice");
    for reply in [
        json!({"sub": sub, "name": "Alice", "org.example": {"sub": "@eve:x"}}),
        json!({"aud": null, "sub": sub}),
    ] {
        let token = world.home.token_with(Reply::json(200, &reply));
        assert_eq!(
            world
                .service
                .post("/get_token", &bodies::get_token(&unique_room(), &world.home.name, &token, &sub))
                .status,
            200,
            "{reply}"
        );
    }
}

#[test]
fn what_is_no_server_name_is_asked_nothing() {
    let world = World::shared();
    let names = [
        "example org",
        "example.org/path",
        "user@example.org",
        "https://example.org",
        "example.org:",
        "example.org:99999",
        "example.org:-1",
        "::1",
        "[::1",
        "[::1]x",
        "exa\nmple.org",
        "exämple.org",
        ".",
        "example.org#",
        "example.org?x",
        "[127.0.0.1]:8448x",
        "%31%32%37.0.0.1",
        "\0",
        "_._",
        &"a".repeat(300),
        &format!("{}.org", "a.".repeat(2000)),
    ];
    for name in names {
        let answer = world.service.post(
            "/get_token",
            &bodies::get_token(&unique_room(), name, &secrets::token(), "@alice:example.org"),
        );
        assert_eq!(answer.status, 401, "{name:?}: {}", answer.text());
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        assert!(answer.took < AT_ONCE, "{name:?}: {:?}", answer.took);
    }
}

/// A server name is compared as it is written: another spelling of a listed one has no full access (O7).
#[test]
fn full_access_is_for_the_exact_name() {
    let home = Homeserver::builder().certified_for(["localhost"]).start();
    let port = home.http.address().port();
    let world = World::with(|setup| {
        setup
            .full_access(&[&home])
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &format!("LOCALHOST:{port} x.{}", home.name))
    });
    let room = unique_room();
    let answer = world.service.post("/get_token", &bodies::get_token_of(&home, "alice", &room));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(world.sfu.creations(), 0, "a room was created for a server that nobody listed");
}
