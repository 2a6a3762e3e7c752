//! Webhooks and an SFU as test suites and older servers have them: events without a participant's and a room's `sid`, `createdAt` 0,
//! one `id` for all events and people; an SFU that knows CreateRoom and GetParticipant and answers 404 without a body to anything
//! else; delayed events that are answered with 404 `{}`. A leave is expected within six seconds of the absence.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{delegate_all, people, seconds, wait_restarted_all, watchful, within};
use crate::support::client_api::done;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::sfu::{Fault, Session};
use crate::support::wait_until;

const DELAY: Duration = seconds(20);
/// From the absence to the leave.
const LIMIT: Duration = seconds(6);

/// Restarts are granted; nobody knows the event any more when it is to be sent.
fn scene() -> Scene {
    let scene = Scene::with(watchful);
    scene.sfu.fail(Some(Fault::TwoCalls));
    scene.api.answer(|call, _| match call.what.as_str() {
        "restart" => done(),
        _ => Reply::json(404, &json!({})),
    });
    scene
}

/// What the SFU tells of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Joined,
    Nothing,
    /// Before the delegation.
    Before,
}

/// Each case is a whole scene: all of them run at the same time.
fn at_once<T: Sync>(cases: &[T], test: impl Fn(&T) + Sync) {
    let test = &test;
    std::thread::scope(|scope| {
        for case in cases {
            scope.spawn(move || test(case));
        }
    });
}

/// An event that leaves out what it can.
fn bare(name: &str, session: &Session, reason: Option<&str>) -> Value {
    let mut event = json!({
        "event": name,
        "room": {"name": session.room},
        "participant": {"identity": session.identity},
        "id": "EV_1",
        "createdAt": 0,
    });
    if let Some(reason) = reason {
        event["participant"]["disconnectReason"] = reason.into();
    }
    event
}

/// There from now on; the SFU's answers have no `sid` either, where `nameless`.
fn enter(scene: &Scene, identity: &str, nameless: bool) -> Session {
    let mut session = scene.sfu.join(&scene.alias, identity);
    if nameless {
        session.sid = String::new();
        scene.sfu.enter(&session);
    }
    session
}

/// Gone from now on.
fn leave(scene: &Scene, session: &Session) -> Instant {
    scene.sfu.leave(&session.room, &session.identity);
    Instant::now()
}

/// The leave has come, in time.
#[track_caller]
fn sent_in_time(scene: &Scene, delay_id: &str, absent: Instant, what: &str) {
    wait_until(&format!("{what}: the leave to be sent"), LIMIT + TIMEOUT, || {
        scene.api.count("send", delay_id) > 0
    });
    let took = scene.api.times("send", delay_id)[0] - absent;
    eprintln!("{what}: sent {took:.1?} after the absence");
    assert!(took < within(LIMIT, absent), "{what}: {took:?}");
}

#[track_caller]
fn stays_for(scene: &Scene, delay_id: &str, time: Duration, what: &str) {
    let end = Instant::now() + time;
    wait_until("the time to pass", time + TIMEOUT, || {
        assert_eq!(
            scene.api.count("send", delay_id),
            0,
            "{what}: somebody who is there was reported gone"
        );
        Instant::now() >= end
    });
}

/// With and without a reason, and with and without a `sid` in the SFU's answers.
#[test]
fn joined_and_left_are_told() {
    let cases = [
        (None, false),
        (None, true),
        (Some("CLIENT_INITIATED"), false),
        (Some("CLIENT_INITIATED"), true),
        (Some("UNKNOWN_REASON"), true),
    ];
    at_once(&cases, |&(reason, nameless)| {
        let what = format!("told, {reason:?}, nameless {nameless}");
        let scene = scene();
        scene.delegate(DELAY);
        let session = enter(&scene, &scene.identity, nameless);
        scene.send_webhook(&bare("participant_joined", &session, None));
        scene.wait_restarts(1);
        stays_for(&scene, &scene.delay_id, seconds(3), &what);
        let absent = leave(&scene, &session);
        scene.send_webhook(&bare("participant_left", &session, reason));
        sent_in_time(&scene, &scene.delay_id, absent, &what);
        scene.wait_over(TIMEOUT);
        assert_eq!(scene.sends().len(), 1, "{what}");
    });
}

/// Nor is the arrival told in half of the cases; in one it is told before the delegation.
#[test]
fn a_departure_that_is_not_told_is_found() {
    let cases = [
        (Told::Joined, false),
        (Told::Joined, true),
        (Told::Nothing, false),
        (Told::Nothing, true),
        (Told::Before, true),
    ];
    at_once(&cases, |&(told, nameless)| {
        let what = format!("not told, {told:?}, nameless {nameless}");
        let scene = scene();
        if told == Told::Before {
            let session = enter(&scene, &scene.identity, nameless);
            scene.send_webhook(&bare("participant_joined", &session, None));
        }
        scene.delegate(DELAY);
        let session = enter(&scene, &scene.identity, nameless);
        if told == Told::Joined {
            scene.send_webhook(&bare("participant_joined", &session, None));
        }
        scene.wait_restarts(1);
        stays_for(&scene, &scene.delay_id, seconds(3), &what);
        let absent = leave(&scene, &session);
        sent_in_time(&scene, &scene.delay_id, absent, &what);
        scene.wait_over(TIMEOUT);
        assert_eq!(scene.sends().len(), 1, "{what}");
    });
}

/// Whether the page was reloaded before or after the departure was told; and gone for good after that.
#[test]
fn who_is_back_stays_until_the_last_departure() {
    let cases = [(0, false), (0, true), (500, false), (500, true)];
    at_once(&cases, |&(pause, nameless)| {
        let what = format!("back after {pause} ms, nameless {nameless}");
        let scene = scene();
        scene.delegate(DELAY);
        let first = enter(&scene, &scene.identity, nameless);
        scene.send_webhook(&bare("participant_joined", &first, None));
        scene.wait_restarts(1);
        let gone = leave(&scene, &first);
        scene.send_webhook(&bare("participant_left", &first, Some("CLIENT_INITIATED")));
        wait_until("the page to be reloaded", TIMEOUT, || {
            gone.elapsed() >= Duration::from_millis(pause)
        });
        let second = enter(&scene, &scene.identity, nameless);
        scene.send_webhook(&bare("participant_joined", &second, None));
        stays_for(&scene, &scene.delay_id, seconds(7), &what);
        let absent = leave(&scene, &second);
        scene.send_webhook(&bare("participant_left", &second, Some("CLIENT_INITIATED")));
        sent_in_time(&scene, &scene.delay_id, absent, &what);
        assert_eq!(scene.sends().len(), 1, "{what}");
    });
}

/// The same person hands over another event after the first leave; all webhooks are as those of the first stay.
#[test]
fn a_second_stay_is_a_stay_of_its_own() {
    let scene = scene();
    for (stay, told) in [("first", true), ("second", true), ("third", false)] {
        let delay_id = format!("{}_{stay}", scene.delay_id);
        scene.delegate_as(&delay_id, DELAY);
        let session = enter(&scene, &scene.identity, true);
        scene.send_webhook(&bare("participant_joined", &session, None));
        wait_until("a restart", TIMEOUT, || scene.api.count("restart", &delay_id) > 0);
        stays_for(&scene, &delay_id, seconds(2), stay);
        let absent = leave(&scene, &session);
        if told {
            scene.send_webhook(&bare("participant_left", &session, Some("CLIENT_INITIATED")));
        }
        sent_in_time(&scene, &delay_id, absent, stay);
        assert_eq!(scene.api.count("send", &delay_id), 1, "{stay}");
    }
}

/// One goes and one stays, told or not.
#[test]
fn of_two_in_a_room_who_stays_is_never_sent() {
    let cases = [(true, false), (true, true), (false, false), (false, true)];
    at_once(&cases, |&(told, nameless)| {
        let what = format!("of two, told {told}, nameless {nameless}");
        let scene = scene();
        let both = people(&scene, 2);
        delegate_all(&scene, &both, DELAY);
        let sessions: Vec<_> = both.iter().map(|p| enter(&scene, &p.identity, nameless)).collect();
        for session in &sessions {
            scene.send_webhook(&bare("participant_joined", session, None));
        }
        wait_restarted_all(&scene, &both);
        let absent = leave(&scene, &sessions[0]);
        if told {
            scene.send_webhook(&bare("participant_left", &sessions[0], Some("CLIENT_INITIATED")));
        }
        sent_in_time(&scene, &both[0].delay_id, absent, &what);
        stays_for(&scene, &both[1].delay_id, seconds(8), &what);
        // And then the other one.
        let absent = leave(&scene, &sessions[1]);
        if told {
            scene.send_webhook(&bare("participant_left", &sessions[1], Some("CLIENT_INITIATED")));
        }
        sent_in_time(&scene, &both[1].delay_id, absent, &what);
        assert_eq!(
            both.iter().map(|p| scene.api.count("send", &p.delay_id)).sum::<usize>(),
            2,
            "{what}"
        );
    });
}

/// Somebody is there for longer than a delay, with everybody else's webhooks about.
#[test]
fn one_who_stays_is_never_sent() {
    let scene = scene();
    scene.delegate(seconds(6));
    let session = enter(&scene, &scene.identity, true);
    scene.send_webhook(&bare("participant_joined", &session, None));
    scene.wait_restarts(1);
    // Somebody else, whose events have the same id and none of what tells them apart.
    let other = Session {
        identity: "another".into(),
        ..session
    };
    let began = Instant::now();
    while began.elapsed() < seconds(12) {
        scene.send_webhook(&bare("participant_joined", &other, None));
        scene.send_webhook(&bare("participant_left", &other, Some("CLIENT_INITIATED")));
        stays_for(&scene, &scene.delay_id, seconds(1), "one who stays");
    }
    scene.stays_until(began + seconds(12), seconds(6));
}
