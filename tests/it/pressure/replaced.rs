//! Delayed events that take each other's place (decision L14), and those of people who were removed (decision L6).

use std::time::{Duration, Instant};

use serde_json::json;

use super::{pass, seconds};
use crate::support::client_api::{done, not_found};
use crate::support::lateness;
use crate::support::neighbour::Reply;
use crate::support::process::directory;
use crate::support::redis::RedisServer;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::Setup;
use crate::support::{unique, wait_until};

fn unavailable() -> Reply {
    Reply::json(503, &json!({}))
}

fn another() -> String {
    format!("syd_{}", unique())
}

/// The new event cannot be restarted for three seconds: until it was, the old one lives and is restarted like before.
#[test]
fn a_replaced_event_is_cancelled_once_the_new_one_was_restarted() {
    let scene = Scene::new();
    scene.delegate(seconds(60));
    scene.joined();
    let new = another();
    let refused = new.clone();
    scene
        .api
        .answer(move |call, _| if call.delay_id == refused { unavailable() } else { done() });
    scene.delegate_as(&new, seconds(60));
    let replaced = Instant::now();
    wait_until("a restart of the new event", TIMEOUT, || scene.api.count("restart", &new) > 0);
    pass(replaced, seconds(3));
    assert_eq!(
        scene.api.count("cancel", &scene.delay_id),
        0,
        "nobody has granted the new event yet"
    );
    scene.api.answer(|_, _| done());
    let tried = scene.api.count("restart", &new);
    wait_until("the old event to be cancelled", TIMEOUT * 2, || {
        scene.api.count("cancel", &scene.delay_id) > 0
    });
    let granted = scene.api.times("restart", &new)[tried];
    let cancelled = scene.api.times("cancel", &scene.delay_id)[0];
    eprintln!(
        "cancelled {:.1?} after the new event was restarted",
        cancelled.saturating_duration_since(granted)
    );
    assert!(cancelled > granted);
    assert_eq!(scene.api.sends(), 0);
    assert_eq!(scene.api.count("cancel", &new), 0);
}

/// X, Y, and X again while X is being cancelled: the last delegation wins, its event lives.
#[test]
fn an_event_that_is_delegated_again_while_it_is_being_cancelled_lives() {
    let delay = seconds(6);
    let scene = Scene::new();
    scene
        .api
        .answer(|call, _| if call.what == "cancel" { unavailable() } else { done() });
    scene.delegate(delay);
    scene.joined();
    let between = another();
    scene.delegate_as(&between, delay);
    wait_until("a cancellation to be tried", TIMEOUT, || {
        scene.api.count("cancel", &scene.delay_id) > 0
    });
    scene.delegate(delay);
    let again = Instant::now();
    wait_until("the one between to be cancelled", TIMEOUT, || {
        scene.api.count("cancel", &between) > 0
    });
    let tried = scene.api.count("cancel", &scene.delay_id);
    scene.api.answer(|_, _| done());
    scene.stays_until(again + seconds(10), delay);
    eprintln!(
        "X, Y, X: {} more cancellations of X, {} restarts of it",
        scene.api.count("cancel", &scene.delay_id) - tried,
        scene.restarts().len()
    );
    assert_eq!(
        scene.api.count("cancel", &scene.delay_id),
        tried,
        "the event that won was cancelled"
    );
    assert_eq!(scene.api.sends(), 0);
}

/// The homeserver says that the new event does not exist: the old one is the job again.
#[test]
fn a_final_no_to_the_new_event_makes_the_old_one_the_job_again() {
    let delay = seconds(8);
    let scene = Scene::new();
    scene.delegate(delay);
    let session = scene.joined();
    let new = another();
    let unknown = new.clone();
    scene
        .api
        .answer(move |call, _| if call.delay_id == unknown { not_found() } else { done() });
    scene.delegate_as(&new, delay);
    let replaced = Instant::now();
    wait_until("a second no", TIMEOUT, || scene.api.count("restart", &new) >= 2);
    scene.stays_until(replaced + seconds(14), delay);
    eprintln!("the old event was restarted {} times", scene.restarts().len());
    assert_eq!(scene.api.count("cancel", &scene.delay_id), 0);
    assert_eq!(scene.api.count("send", &new), 0);
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

/// kill -9 while the old event is still to be cancelled; with a file and with a real Redis.
fn survives(store: impl Fn(Setup) -> Setup) {
    let mut setup = None;
    let mut scene = Scene::with(|plain| {
        let stored = store(plain);
        setup = Some(stored.clone());
        stored
    });
    scene
        .api
        .answer(|call, _| if call.what == "cancel" { unavailable() } else { done() });
    scene.delegate(seconds(3_600));
    scene.joined();
    let new = another();
    scene.delegate_as(&new, seconds(3_600));
    wait_until("a cancellation to be tried", TIMEOUT, || {
        scene.api.count("cancel", &scene.delay_id) > 0
    });
    scene.service.signal("KILL");
    scene.service.wait_exit(TIMEOUT);
    let tried = scene.api.count("cancel", &scene.delay_id);
    scene.api.answer(|_, _| done());
    scene.service = setup.expect("just set").start();
    let started = Instant::now();
    wait_until("the old event to be cancelled", TIMEOUT * 2, || {
        scene.api.count("cancel", &scene.delay_id) > tried
    });
    let cancelled = scene.api.times("cancel", &scene.delay_id)[tried];
    eprintln!(
        "killed and started: cancelled after {:.1?}",
        cancelled.saturating_duration_since(started)
    );
    assert_eq!((scene.api.sends(), scene.api.count("cancel", &new)), (0, 0));
    // Once is enough, and the participant is still watched.
    pass(cancelled, seconds(2) + lateness::since(cancelled));
    assert_eq!(scene.api.count("cancel", &scene.delay_id), tried + 1);
    let session = scene.join();
    pass(started, Duration::from_millis(2_500));
    scene.leave(&session, "CLIENT_INITIATED");
    wait_until("the leave", TIMEOUT * 2, || scene.api.count("send", &new) > 0);
    assert_eq!(scene.sends().len(), 0, "the replaced event was sent");
}

#[test]
fn a_cancellation_outlives_kill_9_with_a_file() {
    let directory = directory("replaced");
    survives(|setup| setup.env("LIVEKIT_STATE_PATH", &directory.join("state").to_string_lossy()));
}

#[test]
fn a_cancellation_outlives_kill_9_with_redis() {
    let Some(server) = RedisServer::start(&[]) else { return };
    survives(|setup| setup.env("LIVEKIT_REDIS_URL", &format!("redis://{}", server.address())));
}
