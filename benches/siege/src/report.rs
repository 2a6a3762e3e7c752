//! The table in the end.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::attack::{Kind, Tally};
use crate::cage::Cage;
use crate::dns::Asked;
use crate::figures::{Class, Lateness, Samples};
use crate::hostile::Seen;
use crate::world::{Leaves, World};

const MIB: f64 = 1024.0 * 1024.0;

/// Memory of the service, in bytes; of several replicas that of the one that has most.
#[derive(Default)]
pub struct Memory {
    pub rss: u64,
    pub most_rss: u64,
    pub most_usage: u64,
    pub most_files: usize,
}

impl Memory {
    pub fn look(&mut self, cage: &Cage, pids: &[u32]) {
        self.rss = 0;
        pids.iter().for_each(|pid| self.look_at(*pid));
        self.most_usage = self.most_usage.max(cage.usage());
    }

    fn look_at(&mut self, pid: u32) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0) * 1024
        };
        self.rss = self.rss.max(field("VmRSS"));
        self.most_rss = self.most_rss.max(field("VmHWM"));
        let size = std::fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |m| m.len() as usize);
        self.most_files = self.most_files.max(size);
    }
}

/// Seconds of CPU of the service and of everybody else, and how long the service waited for its core.
pub struct Cpu {
    began: Instant,
    first: [f64; 3],
    /// Of each process, those that have ended too.
    ran_and_waited: HashMap<u32, [f64; 2]>,
    own: f64,
    took: Option<f64>,
}

impl Cpu {
    pub fn now(pids: &[u32]) -> Self {
        let mut cpu = Self {
            began: Instant::now(),
            first: [0.0; 3],
            ran_and_waited: HashMap::new(),
            own: 0.0,
            took: None,
        };
        cpu.look(pids);
        cpu.first = cpu.all();
        cpu
    }

    pub fn look(&mut self, pids: &[u32]) {
        if self.took.is_some() {
            return;
        }
        for pid in pids {
            let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
            let mut times = text.split_whitespace().filter_map(|n| n.parse::<f64>().ok());
            if let (Some(ran), Some(waited)) = (times.next(), times.next()) {
                self.ran_and_waited.insert(*pid, [ran / 1e9, waited / 1e9]);
            }
        }
        let own = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let own: f64 = own
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|n| n.parse::<f64>().ok())
            .sum();
        self.own = own / 100.0;
    }

    fn all(&self) -> [f64; 3] {
        let sum = |i: usize| self.ran_and_waited.values().map(|times| times[i]).sum();
        [sum(0), sum(1), self.own]
    }

    pub fn stop(&mut self) {
        self.took = Some(self.began.elapsed().as_secs_f64());
    }

    /// Shares of a core: the service ran, the service waited, everybody else ran.
    fn shares(&self) -> [f64; 3] {
        let took = self.took.unwrap_or(1.0).max(0.1);
        let all = self.all();
        std::array::from_fn(|i| (all[i] - self.first[i]) / took)
    }
}

pub struct Told<'a> {
    pub binary: &'a str,
    pub length: Duration,
    pub after: Duration,
    pub limit: u64,
    pub kinds: &'a [Kind],
}

pub struct Report<'a> {
    pub options: Told<'a>,
    pub samples: &'a Samples,
    pub their_lateness: &'a Lateness,
    pub leaves: Leaves,
    pub memory: &'a Memory,
    pub idle: u64,
    pub afterwards: &'a [u64],
    pub last: u64,
    pub cage: &'a Cage,
    pub deaths: &'a [f64],
    pub seen: &'a Seen,
    pub asked: &'a Asked,
    pub world: &'a World,
    pub tallies: &'a [Tally],
    pub cpu: &'a Cpu,
    pub logged: (u64, u64),
    pub rounds: usize,
}

fn ms(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e4).round() / 10.0
}

fn mib(bytes: u64) -> f64 {
    (bytes as f64 / MIB * 10.0).round() / 10.0
}

/// One line about a round that is over.
pub fn round(n: usize, samples: &Samples, leaves: &Leaves, memory: &Memory) -> String {
    let mut text = format!("round {n}:");
    for class in Class::ALL {
        let of = samples.of(class, Some(n - 1));
        let short = format!("{class:?}").to_lowercase();
        text += &format!(
            " {short} {}/{} p99 {} max {};",
            of.refused,
            of.count,
            ms(of.quantile(0.99)),
            ms(of.max())
        );
    }
    let wrong = leaves.false_sent + leaves.false_fired + leaves.lost + leaves.by_timer;
    text + &format!(
        " leaves {wrong} wrong of {}; rss {} MiB, most {}",
        leaves.events,
        mib(memory.rss),
        mib(memory.most_rss)
    )
}

struct Row {
    what: String,
    value: f64,
    /// What it is measured in.
    unit: &'static str,
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    Below(f64),
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    fn kept(&self) -> bool {
        match self.limit {
            Limit::Below(limit) => self.value < limit,
            Limit::AtMost(limit) => self.value <= limit,
            Limit::AtLeast(limit) => self.value >= limit,
        }
    }

    fn limit(&self) -> String {
        match self.limit {
            Limit::Below(limit) => format!("< {limit}"),
            Limit::AtMost(limit) => format!("<= {limit}"),
            Limit::AtLeast(limit) => format!(">= {limit}"),
        }
    }
}

impl Report<'_> {
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut row = |what: String, value: f64, unit: &'static str, limit: Limit| {
            rows.push(Row { what, value, unit, limit });
        };
        for class in Class::ALL {
            let of = self.samples.of(class, None);
            row(format!("{}: answered", class.name()), of.count as f64, "", Limit::AtLeast(1.0));
            row(format!("{}: refused", class.name()), of.refused as f64, "", Limit::AtMost(0.0));
            let limits: &[(f64, Limit)] = match class {
                Class::Listed | Class::Verified | Class::Delegation => &[(0.99, Limit::Below(1000.0))],
                Class::New | Class::NewQuiet => &[(1.0, Limit::AtMost(3000.0))],
                Class::Webhook => &[(0.999, Limit::AtMost(100.0))],
                Class::Health => &[(0.999, Limit::AtMost(50.0)), (1.0, Limit::AtMost(500.0))],
            };
            for (q, limit) in limits {
                let name = if *q == 1.0 { "max".to_owned() } else { format!("p{}", q * 100.0) };
                row(format!("{}: {name}", class.name()), ms(of.quantile(*q)), "ms", *limit);
            }
        }
        let leaves = &self.leaves;
        row(
            "leaves sent while they were there".into(),
            leaves.false_sent as f64,
            "",
            Limit::AtMost(0.0),
        );
        row(
            "leaves fired while they were there".into(),
            (leaves.false_fired + leaves.excused + leaves.early) as f64,
            "",
            Limit::AtMost(0.0),
        );
        let within = self.world.leave_within().as_secs_f64();
        row(
            format!("leaves not sent within {within} s"),
            (leaves.lost + leaves.by_timer) as f64,
            "",
            Limit::AtMost(0.0),
        );
        row("deaths of the service".into(), self.deaths.len() as f64, "", Limit::AtMost(0.0));
        row("cgroup: processes killed".into(), self.cage.kills() as f64, "", Limit::AtMost(0.0));
        let limit = self.options.limit as f64;
        let peak = self.cage.peak().unwrap_or(self.memory.most_usage);
        row("cgroup: most memory".into(), mib(peak), "MiB", Limit::Below(limit));
        row("RSS at most".into(), mib(self.memory.most_rss), "MiB", Limit::Below(100.0));
        if self.options.after >= Duration::from_secs(60) {
            row("RSS a minute later".into(), mib(self.last), "MiB", Limit::Below(20.0));
        }
        if self.options.kinds.contains(&Kind::FanOuts) {
            let dials = self.seen.dials.lock().unwrap().values().copied().max().unwrap_or(0);
            row("dials of one request at the victim".into(), dials as f64, "", Limit::AtMost(8.0));
        }
        rows
    }

    /// Prints all, writes it as JSON where that is wanted; true when every limit was kept.
    pub fn tell(&self, json: Option<&Path>) -> Result<bool, String> {
        let rows = self.rows();
        println!("\n| what | seen | limit | |\n|---|---|---|---|");
        for row in &rows {
            let verdict = if row.kept() { "kept" } else { "**missed**" };
            println!("| {} | {} {} | {} | {verdict} |", row.what, row.value, row.unit, row.limit());
        }
        println!(
            "\n| who | requests | refused | p50 ms | p99 ms | p99.9 ms | max ms | max as measured |\n|---|---|---|---|---|---|---|---|"
        );
        for class in Class::ALL {
            let of = self.samples.of(class, None);
            let q = |q| ms(of.quantile(q));
            let (name, max, raw) = (class.name(), ms(of.max()), ms(of.raw_max));
            println!(
                "| {name} | {} | {} | {} | {} | {} | {max} | {raw} |",
                of.count,
                of.refused,
                q(0.5),
                q(0.99),
                q(0.999)
            );
        }
        println!("\n| attack | begun | not begun | most in the air | no connection | 200 | 401 | 503 | other | closed | gave up |");
        println!("|---|---|---|---|---|---|---|---|---|---|---|");
        for kind in self.options.kinds {
            let t = &self.tallies[*kind as usize];
            let n = |c: &AtomicU64| c.load(Relaxed);
            print!(
                "| {} | {} | {} | {} | {} |",
                kind.plan().0,
                n(&t.begun),
                n(&t.skipped),
                n(&t.most_in_air),
                n(&t.not_connected)
            );
            print!(" {} | {} | {} |", n(&t.answered_200), n(&t.answered_401), n(&t.answered_503));
            println!(" {} | {} | {} |", n(&t.answered_else), n(&t.closed), n(&t.gave_up));
        }
        let leaves = &self.leaves;
        let late = |l: &Lateness| ms(l.worst(self.began(), Instant::now()));
        let [ran, waited, others] = self.cpu.shares();
        let s = self.seen;
        let n = |c: &AtomicU64| c.load(Relaxed);
        println!();
        println!(
            "delayed events {}, goodbyes {}, slowest leave {} ms, restarts {}",
            leaves.events,
            leaves.departures,
            ms(leaves.slowest),
            n(&self.world.restarts)
        );
        println!(
            "the honest's clock was late by {} ms at worst, in {} seconds by more than 20 ms; the attackers' by {} ms",
            late(&self.samples.lateness),
            self.samples.lateness.late_seconds(),
            late(self.their_lateness)
        );
        println!("of a core: the service {ran:.2}, and waited for it {waited:.2}; attackers and fakes {others:.2}");
        println!(
            "memory: idle {} MiB, buffers of sockets at most {} MiB, charges that met the limit {}, RSS each 10 s after the end {:?} MiB; descriptors at most {}; log {} lines, {} KiB",
            mib(self.idle),
            mib(self.cage.peak_of_sockets()),
            self.cage.failed_charges(),
            self.afterwards.iter().map(|b| mib(*b)).collect::<Vec<_>>(),
            self.memory.most_files,
            self.logged.1,
            self.logged.0 / 1024
        );
        println!("deaths after {:.0?} s", self.deaths);
        if let Some(killed) = self.samples.killed() {
            println!(
                "the watcher was killed after {:.1} s, with {} honest requests in the air",
                killed.as_secs_f64(),
                n(&self.samples.broken)
            );
        }
        println!(
            "DNS: {} answers, {} questions left open; userinfo of the honest {}, SFU calls {}",
            n(&self.asked.answered),
            n(&self.asked.silent),
            n(&self.world.userinfo),
            n(&self.world.sfu_calls)
        );
        println!(
            "the hostile: {} tarpits, {} hung in userinfo, {} verified; {} bombs begun, {} taken whole; {} streams, {} MiB of them taken; {} redirects; victim dialled {} times, {} of them for nobody known",
            n(&s.tarpits),
            n(&s.hung),
            n(&s.verified),
            n(&s.bombs_begun),
            n(&s.bombs_whole),
            n(&s.streams),
            n(&s.streamed) / 1024 / 1024,
            n(&s.redirects),
            n(&s.victim_connections),
            n(&s.victim_unknown)
        );
        for class in Class::ALL {
            let of = self.samples.of(class, None);
            let when: Vec<_> = of
                .slowest
                .iter()
                .map(|(took, at)| format!("{} ms at {:.1} s", ms(*took), at.as_secs_f64()))
                .collect();
            println!("slowest of {}: {}", class.name(), when.join(", "));
        }
        let refusals = self.samples.refusals.lock().unwrap().clone();
        for refusal in refusals.iter().take(12) {
            println!("refused: {refusal}");
        }
        let missed = rows.iter().filter(|r| !r.kept()).count();
        println!("\n{} limits, {missed} missed", rows.len());
        if let Some(path) = json {
            let told = self.json(&rows).to_string();
            std::fs::write(path, told).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(missed == 0)
    }

    fn began(&self) -> Instant {
        Instant::now()
            .checked_sub(self.options.length + self.options.after * 2)
            .unwrap_or_else(Instant::now)
    }

    fn json(&self, rows: &[Row]) -> Value {
        let classes = |round: Option<usize>| -> Value {
            let of = |class: Class| {
                let of = self.samples.of(class, round);
                let figures = json!({
                    "requests": of.count, "refused": of.refused, "p50_ms": ms(of.quantile(0.5)), "p99_ms": ms(of.quantile(0.99)),
                    "p999_ms": ms(of.quantile(0.999)), "max_ms": ms(of.max()), "max_measured_ms": ms(of.raw_max),
                });
                (class.name().to_owned(), figures)
            };
            Value::Object(Class::ALL.into_iter().map(of).collect())
        };
        let [ran, waited, others] = self.cpu.shares();
        json!({
            "binary": self.options.binary,
            "seconds": self.options.length.as_secs(),
            "limits": rows.iter().map(|r| json!({"what": r.what, "seen": r.value, "unit": r.unit, "limit": r.limit(), "kept": r.kept()})).collect::<Vec<_>>(),
            "classes": classes(None),
            "rounds": (0..self.rounds).map(|r| classes(Some(r))).collect::<Vec<_>>(),
            "lateness_ms": ms(self.samples.lateness.worst(self.began(), Instant::now())),
            "late_seconds": self.samples.lateness.late_seconds(),
            "cpu": {"service": ran, "service_waited": waited, "others": others},
            "memory": {"idle_mib": mib(self.idle), "afterwards_mib": self.afterwards.iter().map(|b| mib(*b)).collect::<Vec<_>>()},
            "refusals": *self.samples.refusals.lock().unwrap(),
        })
    }
}
