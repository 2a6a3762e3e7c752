//! Real clients in processes of their own, steered by lines of JSON: browsers and LiveKit's Python SDK.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::clock::now_ms;
use crate::support::Shared;
use crate::support::process::{self, Process};

/// For one order; machines are busy.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Heard {
    answers: HashMap<u64, Value>,
    /// What happened to its tabs or clients, in order.
    events: Vec<Value>,
    ended: bool,
}

/// A process that takes orders. Dropping it kills it, and nobody in it says goodbye.
pub(crate) struct Steered {
    process: Arc<Process>,
    heard: Arc<(Mutex<Heard>, Condvar)>,
    orders: AtomicU64,
}

impl Steered {
    pub(crate) fn start(name: &str, command: &Command) -> Self {
        let directory = process::directory(name);
        let process = Arc::new(Process::start_piped(name, command, &directory));
        let heard = Arc::new((Mutex::default(), Condvar::new()));
        std::thread::spawn({
            let (process, heard) = (Arc::downgrade(&process), heard.clone());
            move || listen(&process, &heard)
        });
        Self {
            process,
            heard,
            orders: AtomicU64::new(1),
        }
    }

    #[track_caller]
    pub(crate) fn order(&self, mut order: Value) -> Value {
        self.try_order(&mut order).unwrap_or_else(|why| panic!("{order}: {why}"))
    }

    pub(crate) fn try_order(&self, order: &mut Value) -> Result<Value, String> {
        let id = self.orders.fetch_add(1, Relaxed);
        order["id"] = json!(id);
        if !self.process.tell(&order.to_string()) {
            return Err(format!("it does not listen any more:\n{}", self.process.tail(20)));
        }
        let (heard, changed) = &*self.heard;
        let (mut heard, _) = changed
            .wait_timeout_while(heard.lock().unwrap(), TIMEOUT, |heard| {
                !heard.ended && !heard.answers.contains_key(&id)
            })
            .unwrap();
        let answer = heard.answers.remove(&id);
        let mut answer = answer.ok_or_else(|| format!("no answer:\n{}", self.process.tail(20)))?;
        // Names the order in a failure, without the token.
        if let Some(order) = order.as_object_mut() {
            order.remove("token");
        }
        match answer.get("error") {
            Some(why) => Err(why.to_string()),
            None => Ok(answer["ok"].take()),
        }
    }

    /// What happened to the tab or client of this name since (ms since 1970).
    fn events(&self, key: &str, name: &str, since: u64) -> Vec<Value> {
        let heard = self.heard.0.lock().unwrap();
        let of = |event: &&Value| event[key] == name && event["at"].as_u64() >= Some(since);
        heard.events.iter().filter(of).cloned().collect()
    }
}

fn listen(process: &Weak<Process>, heard: &(Mutex<Heard>, Condvar)) {
    while let Some(process) = process.upgrade() {
        let line = match process.poll(Duration::from_millis(250)) {
            Ok(Some(line)) => line,
            Ok(None) => continue,
            Err(_) => break,
        };
        let Ok(mut said) = serde_json::from_str::<Value>(&line) else {
            continue;
        };
        let mut now = heard.0.lock().unwrap();
        match said["id"].as_u64() {
            Some(id) => {
                now.answers.insert(id, said.take());
            }
            None => now.events.push(said),
        }
        heard.1.notify_all();
    }
    heard.0.lock().unwrap().ended = true;
    heard.1.notify_all();
}

/// Headless Chromium.
pub(crate) struct Browser(Steered);

impl Browser {
    pub(super) fn start() -> Arc<Self> {
        Self::with("browser/page.js")
    }

    /// With a page in which this script runs.
    pub(crate) fn with(script: &str) -> Arc<Self> {
        Self::with_flags(script, &[])
    }

    /// The same with more flags for Chromium.
    pub(crate) fn with_flags(script: &str, flags: &[&str]) -> Arc<Self> {
        let mut command = Command::new(process::program("node"));
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tools/browser/driver.mjs"))
            .args([chromium(), process::directory("chromium"), process::tool(script)])
            .args(flags);
        Arc::new(Self(Steered::start("browser", &command)))
    }

    /// One for all who only use tabs of it.
    pub(super) fn shared() -> Arc<Self> {
        static SHARED: Shared<Arc<Browser>> = Shared::new();
        (*SHARED.get(Self::start)).clone()
    }

    #[track_caller]
    pub(crate) fn open(self: &Arc<Self>) -> Tab {
        let name = self.0.order(json!({"do": "open"}));
        Tab {
            browser: self.clone(),
            name: name.as_str().expect("a name").into(),
        }
    }

    /// kill -9 of all its processes.
    pub(super) fn kill(&self) {
        self.0.order(json!({"do": "kill"}));
    }
}

/// Where there is no Debian package of it, Chrome is the same.
fn chromium() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|place| place.join("google-chrome"));
    match found.filter(|file| file.is_file()).last() {
        Some(chrome) => chrome,
        None => process::program("chromium"),
    }
}

/// A tab in which livekit-client runs.
pub(crate) struct Tab {
    browser: Arc<Browser>,
    name: String,
}

impl Tab {
    /// With what the service answered. The `sid`.
    #[track_caller]
    pub(super) fn join(&self, answer: &Value) -> String {
        let order = json!({"do": "join", "page": self.name, "url": answer["url"], "token": answer["jwt"]});
        let joined = self.browser.0.order(order);
        joined["sid"].as_str().expect("sid").into()
    }

    /// What the page's own script does with it.
    pub(crate) fn order(&self, order: &Value) -> Result<Value, String> {
        self.browser
            .0
            .try_order(&mut json!({"do": "order", "page": self.name, "order": order}))
    }

    /// One of the driver's other orders, about this tab.
    #[track_caller]
    pub(crate) fn drive(&self, what: &str, mut more: Value) -> Value {
        (more["do"], more["page"]) = (json!(what), json!(self.name));
        self.browser.0.order(more)
    }

    /// One of livekit-client's scenarios. When.
    #[track_caller]
    pub(super) fn simulate(&self, scenario: &str) -> u64 {
        let at = now_ms();
        self.browser
            .0
            .order(json!({"do": "simulate", "page": self.name, "scenario": scenario}));
        at
    }

    #[track_caller]
    pub(super) fn leave(&self) {
        self.browser.0.order(json!({"do": "leave", "page": self.name}));
    }

    #[track_caller]
    pub(super) fn reload(&self) {
        self.browser.0.order(json!({"do": "reload", "page": self.name}));
    }

    #[track_caller]
    pub(super) fn close(&self) {
        self.browser.0.order(json!({"do": "close", "page": self.name}));
    }

    /// livekit-client's word for it (`connected`, …), and our `sid`.
    #[track_caller]
    pub(super) fn state(&self) -> (String, String) {
        let state = self.browser.0.order(json!({"do": "state", "page": self.name}));
        let text = |key: &str| state[key].as_str().unwrap_or_default().to_owned();
        (text("state"), text("sid"))
    }

    /// Waits until it is connected; our `sid`. Who is back may lose the signal once more, and resumes.
    #[track_caller]
    pub(super) fn wait_connected(&self) -> String {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let (state, sid) = self.state();
            if state == "connected" {
                return sid;
            }
            assert!(state != "disconnected" && Instant::now() < end, "{}: {state}", self.name);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What happened in it since (ms since 1970): `event` and what belongs to it.
    pub(super) fn events(&self, since: u64) -> Vec<Value> {
        self.browser.0.events("page", &self.name, since)
    }

    /// Waits until livekit-client told this of the tab.
    #[track_caller]
    pub(super) fn wait_event(&self, event: &str, since: u64, within: Duration) -> Value {
        let end = Instant::now() + within;
        loop {
            let events = self.events(since);
            if let Some(found) = events.iter().find(|e| e["event"] == event) {
                return found.clone();
            }
            assert!(Instant::now() < end, "no {event} within {within:?}: {events:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Clients of the Python SDK in one process.
pub(crate) struct Party(Steered);

impl Party {
    /// It listens: no delay of a scene runs while an interpreter starts. One at a time, or all of them would be slow.
    pub(crate) fn start() -> Self {
        static STARTS: Mutex<()> = Mutex::new(());
        let _turn = STARTS.lock().unwrap_or_else(PoisonError::into_inner);
        let party = Self(Steered::start("party", &process::script("party.py")));
        party.0.order(json!({"do": "listen"}));
        party
    }

    /// With what the service answered. The `sid`.
    #[track_caller]
    pub(crate) fn join(&self, name: &str, answer: &Value) -> String {
        let joined = self.0.order(Self::joining(name, answer));
        joined["sid"].as_str().expect("sid").into()
    }

    /// The same, or why the client did not come in.
    pub(crate) fn try_join(&self, name: &str, answer: &Value) -> Result<Value, String> {
        self.0.try_order(&mut Self::joining(name, answer))
    }

    fn joining(name: &str, answer: &Value) -> Value {
        json!({"do": "join", "name": name, "url": answer["url"], "token": answer["jwt"]})
    }

    #[track_caller]
    pub(crate) fn leave(&self, name: &str) {
        self.0.order(json!({"do": "leave", "name": name}));
    }

    /// kill -9.
    pub(super) fn kill(&self) {
        self.0.process.kill();
    }
}
