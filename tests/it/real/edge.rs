//! The edge of HTTP through real programs: what cannot be read is answered so that they pass it on (decision H3), and of
//! clients that hang up in front of them nothing is left (case D8).

use std::fs::write;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::client::{Call, Connection};
use crate::support::neighbour::Reply;
use crate::support::process::{self, Process, program, real_neighbours};
use crate::support::world::World;
use crate::support::{bodies, unique_room, wait_until};

/// A proxy in front of the service, which takes larger heads than that.
struct Proxy {
    port: u16,
    _process: Process,
}

impl Proxy {
    fn start(name: &str, file: &str, arguments: &[&str], configuration: impl FnOnce(u16) -> String) -> Self {
        let (port, directory) = (process::free_port(), process::directory(name));
        write(directory.join(file), configuration(port)).expect("a configuration");
        let mut command = Command::new(program(name));
        command.args(arguments);
        let process = Process::start(name, &command, &directory);
        process.wait_ready(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { port, _process: process }
    }

    fn nginx(world: &World) -> Self {
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {kind};\n"))
            .concat();
        let arguments = ["-e", "stderr", "-c", "nginx.conf", "-p", "."];
        Self::start("nginx", "nginx.conf", &arguments, |port| {
            format!(
                "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}\
                 server {{ listen 127.0.0.1:{port}; large_client_header_buffers 8 32k;\n\
                 location / {{ proxy_pass http://{}; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n",
                world.service.address()
            )
        })
    }

    /// `more` is for its server line.
    fn haproxy(world: &World, more: &str) -> Self {
        Self::start("haproxy", "haproxy.cfg", &["-db", "-f", "haproxy.cfg"], |port| {
            format!(
                "global\n    tune.bufsize 65536\n    tune.http.maxhdr 300\n\
                 defaults\n    mode http\n    timeout connect 5000\n    timeout client 50000\n    timeout server 50000\n\
                 listen service\n    bind 127.0.0.1:{port}\n    option abortonclose\n    server s {} {more}\n",
                world.service.address()
            )
        })
    }
}

/// Status, `X-Served-By` and body as curl reads them.
fn curl(port: u16, path: &str, arguments: &[String]) -> (String, String) {
    let output = Command::new(program("curl"))
        .args(["-sS", "-m", "10", "-w", "\n%{http_code} %header{x-served-by}"])
        .args(arguments)
        .arg(format!("http://127.0.0.1:{port}{path}"))
        .output()
        .expect("curl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').expect("two parts");
    (status.to_owned(), body.to_owned())
}

#[test]
fn what_cannot_be_read_is_refused_through_proxies() {
    if !real_neighbours() {
        return;
    }
    let world = World::shared();
    let header = |name: usize, length: usize| ["-H".to_owned(), format!("X-{name}: {}", "x".repeat(length))];
    let large: Vec<_> = (0..4).flat_map(|name| header(name, 7_000)).collect();
    let many: Vec<_> = (0..150).flat_map(|name| header(name, 1)).collect();
    for proxy in [Proxy::nginx(&world), Proxy::haproxy(&world, "")] {
        for arguments in [&large, &many] {
            let (status, body) = curl(proxy.port, "/healthz", arguments);
            assert_eq!(status, "431 lk-jwt-service");
            assert!(body.starts_with("{\"errcode\":\"M_TOO_LARGE\""), "{body}");
        }
        // The connection between the two is another one now.
        assert_eq!(curl(proxy.port, "/healthz", &[]), ("200 lk-jwt-service".into(), String::new()));
    }
    // A protocol that is not spoken here.
    for more in ["send-proxy", "send-proxy-v2"] {
        let (status, body) = curl(Proxy::haproxy(&world, more).port, "/healthz", &[]);
        assert_eq!(status, "400 lk-jwt-service", "{more}");
        assert!(body.starts_with("{\"errcode\":\"M_UNKNOWN\""), "{body}");
    }
    let unreadable = || world.service.lines(&[("target", "request"), ("outcome", "bad_request")]);
    wait_until("a line", Duration::from_secs(20), || !unreadable().is_empty());
    assert!(
        unreadable()
            .iter()
            .any(|line| line.contains("could not be read") && line.contains("PROXY protocol"))
    );
}

/// A whole request of a client that hangs up, in front of a proxy that tells so.
#[test]
fn who_hangs_up_in_front_of_a_proxy_has_no_place_for_long() {
    if !real_neighbours() {
        return;
    }
    let world = World::new();
    for proxy in [Proxy::nginx(&world), Proxy::haproxy(&world, "")] {
        let token = world.home.token_with(Reply::Hang);
        let body = bodies::sfu_get(&unique_room(), &world.home.name, &token);
        let mut client = Connection::open(([127, 0, 0, 1], proxy.port).into()).expect("a connection");
        client.send(&Call::json("/sfu/get", &body).bytes(world.service.address()));
        wait_until("the homeserver to be asked", Duration::from_secs(5), || world.home.http.busy() == 1);
        drop(client);
        let began = Instant::now();
        wait_until("nobody to be asked", Duration::from_secs(5), || world.home.http.busy() == 0);
        eprintln!("free after {:.2?}", began.elapsed());
    }
}
