//! The guard (decision O5): which addresses are never dialled, whichever way a stranger leads there.
//!
//! Every test runs in a network of its own in which any address can be dialled and listened on, and in which the kernel
//! counts the connections that were begun: that count, not a listener, proves that no packet was sent. The service runs
//! as it comes: loopback is not allowed here.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::ca::Ca;
use crate::support::client::{Answer, Call, Connection};
use crate::support::dns::{Dns, Kind, Say};
use crate::support::homeserver::{Homeserver, WELL_KNOWN};
use crate::support::neighbour::{Neighbour, Reply};
use crate::support::network::{connections_begun, in_own_network, own};
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;
use crate::support::{bodies, secrets, unique, unique_room, wait_until};

/// Loopback, private, unique-local, carrier-NAT, and what carries such an address.
const PRIVATE: [&str; 27] = [
    "127.0.0.1",
    "127.0.0.53",
    "127.255.255.254",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "192.168.255.255",
    "100.64.0.1",
    "100.127.255.255",
    "::1",
    "fc00::1",
    "fd00::1",
    "fdff:ffff::1",
    // Mapped, compatible.
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "::192.168.0.1",
    // NAT64.
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "64:ff9b:1::c0a8:1",
    "64:ff9b:1:a00:0:100::",
    // 6to4.
    "2002:7f00:1::1",
    "2002:c0a8:1::1",
    // Teredo: the server, the client (with its bits flipped).
    "2001:0:a00:1::fefe:fefe",
    "2001:0:808:808::f5ff:fffe",
];

/// Unspecified, link-local, multicast, broadcast, documentation, reserved, and what carries such an address.
const NEVER: [&str; 45] = [
    "0.0.0.0",
    "0.0.0.1",
    "0.255.255.255",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.254",
    "255.255.255.255",
    "::",
    "fe80::1",
    "fe80::a9fe:a9fe",
    "febf::1",
    "fec0::1",
    "ff00::1",
    "ff02::1",
    "ff0e::1",
    "100::1",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "a000::1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "::ffff:255.255.255.255",
    "::169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1:a9fe:a9:fe00::",
    "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::fefe:fefe",
    "2001:0:808:808::5601:5601",
];

/// Addresses that anybody may have.
const PUBLIC: [&str; 9] = [
    "1.1.1.1",
    "9.255.255.255",
    "172.32.0.1",
    "100.128.0.1",
    "192.167.0.1",
    "2606:4700::1111",
    "2a00::1",
    "::ffff:1.1.2.1",
    "64:ff9b::101:301",
];

/// A service and a DNS server.
struct Stage {
    service: Service,
    dns: Dns,
    sfu: Sfu,
    /// Kept, so that asking begins no connection.
    client: Connection,
    /// Bodies are compared with this one.
    unreachable: serde_json::Value,
}

impl Stage {
    fn new(change: impl FnOnce(Setup) -> Setup) -> Self {
        let (sfu, dns) = (Sfu::start(), Dns::start());
        let setup = dns.serving(Setup::new(&sfu)).unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS");
        let service = change(setup).start();
        let client = Connection::open(service.address()).expect("a connection");
        let mut stage = Self {
            service,
            dns,
            sfu,
            client,
            unreachable: json!(null),
        };
        // A public address where nobody listens.
        stage.dns.address("gone.example.org", &[v4(7, 7, 7, 7)]);
        stage.unreachable = without_id(&stage.ask("gone.example.org"));
        assert_eq!(stage.unreachable["reason"], "homeserver_unreachable");
        stage
    }

    /// On the kept connection.
    fn ask(&mut self, server: &str) -> Answer {
        self.ask_with(server, &secrets::token())
    }

    fn ask_with(&mut self, server: &str, token: &str) -> Answer {
        ask_on(&self.service, &mut self.client, server, token)
    }

    /// Refused at once and looking like any other failure, after `begun` connections to elsewhere.
    #[track_caller]
    fn refuses(&mut self, server: &str, begun: u64) {
        let before = connections_begun();
        let answer = self.ask(server);
        self.assert_refused(server, &answer);
        assert_eq!(connections_begun() - before, begun, "{server}: somebody was dialled");
    }

    #[track_caller]
    fn assert_refused(&self, server: &str, answer: &Answer) {
        assert_eq!(answer.status, 401, "{server}: {}", answer.text());
        assert_eq!(
            without_id(answer),
            self.unreachable,
            "{server}: the answer tells that it was refused"
        );
    }

    /// Anybody's dialling, whatever becomes of it.
    #[track_caller]
    fn dials(&mut self, server: &str) {
        let before = connections_begun();
        self.ask(server);
        assert!(connections_begun() > before, "{server} was not dialled");
    }
}

fn ask_on(service: &Service, client: &mut Connection, server: &str, token: &str) -> Answer {
    let call = Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), server, token));
    client.send(&call.bytes(service.address()));
    let answer = client.answer().expect("an answer");
    answer.assert_manners();
    answer
}

fn without_id(answer: &Answer) -> serde_json::Value {
    let mut body = answer.json();
    body["request_id"] = json!(null);
    body
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    Ipv4Addr::new(a, b, c, d).into()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn unique_name(label: &str) -> String {
    format!("{label}{}.example.org", unique())
}

/// An address as a server name.
fn literal(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    }
}

/// Web servers of strangers: what each of their names answers for the well-known file.
struct Web {
    certificate: Arc<rustls::ServerConfig>,
    machines: Mutex<Vec<Neighbour>>,
    files: Arc<Mutex<HashMap<String, Reply>>>,
}

impl Web {
    /// Names on one machine: fewer than the connections that an address gets at once.
    const NAMES: usize = 6;

    fn new() -> Self {
        Self {
            certificate: Ca::trusted().server(&["*.web.example.org".into()]),
            machines: Mutex::default(),
            files: Arc::default(),
        }
    }

    /// One more, at a public address.
    fn machine(&self, number: usize) -> Neighbour {
        let served = self.files.clone();
        let at = v4(8, 8, u8::try_from(number).expect("few machines"), 8);
        Neighbour::start(SocketAddr::new(at, 443), Some(self.certificate.clone()), move |request| {
            assert_eq!(request.path, WELL_KNOWN);
            let host = request.header("host").unwrap_or_default();
            let file = served.lock().unwrap().get(host).cloned();
            file.unwrap_or_else(|| Reply::text(404, "text/plain", "no"))
        })
    }

    /// A server name whose file is this.
    fn serves(&self, dns: &Dns, file: Reply) -> String {
        let name = format!("n{}.web.example.org", unique());
        let mut files = self.files.lock().unwrap();
        let mut machines = self.machines.lock().unwrap();
        if files.len().is_multiple_of(Self::NAMES) {
            let next = self.machine(machines.len());
            machines.push(next);
        }
        let machine = machines.last().expect("just started");
        dns.address(&name, &[machine.address().ip()]);
        files.insert(name.clone(), file);
        name
    }

    fn connections(&self) -> usize {
        let machines = self.machines.lock().unwrap();
        machines.iter().map(|machine| machine.connections().len()).sum()
    }

    fn delegates(&self, dns: &Dns, target: &str) -> String {
        self.serves(dns, Reply::json(200, &json!({ "m.server": target })))
    }

    fn redirects(&self, dns: &Dns, target: &str) -> String {
        self.serves(dns, Reply::redirect(307, &format!("https://{target}/latest/meta-data/")))
    }
}

/// Every way to `address`: server name, and the connections to elsewhere that it costs to find out.
fn ways(dns: &Dns, web: &Web, address: &str) -> Vec<(String, u64)> {
    let literal = literal(address);
    let mut ways = vec![(literal.clone(), 0), (format!("{literal}:443"), 0), (format!("{literal}:80"), 0)];
    // By its own records.
    let name = unique_name("a");
    dns.address(&name, &[ip(address)]);
    ways.extend([(name.clone(), 0), (format!("{name}:8448"), 0), (format!("{name}:22"), 0)]);
    // By an alias.
    let alias = unique_name("c");
    dns.cname(&alias, &name);
    ways.push((alias, 0));
    // Several, all of them bad.
    let many = unique_name("m");
    dns.address(&many, &[ip(address), ip("127.0.0.1"), ip("fe80::1")]);
    ways.push((many, 0));
    // By delegation, and by a redirect: one connection each, to the web server.
    for target in [literal.clone(), format!("{literal}:443"), name.clone(), format!("{name}:80")] {
        ways.push((web.delegates(dns, &target), 1));
    }
    for target in [literal.clone(), format!("{literal}:8443"), name.clone()] {
        ways.push((web.redirects(dns, &target), 1));
    }
    // By SRV, of a delegated name, and of the name itself.
    for service in ["_matrix-fed._tcp", "_matrix._tcp"] {
        let by_srv = unique_name("v");
        dns.srv(&format!("{service}.{by_srv}"), &[(1, 1, 443, &name), (2, 1, 6379, &name)]);
        ways.push((by_srv.clone(), 0));
        ways.push((web.delegates(dns, &by_srv), 1));
    }
    ways
}

#[test]
fn no_packet_goes_to_a_refused_address_whatever_leads_there() {
    in_own_network(|| {
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
        let web = Web::new();
        let addresses = PRIVATE.len() + NEVER.len();
        let all = PRIVATE.iter().chain(&NEVER);
        let all: Vec<_> = all.flat_map(|address| ways(&stage.dns, &web, address)).collect();
        // A few at a time, on connections that stand. Whichever of them it was that dialled somebody, the sum is wrong then.
        let mut clients: Vec<_> = (0..4)
            .map(|_| Connection::open(stage.service.address()).expect("a connection"))
            .collect();
        // The service looks after its SFU meanwhile: the first question may still be on its way.
        let of_sfu = || stage.sfu.http.connections().len() as u64;
        wait_until("a question to the SFU", Duration::from_secs(20), || of_sfu() >= 1);
        let begun = || connections_begun() - of_sfu();
        let before = begun();
        std::thread::scope(|scope| {
            let share = all.len().div_ceil(clients.len());
            for (client, ways) in clients.iter_mut().zip(all.chunks(share)) {
                let stage = &stage;
                scope.spawn(move || {
                    for (server, _) in ways {
                        stage.assert_refused(server, &ask_on(&stage.service, client, server, &secrets::token()));
                    }
                });
            }
        });
        let elsewhere: u64 = all.iter().map(|(_, elsewhere)| elsewhere).sum();
        // Another look at the SFU may be on its way, too: begun, and not accepted yet.
        let end = Instant::now() + Duration::from_secs(10);
        while begun() - before != elsewhere && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(begun() - before, elsewhere, "somebody was dialled");
        assert_eq!(web.connections(), 9 * addresses);
        eprintln!("{} ways to {addresses} addresses, none of them dialled", all.len());
        // The count is worth something: what is public is dialled, by the same ways.
        let before = connections_begun();
        // One at a time of each address, which is paced: whoever waits for too long is told that we are busy.
        let ways = PUBLIC.map(|address| ways(&stage.dns, &web, address));
        let calls: Vec<_> = (0..ways[0].len())
            .flat_map(|way| ways.iter().map(move |ways| &ways[way].0))
            .map(|server| Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), server, &secrets::token())))
            .collect();
        let answers = stage.service.flood(&calls, PUBLIC.len());
        assert!(answers.iter().all(|a| without_id(a) == stage.unreachable));
        let begun = connections_begun() - before;
        eprintln!(
            "{begun} connections begun by {} ways to {} public addresses",
            calls.len(),
            PUBLIC.len()
        );
        assert!(begun > 2 * calls.len() as u64, "only {begun}");
        // Of strangers' failures ten a second are told one by one: whichever was not is asked for once more.
        for address in PUBLIC {
            let name = literal(address);
            let mut lines = Vec::new();
            wait_until(&name, Duration::from_secs(20), || {
                lines = stage.service.lines(&[("target", "request"), ("server", &name)]);
                if lines.is_empty() {
                    ask_on(&stage.service, &mut stage.client, &name, &secrets::token());
                }
                !lines.is_empty()
            });
            lines[0].says(&[&format!("cannot connect to {name}:8448")]);
        }
    });
}

/// The same where a listener would tell.
#[test]
fn nobody_on_this_machine_hears_a_stranger() {
    in_own_network(|| {
        let mut stage = Stage::new(|setup| setup);
        let web = Web::new();
        let ears: Vec<_> = [
            "0.0.0.0:8448",
            "[::1]:8448",
            "[::1]:443",
            "127.0.0.1:443",
            "127.0.0.1:80",
            "127.0.0.1:6379",
            "127.0.0.1:22",
        ]
        .iter()
        .map(|address| Neighbour::start(address.parse().expect("an address"), None, |_| Reply::Close))
        .collect();
        for address in ["127.0.0.1", "::1", "0.0.0.0", "::ffff:127.0.0.1", "169.254.169.254", "10.0.0.1"] {
            for (server, elsewhere) in ways(&stage.dns, &web, address) {
                stage.refuses(&server, elsewhere);
            }
        }
        for ear in &ears {
            assert_eq!(ear.connections().len(), 0, "{} was dialled", ear.address());
        }
    });
}

/// Neither a list, nor a network, nor a lab, nor an override's name opens the ranges that are never dialled.
#[test]
fn nothing_opens_the_ranges_that_are_never_dialled() {
    in_own_network(|| {
        for lab in [false, true] {
            let listed: Vec<_> = NEVER.iter().map(|a| literal(a)).collect();
            let mut stage = Stage::new(|setup| {
                let setup = setup
                    .env("LIVEKIT_LOG_LEVEL", "info")
                    .env(
                        "LIVEKIT_FULL_ACCESS_HOMESERVERS",
                        &format!("listed.example.org {}", listed.join(" ")),
                    )
                    .env("LIVEKIT_CS_API_URL_OVERRIDES", "cs.example.org=https://10.0.0.1")
                    .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "0.0.0.0/0,::/0,169.254.0.0/16");
                if lab {
                    setup.env("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
                } else {
                    setup
                }
            });
            for address in NEVER {
                stage.refuses(&literal(address), 0);
                let name = unique_name("n");
                stage.dns.address(&name, &[ip(address)]);
                stage.refuses(&name, 0);
                stage.dns.ttl(0);
                for listed in ["listed.example.org", "cs.example.org"] {
                    stage.dns.script(listed, Kind::A, [Say::Records(vec![])]);
                    stage.dns.script(listed, Kind::AAAA, [Say::Records(vec![])]);
                    stage.dns.address(listed, &[ip(address)]);
                    stage.refuses(listed, 0);
                }
            }
            // While the private ones are open now.
            for address in ["127.0.0.1", "10.0.0.1", "fd00::1"] {
                stage.dials(&literal(address));
            }
        }
    });
}

/// Who may live in a private network: names that the operator wrote down, networks that he did, and labs.
#[test]
fn private_networks_are_for_those_whom_the_operator_named() {
    in_own_network(|| {
        let private = v4(10, 1, 2, 3);
        let far = |name: &str, at: IpAddr| {
            if at.is_ipv6() {
                own(at);
            }
            Homeserver::builder().at(at, 8448).named(name).certified_for([name]).start()
        };
        let answer = |stage: &mut Stage, server: &str, far: &Homeserver| {
            let token = far.token_of(&format!("@alice:{server}"));
            stage.ask_with(server, &token).status
        };
        // By nothing: refused. `*` names nobody.
        for list in ["nobody.example.org", "*"] {
            let mut stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", list));
            stage.dns.address("home.example.org", &[private]);
            let home = far("home.example.org", private);
            stage.refuses("home.example.org", 0);
            stage.refuses("10.1.2.3", 0);
            assert_eq!(home.http.connections().len(), 0);
        }
        // By its name, and by its name only.
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "listed.example.org,10.1.2.4"));
        let at = v4(10, 1, 2, 4);
        let listed = far("listed.example.org", at);
        stage.dns.address("listed.example.org", &[at]);
        stage.dns.address("other.example.org", &[at]);
        assert_eq!(answer(&mut stage, "listed.example.org", &listed), 200);
        assert_eq!(answer(&mut stage, "10.1.2.4", &listed), 200);
        let begun = listed.http.connections().len();
        for other in [
            "other.example.org",
            "listed.example.org:8448",
            "10.1.2.4:8448",
            "x.listed.example.org",
        ] {
            stage.refuses(other, 0);
        }
        // Nor does the way there open by delegation: it is the stranger's name that counts.
        let web = Web::new();
        let delegating = web.delegates(&stage.dns, "listed.example.org");
        stage.refuses(&delegating, 1);
        assert_eq!(listed.http.connections().len(), begun);
        // Our own homeserver, and those of the two override lists.
        let at = v4(192, 168, 7, 7);
        let own_hs = far("own.example.org", at);
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_CS_API_URL_OVERRIDES", "own.example.org=https://10.9.9.9"));
        stage.dns.address("own.example.org", &[at]);
        assert_eq!(answer(&mut stage, "own.example.org", &own_hs), 200);
        let target = far("target.example.org", v4(192, 168, 7, 8));
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_FEDERATION_URL_OVERRIDES", "over.example.org=https://192.168.7.8:8448"));
        assert_eq!(answer(&mut stage, "over.example.org", &target), 200);
        // The target is open to that name, not to others.
        stage.refuses("192.168.7.8:8448", 0);
        // By its network, mapped or not; the next network stays shut.
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.1.2.0/24, fd00:1::/64"));
        let at = [v4(10, 1, 2, 5), ip("fd00:1::5")];
        let homes = [far("four.example.org", at[0]), far("six.example.org", at[1])];
        for home in &homes {
            stage.dns.address(&home.name, &[home.http.address().ip()]);
            assert_eq!(answer(&mut stage, &home.name, home), 200, "{}", home.name);
        }
        for outside in ["10.1.3.1", "[fd00:2::1]", "127.0.0.1", "[::ffff:10.1.3.1]"] {
            stage.refuses(outside, 0);
        }
        stage.dials("[::ffff:10.1.2.77]");
    });
}

/// A name with a public and a refused address: only the public one is dialled.
#[test]
fn of_several_addresses_only_the_allowed_ones_are_dialled() {
    in_own_network(|| {
        let mut stage = Stage::new(|setup| setup);
        let name = unique_name("mixed");
        let public = v4(9, 1, 1, 1);
        stage
            .dns
            .address(&name, &[v4(127, 0, 0, 1), v4(169, 254, 169, 254), public, ip("::1"), ip("fd00::1")]);
        let ears = [
            "127.0.0.1:443",
            "127.0.0.1:8448",
            "169.254.169.254:443",
            "169.254.169.254:8448",
            "[::1]:443",
            "[::1]:8448",
        ]
        .map(|address| Neighbour::start(address.parse().expect("an address"), None, |_| Reply::Close));
        let far = Homeserver::builder()
            .at(public, 8448)
            .named(&name)
            .certified_for([name.as_str()])
            .start();
        let token = far.token_of(&format!("@alice:{name}"));
        let before = connections_begun();
        assert_eq!(stage.ask_with(&name, &token).status, 200);
        // To the web server's port, to the homeserver, and to the SFU.
        assert!(connections_begun() - before <= 3, "{} connections", connections_begun() - before);
        for ear in &ears {
            assert_eq!(ear.connections().len(), 0, "{} was dialled", ear.address());
        }
    });
}

/// The name answers differently the second time. The address that was checked is the address that is dialled.
#[test]
fn rebinding_leads_nowhere() {
    in_own_network(|| {
        let mut stage = Stage::new(|setup| setup);
        stage.dns.ttl(0);
        let ears = [
            "127.0.0.1:443",
            "127.0.0.1:8448",
            "127.0.0.1:8400",
            "169.254.169.254:443",
            "169.254.169.254:8448",
        ]
        .map(|address| Neighbour::start(address.parse().expect("an address"), None, |_| Reply::Close));
        let (good, web_at) = (v4(9, 2, 2, 2), v4(9, 2, 2, 2));
        for bad in ["127.0.0.1", "169.254.169.254"].map(ip) {
            // Any number of good answers first: the well-known file is asked for at the good address, then the other one
            // comes up. Whichever question it is that gets the bad answer, nobody there hears of it.
            let mut calls = Vec::new();
            for good_answers in 0..6 {
                for port in ["", ":8400"] {
                    let name = unique_name("rebinding");
                    let mut script = vec![Say::at(good); good_answers];
                    script.push(Say::at(bad));
                    stage.dns.script(&name, Kind::A, script);
                    let body = bodies::sfu_get(&unique_room(), &(name + port), &secrets::token());
                    calls.push(Call::json("/sfu/get", &body));
                }
            }
            for answer in stage.service.flood(&[calls.clone(), calls].concat(), 100) {
                assert_eq!(without_id(&answer), stage.unreachable);
            }
            // The other way round: refused at first, good from then on. Not believed for long.
            let name = unique_name("rebound");
            let far = Homeserver::builder()
                .at(good, 8448)
                .named(&name)
                .certified_for([name.as_str()])
                .start();
            stage.dns.script(&name, Kind::A, [Say::at(bad), Say::at(good)]);
            stage.refuses(&name, 0);
            let token = far.token_of(&format!("@alice:{name}"));
            // A refusal is remembered for a second, so that nobody is looked for more often.
            wait_until("the good answer to be believed", Duration::from_secs(10), || {
                stage.ask_with(&name, &token).status == 200
            });
            far.http.refuse();
        }
        // A stranger that has verified a token is known, and refused all the same when its name moves.
        let name = unique_name("promoted");
        let far = Homeserver::builder()
            .at(web_at, 8448)
            .named(&name)
            .certified_for([name.as_str()])
            .start();
        stage.dns.script(&name, Kind::A, [Say::at(good)]);
        let token = far.token_of(&format!("@alice:{name}"));
        assert_eq!(stage.ask_with(&name, &token).status, 200);
        stage.dns.script(&name, Kind::A, [Say::at(v4(127, 0, 0, 1))]);
        far.http.refuse();
        let answer = stage.ask(&name);
        assert_eq!(without_id(&answer), stage.unreachable);
        for ear in &ears {
            assert_eq!(ear.connections().len(), 0, "{} was dialled", ear.address());
        }
    });
}

/// The operator hears of the first refusal of a name, with the variable that helps; of a flood of names he hears little.
#[test]
fn a_refusal_is_told_once_and_a_flood_of_them_is_not_told() {
    in_own_network(|| {
        let mut stage = Stage::new(|setup| setup.env("LIVEKIT_LOG_LEVEL", "info"));
        let warned = |stage: &Stage, name: &str| {
            let log = stage.service.log();
            log.lines()
                .filter(|l| l.contains("WARN") && l.contains(name) && l.contains("LIVEKIT_FEDERATION_ALLOWED_NETWORKS"))
                .count()
        };
        let name = unique_name("mine");
        stage.dns.address(&name, &[v4(10, 0, 0, 1)]);
        stage.refuses(&name, 0);
        let line = stage.service.wait_line(&[("event", "address_denied"), ("server", &name)]);
        line.says(&["LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.0.0.1"]);
        let first = warned(&stage, &name);
        for _ in 0..5 {
            stage.refuses(&name, 0);
        }
        assert_eq!(warned(&stage, &name), first, "the same name was told again");
        let mark = stage.service.log().len();
        stage.dns.address("*.flood.example.org", &[v4(10, 0, 0, 1)]);
        let calls: Vec<_> = (0..2_000)
            .map(|n| {
                Call::json(
                    "/sfu/get",
                    &bodies::sfu_get("!r:x", &format!("n{n}.flood.example.org"), &secrets::token()),
                )
            })
            .collect();
        let began = Instant::now();
        let answers = stage.service.flood(&calls, 50);
        assert!(answers.iter().all(|a| a.status == 401));
        let seconds = began.elapsed().as_secs();
        let log = stage.service.log();
        let lines = log[mark..].lines().filter(|l| l.contains("WARN")).count();
        eprintln!("2,000 refused names in {seconds} s: {lines} warnings");
        assert!(lines as u64 <= 20 + seconds, "{lines} warnings in {seconds} s");
    });
}
