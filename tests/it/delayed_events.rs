//! The life of a delegated leave: a participant who is there is never reported gone, one who is gone always is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::bodies::delegate_of;
use crate::support::bucket::Bucket;
use crate::support::client_api::{Managed, done, not_found, unrecognized, versions};
use crate::support::hashes::identity;
use crate::support::lateness;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::Setup;
use crate::support::sfu::Fault;
use crate::support::wait_until;
use crate::support::webhook::{event, joined, left};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// 250 ms apart when they were sent; a busy machine may bring one late, but not all of them.
#[track_caller]
fn assert_no_storm(restarts: &[Instant]) {
    let pauses = u32::try_from(restarts.len() - 1).expect("a few");
    let span = restarts[restarts.len() - 1] - restarts[0] + Duration::from_millis(500);
    assert!(span >= Duration::from_millis(250) * pauses, "{} in {span:?}", restarts.len());
}

/// Asks the SFU every second.
fn watchful(setup: Setup) -> Setup {
    setup.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
}

#[test]
fn a_participant_who_joins_is_kept() {
    let delay = seconds(2);
    let scene = Scene::new();
    scene.delegate(delay);
    let joined = Instant::now();
    scene.joined();
    assert!(
        scene.restarts()[0] - joined < seconds(1) + lateness::since(joined),
        "the first restart was late"
    );
    scene.wait_restarts(6);
    let restarts = scene.restarts();
    // The average of some: a busy machine delays one of them.
    let every = (restarts[5] - restarts[1]) / 4;
    assert!(
        every > Duration::from_millis(800) && every < Duration::from_millis(1_500) + lateness::since(joined) / 4,
        "{every:?}"
    );
    assert_eq!(scene.sends().len(), 0);
    assert_eq!(scene.api.strays(), [""; 0]);
}

/// Without any webhook.
#[test]
fn a_participant_who_is_found_there_is_kept() {
    let scene = Scene::new();
    scene.sfu.join(&scene.alias, &scene.identity);
    scene.delegate(seconds(4));
    scene.wait_restarts(3);
    assert_eq!(scene.sends().len(), 0);
}

#[test]
fn who_never_comes_is_reported_after_one_delay() {
    let scene = Scene::new();
    let began = Instant::now();
    scene.delegate(seconds(2));
    let sent = scene.wait_sent(TIMEOUT);
    assert!(sent - began > Duration::from_millis(1_500), "{:?}", sent - began);
    assert_eq!(scene.restarts().len(), 0);
    scene.wait_over(TIMEOUT);
}

#[test]
fn a_goodbye_is_checked_twice_and_sent_within_two_seconds() {
    let scene = Scene::new();
    scene.delegate(seconds(8));
    let session = scene.joined();
    let before = scene.sfu.lookups(&scene.alias, &scene.identity).len();
    let at = scene.leave(&session, "CLIENT_INITIATED");
    let sent = scene.wait_sent(TIMEOUT);
    let took = sent - at;
    assert!(
        took > Duration::from_millis(1_400) && took < Duration::from_millis(2_600) + lateness::since(at),
        "{took:?}"
    );
    let asked: Vec<_> = scene.sfu.lookups(&scene.alias, &scene.identity).split_off(before);
    // Not the one that was asked while it was waited for.
    let asked: Vec<_> = asked.into_iter().filter(|when| *when > at + Duration::from_millis(500)).collect();
    assert_eq!(asked.len(), 2, "{asked:?}");
    let [first, second] = [asked[0] - at, asked[1] - at];
    assert!(
        first > Duration::from_millis(700) && first < Duration::from_millis(1_300) + lateness::since(at),
        "{first:?}"
    );
    assert!(
        second > Duration::from_millis(1_400) && second < Duration::from_millis(2_000) + lateness::since(at),
        "{second:?}"
    );
    scene.wait_over(TIMEOUT);
    assert_eq!(scene.sends().len(), 1);
}

/// No answer is no evidence: nothing is sent before the SFU has denied the participant, and the event lives until then.
#[test]
fn a_goodbye_is_not_believed_while_the_sfu_does_not_answer() {
    let delay = seconds(6);
    let scene = Scene::with(watchful);
    scene.delegate(delay);
    let session = scene.joined();
    scene.sfu.fail(Some(Fault::Hang));
    let at = scene.leave(&session, "CLIENT_INITIATED");
    scene.stays_until(at + seconds(8), delay);
    scene.sfu.fail(None);
    scene.wait_sent(seconds(20));
}

#[test]
fn who_is_back_under_another_sid_stays() {
    let delay = seconds(4);
    let scene = Scene::new();
    scene.delegate(delay);
    let first = scene.joined();
    let at = scene.leave(&first, "CLIENT_INITIATED");
    // The SFU has the new session before its webhook comes; here none ever does.
    let second = scene.sfu.join(&scene.alias, &scene.identity);
    scene.stays_until(at + seconds(6), delay);
    let at = scene.leave(&second, "CLIENT_INITIATED");
    let took = scene.wait_sent(TIMEOUT) - at;
    assert!(took < seconds(3), "{took:?}");
}

#[test]
fn who_is_displaced_by_itself_stays() {
    let delay = seconds(4);
    let scene = Scene::new();
    scene.delegate(delay);
    let first = scene.joined();
    scene.send_webhook(&left(&first, "DUPLICATE_IDENTITY"));
    let second = scene.join();
    scene.stays_until(Instant::now() + seconds(7), delay);
    scene.leave(&second, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

/// These are checked and then believed, whoever says them.
#[test]
fn every_plain_reason_is_sent_within_two_seconds() {
    let scene = Scene::new();
    let reasons = [
        json!("CLIENT_INITIATED"),
        json!(1),
        json!("CONNECTION_TIMEOUT"),
        json!("PARTICIPANT_REMOVED"),
        json!("ROOM_DELETED"),
        json!("ROOM_CLOSED"),
        json!("SIGNAL_CLOSE"),
    ];
    let stays: Vec<_> = reasons
        .iter()
        .enumerate()
        .map(|(n, reason)| {
            let (user, id) = (format!("user{n}"), format!("event{n}"));
            let body = delegate_of(&scene.home, &user, &scene.room, &id, 20_000);
            assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
            let session = scene
                .sfu
                .join(&scene.alias, &identity(&scene.home.user(&user), "DEVICE", "member1"));
            scene.send_webhook(&joined(&session));
            (session, id, reason)
        })
        .collect();
    for (_, id, _) in &stays {
        wait_until("the restart", TIMEOUT, || scene.api.count("restart", id) >= 1);
    }
    for (session, id, reason) in &stays {
        scene.sfu.leave(&session.room, &session.identity);
        let mut event = left(session, "");
        event["participant"]["disconnectReason"] = (*reason).clone();
        let at = Instant::now();
        scene.send_webhook(&event);
        wait_until(&format!("the leave after {reason}"), TIMEOUT, || scene.api.count("send", id) == 1);
        let took = scene.api.times("send", id)[0] - at;
        assert!(
            took > Duration::from_millis(1_400) && took < Duration::from_millis(2_600) + lateness::since(at),
            "{reason}: {took:?}"
        );
    }
}

/// Nobody saw that session: the SFU is asked, and the wait goes on to its end.
#[test]
fn a_goodbye_without_an_arrival_is_a_question() {
    let scene = Scene::new();
    let began = Instant::now();
    scene.delegate(seconds(4));
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    let asked = scene.sfu.lookups(&scene.alias, &scene.identity).len();
    scene.leave(&session, "CLIENT_INITIATED");
    wait_until("a question", TIMEOUT, || {
        scene.sfu.lookups(&scene.alias, &scene.identity).len() > asked
    });
    let sent = scene.wait_sent(TIMEOUT);
    assert!(sent - began > Duration::from_millis(3_500), "{:?}", sent - began);
}

/// Of an earlier stay, told late.
#[test]
fn a_goodbye_from_before_the_delegation_changes_nothing() {
    let scene = Scene::new();
    let began = Instant::now();
    scene.delegate(seconds(4));
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    scene.sfu.leave(&scene.alias, &scene.identity);
    let mut event = left(&session, "CLIENT_INITIATED");
    event["createdAt"] = json!((crate::support::webhook::now() - 10).to_string());
    scene.send_webhook(&event);
    let sent = scene.wait_sent(TIMEOUT);
    // The wait for its coming, not the goodbye.
    assert!(sent - began > Duration::from_millis(3_500), "{:?}", sent - began);
}

#[test]
fn who_cannot_connect_is_waited_for() {
    let scene = Scene::new();
    scene.delegate(seconds(4));
    let mut session = scene.sfu.join(&scene.alias, &scene.identity);
    scene.sfu.leave(&scene.alias, &scene.identity);
    scene.send_webhook(&event("participant_connection_aborted", &session, Some("SIGNAL_CLOSE")));
    session = scene.join();
    scene.wait_restarts(1);
    scene.stays_until(Instant::now() + seconds(5), seconds(4));
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

/// The whole room in one question, and only those who are missing one by one.
#[test]
fn a_sweep_asks_once_per_room() {
    let scene = Scene::with(watchful);
    let sessions: Vec<_> = (0..4)
        .map(|n| {
            let (user, id) = (format!("user{n}"), format!("event{n}"));
            let body = delegate_of(&scene.home, &user, &scene.room, &id, 60_000);
            assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
            let session = scene
                .sfu
                .join(&scene.alias, &identity(&scene.home.user(&user), "DEVICE", "member1"));
            scene.send_webhook(&joined(&session));
            wait_until("the restart", TIMEOUT, || scene.api.count("restart", &id) >= 1);
            session
        })
        .collect();
    let count = |method: &str| scene.sfu.http.count(|r| r.path.ends_with(method));
    let (began, lists, asked) = (Instant::now(), count("/ListParticipants"), count("/GetParticipant"));
    wait_until("five sweeps", seconds(30), || count("/ListParticipants") >= lists + 5);
    assert!(began.elapsed() > seconds(3), "the sweeps come too fast: {:?}", began.elapsed());
    assert_eq!(count("/GetParticipant"), asked, "somebody was asked for one by one");
    let asked_about = |n: usize| scene.sfu.lookups(&sessions[n].room, &sessions[n].identity).len();
    let before = [0, 1, 3].map(asked_about);
    scene.sfu.leave(&sessions[2].room, &sessions[2].identity);
    wait_until("the leave", seconds(20), || scene.api.count("send", "event2") == 1);
    for n in [0, 1, 3] {
        assert_eq!(scene.api.count("send", &format!("event{n}")), 0);
    }
    assert_eq!([0, 1, 3].map(asked_about), before, "those who are there were asked for one by one");
    let suspected = count("/GetParticipant") - asked;
    assert!((2..=10).contains(&suspected), "{suspected} questions about one absence");
}

/// With a reason that says nothing, a departure is judged by asking: at least three seconds, two denials.
#[test]
fn a_reason_that_says_little_is_not_believed_at_once() {
    let scene = Scene::new();
    scene.delegate(seconds(8));
    let session = scene.joined();
    let at = scene.leave(&session, "STATE_MISMATCH");
    let took = scene.wait_sent(seconds(20)) - at;
    assert!(took > Duration::from_millis(5_500), "{took:?}");
}

/// Webhooks that never come.
#[test]
fn a_departure_that_nobody_told_is_noticed() {
    let scene = Scene::with(watchful);
    scene.sfu.join(&scene.alias, &scene.identity);
    scene.delegate(seconds(4));
    scene.wait_restarts(2);
    let at = Instant::now();
    scene.sfu.leave(&scene.alias, &scene.identity);
    let took = scene.wait_sent(seconds(20)) - at;
    // Two noes, one interval of the sweeps apart.
    assert!(took > Duration::from_millis(1_000), "believed at once: {took:?}");
}

#[test]
fn a_limit_is_waited_for() {
    let scene = Scene::new();
    scene.api.answer(|_, before| match before {
        0 => Reply::Answer {
            status: 429,
            headers: vec![("Retry-After".into(), "1".into())],
            body: br#"{"errcode":"M_LIMIT_EXCEEDED","retry_after_ms":900}"#.into(),
        },
        _ => done(),
    });
    scene.delegate(seconds(8));
    let session = scene.joined();
    scene.wait_restarts(2);
    let restarts = scene.restarts();
    let pause = restarts[1] - restarts[0];
    assert!(pause > Duration::from_millis(950) && pause < seconds(4), "{pause:?}");
    scene.leave(&session, "CLIENT_INITIATED");
    wait_until("the second send", TIMEOUT, || scene.sends().len() == 2);
    let sends = scene.sends();
    let pause = sends[1] - sends[0];
    assert!(pause > Duration::from_millis(950) && pause < seconds(4), "{pause:?}");
    scene.wait_over(TIMEOUT);
}

fn limited(retry_after: &str) -> Reply {
    Reply::Answer {
        status: 429,
        headers: vec![("Retry-After".into(), retry_after.into())],
        body: b"{}".to_vec(),
    }
}

#[test]
fn a_hint_that_is_longer_than_the_delay_does_not_cost_the_event() {
    for after in ["100000", "99999999999999999999", "Fri, 31 Dec 2100 23:59:59 GMT"] {
        let scene = Scene::new();
        scene.api.answer(move |_, before| if before < 1 { limited(after) } else { done() });
        let began = Instant::now();
        scene.delegate(seconds(4));
        scene.joined();
        scene.wait_restarts(2);
        assert!(scene.restarts()[1] - began < seconds(4), "{after}: the event ran out");
    }
}

#[test]
fn a_hint_that_is_longer_than_the_window_does_not_cost_the_leave() {
    let scene = Scene::new();
    let limit_sends = |call: &Managed, before| {
        if call.what == "send" && before < 1 {
            limited("100000")
        } else {
            done()
        }
    };
    scene.api.answer(limit_sends);
    scene.delegate(seconds(8));
    let session = scene.joined();
    let at = scene.leave(&session, "CLIENT_INITIATED");
    wait_until("the second send", seconds(60), || scene.sends().len() >= 2);
    assert!(scene.sends()[1] - at < seconds(40), "{:?}", scene.sends()[1] - at);
}

#[test]
fn a_hint_of_nothing_makes_no_storm() {
    let scene = Scene::new();
    scene.api.answer(|_, _| limited("0"));
    scene.delegate(seconds(4));
    scene.joined();
    scene.wait_over(TIMEOUT);
    let tries = scene.restarts().len();
    assert!((2..=17).contains(&tries), "{tries} tries in four seconds");
}

#[test]
fn a_redirect_is_not_followed() {
    let scene = Scene::new();
    let elsewhere = format!("{}/elsewhere", scene.api.url());
    scene
        .api
        .answer(move |_, before| if before < 1 { Reply::redirect(307, &elsewhere) } else { done() });
    scene.delegate(seconds(4));
    scene.joined();
    scene.wait_restarts(3);
    assert_eq!(scene.api.strays(), [""; 0]);
}

/// A leave is due while the homeserver restarts.
#[test]
fn a_homeserver_that_is_away_gets_the_leave_when_it_is_back() {
    let scene = Scene::new();
    scene.delegate(seconds(4));
    let session = scene.joined();
    scene.api.http.refuse();
    let at = scene.leave(&session, "CLIENT_INITIATED");
    wait_until("six seconds to pass", TIMEOUT, || at.elapsed() > seconds(6));
    assert_eq!(scene.sends().len(), 0);
    scene.api.http.listen_again();
    scene.wait_sent(seconds(20));
    scene.wait_over(TIMEOUT);
}

#[test]
fn what_may_pass_is_tried_again() {
    for failure in [
        Reply::json(502, &json!({"errcode": "M_UNKNOWN"})),
        Reply::text(404, "text/html", "<html><h1>404 Not Found</h1></html>"),
        Reply::Close,
    ] {
        let scene = Scene::new();
        let fails = failure.clone();
        scene.api.answer(move |_, before| if before < 2 { fails.clone() } else { done() });
        scene.delegate(seconds(8));
        let session = scene.joined();
        // Well before the deadline, and no storm.
        wait_until(&format!("restarts after {failure:?}"), seconds(7), || scene.restarts().len() >= 3);
        let restarts = scene.restarts();
        assert_no_storm(&restarts);
        scene.leave(&session, "CLIENT_INITIATED");
        wait_until(&format!("the leave after {failure:?}"), seconds(15), || scene.sends().len() == 3);
        scene.wait_over(TIMEOUT);
    }
}

/// Firewalls and proxies answer with any status, and JSON. None of it is the homeserver's word about anybody who is there, nor
/// that a leave was sent.
#[test]
fn a_page_of_somebody_else_is_neither_a_yes_nor_a_no() {
    const PARTICIPANTS: usize = 10;
    let page = |status, text| Reply::text(status, "text/html", text);
    for answer in [
        page(403, "<h1>Request blocked</h1>"),
        page(401, "who are you?"),
        Reply::json(404, &json!({"message": "no Route matched with those values"})),
        Reply::json(403, &json!({"error": "forbidden"})),
        page(409, ""),
        page(200, "<h1>It works!</h1>"),
        page(200, ""),
        unrecognized(),
    ] {
        let scene = Scene::new();
        let users: Vec<_> = (0..PARTICIPANTS).map(|n| (format!("user{n}"), format!("syd_page{n}"))).collect();
        let sessions: Vec<_> = users
            .iter()
            .map(|(user, delay_id)| {
                let body = delegate_of(&scene.home, user, &scene.room, delay_id, 8000);
                assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
                let session = scene.sfu.join(&scene.alias, &identity(&scene.home.user(user), "DEVICE", "member1"));
                scene.send_webhook(&joined(&session));
                session
            })
            .collect();
        let restarted = |least| users.iter().all(|(_, delay_id)| scene.api.count("restart", delay_id) >= least);
        wait_until("everybody's first restart", TIMEOUT, || restarted(1));
        let everything = Arc::new(Mutex::new(Some(answer.clone())));
        let said = everything.clone();
        scene.api.answer(move |_, _| said.lock().unwrap().clone().unwrap_or_else(done));
        wait_until("everybody's restart to meet it", TIMEOUT, || restarted(2));
        *everything.lock().unwrap() = None;
        wait_until("everybody's restart to be granted", TIMEOUT, || restarted(3));
        // The first leave meets it as well.
        *everything.lock().unwrap() = Some(answer.clone());
        let (gone, delay_id) = (&sessions[0], &users[0].1);
        scene
            .sfu
            .leave(&scene.alias, &identity(&scene.home.user("user0"), "DEVICE", "member1"));
        scene.send_webhook(&left(gone, "CLIENT_INITIATED"));
        wait_until("the leave to meet it", TIMEOUT, || scene.api.count("send", delay_id) >= 1);
        *everything.lock().unwrap() = None;
        wait_until("the leave to be sent again", TIMEOUT, || scene.api.count("send", delay_id) >= 2);
        let false_ones: usize = users[1..].iter().map(|(_, delay_id)| scene.api.count("send", delay_id)).sum();
        assert_eq!(false_ones, 0, "{answer:?}");
    }
}

#[test]
fn an_event_that_is_gone_ends_the_job() {
    for (answer, after) in [
        // Each is asked for once more.
        (not_found(), 2),
        (Reply::json(409, &json!({"errcode": "M_UNKNOWN"})), 2),
        // The other path is tried once, each time.
        (Reply::json(401, &json!({"errcode": "M_MISSING_TOKEN"})), 4),
        (Reply::json(403, &json!({"errcode": "M_FORBIDDEN"})), 4),
    ] {
        let scene = Scene::new();
        let always = answer.clone();
        scene.api.answer(move |_, _| always.clone());
        scene.delegate(seconds(2));
        let session = scene.joined();
        scene.wait_over(TIMEOUT);
        let paths: Vec<_> = scene.api.calls(&scene.delay_id).iter().map(|c| c.stable).collect();
        let expected: &[bool] = if after == 2 { &[false, false] } else { &[false, true, false, true] };
        assert_eq!(paths, expected, "{answer:?}");
        // Nothing more, whatever happens.
        scene.leave(&session, "CLIENT_INITIATED");
        scene.api.answer(|_, _| done());
        scene.delegate_as("later", seconds(2));
        wait_until("the later one to be sent", TIMEOUT, || scene.api.count("send", "later") == 1);
        assert_eq!(scene.api.calls(&scene.delay_id).len(), after, "{answer:?}");
    }
}

#[test]
fn an_event_that_was_sent_already_ends_the_job() {
    let scene = Scene::new();
    scene.api.answer(|call, _| if call.what == "send" { not_found() } else { done() });
    scene.delegate(seconds(8));
    let session = scene.joined();
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_over(TIMEOUT);
    assert_eq!(scene.sends().len(), 1);
}

/// It was updated, or rolled back, while it was watched.
#[test]
fn a_homeserver_that_moves_the_path_is_followed() {
    let scene = Scene::new();
    scene.delegate(seconds(2));
    scene.joined();
    assert_eq!(scene.api.versions_asked(), 1);
    scene.api.answer_versions(versions(false, true));
    scene.api.answer(|call, _| if call.stable { done() } else { unrecognized() });
    let before = scene.restarts().len();
    scene.wait_restarts(before + 4);
    assert_eq!(scene.api.versions_asked(), 2);
    let calls = scene.api.calls(&scene.delay_id);
    let unstable = calls.iter().filter(|c| !c.stable).count();
    assert!(calls.last().is_some_and(|c| c.stable), "{calls:?}");
    // At most one more on the old path once it was gone.
    assert!(unstable <= before + 2, "{calls:?}");
    assert_eq!(scene.sends().len(), 0);
}

#[test]
fn versions_decide_the_path() {
    for (answer, stable) in [
        (versions(true, false), false),
        (versions(false, true), true),
        // Without a token the unstable one, while it is there.
        (versions(true, true), false),
        (versions(false, false), false),
        (Reply::json(500, &json!({})), false),
    ] {
        let scene = Scene::new();
        scene.api.answer_versions(answer.clone());
        scene.delegate(seconds(60));
        scene.joined();
        assert_eq!(scene.api.calls(&scene.delay_id)[0].stable, stable, "{answer:?}");
    }
}

/// A page that was reloaded: left alone, the old event would fire and remove the new session's membership.
#[test]
fn another_event_replaces_the_first_which_is_cancelled() {
    let delay = seconds(4);
    let scene = Scene::new();
    scene.delegate_as("old", delay);
    scene.join();
    wait_until("the first restart", TIMEOUT, || scene.api.count("restart", "old") == 1);
    scene.delegate(delay);
    wait_until("the old one to be cancelled", TIMEOUT, || scene.api.count("cancel", "old") == 1);
    scene.wait_restarts(3);
    assert_eq!(scene.api.count("send", "old"), 0);
    assert_eq!(scene.api.count("cancel", "old"), 1);
    assert!(scene.api.count("restart", "old") <= 2);
    assert_eq!(scene.sends().len(), 0);
    assert_eq!(scene.api.count("cancel", &scene.delay_id), 0);
}

#[test]
fn a_cancellation_that_fails_is_tried_again() {
    let scene = Scene::new();
    scene.api.answer(|call, before| {
        if call.what == "cancel" && before < 2 {
            Reply::json(500, &json!({}))
        } else {
            done()
        }
    });
    scene.delegate_as("old", seconds(8));
    scene.delegate(seconds(8));
    wait_until("the old one to be cancelled", TIMEOUT, || scene.api.count("cancel", "old") == 3);
}

#[test]
fn the_same_event_again_renews_the_job() {
    let delay = seconds(2);
    let scene = Scene::new();
    scene.delegate(delay);
    scene.joined();
    for _ in 0..5 {
        scene.delegate(delay);
    }
    scene.stays_until(Instant::now() + seconds(3), delay);
    assert_eq!(scene.api.count("cancel", &scene.delay_id), 0);
    let restarts = scene.restarts();
    assert_no_storm(&restarts);
}

/// Five seconds per call, and an event that runs for eight.
#[test]
fn a_slow_homeserver_loses_nobody_who_is_there() {
    let scene = Scene::new();
    scene.api.answer(|_, _| done().after(seconds(5)));
    scene.delegate(seconds(8));
    let began = Instant::now();
    let session = scene.join();
    wait_until("half a minute to pass", seconds(60), || {
        assert_eq!(scene.sends().len(), 0);
        Instant::now() > began + seconds(30)
    });
    let restarts = scene.restarts();
    // What counts for the homeserver is when it hears of it, at the latest when it answers.
    for pair in restarts.windows(2) {
        assert!(pair[1] - pair[0] < seconds(8), "the event ran out: {:?}", pair[1] - pair[0]);
    }
    assert!(
        restarts.last().is_some_and(|last| *last + seconds(8) > Instant::now()),
        "{restarts:?}"
    );
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

#[test]
fn an_sfu_that_fails_for_a_while_loses_nobody() {
    for fault in [
        Some(Fault::Instead(Reply::json(500, &json!({"code": "internal", "msg": "x"})))),
        Some(Fault::ProxyPage(404)),
        Some(Fault::ProxyPage(401)),
        Some(Fault::ProxyPage(502)),
        Some(Fault::Garbage),
        // A maintenance page, no page at all, and a gateway's no.
        Some(Fault::ProxyPage(200)),
        Some(Fault::Instead(Reply::text(200, "text/html", ""))),
        Some(Fault::Instead(Reply::text(200, "application/protobuf", ""))),
        Some(Fault::Instead(Reply::json(
            404,
            &json!({"code": "not_found", "message": "no upstream"}),
        ))),
        Some(Fault::NoGrant),
        // Away: nothing listens.
        None,
    ] {
        let delay = seconds(4);
        let scene = Scene::with(watchful);
        scene.delegate(delay);
        let session = scene.joined();
        match fault.clone() {
            Some(fault) => scene.sfu.fail(Some(fault)),
            None => scene.sfu.http.refuse(),
        }
        let what = format!("{fault:?}");
        scene.stays_until(Instant::now() + seconds(3), delay);
        match fault {
            Some(_) => scene.sfu.fail(None),
            None => scene.sfu.http.listen_again(),
        }
        scene.stays_until(Instant::now() + seconds(4), delay);
        let at = scene.leave(&session, "CLIENT_INITIATED");
        let took = scene.wait_sent(TIMEOUT) - at;
        assert!(took < seconds(4), "{what}: {took:?}");
    }
}

/// Whoever may not list rooms is taken to be told that the room stands (decision L3).
#[test]
fn a_proxy_that_refuses_the_list_of_rooms_keeps_no_leave_back() {
    for status in [401, 403, 404, 501] {
        let scene = Scene::with(watchful);
        scene.delegate(seconds(60));
        scene.joined();
        scene.sfu.fail(Some(Fault::NoRoomList(status)));
        // Nobody tells: it is found out by asking.
        scene.sfu.leave(&scene.alias, &scene.identity);
        let gone = Instant::now();
        scene.wait_sent(TIMEOUT);
        eprintln!("{status}: sent after {:.1?}", gone.elapsed());
    }
}

/// A restarted SFU has forgotten the room; it is created again, and its people may come back.
#[test]
fn a_restarted_sfu_gets_its_room_back_and_nobody_is_reported() {
    let delay = seconds(4);
    let scene = Scene::with(watchful);
    scene.delegate(delay);
    scene.joined();
    wait_until("the watch to begin", TIMEOUT, || scene.sfu.http.count(|r| r.method == "GET") >= 2);
    scene.sfu.http.refuse();
    scene.sfu.leave(&scene.alias, &scene.identity);
    scene.sfu.forget_rooms();
    let before = scene.sfu.creations_of(&scene.alias);
    scene.sfu.http.listen_again();
    let back = Instant::now();
    wait_until("the room to be created again", TIMEOUT, || {
        scene.sfu.creations_of(&scene.alias) > before
    });
    assert!(back.elapsed() < seconds(2), "{:?}", back.elapsed());
    scene.stays_until(back + seconds(8), delay);
    let session = scene.join();
    scene.stays_until(Instant::now() + seconds(5), delay);
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}

#[test]
fn at_the_end_connected_events_run_anew_and_a_due_leave_is_sent() {
    // Questions whose answers come in while it stops change nothing.
    let scene = Scene::with(watchful);
    scene.delegate(seconds(60));
    let session = scene.joined();
    let stays = delegate_of(&scene.home, "bob", &scene.room, "bob", 60_000);
    assert_eq!(scene.service.post("/delegate_delayed_leave", &stays).status, 200);
    let bob = identity(&scene.home.user("bob"), "DEVICE", "member1");
    let bob = scene.sfu.join(&scene.alias, &bob);
    scene.send_webhook(&joined(&bob));
    scene.wait_restarted("bob");
    scene.leave(&session, "CLIENT_INITIATED");
    let at = Instant::now();
    scene.service.signal("TERM");
    let status = scene.service.wait_exit(seconds(15));
    assert_eq!(status.code(), Some(0));
    eprintln!("ended after {:.1?}", at.elapsed());
    assert_eq!(scene.api.count("restart", "bob"), 2, "bob was to be restarted once more");
    assert_eq!(scene.api.count("send", "bob"), 0);
    assert_eq!(scene.sends().len(), 1, "the due leave was not sent");
}

#[test]
fn at_the_end_a_homeserver_that_hangs_is_not_waited_for() {
    let scene = Scene::with(|setup| setup.env("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "2"));
    scene.delegate(seconds(60));
    scene.joined();
    scene.wait_restarted(&scene.delay_id);
    scene.api.answer(|_, _| Reply::Hang);
    let at = Instant::now();
    scene.service.signal("TERM");
    let status = scene.service.wait_exit(seconds(20));
    assert_eq!(status.code(), Some(0));
    assert!(at.elapsed() < seconds(6), "{:?}", at.elapsed());
    scene.service.wait_event("leaves_unfinished");
}

/// As Synapse limits an address: so many a second after a burst of five. Nobody's event runs out.
#[test]
fn a_limited_homeserver_carries_as_many_as_it_can() {
    const PER_SECOND: f64 = 1.0;
    let delay = seconds(8);
    let scene = Scene::new();
    let bucket = Bucket::new(PER_SECOND, 5.0);
    let heard: Arc<Mutex<HashMap<String, Vec<Instant>>>> = Arc::default();
    let hears = heard.clone();
    scene.api.answer(move |call, _| {
        if let Some(refusal) = bucket.refuses() {
            return refusal;
        }
        hears.lock().unwrap().entry(call.delay_id.clone()).or_default().push(Instant::now());
        done()
    });
    let began = Instant::now();
    let ids: Vec<_> = (0..5).map(|n| format!("event{n}")).collect();
    for (n, id) in ids.iter().enumerate() {
        let user = format!("user{n}");
        let session = scene
            .sfu
            .join(&scene.alias, &identity(&scene.home.user(&user), "DEVICE", "member1"));
        let body = delegate_of(&scene.home, &user, &scene.room, id, 8_000);
        assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
        scene.send_webhook(&joined(&session));
    }
    let delegated = Instant::now();
    wait_until("half a minute to pass", seconds(60), || began.elapsed() > seconds(30));
    let heard = heard.lock().unwrap();
    for id in &ids {
        assert_eq!(scene.api.count("send", id), 0, "{id} was reported gone");
        let mut before = delegated;
        for at in heard.get(id).into_iter().flatten().copied().chain([Instant::now()]) {
            assert!(at.saturating_duration_since(before) < delay, "{id} ran out after {:?}", at - before);
            before = at;
        }
    }
}

/// Where nothing could notice a departure, `0` does not switch the questions off.
#[test]
fn polling_that_is_switched_off_is_warned_about() {
    let scene = Scene::with(|setup| setup.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "0"));
    let line = scene.service.wait_event("polling_until_webhook");
    line.says(&["WARN", "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "every 30 s", "remedy="]);
    scene.delegate(seconds(8));
    let session = scene.joined();
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
}
