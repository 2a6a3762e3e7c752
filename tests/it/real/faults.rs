//! The faults of `crate::faults` whose subject is a neighbour, planted in real ones: within a minute the log names the cause and
//! the remedy. On a stack in which all is well no line is a warning.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use serde_json::{Value, json};

use crate::faults::{quick, told};
use crate::support::ca::Ca;
use crate::support::client::{self, Call};
use crate::support::client_api::ClientApi;
use crate::support::hashes::{self, SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{self, Process, program, real_neighbours};
use crate::support::redis::RedisServer;
use crate::support::scene::TIMEOUT;
use crate::support::service::{Service, Setup, binary, free_address};
use crate::support::sfu::Sfu;
use crate::support::synapse::{Synapse, User};
use crate::support::{bodies, secrets, unique_room, wait_until, webhook};

/// nginx with these servers; `cert.pem` and `key.pem` are for 127.0.0.1.
struct Nginx {
    _process: Process,
    directory: PathBuf,
}

impl Nginx {
    /// Each server with a port of its own, which stands for `PORT` in its text.
    fn start<const N: usize>(servers: [&str; N]) -> (Self, [u16; N]) {
        let directory = process::directory("nginx");
        let nginx = |name: &str, (certificate, key): (String, String)| {
            std::fs::write(directory.join(format!("{name}.pem")), certificate + &key).expect("a file");
        };
        let names = ["127.0.0.1".to_owned()];
        nginx("good", Ca::trusted().server_pem(&names));
        nginx("unknown", Ca::untrusted().server_pem(&names));
        nginx("other", Ca::trusted().server_pem(&["other.example".to_owned()]));
        nginx("expired", Ca::trusted().server_pem_until(&names, Some(2020)));
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {kind};\n"))
            .concat();
        let ports = [(); N].map(|()| process::free_port());
        let tls = |certificate: &str| format!("ssl_certificate {certificate}.pem; ssl_certificate_key {certificate}.pem;");
        let servers: String = servers
            .iter()
            .zip(ports)
            .map(|(server, port)| {
                let words = ["good", "unknown", "other", "expired"];
                let server = words.iter().fold((*server).to_owned(), |server, word| {
                    server.replace(&format!("TLS({word})"), &format!("listen 127.0.0.1:{port} ssl; {}", tls(word)))
                });
                format!("server {{ {} }}\n", server.replace("PLAIN", &format!("listen 127.0.0.1:{port};")))
            })
            .collect();
        let config = format!(
            "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\nhttp {{\naccess_log access.log;\n{temporary}{servers}}}\n"
        );
        std::fs::write(directory.join("nginx.conf"), config).expect("nginx.conf");
        let mut command = Command::new(program("nginx"));
        command.args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(&directory);
        let process = Process::start("nginx", &command, &directory);
        process.wait_ready(|| ports.iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok()));
        let nginx = Self {
            _process: process,
            directory,
        };
        (nginx, ports)
    }
}

/// The service by a clock that is off. What `faketime` starts is not ended with it, so its library is loaded without it.
fn at_another_time(setup: Setup, off: &str) -> Setup {
    program("faketime");
    let found = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut libraries = found.map(|entry| entry.path().join("faketime/libfaketime.so.1"));
    let library = libraries.find(|library| library.exists()).expect("libfaketime");
    setup
        .env("LD_PRELOAD", &library.to_string_lossy())
        .env("FAKETIME", off)
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
}

/// What stands before the SFU, and its key, clock and rooms.
#[test]
fn an_sfu_that_is_not_as_it_should_be() {
    if !real_neighbours() {
        return;
    }
    let livekit = Livekit::shared();
    let to_livekit = format!("location / {{ proxy_pass http://{}; }}", livekit.address());
    let (_nginx, ports) = Nginx::start([
        &format!("TLS(unknown) {to_livekit}"),
        &format!("TLS(other) {to_livekit}"),
        &format!("TLS(expired) {to_livekit}"),
        &format!("PLAIN {to_livekit}"),
        "TLS(good) location / { return 301 https://livekit.example.com$request_uri; }",
        "TLS(good) location / { return 502; }",
    ]);
    let opening = Livekit::prepare_with(&[], json!({"room": {"auto_create": true}}));
    opening.start();
    let through = |port: u16| {
        livekit
            .setup(&["example.com"])
            .env("LIVEKIT_URL", &format!("wss://127.0.0.1:{port}"))
    };
    let bad = "the SFU cannot be used";
    let whole = livekit.configuration().to_string_lossy().into_owned();
    let rows: Vec<(&str, &str, Setup, &str, &str)> = vec![
        ("an unknown issuer", "sfu_down", through(ports[0]), "UnknownIssuer", "SSL_CERT_FILE"),
        ("another name", "sfu_down", through(ports[1]), "not valid for name", "another name"),
        (
            "expired",
            "sfu_down",
            through(ports[2]),
            "not valid after 2020-01-01 00:00:00 UTC",
            "renew it",
        ),
        ("a plain port", "sfu_down", through(ports[3]), bad, "that port speaks plain HTTP"),
        (
            "a redirect to https",
            "sfu_down",
            through(ports[4]),
            "status 301",
            "it redirects, which is not followed",
        ),
        (
            "a proxy whose SFU is away",
            "sfu_down",
            through(ports[5]),
            "status 502",
            "let this service's calls of /twirp through",
        ),
        (
            "auto_create",
            "auto_create_on",
            opening.setup(&["example.com"]),
            "auto_create is on",
            "auto_create: false",
        ),
        (
            "a wrong secret",
            "sfu_down",
            livekit.setup(&["example.com"]).env("LIVEKIT_SECRET", &secrets::sfu_secret()),
            "the signature is wrong",
            "LIVEKIT_SECRET must be the secret of LIVEKIT_KEY",
        ),
        (
            "key and secret swapped",
            "sfu_down",
            livekit
                .setup(&["example.com"])
                .env("LIVEKIT_KEY", "hunter2-hunter2-hunter2-hunter2-hunter2")
                .env("LIVEKIT_SECRET", livekit.key()),
            "does not know",
            "have LIVEKIT_KEY and LIVEKIT_SECRET been swapped?",
        ),
        (
            "a clock behind",
            "sfu_down",
            at_another_time(livekit.setup(&["example.com"]), "-1h"),
            "clock",
            "check NTP on both",
        ),
        (
            "a clock ahead",
            "sfu_down",
            at_another_time(livekit.setup(&["example.com"]), "+1h"),
            "clock",
            "check NTP on both",
        ),
        (
            "LiveKit's configuration as keys file",
            "configuration",
            livekit
                .setup(&["example.com"])
                .unset("LIVEKIT_KEY")
                .unset("LIVEKIT_SECRET")
                .env("LIVEKIT_KEY_FILE", &whole),
            "livekit-server's whole configuration",
            "its `keys:` are used",
        ),
    ];
    let running: Vec<_> = rows
        .into_iter()
        .map(|(what, event, setup, cause, remedy)| (what, event, quick(setup).start(), cause, remedy))
        .collect();
    for (what, event, service, cause, remedy) in &running {
        told(what, service, event, cause, remedy);
    }
    // Its keys are those of the SFU.
    let (_, _, service, ..) = running.last().expect("rows");
    told(
        "a whole configuration",
        service,
        "sfu_up",
        "the SFU answers and accepts the key",
        "",
    );
}

/// Webhooks of a real SFU that are not configured, or go to the wrong path, or are signed with a key that is not ours.
#[test]
fn an_sfu_whose_webhooks_do_not_arrive() {
    if !real_neighbours() {
        return;
    }
    let home = Homeserver::start();
    let (path, key, none) = (free_address(), free_address(), free_address());
    let wrong_path = Livekit::prepare_with_webhooks(&[format!("http://{path}/livekit/webhook")]);
    let other = json!({"webhook": {"api_key": "other"}, "keys": {"other": secrets::sfu_secret()}});
    let wrong_key = Livekit::prepare_with(&[format!("http://{key}/sfu_webhook")], other);
    let not_configured = Livekit::prepare();
    let api = ClientApi::start();
    let start = |livekit: &Livekit, at: std::net::SocketAddr| {
        livekit.start();
        let setup = livekit
            .setup(&[&home.name])
            .env("LIVEKIT_JWT_BIND", &at.to_string())
            .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home));
        quick(setup).reached_at(at).start()
    };
    let services = [start(&wrong_path, path), start(&wrong_key, key), start(&not_configured, none)];
    // Every room that is opened is told.
    for service in &services[..2] {
        drop(service.begin(&Call::json("/get_token", &bodies::get_token_of(&home, "alice", &unique_room()))));
    }
    let room = unique_room();
    let mut body = bodies::get_token_of(&home, "alice", &room);
    (body["delay_id"], body["delay_timeout"]) = (json!("syd_1"), json!(60_000));
    let answer = services[2].post("/get_token", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let (_client, _) = Client::join(&answer.json());
    told(
        "a wrong path",
        &services[0],
        "misdirected_webhook",
        "a webhook came at another path",
        "webhook.urls of livekit-server must end in /sfu_webhook",
    );
    told(
        "a wrong key",
        &services[1],
        "webhooks_refused",
        "webhooks are refused",
        "webhook.api_key",
    );
    told(
        "not configured",
        &services[2],
        "webhooks_missing",
        "no webhook of the SFU has arrived although somebody has joined",
        "webhook.urls",
    );
}

/// What stands before a homeserver, or in its place.
#[test]
fn a_homeserver_behind_a_proxy_that_does_not_let_us_through() {
    if !real_neighbours() {
        return;
    }
    let (_nginx, ports) = Nginx::start([
        "TLS(good) location / { return 301 https://example.com$request_uri; }",
        "TLS(good) location / { return 403; }",
        "TLS(good) location / { default_type application/json; return 403 '{\"errcode\":\"M_FORBIDDEN\"}'; }",
        "TLS(good) location / { return 429; }",
        // Nobody is behind it.
        "TLS(good) location / { proxy_pass http://127.0.0.1:1; }",
        "PLAIN location / { return 200; }",
        "TLS(unknown) location / { return 200; }",
    ]);
    let names = ports.map(|port| format!("127.0.0.1:{port}"));
    let listed: Vec<&str> = names.iter().map(String::as_str).collect();
    let sfu = Sfu::start();
    let setup = Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &listed.join(" "));
    let service = quick(setup).start();
    let rows = [
        ("status 301", "it redirects, which is not followed"),
        ("status 403 and no JSON", "federation is refused"),
        ("status 403", "federation is refused"),
        ("status 429", "raise the limit for this service's address"),
        ("status 502", "the homeserver behind it does not"),
        ("TLS", "that port speaks plain HTTP"),
        ("UnknownIssuer", "SSL_CERT_FILE"),
    ];
    for (n, name) in names.iter().enumerate() {
        let body = bodies::sfu_get(&unique_room(), name, &secrets::token());
        drop(service.begin(&Call::json("/sfu/get", &body).header("X-Request-Id", &format!("row-{n}"))));
    }
    for (n, (cause, remedy)) in rows.iter().enumerate() {
        service.wait_request(&format!("row-{n}")).says(&[cause, remedy]);
    }
}

/// A client, and a proxy with little patience, give up while the SFU is waited for.
#[test]
fn a_client_and_a_proxy_that_give_up() {
    if !real_neighbours() {
        return;
    }
    // Never started.
    let (livekit, home) = (Livekit::prepare(), Homeserver::start());
    let service = quick(livekit.setup(&[&home.name])).start();
    let (nginx, [port]) = Nginx::start([&format!(
        "PLAIN location / {{ proxy_pass http://{}; proxy_read_timeout 2s; proxy_set_header X-Request-Id $http_x_request_id; }}",
        service.address()
    )]);
    let ask = |id: &str| {
        let body = bodies::get_token_of(&home, "alice", &unique_room());
        Call::json("/get_token", &body).header("X-Request-Id", id)
    };
    let mut connection = service.connect();
    connection.send(&ask("a-client").bytes(service.address()));
    let answer = client::call(([127, 0, 0, 1], port).into(), &ask("a-proxy"));
    drop(connection);
    let said = std::fs::read_to_string(nginx.directory.join("access.log")).unwrap_or_default();
    assert_eq!(answer.status, 504, "{said}");
    for id in ["a-client", "a-proxy"] {
        let line = service.wait_request(id);
        assert!(line.has(&[("outcome", "client_gone"), ("waited_for", "sfu")]), "{line}");
        line.says(&["onnection refused", "must wait for 25 s at least"]);
    }
}

/// Synapse limits restarts to one a second; two dozen participants with a delay of 18 s want three.
#[test]
fn a_homeserver_whose_limit_is_passed() {
    if !real_neighbours() {
        return;
    }
    let (sfu, synapse) = (Sfu::start(), Synapse::start_limited());
    let setup = Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &synapse.name).env(
        "LIVEKIT_CS_API_URL_OVERRIDES",
        &format!("{}=http://{}", synapse.name, synapse.client_api()),
    );
    let service = quick(setup).start();
    let user = synapse.register("alice");
    let room = user.create_call_room();
    let body = user.get_token(&room);
    for n in 0..24 {
        let member = format!("member{n}");
        let path = format!("/_matrix/client/v3/rooms/{room}/state/org.matrix.msc3401.call.member/{member}?org.matrix.msc4140.delay=18000");
        let answer = user.request("PUT", &path, Some(&json!({})));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let mut body = body.clone();
        body["member"]["id"] = json!(member);
        (body["delay_id"], body["delay_timeout"]) = (json!(answer.field("delay_id")), json!(18_000));
        let answer = service.post("/get_token", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let session = sfu.join(&alias(&room, SLOT), &hashes::identity(&user.id, &user.device, &member));
        assert_eq!(webhook::tell(&service, &sfu, &webhook::joined(&session)).status, 200);
    }
    told(
        "24 participants of 18 s",
        &service,
        "homeserver_limits",
        "a homeserver limits so much that these delayed events cannot be restarted in time",
        "raise rc_delayed_event_mgmt in Synapse's homeserver.yaml",
    );
}

/// A service with an SFU, a Redis and a homeserver of its own, all of them real.
struct Stack {
    service: Service,
    setup: Setup,
    livekit: Livekit,
    redis: RedisServer,
    synapse: Synapse,
}

impl Stack {
    fn start() -> Option<Self> {
        let redis = RedisServer::start(&[])?;
        let (address, ports) = (free_address(), [process::free_port(), process::free_port()]);
        let (name, url) = (format!("127.0.0.1:{}", ports[0]), format!("http://{address}"));
        let printed = Command::new(binary())
            .args(["generate-registration", &name, &url])
            .env_clear()
            .output()
            .expect("the service's binary");
        let registration = process::directory("registration").join("lk-jwt-service.yaml");
        std::fs::write(&registration, &printed.stdout).expect("a file");
        let synapse = Synapse::spawn_with(&registration, ports);
        let livekit = Livekit::prepare_with_webhooks(&[format!("{url}/sfu_webhook")]);
        livekit.start();
        synapse.wait_ready();
        let setup = quick(livekit.setup(&[&name]))
            // As browsers reach it; they are told where it really is, below.
            .env("LIVEKIT_URL", "wss://livekit.example.com")
            .env("LIVEKIT_API_URL", &format!("http://{}", livekit.address()))
            .env("LIVEKIT_JWT_BIND", &address.to_string())
            .env("LIVEKIT_HS_SERVER_NAME", &name)
            .env("LIVEKIT_AS_REGISTRATION_FILE", &registration.to_string_lossy())
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &format!("{name}=http://127.0.0.1:{}", ports[1]))
            .env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address()))
            .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
            .reached_at(address);
        Some(Self {
            service: setup.clone().start(),
            setup,
            livekit,
            redis,
            synapse,
        })
    }

    /// Somebody in a call, with a delegated leave; through their homeserver, as clients do.
    #[track_caller]
    fn call(&self, user: &User<'_>, room: &str) -> (Client, String) {
        let path = format!(
            "/_matrix/client/v3/rooms/{room}/state/org.matrix.msc3401.call.member/_{}_{}",
            user.id, user.device
        );
        let here = json!({"application": "m.call", "device_id": user.device, "call_id": "", "expires": 14_400_000});
        assert_eq!(user.request("PUT", &path, Some(&here)).status, 200);
        let scheduled = user.request("PUT", &format!("{path}?org.matrix.msc4140.delay=20000"), Some(&json!({})));
        assert_eq!(scheduled.status, 200, "{}", scheduled.text());
        let mut body = json!({"url": "wss://livekit.example.com", "room_id": room, "slot_id": SLOT, "member_id": "m"});
        let token = self.ask(user, "get_token", &body);
        body["delay_id"] = json!(scheduled.field("delay_id"));
        self.ask(user, "delegate_delayed_leave", &body);
        let (client, _) = Client::join(&json!({"url": self.livekit.url(), "jwt": token["jwt"]}));
        (client, path)
    }

    #[track_caller]
    fn ask(&self, user: &User<'_>, what: &str, body: &Value) -> Value {
        let answer = user.request("POST", &format!("/_matrix/client/v1/rtc/livekit/{what}"), Some(body));
        assert_eq!(answer.status, 200, "{what}: {}\n{}", answer.text(), self.service.log());
        answer.json()
    }
}

/// First all is well, and no line is a warning; then one after another goes and comes back, and another homeserver is named.
#[test]
fn neighbours_that_go_and_come_back() {
    let Some(mut stack) = Stack::start() else { return };
    let alice = stack.synapse.register("alice");
    let room = alice.create_call_room();
    let (client, path) = stack.call(&alice, &room);
    told("a healthy SFU", &stack.service, "sfu_up", "the SFU answers and accepts the key", "");
    told(
        "a healthy homeserver",
        &stack.service,
        "homeserver_up",
        "our homeserver accepts the as_token",
        "",
    );
    client.leave();
    wait_until("the leave", Duration::from_secs(60), || {
        alice.request("GET", &path, None).json() == json!({})
    });
    stack.service.wait_event("leave_over");
    let log = stack.service.log();
    let bad: Vec<_> = log
        .lines()
        .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
        .collect();
    assert!(bad.is_empty(), "a healthy stack warns: {bad:#?}");

    stack.livekit.kill();
    told(
        "the SFU is away",
        &stack.service,
        "sfu_down",
        "the SFU cannot be used",
        "check that livekit-server runs",
    );
    stack.livekit.start();
    told("the SFU is back", &stack.service, "sfu_back", "the SFU answers again, after ", "");

    stack.redis.kill();
    told(
        "Redis is away",
        &stack.service,
        "store_down",
        "jobs cannot be stored",
        "check that Redis runs",
    );
    stack.redis.start_again();
    told(
        "Redis is back",
        &stack.service,
        "store_back",
        "the store takes jobs again, after ",
        "",
    );

    stack.synapse.freeze();
    told(
        "our homeserver is away",
        &stack.service,
        "homeserver_down",
        "our homeserver cannot be asked",
        "check that the homeserver runs",
    );
    stack.synapse.thaw();
    told(
        "our homeserver is back",
        &stack.service,
        "homeserver_back",
        "our homeserver tells who is in a room again, after ",
        "",
    );

    let address = stack.synapse.client_api();
    let other = stack
        .setup
        .clone()
        .env("LIVEKIT_HS_SERVER_NAME", "example.com")
        .env("LIVEKIT_CS_API_URL_OVERRIDES", &format!("example.com=http://{address}"))
        .env("LIVEKIT_JWT_BIND", &free_address().to_string())
        .unset("LIVEKIT_REDIS_URL");
    let other = other.spawn();
    told(
        "another name",
        &other,
        "wrong_server_name",
        "LIVEKIT_HS_SERVER_NAME is not the homeserver that has our registration",
        "set LIVEKIT_HS_SERVER_NAME to the server_name of that homeserver",
    );
}

/// A key is rotated while people come: nobody is refused, the new one signs, and webhooks of both are taken.
#[test]
fn a_rotated_key_costs_nobody_a_token() {
    if !real_neighbours() {
        return;
    }
    let (home, address, new_secret) = (Homeserver::start(), free_address(), secrets::sfu_secret());
    let told_to = format!("http://{address}/sfu_webhook");
    let livekit = Livekit::prepare_with(&[told_to], json!({"keys": {"newkey": new_secret}}));
    livekit.start();
    let keys = process::directory("keys").join("keys.yaml");
    let write = |text: String| std::fs::write(&keys, text).expect("a file");
    let former = format!("{}: {}\n", livekit.key(), livekit.secret());
    write(former.clone());
    let setup = livekit.setup(&[&home.name]).unset("LIVEKIT_KEY").unset("LIVEKIT_SECRET");
    let setup = setup
        .env("LIVEKIT_KEY_FILE", &keys.to_string_lossy())
        .env("LIVEKIT_JWT_BIND", &address.to_string());
    let service = quick(setup).reached_at(address).start();
    let ask = || {
        let answer = service.post("/get_token", &bodies::get_token_of(&home, "alice", &unique_room()));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let jwt = Jwt::decode(&answer.field("jwt")).expect("a JWT");
        jwt.claims["iss"].as_str().expect("iss").to_owned()
    };
    let (asked, rotated) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !rotated.load(Relaxed) {
                    ask();
                    asked.fetch_add(1, Relaxed);
                }
            });
        }
        let more = |count: usize| wait_until("more requests", TIMEOUT, || asked.load(Relaxed) >= count);
        more(20);
        for text in ["no keys".to_owned(), format!("newkey: {new_secret}\n")] {
            write(text);
            service.signal("HUP");
            more(asked.load(Relaxed) + 20);
        }
        wait_until("the new key", TIMEOUT, || ask() == "newkey");
        more(asked.load(Relaxed) + 20);
        rotated.store(true, Relaxed);
    });
    told(
        "a bad file",
        &service,
        "reload_failed",
        "cannot be read again (SIGHUP)",
        "LIVEKIT_KEY_FILE",
    );
    // livekit-server signs with the former one.
    let mark = service.log().len();
    ask();
    let line = service.wait_line_after(mark, &[("target", "request"), ("route", "sfu_webhook")]);
    assert_eq!(line.field("outcome"), "ok", "{line}");
    let body = json!({"event": "room_started"}).to_string();
    let mut claims = webhook::claims(&Sfu::start(), body.as_bytes());
    claims["iss"] = json!("newkey");
    let call = webhook::with_token(body, &Jwt::sign(&claims, &new_secret));
    assert_eq!(service.call(&call).status, 200, "signed with the new key");
    assert!(service.exit_status().is_none());
    eprintln!("{} requests while the key was rotated", asked.load(Relaxed));
}
