//! `lk-jwt-service doctor`: what is wrong around this service, and what to do about it.
//!
//! The running service makes the checks, since it has the network, the settings, the store and the webhooks; the command asks it,
//! by a ticket that only who knows the signing secret can make, and draws what comes back. Where nothing answers, the command
//! makes the checks by itself.
//!
//! * pure: `fault.rs` all faults and remedies; `ticket.rs` who may ask; `gate.rs` how often; `media.rs` the SFU's words about media;
//!   `paint.rs` how it is drawn
//! * `check.rs` a finding and where it goes; `arrivals.rs` what arrives meanwhile; `socket.rs` a WebSocket, `signal.rs` what is said on it
//! * a file for each group of checks: `sfu.rs`, `discovery.rs`, `routes.rs`, `homeserver.rs`, `application_service.rs`, `store.rs`,
//!   `user.rs` (webhooks are tried with the SFU's room, in `sfu.rs`)
//! * `command.rs` the command: `settings.rs` whose settings count, `ask.rs` finds the service and asks it
#![expect(
    clippy::disallowed_methods,
    reason = "a use case that drives: asks, waits, and names what it makes"
)]

mod application_service;
mod arrivals;
mod ask;
mod check;
mod command;
mod discovery;
pub mod fault;
mod gate;
mod homeserver;
mod media;
mod paint;
mod routes;
mod settings;
mod sfu;
mod signal;
mod socket;
mod store;
mod ticket;
mod user;

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{self, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use url::Url;

pub use arrivals::{Arrivals, Astray};
pub use check::{Group, Line, Verdict, View, WAITING};
pub use command::run as command;
pub use ticket::{TicketKey, Use, Wishes};

use crate::access::HostPattern;
use crate::clock::unix_seconds;
use crate::config::Config;
use crate::driver::fleet::FleetReport;
use crate::federation::{Failure, Federation, Reply};
use crate::homeserver::OwnHomeserver;
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::sfu::Sfu;
use crate::store::Store;
use check::Sink;
use gate::{Gate, Refusal};

/// Time for a whole run, and for one with a slow answer.
pub const RUN_TIMEOUT: Duration = Duration::from_secs(18);
/// Time for a run that waits for a slow answer.
pub const SLOW_RUN_TIMEOUT: Duration = Duration::from_secs(43);
/// Time for one look at something.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the slow answer takes.
pub const SLOW_ANSWER: Duration = Duration::from_secs(12);
/// Header by which a public route is asked who answers.
pub const HEADER: &str = "x-lk-jwt-doctor";
/// Body that is read of an answer, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Homeservers that are looked at side by side.
const AT_ONCE: usize = 4;

/// Parts that are examined, and by which they are.
pub struct Context {
    /// Place from which is looked.
    pub view: View,
    /// The way to homeservers, and to whatever has to pass the guard.
    pub federation: Arc<Federation>,
    /// The SFU, where its key is known.
    pub sfu: Option<Arc<Sfu>>,
    /// Our homeserver in application-service mode.
    pub own: Option<Arc<OwnHomeserver>>,
    /// The store of delegated leaves, where it is at hand.
    pub store: Option<Store>,
    /// Whether a delegated leave with this room and identity is known here, where that can be told.
    pub knows: Option<Knows>,
    /// The replicas that share the store, as this one sees them, where it is the one that runs.
    pub fleet: Option<Fleet>,
    /// Arrivals at this service, where it is the one that runs.
    pub arrivals: Option<Arc<Arrivals>>,
    /// Settings that the checks are about.
    pub settings: Settings,
}

/// The replicas that share the store; `None` where this one is alone.
pub type Fleet = Box<dyn Fn() -> Option<FleetReport> + Send + Sync>;
/// Whether a delegated leave of this room and identity is known.
pub type Knows = Box<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// Settings that the checks are about.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `LIVEKIT_URL`, as clients get it; empty where it is not known.
    pub livekit_url: String,
    /// Base of the SFU's API.
    pub livekit_api: Option<Url>,
    /// Homeservers with full access that are named.
    pub servers: Vec<ServerName>,
    /// Other homeservers that are named in a list, with its variable.
    pub mentioned: Vec<(ServerName, &'static str)>,
    /// Entries of lists that contradict each other, in words.
    pub contradictions: Vec<String>,
    /// Addresses of client-server APIs that the operator wrote down.
    pub client_apis: BTreeMap<ServerName, Url>,
    /// Public address of this service that the operator wrote down.
    pub public: Option<Url>,
}

impl Settings {
    /// Takes what the checks are about out of a configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut servers: Vec<ServerName> = config.full_access.entries().cloned().collect();
        let own = config.app_service.as_ref().map(|own| &own.server_name);
        if let Some(own) = own.filter(|own| !servers.contains(own)) {
            servers.insert(0, own.clone());
        }
        let mut mentioned = Vec::new();
        let mut mention = |name: ServerName, variable| {
            if !servers.iter().any(|server| server.host_key() == name.host_key()) {
                mentioned.push((name, variable));
            }
        };
        for name in config.remote_can_publish.entries() {
            mention(name.clone(), "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS");
        }
        let patterns = [
            (&config.allowed, "LIVEKIT_ALLOWED_HOMESERVERS"),
            (&config.blocked, "LIVEKIT_BLOCKED_HOMESERVERS"),
        ];
        for (list, variable) in patterns {
            for name in list.entries().filter_map(HostPattern::host) {
                mention(name, variable);
            }
        }
        Self {
            livekit_url: config.livekit.url.clone(),
            livekit_api: Some(config.livekit.api_base.clone()),
            servers,
            mentioned,
            contradictions: config.policy().contradictions(),
            client_apis: config.cs_api_overrides.clone(),
            public: None,
        }
    }
}

/// The part of the service that examines it.
pub struct Doctor {
    context: Arc<Context>,
    arrivals: Arc<Arrivals>,
    instance: u64,
    gate: Arc<Mutex<Gate>>,
    answers_slowly: AtomicBool,
    /// The secret may be known to everybody (`--dev`): only callers on this machine count.
    only_loopback: bool,
}

/// Refusal to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The caller does not prove to know the secret.
    NotProven,
    /// The caller may, and has to wait for so many seconds.
    Later(u32),
}

impl Doctor {
    /// Makes the examiner of what `context` names; with `only_loopback`, for callers on this machine.
    #[must_use]
    pub fn new(context: Context, arrivals: Arc<Arrivals>, only_loopback: bool) -> Self {
        Self {
            context: Arc::new(context),
            arrivals,
            instance: rand::random(),
            gate: Arc::default(),
            answers_slowly: AtomicBool::new(false),
            only_loopback,
        }
    }

    /// Arrivals at this service.
    #[must_use]
    pub const fn arrivals(&self) -> &Arc<Arrivals> {
        &self.arrivals
    }

    /// A run for whoever has a ticket under `secret`. Dropping it ends it.
    ///
    /// # Errors
    /// When the caller may not, or has to wait.
    pub fn examine(&self, ticket: &str, secret: &Secret, is_loopback: bool) -> Result<Findings, Denied> {
        let now = unix_seconds();
        let claims = TicketKey::derive(secret)
            .verify(ticket, Use::Run, now)
            .filter(|_| is_loopback || !self.only_loopback)
            .ok_or(Denied::NotProven)?;
        let entered = self.gate.lock().enter(&claims.jti, claims.ends(), now);
        entered.map_err(|refusal| match refusal {
            Refusal::Used => Denied::NotProven,
            Refusal::Later(seconds) => Denied::Later(seconds),
        })?;
        let running = Running(self.gate.clone());
        let (lines, found) = mpsc::channel(WAITING);
        let (context, secret) = (self.context.clone(), secret.clone());
        let run: Work<'_> = Box::pin(async move {
            let _running = running;
            run(&context, &claims.wishes, Some(&secret), &lines).await;
        });
        Ok(Findings { run: Some(run), found })
    }

    /// Names this instance to whoever has a ticket for that question; waits first where the ticket is for a slow answer.
    pub async fn introduce(&self, ticket: &str, secret: &Secret) -> Option<String> {
        let (key, now) = (TicketKey::derive(secret), unix_seconds());
        if key.verify(ticket, Use::Slow, now).is_some() {
            // One at a time: it costs a connection.
            if !self.answers_slowly.swap(true, Relaxed) {
                let _answering = Answering(&self.answers_slowly);
                tokio::time::sleep(SLOW_ANSWER).await;
            }
        } else {
            key.verify(ticket, Use::Who, now)?;
        }
        Some(format!(
            "lk-jwt-service/{}; instance={:016x}",
            env!("CARGO_PKG_VERSION"),
            self.instance
        ))
    }
}

/// A run, and what it finds.
pub struct Findings {
    /// The run, until it is over.
    run: Option<Work<'static>>,
    found: mpsc::Receiver<Line>,
}

impl Findings {
    /// Goes on with the run until there is a line of it; `None` at its end.
    pub fn poll_next(&mut self, context: &mut task::Context<'_>) -> Poll<Option<Line>> {
        if self.run.as_mut().is_some_and(|run| run.as_mut().poll(context).is_ready()) {
            self.run = None;
        }
        self.found.poll_recv(context)
    }
}

/// A run that is not over.
struct Running(Arc<Mutex<Gate>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().leave();
    }
}

/// A slow answer that is not over.
struct Answering<'a>(&'a AtomicBool);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.store(false, Relaxed);
    }
}

/// A run: what is looked at, until when, and by which tickets.
struct Run<'a> {
    context: &'a Context,
    wishes: &'a Wishes,
    /// Signs tickets for public routes.
    secret: Option<&'a Secret>,
    /// The name that is taken for our homeserver's and is none, so that all else about it follows from that.
    misnamed: Option<&'a ServerName>,
    began: Instant,
    ends: Instant,
}

impl Run<'_> {
    /// When a look that begins now has to be over.
    fn soon(&self) -> Instant {
        self.ends.min(Instant::now() + LOOK_TIMEOUT)
    }

    /// Homeservers that this run is about.
    fn servers(&self) -> Vec<ServerName> {
        if self.wishes.servers.is_empty() {
            let servers = self.context.settings.servers.iter();
            return servers.filter(|name| Some(*name) != self.misnamed).cloned().collect();
        }
        let names = self.wishes.servers.iter();
        names.filter_map(|name| ServerName::parse(name).ok()).collect()
    }

    /// Whether the host of `url` stands in the configuration.
    fn is_configured(&self, url: &Url) -> bool {
        let settings = &self.context.settings;
        let Some(host) = url.host_str() else { return false };
        let of_livekit = Url::parse(&settings.livekit_url).ok();
        let urls = of_livekit.iter().chain(&settings.livekit_api).chain(&settings.public);
        let is_of = |other: &Url| other.host_str().is_some_and(|other| other.eq_ignore_ascii_case(host));
        urls.chain(settings.client_apis.values()).any(is_of)
            || ServerName::parse(host).is_ok_and(|name| self.context.federation.is_configured(&name))
            || ServerName::parse(&url[url::Position::BeforeHost..url::Position::AfterPort])
                .is_ok_and(|name| self.context.federation.is_configured(&name))
    }
}

/// Work that is made beside other work, of one type, so that what waits for it is compiled once.
type Work<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Makes all checks that are wished for.
pub async fn run(context: &Context, wishes: &Wishes, secret: Option<&Secret>, lines: &mpsc::Sender<Line>) {
    let time = if wishes.slow { SLOW_RUN_TIMEOUT } else { RUN_TIMEOUT };
    let began = Instant::now();
    let ends = began + time;
    let run = Run {
        context,
        wishes,
        secret,
        misnamed: application_service::misnamed(context, ends.min(Instant::now() + LOOK_TIMEOUT)).await,
        began,
        ends,
    };
    let run = &run;
    let sinks = Group::ALL.map(|group| Sink::new(lines, group, context.view).wanted(wishes.wants(group)));
    let [sfu, webhook, discovery, routes, homeserver, app_service, store, user] = &sinks;
    side_by_side(vec![
        group(run, &sinks[..2], Box::pin(sfu::check(run, sfu, webhook))),
        group(run, &sinks[2..4], Box::pin(discovery::check(run, discovery, routes))),
        group(run, &sinks[4..5], Box::pin(homeserver::check(run, homeserver))),
        group(run, &sinks[5..6], Box::pin(application_service::check(run, app_service))),
        group(run, &sinks[6..7], Box::pin(store::check(run, store))),
        group(run, &sinks[7..], Box::pin(user::check(run, user))),
    ])
    .await;
    let _ = lines.send(Line::End { end: None }).await;
}

/// Makes the checks of some groups within the time of the run, says where they were not done with, and ends the groups.
fn group<'a>(run: &'a Run<'_>, sinks: &'a [Sink<'a>], checks: Work<'a>) -> Work<'a> {
    Box::pin(async move {
        let wanted = || sinks.iter().filter(|sink| sink.is_wanted());
        if wanted().next().is_some() && timeout_at(run.ends, checks).await.is_err() {
            for sink in wanted() {
                sink.warn("time", &fault::TOO_SLOW, &"the checks of this group were not done in time");
            }
        }
        for sink in wanted() {
            sink.end().await;
        }
    })
}

/// Makes all of `works` at once, until each has ended.
async fn side_by_side(mut works: Vec<Work<'_>>) {
    poll_fn(|context| {
        works.retain_mut(|work| work.as_mut().poll(context).is_pending());
        if works.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Kind of trouble on the way to somebody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// DNS says that there is no such name.
    NoName,
    /// The certificate is not one for that name, now, from somebody who is trusted.
    Certificate,
    /// The guard does not let the address be dialled.
    Guarded,
    /// No connection, or no answer.
    Connection,
}

impl Trouble {
    fn of(failure: &Failure) -> Self {
        match failure {
            failure if failure.is_no_name() => Self::NoName,
            Failure::Tls { error, .. } if crate::tls::remedy(error).is_some() => Self::Certificate,
            Failure::AddressDenied { .. } => Self::Guarded,
            Failure::Dns { .. }
            | Failure::Connect { .. }
            | Failure::Tls { .. }
            | Failure::Proxy { .. }
            | Failure::NoService(_)
            | Failure::BadDelegation(_)
            | Failure::NoClientApi(_)
            | Failure::Http(_)
            | Failure::TooLarge(_)
            | Failure::Timeout
            | Failure::Busy
            | Failure::Spent => Self::Connection,
        }
    }

    /// How bad it is that something public cannot be reached: from inside it may be reached from elsewhere all the same.
    const fn verdict(self, view: View) -> Verdict {
        match (self, view) {
            (Self::NoName | Self::Certificate, _) | (_, View::Outside) => Verdict::Fail,
            (Self::Guarded | Self::Connection, View::Inside) => Verdict::Warn,
        }
    }
}

/// Failure in words, with the date of a certificate as one.
fn words(failure: &Failure) -> String {
    crate::tls::with_date(failure.to_string())
}

/// The beginning of what a page says, to tell whose it is.
fn page(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(200)]);
    let title = text
        .split_once("<title>")
        .and_then(|(_, rest)| rest.split_once("</title>"))
        .map(|(title, _)| title);
    let words: Vec<_> = title.unwrap_or(&text).split_whitespace().collect();
    let said: String = words.join(" ").chars().filter(|c| !matches!(c, '“' | '”')).take(80).collect();
    if said.is_empty() {
        "an empty page".to_owned()
    } else {
        format!("“{said}”")
    }
}

/// How an answer was that is no yes: its status, and its error code or whose page it is. Of other JSON nothing is told: it may hold
/// a token.
fn answered(reply: &Reply) -> String {
    let code = reply.status.as_u16();
    match json_of(&reply.body) {
        Value::Object(json) => match json.get("errcode").and_then(Value::as_str) {
            Some(errcode) => format!("{code} {errcode}"),
            None => format!("{code}, and not what was asked for"),
        },
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => format!("{code}: {}", page(&reply.body)),
    }
}

/// JSON that somebody else wrote; null where it is none.
#[inline(never)]
fn json_of(text: &[u8]) -> Value {
    serde_json::from_slice(text).unwrap_or_default()
}

/// A JSON object of texts.
fn texts(fields: &[(&str, &str)]) -> Value {
    let mut object = Map::new();
    for (name, text) in fields {
        object.insert((*name).to_owned(), (*text).into());
    }
    object.into()
}

/// The address of `route` below that of the service.
fn below(service: &Url, route: &str) -> Url {
    let mut url = service.clone();
    url.set_path(&format!("{}/{route}", service.path().trim_end_matches('/')));
    url
}

/// A name that nobody else has, for rooms and tickets.
#[inline(never)]
fn nonce() -> String {
    format!("{:016x}", rand::random::<u64>())
}
