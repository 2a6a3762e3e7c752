//! A service that stood still (decision L5a), and a homeserver that does: what was known before is asked again.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Timers, guests, join, leaves, pass, seconds, told_left};
use crate::support::bodies::delegate_of;
use crate::support::client_api::{Managed, done};
use crate::support::lateness;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::{wait_until, webhook};

/// A hundred whose resume failed and who are back already; the process is frozen for twelve seconds just after the webhooks.
#[test]
fn nobody_is_reported_by_a_service_that_was_frozen_after_their_webhooks() {
    let scene = Scene::new();
    let guests = guests(&scene, 100, 50, seconds(60));
    let sessions = join(&scene, &guests);
    let back: Vec<_> = guests.iter().map(|guest| scene.sfu.join(&guest.alias, &guest.identity)).collect();
    told_left(&scene, &sessions);
    scene.service.signal("STOP");
    let frozen = Instant::now();
    pass(frozen, seconds(12));
    scene.service.signal("CONT");
    let awake = Instant::now();
    pass(awake, seconds(4));
    eprintln!("frozen for 12 s: {} of {} reported gone", scene.api.sends(), guests.len());
    assert_eq!(scene.api.sends(), 0);
    leaves(&scene, &guests[0], &back[0]);
}

/// A leave is being tried when the service is stopped, and the participant comes back unnoticed. Gives the moment, and the tries
/// until then.
fn frozen_between_two_tries(scene: &Scene) -> (Instant, usize) {
    // So that no try is just being sent then.
    scene.api.answer(|call, _| match call.what.as_str() {
        "send" => Reply::Answer {
            status: 503,
            headers: vec![("Retry-After".into(), "3".into())],
            body: b"{}".to_vec(),
        },
        _ => done(),
    });
    scene.delegate(seconds(60));
    let session = scene.joined();
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
    scene.service.signal("STOP");
    let frozen = Instant::now();
    // What was under way when it was stopped has arrived.
    pass(frozen, Duration::from_millis(500));
    let tries = scene.sends().len();
    scene.sfu.join(&scene.alias, &scene.identity);
    scene.api.answer(|_, _| done());
    (frozen, tries)
}

/// Five seconds, while a leave is being tried: who came back meanwhile is asked about first.
#[test]
fn a_leave_that_was_due_before_the_freeze_is_asked_about_first() {
    let scene = Scene::new();
    let (frozen, tries) = frozen_between_two_tries(&scene);
    pass(frozen, seconds(5));
    let asked = scene.sfu.lookups(&scene.alias, &scene.identity).len();
    scene.service.signal("CONT");
    let awake = Instant::now();
    wait_until("a question", TIMEOUT, || {
        scene.sfu.lookups(&scene.alias, &scene.identity).len() > asked
    });
    pass(awake, seconds(4));
    let restarts = scene.restarts();
    eprintln!(
        "frozen for 5 s: {} sends after it, asked after {:.1?}",
        scene.sends().len() - tries,
        scene.sfu.lookups(&scene.alias, &scene.identity)[asked].saturating_duration_since(awake)
    );
    assert_eq!(scene.sends().len(), tries, "somebody who is there was reported gone");
    assert!(restarts.iter().any(|at| *at > awake), "the event was not restarted");
}

/// What was told while it stood still is heard first when it goes on: that is no reason to act on what was known before.
#[test]
fn webhooks_that_came_during_the_freeze_do_not_hide_it() {
    for _ in 0..3 {
        let scene = Scene::new();
        let guests = guests(&scene, 8, 1, seconds(60));
        let others = guests
            .iter()
            .map(|guest| scene.sfu.join(&guest.alias, &guest.identity))
            .collect::<Vec<_>>();
        let (frozen, tries) = frozen_between_two_tries(&scene);
        let told: Vec<_> = others
            .iter()
            .map(|other| {
                scene
                    .service
                    .begin(&webhook::signed(&scene.sfu, &webhook::joined(other).to_string()))
            })
            .collect();
        pass(frozen, seconds(5));
        scene.service.signal("CONT");
        let awake = Instant::now();
        for answer in told {
            assert_eq!(answer.join().expect("a thread").expect("an answer").status, 200);
        }
        pass(awake, seconds(2));
        assert_eq!(scene.sends().len(), tries, "somebody who is there was reported gone");
        scene.service.wait_event("stood_still");
    }
}

/// A leave that cannot be sent for ten seconds rests on evidence that is too old by then: who came back unnoticed meanwhile stays.
#[test]
fn a_leave_that_could_not_be_sent_for_long_is_asked_about_again() {
    let scene = Scene::new();
    let refuse_sends = |call: &Managed, _| match call.what.as_str() {
        "send" => Reply::json(503, &json!({})),
        _ => done(),
    };
    scene.api.answer(refuse_sends);
    scene.delegate(seconds(60));
    let session = scene.joined();
    scene.leave(&session, "CLIENT_INITIATED");
    let sent = scene.wait_sent(TIMEOUT);
    scene.sfu.join(&scene.alias, &scene.identity);
    // The no is older than the first try.
    pass(sent, seconds(10));
    let tries = scene.sends().len();
    scene.api.answer(|_, _| done());
    pass(sent, seconds(18));
    let asked = scene.sfu.lookups(&scene.alias, &scene.identity);
    eprintln!(
        "{tries} tries within 10 s, {} after it; asked again after {:.1?}",
        scene.sends().len() - tries,
        asked.iter().find(|at| **at > sent).map(|at| *at - sent).unwrap_or_default()
    );
    assert_eq!(scene.sends().len(), tries, "somebody who is there was reported gone");
    let restarts = scene.restarts();
    assert!(restarts.iter().any(|at| *at > sent), "the event was not restarted");
}

/// Five of an event's eight seconds: it is restarted at once.
#[test]
fn what_a_freeze_has_brought_near_its_end_is_restarted_at_once() {
    let delay = seconds(8);
    let scene = Scene::new();
    let timers = Timers::default();
    timers.answer(&scene.api, |_, _| done());
    scene.delegate(delay);
    scene.joined();
    scene.wait_restarts(2);
    let last = scene.restarts()[1];
    pass(last, seconds(2));
    scene.service.signal("STOP");
    let frozen = Instant::now();
    pass(frozen, seconds(5));
    let before = scene.restarts().len();
    scene.service.signal("CONT");
    let awake = Instant::now();
    scene.wait_restarts(before + 1);
    let took = scene.restarts()[before].saturating_duration_since(awake);
    eprintln!(
        "frozen for 5 s: restarted after {took:.1?}, {:.1?} after the last time",
        scene.restarts()[before] - last
    );
    assert!(took < Duration::from_millis(500) + lateness::since(awake), "{took:?}");
    assert_eq!(timers.gone(&scene.api, [&scene.delay_id], last, delay), 0);
}

/// ONE call that is never answered costs neither an event of eight seconds nor one of eighteen.
#[test]
fn one_restart_that_is_never_answered_loses_nobody() {
    let scene = Scene::new();
    let timers = Timers::default();
    timers.answer(&scene.api, |call, before| match (call.what.as_str(), before) {
        ("restart", 1) => Reply::Hang,
        _ => done(),
    });
    let began = Instant::now();
    let short = guests(&scene, 1, 1, seconds(8));
    let long = guests(&scene, 1, 1, seconds(18));
    join(&scene, &[short.clone(), long.clone()].concat());
    wait_until("restarts after the one that hangs", seconds(40), || {
        [&short, &long]
            .iter()
            .all(|guest| scene.api.count("restart", &guest[0].delay_id) >= 4)
    });
    let (of_short, of_long) = (timers.longest(&short[0].delay_id, began), timers.longest(&long[0].delay_id, began));
    eprintln!("one restart without an answer: {of_short:.1?} of 8 s, {of_long:.1?} of 18 s");
    assert_eq!(timers.gone(&scene.api, [&short[0].delay_id], began, seconds(8)), 0);
    assert_eq!(timers.gone(&scene.api, [&long[0].delay_id], began, seconds(18)), 0);
}

/// Three seconds in which no call is answered, just when three hundred restarts are due; those calls stay dead.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn a_homeserver_that_is_silent_for_three_seconds_loses_nobody() {
    let delay = seconds(18);
    let scene = Scene::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let timers = Timers::default();
    timers.answer(&scene.api, |_, _| done());
    let began = Instant::now();
    let guests = guests(&scene, 300, 50, delay);
    join(&scene, &guests);
    let restarted = scene.api.restarts();
    wait_until("the next restarts", delay, || scene.api.restarts() > restarted + 5);
    timers.answer(&scene.api, |_, _| Reply::Hang);
    let silent = Instant::now();
    pass(silent, seconds(3));
    timers.answer(&scene.api, |_, _| done());
    pass(began, seconds(30));
    let gone = timers.gone(&scene.api, guests.iter().map(|guest| &guest.delay_id), began, delay);
    eprintln!("silent for 3 s: {gone} of {} gone", guests.len());
    assert_eq!(gone, 0);
}

/// As above, with delays of eight seconds.
#[test]
fn a_homeserver_that_always_needs_a_second_and_a_half_loses_nobody() {
    let delay = seconds(8);
    let scene = Scene::new();
    let timers = Timers::default();
    timers.answer(&scene.api, |_, _| done().after(Duration::from_millis(1_500)));
    let began = Instant::now();
    let guests = guests(&scene, 30, 10, delay);
    join(&scene, &guests);
    pass(began, seconds(20));
    let gone = timers.gone(&scene.api, guests.iter().map(|guest| &guest.delay_id), began, delay);
    let longest = guests.iter().map(|guest| timers.longest(&guest.delay_id, began)).max();
    eprintln!(
        "1.5 s a call: {gone} of {} gone, {:.1?} of 8 s at most",
        guests.len(),
        longest.unwrap_or_default()
    );
    assert_eq!(gone, 0);
}

/// The hint outranks no deadline: it moves a restart by a third of what is left at most.
#[test]
fn a_503_with_an_hour_to_wait_costs_no_event() {
    let delay = seconds(8);
    let scene = Scene::new();
    let timers = Timers::default();
    timers.answer(&scene.api, |call, before| match (call.what.as_str(), before) {
        ("restart", 1) => Reply::Answer {
            status: 503,
            headers: vec![("Retry-After".into(), "3600".into())],
            body: b"{}".to_vec(),
        },
        _ => done(),
    });
    scene.delegate(delay);
    let joined = Instant::now();
    scene.joined();
    scene.wait_restarts(4);
    let restarts = scene.restarts();
    let (pause, longest) = (restarts[2] - restarts[1], timers.longest(&scene.delay_id, joined));
    eprintln!("503 with an hour to wait: tried again after {pause:.1?}, {longest:.1?} of 8 s");
    let left = delay - (restarts[1] - restarts[0]);
    assert!(
        pause <= left / 3 + Duration::from_millis(300) + lateness::since(joined),
        "{pause:?} of {left:?}"
    );
    assert!(longest < seconds(7), "{longest:?}");
    assert_eq!(scene.sends().len(), 0);
}

/// The request was held for longer than the delay: its event is restarted before anything else, and nobody is reported before
/// the client has its answer.
#[test]
fn a_request_that_was_held_for_longer_than_the_delay_restarts_first() {
    for is_there in [true, false] {
        let delay = seconds(6);
        let scene = Scene::new();
        scene.home.change_userinfo(|known| known.expect("a token").after(seconds(7)));
        let body = delegate_of(&scene.home, "alice", &scene.room, &scene.delay_id, 6_000);
        if is_there {
            scene.sfu.join(&scene.alias, &scene.identity);
        }
        let answer = scene.service.post("/delegate_delayed_leave", &body);
        let answered = Instant::now();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.took >= seconds(7), "{:?}", answer.took);
        wait_until("the first call", TIMEOUT, || !scene.api.calls(&scene.delay_id).is_empty());
        let calls = scene.api.calls(&scene.delay_id);
        eprintln!(
            "held for {:.1?}: {} {:.1?} after the answer",
            answer.took,
            calls[0].what,
            calls[0].at.saturating_duration_since(answered)
        );
        assert_eq!(calls[0].what, "restart");
        if is_there {
            scene.stays_until(answered + seconds(6), delay);
        } else {
            // Restarted once, it has a delay to come in.
            scene.join();
            scene.stays_until(answered + seconds(6), delay);
        }
    }
}
