//! The SFU moves: its name gets another address, while its old one is closed, silent, or somebody else's (decisions O2, L13).
//! All records live for ten minutes.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::discovery::Proxy;
use crate::support::bodies;
use crate::support::ca::Ca;
use crate::support::client::{Answer, Call};
use crate::support::dns::{Dns, Kind, Say};
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::{Greeting, Neighbour, Reply};
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Fault, Sfu};
use crate::support::world::World;
use crate::support::{runtime, unique, unique_loopback, unique_room, wait_until};

/// What is at once takes milliseconds; the rest is for a machine that is busy with other tests.
const AT_ONCE: Duration = Duration::from_secs(4);
/// One call runs into its time-out, the next one finds the new place.
const ONE_TIMEOUT: Duration = Duration::from_secs(9);

type Leave = fn(&Sfu);

/// What the old place is by then, and how long the next request may take.
const OLD_PLACES: [(&str, Leave, Duration); 9] = [
    ("closed", |sfu| sfu.http.refuse(), AT_ONCE),
    ("one that closes every connection", |sfu| sfu.http.greet(Greeting::Close), AT_ONCE),
    ("somebody's 404", |sfu| sfu.fail(Some(Fault::ProxyPage(404))), AT_ONCE),
    ("somebody's login", |sfu| sfu.fail(Some(Fault::ProxyPage(401))), AT_ONCE),
    ("somebody's home page", |sfu| sfu.fail(Some(Fault::ProxyPage(200))), AT_ONCE),
    ("somebody's 502", |sfu| sfu.fail(Some(Fault::ProxyPage(502))), AT_ONCE),
    (
        "another Go program",
        |sfu| {
            let reply = Reply::text(404, "text/plain; charset=utf-8", "404 page not found\n");
            sfu.fail(Some(Fault::Instead(reply)));
        },
        AT_ONCE,
    ),
    ("silent", |sfu| sfu.http.greet(Greeting::Silence), ONE_TIMEOUT),
    ("frozen", |sfu| sfu.fail(Some(Fault::Hang)), ONE_TIMEOUT),
];

fn zone() -> (Dns, String) {
    let dns = Dns::start();
    dns.ttl(600);
    (dns, format!("sfu{}.example.org", unique()))
}

fn begin(service: &Service, home: &Homeserver) -> std::thread::JoinHandle<Option<Answer>> {
    service.begin(&Call::json("/get_token", &bodies::get_token_of(home, "alice", &unique_room())))
}

#[track_caller]
fn finish(request: std::thread::JoinHandle<Option<Answer>>, what: &str, within: Duration) {
    let answer = request.join().expect("the request").expect("an answer");
    assert_eq!(answer.status, 200, "{what}: {}", answer.text());
    assert!(answer.took < within, "{what}: answered after {:?}", answer.took);
    eprintln!("{what}: 200 after {:.1?}", answer.took);
}

fn creations(place: &Neighbour) -> usize {
    place.count(|r| r.path.ends_with("/CreateRoom"))
}

#[test]
fn an_sfu_that_has_moved_is_found_by_the_next_request() {
    let worlds: Vec<_> = OLD_PLACES
        .into_iter()
        .map(|(what, leave, within)| {
            let (dns, name) = zone();
            let world = World::with(|setup| setup.sfu_named(&name, &dns));
            finish(begin(&world.service, &world.home), "before", AT_ONCE);
            let new = world.sfu.elsewhere();
            leave(&world.sfu);
            dns.address(&name, &[new.address().ip()]);
            (what, within, world, new, dns)
        })
        .collect();
    let waiting: Vec<_> = worlds.iter().map(|(.., world, _, _)| begin(&world.service, &world.home)).collect();
    for ((what, within, world, new, _dns), request) in worlds.iter().zip(waiting) {
        finish(request, what, *within);
        assert_eq!(creations(new), 1, "{what}");
        // The old place is left alone from then on.
        let before = world.sfu.http.requests().len();
        finish(begin(&world.service, &world.home), what, AT_ONCE);
        assert_eq!((creations(new), world.sfu.http.requests().len()), (2, before), "{what}");
    }
}

#[test]
fn an_sfu_that_has_moved_is_found_where_its_old_address_has_anothers_certificate() {
    let ((dns, name), home) = (zone(), Homeserver::start());
    let sfu = Sfu::certified(&name);
    let service = Setup::new(&sfu).full_access(&[&home]).sfu_named(&name, &dns).start();
    finish(begin(&service, &home), "before", AT_ONCE);
    let new = sfu.elsewhere();
    sfu.http.refuse();
    let others = Ca::trusted().server(&["other.example.org".to_owned()]);
    let other = Neighbour::start(sfu.http.address(), Some(others), |_| Reply::text(200, "text/html", "<html></html>"));
    dns.address(&name, &[new.address().ip()]);
    finish(begin(&service, &home), "another's certificate", AT_ONCE);
    assert_eq!((creations(&new), other.requests().len()), (1, 0));
}

/// It answers until its last call is over; new rooms have to be where clients are led.
#[test]
fn an_sfu_that_is_being_replaced_is_left_for_the_new_one() {
    let (dns, name) = zone();
    dns.ttl(1);
    let scene = watched(&name, &dns);
    let new = scene.sfu.elsewhere();
    dns.address(&name, &[new.address().ip()]);
    let moved = Instant::now();
    let is_asked = |what: &str| new.count(|r| r.path.ends_with(what)) > 0;
    wait_until("the watch to follow", TIMEOUT, || is_asked("/") && is_asked("/GetParticipant"));
    eprintln!("replaced: followed after {:.1?}", moved.elapsed());
    let before = creations(&scene.sfu.http);
    finish(begin(&scene.service, &scene.home), "replaced", AT_ONCE);
    assert_eq!((creations(&scene.sfu.http), creations(&new) > 0), (before, true));
    scene.stays_until(moved + Duration::from_secs(8), DELAY);
}

/// One of its addresses is a machine that is off: what is sent there is lost.
#[test]
fn a_dead_address_among_several_is_passed_over() {
    let ((dns, name), sfu) = (zone(), Sfu::start());
    let alive = sfu.http.address();
    // Nobody accepts, and its queue is full.
    let dead = SocketAddr::new(unique_loopback().into(), alive.port());
    let _full = runtime().block_on(async {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(dead).expect("the port");
        let listener = socket.listen(0).expect("a listener");
        let mut waiting = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(dead)).await {
            waiting.push(stream.expect("a connection"));
        }
        (listener, waiting)
    });
    let scene = Scene::of(sfu, |setup| {
        let setup = setup.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1").sfu_named(&name, &dns);
        dns.address(&name, &[dead.ip(), alive.ip()]);
        setup
    });
    finish(begin(&scene.service, &scene.home), "a dead address among several", AT_ONCE);
    scene.delegate(DELAY);
    scene.join();
    wait_until("the watch", TIMEOUT, || scene.sfu.http.count(|r| r.method == "GET") >= 3);
    scene.stays_until(Instant::now() + Duration::from_secs(4), DELAY);
}

/// As many who come at the same time wait for the same answer of DNS.
#[test]
fn many_requests_find_it_with_few_questions() {
    let (dns, name) = zone();
    let world = World::with(|setup| setup.sfu_named(&name, &dns));
    finish(begin(&world.service, &world.home), "before", AT_ONCE);
    let new = world.sfu.elsewhere();
    world.sfu.fail(Some(Fault::ProxyPage(404)));
    dns.address(&name, &[new.address().ip()]);
    let (before, began) = (dns.asked(&name, Kind::A), Instant::now());
    let requests: Vec<_> = (0..30).map(|_| begin(&world.service, &world.home)).collect();
    requests.into_iter().for_each(|request| finish(request, "one of many", AT_ONCE));
    let asked = dns.asked(&name, Kind::A) - before;
    assert!(
        asked as u64 <= 1 + began.elapsed().as_secs(),
        "{asked} questions in {:?}",
        began.elapsed()
    );
}

/// However many requests and questions of the watch fail meanwhile.
#[test]
fn an_sfu_that_is_away_costs_one_question_a_second() {
    let (dns, name) = zone();
    let scene = watched(&name, &dns);
    let (before, began) = (dns.asked(&name, Kind::A), Instant::now());
    scene.sfu.http.refuse();
    let requests: Vec<_> = (0..20).map(|_| begin(&scene.service, &scene.home)).collect();
    wait_until("some seconds to pass", TIMEOUT, || began.elapsed() > Duration::from_secs(5));
    let (asked, elapsed) = (dns.asked(&name, Kind::A) - before, began.elapsed());
    scene.sfu.http.listen_again();
    requests.into_iter().for_each(|request| finish(request, "one of many", TIMEOUT));
    assert!(
        (3..=2 + elapsed.as_secs() as usize).contains(&asked),
        "{asked} questions in {elapsed:?}"
    );
}

/// The addresses that worked go on (case D10).
#[test]
fn nothing_is_lost_while_dns_is_away_and_connections_are_cut() {
    let (dns, name) = zone();
    dns.ttl(1);
    let scene = watched(&name, &dns);
    for kind in [Kind::A, Kind::AAAA] {
        dns.script(&name, kind, [Say::Silence]);
    }
    let away = Instant::now();
    wait_until("what DNS said to be old", TIMEOUT, || away.elapsed() > Duration::from_secs(2));
    scene.sfu.http.refuse();
    scene.sfu.http.listen_again();
    finish(begin(&scene.service, &scene.home), "without DNS", AT_ONCE);
    scene.stays_until(away + Duration::from_secs(10), DELAY);
    finish(begin(&scene.service, &scene.home), "without DNS", AT_ONCE);
    // Nobody tells: it is found out by asking.
    scene.sfu.leave(&scene.alias, &scene.identity);
    scene.wait_sent(TIMEOUT);
}

/// A container that starts later than this one has no name at first.
#[test]
fn a_name_that_comes_into_being_is_found_by_the_request_that_waits() {
    let (dns, name) = zone();
    let world = World::with(|setup| {
        let setup = setup.sfu_named(&name, &dns);
        dns.script(&name, Kind::A, []);
        setup
    });
    let (began, waiting) = (Instant::now(), begin(&world.service, &world.home));
    wait_until("the name to be asked for in vain", TIMEOUT, || dns.asked(&name, Kind::A) >= 2);
    let nameless = began.elapsed();
    dns.address(&name, &[world.sfu.http.address().ip()]);
    finish(waiting, "a new name", nameless + AT_ONCE);
}

/// Asks the SFU every second.
fn watched(name: &str, dns: &Dns) -> Scene {
    let scene = Scene::with(|setup| setup.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1").sfu_named(name, dns));
    scene.delegate(DELAY);
    scene.joined();
    wait_until("the watch to begin", TIMEOUT, || scene.sfu.http.count(|r| r.method == "GET") >= 2);
    scene
}

const DELAY: Duration = Duration::from_secs(6);

/// At half of them, since each is a whole scene.
fn at_old_places(test: impl Fn(&str, Leave) + Sync) {
    let test = &test;
    std::thread::scope(|scope| {
        for (what, leave, _) in OLD_PLACES.into_iter().step_by(2) {
            scope.spawn(move || test(what, leave));
        }
    });
}

/// Its people are still there, and nobody is told that they left.
#[test]
fn leaves_follow_an_sfu_that_moves_with_its_people() {
    at_old_places(|what, leave| {
        let (dns, name) = zone();
        let scene = watched(&name, &dns);
        let new = scene.sfu.elsewhere();
        leave(&scene.sfu);
        dns.address(&name, &[new.address().ip()]);
        let moved = Instant::now();
        wait_until(&format!("the watch to follow: {what}"), TIMEOUT, || {
            new.count(|r| r.method == "GET") > 0 && new.count(|r| r.path.ends_with("/GetParticipant")) > 0
        });
        eprintln!("{what}: followed after {:.1?}", moved.elapsed());
        scene.stays_until(moved + Duration::from_secs(6), DELAY);
        // Nobody tells: it is found out by asking.
        scene.sfu.leave(&scene.alias, &scene.identity);
        scene.wait_sent(TIMEOUT);
    });
}

/// It has forgotten every room; its people come back once theirs stands again.
#[test]
fn an_sfu_that_was_made_anew_elsewhere_gets_its_room_back_and_nobody_is_reported() {
    at_old_places(|what, leave| {
        let (dns, name) = zone();
        let scene = watched(&name, &dns);
        let new = scene.sfu.elsewhere();
        scene.sfu.leave(&scene.alias, &scene.identity);
        scene.sfu.forget_rooms();
        leave(&scene.sfu);
        dns.address(&name, &[new.address().ip()]);
        let moved = Instant::now();
        wait_until(&format!("the room to be created again: {what}"), TIMEOUT, || creations(&new) > 0);
        eprintln!("{what}: created again after {:.1?}", moved.elapsed());
        scene.stays_until(moved + Duration::from_secs(8), DELAY);
        let session = scene.join();
        scene.stays_until(Instant::now() + Duration::from_secs(5), DELAY);
        scene.leave(&session, "CLIENT_INITIATED");
        scene.wait_sent(TIMEOUT);
    });
}

/// Decision P11: the watch goes where all other calls go. Nobody but the proxy knows the name.
#[test]
fn the_watch_goes_through_the_forward_proxy() {
    const EXPECTED: &str = "Basic dXNlcjpwYXNzTkVWRVI=";
    let name = format!("sfu{}.example.org", unique());
    let through = |setup: Setup, proxy: &str, at: SocketAddr| {
        setup
            .env(proxy, &format!("http://user:passNEVER@{at}"))
            .env("NO_PROXY", "127.0.0.0/8")
            .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
            .secret("passNEVER")
    };
    // What is not encrypted: the proxy itself is asked.
    let sfu = Sfu::start();
    let proxy = sfu.proxy();
    let scene = Scene::of(sfu, |setup| {
        through(setup, "HTTP_PROXY", proxy.address()).env("LIVEKIT_URL", &format!("ws://{name}:7880"))
    });
    scene.delegate(DELAY);
    scene.joined();
    wait_until("the watch", TIMEOUT, || proxy.count(|r| r.method == "GET") >= 3);
    for request in proxy.requests() {
        assert!(request.target.starts_with(&format!("http://{name}:7880/")), "{}", request.target);
        assert_eq!(request.header("host"), Some(format!("{name}:7880").as_str()));
        assert_eq!(request.header("proxy-authorization"), Some(EXPECTED), "{}", request.target);
    }
    let watched = proxy
        .requests()
        .into_iter()
        // Whether rooms come to be by themselves is asked seldom, and beside the others.
        .filter(|r| r.method == "GET" && !r.target.contains("/rtc/validate"))
        .map(|r| r.connection.peer);
    assert_eq!(watched.collect::<HashSet<_>>().len(), 1, "a connection for each question");
    assert_eq!(scene.sfu.http.connections().len(), 0, "somebody went past the proxy");
    drop(scene);
    // What is encrypted: a tunnel.
    let sfu = Sfu::certified(&name);
    let proxy = Proxy::start(vec![(format!("{name}:7880"), sfu.http.address())]);
    let scene = Scene::of(sfu, |setup| {
        through(setup, "HTTPS_PROXY", proxy.address).env("LIVEKIT_URL", &format!("wss://{name}:7880"))
    });
    scene.delegate(DELAY);
    scene.joined();
    wait_until("the watch", TIMEOUT, || scene.sfu.http.count(|r| r.method == "GET") >= 3);
    assert_eq!(
        proxy.seen().len(),
        scene.sfu.http.connections().len(),
        "somebody went past the proxy"
    );
    assert!(
        proxy
            .seen()
            .iter()
            .all(|(target, auth)| *target == format!("{name}:7880") && auth.as_deref() == Some(EXPECTED))
    );
}
