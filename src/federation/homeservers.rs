//! Memory of each homeserver. Bounded: the names come from strangers.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::futures::Notified;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{Instant, sleep_until, timeout};

use super::dial::{Attempt, Dialer};
use super::discovery::{File, Found, discover};
use super::failure::Failure;
use super::guard::Trust;
use super::rediscovery::{Next, Rediscovery};
use super::route::Link;
use super::well_known::failure_life;
use crate::admission::budget::Budget;
use crate::admission::{Class, Group, Who};
use crate::cache::bounded;
use crate::clock::unix_seconds;
use crate::server_name::ServerName;

/// Homeservers that have verified a token here and are not listed.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(2048).unwrap();
/// The others. A flood of made-up names turns over this table and not the one above.
const MAX_STRANGERS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Names of one host that are among the known, since ports cost nobody anything. The host's own name always is, all others are among the
/// strangers.
const MAX_SPELLINGS: usize = 4;

/// A remembered failure is not asked again more often than this, however many requests want it.
const FAILURE_MIN_AGE: Duration = Duration::from_secs(1);
/// Time to find out in the background where a homeserver is.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last well-known file is followed while its server does not answer.
const LAST_FILE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// The weight of one answer in what a homeserver usually needs is one part of so many.
const USUAL_WEIGHT: u64 = 8;

/// A homeserver, with what is remembered of it.
pub struct Homeserver {
    name: ServerName,
    trust: Trust,
    /// With the class that it had at first.
    who: Who,
    /// The second until which it counts as verified.
    verified_until: AtomicU64,
    verified: Notify,
    link: AsyncMutex<Remembered>,
    /// Held by the one request that looks for it anew: those who need not wait for that have the other one.
    looking: AsyncMutex<()>,
    /// Whether the last request had neither an answer in time nor the time to look for the server anew.
    missed: AtomicBool,
    group: Mutex<Option<Group>>,
    /// Milliseconds that an answer usually takes.
    usual_ms: AtomicU64,
    refused: AtomicBool,
}

#[derive(Default)]
struct Remembered {
    link: Option<Arc<Link>>,
    rediscovery: Rediscovery,
    until: Option<Instant>,
    failures: u32,
    /// When the well-known file was read that led there.
    read: Option<Instant>,
    /// Discovery itself failed, and is not repeated until then.
    refused: Option<(Instant, Failure)>,
}

impl Homeserver {
    pub(super) fn new(name: ServerName, trust: Trust, who: Who, verified_until: u64) -> Self {
        Self {
            name,
            trust,
            who,
            verified_until: AtomicU64::new(verified_until),
            verified: Notify::new(),
            link: AsyncMutex::default(),
            looking: AsyncMutex::default(),
            missed: AtomicBool::new(false),
            group: Mutex::new(None),
            usual_ms: AtomicU64::new(0),
            refused: AtomicBool::new(false),
        }
    }

    /// Name of the homeserver, as it was asked for.
    #[must_use]
    pub const fn name(&self) -> &ServerName {
        &self.name
    }

    /// How well it is known at `now`, in seconds of the wall clock.
    #[must_use]
    pub fn class(&self, now: u64) -> Class {
        if self.trust == Trust::Listed {
            Class::Listed
        } else if self.verified_until.load(Ordering::Relaxed) > now {
            Class::Verified
        } else {
            Class::Stranger
        }
    }

    /// Whether it is waited for: it is listed, or has answered within a day.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.class(unix_seconds()) != Class::Stranger
    }

    /// Returns the marks that tell the homeserver from others, at `now`.
    #[must_use]
    pub fn who(&self, now: u64) -> Who {
        Who {
            class: self.class(now),
            ..self.who
        }
    }

    pub(super) const fn trust(&self) -> Trust {
        self.trust
    }

    pub(super) fn verified_until(&self) -> u64 {
        self.verified_until.load(Ordering::Relaxed)
    }

    pub(super) fn is_verified_until(&self, until: u64) {
        self.verified_until.store(until, Ordering::Relaxed);
        self.verified.notify_waiters();
    }

    /// Waits for the moment at which it is verified: from the call on, not from the first poll.
    pub(super) fn becomes_verified(&self) -> Notified<'_> {
        self.verified.notified()
    }

    /// Whether this is the first time that its address is refused.
    pub(super) fn first_refusal(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }

    /// The machines it is on, as far as they are known.
    pub(super) fn group(&self) -> Option<Group> {
        *self.group.lock()
    }

    /// Notes the machines that the homeserver has answered from.
    pub(super) fn is_on(&self, group: Option<Group>) {
        *self.group.lock() = group;
    }

    /// How long an answer usually takes.
    pub(super) fn usual(&self) -> Duration {
        Duration::from_millis(self.usual_ms.load(Ordering::Relaxed))
    }

    /// Notes how long an answer took.
    pub(super) fn took(&self, time: Duration) {
        let before = self.usual_ms.load(Ordering::Relaxed);
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.usual_ms
            .store(before - before / USUAL_WEIGHT + time / USUAL_WEIGHT, Ordering::Relaxed);
    }

    /// The way to it: the remembered one while it is good, else discovery. Requests that come meanwhile wait for it. Who is
    /// known is asked where he was, while it is found out in the background whether that is still so.
    pub(super) async fn link<'a>(
        self: &Arc<Self>,
        dialer: &'a Arc<Dialer>,
        again: bool,
        attempt: &Attempt<'a>,
    ) -> Result<Arc<Link>, Failure> {
        let mut remembered = self.link.lock().await;
        let now = Instant::now();
        let missed = self.missed.load(Ordering::Relaxed);
        let stale_failure = again && remembered.failures > 0 && remembered.rediscovery.is_due(now);
        let asks = stale_failure || (missed && remembered.rediscovery.is_overdue(now));
        if let Some(link) = remembered.link.clone().filter(|_| !asks) {
            let is_old = remembered.until.is_some_and(|until| now >= until) && remembered.rediscovery.is_due(now);
            if !is_old {
                return Ok(link);
            }
            if attempt.who.class != Class::Stranger {
                remembered.until = Some(now + REFRESH_TIMEOUT);
                tokio::spawn(self.clone().refresh(dialer.clone(), attempt.who));
                return Ok(link);
            }
        }
        if let Some((until, failure)) = &remembered.refused
            && now < *until
        {
            return Err(failure.clone());
        }
        let since = missed.then_some(now);
        let found = self.discover(dialer, attempt, since).await;
        self.missed.store(false, Ordering::Relaxed);
        let link = remembered.take_in(self, found, dialer, attempt.who.class)?;
        if let Some(since) = since {
            link.doubt(since);
        }
        Ok(link)
    }

    /// The name of the place where it is asked, which is another one where it delegates; none while that is being looked for.
    pub fn asked_at(&self) -> Option<String> {
        let remembered = self.link.try_lock().ok()?;
        remembered.link.as_ref().map(|link| link.route.host().to_owned())
    }

    /// Notes that the homeserver did not answer while there was time: the next request looks for it anew.
    pub(super) fn is_missed(&self) {
        self.missed.store(true, Ordering::Relaxed);
    }

    /// The way to it, found anew because the one that was used from `used` on has led nowhere; none where that was found
    /// meanwhile. One request asks, and all others that failed meanwhile wait for what it finds (decision O2); with `waits`,
    /// whoever comes within a second after it asks again then.
    pub(super) async fn look_again<'a>(
        &self,
        dialer: &'a Dialer,
        used: Instant,
        waits: bool,
        attempt: &Attempt<'a>,
    ) -> Result<Option<Arc<Link>>, Failure> {
        let mut looking = self.looking.lock().await;
        loop {
            let mut remembered = self.link.lock().await;
            let now = Instant::now();
            let until = match remembered.rediscovery.next(used, now) {
                Next::GiveUp => return Ok(None),
                Next::Use => return Ok(remembered.link.clone()),
                Next::Doubt => {
                    remembered.rediscovery.doubted(now);
                    return Ok(remembered.link.clone().inspect(|link| link.doubt(now)));
                }
                Next::Ask => {
                    remembered.rediscovery.begins(now);
                    break;
                }
                Next::Wait(_) if !waits => return Ok(None),
                Next::Wait(until) => until,
            };
            drop((remembered, looking));
            sleep_until(until).await;
            looking = self.looking.lock().await;
        }
        let now = Instant::now();
        let found = self.discover(dialer, attempt, Some(now)).await;
        let mut remembered = self.link.lock().await;
        if matches!(found, Err(Failure::Spent | Failure::Busy)) {
            // Nothing was found out: the next one asks.
            return Ok(None);
        }
        let link = remembered.take_in(self, found, dialer, attempt.who.class);
        remembered.rediscovery.asked_again(Instant::now());
        let link = link?;
        link.doubt(now);
        Ok(Some(link))
    }

    async fn refresh(self: Arc<Self>, dialer: Arc<Dialer>, who: Who) {
        let (budget, queued) = (Budget::of(who.class), Notify::new());
        let attempt = Attempt::new(who, &budget, &queued, None);
        let found = timeout(REFRESH_TIMEOUT, self.discover(&dialer, &attempt, None)).await;
        let mut remembered = self.link.lock().await;
        // Whoever comes next is told what fails.
        let _ = remembered.take_in(&self, found.unwrap_or(Err(Failure::Timeout)), &dialer, who.class);
    }

    async fn discover<'a>(&self, dialer: &'a Dialer, attempt: &Attempt<'a>, since: Option<Instant>) -> Result<Found, Failure> {
        let queued = Notify::new();
        let discovering = Attempt::new(attempt.who.discovered(), attempt.budget, &queued, attempt.queueing);
        discovering.asks_since(since);
        Box::pin(discover(dialer, &self.name, self.trust, &discovering)).await
    }
}

impl Remembered {
    fn take_in(
        &mut self,
        homeserver: &Homeserver,
        found: Result<Found, Failure>,
        dialer: &Dialer,
        class: Class,
    ) -> Result<Arc<Link>, Failure> {
        let now = Instant::now();
        let found = match found {
            // That is about this question, and not about the homeserver: what is remembered may do.
            Err(failure @ (Failure::Spent | Failure::Busy | Failure::Timeout)) => return self.link.clone().ok_or(failure),
            Ok(found) => found,
            Err(failure) => {
                self.link = None;
                self.refused = Some((now + FAILURE_MIN_AGE, failure.clone()));
                return Err(failure);
            }
        };
        self.refused = None;
        self.rediscovery.asked(now);
        match found.file {
            File::NotAsked | File::Read => {
                self.until = found.life.map(|life| now + life);
                self.failures = 0;
            }
            File::Missing | File::Unreachable => {
                self.until = Some(now + failure_life(self.failures, class != Class::Stranger));
                self.failures = self.failures.saturating_add(1);
            }
        }
        if let Some(link) = &self.link
            && found.file == File::Unreachable
            && self.read.is_some_and(|read| now < read + LAST_FILE_LIFE)
        {
            return Ok(link.clone());
        }
        self.read = (found.file == File::Read).then_some(now);
        if let Some(link) = self.link.as_ref().filter(|link| *link.route == found.route) {
            return Ok(link.clone());
        }
        tracing::debug!(
            server = homeserver.name.as_str(),
            step = found.step,
            host = found.route.host(),
            "homeserver found"
        );
        let link = Arc::new(Link::new(dialer, Arc::new(found.route)));
        self.link = Some(link.clone());
        Ok(link)
    }
}

/// Table of all homeservers.
pub(super) struct Table {
    entries: Mutex<Entries>,
}

struct Entries {
    /// As many as the operator wrote down.
    listed: HashMap<ServerName, Arc<Homeserver>>,
    known: LruCache<ServerName, Arc<Homeserver>>,
    /// How many names of each host are among the known.
    spellings: HashMap<String, usize>,
    strangers: LruCache<ServerName, Arc<Homeserver>>,
}

impl Entries {
    /// Takes a homeserver among the known, unless others of its host have taken the places.
    fn know(&mut self, name: &ServerName, homeserver: &Arc<Homeserver>) -> bool {
        let host = name.host_key();
        let spellings = self.spellings.entry(host.clone()).or_default();
        if *spellings >= MAX_SPELLINGS && name.as_str() != host {
            return false;
        }
        *spellings += 1;
        if let Some((forgotten, _)) = self.known.push(name.clone(), homeserver.clone()) {
            let host = forgotten.host_key();
            if let Some(spellings) = self.spellings.get_mut(&host) {
                *spellings -= 1;
                if *spellings == 0 {
                    self.spellings.remove(&host);
                }
            }
        }
        true
    }
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            entries: Mutex::new(Entries {
                listed: HashMap::new(),
                known: bounded(MAX_KNOWN),
                spellings: HashMap::new(),
                strangers: bounded(MAX_STRANGERS),
            }),
        }
    }

    /// The entry of `name`, or what `make` makes. Who has become known is not displaced by strangers any more, and who is listed by nobody.
    pub(super) fn get(&self, name: &ServerName, now: u64, make: impl FnOnce() -> Homeserver) -> Arc<Homeserver> {
        let mut entries = self.entries.lock();
        if let Some(found) = entries.listed.get(name) {
            return found.clone();
        }
        if let Some(found) = entries.known.get(name) {
            return found.clone();
        }
        let is_stranger = |homeserver: &Homeserver| homeserver.class(now) == Class::Stranger;
        if let Some(found) = entries.strangers.get(name).filter(|found| is_stranger(found)) {
            return found.clone();
        }
        let found = entries.strangers.pop(name).unwrap_or_else(|| Arc::new(make()));
        let is_placed = match found.class(now) {
            Class::Listed => {
                entries.listed.insert(name.clone(), found.clone());
                true
            }
            Class::Verified => entries.know(name, &found),
            Class::Stranger => false,
        };
        if !is_placed {
            entries.strangers.put(name.clone(), found.clone());
        }
        found
    }
}

#[cfg(test)]
impl Homeserver {
    pub(crate) fn listed(name: ServerName) -> Self {
        let who = crate::admission::NameHasher::default().who(&name, Class::Listed);
        Self::new(name, Trust::Listed, who, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::NameHasher;

    fn get(table: &Table, hasher: &NameHasher, n: usize) -> Arc<Homeserver> {
        let name = ServerName::parse(&format!("n{n}.example")).unwrap();
        table.get(&name, 1, || {
            Homeserver::new(name.clone(), Trust::Stranger, hasher.who(&name, Class::Stranger), 0)
        })
    }

    #[test]
    fn a_flood_of_names_neither_grows_the_table_nor_displaces_who_is_known() {
        let (table, hasher) = (Table::new(), NameHasher::default());
        let home = get(&table, &hasher, 0);
        home.is_verified_until(2);
        assert!(Arc::ptr_eq(&home, &get(&table, &hasher, 0)), "what is known of it stays");
        for n in 1..10_000 {
            get(&table, &hasher, n);
        }
        assert!(Arc::ptr_eq(&home, &get(&table, &hasher, 0)));
        assert_eq!(table.entries.lock().strangers.len(), MAX_STRANGERS.get());
    }

    /// A host that is verified has as many names as there are ports.
    #[test]
    fn a_flood_of_ports_of_a_verified_host_displaces_nobody() {
        let (table, hasher) = (Table::new(), NameHasher::default());
        let get = |name: &str, trust: Trust| {
            let name = ServerName::parse(name).unwrap();
            table.get(&name, 1, || {
                Homeserver::new(name.clone(), trust, hasher.who(&name, Class::Verified), 2)
            })
        };
        let honest = ["honest.example", "honest.example:8448"].map(|name| get(name, Trust::Stranger));
        let listed = get("listed.example:8448", Trust::Listed);
        for port in 1..60_000 {
            get(&format!("evil.test:{port}"), Trust::Stranger);
        }
        let evil = get("evil.test", Trust::Stranger);
        for n in 0..MAX_KNOWN.get() - 8 {
            get(&format!("n{n}.example"), Trust::Stranger);
        }
        for (before, name) in honest.iter().zip(["honest.example", "honest.example:8448"]) {
            assert!(Arc::ptr_eq(before, &get(name, Trust::Stranger)), "{name}");
        }
        assert!(Arc::ptr_eq(&listed, &get("listed.example:8448", Trust::Listed)));
        assert!(Arc::ptr_eq(&evil, &get("evil.test", Trust::Stranger)), "its own name is known, too");
        for n in 0..3 * MAX_KNOWN.get() {
            get(&format!("m{n}.example"), Trust::Stranger);
        }
        let entries = table.entries.lock();
        assert_eq!((entries.known.len(), entries.spellings.len()), (MAX_KNOWN.get(), MAX_KNOWN.get()));
        assert!(Arc::ptr_eq(
            &listed,
            &entries.listed[&ServerName::parse("listed.example:8448").unwrap()]
        ));
    }

    #[test]
    fn an_answer_takes_about_as_long_as_the_last_ones() {
        let home = get(&Table::new(), &NameHasher::default(), 0);
        (0..40).for_each(|_| home.took(Duration::from_millis(800)));
        assert!((700..=800).contains(&home.usual().as_millis()), "{:?}", home.usual());
    }
}
