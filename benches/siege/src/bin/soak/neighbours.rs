//! The neighbours as processes, that signals end and stop: before each fake stands a front, Redis is a real one and its replica.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use siege::places::Places;
use siege::{dns, http};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

/// What each part of an answer is late by while its front is slow.
const SLOW_MS: u64 = 300;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    Sfu,
    Homeserver,
    ClientApi,
    Verified,
    Dns,
    Redis,
}

impl Who {
    pub const ALL: [Self; 6] = [Self::Sfu, Self::Homeserver, Self::ClientApi, Self::Verified, Self::Dns, Self::Redis];

    pub fn name(self) -> &'static str {
        match self {
            Self::Sfu => "SFU",
            Self::Homeserver => "homeserver",
            Self::ClientApi => "client API",
            Self::Verified => "other homeserver",
            Self::Dns => "DNS",
            Self::Redis => "Redis",
        }
    }
}

pub struct Neighbours {
    places: Places,
    folder: PathBuf,
    /// Of each neighbour, in their order.
    fronts: [Option<Child>; 6],
    redis: [Option<Child>; 2],
    /// Which of the two is in use.
    pub master: Arc<AtomicUsize>,
}

impl Neighbours {
    pub async fn start(places: Places, folder: &Path) -> Result<Self, String> {
        let mut all = Self {
            places,
            folder: folder.to_owned(),
            fronts: Default::default(),
            redis: Default::default(),
            master: Arc::default(),
        };
        all.start_redis(0, None).await?;
        all.start_redis(1, Some(places.redis_server(0))).await?;
        for who in Who::ALL {
            all.start_front(who)?;
        }
        Ok(all)
    }

    /// What it listens at, and where it leads.
    fn ways(&self, who: Who) -> Vec<(SocketAddr, SocketAddr)> {
        let behind = |at: SocketAddr| match at.ip() {
            IpAddr::V4(ip) => (at, SocketAddr::new(self.places.behind(ip).into(), at.port())),
            IpAddr::V6(_) => (at, at),
        };
        let both = |ip: Ipv4Addr| vec![behind((ip, 443).into()), behind((ip, 8448).into())];
        match who {
            Who::Sfu => vec![behind(self.places.sfu())],
            Who::Homeserver => both(self.places.listed()),
            Who::ClientApi => vec![behind(self.places.listed_client_api())],
            Who::Verified => both(self.places.verified()),
            Who::Redis => vec![(self.places.redis(), self.places.redis_server(self.master()))],
            Who::Dns => vec![],
        }
    }

    pub fn start_front(&mut self, who: Who) -> Result<(), String> {
        let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
        match who {
            Who::Dns => command.args(["--dns", &self.places.base().to_string()]),
            _ => {
                let ways = self.ways(who).into_iter().flat_map(|(from, to)| [from.to_string(), to.to_string()]);
                command.arg("--front").args(ways)
            }
        };
        let child = command.stdin(Stdio::null()).spawn().map_err(|e| format!("{}: {e}", who.name()))?;
        self.fronts[who as usize] = Some(child);
        Ok(())
    }

    async fn start_redis(&mut self, which: usize, master: Option<SocketAddr>) -> Result<(), String> {
        let at = self.places.redis_server(which);
        let folder = self.folder.join(format!("redis{which}"));
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let mut command = Command::new(std::env::current_exe().map_err(|e| e.to_string())?);
        command
            .args(["--run", "redis-server", "--port", "6379", "--protected-mode", "no"])
            .args([
                "--save",
                "",
                "--appendonly",
                "yes",
                "--appendfsync",
                "everysec",
                "--repl-diskless-sync-delay",
                "0",
            ])
            .args(["--bind", &at.ip().to_string(), "--dir"])
            .arg(&folder);
        if let Some(master) = master {
            command.args(["--replicaof", &format!("{} {}", master.ip(), master.port())]);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("redis-server: {e}"))?;
        self.redis[which] = Some(child);
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if redis(at, &["PING"]).await.is_some_and(|answer| answer == "+PONG") {
                return Ok(());
            }
            sleep(Duration::from_millis(20)).await;
        }
        Err("redis-server does not answer".into())
    }

    fn child(&self, who: Who) -> Option<&Child> {
        match who {
            Who::Redis => self.redis[self.master()].as_ref(),
            _ => self.fronts[who as usize].as_ref(),
        }
    }

    pub fn signal(&self, who: Who, signal: Signal) {
        if let Some(child) = self.child(who) {
            signal_to(child.id(), signal);
        }
    }

    /// Only what stands before it is slow.
    pub fn slow(&self, who: Who, is_slow: bool) {
        if let Some(child) = &self.fronts[who as usize] {
            signal_to(child.id(), if is_slow { Signal::USR1 } else { Signal::USR2 });
        }
    }

    pub fn end(&mut self, who: Who, signal: Signal) {
        let child = match who {
            Who::Redis => self.redis[self.master()].take(),
            _ => self.fronts[who as usize].take(),
        };
        if let Some(mut child) = child {
            signal_to(child.id(), signal);
            let _ = child.wait();
        }
    }

    pub async fn begin(&mut self, who: Who) -> Result<(), String> {
        match who {
            Who::Redis => self.start_redis(self.master(), None).await,
            _ => self.start_front(who),
        }
    }

    /// The master dies; the replica becomes master, at the same address for the service; the old one comes back as its replica.
    pub async fn fail_over(&mut self, pause: Duration) -> Result<(), String> {
        self.end(Who::Redis, Signal::KILL);
        sleep(pause).await;
        let old = self.master();
        self.master.store(1 - old, Relaxed);
        let new = self.places.redis_server(self.master());
        let promoted = redis(new, &["REPLICAOF", "NO", "ONE"]).await;
        if promoted.as_deref() != Some("+OK") {
            return Err(format!("the replica is not promoted: {promoted:?}"));
        }
        if let Some(mut front) = self.fronts[Who::Redis as usize].take() {
            let _ = front.kill();
            let _ = front.wait();
        }
        self.start_front(Who::Redis)?;
        self.start_redis(old, Some(new)).await
    }

    fn master(&self) -> usize {
        self.master.load(Relaxed)
    }
}

/// Records in the store.
pub async fn stored(places: Places, master: &AtomicUsize) -> Option<u64> {
    let answer = redis(places.redis_server(master.load(Relaxed)), &["HLEN", "lk-jwt:jobs"]).await?;
    answer.strip_prefix(':')?.parse().ok()
}

impl Drop for Neighbours {
    fn drop(&mut self) {
        for child in self.fronts.iter_mut().chain(&mut self.redis).flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn signal_to(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The first line of the answer to a command.
async fn redis(at: SocketAddr, command: &[&str]) -> Option<String> {
    timeout(Duration::from_secs(1), async {
        let mut stream = TcpStream::connect(at).await.ok()?;
        let parts: String = command.iter().map(|part| format!("${}\r\n{part}\r\n", part.len())).collect();
        stream.write_all(format!("*{}\r\n{parts}", command.len()).as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            answer.push(stream.read_u8().await.ok()?);
        }
        Some(String::from_utf8_lossy(&answer).trim_end().to_owned())
    })
    .await
    .ok()?
}

/// How late a front is, as signals tell it.
fn lateness() -> std::io::Result<Arc<AtomicU64>> {
    let late = Arc::new(AtomicU64::new(0));
    for (kind, ms) in [(SignalKind::user_defined1(), SLOW_MS), (SignalKind::user_defined2(), 0)] {
        let (mut signals, late) = (signal(kind)?, late.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                late.store(ms, Relaxed);
            }
        });
    }
    Ok(late)
}

/// Passes connections on: pairs of where it listens and where it leads.
pub async fn front(ways: &[String]) -> Result<(), String> {
    let late = lateness().map_err(|e| e.to_string())?;
    for way in ways.chunks_exact(2) {
        let address = |text: &String| text.parse::<SocketAddr>().map_err(|e| format!("{text}: {e}"));
        let (from, to) = (address(&way[0])?, address(&way[1])?);
        let listener = http::listen(from).map_err(|e| format!("cannot listen on {from}: {e}"))?;
        let late = late.clone();
        tokio::spawn(async move {
            loop {
                if let Ok((inner, _)) = listener.accept().await {
                    tokio::spawn(pass(inner, to, late.clone()));
                }
            }
        });
    }
    std::future::pending().await
}

async fn pass(inner: TcpStream, to: SocketAddr, late: Arc<AtomicU64>) {
    let Ok(outer) = TcpStream::connect(to).await else { return };
    let _ = (inner.set_nodelay(true), outer.set_nodelay(true));
    let (inner_read, inner_write) = inner.into_split();
    let (outer_read, outer_write) = outer.into_split();
    tokio::select! {
        () = pump(inner_read, outer_write, None) => {}
        () = pump(outer_read, inner_write, Some(late)) => {}
    }
}

async fn pump(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, late: Option<Arc<AtomicU64>>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(n) = from.read(&mut buffer).await
        && n > 0
    {
        if let Some(ms) = late.as_ref().map(|late| late.load(Relaxed)).filter(|ms| *ms > 0) {
            sleep(Duration::from_millis(ms)).await;
        }
        if to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// The DNS server of a soak.
pub async fn name_server(base: &str) -> Result<(), String> {
    let places = Places::below(base.parse().map_err(|_| "no octet".to_owned())?);
    let late = lateness().map_err(|e| e.to_string())?;
    dns::serve(places, Arc::default(), late).await.map_err(|e| e.to_string())?;
    std::future::pending().await
}
