//! `/sfu/get`: the legacy body, and the body of `/get_token` (decision H6).

use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::Answer;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::jwt::Jwt;
use crate::support::unique_room;
use crate::support::world::World;

const ROOM: &str = "Missing room parameter";
const OPENID: &str = "Missing OpenID token parameters";
const T6: &str = "The request body is missing `delay_id` or `delay_timeout`";

fn claims(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    Jwt::decode(&answer.field("jwt")).expect("a JWT").claims
}

#[test]
fn every_missing_field_has_its_text_and_no_neighbour_hears_of_it() {
    let world = World::shared();
    let fields = [
        ("/room", ROOM),
        ("/openid_token", OPENID),
        ("/openid_token/access_token", OPENID),
        ("/openid_token/matrix_server_name", OPENID),
    ];
    for (pointer, text) in fields {
        let empty = if pointer == "/openid_token" { json!({}) } else { json!("") };
        for value in [None, Some(Value::Null), Some(empty)] {
            let (token, room) = (world.home.token("alice"), unique_room());
            let good = bodies::sfu_get(&room, &world.home.name, &token);
            world
                .service
                .post("/sfu/get", &with(&good, pointer, value))
                .assert_error(400, "M_BAD_JSON", text);
            assert_eq!(world.home.asked_about(&token), 0, "{pointer}: userinfo was asked");
            assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), 0, "{pointer}: a room was created");
        }
    }
    world.service.post("/sfu/get", &json!({})).assert_error(400, "M_BAD_JSON", ROOM);
    world
        .service
        .post("/sfu/get", &json!({"delay_id": "syd_1"}))
        .assert_error(400, "M_BAD_JSON", ROOM);
    world
        .service
        .post("/sfu/get", &json!({"delay_id": "syd_1", "room": "!r:x"}))
        .assert_error(400, "M_BAD_JSON", OPENID);
}

#[test]
fn delays_are_as_on_the_other_route() {
    let world = World::shared();
    for half in [
        json!({"delay_id": "syd_1"}),
        json!({"delay_timeout": 8000}),
        json!({"delay_timeout": "8000"}),
    ] {
        let mut body = bodies::sfu_get_of(&world.home, "alice", &unique_room());
        body.as_object_mut()
            .expect("an object")
            .extend(half.as_object().expect("an object").clone());
        world.service.post("/sfu/get", &body).assert_error(400, "M_BAD_JSON", T6);
    }
    for timeout in [json!(3_600_000), json!("3600000"), json!(3_600_000.0)] {
        let room = unique_room();
        let mut body = bodies::sfu_get_of(&world.home, "alice", &room);
        body["delay_id"] = json!("syd_1");
        body["delay_timeout"] = timeout;
        body["delay_cs_api_url"] = json!("https://example.org");
        world.service.post("/sfu/get", &body).assert_errcode(400, "M_BAD_JSON");
        assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), 0);
    }
}

#[test]
fn a_field_of_the_wrong_type_is_bad_json() {
    let world = World::shared();
    let good = bodies::sfu_get(&unique_room(), &world.home.name, "token");
    for pointer in [
        "/room",
        "/device_id",
        "/openid_token",
        "/openid_token/access_token",
        "/openid_token/matrix_server_name",
    ] {
        // A device that begins like the port of a server name would make its user another homeserver's.
        let odd = (pointer == "/device_id").then(|| json!("8448:DEVICE"));
        for value in [json!(5), json!(true), json!([])].into_iter().chain(odd) {
            let answer = world.service.post("/sfu/get", &with(&good, pointer, Some(value.clone())));
            assert_eq!(
                (answer.status, answer.field("errcode")),
                (400, "M_BAD_JSON".into()),
                "{pointer} = {value}: {}",
                answer.text()
            );
        }
    }
}

#[test]
fn the_identity_is_user_and_device_in_plain_text() {
    let world = World::shared();
    for (device, suffix) in [
        (Some(json!("DEVICE")), "DEVICE"),
        (None, ""),
        (Some(Value::Null), ""),
        (Some(json!("")), ""),
        (Some(json!("a:b c")), "a:b c"),
    ] {
        let room = unique_room();
        let body = with(&bodies::sfu_get_of(&world.home, "alice", &room), "/device_id", device);
        let claims = claims(&world.service.post("/sfu/get", &body));
        assert_eq!(claims["sub"], format!("{}:{suffix}", world.home.user("alice")));
        assert_eq!(claims["video"]["room"], alias(&room, SLOT));
    }
}

#[test]
fn the_other_body_is_understood_too() {
    let world = World::shared();
    let room = unique_room();
    let body = bodies::get_token_of(&world.home, "alice", &room);
    let legacy_route = claims(&world.service.post("/sfu/get", &body));
    assert_eq!(legacy_route["sub"], identity(&world.home.user("alice"), "DEVICE", "member1"));
    assert_eq!(legacy_route["video"]["room"], alias(&room, SLOT));
    // With its checks.
    let body = with(&body, "/member/claimed_user_id", Some(json!(world.home.user("bob"))));
    let answer = world.service.post("/sfu/get", &body);
    answer.assert_error(401, "M_UNAUTHORIZED", "The request could not be authorised.");
    assert_eq!(answer.field("reason"), "user_mismatch");
    world.service.post("/sfu/get", &json!({"room_id": "!r:x"})).assert_error(
        400,
        "M_BAD_JSON",
        "The request body is missing `room_id` or `slot_id`",
    );
}

#[test]
fn calls_to_neighbours_are_those_of_the_table() {
    let world = World::shared();
    let foreign = world.home.token_of(&world.away.user("alice"));
    for (case, homeserver, token, status, rooms) in [
        ("full access", &world.home, world.home.token("alice"), 200, 1),
        ("restricted", &world.away, world.away.token("alice"), 200, 0),
        ("a foreign sub", &world.home, foreign, 401, 0),
    ] {
        let room = unique_room();
        let answer = world.service.post("/sfu/get", &bodies::sfu_get(&room, &homeserver.name, &token));
        assert_eq!(answer.status, status, "{case}: {}", answer.text());
        assert_eq!(homeserver.asked_about(&token), 1, "{case}: userinfo");
        assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), rooms, "{case}: CreateRoom");
    }
}

#[test]
fn success_is_url_and_jwt_and_nothing_else() {
    let world = World::shared();
    let answer = world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()));
    let expected = format!("{{\"url\":\"{}\",\"jwt\":\"{}\"}}\n", world.sfu.url(), answer.field("jwt"));
    assert_eq!(answer.text(), expected);
}
