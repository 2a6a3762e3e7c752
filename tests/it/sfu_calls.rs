//! What the service asks of the SFU: the CreateRoom call, the path prefix, and when a room is remembered (decisions P7, T6, T6a).

use std::time::Duration;

use livekit_protocol as proto;
use prost::Message;

use crate::support::bodies;
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::service::Setup;
use crate::support::sfu::{RoomShape, Sfu};
use crate::support::unique_room;
use crate::support::world::World;

#[test]
fn create_room_is_the_call_that_livekit_knows() {
    let world = World::new();
    let room = unique_room();
    assert_eq!(
        world
            .service
            .post("/get_token", &bodies::get_token_of(&world.home, "alice", &room))
            .status,
        200
    );
    let requests = world.sfu.http.requests();
    let call = requests
        .iter()
        .find(|r| r.path == "/twirp/livekit.RoomService/CreateRoom")
        .expect("a CreateRoom call");
    let asked = proto::CreateRoomRequest::decode(call.body.as_slice()).expect("protobuf");
    let expected = proto::CreateRoomRequest {
        name: alias(&room, SLOT),
        empty_timeout: 300,
        departure_timeout: 20,
        ..Default::default()
    };
    assert_eq!(asked, expected);
    assert_eq!(world.sfu.rooms(), [alias(&room, SLOT)]);
    assert_eq!(world.sfu.complaints(), Vec::<String>::new());
}

#[test]
fn the_path_prefix_of_the_url_is_kept() {
    let home = Homeserver::start();
    for (prefix, slash) in [("", ""), ("", "/"), ("/livekit/sfu", ""), ("/livekit/sfu", "/"), ("/a/b%20c", "")] {
        let sfu = Sfu::below(prefix);
        let url = format!("{}{slash}", sfu.url());
        let http = url.replacen("ws", "http", 1);
        let public = ("wss://unreachable.example.org/elsewhere", http.as_str());
        for (url, api) in [(url.as_str(), ""), (http.as_str(), ""), public] {
            let setup = Setup::new(&sfu)
                .full_access(&[&home])
                .env("LIVEKIT_URL", url)
                .env("LIVEKIT_API_URL", api);
            let answer = setup.start().post("/sfu/get", &bodies::sfu_get_of(&home, "alice", &unique_room()));
            assert_eq!(answer.status, 200, "{url:?} {api:?}: {}", answer.text());
            assert_eq!(answer.field("url"), url);
        }
        assert_eq!(sfu.complaints(), Vec::<String>::new());
    }
}

/// Asks `times` times for one room of this shape; how many CreateRoom calls were made.
fn creations(shape: RoomShape, dated: bool, times: usize) -> usize {
    let world = World::new();
    world.sfu.shape_rooms(shape);
    if !dated {
        world.sfu.http.without_date();
    }
    let room = unique_room();
    for _ in 0..times {
        assert_eq!(
            world
                .service
                .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &room))
                .status,
            200
        );
    }
    world.sfu.creations_of(&alias(&room, SLOT))
}

#[test]
fn a_room_is_remembered_only_while_the_sfu_cannot_have_closed_it() {
    let shape = |num_participants, departure_timeout, age| RoomShape {
        num_participants,
        departure_timeout,
        age: Duration::from_secs(age),
        ..RoomShape::default()
    };
    // D - 2 s - A for an empty room, D - 7 s for one with somebody in it.
    assert_eq!(creations(shape(0, 20, 0), true, 5), 1, "a fresh empty room");
    assert_eq!(creations(shape(3, 20, 500), true, 5), 1, "a room with somebody in it");
    assert_eq!(creations(shape(0, 20, 19), true, 5), 5, "an empty room that is about to be closed");
    assert_eq!(creations(shape(0, 20, 500), true, 5), 5, "an old empty room");
    assert_eq!(creations(shape(0, 2, 0), true, 5), 5, "a short departure_timeout, empty");
    assert_eq!(creations(shape(1, 7, 0), true, 5), 5, "a short departure_timeout, somebody in it");
    assert_eq!(
        creations(
            RoomShape {
                empty_timeout: 1,
                ..shape(0, 20, 0)
            },
            true,
            5
        ),
        5,
        "a short empty_timeout"
    );
    assert_eq!(creations(shape(0, 20, 0), false, 5), 5, "no Date in the answer");
}

#[test]
fn a_failed_connection_to_the_sfu_forgets_every_room() {
    let world = World::new();
    let (known, other) = (unique_room(), unique_room());
    let ask = |room: &str| world.service.post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", room));
    assert_eq!(ask(&known).status, 200);
    assert_eq!(ask(&known).status, 200);
    assert_eq!(world.sfu.creations_of(&alias(&known, SLOT)), 1);
    world.sfu.http.refuse();
    world.sfu.forget_rooms();
    let waiting = {
        use crate::support::client::Call;
        world
            .service
            .begin(&Call::json("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &other)))
    };
    // The other room's call has met a refusal: nothing but the service has seen it.
    world.service.wait_event("retry");
    world.sfu.http.listen_again();
    assert_eq!(waiting.join().expect("the request").expect("an answer").status, 200);
    assert_eq!(ask(&known).status, 200);
    assert_eq!(
        world.sfu.creations_of(&alias(&known, SLOT)),
        2,
        "a room of before the restart was still remembered"
    );
}
