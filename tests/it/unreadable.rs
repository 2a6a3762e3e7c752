//! Requests that the HTTP library cannot read, and answers by itself (decision H3): whoever sends them, a browser behind a
//! proxy included, sees an error like any other.

use std::time::Duration;

use crate::support::client::{Answer, Call, Connection};
use crate::support::world::World;

/// The beginning of a TLS handshake.
const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\x00\xba\x01\x00\x00\xb6\x03\x03\r\n\r\n\x00\x02\x13\x01\x01\x00";
/// The preface of HTTP/2, and its first frames.
const HTTP_2: &[u8] =
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\x00\x00";
/// The second version of the PROXY protocol, in front of a request.
const PROXY_2: &[u8] = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x7f\x00\x00\x01\x00\x01\x00\x02GET / HTTP/1.1\r\n\r\n";

/// Heads with the status that each is answered with.
fn unreadable() -> Vec<(&'static str, Vec<u8>, u16)> {
    let text = |what, text: &str, status| (what, text.as_bytes().to_vec(), status);
    let with = |what, field: &str| text(what, &format!("POST /get_token HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n"), 400);
    let long = |what, length: usize| {
        let head = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(length));
        text(what, &head, 431)
    };
    vec![
        text("no method", " /healthz HTTP/1.1\r\n\r\n", 400),
        ("a method of other bytes", b"G\x00T /healthz HTTP/1.1\r\n\r\n".to_vec(), 400),
        ("a method in UTF-8", "GÄT /healthz HTTP/1.1\r\n\r\n".into(), 400),
        text("no version", "GET /healthz\r\n\r\n", 400),
        text("no path", "GET HTTP/1.1\r\n\r\n", 400),
        text("another version", "GET /healthz HTTP/9.9\r\n\r\n", 400),
        text("another protocol", "GET /healthz ICY/1.0\r\n\r\n", 400),
        text("a path that is none", "GET /<script> HTTP/1.1\r\n\r\n", 400),
        with("a bad name", "B[d: x"),
        with("a name with a space", "Host : x"),
        with("no colon", "Host"),
        with("no name", ": x"),
        with("a folded header", "X: y\r\n z"),
        with("a value with NUL", "X: y\0"),
        with("a length that is none", "Content-Length: many"),
        with("two lengths", "Content-Length: 1\r\nContent-Length: 2"),
        with("a coding that is unknown", "Transfer-Encoding: gzip"),
        text("chunks in HTTP/1.0", "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        ("TLS", CLIENT_HELLO.into(), 400),
        ("HTTP/2", HTTP_2.into(), 400),
        text(
            "the PROXY protocol",
            "PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET /healthz HTTP/1.1\r\n\r\n",
            400,
        ),
        ("the other PROXY protocol", PROXY_2.into(), 400),
        long("a head of 16 KiB", 16 * 1024),
        long("a head of 1 MiB", 1024 * 1024),
        text("a path of 40 KiB", &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(40 * 1024)), 431),
        text(
            "150 headers",
            &format!("GET /healthz HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(150)),
            431,
        ),
    ]
}

/// Fails unless it is this error in our form, and the end of its connection.
#[track_caller]
fn assert_refused(world: &World, what: &str, answer: Option<Answer>, status: u16, connection: &mut Connection) {
    let answer = answer.unwrap_or_else(|| panic!("{what}: no answer"));
    answer.assert_errcode(status, if status == 431 { "M_TOO_LARGE" } else { "M_UNKNOWN" });
    answer.assert_manners();
    assert_eq!(answer.header("connection"), Some("close"), "{what}");
    assert!(connection.closed_within(Duration::from_secs(5)), "{what}: kept open");
    world.service.wait_line_of(&answer).says(&["INFO", "could not be read"]);
}

#[test]
fn what_cannot_be_read_is_answered_like_any_other_error() {
    let world = World::shared();
    for (what, bytes, status) in unreadable() {
        let mut connection = world.service.connect();
        connection.send(&bytes);
        let answer = connection.answer();
        assert_refused(&world, what, answer, status, &mut connection);
    }
}

/// The same on a connection that has been used, as proxies use them.
#[test]
fn what_cannot_be_read_is_answered_on_a_used_connection_too() {
    let world = World::shared();
    let good = Call::new("GET", "/healthz").bytes(world.service.address());
    // HTTP/2 begins with its preface or never.
    for (what, bytes, status) in unreadable().into_iter().filter(|(what, ..)| *what != "HTTP/2") {
        for at_once in [false, true] {
            let mut connection = world.service.connect();
            if at_once {
                connection.send(&[&good[..], &bytes].concat());
                assert_eq!(connection.answer().map(|a| a.status), Some(200), "{what}");
            } else {
                connection.send(&good);
                assert_eq!(connection.answer().map(|a| a.status), Some(200), "{what}");
                connection.send(&bytes);
            }
            let answer = connection.answer();
            assert_refused(&world, what, answer, status, &mut connection);
        }
    }
}

/// What an honest client may send at most, on a new connection and on a used one.
#[test]
fn a_head_of_almost_16_kib_is_read() {
    let world = World::shared();
    let small = Call::new("GET", "/healthz").bytes(world.service.address());
    let large = Call::new("GET", "/healthz").header("Cookie", &"x".repeat(16_000));
    let large = large.bytes(world.service.address());
    for bytes in [large.clone(), [&small[..], &large].concat()] {
        let mut connection = world.service.connect();
        connection.send(&bytes);
        while let Some(answer) = connection.answer() {
            assert_eq!(answer.status, 200, "{}", answer.text());
            if answer.header("connection") == Some("close") {
                break;
            }
        }
        assert!(connection.closed_within(Duration::from_secs(5)));
    }
}

/// In pieces, and by a client that has no more to say.
#[test]
fn what_cannot_be_read_may_come_slowly() {
    let world = World::shared();
    for (what, bytes, status) in unreadable().into_iter().filter(|(_, bytes, _)| bytes.len() < 1024) {
        let mut connection = world.service.connect();
        for part in bytes.chunks(bytes.len().div_ceil(5)) {
            connection.send(part);
            std::thread::sleep(Duration::from_millis(5));
        }
        connection.half_close();
        let answer = connection.answer();
        assert_refused(&world, what, answer, status, &mut connection);
    }
}

/// What our own answers begin with is left as it is.
#[test]
fn our_own_refusals_are_not_taken_for_the_librarys() {
    let world = World::shared();
    for call in [
        Call::new("GET", "/nope"),
        Call::new("HEAD", "/nope"),
        Call::new("CONNECT", "example.org:443"),
        Call::new("GET", "http://example.org/nope"),
        Call::new("PUT", "/get_token"),
        Call::post("/get_token", "{").header("X-Request-Id", "mine"),
    ] {
        let mut connection = world.service.connect();
        connection.send(&call.bytes(world.service.address()));
        let head = format!("{call:?}").contains("\"HEAD\"");
        let answer = connection.answer_to(head).expect("an answer");
        answer.assert_manners();
        assert_eq!(head, answer.body.is_empty(), "{call:?}");
        assert!([400, 404, 405].contains(&answer.status), "{call:?}: {}", answer.status);
        connection.send(&Call::new("GET", "/healthz").bytes(world.service.address()));
        assert_eq!(connection.answer().map(|a| a.status), Some(200), "after {call:?}");
    }
}
