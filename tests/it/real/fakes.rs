//! The fakes of all other tests beside the real neighbours: a fake that lies makes every test above it worthless.

use livekit_protocol as proto;
use prost::Message;
use serde_json::json;

use super::{Neighbours, https};
use crate::support::client::{self, Call};
use crate::support::homeserver::{Homeserver, USERINFO};
use crate::support::jwt::Jwt;
use crate::support::runtime;
use crate::support::sfu::Sfu;

#[test]
fn the_fake_sfu_answers_as_the_real_one() {
    let Some(real) = Neighbours::get() else { return };
    let fake = Sfu::start();
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs()).expect("seconds");
    let sides = [
        (real.livekit.address(), real.livekit.key(), real.livekit.secret()),
        (fake.http.address(), fake.key(), fake.secret()),
    ];
    let all = json!({"roomCreate": true, "roomList": true, "roomAdmin": true, "room": "r"});
    let name = |name: &str| {
        proto::CreateRoomRequest {
            name: name.into(),
            ..Default::default()
        }
        .encode_to_vec()
    };
    // What is asked, with which claims (`None`: no token), and how the answer's body is compared.
    let cases = [
        ("CreateRoom", Some(json!({"video": all})), name("r")),
        ("CreateRoom", None, name("r")),
        ("CreateRoom", Some(json!({"video": {"roomList": true}})), name("r")),
        ("CreateRoom", Some(json!({"video": all, "iss": "otherkey"})), name("r")),
        ("CreateRoom", Some(json!({"video": all, "exp": now - 120})), name("r")),
        ("CreateRoom", Some(json!({"video": all, "exp": now - 30})), name("r")),
        ("CreateRoom", Some(json!({"video": all, "nbf": now + 120})), name("r")),
        ("CreateRoom", Some(json!({"video": all})), name(&"x".repeat(257))),
        ("CreateRoom", Some(json!({"video": all})), vec![0xff; 8]),
        ("GetParticipant", Some(json!({"video": all})), name("r")),
        ("ListRooms", Some(json!({"video": all})), Vec::new()),
        ("ListRooms", Some(json!({"video": {"roomCreate": true}})), Vec::new()),
        ("Nope", Some(json!({"video": all})), Vec::new()),
        ("../elsewhere", Some(json!({"video": all})), Vec::new()),
    ];
    for (method, claims, body) in cases {
        let [real, fake] = sides.map(|(address, key, secret)| {
            let mut call = Call::post(&format!("/twirp/livekit.RoomService/{method}"), body.clone());
            if method.starts_with("..") {
                call = Call::post("/livekit/sfu/twirp/livekit.RoomService/CreateRoom", body.clone());
            }
            call = call.header("Content-Type", "application/protobuf");
            let token = claims.as_ref().map(|claims| {
                let mut claims = claims.clone();
                let members = claims.as_object_mut().expect("an object");
                members.entry("iss").or_insert(json!(key));
                members.entry("exp").or_insert(json!(now + 60));
                Jwt::sign(&claims, secret)
            });
            if let Some(token) = &token {
                call = call.header("Authorization", &format!("Bearer {token}"));
            }
            let answer = client::call(address, &call);
            // A room or a list of them is another one on each side.
            let text = if answer.status == 200 { String::new() } else { answer.text() };
            let text = text.replace(token.as_deref().unwrap_or("no token"), "<token>");
            // The order of an object's members says nothing.
            let text = serde_json::from_str(&text).map_or(text, |json: serde_json::Value| json.to_string());
            (answer.status, answer.header("content-type").map(str::to_owned), text)
        });
        assert_eq!(fake, real, "{method} {claims:?}: the fake (left) is not as the real one");
    }
}

#[test]
fn the_fake_homeserver_answers_as_a_real_one() {
    let Some(real) = Neighbours::get() else { return };
    let fake = Homeserver::start();
    let (alice, token) = (real.home.register("alice"), fake.token("alice"));
    let openid = alice.request_token();
    let given = openid["access_token"].as_str().expect("a token");
    let ask = |name: &str, query: &str| {
        let url = format!("https://{name}{USERINFO}{query}");
        let answer = runtime().block_on(async {
            let answer = https().get(&url).send().await.expect("an answer");
            let kind = answer
                .headers()
                .get("content-type")
                .and_then(|v| v.to_str().ok())
                .map(str::to_owned);
            (answer.status().as_u16(), kind, answer.text().await.expect("a body"))
        });
        let body: serde_json::Value = serde_json::from_str(&answer.2).expect("JSON");
        (answer.0, answer.1, body)
    };
    let (good, fake_good) = (
        ask(&real.home.name, &format!("?access_token={given}")),
        ask(&fake.name, &format!("?access_token={token}")),
    );
    assert_eq!(good.2, json!({"sub": alice.id}));
    assert_eq!(fake_good.2, json!({"sub": fake.user("alice")}));
    assert_eq!((fake_good.0, fake_good.1), (good.0, good.1));
    assert_eq!(
        ask(&fake.name, "?access_token=madeup"),
        ask(&real.home.name, "?access_token=madeup")
    );
}
