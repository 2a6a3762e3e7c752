//! The token that a ticket brings, against the real SFU: it joins for a minute, does nothing, and does not stay.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lk_jwt_service::internals::doctor::TicketKey;
use lk_jwt_service::secret::Secret;
use serde_json::{Value, json};

use crate::leave_real::steered::Browser;
use crate::support::client::{self, Call};
use crate::support::jwt::Jwt;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{real_neighbours, say};
use crate::support::service::Service;
use crate::support::{unique, wait_until};

/// How long anybody stays, at the very most.
const LONGEST_STAY: Duration = Duration::from_secs(90);

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

fn service(livekit: &Livekit) -> Service {
    livekit.setup(&["example.org"]).env("LIVEKIT_CHECK_PAGE", "on").start()
}

/// What a new ticket brings, as clients take it; and its room.
fn begin(service: &Service, livekit: &Livekit) -> (Value, String) {
    let jti = format!("ticket-of-a-test-{:016}", unique());
    let ticket = TicketKey::of_links(&Secret::new(livekit.secret())).sign_link(&jti, now(), 600);
    let call = Call::post("/check/token", "").header("Authorization", &format!("Bearer {ticket}"));
    let answer = service.call(&call);
    assert_eq!(answer.status, 200, "{}", answer.text());
    (json!({"url": livekit.url(), "jwt": answer.json()["token"]}), format!("check-{jti}"))
}

/// A token with all rights in that room, and of the operator's API.
fn operator(livekit: &Livekit, room: &str) -> Value {
    let claims = json!({
        "iss": livekit.key(), "sub": "operator", "exp": now() + 600,
        "video": {"roomJoin": true, "room": room, "canPublish": true, "canSubscribe": true, "canPublishData": true},
    });
    json!({"url": livekit.url(), "jwt": Jwt::sign(&claims, livekit.secret())})
}

#[test]
fn the_token_joins_and_does_nothing_else() {
    if !real_neighbours() {
        return;
    }
    let livekit = Livekit::shared();
    let service = service(livekit);
    let (answer, room) = begin(&service, livekit);
    let stands = livekit.room(&room).expect("the room");
    assert_eq!(
        (stands.max_participants, stands.empty_timeout, stands.departure_timeout),
        (2, 60, 20)
    );
    // By the API of the SFU.
    let bearer = format!("Bearer {}", answer["jwt"].as_str().expect("a token"));
    for (method, body) in [
        ("ListRooms", json!({})),
        ("CreateRoom", json!({"name": "another"})),
        ("DeleteRoom", json!({"room": room})),
        ("ListParticipants", json!({"room": room})),
        ("GetParticipant", json!({"room": room, "identity": "lk-jwt-service"})),
        ("RemoveParticipant", json!({"room": room, "identity": "lk-jwt-service"})),
        (
            "UpdateParticipant",
            json!({"room": room, "identity": "lk-jwt-service", "name": "another"}),
        ),
        ("UpdateRoomMetadata", json!({"room": room, "metadata": "another"})),
        ("SendData", json!({"room": room, "data": "aGVsbG8="})),
        (
            "MutePublishedTrack",
            json!({"room": room, "identity": "operator", "track_sid": "x", "muted": true}),
        ),
    ] {
        let call = Call::json(&format!("/twirp/livekit.RoomService/{method}"), &body).header("Authorization", &bearer);
        let status = client::call(livekit.address(), &call).status;
        assert!(matches!(status, 401 | 403), "{method}: {status}");
    }
    // In the room, by a client that does not look at its rights, before the eyes of one who has all.
    let browser = Browser::with("browser/page.js");
    let (watcher, guest) = (browser.open(), browser.open());
    watcher.drive("run", json!({"script": script("watch", &operator(livekit, &room))}));
    let tried = guest.drive("run", json!({"script": script("tryEverything", &answer)}));
    assert_eq!(tried["state"], "connected", "{tried:#}");
    assert_eq!(tried["ice"], "connected", "media had no way: {tried:#}");
    for right in ["publish", "name", "metadata", "attributes"] {
        assert!(tried[right].as_str().is_some_and(|refused| refused != "done"), "{right}: {tried:#}");
    }
    // Data of others comes through, as livekit-server does not ask for that right (1.13.5); there is nobody else in such a room.
    assert_eq!(tried["heard"], 0, "{tried:#}");
    let seen = watcher.drive("run", json!({"script": "watched()"}));
    assert_eq!(seen, json!({"people": [], "tracks": 0, "data": 0}), "{tried:#}");
    say(&format!("the token of a ticket: {tried}"));
}

fn script(name: &str, answer: &Value) -> String {
    format!("{name}({}, {})", answer["url"], answer["jwt"])
}

#[test]
fn nobody_joins_after_the_minute_or_stays_beyond_90_seconds() {
    if !real_neighbours() {
        return;
    }
    let livekit = Livekit::shared();
    let service = service(livekit);
    let (stays, its_room) = begin(&service, livekit);
    let began = Instant::now();
    let (late, other_room) = begin(&service, livekit);
    let (client, identity) = Client::join(&stays);
    assert_eq!(identity, "lk-jwt-service");
    let reason = client.disconnected();
    let stayed = began.elapsed();
    say(&format!("after {stayed:?}: {reason}"));
    assert!(stayed > Duration::from_secs(45) && stayed < LONGEST_STAY, "{stayed:?}");
    wait_until("the rooms to end", Duration::from_secs(10), || {
        livekit.room(&its_room).is_none() && livekit.room(&other_room).is_none()
    });
    // The SFU takes tokens for a minute longer than they say, for clocks that differ: there is no room for them any more.
    for answer in [&late, &stays] {
        say(&format!("after {:?}: {}", began.elapsed(), Client::refused(answer)));
        assert!(livekit.room(&other_room).is_none());
    }
}

#[test]
fn a_stop_ends_the_rooms_and_another_use_ends_the_one_before() {
    if !real_neighbours() {
        return;
    }
    let livekit = Livekit::shared();
    let service = service(livekit);
    let (answer, room) = begin(&service, livekit);
    let first = livekit.room(&room).expect("a room").sid;
    let (client, _) = Client::join(&answer);
    let jti = room.strip_prefix("check-").expect("a name").to_owned();
    let ticket = TicketKey::of_links(&Secret::new(livekit.secret())).sign_link(&jti, now(), 600);
    let again = Call::post("/check/token", "").header("Authorization", &format!("Bearer {ticket}"));
    assert_eq!(service.call(&again).status, 200);
    client.disconnected();
    assert_ne!(livekit.room(&room).expect("another room").sid, first);
    service.signal("TERM");
    service.wait_exit(Duration::from_secs(20));
    assert!(livekit.room(&room).is_none(), "the room outlives the service");
}
