//! The image's healthcheck: every address that the service can listen on, in time, by its exit code.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::support::neighbour::{Greeting, Neighbour, Reply};
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::{nothing_may_be_left_out, unique, unique_loopback};

/// The two ways to run it.
fn commands() -> [Command; 2] {
    let mut subcommand = Command::new(env!("CARGO_BIN_EXE_lk-jwt-service"));
    subcommand.arg("healthcheck");
    [Command::new(env!("CARGO_BIN_EXE_lk-jwt-service-healthcheck")), subcommand]
}

fn check(environment: &[(&str, &str)]) -> Vec<(Output, Duration)> {
    let run = |mut command: Command| {
        let began = Instant::now();
        let output = command
            .env_clear()
            .envs(environment.iter().copied())
            .output()
            .expect("the healthcheck");
        (output, began.elapsed())
    };
    commands().into_iter().map(run).collect()
}

/// A port that is free on every address, outside of the range from which the kernel picks.
fn free_everywhere() -> u16 {
    let start = unique() * 31 + u64::from(std::process::id()) * 97;
    let mut ports = (start..).map(|n| 10_000 + (n % 20_000) as u16);
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    ports.find(free).expect("a free port")
}

fn has_ipv6() -> bool {
    let has = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    assert!(has || !nothing_may_be_left_out(), "no IPv6 loopback here");
    has
}

#[test]
fn it_finds_the_service_wherever_that_listens() {
    let sfu = Sfu::start();
    let v4 = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = |port| SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    type Reached = fn(u16) -> SocketAddr;
    let mut forms: Vec<(&str, &str, Vec<Reached>)> = vec![
        ("LIVEKIT_JWT_BIND", "127.0.0.1:PORT", vec![v4]),
        ("LIVEKIT_JWT_BIND", "0.0.0.0:PORT", vec![v4]),
        ("LIVEKIT_JWT_BIND", "localhost:PORT", vec![v4]),
        ("LIVEKIT_JWT_BIND", ":PORT", vec![v4]),
        ("LIVEKIT_JWT_BIND", "PORT", vec![v4]),
        ("LIVEKIT_JWT_BIND", " :PORT\n", vec![v4]),
        ("LIVEKIT_JWT_PORT", "PORT", vec![v4]),
        ("LK_JWT_PORT", "PORT", vec![v4]),
    ];
    if has_ipv6() {
        forms[3].2.push(v6);
        forms[4].2.push(v6);
        forms.push(("LIVEKIT_JWT_BIND", "[::1]:PORT", vec![v6]));
        forms.push(("LIVEKIT_JWT_BIND", "[::]:PORT", vec![v6]));
    } else {
        eprintln!("left out: the IPv6 forms of LIVEKIT_JWT_BIND, since there is no IPv6 loopback here");
    }
    for (name, form, reached) in forms {
        let port = free_everywhere();
        let value = form.replace("PORT", &port.to_string());
        // Before: nothing is there.
        for (output, _) in check(&[(name, &value)]) {
            assert_eq!(output.status.code(), Some(1), "{name}={value}: {output:?}");
        }
        let service = Setup::new(&sfu)
            .unset("LIVEKIT_JWT_BIND")
            .env(name, &value)
            .reached_at(reached[0](port))
            .start();
        for address in &reached {
            let answer = crate::support::client::call(address(port), &crate::support::client::Call::new("GET", "/healthz"));
            assert_eq!(answer.status, 200, "{name}={value} at {}", address(port));
        }
        for (output, took) in check(&[(name, &value)]) {
            assert_eq!(output.status.code(), Some(0), "{name}={value}: {output:?}");
            assert!(took < Duration::from_secs(3), "{name}={value}: {took:?}");
        }
        // The rest of the environment does not matter: not a proxy, not what the service itself would refuse.
        let busy = [
            (name, value.as_str()),
            ("HTTP_PROXY", "http://127.0.0.1:1"),
            ("http_proxy", "http://127.0.0.1:1"),
            ("LIVEKIT_URL", "nonsense"),
        ];
        for (output, _) in check(&busy) {
            assert_eq!(output.status.code(), Some(0), "{name}={value} with a proxy: {output:?}");
        }
        drop(service);
    }
}

#[test]
fn the_port_is_8080_unless_set() {
    let Ok(listener) = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 8080)) else {
        eprintln!("left out: the_port_is_8080_unless_set, since port 8080 is in use here");
        return;
    };
    drop(listener);
    let sfu = Sfu::start();
    let service = Setup::new(&sfu)
        .unset("LIVEKIT_JWT_BIND")
        .reached_at((Ipv4Addr::LOCALHOST, 8080).into())
        .start();
    for environment in [&[][..], &[("LIVEKIT_JWT_BIND", "")], &[("LIVEKIT_JWT_PORT", "")]] {
        for (output, _) in check(environment) {
            assert_eq!(output.status.code(), Some(0), "{environment:?}: {output:?}");
        }
    }
    drop(service);
}

#[test]
fn a_service_that_is_ill_is_reported_within_three_seconds() {
    let at = || (unique_loopback(), 0).into();
    let silent = Neighbour::start(at(), None, |_| Reply::Hang);
    silent.greet(Greeting::Silence);
    let hanging = Neighbour::start(at(), None, |_| Reply::Hang);
    let stalling = Neighbour::start(at(), None, |_| Reply::Stall(b"HTTP/1.1 200 ".to_vec()));
    let closing = Neighbour::start(at(), None, |_| Reply::Close);
    let failing = Neighbour::start(at(), None, |_| Reply::text(503, "text/plain", "no"));
    let moved = Neighbour::start(at(), None, |_| Reply::redirect(302, "/elsewhere"));
    let other = Neighbour::start(at(), None, |_| Reply::Raw(b"SSH-2.0-OpenSSH\r\n".to_vec()));
    for (which, neighbour) in [
        ("silent", &silent),
        ("hanging", &hanging),
        ("stalling", &stalling),
        ("closing", &closing),
        ("503", &failing),
        ("302", &moved),
        ("no HTTP", &other),
    ] {
        for (output, took) in check(&[("LIVEKIT_JWT_BIND", &neighbour.address().to_string())]) {
            assert_eq!(output.status.code(), Some(1), "{which}: {output:?}");
            assert!(took < Duration::from_secs(3), "{which}: {took:?}");
            let said = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            assert_eq!(said.trim().lines().count(), 1, "{which}: {said:?}");
        }
    }
}

#[test]
fn a_bind_that_makes_no_sense_is_an_error_not_a_hang() {
    for value in ["nonsense:", ":99999", "127.0.0.1:", "[::1", "no.such.host.invalid:8080"] {
        for (output, took) in check(&[("LIVEKIT_JWT_BIND", value)]) {
            assert_eq!(output.status.code(), Some(1), "{value}: {output:?}");
            assert!(took < Duration::from_secs(3), "{value}: {took:?}");
        }
    }
}
