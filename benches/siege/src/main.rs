//! A siege of the service by strangers, while honest users want to be served. See `HELP`.

mod attack;
mod hostile;
mod report;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use siege::{cage, dns, figures, honest, http, places, tls, world};

use attack::{Attackers, Kind};
use cage::Cage;
use figures::{Lateness, Samples};
use honest::Signals;
use places::{LISTED, Places, VERIFIED};
use report::Memory;
use world::World;

const HELP: &str = "\
A siege of lk-jwt-service: attackers without an account do all that they can, at once, while honest users, the SFU's
webhooks and delegated leaves want to be served. Prints what the honest saw beside its limits; the exit code is 1 when a
limit is missed, 2 when the siege cannot be held here.

usage: siege --binary PATH [options]

  --binary PATH       the service
  --minutes N         how long, at most 15; figures are also given for each minute (default 1)
  --seconds N         the same in seconds, as one round
  --after SECONDS     how long memory is watched after the end (default 60)
  --attacks LIST      only these, by comma, or none; all: stalled-heads, silent, chunk-bombs, 1xx-streams, junk-listed,
                      junk-verified, junk-new, hanging-names, fan-outs, stalled-webhooks,
                      forged-tickets
  --replicas N        so many replicas on one Redis instead of one service, asked in turn; the one that watches is killed
                      when half of the time is over, and what it was killed with in the air is not counted. Needs
                      redis-server
  --memory MIB        limit of the service's cgroup (default 128); of each replica
  --service-cpu N     core of the service (default 0)
  --siege-cpu N       core of everybody else (default 1)
  --nice N            priority of the service and of the siege, for a machine that does other things besides: -15
  --env NAME=VALUE    one more variable of the service, as often as wanted
  --log FILE          where the service's log goes, its first 64 MiB
  --json FILE         the figures, for programs

Needs root: for a cgroup of memory (v1 or v2), for the ports 443 and 53, and for priorities. Everything is on loopback,
below four octets of 127.224.0.0/11; nothing else of the machine is changed, and all of it is gone afterwards.
";

/// Longest log that is kept.
const LOG: usize = 64 * 1024 * 1024;
/// A siege that takes so much longer than it should is ended.
const SLACK: Duration = Duration::from_secs(120);
/// A leave whose watcher is killed is sent so soon: a life of 2 s, two beats, and what confirms the departure.
const LEAVE_WITHIN_A_TAKEOVER: Duration = Duration::from_millis(7300);
/// A service that dies is started again so often.
const STARTS: u64 = 50;

struct Options {
    binary: String,
    length: Duration,
    round: Duration,
    after: Duration,
    kinds: Vec<Kind>,
    replicas: u8,
    memory: u64,
    service_cpu: usize,
    siege_cpu: usize,
    nice: i32,
    environment: Vec<(String, String)>,
    log: Option<PathBuf>,
    json: Option<PathBuf>,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let minute = Duration::from_secs(60);
        let mut all = Self {
            binary: String::new(),
            length: minute,
            round: minute,
            after: minute,
            kinds: Kind::ALL.to_vec(),
            replicas: 1,
            memory: 128,
            service_cpu: 0,
            siege_cpu: 1,
            nice: 0,
            environment: Vec::new(),
            log: None,
            json: None,
        };
        while let Some(name) = arguments.next() {
            if name == "--help" {
                return Err(String::new());
            }
            let value = arguments.next().ok_or(format!("{name} has no value"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{name} {value} is no number"));
            match name.as_str() {
                "--binary" => all.binary = value,
                "--minutes" => (all.length, all.round) = (minute * number()?.clamp(1, 15) as u32, minute),
                "--seconds" => {
                    all.length = Duration::from_secs(number()?.clamp(1, 900));
                    all.round = all.length;
                }
                "--after" => all.after = Duration::from_secs(number()?.min(600)),
                "--attacks" if value == "none" => all.kinds.clear(),
                "--attacks" => {
                    let kind = |name| {
                        Kind::ALL
                            .into_iter()
                            .find(|k| k.plan().0 == name)
                            .ok_or(format!("no attack is called {name}"))
                    };
                    all.kinds = value.split(',').map(kind).collect::<Result<_, _>>()?;
                }
                "--replicas" => all.replicas = number()?.clamp(1, 50) as u8,
                "--memory" => all.memory = number()?,
                "--service-cpu" => all.service_cpu = number()? as usize,
                "--siege-cpu" => all.siege_cpu = number()? as usize,
                "--nice" => all.nice = value.parse().map_err(|_| format!("{name} {value} is no number"))?,
                "--env" => {
                    let (name, value) = value.split_once('=').ok_or(format!("--env {value} has no ="))?;
                    all.environment.push((name.to_owned(), value.to_owned()));
                }
                "--log" => all.log = Some(value.into()),
                "--json" => all.json = Some(value.into()),
                _ => return Err(format!("{name} is not known; see --help")),
            }
        }
        if all.binary.is_empty() {
            return Err("--binary is missing; see --help".into());
        }
        Ok(all)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--enter") => {
            eprintln!("siege: the service cannot be started: {}", cage::enter(&arguments[1..]));
            return ExitCode::from(127);
        }
        Some("--watch") => {
            cage::watch(&arguments[1..]);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let done = Options::parse(arguments.into_iter()).and_then(|options| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())?;
        runtime.block_on(siege(options))
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) if why.is_empty() => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("siege: {why}");
            ExitCode::from(2)
        }
    }
}

/// A thread with a runtime of its own.
fn thread<F: Future<Output = ()>>(nice: i32, what: impl FnOnce() -> F + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), nice);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        LocalSet::new().block_on(&runtime, what());
    })
}

/// The service, or its replicas, and how often one had to be started.
struct Service {
    replicas: Vec<(SocketAddr, Child)>,
    starts: u64,
}

impl Service {
    fn pids(&self) -> Vec<u32> {
        self.replicas.iter().map(|(_, child)| child.id()).collect()
    }

    /// Place of the replica that watches.
    async fn watcher(&self) -> Option<usize> {
        for (i, (at, _)) in self.replicas.iter().enumerate() {
            if get(*at, "/readyz").await.body.contains("\"watches\":true") {
                return Some(i);
            }
        }
        None
    }
}

/// A directory that goes away.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[derive(Default)]
struct Logged {
    bytes: AtomicU64,
    lines: AtomicU64,
}

struct Stage {
    options: Options,
    places: Places,
    cage: Cage,
    folder: Folder,
    logged: Arc<Logged>,
}

impl Stage {
    /// The Redis of replicas. It ends with the cgroup.
    fn start_redis(&self) -> Result<(), String> {
        let at = self.places.redis();
        let mut command = self.cage.command("redis-server", Some(self.options.siege_cpu), self.options.nice)?;
        let (port, address) = (at.port().to_string(), at.ip().to_string());
        command
            .args(["--port", &port, "--bind", &address, "--protected-mode", "no"])
            .args(["--save", "", "--appendonly", "yes", "--dir"])
            .arg(&self.folder.0)
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("redis-server cannot be started: {e}"))?;
        Ok(())
    }

    fn start(&self, at: SocketAddr) -> Result<Child, String> {
        let places = self.places;
        let redis = format!("redis://{}", places.redis());
        let shared = [("LIVEKIT_REDIS_URL", redis.as_str()), ("LIVEKIT_REDIS_SHARED", "true")];
        let mut command = self
            .cage
            .command(&self.options.binary, Some(self.options.service_cpu), self.options.nice)?;
        let mut child = command
            .env("LIVEKIT_URL", format!("ws://{}", places.sfu()))
            .env("LIVEKIT_KEY", world::KEY)
            .env("LIVEKIT_SECRET", world::SECRET)
            .env("LIVEKIT_JWT_BIND", at.to_string())
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", LISTED)
            .env(
                "LIVEKIT_CS_API_URL_OVERRIDES",
                format!("{LISTED}=http://{}", places.listed_client_api()),
            )
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
            .env("LIVEKIT_DNS_SERVERS", places.dns().to_string())
            .env("SSL_CERT_FILE", self.folder.0.join("ca.pem"))
            .envs(shared.into_iter().filter(|_| self.options.replicas > 1))
            .envs(self.options.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("the service cannot be started: {e}"))?;
        // Written by us: the pages of the file are not to be counted as the service's memory.
        let mut pipe = child.stderr.take().ok_or("no stderr")?;
        let logged = self.logged.clone();
        let mut file = match &self.options.log {
            Some(path) => Some(
                std::fs::File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|e| format!("{}: {e}", path.display()))?,
            ),
            None => None,
        };
        std::thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            while let Ok(n) = pipe.read(&mut chunk)
                && n > 0
            {
                let before = logged.bytes.fetch_add(n as u64, Relaxed) as usize;
                logged
                    .lines
                    .fetch_add(chunk[..n].iter().filter(|b| **b == b'\n').count() as u64, Relaxed);
                if let Some(file) = file.as_mut().filter(|_| before < LOG) {
                    let _ = file.write_all(&chunk[..n]);
                }
            }
        });
        Ok(child)
    }
}

async fn get(to: SocketAddr, path: &str) -> http::Outcome {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {to}\r\n\r\n");
    let from = std::net::Ipv4Addr::LOCALHOST;
    http::ask(from, to, request.as_bytes(), Duration::from_secs(1)).await
}

async fn healthy(to: SocketAddr, within: Duration) -> bool {
    let end = Instant::now() + within;
    while Instant::now() < end {
        if get(to, "/healthz").await.status == 200 {
            return true;
        }
        sleep(Duration::from_millis(10)).await;
    }
    false
}

/// True when every limit was kept.
async fn siege(options: Options) -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("root is needed, for a cgroup and for the ports 443 and 53 of loopback addresses".into());
    }
    if let Some(path) = &options.log {
        let _ = std::fs::remove_file(path);
    }
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).map_err(|e| format!("descriptors: {e}"))?;
    cage::pin(options.siege_cpu)?;
    cage::prefer(options.nice)?;
    let places = Places::of_this_process();
    let folder = Folder(std::env::temp_dir().join(format!("siege-{}", std::process::id())));
    std::fs::create_dir_all(&folder.0).map_err(|e| format!("{}: {e}", folder.0.display()))?;
    let (tls, pem) = tls::make();
    std::fs::write(folder.0.join("ca.pem"), pem).map_err(|e| e.to_string())?;
    let memory_limit = options.memory * u64::from(options.replicas);
    let cage = Cage::new(memory_limit * 1024 * 1024, &folder.0, options.length + options.after + SLACK)?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut hang_up = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).map_err(|e| e.to_string())?;

    // The honest world, with a thread that comes before the attackers'.
    let began = Instant::now();
    let samples = Arc::new(Samples::new(began, options.round));
    let mut world = World::new(places, samples.clone(), tls.clone());
    let addresses: Vec<_> = (0..options.replicas).map(|n| places.replica(n)).collect();
    if options.replicas > 1 {
        world = world.with_leaves_within(LEAVE_WITHIN_A_TAKEOVER);
        world.serve_at(addresses.clone());
    }
    let world = Arc::new(world);
    let signals = Arc::new(Signals::default());
    let asked = Arc::new(dns::Asked::default());
    let (told, hears) = mpsc::channel::<Result<(), String>>();
    let (warm_up, warming) = oneshot::channel::<()>();
    let (begin, beginning) = oneshot::channel::<()>();
    let (finish, finishing) = oneshot::channel::<()>();
    {
        let (world, signals, asked, samples) = (world.clone(), signals.clone(), asked.clone(), samples.clone());
        thread(-15, move || async move {
            tokio::spawn(async move { samples.lateness.measure().await });
            let stands = async {
                dns::serve(places, asked, Arc::default()).await?;
                world.stand(|place| place).await
            };
            let failed = |e: std::io::Error| format!("cannot listen on {}: {e}; is another siege going on?", places.dns());
            let _ = told.send(stands.await.map_err(failed));
            let _ = warming.await;
            let _ = told.send(warm(&world).await);
            let _ = beginning.await;
            honest::run(world, signals).await;
            let _ = finishing.await;
        });
    }
    let hear = |within: u64| hears.recv_timeout(Duration::from_secs(within)).map_err(|e| e.to_string())?;
    hear(10)?;

    let stage = Stage {
        options,
        places,
        cage,
        folder,
        logged: Arc::default(),
    };
    let options = &stage.options;
    if options.replicas > 1 {
        stage.start_redis()?;
    }
    let mut service = Service {
        replicas: Vec::new(),
        starts: 1,
    };
    for at in addresses {
        service.replicas.push((at, stage.start(at)?));
        if !healthy(at, Duration::from_secs(20)).await {
            return Err(format!("{} does not become healthy; see --log FILE", options.binary));
        }
    }
    let _ = warm_up.send(());
    hear(30)?;
    let mut memory = Memory::default();
    memory.look(&stage.cage, &service.pids());
    let idle = memory.rss;

    let seen = Arc::new(hostile::Seen::default());
    let attackers = Arc::new(Attackers {
        places,
        world: world.clone(),
        signals: signals.clone(),
        tallies: Default::default(),
        next: AtomicU64::new(0),
    });
    let their_lateness = Arc::new(Lateness::new(began));
    let attacking = {
        let (attackers, seen, lateness, kinds) = (attackers.clone(), seen.clone(), their_lateness.clone(), options.kinds.clone());
        let (told, hears) = mpsc::channel();
        let attacking = thread(5, move || async move {
            tokio::task::spawn_local(async move { lateness.measure().await });
            let _ = told.send(hostile::stand(places, tls, seen).map_err(|e| format!("the hostile cannot listen: {e}")));
            // The first users are there before the first attacker.
            sleep(Duration::from_secs(1)).await;
            attackers.run(kinds).await;
        });
        hears.recv_timeout(Duration::from_secs(10)).map_err(|e| e.to_string())??;
        attacking
    };
    let started = Instant::now();
    let _ = begin.send(());
    let mut cpu = report::Cpu::now(&service.pids());
    println!(
        "siege: {} s of {}, pid {:?}",
        options.length.as_secs(),
        options.binary,
        service.pids()
    );

    let mut ticks = interval(Duration::from_millis(100));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut rounds = 0;
    let mut deaths = Vec::new();
    let mut stopped_at = None;
    let mut afterwards = Vec::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = tokio::signal::ctrl_c() => return Err("interrupted".into()),
            _ = terminate.recv() => return Err("terminated".into()),
            _ = hang_up.recv() => return Err("hung up".into()),
        }
        if options.replicas > 1 && samples.killed.get().is_none() && started.elapsed() >= options.length / 2 {
            let at = service.watcher().await.ok_or("no replica watches")?;
            cpu.look(&service.pids());
            let (_, mut child) = service.replicas.remove(at);
            // No balancer would find it any more.
            world.serve_at(service.replicas.iter().map(|(at, _)| *at).collect());
            let _ = samples.killed.set(Instant::now());
            child.kill().and_then(|()| child.wait()).map_err(|e| format!("kill: {e}"))?;
            println!("siege: the watcher was killed after {:.1} s", started.elapsed().as_secs_f64());
        }
        memory.look(&stage.cage, &service.pids());
        for (at, child) in &mut service.replicas {
            let Ok(Some(status)) = child.try_wait() else { continue };
            let after = started.elapsed().as_secs_f64();
            println!("siege: the service ended after {after:.1} s: {status}");
            deaths.push(after);
            if service.starts >= STARTS {
                return Err(format!("the service has ended {STARTS} times"));
            }
            *child = stage.start(*at)?;
            service.starts += 1;
        }
        cpu.look(&service.pids());
        let over = started.elapsed() >= options.length;
        if stopped_at.is_none() && (over || started.elapsed() >= options.round * (rounds + 1)) {
            rounds += 1;
            // Rounds are counted from the first moment of the samples, which is a little earlier.
            println!("{}", report::round(rounds as usize, &samples, &world.leaves(), &memory));
        }
        if over && stopped_at.is_none() {
            stopped_at = Some(Instant::now());
            signals.stop.store(true, Relaxed);
            cpu.stop();
        }
        // Leaves that are due are waited for.
        let rest = options.after.max(world::LEAVE_WITHIN + Duration::from_secs(1));
        if let Some(at) = stopped_at {
            let since: Duration = Instant::now() - at;
            if since.as_secs() >= 10 * afterwards.len() as u64 {
                afterwards.push(memory.rss);
            }
            if since >= rest {
                break;
            }
        }
    }
    let _ = attacking.join();
    let last = memory.rss;
    let kept = report::Report {
        options: report::Told {
            binary: &options.binary,
            length: options.length,
            after: options.after,
            limit: memory_limit,
            kinds: &options.kinds,
        },
        samples: &samples,
        their_lateness: &their_lateness,
        leaves: world.leaves(),
        memory: &memory,
        idle,
        afterwards: &afterwards,
        last,
        cage: &stage.cage,
        deaths: &deaths,
        seen: &seen,
        asked: &asked,
        world: &world,
        tallies: &attackers.tallies,
        cpu: &cpu,
        logged: (stage.logged.bytes.load(Relaxed), stage.logged.lines.load(Relaxed)),
        rounds: rounds as usize,
    }
    .tell(options.json.as_deref())?;
    for (_, child) in &mut service.replicas {
        let _ = child.kill();
        let _ = child.wait();
    }
    let _ = finish.send(());
    Ok(kept)
}

/// Both standing homeservers are served once before it begins; so one of them is verified.
async fn warm(world: &World) -> Result<(), String> {
    for server in [LISTED, VERIFIED] {
        for _ in 0..3 {
            let status = honest::exchange(world, server, None).await;
            if status != 200 {
                return Err(format!("a user of {server} gets {status} before anybody attacks"));
            }
        }
    }
    Ok(())
}
