//! Who is in the room: on which path that is asked, and how often (decisions A4 and A8).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Ask, OTHER, Stage};
use crate::support::hashes::{SLOT, alias};
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::{Asked, OwnHomeserver, Proposal};
use crate::support::sfu::Fault;
use crate::support::{unique_room, wait_until};

type Path = (Proposal, bool);

/// The paths of all calls that belong to a proposal, in their order.
fn paths(stage: &Stage) -> Vec<Path> {
    stage.own.asked().iter().filter_map(|(_, asked)| asked.proposal()).collect()
}

#[test]
fn versions_say_which_path_and_the_other_one_is_tried_once() {
    // Everything on the same side, so that one request shows all three.
    let side = |stable: bool| Proposal::ALL.map(|proposal| (proposal, stable)).to_vec();
    for (says, has_stable, expected) in [
        (vec![], false, vec![false]),
        (side(false), false, vec![false]),
        (side(true), true, vec![true]),
        ([side(true), side(false)].concat(), true, vec![true]),
        (vec![], true, vec![false, true]),
        (side(true), false, vec![true, false]),
    ] {
        for make in [Stage::client, Stage::delegation] as [fn(&Stage) -> Ask; 2] {
            let stage = Stage::prepared(|own| {
                own.advertise(says.clone());
                own.serve(side(has_stable));
            });
            let ask = make(&stage);
            let answer = stage.call(&ask);
            assert_eq!(answer.status, 200, "{says:?}: {}", answer.text());
            let question = |asked: &Asked| asked.is_about_user() || asked.is_event();
            let tried: Vec<_> = stage.own.asked().into_iter().filter(|(_, asked)| question(asked)).collect();
            let first = tried.first().and_then(|(_, asked)| asked.proposal()).expect("a question").0;
            let of_first: Vec<_> = paths(&stage)
                .into_iter()
                .filter(|(proposal, _)| *proposal == first)
                .map(|(_, s)| s)
                .collect();
            assert_eq!(
                of_first.get(..expected.len()),
                Some(expected.as_slice()),
                "says {says:?}, has {has_stable}"
            );
        }
    }
}

#[test]
fn versions_that_say_nothing_of_use_are_no_error() {
    for reply in [
        Reply::json(500, &serde_json::json!({})),
        Reply::json(404, &serde_json::json!({"errcode": "M_UNRECOGNIZED"})),
        Reply::text(200, "text/html", "<html>"),
        Reply::redirect(302, "/elsewhere"),
        Reply::Close,
    ] {
        let shown = format!("{reply:?}");
        let stage = Stage::prepared(|own| own.script(move |_, asked| (*asked == Asked::Versions).then(|| reply.clone())));
        assert_eq!(stage.call(&stage.client()).status, 200, "{shown}");
        assert_eq!(stage.call(&stage.relayed()).status, 200, "{shown}");
        assert_eq!(stage.call(&stage.delegation()).status, 200, "{shown}");
    }
}

#[test]
fn a_proposal_that_is_on_neither_path_is_a_502_with_a_remedy() {
    let stage = Stage::prepared(|own| own.serve([]));
    let answer = stage.call(&stage.client());
    answer.assert_errcode(502, "M_UNKNOWN");
    assert_eq!(paths(&stage), [(Proposal::IsJoined, false), (Proposal::IsJoined, true)]);
    stage.service.wait_line_of(&answer).says(&["WARN", "msc4502_enabled"]);
    assert_eq!(stage.sfu.creations(), 0);
}

/// `/versions` is asked in nobody's name.
#[test]
fn versions_are_asked_without_the_token_and_seldom() {
    let stage = Stage::new();
    for _ in 0..5 {
        assert_eq!(stage.call(&stage.client()).status, 200);
    }
    let requests = stage.own.http.requests();
    let versions: Vec<_> = requests.iter().filter(|r| r.path == "/_matrix/client/versions").collect();
    assert_eq!(versions.len(), 1);
    assert_eq!(versions[0].header("authorization"), None);
}

#[test]
fn answers_that_are_not_a_yes_are_a_no_or_a_502() {
    let stage = Stage::new();
    for (reply, status) in [
        (Reply::json(200, &serde_json::json!({"joined": false})), 403),
        (Reply::json(200, &serde_json::json!({"joined": "true"})), 502),
        (Reply::json(200, &serde_json::json!({"joined": 1})), 502),
        (Reply::json(200, &serde_json::json!({})), 502),
        (Reply::json(400, &serde_json::json!({"errcode": "M_INVALID_PARAM"})), 403),
        (Reply::json(400, &serde_json::json!({"errcode": "M_MISSING_PARAM"})), 502),
        (Reply::json(200, &serde_json::json!([true])), 502),
        (Reply::text(200, "text/html", "<html>"), 502),
        (Reply::redirect(302, "/elsewhere"), 502),
        (Reply::Flood(1024 * 1024), 502),
    ] {
        let shown = format!("{reply:?}");
        stage.own.script(move |_, asked| asked.is_about_user().then(|| reply.clone()));
        let answer = stage.call(&stage.client());
        assert_eq!(answer.status, status, "{shown}: {}", answer.text());
    }
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn a_burst_asks_once_per_user_and_makes_one_room_at_a_time() {
    const SLOW: Duration = Duration::from_millis(150);
    let stage = Stage::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info").unset("RUST_LOG"));
    let room = unique_room();
    let users: Vec<_> = (0..20).map(|n| stage.own.user(&format!("user{n}"))).collect();
    users.iter().for_each(|user| stage.own.join(&room, user));
    // Without the memory of rooms, which needs the time of the answer.
    stage.sfu.http.without_date();
    stage.sfu.fail(Some(Fault::Slow(SLOW)));
    let calls: Vec<_> = (0..200)
        .map(|n| {
            let mut ask = stage.client_in(&room).set("member_id", format!("member{n}"));
            ask.who = Some(users[n % users.len()].clone());
            ask.call()
        })
        .collect();
    let began = Instant::now();
    let answers = stage.service.flood(&calls, 200);
    let took = began.elapsed();
    assert!(answers.iter().all(|answer| answer.status == 200), "{}", answers[0].text());
    let mut questions = BTreeMap::new();
    for (_, asked) in stage.own.asked() {
        if let Asked::IsJoined { mxid: Some(user), .. } = asked {
            *questions.entry(user).or_insert(0) += 1;
        }
    }
    // A second question about somebody only where the whole burst took longer than an answer is remembered.
    if took < Duration::from_secs(5) {
        assert!(
            questions.len() == 20 && questions.values().all(|count| *count == 1),
            "{questions:?}"
        );
    }
    let creations = stage.sfu.creations_of(&alias(&room, SLOT));
    let slots = took.as_millis() / SLOW.as_millis() + 1;
    assert!((creations as u128) <= slots, "{creations} creations of {SLOW:?} each in {took:?}");
}

/// Users of one other homeserver, about whom the answer takes long: nobody else asks, so they have most of the places.
#[test]
fn two_hundred_users_of_another_homeserver_are_answered_in_time() {
    let stage = Stage::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info").unset("RUST_LOG"));
    let room = unique_room();
    stage.own.join(&room, stage.own.name());
    stage.own.script(|_, asked| {
        let yes = || Reply::json(200, &serde_json::json!({"joined": true}));
        asked.is_about_user().then(|| yes().after(Duration::from_millis(500)))
    });
    let calls: Vec<_> = (0..200)
        .map(|n| {
            let mut ask = stage.federated();
            ask.body["room_id"] = room.as_str().into();
            ask.body["user_id"] = format!("@user{n}:{OTHER}").into();
            ask.call()
        })
        .collect();
    let began = Instant::now();
    let answers = stage.service.flood(&calls, calls.len());
    eprintln!("200 users of another homeserver, half a second each: {:.1?}", began.elapsed());
    for answer in &answers {
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.took < Duration::from_secs(15), "{:?}", answer.took);
    }
}

#[test]
fn a_yes_is_believed_for_five_seconds_and_a_no_not_at_all() {
    let stage = Stage::new();
    // A no, and a yes right after it.
    let (room, user) = (unique_room(), stage.own.user("alice"));
    let late = stage.client_in(&room);
    for asked in 1..=3 {
        assert_eq!(stage.call(&late).status, 403);
        assert_eq!(stage.own.count(Asked::is_about_user), asked);
    }
    stage.own.join(&room, &user);
    assert_eq!(stage.call(&late).status, 200);
    assert_eq!(stage.own.count(Asked::is_about_user), 4);

    // A yes, which is believed at first, and for all endpoints.
    let began = Instant::now();
    let relayed = stage.relayed();
    let asks = [relayed.clone(), relayed.clone().set("server_name", ""), relayed.clone()];
    let before = stage.done();
    for mut ask in asks {
        if ask.body["server_name"] == "" {
            ask.body["url"] = stage.sfu.url().into();
        }
        assert_eq!(stage.call(&ask).status, 200);
    }
    if began.elapsed() < Duration::from_secs(5) {
        let done = stage.done() - before;
        assert_eq!((done.users, done.servers), (1, 1));
    }
    // Gone meanwhile: found out once the five seconds are over.
    stage.own.part(&relayed.room(), &user);
    stage.own.part(&relayed.room(), OTHER);
    wait_until("the answer to be forgotten", Duration::from_secs(15), || {
        std::thread::sleep(Duration::from_millis(100));
        stage.call(&relayed).status == 403
    });
    assert!(
        began.elapsed() >= Duration::from_millis(4900),
        "forgotten after {:?}",
        began.elapsed()
    );
    assert!(stage.own.count(Asked::is_about_user) >= 6);
}

/// What one room or one user was told is nobody else's.
#[test]
fn an_answer_is_for_one_user_and_one_room() {
    let stage = Stage::new();
    let ask = stage.client();
    assert_eq!(stage.call(&ask).status, 200);
    let mut other = ask.clone();
    other.who = Some(stage.own.user("mallory"));
    assert_eq!(stage.call(&other).status, 403);
    for room in [format!("{}x", ask.room()), format!("{}\0", ask.room()), ask.room().to_uppercase()] {
        let before = stage.done();
        assert_eq!(stage.call(&ask.clone().set("room_id", room.as_str())).status, 403, "{room:?}");
        assert_eq!((stage.done() - before).users, 1, "{room:?}");
    }
}

#[test]
fn a_client_that_hangs_up_does_not_take_the_answer_of_the_others_along() {
    let stage = Stage::new();
    stage.own.script(|_, asked| {
        asked
            .is_about_user()
            .then(|| Reply::json(200, &serde_json::json!({"joined": true})).after(Duration::from_millis(600)))
    });
    let ask = stage.client();
    let mut impatient = stage.service.connect();
    impatient.send(&ask.call().bytes(stage.service.address()));
    wait_until("the question", Duration::from_secs(10), || {
        stage.own.count(Asked::is_about_user) == 1
    });
    let patient = stage.service.begin(&ask.call());
    drop(impatient);
    assert_eq!(patient.join().expect("the request").expect("an answer").status, 200);
}

/// The base address may have a path of its own.
#[test]
fn the_address_of_the_homeserver_may_end_in_a_slash() {
    let own = OwnHomeserver::start();
    let address = format!("{}={}/", own.name(), own.url());
    let stage = Stage::of(own, |setup| setup.env("LIVEKIT_CS_API_URL_OVERRIDES", &address));
    assert_eq!(stage.call(&stage.client()).status, 200);
}

/// A10: the address leads to another homeserver than the one that is named.
#[test]
fn a_homeserver_of_another_name_is_told_at_once() {
    let stage = Stage::new();
    stage.service.wait_event("homeserver_up");
    wait_until("the question", Duration::from_secs(20), || {
        stage.own.http.count(|r| r.path.ends_with("/account/whoami")) == 1
    });
    assert!(!stage.service.log().contains("ERROR"), "it is the right one");
    let other = Stage::prepared(|own| {
        own.script(|_, asked| {
            let user = serde_json::json!({"user_id": "@lk-jwt-service:other.example.org", "is_guest": false});
            (*asked == Asked::Whoami).then(|| Reply::json(200, &user))
        });
    });
    let line = other.service.wait_event("wrong_server_name");
    assert!(line.has(&[("level", "ERROR"), ("its_name", "other.example.org")]), "{line}");
    line.says(&["LIVEKIT_HS_SERVER_NAME is not the homeserver", "remedy="]);
    assert!(other.own.http.count(|r| r.path.ends_with("/account/whoami")) == 1);
}
