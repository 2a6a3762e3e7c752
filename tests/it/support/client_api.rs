//! A homeserver's client-server API, as far as delayed events go (MSC4140), over plain HTTP as behind a proxy.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::json;

use rustls::ServerConfig;

use super::ca::Ca;
use super::homeserver::Homeserver;
use super::neighbour::{Neighbour, Reply, Request};
use super::unique_loopback;

pub(crate) const VERSIONS: &str = "/_matrix/client/versions";
pub(crate) const STABLE: &str = "/_matrix/client/v1/delayed_events/";
pub(crate) const UNSTABLE: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/";

/// One call about a delayed event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Managed {
    pub(crate) at: Instant,
    /// On the stable path.
    pub(crate) stable: bool,
    /// As it was sent, percent-encoded.
    pub(crate) delay_id: String,
    /// `restart`, `send` or `cancel`.
    pub(crate) what: String,
}

type Script = dyn Fn(&Managed, usize) -> Reply + Send + Sync;

/// What it answers; the script gets how many such calls (same action and id) there were before.
struct State {
    script: Mutex<Arc<Script>>,
    versions: Mutex<Reply>,
    /// By the id of the event, in the order of their arrival.
    calls: Mutex<HashMap<String, Vec<Managed>>>,
}

pub(crate) struct ClientApi {
    pub(crate) http: Neighbour,
    state: Arc<State>,
}

impl ClientApi {
    /// Offers the unstable path only, and does what it is told.
    pub(crate) fn start() -> Self {
        Self::at((unique_loopback(), 0).into())
    }

    /// The same at this address.
    pub(crate) fn at(address: SocketAddr) -> Self {
        Self::with(address, None)
    }

    /// The same over TLS.
    pub(crate) fn start_with_tls() -> Self {
        let at = unique_loopback();
        Self::with((at, 0).into(), Some(Ca::trusted().server(&[at.to_string()])))
    }

    fn with(address: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Self {
        let state = Arc::new(State {
            script: Mutex::new(Arc::new(as_it_should())),
            versions: Mutex::new(versions(true, false)),
            calls: Mutex::default(),
        });
        let answering = state.clone();
        Self {
            http: Neighbour::start(address, tls, move |request| answering.reply(request)),
            state,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.http.address())
    }

    /// One entry of `LIVEKIT_CS_API_URL_OVERRIDES`.
    pub(crate) fn override_of(&self, homeserver: &Homeserver) -> String {
        format!("{}={}", homeserver.name, self.url())
    }

    /// Answers so from now on.
    pub(crate) fn answer(&self, script: impl Fn(&Managed, usize) -> Reply + Send + Sync + 'static) {
        *self.state.script.lock().unwrap() = Arc::new(script);
    }

    pub(crate) fn answer_versions(&self, reply: Reply) {
        *self.state.versions.lock().unwrap() = reply;
    }

    /// All calls about this event, in the order of their arrival.
    pub(crate) fn calls(&self, delay_id: &str) -> Vec<Managed> {
        self.state.calls.lock().unwrap().get(delay_id).cloned().unwrap_or_default()
    }

    /// When this was done to this event.
    pub(crate) fn times(&self, what: &str, delay_id: &str) -> Vec<Instant> {
        self.calls(delay_id).iter().filter(|c| c.what == what).map(|c| c.at).collect()
    }

    pub(crate) fn count(&self, what: &str, delay_id: &str) -> usize {
        self.times(what, delay_id).len()
    }

    /// How many restarts of any event there were.
    pub(crate) fn restarts(&self) -> usize {
        self.total("restart")
    }

    /// How many sends of any event there were.
    pub(crate) fn sends(&self) -> usize {
        self.total("send")
    }

    fn total(&self, what: &str) -> usize {
        let calls = self.state.calls.lock().unwrap();
        calls.values().flatten().filter(|call| call.what == what).count()
    }

    /// How often `/versions` was asked.
    pub(crate) fn versions_asked(&self) -> usize {
        self.http.count(|r| r.path == VERSIONS)
    }

    /// Requests for anything but `/versions` and delayed events.
    pub(crate) fn strays(&self) -> Vec<String> {
        let all = self.http.requests().into_iter();
        all.filter(|r| r.target != VERSIONS && parse(r).is_none())
            .map(|r| r.target)
            .collect()
    }
}

impl State {
    fn reply(&self, request: &Request) -> Reply {
        if request.path == VERSIONS {
            return self.versions.lock().unwrap().clone();
        }
        let Some(managed) = parse(request) else {
            return unrecognized();
        };
        let before = {
            let mut calls = self.calls.lock().unwrap();
            let calls = calls.entry(managed.delay_id.clone()).or_default();
            let before = calls.iter().filter(|call| call.what == managed.what).count();
            calls.push(managed.clone());
            before
        };
        let script = self.script.lock().unwrap().clone();
        script(&managed, before)
    }
}

/// Only exactly what MSC4140 says: one segment, one word, nothing after it, `{}`.
fn parse(request: &Request) -> Option<Managed> {
    let (stable, rest) = match request.target.strip_prefix(STABLE) {
        Some(rest) => (true, rest),
        None => (false, request.target.strip_prefix(UNSTABLE)?),
    };
    let (delay_id, what) = rest.split_once('/')?;
    let known = ["restart", "send", "cancel"].contains(&what);
    let plain = !delay_id.contains(['?', '#']) && !matches!(delay_id, "" | "." | "..");
    (known && plain && request.method == "POST" && request.body == b"{}").then(|| Managed {
        at: request.at,
        stable,
        delay_id: delay_id.into(),
        what: what.into(),
    })
}

/// What was sent or cancelled is gone.
fn as_it_should() -> impl Fn(&Managed, usize) -> Reply + Send + Sync {
    let gone = Mutex::new(HashSet::new());
    move |managed, _| {
        let mut gone = gone.lock().unwrap();
        if gone.contains(&managed.delay_id) {
            return not_found();
        }
        if managed.what != "restart" {
            gone.insert(managed.delay_id.clone());
        }
        done()
    }
}

pub(crate) fn done() -> Reply {
    Reply::json(200, &json!({}))
}

/// No such delayed event.
pub(crate) fn not_found() -> Reply {
    Reply::json(404, &json!({"errcode": "M_NOT_FOUND", "error": "Delayed event not found"}))
}

/// No such path.
pub(crate) fn unrecognized() -> Reply {
    Reply::json(404, &json!({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}))
}

/// What `/versions` says of a homeserver with these paths.
pub(crate) fn versions(unstable: bool, stable: bool) -> Reply {
    Reply::json(
        200,
        &json!({
            "versions": ["v1.1", "v1.12"],
            "unstable_features": {"org.matrix.msc4140": unstable, "org.matrix.msc4140.stable": stable},
        }),
    )
}
