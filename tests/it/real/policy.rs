//! The operator's policy with a real SFU, a real homeserver and real clients.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::Neighbours;
use crate::leave_real::steered::Party;
use crate::support::bodies;
use crate::support::client::Call;
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::livekit::Publisher;
use crate::support::process::say;
use crate::support::{unique_room, wait_until};

#[test]
fn a_blocked_homeserver_is_not_dialled_and_others_call() {
    let Some(real) = Neighbours::get() else { return };
    let evil = Homeserver::start();
    let blocked = evil.http.address().ip().to_string();
    let setup = real.livekit.setup(&[&real.home.name]).env("LIVEKIT_BLOCKED_HOMESERVERS", &blocked);
    let service = setup.start();
    let alice = real.home.register("alice");
    let room = alice.create_room();
    let answer = service.post("/get_token", &bodies::get_token_of(&evil, "eve", &room));
    answer.assert_errcode(403, "M_FORBIDDEN");
    assert_eq!(answer.field("reason"), "blocked_homeserver");
    assert!(evil.http.connections().is_empty(), "it was dialled");
    assert!(real.livekit.room(&alias(&room, SLOT)).is_none(), "a room was opened");
    let answer = service.post("/get_token", &alice.get_token(&room));
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// The SFU itself refuses the camera: the client's word is not taken for it.
#[test]
fn without_the_camera_among_the_sources_the_sfu_refuses_it() {
    let Some(real) = Neighbours::get() else { return };
    let alice = real.home.register("alice");
    for (sources, published) in [
        (Some("microphone,screen_share"), &["MICROPHONE"] as &[_]),
        (None, &["MICROPHONE", "CAMERA"]),
    ] {
        let setup = real.livekit.setup(&[&real.home.name]);
        let setup = sources
            .into_iter()
            .fold(setup, |setup, sources| setup.env("LIVEKIT_PUBLISH_SOURCES", sources));
        let service = setup.start();
        let room = alice.create_room();
        let answer = service.post("/get_token", &alice.get_token(&room));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let publisher = Publisher::start(&answer.json());
        let said = [publisher.line(), publisher.line(), publisher.line()];
        assert!(
            said[0].starts_with("joined ") && said[1].starts_with("published microphone "),
            "{said:?}"
        );
        let wanted = if published.len() == 2 {
            "published camera "
        } else {
            "refused camera "
        };
        assert!(said[2].starts_with(wanted), "{said:?}");
        // What the SFU lists lags a little.
        wait_until("the tracks", Duration::from_secs(20), || {
            // It lists them in any order.
            real.livekit.sources(&alias(&room, SLOT)) == BTreeSet::from_iter(published.iter().copied())
        });
        say(&format!("sources {sources:?}: the SFU has {published:?}"));
    }
}

#[test]
fn the_eleventh_participant_is_refused_and_a_standing_room_keeps_its_number() {
    let Some(real) = Neighbours::get() else { return };
    let home = Homeserver::start();
    let service = real.livekit.setup(&[&home.name]).env("LIVEKIT_MAX_PARTICIPANTS", "10").start();
    let ask = |user: &str, room: &str| {
        let answer = service.post("/get_token", &bodies::get_token_of(&home, user, room));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let (party, room) = (Party::start(), unique_room());
    for n in 0..10 {
        party.join(&n.to_string(), &ask(&format!("user{n}"), &room));
    }
    let why = party
        .try_join("eleventh", &ask("eleventh", &room))
        .expect_err("the eleventh came in");
    assert!(why.contains("500"), "refused for another reason: {why}");
    assert_eq!(real.livekit.participants(&alias(&room, SLOT)).len(), 10);
    party.leave("3");
    wait_until("a place", Duration::from_secs(20), || {
        real.livekit.participants(&alias(&room, SLOT)).len() == 9
    });
    party.join("eleventh", &ask("eleventh", &room));

    let standing = unique_room();
    real.livekit.create_for(&alias(&standing, SLOT), 3);
    ask("alice", &standing);
    let room = real.livekit.room(&alias(&standing, SLOT)).expect("the room");
    assert_eq!(room.max_participants, 3, "a room that stands keeps its number");
}

/// All of them behind one address, with the rates that hold when nothing is set.
#[test]
fn an_office_of_two_hundred_starts_a_call() {
    let Some(real) = Neighbours::get() else { return };
    let home = Homeserver::start();
    let service = real.livekit.setup(&[&home.name]).unset("LIVEKIT_RATE_LIMIT_USER").start();
    let room = unique_room();
    let calls: Vec<_> = (0..200)
        .map(|n| Call::json("/get_token", &bodies::get_token_of(&home, &format!("user{n}"), &room)))
        .collect();
    let began = Instant::now();
    let answers = service.flood(&calls, 200);
    let all = began.elapsed();
    assert!(answers.iter().all(|answer| answer.status == 200));
    assert!(all < Duration::from_secs(10), "{all:?}");
    let rooms = real.livekit.room(&alias(&room, SLOT));
    assert!(rooms.is_some(), "the room stands");
    say(&format!("an office of 200 behind one address: all had their token after {all:.2?}"));
}
