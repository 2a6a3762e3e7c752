//! Places: those of the page are not those of calls (decision H7), whichever of the two run out.

use crate::support::bodies;
use crate::support::client::{Answer, Call};
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::Reply;
use crate::support::scene::TIMEOUT;
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Fault, Sfu};
use crate::support::{unique_room, wait_until};

use super::tickets::{now, post, ticket};

/// Uses of all tickets in a minute: so many requests of the page can wait for the SFU, and no more.
const USES: usize = 20;
/// Files that the service may open here, so that there are 100 connections and 75 places for calls.
const FEW_FILES: [&str; 4] = ["/bin/sh", "-c", "ulimit -n 200 && exec \"$@\"", "sh"];
const PLACES: u64 = 75;

/// Few places, and one homeserver, whose users have full access.
struct Stage {
    service: Service,
    sfu: Sfu,
    home: Homeserver,
}

impl Stage {
    fn new() -> Self {
        let (sfu, home) = (Sfu::start(), Homeserver::start());
        let setup = Setup::new(&sfu).full_access(&[&home]).wrapped_in(&FEW_FILES);
        let setup = setup.env("LIVEKIT_CHECK_PAGE", "on").env("LIVEKIT_METRICS_BIND", "main");
        let service = setup.start();
        let line = service.wait_event("limits");
        let places = PLACES.to_string();
        assert!(line.has(&[("connections", "100"), ("requests_in_flight", &places)]), "{line}");
        Self { service, sfu, home }
    }

    fn ticket(&self) -> Call {
        post("/check/token", &ticket(self.sfu.secret(), now(), 1800))
    }

    /// Requests of calls that have their places and wait for the homeserver, which never answers about this one token.
    fn hold_calls(&self, count: u64) -> Vec<std::thread::JoinHandle<Option<Answer>>> {
        let token = self.home.token_with(Reply::Hang);
        let body = bodies::get_token(&unique_room(), &self.home.name, &token, &self.home.user("eve"));
        let call = Call::json("/get_token", &body);
        (0..count).map(|_| self.service.begin(&call)).collect()
    }

    fn call(&self) -> Answer {
        self.service
            .post("/get_token", &bodies::get_token_of(&self.home, "alice", &unique_room()))
    }

    fn number(&self, name: &str) -> u64 {
        let text = self.service.get("/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .unwrap_or_default()
            .parse()
            .unwrap_or_else(|_| panic!("no {name} in:\n{text}"))
    }

    /// Requests without an answer, but for the scrape.
    fn in_flight(&self) -> u64 {
        self.number("lk_jwt_requests_in_flight") - 1
    }

    /// How often somebody found no place, or lost one.
    fn crowded(&self) -> u64 {
        self.number("lk_jwt_limit_hits_total{limit=\"requests_in_flight\"}")
    }
}

#[test]
fn tickets_by_the_hundred_leave_the_places_of_calls_alone() {
    let stage = Stage::new();
    stage.sfu.fail(Some(Fault::Hang));
    let pages: Vec<_> = (0..USES).map(|_| stage.service.begin(&stage.ticket())).collect();
    wait_until("the page to hold all that it can", TIMEOUT, || stage.in_flight() == USES as u64);
    // Good ones, whose turn it is not, and made-up ones.
    let tries: Vec<_> = (0..200)
        .flat_map(|n| [stage.ticket(), post("/check/token", &format!("made-up-{n}"))])
        .collect();
    for pair in stage.service.flood(&tries, 8).chunks(2) {
        assert_eq!([pair[0].status, pair[1].status], [429, 401]);
    }
    // With those of the page there would be more than there are places; without them there are some left.
    let calls = PLACES - 15;
    assert!(calls + USES as u64 > PLACES);
    let held = stage.hold_calls(calls);
    wait_until("calls to be held beside the page", TIMEOUT, || {
        stage.in_flight() == calls + USES as u64
    });
    stage.sfu.fail(None);
    let answer = stage.call();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(stage.crowded(), 0, "somebody had no place");
    for one in pages.into_iter().chain(held) {
        let answer = one.join().expect("a thread").expect("an answer");
        assert_ne!(answer.status, 503, "{}", answer.text());
    }
}

#[test]
fn calls_without_number_leave_the_places_of_the_page_alone() {
    let stage = Stage::new();
    let calls = PLACES + 15;
    let held = stage.hold_calls(calls);
    wait_until("all calls to be there, and some to have no place", TIMEOUT, || {
        let crowded = stage.crowded();
        crowded > 0 && stage.in_flight() + crowded == calls
    });
    let crowded = stage.crowded();
    for _ in 0..USES {
        let answer = stage.service.call(&stage.ticket());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    for part in ["/check", "/check/page.js", "/check/faults.json"] {
        assert_eq!(stage.service.get(part).status, 200, "{part}");
    }
    // The page's own places are taken, nobody else's.
    assert_eq!(stage.service.call(&stage.ticket()).status, 429);
    assert_eq!(stage.crowded(), crowded, "a call lost its place to the page");
    let answers = held.into_iter().map(|one| one.join().expect("a thread").expect("an answer"));
    assert_eq!(answers.filter(|answer| answer.status == 503).count() as u64, crowded);
}
