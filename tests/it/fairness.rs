//! Nobody keeps anybody else from being served (decisions H7a, H7b): junk tokens for somebody's own homeserver, hanging
//! homeservers of strangers, many spellings and many machines. All tokens of a flood are different.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::support::ca::Ca;
use crate::support::client::{Answer, Call};
use crate::support::dns::Dns;
use crate::support::homeserver::{Homeserver, USERINFO, unknown_token};
use crate::support::neighbour::{Neighbour, Reply};
use crate::support::network::with_low_ports;
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;
use crate::support::{bodies, secrets, unique, unique_network, unique_room};

/// What the figures have on top here: a debug build on a machine that is busy with other tests.
const BUSY: Duration = Duration::from_secs(2);

/// Where honest users come from.
const HONEST: [u8; 4] = [9, 9, 8, 7];

struct Stage {
    service: Service,
    dns: Dns,
    _sfu: Sfu,
}

impl Stage {
    fn new(change: impl FnOnce(Setup) -> Setup) -> Self {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let setup = dns.serving(Setup::new(&sfu)).env("LIVEKIT_LOG_LEVEL", "warn").unset("RUST_LOG");
        let service = change(setup).start();
        Self { service, dns, _sfu: sfu }
    }

    /// A homeserver on machines of its own, found by its name.
    fn homeserver(&self, name: &str) -> Homeserver {
        let at = unique_network();
        self.dns.address(name, &[at.into()]);
        Homeserver::builder().at(at, 8448).named(name).certified_for([name]).start()
    }

    /// An honest user's request, from an address of its own.
    fn ask(&self, homeserver: &Homeserver) -> Answer {
        let body = bodies::sfu_get_of(homeserver, "alice", &unique_room());
        self.service.call(&from(Call::json("/sfu/get", &body), HONEST))
    }

    /// Asks again and again while `busy` is set; the slowest answer and how many there were. All are 200.
    fn ask_while(&self, homeserver: &Homeserver, busy: &AtomicBool) -> (Duration, usize) {
        let (mut slowest, mut asked) = (Duration::ZERO, 0);
        while busy.load(Relaxed) {
            let answer = self.ask(homeserver);
            assert_eq!(answer.status, 200, "{} after {:?}", answer.text(), answer.took);
            slowest = slowest.max(answer.took);
            asked += 1;
        }
        (slowest, asked)
    }
}

fn from(call: Call, address: [u8; 4]) -> Call {
    call.header("X-Forwarded-For", &IpAddr::from(address).to_string())
}

/// A request with a token that its homeserver does not know, from one of 64 clients.
fn junk(server: &str) -> Call {
    let body = bodies::get_token("!r:x", server, &secrets::token(), "@a:x");
    from(Call::json("/get_token", &body), [9, 9, 9, (unique() % 64) as u8])
}

/// Keeps `at_once` requests in the air for `time`.
fn keep_in_the_air(service: &Service, at_once: usize, time: Duration, next: impl Fn() -> Call + Sync) -> usize {
    let end = Instant::now() + time;
    let sent = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        // A few workers that each keep a part of them in the air, so that those that end are replaced at once.
        for part in 0..8 {
            let (next, sent) = (&next, &sent);
            scope.spawn(move || {
                let mine = at_once * (part + 1) / 8 - at_once * part / 8;
                while Instant::now() < end && mine > 0 {
                    let calls: Vec<_> = (0..mine).map(|_| next()).collect();
                    sent.fetch_add(service.flood(&calls, mine).len(), Relaxed);
                }
            });
        }
    });
    sent.load(Relaxed)
}

/// Asks while the requests of `next` are in the air, from when they are.
fn ask_under(stage: &Stage, at_once: usize, next: impl Fn() -> Call + Sync, honest: impl Fn(&AtomicBool)) {
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let sent = keep_in_the_air(&stage.service, at_once, Duration::from_secs(6), &next);
            busy.store(false, Relaxed);
            sent
        });
        std::thread::sleep(Duration::from_millis(300));
        honest(&busy);
        eprintln!("{} requests of a flood of {at_once} at a time", flood.join().expect("the flood"));
    });
}

/// Junk for a homeserver that nobody knows yet, so that even its first honest user comes after the junk.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn junk_for_a_new_homeserver_does_not_keep_its_users_out() {
    with_low_ports(|| {
        for in_the_air in [12, 100, 1000] {
            let stage = Stage::new(|setup| setup);
            let home = stage.homeserver("home.example.org");
            ask_under(
                &stage,
                in_the_air,
                || junk("home.example.org"),
                |busy| {
                    let (slowest, asked) = stage.ask_while(&home, busy);
                    eprintln!("{in_the_air} in the air: {asked} answers, the slowest after {slowest:.1?}");
                    assert!(slowest < Duration::from_secs(3) + BUSY, "{slowest:?}");
                },
            );
        }
    });
}

/// Junk for a listed homeserver that needs 0.3 s for each answer.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn junk_for_a_slow_homeserver_does_not_keep_its_users_out() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "slow.example.org"));
        let slow = stage.homeserver("slow.example.org");
        slow.change_userinfo(|known| known.unwrap_or_else(unknown_token).after(Duration::from_millis(300)));
        let name = slow.name.clone();
        ask_under(
            &stage,
            1500,
            || junk(&name),
            |busy| {
                let (slowest, asked) = stage.ask_while(&slow, busy);
                eprintln!("1,500 in the air: {asked} answers, the slowest after {slowest:.1?}");
                assert!(slowest < Duration::from_secs(3) + BUSY, "{slowest:?}");
            },
        );
    });
}

/// The second half of it: the honest user has the same address as all the junk, and the homeserver needs 10 ms.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn junk_from_ones_own_address_keeps_nobody_out() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "quick.example.org"));
        let quick = stage.homeserver("quick.example.org");
        quick.change_userinfo(|known| known.unwrap_or_else(unknown_token).after(Duration::from_millis(10)));
        let name = quick.name.clone();
        ask_under(
            &stage,
            1500,
            || {
                let body = bodies::get_token("!r:x", &name, &secrets::token(), "@a:x");
                from(Call::json("/get_token", &body), HONEST)
            },
            |busy| {
                let (slowest, asked) = stage.ask_while(&quick, busy);
                eprintln!("1,500 in the air from one address: {asked} answers, the slowest after {slowest:.1?}");
                assert!(slowest < Duration::from_secs(3) + BUSY, "{slowest:?}");
            },
        );
    });
}

/// Strangers' homeservers that never answer keep no other stranger's users out.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn hanging_strangers_keep_no_other_stranger_out() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        let at = unique_network();
        stage.dns.address("*.hangs.example.net", &[at.into()]);
        let certificate = Ca::trusted().server(&["*.hangs.example.net".into()]);
        let _hangs = Neighbour::start(SocketAddr::new(at.into(), 8448), Some(certificate), |_| Reply::Hang);
        let fresh = AtomicUsize::new(0);
        ask_under(
            &stage,
            1024,
            || junk(&format!("n{}.hangs.example.net:8448", unique())),
            |busy| {
                let mut slowest = Duration::ZERO;
                while busy.load(Relaxed) {
                    // Nobody has ever heard of it.
                    let home = stage.homeserver(&format!("new{}.example.org", fresh.fetch_add(1, Relaxed)));
                    let answer = stage.ask(&home);
                    assert_eq!(answer.status, 200, "{} after {:?}", answer.text(), answer.took);
                    slowest = slowest.max(answer.took);
                }
                eprintln!("{} new homeservers, the slowest after {slowest:.1?}", fresh.load(Relaxed));
                assert!(slowest < Duration::from_secs(3) + BUSY, "{slowest:?}");
            },
        );
    });
}

/// 10,000 names of 200 domains on 20 networks, which all have answered well once, and then hang.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn many_names_that_were_good_once_keep_nobody_out() {
    const NETWORKS: usize = 20;
    const DOMAINS: usize = 200;
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "listed.example.org"));
        let (listed, verified) = (stage.homeserver("listed.example.org"), stage.homeserver("verified.example.org"));
        for home in [&listed, &verified] {
            assert_eq!(stage.ask(home).status, 200);
        }
        static HANG: AtomicBool = AtomicBool::new(false);
        HANG.store(false, Relaxed);
        let _evil: Vec<_> = (0..NETWORKS)
            .map(|network| {
                let at = unique_network();
                let names: Vec<_> = (network..DOMAINS).step_by(NETWORKS).map(|d| format!("*.evil{d}.test")).collect();
                names.iter().for_each(|name| stage.dns.address(name, &[at.into()]));
                Neighbour::start(SocketAddr::new(at.into(), 8448), Some(Ca::trusted().server(&names)), |request| {
                    if HANG.load(Relaxed) || request.path != USERINFO {
                        Reply::Hang
                    } else {
                        unknown_token()
                    }
                })
            })
            .collect();
        let name = |n: usize| {
            let name = format!("n{}.evil{}.test:8448", n / DOMAINS, n % DOMAINS);
            if n.is_multiple_of(3) {
                name.to_uppercase().replace("TEST", "TeSt")
            } else {
                name
            }
        };
        let calls: Vec<_> = (0..1_000).map(|n| junk(&name(n))).collect();
        let good = stage
            .service
            .flood(&calls, 64)
            .iter()
            .filter(|a| a.field("reason") == "token_rejected")
            .count();
        assert!(good > 900, "only {good} of 1,000 names have answered");
        HANG.store(true, Relaxed);
        let next = AtomicUsize::new(0);
        ask_under(
            &stage,
            2_000,
            || junk(&name(next.fetch_add(1, Relaxed) % 10_000)),
            |busy| {
                std::thread::scope(|scope| {
                    for home in [&listed, &verified] {
                        let stage = &stage;
                        scope.spawn(move || {
                            let (slowest, asked) = stage.ask_while(home, busy);
                            eprintln!("{}: {asked} answers, the slowest after {slowest:.1?}", home.name);
                            assert!(slowest < Duration::from_secs(1) + BUSY, "{}: {slowest:?}", home.name);
                        });
                    }
                });
            },
        );
    });
}
