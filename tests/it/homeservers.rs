//! Connections to homeservers, and who counts as whose (decisions O4 to O6, P4). Discovery over DNS has tests of its own.

use std::time::Duration;

use serde_json::json;

use crate::support::bodies;
use crate::support::client::Call;
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::Reply;
use crate::support::unique_room;
use crate::support::world::World;

fn ask(world: &World, homeserver: &Homeserver) -> crate::support::client::Answer {
    world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(homeserver, "alice", &unique_room()))
}

#[test]
fn connections_are_kept_and_used_again() {
    let world = World::new();
    for homeserver in [&world.home, &world.away] {
        for _ in 0..20 {
            assert_eq!(ask(&world, homeserver).status, 200);
        }
        let connections = homeserver.http.connections().len();
        // A stranger becomes known by its first token, which may change how it is connected to.
        assert!(connections <= 2, "{connections} connections for 20 requests");
    }
    // At the start it is asked at the same time whether the SFU is there and whether rooms come to be by themselves.
    let connections = world.sfu.http.connections().len();
    assert!(connections <= 3, "{connections} connections to the SFU for 20 requests");
}

#[test]
fn a_kept_connection_that_was_closed_costs_nobody_his_answer() {
    let world = World::new();
    for round in 0..10 {
        assert_eq!(ask(&world, &world.home).status, 200, "round {round}");
        assert_eq!(ask(&world, &world.away).status, 200, "round {round}");
        for neighbour in [&world.home.http, &world.away.http, &world.sfu.http] {
            neighbour.refuse();
            neighbour.listen_again();
        }
        let answer = ask(&world, &world.home);
        assert_eq!(answer.status, 200, "round {round}: {}", answer.text());
        assert!(answer.took < Duration::from_secs(2), "round {round}: {:?}", answer.took);
        let answer = ask(&world, &world.away);
        assert_eq!(answer.status, 200, "round {round}: {}", answer.text());
        assert!(answer.took < Duration::from_secs(3), "round {round}: {:?}", answer.took);
    }
}

#[test]
fn at_most_32_requests_are_in_flight_to_one_homeserver() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let sub = world.home.user("alice");
    world
        .home
        .answer_userinfo(Some(Reply::json(200, &json!({ "sub": sub })).after(Duration::from_millis(100))));
    let room = unique_room();
    let calls: Vec<_> = (0..300)
        .map(|_| Call::json("/get_token", &bodies::get_token_of(&world.home, "alice", &room)))
        .collect();
    for answer in world.service.flood(&calls, 300) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let most = world.home.http.most_at_once();
    assert!((16..=32).contains(&most), "{most} requests at a time");
    // A few more, where one was closed in between or not yet given back.
    let connections = world.home.http.connections().len();
    assert!(connections <= 40, "{connections} connections");
}

/// By an override the homeserver needs no DNS and may be on a private address; a value without a scheme means https.
#[test]
fn an_override_says_where_a_homeserver_is() {
    let start = || Homeserver::builder().named("overridden.example.org").start();
    for (homeserver, scheme) in [(start(), "https://"), (start(), "")] {
        let value = format!(
            "other.example.org=https://127.0.0.1:1, {}={scheme}{}",
            homeserver.name,
            homeserver.http.address()
        );
        let world = World::with(|setup| {
            setup
                .env("LIVEKIT_FEDERATION_URL_OVERRIDES", &value)
                .unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS")
        });
        let answer = ask(&world, &homeserver);
        assert_eq!(answer.status, 200, "{value}: {}", answer.text());
        // An override says where, not what: it grants no full access.
        assert_eq!(world.sfu.creations(), 0);
    }
}

#[test]
fn everybody_may_be_everybody() {
    let world = World::with(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"));
    for homeserver in [&world.home, &world.away] {
        assert_eq!(ask(&world, homeserver).status, 200);
    }
    assert_eq!(world.sfu.creations(), 2);
    // Among other names it is a name.
    let world = World::with(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*, example.org"));
    assert_eq!(ask(&world, &world.home).status, 200);
    assert_eq!(world.sfu.creations(), 0);
}

/// The service is no way into its own network: not by `*`, not by a name that nobody listed.
#[test]
fn private_addresses_are_for_those_who_are_listed() {
    let lists = ["*", "example.org"];
    for list in lists {
        let world = World::with(|setup| {
            setup
                .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", list)
                .unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS")
        });
        let answer = ask(&world, &world.home);
        answer.assert_error(401, "M_UNAUTHORIZED", "The request could not be authorised.");
        assert_eq!(answer.field("reason"), "homeserver_unreachable");
        assert_eq!(world.home.http.connections().len(), 0, "{list}: it was dialled");
        let line = world.service.wait_event("address_denied");
        line.says(&["WARN", "LIVEKIT_FEDERATION_ALLOWED_NETWORKS", &world.home.name]);
        ask(&world, &world.home);
        let told = world
            .service
            .log()
            .lines()
            .filter(|l| l.contains("WARN") && l.contains(&world.home.name))
            .count();
        assert_eq!(told, 1, "{list}: each name is told once");
    }
    // Listed by name, it needs no network.
    let world = World::with(|setup| setup.unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS"));
    assert_eq!(ask(&world, &world.home).status, 200);
    assert_eq!(ask(&world, &world.away).status, 401);
}
