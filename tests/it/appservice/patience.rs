//! Neighbours that are away, slow or silent: what may pass is waited for (decision T7a), and no request takes longer than 25
//! seconds (decision A5), since the homeserver gives it up after 30.

use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::json;

use super::{Ask, OTHER, REMOTE_JWT, Stage};
use crate::support::bodies;
use crate::support::client::{Answer, Call};
use crate::support::neighbour::{Greeting, Reply};
use crate::support::own_homeserver::{Asked, OwnHomeserver, error};
use crate::support::sfu::Fault;
use crate::support::unique_room;

/// What A5 promises.
const BUDGET: Duration = Duration::from_secs(25);
/// Never given up before.
const PATIENCE: Duration = Duration::from_secs(8);

/// The beginning of an answer, and no more.
fn stalled() -> Reply {
    Reply::Stall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{".to_vec())
}

#[track_caller]
fn finish(request: JoinHandle<Option<Answer>>) -> Answer {
    let answer = request.join().expect("the request").expect("an answer");
    answer.assert_manners();
    answer
}

/// Asks, and expects this status within the budget; what hangs is answered after a wait at the earliest.
#[track_caller]
fn ends(stage: &Stage, ask: &Ask, status: u16) {
    let answer = stage.call(ask);
    answer.assert_errcode(status, "M_UNKNOWN");
    assert!(answer.took < BUDGET, "after {:?}", answer.took);
    assert!(answer.took > PATIENCE, "given up after {:?}", answer.took);
}

#[test]
fn a_homeserver_that_accepts_and_says_nothing() {
    let stage = Stage::new();
    stage.own.http.greet(Greeting::Silence);
    ends(&stage, &stage.client(), 502);
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn a_homeserver_that_falls_silent_after_it_was_known() {
    let stage = Stage::new();
    assert_eq!(stage.call(&stage.client()).status, 200);
    stage.own.http.greet(Greeting::Silence);
    ends(&stage, &stage.relayed(), 502);
}

#[test]
fn a_homeserver_that_hangs_on_every_request() {
    let stage = Stage::new();
    stage.own.script(|_, _| Some(Reply::Hang));
    ends(&stage, &stage.client(), 502);
}

#[test]
fn a_homeserver_that_sends_headers_and_nothing_more() {
    let stage = Stage::new();
    stage.own.script(|_, _| Some(stalled()));
    ends(&stage, &stage.client(), 502);
}

#[test]
fn a_question_about_a_homeserver_that_hangs() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_about_server().then_some(Reply::Hang));
    ends(&stage, &stage.relayed(), 502);
}

#[test]
fn a_question_of_another_homeserver_that_hangs() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_about_user().then(stalled));
    ends(&stage, &stage.federated(), 502);
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn a_relay_that_hangs() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_relay().then_some(Reply::Hang));
    ends(&stage, &stage.relayed(), 502);
}

#[test]
fn a_relay_that_sends_headers_and_nothing_more() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_relay().then(stalled));
    ends(&stage, &stage.relayed(), 502);
}

#[test]
fn a_delayed_event_that_hangs() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_event().then_some(Reply::Hang));
    ends(&stage, &stage.delegation(), 503);
}

#[test]
fn a_delayed_event_that_sends_headers_and_nothing_more() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_event().then(stalled));
    ends(&stage, &stage.delegation(), 503);
}

#[test]
fn a_well_known_file_that_hangs() {
    let stage = Stage::lost(OwnHomeserver::start_with_tls());
    stage.own.federation.answer_client_well_known(Reply::Hang);
    ends(&stage, &stage.client(), 502);
}

#[test]
fn an_sfu_that_hangs_behind_a_slow_homeserver() {
    let stage = Stage::new();
    let slow = |asked: &Asked| asked.is_about_user();
    stage
        .own
        .script(move |_, asked| slow(asked).then(|| Reply::json(200, &json!({"joined": true})).after(Duration::from_secs(9))));
    stage.sfu.fail(Some(Fault::Hang));
    ends(&stage, &stage.client(), 500);
}

/// Every neighbour takes just too long for all of them together.
#[test]
fn a_homeserver_that_is_slow_in_all_it_does() {
    let stage = Stage::new();
    stage.own.script(|_, asked| {
        let reply = if asked.is_relay() {
            Reply::json(200, &json!({"status": 200, "content": {"jwt": REMOTE_JWT}}))
        } else {
            Reply::json(200, &json!({"joined": true}))
        };
        Some(reply.after(Duration::from_millis(9_500)))
    });
    ends(&stage, &stage.relayed(), 502);
}

#[test]
fn what_stays_away_is_given_up_after_ten_seconds() {
    // What each of them does, who asks, and what that is in the end.
    type Case = (fn(&Stage), fn(&Stage) -> Ask, u16);
    let cases: [Case; 8] = [
        (|stage| stage.own.script(|_, asked| asked.is_about_user().then(|| error(500, "M_UNKNOWN", "x"))), Stage::client, 502),
        (|stage| stage.own.script(|_, asked| asked.is_about_user().then_some(Reply::Close)), Stage::client, 502),
        (
            |stage| stage.own.script(|_, asked| asked.is_about_user().then(|| Reply::text(404, "text/html", "<html>"))),
            Stage::client,
            502,
        ),
        (|stage| stage.own.script(|_, asked| asked.is_about_server().then(|| error(429, "M_LIMIT_EXCEEDED", "x"))), Stage::federated, 502),
        (|stage| stage.own.script(|_, asked| asked.is_event().then(|| error(503, "M_UNKNOWN", "x"))), Stage::delegation, 503),
        (|stage| stage.own.script(|_, asked| asked.is_event().then(|| error(429, "M_LIMIT_EXCEEDED", "x"))), Stage::delegation, 503),
        (|stage| stage.own.peer(OTHER, |_| (500, json!({"errcode": "M_UNKNOWN"}))), |stage| stage.client_of_other(), 502),
        // Nobody has such a homeserver.
        (|_| {}, |stage| stage.client_of_other(), 502),
    ];
    let stages = cases.map(|(fault, make, status)| {
        let stage = Stage::new();
        let ask = make(&stage);
        fault(&stage);
        let request = stage.service.begin(&ask.call());
        (stage, request, status)
    });
    for (at, (stage, request, status)) in stages.into_iter().enumerate() {
        let answer = stage.checked(finish(request));
        answer.assert_errcode(status, "M_UNKNOWN");
        assert!(answer.took > PATIENCE && answer.took < BUDGET, "case {at}: {:?}", answer.took);
        assert_eq!(stage.sfu.creations(), 0, "case {at}");
        // Short pauses, but pauses.
        let asked = stage.own.asked().len();
        assert!((4..40).contains(&asked), "case {at}: {asked} calls");
    }
}

/// Also on the standalone routes (decision A7).
#[test]
fn a_standalone_request_waits_for_the_answer_about_its_room() {
    let stage = Stage::new();
    stage.own.script(|_, asked| asked.is_about_user().then(|| error(503, "M_UNKNOWN", "x")));
    let home = &stage.own.federation;
    let bodies = [
        ("/get_token", bodies::get_token_of(home, "alice", &unique_room())),
        ("/sfu/get", bodies::sfu_get_of(home, "alice", &unique_room())),
        ("/delegate_delayed_leave", bodies::delegate_of(home, "alice", &unique_room(), "syd_x", 600_000)),
    ];
    let requests = bodies.map(|(path, body)| stage.service.begin(&Call::json(path, &body)));
    for request in requests {
        let answer = stage.checked(finish(request));
        answer.assert_errcode(502, "M_UNKNOWN");
        assert!(answer.took > PATIENCE && answer.took < BUDGET, "{:?}", answer.took);
    }
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn a_homeserver_that_comes_back_after_three_seconds_was_worth_waiting_for() {
    // Before it was ever seen, and after.
    let (new, known) = (Stage::new(), Stage::new());
    assert_eq!(known.call(&known.client()).status, 200);
    for stage in [&new, &known] {
        stage.own.http.refuse();
    }
    let standalone = |stage: &Stage| {
        let room = stage.room();
        Call::json("/get_token", &bodies::get_token_of(&stage.own.federation, "alice", &room))
    };
    let mut waiting = Vec::new();
    for stage in [&new, &known] {
        for make in [Stage::client, Stage::relayed, Stage::federated, Stage::delegation] as [fn(&Stage) -> Ask; 4] {
            waiting.push(stage.service.begin(&make(stage).call()));
        }
        waiting.push(stage.service.begin(&standalone(stage)));
    }
    std::thread::sleep(Duration::from_secs(3));
    for stage in [&new, &known] {
        stage.own.http.listen_again();
    }
    for (at, request) in waiting.into_iter().enumerate() {
        let answer = finish(request);
        assert_eq!(answer.status, 200, "request {at}: {}", answer.text());
        assert!(answer.took > Duration::from_secs(2), "request {at} did not wait: {:?}", answer.took);
    }
}
