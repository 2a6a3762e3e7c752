//! Trouble with Redis itself while the watch changes hands, and messages that no node has written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::scenes::{HOUR, KNOWN, SHORT, SHORT_TAKEOVER, crowd};
use super::stage::{Stage, TIMEOUT, readyz, up, within};
use crate::support::{wait_until, webhook};

/// R2b: the first heir may run no script when its turn comes.
#[test]
fn where_the_heir_is_refused_the_next_one_follows() {
    let Some(mut stage) = Stage::start(1) else { return };
    let heir_may = |stage: &Stage, rights: &[&str]| {
        let command = [&["ACL", "SETUSER", "heir", "on", ">secret", "~*", "&*"], rights].concat();
        assert_eq!(stage.redis.ask(&command), "+OK\r\n");
    };
    heir_may(&stage, &["+@all"]);
    let heir = stage.add_as("heir:secret@", |setup| setup);
    let third = stage.add(|setup| setup);
    wait_until("all nodes to be up", TIMEOUT, || stage.living().all(|node| up(node) == 3));
    let people = crowd(&stage, 10, SHORT);
    std::thread::sleep(KNOWN);
    let watcher = stage.wait_one_watcher();
    heir_may(&stage, &["-eval", "-evalsha"]);
    let killed = stage.kill(watcher);
    wait_until("the third to watch", TIMEOUT, || {
        readyz(stage.nodes[third].as_ref().expect("a node"))["watches"] == true
    });
    let took = killed.elapsed();
    eprintln!("R2b: the heir is refused, the third watches after {took:?}");
    assert!(took <= within(SHORT_TAKEOVER + Duration::from_millis(1200), killed), "{took:?}");
    heir_may(&stage, &["+@all"]);
    wait_until("the heir to be up again", TIMEOUT, || {
        readyz(stage.nodes[heir].as_ref().expect("a node"))["redis"] == true
    });
    assert_eq!(stage.wait_one_watcher(), third);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
}

/// R11b: the watcher dies while Redis has no room, and while it answers in every other second only.
#[test]
fn a_takeover_on_a_full_or_a_stalling_redis_loses_nothing() {
    let Some(mut stage) = Stage::start(3) else { return };
    let people = crowd(&stage, 20, HOUR);
    let memory = |stage: &Stage, limit: &str| assert_eq!(stage.redis.ask(&["CONFIG", "SET", "maxmemory", limit]), "+OK\r\n");
    let watcher = stage.wait_one_watcher();
    memory(&stage, "1");
    let killed = stage.kill(watcher);
    stage.wait_other_watcher(watcher, TIMEOUT);
    eprintln!("R11b: watched on a full Redis after {:?}", killed.elapsed());
    stage.wait_looked_up(&people, killed, TIMEOUT);
    memory(&stage, "0");
    stage.add(|setup| setup);
    let watcher = stage.wait_one_watcher();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let redis = &stage.redis;
        let nodes = &stage.nodes;
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                redis.freeze();
                std::thread::sleep(Duration::from_secs(1));
                redis.thaw();
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        std::thread::sleep(Duration::from_millis(1_500));
        nodes[watcher].as_ref().expect("a node").signal("KILL");
        let killed = Instant::now();
        let found = crate::support::comes_true(TIMEOUT * 2, || {
            let others = nodes.iter().enumerate().filter(|(at, _)| *at != watcher);
            others
                .filter_map(|(_, node)| node.as_ref())
                .any(|node| readyz(node)["watches"] == true)
        });
        eprintln!("R11b: watched on a stalling Redis after {:?}", killed.elapsed());
        is_over.store(true, Ordering::Relaxed);
        assert!(found, "nobody watches");
    });
    stage.nodes[watcher].take().expect("a node").wait_exit(TIMEOUT);
    stage.wait_one_watcher();
    stage.assert_there(&people);
    assert_eq!(stage.records(), people.len());
    for (person, session) in &people {
        let gone = stage.leave(session);
        stage.wait_sent(person, gone, TIMEOUT);
    }
}

/// R13: whoever can write to Redis can have the SFU asked, and nothing else.
#[test]
fn forged_and_repeated_messages_are_asked_about() {
    let Some(stage) = Stage::start(2) else { return };
    let people = crowd(&stage, 4, SHORT);
    let forged = |event: &Value| {
        let mut event = event.clone();
        event["iat"] = webhook::now().into();
        event["digest"] = format!("{:016x}", crate::support::unique()).into();
        let id = stage.redis.ask(&[
            "XADD",
            "{lk-jwt:jobs}:in",
            "*",
            "webhook",
            "0000000000000007",
            "value",
            &event.to_string(),
        ]);
        assert!(id.starts_with('$'), "{id}");
    };
    let began = Instant::now();
    // Of those who are there: that they left, twice, that the room is over, and the join after the departure.
    forged(&webhook::left(&people[0].1, "CLIENT_INITIATED"));
    forged(&webhook::left(&people[0].1, "CLIENT_INITIATED"));
    let mut finished = webhook::event("room_finished", &people[1].1, None);
    finished.as_object_mut().expect("an event").remove("participant");
    forged(&finished);
    forged(&webhook::left(&people[2].1, "DUPLICATE_IDENTITY"));
    forged(&webhook::joined(&people[2].1));
    // What is none at all.
    for text in ["", "{", "[]", "{\"event\":\"participant_left\"}"] {
        stage.redis.ask(&["XADD", "{lk-jwt:jobs}:in", "*", "webhook", "x", "value", text]);
        stage.redis.ask(&["XADD", "{lk-jwt:jobs}:in", "*", "job", text, "value", text]);
    }
    stage.wait_looked_up(&people[..2], began, TIMEOUT);
    let asked = Instant::now();
    stage.wait_restarted(&people, asked);
    stage.assert_there(&people);
    // Nor does it keep anybody from being reported.
    for (person, session) in &people {
        let gone = stage.leave(session);
        stage.wait_sent(person, gone, TIMEOUT);
    }
}
