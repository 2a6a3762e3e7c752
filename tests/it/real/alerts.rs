//! Alerts and dashboard in Debian's Prometheus, which scrapes a service whose neighbours fail.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use url::form_urlencoded::Serializer;

use crate::faults::quick;
use crate::support::bodies::{self, with};
use crate::support::client::{self, Call};
use crate::support::client_api;
use crate::support::hashes::{SLOT, alias};
use crate::support::neighbour::Reply;
use crate::support::process::{self, Process, program, say};
use crate::support::redis::RedisServer;
use crate::support::scene::Scene;
use crate::support::service::free_address;
use crate::support::{secrets, unique_room, wait_until, webhook};

const ALERTS: &str = include_str!("../../../contrib/prometheus/alerts.yml");
const DASHBOARD: &str = include_str!("../../../contrib/prometheus/dashboard.json");
const JOB: &str = "lk-jwt-service";
/// Each scrape, and each look at the rules, is a second after the one before.
const PATIENCE: Duration = Duration::from_secs(60);

struct Prometheus {
    address: SocketAddr,
    _process: Process,
}

impl Prometheus {
    /// Scrapes this service each second. An alert need not last for minutes before it fires.
    fn start(target: SocketAddr) -> Self {
        let directory = process::directory("prometheus");
        let rules: String = ALERTS
            .lines()
            .map(|line| {
                if line.trim().starts_with("for: ") {
                    "        for: 1s\n".to_owned()
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
        std::fs::write(directory.join("alerts.yml"), rules).expect("a file");
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
        });
        std::fs::write(directory.join("prometheus.yml"), config.to_string()).expect("a file");
        let address = free_address();
        let mut command = Command::new(program("prometheus"));
        command
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .arg(format!("--web.listen-address={address}"));
        let process = Process::start("prometheus", &command, &directory);
        process.wait_ready(|| process::answers(address, "/-/ready"));
        Self {
            address,
            _process: process,
        }
    }

    fn ask(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let query = Serializer::new(String::new()).extend_pairs(parameters).finish();
        let answer = client::call(self.address, &Call::new("GET", &format!("/api/v1/{path}?{query}")));
        assert_eq!(answer.status, 200, "{parameters:?}: {}", answer.text());
        answer.json()["data"].take()
    }

    /// Whether a query has a result now.
    fn has(&self, query: &str) -> bool {
        let found = self.ask("query", &[("query", query)]);
        found["result"].as_array().is_some_and(|found| !found.is_empty())
    }

    /// The names of the alerts that fire.
    fn firing(&self) -> Vec<String> {
        let alerts = self.ask("alerts", &[]);
        let alerts = alerts["alerts"].as_array().expect("alerts").iter();
        let firing = alerts.filter(|alert| alert["state"] == "firing");
        firing
            .filter_map(|alert| Some(alert["labels"]["alertname"].as_str()?.to_owned()))
            .collect()
    }

    #[track_caller]
    fn wait_firing(&self, alert: &str) {
        wait_until(&format!("{alert} to fire"), PATIENCE, || {
            self.firing().iter().any(|firing| firing == alert)
        });
        say(&format!("{alert} fires"));
    }

    /// Runs a query over the time that was recorded; each series is a line of a panel.
    fn range(&self, query: &str) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let (start, end) = ((now - 90).to_string(), now.to_string());
        self.ask("query_range", &[("query", query), ("start", &start), ("end", &end), ("step", "1")])["result"].take()
    }
}

#[test]
fn alerts_fire_and_panels_show_something() {
    let Some(mut redis) = RedisServer::start(&[]) else { return };
    let metrics = free_address();
    let scene = Scene::with(|setup| {
        quick(setup)
            .env("LIVEKIT_METRICS_BIND", &metrics.to_string())
            .env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address()))
            .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
    });
    let prometheus = Prometheus::start(metrics);
    wait_until("a scrape in which all is well", PATIENCE, || {
        prometheus.has("lk_jwt_neighbour_up{neighbour=\"sfu\"} == 1")
    });
    // A day's work.
    let good = bodies::get_token_of(&scene.home, "alice", &scene.room);
    let bad = with(&good, "/openid_token/access_token", Some(json!(secrets::token())));
    let never = with(&good, "/openid_token/matrix_server_name", Some(json!("169.254.169.254")));
    assert_eq!(scene.service.post("/get_token", &good).status, 200);
    // What begins at one has never grown: a route that is used has all its rows from the next scrape on.
    let rejected = "lk_jwt_requests_total{route=\"get_token\",outcome=\"token_rejected\"}";
    wait_until("a scrape", PATIENCE, || prometheus.has(&format!("{rejected} == 0")));
    // One in ten is a neighbour's fault.
    for body in [&bad, &never].into_iter().chain([&good; 8]) {
        scene.service.post("/get_token", body);
    }
    wait_until("a refusal that is seen", PATIENCE, || {
        prometheus.has(&format!("increase({rejected}[1m]) > 0"))
    });
    assert_eq!(prometheus.firing(), [""; 0], "all is well");

    // Two people join: one whose leave can be restarted, and one whose homeserver says 429 until it is given up.
    let (room, given_up) = (unique_room(), "syd_given_up");
    scene.api.answer(move |managed, _| match managed.delay_id.as_str() {
        "syd_given_up" => Reply::json(429, &json!({"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 500})),
        _ => client_api::done(),
    });
    scene.delegate(Duration::from_secs(60));
    let body = bodies::delegate_of(&scene.home, "alice", &room, given_up, 5_000);
    assert_eq!(scene.service.post("/delegate_delayed_leave", &body).status, 200);
    scene.sfu.join(&scene.alias, &scene.identity);
    scene.sfu.join(&alias(&room, SLOT), &scene.identity);
    // Nothing tells of them.
    prometheus.wait_firing("WebhooksSilent");
    prometheus.wait_firing("LeaveGivenUp");
    assert_eq!(prometheus.firing().len(), 2, "{:?}", prometheus.firing());
    redis.kill();
    scene.sfu.http.refuse();
    prometheus.wait_firing("StoreDown");
    let unwritten = bodies::delegate_of(&scene.home, "alice", &unique_room(), "syd_unwritten", 60_000);
    assert_eq!(scene.service.post("/delegate_delayed_leave", &unwritten).status, 200);
    for counted in ["lk_jwt_store_pending_writes > 0", "increase(lk_jwt_store_errors_total[1m]) > 0"] {
        wait_until(counted, PATIENCE, || prometheus.has(counted));
    }
    prometheus.wait_firing("SfuDown");
    // Back, with a webhook: nothing but the leave that was given up is left.
    redis.start_again();
    scene.sfu.http.listen_again();
    let session = scene.sfu.join(&scene.alias, &scene.identity);
    assert_eq!(webhook::tell(&scene.service, &scene.sfu, &webhook::joined(&session)).status, 200);
    wait_until("the others to end", PATIENCE, || prometheus.firing() == ["LeaveGivenUp"]);
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(PATIENCE);

    let mut drawn = Vec::new();
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    wait_until("the leave to be scraped", PATIENCE, || {
        prometheus.has("increase(lk_jwt_leave_lag_seconds_count[1m] offset 3s) > 0")
    });
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            let query = target["expr"].as_str().expect("a query");
            let result = prometheus.range(&query.replace("$instance", ".*").replace("$job", JOB));
            let series = result.as_array().expect("series");
            let is_number = |value: &Value| {
                value[1]
                    .as_str()
                    .and_then(|number| number.parse::<f64>().ok())
                    .is_some_and(f64::is_finite)
            };
            let values = series.iter().flat_map(|series| series["values"].as_array().into_iter().flatten());
            assert!(
                values.filter(|value| is_number(value)).count() > 0,
                "{}: nothing to see of {query}",
                panel["title"]
            );
            drawn
                .push(json!({"panel": panel["title"], "unit": panel["fieldConfig"]["defaults"]["unit"], "query": query, "series": result}));
        }
    }
    // For whoever wants to look at it.
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dashboard.json");
    std::fs::write(&file, Value::Array(drawn).to_string()).expect("a file");
    say(&format!("what the panels show is in {}", file.display()));
}
