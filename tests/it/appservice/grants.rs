//! What the tokens grant, and to whom.

use serde_json::json;

use super::{Ask, OTHER, Stage};
use crate::support::hashes::{SLOT, alias, homeserver_identity, identity};
use crate::support::jwt::Jwt;
use crate::support::service::Setup;

/// The token grants exactly this, and its room was opened.
#[track_caller]
fn assert_grants(stage: &Stage, ask: &Ask, sub: &str, publishes: bool) {
    let before = stage.creations_in(ask);
    let answer = stage.call(ask);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let jwt = Jwt::decode(&answer.field("jwt")).expect("a JWT");
    assert!(jwt.is_signed_with(stage.sfu.secret()), "the signature does not verify");
    let video = &jwt.claims["video"];
    assert_eq!(
        (jwt.claims["sub"].as_str(), jwt.claims["iss"].as_str()),
        (Some(sub), Some(stage.sfu.key()))
    );
    assert_eq!(video["room"], alias(&ask.room(), SLOT));
    for (grant, expected) in [
        ("roomJoin", true),
        ("canSubscribe", true),
        ("canUpdateOwnMetadata", true),
        ("canPublish", publishes),
        ("canPublishData", publishes),
    ] {
        assert_eq!(video[grant], expected, "{grant} in {video}");
    }
    for grant in [
        "roomCreate",
        "roomAdmin",
        "roomList",
        "roomRecord",
        "hidden",
        "recorder",
        "ingressAdmin",
    ] {
        assert_ne!(video[grant], true, "{grant} in {video}");
    }
    let lifetime = jwt.claims["exp"].as_u64().expect("exp") - jwt.claims["nbf"].as_u64().expect("nbf");
    assert_eq!((lifetime, &jwt.claims["iat"]), (3600 + 60, &serde_json::Value::Null));
    assert_eq!(stage.creations_in(ask) - before, 1, "the room");
}

#[test]
fn our_users_publish_under_a_name_of_two_parts() {
    let stage = Stage::with(|setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "nobody.example.org"));
    let user = stage.own.user("alice");
    let ask = stage.client();
    assert_grants(&stage, &ask, &homeserver_identity(&user, "member1"), true);
    // The flat member counts, and the device only where it is the only one.
    let member = json!({"id": "older", "claimed_device_id": "DEVICE", "claimed_user_id": user});
    let both = stage.client().set("member", member.clone());
    assert_grants(&stage, &both, &homeserver_identity(&user, "member1"), true);
    // A member that names no device is one of two elements, whatever it is called; with one, of three.
    for (member, expected) in [
        (json!({"id": "member1"}), homeserver_identity(&user, "member1")),
        (
            json!({"id": "member1", "claimed_user_id": user}),
            homeserver_identity(&user, "member1"),
        ),
        (json!({"id": "older", "device_id": "DEVICE"}), identity(&user, "DEVICE", "older")),
    ] {
        let ask = stage.client().set("member_id", serde_json::Value::Null).set("member", member);
        assert_grants(&stage, &ask, &expected, true);
    }
    let mut older = stage.client().set("member", member);
    older.body["member_id"] = serde_json::Value::Null;
    assert_grants(&stage, &older, &identity(&user, "DEVICE", "older"), true);
    // The vector that every implementation shares, as far as its shape goes.
    assert_eq!(
        homeserver_identity("@alice:example.com", "memberABC"),
        "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
    );
}

#[test]
fn users_of_other_homeservers_publish_where_they_may() {
    type Change = fn(Setup) -> Setup;
    let cases: [(Change, bool); 5] = [
        (|setup| setup, true),
        (|setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "*"), true),
        (
            |setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "a.example.org,other.example.org"),
            true,
        ),
        (
            |setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "third.example.org"),
            false,
        ),
        (
            |setup| setup.env("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "OTHER.example.org"),
            false,
        ),
    ];
    for (change, publishes) in cases {
        let stage = Stage::with(change);
        let bob = format!("@bob:{OTHER}");
        let ask = stage.federated();
        assert_grants(&stage, &ask, &homeserver_identity(&bob, "member1"), publishes);
        let mut older = stage.federated();
        older.body["member"] = json!({"id": "older", "claimed_device_id": "DEVICE"});
        older.body["member_id"] = serde_json::Value::Null;
        assert_grants(&stage, &older, &identity(&bob, "DEVICE", "older"), publishes);
    }
}

#[test]
fn a_homeserver_is_told_the_token_and_nothing_else() {
    let stage = Stage::new();
    let theirs = stage.call(&stage.federated()).json();
    assert_eq!(theirs.as_object().expect("an object").keys().collect::<Vec<_>>(), ["jwt"]);
    let ours = stage.call(&stage.client()).json();
    assert_eq!(ours.as_object().expect("an object").keys().collect::<Vec<_>>(), ["jwt", "url"]);
    assert_eq!(ours["url"], stage.sfu.url());
}

/// Nothing that a client names can make two participants one.
#[test]
fn seats_are_the_same_for_the_same_request_and_different_for_others() {
    let stage = Stage::new();
    let room = stage.room();
    let sub = |member: &str| {
        let answer = stage.call(&stage.client_in(&room).set("member_id", member));
        Jwt::decode(&answer.field("jwt")).expect("a JWT").claims["sub"].clone()
    };
    assert_eq!(sub("a"), sub("a"));
    assert_ne!(sub("a"), sub("b"));
    assert_ne!(sub("a"), sub("a "));
}
