//! Concurrent creations of one room share one call (decision T6).

use std::time::{Duration, Instant};

use crate::support::bodies;
use crate::support::client::Call;
use crate::support::hashes::{SLOT, alias};
use crate::support::sfu::Fault;
use crate::support::unique_room;
use crate::support::world::World;

/// 2,000 users enter one room at once; how many CreateRoom calls that took, and how long.
fn rush(world: &World) -> (usize, Duration) {
    world.sfu.fail(Some(Fault::Slow(Duration::from_millis(50))));
    let room = unique_room();
    let calls: Vec<_> = (0..2_000)
        .map(|n| Call::json("/get_token", &bodies::get_token_of(&world.home, &format!("user{n}"), &room)))
        .collect();
    let began = Instant::now();
    let answers = world.service.flood(&calls, 2_000);
    let took = began.elapsed();
    let refused: Vec<_> = answers.iter().filter(|a| a.status != 200).map(|a| (a.status, a.text())).collect();
    assert!(refused.is_empty(), "{} of 2,000 were refused: {:?}", refused.len(), refused.first());
    (world.sfu.creations_of(&alias(&room, SLOT)), took)
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn two_thousand_requests_for_one_room_make_few_calls() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let (creations, took) = rush(&world);
    eprintln!("coalescing: 2,000 requests in {took:.1?}, {creations} CreateRoom calls");
    assert!((1..50).contains(&creations), "{creations} CreateRoom calls");
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn without_a_memory_of_rooms_one_call_is_under_way_at_a_time() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    world.sfu.http.without_date();
    let (creations, took) = rush(&world);
    let most = took.as_millis() / 50 + 2;
    eprintln!("coalescing, no memory: 2,000 requests in {took:.1?}, {creations} CreateRoom calls");
    assert!((creations as u128) <= most, "{creations} CreateRoom calls of 50 ms in {took:?}");
}

/// A creation that fails is not shared with those who ask later.
#[test]
fn a_failure_is_not_remembered() {
    let world = World::new();
    let room = unique_room();
    let ask = || world.service.post("/get_token", &bodies::get_token_of(&world.home, "alice", &room));
    world.sfu.fail(Some(Fault::NoGrant));
    assert_eq!(ask().status, 500);
    world.sfu.fail(None);
    assert_eq!(ask().status, 200);
}

/// A client that goes away in the middle takes nobody else's room with it.
#[test]
fn a_client_that_hangs_up_does_not_cancel_the_others() {
    let world = World::new();
    world.sfu.fail(Some(Fault::Slow(Duration::from_millis(400))));
    let room = unique_room();
    let call = || Call::json("/get_token", &bodies::get_token_of(&world.home, "alice", &room));
    let mut impatient = world.service.connect();
    impatient.send(&call().bytes(world.service.address()));
    crate::support::wait_until("the SFU to be asked", Duration::from_secs(5), || world.sfu.creations() == 1);
    let patient = world.service.begin(&call());
    crate::support::wait_until("the second user to be known", Duration::from_secs(5), || world.home.asked() == 2);
    drop(impatient);
    assert_eq!(patient.join().expect("the request").expect("an answer").status, 200);
    assert!(world.sfu.creations() <= 2);
}
