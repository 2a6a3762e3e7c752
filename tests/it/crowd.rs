//! Crowds at the door (decisions P14, P15, H7): nothing that is scarce is taken before the client has paid for it, nobody
//! shares a pot with strangers who has proved himself, and the memory limit holds whatever strangers do.

use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::cgroup::Cgroup;
use crate::support::client::{Call, Connection};
use crate::support::secrets;
use crate::support::service::{Service, binary};
use crate::support::webhook::signed;
use crate::support::world::World;
use crate::support::{bodies, unique_room, wait_until};

/// A head whose body does not come.
const HEAD_ONLY: &[u8] = b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n";

/// Connections that have sent these bytes, and say nothing more. Some may be gone already.
fn crowd(service: &Service, count: usize, bytes: &[u8]) -> Vec<Connection> {
    (0..count)
        .map(|_| {
            let mut connection = service.connect();
            connection.send(bytes);
            connection
        })
        .collect()
}

/// A request with a head of `size` bytes whose body does not come.
fn large_head(size: usize) -> Vec<u8> {
    let padding = "a".repeat(size);
    format!("POST /get_token HTTP/1.1\r\nHost: x\r\nX-Padding: {padding}\r\nContent-Length: 2000\r\n\r\n").into_bytes()
}

/// The slowest of a few probes.
fn healthz(service: &Service) -> Duration {
    (0..20)
        .map(|_| {
            let answer = service.get("/healthz");
            assert_eq!(answer.status, 200);
            answer.took
        })
        .max()
        .unwrap_or_default()
}

fn honest(world: &World, what: &str) {
    let answer = world
        .service
        .post("/sfu/get", &bodies::sfu_get_of(&world.home, "alice", &unique_room()));
    assert_eq!(answer.status, 200, "{what}: {}", answer.text());
    assert!(answer.took < Duration::from_secs(3), "{what}: {:?}", answer.took);
}

fn warnings(service: &Service) -> usize {
    let log = service.log();
    log.lines().filter(|line| line.contains("too much at once")).count()
}

/// Crowds come one after the other, and once again; nobody is killed, probes are answered, and what they need does not add up.
fn within(mib: u64, crowds: &[(&str, usize, Vec<u8>)]) {
    let Some(group) = Cgroup::with_mib(mib) else { return };
    let world = World::with(|setup| setup.wrapped_in(&group.wrapper()).env("LIVEKIT_LOG_LEVEL", "info"));
    honest(&world, "at rest");
    let (before, files) = (group.used_kib(), world.service.fds());
    let mut peak = 0u64;
    for (number, (what, count, bytes)) in crowds.iter().chain(crowds).enumerate() {
        let crowd = crowd(&world.service, *count, bytes);
        // The first probe comes behind all that the crowd has sent; the others while it stands.
        let (behind, slowest, most) = (world.service.get("/healthz").took, healthz(&world.service), group.used_kib());
        honest(&world, what);
        eprintln!(
            "{mib} MiB, {count} {what}: {before} KiB before, {most} KiB then; /healthz took {behind:.1?} behind them, {slowest:.1?} at most beside them ({})",
            binary()
        );
        assert_eq!(group.killed(), 0, "{what}");
        // Fifty milliseconds, and the rest for a debug build on a machine with other tests.
        assert!(behind < Duration::from_secs(20), "{what}: {behind:?}");
        assert!(slowest < Duration::from_secs(1), "{what}: {slowest:?}");
        drop(crowd);
        wait_until("the connections to be given back", Duration::from_secs(30), || {
            world.service.fds() < files + 16
        });
        eprintln!("{mib} MiB, after {count} {what}: {} KiB", group.used_kib());
        // What the allocator keeps, the next crowd gets: it does not add up.
        assert!(
            number < crowds.len() || most < peak + 8 * 1024,
            "{what}: {most} KiB after {peak} KiB"
        );
        peak = peak.max(most);
    }
    assert!(warnings(&world.service) >= 1, "nothing was said about it");
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn silent_connections_fit_into_64_mib() {
    within(64, &[("silent connections", 5_400, Vec::new())]);
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn stalled_requests_fit_into_128_mib() {
    let started = b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 64000\r\n\r\n".to_vec();
    let half_a_body = [started, vec![b' '; 32_000]].concat();
    let unfinished_head = large_head(15_000)[..15_000].to_vec();
    within(
        128,
        &[
            ("requests without a body", 4_096, HEAD_ONLY.to_vec()),
            ("requests with a head of 15 KiB and no body", 4_096, large_head(15_000)),
            ("unfinished heads of 15 KiB", 4_096, unfinished_head),
            ("requests with half a body", 4_096, half_a_body),
        ],
    );
}

/// A head takes no place among the requests in flight.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn requests_whose_body_does_not_come_keep_nobody_out() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let kept = crowd(&world.service, 4_096, HEAD_ONLY);
    for _ in 0..10 {
        honest(&world, "with 4,096 heads");
    }
    assert_eq!(warnings(&world.service), 0, "nothing has run out");
    drop(kept);
}

/// Where the places do run out, connections that bring nothing give way, and one line says so.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn where_connections_run_out_the_slowest_give_way() {
    let few = ["/bin/sh", "-c", "ulimit -n 1024 && exec \"$@\"", "sh"];
    let world = World::with(|setup| setup.wrapped_in(&few).env("LIVEKIT_LOG_LEVEL", "info"));
    for (what, bytes) in [
        ("heads", HEAD_ONLY),
        ("silence", b"".as_slice()),
        ("unfinished heads", b"POST /get_token HTTP/1.1\r\nHost: x\r\n"),
        ("idle connections", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
    ] {
        let kept = crowd(&world.service, 4_096, bytes);
        for _ in 0..10 {
            honest(&world, what);
        }
        let slowest = healthz(&world.service);
        eprintln!("1,024 files, 4,096 times {what}: /healthz took {slowest:.1?} at most");
        assert!(slowest < Duration::from_secs(2), "{what}: {slowest:?}");
        drop(kept);
    }
    assert_eq!(warnings(&world.service), 1, "{}", world.service.log());
    world.service.wait_event("overload").says(&["remedy="]);
}

#[test]
fn the_soft_limit_on_open_files_is_raised_to_the_hard_one() {
    let shell = ["/bin/sh", "-c", "ulimit -S -n 1024 && ulimit -H -n 8192 && exec \"$@\"", "sh"];
    let world = World::with(|setup| setup.wrapped_in(&shell).env("LIVEKIT_LOG_LEVEL", "info"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", world.service.pid)).expect("limits");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let numbers: Vec<_> = line.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).collect();
    assert_eq!(numbers, [8192, 8192]);
    let line = world.service.wait_event("limits");
    assert!(
        line.has(&[("descriptors", "8192"), ("connections", "4096"), ("requests_in_flight", "3072")]),
        "{line}"
    );
}

/// The SFU and our homeserver have proved themselves: strangers' bodies do not stand in their way.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn stalled_bodies_of_strangers_stand_in_nobodys_way() {
    let hs_token = secrets::hs_token();
    let world = World::with(|setup| {
        setup
            .env("LIVEKIT_LOG_LEVEL", "info")
            .env("LIVEKIT_HS_SERVER_NAME", "127.0.0.1:1")
            .env("LIVEKIT_AS_TOKEN", &secrets::as_token())
            .env("LIVEKIT_HS_TOKEN", &hs_token)
            .env("LIVEKIT_REQUIRE_MEMBERSHIP", "false")
    });
    let mut stalled = b"POST /get_token HTTP/1.1\r\nHost: x\r\nContent-Length: 65000\r\n\r\n".to_vec();
    stalled.extend([b' '; 64_500]);
    for count in [198, 400] {
        let kept = crowd(&world.service, count, &stalled);
        for padding in [1_500, 60_000] {
            let event = json!({"event": "track_published", "id": "EV_1", "padding": "a".repeat(padding)}).to_string();
            let answer = world.service.call(&signed(&world.sfu, &event));
            assert_eq!(answer.status, 200, "{count} stalled bodies: {}", answer.text());
            let body = json!({"padding": "a".repeat(padding)});
            let call = Call::json("/_matrix/client/v1/rtc/livekit/get_token", &body);
            let token = format!("Bearer {hs_token}");
            let answer = world.service.call(
                &call
                    .header("Authorization", &token)
                    .header("X-Matrix-User-Identifier", "@a:127.0.0.1:1"),
            );
            answer.assert_errcode(400, "M_BAD_JSON");
        }
        honest(&world, "a short body");
        // A long one waits until it is seen who is slow.
        let mut body = bodies::sfu_get_of(&world.home, "alice", &unique_room());
        body["padding"] = "a".repeat(60_000).into();
        let answer = world.service.post("/sfu/get", &body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(answer.took < Duration::from_secs(4), "{:?}", answer.took);
        drop(kept);
    }
    assert_eq!(warnings(&world.service), 1);
}

/// A body that trickles in chunks of a byte keeps neither a place nor anybody waiting.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn trickled_chunks_keep_nobody_out() {
    let few = ["/bin/sh", "-c", "ulimit -n 1024 && exec \"$@\"", "sh"];
    let world = World::with(|setup| setup.wrapped_in(&few).env("LIVEKIT_LOG_LEVEL", "info"));
    let head = b"POST /sfu/get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n";
    let mut kept = crowd(&world.service, 1_000, head);
    for _ in 0..5 {
        for connection in &mut kept {
            connection.send(b"1\r\n \r\n");
        }
        honest(&world, "with trickling bodies");
    }
}

/// Whoever asks and never reads has no place, and no connection for long.
#[test]
fn a_client_that_never_reads_is_given_up() {
    let world = World::with(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
    let asked = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2_000);
    let began = Instant::now();
    // Until the buffers on both sides are full, and then until the service has had enough.
    let mut stream = TcpStream::connect(world.service.address()).expect("a connection");
    stream.set_write_timeout(Some(Duration::from_secs(60))).expect("a socket");
    let failed = loop {
        if let Err(error) = stream.write_all(&asked) {
            break error;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "it is listened to for ever");
    };
    assert!(
        matches!(failed.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "after {:?}: {failed}",
        began.elapsed()
    );
    honest(&world, "after it");
    eprintln!("given up after {:.1?}", began.elapsed());
}
