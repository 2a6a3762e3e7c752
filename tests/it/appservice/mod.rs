//! Application-service mode (decisions A1 to A7), with a fake of the homeserver that the service belongs to.

mod client_token;
mod deadlines;
mod delegation;
mod evil;
mod federation_token;
mod grants;
mod membership;
mod off;
mod paths;
mod policy;
mod registration;
mod relay;
mod standalone;
mod table;

use std::ops::Sub;

use serde_json::{Value, json};

use crate::support::client::{Answer, Call};
use crate::support::hashes::{SLOT, alias};
use crate::support::own_homeserver::{Asked, OwnHomeserver};
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;
use crate::support::unique_room;

const CLIENT: [&str; 3] = [
    "/_matrix/client/v1/rtc/livekit",
    "/_matrix/client/v3/rtc/livekit",
    "/_matrix/client/unstable/io.element.msc4195/rtc/livekit",
];
const FEDERATION: [&str; 2] = [
    "/_matrix/federation/v1/rtc/livekit",
    "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit",
];
const GET_TOKEN: &str = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token";
const DELEGATE: &str = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/delegate_delayed_leave";
const FEDERATION_GET_TOKEN: &str = "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token";

/// The homeserver of the other users, and of another SFU.
const OTHER: &str = "other.example.org";
/// The SFU there.
const OTHER_URL: &str = "wss://sfu.other.example.org";

/// The service with its homeserver and its SFU.
struct Stage {
    // Dropped first: its log is judged while its neighbours still stand.
    service: Service,
    sfu: Sfu,
    own: OwnHomeserver,
}

impl Stage {
    fn new() -> Self {
        Self::with(|setup| setup)
    }

    fn with(change: impl FnOnce(Setup) -> Setup) -> Self {
        Self::of(OwnHomeserver::start(), change)
    }

    /// A homeserver that is prepared before anybody asks it.
    fn prepared(prepare: impl FnOnce(&OwnHomeserver)) -> Self {
        let own = OwnHomeserver::start();
        prepare(&own);
        Self::of(own, |setup| setup)
    }

    /// The same with this homeserver.
    fn of(own: OwnHomeserver, change: impl FnOnce(Setup) -> Setup) -> Self {
        let sfu = Sfu::start();
        let service = change(own.serving(traced(&sfu))).start();
        Self { service, sfu, own }
    }

    /// The operator wrote down no address.
    fn lost(own: OwnHomeserver) -> Self {
        let sfu = Sfu::start();
        let service = own.serving_lost(traced(&sfu)).start();
        Self { service, sfu, own }
    }

    /// A room that alice is in.
    fn room(&self) -> String {
        let room = unique_room();
        self.own.join(&room, &self.own.user("alice"));
        room
    }

    /// A request of alice for a token of our SFU.
    fn client(&self) -> Ask {
        self.client_in(&self.room())
    }

    fn client_in(&self, room: &str) -> Ask {
        let body = json!({"url": self.sfu.url(), "room_id": room, "slot_id": SLOT, "member_id": "member1"});
        self.ask(GET_TOKEN, &self.own.user("alice"), body)
    }

    /// A request of alice for a token of the other homeserver's SFU, whose service gives one.
    fn relayed(&self) -> Ask {
        self.own.peer(OTHER, |_| (200, json!({"jwt": REMOTE_JWT})));
        self.client_of_other()
    }

    /// The same, whatever the service there does.
    fn client_of_other(&self) -> Ask {
        let mut ask = self.client();
        self.own.join(&ask.room(), OTHER);
        ask.body["url"] = OTHER_URL.into();
        ask.body["server_name"] = OTHER.into();
        ask
    }

    /// A request of bob, who is a user of the other homeserver, for a token of our SFU.
    fn federated(&self) -> Ask {
        let (room, bob) = (unique_room(), format!("@bob:{OTHER}"));
        self.own.join(&room, self.own.name());
        self.own.join(&room, &bob);
        let body = json!({"user_id": bob, "url": self.sfu.url(), "room_id": room, "slot_id": SLOT, "member_id": "member1"});
        self.ask(FEDERATION_GET_TOKEN, OTHER, body)
    }

    /// A delegation by alice.
    fn delegation(&self) -> Ask {
        let mut ask = self.client();
        ask.path = DELEGATE.into();
        ask.body["delay_id"] = self.own.schedule(&self.own.user("alice"), &ask.room(), 600_000).into();
        ask
    }

    fn ask(&self, path: &str, who: &str, body: Value) -> Ask {
        Ask {
            method: "POST".into(),
            path: path.into(),
            authorization: Some(format!("Bearer {}", self.own.hs_token)),
            who: Some(who.into()),
            body,
            raw: None,
        }
    }

    #[track_caller]
    fn call(&self, ask: &Ask) -> Answer {
        self.checked(self.service.call(&ask.call()))
    }

    /// Neither token is in any answer, whatever its status.
    /// Whether a request as this one is taken when its token comes so.
    #[track_caller]
    fn takes(&self, mut ask: Ask, authorization: String) -> bool {
        ask.authorization = Some(authorization);
        self.call(&ask).status == 200
    }

    #[track_caller]
    fn checked(&self, answer: Answer) -> Answer {
        let whole = format!("{:?} {}", answer.headers, answer.text());
        for secret in [&self.own.as_token, &self.own.hs_token] {
            assert!(!whole.contains(secret.as_str()), "a token of the application service in {whole}");
        }
        answer
    }

    /// All that was done so far on behalf of anybody.
    fn done(&self) -> Done {
        let mut done = Done {
            rooms: self.sfu.creations(),
            ..Done::NOTHING
        };
        for (_, asked) in self.own.asked() {
            done.users += usize::from(asked.is_about_user());
            done.servers += usize::from(asked.is_about_server());
            done.events += usize::from(asked.is_event());
            done.relays += usize::from(asked.is_relay());
            assert!(asked != Asked::Unknown, "a path that no homeserver has was called");
        }
        done
    }

    fn creations_in(&self, ask: &Ask) -> usize {
        self.sfu.creations_of(&alias(&ask.room(), SLOT))
    }
}

/// Begins as a token does, so that it is found in a log.
const REMOTE_JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJvdGhlciJ9.c2lnbmF0dXJl";

/// At the finest level of everything that may be logged.
fn traced(sfu: &Sfu) -> Setup {
    Setup::new(sfu)
        .env("LIVEKIT_LOG_LEVEL", "trace")
        .env("RUST_LOG", "trace")
        // Only what requests bring about is of interest here.
        .env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "0")
}

/// What was asked of the neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Done {
    /// Questions about the membership of users, and of homeservers.
    users: usize,
    servers: usize,
    /// Questions about delayed events.
    events: usize,
    relays: usize,
    rooms: usize,
}

impl Done {
    const NOTHING: Self = Self {
        users: 0,
        servers: 0,
        events: 0,
        relays: 0,
        rooms: 0,
    };
}

impl Sub for Done {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            users: self.users - before.users,
            servers: self.servers - before.servers,
            events: self.events - before.events,
            relays: self.relays - before.relays,
            rooms: self.rooms - before.rooms,
        }
    }
}

/// A request as our homeserver forwards it.
#[derive(Clone)]
struct Ask {
    method: String,
    path: String,
    authorization: Option<String>,
    /// The user, or the homeserver, on whose behalf it is made.
    who: Option<String>,
    body: Value,
    /// Instead of `body`.
    raw: Option<Vec<u8>>,
}

impl Ask {
    fn room(&self) -> String {
        self.body["room_id"].as_str().expect("a room").to_owned()
    }

    fn call(&self) -> Call {
        let body = self.raw.clone().unwrap_or_else(|| self.body.to_string().into());
        // As Synapse forwards it (recorded).
        let mut call = Call::with_body(&self.method, &self.path, body)
            .header("Accept", "*/*")
            .header("Content-Type", "application/json");
        if let Some(authorization) = &self.authorization {
            call = call.header("Authorization", authorization);
        }
        let name = if self.path.contains("/federation/") {
            "X-Matrix-Origin"
        } else {
            "X-Matrix-User-Identifier"
        };
        if let Some(who) = &self.who {
            call = call.header(name, who);
        }
        call
    }

    fn set(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.body[field] = value.into();
        self
    }
}
