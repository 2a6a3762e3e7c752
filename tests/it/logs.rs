//! The log: one line per event that nobody can forge, in text or JSON, at the level of whose fault it is (decision P12).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::Call;
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::Reply;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::{Service, Setup};
use crate::support::sfu::Fault;
use crate::support::world::World;
use crate::support::{hashes, lateness, secrets, unique_room, wait_until, webhook};

/// What a forger would like to see at the beginning of a line, with what might bring it there.
const FORGERY: &str = "x\r\nFORGED 2026-01-01T00:00:00Z  INFO root login\nFORGED\u{b}FORGED\u{85}FORGED\u{2028}FORGED\u{1b}[2J\u{1b}[31mred\u{9b}31m\u{7}\u{8}\0\u{202e}end";

/// Tries every value that a client or a neighbour chooses.
fn forge(world: &World) {
    let good = bodies::get_token_of(&world.home, "alice", &unique_room());
    let pointers = [
        "/room_id",
        "/slot_id",
        "/member/id",
        "/member/claimed_user_id",
        "/member/claimed_device_id",
        "/openid_token/matrix_server_name",
        "/openid_token/token_type",
    ];
    for pointer in pointers {
        world.service.post("/get_token", &with(&good, pointer, Some(json!(FORGERY))));
        world
            .service
            .post("/get_token", &with(&good, pointer, Some(json!(format!("!a:{FORGERY}")))));
    }
    let legacy = bodies::sfu_get_of(&world.home, "alice", FORGERY);
    for pointer in ["/device_id", "/openid_token/matrix_server_name", "/delay_id"] {
        world.service.post("/sfu/get", &with(&legacy, pointer, Some(json!(FORGERY))));
    }
    world.service.post("/sfu/get", &json!({ FORGERY: FORGERY }));
    world.service.call(&Call::post("/get_token", format!("{{\"{FORGERY}")));
    for target in [
        "/%0d%0aFORGED",
        "/%1b[31mFORGED",
        "/get_token?x=%0aFORGED",
        "/\u{85}FORGED",
        "/\u{9b}31mFORGED",
    ] {
        let _ = world.service.raw(&Call::new("GET", target).bytes(world.service.address()));
    }
    let headers = [
        ("X-Request-Id", "\u{85}FORGED\u{1b}[31m"),
        ("User-Agent", "\u{85}FORGED\u{9b}"),
        ("X-Forwarded-For", "FORGED\u{1b}"),
        ("Origin", "\u{1b}FORGED"),
    ];
    for (name, value) in headers {
        let _ = world
            .service
            .raw(&Call::post("/get_token", "{}").header(name, value).bytes(world.service.address()));
    }
    // Neighbours forge too.
    let subs = [
        FORGERY.into(),
        format!("@{FORGERY}:{}", world.home.name),
        format!("@alice:{FORGERY}"),
    ];
    for sub in subs {
        world.service.post(
            "/sfu/get",
            &bodies::sfu_get(&unique_room(), &world.home.name, &world.home.token_of(&sub)),
        );
    }
    let pages = [
        Reply::text(403, "text/html", FORGERY),
        Reply::json(401, &json!({"errcode": FORGERY, "error": FORGERY})),
        Reply::text(404, "FORGED", FORGERY),
    ];
    for page in pages {
        let token = world.home.token_with(page.clone());
        world
            .service
            .post("/sfu/get", &bodies::sfu_get(&unique_room(), &world.home.name, &token));
        world.sfu.fail(Some(Fault::Instead(page)));
        world
            .service
            .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()));
        world.sfu.fail(None);
    }
    let twirp = Reply::json(401, &json!({"code": FORGERY, "msg": FORGERY}));
    world.sfu.fail(Some(Fault::Instead(twirp)));
    world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()));
    world.sfu.fail(None);
}

fn assert_unforged(service: &Service) -> String {
    let log = service.log();
    assert!(log.lines().count() > 20, "so few lines that this proves nothing:\n{log}");
    for line in log.split('\n') {
        let odd = |c: &char| c.is_control() || ['\u{2028}', '\u{2029}', '\u{202e}'].contains(c);
        assert_eq!(line.chars().find(odd), None, "a control character in {line:?}");
        assert!(!line.trim_start().starts_with("FORGED"), "forged: {line:?}");
    }
    log
}

#[test]
fn nobody_writes_lines_into_the_text_log() {
    let world = World::new();
    forge(&world);
    let log = assert_unforged(&world.service);
    for line in log.lines() {
        let year = line.get(..4).is_some_and(|y| y.bytes().all(|b| b.is_ascii_digit()));
        let level = ["TRACE", "DEBUG", "INFO", "WARN", "ERROR"]
            .iter()
            .any(|l| line.get(..60).unwrap_or(line).contains(l));
        assert!(year && level, "a line without time and level: {line:?}");
    }
}

#[test]
fn the_json_log_is_one_object_a_line() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_FORMAT", "json"));
    forge(&world);
    let log = assert_unforged(&world.service);
    for line in log.lines() {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("no JSON ({e}): {line:?}"));
        for name in ["timestamp", "level"] {
            assert!(object[name].is_string(), "no {name} in {line}");
        }
    }
}

/// Client's fault: debug or info. Neighbour's: warn. Ours: error.
#[test]
fn the_level_says_whose_fault_it_was() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "warn"));
    let started = world.service.log();
    let good = || bodies::get_token_of(&world.home, "alice", &unique_room());
    assert_eq!(world.service.post("/get_token", &good()).status, 200);
    for call in [
        Call::new("GET", "/nope"),
        Call::new("GET", "/get_token"),
        Call::post("/get_token", "nonsense"),
        Call::post("/sfu/get", vec![b' '; 70_000]),
    ] {
        world.service.call(&call);
    }
    world.service.post("/get_token", &with(&good(), "/room_id", None));
    world.service.post(
        "/get_token",
        &with(&good(), "/openid_token/access_token", Some(json!(secrets::token()))),
    );
    world.service.post(
        "/get_token",
        &with(&good(), "/member/claimed_user_id", Some(json!("@eve:example.org"))),
    );
    world.service.post(
        "/get_token",
        &with(&good(), "/openid_token/matrix_server_name", Some(json!("no server"))),
    );
    // Of a busy machine it may say that it stood still, and a warning about a variable, of the start, may come a moment late.
    let log = world.service.log();
    let of_clients = |line: &&str| !line.contains("stood still") && !line.contains("LIVEKIT_");
    let told: Vec<_> = log[started.len()..].lines().filter(of_clients).collect();
    assert_eq!(told, [""; 0], "a client's fault is no warning");
    world.sfu.fail(Some(Fault::NoGrant));
    let answer = world.service.post("/get_token", &good());
    let line = world.service.wait_line_of(&answer);
    assert!(["WARN", "ERROR"].contains(&line.field("level")), "{line}");
}

#[test]
fn levels_are_those_of_the_old_service() {
    for (level, debug, info) in [
        ("debug", true, true),
        ("DEBUG", true, true),
        ("info", false, true),
        ("", false, true),
        ("warning", false, false),
        ("Error", false, false),
    ] {
        let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", level));
        world
            .service
            .post("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room()));
        world.service.post("/get_token", &json!({}));
        let log = world.service.log();
        let has = |name: &str| log.lines().any(|l| l.get(..60).unwrap_or(l).contains(name));
        assert_eq!((has("DEBUG"), has("INFO")), (debug, info), "LIVEKIT_LOG_LEVEL={level}:\n{log}");
    }
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "loud"));
    assert!(world.service.warns_of(&["LIVEKIT_LOG_LEVEL"]));
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "error").env("RUST_LOG", "lk_jwt_service=debug"));
    world.service.post("/get_token", &json!({}));
    world.service.wait_line(&[("level", "DEBUG")]);
}

/// What an operator greps for: the ID that the user reads off an error page.
#[test]
fn a_request_is_found_by_its_id() {
    let world = World::new();
    let good = bodies::get_token_of(&world.home, "alice", &unique_room());
    for (n, body) in [
        good.clone(),
        with(&good, "/member/claimed_user_id", Some(json!("@eve:example.org"))),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("grep-for-me-{n}");
        world.service.call(&Call::json("/get_token", &body).header("X-Request-Id", &id));
        world.service.wait_request(&id);
    }
    let failing = Homeserver::start();
    failing.http.refuse();
    let id = "grep-for-me-unreachable";
    let call = Call::json("/sfu/get", &bodies::sfu_get_of(&failing, "alice", &unique_room())).header("X-Request-Id", id);
    assert_eq!(world.service.call(&call).status, 401);
    world.service.wait_request(id).says(&[&failing.name]);
}

/// A pipe that nobody reads, filled by strangers at debug level.
#[test]
fn a_reader_of_the_log_that_hangs_stops_nothing() {
    const PEOPLE: usize = 20;
    let delay = Duration::from_secs(5);
    let scene = Scene::with(Setup::unread_log);
    let people: Vec<_> = (0..PEOPLE)
        .map(|n| {
            let (user, id) = (format!("user{n}"), format!("syd_{n}"));
            let body = bodies::delegate_of(&scene.home, &user, &scene.room, &id, 5_000);
            assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
            let identity = hashes::identity(&scene.home.user(&user), "DEVICE", "member1");
            let session = scene.sfu.join(&scene.alias, &identity);
            scene.send_webhook(&webhook::joined(&session));
            (id, session)
        })
        .collect();
    // Some 16 MiB, of which a pipe takes 64 KiB.
    let began = Instant::now();
    let long = format!("/{}", "x".repeat(4_000));
    let calls: Vec<_> = (0..4_000).map(|_| Call::new("GET", &long)).collect();
    let before = scene.service.rss_kib();
    for answer in scene.service.flood(&calls, 50) {
        assert_eq!(answer.status, 404);
    }
    let grown = scene.service.rss_kib().saturating_sub(before);
    let mut slowest = Duration::ZERO;
    wait_until("three delays to pass", delay * 3 + TIMEOUT, || {
        let asked = Instant::now();
        assert_eq!(scene.service.get("/healthz").status, 200);
        slowest = slowest.max(asked.elapsed());
        began.elapsed() > delay * 3
    });
    let late = lateness::since(began);
    eprintln!("a log that nobody reads: /healthz within {slowest:?} (this machine was late by {late:?}), {grown} KiB more");
    assert!(slowest < Duration::from_millis(250) + late * 2, "/healthz took {slowest:?}");
    assert!(grown < 8 * 1024, "{grown} KiB more");
    for (id, _) in &people {
        assert_eq!(scene.api.count("send", id), 0, "{id}: somebody who is there was reported gone");
        let restarts = scene.api.times("restart", id);
        let gaps = restarts.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = gaps.chain(restarts.last().map(Instant::elapsed)).max();
        assert!(longest.is_some_and(|gap| gap < delay), "{id} ran out: {longest:?}");
    }
    let (id, session) = &people[7];
    scene.sfu.leave(&scene.alias, &session.identity);
    scene.send_webhook(&webhook::left(session, "CLIENT_INITIATED"));
    wait_until("the leave", TIMEOUT, || scene.api.count("send", id) == 1);
    // The reader comes back.
    scene.service.read_log();
    wait_until("a line that finds room", TIMEOUT, || {
        assert_eq!(scene.service.get("/after").status, 404);
        !scene.service.lines(&[("path", "/after")]).is_empty()
    });
    let log = scene.service.log();
    // Short lines found room where long ones did not.
    let notices = log
        .lines()
        .filter_map(|line| line.split_once(" log lines were dropped: the reader of stderr is too slow"));
    let counts = notices.filter_map(|(before, _)| before.rsplit(' ').next()?.parse::<usize>().ok());
    let (dropped, kept) = (counts.sum::<usize>(), log.matches("path=\"/xxx").count());
    assert!(dropped + kept >= 4_000 && kept < 400, "{dropped} dropped, {kept} kept");
    assert!(log.len() < 2 * 1024 * 1024, "{} bytes were kept", log.len());
    let whole = |line: &str| line.get(..4).is_some_and(|year| year.bytes().all(|b| b.is_ascii_digit()));
    assert!(log.lines().all(whole), "half a line");
}

#[test]
fn a_reader_of_the_log_that_hangs_does_not_hold_up_the_end() {
    let world = World::with(Setup::unread_log);
    let long = format!("/{}", "x".repeat(4_000));
    let calls: Vec<_> = (0..500).map(|_| Call::new("GET", &long)).collect();
    world.service.flood(&calls, 50);
    let began = Instant::now();
    world.service.signal("TERM");
    wait_until("the end", TIMEOUT, || world.service.exit_status().is_some());
    assert!(world.service.exit_status().is_some_and(|status| status.success()));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// What is logged last is not lost.
#[test]
fn everything_is_in_the_log_at_the_end() {
    let world = World::new();
    let calls: Vec<_> = (0..500).map(|n| Call::new("GET", &format!("/last-{n}-words"))).collect();
    world.service.flood(&calls, 50);
    world.service.signal("TERM");
    assert!(world.service.wait_exit(TIMEOUT).success());
    let log = world.service.log();
    for n in 0..500 {
        assert!(log.contains(&format!("path=\"/last-{n}-words\"")), "{n}");
    }
    assert!(log.contains("stopping: requests in flight may finish"));
}

/// Refusals of strangers are bounded, and do not hide those of homeservers that the operator wrote down.
#[test]
fn strangers_do_not_fill_the_log() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let mark = world.service.log().len();
    let began = Instant::now();
    let junk = |n: usize| {
        let server = format!("127.9.{}.{}:1", n / 250, n % 250);
        Call::json("/sfu/get", &bodies::sfu_get("!r:x", &server, &secrets::token()))
    };
    let calls: Vec<_> = (0..2_000).map(junk).collect();
    for answer in world.service.flood(&calls, 200) {
        assert!([401, 503].contains(&answer.status), "{}", answer.text());
    }
    // What anybody may fetch leaves nothing, and a method is no place for a text.
    for path in ["/check", "/check/page.css", "/check/faults.json", "/healthz"] {
        assert_eq!(world.service.get(path).status, 200, "{path}");
    }
    let odd = world.service.get("/check/%FF");
    assert_eq!((odd.status, odd.json()["errcode"].as_str()), (404, Some("M_UNRECOGNIZED")));
    assert_eq!(world.service.call(&Call::new(&"A".repeat(12_000), "/x")).status, 404);
    assert!(!world.service.log().contains("route=check") && !world.service.log().contains(&"A".repeat(40)));
    let ours = bodies::sfu_get(&unique_room(), &world.home.name, &secrets::token());
    let call = Call::json("/sfu/get", &ours).header("X-Request-Id", "one-of-ours");
    assert_eq!(world.service.call(&call).status, 401);
    world
        .service
        .wait_line(&[("target", "request"), ("of", "strangers")])
        .says(&["suppressed="]);
    let line = world.service.wait_request("one-of-ours");
    assert_eq!(line.field("outcome"), "token_rejected", "{line}");
    let took = began.elapsed();
    let log = world.service.log();
    let new = &log[mark..];
    let lines = new.lines().filter(|line| line.contains("server=\"127.9.")).count();
    let counts: usize = new
        .lines()
        .filter_map(|line| line.split_once(" suppressed=")?.1.split(' ').next()?.parse::<usize>().ok())
        .sum();
    eprintln!(
        "2000 refusals within {took:?}: {lines} lines, {counts} counted, {} bytes",
        new.len()
    );
    // Ten in each second that has begun, and the warning about their addresses.
    let most = 10 * (took.as_secs() as usize + 2) + 20;
    assert!((10..=most).contains(&lines), "{lines} lines");
    assert!(lines + counts <= 2_000 + 20 && counts > 0, "{counts} counted");
}

/// At the finest level, too, nothing secret: whatever libraries log below us.
#[test]
fn even_a_trace_of_everything_holds_no_secret() {
    let world = World::with(|setup| setup.env("RUST_LOG", "trace"));
    for homeserver in [&world.home, &world.away] {
        for path in ["/get_token", "/sfu/get"] {
            let body = bodies::get_token_of(homeserver, "alice", &unique_room());
            assert_eq!(world.service.post(path, &body).status, 200);
            assert_eq!(world.service.post(path, &body).status, 200);
        }
        world
            .service
            .post("/sfu/get", &bodies::sfu_get(&unique_room(), &homeserver.name, &secrets::token()));
    }
    world.home.http.refuse();
    let waiting = world
        .service
        .begin(&Call::json("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room())));
    world.service.wait_event("retry");
    world.home.http.listen_again();
    assert_eq!(waiting.join().expect("the request").expect("an answer").status, 200);
}
