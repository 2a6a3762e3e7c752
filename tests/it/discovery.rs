//! Server discovery (decision O1, [the specification's
//! algorithm](https://spec.matrix.org/v1.16/server-server-api/#resolving-server-names)) on a real resolver and real
//! sockets. What counts is seen at the far end: who was dialled, with which `Host` header and which SNI, and that a
//! certificate for another name is not taken.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::ca::Ca;
use crate::support::client::{Answer, Call};
use crate::support::dns::{Dns, Kind, Say};
use crate::support::homeserver::{Homeserver, USERINFO, WELL_KNOWN};
use crate::support::neighbour::{Greeting, Neighbour, Reply, Request};
use crate::support::network::{Lost, in_own_network, own, replace_file, with_low_ports};
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;
use crate::support::{Shared, bodies, runtime, unique, unique_loopback, unique_room, wait_until};

const UNAUTHORISED: &str = "The request could not be authorised.";

/// A service with a DNS server of ours.
pub(crate) struct Stage {
    pub(crate) service: Service,
    pub(crate) dns: Dns,
    pub(crate) sfu: Sfu,
}

impl Stage {
    pub(crate) fn new(change: impl FnOnce(Setup) -> Setup) -> Self {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let service = change(dns.serving(Setup::new(&sfu))).start();
        Self { service, dns, sfu }
    }

    /// For all tests that need nothing special: their names differ.
    fn shared() -> Arc<Self> {
        static SHARED: Shared<Stage> = Shared::new();
        SHARED.get(|| Self::new(|setup| setup))
    }

    pub(crate) fn ask(&self, server: &str, token: &str) -> Answer {
        self.service.post("/sfu/get", &bodies::sfu_get(&unique_room(), server, token))
    }

    /// A user of `server` gets a token, because `far` vouched for it once, under this `Host` header and SNI.
    #[track_caller]
    pub(crate) fn reaches(&self, server: &str, far: &Homeserver, host: &str, sni: Option<&str>) -> Answer {
        let token = far.token_of(&format!("@alice:{server}"));
        let answer = self.ask(server, &token);
        assert_eq!(answer.status, 200, "{server}: {}", answer.text());
        let seen: Vec<_> = far.http.requests().into_iter().filter(|r| is_about(r, &token)).collect();
        let [request] = &seen[..] else {
            panic!("{server}: asked {} times about one token", seen.len());
        };
        assert_eq!(
            (request.header("host"), request.connection.sni()),
            (Some(host), sni),
            "Host and SNI for {server}"
        );
        assert_eq!((request.method.as_str(), request.header("referer")), ("GET", None));
        answer
    }

    /// Nobody vouches; answered like any unreachable homeserver, and the log names the cause and a remedy.
    #[track_caller]
    pub(crate) fn misses(&self, server: &str, log: &[&str]) -> Answer {
        let answer = self.ask(server, &crate::support::secrets::token());
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        assert_eq!(answer.field("reason"), "homeserver_unreachable", "{server}");
        let line = self.service.wait_line_of(&answer);
        line.says(&[&["could not be reached", "remedy", server], log].concat());
        eprintln!("{line}");
        answer
    }
}

fn is_about(request: &Request, token: &str) -> bool {
    request.path == USERINFO && request.query("access_token") == Some(token)
}

pub(crate) fn unique_name(label: &str) -> String {
    format!("{label}{}.example.org", unique())
}

/// A federation listener whose certificate is for `name`.
pub(crate) fn listener(at: impl Into<IpAddr>, port: u16, name: &str) -> Homeserver {
    Homeserver::builder().at(at, port).named(name).certified_for([name]).start()
}

/// The web server of `name`: port 443, with this well-known file.
pub(crate) fn web(at: impl Into<IpAddr>, name: &str, file: Reply) -> Homeserver {
    let web = listener(at, 443, name);
    web.answer_well_known(file);
    web
}

pub(crate) fn delegation(to: &str) -> Reply {
    Reply::json(200, &json!({ "m.server": to }))
}

pub(crate) fn v4(address: Ipv4Addr) -> IpAddr {
    address.into()
}

/// The file was fetched so often, and nothing else was asked there, least of all about a token.
#[track_caller]
fn assert_fetched(web: &Homeserver, times: usize) {
    let requests = web.http.requests();
    assert_eq!(requests.iter().filter(|r| r.path == WELL_KNOWN).count(), times);
    for request in &requests {
        assert_eq!((request.method.as_str(), request.path.as_str()), ("GET", WELL_KNOWN));
        assert!(request.query.is_empty() && request.header("referer").is_none(), "{request:?}");
        assert_eq!(request.header("host"), Some(web.name.as_str()));
        assert_eq!(request.connection.sni(), Some(web.name.as_str()));
    }
}

/// Steps 1 and 3.1.
#[test]
fn a_literal_address_is_dialled_as_it_stands() {
    in_own_network(|| {
        let stage = Stage::new(|setup| setup);
        let v4 = Ipv4Addr::new(5, 6, 7, 8);
        let v6: Ipv6Addr = "2a00:1::5".parse().expect("an address");
        own(v6.into());
        let decoys = [IpAddr::from(v4), v6.into()].map(|at| Homeserver::builder().at(at, 443).start());
        for (server, at, port) in [
            ("5.6.7.8", IpAddr::from(v4), 8448),
            ("5.6.7.8:8400", v4.into(), 8400),
            ("[2a00:1::5]", v6.into(), 8448),
            ("[2a00:1::5]:8400", v6.into(), 8400),
        ] {
            let far = Homeserver::builder().at(at, port).start();
            stage.reaches(server, &far, server, None);
            // The same by delegation: the header is the delegated name, and that is an address, too.
            let name = unique_name("to-literal");
            let web_at = unique_loopback();
            stage.dns.address(&name, &[web_at.into()]);
            let web = web(web_at, &name, delegation(server));
            stage.reaches(&name, &far, server, None);
            assert_fetched(&web, 1);
        }
        for decoy in &decoys {
            assert_eq!(decoy.http.connections().len(), 0, "a well-known file of an address was asked for");
        }
        // DNS was asked for the web servers' addresses, and for nothing else.
        let strange: Vec<_> = stage
            .dns
            .questions()
            .into_iter()
            .filter(|q| !q.name.starts_with("to-literal"))
            .collect();
        assert_eq!(strange, []);
        assert!(stage.dns.questions().iter().all(|q| q.kind != Kind::SRV));
    });
}

/// A certificate that is good for a name proves nothing about an address.
#[test]
fn a_literal_address_must_stand_in_the_certificate() {
    let stage = Stage::shared();
    let address = SocketAddr::new(unique_loopback().into(), 0);
    let far = Neighbour::start(address, Some(Ca::trusted().server(&["example.org".into()])), |_| {
        Reply::json(200, &json!({"sub": "@alice:example.org"}))
    });
    stage.misses(&far.address().to_string(), &["certificate"]);
    assert_eq!(far.requests().len(), 0, "a token was sent to a server that had not proven its name");
}

/// Step 2.
#[test]
fn a_port_in_the_name_skips_everything_else() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("with-port"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        stage.dns.srv(&format!("_matrix-fed._tcp.{name}"), &[(1, 1, 9999, &name)]);
        let decoy = web(at, &name, delegation("127.0.0.1:1"));
        let far = listener(at, 8449, &name);
        let server = format!("{name}:8449");
        stage.reaches(&server, &far, &server, Some(&name));
        assert_eq!(decoy.http.connections().len(), 0);
        assert!(
            stage
                .dns
                .questions()
                .iter()
                .all(|q| q.kind != Kind::SRV || !q.name.ends_with(&name))
        );
    });
}

/// Step 3 with all that can follow it.
#[test]
fn a_well_known_file_delegates() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let hosts = |file: &str| {
            let (name, at) = (unique_name("delegating"), unique_loopback());
            stage.dns.address(&name, &[v4(at)]);
            let web = web(at, &name, delegation(file));
            (name, web)
        };
        // To a name with a port: 3.2.
        let (delegated, at) = (unique_name("delegated"), unique_loopback());
        stage.dns.address(&delegated, &[v4(at)]);
        // Its own file is not asked for.
        let decoy = web(at, &delegated, delegation("127.0.0.1:1"));
        let far = listener(at, 8450, &delegated);
        let server = format!("{delegated}:8450");
        let (name, web_server) = hosts(&server);
        stage.reaches(&name, &far, &server, Some(&delegated));
        assert_fetched(&web_server, 1);
        assert_eq!(decoy.http.connections().len(), 0);
        // To a name alone: its SRV records, 3.3 and 3.4, header and certificate for the delegated name.
        for service in ["_matrix-fed._tcp", "_matrix._tcp"] {
            let (delegated, target, at) = (unique_name("delegated"), unique_name("target"), unique_loopback());
            stage.dns.address(&target, &[v4(at)]);
            stage.dns.srv(&format!("{service}.{delegated}"), &[(10, 5, 8451, &target)]);
            let far = listener(at, 8451, &delegated);
            let (name, web_server) = hosts(&delegated);
            stage.reaches(&name, &far, &delegated, Some(&delegated));
            assert_fetched(&web_server, 1);
            assert_eq!(stage.dns.asked(&format!("_matrix-fed._tcp.{name}"), Kind::SRV), 0);
        }
        // Without such records its port 8448: 3.5.
        let (delegated, at) = (unique_name("delegated"), unique_loopback());
        stage.dns.address(&delegated, &[v4(at)]);
        let far = listener(at, 8448, &delegated);
        let (name, web_server) = hosts(&delegated);
        stage.reaches(&name, &far, &delegated, Some(&delegated));
        assert_fetched(&web_server, 1);
    });
}

/// Steps 4 to 6.
#[test]
fn without_a_file_srv_records_lead_on_and_then_port_8448() {
    with_low_ports(|| {
        let stage = Stage::shared();
        for (service, also) in [("_matrix-fed._tcp", Some("_matrix._tcp")), ("_matrix._tcp", None)] {
            let (name, target, at) = (unique_name("by-srv"), unique_name("target"), unique_loopback());
            stage.dns.address(&target, &[v4(at)]);
            stage.dns.srv(&format!("{service}.{name}"), &[(10, 5, 8452, &target)]);
            if let Some(old) = also {
                stage.dns.srv(&format!("{old}.{name}"), &[(1, 5, 1, &target)]);
            }
            let far = listener(at, 8452, &name);
            stage.reaches(&name, &far, &name, Some(&name));
        }
        let (name, at) = (unique_name("plain"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let far = listener(at, 8448, &name);
        stage.reaches(&name, &far, &name, Some(&name));
        for service in ["_matrix-fed._tcp", "_matrix._tcp"] {
            assert!(stage.dns.asked(&format!("{service}.{name}"), Kind::SRV) >= 1);
        }
        // An alias is as good as an address.
        let (alias, at) = (unique_name("alias"), unique_loopback());
        let real = unique_name("real");
        stage.dns.cname(&alias, &real);
        stage.dns.address(&real, &[v4(at)]);
        let far = listener(at, 8448, &alias);
        stage.reaches(&alias, &far, &alias, Some(&alias));
    });
}

/// A failing `_matrix-fed` is no absent `_matrix-fed`: the deprecated service is left alone, port 8448 is tried.
#[test]
fn an_srv_question_that_fails_ends_at_port_8448() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("servfail"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        stage.dns.script(&format!("_matrix-fed._tcp.{name}"), Kind::SRV, [Say::Broken]);
        stage.dns.srv(&format!("_matrix._tcp.{name}"), &[(1, 1, 1, &name)]);
        let far = listener(at, 8448, &name);
        stage.reaches(&name, &far, &name, Some(&name));
    });
}

/// Somebody has the addresses of another homeserver's service looked up: that says nothing about its SRV record.
#[test]
fn an_address_question_does_not_answer_an_srv_question() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let [victim, target, evil] = ["victim", "target", "evil"].map(unique_name);
        let (service, at) = (format!("_matrix-fed._tcp.{victim}"), unique_loopback());
        stage.dns.address(&target, &[v4(at)]);
        stage.dns.srv(&service, &[(1, 1, 8452, &target)]);
        stage.dns.srv(&format!("_matrix-fed._tcp.{evil}"), &[(1, 1, 8448, &service)]);
        assert_ne!(stage.ask(&evil, "junk").status, 200);
        assert!(stage.dns.asked(&service, Kind::A) > 0, "{:?}", stage.dns.questions());
        let far = listener(at, 8452, &victim);
        stage.reaches(&victim, &far, &victim, Some(&victim));
    });
}

/// RFC 2782: the target `.` means that there is no such service.
#[test]
fn an_srv_record_can_deny_the_service() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("no-service"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        stage.dns.srv(&format!("_matrix-fed._tcp.{name}"), &[(0, 0, 0, ".")]);
        let far = listener(at, 8448, &name);
        stage.misses(&name, &["SRV record"]);
        assert_eq!(far.http.connections().len(), 0);
    });
}

/// A long answer that comes over TCP only, with more targets than anybody needs.
#[test]
fn an_answer_that_does_not_fit_is_asked_for_over_tcp() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("cut"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let Say::Records(address) = Say::at(at.into()) else {
            unreachable!()
        };
        stage.dns.script(&name, Kind::A, [Say::Cut(address)]);
        let far = listener(at, 8448, &name);
        stage.reaches(&name, &far, &name, Some(&name));
        assert!(stage.dns.questions().iter().any(|q| q.name == name && q.tcp));
    });
}

/// Whatever is wrong with the file, the next steps are taken.
#[test]
fn a_file_of_no_use_is_passed_over() {
    with_low_ports(|| {
        let padded = |length: usize| {
            let body = r#"{"m.server":"127.0.0.1:1","x":""#.to_owned();
            let body = body.clone() + &" ".repeat(length - body.len() - 2) + "\"}";
            Reply::text(200, "application/json", &body)
        };
        let cases: Vec<(&str, Reply)> = vec![
            ("404", Reply::text(404, "application/json", r#"{"m.server":"127.0.0.1:1"}"#)),
            ("500", Reply::text(500, "application/json", r#"{"m.server":"127.0.0.1:1"}"#)),
            ("201", Reply::text(201, "application/json", r#"{"m.server":"127.0.0.1:1"}"#)),
            ("a page", Reply::text(200, "text/html", "<html>Welcome to nginx!</html>")),
            ("an array", Reply::json(200, &json!(["m.server", "127.0.0.1:1"]))),
            ("no member", Reply::json(200, &json!({"m.homeserver": "127.0.0.1:1"}))),
            ("a number", Reply::json(200, &json!({"m.server": 1}))),
            (
                "cut off",
                Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"m.server\":\"127.0.0.1:1\"}".to_vec()),
            ),
            ("too large", padded(51_201)),
            ("endless", Reply::Flood(100 << 20)),
            ("no HTTP", Reply::Raw(b"SSH-2.0-OpenSSH_9.9\r\n".to_vec())),
            ("closes", Reply::Close),
            ("hangs", Reply::Hang),
            ("stalls", Reply::Stall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{".to_vec())),
            ("nowhere", Reply::text(302, "text/plain", "")),
            ("to http", Reply::redirect(301, "http://127.0.0.1:1/.well-known/matrix/server")),
            ("to ftp", Reply::redirect(301, "ftp://example.org/")),
            ("to nonsense", Reply::redirect(301, "https://")),
        ];
        let stage = Stage::shared();
        std::thread::scope(|scope| {
            for (case, file) in cases {
                let stage = &stage;
                scope.spawn(move || {
                    let (name, at) = (unique_name("useless"), unique_loopback());
                    stage.dns.address(&name, &[v4(at)]);
                    let web = web(at, &name, file);
                    let far = listener(at, 8448, &name);
                    let answer = stage.reaches(&name, &far, &name, Some(&name));
                    assert_fetched(&web, 1);
                    eprintln!("well-known file that is {case}: reached after {:.1?}", answer.took);
                });
            }
            // The same without a word of HTTP.
            for greeting in [Greeting::Silence, Greeting::Close] {
                let stage = &stage;
                scope.spawn(move || {
                    let (name, at) = (unique_name("useless"), unique_loopback());
                    stage.dns.address(&name, &[v4(at)]);
                    let web = web(at, &name, delegation("127.0.0.1:1"));
                    web.http.greet(greeting);
                    let far = listener(at, 8448, &name);
                    stage.reaches(&name, &far, &name, Some(&name));
                });
            }
            // A certificate of another name, of an unknown authority, and packets that get lost.
            for which in 0..3 {
                let stage = &stage;
                scope.spawn(move || {
                    let (name, at) = (unique_name("useless"), unique_loopback());
                    stage.dns.address(&name, &[v4(at)]);
                    let other = Homeserver::builder().at(at, 443);
                    let _web = match which {
                        0 => Some(other.certified_for(["example.com"]).start()),
                        1 => Some(other.certified_for([name.as_str()]).signed_by(Ca::untrusted()).start()),
                        _ => None,
                    };
                    let _lost = _web.is_none().then(|| Lost::at(SocketAddr::new(at.into(), 443)));
                    let far = listener(at, 8448, &name);
                    stage.reaches(&name, &far, &name, Some(&name));
                    if let Some(web) = _web {
                        assert_eq!(web.http.requests().len(), 0);
                    }
                });
            }
            // As large as it may be.
            scope.spawn(|| {
                let (name, at) = (unique_name("large"), unique_loopback());
                stage.dns.address(&name, &[v4(at)]);
                let far = Homeserver::builder().at(at, 0).start();
                let start = format!(r#"{{"m.server":"{}","x":""#, far.name);
                let file = start.clone() + &" ".repeat(51_200 - start.len() - 2) + "\"}";
                let _web = web(at, &name, Reply::text(200, "text/plain", &file));
                stage.reaches(&name, &far, &far.name, None);
            });
        });
    });
}

/// A file that is there and names something impossible ends the search.
#[test]
fn a_delegation_to_nonsense_is_not_passed_over() {
    with_low_ports(|| {
        let stage = Stage::shared();
        for nonsense in [
            "",
            "https://matrix.example.org",
            "matrix.example.org/",
            "a b",
            "::1",
            "x:99999",
            "x_y.example.org",
        ] {
            let (name, at) = (unique_name("nonsense"), unique_loopback());
            stage.dns.address(&name, &[v4(at)]);
            let web = web(at, &name, delegation(nonsense));
            let far = listener(at, 8448, &name);
            stage.misses(&name, &["m.server", "well-known"]);
            assert_fetched(&web, 1);
            assert_eq!(far.http.connections().len(), 0, "{nonsense:?}");
        }
    });
}

/// Up to five redirects, to other paths, ports and hosts, https only.
#[test]
fn redirects_of_the_file_are_followed_five_times() {
    with_low_ports(|| {
        let stage = Stage::shared();
        for (hops, status) in [(1, 301), (2, 302), (3, 303), (4, 307), (5, 308), (6, 302)] {
            let far = Homeserver::start();
            let (name, at) = (unique_name("redirecting"), unique_loopback());
            stage.dns.address(&name, &[v4(at)]);
            // Each hop on a host and a port of its own, built from the last.
            let mut next = delegation(&far.name);
            let mut chain = Vec::new();
            for hop in (1..=hops).rev() {
                let (host, hop_at) = (unique_name("hop"), unique_loopback());
                stage.dns.address(&host, &[v4(hop_at)]);
                let port = if hop % 2 == 0 { 443 } else { 4443 };
                let authority = if port == 443 { host.clone() } else { format!("{host}:{port}") };
                let reply = next.clone();
                let file = format!("/hop/{hop}?of={hops}&x=%20y");
                let served = Neighbour::start(
                    SocketAddr::new(hop_at.into(), port),
                    Some(Ca::trusted().server(std::slice::from_ref(&host))),
                    move |_| reply.clone(),
                );
                next = Reply::redirect(status, &format!("https://{authority}{file}#fragment"));
                chain.push((served, authority, host, format!("/hop/{hop}")));
            }
            let web = web(at, &name, next);
            if hops <= 5 {
                stage.reaches(&name, &far, &far.name, None);
            } else {
                let fallback = listener(at, 8448, &name);
                stage.reaches(&name, &fallback, &name, Some(&name));
                assert_eq!(chain.remove(0).0.connections().len(), 0, "the sixth redirect was followed");
            }
            assert_fetched(&web, 1);
            for (served, authority, host, path) in &chain {
                let [request] = &served.requests()[..] else {
                    panic!("{} requests at {authority}", served.requests().len());
                };
                assert_eq!(request.header("host"), Some(authority.as_str()));
                assert_eq!(request.connection.sni(), Some(host.as_str()));
                assert_eq!(request.path, *path);
                assert_eq!(request.query, [("of".to_owned(), hops.to_string()), ("x".into(), " y".into())]);
                assert_eq!(request.header("referer"), None);
            }
        }
        // A path alone.
        let far = Homeserver::start();
        let (name, at) = (unique_name("relative"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let delegated = far.name.clone();
        let certificate = Ca::trusted().server(std::slice::from_ref(&name));
        let _web = Neighbour::start(SocketAddr::new(at.into(), 443), Some(certificate), move |request| {
            if request.path == "/elsewhere" {
                delegation(&delegated)
            } else {
                Reply::redirect(302, "/elsewhere")
            }
        });
        stage.reaches(&name, &far, &far.name, None);
    });
}

/// Not even where the plain port answers.
#[test]
fn a_redirect_of_the_file_to_http_is_not_followed() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("to-http"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let plain = Neighbour::start(SocketAddr::new(at.into(), 80), None, |_| delegation("127.0.0.1:1"));
        let _web = web(at, &name, Reply::redirect(301, &format!("http://{name}/.well-known/matrix/server")));
        let far = listener(at, 8448, &name);
        stage.reaches(&name, &far, &name, Some(&name));
        assert_eq!(plain.connections().len(), 0);
    });
}

/// Priorities strictly, weights within one as shares.
#[test]
fn srv_targets_are_taken_by_priority_and_weight() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let names: Vec<_> = (0..40).map(|n| format!("n{n}.{}", unique_name("weighted"))).collect();
        let at = [unique_loopback(), unique_loopback(), unique_loopback()];
        let targets: Vec<_> = at
            .iter()
            .map(|at| {
                let target = unique_name("target");
                stage.dns.address(&target, &[v4(*at)]);
                target
            })
            .collect();
        let far: Vec<_> = at
            .iter()
            .map(|at| {
                Homeserver::builder()
                    .at(*at, 8453)
                    .certified_for(names.iter().map(String::as_str))
                    .start()
            })
            .collect();
        for name in &names {
            let [heavy, light, backup] = &targets[..] else { unreachable!() };
            let records = [(20, 100, 8453, backup.as_str()), (10, 1, 8453, light), (10, 99, 8453, heavy)];
            stage.dns.srv(&format!("_matrix-fed._tcp.{name}"), &records);
            let sub = json!({"sub": format!("@alice:{name}")});
            far.iter().for_each(|f| f.answer_userinfo(Some(Reply::json(200, &sub))));
            let answer = stage.ask(name, &crate::support::secrets::token());
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        let asked: Vec<_> = far.iter().map(Homeserver::asked).collect();
        eprintln!("SRV targets of 10/99, 10/1, 20/100: {asked:?}");
        // The odds that a fair draw fails here are below one in 10^12.
        assert!(asked[0] >= 30 && asked[2] == 0, "{asked:?}");
    });
}

/// A dead first target leaves enough of the ten seconds for the second.
#[test]
fn a_dead_srv_target_is_followed_by_the_next() {
    with_low_ports(|| {
        enum Dead {
            Refuses,
            NoName,
            NoAddress,
            BreaksTls,
            ClosesAtOnce,
            HangsInTls,
            LosesPackets,
            WrongName,
        }
        let cases = [
            ("refuses", Dead::Refuses),
            ("does not exist", Dead::NoName),
            ("has no address", Dead::NoAddress),
            ("breaks TLS", Dead::BreaksTls),
            ("closes", Dead::ClosesAtOnce),
            ("hangs in TLS", Dead::HangsInTls),
            ("loses packets", Dead::LosesPackets),
            ("has the certificate of the target", Dead::WrongName),
        ];
        // Its own: two wait for four of their ten seconds, and must not stand behind what other tests have in the air.
        let stage = Stage::new(|setup| setup);
        std::thread::scope(|scope| {
            for (case, dead) in cases {
                let stage = &stage;
                scope.spawn(move || {
                    let name = unique_name("first-dead");
                    let (first, first_at) = (unique_name("first"), unique_loopback());
                    let (second, second_at) = (unique_name("second"), unique_loopback());
                    stage.dns.address(&first, &[v4(first_at)]);
                    stage.dns.address(&second, &[v4(second_at)]);
                    stage
                        .dns
                        .srv(&format!("_matrix-fed._tcp.{name}"), &[(1, 1, 8454, &first), (2, 1, 8454, &second)]);
                    let address = SocketAddr::new(first_at.into(), 8454);
                    let greeting = |greeting| {
                        let far = Neighbour::start(address, None, |_| Reply::Close);
                        far.greet(greeting);
                        Some(far)
                    };
                    let (mut lost, mut wrong) = (None, None);
                    let _first = match dead {
                        Dead::Refuses => None,
                        Dead::NoName => {
                            stage.dns.script(&first, Kind::A, [Say::NoName]);
                            None
                        }
                        Dead::NoAddress => {
                            stage.dns.script(&first, Kind::A, [Say::Records(vec![])]);
                            None
                        }
                        Dead::BreaksTls => {
                            speak_first(address);
                            None
                        }
                        Dead::ClosesAtOnce => greeting(Greeting::Close),
                        Dead::HangsInTls => greeting(Greeting::Silence),
                        Dead::LosesPackets => {
                            lost = Some(Lost::at(address));
                            None
                        }
                        Dead::WrongName => {
                            wrong = Some(listener(first_at, 8454, &first));
                            None
                        }
                    };
                    let far = listener(second_at, 8454, &name);
                    let answer = stage.reaches(&name, &far, &name, Some(&name));
                    eprintln!("first target {case}: reached after {:.1?}", answer.took);
                    assert!(answer.took < Duration::from_secs(9), "{case}: {:?}", answer.took);
                    if let Some(wrong) = wrong {
                        assert_eq!(wrong.http.requests().len(), 0);
                    }
                    drop(lost);
                });
            }
        });
    });
}

/// Listens, and answers whatever comes in plain text, at once.
fn speak_first(address: SocketAddr) {
    let listener = runtime().block_on(tokio::net::TcpListener::bind(address)).expect("a port");
    runtime().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
        }
    });
}

#[test]
fn targets_of_either_family_are_reached() {
    in_own_network(|| {
        let stage = Stage::new(|setup| setup.unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS"));
        let (six, four) = ("2a00:2::1", "8.7.6.5");
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let cases: [(&str, &[&str], &str); 5] = [
            ("IPv6 only", &[six], six),
            ("IPv4 only", &[four], four),
            ("both alive", &[six, four], six),
            ("IPv6 refuses", &["2a00:2::dead", four], four),
            ("IPv6 loses packets", &["2a00:2::10", four], four),
        ];
        [six, "2a00:2::10"].iter().for_each(|address| own(ip(address)));
        let _lost = [443, 8448].map(|port| Lost::at(SocketAddr::new(ip("2a00:2::10"), port)));
        let mut names: Vec<_> = (0..2 * cases.len()).map(|_| unique_name("family")).collect();
        let far = [(six, 8448), (four, 8448), (four, 443)].map(|(at, port)| {
            let builder = Homeserver::builder().at(ip(at), port);
            builder.certified_for(names.iter().map(String::as_str)).start()
        });
        for (case, addresses, expected) in cases {
            for by_srv in [false, true] {
                let name = names.pop().expect("enough of them");
                let addresses: Vec<_> = addresses.iter().map(|a| ip(a)).collect();
                if by_srv {
                    let target = unique_name("target");
                    stage.dns.address(&target, &addresses);
                    stage.dns.srv(&format!("_matrix-fed._tcp.{name}"), &[(1, 1, 8448, &target)]);
                } else {
                    stage.dns.address(&name, &addresses);
                }
                let far = if expected == six { &far[0] } else { &far[1] };
                let answer = stage.reaches(&name, far, &name, Some(&name));
                eprintln!("{case}, by SRV {by_srv}: reached after {:.1?}", answer.took);
                assert!(answer.took < Duration::from_secs(4), "{case}: {:?}", answer.took);
            }
        }
    });
}

/// Name servers that drop questions for IPv6 addresses, or answer them with an error, exist (RFC 4074).
#[test]
fn a_name_server_without_ipv6_manners_is_no_obstacle() {
    with_low_ports(|| {
        let stage = Stage::shared();
        std::thread::scope(|scope| {
            for said in [Say::Silence, Say::Broken, Say::NoName] {
                let stage = &stage;
                scope.spawn(move || {
                    let (name, at) = (unique_name("aaaa"), unique_loopback());
                    stage.dns.address(&name, &[v4(at)]);
                    stage.dns.script(&name, Kind::AAAA, [said.clone()]);
                    let far = listener(at, 8448, &name);
                    let answer = stage.reaches(&name, &far, &name, Some(&name));
                    eprintln!("AAAA {said:?}: reached after {:.1?}", answer.took);
                });
            }
        });
    });
}

/// `/etc/hosts`, and the name server and the search list of `/etc/resolv.conf`.
#[test]
fn the_settings_of_the_system_are_honoured() {
    in_own_network(|| {
        let at = [unique_loopback(), unique_loopback()];
        replace_file("/etc/hosts", &format!("{} in-hosts.example.org\n", at[0]));
        replace_file("/etc/resolv.conf", "nameserver 127.0.0.53\nsearch corp.example.org\n");
        let sfu = Sfu::start();
        let dns = Dns::at(SocketAddr::from(([127, 0, 0, 53], 53)));
        dns.address("short.corp.example.org", &[v4(at[1])]);
        let stage = Stage {
            service: Setup::new(&sfu).start(),
            dns,
            sfu,
        };
        let far = listener(at[0], 8448, "in-hosts.example.org");
        stage.reaches("in-hosts.example.org", &far, "in-hosts.example.org", Some("in-hosts.example.org"));
        assert_eq!(stage.dns.asked("in-hosts.example.org", Kind::A), 0);
        let far = listener(at[1], 8448, "short");
        stage.reaches("short", &far, "short", Some("short"));
        // A search list must not lead one server's name to another's services.
        let questions = stage.dns.questions();
        let strange: Vec<_> = questions
            .iter()
            .filter(|q| q.kind == Kind::SRV && q.name.contains("corp"))
            .collect();
        assert!(strange.is_empty(), "{strange:?}");
    });
}

#[test]
fn a_certificate_of_another_name_is_refused() {
    with_low_ports(|| {
        let stage = Stage::shared();
        // The delegated name counts, not the first one.
        let (name, delegated) = (unique_name("name"), unique_name("delegated"));
        let (at, delegated_at) = (unique_loopback(), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        stage.dns.address(&delegated, &[v4(delegated_at)]);
        let _web = web(at, &name, delegation(&delegated));
        let wrong = listener(delegated_at, 8448, &name);
        stage.misses(&name, &["certificate", "another name"]);
        // The first name counts, not the SRV target.
        let (by_srv, target, target_at) = (unique_name("by-srv"), unique_name("target"), unique_loopback());
        stage.dns.address(&target, &[v4(target_at)]);
        stage.dns.srv(&format!("_matrix-fed._tcp.{by_srv}"), &[(1, 1, 8448, &target)]);
        let of_target = listener(target_at, 8448, &target);
        stage.misses(&by_srv, &["certificate"]);
        // An authority that nobody knows.
        let (unknown, unknown_at) = (unique_name("unknown"), unique_loopback());
        stage.dns.address(&unknown, &[v4(unknown_at)]);
        let self_made = Homeserver::builder()
            .at(unknown_at, 8448)
            .certified_for([unknown.as_str()])
            .signed_by(Ca::untrusted())
            .start();
        stage.misses(&unknown, &["certificate"]);
        for far in [&wrong, &of_target, &self_made] {
            assert_eq!(
                far.http.requests().len(),
                0,
                "a token was sent to a server that had not proven its name"
            );
        }
    });
}

/// A delegation holds for an hour at least, a missing file for some seconds.
#[test]
fn the_file_is_remembered_while_it_is_good() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let far = Homeserver::start();
        let (name, at) = (unique_name("remembered"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let Reply::Answer { status, mut headers, body } = delegation(&far.name) else {
            unreachable!()
        };
        headers.push(("Cache-Control".into(), "max-age=0".into()));
        let web_server = web(at, &name, Reply::Answer { status, headers, body });
        let (absent, absent_at) = (unique_name("absent"), unique_loopback());
        stage.dns.address(&absent, &[v4(absent_at)]);
        let no_file = listener(absent_at, 443, &absent);
        let plain = listener(absent_at, 8448, &absent);
        let began = Instant::now();
        // Twice: a homeserver that verified a token is known from then on, and the stranger's notes do not count.
        while no_file.http.count(|r| r.path == WELL_KNOWN) < 3 {
            stage.reaches(&name, &far, &far.name, None);
            stage.reaches(&absent, &plain, &absent, Some(&absent));
            assert!(began.elapsed() < Duration::from_secs(60), "a missing file was not asked for again");
            std::thread::sleep(Duration::from_millis(100));
        }
        let again = began.elapsed();
        eprintln!("a missing file was asked for again after {again:.1?}");
        assert!(again > Duration::from_secs(8), "a missing file was asked for again after {again:?}");
        let fetched = web_server.http.count(|r| r.path == WELL_KNOWN);
        assert!(fetched <= 2, "the file was fetched {fetched} times in {again:?}");
    });
}

/// An operator moves a homeserver: the delegation appears while a request is held.
#[test]
fn a_retry_asks_for_the_file_again() {
    with_low_ports(|| {
        let (name, at) = (unique_name("moved"), unique_loopback());
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
        stage.dns.address(&name, &[v4(at)]);
        let web_server = listener(at, 443, &name);
        let far = Homeserver::start();
        let token = far.token_of(&format!("@alice:{name}"));
        let request = stage
            .service
            .begin(&Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &name, &token)));
        wait_until("the missing file to be asked for", Duration::from_secs(5), || {
            web_server.http.count(|r| r.path == WELL_KNOWN) == 1
        });
        web_server.answer_well_known(delegation(&far.name));
        let answer = request.join().expect("the request").expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(far.asked(), 1);
    });
}

#[test]
fn overrides_replace_discovery() {
    with_low_ports(|| {
        let names = ["bare", "based", "plain", "named"].map(unique_name);
        // Answers below one base path, at the usual port.
        let target = |base: &'static str, tls: bool| {
            let address = SocketAddr::new(unique_loopback().into(), if tls { 443 } else { 80 });
            let certificate = tls.then(|| Ca::trusted().server(&[address.ip().to_string(), "hs.internal".into()]));
            Neighbour::start(address, certificate, move |request| {
                let user = request.query("access_token").map(owner);
                if request.path == format!("{base}{USERINFO}") {
                    Reply::json(200, &json!({"sub": user}))
                } else {
                    Reply::json(404, &json!({}))
                }
            })
        };
        let (https, based, plain) = (target("", true), target("/base/path", true), target("", false));
        let ip = |far: &Neighbour| far.address().ip();
        let overrides = [
            // No scheme means https.
            format!("{}={}", names[0], ip(&https)),
            format!("{}=https://{}:443/base/path/", names[1], ip(&based)),
            format!("{}=http://{}", names[2], ip(&plain)),
            format!("{}=https://hs.internal", names[3]),
            format!("{}:1234=https://{}", names[0], ip(&https)),
        ];
        // Private addresses need no leave here: the operator wrote them down.
        let stage = Stage::new(|setup| {
            setup
                .env("LIVEKIT_FEDERATION_URL_OVERRIDES", &overrides.join(","))
                .unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS")
        });
        stage.dns.address("hs.internal", &[ip(&https)]);
        for (name, far, host, sni) in [
            (names[0].as_str(), &https, ip(&https).to_string(), None),
            (&names[1], &based, ip(&based).to_string(), None),
            (&names[2], &plain, ip(&plain).to_string(), None),
            (&names[3], &https, "hs.internal".into(), Some("hs.internal")),
            (&format!("{}:1234", names[0]), &https, ip(&https).to_string(), None),
        ] {
            let token = token_of(&format!("@alice:{name}"));
            let answer = stage.ask(name, &token);
            assert_eq!(answer.status, 200, "{name}: {}", answer.text());
            let seen: Vec<_> = far
                .requests()
                .into_iter()
                .filter(|r| r.query("access_token") == Some(&token))
                .collect();
            let [request] = &seen[..] else {
                panic!("{name}: asked {} times", seen.len());
            };
            assert_eq!(
                (request.header("host"), request.connection.sni()),
                (Some(host.as_str()), sni),
                "{name}"
            );
        }
        let questions = stage.dns.questions();
        assert!(questions.iter().all(|q| q.name == "hs.internal"), "{questions:?}");
    });
}

/// A token that says whose it is, for fakes that know no table.
fn token_of(user: &str) -> String {
    format!("{}|{user}", crate::support::secrets::token())
}

fn owner(token: &str) -> String {
    token.split_once('|').map_or("", |(_, user)| user).to_owned()
}

/// An authority that was asked for, with the credentials that came along.
type Tunnel = (String, Option<String>);

/// A forward proxy that opens tunnels (`CONNECT`) to where it knows the way.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Tunnel>>>,
}

impl Proxy {
    /// Knows these authorities, and refuses all others.
    pub(crate) fn start(ways: Vec<(String, SocketAddr)>) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let tell = seen.clone();
        let listener = runtime()
            .block_on(tokio::net::TcpListener::bind((unique_loopback(), 0)))
            .expect("a port");
        let address = listener.local_addr().expect("address");
        runtime().spawn(async move {
            while let Ok((mut inner, _)) = listener.accept().await {
                let (ways, tell) = (ways.clone(), tell.clone());
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(inner.read_u8().await.ok()?);
                    }
                    let head = String::from_utf8_lossy(&head).into_owned();
                    let target = head.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
                    let authorization = head.lines().find_map(|l| {
                        l.to_ascii_lowercase()
                            .starts_with("proxy-authorization:")
                            .then(|| l[20..].trim().to_owned())
                    });
                    tell.lock().unwrap().push((target.clone(), authorization));
                    let Some((_, way)) = ways.iter().find(|(authority, _)| *authority == target) else {
                        return inner.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").await.ok();
                    };
                    let mut outer = tokio::net::TcpStream::connect(way).await.ok()?;
                    inner.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.ok()?;
                    tokio::io::copy_bidirectional(&mut inner, &mut outer).await.ok().map(|_| ())
                });
            }
        });
        Self { address, seen }
    }

    pub(crate) fn seen(&self) -> Vec<Tunnel> {
        self.seen.lock().unwrap().clone()
    }

    fn targets(&self) -> Vec<String> {
        self.seen().into_iter().map(|(target, _)| target).collect()
    }
}

/// Decision P11: what goes through a proxy is dialled by it, what is refused here is refused all the same.
#[test]
fn a_forward_proxy_is_used_for_homeservers() {
    with_low_ports(|| {
        let (name, direct, gone) = (unique_name("proxied"), unique_name("direct"), unique_name("nowhere"));
        let (at, direct_at) = (unique_loopback(), unique_loopback());
        let far = listener(at, 8448, &name);
        let web_server = web(at, &name, delegation(&format!("{name}:8448")));
        let near = listener(direct_at, 8448, &direct);
        let way = |host: &str, to: &Homeserver| (host.to_owned(), to.http.address());
        let proxy = Proxy::start(vec![way(&format!("{name}:443"), &web_server), way(&format!("{name}:8448"), &far)]);
        let stage = Stage::new(|setup| {
            setup
                .env("HTTPS_PROXY", &format!("http://user:passNEVER@{}", proxy.address))
                .env("NO_PROXY", &format!("{direct},10.0.0.0/8"))
                .secret("passNEVER")
        });
        stage.service.wait_event("forward_proxy");
        // Only the proxy can resolve the name.
        stage.reaches(&name, &far, &format!("{name}:8448"), Some(&name));
        assert_fetched(&web_server, 1);
        assert_eq!(proxy.targets(), [format!("{name}:443"), format!("{name}:8448")]);
        let expected = "Basic dXNlcjpwYXNzTkVWRVI=";
        assert!(
            proxy.seen().iter().all(|(_, auth)| auth.as_deref() == Some(expected)),
            "{:?}",
            proxy.seen()
        );
        // Named in NO_PROXY.
        stage.dns.address(&direct, &[v4(direct_at)]);
        stage.reaches(&direct, &near, &direct, Some(&direct));
        assert_eq!(proxy.seen().len(), 2);
        // A proxy that says no.
        stage.misses(&gone, &["proxy", "HTTPS_PROXY"]);
        let asked = proxy.seen().len();
        // What must not be dialled is not asked of a proxy either.
        let metadata = unique_name("metadata");
        stage.dns.address(&metadata, &["169.254.169.254".parse().expect("an address")]);
        // The proxy would take any of them.
        let among_others = unique_name("among-others");
        stage.dns.address(
            &among_others,
            &[v4(at), "169.254.169.254".parse().expect("an address"), v4(direct_at)],
        );
        for server in [
            "169.254.169.254",
            "[fe80::1]:443",
            "0.0.0.0",
            &metadata,
            &format!("{metadata}:8448"),
            &among_others,
            &format!("{among_others}:8448"),
        ] {
            stage.misses(server, &["never dialled"]);
        }
        // Nor what the proxy would take for such an address, and we for a name.
        for server in ["0x7f000001:6443", "169.254.0xa9fe", "127.1:6443", "2130706433"] {
            stage.misses(server, &[]);
        }
        assert_eq!(proxy.seen().len(), asked, "{:?}", proxy.seen());
    });
}

/// A redirect of userinfo would carry the token to another host.
#[test]
fn a_redirect_of_userinfo_is_not_followed() {
    let stage = Stage::shared();
    let target = Homeserver::start();
    for status in [301, 302, 303, 307, 308] {
        let far = Homeserver::start();
        let to = format!("https://{}{USERINFO}?access_token=x", target.name);
        let token = far.token_with(Reply::redirect(status, &to));
        let answer = stage.ask(&far.name, &token);
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        let line = stage.service.wait_line_of(&answer);
        line.says(&["unusable", &far.name, &status.to_string()]);
        assert_eq!(far.asked_about(&token), 1);
    }
    assert_eq!(target.http.connections().len(), 0, "the redirect was followed");
}

#[test]
fn fifty_requests_share_a_few_connections() {
    with_low_ports(|| {
        let stage = Stage::shared();
        let (name, at) = (unique_name("kept"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let far = listener(at, 8448, &name);
        for _ in 0..50 {
            stage.reaches(&name, &far, &name, Some(&name));
        }
        let connections = far.http.connections().len();
        eprintln!("50 requests one after the other: {connections} connections");
        assert!(connections <= 3, "{connections} connections");
        let calls: Vec<_> = (0..200)
            .map(|n| {
                let token = far.token_of(&format!("@user{n}:{name}"));
                Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &name, &token))
            })
            .collect();
        let answers = stage.service.flood(&calls, 50);
        assert!(answers.iter().all(|a| a.status == 200));
        let more = far.http.connections().len() - connections;
        eprintln!("200 requests, 50 at a time: {more} more connections");
        // At most 32 at a time; while one is being made, another one may become free for its request. A machine that is
        // busy with other tests makes more of them in vain.
        assert!(more <= 100, "{more} connections");
    });
}

/// What a homeserver says is read up to a bound.
#[test]
fn a_userinfo_answer_is_read_up_to_64_kib() {
    let stage = Stage::shared();
    let far = Homeserver::start();
    let padded = |length: usize| {
        let start = format!(r#"{{"sub":"@alice:{}","x":""#, far.name);
        Reply::text(
            200,
            "application/json",
            &(start.clone() + &" ".repeat(length - start.len() - 2) + "\"}"),
        )
    };
    let answer = stage.ask(&far.name, &far.token_with(padded(65_536)));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let before = stage.service.rss_kib();
    for reply in [padded(65_537), padded(10 << 20), Reply::Flood(1 << 30)] {
        let answer = stage.ask(&far.name, &far.token_with(reply));
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        let line = stage.service.wait_line_of(&answer);
        line.says(&["could not be reached", &far.name, "larger than"]);
    }
    let grown = stage.service.rss_kib().saturating_sub(before);
    assert!(grown < 16 * 1024, "memory grew by {grown} KiB");
    let body: Value = stage.ask(&far.name, &far.token("bob")).json();
    assert!(body["jwt"].is_string(), "{body}");
}
