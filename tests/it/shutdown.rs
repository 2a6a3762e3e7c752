//! SIGTERM and SIGINT: what is under way is finished, nothing new begins, and the end comes in time.

use std::time::{Duration, Instant};

use crate::support::client::{Call, Connection};
use crate::support::neighbour::Reply;
use crate::support::service::signal;
use crate::support::world::World;
use crate::support::{bodies, nothing_may_be_left_out, unique_room, wait_until};

/// A world whose homeserver takes two seconds to answer.
fn slow_world(change: impl FnOnce(crate::support::service::Setup) -> crate::support::service::Setup) -> World {
    let world = World::with(change);
    let sub = world.home.user("alice");
    world.home.answer_userinfo(Some(
        Reply::json(200, &serde_json::json!({ "sub": sub })).after(Duration::from_secs(2)),
    ));
    world
}

fn call(world: &World) -> Call {
    Call::json("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room()))
}

#[test]
fn a_request_under_way_is_finished() {
    for name in ["TERM", "INT"] {
        let world = slow_world(|setup| setup);
        let mut idle = world.service.connect();
        idle.send(&Call::new("GET", "/healthz").bytes(world.service.address()));
        assert_eq!(idle.answer().expect("an answer").status, 200);
        let mut silent = world.service.connect();
        let request = world.service.begin(&call(&world));
        wait_until("the request to be under way", Duration::from_secs(5), || world.home.asked() == 1);
        let began = Instant::now();
        world.service.signal(name);
        wait_until("new connections to be refused", Duration::from_millis(1900), || {
            Connection::open(world.service.address()).is_err()
        });
        assert!(
            idle.closed_within(Duration::from_millis(500)),
            "SIG{name}: an idle connection was kept"
        );
        let answer = request
            .join()
            .expect("the request")
            .unwrap_or_else(|| panic!("SIG{name}: the request was cut off"));
        assert_eq!(answer.status, 200, "SIG{name}: {}", answer.text());
        let status = world.service.wait_exit(Duration::from_secs(6));
        assert_eq!(status.code(), Some(0), "SIG{name}: {status}");
        eprintln!("SIG{name}: ended after {:.1?}", began.elapsed());
        assert!(silent.closed_within(Duration::from_millis(500)));
    }
}

/// A proxy opens a connection for each request: what it has sent before the end is answered, and not reset.
#[test]
fn what_has_come_before_the_end_is_answered() {
    let world = World::new();
    let service = &world.service;
    let request = call(&world);
    assert_eq!(service.call(&request).status, 200);
    service.signal("STOP");
    let mut waiting: Vec<_> = (0..100).map(|_| service.connect()).collect();
    for connection in &mut waiting {
        connection.send(&request.bytes(service.address()));
    }
    service.signal("TERM");
    service.signal("CONT");
    for (at, connection) in waiting.iter_mut().enumerate() {
        let answer = connection.answer().unwrap_or_else(|| panic!("request {at} was cut off"));
        assert_eq!(answer.status, 200, "{at}: {}", answer.text());
    }
    assert_eq!(service.wait_exit(Duration::from_secs(6)).code(), Some(0));
}

#[test]
fn with_nothing_under_way_it_ends_at_once() {
    for name in ["TERM", "INT"] {
        let world = World::new();
        let mut connections: Vec<_> = (0..5).map(|_| world.service.connect()).collect();
        // One has begun a request that will never be complete.
        connections[0].send(b"POST /get_token HTTP/1.1\r\nHost: x\r\n");
        for connection in &mut connections[1..] {
            connection.send(&Call::new("GET", "/healthz").bytes(world.service.address()));
            assert_eq!(connection.answer().expect("an answer").status, 200);
        }
        drop(connections.remove(0));
        let began = Instant::now();
        world.service.signal(name);
        assert_eq!(world.service.wait_exit(Duration::from_secs(5)).code(), Some(0));
        assert!(began.elapsed() < Duration::from_secs(4), "SIG{name}: it took {:?}", began.elapsed());
    }
}

#[test]
fn the_grace_bounds_what_is_waited_for() {
    let world = World::with(|setup| setup.env("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "2"));
    world.home.answer_userinfo(Some(Reply::Hang));
    let mut half = world.service.connect();
    half.send(b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{");
    let _stuck = world.service.begin(&call(&world));
    wait_until("the request to be under way", Duration::from_secs(5), || world.home.asked() == 1);
    let began = Instant::now();
    world.service.signal("TERM");
    let status = world.service.wait_exit(Duration::from_secs(8));
    let took = began.elapsed();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(
        (Duration::from_millis(1800)..Duration::from_secs(5)).contains(&took),
        "it ended after {took:?}, not 2 s"
    );
}

#[test]
fn the_grace_is_ten_seconds_unless_set() {
    let world = World::new();
    world.home.http.greet(crate::support::neighbour::Greeting::Silence);
    let _stuck = world.service.begin(&call(&world));
    wait_until("the request to be under way", Duration::from_secs(5), || {
        !world.home.http.connections().is_empty()
    });
    let began = Instant::now();
    world.service.signal("TERM");
    assert_eq!(world.service.wait_exit(Duration::from_secs(14)).code(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(13), "it ended after {:?}", began.elapsed());
}

/// In an image without an init, the service is process 1, for which the kernel ignores every signal that is not handled.
#[test]
fn process_1_ends_too() {
    let namespace: &[&str] = &[
        "unshare",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ];
    let permitted = std::process::Command::new(namespace[0])
        .args(&namespace[1..])
        .arg("true")
        .output()
        .is_ok_and(|o| o.status.success());
    let root: &[&str] = &["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let as_root = || {
        std::process::Command::new(root[0])
            .args(&root[1..])
            .arg("true")
            .output()
            .is_ok_and(|o| o.status.success())
    };
    let wrapper = if permitted {
        namespace
    } else if as_root() {
        root
    } else {
        assert!(!nothing_may_be_left_out(), "no new PID namespace is permitted here (unshare --pid)");
        eprintln!("left out: process_1_ends_too, since no new PID namespace is permitted here (unshare --pid)");
        return;
    };
    for name in ["TERM", "INT"] {
        let world = slow_world(|setup| setup.env("PATH", "/usr/bin:/bin").wrapped_in(wrapper));
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", world.service.pid)).expect("children");
        let child: u32 = children.trim().parse().expect("one child");
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).expect("status");
        let inner = status
            .lines()
            .find_map(|l| l.strip_prefix("NSpid:"))
            .and_then(|l| l.split_whitespace().last())
            .map(str::to_owned);
        assert_eq!(inner.as_deref(), Some("1"), "not process 1");
        let request = world.service.begin(&call(&world));
        wait_until("the request to be under way", Duration::from_secs(5), || world.home.asked() == 1);
        signal(child, name);
        assert_eq!(request.join().expect("the request").expect("an answer").status, 200, "SIG{name}");
        assert_eq!(world.service.wait_exit(Duration::from_secs(15)).code(), Some(0), "SIG{name}");
    }
}
