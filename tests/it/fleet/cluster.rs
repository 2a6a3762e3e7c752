//! A cluster of three real masters: the slot of our keys moves to another node, and that one is lost.

use std::time::{Duration, Instant};

use super::scenes::{SHORT, crowd};
use super::stage::{Person, Stage, TIMEOUT, WRITES_AGAIN, within};
use crate::faults::{quick, told};
use crate::support::redis::RedisServer;
use crate::support::scene::Scene;
use crate::support::sfu::Session;
use crate::support::wait_until;

const OPTIONS: [&str; 4] = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"];
/// Slot of `lk-jwt:jobs` and of all keys that have it in braces.
const SLOT: &str = "14649";
const KEYS: [&str; 5] = [
    "lk-jwt:jobs",
    "{lk-jwt:jobs}:watcher",
    "{lk-jwt:jobs}:nodes",
    "{lk-jwt:jobs}:in",
    "{lk-jwt:jobs}:full",
];

fn id(node: &RedisServer) -> String {
    let answer = node.ask(&["CLUSTER", "MYID"]);
    answer.lines().nth(1).expect("an id").to_owned()
}

fn ok(node: &RedisServer, command: &[&str]) {
    assert_eq!(node.ask(command), "+OK\r\n", "{command:?}");
}

fn info(node: &RedisServer, line: &str) -> bool {
    node.ask(&["CLUSTER", "INFO"]).lines().any(|one| one == line)
}

/// A cluster of the stage's own Redis, which has our slot, and of two more; the second has a replica.
fn cluster(stage: &Stage) -> Option<[RedisServer; 3]> {
    let others = [
        RedisServer::start(&OPTIONS)?,
        RedisServer::start(&OPTIONS)?,
        RedisServer::start(&OPTIONS)?,
    ];
    let [heir, third, replica] = &others;
    for (node, first, last) in [(heir, "0", "5460"), (third, "5461", "10922"), (&stage.redis, "10923", "16383")] {
        ok(node, &["CLUSTER", "ADDSLOTSRANGE", first, last]);
    }
    for node in &others {
        ok(&stage.redis, &["CLUSTER", "MEET", &node.address().ip().to_string(), "6379"]);
    }
    let is_whole = |node: &RedisServer| info(node, "cluster_state:ok") && info(node, "cluster_known_nodes:4");
    wait_until("the nodes to know each other", TIMEOUT, || {
        is_whole(&stage.redis) && others.iter().all(is_whole)
    });
    ok(replica, &["CLUSTER", "REPLICATE", &id(heir)]);
    wait_until("the replica to follow", TIMEOUT, || {
        let link = replica.ask(&["INFO", "replication"]);
        link.contains("master_link_status:up")
    });
    Some(others)
}

/// Somebody new at each node: taken in time.
fn delegate_everywhere(stage: &Stage) -> Vec<(Person, Session)> {
    let delegated = stage.living().map(|node| {
        let (person, asked) = (stage.person(SHORT), Instant::now());
        assert_eq!(stage.delegate_at(node, &person), 200);
        assert!(asked.elapsed() <= within(WRITES_AGAIN, asked), "{:?}", asked.elapsed());
        let session = stage.sfu.join(&person.alias, &person.identity);
        (person, session)
    });
    delegated.collect()
}

/// R7 in a cluster.
#[test]
fn neither_a_slot_that_moves_nor_a_lost_master_moves_the_watch() {
    let Some(mut stage) = Stage::with(0, &OPTIONS) else { return };
    let Some([mut heir, third, replica]) = cluster(&stage) else {
        return;
    };
    let all = [&third, &heir, &stage.redis].map(|node| node.address().to_string());
    let url = format!("redis+cluster://{}", all.join(","));
    for _ in 0..3 {
        stage.add(|setup| setup.env("LIVEKIT_REDIS_URL", &url));
    }
    stage.wait_one_watcher();
    let mut people = crowd(&stage, 12, SHORT);
    let (watcher, epoch) = (stage.wait_one_watcher(), stage.epoch());

    ok(&heir, &["CLUSTER", "SETSLOT", SLOT, "IMPORTING", &id(&stage.redis)]);
    ok(&stage.redis, &["CLUSTER", "SETSLOT", SLOT, "MIGRATING", &id(&heir)]);
    let to = heir.address().ip().to_string();
    let moved = [&["MIGRATE", &to, "6379", "", "0", "5000", "KEYS"][..], &KEYS].concat();
    ok(&stage.redis, &moved);
    for node in [&heir, &stage.redis, &third] {
        ok(node, &["CLUSTER", "SETSLOT", SLOT, "NODE", &id(&heir)]);
    }
    let began = Instant::now();
    people.extend(delegate_everywhere(&stage));
    stage.wait_handed_over();
    eprintln!("R7, a slot moved: all is handed over after {:?}", began.elapsed());
    assert_eq!(heir.ask(&["HLEN", "lk-jwt:jobs"]), format!(":{}\r\n", people.len()));
    assert_eq!((stage.wait_one_watcher(), stage.epoch()), (watcher, epoch));

    wait_until("the replica to have all", TIMEOUT, || {
        replica.ask(&["READONLY"]) == "+OK\r\n" && replica.ask(&["INFO", "keyspace"]).contains("keys=")
    });
    heir.kill();
    let began = Instant::now();
    people.extend(delegate_everywhere(&stage));
    wait_until("the replica to be the master", TIMEOUT, || {
        replica.ask(&["ROLE"]).starts_with("*3") && replica.ask(&["INFO", "replication"]).contains("role:master")
    });
    stage.wait_handed_over();
    eprintln!("R7, a master killed: all is handed over after {:?}", began.elapsed());
    wait_until("all records to be there", TIMEOUT, || {
        replica.ask(&["HLEN", "lk-jwt:jobs"]) == format!(":{}\r\n", people.len())
    });
    assert_eq!((stage.wait_one_watcher(), stage.epoch()), (watcher, epoch));
    stage.wait_restarted(&people, Instant::now());
    stage.assert_there(&people);
    let (person, session) = &people[0];
    let gone = stage.leave(session);
    let took = stage.wait_sent(person, gone, TIMEOUT);
    assert!(took <= within(Duration::from_millis(2300), gone), "{took:?}");
}

/// A cluster that is spoken to like one server, and one server like a cluster.
#[test]
fn an_address_of_the_wrong_kind_is_told_with_the_right_one() {
    let Some(stage) = Stage::with(0, &OPTIONS) else { return };
    let (Some(others), Some(single)) = (cluster(&stage), RedisServer::start(&[])) else {
        return;
    };
    for (scheme, server, remedy) in [
        ("redis+cluster", &single, "write redis:// for redis+cluster://"),
        ("redis", &others[1], "name nodes of it in LIVEKIT_REDIS_URL, as redis+cluster://"),
    ] {
        let url = format!("{scheme}://{}", server.address());
        let scene = Scene::with(|setup| quick(setup).env("LIVEKIT_REDIS_URL", &url));
        scene.delegate(SHORT);
        told(scheme, &scene.service, "store_down", "cannot be stored", remedy);
    }
}
