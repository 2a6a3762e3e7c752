//! What was measured, and how late the clock of those who measured was.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Seconds that are remembered: the longest soak, and ten minutes.
const SECONDS: usize = 7800;
/// A second in which the clock was later than this counts only by what is above it.
const FORGIVEN: Duration = Duration::from_millis(20);
/// What a replica was killed with in the air breaks off so soon.
const BREAKS_WITHIN: Duration = Duration::from_secs(1);
/// Most samples of a siege.
const MAX_SAMPLES: usize = 400_000;

/// How late a task was that wanted to run each millisecond, at worst in each second.
pub struct Lateness {
    began: Instant,
    worst_us: Vec<AtomicU32>,
}

impl Lateness {
    pub fn new(began: Instant) -> Self {
        Self {
            began,
            worst_us: (0..SECONDS).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Measures as long as its runtime lives.
    pub async fn measure(&self) {
        const NAP: Duration = Duration::from_millis(1);
        loop {
            let before = Instant::now();
            tokio::time::sleep(NAP).await;
            let late = before.elapsed().saturating_sub(2 * NAP);
            let late_us = late.as_micros().try_into().unwrap_or(u32::MAX);
            // It was late in all the seconds that it slept through.
            for second in self.second(before)..=self.second(Instant::now()) {
                self.worst_us[second].fetch_max(late_us, Relaxed);
            }
        }
    }

    fn second(&self, at: Instant) -> usize {
        (at.saturating_duration_since(self.began).as_secs() as usize).min(SECONDS - 1)
    }

    /// The worst between two moments.
    pub fn worst(&self, from: Instant, to: Instant) -> Duration {
        let all = &self.worst_us[self.second(from)..=self.second(to)];
        Duration::from_micros(all.iter().map(|us| us.load(Relaxed)).max().unwrap_or(0).into())
    }

    /// What is forgiven to whoever was waited for between two moments.
    pub fn forgiven(&self, from: Instant, to: Instant) -> Duration {
        Some(self.worst(from, to)).filter(|late| *late > FORGIVEN).unwrap_or_default()
    }

    /// Seconds in which something is forgiven.
    pub fn late_seconds(&self) -> usize {
        let late = |us: &&AtomicU32| Duration::from_micros(us.load(Relaxed).into()) > FORGIVEN;
        self.worst_us.iter().filter(late).count()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Listed,
    Verified,
    /// A homeserver that nobody has heard of, and for which junk comes as well.
    New,
    /// The same without junk.
    NewQuiet,
    Delegation,
    Webhook,
    Health,
}

impl Class {
    pub const ALL: [Self; 7] = [
        Self::Listed,
        Self::Verified,
        Self::New,
        Self::NewQuiet,
        Self::Delegation,
        Self::Webhook,
        Self::Health,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Listed => "users of the listed homeserver",
            Self::Verified => "users of the verified homeserver",
            Self::New => "users of new homeservers, junk on them",
            Self::NewQuiet => "users of new homeservers, left alone",
            Self::Delegation => "delegations of the listed homeserver",
            Self::Webhook => "webhooks of the SFU",
            Self::Health => "/healthz",
        }
    }
}

#[derive(Clone, Copy)]
pub struct Sample {
    pub class: Class,
    /// Since the beginning.
    pub at: Duration,
    pub round: usize,
    pub status: u16,
    pub raw: Duration,
    /// What counts for the service.
    pub counted: Duration,
}

pub struct Samples {
    pub lateness: Lateness,
    round: Duration,
    all: Mutex<Vec<Sample>>,
    /// A few of the refusals, as they were answered.
    pub refusals: Mutex<Vec<String>>,
    /// When a replica was killed, and how many requests it was killed with in the air: they are no samples.
    pub killed: OnceLock<Instant>,
    pub broken: AtomicU64,
}

impl Samples {
    pub fn new(began: Instant, round: Duration) -> Self {
        Self {
            lateness: Lateness::new(began),
            round,
            all: Mutex::default(),
            refusals: Mutex::default(),
            killed: OnceLock::new(),
            broken: AtomicU64::new(0),
        }
    }

    pub fn add(&self, class: Class, outcome: &crate::http::Outcome) {
        let ended = outcome.written + outcome.took;
        let breaks = |killed: &Instant| ended.checked_duration_since(*killed).is_some_and(|since| since < BREAKS_WITHIN);
        if outcome.status == 0 && self.killed.get().is_some_and(breaks) {
            self.broken.fetch_add(1, Relaxed);
            return;
        }
        let late = self.lateness.forgiven(outcome.written, ended);
        let since = outcome.written.saturating_duration_since(self.lateness.began).as_secs_f64();
        let sample = Sample {
            class,
            at: outcome.written.saturating_duration_since(self.lateness.began),
            round: (since / self.round.as_secs_f64()) as usize,
            status: outcome.status,
            raw: outcome.took,
            counted: outcome.took.saturating_sub(late),
        };
        if outcome.status != 200 {
            let mut refusals = self.refusals.lock().unwrap();
            if refusals.len() < 200 {
                let (name, body) = (class.name(), outcome.body.trim());
                let took = outcome.took.as_secs_f64();
                refusals.push(format!("{since:7.1} s  {name}: {} after {took:.1} s {body}", outcome.status));
            }
        }
        let mut all = self.all.lock().unwrap();
        if all.len() < MAX_SAMPLES {
            all.push(sample);
        }
    }

    /// When a replica was killed.
    pub fn killed(&self) -> Option<Duration> {
        Some(self.killed.get()?.saturating_duration_since(self.lateness.began))
    }

    /// Of one class, in one round or in all.
    pub fn of(&self, class: Class, round: Option<usize>) -> Summary {
        let all = self.all.lock().unwrap();
        let mine = all.iter().filter(|s| s.class == class && round.is_none_or(|r| r == s.round));
        let mine: Vec<Sample> = mine.copied().collect();
        let mut slowest: Vec<(Duration, Duration)> = mine.iter().map(|s| (s.counted, s.at)).collect();
        slowest.sort_unstable();
        slowest.reverse();
        slowest.truncate(8);
        let mut counted: Vec<Duration> = mine.iter().map(|s| s.counted).collect();
        counted.sort_unstable();
        Summary {
            count: mine.len(),
            refused: mine.iter().filter(|s| s.status != 200).count(),
            raw_max: mine.iter().map(|s| s.raw).max().unwrap_or_default(),
            counted,
            slowest,
        }
    }
}

pub struct Summary {
    pub count: usize,
    pub refused: usize,
    pub raw_max: Duration,
    /// The worst, and when they were written.
    pub slowest: Vec<(Duration, Duration)>,
    counted: Vec<Duration>,
}

impl Summary {
    pub fn quantile(&self, q: f64) -> Duration {
        let last = self.counted.len().saturating_sub(1);
        let at = ((self.counted.len() as f64 * q).ceil() as usize).saturating_sub(1).min(last);
        self.counted.get(at).copied().unwrap_or_default()
    }

    pub fn max(&self) -> Duration {
        self.counted.last().copied().unwrap_or_default()
    }
}
