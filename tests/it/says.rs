//! It says what happened: one line for each request in one vocabulary, the metrics, and what is told of the configuration.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use lk_jwt_service::internals::metrics::{Gauges, METRICS};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::support::bodies::{self, with};
use crate::support::client::{Answer, Call, Connection, call};
use crate::support::hashes::{SLOT, alias, homeserver_identity};
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::OwnHomeserver;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::{Setup, free_address};
use crate::support::sfu::{Fault, Sfu};
use crate::support::world::World;
use crate::support::{client_api, nothing_may_be_left_out, secrets, unique, unique_room, wait_until, webhook};

/// The fields of a line in JSON.
fn object(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("no JSON ({e}): {line:?}"))
}

/// The lines about requests.
fn requests(log: &str) -> Vec<Value> {
    let objects = log.lines().map(object);
    objects.filter(|object| object["target"] == "request").collect()
}

/// The line of the request with this id.
fn line_of(world: &World, id: &str) -> Value {
    object(&world.service.wait_request(id).to_string())
}

fn json_world(change: impl FnOnce(Setup) -> Setup) -> World {
    World::with(|setup| change(setup.env("LIVEKIT_LOG_FORMAT", "json").env("LIVEKIT_LOG_LEVEL", "info")))
}

#[test]
fn a_token_leaves_a_line_with_all_that_it_is_about() {
    let world = json_world(|setup| setup);
    let room = unique_room();
    let ask = Call::json("/livekit/jwt/get_token", &bodies::get_token_of(&world.home, "alice", &room));
    let ask = ask
        .header("X-Request-Id", "good")
        .header("X-Forwarded-For", "10.0.0.1, 8.8.4.4, 192.168.0.1");
    assert_eq!(world.service.call(&ask).status, 200);
    let line = line_of(&world, "good");
    for (field, expected) in [
        ("level", json!("INFO")),
        ("route", json!("get_token")),
        ("method", json!("POST")),
        ("status", json!(200)),
        ("outcome", json!("ok")),
        ("user", json!(world.home.user("alice"))),
        ("server", json!(world.home.name)),
        ("matrix_room", json!(room)),
        ("opens_rooms", json!(true)),
        ("publishes", json!(true)),
        ("delegated", json!(false)),
        ("client", json!("8.8.4.4")),
    ] {
        assert_eq!(line[field], expected, "{field} in {line}");
    }
    for field in ["total_ms", "verify_ms", "sfu_ms"] {
        assert!(line[field].is_u64(), "{field} in {line}");
    }
    assert!(
        line["livekit_room"]
            .as_str()
            .is_some_and(|alias| world.sfu.rooms().contains(&alias.to_owned()))
    );
    assert!(line.get("members_ms").is_none() && line.get("store_ms").is_none(), "{line}");
}

/// Fields of the line of every request, and of one that had this outcome on this route, if something went well enough to know them.
fn fields_of(route: &str, outcome: &str) -> &'static [&'static str] {
    match (route, outcome) {
        ("get_token" | "sfu_get", "ok") => &[
            "user",
            "server",
            "matrix_room",
            "livekit_room",
            "opens_rooms",
            "publishes",
            "delegated",
            "verify_ms",
        ],
        ("sfu_get", "token_rejected") => &["server", "verify_ms", "detail"],
        ("sfu_get", "client_gone") => &["server", "waited_for", "verify_ms"],
        ("sfu_get", "invalid_server_name") | ("get_token", "bad_request") | ("sfu_webhook", "webhook_rejected") => &["detail"],
        _ => &[],
    }
}

/// Twenty thousand requests of all kinds, and clients that hang up: as many lines, each with its fields, and nobody in them who is
/// not to be seen.
#[test]
fn every_request_leaves_a_line() {
    std::thread::scope(|scope| {
        for (level, users, each) in [
            ("info", "full", 1000),
            ("debug", "full", 500),
            ("debug", "hash", 250),
            ("debug", "none", 250),
        ] {
            scope.spawn(move || as_many_lines_as_requests(level, users, each));
        }
    });
}

fn as_many_lines_as_requests(level: &str, users: &str, each: usize) {
    const HUNG_UP: usize = 100;
    let world = json_world(|setup| setup.env("LIVEKIT_LOG_LEVEL", level).env("LIVEKIT_LOG_USERS", users));
    let (room, elsewhere) = (unique_room(), unique_room());
    let good = bodies::get_token_of(&world.home, "alice", &room);
    let away = bodies::sfu_get_of(&world.away, "bob", &room);
    let alice = world.home.user("alice");
    let mut calls = Vec::new();
    for n in 0..each {
        calls.push(Call::json("/get_token", &good));
        calls.push(Call::json("/sfu/get", &away));
        calls.push(Call::new("GET", &format!("/nothing/{n}/{alice}/{room}")));
        calls.push(Call::new("GET", "/get_token"));
        calls.push(Call::post("/get_token", "nonsense"));
        calls.push(Call::json(
            "/sfu/get",
            &bodies::sfu_get(&elsewhere, &world.home.name, &secrets::token()),
        ));
        calls.push(Call::json("/sfu/get", &bodies::sfu_get(&elsewhere, "no server", "token")));
        calls.push(Call::post("/sfu_webhook", "{}"));
        calls.push(Call::new("OPTIONS", "/get_token"));
        calls.push(Call::new("GET", "/healthz"));
    }
    // The start asks, too: for /healthz until it is answered.
    let mine = |call: Call| {
        call.header("X-Forwarded-For", "8.8.4.4")
            .header("X-Request-Id", &format!("mine-{}", unique()))
    };
    let calls: Vec<_> = calls.into_iter().map(mine).collect();
    for answer in world.service.flood(&calls, 25) {
        assert!(answer.status < 500, "{}", answer.text());
    }
    world.home.http.refuse();
    for _ in 0..HUNG_UP {
        let body = bodies::sfu_get_of(&world.home, "alice", &elsewhere);
        let mut connection = world.service.connect();
        connection.send(&mine(Call::json("/sfu/get", &body)).bytes(world.service.address()));
    }
    // Preflights and probes are at debug.
    let quiet = if level == "info" { 2 * each } else { 0 };
    let wanted = calls.len() + HUNG_UP - quiet;
    let count = || {
        let log = world.service.log();
        let all = requests(&log);
        let mine = |line: &&Value| line["request_id"].as_str().is_some_and(|id| id.starts_with("mine-"));
        let lines = all.iter().filter(mine).count();
        let suppressed: u64 = all.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
        let dropped: usize = log
            .lines()
            .filter_map(|line| {
                object(line)["message"]
                    .as_str()?
                    .split_once(" log lines were dropped")?
                    .0
                    .parse::<usize>()
                    .ok()
            })
            .sum();
        (lines + dropped, usize::try_from(suppressed).expect("a count"))
    };
    let sum = |(lines, suppressed): (usize, usize)| lines + suppressed;
    wait_until("all lines", Duration::from_secs(30), || sum(count()) >= wanted);
    let (lines, suppressed) = count();
    eprintln!("{level}, {users}: {wanted} requests, {lines} lines, {suppressed} suppressed");
    assert_eq!(lines + suppressed, wanted, "{level}, {users}");
    assert_eq!(suppressed > 0, level == "info");

    let log = world.service.log();
    for line in requests(&log).iter().filter(|line| line.get("outcome").is_some()) {
        let words = (
            line["route"].as_str().expect("a route"),
            line["outcome"].as_str().expect("an outcome"),
        );
        let own = if line["method"] == "POST" {
            fields_of(words.0, words.1)
        } else {
            &[]
        };
        for field in ["request_id", "route", "method", "total_ms", "client"].iter().chain(own) {
            let is_hidden = users == "none" && ["user", "matrix_room", "livekit_room", "client"].contains(field);
            assert_eq!(line.get(field).is_none(), is_hidden, "{field} in {line}");
        }
        assert_eq!(line.get("path").is_some(), words.0 == "other" && users == "full", "{line}");
        assert_ne!(line["server"], "", "{line}");
        assert_eq!(line.get("status").is_none(), words.1 == "client_gone", "{line}");
    }
    let names = [alice, world.away.user("bob"), room, elsewhere, "8.8.4.4".to_owned()];
    let aliases = world.sfu.rooms();
    for name in names.iter().chain(&aliases) {
        let seen = log.lines().find(|line| line.contains(name.as_str()));
        assert_eq!(seen.is_some(), users == "full", "{users}: {name} in {seen:?}");
    }
}

#[test]
fn a_client_that_gave_up_leaves_what_it_waited_for() {
    let world = json_world(|setup| setup);
    world.sfu.fail(Some(Fault::ProxyPage(502)));
    let ask = Call::json("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room())).header("X-Request-Id", "gone");
    let mut connection = world.service.connect();
    connection.send(&ask.bytes(world.service.address()));
    wait_until("two tries", TIMEOUT, || world.sfu.creations() >= 2);
    drop(connection);
    let line = line_of(&world, "gone");
    assert_eq!(line["outcome"], "client_gone", "{line}");
    assert_eq!(line["waited_for"], "sfu", "{line}");
    assert_eq!(line["user"], world.home.user("alice"), "{line}");
    assert!(line["neighbour_said"].as_str().is_some_and(|said| said.contains("502")), "{line}");
    assert!(line.get("status").is_none() && line["sfu_ms"].is_u64(), "{line}");
    // The same while the homeserver is waited for.
    let world = json_world(|setup| setup);
    world.home.http.refuse();
    let ask = Call::json("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room())).header("X-Request-Id", "gone");
    let mut connection = world.service.connect();
    connection.send(&ask.bytes(world.service.address()));
    connection.half_close();
    let line = line_of(&world, "gone");
    assert_eq!(
        (&line["outcome"], &line["waited_for"]),
        (&json!("client_gone"), &json!("verify")),
        "{line}"
    );
    assert!(
        line["neighbour_said"].as_str().is_some_and(|said| said.contains("refused")),
        "{line}"
    );
    assert!(line.get("user").is_none(), "nobody was verified: {line}");
}

/// A number of the metrics.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).unwrap_or(0.0)
}

fn metrics_of(world: &World) -> String {
    let answer = world.service.get("/metrics");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    answer.text()
}

/// What names a user, a room or a client, and must not be seen.
#[test]
fn people_are_hashed_or_left_out() {
    for mode in ["full", "hash", "none"] {
        let scene = Scene::with(|setup| setup.env("LIVEKIT_LOG_USERS", mode).env("RUST_LOG", "lk_jwt_service=trace"));
        scene.delegate(Duration::from_secs(10));
        let session = scene.joined();
        scene.wait_restarts(1);
        let ask = |headers: &[(&str, &str)], target: &str, body: &Value| -> Answer {
            let mut ask = Call::json(target, body);
            for (name, value) in headers {
                ask = ask.header(name, value);
            }
            scene.service.call(&ask)
        };
        let good = bodies::get_token_of(&scene.home, "alice", &scene.room);
        for _ in 0..2 {
            let answer = ask(&[("X-Forwarded-For", "8.8.4.4"), ("X-Request-Id", "one")], "/get_token", &good);
            assert_eq!(answer.status, 200);
        }
        ask(
            &[("X-Forwarded-For", "2a00:1450:4001:82f::200e")],
            "/sfu/get",
            &bodies::sfu_get_of(&scene.home, "alice", &scene.room),
        );
        ask(&[], &format!("/_matrix/app/v1/users/{}", scene.home.user("alice")), &good);
        // A route of ours at another path is warned about.
        ask(&[], &format!("/{}/{}/get_token", scene.home.user("alice"), scene.room), &good);
        scene.service.wait_event("misdirected_request");
        ask(
            &[],
            "/get_token",
            &with(&good, "/member/claimed_user_id", Some(json!(scene.home.user("eve")))),
        );
        scene.leave(&session, "CLIENT_INITIATED");
        scene.wait_sent(TIMEOUT);
        let line = scene.service.wait_event("leave_over");
        assert!(line.has(&[("reason", "sent"), ("cause", "reported")]), "{line}");
        let log = scene.service.log();
        let names = [
            scene.home.user("alice"),
            scene.room.clone(),
            scene.alias.clone(),
            session.identity.clone(),
            "8.8.4.4".into(),
            "2a00:1450:4001:82f".into(),
        ];
        for name in &names {
            let seen = log.lines().find(|line| line.contains(name.as_str()));
            if mode == "full" {
                assert!(seen.is_some() || *name == session.identity, "{name} is not in the log");
            } else {
                assert_eq!(seen, None, "{name} is seen with {mode}");
            }
        }
        let line = scene.service.wait_request("one");
        let user = line.field("user");
        match mode {
            "full" => assert_eq!(user, names[0]),
            "hash" => {
                assert!(user.len() == 12 && user.bytes().all(|b| b.is_ascii_hexdigit()), "{line}");
                assert!(log.matches(user).count() > 1, "the same person has the same pseudonym");
                assert!(
                    line.contains("client=\"8.8.4.0/24\"") && log.contains("client=\"2a00:1450:4001::/48\""),
                    "{line}"
                );
                let plain = Sha256::digest(&names[0])
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<String>();
                assert!(!plain.starts_with(user), "a plain hash is guessed");
            }
            _ => assert!(user.is_empty() && !log.contains("client="), "{line}"),
        }
    }
}

/// The same behind our homeserver, which says who is in a room: who left it is removed from the call.
#[test]
fn people_of_our_homeserver_are_hashed_or_left_out() {
    const PATH: &str = "/_matrix/client/v1/rtc/livekit";
    for mode in ["full", "hash", "none"] {
        let (sfu, own) = (Sfu::start(), OwnHomeserver::start());
        let setup = own.serving(Setup::new(&sfu)).env("LIVEKIT_LOG_USERS", mode);
        let setup = setup
            .env("RUST_LOG", "lk_jwt_service=trace")
            .env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "1");
        let service = setup.start();
        let (room, alice, bob) = (unique_room(), own.user("alice"), own.user("bob"));
        own.join(&room, &alice);
        let ask = |what: &str, who: &str, body: &Value| {
            let call = Call::json(&format!("{PATH}/{what}"), body).header("Authorization", &format!("Bearer {}", own.hs_token));
            service.call(&call.header("X-Matrix-User-Identifier", who)).status
        };
        let mut body = json!({"url": sfu.url(), "room_id": room, "slot_id": SLOT, "member_id": "m"});
        assert_eq!(ask("get_token", &alice, &body), 200);
        assert_eq!(ask("get_token", &bob, &body), 403);
        assert_eq!(ask("get_token", &format!("{bob}:x"), &body), 400);
        body["delay_id"] = json!(own.schedule(&alice, &room, 60_000));
        assert_eq!(ask("delegate_delayed_leave", &alice, &body), 200);
        let (alias, identity) = (alias(&room, SLOT), homeserver_identity(&alice, "m"));
        let session = sfu.join(&alias, &identity);
        assert_eq!(webhook::tell(&service, &sfu, &webhook::joined(&session)).status, 200);
        own.part(&room, &alice);
        wait_until("the removal", TIMEOUT, || !sfu.removals(&alias, &identity).is_empty());
        service.wait_event("participant_removed");
        let log = service.log();
        for (name, shown) in [(&alice, true), (&bob, true), (&room, true), (&alias, true), (&identity, true)] {
            let seen = log.lines().find(|line| line.contains(name.as_str()));
            assert_eq!(seen.is_some(), shown && mode == "full", "{mode}: {name} in {seen:?}");
        }
    }
}

fn promtool(arguments: &[&str], input: &str) -> Option<String> {
    let child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        assert!(!nothing_may_be_left_out(), "promtool is missing (Debian's package prometheus)");
        eprintln!("left out: promtool is missing");
        return None;
    };
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("a pipe");
    let output = child.wait_with_output().expect("promtool");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}\n{input}");
    Some(said)
}

/// Every family, and how it moves.
#[test]
fn metrics_move() {
    let scene = Scene::with(|setup| setup.env("LIVEKIT_METRICS_BIND", "main"));
    let text = || {
        let answer = scene.service.get("/metrics");
        assert_eq!(answer.status, 200);
        answer.text()
    };
    let before = text();
    let good = bodies::get_token_of(&scene.home, "alice", &scene.room);
    assert_eq!(scene.service.post("/get_token", &good).status, 200);
    assert_eq!(scene.service.post("/get_token", &good).status, 200);
    scene.service.post(
        "/get_token",
        &with(&good, "/openid_token/access_token", Some(json!(secrets::token()))),
    );
    for address in ["169.254.169.254", "10.0.0.1"] {
        let away = with(&good, "/openid_token/matrix_server_name", Some(json!(address)));
        scene.service.post("/get_token", &away);
    }
    scene.service.post("/sfu_webhook", &json!({}));
    scene.delegate(Duration::from_secs(10));
    let waiting = text();
    assert!(sample(&waiting, "lk_jwt_jobs{state=\"waiting\"}") > 0.5, "{waiting}");
    let session = scene.joined();
    scene.wait_restarts(1);
    assert!(sample(&text(), "lk_jwt_jobs{state=\"watched\"}") > 0.5);
    scene.api.answer(|_, _| Reply::json(429, &json!({"errcode": "M_LIMIT_EXCEEDED"})));
    wait_until("a 429", TIMEOUT, || sample(&text(), "lk_jwt_homeserver_rate_limited_total") > 0.5);
    scene.api.answer(|_, _| client_api::done());
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
    wait_until("the end", TIMEOUT, || {
        sample(&text(), "lk_jwt_job_ends_total{reason=\"sent\"}") > 0.5
    });
    let after = text();
    for name in [
        "lk_jwt_requests_total{route=\"get_token\",outcome=\"ok\"}",
        "lk_jwt_requests_total{route=\"get_token\",outcome=\"token_rejected\"}",
        "lk_jwt_request_duration_seconds_count{route=\"get_token\"}",
        "lk_jwt_verifications_total{result=\"ok\"}",
        "lk_jwt_verifications_total{result=\"token_rejected\"}",
        "lk_jwt_rooms_total{result=\"opened\"}",
        "lk_jwt_tokens_total{access=\"full\"}",
        "lk_jwt_leave_lag_seconds_count",
        "lk_jwt_job_ends_total{reason=\"sent\"}",
        "lk_jwt_homeserver_rate_limited_total",
        "lk_jwt_webhooks_total{result=\"accepted\"}",
        "lk_jwt_webhooks_total{result=\"rejected\"}",
        "lk_jwt_webhook_last_received_timestamp_seconds",
        "lk_jwt_guard_refusals_total{reason=\"never\"}",
        "lk_jwt_guard_refusals_total{reason=\"private\"}",
        "lk_jwt_neighbour_request_duration_seconds_count{neighbour=\"sfu\",call=\"create_room\",result=\"ok\"}",
        "lk_jwt_neighbour_request_duration_seconds_count{neighbour=\"homeservers\",call=\"send_delayed_event\",result=\"ok\"}",
        "process_cpu_seconds_total",
    ] {
        assert!(sample(&after, name) > sample(&before, name), "{name} has not moved:\n{after}");
    }
    for name in [
        concat!("lk_jwt_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"),
        "lk_jwt_requests_in_flight",
        "lk_jwt_neighbour_up{neighbour=\"sfu\"}",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_max_fds",
        "process_start_time_seconds",
    ] {
        assert!(sample(&after, name) > 0.5, "{name}:\n{after}");
    }
    promtool(&["check", "metrics"], &after);
    for name in [&scene.home.name, &scene.room, &scene.home.user("alice")] {
        assert!(!after.contains(name.as_str()), "{name} is a label");
    }
}

/// Our homeserver goes and comes back; the SFU and the store do in other tests.
#[test]
fn our_homeserver_is_up_or_not() {
    let (sfu, own) = (Sfu::start(), OwnHomeserver::start());
    let setup = own.serving(Setup::new(&sfu)).env("LIVEKIT_METRICS_BIND", "main");
    let service = setup.env("LIVEKIT_NEIGHBOUR_CHECK_INTERVAL_SECONDS", "1").start();
    let wait_up = |up: u8| {
        let line = format!("\nlk_jwt_neighbour_up{{neighbour=\"homeserver\"}} {up}\n");
        wait_until(&line, TIMEOUT * 3, || service.get("/metrics").text().contains(&line));
    };
    wait_up(1);
    own.http.refuse();
    wait_up(0);
    own.http.listen_again();
    wait_up(1);
}

#[test]
fn metrics_are_nobody_elses() {
    // Off by default.
    let world = World::shared();
    world.service.get("/metrics").assert_errcode(404, "M_UNRECOGNIZED");
    // On the main port: there only, and not through a proxy.
    let world = World::with(|setup| setup.env("LIVEKIT_METRICS_BIND", "main"));
    assert!(world.service.warns_of(&["LIVEKIT_METRICS_BIND", "proxy"]));
    metrics_of(&world);
    for path in ["/livekit/jwt/metrics", "/metrics/", "//metrics", "/%6detrics"] {
        assert_eq!(world.service.get(path).status, 404, "{path}");
    }
    for name in ["X-Forwarded-For", "Forwarded", "Via"] {
        assert_eq!(
            world.service.call(&Call::new("GET", "/metrics").header(name, "1.1 x")).status,
            404,
            "{name}"
        );
    }
    // On a port of its own, and nothing else there.
    let own = free_address();
    let world = World::with(|setup| setup.env("LIVEKIT_METRICS_BIND", &own.to_string()));
    assert_eq!(world.service.get("/metrics").status, 404);
    let answer = call(own, &Call::new("GET", "/metrics"));
    assert!(
        answer.status == 200 && answer.text().contains("lk_jwt_build_info"),
        "{}",
        answer.text()
    );
    for other in ["/", "/get_token", "/metrics/"] {
        assert_eq!(call(own, &Call::new("GET", other)).status, 404, "{other}");
    }
    // Somebody who says nothing keeps nobody out.
    let _silent: Vec<_> = (0..4).filter_map(|_| Connection::open(own).ok()).collect();
    assert_eq!(call(own, &Call::new("GET", "/metrics")).status, 200);
}

#[test]
fn the_configuration_is_checked_and_shown_without_secrets() {
    let run = |setup: Setup| {
        let service = setup.argument("check-config").spawn();
        let status = service.wait_exit(Duration::from_secs(10));
        (status.code(), service.stdout(), service.log())
    };
    let good = || {
        Setup::bare()
            .env("LIVEKIT_URL", "wss://user:hunter2@livekit.example.com/sfu")
            .env("LIVEKIT_KEY", "mykey")
            .env("LIVEKIT_SECRET", "hunter2-hunter2-hunter2-hunter2-hunter2")
            .env("LIVEKIT_REDIS_URL", "redis://:hunter2@redis:6379")
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com")
            .secret("hunter2")
    };
    let (code, stdout, stderr) = run(good());
    assert_eq!(code, Some(0), "{stderr}");
    for text in [
        "livekit.example.com/sfu",
        "mykey",
        "example.com",
        "redis",
        "standalone",
        "full_access",
    ] {
        assert!(stdout.contains(text), "{text} is missing:\n{stdout}");
    }
    assert!(stderr.contains("LIVEKIT_URL holds a user name or password"), "{stderr}");
    // What is told to be a secret in the wrong place is not shown there.
    let (code, stdout, stderr) = run(good()
        .env("LIVEKIT_KEY", "hunter2-hunter2-hunter2-hunter2-hunter2")
        .env("LIVEKIT_SECRET", "mykey"));
    assert!(
        code == Some(0) && stderr.contains("swapped") && stdout.contains("not shown"),
        "{stdout}{stderr}"
    );
    assert!(!stdout.contains("hunter2") && !stderr.contains("hunter2"), "{stdout}{stderr}");
    let (code, stdout, stderr) = run(good()
        .env("LIVEKIT_JWT_TTL_SECONDS", "1")
        .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", ""));
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(
        stderr.contains("LIVEKIT_JWT_TTL_SECONDS") && stderr.contains("LIVEKIT_FULL_ACCESS_HOMESERVERS"),
        "{stderr}"
    );
}

/// A start that fails is read by the same machines as the log.
#[test]
fn start_errors_are_objects_where_the_log_is() {
    let taken = std::net::TcpListener::bind(free_address()).expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    let bare = || Setup::bare().env("LIVEKIT_LOG_FORMAT", "JSON");
    let configured = || {
        bare()
            .env("LIVEKIT_URL", "wss://livekit.example.com")
            .env("LIVEKIT_KEY", "key")
            .env("LIVEKIT_SECRET", "hunter2-hunter2-hunter2-hunter2-hunter2")
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com")
    };
    for (setup, variables) in [
        (bare(), vec!["LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET"]),
        (
            bare().argument("check-config"),
            vec!["LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET"],
        ),
        (configured().env("LIVEKIT_JWT_BIND", &taken), vec![]),
        (configured().argument("--nonsense"), vec![]),
    ] {
        let service = setup.spawn();
        let status = service.wait_exit(Duration::from_secs(10));
        assert!(!status.success());
        let log = service.log();
        let errors: Vec<_> = log.lines().map(object).filter(|object| object["level"] == "ERROR").collect();
        assert!(!errors.is_empty(), "{log}");
        let mut named = BTreeMap::new();
        for error in &errors {
            assert!(
                error["timestamp"].is_string() && error["message"].as_str().is_some_and(|text| !text.is_empty()),
                "{error}"
            );
            named.insert(error["variable"].as_str().unwrap_or_default(), ());
        }
        assert!(variables.iter().all(|variable| named.contains_key(variable)), "{log}");
    }
}

/// States, not shots: one line when the SFU is away, one when it is back.
#[test]
fn the_sfu_goes_and_comes_back_in_two_lines() {
    let world = json_world(|setup| {
        setup
            .env("LIVEKIT_NEIGHBOUR_CHECK_INTERVAL_SECONDS", "1")
            .env("LIVEKIT_METRICS_BIND", "main")
    });
    world.service.wait_event("sfu_up");
    world.sfu.fail(Some(Fault::ProxyPage(502)));
    let ask = || {
        world
            .service
            .post("/get_token", &bodies::get_token_of(&world.home, "alice", &unique_room()))
    };
    let (first, second) = (ask(), ask());
    assert_eq!((first.status, second.status), (500, 500));
    world.service.wait_event("sfu_down").says(&["WARN", "remedy"]);
    wait_until("the metric", TIMEOUT, || {
        metrics_of(&world).contains("lk_jwt_neighbour_up{neighbour=\"sfu\"} 0")
    });
    world.sfu.fail(None);
    // Nobody asks for anything: the check that is repeated finds it.
    world.service.wait_event("sfu_back").says(&["the SFU answers again, after "]);
    let count = |event| world.service.lines(&[("event", event)]).len();
    assert_eq!(
        [count("sfu_up"), count("sfu_down"), count("sfu_back")],
        [1; 3],
        "{}",
        world.service.log()
    );
    assert!(metrics_of(&world).contains("lk_jwt_neighbour_up{neighbour=\"sfu\"} 1"));
}

/// Words that begin with one of ours.
fn metric_names(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let mut names: Vec<_> = words
        .filter(|word| word.starts_with("lk_jwt_") || word.starts_with("process_"))
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The dashboard, the alerts and the README name no metric that is missing, and each alert fires when it should.
#[test]
fn what_is_shipped_for_prometheus_fits() {
    // One of several replicas has more.
    METRICS.fleet([1, 0, 0], true, 1, 0, 0);
    let text = METRICS.text(&Gauges::default());
    let families: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    let exists = |name: &str| {
        let parts = ["_bucket", "_sum", "_count"];
        let is_part = |family: &str, kind: &str| kind == "histogram" && parts.iter().any(|part| name.strip_suffix(part) == Some(family));
        families.iter().any(|(family, kind)| *family == name || is_part(family, kind))
    };
    for (file, text, least) in [
        ("dashboard.json", include_str!("../../contrib/prometheus/dashboard.json"), 20),
        ("alerts.yml", include_str!("../../contrib/prometheus/alerts.yml"), 9),
        ("alerts_test.yml", include_str!("../../contrib/prometheus/alerts_test.yml"), 9),
        ("README.md of contrib", include_str!("../../contrib/prometheus/README.md"), 3),
        ("README.md", include_str!("../../README.md"), 20),
    ] {
        let others = ["process_", "lk_jwt_service"];
        let names: Vec<_> = metric_names(text).into_iter().filter(|name| !others.contains(name)).collect();
        assert!(names.len() >= least, "{file}: {names:?}");
        for name in names {
            assert!(exists(name), "{file} names {name}, which does not exist");
        }
    }
    let alerts = include_str!("../../contrib/prometheus/alerts.yml");
    let (tests, runbook) = (
        include_str!("../../contrib/prometheus/alerts_test.yml"),
        include_str!("../../contrib/prometheus/README.md"),
    );
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("alertname: {alert}")), "{alert} is not tried");
        assert!(runbook.contains(&format!("\n## {alert}\n")), "{alert} has no runbook");
    }
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/prometheus/");
    promtool(&["check", "rules", &format!("{directory}alerts.yml")], "");
    promtool(&["test", "rules", &format!("{directory}alerts_test.yml")], "");
}
