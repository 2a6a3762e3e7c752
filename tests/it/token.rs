//! The LiveKit token in the answer: signature, claims, and the form that browsers can read.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::Answer;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::sfu::Sfu;
use crate::support::unique_room;
use crate::support::world::World;

fn jwt(answer: &Answer, sfu: &Sfu) -> Jwt {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let jwt = Jwt::decode(&answer.field("jwt")).expect("a JWT");
    assert!(jwt.is_signed_with(sfu.secret()), "the signature does not verify");
    jwt
}

/// Without the members that a LiveKit server takes as unset, which `livekit-api` writes all the same.
fn significant(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let kept = members.iter().map(|(name, value)| (name.clone(), significant(value)));
            Value::Object(kept.filter(|(_, value)| !is_unset(value)).collect())
        }
        plain @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => plain.clone(),
    }
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_secs()
        .cast_signed()
}

/// The claims of a token for everybody, its times checked and taken out.
fn timeless(jwt: &Jwt, lifetime: i64) -> Value {
    let mut claims = significant(&jwt.claims);
    let object = claims.as_object_mut().expect("an object");
    let exp = object.remove("exp").and_then(|v| v.as_i64()).expect("exp");
    let nbf = object.remove("nbf").and_then(|v| v.as_i64()).expect("nbf");
    assert!((exp - now() - lifetime).abs() <= 5, "exp is {} s away, not {lifetime}", exp - now());
    // Caches of LiveKit's SDKs allow no clock behind ours (decision T5).
    assert!((nbf - now() + 60).abs() <= 5, "nbf is {} s away, not -60", nbf - now());
    claims
}

#[test]
fn it_grants_exactly_what_a_call_needs_to_full_and_restricted_users_alike() {
    let world = World::shared();
    for homeserver in [&world.home, &world.away] {
        let room = unique_room();
        let token = jwt(
            &world.service.post("/get_token", &bodies::get_token_of(homeserver, "alice", &room)),
            &world.sfu,
        );
        assert_eq!((&token.header["alg"], &token.header["typ"]), (&json!("HS256"), &json!("JWT")));
        let video = json!({
            "roomJoin": true, "room": alias(&room, SLOT), "canPublish": true, "canSubscribe": true, "canPublishData": true,
            "canUpdateOwnMetadata": true,
        });
        let expected = json!({"iss": world.sfu.key(), "sub": identity(&homeserver.user("alice"), "DEVICE", "member1"), "video": video});
        assert_eq!(timeless(&token, 3600), expected);
        let room = unique_room();
        let legacy = jwt(
            &world.service.post("/sfu/get", &bodies::sfu_get_of(homeserver, "alice", &room)),
            &world.sfu,
        );
        let mut expected = expected;
        expected["sub"] = json!(format!("{}:DEVICE", homeserver.user("alice")));
        expected["video"]["room"] = json!(alias(&room, SLOT));
        assert_eq!(timeless(&legacy, 3600), expected);
    }
}

#[test]
fn its_lifetime_can_be_set() {
    for (seconds, lifetime) in [("60", 60), ("120", 120), ("86400", 86_400), (" 600\n", 600), ("", 3600)] {
        let world = World::with(|setup| setup.env("LIVEKIT_JWT_TTL_SECONDS", seconds));
        timeless(
            &jwt(
                &world
                    .service
                    .post("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room())),
                &world.sfu,
            ),
            lifetime,
        );
    }
}

#[test]
fn metadata_can_be_withheld() {
    let world = World::with(|setup| setup.env("LIVEKIT_CAN_UPDATE_OWN_METADATA", "false"));
    for homeserver in [&world.home, &world.away] {
        let token = jwt(
            &world
                .service
                .post("/get_token", &bodies::get_token_of(homeserver, "alice", &unique_room())),
            &world.sfu,
        );
        assert_ne!(token.claims["video"]["canUpdateOwnMetadata"], true);
        assert_eq!(token.claims["video"]["canPublish"], true);
    }
}

#[test]
fn publishing_can_be_kept_to_some_servers() {
    let guest = Homeserver::start();
    let named = World::with(|setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", &guest.name));
    let everybody = World::with(|setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "*"));
    let cases = [
        (&named, &named.home, true),
        (&named, &guest, true),
        (&named, &named.away, false),
        (&everybody, &everybody.away, true),
    ];
    for (world, homeserver, may) in cases {
        let bodies = [
            ("/get_token", bodies::get_token_of(homeserver, "alice", &unique_room())),
            ("/sfu/get", bodies::sfu_get_of(homeserver, "alice", &unique_room())),
        ];
        for (path, body) in bodies {
            let video = jwt(&world.service.post(path, &body), &world.sfu).claims["video"].clone();
            // Absent would mean yes to the SFU.
            assert_eq!(
                (&video["canPublish"], &video["canPublishData"]),
                (&json!(may), &json!(may)),
                "{}",
                homeserver.name
            );
            assert_eq!((&video["canSubscribe"], &video["roomJoin"]), (&json!(true), &json!(true)));
        }
    }
}

/// `standalone.md` section 5, in the plain form of decision T4.
#[test]
fn aliases_are_those_of_the_vectors() {
    let world = World::shared();
    let vectors = [
        (
            "!roomid:example.com",
            "slot1234",
            Some("O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
        ),
        (
            "!room:example.com",
            "m.call#ROOM",
            Some("krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs"),
        ),
        ("!r:x", "m.call#ROOM", Some("pRFzEPtSfqdKIzEf0NCR8PiABfxPTGTxjJq8B7Y6NS4")),
        (
            "!a\u{fffd}b\u{fffd}:x",
            "m.call#ROOM",
            Some("zqoXFrhuzjhY05gcyTEVNf6DCroEp5poFwQH+j4ufgo"),
        ),
        ("!é😀:x", "m.call#ROOM", Some("rmKuWCH36l1AX88q0aWVIAgFOu5OlHwOu3nuNeFrwzo")),
        // Go escapes these five characters; we do not.
        ("!a<b>&c:x", "m.call#ROOM", None),
        ("!a\u{2028}\u{2029}b:x", "m.call#ROOM", None),
        (
            "a\"b\\c/d",
            "\u{8}\u{c}\n\r\t\0\u{1f}\u{7f}",
            Some("V48XcqIsLG/EmqYLAUmG95qc5aorKrrkhTJHvQIexII"),
        ),
    ];
    for (room, slot, vector) in vectors {
        let body = with(&bodies::get_token_of(&world.home, "alice", room), "/slot_id", Some(json!(slot)));
        let claims = jwt(&world.service.post("/get_token", &body), &world.sfu).claims;
        assert_eq!(claims["video"]["room"], alias(room, slot), "{room:?} {slot:?}");
        if let Some(vector) = vector {
            assert_eq!(claims["video"]["room"], vector, "{room:?} {slot:?}");
        }
    }
    let go = [
        "cDgj1jylvCeyef74HWx13+FSLF10XfvuYRpmcnfWSoo",
        "rFvjx9ds90Oqu9ngmrLOHZADg9LmWQovZkhHjYqPkTM",
    ];
    assert!(!go.contains(&alias("!a<b>&c:x", SLOT).as_str()) && !go.contains(&alias("!a\u{2028}\u{2029}b:x", SLOT).as_str()));
}

#[test]
fn identities_are_hashes_of_user_device_and_member() {
    assert_eq!(
        identity("@alice:example.com", "DEVICE123", "memberABC"),
        "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
    );
    let world = World::shared();
    for (localpart, device, member) in [
        ("alice", "DEVICE123", "memberABC"),
        ("alice", "~?>\u{7f}", "82a10a4a-35ba-4447-bdc8-46980f35fb73"),
        ("älice", "<&>\u{2028}", "\"\\/"),
        ("a", "😀", "@a:x:y"),
    ] {
        let mut body = bodies::get_token_of(&world.home, localpart, &unique_room());
        body["member"]["id"] = json!(member);
        body["member"]["claimed_device_id"] = json!(device);
        let claims = jwt(&world.service.post("/get_token", &body), &world.sfu).claims;
        assert_eq!(claims["sub"], identity(&world.home.user(localpart), device, member));
    }
}

/// Element Call runs `atob` on the raw segment, which knows neither `-` nor `_` (decision T5). Where a character falls within its
/// group of three bytes decides whether one of them appears.
#[test]
fn a_browser_can_read_the_payload_whatever_the_device_is_called() {
    let world = World::shared();
    let odd = [
        "~",
        "?",
        ">",
        "\u{7f}",
        "~~~",
        "???",
        ">>>",
        "é",
        "ÿ",
        "\u{7ff}",
        "\u{fff}",
        "\u{ffff}",
        "😀",
        "\u{10ffff}",
        "\u{2028}",
        "a~b?c>d\u{7f}e😀f",
    ];
    for text in odd {
        for offset in 0..=3 {
            let device = format!("{}{text}", "D".repeat(offset));
            let body = with(
                &bodies::sfu_get_of(&world.home, "alice", &unique_room()),
                "/device_id",
                Some(json!(device)),
            );
            let token = jwt(&world.service.post("/sfu/get", &body), &world.sfu);
            assert_eq!(token.claims["sub"], format!("{}:{device}", world.home.user("alice")));
            assert!(!token.payload.contains(['-', '_']), "device {device:?}: {}", token.payload);
        }
    }
    for localpart in ["~", "a~", "ab~", "é", "aé", "abé", "?>"] {
        let token = jwt(
            &world
                .service
                .post("/sfu/get", &bodies::sfu_get_of(&world.home, localpart, &unique_room())),
            &world.sfu,
        );
        assert!(!token.payload.contains(['-', '_']), "user {localpart:?}: {}", token.payload);
    }
}

#[test]
fn the_url_is_echoed_as_it_was_given() {
    let sfu = Sfu::below("/livekit/sfu");
    let home = Homeserver::start();
    let api = format!("http://{}/livekit/sfu", sfu.http.address());
    for url in [
        "wss://sfu.example.org",
        "wss://sfu.example.org/",
        "wss://sfu.example.org/livekit/sfu",
        "ws://sfu.example.org:7880/livekit/sfu/",
        "https://SFU.example.org:443/a?b=c&d=<e>",
        "http://[::1]:7880",
    ] {
        let setup = crate::support::service::Setup::new(&sfu)
            .full_access(&[&home])
            .env("LIVEKIT_API_URL", &api);
        let service = setup.env("LIVEKIT_URL", &format!(" {url}\n")).start();
        let answer = service.post("/sfu/get", &bodies::sfu_get_of(&home, "alice", &unique_room()));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.field("url"), url);
    }
}
