//! Three replicas behind nginx: a real Redis, SFU and homeserver, and clients who stay while the watch moves.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::clients::joins_and_is_watched;
use super::clock::now_ms;
use super::stage::{Plan, Stage};
use super::steered::Party;
use crate::support::process::{Process, directory, program, real_neighbours, say};
use crate::support::redis::RedisServer;
use crate::support::service::{Service, free_address};
use crate::support::wait_until;

const TIMEOUT: Duration = Duration::from_secs(20);

/// Round robin, as in docs/replicas.md.
fn nginx(front: SocketAddr, replicas: &[&Service]) -> Process {
    let place = directory("replicas");
    let servers: String = replicas.iter().map(|replica| format!("server {};\n", replica.address())).collect();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {kind};\n"))
        .concat();
    let config = format!(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nevents {{}}\nhttp {{\naccess_log access.log;\n{temporary}\
         upstream replicas {{\n{servers}}}\n\
         server {{\nlisten {front};\nlocation / {{\nproxy_pass http://replicas;\nproxy_connect_timeout 1s;\n\
         proxy_next_upstream error timeout http_503 non_idempotent;\n}}\n}}\n}}\n"
    );
    std::fs::write(place.join("nginx.conf"), config).expect("nginx.conf");
    let mut command = Command::new(program("nginx"));
    command.args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(&place);
    let nginx = Process::start("nginx", &command, &place);
    nginx.wait_ready(|| TcpStream::connect(front).is_ok());
    nginx
}

fn watches(replica: &Service) -> bool {
    let report: Value = serde_json::from_str(&replica.get("/readyz").text()).unwrap_or_default();
    report["watches"] == true
}

/// Two clients with delays of 18 s: the watcher is killed, one says goodbye to the SFU, which tells a replica by way of nginx, and the
/// other one's event goes on.
#[test]
fn three_replicas_behind_nginx_lose_their_watcher() {
    if !real_neighbours() {
        return;
    }
    let redis = RedisServer::start(&[]).expect("redis-server, or these tests are left out");
    let front = free_address();
    let plan = Plan {
        webhooks: false,
        told: vec![format!("http://{front}/sfu_webhook")],
        ..Plan::default()
    };
    let plan = plan
        .env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address()))
        .env("LIVEKIT_REDIS_SHARED", "true");
    let stage = Arc::new(Stage::new(plan));
    let (second, third) = (stage.replica(), stage.replica());
    let _nginx = nginx(front, &[&stage.service(), &second, &third]);
    wait_until("the first replica to watch", TIMEOUT, || watches(&stage.service()));
    let [stays, leaves] = ["replicastays", "replicaleaves"].map(|name| stage.caller(name));
    let parties = [Party::start(), Party::start()];
    let events = [stays.schedule(18), leaves.schedule(18)];
    for ((caller, party), event) in [&stays, &leaves].into_iter().zip(&parties).zip(&events) {
        joins_and_is_watched(caller, event, |answer| party.join("r", answer));
    }
    let killed = now_ms();
    stage.kill_service();
    wait_until("another replica to watch", TIMEOUT, || watches(&second) || watches(&third));
    say(&format!("three replicas: watched again {} ms after kill -9", now_ms() - killed));
    parties[1].leave("r");
    let notice = leaves.wait_notice("participant_left", killed, TIMEOUT);
    let sent = leaves.wait_sent(&events[1], Duration::from_secs(8));
    say(&format!(
        "three replicas: the leave {} ms after the SFU told",
        sent.saturating_sub(notice.at)
    ));
    stays.wait_restarted(&events[0], killed, TIMEOUT);
    stays.assert_there(&events[0]);
    parties[0].leave("r");
    stays.wait_sent(&events[0], Duration::from_secs(8));
}
