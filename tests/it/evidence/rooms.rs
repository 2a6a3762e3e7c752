//! An SFU that is very quick, and one that is half dead (decisions L3, L13).

use std::time::{Duration, Instant};

use super::{delegate_all, enter_all, people, seconds, sent, wait_restarted_all, watchful, within};
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::sfu::Fault;
use crate::support::{bodies, hashes, lateness, unique_room, wait_until, webhook};

const DELAY: Duration = seconds(12);
const MANY: usize = 30;

/// Answers come within the millisecond of their questions. Nobody tells that thirty have left, the whole room at once.
#[test]
fn thirty_who_leave_one_room_are_sent_within_five_seconds() {
    let scene = Scene::with(watchful);
    let all = people(&scene, MANY);
    delegate_all(&scene, &all, DELAY);
    let sessions = enter_all(&scene, &all);
    for session in &sessions {
        scene.send_webhook(&webhook::joined(session));
    }
    wait_restarted_all(&scene, &all);
    for session in &sessions {
        scene.sfu.leave(&session.room, &session.identity);
    }
    let absent = Instant::now();
    wait_until("every leave", TIMEOUT * 2, || sent(&scene, &all) == MANY);
    let took = absent.elapsed();
    eprintln!("one room: {MANY} of {MANY} sent within {took:.1?}");
    assert!(took < within(seconds(5), absent), "{took:?}");
}

/// The same in thirty rooms.
#[test]
fn thirty_who_leave_thirty_rooms_are_sent_within_five_seconds() {
    let scene = Scene::with(watchful);
    let identity = &scene.identity;
    let events: Vec<_> = (0..MANY).map(|n| (unique_room(), format!("{}_{n}", scene.delay_id))).collect();
    let mut aliases = Vec::new();
    for (room, delay_id) in &events {
        let body = bodies::delegate_of(&scene.home, "alice", room, delay_id, 12_000);
        assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
        let alias = hashes::alias(room, hashes::SLOT);
        scene.send_webhook(&webhook::joined(&scene.sfu.join(&alias, identity)));
        aliases.push(alias);
    }
    let all = |what: &str| events.iter().filter(|(_, id)| scene.api.count(what, id) > 0).count() == MANY;
    wait_until("everybody's first restart", TIMEOUT * 2, || all("restart"));
    for alias in &aliases {
        scene.sfu.leave(alias, identity);
    }
    let absent = Instant::now();
    wait_until("every leave", TIMEOUT * 2, || all("send"));
    let took = absent.elapsed();
    eprintln!("thirty rooms: {MANY} of {MANY} sent within {took:.1?}");
    assert!(took < within(seconds(5), absent), "{took:?}");
}

/// One of two backends is dead for 15 seconds: all rooms are asked for once or twice, not every second, and nobody is reported gone.
#[test]
fn a_front_with_a_dead_backend_does_not_get_all_rooms_asked_for_every_second() {
    let scene = Scene::new();
    scene.delegate(DELAY);
    scene.joined();
    let lists = || scene.sfu.http.count(|r| r.path.ends_with("/ListRooms"));
    let probes = || scene.sfu.http.count(|r| r.method == "GET");
    wait_until("the watch to begin", TIMEOUT, || probes() >= 2);
    let (before, began) = (lists(), Instant::now());
    scene.sfu.fail(Some(Fault::HalfDead));
    scene.stays_until(began + seconds(15), DELAY);
    let asked = lists() - before;
    eprintln!(
        "half dead for 15 s: {asked} times ListRooms, {} probes; late by {:.1?}",
        probes(),
        lateness::since(began)
    );
    assert!(asked <= 4, "{asked} times ListRooms in 15 s");
}
