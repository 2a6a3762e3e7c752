//! The homeserver that the service belongs to, as a Synapse 1.163 with our registration answers (recorded): who is in which
//! room (MSC4502), delayed events (MSC4140), the way to other homeservers (MSC4512). It looks at the `as_token` of every call
//! as Synapse does. Its federation side, which knows OpenID tokens, is an ordinary [`Homeserver`] of the same name.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::ca::Ca;
use super::client_api::{done, not_found, unrecognized};
use super::homeserver::Homeserver;
use super::neighbour::{Neighbour, Reply, Request};
use super::service::Setup;
use super::{secrets, unique, unique_loopback};

/// One of the three proposals, each with a stable path and an unstable one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Proposal {
    DelayedEvents,
    IsJoined,
    FedProxy,
}

impl Proposal {
    pub(crate) const ALL: [Self; 3] = [Self::DelayedEvents, Self::IsJoined, Self::FedProxy];

    const fn flag(self) -> &'static str {
        match self {
            Self::DelayedEvents => "org.matrix.msc4140",
            Self::IsJoined => "io.element.msc4502",
            Self::FedProxy => "io.element.msc4512",
        }
    }
}

/// A call, as it is understood.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asked {
    Versions,
    /// Which user the `as_token` is.
    Whoami,
    IsJoined {
        stable: bool,
        room: String,
        mxid: Option<String>,
        server: Option<String>,
    },
    JoinedMembers {
        room: String,
    },
    /// What a delayed event is.
    Event {
        stable: bool,
        delay_id: String,
    },
    /// `restart`, `send` or `cancel` of one.
    Manage {
        stable: bool,
        delay_id: String,
        what: String,
    },
    Relay {
        stable: bool,
        body: Value,
    },
    /// A path that no homeserver has.
    Unknown,
}

impl Asked {
    /// The proposal that it belongs to, and whether it came on its stable path.
    pub(crate) fn proposal(&self) -> Option<(Proposal, bool)> {
        match self {
            Self::Versions | Self::Whoami | Self::JoinedMembers { .. } | Self::Unknown => None,
            Self::IsJoined { stable, .. } => Some((Proposal::IsJoined, *stable)),
            Self::Event { stable, .. } | Self::Manage { stable, .. } => Some((Proposal::DelayedEvents, *stable)),
            Self::Relay { stable, .. } => Some((Proposal::FedProxy, *stable)),
        }
    }

    pub(crate) fn is_relay(&self) -> bool {
        matches!(self, Self::Relay { .. })
    }

    /// A question about a user's membership.
    pub(crate) fn is_about_user(&self) -> bool {
        matches!(self, Self::IsJoined { mxid: Some(_), .. })
    }

    /// A question about a homeserver's membership.
    pub(crate) fn is_about_server(&self) -> bool {
        matches!(self, Self::IsJoined { server: Some(_), .. })
    }

    pub(crate) fn is_event(&self) -> bool {
        matches!(self, Self::Event { .. })
    }

    pub(crate) fn is_manage(&self, of: &str, wanted: &str) -> bool {
        matches!(self, Self::Manage { delay_id, what, .. } if delay_id == of && what == wanted)
    }
}

struct Event {
    user: String,
    room: String,
    delay_ms: u64,
}

type Script = dyn Fn(&Request, &Asked) -> Option<Reply> + Send + Sync;
type Peer = dyn Fn(&Value) -> (u16, Value) + Send + Sync;

struct State {
    name: String,
    as_token: Mutex<String>,
    /// Which paths are served: stable or not.
    served: Mutex<HashSet<(Proposal, bool)>>,
    /// `unstable_features`.
    features: Mutex<Value>,
    joined: Mutex<HashSet<(String, String)>>,
    users: Mutex<HashSet<String>>,
    events: Mutex<HashMap<String, Event>>,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
    script: Mutex<Option<Arc<Script>>>,
}

pub(crate) struct OwnHomeserver {
    /// The client-server API: connections, requests, refusing.
    pub(crate) http: Neighbour,
    /// The federation side: OpenID tokens, well-known files.
    pub(crate) federation: Homeserver,
    pub(crate) as_token: String,
    pub(crate) hs_token: String,
    encrypted: bool,
    state: Arc<State>,
}

impl OwnHomeserver {
    /// Its client-server API speaks plain HTTP, as behind a proxy.
    pub(crate) fn start() -> Self {
        Self::open(false)
    }

    /// Its client-server API speaks TLS.
    pub(crate) fn start_with_tls() -> Self {
        Self::open(true)
    }

    fn open(encrypted: bool) -> Self {
        let federation = Homeserver::start();
        let as_token = secrets::as_token();
        let state = Arc::new(State {
            name: federation.name.clone(),
            as_token: Mutex::new(as_token.clone()),
            served: Mutex::new(Proposal::ALL.map(|proposal| (proposal, false)).into()),
            // Synapse has no flag for MSC4512.
            features: Mutex::new(json!({"org.matrix.msc4140": true, "org.matrix.msc4143": true, "io.element.msc4502": true})),
            joined: Mutex::default(),
            users: Mutex::default(),
            events: Mutex::default(),
            peers: Mutex::default(),
            script: Mutex::default(),
        });
        let answering = state.clone();
        let address = SocketAddr::new(unique_loopback().into(), 0);
        let tls = encrypted.then(|| Ca::trusted().server(&[address.ip().to_string()]));
        Self {
            http: Neighbour::start(address, tls, move |request| answering.reply(request)),
            federation,
            as_token,
            hs_token: secrets::hs_token(),
            encrypted,
            state,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.state.name
    }

    pub(crate) fn user(&self, localpart: &str) -> String {
        self.federation.user(localpart)
    }

    pub(crate) fn url(&self) -> String {
        format!("http{}://{}", if self.encrypted { "s" } else { "" }, self.http.address())
    }

    /// A service that is its application service, and finds it at the address that the operator wrote down.
    pub(crate) fn serving(&self, setup: Setup) -> Setup {
        self.serving_lost(setup)
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &format!("{}={}", self.name(), self.url()))
    }

    /// A service that is its application service, and has to find it.
    pub(crate) fn serving_lost(&self, setup: Setup) -> Setup {
        setup
            .env("LIVEKIT_HS_SERVER_NAME", self.name())
            .env("LIVEKIT_AS_TOKEN", &self.as_token)
            .env("LIVEKIT_HS_TOKEN", &self.hs_token)
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", self.name())
    }

    /// It was started again with another registration.
    pub(crate) fn change_token(&self, as_token: &str) {
        *self.state.as_token.lock().unwrap() = as_token.to_owned();
    }

    /// From now on this user, or this homeserver, is in the room.
    pub(crate) fn join(&self, room: &str, who: &str) {
        self.state.users.lock().unwrap().insert(who.into());
        self.state.joined.lock().unwrap().insert((room.into(), who.into()));
    }

    pub(crate) fn part(&self, room: &str, who: &str) {
        self.state.joined.lock().unwrap().remove(&(room.into(), who.into()));
    }

    /// A delayed event of this user; returns its id.
    pub(crate) fn schedule(&self, user: &str, room: &str, delay_ms: u64) -> String {
        let delay_id = format!("syd_{}", unique());
        self.schedule_as(&delay_id, user, room, delay_ms);
        delay_id
    }

    /// The same with this id.
    pub(crate) fn schedule_as(&self, delay_id: &str, user: &str, room: &str, delay_ms: u64) {
        let event = Event {
            user: user.into(),
            room: room.into(),
            delay_ms,
        };
        self.state.users.lock().unwrap().insert(user.into());
        self.state.events.lock().unwrap().insert(delay_id.to_owned(), event);
    }

    /// The service of another homeserver: gets the body, gives status and content.
    pub(crate) fn peer(&self, name: &str, answer: impl Fn(&Value) -> (u16, Value) + Send + Sync + 'static) {
        self.state.peers.lock().unwrap().insert(name.into(), Arc::new(answer));
    }

    /// Serves exactly these paths.
    pub(crate) fn serve(&self, paths: impl IntoIterator<Item = (Proposal, bool)>) {
        *self.state.served.lock().unwrap() = paths.into_iter().collect();
    }

    /// What `/versions` says it serves.
    pub(crate) fn advertise(&self, paths: impl IntoIterator<Item = (Proposal, bool)>) {
        let flag = |(proposal, stable): (Proposal, bool)| {
            let name = proposal.flag().to_owned() + if stable { ".stable" } else { "" };
            (name, Value::Bool(true))
        };
        *self.state.features.lock().unwrap() = Value::Object(paths.into_iter().map(flag).collect());
    }

    /// Before anything else a call is answered so; `None`: as it would have been.
    pub(crate) fn script(&self, script: impl Fn(&Request, &Asked) -> Option<Reply> + Send + Sync + 'static) {
        *self.state.script.lock().unwrap() = Some(Arc::new(script));
    }

    pub(crate) fn unscript(&self) {
        *self.state.script.lock().unwrap() = None;
    }

    /// Every call so far that was made for somebody: without `/versions`, and what a service asks when it starts.
    pub(crate) fn asked(&self) -> Vec<(Request, Asked)> {
        let all = self.http.requests().into_iter().map(|request| {
            let asked = understand(&request);
            (request, asked)
        });
        let of_the_start = |asked: &Asked| matches!(asked, Asked::IsJoined { room, .. } if room.starts_with("!lk-jwt-service:"));
        all.filter(|(_, asked)| !matches!(asked, Asked::Versions | Asked::Whoami) && !of_the_start(asked))
            .collect()
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Asked) -> bool) -> usize {
        self.asked().iter().filter(|(_, asked)| wanted(asked)).count()
    }

    /// The bodies that were to be relayed, oldest first.
    pub(crate) fn relayed(&self) -> Vec<Value> {
        let mut bodies = Vec::new();
        for (_, asked) in self.asked() {
            if let Asked::Relay { body, .. } = asked {
                bodies.push(body);
            }
        }
        bodies
    }

    /// What was done to a delayed event, oldest first.
    pub(crate) fn managed(&self, delay_id: &str, what: &str) -> Vec<Request> {
        let all = self.asked().into_iter();
        all.filter(|(_, asked)| asked.is_manage(delay_id, what))
            .map(|(request, _)| request)
            .collect()
    }
}

impl State {
    fn reply(&self, request: &Request) -> Reply {
        let asked = understand(request);
        let script = self.script.lock().unwrap().clone();
        if let Some(reply) = script.and_then(|script| script(request, &asked)) {
            return reply;
        }
        let lacks = asked.proposal().is_some_and(|path| !self.served.lock().unwrap().contains(&path));
        if lacks || asked == Asked::Unknown {
            return unrecognized();
        }
        if asked == Asked::Versions {
            let features = self.features.lock().unwrap().clone();
            return Reply::json(200, &json!({"versions": ["v1.1", "v1.12"], "unstable_features": features}));
        }
        // Synapse 1.163 lets anybody manage an event who knows its id.
        let open = matches!(asked, Asked::Manage { .. }) && request.header("authorization").is_none();
        if !open && let Err(refusal) = self.admit(request) {
            return refusal;
        }
        match asked {
            Asked::Versions | Asked::Unknown => unrecognized(),
            Asked::Whoami => Reply::json(
                200,
                &json!({"user_id": format!("@lk-jwt-service:{}", self.name), "is_guest": false}),
            ),
            Asked::IsJoined { room, mxid, server, .. } => self.is_joined(&room, mxid.as_deref(), server.as_deref()),
            Asked::JoinedMembers { room } => self.joined_members(&room),
            Asked::Event { delay_id, .. } => self.event(&delay_id, request.query("user_id").unwrap_or_default()),
            Asked::Manage { delay_id, what, .. } => {
                let mut events = self.events.lock().unwrap();
                let known = if what == "restart" {
                    events.contains_key(&delay_id)
                } else {
                    events.remove(&delay_id).is_some()
                };
                if known { done() } else { not_found() }
            }
            Asked::Relay { body, .. } => self.relay(&body),
        }
    }

    fn admit(&self, request: &Request) -> Result<(), Reply> {
        let Some(authorization) = request.header("authorization") else {
            return Err(error(401, "M_MISSING_TOKEN", "Missing access token"));
        };
        if authorization != format!("Bearer {}", self.as_token.lock().unwrap()) {
            let body = json!({"errcode": "M_UNKNOWN_TOKEN", "error": "Invalid access token passed.", "soft_logout": false});
            return Err(Reply::json(401, &body));
        }
        let Some(user) = request.query("user_id") else { return Ok(()) };
        if !user.ends_with(&format!(":{}", self.name)) {
            let text = format!("Application service cannot masquerade as this user ({user}).");
            return Err(error(403, "M_FORBIDDEN", &text));
        }
        if !self.users.lock().unwrap().contains(user) {
            let text = format!("Application service has not registered this user ({user})");
            return Err(error(403, "M_FORBIDDEN", &text));
        }
        Ok(())
    }

    fn is_joined(&self, room: &str, mxid: Option<&str>, server: Option<&str>) -> Reply {
        let ((Some(who), None) | (None, Some(who))) = (mxid, server) else {
            let text = "Exactly one of 'mxid' or 'server_name' query parameters must be given";
            return error(400, "M_MISSING_PARAM", text);
        };
        if !room.starts_with('!') {
            return error(400, "M_INVALID_PARAM", "Invalid room ID");
        }
        if mxid.is_some_and(|mxid| !mxid.starts_with('@') || !mxid.contains(':')) {
            return error(400, "M_INVALID_PARAM", &format!("Invalid MXID: {who}"));
        }
        let joined = self.joined.lock().unwrap().contains(&(room.to_owned(), who.to_owned()));
        Reply::json(200, &json!({ "joined": joined }))
    }

    fn joined_members(&self, room: &str) -> Reply {
        let joined = self.joined.lock().unwrap();
        let here = joined.iter().filter(|(name, who)| name == room && who.starts_with('@'));
        let here: serde_json::Map<_, _> = here.map(|(_, who)| (who.clone(), json!({"display_name": who}))).collect();
        if here.keys().any(|who| who.ends_with(&format!(":{}", self.name))) {
            Reply::json(200, &json!({ "joined": here }))
        } else {
            error(403, "M_FORBIDDEN", "Appservices can only query rooms that a user of theirs is in")
        }
    }

    fn event(&self, delay_id: &str, user: &str) -> Reply {
        match self.events.lock().unwrap().get(delay_id) {
            Some(event) if event.user == user => Reply::json(
                200,
                &json!({"delay_id": delay_id, "room_id": event.room, "type": "m.room.message", "delay_ms": event.delay_ms,
                    "delayed_since_ts": 1_795_242_817_186_u64, "content": {"msgtype": "m.text", "body": "x"}}),
            ),
            _ => not_found(),
        }
    }

    fn relay(&self, call: &Value) -> Reply {
        let text = |key: &str| call[key].as_str().unwrap_or_default().to_owned();
        let (destination, path) = (text("destination"), text("path"));
        let denied = |errcode: &str, text: &str| error(403, &format!("IO.ELEMENT.MSC4512.M_FEDPROXY_{errcode}"), text);
        if destination.is_empty() {
            return error(400, "M_MISSING_PARAM", "Missing or invalid destination");
        }
        if !["GET", "PUT", "POST", "DELETE"].contains(&text("method").as_str()) {
            return error(400, "M_INVALID_PARAM", "method must be one of ('GET', 'PUT', 'POST', 'DELETE')");
        }
        let below = path
            .strip_prefix("/_matrix/federation/")
            .and_then(|path| path.split_once("/rtc/livekit/"))
            .is_some_and(|(version, _)| version == "v1" || version == "unstable/io.element.msc4195");
        if !below || path.contains(['?', '#']) || path.split('/').any(|part| part == "." || part == "..") {
            return denied("PATH_NOT_ALLOWED", "Path must be under /_matrix/federation/<version>/rtc/livekit");
        }
        if destination == self.name {
            return denied("DESTINATION_DENIED", "Cannot target this homeserver itself");
        }
        let peer = self.peers.lock().unwrap().get(&destination).cloned();
        match peer {
            Some(peer) => {
                let (status, content) = peer(&call["body"]);
                Reply::json(200, &json!({"status": status, "content": content}))
            }
            None => error(
                502,
                "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED",
                "Failed to send request: ConnectionRefusedError: Connection was refused by other side: 111: Connection refused.",
            ),
        }
    }
}

/// A Matrix error.
pub(crate) fn error(status: u16, errcode: &str, text: &str) -> Reply {
    Reply::json(status, &json!({"errcode": errcode, "error": text}))
}

fn understand(request: &Request) -> Asked {
    understood(request).unwrap_or(Asked::Unknown)
}

/// Only exactly what the proposals say: each name one percent-encoded segment.
fn understood(request: &Request) -> Option<Asked> {
    let path = request.path.as_str();
    if (request.method.as_str(), path) == ("GET", "/_matrix/client/versions") {
        return Some(Asked::Versions);
    }
    if (request.method.as_str(), path) == ("GET", "/_matrix/client/v3/account/whoami") {
        return Some(Asked::Whoami);
    }
    let version = path.strip_prefix("/_matrix/client/")?;
    let rest = |stable: &str, unstable: &str| {
        version
            .strip_prefix(stable)
            .map(|rest| (true, rest))
            .or_else(|| Some((false, version.strip_prefix(unstable)?)))
    };
    match request.method.as_str() {
        "POST" if rest("v1/appservice/fed_proxy", "unstable/io.element.msc4512/appservice/fed_proxy").is_some_and(|r| r.1.is_empty()) => {
            return Some(Asked::Relay {
                stable: version.starts_with("v1/"),
                body: serde_json::from_slice(&request.body).ok()?,
            });
        }
        _ => {}
    }
    if let Some((stable, rest)) = rest("v1/delayed_events/", "unstable/org.matrix.msc4140/delayed_events/") {
        let words: Vec<_> = rest.split('/').collect();
        return match (request.method.as_str(), words.as_slice()) {
            ("GET", [id]) => Some(Asked::Event {
                stable,
                delay_id: decoded(id)?,
            }),
            ("POST", [id, what @ ("restart" | "send" | "cancel")]) if request.body == b"{}" => Some(Asked::Manage {
                stable,
                delay_id: decoded(id)?,
                what: (*what).to_owned(),
            }),
            _ => None,
        };
    }
    let (stable, rest) = rest("v3/rooms/", "unstable/io.element.msc4502/rooms/")?;
    let (room, what) = rest.split_once('/')?;
    let room = decoded(room)?;
    match (request.method.as_str(), what, stable) {
        ("GET", "is_joined", _) => Some(Asked::IsJoined {
            stable,
            room,
            mxid: request.query("mxid").map(str::to_owned),
            server: request.query("server_name").map(str::to_owned),
        }),
        ("GET", "joined_members", true) => Some(Asked::JoinedMembers { room }),
        _ => None,
    }
}

/// A segment of a path without its percent signs; `None` for what a server would take for something else.
fn decoded(segment: &str) -> Option<String> {
    if matches!(segment, "" | "." | "..") {
        return None;
    }
    let mut bytes = segment.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(out).ok()
}
