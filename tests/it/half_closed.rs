//! Clients that shut down their writing side (case D8). They get their answer when it is there within two seconds; after
//! that, and when they have closed for good, which looks the same, nothing of theirs is left.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::{Answer, Call, Connection};
use crate::support::homeserver::{Homeserver, unknown_token};
use crate::support::neighbour::Reply;
use crate::support::webhook::{joined, signed};
use crate::support::world::World;
use crate::support::{bodies, unique, unique_room, wait_until};

/// How long somebody is waited for who has said that he will say no more.
const WAITED_FOR: Duration = Duration::from_secs(2);
/// On a busy machine; a request that nobody gave up would take ten seconds.
const LATE: Duration = Duration::from_secs(3);

/// A request for a token whose owner the homeserver names with this reply.
fn ask(homeserver: &Homeserver, reply: Reply) -> Call {
    let token = homeserver.token_with(reply);
    Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &homeserver.name, &token))
}

fn after(homeserver: &Homeserver, delay: Duration) -> Call {
    ask(homeserver, Reply::json(200, &json!({"sub": homeserver.user("alice")})).after(delay))
}

/// Sends these bytes and a FIN.
fn half_closed(world: &World, bytes: &[u8]) -> Connection {
    let mut connection = world.service.connect();
    connection.send(bytes);
    connection.half_close();
    connection
}

fn answer(world: &World, call: &Call) -> Option<Answer> {
    half_closed(world, &call.bytes(world.service.address())).answer()
}

/// Waits until nobody asks the homeserver, which answers nobody, and no connection is left.
#[track_caller]
fn wait_free(world: &World, what: &str, files: usize, began: Instant) -> Duration {
    wait_until(&format!("{what}: nothing to be left"), WAITED_FOR + LATE, || {
        world.home.http.busy() == 0 && world.service.fds() <= files
    });
    began.elapsed()
}

/// With a request behind it, so that what stays open is open.
fn warm() -> (World, usize) {
    let world = World::new();
    assert_eq!(world.service.call(&after(&world.home, Duration::ZERO)).status, 200);
    // The connection to the homeserver is kept for a while, the one of the client is not.
    let files = world.service.fds() + 2;
    (world, files)
}

#[test]
fn an_answer_that_is_ready_in_time_is_given() {
    let world = World::shared();
    for delay in [0, 300, 1_500].map(Duration::from_millis) {
        let mut connection = half_closed(&world, &after(&world.home, delay).bytes(world.service.address()));
        let answer = connection.answer().unwrap_or_else(|| panic!("no answer after {delay:?}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.assert_manners();
        assert!((delay..delay + LATE).contains(&answer.took), "{delay:?}: {:?}", answer.took);
        assert!(connection.closed_within(LATE), "{delay:?}: kept open");
    }
}

#[test]
fn every_kind_of_request_is_answered() {
    let world = World::shared();
    let body = || bodies::sfu_get_of(&world.home, "alice", &unique_room()).to_string();
    for (status, call) in [
        (200, Call::new("GET", "/healthz")),
        (200, Call::new("OPTIONS", "/get_token")),
        (404, Call::new("GET", "/nope")),
        (405, Call::new("GET", "/get_token")),
        (400, Call::post("/get_token", "{")),
        (413, Call::post("/get_token", vec![b' '; 70_000])),
        (401, ask(&world.home, unknown_token().after(Duration::from_millis(300)))),
        (400, Call::post("/delegate_delayed_leave", "{}")),
        (
            200,
            signed(
                &world.sfu,
                &joined(&world.sfu.join(&format!("room{}", unique()), "somebody")).to_string(),
            ),
        ),
    ] {
        let answer = answer(&world, &call).unwrap_or_else(|| panic!("no answer to {call:?}"));
        assert_eq!(answer.status, status, "{call:?}: {}", answer.text());
    }
    let text = body();
    let chunked = format!(
        "POST /sfu/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{text}\r\n0\r\n\r\n",
        text.len()
    );
    let text = body();
    let old = format!("POST /sfu/get HTTP/1.0\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    let text = body();
    // As `nc` sends a file that ends with an empty line.
    let lines = format!(
        "POST /sfu/get HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{text}\r\n",
        text.len()
    );
    for request in [chunked, old, lines] {
        let answer = half_closed(&world, request.as_bytes()).answer();
        assert_eq!(answer.map(|a| a.status), Some(200), "{request}");
    }
}

/// The FIN may come at any time after the request.
#[test]
fn the_end_may_come_late() {
    let world = World::shared();
    let mut connection = world.service.connect();
    connection.send(&after(&world.home, Duration::from_millis(1_200)).bytes(world.service.address()));
    std::thread::sleep(Duration::from_millis(600));
    connection.half_close();
    assert_eq!(connection.answer().map(|a| a.status), Some(200));
    // Several requests, each of which takes a while.
    let address = world.service.address();
    let calls: Vec<_> = (0..3)
        .flat_map(|_| after(&world.home, Duration::from_millis(800)).bytes(address))
        .collect();
    let mut connection = half_closed(&world, &calls);
    for n in 0..3 {
        assert_eq!(connection.answer().map(|a| a.status), Some(200), "request {n}");
    }
    assert!(connection.closed_within(LATE));
}

#[test]
fn a_request_is_given_up_when_its_answer_takes_too_long() {
    let (world, files) = warm();
    let bytes = ask(&world.home, Reply::Hang).bytes(world.service.address());
    let began = Instant::now();
    let mut connection = half_closed(&world, &bytes);
    wait_until("the homeserver to be asked", LATE, || world.home.http.busy() == 1);
    assert!(connection.closed_within(WAITED_FOR + LATE), "the client is still waited for");
    assert!(began.elapsed() >= WAITED_FOR, "given up after {:?}", began.elapsed());
    let free = wait_free(&world, "half-closed", files, began);
    eprintln!("half-closed: free after {free:.2?}");
}

/// Closed, half-closed, reset: before the answer, in the middle of a body, one and many.
#[test]
fn whoever_hung_up_has_no_place_for_long() {
    let (world, files) = warm();
    let address = world.service.address();
    let whole = || ask(&world.home, Reply::Hang).bytes(address);
    let body = b"POST /sfu/get HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n{".as_slice();
    let chunk = b"POST /sfu/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{".as_slice();
    let head = b"GET /healthz HTTP/1.1\r\nX-Slow: ".as_slice();
    for (what, bytes) in [
        ("a whole request", whole()),
        ("a whole request and an empty line", [&whole()[..], b"\r\n"].concat()),
        ("a whole request and half of the next", [&whole()[..], body].concat()),
        ("a part of a body", body.into()),
        ("a part of a chunk", chunk.into()),
        ("a part of a head", head.into()),
    ] {
        // Enough to be told from what else is opened and closed.
        let begun = || -> Vec<Connection> {
            let connections = (0..10).map(|_| world.service.connect());
            connections
                .map(|mut c| {
                    c.send(&bytes);
                    c
                })
                .collect()
        };
        let (mut kept, closed) = (begun(), begun());
        // All ask about one token: one question.
        let asked = usize::from(what.starts_with("a whole request"));
        wait_until("the homeserver to be asked", LATE, || world.home.http.busy() == asked);
        // Whoever came before has been seen by then.
        assert_eq!(world.service.get("/healthz").status, 200);
        let began = Instant::now();
        kept.iter().for_each(Connection::half_close);
        drop(closed);
        let free = wait_free(&world, what, files + 1, began);
        assert!(kept.iter_mut().all(|c| c.closed_within(LATE)), "{what}: kept open");
        eprintln!("{what}: free after {free:.2?}");
    }
    // A reset is no FIN: nobody is waited for. It is one because an answer was not read.
    let began = Instant::now();
    let mut connection = world.service.connect();
    connection.send(&Call::new("GET", "/healthz").bytes(address));
    assert!(connection.has_unread(), "no answer");
    connection.send(&whole());
    wait_until("the homeserver to be asked", LATE, || world.home.http.busy() == 1);
    drop(connection);
    let free = wait_free(&world, "a reset", files, began);
    eprintln!("a reset: free after {free:.2?}");
    // As many at a time as are let to one homeserver, and more.
    let began = Instant::now();
    for _ in 0..200 {
        half_closed(&world, &whole());
    }
    wait_until("the homeserver to be asked", LATE, || world.home.http.busy() > 16);
    let free = wait_free(&world, "200 of them", files, began);
    eprintln!("200 of them: free after {free:.2?}");
    let answer = world.service.call(&after(&world.home, Duration::ZERO));
    assert_eq!(answer.status, 200);
    assert!(answer.took < LATE, "{:?}", answer.took);
}
