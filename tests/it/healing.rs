//! What stands beside the service moves, and is found again at the next request (decision O2): a container that was made anew
//! has another address, a well-known file is corrected, a line is added to `/etc/hosts`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::discovery::{Stage, delegation, listener, unique_name, v4, web};
use crate::support::client::Call;
use crate::support::client_api::ClientApi;
use crate::support::dns::{Dns, Kind, Say};
use crate::support::hashes::{self, SLOT};
use crate::support::homeserver::{Homeserver, WELL_KNOWN};
use crate::support::neighbour::{Greeting, Reply};
use crate::support::network::{in_own_network, replace_file, with_low_ports};
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::{bodies, secrets, unique, unique_loopback, unique_room, wait_until, webhook};

/// What is at a homeserver's old address after it has moved.
#[derive(Clone, Copy, Debug)]
enum Left {
    Nobody,
    /// A page, with the certificate of the homeserver: a proxy that has lost its back end, or gives 404.
    Page(u16),
    /// Somebody else's machine.
    AnotherName,
    /// A port that takes connections and says nothing.
    Silence,
}

const LEFT: [Left; 6] = [
    Left::Nobody,
    Left::Page(404),
    Left::Page(200),
    Left::Page(502),
    Left::AnotherName,
    Left::Silence,
];

impl Left {
    /// `former` is not the homeserver any more.
    fn take_over(self, former: &Homeserver) -> Option<Homeserver> {
        match self {
            Self::Nobody => former.http.refuse(),
            Self::Page(status) => former.answer_userinfo(Some(Reply::text(status, "text/html", "<h1>It works!</h1>"))),
            Self::Silence => former.http.greet(Greeting::Silence),
            Self::AnotherName => {
                former.http.refuse();
                let at = former.http.address();
                return Some(listener(at.ip(), at.port(), "somebody-else.example.org"));
            }
        }
        None
    }
}

/// A user of `server` gets a token, as `far` vouches for it; how long that took.
#[track_caller]
pub(crate) fn reaches(stage: &Stage, server: &str, far: &Homeserver, what: &str) -> Duration {
    let token = far.token_of(&format!("@alice:{server}"));
    let answer = stage.ask(server, &token);
    assert_eq!(answer.status, 200, "{what}: {server}: {}", answer.text());
    assert!(far.asked_about(&token) > 0, "{what}: {server}");
    eprintln!("{what}: {server}: {:?}", answer.took);
    answer.took
}

/// With a TTL of 600: the port stands in the server name, in the well-known file, in an SRV record, or is 8448.
#[test]
fn a_homeserver_that_moves_is_found_at_the_next_request() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        stage.dns.ttl(600);
        std::thread::scope(|scope| {
            for left in LEFT {
                let stage = &stage;
                scope.spawn(move || {
                    let [old, new] = [unique_loopback(), unique_loopback()];
                    let (host, server) = (unique_name("host"), unique_name("moves"));
                    let (plain, srv) = (unique_name("plain"), unique_name("srv"));
                    let web_at = unique_loopback();
                    stage.dns.address(&server, &[v4(web_at)]);
                    let _web = web(web_at, &server, delegation(&format!("{host}:8448")));
                    stage.dns.srv(&format!("_matrix-fed._tcp.{srv}"), &[(1, 1, 8448, &host)]);
                    stage.dns.address(&host, &[v4(old)]);
                    stage.dns.address(&plain, &[v4(old)]);
                    let at = |ip| {
                        Homeserver::builder()
                            .at(ip, 8448)
                            .named(&host)
                            .certified_for([host.as_str(), &plain, &srv])
                            .start()
                    };
                    let names = [server.clone(), format!("{host}:8448"), srv.clone(), plain.clone()];
                    let former = at(old);
                    for name in &names {
                        reaches(stage, name, &former, "before");
                    }
                    let now = at(new);
                    stage.dns.address(&host, &[v4(new)]);
                    stage.dns.address(&plain, &[v4(new)]);
                    let _somebody_else = left.take_over(&former);
                    for name in &names {
                        reaches(stage, name, &now, &format!("{left:?} left"));
                    }
                });
            }
        });
    });
}

/// The address of an override moves, over http: nothing but the answer tells that somebody else is there.
#[test]
fn an_override_that_moves_is_found_at_the_next_request() {
    for left in [Left::Nobody, Left::Page(404), Left::Page(200), Left::Silence] {
        let (server, host) = (unique_name("overridden"), unique_name("inside"));
        let former = listener(unique_loopback(), 0, &host);
        let port = former.http.address().port();
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FEDERATION_URL_OVERRIDES", &format!("{server}=https://{host}:{port}")));
        stage.dns.ttl(600);
        stage.dns.address(&host, &[former.http.address().ip()]);
        reaches(&stage, &server, &former, "before");
        let new = unique_loopback();
        let now = listener(new, port, &host);
        stage.dns.address(&host, &[v4(new)]);
        let _somebody_else = left.take_over(&former);
        reaches(&stage, &server, &now, &format!("{left:?} left"));
    }
}

/// A host that is cut off says no goodbye: a kept connection to it would be believed in until the request's time is over.
#[test]
fn a_machine_that_vanishes_is_left_in_time() {
    in_own_network(|| {
        let stage = Stage::new(|setup| setup);
        stage.dns.ttl(600);
        let host = unique_name("vanishes");
        let server = format!("{host}:8448");
        let [old, new] = [Ipv4Addr::new(9, 1, 1, 1), Ipv4Addr::new(9, 1, 2, 1)];
        let former = listener(old, 8448, &host);
        stage.dns.address(&host, &[v4(old)]);
        reaches(&stage, &server, &former, "before");
        let lost = Command::new("ip")
            .args(["route", "add", "blackhole", "9.1.1.1/32"])
            .status()
            .expect("ip");
        assert!(lost.success(), "packets cannot be lost here");
        let now = listener(new, 8448, &host);
        stage.dns.address(&host, &[v4(new)]);
        reaches(&stage, &server, &now, "cut off");
    });
}

/// The file may be kept for a day; it is asked for again when the homeserver that it names is not there.
#[test]
fn a_corrected_well_known_file_counts_at_the_next_request() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        std::thread::scope(|scope| {
            // Who answers under the name that the file gives is the homeserver.
            for left in LEFT.into_iter().filter(|left| !matches!(left, Left::AnotherName)) {
                let stage = &stage;
                scope.spawn(move || {
                    let (name, at) = (unique_name("corrected"), unique_loopback());
                    stage.dns.address(&name, &[v4(at)]);
                    let former = Homeserver::start();
                    let file = web(at, &name, delegation(&former.name));
                    reaches(stage, &name, &former, "before");
                    let now = Homeserver::start();
                    file.answer_well_known(delegation(&now.name));
                    let _somebody_else = left.take_over(&former);
                    reaches(stage, &name, &now, &format!("{left:?} left"));
                    // The file goes, and the homeserver is where its name says.
                    let plain = listener(at, 8448, &name);
                    file.answer_well_known(Reply::json(404, &json!({})));
                    now.http.refuse();
                    reaches(stage, &name, &plain, "without a file");
                });
            }
        });
    });
}

/// While the file's server is away, what the file said last is still followed.
#[test]
fn a_file_that_cannot_be_asked_for_is_still_believed() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        let (name, at) = (unique_name("away"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let far = Homeserver::start();
        let file = web(at, &name, delegation(&far.name));
        reaches(&stage, &name, &far, "before");
        file.http.refuse();
        far.http.refuse();
        let token = far.token_of(&format!("@alice:{name}"));
        let request = stage
            .service
            .begin(&Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &name, &token)));
        wait_until("it to be missed", Duration::from_secs(8), || {
            !stage.service.lines(&[("event", "retry"), ("server", &name)]).is_empty()
        });
        far.http.listen_again();
        let answer = request.join().expect("the request").expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
    });
}

/// A web server that takes connections and says nothing: whoever asks first finds that out, and nobody after him waits for it.
#[test]
fn a_file_that_is_due_is_asked_for_in_the_background() {
    with_low_ports(|| {
        let (name, at) = (unique_name("hangs"), unique_loopback());
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
        stage.dns.address(&name, &[v4(at)]);
        let silent = listener(at, 443, &name);
        silent.http.greet(Greeting::Silence);
        let far = listener(at, 8448, &name);
        reaches(&stage, &name, &far, "first");
        let asked = silent.http.connections().len();
        let began = Instant::now();
        while silent.http.connections().len() < asked + 2 {
            assert!(began.elapsed() < Duration::from_secs(60), "the file was not asked for again");
            let token = far.token_of(&format!("@alice:{name}"));
            let answer = stage.ask(&name, &token);
            assert_eq!(answer.status, 200, "{}", answer.text());
            assert!(answer.took < Duration::from_secs(2), "{:?}", answer.took);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

/// SRV records with a TTL of 600 that are corrected.
#[test]
fn corrected_srv_records_count_at_the_next_request() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        stage.dns.ttl(600);
        let name = unique_name("records");
        let service = format!("_matrix-fed._tcp.{name}");
        let [old, new] = [unique_loopback(), unique_loopback()];
        let [old_target, new_target] = [unique_name("old"), unique_name("new")];
        stage.dns.address(&old_target, &[v4(old)]);
        stage.dns.address(&new_target, &[v4(new)]);
        stage.dns.srv(&service, &[(1, 1, 8400, &old_target)]);
        let former = listener(old, 8400, &name);
        reaches(&stage, &name, &former, "before");
        former.http.refuse();
        let now = listener(new, 8500, &name);
        stage.dns.srv(&service, &[(1, 1, 8500, &new_target)]);
        reaches(&stage, &name, &now, "after");
    });
}

/// While DNS does not answer, or with an error, the addresses that it gave last go on, and nobody waits long for it.
#[test]
fn while_dns_is_away_the_last_addresses_go_on() {
    for say in [Say::Silence, Say::Broken] {
        let stage = Stage::new(|setup| setup);
        stage.dns.ttl(1);
        let host = unique_name("steady");
        let far = listener(unique_loopback(), 0, &host);
        let server = format!("{host}:{}", far.http.address().port());
        stage.dns.address(&host, &[far.http.address().ip()]);
        reaches(&stage, &server, &far, "before");
        for kind in [Kind::A, Kind::AAAA] {
            stage.dns.script(&host, kind, [say.clone()]);
        }
        let asked = stage.dns.asked(&host, Kind::A);
        let began = Instant::now();
        while stage.dns.asked(&host, Kind::A) == asked {
            assert!(began.elapsed() < Duration::from_secs(10), "DNS was not asked any more");
            // Without a connection that is kept.
            far.http.refuse();
            far.http.listen_again();
            let token = far.token_of(&format!("@alice:{server}"));
            let answer = stage.ask(&server, &token);
            assert_eq!(answer.status, 200, "{say:?}: {}", answer.text());
            assert!(answer.took < Duration::from_secs(5), "{say:?}: {:?}", answer.took);
        }
    }
}

/// As an operator mends it while the service runs.
#[test]
fn a_line_added_to_etc_hosts_counts_at_the_next_request() {
    in_own_network(|| {
        let hosts = replace_file("/etc/hosts", "127.0.0.1 localhost\n");
        let resolv = replace_file("/etc/resolv.conf", "nameserver 127.0.0.53\n");
        let sfu = Sfu::start();
        let dns = Dns::at(SocketAddr::from(([127, 0, 0, 53], 53)));
        let names = [unique_name("added"), unique_name("moved")];
        let all = names.clone().map(|name| format!("{name}:8448")).join(",");
        let stage = Stage {
            service: Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &all).start(),
            dns,
            sfu,
        };
        let [at, old, new] = [unique_loopback(), unique_loopback(), unique_loopback()];
        let former = listener(old, 8448, &names[1]);
        stage.dns.address(&names[1], &[v4(old)]);
        reaches(&stage, &format!("{}:8448", names[1]), &former, "before");
        let nobody = stage.ask(&format!("{}:8448", names[0]), &secrets::token());
        assert_eq!(nobody.status, 401, "{}", nobody.text());

        let added = listener(at, 8448, &names[0]);
        let moved = listener(new, 8448, &names[1]);
        std::fs::write(&hosts, format!("127.0.0.1 localhost\n{at} {}\n{new} {}\n", names[0], names[1])).expect("the file");
        former.http.refuse();
        reaches(&stage, &format!("{}:8448", names[0]), &added, "a line added");
        reaches(
            &stage,
            &format!("{}:8448", names[1]),
            &moved,
            "a line added for a name that has moved",
        );

        // Another name server, as after a change of networks.
        let elsewhere = Dns::at(SocketAddr::from(([127, 0, 0, 54], 53)));
        let next = listener(unique_loopback(), 8448, &names[0]);
        elsewhere.address(&names[0], &[next.http.address().ip()]);
        std::fs::write(&hosts, "127.0.0.1 localhost\n").expect("the file");
        std::fs::write(&resolv, "nameserver 127.0.0.54\n").expect("the file");
        added.http.refuse();
        reaches(&stage, &format!("{}:8448", names[0]), &next, "another name server");
        assert!(elsewhere.asked(&names[0], Kind::A) > 0);
    });
}

/// A homeserver is down, and 1,500 requests ask for it at once and again and again: its file and its names are asked about
/// once a second, for all of them together.
#[test]
fn nothing_is_asked_more_often_than_once_a_second() {
    with_low_ports(|| {
        let (name, at) = (unique_name("down"), unique_loopback());
        let host = unique_name("down-host");
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
        stage.dns.ttl(600);
        stage.dns.address(&name, &[v4(at)]);
        stage.dns.address(&host, &[v4(at)]);
        let file = web(at, &name, delegation(&format!("{host}:8448")));
        let far = listener(at, 8448, &host);
        reaches(&stage, &name, &far, "before");
        far.http.refuse();
        let began = Instant::now();
        let (fetched, asked) = (
            || file.http.count(|r| r.path == WELL_KNOWN),
            |name: &str| stage.dns.asked(name, Kind::A),
        );
        let before = (fetched(), asked(&name), asked(&host));
        let calls: Vec<_> = (0..3000)
            .map(|_| Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &name, &secrets::token())))
            .collect();
        let answers = stage.service.flood(&calls, 1500);
        let seconds = usize::try_from(began.elapsed().as_secs()).expect("a time") + 2;
        assert!(answers.iter().all(|answer| answer.status != 200));
        let counts = [fetched() - before.0, asked(&name) - before.1, asked(&host) - before.2];
        eprintln!(
            "in {seconds} s: the file was fetched {} times, its host asked about {} times, the other {} times",
            counts[0], counts[1], counts[2]
        );
        assert!(
            counts.iter().all(|count| (1..=seconds).contains(count)),
            "{counts:?} in {seconds} s"
        );
    });
}

/// A delegated leave whose homeserver's client-server API moves: by a corrected file, and by its address.
#[test]
fn a_client_server_api_that_moves_is_found_in_time() {
    with_low_ports(|| {
        for by_file in [true, false] {
            let (name, at) = (unique_name("client-api"), unique_loopback());
            let host = unique_name("client-host");
            let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
            stage.dns.ttl(600);
            stage.dns.address(&name, &[v4(at)]);
            let home = web(at, &name, delegation(&format!("{name}:443")));
            let former = ClientApi::start();
            let port = former.http.address().port();
            stage.dns.address(&host, &[former.http.address().ip()]);
            let points_to = |url: &str| home.answer_client_well_known(Reply::json(200, &json!({ "m.homeserver": { "base_url": url } })));
            points_to(&format!("http://{host}:{port}"));

            let (room, delay_id) = (unique_room(), format!("syd_{}", unique()));
            let body = bodies::delegate_of(&home, "alice", &room, &delay_id, 8000);
            let answer = stage.service.post("/delegate_delayed_leave", &body);
            assert_eq!(answer.status, 200, "{}", answer.text());
            let identity = hashes::identity(&home.user("alice"), "DEVICE", "member1");
            let session = stage.sfu.join(&hashes::alias(&room, SLOT), &identity);
            webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session));
            wait_until("a restart", Duration::from_secs(10), || former.count("restart", &delay_id) > 0);

            let now = if by_file {
                let now = ClientApi::start();
                points_to(&now.url());
                now
            } else {
                let new: IpAddr = unique_loopback().into();
                let now = ClientApi::at(SocketAddr::new(new, port));
                stage.dns.address(&host, &[new]);
                now
            };
            let moved = Instant::now();
            former.http.refuse();
            wait_until("a restart where it is now", Duration::from_secs(8), || {
                now.count("restart", &delay_id) > 0
            });
            eprintln!("by its file {by_file}: a restart after {:?}", moved.elapsed());
            assert_eq!(now.count("send", &delay_id) + former.count("send", &delay_id), 0);
        }
    });
}

/// DNS does not answer for longer than an answer counts, and all connections are cut again and again: nobody who is there is
/// reported gone, and tokens are still given.
#[test]
fn nobody_is_reported_gone_while_dns_is_away() {
    const PARTICIPANTS: usize = 20;
    let home = Homeserver::start();
    let api = ClientApi::start();
    let (host, port) = (unique_name("away-api"), api.http.address().port());
    let stage = Stage::new(|setup| {
        setup
            .full_access(&[&home])
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &format!("{}=http://{host}:{port}", home.name))
    });
    stage.dns.ttl(2);
    stage.dns.address(&host, &[api.http.address().ip()]);
    let room = unique_room();
    let users: Vec<_> = (0..PARTICIPANTS)
        .map(|n| (format!("user{n}"), format!("syd_{}", unique())))
        .collect();
    for (user, delay_id) in &users {
        let body = bodies::delegate_of(&home, user, &room, delay_id, 6000);
        assert_eq!(stage.service.post("/delegate_delayed_leave", &body).status, 200);
        let identity = hashes::identity(&home.user(user), "DEVICE", "member1");
        let session = stage.sfu.join(&hashes::alias(&room, SLOT), &identity);
        webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session));
    }
    let restarted = |least: usize| users.iter().all(|(_, delay_id)| api.count("restart", delay_id) >= least);
    wait_until("everybody's first restart", Duration::from_secs(10), || restarted(1));
    for kind in [Kind::A, Kind::AAAA] {
        stage.dns.script(&host, kind, [Say::Silence]);
    }
    let asked = stage.dns.asked(&host, Kind::A);
    for round in 2..6 {
        api.http.refuse();
        api.http.listen_again();
        wait_until("everybody's next restart", Duration::from_secs(6), || restarted(round));
        let body = bodies::get_token_of(&home, "user0", &room);
        assert_eq!(stage.service.post("/get_token", &body).status, 200);
    }
    assert!(stage.dns.asked(&host, Kind::A) > asked, "DNS was asked, and did not answer");
    let sent: usize = users.iter().map(|(_, delay_id)| api.count("send", delay_id)).sum();
    assert_eq!(sent, 0, "of {PARTICIPANTS}");
}
