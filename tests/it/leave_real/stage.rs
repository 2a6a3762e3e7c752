//! A service with its real SFU and its real homeserver, between which everything is recorded.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::clock::{now_ms, sleep_s};
use crate::support::client::{Call, Connection};
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::livekit::Livekit;
use crate::support::neighbour::{Neighbour, Reply, Request};
use crate::support::process::say;
use crate::support::service::{Service, Setup, free_address};
use crate::support::synapse::{Synapse, User};
use crate::support::{Shared, lateness, unique, unique_loopback};

const MEMBER: &str = "org.matrix.msc3401.call.member";
const UNSTABLE: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";

/// What a stage is made of.
pub(super) struct Plan {
    pub(super) synapse: &'static Synapse,
    /// Whether the SFU's webhooks reach the service.
    pub(super) webhooks: bool,
    /// Where else the SFU tells of its events.
    pub(super) told: Vec<String>,
    /// How long each of the service's calls is on its way to the homeserver's client-server API.
    pub(super) slow: Duration,
    pub(super) environment: Vec<(&'static str, String)>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            synapse: &Synapse::pair()[0],
            webhooks: true,
            told: Vec::new(),
            slow: Duration::ZERO,
            environment: Vec::new(),
        }
    }
}

impl Plan {
    pub(super) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }
}

pub(super) struct Stage {
    service: Mutex<Option<Arc<Service>>>,
    setup: Setup,
    pub(super) livekit: Livekit,
    synapse: &'static Synapse,
    /// What the service asks of the homeserver's client-server API.
    pub(super) calls: Calls,
    /// What the SFU tells, to the service as to us.
    pub(super) notices: Notices,
    earlier_logs: Mutex<String>,
}

impl Stage {
    /// One for all who leave it standing.
    pub(super) fn shared() -> Arc<Self> {
        static SHARED: Shared<Stage> = Shared::new();
        SHARED.get(|| Self::new(Plan::default()))
    }

    pub(super) fn new(plan: Plan) -> Self {
        lateness::measure();
        let synapse = plan.synapse;
        let (calls, notices) = (Calls::before(synapse, plan.slow), Notices::start());
        let address = free_address();
        let mut told = vec![format!("http://{}/", notices.neighbour.address())];
        if plan.webhooks {
            told.push(format!("http://{address}/sfu_webhook"));
        }
        told.extend_from_slice(&plan.told);
        let livekit = Livekit::prepare_with_webhooks(&told);
        let overrides = format!("{}=http://{}", synapse.name, calls.neighbour.address());
        let mut setup = livekit
            .setup(&[&synapse.name])
            .env("LIVEKIT_JWT_BIND", &address.to_string())
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &overrides)
            .reached_at(address);
        for (name, value) in &plan.environment {
            setup = setup.env(name, value);
        }
        livekit.start();
        let stage = Self {
            service: Mutex::default(),
            setup,
            livekit,
            synapse,
            calls,
            notices,
            earlier_logs: Mutex::default(),
        };
        stage.start_service();
        stage
    }

    pub(super) fn service(&self) -> Arc<Service> {
        self.service.lock().unwrap().clone().expect("a running service")
    }

    #[track_caller]
    pub(super) fn start_service(&self) {
        *self.service.lock().unwrap() = Some(Arc::new(self.setup.clone().start()));
    }

    /// One more instance, with what the service has.
    #[track_caller]
    pub(super) fn replica(&self) -> Service {
        let address = free_address();
        let setup = self.setup.clone().env("LIVEKIT_JWT_BIND", &address.to_string());
        setup.reached_at(address).start()
    }

    /// kill -9.
    #[track_caller]
    pub(super) fn kill_service(&self) {
        let service = self.service.lock().unwrap().take().expect("a running service");
        service.signal("KILL");
        service.wait_exit(Duration::from_secs(5));
        *self.earlier_logs.lock().unwrap() += &service.log();
    }

    /// All that it logged, the lives before the last kill included.
    pub(super) fn log(&self) -> String {
        let service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        let now = service.as_ref().map(|s| s.log()).unwrap_or_default();
        self.earlier_logs.lock().unwrap_or_else(PoisonError::into_inner).clone() + &now
    }

    /// Somebody with a Matrix room of their own, shown there as in the call.
    #[track_caller]
    pub(super) fn caller(self: &Arc<Self>, name: &str) -> Caller {
        let user = self.synapse.register(name);
        let room = user.create_room();
        self.caller_of(name, user, room)
    }

    /// Several in one Matrix room, shown there as in the call.
    #[track_caller]
    pub(super) fn callers<const N: usize>(self: &Arc<Self>, names: [&str; N]) -> [Caller; N] {
        let mut room = None;
        names.map(|name| {
            let user = self.synapse.register(name);
            let room = room.get_or_insert_with(|| user.create_call_room()).clone();
            user.join(&room);
            self.caller_of(name, user, room)
        })
    }

    #[track_caller]
    fn caller_of(self: &Arc<Self>, name: &str, user: User<'static>, room: String) -> Caller {
        let caller = Caller {
            name: name.into(),
            identity: format!("{}:{}", user.id, user.device),
            stage: self.clone(),
            room,
            user,
        };
        caller.appear();
        caller
    }

    pub(super) fn dump(&self, name: &str) {
        static TAKEN: Mutex<()> = Mutex::new(());
        let _taken = TAKEN.lock();
        let mut text = format!("== the service\n{}\n== its calls of the homeserver\n", self.log());
        for call in self.calls.all() {
            let _ = writeln!(text, "{} {} {} -> {}", call.at, call.action, call.delay_id, call.status);
        }
        text += "== what the SFU told\n";
        for notice in self.notices.all() {
            let _ = writeln!(text, "{notice:?}");
        }
        let _ = writeln!(text, "== livekit-server\n{}", self.livekit.log());
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("leave_real");
        let file = directory.join(format!("{name}-{}.txt", unique()));
        if std::fs::create_dir_all(&directory).is_ok() && std::fs::write(&file, text).is_ok() {
            say(&format!("{name}: all that was logged is in {}", file.display()));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if std::env::var_os("LK_TESTS_DUMP").is_some() {
            self.dump("stage");
        }
        // The service is judged while its neighbours still stand.
        drop(self.service.get_mut().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// A delayed event that was scheduled.
#[derive(Clone)]
pub(super) struct Delayed {
    pub(super) id: String,
    pub(super) delay_ms: u64,
    /// When it was scheduled.
    pub(super) at: u64,
}

/// Somebody in a call, as far as Matrix is concerned.
pub(super) struct Caller {
    pub(super) name: String,
    /// On the SFU, by `/sfu/get`.
    pub(super) identity: String,
    pub(super) stage: Arc<Stage>,
    user: User<'static>,
    room: String,
}

impl Drop for Caller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&format!("{}: {} in {}", self.name, self.identity, self.alias()));
            self.stage.dump(&self.name);
        }
    }
}

impl Caller {
    /// The room on the SFU.
    pub(super) fn alias(&self) -> String {
        alias(&self.room, SLOT)
    }

    /// Where `/get_token` is used: the identity on the SFU.
    pub(super) fn hashed_identity(&self) -> String {
        identity(&self.user.id, &self.user.device, "member1")
    }

    fn member_path(&self) -> String {
        let key = format!("_{}_{}", self.user.id, self.user.device);
        format!("/_matrix/client/v3/rooms/{}/state/{MEMBER}/{key}", self.room)
    }

    /// Says in the Matrix room that they are in the call.
    #[track_caller]
    pub(super) fn appear(&self) {
        let content = json!({"application": "m.call", "device_id": self.user.device, "call_id": "", "expires": 14_400_000 + unique()});
        let answer = self.user.request("PUT", &self.member_path(), Some(&content));
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// Schedules their leave.
    #[track_caller]
    pub(super) fn schedule(&self, delay_s: u64) -> Delayed {
        let delay_ms = delay_s * 1000;
        let path = format!("{}?org.matrix.msc4140.delay={delay_ms}", self.member_path());
        let at = now_ms();
        let answer = self.user.request("PUT", &path, Some(&json!({})));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let id = answer.field("delay_id");
        assert!(!id.is_empty(), "no delay_id: {}", answer.text());
        Delayed { id, delay_ms, at }
    }

    /// A token of `/sfu/get`, with the delegation of a leave or without.
    #[track_caller]
    pub(super) fn token(&self, delayed: Option<&Delayed>) -> Value {
        self.token_of(self.user.sfu_get(&self.room), delayed)
    }

    /// The body of a request for a token, with a fresh OpenID token in it, for later.
    #[track_caller]
    pub(super) fn openid(&self) -> Value {
        self.user.sfu_get(&self.room)
    }

    #[track_caller]
    pub(super) fn token_of(&self, mut body: Value, delayed: Option<&Delayed>) -> Value {
        if let Some(delayed) = delayed {
            delegate(&mut body, delayed);
        }
        let answer = self.stage.service().post("/sfu/get", &body);
        assert_eq!(answer.status, 200, "{}: {}", self.name, answer.text());
        answer.json()
    }

    /// A token of `/get_token`, and the leave delegated by `/delegate_delayed_leave`.
    #[track_caller]
    pub(super) fn token_and_delegation(&self, delayed: &Delayed) -> Value {
        let service = self.stage.service();
        let answer = service.post("/get_token", &self.user.get_token(&self.room));
        assert_eq!(answer.status, 200, "{}: {}", self.name, answer.text());
        let mut body = self.user.get_token(&self.room);
        delegate(&mut body, delayed);
        let delegated = service.post("/delegate_delayed_leave", &body);
        assert_eq!((delegated.status, delegated.json()), (200, json!({})), "{}", delegated.text());
        answer.json()
    }

    /// When Synapse says that the delay of it began the last time; `None` where it does not know it (any more).
    #[track_caller]
    pub(super) fn since(&self, delayed: &Delayed) -> Option<u64> {
        let answer = self.user.request("GET", &format!("{UNSTABLE}/{}", delayed.id), None);
        if answer.status == 404 {
            return None;
        }
        assert_eq!(answer.status, 200, "{}", answer.text());
        Some(answer.json()["delayed_since_ts"].as_u64().expect("delayed_since_ts"))
    }

    /// Waits until the delay began again after `after` (ms since 1970).
    #[track_caller]
    pub(super) fn wait_restarted(&self, delayed: &Delayed, after: u64, within: Duration) -> u64 {
        let end = Instant::now() + within;
        loop {
            let since = self.since(delayed);
            let since = since.unwrap_or_else(|| panic!("{}: the delayed event is gone", self.name));
            if since > after {
                return since;
            }
            assert!(Instant::now() < end, "{}: not restarted within {within:?}", self.name);
            sleep_s(0.05);
        }
    }

    /// Cancels it past the service.
    #[track_caller]
    pub(super) fn cancel(&self, delayed: &Delayed) {
        let path = format!("{UNSTABLE}/{}/cancel", delayed.id);
        let answer = self.user.request("POST", &path, Some(&json!({})));
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// When the Matrix room was told that they left; `None` while it shows them in the call.
    #[track_caller]
    pub(super) fn left(&self) -> Option<u64> {
        let path = format!("{}?format=event", self.member_path());
        let answer = self.user.request("GET", &path, None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let event = answer.json();
        let empty = event["content"].as_object().expect("content").is_empty();
        empty.then(|| event["origin_server_ts"].as_u64().expect("origin_server_ts"))
    }

    /// Waits for the leave; when it was.
    #[track_caller]
    pub(super) fn wait_left(&self, within: Duration) -> u64 {
        let end = Instant::now() + within;
        loop {
            if let Some(at) = self.left() {
                return at;
            }
            let calls = self.stage.calls.all().len();
            assert!(
                Instant::now() < end,
                "{}: still shown in the call after {within:?} ({calls} calls)",
                self.name
            );
            sleep_s(0.05);
        }
    }

    /// Fails when the room shows that they left, or a leave was sent.
    #[track_caller]
    pub(super) fn assert_there(&self, delayed: &Delayed) {
        let sent = self.stage.calls.of(delayed, "send");
        assert!(sent.is_empty(), "{}: a leave was sent although they are there: {sent:?}", self.name);
        let left = self.left();
        assert_eq!(
            left,
            None,
            "{}: shown as gone although they are there; {:?}",
            self.name,
            self.stage.calls.of_any(delayed)
        );
    }

    /// Waits for the leave that the service sends, and fails when it was the homeserver's own timer that fired. When the
    /// service's call arrived.
    #[track_caller]
    pub(super) fn wait_sent(&self, delayed: &Delayed, within: Duration) -> u64 {
        let left = self.wait_left(within);
        // The proxy notes a call when it has the answer, which is after the event.
        let noted = Instant::now() + Duration::from_secs(2);
        loop {
            let sent = self.stage.calls.of(delayed, "send");
            if let Some(taken) = sent.iter().find(|call| call.status == 200) {
                return taken.at;
            }
            let calls = self.stage.calls.of_any(delayed);
            assert!(
                Instant::now() < noted,
                "{}: left at {left}, but not because the service sent it: {calls:?}",
                self.name
            );
            sleep_s(0.01);
        }
    }

    /// Waits for a webhook about them.
    #[track_caller]
    pub(super) fn wait_notice(&self, event: &str, after: u64, within: Duration) -> Notice {
        let (own, hashed) = (self.identity.clone(), self.hashed_identity());
        let about =
            move |notice: &Notice| notice.event == event && notice.at >= after && (notice.identity == own || notice.identity == hashed);
        self.stage.notices.wait(&format!("{event} of {}", self.name), within, about)
    }
}

fn delegate(body: &mut Value, delayed: &Delayed) {
    body["delay_id"] = json!(delayed.id);
    body["delay_timeout"] = json!(delayed.delay_ms);
    body["delay_cs_api_url"] = json!("https://nobody.example.org");
}

/// A call that the service made to the homeserver's client-server API.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) at: u64,
    /// `restart`, `send`, `cancel`; the whole path of others.
    pub(super) action: String,
    pub(super) delay_id: String,
    pub(super) status: u16,
}

/// A reverse proxy before a homeserver.
pub(super) struct Calls {
    neighbour: Neighbour,
    made: Arc<Mutex<Vec<Made>>>,
}

impl Calls {
    fn before(synapse: &Synapse, slow: Duration) -> Self {
        let (to, made) = (synapse.client_api(), Arc::<Mutex<Vec<Made>>>::default());
        let neighbour = Neighbour::start((Ipv4Addr::LOCALHOST, 0).into(), None, {
            let made = made.clone();
            move |request| {
                let at = now_ms();
                let (status, reply) = tokio::task::block_in_place(|| {
                    std::thread::sleep(slow);
                    forward(to, request)
                });
                let tail = request
                    .path
                    .split_once("/delayed_events/")
                    .and_then(|(_, tail)| tail.split_once('/'));
                let (delay_id, action) = tail.unwrap_or(("", &request.path));
                made.lock().unwrap().push(Made {
                    at,
                    action: action.into(),
                    delay_id: delay_id.into(),
                    status,
                });
                reply
            }
        });
        Self { neighbour, made }
    }

    pub(super) fn all(&self) -> Vec<Made> {
        self.made.lock().unwrap().clone()
    }

    pub(super) fn of_any(&self, delayed: &Delayed) -> Vec<Made> {
        let mut made = self.all();
        made.retain(|call| call.delay_id == delayed.id);
        made
    }

    pub(super) fn of(&self, delayed: &Delayed, action: &str) -> Vec<Made> {
        let mut made = self.of_any(delayed);
        made.retain(|call| call.action == action);
        made
    }
}

fn forward(to: std::net::SocketAddr, request: &Request) -> (u16, Reply) {
    let mut target = request.path.clone();
    if !request.query.is_empty() {
        let query = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(&request.query)
            .finish();
        target += &format!("?{query}");
    }
    let mut call = match request.method.as_str() {
        "GET" => Call::new("GET", &target),
        _ => Call::post(&target, request.body.clone()),
    };
    for name in ["content-type", "authorization", "accept"] {
        if let Some(value) = request.header(name) {
            call = call.header(name, value);
        }
    }
    let answer = Connection::open(to).ok().and_then(|mut connection| {
        connection.send(&call.header("Connection", "close").bytes(to));
        connection.answer()
    });
    match answer {
        None => (502, Reply::text(502, "text/plain", "no answer")),
        Some(answer) => {
            let passed_on = ["content-type", "retry-after"];
            let reply = Reply::Answer {
                status: answer.status,
                headers: answer
                    .headers
                    .into_iter()
                    .filter(|(name, _)| passed_on.contains(&name.as_str()))
                    .collect(),
                body: answer.body,
            };
            (answer.status, reply)
        }
    }
}

/// A webhook.
#[derive(Clone, Debug)]
pub(super) struct Notice {
    pub(super) at: u64,
    pub(super) event: String,
    pub(super) room: String,
    pub(super) identity: String,
    pub(super) sid: String,
    pub(super) reason: String,
}

/// What the SFU tells.
pub(super) struct Notices {
    neighbour: Neighbour,
    told: Arc<Mutex<Vec<Notice>>>,
}

impl Notices {
    fn start() -> Self {
        let told = Arc::<Mutex<Vec<Notice>>>::default();
        let neighbour = Neighbour::start((unique_loopback(), 0).into(), None, {
            let told = told.clone();
            move |request| {
                let event: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
                told.lock().unwrap().push(Notice {
                    at: now_ms(),
                    event: text("/event"),
                    room: text("/room/name"),
                    identity: text("/participant/identity"),
                    sid: text("/participant/sid"),
                    reason: text("/participant/disconnectReason"),
                });
                Reply::text(200, "text/plain", "")
            }
        });
        Self { neighbour, told }
    }

    pub(super) fn all(&self) -> Vec<Notice> {
        self.told.lock().unwrap().clone()
    }

    #[track_caller]
    pub(super) fn wait(&self, what: &str, within: Duration, wanted: impl Fn(&Notice) -> bool) -> Notice {
        let end = Instant::now() + within;
        loop {
            if let Some(notice) = self.told.lock().unwrap().iter().find(|notice| wanted(notice)) {
                return notice.clone();
            }
            assert!(Instant::now() < end, "the SFU did not tell within {within:?}: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
