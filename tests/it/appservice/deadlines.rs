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
const TIMEOUT: Duration = Duration::from_secs(8);

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

/// A neighbour that hangs: what it does, who asks, and the status in the end.
type Hang = (&'static str, fn() -> Stage, fn(&Stage) -> Ask, u16);

const HANGS: [Hang; 13] = [
    (
        "a homeserver that accepts and says nothing",
        || Stage::prepared(|own| own.http.greet(Greeting::Silence)),
        Stage::client,
        502,
    ),
    (
        "a homeserver that falls silent after it was known",
        || {
            with(|stage| {
                assert_eq!(stage.call(&stage.client()).status, 200);
                stage.own.http.greet(Greeting::Silence);
            })
        },
        Stage::relayed,
        502,
    ),
    (
        "every request hangs",
        || Stage::prepared(|own| own.script(|_, _| Some(Reply::Hang))),
        Stage::client,
        502,
    ),
    (
        "every answer stops after its head",
        || Stage::prepared(|own| own.script(|_, _| Some(stalled()))),
        Stage::client,
        502,
    ),
    (
        "the question about a homeserver hangs",
        || hanging(Asked::is_about_server),
        Stage::relayed,
        502,
    ),
    (
        "the question of another homeserver hangs",
        || hanging(Asked::is_about_user),
        Stage::federated,
        502,
    ),
    (
        "the answer about a user stops after its head",
        || stalling(Asked::is_about_user),
        Stage::client,
        502,
    ),
    ("the relay hangs", || hanging(Asked::is_relay), Stage::relayed, 502),
    (
        "the answer of the relay stops after its head",
        || stalling(Asked::is_relay),
        Stage::relayed,
        502,
    ),
    ("the delayed event hangs", || hanging(Asked::is_event), Stage::delegation, 503),
    (
        "the delayed event stops after its head",
        || stalling(Asked::is_event),
        Stage::delegation,
        503,
    ),
    (
        "the well-known file hangs",
        || {
            let own = OwnHomeserver::start_with_tls();
            own.federation.answer_client_well_known(Reply::Hang);
            Stage::lost(own)
        },
        Stage::client,
        502,
    ),
    (
        "the SFU hangs behind a slow homeserver",
        || {
            with(|stage| {
                stage.sfu.fail(Some(Fault::Hang));
                stage.own.script(|_, asked| {
                    let yes = Reply::json(200, &json!({"joined": true}));
                    asked.is_about_user().then(|| yes.after(Duration::from_secs(9)))
                });
            })
        },
        Stage::client,
        500,
    ),
];

fn with(change: fn(&Stage)) -> Stage {
    let stage = Stage::new();
    change(&stage);
    stage
}

fn hanging(which: fn(&Asked) -> bool) -> Stage {
    let stage = Stage::new();
    stage.own.script(move |_, asked| which(asked).then_some(Reply::Hang));
    stage
}

fn stalling(which: fn(&Asked) -> bool) -> Stage {
    let stage = Stage::new();
    stage.own.script(move |_, asked| which(asked).then(stalled));
    stage
}

/// Fails unless the request is answered so, after a wait and within the budget.
#[track_caller]
fn assert_ended(what: &str, answer: &Answer, status: u16) {
    answer.assert_errcode(status, "M_UNKNOWN");
    assert!(answer.took > TIMEOUT && answer.took < BUDGET, "{what}: after {:?}", answer.took);
}

#[test]
fn no_neighbour_that_hangs_makes_a_request_take_longer_than_its_homeserver_waits() {
    // All at a time.
    let waiting = HANGS.map(|(what, make, ask, status)| {
        let stage = make();
        let rooms = stage.sfu.creations();
        let request = stage.service.begin(&ask(&stage).call());
        (what, stage, rooms, request, status)
    });
    for (what, stage, rooms, request, status) in waiting {
        let answer = stage.checked(finish(request));
        assert_ended(what, &answer, status);
        assert!(status == 500 || stage.sfu.creations() == rooms, "{what}: a room was opened");
    }
}

/// Every neighbour takes just too long for all of them together.
#[test]
fn a_homeserver_that_is_slow_in_all_it_does_is_given_up_in_time() {
    let stage = Stage::new();
    stage.own.script(|_, asked| {
        let reply = if asked.is_relay() {
            Reply::json(200, &json!({"status": 200, "content": {"jwt": REMOTE_JWT}}))
        } else {
            Reply::json(200, &json!({"joined": true}))
        };
        Some(reply.after(Duration::from_millis(9_500)))
    });
    assert_ended("slow", &stage.call(&stage.relayed()), 502);
}

#[test]
fn what_stays_away_is_given_up_after_ten_seconds() {
    // What each of them does, who asks, and what that is in the end.
    type Case = (fn(&Stage), fn(&Stage) -> Ask, u16);
    let cases: [Case; 6] = [
        (
            |stage| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_user().then(|| error(500, "M_UNKNOWN", "x")));
            },
            Stage::client,
            502,
        ),
        (
            |stage| stage.own.script(|_, asked| asked.is_about_user().then_some(Reply::Close)),
            Stage::client,
            502,
        ),
        (
            |stage| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_user().then(|| Reply::text(404, "text/html", "<html>")));
            },
            Stage::client,
            502,
        ),
        (
            |stage| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_server().then(|| error(429, "M_LIMIT_EXCEEDED", "x")));
            },
            Stage::federated,
            502,
        ),
        (
            |stage| stage.own.script(|_, asked| asked.is_event().then(|| error(503, "M_UNKNOWN", "x"))),
            Stage::delegation,
            503,
        ),
        (
            |stage| {
                stage
                    .own
                    .script(|_, asked| asked.is_event().then(|| error(429, "M_LIMIT_EXCEEDED", "x")));
            },
            Stage::delegation,
            503,
        ),
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
        assert_ended(&format!("case {at}"), &answer, status);
        assert_eq!(stage.sfu.creations(), 0, "case {at}");
        // Short pauses, but pauses.
        let asked = stage.own.asked().len();
        assert!((4..40).contains(&asked), "case {at}: {asked} calls");
    }
}

/// The homeserver has tried three times before it says so (decision A9).
#[test]
fn a_homeserver_behind_ours_that_is_down_is_asked_twice() {
    type Fault = (&'static str, fn(&Stage), usize);
    let faults: [Fault; 4] = [
        (
            "its service is out of order",
            |stage| stage.own.peer(OTHER, |_| (500, json!({"errcode": "M_UNKNOWN"}))),
            2,
        ),
        ("nobody has such a homeserver", |_| {}, 2),
        // A wait that fits is kept, one that does not ends it.
        (
            "a short wait",
            |stage| {
                stage
                    .own
                    .peer(OTHER, |_| (503, json!({"errcode": "M_UNKNOWN", "retry_after_ms": 1500})));
            },
            2,
        ),
        (
            "a long wait",
            |stage| {
                stage
                    .own
                    .peer(OTHER, |_| (503, json!({"errcode": "M_UNKNOWN", "retry_after_ms": 60_000})));
            },
            1,
        ),
    ];
    for (what, fault, relays) in faults {
        let stage = Stage::new();
        fault(&stage);
        let answer = stage.call(&stage.client_of_other());
        answer.assert_errcode(502, "M_UNKNOWN");
        assert!(answer.took < Duration::from_secs(5), "{what}: {:?}", answer.took);
        assert_eq!(stage.own.relayed().len(), relays, "{what}");
        assert!(
            relays == 1 || what != "a short wait" || answer.took > Duration::from_millis(1_400),
            "{what}: {:?}",
            answer.took
        );
    }
}

/// A wait that ends after our own time is handed on at once (decision A9).
#[test]
fn a_rate_limit_is_answered_with_its_wait() {
    fn limited() -> Reply {
        Reply::json(
            429,
            &json!({"errcode": "M_LIMIT_EXCEEDED", "error": "Too Many Requests", "retry_after_ms": 30_000}),
        )
    }
    // What is limited, who asks, and how many questions that may cost.
    type Case = (fn(&Stage), fn(&Stage) -> Ask);
    let cases: [Case; 5] = [
        (
            |stage| stage.own.script(|_, asked| asked.is_about_user().then(limited)),
            Stage::client,
        ),
        (
            |stage| stage.own.script(|_, asked| asked.is_about_server().then(limited)),
            Stage::federated,
        ),
        (
            |stage| stage.own.script(|_, asked| asked.is_event().then(limited)),
            Stage::delegation,
        ),
        (
            |stage| stage.own.script(|_, asked| asked.is_relay().then(limited)),
            |stage| stage.client_of_other(),
        ),
        (
            |stage| {
                stage
                    .own
                    .peer(OTHER, |_| (429, json!({"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 29_500})));
            },
            |stage| stage.client_of_other(),
        ),
    ];
    for (at, (fault, make)) in cases.into_iter().enumerate() {
        let stage = Stage::new();
        let ask = make(&stage);
        fault(&stage);
        let answer = stage.call(&ask);
        answer.assert_errcode(429, "M_LIMIT_EXCEEDED");
        assert_eq!(answer.header("retry-after"), Some("30"), "case {at}");
        assert_eq!(answer.json()["retry_after_ms"], 30_000, "case {at}");
        assert!(answer.took < Duration::from_secs(3), "case {at}: {:?}", answer.took);
        // Each of its questions once.
        let asked = stage.own.asked();
        assert!(
            asked
                .iter()
                .enumerate()
                .all(|(n, (_, one))| asked[..n].iter().all(|(_, other)| one != other)),
            "case {at}: {asked:?}"
        );
        assert_eq!(stage.sfu.creations(), 0, "case {at}");
    }
    // A wait that fits is kept: two questions, three seconds apart.
    let stage = Stage::new();
    let ask = stage.client();
    stage.own.script({
        let first = std::sync::atomic::AtomicBool::new(true);
        move |_, asked| {
            let is_first = asked.is_about_user() && first.swap(false, std::sync::atomic::Ordering::SeqCst);
            is_first.then(|| Reply::json(429, &json!({"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 3_000})))
        }
    });
    let answer = stage.call(&ask);
    assert_eq!((answer.status, stage.done().users), (200, 2));
    assert!(
        (Duration::from_secs(3)..Duration::from_secs(6)).contains(&answer.took),
        "{:?}",
        answer.took
    );
}

/// Of a room that the homeserver does not know, nobody is a member (decision A9).
#[test]
fn a_room_that_is_not_found_is_a_no() {
    let stage = Stage::new();
    let ask = stage.client();
    stage
        .own
        .script(|_, asked| asked.is_about_user().then(|| error(404, "M_NOT_FOUND", "Room not found")));
    let answer = stage.call(&ask);
    answer.assert_errcode(403, "M_FORBIDDEN");
    assert!(answer.took < Duration::from_secs(3), "{:?}", answer.took);
    assert_eq!(stage.done().users, 1);
}

/// Also on the standalone routes (decision A7).
#[test]
fn a_standalone_request_waits_for_the_answer_about_its_room() {
    let stage = Stage::new();
    stage
        .own
        .script(|_, asked| asked.is_about_user().then(|| error(503, "M_UNKNOWN", "x")));
    let home = &stage.own.federation;
    let bodies = [
        ("/get_token", bodies::get_token_of(home, "alice", &unique_room())),
        ("/sfu/get", bodies::sfu_get_of(home, "alice", &unique_room())),
        (
            "/delegate_delayed_leave",
            bodies::delegate_of(home, "alice", &unique_room(), "syd_x", 600_000),
        ),
    ];
    let requests = bodies.map(|(path, body)| stage.service.begin(&Call::json(path, &body)));
    for request in requests {
        assert_ended("standalone", &stage.checked(finish(request)), 502);
    }
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn a_homeserver_that_comes_back_after_three_seconds_was_worth_waiting_for() {
    // Before it was ever seen, and after.
    let (new, known) = (Stage::prepared(|own| own.http.refuse()), Stage::new());
    assert_eq!(known.call(&known.client()).status, 200);
    known.own.http.refuse();
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
