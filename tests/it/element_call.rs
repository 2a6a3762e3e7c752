//! Every request that a real Element Call 0.26.1 made of a token route, as it was recorded in a browser.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::support::client::Call;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::jwt::Jwt;
use crate::support::unique_room;
use crate::support::world::World;

#[derive(Deserialize)]
struct Row {
    path: String,
    origin: String,
    /// The room of the recorded token, where the recorded service gave one.
    alias: Option<String>,
    /// With `SERVER` and `TOKEN` for the homeserver and the OpenID token.
    body: Value,
}

impl Row {
    /// The request that a user of this world would have made.
    fn body(&self, world: &World) -> Value {
        let text = self.body.to_string().replace("SERVER", &world.home.name);
        let mut body: Value = serde_json::from_str(&text).expect("JSON");
        // The legacy body does not say who asks.
        let user = body["member"]["claimed_user_id"]
            .as_str()
            .map_or_else(|| world.home.user("alice"), str::to_owned);
        body["openid_token"]["access_token"] = world.home.token_of(&user).into();
        body
    }
}

fn rows() -> Vec<Row> {
    include_str!("data/element_call.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row"))
        .collect()
}

fn call(row: &Row, body: &Value) -> Call {
    Call::json(&row.path, body)
        .header("Origin", &row.origin)
        .header("Accept", "*/*")
        .header("Accept-Encoding", "gzip, deflate, br, zstd")
}

#[test]
fn each_gets_the_token_it_got_or_is_asked_to_leave_the_delay_out() {
    let world = World::shared();
    let rows = rows();
    assert_eq!(rows.len(), 93);
    let mut joined = 0;
    for row in &rows {
        let mut body = row.body(&world);
        if body.get("delay_id").is_some() {
            // On this and only this error Element Call asks again without the delay.
            world.service.call(&call(row, &body)).assert_errcode(400, "M_BAD_JSON");
            let object = body.as_object_mut().expect("an object");
            object.retain(|name, _| !name.starts_with("delay_"));
        }
        let answer = world.service.call(&call(row, &body));
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        assert_eq!(answer.field("url"), world.sfu.url());
        let claims = Jwt::decode(&answer.field("jwt")).expect("a JWT").claims;
        let room = body["room"].as_str().or_else(|| body["room_id"].as_str()).expect("a room");
        assert_eq!(claims["video"]["room"], alias(room, SLOT));
        if let Some(recorded) = &row.alias {
            assert_eq!(claims["video"]["room"], recorded.as_str());
            joined += 1;
        }
        let expected = match body["member"].as_object() {
            Some(member) => {
                let part = |name: &str| member[name].as_str().expect("text");
                identity(part("claimed_user_id"), part("claimed_device_id"), part("id"))
            }
            None => format!("{}:{}", world.home.user("alice"), body["device_id"].as_str().expect("a device")),
        };
        assert_eq!(claims["sub"], expected);
    }
    assert!(joined > 60, "the recording lost its aliases");
}

/// What a browser asks before each of them.
#[test]
fn each_preflight_is_answered() {
    let world = World::shared();
    for row in rows() {
        let preflight = Call::new("OPTIONS", &row.path)
            .header("Origin", &row.origin)
            .header("Access-Control-Request-Method", "POST")
            .header("Access-Control-Request-Headers", "content-type");
        let answer = world.service.call(&preflight);
        assert_eq!((answer.status, answer.body.len()), (200, 0));
    }
}

/// The probe: without a body, content type or preflight. 404 would say "unsupported"; without CORS headers it would be a network error.
#[test]
fn the_probe_for_delegation_hears_yes() {
    let world = World::shared();
    for path in [
        "/delegate_delayed_leave",
        "//delegate_delayed_leave",
        "/livekit/jwt/delegate_delayed_leave",
    ] {
        let probe = Call::post(path, "")
            .header("Origin", "http://localhost:28090")
            .header("Accept", "*/*");
        world.service.call(&probe).assert_errcode(400, "M_NOT_JSON");
    }
}

/// The first member of a call asks twice, side by side, each time with a token of its own.
#[test]
fn two_requests_side_by_side_open_one_room() {
    let world: Arc<World> = World::shared();
    for _ in 0..10 {
        let room = unique_room();
        let body = || crate::support::bodies::sfu_get_of(&world.home, "alice", &room);
        let both = [body(), body()].map(|body| world.service.begin(&Call::json("/sfu/get", &body)));
        for answer in both {
            assert_eq!(answer.join().expect("the request").expect("an answer").status, 200);
        }
        let creations = world.sfu.creations_of(&alias(&room, SLOT));
        assert!((1..=2).contains(&creations), "{creations} CreateRoom calls");
    }
}
