//! What a real SFU answers when something is wrong with it, and what the operator is told.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::Neighbours;
use crate::support::client::Call;
use crate::support::client_api::ClientApi;
use crate::support::dns::Dns;
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::livekit::{Client, Livekit};
use crate::support::neighbour::{Greeting, Neighbour, Reply};
use crate::support::process::{real_neighbours, say};
use crate::support::service::Setup;
use crate::support::tunnel::Tunnel;
use crate::support::{bodies, secrets, unique_loopback, unique_room, wait_until};

const NO_ROOM: &str = "Unable to create room on SFU";

/// Held, not refused: Element Call would show a fatal page.
#[test]
fn an_sfu_that_starts_four_seconds_late_is_waited_for() {
    if !real_neighbours() {
        return;
    }
    let (livekit, home) = (Livekit::prepare(), Homeserver::start());
    let service = livekit.setup(&[&home.name]).start();
    let began = Instant::now();
    let waiting = service.begin(&Call::json("/get_token", &bodies::get_token_of(&home, "alice", &unique_room())));
    std::thread::sleep(Duration::from_secs(4));
    livekit.start();
    let started = began.elapsed();
    let answer = waiting.join().expect("the request").expect("an answer");
    assert_eq!(answer.status, 200, "livekit-server answered after {started:?}: {}", answer.text());
    assert!(answer.took > Duration::from_secs(4), "{:?}", answer.took);
    say(&format!(
        "an SFU that starts late: it answered {:.1} s after the request came, the client had its 200 after {:.1} s",
        started.as_secs_f64(),
        answer.took.as_secs_f64()
    ));
    let (_client, _) = Client::join(&answer.json());
}

#[test]
fn what_a_real_sfu_refuses_is_answered_and_explained_at_once() {
    let Some(real) = Neighbours::get() else { return };
    let alice = real.home.register("alice");
    type Change = fn(Setup, &Livekit) -> Setup;
    let cases: [(&str, Change, &[&str]); 4] = [
        (
            "wrong secret",
            |setup, _| setup.env("LIVEKIT_SECRET", &secrets::sfu_secret()),
            &["signature", "LIVEKIT_SECRET must be", "LIVEKIT_KEY"],
        ),
        (
            "unknown key",
            |setup, _| setup.env("LIVEKIT_KEY", "otherkey"),
            &["does not know", "LIVEKIT_KEY must be"],
        ),
        (
            "a prefix that the SFU does not know",
            |setup, livekit| setup.env("LIVEKIT_URL", &format!("{}/livekit/sfu", livekit.url())),
            &["path", "prefix of LIVEKIT_URL", "LIVEKIT_API_URL"],
        ),
        (
            "the same, in LIVEKIT_API_URL",
            |setup, livekit| setup.env("LIVEKIT_API_URL", &format!("http://{}/nowhere", livekit.address())),
            &["path", "prefix", "LIVEKIT_API_URL"],
        ),
    ];
    for (case, change, log) in cases {
        let service = change(real.livekit.setup(&[&real.home.name]), real.livekit).start();
        for (path, body) in [
            ("/get_token", alice.get_token(&unique_room())),
            ("/sfu/get", alice.sfu_get(&unique_room())),
        ] {
            let answer = service.post(path, &body);
            assert_eq!(answer.status, 500, "{case}: {}", answer.text());
            answer.assert_error(500, "M_UNKNOWN", NO_ROOM);
            assert_eq!(answer.field("reason"), "sfu_rejected", "{case}");
            // What may pass would have been held for ten seconds.
            assert!(answer.took < Duration::from_secs(5), "{case}: answered after {:?}", answer.took);
            let line = service.wait_line_of(&answer);
            line.says(log);
            assert_eq!(line.field("level"), "WARN", "{case}");
            super::assert_not_logged(&service, &[&body]);
        }
    }
}

/// Its name gets another address, while records of DNS live for ten minutes (decision O2).
#[test]
fn an_sfu_that_moves_is_found_by_the_next_request() {
    if !real_neighbours() {
        return;
    }
    let (mut livekit, home, dns) = (Livekit::prepare(), Homeserver::start(), Dns::start());
    livekit.start();
    dns.ttl(600);
    let setup = livekit.setup(&[&home.name]).sfu_named("sfu.example.org", &dns);
    let service = setup.start();
    let ask = |livekit: &Livekit, what: &str, within: Duration| {
        let room = unique_room();
        let answer = service.post("/get_token", &bodies::get_token_of(&home, "alice", &room));
        assert_eq!(answer.status, 200, "{what}: {}", answer.text());
        assert!(answer.took < within, "{what}: {:?}", answer.took);
        assert!(livekit.room(&alias(&room, SLOT)).is_some(), "{what}: no room there");
        say(&format!("an SFU that moved, {what}: 200 after {:.2?}", answer.took));
    };
    ask(&livekit, "before", Duration::from_secs(4));
    let page = |at| Neighbour::start(at, None, |_| Reply::text(404, "text/html", "<html>nothing here</html>"));
    let silence = |at| {
        let neighbour = page(at);
        neighbour.greet(Greeting::Silence);
        neighbour
    };
    type Others<'a> = &'a dyn Fn(SocketAddr) -> Neighbour;
    let cases: [(&str, Option<Others<'_>>, u64); 3] = [
        ("old address closed", None, 4),
        ("old address somebody else's", Some(&page), 4),
        ("old address silent", Some(&silence), 9),
    ];
    for (what, other, within) in cases {
        let next = livekit.elsewhere();
        next.start();
        livekit.kill();
        let _other = other.map(|other| other(livekit.address()));
        dns.address("sfu.example.org", &[next.address().ip()]);
        ask(&next, what, Duration::from_secs(within));
        ask(&next, what, Duration::from_secs(4));
        livekit = next;
    }
}

/// It has forgotten every room. Its people come back by themselves, and nobody is told that they left (decision L13).
#[test]
fn leaves_follow_an_sfu_that_is_made_anew_elsewhere() {
    if !real_neighbours() {
        return;
    }
    const NAME: &str = "sfu.example.org";
    let (old, home, api, dns) = (Livekit::prepare(), Homeserver::start(), ClientApi::start(), Dns::start());
    old.start();
    dns.ttl(600);
    dns.address(NAME, &[old.address().ip()]);
    let front = Tunnel::start((unique_loopback(), 0).into(), old.address());
    let setup = old.setup(&[&home.name]).env("LIVEKIT_URL", &format!("ws://{}", front.address()));
    let service = dns
        .serving(setup)
        .env("LIVEKIT_API_URL", &format!("http://{NAME}:{}", old.address().port()))
        .env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home))
        .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
        .start();
    let (room, delay_id) = (unique_room(), "syd_moved");
    let alias = alias(&room, SLOT);
    let answer = service.post("/get_token", &bodies::get_token_of(&home, "alice", &room));
    let (client, identity) = Client::join(&answer.json());
    let body = bodies::delegate_of(&home, "alice", &room, delay_id, 10_000);
    assert_eq!(service.post("/delegate_delayed_leave", &body).status, 200);
    wait_until("the participant to be seen", Duration::from_secs(20), || {
        api.count("restart", delay_id) > 0
    });

    let new = old.elsewhere();
    new.start();
    old.kill();
    front.leads_to(new.address());
    dns.address(NAME, &[new.address().ip()]);
    let moved = Instant::now();
    wait_until("the room to be created again", Duration::from_secs(5), || {
        new.room(&alias).is_some()
    });
    say(&format!(
        "an SFU made anew elsewhere: its room stood again after {:.2?}",
        moved.elapsed()
    ));
    let stays_for = |what: &str, within: Duration, done: &dyn Fn() -> bool| {
        wait_until(what, within, || {
            assert_eq!(api.count("send", delay_id), 0, "somebody who is there was reported gone");
            done()
        });
    };
    stays_for("the client to be back", Duration::from_secs(40), &|| {
        new.participants(&alias).contains(&identity)
    });
    say(&format!(
        "an SFU made anew elsewhere: the client was back after {:.1?}",
        moved.elapsed()
    ));
    let (back, restarts) = (Instant::now(), api.count("restart", delay_id));
    stays_for("the watch to go on", Duration::from_secs(40), &|| {
        back.elapsed() > Duration::from_secs(12) && api.count("restart", delay_id) >= restarts + 2
    });
    drop(client);
    wait_until("the leave", Duration::from_secs(60), || api.count("send", delay_id) == 1);
}
