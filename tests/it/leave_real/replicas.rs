//! Replicas behind nginx: a real Redis, SFU and homeserver, and clients who stay while the watch moves.

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
         server {{\nlisten {front};\nlocation / {{\nproxy_pass http://replicas;\nproxy_connect_timeout 1s;\nproxy_read_timeout 2s;\n\
         proxy_next_upstream error timeout non_idempotent;\n}}\n}}\n}}\n"
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

/// Clients with delays of 18 s: the watcher is killed, the next one is stopped as in a rolling update, and one is frozen for longer than a
/// node's life. Each time somebody says goodbye to the SFU, which tells a replica by way of nginx, and whoever stays is there.
#[test]
fn replicas_behind_nginx_lose_one_watcher_after_the_other() {
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
    let others: Vec<_> = (0..3).map(|_| stage.replica()).collect();
    let first = stage.service();
    let _nginx = nginx(front, &[&first, &others[0], &others[1], &others[2]]);
    wait_until("the first replica to watch", TIMEOUT, || watches(&first));
    drop(first);
    let party = Party::start();
    let callers = ["replicastays", "replicakill", "replicaterm", "replicastop"].map(|name| stage.caller(name));
    let events = callers.each_ref().map(|caller| caller.schedule(18));
    for (caller, event) in callers.iter().zip(&events) {
        joins_and_is_watched(caller, event, |answer| party.join(&caller.name, answer));
    }
    let watcher_but = |out: &[usize]| (0..others.len()).find(|at| !out.contains(at) && watches(&others[*at]));
    let next_watcher = |what: &str, out: &[usize]| {
        let began = now_ms();
        wait_until("another replica to watch", TIMEOUT, || watcher_but(out).is_some());
        say(&format!("replicas: watched again {} ms after {what}", now_ms() - began));
        watcher_but(out).expect("just seen")
    };
    let goodbye = |at: usize| {
        let began = now_ms();
        party.leave(&callers[at].name);
        let notice = callers[at].wait_notice("participant_left", began, TIMEOUT);
        let sent = callers[at].wait_sent(&events[at], Duration::from_secs(8));
        say(&format!(
            "replicas: the leave {} ms after the SFU told",
            sent.saturating_sub(notice.at)
        ));
        callers[0].assert_there(&events[0]);
    };

    stage.kill_service();
    let killed = next_watcher("SIGKILL", &[]);
    goodbye(1);

    others[killed].signal("TERM");
    others[killed].wait_exit(TIMEOUT);
    assert!(!others[killed].log().contains("watch_not_handed_over"), "{}", others[killed].log());
    let stopped = next_watcher("the end of the former one", &[killed]);
    goodbye(2);

    others[stopped].signal("STOP");
    let last = next_watcher("SIGSTOP", &[killed, stopped]);
    goodbye(3);
    others[stopped].signal("CONT");
    wait_until("exactly one watcher", TIMEOUT, || {
        !watches(&others[stopped]) && watches(&others[last])
    });
    callers[0].wait_restarted(&events[0], now_ms(), TIMEOUT);
    party.leave(&callers[0].name);
    callers[0].wait_sent(&events[0], Duration::from_secs(8));
}
