//! LiveKit's own token sources against `/token_source`, in Node, in Chromium and in Rust, as docs/token-source.md has them; and what
//! each of them got lets a real client in.

use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::leave_real::steered::{Browser, Steered, Tab};
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{self, Process, real_neighbours, say};
use crate::support::service::Service;
use crate::support::unique_room;

/// Where LiveKit's token sources run.
enum Sdk {
    Process(Steered),
    Page(Tab),
}

impl Sdk {
    fn node() -> Self {
        let mut command = Command::new(process::program("node"));
        command.arg(process::tool("token_source/node.mjs"));
        Self::Process(Steered::start("node", &command))
    }

    fn rust() -> Self {
        Self::Process(Steered::start("rust", &Command::new(process::tool("token_source/rust"))))
    }

    fn page() -> Self {
        Self::Page(Browser::with("token_source/page.js").open())
    }

    fn order(&self, mut order: Value) -> Result<Value, String> {
        match self {
            Self::Process(process) => process.try_order(&mut order),
            Self::Page(tab) => tab.order(&order),
        }
    }

    #[track_caller]
    fn must(&self, order: Value) -> Value {
        let what = order["do"].to_string();
        self.order(order).unwrap_or_else(|why| panic!("{what}: {why}"))
    }
}

/// A homeserver whose tokens the test ends, the service, and a real SFU.
struct Stage {
    service: Service,
    home: Homeserver,
    livekit: &'static Livekit,
    room: String,
}

impl Stage {
    /// `None` where these tests are left out.
    fn get() -> Option<Self> {
        if !real_neighbours() {
            return None;
        }
        let (livekit, home) = (Livekit::shared(), Homeserver::start());
        let service = livekit.setup(&[&home.name]).start();
        let room = unique_room();
        Some(Self {
            service,
            home,
            livekit,
            room,
        })
    }

    /// As clients know it.
    fn url(&self) -> String {
        format!("http://{}/livekit/jwt", self.service.address())
    }

    /// The app's OpenID token from now on.
    fn token(&self, sdk: &Sdk, what: &str) -> String {
        let token = self.home.token("alice");
        sdk.must(json!({"do": what, "service": self.url(), "server": self.home.name, "device": "DEVICE", "token": token}));
        token
    }

    fn fetch(&self, source: &str) -> Value {
        json!({"do": "fetch", "source": source, "room": self.room})
    }

    fn identity(&self) -> String {
        format!("{}:DEVICE", self.home.user("alice"))
    }

    /// Whoever has this comes in, under that name.
    fn lets_in(&self, answer: &Value) {
        assert_eq!(answer["url"], self.livekit.url());
        let claims = Jwt::decode(answer["jwt"].as_str().expect("jwt")).expect("a JWT").claims;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let back = now - claims["nbf"].as_u64().expect("nbf");
        assert!((60..180).contains(&back), "nbf is {back} s back");
        assert_eq!(claims["iat"], Value::Null);
        let (_client, identity) = Client::join(answer);
        assert_eq!(identity, self.identity());
        assert!(self.livekit.participants(&alias(&self.room, SLOT)).contains(&identity));
    }

    /// Fetched, served from the cache, forced, and after the OpenID token's end. `renew` is what the app does then.
    fn fetches(&self, sdk: &Sdk, source: &str, renew: Option<&str>) -> Value {
        let first = self.token(sdk, "start");
        let asked = |token: &str| self.home.asked_about(token);
        let fetch = || self.fetch(source);
        let mut forced = fetch();
        forced["force"] = json!(true);
        let got = sdk.must(fetch());
        assert_eq!((sdk.must(fetch()), asked(&first)), (got.clone(), 1), "{source}: not from the cache");
        sdk.must(forced.clone());
        assert_eq!(asked(&first), 2, "{source}: not forced");
        self.home.end_token(&first);
        sdk.must(fetch());
        assert_eq!(asked(&first), 2, "{source}: not from the cache");
        // The developer reads what is wrong.
        let why = sdk.order(forced.clone()).expect_err("a token for one that has ended");
        for text in ["401", "M_UNAUTHORIZED", "token_rejected", "request_id"] {
            assert!(why.contains(text), "{source}: {text} is not in {why}");
        }
        let second = self.token(sdk, "token");
        if let Some(renew) = renew {
            let why = sdk.order(fetch()).expect_err("a token for a header that was not replaced");
            assert!(why.contains("token_rejected"), "{source}: {why}");
            sdk.must(json!({"do": renew}));
        }
        let got = sdk.must(fetch());
        assert_eq!(
            (sdk.must(fetch()), asked(&second)),
            (got.clone(), 1),
            "{source}: not from the cache"
        );
        say(&format!("{source}: 1 request, then the cache, forced, refused with 401, 1 request"));
        got
    }

    /// What the SDK itself sends when a name is set.
    fn may_not_choose_a_name(&self, sdk: &Sdk, source: &str) {
        let token = self.token(sdk, "start");
        let mut named = self.fetch(source);
        named["name"] = json!("Bob");
        let why = sdk.order(named).expect_err("a name of the client's choice");
        for text in ["403", "M_FORBIDDEN", "participant_name", "must be left out"] {
            assert!(why.contains(text), "{source}: {text} is not in {why}");
        }
        assert_eq!(self.home.asked_about(&token), 0);
    }

    /// The same with all that JavaScript has.
    fn fetches_by_livekit_client(&self, sdk: &Sdk) -> Value {
        self.fetches(sdk, "endpoint", Some("renew"));
        self.may_not_choose_a_name(sdk, "endpoint");
        let got = self.fetches(sdk, "custom", None);
        let why = sdk.order(json!({"do": "fetchWithHeadersInstance", "room": self.room}));
        let why = why.expect_err("headers that are lost");
        for text in ["401", "M_MISSING_TOKEN", "plain object"] {
            assert!(why.contains(text), "{text} is not in {why}");
        }
        // A slow clock.
        for source in ["endpoint", "custom"] {
            let token = self.token(sdk, "start");
            for (slow, asked) in [(0, 1), (30, 1), (55, 1), (600, 2)] {
                sdk.must(json!({"do": "clock", "slow": slow}));
                sdk.must(self.fetch(source));
                assert_eq!(self.home.asked_about(&token), asked, "{source}, {slow} s slow");
            }
            sdk.must(json!({"do": "clock", "slow": 0}));
        }
        got
    }
}

#[test]
fn livekit_client_in_node_has_tokens_that_let_in() {
    let Some(stage) = Stage::get() else { return };
    stage.lets_in(&stage.fetches_by_livekit_client(&Sdk::node()));
}

/// The page has another origin than the service, and livekit-client joins by itself.
#[test]
fn livekit_client_in_a_browser_joins_with_what_it_has_fetched() {
    let Some(stage) = Stage::get() else { return };
    let page = Sdk::page();
    stage.fetches_by_livekit_client(&page);
    for source in ["custom", "endpoint"] {
        stage.token(&page, "start");
        let joined = page.must(json!({"do": "join", "source": source, "room": stage.room}));
        let name = alias(&stage.room, SLOT);
        assert_eq!(joined, json!({"identity": stage.identity(), "room": name}), "{source}");
        assert!(stage.livekit.participants(&name).contains(&stage.identity()), "{source}");
        page.must(json!({"do": "leave"}));
    }
}

#[test]
fn the_rust_crate_has_tokens_that_let_in() {
    let Some(stage) = Stage::get() else { return };
    let rust = Sdk::rust();
    stage.lets_in(&stage.fetches(&rust, "custom", None));
    stage.may_not_choose_a_name(&rust, "custom");
}

/// There is no token source in LiveKit's SDK for Python: the page's example sends one request.
#[test]
fn a_python_client_joins_with_one_plain_request() {
    let Some(stage) = Stage::get() else { return };
    let token = stage.home.token("alice");
    let mut command = process::script("token_source/python.py");
    command.args([&stage.url(), &stage.home.name, &token, "DEVICE", &stage.room]);
    let client = Process::start_piped("python", &command, &process::directory("python"));
    let line = client.line(Duration::from_secs(60)).unwrap_or_default();
    let name = alias(&stage.room, SLOT);
    assert_eq!(line, format!("joined {} {name}", stage.identity()));
    assert_eq!(stage.livekit.participants(&name), [stage.identity()]);
    assert_eq!(stage.home.asked_about(&token), 1);
    say(&format!("python: {line}"));
}
