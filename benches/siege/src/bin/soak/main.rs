//! An hour of everything: load, thousands of delegated leaves, and neighbours that go wrong in turn. See `HELP`.

mod faults;
mod ledger;
mod neighbours;
mod report;
mod service;
mod town;

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use siege::cage::{self, Cage};
use siege::figures::Samples;
use siege::places::Places;
use siege::world::World;
use siege::{tls, world};
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use faults::{Actors, Fault};
use neighbours::Neighbours;
use report::{CALM_AFTER, Row, Verdict, quantile};
use service::Stage;
use town::{Phase, Town};

const HELP: &str = "\
A soak of lk-jwt-service: 300 requests a second and thousands of delegated leaves, while every neighbour is killed,
frozen, slowed and restarted in turn, keys change, Redis fails over and the service itself is replaced. Every ten seconds a
row of figures; in the end a verdict on each rule. The exit code is 1 when a rule is missed, 2 when it cannot be held here.

usage: soak --binary PATH [options]

  --binary PATH       the service
  --minutes N         how long, at most 120 (default 1)
  --leaves N          participants with a delegated leave (default 5000)
  --short N           of them, with a delay of 18 s; the others have an hour (default 500)
  --csv FILE          the rows
  --svg FILE          their graph
  --log FILE          what the service logs besides the lines of requests, its first 64 MiB
  --memory MIB        limit of the service's cgroup (default 256)
  --nice N            priority of all, for a machine that does other things besides: -10

Needs root and redis-server. Everything is on loopback, below four octets of 127.224.0.0/11.
";

/// A leave has to be told so soon after a departure, whatever goes wrong: the minute of a lost room, and what leads to it.
const LEAVE_WITHIN: Duration = Duration::from_secs(120);
const ROW: Duration = Duration::from_secs(10);
/// A soak that takes so much longer than it should is ended.
const SLACK: Duration = Duration::from_secs(420);
/// Faults begin in this rhythm, or as fast as all of them fit in.
const RHYTHM: (Duration, Duration) = (Duration::from_secs(7), Duration::from_secs(60));

struct Options {
    binary: String,
    length: Duration,
    leaves: u64,
    short: u64,
    csv: Option<PathBuf>,
    svg: Option<PathBuf>,
    log: Option<PathBuf>,
    memory: u64,
    nice: i32,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut all = Self {
            binary: String::new(),
            length: Duration::from_secs(60),
            leaves: 5000,
            short: 500,
            csv: None,
            svg: None,
            log: None,
            memory: 256,
            nice: 0,
        };
        while let Some(name) = arguments.next() {
            if name == "--help" {
                return Err(String::new());
            }
            let value = arguments.next().ok_or(format!("{name} has no value"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{name} {value} is no number"));
            match name.as_str() {
                // It runs elsewhere.
                "--binary" => {
                    let path = std::fs::canonicalize(&value).map_err(|e| format!("{value}: {e}"))?;
                    all.binary = path.to_string_lossy().into_owned();
                }
                "--minutes" => all.length = Duration::from_secs(60 * number()?.clamp(1, 120)),
                "--leaves" => all.leaves = number()?.max(1),
                "--short" => all.short = number()?,
                "--csv" => all.csv = Some(value.into()),
                "--svg" => all.svg = Some(value.into()),
                "--log" => all.log = Some(value.into()),
                "--memory" => all.memory = number()?,
                "--nice" => all.nice = value.parse().map_err(|_| format!("{name} {value} is no number"))?,
                _ => return Err(format!("{name} is not known; see --help")),
            }
        }
        if all.binary.is_empty() {
            return Err("--binary is missing; see --help".into());
        }
        Ok(all)
    }

    fn ramp(&self) -> Duration {
        Duration::from_secs_f64(self.leaves as f64 / 250.0)
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let role = arguments.first().map(String::as_str);
    if matches!(role, Some("--front" | "--dns" | "--run")) {
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    }
    let done = match role {
        Some("--enter") => Err(format!("the service cannot be started: {}", cage::enter(&arguments[1..]))),
        Some("--watch") => {
            cage::watch(&arguments[1..]);
            Ok(true)
        }
        Some("--front") => runtime.block_on(neighbours::front(&arguments[1..])).map(|()| true),
        Some("--dns") => runtime.block_on(neighbours::name_server(&arguments[1..].concat())).map(|()| true),
        Some("--run") => Err(Command::new(&arguments[1]).args(&arguments[2..]).exec().to_string()),
        _ => Options::parse(arguments.into_iter()).and_then(|options| LocalSet::new().block_on(&runtime, soak(options))),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) if why.is_empty() => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("soak: {why}");
            ExitCode::from(2)
        }
    }
}

/// A directory that goes away.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A fault, from when to when.
type Span = (Instant, Option<Instant>, String);

struct Watch {
    began: Instant,
    rows: Vec<Row>,
    csv: Option<File>,
    spans: Vec<Span>,
    faults: usize,
    told: Vec<(Instant, Duration)>,
    last: Instant,
    last_cpu: (u32, f64, f64),
    last_counts: [u64; 3],
}

impl Watch {
    fn is_calm(&self, from: Instant, to: Instant) -> bool {
        let touches = |(began, ended, _): &Span| *began <= to && ended.is_none_or(|ended| ended + CALM_AFTER >= from);
        from.duration_since(self.began) >= CALM_AFTER && !self.spans.iter().any(touches)
    }

    async fn row(&mut self, stage: &Stage, master: &AtomicUsize, samples: &Samples) {
        let (now, town) = (Instant::now(), &stage.town);
        let late = samples.lateness.worst(self.last, now);
        if late >= world::STOOD_STILL {
            self.spans.push((self.last, Some(now), "the machine stood still".into()));
        }
        let took = (now - self.last).as_secs_f64();
        let mut window = town.ledger.take_window();
        window.took.sort_unstable();
        let totals = town.ledger.totals();
        let told = town.world.take_told();
        let leaves = town.world.leaves();
        let counts = [totals.lines, totals.counted, town.world.restarts.load(Relaxed)];
        let since: [u64; 3] = std::array::from_fn(|i| counts[i] - self.last_counts[i]);
        let mut row = Row {
            at_s: (now - self.began).as_secs_f64(),
            faults: self
                .spans
                .iter()
                .filter(|(began, ended, _)| *began <= now && ended.is_none_or(|ended| ended >= self.last))
                .map(|(_, _, name)| name.as_str())
                .collect::<Vec<_>>()
                .join(" + "),
            is_calm: self.is_calm(self.last, now),
            per_s: window.requests as f64 / took,
            refused_per_s: window.refused as f64 / took,
            good_refused: window.good_refused,
            failed: window.failed,
            p50_ms: quantile(&window.took, 0.5),
            p99_ms: quantile(&window.took, 0.99),
            lines: since[0],
            counted: since[1],
            restarts_per_s: since[2] as f64 / took,
            events: town.world.events(),
            told: told.len() as u64,
            wrong: leaves.false_sent + leaves.false_fired + leaves.lost,
            stored: neighbours::stored(stage.places, master).await,
            late_ms: late.as_secs_f64() * 1e3,
            ..Row::default()
        };
        let instance = *stage.now.lock().unwrap();
        if let Some(instance) = instance {
            let taken = instance.taken();
            (row.instance, row.age_s) = (instance.number, instance.began.elapsed().as_secs_f64());
            let (number, ran, waited) = self.last_cpu;
            let (ran, waited) = if number == instance.number { (ran, waited) } else { (0.0, 0.0) };
            let share = 100.0 / took.min(row.age_s);
            (row.cpu, row.waited) = ((taken.cpu_s - ran) * share, (taken.waited_s - waited) * share);
            self.last_cpu = (instance.number, taken.cpu_s, taken.waited_s);
            // Others had the processors, which is nothing that the service could mend.
            if row.waited > 50.0 {
                self.spans.push((self.last, Some(now), "no processor was free".into()));
            }
            row.taken = taken;
        }
        if let Some(file) = &mut self.csv {
            let _ = writeln!(file, "{}", row.csv());
        }
        println!(
            "{:5.0} s  {:.0}/s, {:.0} refused, p99 {:.0} ms; leaves {} ({} wrong); {:.1} MiB, {} descriptors, CPU {:.0} %  {}",
            row.at_s,
            row.per_s,
            row.refused_per_s,
            row.p99_ms,
            row.events,
            row.wrong,
            row.taken.rss as f64 / 1024.0 / 1024.0,
            row.taken.files,
            row.cpu,
            row.faults
        );
        self.told.extend(told);
        (self.last, self.last_counts) = (now, counts);
        self.rows.push(row);
    }
}

/// True when every rule was kept.
async fn soak(options: Options) -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("root is needed, for a cgroup and for the ports 443 and 53 of loopback addresses".into());
    }
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).map_err(|e| format!("descriptors: {e}"))?;
    cage::prefer(options.nice)?;
    let places = Places::of_this_process();
    let folder = Folder(std::env::temp_dir().join(format!("soak-{}", std::process::id())));
    std::fs::create_dir_all(folder.0.join("home")).map_err(|e| format!("{}: {e}", folder.0.display()))?;
    let (tls, pem) = tls::make();
    std::fs::write(folder.0.join("ca.pem"), pem).map_err(|e| e.to_string())?;
    let cage = Cage::new(options.memory * 1024 * 1024, &folder.0, options.length + SLACK)?;

    let began = Instant::now();
    let samples = Arc::new(Samples::new(began, options.length));
    let world = Arc::new(World::new(places, samples.clone(), tls).with_leaves_within(LEAVE_WITHIN));
    let town = Arc::new(Town::new(world.clone()));
    if let Some(path) = &options.log {
        town.ledger.keep(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let (told, hears) = mpsc::channel();
    let (begin, beginning) = tokio::sync::oneshot::channel::<()>();
    {
        let (town, samples) = (town.clone(), samples.clone());
        let (leaves, short, ramp) = (options.leaves, options.short, options.ramp());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            LocalSet::new().block_on(&runtime, async move {
                tokio::task::spawn_local(async move { samples.lateness.measure().await });
                let stands = town.world.stand(|place| places.behind(place)).await;
                let _ = told.send(stands.map_err(|e| format!("the fakes cannot listen: {e}")));
                if beginning.await.is_ok() {
                    town.run(leaves, short, ramp).await;
                    std::future::pending::<()>().await;
                }
            });
        });
    }
    hears.recv_timeout(Duration::from_secs(10)).map_err(|e| e.to_string())??;
    let neighbours = Neighbours::start(places, &folder.0).await?;
    let master = neighbours.master.clone();
    let stage = Rc::new(Stage {
        binary: options.binary.clone(),
        nice: options.nice,
        places,
        cage,
        folder: folder.0.clone(),
        town: town.clone(),
        now: Mutex::default(),
    });
    std::fs::write(stage.keys(), format!("{}: {}\n", world::KEY, world::SECRET)).map_err(|e| e.to_string())?;
    let service = stage.start(places.service(), 1).await?;
    let idle_files = service.is.taken().files;
    let actors = Rc::new(tokio::sync::Mutex::new(Actors {
        neighbours,
        service: Some(service),
    }));

    let mut csv = match &options.csv {
        Some(path) => Some(File::create(path).map_err(|e| format!("{}: {e}", path.display()))?),
        None => None,
    };
    if let Some(file) = &mut csv {
        writeln!(file, "{}", report::HEAD).map_err(|e| e.to_string())?;
    }
    let now = Instant::now();
    let mut watch = Watch {
        began: now,
        rows: Vec::new(),
        csv,
        spans: Vec::new(),
        faults: 0,
        told: Vec::new(),
        last: now,
        last_cpu: (0, 0.0, 0.0),
        last_counts: [0; 3],
    };
    let _ = begin.send(());
    let (over, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let mut troubles = Vec::new();
    let rest = options.length.saturating_sub(options.ramp());
    let rhythm = (rest / Fault::count() as u32).clamp(RHYTHM.0, RHYTHM.1);
    let most = (rhythm / 3).min(Duration::from_secs(15));
    let mut next = (options.ramp() + rhythm / 3, 0);
    let mut rows = interval(ROW);
    rows.set_missed_tick_behavior(MissedTickBehavior::Skip);
    rows.tick().await;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(|e| e.to_string())?;
    while watch.began.elapsed() < options.length {
        tokio::select! {
            _ = rows.tick() => watch.row(&stage, &master, &samples).await,
            () = sleep(next.0.saturating_sub(watch.began.elapsed())), if next.0 + most + Duration::from_secs(5) < options.length => {
                let fault = Fault::number(next.1);
                next = (next.0 + rhythm, next.1 + 1);
                let span = watch.spans.len();
                watch.spans.push((Instant::now(), None, fault.name()));
                watch.faults += 1;
                let (stage, actors, over) = (stage.clone(), actors.clone(), over.clone());
                tokio::task::spawn_local(async move {
                    let happened = faults::happen(fault, most, &stage, &mut *actors.lock().await).await;
                    let _ = over.send((span, Instant::now(), happened));
                });
            }
            Some((span, at, happened)) = ends.recv() => {
                let (_, ended, name) = &mut watch.spans[span];
                *ended = Some(at);
                if let Err(why) = happened {
                    println!("soak: {name}: {why}");
                    troubles.push(format!("{name}: {why}"));
                }
            }
            () = sleep(Duration::from_millis(250)) => {}
            _ = tokio::signal::ctrl_c() => return Err("interrupted".into()),
            _ = terminate.recv() => return Err("terminated".into()),
        }
        if let Ok(mut actors) = actors.try_lock() {
            let running = actors
                .service
                .as_mut()
                .ok_or_else(|| format!("the service is gone: {troubles:?}"))?;
            if let Ok(Some(status)) = running.child.try_wait() {
                troubles.push(format!("instance {} ended by itself: {status}", running.is.number));
                let number = running.is.number + 1;
                actors.service = Some(stage.start(places.service(), number).await?);
            }
        }
    }
    let mut actors = actors.lock().await;
    let loaded = watch.began.elapsed();
    let requests = town.ledger.totals().sent;

    // Everybody leaves, and all of it is told. Connections that are kept for later are closed after half a minute or so.
    let is_long = options.length >= Duration::from_secs(300);
    let rest = Duration::from_secs(if is_long { 45 } else { 5 });
    town.phase.send_replace(Phase::AllLeave);
    let since = Instant::now();
    while since.elapsed() < LEAVE_WITHIN + town::ALL_LEAVE_WITHIN + rest {
        let stored = neighbours::stored(places, &master).await;
        let is_over = since.elapsed() > town::ALL_LEAVE_WITHIN + rest && world.events() == 0 && stored == Some(0);
        if is_over {
            break;
        }
        tokio::select! {
            _ = rows.tick() => watch.row(&stage, &master, &samples).await,
            () = sleep(Duration::from_millis(500)) => {}
        }
    }
    watch.row(&stage, &master, &samples).await;
    let stored = neighbours::stored(places, &master).await;
    town.phase.send_replace(Phase::Over);
    let last_files = stage.now.lock().unwrap().map_or(0, |instance| instance.taken().files);
    let left_behind = left_in(&stage.home());
    if let Some(service) = actors.service.take()
        && let Err(why) = service.stop().await
    {
        troubles.push(why);
    }
    let verdicts = judge(
        &stage,
        &watch,
        &Ends {
            loaded,
            requests,
            stored,
            idle_files,
            last_files,
            is_long,
            left_behind,
            troubles,
        },
    );
    let title = format!(
        "{} minutes, {} delegated leaves; yellow: something is wrong",
        options.length.as_secs() / 60,
        options.leaves
    );
    if let Some(path) = &options.svg {
        let at = |at: Instant| (at - watch.began).as_secs_f64();
        let spans: Vec<_> = watch
            .spans
            .iter()
            .map(|(from, to, name)| (at(*from), at(to.unwrap_or(*from)), name.clone()))
            .collect();
        std::fs::write(path, report::graph(&watch.rows, &spans, &title)).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let missed = verdicts.iter().filter(|verdict| verdict.kept == Some(false)).count();
    println!("\n| rule | seen | |\n|---|---|---|");
    verdicts.iter().for_each(|verdict| println!("{}", verdict.line()));
    println!("\n{} rules, {missed} missed", verdicts.len());
    Ok(missed == 0)
}

fn left_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

struct Ends {
    loaded: Duration,
    requests: u64,
    stored: Option<u64>,
    idle_files: u64,
    last_files: u64,
    is_long: bool,
    left_behind: Vec<String>,
    troubles: Vec<String>,
}

fn judge(stage: &Stage, watch: &Watch, ends: &Ends) -> Vec<Verdict> {
    let town = &stage.town;
    let (books, leaves) = (town.ledger.balance(), town.world.leaves());
    let totals = &books.totals;
    let mut told = watch.told.clone();
    told.extend(town.world.take_told());
    let mut all: Vec<Duration> = told.iter().map(|(_, took)| *took).collect();
    all.sort_unstable();
    let soon = Duration::from_secs(5);
    let mut calm: Vec<Duration> = told
        .iter()
        .filter(|(at, _)| watch.is_calm(*at, *at + soon))
        .map(|(_, took)| *took)
        .collect();
    calm.sort_unstable();
    let calm_rows = || watch.rows.iter().filter(|row| row.is_calm);
    let calm_refused: u64 = calm_rows().map(|row| row.good_refused).sum();
    let per_s = ends.requests as f64 / ends.loaded.as_secs_f64();
    let mut statuses: Vec<_> = totals.by_status.iter().collect();
    statuses.sort();
    println!("\nanswers by status: {statuses:?}");
    let mut outcomes: Vec<_> = totals.by_outcome.iter().collect();
    outcomes.sort();
    println!("lines and counts by outcome: {outcomes:?}");
    println!(
        "without an answer {} (of them with a line {}), not connected {}, SIGHUPs {}, other lines at warn or error {}",
        totals.silent, totals.lines_of_silent, totals.not_connected, totals.reloads, totals.warnings
    );
    println!(
        "departures {}, told by the homeserver's own timer {}, stranded by the SFU {}, webhooks given up {}; cgroup at most {:.1} MiB",
        leaves.departures,
        leaves.by_timer,
        town.stranded.load(Relaxed),
        town.webhooks_lost.load(Relaxed),
        stage.cage.peak().unwrap_or(0) as f64 / 1024.0 / 1024.0
    );
    totals.examples.iter().for_each(|example| println!("seen: {example}"));
    ends.troubles.iter().for_each(|trouble| println!("trouble: {trouble}"));
    let happened = watch.faults;
    let written = watch.rows.iter().map(|row| row.taken.written).max().unwrap_or(0);
    let writable = watch.rows.iter().map(|row| row.taken.writable).max().unwrap_or(0);
    vec![
        Verdict::new(
            "300 requests a second",
            format!("{} in all, {per_s:.0} a second", ends.requests),
            per_s >= 300.0,
        ),
        Verdict::new(
            "every refusal has its line with a cause, or is in a count of suppressed lines",
            format!(
                "{} refusals: {} lines, {} counted; {} without a cause",
                totals.refused,
                totals.refused - books.not_shown,
                totals.counted,
                totals.without_cause
            ),
            totals.without_cause == 0 && books.not_shown <= totals.counted,
        ),
        Verdict::new(
            "lines and counts are the requests",
            format!(
                "{} requests answered ({} of them probes without a line), {} not: {} lines and {} counted; {} without a line, {} lines of nobody, {} with another status",
                totals.answered,
                totals.unlogged,
                totals.silent,
                totals.lines,
                totals.counted,
                books.missing_2xx + books.not_shown.saturating_sub(totals.counted),
                books.invented,
                totals.other_status
            ),
            books.is_even(),
        ),
        Verdict::new(
            "no leave is false",
            format!(
                "{} sent, {} ran out, of {}; {} more ran out when the whole machine had stood still, {} ended before their participants had joined",
                leaves.false_sent, leaves.false_fired, leaves.events, leaves.excused, leaves.early
            ),
            leaves.false_sent + leaves.false_fired == 0 && leaves.events > 0,
        ),
        Verdict::new(
            format!("no leave is lost: told within {} s of each departure", LEAVE_WITHIN.as_secs()),
            format!(
                "{} of {} lost; median {:.1} s, p99 {:.1} s, at most {:.1} s; {} by the homeserver's timer",
                leaves.lost,
                leaves.departures,
                quantile(&all, 0.5) / 1e3,
                quantile(&all, 0.99) / 1e3,
                quantile(&all, 1.0) / 1e3,
                leaves.by_timer
            ),
            leaves.lost == 0 && town.world.events() == 0 && leaves.departures > 0,
        ),
        Verdict::maybe(
            "departures are told within 5 s while nothing is wrong",
            (!calm.is_empty()).then(|| {
                let most = quantile(&calm, 1.0) / 1e3;
                (format!("{} of them, at most {most:.1} s", calm.len()), most <= soon.as_secs_f64())
            }),
        ),
        Verdict::maybe(
            "no honest request is refused while nothing is wrong",
            calm_rows()
                .next()
                .map(|_| (format!("{calm_refused} in {} rows", calm_rows().count()), calm_refused == 0)),
        ),
        Verdict::maybe(
            "memory is flat after ten minutes of an instance, ±5 MiB",
            report::flatness(&watch.rows),
        ),
        Verdict::maybe("descriptors do not leak", report::descriptors(&watch.rows)),
        Verdict::maybe(
            "descriptors are given back in the end",
            ends.is_long.then(|| {
                let seen = format!("{} idle, {} in the end", ends.idle_files, ends.last_files);
                (seen, ends.last_files <= ends.idle_files + 40)
            }),
        ),
        Verdict::new(
            "no file grows",
            format!(
                "{writable} open for writing, {written} bytes written, left behind {:?}",
                ends.left_behind
            ),
            writable == 0 && written == 0 && ends.left_behind.is_empty(),
        ),
        Verdict::new(
            "nothing is left in the store",
            format!("{} records", ends.stored.map_or("?".into(), |n| n.to_string())),
            ends.stored == Some(0),
        ),
        Verdict::new(
            "all that was done to it went well: each instance ended with 0, keys counted at once",
            format!(
                "{happened} faults, {} troubles, {} killed by the cgroup",
                ends.troubles.len(),
                stage.cage.kills()
            ),
            ends.troubles.is_empty() && stage.cage.kills() == 0 && happened > 0,
        ),
    ]
}
