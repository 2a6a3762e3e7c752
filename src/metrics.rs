//! The metrics of the service, and how Prometheus reads them: text format 0.0.4.
//!
//! Written by hand rather than with `prometheus-client`, whose OpenMetrics counters and `info` the older `promtool` of
//! distributions refuses. Everything is a static atomic number: counting costs no allocation and no lock, and may be done
//! anywhere. Never a user, a room or somebody else's server as a label.

use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::outcome::{Outcome, Route, words};

/// The content type of text format 0.0.4.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds of all histograms, in seconds and in microseconds.
const BOUNDS: [(&str, u64); 13] = [
    ("0.001", 1_000),
    ("0.005", 5_000),
    ("0.025", 25_000),
    ("0.1", 100_000),
    ("0.25", 250_000),
    ("0.5", 500_000),
    ("1", 1_000_000),
    ("2.5", 2_500_000),
    ("5", 5_000_000),
    ("10", 10_000_000),
    ("30", 30_000_000),
    ("60", 60_000_000),
    ("300", 300_000_000),
];

/// How a verification ends.
const VERIFIED: [Outcome; 6] = [
    Outcome::Ok,
    Outcome::TokenRejected,
    Outcome::UserMismatch,
    Outcome::HomeserverUnreachable,
    Outcome::HomeserverError,
    Outcome::Busy,
];

/// All numbers of this process.
pub static METRICS: Metrics = Metrics {
    requests: [const { [const { Number::new() }; Outcome::COUNT] }; Route::COUNT],
    request_duration: [const { Histogram::new() }; Route::COUNT],
    requests_in_flight: Number::new(),
    neighbour_up: [const { AtomicI64::new(-1) }; Neighbour::ALL.len()],
    neighbour_requests: [const { [const { Histogram::new() }; CallResult::ALL.len()] }; NeighbourCall::ALL.len()],
    verifications: [const { Number::new() }; Outcome::COUNT],
    rooms: [const { Number::new() }; RoomResult::ALL.len()],
    tokens: [const { Number::new() }; TokenAccess::ALL.len()],
    job_ends: [const { Number::new() }; JobEnd::ALL.len()],
    leave_lag: Histogram::new(),
    homeserver_rate_limited: Number::new(),
    webhooks: [const { Number::new() }; WebhookResult::ALL.len()],
    webhook_last_received: Number::new(),
    store_errors: Number::new(),
    guard_refusals: [const { Number::new() }; GuardReason::ALL.len()],
    limit_hits: [const { Number::new() }; Limit::ALL.len()],
    kicks: Number::new(),
    fleet: Fleet {
        nodes: [const { Number::new() }; NODE_STATES.len()],
        watches: Number::new(),
        epoch: Number::new(),
        guests: Number::new(),
        unread: Number::new(),
        takeovers: [const { Number::new() }; TAKEOVERS.len()],
    },
};

/// All metrics of the service; there is one of it, [`METRICS`].
#[derive(Debug)]
pub struct Metrics {
    requests: [[Number; Outcome::COUNT]; Route::COUNT],
    request_duration: [Histogram; Route::COUNT],
    /// Requests that have no answer yet.
    pub requests_in_flight: Number,
    neighbour_up: [AtomicI64; Neighbour::ALL.len()],
    neighbour_requests: [[Histogram; CallResult::ALL.len()]; NeighbourCall::ALL.len()],
    verifications: [Number; Outcome::COUNT],
    rooms: [Number; RoomResult::ALL.len()],
    tokens: [Number; TokenAccess::ALL.len()],
    job_ends: [Number; JobEnd::ALL.len()],
    /// From the departure of a participant, as it is known, to the answer to the leave.
    pub leave_lag: Histogram,
    /// 429s to calls about delayed events.
    pub homeserver_rate_limited: Number,
    webhooks: [Number; WebhookResult::ALL.len()],
    webhook_last_received: Number,
    /// Failed calls to the store.
    pub store_errors: Number,
    guard_refusals: [Number; GuardReason::ALL.len()],
    limit_hits: [Number; Limit::ALL.len()],
    /// Participants that were removed because their user left the Matrix room.
    pub kicks: Number,
    fleet: Fleet,
}

/// States of the nodes of a fleet, and how one of them came to watch.
const NODE_STATES: [&str; 3] = ["up", "waiting", "leaving"];
const TAKEOVERS: [&str; 3] = ["first", "claimed", "given"];

/// The replicas on one Redis, as this one sees them. All 0 where it is alone.
#[derive(Debug)]
struct Fleet {
    nodes: [Number; NODE_STATES.len()],
    watches: Number,
    epoch: Number,
    guests: Number,
    unread: Number,
    takeovers: [Number; TAKEOVERS.len()],
}

/// A counter, or a number that goes up and down.
#[derive(Debug)]
pub struct Number(AtomicU64);

impl Number {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one to the number.
    pub fn up(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// Takes one away.
    pub fn down(&self) {
        self.0.fetch_sub(1, Relaxed);
    }

    fn set(&self, number: u64) {
        self.0.store(number, Relaxed);
    }

    /// Sets the gauge to a number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How long something took.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Number; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    const fn new() -> Self {
        Self {
            buckets: [const { Number::new() }; BOUNDS.len() + 1],
            micros: AtomicU64::new(0),
        }
    }

    /// Counts something that took so long.
    pub fn observe(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.iter().position(|(_, most)| micros <= *most).unwrap_or(BOUNDS.len());
        self.buckets[bucket].up();
        self.micros.fetch_add(micros, Relaxed);
    }

    fn count(&self) -> u64 {
        self.buckets.iter().map(Number::get).sum()
    }
}

words! {
    /// A service that this one depends on.
    Neighbour {
        /// LiveKit's server, the SFU.
        Sfu = "sfu",
        /// Redis, or the state file.
        Store = "store",
        /// Our own homeserver, in application-service mode.
        Homeserver = "homeserver",
    }
}

words! {
    /// A call to a neighbour.
    NeighbourCall {
        /// Creates a room, or finds it.
        CreateRoom = "create_room",
        /// Asks which rooms there are.
        ListRooms = "list_rooms",
        /// Asks for one participant of a room.
        GetParticipant = "get_participant",
        /// The participants of a room.
        ListParticipants = "list_participants",
        /// Removes a participant.
        RemoveParticipant = "remove_participant",
        /// Ends a room that `doctor` has opened.
        DeleteRoom = "delete_room",
        /// Asks a homeserver whose OpenID token it is.
        Userinfo = "userinfo",
        /// Restarts a delayed event.
        RestartDelayedEvent = "restart_delayed_event",
        /// Sends a delayed event.
        SendDelayedEvent = "send_delayed_event",
        /// Cancels a delayed event.
        CancelDelayedEvent = "cancel_delayed_event",
        /// Asks our homeserver who is in a room.
        IsJoined = "is_joined",
        /// Writes to the store.
        Write = "write",
    }
}

impl NeighbourCall {
    /// Neighbour that is called.
    #[must_use]
    pub const fn neighbour(self) -> &'static str {
        match self {
            Self::CreateRoom
            | Self::ListRooms
            | Self::GetParticipant
            | Self::ListParticipants
            | Self::RemoveParticipant
            | Self::DeleteRoom => Neighbour::Sfu.word(),
            Self::Userinfo | Self::RestartDelayedEvent | Self::SendDelayedEvent | Self::CancelDelayedEvent => "homeservers",
            Self::IsJoined => Neighbour::Homeserver.word(),
            Self::Write => Neighbour::Store.word(),
        }
    }
}

words! {
    /// How a call to a neighbour ended.
    CallResult {
        /// As it should.
        Ok = "ok",
        /// The neighbour said no.
        Refused = "refused",
        /// There was no usable answer.
        Failed = "failed",
    }
}

words! {
    /// Result of opening a room for a token.
    RoomResult {
        /// The SFU was asked, and it stands.
        Opened = "opened",
        /// The room cannot have closed since it was asked for last.
        Remembered = "remembered",
        /// The SFU could not, or would not.
        Failed = "failed",
    }
}

words! {
    /// Access that a token gives.
    TokenAccess {
        /// Opens rooms and publishes.
        Full = "full",
        /// Joins rooms that stand, and publishes.
        Restricted = "restricted",
        /// Joins rooms that stand, and publishes nothing.
        ListenOnly = "listen_only",
    }
}

words! {
    /// How a delegated leave ended.
    JobEnd {
        /// The leave was sent.
        Sent = "sent",
        /// The homeserver did not take it in time.
        NotSent = "not_sent",
        /// The homeserver does not know the event any more.
        EventGone = "event_gone",
        /// The homeserver refuses us.
        Refused = "refused",
        /// No restart got through within one delay.
        GivenUp = "given_up",
        /// The SFU was silent for too long.
        SfuSilent = "sfu_silent",
        /// The join failed.
        JoinFailed = "join_failed",
        /// The participant never came.
        NeverJoined = "never_joined",
        /// A later delegation took its place.
        Replaced = "replaced",
        /// The user was removed from the Matrix room.
        Kicked = "kicked",
        /// The job made room for others.
        Evicted = "evicted",
    }
}

words! {
    /// Result of a call of the webhook.
    WebhookResult {
        /// The event was taken.
        Accepted = "accepted",
        /// The call does not prove that it is the SFU's.
        Rejected = "rejected",
        /// The event is the SFU's, and not readable.
        Unreadable = "unreadable",
        /// The event came before the service was ready, or when it was stopping.
        NotReady = "not_ready",
    }
}

words! {
    /// Why an address is not dialled.
    GuardReason {
        /// The address is private, and nobody listed the homeserver.
        Private = "private",
        /// Such an address is never dialled.
        Never = "never",
    }
}

words! {
    /// A limit of the service that can be met.
    Limit {
        /// Number of open connections.
        Connections = "connections",
        /// Memory for heads and bodies of requests.
        RequestBodies = "request_bodies",
        /// Places for requests.
        RequestsInFlight = "requests_in_flight",
        /// Places for requests of our homeserver.
        HomeserverRequests = "homeserver_requests",
        /// Number of watched tokens.
        Tokens = "tokens",
        /// Number of delegated leaves.
        Jobs = "jobs",
        /// Rate of requests of a user: one was refused.
        UserRate = "user_rate",
        /// Rate of requests of a homeserver: one was refused.
        HomeserverRate = "homeserver_rate",
    }
}

/// Numbers that are known at the moment of a scrape only.
#[derive(Debug, Clone, Copy, Default)]
pub struct Gauges {
    /// Delegated leaves whose participant was never seen.
    pub jobs_waiting: usize,
    /// Jobs in the other states.
    pub jobs_watched: usize,
    /// Changes of delegated leaves that the store does not have yet.
    pub store_pending_writes: usize,
}

impl Metrics {
    /// A request has ended.
    pub fn request(&self, route: Route, outcome: Outcome, took: Duration) {
        self.requests[route as usize][outcome as usize].up();
        self.request_duration[route as usize].observe(took);
    }

    /// A neighbour was called.
    pub fn called(&self, call: NeighbourCall, result: CallResult, took: Duration) {
        self.neighbour_requests[call as usize][result as usize].observe(took);
    }

    /// Whether a neighbour is there.
    pub fn is_up(&self, neighbour: Neighbour, up: bool) {
        self.neighbour_up[neighbour as usize].store(up.into(), Relaxed);
    }

    /// Whether it can be used, as far as that is known.
    #[must_use]
    pub fn neighbour_up(&self, neighbour: Neighbour) -> Option<bool> {
        let up = self.neighbour_up[neighbour as usize].load(Relaxed);
        (up >= 0).then_some(up > 0)
    }

    /// An OpenID token was judged.
    pub fn verified(&self, outcome: Outcome) {
        self.verifications[outcome as usize].up();
    }

    /// A room was wished for.
    pub fn room(&self, result: RoomResult) {
        self.rooms[result as usize].up();
    }

    /// A token was issued.
    pub fn token(&self, access: TokenAccess) {
        self.tokens[access as usize].up();
    }

    /// A delegated leave is over.
    pub fn job_ended(&self, how: JobEnd) {
        self.job_ends[how as usize].up();
    }

    /// A webhook came, at this second since 1970.
    pub fn webhook(&self, result: WebhookResult, now: u64) {
        self.webhooks[result as usize].up();
        if result != WebhookResult::Rejected {
            self.webhook_last_received.0.store(now, Relaxed);
        }
    }

    /// When a webhook of the SFU came last, in seconds since 1970; 0: never.
    #[must_use]
    pub fn last_webhook(&self) -> u64 {
        self.webhook_last_received.get()
    }

    /// The guard refused an address.
    pub fn guard_refused(&self, reason: GuardReason) {
        self.guard_refusals[reason as usize].up();
    }

    /// Counts a limit that was met.
    pub fn limit_hit(&self, limit: Limit) {
        self.limit_hits[limit as usize].up();
    }

    /// Writes all metrics as Prometheus reads them.
    #[must_use]
    pub fn text(&self, gauges: &Gauges) -> String {
        let mut page = Page(String::with_capacity(16 * 1024));
        page.family("lk_jwt_build_info", "gauge", "The version that runs.");
        page.sample("lk_jwt_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
        self.write_requests(&mut page);
        self.write_neighbours(&mut page);
        self.write_exchange(&mut page);
        self.write_leaves(&mut page, gauges);
        self.write_webhooks_and_store(&mut page, gauges);
        self.write_refusals(&mut page);
        self.fleet.write(&mut page);
        process(&mut page);
        page.0
    }

    fn write_requests(&self, page: &mut Page) {
        page.family("lk_jwt_requests_total", "counter", "Requests by route and by how they ended.");
        for (route, by_outcome) in Route::ALL.iter().zip(&self.requests) {
            // A row for each would be some three hundred, most of them for ever zero. But what begins at one has never grown as
            // Prometheus sees it: so a route that is used has all.
            let is_used = by_outcome.iter().any(|count| count.get() > 0);
            for (outcome, count) in Outcome::ALL.iter().zip(by_outcome) {
                if is_used || *outcome == Outcome::Ok {
                    let labels = [("route", route.word()), ("outcome", outcome.word())];
                    page.sample("lk_jwt_requests_total", &labels, count.get());
                }
            }
        }
        page.family("lk_jwt_request_duration_seconds", "histogram", "How long requests took.");
        for (route, histogram) in Route::ALL.iter().zip(&self.request_duration) {
            page.histogram("lk_jwt_request_duration_seconds", &[("route", route.word())], histogram);
        }
        page.one(
            "lk_jwt_requests_in_flight",
            "gauge",
            "Requests without an answer.",
            self.requests_in_flight.get(),
        );
    }

    fn write_neighbours(&self, page: &mut Page) {
        page.family(
            "lk_jwt_neighbour_up",
            "gauge",
            "Whether a neighbour answers as it should, as far as is known.",
        );
        for (neighbour, up) in Neighbour::ALL.iter().zip(&self.neighbour_up) {
            let up = up.load(Relaxed);
            if up >= 0 {
                page.sample("lk_jwt_neighbour_up", &[("neighbour", neighbour.word())], up);
            }
        }
        let name = "lk_jwt_neighbour_request_duration_seconds";
        page.family(name, "histogram", "How long calls to neighbours took.");
        for (call, by_result) in NeighbourCall::ALL.iter().zip(&self.neighbour_requests) {
            for (result, histogram) in CallResult::ALL.iter().zip(by_result) {
                if histogram.count() > 0 || (*result == CallResult::Ok && *call == NeighbourCall::CreateRoom) {
                    let labels = [("neighbour", call.neighbour()), ("call", call.word()), ("result", result.word())];
                    page.histogram(name, &labels, histogram);
                }
            }
        }
    }

    fn write_exchange(&self, page: &mut Page) {
        page.family(
            "lk_jwt_verifications_total",
            "counter",
            "OpenID tokens by what their homeserver said.",
        );
        for (outcome, count) in Outcome::ALL.iter().zip(&self.verifications) {
            if count.get() > 0 || VERIFIED.contains(outcome) {
                page.sample("lk_jwt_verifications_total", &[("result", outcome.word())], count.get());
            }
        }
        let words = RoomResult::ALL.iter().map(|result| result.word());
        page.counters("lk_jwt_rooms_total", "Wishes for rooms.", "result", words.zip(&self.rooms));
        let words = TokenAccess::ALL.iter().map(|access| access.word());
        page.counters("lk_jwt_tokens_total", "Issued LiveKit tokens.", "access", words.zip(&self.tokens));
    }

    fn write_leaves(&self, page: &mut Page, gauges: &Gauges) {
        page.family(
            "lk_jwt_jobs",
            "gauge",
            "Delegated leaves: their participants were seen (watched) or never (waiting).",
        );
        page.sample("lk_jwt_jobs", &[("state", "waiting")], gauges.jobs_waiting);
        page.sample("lk_jwt_jobs", &[("state", "watched")], gauges.jobs_watched);
        let words = JobEnd::ALL.iter().map(|end| end.word());
        page.counters(
            "lk_jwt_job_ends_total",
            "Delegated leaves that are over.",
            "reason",
            words.zip(&self.job_ends),
        );
        page.family(
            "lk_jwt_leave_lag_seconds",
            "histogram",
            "From the SFU's no about a participant to the homeserver's answer to the leave.",
        );
        page.histogram("lk_jwt_leave_lag_seconds", &[], &self.leave_lag);
        page.one(
            "lk_jwt_homeserver_rate_limited_total",
            "counter",
            "Calls about delayed events that a homeserver answered with 429.",
            self.homeserver_rate_limited.get(),
        );
    }

    fn write_webhooks_and_store(&self, page: &mut Page, gauges: &Gauges) {
        let words = WebhookResult::ALL.iter().map(|result| result.word());
        page.counters(
            "lk_jwt_webhooks_total",
            "Webhooks by what became of them.",
            "result",
            words.zip(&self.webhooks),
        );
        page.one(
            "lk_jwt_webhook_last_received_timestamp_seconds",
            "gauge",
            "When the SFU's last webhook came; 0 is never.",
            self.webhook_last_received.get(),
        );
        page.one(
            "lk_jwt_store_errors_total",
            "counter",
            "Failed calls to the store.",
            self.store_errors.get(),
        );
        page.one(
            "lk_jwt_store_pending_writes",
            "gauge",
            "Changes that the store does not have yet.",
            gauges.store_pending_writes,
        );
    }

    fn write_refusals(&self, page: &mut Page) {
        let words = GuardReason::ALL.iter().map(|reason| reason.word());
        page.counters(
            "lk_jwt_guard_refusals_total",
            "Addresses that were not dialled.",
            "reason",
            words.zip(&self.guard_refusals),
        );
        let words = Limit::ALL.iter().map(|limit| limit.word());
        page.counters(
            "lk_jwt_limit_hits_total",
            "How often something had run out.",
            "limit",
            words.zip(&self.limit_hits),
        );
        page.one(
            "lk_jwt_kicks_total",
            "counter",
            "Participants removed because their user left the Matrix room.",
            self.kicks.get(),
        );
    }
}

impl Metrics {
    /// Takes in the fleet as it is: its living nodes that are up, waiting and leaving, whether this one watches, the epoch, and the leaves
    /// that this one looks after although another one watches, and for how many milliseconds messages have waited here.
    pub fn fleet(&self, nodes: [usize; 3], watches: bool, epoch: u64, guests: usize, unread_ms: u64) {
        for (number, nodes) in self.fleet.nodes.iter().zip(nodes) {
            number.set(nodes as u64);
        }
        self.fleet.watches.set(u64::from(watches));
        self.fleet.epoch.set(epoch);
        self.fleet.guests.set(guests as u64);
        self.fleet.unread.set(unread_ms / 1000);
    }

    /// Counts that this node has begun to watch: as the first, by claiming the watch, or since it was given it.
    pub fn fleet_takeover(&self, how: usize) {
        if let Some(number) = self.fleet.takeovers.get(how) {
            number.up();
        }
    }
}

impl Fleet {
    /// Writes nothing where there is no fleet.
    fn write(&self, page: &mut Page) {
        if self.nodes.iter().all(|number| number.get() == 0) {
            return;
        }
        page.family("lk_jwt_fleet_nodes", "gauge", "Replicas on this Redis that live, by state.");
        for (state, number) in NODE_STATES.iter().zip(&self.nodes) {
            page.sample("lk_jwt_fleet_nodes", &[("state", *state)], number.get());
        }
        page.one(
            "lk_jwt_fleet_watcher",
            "gauge",
            "Whether this replica watches all delegated leaves.",
            self.watches.get(),
        );
        page.one(
            "lk_jwt_fleet_epoch",
            "gauge",
            "Number of the watch; grows with each change.",
            self.epoch.get(),
        );
        page.one(
            "lk_jwt_fleet_guests",
            "gauge",
            "Leaves that this replica looks after until the watcher has them.",
            self.guests.get(),
        );
        page.one(
            "lk_jwt_fleet_unread_seconds",
            "gauge",
            "For how long messages of other replicas have not been read here, or wait to be dealt with.",
            self.unread.get(),
        );
        page.counters(
            "lk_jwt_fleet_takeovers_total",
            "How often this replica began to watch.",
            "how",
            TAKEOVERS.iter().copied().zip(&self.takeovers),
        );
    }
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Labels are words of ours, which need no escapes.
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (at, (label, word)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"{word}\"", if at == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn counters<'a>(&mut self, name: &str, help: &str, label: &str, rows: impl Iterator<Item = (&'a str, &'a Number)>) {
        self.family(name, "counter", help);
        for (word, count) in rows {
            self.sample(name, &[(label, word)], count.get());
        }
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut sum = 0;
        let bounds = BOUNDS.iter().map(|(text, _)| *text).chain(["+Inf"]);
        for (bound, count) in bounds.zip(&histogram.buckets) {
            sum += count.get();
            self.sample(&bucket, &[labels, &[("le", bound)]].concat(), sum);
        }
        let micros = histogram.micros.load(Relaxed);
        let seconds = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
        self.sample(&format!("{name}_sum"), labels, seconds);
        self.sample(&format!("{name}_count"), labels, sum);
    }
}

/// Writes the metrics of the process by their usual names; what the system does not show is left out.
fn process(page: &mut Page) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let stat = read("/proc/self/stat");
    // The second field is a name, which may hold anything.
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<u64>().ok());
    // The unit of these numbers in /proc has been 1/100 s on every Linux there is.
    let seconds = |ticks: u64| format!("{}.{:02}", ticks / 100, ticks % 100);
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        page.one(
            "process_cpu_seconds_total",
            "counter",
            "CPU time in user and system mode.",
            seconds(user + system),
        );
    }
    let boot = read("/proc/stat");
    let boot = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok());
    if let (Some(boot), Some(start)) = (boot, field(22)) {
        page.one(
            "process_start_time_seconds",
            "gauge",
            "When the process started.",
            seconds(boot * 100 + start),
        );
    }
    if let Some(bytes) = field(23) {
        page.one("process_virtual_memory_bytes", "gauge", "Virtual memory.", bytes);
    }
    let status = read("/proc/self/status");
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    if let Some(kib) = resident {
        page.one("process_resident_memory_bytes", "gauge", "Resident memory.", kib * 1024);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        page.one("process_open_fds", "gauge", "Open file descriptors.", open.count());
    }
    if let Some(most) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        page.one("process_max_fds", "gauge", "Most open file descriptors.", most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative() {
        let histogram = Histogram::new();
        for millis in [0, 1, 2, 400, 1_000_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut page = Page(String::new());
        page.histogram("x", &[("a", "b")], &histogram);
        for line in [
            "x_bucket{a=\"b\",le=\"0.001\"} 2\n",
            "x_bucket{a=\"b\",le=\"0.005\"} 3\n",
            "x_bucket{a=\"b\",le=\"0.25\"} 3\n",
            "x_bucket{a=\"b\",le=\"0.5\"} 4\n",
            "x_bucket{a=\"b\",le=\"300\"} 4\n",
            "x_bucket{a=\"b\",le=\"+Inf\"} 5\n",
            "x_sum{a=\"b\"} 1000.403000\n",
            "x_count{a=\"b\"} 5\n",
        ] {
            assert!(page.0.contains(line), "{line}\n{}", page.0);
        }
    }

    #[test]
    fn every_family_is_described_once_and_has_a_sample() {
        let text = METRICS.text(&Gauges::default());
        let mut names = Vec::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert!(!names.contains(&name), "{name} twice");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            let has_sample = |line: &&str| line.starts_with(name) && !line.starts_with('#');
            // Nobody has said yet whether the neighbours are there.
            assert!(
                name == "lk_jwt_neighbour_up" || text.lines().any(|line| has_sample(&line)),
                "{name}"
            );
            names.push(name);
        }
        assert!(names.len() > 25, "{names:?}");
    }
}
