//! Behind real reverse proxies, configured with the very snippets of the README.

use std::fs::write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{Neighbours, https};
use crate::support::ca::Ca;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::livekit::Client;
use crate::support::process::{self, Process, program};
use crate::support::{runtime, service::Service};

const README: &str = include_str!("../../../README.md");

/// The code block of the README in this language.
fn snippet(language: &str) -> &'static str {
    let (_, rest) = README.split_once(&format!("```{language}\n")).expect("a snippet of the README");
    rest.split_once("```").expect("its end").0
}

/// `text` with each of these pieces, which it must have, replaced.
fn adapt(text: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "the README's snippet has no {from:?} any more:\n{text}");
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
fn nginx_as_in_the_readme() {
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
fn haproxy_as_in_the_readme() {
    through("haproxy", |place| haproxy(place, &[]));
}

#[test]
fn haproxy_that_strips_the_prefix() {
    let from = "    server lk_jwt ";
    let to = "    http-request replace-path /livekit/jwt(/)?(.*) /\\2\n    server lk_jwt ";
    through("haproxy", |place| haproxy(place, &[(from, to)]));
}

#[test]
fn caddy_as_in_the_readme() {
    through("caddy", |place| caddy(place, &[]));
}

#[test]
fn caddy_that_strips_the_prefix() {
    through("caddy", |place| {
        caddy(place, &[("handle /livekit/jwt/*", "handle_path /livekit/jwt/*")])
    });
}

fn nginx(place: &Place, changes: &[(&str, &str)]) -> Command {
    let snippet = adapt(
        snippet("nginx"),
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

fn haproxy(place: &Place, changes: &[(&str, &str)]) -> Command {
    let snippet = adapt(
        snippet("haproxy"),
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

fn caddy(place: &Place, changes: &[(&str, &str)]) -> Command {
    let snippet = adapt(
        snippet("caddy"),
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
