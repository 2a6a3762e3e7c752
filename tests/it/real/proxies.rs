//! Behind real reverse proxies, configured with the very files of `contrib/proxy`: prefix kept and stripped, WebSocket, and answers that take
//! long.

use std::fs::write;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::{Neighbours, https};
use crate::support::ca::Ca;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::livekit::Client;
use crate::support::process::{self, Process, program};
use crate::support::{runtime, service::Service};

const CADDY: &str = include_str!("../../../contrib/proxy/Caddyfile");
const NGINX: &str = include_str!("../../../contrib/proxy/nginx.conf");
const HAPROXY: &str = include_str!("../../../contrib/proxy/haproxy.cfg");

/// `text` with each of these pieces, which it must have, replaced.
fn adapt(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the file has no {from:?} any more:\n{text}");
        text.replace(from, to)
    })
}

/// Where a proxy keeps its files, and what it routes to.
struct Place {
    directory: PathBuf,
    port: u16,
    service: String,
    livekit: String,
}

#[test]
fn nginx_as_it_stands() {
    through("nginx", |place| nginx(place, &[]));
}

#[test]
fn nginx_that_does_not_strip_the_prefix() {
    through("nginx", |place| {
        let service = format!("http://{}", place.service);
        nginx(place, &[(&format!("{service}/"), &service)])
    });
}

#[test]
fn haproxy_as_it_stands() {
    through("haproxy", |place| haproxy(place, &[]));
}

#[test]
fn haproxy_that_strips_the_prefix() {
    let from = "    server lk_jwt ";
    let to = "    http-request replace-path /livekit/jwt(/)?(.*) /\\2\n    server lk_jwt ";
    through("haproxy", |place| haproxy(place, &[(from, to)]));
}

#[test]
fn caddy_as_it_stands() {
    through("caddy", |place| caddy(place, &[]));
}

#[test]
fn caddy_that_strips_the_prefix() {
    through("caddy", |place| {
        caddy(place, &[("handle /livekit/jwt/*", "handle_path /livekit/jwt/*")])
    });
}

/// How to start each proxy.
type Configure = fn(&Place, Changes<'_>) -> Command;
/// Pieces of a configuration, each with what takes its place.
type Changes<'a> = &'a [(&'a str, &'a str)];

/// Answers behind the homeserver may take 25 s (decision A5): no proxy cuts them off or adds to them.
#[test]
#[ignore = "half a minute: ./tests/packages"]
fn an_answer_of_25_s_comes_through_each() {
    let proxies: [(&str, Configure, [&str; 2]); 3] = [
        ("nginx", nginx, ["http://BACKEND/;", "http://BACKEND;"]),
        (
            "haproxy",
            haproxy,
            [
                "    server lk_jwt ",
                "    http-request replace-path /livekit/jwt(/)?(.*) /\\2\n    server lk_jwt ",
            ],
        ),
        ("caddy", caddy, ["handle /livekit/jwt/*", "handle_path /livekit/jwt/*"]),
    ];
    let slow = Slow::start();
    thread::scope(|scope| {
        for (name, configure, [from, to]) in proxies {
            let (slow, from, to) = (&slow, from.replace("BACKEND", &slow.address), to.replace("BACKEND", &slow.address));
            scope.spawn(move || slow.through(name, configure, &[]));
            scope.spawn(move || slow.through(name, configure, &[(&from, &to)]));
        }
    });
}

/// A backend that answers after 25 s.
struct Slow {
    address: String,
}

impl Slow {
    const AFTER: Duration = Duration::from_secs(25);

    fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || Self::answer(stream));
            }
        });
        Self { address }
    }

    fn answer(mut stream: TcpStream) {
        let mut head = BufReader::new(stream.try_clone().expect("a socket"));
        let mut path = String::new();
        head.read_line(&mut path).expect("a request");
        let mut line = String::new();
        while head.read_line(&mut line).is_ok_and(|read| read > 2) {
            line.clear();
        }
        thread::sleep(Self::AFTER);
        let head = "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nConnection: close\r\n";
        // The proxy may have given up, which the test then says.
        let _ = write!(stream, "{head}Content-Length: {}\r\n\r\n{path}", path.len());
    }

    fn through(&self, name: &str, configure: Configure, changes: Changes<'_>) {
        let port = process::free_port();
        let place = Place {
            directory: process::directory(name),
            port,
            service: self.address.clone(),
            livekit: self.address.clone(),
        };
        certify(&place.directory);
        let proxy = Process::start(name, &configure(&place, changes), &place.directory);
        proxy.wait_ready(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
        let url = format!("https://localhost:{port}/livekit/jwt/get_token");
        let (status, origins, path) = runtime().block_on(async {
            let answer = https()
                .get(&url)
                .timeout(Self::AFTER * 2)
                .send()
                .await
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let origins = answer.headers().get_all("access-control-allow-origin").iter().count();
            (answer.status().as_u16(), origins, answer.text().await.expect("a body"))
        });
        assert_eq!((status, origins), (200, 1), "{name}: {path}");
        let is_stripped = (name == "nginx") == changes.is_empty();
        let wanted = if is_stripped { "/get_token" } else { "/livekit/jwt/get_token" };
        assert_eq!(path.split(' ').nth(1), Some(wanted), "{name}");
    }
}

fn nginx(place: &Place, changes: Changes<'_>) -> Command {
    let snippet = adapt(
        NGINX,
        &[
            ("listen 443 ssl;", &format!("listen 127.0.0.1:{} ssl;", place.port)),
            ("livekit.example.com", "localhost"),
            ("127.0.0.1:8080", &place.service),
            ("127.0.0.1:7880", &place.livekit),
        ],
    );
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {kind};\n"))
        .concat();
    let config = format!(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\nhttp {{\naccess_log access.log;\n{temporary}\
         ssl_certificate cert.pem;\nssl_certificate_key key.pem;\n{}}}\n",
        adapt(&snippet, changes)
    );
    write(place.directory.join("nginx.conf"), config).expect("nginx.conf");
    let mut command = Command::new(program("nginx"));
    command.args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(&place.directory);
    command
}

fn haproxy(place: &Place, changes: Changes<'_>) -> Command {
    let snippet = adapt(
        HAPROXY,
        &[
            (
                "bind :443 ssl crt /etc/haproxy/certs/",
                &format!("bind 127.0.0.1:{} ssl crt both.pem", place.port),
            ),
            ("127.0.0.1:8080", &place.service),
            ("127.0.0.1:7880", &place.livekit),
        ],
    );
    // As in the configuration that the package brings.
    let defaults = "defaults\n    mode http\n    timeout connect 5000\n    timeout client 50000\n    timeout server 50000\n";
    write(
        place.directory.join("haproxy.cfg"),
        format!("{defaults}\n{}", adapt(&snippet, changes)),
    )
    .expect("haproxy.cfg");
    let mut command = Command::new(program("haproxy"));
    command.args(["-db", "-f", "haproxy.cfg"]);
    command
}

fn caddy(place: &Place, changes: Changes<'_>) -> Command {
    let snippet = adapt(
        CADDY,
        &[
            (
                "livekit.example.com {",
                &format!("https://localhost:{} {{\n\ttls cert.pem key.pem", place.port),
            ),
            ("127.0.0.1:8080", &place.service),
            ("127.0.0.1:7880", &place.livekit),
        ],
    );
    let config = format!("{{\n\tadmin off\n\tauto_https off\n}}\n{}", adapt(&snippet, changes));
    write(place.directory.join("Caddyfile"), config).expect("Caddyfile");
    let mut command = Command::new(program("caddy"));
    command.args(["run", "--config", "Caddyfile", "--adapter", "caddyfile"]);
    for variable in ["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
        command.env(variable, &place.directory);
    }
    command
}

/// All public routes, CreateRoom, and a client, through this proxy.
fn through(name: &str, configure: impl FnOnce(&Place) -> Command) {
    let Some(real) = Neighbours::get() else { return };
    let port = process::free_port();
    let service = real
        .livekit
        .setup(&[&real.home.name])
        .env("LIVEKIT_URL", &format!("wss://localhost:{port}/livekit/sfu"))
        .start();
    let place = Place {
        directory: process::directory(name),
        port,
        service: service.address().to_string(),
        livekit: real.livekit.address().to_string(),
    };
    certify(&place.directory);
    let proxy = Process::start(name, &configure(&place), &place.directory);
    proxy.wait_ready(|| TcpStream::connect(("127.0.0.1", port)).is_ok());

    let base = format!("https://localhost:{port}/livekit/jwt");
    routes(&base, &service);
    let alice = real.home.register("alice");
    let room = alice.create_room();
    let answer = post(&format!("{base}/get_token"), &alice.get_token(&room));
    assert!(
        real.livekit.room(&alias(&room, SLOT)).is_some(),
        "CreateRoom did not come through {name}"
    );
    assert_eq!(answer["url"], format!("wss://localhost:{port}/livekit/sfu"));
    let legacy = post(&format!("{base}/sfu/get"), &alice.sfu_get(&room));
    let client = Client::start(&answer);
    let other = Client::start(&legacy);
    assert_eq!(client.joined(), identity(&alice.id, &alice.device, "member1"));
    assert_eq!(other.joined(), format!("{}:{}", alice.id, alice.device));
}

/// Every public route arrives at the service, which marks all that it answers; LiveKit's 404 has neither mark nor CORS.
fn routes(base: &str, service: &Service) {
    for (method, path, expected) in [
        ("GET", "/healthz", Some(200)),
        ("OPTIONS", "/get_token", Some(200)),
        ("OPTIONS", "/sfu/get", Some(200)),
        ("GET", "/get_token", Some(405)),
        ("POST", "/get_token", Some(400)),
        ("POST", "/sfu/get", Some(400)),
        ("POST", "/delegate_delayed_leave", None),
        ("POST", "/sfu_webhook", None),
    ] {
        let url = format!("{base}{path}");
        let id = format!("through-{}", crate::support::unique());
        let request = https().request(method.parse().expect("a method"), &url).header("X-Request-Id", &id);
        let answer = runtime()
            .block_on(request.send())
            .unwrap_or_else(|e| panic!("{method} {url}: {e}\n{}", service.log()));
        let header = |name| {
            answer
                .headers()
                .get_all(name)
                .iter()
                .filter_map(|v| v.to_str().ok())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            header("x-request-id"),
            [id.as_str()],
            "{method} {url} was not answered by the service"
        );
        assert_eq!(header("access-control-allow-origin"), ["*"], "{method} {url}");
        let status = answer.status().as_u16();
        assert!(expected.is_none_or(|expected| expected == status), "{method} {url}: {status}");
    }
}

#[track_caller]
fn post(url: &str, body: &Value) -> Value {
    runtime().block_on(async {
        let request = https().post(url).body(body.to_string());
        let answer = request.send().await.unwrap_or_else(|e| panic!("POST {url}: {e}"));
        let status = answer.status().as_u16();
        let text = answer.text().await.expect("a body");
        assert_eq!(status, 200, "POST {url}: {text}");
        serde_json::from_str(&text).expect("JSON")
    })
}

/// cert.pem and key.pem for localhost, and both in one file.
fn certify(directory: &Path) {
    let (certificate, key) = Ca::trusted().server_pem(&["localhost".into()]);
    write(directory.join("both.pem"), format!("{certificate}{key}")).expect("both.pem");
    write(directory.join("cert.pem"), certificate).expect("cert.pem");
    write(directory.join("key.pem"), key).expect("key.pem");
}
