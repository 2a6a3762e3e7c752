//! What a second look at the way to a homeserver (decision O2) must not cost: neither those who wait for it nor those who do
//! not need it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::discovery::{Stage, delegation, listener, unique_name, v4, web};
use crate::healing::reaches;
use crate::support::client::Call;
use crate::support::client_api::ClientApi;
use crate::support::dns::{Dns, Kind, Say};
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::{Greeting, Reply};
use crate::support::network::{in_own_network, replace_file, with_low_ports};
use crate::support::service::Setup;
use crate::support::sfu::Sfu;
use crate::support::{bodies, secrets, unique, unique_loopback, unique_room, wait_until};

/// The request that finds the file due has not looked at DNS for it: it does so before it is refused.
#[test]
fn a_request_that_asks_for_the_file_anyway_looks_at_dns_too() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        stage.dns.ttl(600);
        let host = unique_name("due");
        let [old, new] = [unique_loopback(), unique_loopback()];
        stage.dns.address(&host, &[v4(old)]);
        let former = listener(old, 8448, &host);
        reaches(&stage, &host, &former, "before");
        // A file that is missing is asked for again after ten seconds, DNS after thirty.
        let began = Instant::now();
        wait_until("the file to be due", Duration::from_secs(15), || {
            began.elapsed() > Duration::from_millis(10_500)
        });
        let now = listener(new, 8448, &host);
        stage.dns.address(&host, &[v4(new)]);
        former.answer_userinfo(Some(Reply::text(404, "text/html", "<h1>It works!</h1>")));
        reaches(&stage, &host, &now, "after");
    });
}

/// One that has verified a token here has eight connections for a request: they last for the whole time.
#[test]
fn a_verified_homeserver_with_two_addresses_is_waited_for() {
    let stage = Stage::new(|setup| setup);
    let host = unique_name("two");
    let far = listener(unique_loopback(), 0, &host);
    let server = format!("{host}:{}", far.http.address().port());
    stage.dns.address(&host, &[far.http.address().ip(), v4(unique_loopback())]);
    reaches(&stage, &server, &far, "before");
    far.http.refuse();
    let answer = stage.ask(&server, &secrets::token());
    assert_eq!(answer.status, 401, "{}", answer.text());
    assert!(answer.took > Duration::from_secs(8), "given up after {:?}", answer.took);
}

/// A machine that changes networks has a new `resolv.conf` before it has DNS.
#[test]
fn a_new_resolv_conf_is_no_reason_to_forget_addresses() {
    in_own_network(|| {
        let resolv = replace_file("/etc/resolv.conf", "nameserver 127.0.0.53\n");
        let sfu = Sfu::start();
        let dns = Dns::at(SocketAddr::from(([127, 0, 0, 53], 53)));
        let name = unique_name("kept");
        let server = format!("{name}:8448");
        let stage = Stage {
            service: Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &server).start(),
            dns,
            sfu,
        };
        let far = listener(unique_loopback(), 8448, &name);
        stage.dns.address(&name, &[far.http.address().ip()]);
        reaches(&stage, &server, &far, "before");
        // Nobody is there.
        for text in ["nameserver 127.0.0.54\n", "", "nameserver 127.0.0.55\n"] {
            std::fs::write(&resolv, text).expect("the file");
            far.http.refuse();
            far.http.listen_again();
            reaches(&stage, &server, &far, "with another resolv.conf");
        }
    });
}

/// Somebody's request brings a page (a firewall that dislikes its token), and the file's server does not answer.
#[test]
fn whoever_has_no_need_of_a_second_look_does_not_wait_for_it() {
    with_low_ports(|| {
        let (name, at) = (unique_name("healthy"), unique_loopback());
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
        stage.dns.address(&name, &[v4(at)]);
        let far = Homeserver::start();
        let file = web(at, &name, delegation(&far.name));
        let began = Instant::now();
        reaches(&stage, &name, &far, "before");
        wait_until("the second to pass", Duration::from_secs(5), || {
            began.elapsed() > Duration::from_millis(1200)
        });
        file.http.refuse();
        file.http.listen_again();
        file.http.greet(Greeting::Silence);
        far.answer_userinfo(Some(Reply::text(403, "text/html", "<h1>Go away</h1>")));
        let refused = stage
            .service
            .begin(&Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &name, &secrets::token())));
        let before = file.http.connections().len();
        wait_until("the second look", Duration::from_secs(5), || {
            file.http.connections().len() > before || !far.http.requests().is_empty() && far.http.requests().len() > 1
        });
        far.answer_userinfo(None);
        let took = reaches(&stage, &name, &far, "meanwhile");
        assert!(took < Duration::from_secs(2), "{took:?}");
        refused.join().expect("the request").expect("an answer");
    });
}

/// The address in the client-server file cannot be used, and is corrected.
#[test]
fn a_corrected_client_file_counts_soon() {
    with_low_ports(|| {
        let (name, at) = (unique_name("client-file"), unique_loopback());
        let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &name));
        stage.dns.address(&name, &[v4(at)]);
        let home = web(at, &name, delegation(&format!("{name}:443")));
        let api = ClientApi::start();
        let points_to = |url: &str| home.answer_client_well_known(Reply::json(200, &json!({ "m.homeserver": { "base_url": url } })));
        let delegate = || {
            let body = bodies::delegate_of(&home, "alice", &unique_room(), &format!("syd_{}", unique()), 8000);
            stage.service.post("/delegate_delayed_leave", &body)
        };
        // Never dialled.
        points_to("https://169.254.1.1/");
        let refused = delegate();
        assert_ne!(refused.status, 200, "{}", refused.text());
        points_to(&api.url());
        let began = Instant::now();
        wait_until("the corrected file to count", Duration::from_secs(8), || delegate().status == 200);
        eprintln!("after {:?}", began.elapsed());
    });
}

/// What is at the old address takes the question and never answers it; the file is corrected.
#[test]
fn a_homeserver_that_moved_from_where_nothing_is_ever_answered() {
    with_low_ports(|| {
        let stage = Stage::new(|setup| setup);
        let (name, at) = (unique_name("hangs"), unique_loopback());
        stage.dns.address(&name, &[v4(at)]);
        let former = Homeserver::start();
        let file = web(at, &name, delegation(&former.name));
        reaches(&stage, &name, &former, "before");
        let now = Homeserver::start();
        file.answer_well_known(delegation(&now.name));
        former.answer_userinfo(Some(Reply::Hang));
        let first = stage.ask(&name, &now.token_of(&format!("@alice:{name}")));
        eprintln!("first: {} after {:?}", first.status, first.took);
        reaches(&stage, &name, &now, "second");
    });
}

/// DNS is away, and the homeserver is restarted.
#[test]
fn a_second_look_does_not_wait_long_for_dns() {
    let stage = Stage::new(|setup| setup);
    stage.dns.ttl(1);
    let host = unique_name("restarts");
    let far = listener(unique_loopback(), 0, &host);
    let server = format!("{host}:{}", far.http.address().port());
    stage.dns.address(&host, &[far.http.address().ip()]);
    let began = Instant::now();
    reaches(&stage, &server, &far, "before");
    for kind in [Kind::A, Kind::AAAA] {
        stage.dns.script(&host, kind, [Say::Silence]);
    }
    wait_until("the second to pass", Duration::from_secs(5), || {
        began.elapsed() > Duration::from_millis(1200)
    });
    far.http.refuse();
    let token = far.token_of(&format!("@alice:{server}"));
    let request = stage
        .service
        .begin(&Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &server, &token)));
    let began = Instant::now();
    wait_until("a restart", Duration::from_secs(5), || began.elapsed() > Duration::from_secs(1));
    far.http.listen_again();
    let answer = request.join().expect("the request").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.took < Duration::from_secs(4), "{:?}", answer.took);
}

/// A homeserver that answers every question with a page, five hundred at a time.
#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn a_page_for_everybody_costs_two_questions_and_a_second() {
    let far = Homeserver::start();
    let stage = Stage::new(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &far.name));
    reaches(&stage, &far.name, &far, "before");
    far.answer_userinfo(Some(Reply::text(404, "text/html", "<h1>It works!</h1>")));
    let calls: Vec<_> = (0..1500)
        .map(|_| Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &far.name, &secrets::token())))
        .collect();
    let (asked, began) = (far.asked(), Instant::now());
    let answers = stage.service.flood(&calls, 500);
    let (asked, took) = (far.asked() - asked, began.elapsed());
    let slowest = answers.iter().map(|answer| answer.took).max().expect("answers");
    eprintln!(
        "{asked} questions about {} tokens in {took:?}, over {} connections; the slowest answer after {slowest:?}",
        calls.len(),
        far.http.connections().len()
    );
    assert!(answers.iter().all(|answer| answer.status == 401));
    assert!(asked <= 2 * calls.len(), "{asked}");
    assert!(slowest < Duration::from_secs(8), "{slowest:?}");
}
