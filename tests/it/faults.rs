//! Faults that are planted one at a time against the real binary: within a minute the log, at info or above, names the cause and
//! the remedy; and a healthy stack says none of it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::ca::Ca;
use crate::support::client::Call;
use crate::support::dns::Dns;
use crate::support::homeserver::Homeserver;
use crate::support::log::Line;
use crate::support::neighbour::Reply;
use crate::support::network::{in_own_network, with_low_ports};
use crate::support::own_homeserver::OwnHomeserver;
use crate::support::redis::RedisServer;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Fault, Sfu};
use crate::support::world::World;
use crate::support::{bodies, comes_true, secrets, unique, unique_loopback, unique_room, wait_until, webhook};

/// Within that time each fault is told; the checks that are repeated each 60 s are repeated each second here.
const WITHIN: Duration = Duration::from_secs(60);

/// Waits for a line about this event that has both texts, for whoever reads at level info. It need not be the first one: a
/// neighbour that goes away may break off an answer before it refuses connections.
#[track_caller]
pub(crate) fn told(what: &str, service: &Service, event: &str, cause: &str, remedy: &str) {
    let began = Instant::now();
    let fits = |line: &Line| line.contains(cause) && line.contains(remedy) && line.field("level") != "DEBUG";
    let told = || service.lines(&[("event", event)]).iter().any(fits);
    if !comes_true(WITHIN, told) {
        let lines = service.lines(&[("event", event)]);
        panic!("{what}: no line has {cause:?} and {remedy:?}: {lines:#?}");
    }
    eprintln!("{what}: told within {:?}", began.elapsed());
}

pub(crate) fn quick(setup: Setup) -> Setup {
    setup
        .env("LIVEKIT_LOG_LEVEL", "info")
        .env("LIVEKIT_NEIGHBOUR_CHECK_INTERVAL_SECONDS", "1")
}

fn bare() -> Setup {
    quick(Setup::bare())
        .env("LIVEKIT_URL", "wss://livekit.example.com")
        .env("LIVEKIT_KEY", "key")
        .env("LIVEKIT_SECRET", "hunter2-hunter2-hunter2-hunter2-hunter2")
        .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com")
}

fn file(name: &str, text: &str) -> String {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}-{}-{name}", std::process::id(), unique()));
    fs::write(&path, text).expect("a file");
    path.to_string_lossy().into_owned()
}

/// What is wrong, the variables that make it so, and the two texts of the line: the cause and the remedy.
type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str, &'a str);

/// A web server without TLS: to what is no HTTP it says so.
fn plain_port() -> SocketAddr {
    let listener = TcpListener::bind((unique_loopback(), 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    address
}

/// What is wrong with the configuration and does not keep the service from starting.
#[test]
fn faults_of_the_configuration() {
    let state = file("state", "");
    fs::remove_file(&state).expect("a file");
    let whole = file(
        "config.yaml",
        "port: 7880\nrtc:\n  tcp_port: 7881\nkeys:\n  key: hunter2-hunter2-hunter2-hunter2-hunter2\nroom:\n  auto_create: false\n",
    );
    let table: &[Row<'_>] = &[
        (
            "ws",
            &[("LIVEKIT_URL", "ws://livekit.example.com")],
            "LIVEKIT_URL is not encrypted",
            "Write wss://",
        ),
        (
            "http",
            &[("LIVEKIT_URL", "http://livekit.example.com")],
            "LIVEKIT_URL is not encrypted",
            "Write wss://",
        ),
        (
            "loopback",
            &[("LIVEKIT_URL", "ws://localhost:7880")],
            "LIVEKIT_URL is this machine itself",
            "LIVEKIT_API_URL is for the inner",
        ),
        (
            "loopback",
            &[("LIVEKIT_URL", "ws://127.0.0.1:7880")],
            "LIVEKIT_URL is this machine itself",
            "The public address belongs there",
        ),
        (
            "container",
            &[("LIVEKIT_URL", "ws://livekit:7880")],
            "has a name that only its own network knows",
            "LIVEKIT_API_URL",
        ),
        (
            "private",
            &[("LIVEKIT_URL", "wss://10.0.0.7:7880")],
            "is a private address",
            "The public address belongs there",
        ),
        (
            "capitals",
            &[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "Example.com")],
            "capital letters",
            "write \"example.com\"",
        ),
        (
            "both stores",
            &[("LIVEKIT_REDIS_URL", "redis://127.0.0.1:1"), ("LIVEKIT_STATE_PATH", &state)],
            "LIVEKIT_STATE_PATH is ignored",
            "unset one of them",
        ),
        (
            "a wrong name",
            &[("LIVEKIT_REDIS_URI", "redis://redis")],
            "LIVEKIT_REDIS_URI",
            "did you mean LIVEKIT_REDIS_URL",
        ),
        (
            "key and secret swapped",
            &[
                ("LIVEKIT_KEY", "a-secret-of-at-least-32-characters-it-is"),
                ("LIVEKIT_SECRET", "APIkey"),
            ],
            "as if they had been swapped",
            "the key is the public name",
        ),
        (
            "config.yaml",
            &[("LIVEKIT_KEY_FILE", &whole)],
            "livekit-server's whole configuration",
            "its `keys:` are used",
        ),
        (
            "metrics for everybody",
            &[("LIVEKIT_METRICS_BIND", "main")],
            "LIVEKIT_METRICS_BIND is main",
            "no proxy may pass",
        ),
    ];
    let healthy = bare().start();
    for (what, changes, cause, remedy) in table {
        let setup = changes.iter().fold(bare(), |setup, (name, value)| setup.env(name, value));
        let service = setup.secret("hunter2").start();
        assert!(service.warns_of(&[cause, remedy]), "{what}: {}", service.log());
        assert!(!healthy.log().contains(cause), "a healthy one says it, too: {cause}");
    }
}

/// What keeps the service from starting.
#[test]
fn faults_that_end_the_start() {
    let empty = file("empty.pem", "");
    let elsewhere = "192.0.2.1:8080";
    let table: &[Row<'_>] = &[
        (
            "no such address",
            &[("LIVEKIT_JWT_BIND", elsewhere)],
            "LIVEKIT_JWT_BIND",
            "write :PORT for all",
        ),
        (
            "no such address",
            &[("LIVEKIT_METRICS_BIND", elsewhere)],
            "LIVEKIT_METRICS_BIND",
            "write :PORT for all",
        ),
        ("no certificates", &[("SSL_CERT_FILE", &empty)], "SSL_CERT_FILE", "certificate"),
        ("no such file", &[("SSL_CERT_FILE", "/none.pem")], "SSL_CERT_FILE", "/none.pem"),
        (
            "no such file",
            &[("LIVEKIT_KEY_FILE", "/none.yaml")],
            "LIVEKIT_KEY_FILE",
            "/none.yaml",
        ),
    ];
    for (what, changes, cause, remedy) in table {
        let setup = changes.iter().fold(bare(), |setup, (name, value)| setup.env(name, value));
        let service = setup.secret("hunter2").spawn();
        assert_eq!(service.wait_exit(WITHIN).code(), Some(1), "{what}: {}", service.log());
        let log = service.log();
        let fits = |line: &str| line.contains(cause) && line.contains(remedy);
        assert!(log.lines().any(fits), "{what}: no line has {cause:?} and {remedy:?}:\n{log}");
    }
}

/// A low port, without the right to it: in a network of its own, in which the kernel knows low ports.
#[test]
fn a_low_port_wants_a_right() {
    in_own_network(|| {
        let setup = bare()
            .env("LIVEKIT_JWT_BIND", ":80")
            .wrapped_in(&["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]);
        let service = setup.secret("hunter2").spawn();
        assert_eq!(service.wait_exit(WITHIN).code(), Some(1), "{}", service.log());
        let log = service.log();
        assert!(log.contains("Permission denied") && log.contains("ports below 1024"), "{log}");
    });
}

/// A well-known file that is there and cannot be used, for the federation API and for clients.
#[test]
fn faults_of_well_known_files() {
    with_low_ports(|| {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let page = || Reply::text(200, "text/html", "<html>Welcome</html>");
        let serve = |name: &str, file: Reply| {
            let at = unique_loopback();
            dns.address(name, &[at.into()]);
            let web = Homeserver::builder().at(at, 443).named(name).certified_for([name]).start();
            web.answer_well_known(file);
            web.answer_client_well_known(page());
            (web, Homeserver::builder().at(at, 8448).named(name).certified_for([name]).start())
        };
        let (_web, plain) = serve("page.example.org", page());
        let (_other, scheme) = serve(
            "scheme.example.org",
            Reply::json(200, &json!({"m.server": "https://scheme.example.org"})),
        );
        let setup = quick(Setup::new(&sfu)).full_access(&[&plain, &scheme]);
        let service = dns.serving(setup).start();
        // The page counts as no file.
        let answer = service.post("/sfu/get", &bodies::sfu_get_of(&plain, "alice", &unique_room()));
        assert_eq!(answer.status, 200, "{}", answer.text());
        told(
            "a page",
            &service,
            "well_known_unusable",
            "/.well-known/matrix/server is there and cannot be used",
            "serve it as a JSON object",
        );
        let answer = service.post("/sfu/get", &bodies::sfu_get_of(&scheme, "alice", &unique_room()));
        assert_eq!(answer.status, 401, "{}", answer.text());
        let line = service.wait_line_of(&answer);
        line.says(&["something that is not a server name", "without https://"]);
        let body = bodies::delegate_of(&plain, "alice", &unique_room(), "id", 60_000);
        let answer = service.post("/delegate_delayed_leave", &body);
        assert_eq!(answer.status, 400, "{}", answer.text());
        service.wait_line_of(&answer).says(&[
            "/.well-known/matrix/client cannot be used",
            "serve the file with m.homeserver.base_url",
        ]);
    });
}

/// A list that is not what the operator means is seen when users come.
#[test]
fn faults_of_the_list() {
    let home = Homeserver::start();
    let (host, port) = home.name.split_once(':').expect("a port");
    let (rest, last) = port.split_at(port.len() - 1);
    let typo = format!("{host}:{rest}{}", if last == "1" { "2" } else { "1" });
    for (what, listed) in [
        ("a port", format!("{host}:1")),
        ("a typo", typo),
        ("a host below it", format!("matrix.{}", home.name)),
    ] {
        let sfu = Sfu::start();
        let service = quick(Setup::new(&sfu)).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &listed).start();
        let answer = service.post("/sfu/get", &bodies::sfu_get_of(&home, "alice", &unique_room()));
        assert_eq!(answer.status, 200, "{}", answer.text());
        told(
            what,
            &service,
            "only_unlisted_users",
            &format!("did you mean {}", home.name),
            &listed,
        );
        told(
            what,
            &service,
            "only_unlisted_users",
            "users of a homeserver without full access come",
            "LIVEKIT_FULL_ACCESS_HOMESERVERS",
        );
    }
    // Once one of the list has come, others are nothing special.
    let world = World::with(quick);
    world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()));
    world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(&world.away, "bob", &unique_room()));
    assert!(!world.service.has_event("only_unlisted_users"), "{}", world.service.log());
}

/// The list has the host to which a homeserver delegates, and not the homeserver's name.
#[test]
fn a_list_of_hosts() {
    with_low_ports(|| {
        let (sfu, dns, at) = (Sfu::start(), Dns::start(), unique_loopback());
        let (name, host) = ("example.org", "synapse.hosting.example");
        dns.address(name, &[at.into()]);
        dns.address(host, &[at.into()]);
        let web = Homeserver::builder().at(at, 443).named(name).certified_for([name]).start();
        web.answer_well_known(Reply::json(200, &json!({"m.server": format!("{host}:8448")})));
        let there = Homeserver::builder().at(at, 8448).named(name).certified_for([host]).start();
        let setup = quick(Setup::new(&sfu)).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", host);
        let service = dns.serving(setup).start();
        let answer = service.post("/sfu/get", &bodies::sfu_get_of(&there, "alice", &unique_room()));
        assert_eq!(answer.status, 200, "{}", answer.text());
        told(
            "a host",
            &service,
            "only_unlisted_users",
            "users of a homeserver without full access come",
            "did you mean example.org where LIVEKIT_FULL_ACCESS_HOMESERVERS has synapse.hosting.example",
        );
    });
}

/// The answers to userinfo, each with a text of its own.
#[test]
fn faults_of_a_homeserver() {
    let page = |status| Reply::text(status, "text/html", "<html>no</html>");
    let world = World::with(quick);
    let table = [
        (
            Reply::redirect(301, "https://elsewhere.example/"),
            "status 301",
            "it redirects, which is not followed",
        ),
        (page(403), "status 403 and no JSON", "federation is refused"),
        (
            Reply::json(403, &json!({"errcode": "M_FORBIDDEN"})),
            "status 403",
            "federation is refused",
        ),
        (
            Reply::json(429, &json!({"errcode": "M_LIMIT_EXCEEDED"})),
            "status 429",
            "raise the limit",
        ),
        (page(502), "status 502", "the homeserver behind it does not"),
    ];
    for (n, (reply, ..)) in table.iter().enumerate() {
        let token = world.home.token_with(reply.clone());
        let body = bodies::sfu_get(&unique_room(), &world.home.name, &token);
        let call = Call::json("/sfu/get", &body).header("X-Request-Id", &format!("userinfo-{n}"));
        drop(world.service.begin(&call));
    }
    for (n, (_, cause, remedy)) in table.iter().enumerate() {
        world.service.wait_request(&format!("userinfo-{n}")).says(&[cause, remedy]);
    }
    // Plain HTTP where TLS is asked for, a certificate of nobody.
    let plain = plain_port();
    let unknown = Homeserver::builder().signed_by(Ca::untrusted()).start();
    let sfu = Sfu::start();
    let listed = format!("{plain} {}", unknown.name);
    let service = quick(Setup::new(&sfu)).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &listed).start();
    for (name, cause, remedy) in [
        (plain.to_string(), "TLS", "that port speaks plain HTTP"),
        (unknown.name.clone(), "UnknownIssuer", "SSL_CERT_FILE"),
    ] {
        let body = bodies::sfu_get(&unique_room(), &name, &secrets::token());
        drop(service.begin(&Call::json("/sfu/get", &body)));
        service
            .wait_line(&[("target", "request"), ("server", &name)])
            .says(&[cause, remedy]);
    }
}

/// TLS to the SFU, and what stands before it.
#[test]
fn faults_on_the_way_to_the_sfu() {
    let ip = || unique_loopback();
    let names = |ip: std::net::Ipv4Addr| [ip.to_string()];
    let (unknown, other, expired, good) = (ip(), ip(), ip(), ip());
    let moved = Sfu::start();
    moved.fail(Some(Fault::Instead(Reply::redirect(301, "https://livekit.example.com/"))));
    let plain = Sfu::start();
    for (what, sfu, cause, remedy) in [
        (
            "an unknown issuer",
            Sfu::behind(unknown, Ca::untrusted().server(&names(unknown))),
            "UnknownIssuer",
            "SSL_CERT_FILE",
        ),
        (
            "another name",
            Sfu::behind(other, Ca::trusted().server(&["other.example".to_owned()])),
            "not valid for name",
            "another name",
        ),
        (
            "an expired certificate",
            Sfu::behind(expired, Ca::trusted().server_until(&names(expired), Some(2020))),
            "not valid after 2020-01-01 00:00:00 UTC",
            "renew it",
        ),
        ("a redirect", moved, "status 301", "it redirects, which is not followed"),
    ] {
        let service = quick(Setup::new(&sfu)).start();
        told(what, &service, "sfu_down", cause, remedy);
    }
    let service = quick(Setup::new(&plain))
        .env("LIVEKIT_URL", &format!("wss://{}", plain_port()))
        .start();
    told(
        "a plain port",
        &service,
        "sfu_down",
        "the SFU cannot be used",
        "that port speaks plain HTTP",
    );
    // Wrong secret, and auto_create.
    let service = quick(Setup::new(&plain))
        .env("LIVEKIT_SECRET", "hunter2-hunter2-hunter2-hunter2-hunter2")
        .start();
    told(
        "a wrong secret",
        &service,
        "sfu_down",
        "the signature is wrong",
        "LIVEKIT_SECRET must be the secret of LIVEKIT_KEY",
    );
    let opens = Sfu::behind(good, Ca::trusted().server(&names(good)));
    opens.auto_create(true);
    let service = quick(Setup::new(&opens)).start();
    told("auto_create", &service, "auto_create_on", "auto_create is on", "auto_create: false");
    // None of it on a healthy one.
    opens.auto_create(false);
    let service = quick(Setup::new(&opens)).start();
    told("a healthy one", &service, "sfu_up", "the SFU answers and accepts the key", "");
    assert!(!service.has_event("auto_create_on"));
}

/// Webhooks that do not come, or come to the wrong place or with the wrong key.
#[test]
fn faults_of_webhooks() {
    let scene = Scene::with(|setup| quick(setup).env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1"));
    scene.delegate(Duration::from_secs(60));
    scene.sfu.join(&scene.alias, &scene.identity);
    told(
        "none",
        &scene.service,
        "webhooks_missing",
        "no webhook of the SFU has arrived although somebody has joined",
        "webhook.urls",
    );
    for path in ["/livekit/sfu_webhook", "/webhook"] {
        let call = Call::post(path, "{}").header("Content-Type", "application/webhook+json");
        assert_eq!(scene.service.call(&call).status, 404);
    }
    told(
        "a wrong path",
        &scene.service,
        "misdirected_webhook",
        "a webhook came at another path",
        "webhook.urls of livekit-server must end in /sfu_webhook",
    );
    let other = Sfu::start();
    let session = scene.sfu.join(&scene.alias, "somebody");
    assert_eq!(webhook::tell(&scene.service, &other, &webhook::joined(&session)).status, 401);
    told(
        "a wrong key",
        &scene.service,
        "webhooks_refused",
        "webhooks are refused",
        "LIVEKIT_SECRET must be the secret of that key",
    );
    scene.send_webhook(&webhook::joined(&session));
    told("back", &scene.service, "webhooks_arrive", "webhooks of the SFU arrive", "");
    // A client's route below another prefix.
    let scene = Scene::with(quick);
    scene.service.post("/rtc/get_token", &json!({}));
    told(
        "another prefix",
        &scene.service,
        "misdirected_request",
        "a request for /get_token came at another path",
        "LIVEKIT_JWT_PATH_PREFIX",
    );
    let session = scene.sfu.join(&scene.alias, "somebody");
    scene.send_webhook(&webhook::joined(&session));
    assert!(!scene.service.has_event("webhooks_missing"));
}

/// Neighbours that go and come back.
#[test]
fn neighbours_away_and_back() {
    let Some(server) = RedisServer::start(&[]) else { return };
    let url = format!("redis://{}", server.address());
    let scene = Scene::with(|setup| quick(setup).env("LIVEKIT_REDIS_URL", &url));
    scene.sfu.http.refuse();
    let ask = scene.service.begin(&Call::json(
        "/get_token",
        &bodies::get_token_of(&scene.home, "alice", &unique_room()),
    ));
    told(
        "the SFU is away",
        &scene.service,
        "sfu_down",
        "the SFU cannot be used",
        "check that livekit-server runs",
    );
    scene.sfu.http.listen_again();
    told("the SFU is back", &scene.service, "sfu_back", "the SFU answers again, after ", "");
    drop(ask.join());
    drop(server);
    scene.delegate(Duration::from_secs(60));
    told(
        "Redis is away",
        &scene.service,
        "store_down",
        "cannot be stored",
        "check that Redis runs",
    );
}

/// A limit that delays, told with the line for homeserver.yaml; and a leave that is given up.
#[test]
fn a_homeserver_that_limits() {
    let scene = Scene::with(quick);
    scene
        .api
        .answer(|_, _| Reply::json(429, &json!({"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 60_000})));
    scene.delegate(Duration::from_secs(6));
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    scene.send_webhook(&webhook::joined(&session));
    told(
        "a pause",
        &scene.service,
        "homeserver_pause",
        "a homeserver asks for a pause",
        "rc_delayed_event_mgmt",
    );
    told(
        "given up",
        &scene.service,
        "leave_given_up",
        "delegated leave is over: it is given up",
        "last_answer=\"429\"",
    );
    told(
        "given up",
        &scene.service,
        "leave_given_up",
        "delegated leave is over: it is given up",
        "rc_delayed_event_mgmt",
    );
}

/// One that wants to be left alone for a while, and limits nothing: the limit is not what is to be raised.
#[test]
fn a_homeserver_that_is_overloaded() {
    let scene = Scene::with(quick);
    scene.api.answer(|_, _| Reply::json(503, &json!({"retry_after_ms": 60_000})));
    scene.delegate(Duration::from_secs(60));
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    scene.send_webhook(&webhook::joined(&session));
    told(
        "a pause",
        &scene.service,
        "homeserver_pause",
        "a homeserver asks for a pause",
        "has too much to do or is being restarted: see that both run",
    );
}

/// Keys are read again without an end and without a failed request (decision P19).
#[test]
fn sighup_reads_the_keys_again() {
    let sfu = Sfu::start();
    let home = Homeserver::start();
    let keys = file("keys", &format!("{}: {}\n", sfu.key(), sfu.secret()));
    let setup = quick(Setup::new(&sfu))
        .full_access(&[&home])
        .unset("LIVEKIT_KEY")
        .unset("LIVEKIT_SECRET");
    let service = setup.env("LIVEKIT_KEY_FILE", &keys).start();
    let issuer = || {
        let answer = service.post("/get_token", &bodies::get_token_of(&home, "alice", "!room:example.org"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let jwt = answer.field("jwt");
        crate::support::jwt::Jwt::decode(&jwt).expect("a JWT").claims["iss"].clone()
    };
    assert_eq!(issuer(), sfu.key());
    // Nothing that can be read: what was there stays.
    fs::write(&keys, "no keys").expect("a file");
    service.signal("HUP");
    told(
        "a bad file",
        &service,
        "reload_failed",
        "cannot be read again (SIGHUP)",
        "LIVEKIT_KEY_FILE",
    );
    assert_eq!(issuer(), sfu.key());
    fs::write(
        &keys,
        format!(
            "newkey: hunter2-hunter2-hunter2-hunter2-hunter2\n{}: {}\n",
            "third",
            secrets::token()
        ),
    )
    .expect("a file");
    service.signal("HUP");
    told("a good file", &service, "keys_reloaded", "the keys were read again", "newkey");
    // The room is remembered, so that the SFU, which does not know the new key, is not asked.
    wait_until("the new key", TIMEOUT, || issuer() == "newkey");
    let session = sfu.join("room", "somebody");
    assert_eq!(
        webhook::tell(&service, &sfu, &webhook::joined(&session)).status,
        200,
        "signed with the former key"
    );
    assert!(service.exit_status().is_none());
}

/// The registration is read again, too: the homeserver that has new tokens is asked with them, and comes with them.
#[test]
fn sighup_reads_the_registration_again() {
    let (sfu, own) = (Sfu::start(), OwnHomeserver::start());
    let registration = |as_token: &str, hs_token: &str| format!("as_token: {as_token}\nhs_token: {hs_token}\n");
    let path = file("registration", &registration(&own.as_token, &own.hs_token));
    let setup = own.serving(quick(Setup::new(&sfu)));
    let setup = setup.unset("LIVEKIT_AS_TOKEN").unset("LIVEKIT_HS_TOKEN");
    let service = setup.env("LIVEKIT_AS_REGISTRATION_FILE", &path).start();
    told("at first", &service, "homeserver_up", "our homeserver accepts the as_token", "");
    let (room, alice) = (unique_room(), own.user("alice"));
    own.join(&room, &alice);
    let status = |hs_token: &str| {
        let body = json!({"url": sfu.url(), "room_id": room, "slot_id": "m.call#ROOM", "member_id": "m"});
        let call = Call::json("/_matrix/client/v1/rtc/livekit/get_token", &body)
            .header("Authorization", &format!("Bearer {hs_token}"))
            .header("X-Matrix-User-Identifier", &alice);
        service.call(&call).status
    };
    assert_eq!(status(&own.hs_token), 200);
    // A bad file keeps what was there.
    fs::write(&path, "as_token: only\n").expect("a file");
    service.signal("HUP");
    told(
        "a bad file",
        &service,
        "reload_failed",
        "cannot be read again (SIGHUP)",
        "LIVEKIT_AS_REGISTRATION_FILE",
    );
    assert_eq!(status(&own.hs_token), 200);
    let (as_token, hs_token) = (secrets::as_token(), secrets::hs_token());
    own.change_token(&as_token);
    fs::write(&path, registration(&as_token, &hs_token)).expect("a file");
    service.signal("HUP");
    told(
        "a good file",
        &service,
        "registration_reloaded",
        "the registration was read again",
        "the homeserver must have the same",
    );
    wait_until("the new tokens", TIMEOUT, || status(&hs_token) == 200);
    assert_eq!(status(&own.hs_token), 401, "the former token");
    assert!(service.exit_status().is_none());
}
