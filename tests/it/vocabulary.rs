//! One vocabulary: for each outcome of a request the word in the log, the word in the body and the label of the metric agree.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::TcpListener;
use std::time::Instant;

use lk_jwt_service::internals::metrics::Outcome;
use serde_json::{Value, json};

use crate::support::bodies::{self, with};
use crate::support::client::{Answer, Call};
use crate::support::client_api::ClientApi;
use crate::support::hashes::SLOT;
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::{OwnHomeserver, error};
use crate::support::scene::TIMEOUT;
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Fault, Sfu};
use crate::support::{secrets, unique, unique_loopback, unique_room, wait_until, webhook};

/// A service whose every line and every number is looked at.
struct Witness {
    service: Service,
    seen: Vec<Outcome>,
}

impl Witness {
    fn of(setup: Setup) -> Self {
        let setup = setup
            .env("LIVEKIT_LOG_FORMAT", "json")
            .env("LIVEKIT_LOG_LEVEL", "debug")
            .env("LIVEKIT_METRICS_BIND", "main");
        Self {
            service: setup.start(),
            seen: Vec::new(),
        }
    }

    /// The call ends so, and says so in its body and in its line.
    #[track_caller]
    fn ends(&mut self, outcome: Outcome, call: Call) {
        let (id, call) = named(call);
        let answer = self.service.call(&call);
        self.agree(outcome, &id, Some(&answer));
    }

    #[track_caller]
    fn agree(&mut self, outcome: Outcome, id: &str, answer: Option<&Answer>) {
        let word = outcome.word();
        let line: Value = serde_json::from_str(&self.service.wait_request(id).to_string()).expect("JSON");
        assert_eq!(line["outcome"], word, "{line}");
        assert_eq!(line["status"].as_u64(), answer.map(|answer| answer.status.into()), "{line}");
        match answer {
            Some(answer) if outcome == Outcome::Ok => assert!(answer.status == 200 && answer.field("reason").is_empty(), "{line}"),
            Some(answer) => assert_eq!(answer.field("reason"), word, "{}", answer.text()),
            None => assert_eq!(outcome, Outcome::ClientGone, "an answer that nobody got"),
        }
        self.seen.push(outcome);
    }

    /// As many lines as the metrics count, by route and outcome.
    #[track_caller]
    fn adds_up(self) -> Vec<Outcome> {
        // What is still under way is over, but for the scrape itself.
        wait_until("all requests to end", TIMEOUT, || {
            self.service.get("/metrics").text().contains("\nlk_jwt_requests_in_flight 1\n")
        });
        let text = self.service.get("/metrics").text();
        let counted: BTreeMap<(String, String), u64> = text
            .lines()
            .filter_map(|line| {
                let rest = line.strip_prefix("lk_jwt_requests_total{route=\"")?;
                let (route, rest) = rest.split_once("\",outcome=\"")?;
                let (outcome, count) = rest.split_once("\"} ")?;
                let count = count.parse().ok().filter(|count| *count > 0)?;
                Some(((route.to_owned(), outcome.to_owned()), count))
            })
            .collect();
        // The scrape has a line, and had not counted itself.
        let mut expected = counted;
        *expected.entry(("metrics".into(), "ok".into())).or_default() += 1;
        let mut lines = BTreeMap::new();
        let end = Instant::now() + TIMEOUT;
        while lines != expected && Instant::now() < end {
            lines = requests(&self.service.log());
        }
        assert_eq!(lines, expected);
        self.seen
    }
}

/// How many lines there are, by route and outcome.
fn requests(log: &str) -> BTreeMap<(String, String), u64> {
    let mut lines = BTreeMap::new();
    for line in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        if let (Some("request"), Some(route), Some(outcome)) = (line["target"].as_str(), line["route"].as_str(), line["outcome"].as_str()) {
            *lines.entry((route.to_owned(), outcome.to_owned())).or_default() += 1;
        }
    }
    lines
}

fn named(call: Call) -> (String, Call) {
    let id = format!("vocabulary-{}", unique());
    let call = call.header("X-Request-Id", &id);
    (id, call)
}

fn of(body: &Value) -> Call {
    Call::json("/get_token", body)
}

/// On the routes that anybody may ask.
fn standalone() -> Vec<Outcome> {
    let (sfu, home, away) = (Sfu::start(), Homeserver::start(), Homeserver::start());
    let mut it = Witness::of(Setup::new(&sfu).full_access(&[&home]));
    let good = bodies::get_token_of(&home, "alice", &unique_room());
    // Ten seconds, in the background.
    let (late_id, late) = named(Call::post("/get_token", "{"));
    let late = String::from_utf8(late.bytes(it.service.address()))
        .expect("text")
        .replace("Length: 1\r", "Length: 2\r");
    let mut late_connection = it.service.connect();
    late_connection.send(late.as_bytes());

    it.ends(Outcome::Ok, of(&good));
    it.ends(Outcome::NotFound, Call::new("GET", "/none"));
    it.ends(Outcome::MethodNotAllowed, Call::new("GET", "/get_token"));
    it.ends(Outcome::BadRequest, Call::post("/get_token", "x"));
    it.ends(Outcome::TooLarge, Call::post("/get_token", vec![b' '; 70_000]));
    it.ends(Outcome::TokenMissing, Call::post("/token_source", "{}"));
    it.ends(Outcome::WebhookRejected, Call::post("/sfu_webhook", "{}"));
    let server = |name: &str| of(&with(&good, "/openid_token/matrix_server_name", Some(json!(name))));
    it.ends(Outcome::InvalidServerName, server("no server"));
    // The guard refuses it at once; from outside that is no other thing (decision H4).
    it.ends(Outcome::HomeserverUnreachable, server("169.254.1.1"));
    let token = |token: String| of(&with(&good, "/openid_token/access_token", Some(json!(token))));
    it.ends(Outcome::TokenRejected, token(secrets::token()));
    let page = Reply::text(403, "text/html", "<html>federation is off</html>");
    it.ends(Outcome::HomeserverError, token(home.token_with(page)));
    let eve = with(&good, "/member/claimed_user_id", Some(json!("@eve:example.org")));
    it.ends(Outcome::UserMismatch, of(&eve));
    let delegate = |of: &Homeserver, id: &str| {
        let body = bodies::delegate_of(of, "alice", &unique_room(), id, 3_600_000);
        Call::json("/delegate_delayed_leave", &body)
    };
    it.ends(Outcome::NotAllowed, delegate(&away, "id"));
    home.answer_client_well_known(Reply::json(200, &json!({})));
    it.ends(Outcome::ClientApiNotFound, delegate(&home, "id"));
    for (fault, outcome) in [
        (Fault::NoGrant, Outcome::SfuRejected),
        (Fault::ProxyPage(403), Outcome::SfuUnreachable),
    ] {
        sfu.fail(Some(fault));
        it.ends(outcome, of(&bodies::get_token_of(&home, "alice", &unique_room())));
    }
    sfu.fail(None);

    // Nobody is left to get an answer: the line and the metric are all that there is.
    let stuck = home.token_with(Reply::Hang);
    let (id, call) = named(Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &home.name, &stuck)));
    let mut connection = it.service.connect();
    connection.send(&call.bytes(it.service.address()));
    wait_until("the homeserver to be asked", TIMEOUT, || home.asked_about(&stuck) > 0);
    drop(connection);
    it.agree(Outcome::ClientGone, &id, None);

    let answer = late_connection.answer().expect("an answer");
    it.agree(Outcome::BodyTimeout, &late_id, Some(&answer));
    it.adds_up()
}

/// A hundred delegated leaves are a user's share.
fn shares() -> Vec<Outcome> {
    let (sfu, home, api) = (Sfu::start(), Homeserver::start(), ClientApi::start());
    let setup = Setup::new(&sfu).full_access(&[&home]);
    let mut it = Witness::of(setup.env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home)));
    let call = |n: usize| {
        Call::json(
            "/delegate_delayed_leave",
            &bodies::delegate_of(&home, "alice", &unique_room(), &n.to_string(), 3_600_000),
        )
    };
    let calls: Vec<_> = (0..100).map(call).collect();
    assert!(it.service.flood(&calls, 10).iter().all(|answer| answer.status == 200));
    it.ends(Outcome::LimitReached, call(100));
    assert!(
        it.service
            .get("/metrics")
            .text()
            .contains("\nlk_jwt_limit_hits_total{limit=\"jobs\"} 1\n")
    );
    it.adds_up()
}

/// By the operator's policy.
fn by_policy() -> Vec<Outcome> {
    let (sfu, home) = (Sfu::start(), Homeserver::start());
    let setup = Setup::new(&sfu).full_access(&[&home]).env("LIVEKIT_RATE_LIMIT_USER", "1");
    let mut it = Witness::of(setup.env("LIVEKIT_BLOCKED_HOMESERVERS", "*.example.org"));
    let good = bodies::get_token_of(&home, "alice", &unique_room());
    let blocked = Some(json!("evil.example.org"));
    it.ends(
        Outcome::BlockedHomeserver,
        of(&with(&good, "/openid_token/matrix_server_name", blocked)),
    );
    it.ends(Outcome::Ok, of(&good));
    it.ends(Outcome::RateLimited, of(&good));
    it.adds_up()
}

/// On the routes of our homeserver.
fn behind_our_homeserver() -> Vec<Outcome> {
    const PATH: &str = "/_matrix/client/v1/rtc/livekit/get_token";
    let (sfu, own) = (Sfu::start(), OwnHomeserver::start());
    let mut it = Witness::of(own.serving(Setup::new(&sfu)));
    let (room, alice) = (unique_room(), own.user("alice"));
    own.join(&room, &alice);
    let body = |url: &str, room: &str| json!({"url": url, "room_id": room, "slot_id": SLOT, "member_id": "m"});
    let ask = |token: &str, who: Option<&str>, body: &Value| {
        let call = Call::json(PATH, body).header("Authorization", &format!("Bearer {token}"));
        who.into_iter().fold(call, |call, who| call.header("X-Matrix-User-Identifier", who))
    };
    let (good, hs_token) = (body(&sfu.url(), &room), own.hs_token.clone());
    it.ends(Outcome::Ok, ask(&hs_token, Some(&alice), &good));
    it.ends(Outcome::HsTokenRejected, ask("another", Some(&alice), &good));
    it.ends(Outcome::IdentityMissing, ask(&hs_token, None, &good));
    it.ends(
        Outcome::OtherSfu,
        ask(&hs_token, Some(&alice), &body("wss://other.example.org", &room)),
    );
    let elsewhere = body(&sfu.url(), &unique_room());
    it.ends(Outcome::NotJoined, ask(&hs_token, Some(&alice), &elsewhere));
    own.script(|_, asked| asked.is_about_user().then(|| limited(60_000)));
    it.ends(Outcome::HomeserverLimited, ask(&hs_token, Some(&alice), &elsewhere));
    it.adds_up()
}

/// Longer than the request may wait.
fn limited(millis: u64) -> Reply {
    let mut reply = error(429, "M_LIMIT_EXCEEDED", "Too Many Requests");
    if let Reply::Answer { headers, body, .. } = &mut reply {
        headers.push(("Retry-After".into(), (millis / 1000).to_string()));
        *body = json!({"errcode": "M_LIMIT_EXCEEDED", "error": "Too Many Requests", "retry_after_ms": millis})
            .to_string()
            .into();
    }
    reply
}

/// A store that takes connections and says nothing: what is in it is not known yet.
fn while_starting() -> Vec<Outcome> {
    let silent = TcpListener::bind((unique_loopback(), 0)).expect("a port");
    let url = format!("redis://{}", silent.local_addr().expect("an address"));
    std::thread::spawn(move || {
        let mut kept: Vec<_> = silent.incoming().flatten().collect();
        kept.iter_mut().for_each(|stream| drop(stream.read(&mut [0])));
    });
    let sfu = Sfu::start();
    let mut it = Witness::of(Setup::new(&sfu).env("LIVEKIT_REDIS_URL", &url));
    // The port opens after 2 s at most, and 5 s after the start webhooks are taken.
    let joined = webhook::joined(&sfu.join("room", "somebody"));
    it.ends(Outcome::NotReady, webhook::signed(&sfu, &joined.to_string()));
    it.adds_up()
}

/// Sixty-four descriptors are places for two dozen requests.
fn with_few_places() -> Vec<Outcome> {
    let (sfu, home) = (Sfu::start(), Homeserver::start());
    let setup = Setup::new(&sfu).full_access(&[&home]);
    let mut it = Witness::of(setup.wrapped_in(&["sh", "-c", "ulimit -n 64; exec \"$0\" \"$@\""]));
    let stuck: Vec<_> = (0..28)
        .map(|_| {
            let token = home.token_with(Reply::Hang);
            let (id, call) = named(Call::json("/sfu/get", &bodies::sfu_get(&unique_room(), &home.name, &token)));
            let mut connection = it.service.connect();
            connection.send(&call.bytes(it.service.address()));
            (id, connection)
        })
        .collect();
    let (mut busy, mut others) = (None, Vec::new());
    wait_until("one too many", TIMEOUT, || {
        busy = stuck.iter().position(|(_, connection)| connection.has_unread());
        busy.is_some()
    });
    for (n, (id, mut connection)) in stuck.into_iter().enumerate() {
        if Some(n) == busy {
            let answer = connection.answer().expect("an answer");
            it.agree(Outcome::Busy, &id, Some(&answer));
        } else {
            others.push(connection);
        }
    }
    let text = it.service.get("/metrics").text();
    assert!(
        !text.contains("\nlk_jwt_limit_hits_total{limit=\"requests_in_flight\"} 0\n"),
        "{text}"
    );
    drop(others);
    it.adds_up()
}

/// Why the binary cannot be made to end a request so.
fn cannot(outcome: Outcome) -> Option<&'static str> {
    // A handler that panics and a key that cannot sign are defects; `http::edge::tests` lets a handler panic.
    (outcome == Outcome::InternalError).then_some("only a defect ends a request so, and none is known")
}

#[test]
fn every_outcome_has_one_word() {
    let parts: [fn() -> Vec<Outcome>; 6] = [
        standalone,
        shares,
        by_policy,
        behind_our_homeserver,
        while_starting,
        with_few_places,
    ];
    let seen: Vec<Outcome> = std::thread::scope(|scope| {
        let running = parts.map(|part| scope.spawn(part));
        running.into_iter().flat_map(|part| part.join().expect("a part")).collect()
    });
    for outcome in Outcome::ALL {
        assert!(
            seen.contains(outcome) != cannot(*outcome).is_some(),
            "{}: caused, or why it cannot be",
            outcome.word()
        );
    }
    eprintln!("{} outcomes in {} requests", Outcome::COUNT, seen.len());
}
