//! Several replicas on one Redis, with many jobs: what Redis, the watcher and the others take, and how soon a killed watcher is followed.
//!
//! The jobs stand in Redis as another replica left them, restarted one after the other within the last half of their delay: so restarts are
//! due evenly from the first moment on, and the first one of an heir shows that it watches. With `--delegated` they are delegated instead,
//! one replica after the other in turn, and due in half an hour.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use chrono::{DateTime, SecondsFormat};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::{DELAY_MS, Neighbours, ROOMS, Service, cpu, free_port, load, neighbours, start};

/// How long the steady state is measured; the third reading of all records is in it, a minute after the watch began.
const STEADY: Duration = Duration::from_secs(60);
/// The same while a watch begins; the second reading of all records is in it, after 15 s.
const BEGINS: Duration = Duration::from_secs(25);

struct Redis {
    child: Child,
    folder: PathBuf,
    port: u16,
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Redis {
    async fn start() -> Self {
        let port = free_port();
        let folder = std::env::temp_dir().join(format!("lkbench-redis-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "yes", "--dir"])
            .arg(&folder)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server");
        let redis = Self { child, folder, port };
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            assert!(Instant::now() < end, "redis-server does not answer");
            sleep(Duration::from_millis(10)).await;
        }
        redis
    }

    /// Writes so many records, and makes everybody in them present.
    async fn fill(&self, n: &Neighbours, jobs: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        for first in (0..jobs).step_by(1000) {
            let all = first..(first + 1000).min(jobs);
            let count = all.clone().count();
            let mut commands = Vec::new();
            for i in all {
                // As long as names are that are hashes.
                let (room, identity) = (format!("{:0>43}", i % ROOMS.load(Relaxed)), format!("{i:0>43}"));
                let ago = (DELAY_MS / 2 * i / jobs) as i64;
                let [field, value] = record(n, i, &room, &identity, now - ago);
                for part in ["*4", "$4\r\nHSET", "$11\r\nlk-jwt:jobs"] {
                    commands.extend(format!("{part}\r\n").into_bytes());
                }
                for part in [field, value] {
                    commands.extend(format!("${}\r\n{part}\r\n", part.len()).into_bytes());
                }
                n.present.lock().unwrap().entry(room).or_insert_with(BTreeSet::new).insert(identity);
            }
            stream.write_all(&commands).await.unwrap();
            let mut answers = vec![0; 4 * count];
            stream.read_exact(&mut answers).await.unwrap();
            assert_eq!(answers, b":1\r\n".repeat(count), "an answer of redis-server");
        }
    }
}

/// Field and value of a job that was last restarted then, and whose participant is known.
fn record(n: &Neighbours, i: u64, room: &str, identity: &str, restarted_ms: i64) -> [String; 2] {
    let restarted = DateTime::from_timestamp_millis(restarted_ms).unwrap().to_rfc3339_opts(SecondsFormat::AutoSi, true);
    let value = json!({
        "Params": {
            "DelayId": format!("syd_{i}"), "DelayTimeout": DELAY_MS * 1_000_000, "ServerName": n.server_name,
            "LiveKitRoom": room, "LiveKitIdentity": identity,
        },
        "RestartedAt": restarted,
        "LkJwtServiceWatch": {
            "user": format!("@user{i}:{}", n.server_name), "delegatedAt": restarted_ms - 60_000, "sid": format!("PA_{identity}"),
            "joinedAtMs": 1000, "roomSid": format!("RM_{room}"), "lastSighted": restarted_ms, "seen": true,
        },
    });
    [json!([room, identity]).to_string(), value.to_string()]
}

async fn readyz(s: &Service) -> Value {
    let answer = reqwest::get(format!("{}/readyz", s.url)).await;
    match answer {
        Ok(answer) => answer.json().await.unwrap_or_default(),
        Err(_) => Value::Null,
    }
}

/// Place of the one that says that it watches.
async fn watcher(all: &[Service]) -> usize {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        for (at, s) in all.iter().enumerate() {
            if readyz(s).await["watches"] == true {
                return at;
            }
        }
        assert!(Instant::now() < end, "nobody watches");
        sleep(Duration::from_millis(50)).await;
    }
}

/// One line of `/proc/PID/status`, in MiB.
fn memory(pid: u32, name: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Says what of a core each process takes within that time, and what memory.
async fn shares(what: &str, n: &Neighbours, redis: &Redis, all: &[Service], watching: usize, length: Duration) {
    let restarts = || n.counters.restarts.load(Relaxed);
    let watcher = all[watching].child.id();
    let others: Vec<_> = all.iter().map(|s| s.child.id()).filter(|pid| *pid != watcher).collect();
    let most = |of: &dyn Fn(u32) -> f64| others.iter().map(|pid| of(*pid)).fold(0.0, f64::max);
    let read = || [cpu(redis.child.id()), cpu(watcher), others.iter().map(|pid| cpu(*pid)).sum()];
    let (t, before, restarted) = (Instant::now(), read(), restarts());
    sleep(length).await;
    let took = t.elapsed().as_secs_f64();
    let after = read();
    let [redis_cpu, watcher_cpu, others_cpu] = std::array::from_fn(|i| (after[i] - before[i]) / took * 100.0);
    println!(
        "{what}: {took:.0} s, restarts {}; of a core: redis {redis_cpu:.2} %, watcher {watcher_cpu:.2} %, others together {others_cpu:.2} %; RSS now and at most, MiB: watcher {:.1}, {:.1}, others {:.1}, {:.1}, redis {:.1}",
        restarts() - restarted,
        memory(watcher, "VmRSS"),
        memory(watcher, "VmHWM"),
        most(&|pid| memory(pid, "VmRSS")),
        most(&|pid| memory(pid, "VmHWM")),
        memory(redis.child.id(), "VmRSS"),
    );
}

pub async fn measure(name: &str, bin: &str, replicas: usize, jobs: u64, delegated: bool, conc: u64) {
    println!("== {jobs} delegated leave jobs, {replicas} replicas on one Redis (1 h timeout, participants present)");
    let n = Arc::new(neighbours(Duration::ZERO).await);
    let redis = Redis::start().await;
    if !delegated {
        redis.fill(&n, jobs).await;
    }
    let url = format!("redis://127.0.0.1:{}", redis.port);
    let mut all = Vec::new();
    for _ in 0..replicas {
        all.push(start(bin, &n, true, &[("LIVEKIT_REDIS_URL", &url), ("LIVEKIT_REDIS_SHARED", "true")]).await);
    }
    let mut at = watcher(&all).await;
    if delegated {
        let urls: Vec<_> = all.iter().map(|s| &*s.url).collect();
        let (wall, _, fails) = load(&urls, &n, "delegate", "/delegate_delayed_leave", jobs, conc, true).await;
        println!("{name}: delegated within {wall:.1} s, fails {fails}");
        for _ in 0..600 {
            if n.counters.restarts.load(Relaxed) >= jobs { break; }
            sleep(Duration::from_millis(100)).await;
        }
    }
    shares(&format!("{name}: begins"), &n, &redis, &all, at, BEGINS).await;
    shares(&format!("{name}: steady"), &n, &redis, &all, at, STEADY).await;
    // As long as another one is left, and restarts are due.
    while all.len() > 2 && !delegated {
        let mut killed = all.remove(at);
        let t = Instant::now();
        let _ = killed.child.kill();
        let _ = killed.child.wait();
        // Nobody follows as soon as that; what is counted by then were its own last calls.
        sleep(Duration::from_secs(1)).await;
        let before = n.counters.restarts.load(Relaxed);
        while n.counters.restarts.load(Relaxed) == before {
            assert!(t.elapsed() < Duration::from_secs(60), "nobody has restarted anything");
            sleep(Duration::from_millis(1)).await;
        }
        println!("{name}: kill -9 of the watcher: the first restart of the next one after {:.2} s", t.elapsed().as_secs_f64());
        at = watcher(&all).await;
        shares(&format!("{name}: heir"), &n, &redis, &all, at, BEGINS).await;
    }
}
