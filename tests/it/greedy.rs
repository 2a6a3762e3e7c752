//! Homeservers that answer without end, and names that lead anywhere (decision O4): what is
//! read, dialled and asked for one request is bounded, and by the address that is dialled.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::ca::Ca;
use crate::support::client::Call;
use crate::support::client_api::ClientApi;
use crate::support::dns::{Dns, Kind, Say};
use crate::support::homeserver::{Homeserver, USERINFO, WELL_KNOWN, unknown_token};
use crate::support::neighbour::{Greeting, Neighbour, Reply};
use crate::support::network::with_low_ports;
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::world::World;
use crate::support::{bodies, secrets, unique_loopback, unique_room, wait_until};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";

/// 65,500 chunks of a byte, then silence.
fn chunks_of_a_byte() -> Reply {
    Reply::Stall((CHUNKED.to_owned() + &"1\r\n \r\n".repeat(65_500)).into_bytes())
}

/// Answers that do not end, or whose parts are far more than what they carry.
fn greedy() -> Vec<(&'static str, Reply)> {
    let endless = |first: &str, again: String| Reply::Endless(first.into(), again.into_bytes());
    let plain = "HTTP/1.1 200 OK\r\n";
    vec![
        ("chunks of a byte", chunks_of_a_byte()),
        (
            "interim answers",
            endless("", "HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n".repeat(100)),
        ),
        ("empty interim answers", endless("", "HTTP/1.1 100 \r\n\r\n".repeat(500))),
        ("chunks", endless(CHUNKED, format!("1000\r\n{}\r\n", " ".repeat(0x1000)))),
        ("chunk extensions", endless(&format!("{CHUNKED}1;"), "x".repeat(4096))),
        (
            "chunks with extensions",
            endless(CHUNKED, format!("1;{}\r\n \r\n", "x".repeat(1000))),
        ),
        ("trailers", endless(&format!("{CHUNKED}0\r\n"), "X-Trailer: x\r\n".repeat(100))),
        ("header lines", endless(plain, "X: y\r\n".repeat(500))),
        ("one header", endless(&format!("{plain}X: "), "y".repeat(4096))),
        ("a body without a length", endless(&format!("{plain}\r\n"), " ".repeat(4096))),
        (
            "a body with a length",
            endless(&format!("{plain}Content-Length: 99999999999\r\n\r\n"), " ".repeat(4096)),
        ),
        ("empty lines", endless("", "\r\n".repeat(500))),
    ]
}

/// Debug builds are bigger than those that are shipped, so what is asserted is the growth.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn sixty_answers_in_chunks_of_a_byte_cost_their_limit_and_no_more() {
    let hostile = [Homeserver::start(), Homeserver::start()];
    let api = ClientApi::start();
    api.answer_versions(chunks_of_a_byte());
    let overrides = hostile.iter().map(|h| api.override_of(h)).collect::<Vec<_>>().join(",");
    let names: Vec<_> = hostile.iter().map(|h| h.name.as_str()).collect();
    let world = World::with(|setup| {
        setup
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &names.join(","))
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &overrides)
    });
    for homeserver in &hostile {
        let body = bodies::get_token_of(homeserver, "warm", &unique_room());
        assert_eq!(world.service.post("/get_token", &body).status, 200);
    }
    let before = world.service.rss_kib();
    hostile.iter().for_each(|h| h.answer_userinfo(Some(chunks_of_a_byte())));
    let calls: Vec<_> = (0..60)
        .map(|n| {
            Call::json(
                "/get_token",
                &bodies::get_token_of(&hostile[n % 2], &format!("u{n}"), &unique_room()),
            )
        })
        .collect();
    let most = std::sync::atomic::AtomicU64::new(0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(world.service.rss_kib(), Ordering::Relaxed);
                sleep(Duration::from_millis(5));
            }
        });
        let began = Instant::now();
        for answer in world.service.flood(&calls, calls.len()) {
            answer.assert_errcode(401, "M_UNAUTHORIZED");
        }
        eprintln!("60 answers in chunks of a byte in {:.1?}", began.elapsed());
        // The same of `/versions`, which a delegation asks for.
        hostile.iter().for_each(|h| h.answer_userinfo(None));
        let calls: Vec<_> = (0..60)
            .map(|n| {
                let body = bodies::delegate_of(&hostile[n % 2], &format!("u{n}"), &unique_room(), &format!("syd_{n}"), 3_600_000);
                Call::json("/delegate_delayed_leave", &body)
            })
            .collect();
        world.service.flood(&calls, calls.len());
        done.store(true, Ordering::Relaxed);
    });
    assert!(api.versions_asked() > 0);
    let most = most.load(Ordering::Relaxed);
    eprintln!("resident: {before} KiB before, {most} KiB at most");
    assert!(most < before + 12 * 1024, "memory grew from {before} KiB to {most} KiB");
}

/// Whatever is sent without end is cut off after the limit, for `userinfo` and for both kinds of well-known file.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn answers_without_end_are_refused() {
    with_low_ports(|| {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let service = dns.serving(Setup::new(&sfu)).env("LIVEKIT_LOG_LEVEL", "error").start();
        // Certificates and resolvers are loaded at first use.
        let warm = Homeserver::start();
        assert_eq!(service.call(&ask(&warm.name, &warm.token("a"))).status, 200);
        for (n, (what, reply)) in greedy().into_iter().enumerate() {
            let (direct, name, at) = (Homeserver::start(), format!("greedy{n}.example.org"), unique_loopback());
            direct.answer_userinfo(Some(reply.clone()));
            let web = Homeserver::builder().at(at, 443).certified_for([name.as_str()]).start();
            web.answer_well_known(reply);
            let federation = Homeserver::builder().at(at, 8448).certified_for([name.as_str()]).start();
            dns.address(&name, &[at.into()]);
            let (memory, cpu) = (service.rss_kib(), service.cpu());
            let answer = service.post("/sfu/get", &bodies::sfu_get(&unique_room(), &direct.name, &secrets::token()));
            answer.assert_errcode(401, "M_UNAUTHORIZED");
            assert!(answer.took < Duration::from_secs(6), "{what}: {:?}", answer.took);
            // Without a usable file it is at port 8448.
            let body = bodies::sfu_get(&unique_room(), &name, &federation.token_of(&format!("@a:{name}")));
            let answer = service.post("/sfu/get", &body);
            assert_eq!(answer.status, 200, "{what}: {}", answer.text());
            assert_eq!(web.http.count(|r| r.path == WELL_KNOWN), 1, "{what}");
            let (cost, grown) = (service.cpu() - cpu, service.rss_kib().saturating_sub(memory));
            eprintln!("{what}: {cost:?} of CPU, {grown} KiB, {} requests", direct.asked());
            assert!(cost < Duration::from_secs(2), "{what}: {cost:?} of CPU");
            assert!(grown < 4096, "{what}: {grown} KiB");
        }
    });
}

/// The figure that counts (20 ms) is that of a release build; here it is printed.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn interim_answers_without_end_keep_nobody_waiting() {
    let hostile: Vec<_> = (0..16).map(|_| Homeserver::start()).collect();
    for homeserver in &hostile {
        homeserver.answer_userinfo(Some(Reply::Endless(Vec::new(), b"HTTP/1.1 100 Continue\r\n\r\n".repeat(200))));
    }
    let world = World::new();
    let done = AtomicBool::new(false);
    let (mut slowest, mut asked) = (Duration::ZERO, 0);
    std::thread::scope(|scope| {
        for homeserver in &hostile {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let body = bodies::sfu_get(&unique_room(), &homeserver.name, &secrets::token());
                    world.service.post("/sfu/get", &body).assert_errcode(401, "M_UNAUTHORIZED");
                }
            });
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            let answer = world.service.get("/healthz");
            assert_eq!(answer.status, 200);
            slowest = slowest.max(answer.took);
            asked += 1;
            sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::Relaxed);
    });
    eprintln!("/healthz with 16 of them: {asked} times, the slowest took {slowest:.1?}");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
}

/// A machine that strangers point at: it takes connections and says nothing of use.
struct Victim {
    web: Neighbour,
    federation: Neighbour,
}

impl Victim {
    fn start(at: std::net::Ipv4Addr, certified_for: &str, file: Reply) -> Self {
        let certificate = Ca::trusted().server(&[certified_for.into()]);
        let web = Neighbour::start(SocketAddr::new(at.into(), 443), Some(certificate.clone()), move |_| file.clone());
        let federation = Neighbour::start(SocketAddr::new(at.into(), 8400), Some(certificate), |request| {
            if request.path == USERINFO && request.query("access_token").is_some_and(|t| t.starts_with("good")) {
                Reply::json(200, &json!({ "sub": "@a:evil.example.org" }))
            } else {
                Reply::Close
            }
        });
        Self { web, federation }
    }

    fn dials(&self) -> usize {
        self.web.connections().len() + self.federation.connections().len()
    }
}

fn ask(server: &str, token: &str) -> Call {
    Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), server, token))
}

/// SRV targets, redirects and retries are of one budget, for strangers and for those that have verified a token.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn one_request_makes_eight_connections_at_most() {
    with_low_ports(|| {
        for (kind, file) in [
            ("no file", Reply::text(404, "text/plain", "no")),
            (
                "a file that redirects to itself",
                Reply::redirect(302, "https://evil.example.org/again"),
            ),
            ("a file that does not come", Reply::Close),
        ] {
            for verified in [false, true] {
                let (sfu, dns) = (Sfu::start(), Dns::start());
                dns.ttl(0);
                let at = unique_loopback();
                dns.address("evil.example.org", &[at.into()]);
                let targets: Vec<_> = (0..1000).map(|n| format!("t{n}.evil.example.org")).collect();
                for target in &targets {
                    dns.address(target, &[at.into()]);
                }
                let records: Vec<_> = targets.iter().map(|t| (1, 1, 8400, t.as_str())).collect();
                dns.srv("_matrix-fed._tcp.evil.example.org", &records[..8]);
                let victim = Victim::start(at, "evil.example.org", file.clone());
                let service = dns
                    .serving(Setup::new(&sfu))
                    .env("LIVEKIT_LOG_LEVEL", "error")
                    .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
                    .start();
                if verified {
                    let answer = service.call(&ask("evil.example.org", "good"));
                    assert_eq!(answer.status, 200, "{}", answer.text());
                }
                victim.federation.greet(Greeting::Close);
                let (dials, fetches, questions) = (victim.dials(), victim.web.connections().len(), dns.questions().len());
                let answer = service.call(&ask("evil.example.org", &secrets::token()));
                answer.assert_errcode(401, "M_UNAUTHORIZED");
                let dials = victim.dials() - dials;
                let questions = dns.questions().len() - questions;
                let fetches = victim.web.connections().len() - fetches;
                eprintln!(
                    "{kind}, {}: {dials} connections, {fetches} of them for the file, {questions} questions, {:.1?}",
                    if verified { "verified" } else { "a stranger" },
                    answer.took
                );
                assert!(dials <= 8, "{dials} connections");
                assert!(questions <= 24, "{questions} questions");
                if kind != "a file that redirects to itself" {
                    assert!(fetches <= 3, "{fetches} fetches");
                }
            }
        }
    });
}

/// Other ways to many questions: name servers that fail, aliases of aliases, and answers with a thousand records.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn one_request_asks_24_questions_at_most() {
    with_low_ports(|| {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        dns.ttl(0);
        let at = unique_loopback();
        let service = dns
            .serving(Setup::new(&sfu))
            .env("LIVEKIT_LOG_LEVEL", "error")
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
            .start();
        let closes = [443, 8400].map(|port| Neighbour::start(SocketAddr::new(at.into(), port), None, |_| Reply::Close));
        closes.iter().for_each(|neighbour| neighbour.greet(Greeting::Close));
        for kind in [Kind::A, Kind::AAAA, Kind::SRV] {
            dns.script("*.broken.example.org", kind, [Say::Broken]);
            dns.script("*.silent.example.org", kind, [Say::Silence]);
        }
        let targets: Vec<_> = (0..900).map(|n| format!("t{n}.many.example.org")).collect();
        for target in &targets {
            dns.address(target, &[at.into()]);
        }
        dns.address("many.example.org", &[at.into()]);
        let records: Vec<_> = targets.iter().map(|t| (1, 1, 8400, t.as_str())).collect();
        dns.srv("_matrix-fed._tcp.many.example.org", &records);
        let mut addresses = vec![at.into(); 1];
        addresses.extend((0..900_u32).map(|n| std::net::IpAddr::from([127, 250, (n >> 8) as u8, n as u8])));
        dns.address("addresses.example.org", &addresses);
        let long = format!("{0}.{0}.{0}.example.org", "a".repeat(63));
        for name in [
            "x.broken.example.org",
            "x.silent.example.org",
            "many.example.org",
            "addresses.example.org",
            &long,
            "a..example.org",
            "-.example.org",
        ] {
            let before = dns.questions().len();
            let answer = service.call(&ask(name, &secrets::token()));
            let asked = dns.questions().len() - before;
            eprintln!("{name}: {} after {:.1?}, {asked} questions", answer.status, answer.took);
            assert!(asked <= 24, "{name}: {asked} questions");
            assert!([400, 401].contains(&answer.status), "{name}: {}", answer.text());
        }
    });
}

/// Whoever points names at a homeserver costs it a turn and not the queue.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn foreign_names_on_its_address_keep_nobody_from_a_homeserver() {
    with_low_ports(|| {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let at = unique_loopback();
        let honest = Homeserver::builder()
            .at(at, 8448)
            .named("honest.example.net")
            .certified_for(["honest.example.net"])
            .start();
        let web = Neighbour::start(
            SocketAddr::new(at.into(), 443),
            Some(Ca::trusted().server(&["honest.example.net".into()])),
            |_| Reply::text(404, "text/plain", "no"),
        );
        dns.address("honest.example.net", &[at.into()]);
        for n in 0..10 {
            for below in ["", "*."] {
                dns.address(&format!("{below}evil{n}.test"), &[at.into()]);
            }
        }
        let service = dns
            .serving(Setup::new(&sfu))
            .env("LIVEKIT_LOG_LEVEL", "error")
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
            .start();
        let (done, waiting) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for n in 0..30 {
                let (service, done, waiting) = (&service, &done, &waiting);
                scope.spawn(move || {
                    // Three a second in all, each of which takes up to ten.
                    sleep(Duration::from_millis(333) * n);
                    waiting.fetch_add(1, Ordering::Relaxed);
                    let mut round = 0;
                    while !done.load(Ordering::Relaxed) {
                        round += 1;
                        let name = match n % 3 {
                            0 => format!("evil{}.test", n % 10),
                            1 => format!("EVIL{}.test.", n % 10),
                            _ => format!("n{n}x{round}.evil{}.test", n % 10),
                        };
                        service.call(&ask(&name, &secrets::token()));
                    }
                });
            }
            wait_until("the queue to stand", Duration::from_secs(60), || {
                waiting.load(Ordering::Relaxed) >= 24
            });
            let mut slowest = Duration::ZERO;
            // Junk for the homeserver itself does not make it known; its honest user comes last.
            for _ in 0..3 {
                let answer = service.call(&ask("honest.example.net", &secrets::token()));
                assert_eq!(answer.field("reason"), "token_rejected", "{}", answer.text());
                slowest = slowest.max(answer.took);
            }
            let token = honest.token_of("@a:honest.example.net");
            let answer = service.call(&ask("honest.example.net", &token));
            assert_eq!(answer.status, 200, "{}", answer.text());
            slowest = slowest.max(answer.took);
            done.store(true, Ordering::Relaxed);
            let dialled = honest.http.connections().len() + web.connections().len();
            eprintln!("the slowest took {slowest:.1?}; the address was dialled {dialled} times");
            assert!(slowest < Duration::from_secs(3), "{slowest:?}");
        });
    });
}

/// Names that hang, from spellings, wildcards and two hundred domains: a newcomer's name is looked up at once.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn names_that_hang_keep_nobody_from_being_looked_up() {
    with_low_ports(|| {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let at = unique_loopback();
        let _newcomers = Neighbour::start(
            SocketAddr::new(at.into(), 8448),
            Some(Ca::trusted().server(&["*.honest.example".into(), "*.newcomer.example".into()])),
            |_| unknown_token(),
        );
        for kind in [Kind::A, Kind::AAAA, Kind::SRV] {
            dns.script("*.evil.test", kind, [Say::Silence]);
            for n in 0..200 {
                dns.script(&format!("*.hangs{n}.test"), kind, [Say::Silence]);
            }
        }
        dns.address("*.newcomer.example", &[at.into()]);
        let service = dns
            .serving(Setup::new(&sfu))
            .env("LIVEKIT_LOG_LEVEL", "error")
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
            .start();
        let files = service.fds();
        let mut flood = Vec::new();
        let (mut slowest, mut most) = (Duration::ZERO, 0);
        let began = Instant::now();
        for n in 0..450_u32 {
            // Fifty a second.
            let due = began + Duration::from_millis(20) * n;
            sleep(due.saturating_duration_since(Instant::now()));
            let name = match n % 3 {
                0 => format!("n{n}.evil.test"),
                1 => format!("{}.EVIL.test:{}", "Xy".repeat(1 + n as usize % 20), 1000 + n),
                _ => format!("n{n}.hangs{}.test", n % 200),
            };
            flood.push(service.begin(&ask(&name, &secrets::token())));
            if n % 50 == 49 {
                let name = format!("m{n}.newcomer.example:8448");
                let answer = service.call(&ask(&name, &secrets::token()));
                assert_eq!(answer.field("reason"), "token_rejected", "{}", answer.text());
                slowest = slowest.max(answer.took);
                most = most.max(service.fds());
            }
        }
        eprintln!("newcomers among names that hang: the slowest took {slowest:.1?}; {files} to {most} descriptors");
        assert!(slowest < Duration::from_secs(3), "{slowest:?}");
        for one in flood {
            let _ = one.join();
        }
    });
}
