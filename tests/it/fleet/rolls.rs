//! Rolling changes: all replicas are replaced one after the other by ones with other settings, or by another service.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::events::Events;
use super::length;
use super::link::Link;
use super::scenes::{HOUR, SHORT, crowd, stop};
use super::stage::{Person, Stage, TIMEOUT, within};
use super::standin::StandIn;
use crate::support::client::Connection;
use crate::support::service::{Service, Setup};
use crate::support::sfu::Session;
use crate::support::{bodies, secrets, wait_until, webhook};

/// So many come before somebody leaves.
const OTHERS: usize = 5;
/// A departure is reported within that time, whoever was told of it and whoever watches by then.
const GOODBYE: Duration = Duration::from_millis(11_500);

/// R6b: all get another LIVEKIT_URL, which leads to the same SFU: those that have it wait for the last of the others.
#[test]
fn a_rolling_change_of_the_sfus_address_refuses_nothing() {
    for delay in [SHORT, HOUR] {
        let Some(mut stage) = Stage::start(3) else { return };
        let other = Link::to(stage.sfu.http.address());
        let url = format!("ws://{}", other.address());
        rolls("another LIVEKIT_URL", &mut stage, delay, |setup| setup.env("LIVEKIT_URL", &url));
    }
}

/// R6b: all get another key and secret, while the SFU takes both and signs its webhooks with the former; the new ones know both.
#[test]
fn a_rolling_change_of_the_secret_refuses_nothing() {
    let Some(mut stage) = Stage::start(3) else { return };
    let secret = secrets::sfu_secret();
    stage.sfu.accept("otherkey", &secret);
    let keys = format!("otherkey: {secret}\n{}: {}", stage.sfu.key(), stage.sfu.secret());
    rolls("another LIVEKIT_SECRET", &mut stage, HOUR, |setup| {
        let setup = setup.unset("LIVEKIT_KEY").unset("LIVEKIT_SECRET");
        setup.env("LIVEKIT_KEYS", &keys).secret(&secret)
    });
    // By now the SFU can sign with the new one.
    let (person, session) = stage.arrive(HOUR);
    stage.sfu.leave(&session.room, &session.identity);
    let gone = Instant::now();
    let event = webhook::left(&session, "CLIENT_INITIATED").to_string();
    let answer = stage.next().call(&webhook::signed_with("otherkey", &secret, &event));
    assert_eq!(answer.status, 200, "{}", answer.text());
    stage.wait_sent(&person, gone, TIMEOUT);
}

fn rolls(what: &str, stage: &mut Stage, delay: Duration, change: impl Fn(Setup) -> Setup) {
    let people = crowd(stage, 16, delay);
    wait_until("all to be on record as seen", TIMEOUT, || {
        let record = |person: &Person| {
            stage
                .redis
                .hget(&serde_json::to_string(&[&person.alias, &person.identity]).expect("texts"))
        };
        people
            .iter()
            .all(|(person, _)| record(person).is_some_and(|record| record.contains(r#""seen":true"#)))
    });
    let began = Instant::now();
    let (mut there, mut reported) = (VecDeque::new(), Vec::new());
    let mut came = 0;
    let mut longest = Duration::ZERO;
    for at in 0..3 {
        stage.add(&change);
        let leaving = stage.nodes[at].take().expect("a node");
        leaving.signal("TERM");
        let stopped = Instant::now();
        while leaving.exit_status().is_none() {
            there.push_back(arrives(stage, &leaving, delay));
            came += 1;
            // For as long as it takes some others to come.
            if there.len() > OTHERS {
                reported.extend(there.pop_front().map(|(person, session)| (person, stage.leave(&session))));
            }
            assert!(stopped.elapsed() < TIMEOUT, "it does not end:\n{}", leaving.log());
        }
        leaving.wait_exit(TIMEOUT);
        longest = longest.max(stopped.elapsed());
        let log = leaving.log();
        // That would be a round of restarts (L12).
        assert!(!log.contains("event=watch_not_handed_over"), "{log}");
        assert!(!log.contains("not every delayed event"), "{log}");
        stage.wait_one_watcher();
    }
    for (person, session) in there {
        reported.push((person, stage.leave(&session)));
    }
    let goodbyes = reported.iter().map(|(person, gone)| stage.wait_sent(person, *gone, TIMEOUT));
    let worst = goodbyes.max().unwrap_or_default();
    // Each is restarted when it is due, and there is no round of restarts.
    let early = people.iter().map(|(person, _)| {
        let times = stage.api.times("restart", &person.delay_id);
        times.windows(2).filter(|pair| pair[1] - pair[0] < delay / 4).count()
    });
    let early: usize = early.sum();
    eprintln!(
        "R6b, {what}, {delay:?}: {came} came and went, the latest goodbye after {worst:?}, the longest end {longest:?}, {early} restarts \
         that were not due"
    );
    assert!(early < people.len(), "{early}");
    assert!(worst <= within(GOODBYE, began), "{worst:?}");
    stage.assert_there(&people);
    let left = Instant::now();
    for (_, session) in &people {
        stage.leave(session);
    }
    for (person, _) in &people {
        stage.wait_sent(person, left, TIMEOUT);
    }
}

/// Somebody delegates, asks for a token and joins; whoever still comes to the one that is leaving is served, or finds it closed.
#[track_caller]
fn arrives(stage: &Stage, leaving: &Service, delay: Duration) -> (Person, Session) {
    let (person, session) = stage.arrive(delay);
    let body = bodies::get_token_of(&stage.home, &person.user, &person.room);
    assert_eq!(stage.next().post("/get_token", &body).status, 200);
    if let Ok(connection) = Connection::open(leaving.address()).as_mut() {
        let call = crate::support::client::Call::json("/get_token", &bodies::get_token_of(&stage.home, &person.user, &person.room));
        connection.send(&call.bytes(leaving.address()));
        assert!(connection.answer().is_none_or(|answer| answer.status == 200));
    }
    (person, session)
}

/// R12: from one that is no replica to three and back, while a hundred people are there, and some come and go.
#[test]
fn a_rolling_update_from_the_go_service_and_back_loses_nothing() {
    if !length::is_full() {
        return;
    }
    let Some(mut stage) = Stage::start(0) else { return };
    let events = Events::of(&stage.api);
    let former = StandIn::start(&stage);
    let mut people: Vec<_> = (0..100).map(|_| comes(&stage, &events, Some(&former))).collect();
    stage.wait_restarted(&people, Instant::now() - SHORT);
    let mut gone = Vec::new();
    // Ours start, while the other one goes on.
    for turn in 0..3 {
        let added = Instant::now();
        stage.add(|setup| setup);
        stage.wait_one_watcher();
        if turn == 0 {
            // The records do not say who was seen: those who are there are asked about, and seen.
            stage.wait_restarted(&people, added);
        }
        for tell in [Some(&former), None] {
            let (person, session) = people.remove(7);
            leaves(&stage, &session, tell);
            gone.push((person, Instant::now()));
            people.push(comes(&stage, &events, tell));
        }
        all_live(&events, &people);
    }
    drop(former);
    let (ended, after) = (Instant::now(), Instant::now());
    // What it was told last is found when the records are read again, 15 s later at most.
    while people
        .iter()
        .any(|(person, _)| !stage.api.times("restart", &person.delay_id).iter().any(|at| *at > after))
    {
        all_live(&events, &people);
        assert!(ended.elapsed() < TIMEOUT + SHORT, "somebody is not watched");
        std::thread::sleep(Duration::from_millis(50));
    }
    let watched = ended.elapsed();
    for _ in 0..5 {
        let (person, session) = people.remove(11);
        leaves(&stage, &session, None);
        gone.push((person, Instant::now()));
        people.push(comes(&stage, &events, None));
    }
    all_reported(&stage, &events, &gone);
    // And back: the other one starts, and everybody comes to it; ours end one by one.
    let latter = StandIn::start(&stage);
    for at in 0..3 {
        for tell in [Some(&latter), None] {
            let (person, session) = people.remove(13);
            leaves(&stage, &session, tell);
            gone.push((person, Instant::now()));
        }
        people.push(comes(&stage, &events, Some(&latter)));
        stop(&mut stage, at);
        all_live(&events, &people);
    }
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    all_reported(&stage, &events, &gone);
    all_live(&events, &people);
    for (person, session) in &people {
        assert_eq!(events.sent(person), Vec::<String>::new(), "somebody who is there was reported gone");
        leaves(&stage, session, Some(&latter));
        gone.push((person.clone(), Instant::now()));
    }
    all_reported(&stage, &events, &gone);
    events.assert_well();
    assert_eq!(stage.records(), 0);
    eprintln!(
        "R12: {} people, all watched {watched:?} after the former one ended; all {} departures reported",
        people.len(),
        gone.len()
    );
}

fn comes(stage: &Stage, events: &Events, at: Option<&StandIn>) -> (Person, Session) {
    let person = stage.person(SHORT);
    events.schedule(&person);
    match at {
        Some(other) => other.delegate(&person),
        None => assert_eq!(stage.delegate_at(stage.next(), &person), 200),
    }
    let session = stage.sfu.join(&person.alias, &person.identity);
    match at {
        Some(other) => other.on_joined(&session),
        None => stage.tell(&webhook::joined(&session)),
    }
    (person, session)
}

fn leaves(stage: &Stage, session: &Session, told: Option<&StandIn>) {
    stage.sfu.leave(&session.room, &session.identity);
    match told {
        Some(other) => other.on_left(session),
        None => stage.tell(&webhook::left(session, "CLIENT_INITIATED")),
    }
}

#[track_caller]
fn all_live(events: &Events, people: &[(Person, Session)]) {
    for (person, _) in people {
        assert!(!events.living(person).is_empty(), "no living event: {person:?}");
        assert_eq!(events.sent(person), Vec::<String>::new(), "somebody who is there was reported gone");
    }
}

#[track_caller]
fn all_reported(stage: &Stage, events: &Events, gone: &[(Person, Instant)]) {
    for (person, at) in gone {
        wait_until("a departure to be reported", TIMEOUT, || events.living(person).is_empty());
        let calls = stage.api.calls(&person.delay_id);
        let calls: Vec<_> = calls.iter().map(|call| (&call.what, call.at.elapsed())).collect();
        let gone = at.elapsed();
        assert_eq!(
            events.sent(person),
            std::slice::from_ref(&person.delay_id),
            "{person:?}, gone for {gone:?}; what was done to it, and how long ago: {calls:?}"
        );
    }
}
