//! Which paths there are (decision A1), who may call them, and what holds for all of them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;

use super::{Ask, CLIENT, DELEGATE, FEDERATION, GET_TOKEN, Stage};
use crate::support::client::Call;

/// Ways in which proxies and homeservers write the same path (decision H1).
fn spellings(path: &str) -> Vec<String> {
    let doubled = path.replace('/', "//");
    let mut all = vec![path.to_owned(), doubled.clone(), format!("{path}?access_token=x&y")];
    for prefix in ["/livekit/jwt", "//livekit//jwt", ""] {
        all.extend([
            format!("{prefix}{path}"),
            format!("{prefix}{path}/"),
            format!("{prefix}{doubled}//"),
            format!("{prefix}{}", path.replace('_', "%5F").replace('m', "%6d")),
            format!("/.{prefix}/a/..{path}/%2E"),
        ]);
    }
    all
}

/// Every endpoint with a request that it takes.
fn endpoints(stage: &Stage) -> Vec<Ask> {
    let mut all = Vec::new();
    for base in CLIENT {
        for (mut ask, name) in [(stage.client(), "get_token"), (stage.delegation(), "delegate_delayed_leave")] {
            ask.path = format!("{base}/{name}");
            all.push(ask);
        }
    }
    for base in FEDERATION {
        let mut ask = stage.federated();
        ask.path = format!("{base}/get_token");
        all.push(ask);
    }
    all
}

fn ping(stage: &Stage, method: &str, path: &str) -> Ask {
    let mut ask = stage.ask(path, "", json!({"transaction_id": "mautrix-go_1"}));
    ask.method = method.into();
    ask.who = None;
    ask
}

#[test]
fn every_spelling_of_every_path_is_served() {
    let stage = Stage::new();
    for good in endpoints(&stage) {
        for path in spellings(&good.path) {
            let mut ask = good.clone();
            ask.path = path;
            assert_eq!(stage.call(&ask).status, 200, "{}", ask.path);
        }
    }
    for path in spellings("/_matrix/app/v1/ping") {
        assert_eq!(stage.call(&ping(&stage, "POST", &path)).status, 200, "{path}");
    }
    for path in spellings("/_matrix/app/v1/transactions/m1234.5") {
        assert_eq!(stage.call(&ping(&stage, "PUT", &path)).status, 200, "{path}");
    }
}

#[test]
fn no_other_version_is_served() {
    let stage = Stage::new();
    for path in [
        "/_matrix/client/v2/rtc/livekit/get_token",
        "/_matrix/client/unstable/rtc/livekit/get_token",
        "/_matrix/client/unstable/io.element.msc4196/rtc/livekit/get_token",
        "/_matrix/client/v1/rtc/livekit",
        "/_matrix/client/v1/rtc/livekit/get_token/more",
        "/_matrix/client/v1/rtc/livekit/sfu_webhook",
        "/_matrix/client/v3/rtc/livekit/whatever/deep",
        "/_matrix/federation/v3/rtc/livekit/get_token",
        "/_matrix/federation/v1/rtc/livekit/delegate_delayed_leave",
        "/_matrix/app/unstable/ping",
        "/appservice-ping",
    ] {
        let ask = ping(&stage, "POST", path);
        stage.call(&ask).assert_errcode(404, "M_UNRECOGNIZED");
    }
    assert_eq!(stage.own.asked().len(), 0);
}

#[test]
fn a_ping_takes_any_method_and_any_body() {
    let stage = Stage::new();
    for method in ["POST", "GET", "PUT", "DELETE", "PATCH"] {
        for raw in [None, Some(Vec::new()), Some(b"{x".to_vec()), Some(vec![0xff; 100])] {
            let mut ask = ping(&stage, method, "/_matrix/app/v1/ping");
            ask.raw = raw;
            let answer = stage.call(&ask);
            assert_eq!((answer.status, answer.text().as_str()), (200, "{}\n"), "{method}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
        }
    }
}

#[test]
fn what_a_homeserver_asks_other_services_for_is_not_here() {
    let stage = Stage::new();
    for path in [
        "/_matrix/app/v1/users/x",
        "/_matrix/app/v1/users/%40alice%3Aexample.org",
        "/_matrix/app/v1/rooms/%23alias%3Aexample.org",
        "/_matrix/app/v1/thirdparty/protocol/irc",
        "/_matrix/app/v1/thirdparty/user",
        "/_matrix/app/v1/nothing/of/the/kind",
    ] {
        for method in ["GET", "POST", "PUT"] {
            stage.call(&ping(&stage, method, path)).assert_errcode(404, "M_NOT_FOUND");
        }
    }
}

#[test]
fn everything_needs_the_homeservers_token() {
    let stage = Stage::new();
    let mut all = endpoints(&stage);
    all.extend([
        ping(&stage, "POST", "/_matrix/app/v1/ping"),
        ping(&stage, "GET", "/_matrix/app/v1/users/x"),
        ping(&stage, "PUT", "/_matrix/app/v1/transactions/1"),
    ]);
    for good in all {
        for (authorization, errcode) in [
            (None, "M_MISSING_TOKEN"),
            (Some("Bearer".to_owned()), "M_MISSING_TOKEN"),
            (Some("Bearer nope".to_owned()), "M_UNKNOWN_TOKEN"),
            (Some(format!("Bearer {}", stage.own.as_token)), "M_UNKNOWN_TOKEN"),
            (Some(format!("Bearer {}", stage.own.hs_token.to_uppercase())), "M_UNKNOWN_TOKEN"),
        ] {
            let mut ask = good.clone();
            ask.authorization = authorization;
            stage.call(&ask).assert_errcode(401, errcode);
        }
        // A token in the query is none.
        let mut ask = good.clone();
        ask.authorization = None;
        ask.path += &format!("?access_token={}", stage.own.hs_token);
        let answer = stage.service.call(&ask.call());
        answer.assert_errcode(401, "M_MISSING_TOKEN");
    }
    assert_eq!(stage.own.asked().len(), 0);
    let line = stage.service.wait_event("homeserver_calls_refused");
    line.says(&["WARN", "hs_token differs", "registration"]);
}

/// Element Call asks so whether there are such endpoints at all.
#[test]
fn a_probe_without_token_and_body_is_a_401_that_a_browser_may_read() {
    let stage = Stage::new();
    for path in [DELEGATE, GET_TOKEN] {
        stage.service.call(&Call::new("POST", path)).assert_errcode(401, "M_MISSING_TOKEN");
        let options = stage.service.call(&Call::new("OPTIONS", path));
        assert_eq!((options.status, options.body.len()), (200, 0));
    }
}

#[test]
fn transactions_are_taken_whatever_is_in_them() {
    let stage = Stage::new();
    let put = |raw: Vec<u8>| {
        let mut ask = ping(&stage, "PUT", "/_matrix/app/v1/transactions/7");
        ask.raw = Some(raw);
        stage.call(&ask)
    };
    for raw in [
        Vec::new(),
        b"{\"events\":[]}".to_vec(),
        b"<html>".to_vec(),
        vec![b' '; 70 * 1024],
        vec![b'x'; 5 * 1024 * 1024],
    ] {
        let length = raw.len();
        let answer = put(raw);
        assert_eq!((answer.status, answer.text().as_str()), (200, "{}\n"), "{length} bytes");
    }
    for method in ["GET", "POST"] {
        let answer = stage.call(&ping(&stage, method, "/_matrix/app/v1/transactions/7"));
        answer.assert_errcode(405, "M_UNRECOGNIZED");
        assert_eq!(answer.header("allow"), Some("PUT"), "{method}");
    }
    assert!(
        stage.service.rss_kib() < 64 * 1024,
        "{} KiB after large transactions",
        stage.service.rss_kib()
    );
}

#[test]
fn a_transaction_may_come_in_drops_but_not_for_ever() {
    let stage = Stage::new();
    let begin = || {
        let mut stream = TcpStream::connect(stage.service.address()).expect("a connection");
        stream.set_nodelay(true).expect("no delay");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
        let head = format!(
            "PUT /_matrix/app/v1/transactions/8 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 30\r\n\r\n",
            stage.own.hs_token
        );
        stream.write_all(head.as_bytes()).expect("written");
        stream
    };
    let status = |mut stream: TcpStream| {
        let mut line = [0; 12];
        stream.read_exact(&mut line).expect("an answer");
        String::from_utf8_lossy(&line).into_owned()
    };
    let (mut dropping, stalled) = (begin(), begin());
    for _ in 0..30 {
        dropping.write_all(b" ").expect("written");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(status(dropping), "HTTP/1.1 200");
    assert_eq!(status(stalled), "HTTP/1.1 408");
}
