//! Addresses and SRV records, asked without blocking a thread and remembered for their TTL.
//!
//! `/etc/hosts` and the search list of `/etc/resolv.conf` are honoured. What may be dialled is not decided here but in
//! `federation/guard.rs`.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError as Refusal, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Resolver, TokioResolver};
use lru::LruCache;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::admission::budget::Budget;
use crate::admission::lookups::Lookups;
use crate::admission::{Class, Who};

/// More targets or addresses than this of one name are not looked at.
const MOST: usize = 8;

/// Answers remembered for each class. Each holds at most [`MOST`] addresses or targets, whatever came, which
/// bounds it in bytes too: a resolver's own cache keeps whole messages of up to 64 KiB.
const CACHE_ENTRIES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How long they are believed at most, when there is something and when there is nothing.
const MAX_LIFE: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE_LIFE: Duration = Duration::from_secs(60);

/// Look-ups for strangers at a time: each takes two sockets, and up to six where nobody answers.
const STRANGERS: usize = 64;
/// Time for one look-up of a stranger's name.
const STRANGERS_TIMEOUT: Duration = Duration::from_secs(3);

/// Some name servers drop questions for IPv6 addresses (RFC 4074): after this time IPv4 addresses do alone.
const IPV6_PATIENCE: Duration = Duration::from_millis(500);

/// One target of an SRV record set, RFC 2782.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvTarget {
    /// Smaller is asked first.
    pub priority: u16,
    /// Share among those of one priority.
    pub weight: u16,
    /// Port to connect to.
    pub port: u16,
    /// Host name without the trailing dot; empty where the record says that there is no service.
    pub host: String,
}

/// A name could not be resolved.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DnsError {
    /// DNS answered: there is no such name or no such record.
    #[error("the name does not exist in DNS")]
    NotFound,
    /// DNS did not answer, or answered with an error.
    #[error("DNS did not answer ({0})")]
    Failed(String),
    /// The request has asked as many questions as one request may.
    #[error("no more questions are asked for one request")]
    Spent,
}

/// For whom DNS is asked.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// The homeserver whose name led here.
    pub who: Who,
    /// What is left for the client's request.
    pub budget: &'a Budget,
}

/// The resolvers, made at first use so that they cost the start nothing.
pub struct Dns {
    servers: Vec<SocketAddr>,
    listed: Side,
    verified: Side,
    strangers: Side,
    lookups: Arc<Mutex<Lookups<oneshot::Sender<Place>>>>,
}

/// A resolver and what it found: what strangers make us ask is kept apart.
struct Side {
    /// A question that fails is asked again.
    insists: bool,
    resolver: OnceLock<TokioResolver>,
    cache: Mutex<LruCache<Box<str>, Cached>>,
}

#[derive(Clone)]
struct Cached {
    until: Instant,
    found: Found,
}

#[derive(Clone)]
enum Found {
    Nothing,
    Addresses(Arc<[IpAddr]>),
    Targets(Arc<[SrvTarget]>),
}

impl Side {
    fn new(insists: bool) -> Self {
        let mut cache = LruCache::unbounded();
        cache.resize(CACHE_ENTRIES);
        Self {
            insists,
            resolver: OnceLock::new(),
            cache: Mutex::new(cache),
        }
    }

    fn cached(&self, name: &str) -> Option<Found> {
        let mut cache = self.lock();
        let cached = cache.get(name)?;
        if cached.until > Instant::now() {
            return Some(cached.found.clone());
        }
        cache.pop(name);
        None
    }

    fn keep(&self, name: &str, until: Instant, found: Found) {
        if until > Instant::now() {
            self.lock().put(name.into(), Cached { until, found });
        }
    }

    fn keep_nothing(&self, name: &str, life: Option<Duration>) {
        if let Some(life) = life {
            self.keep(name, Instant::now() + life, Found::Nothing);
        }
    }

    fn lock(&self) -> MutexGuard<'_, LruCache<Box<str>, Cached>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dns {
    /// Asks `servers`, or those of `/etc/resolv.conf` when there are none.
    #[must_use]
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            servers,
            listed: Side::new(true),
            verified: Side::new(false),
            strangers: Side::new(false),
            lookups: Arc::new(Mutex::new(Lookups::new(STRANGERS))),
        }
    }

    /// All IPv6 and IPv4 addresses of `host`, which the operator wrote down.
    ///
    /// # Errors
    /// When there are none.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, DnsError> {
        self.look_up_addresses(host, None).await
    }

    /// All IPv6 and IPv4 addresses of `host`, to which a homeserver led.
    ///
    /// # Errors
    /// When there are none.
    pub async fn addresses_for(&self, host: &str, asker: &Asker<'_>) -> Result<Vec<IpAddr>, DnsError> {
        self.look_up_addresses(host, Some(asker)).await
    }

    async fn look_up_addresses(&self, host: &str, asker: Option<&Asker<'_>>) -> Result<Vec<IpAddr>, DnsError> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let key = key(host);
        let side = self.side(asker);
        match side.cached(&key) {
            Some(Found::Addresses(addresses)) => return Ok(addresses.to_vec()),
            Some(Found::Nothing | Found::Targets(_)) => return Err(DnsError::NotFound),
            None => {}
        }
        let mut name = Name::from_utf8(host).map_err(|_| DnsError::NotFound)?;
        if asker.is_some_and(|asker| asker.who.class == Class::Stranger) && key.contains('.') {
            // A search list would multiply the questions, and is not for names of strangers.
            name.set_fqdn(true);
        }
        let resolver = self.resolver(side)?;
        let both = both_families(resolver, name);
        match self.asking(asker, 2, both).await? {
            Ok((until, addresses)) => {
                side.keep(&key, until, Found::Addresses(addresses.clone().into()));
                Ok(addresses)
            }
            Err(nothing) => {
                side.keep_nothing(&key, nothing.life);
                Err(nothing.error)
            }
        }
    }

    /// The SRV records of `service` of a homeserver, in no particular order.
    ///
    /// # Errors
    /// When there are none.
    pub async fn srv_for(&self, service: &str, asker: &Asker<'_>) -> Result<Vec<SrvTarget>, DnsError> {
        let key = key(service);
        let side = self.side(Some(asker));
        match side.cached(&key) {
            Some(Found::Targets(targets)) => return Ok(targets.to_vec()),
            Some(Found::Nothing | Found::Addresses(_)) => return Err(DnsError::NotFound),
            None => {}
        }
        // Fully qualified: a search list must not turn one server's name into another's.
        let mut name = Name::from_ascii(service).map_err(|_| DnsError::NotFound)?;
        name.set_fqdn(true);
        let resolver = self.resolver(side)?;
        let question = async { resolver.lookup(name, RecordType::SRV).await.map_err(|error| nothing(&error)) };
        match self.asking(Some(asker), 1, question).await? {
            Ok(found) => {
                let targets = targets(&found);
                let until = life(&found);
                if targets.is_empty() {
                    side.keep(&key, until.min(Instant::now() + MAX_NEGATIVE_LIFE), Found::Nothing);
                    return Err(DnsError::NotFound);
                }
                side.keep(&key, until, Found::Targets(targets.clone().into()));
                Ok(targets)
            }
            Err(nothing) => {
                side.keep_nothing(&key, nothing.life);
                Err(nothing.error)
            }
        }
    }

    /// Asks so many questions, within what is left for `asker`.
    async fn asking<T>(
        &self,
        asker: Option<&Asker<'_>>,
        questions: u32,
        lookup: impl Future<Output = Result<T, Nothing>>,
    ) -> Result<Result<T, Nothing>, DnsError> {
        let Some(asker) = asker else {
            return Ok(lookup.await);
        };
        if !asker.budget.questions(questions) {
            return Err(DnsError::Spent);
        }
        if asker.who.class != Class::Stranger {
            return Ok(lookup.await);
        }
        let mut place = self.place(asker.who.domain).await;
        let found = timeout(STRANGERS_TIMEOUT, lookup).await;
        place.hung = found.is_err();
        found.map_err(|_| DnsError::Failed("no answer in time".into()))
    }

    /// A place among the look-ups of strangers.
    async fn place(&self, domain: u64) -> Place {
        let waiting = {
            let mut lookups = lock(&self.lookups);
            if lookups.take(Instant::now(), domain) {
                None
            } else {
                let (waker, waiting) = oneshot::channel();
                lookups.retain(|waker| !waker.is_closed());
                lookups.wait(domain, waker);
                Some(waiting)
            }
        };
        if let Some(waiting) = waiting
            && let Ok(place) = waiting.await
        {
            return place;
        }
        Place {
            lookups: self.lookups.clone(),
            domain,
            since: Instant::now(),
            hung: false,
        }
    }

    fn side(&self, asker: Option<&Asker<'_>>) -> &Side {
        match asker.map(|asker| asker.who.class) {
            Some(Class::Stranger) => &self.strangers,
            Some(Class::Verified) => &self.verified,
            Some(Class::Listed) | None => &self.listed,
        }
    }

    fn resolver<'a>(&self, side: &'a Side) -> Result<&'a TokioResolver, DnsError> {
        if let Some(resolver) = side.resolver.get() {
            return Ok(resolver);
        }
        let made = self.make(side.insists).map_err(|error| DnsError::Failed(error.to_string()))?;
        Ok(side.resolver.get_or_init(|| made))
    }

    fn make(&self, insists: bool) -> Result<TokioResolver, NetError> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().or_else(|error| {
                tracing::warn!(
                    error = error.to_string(),
                    "/etc/resolv.conf cannot be used; asking the DNS server on 127.0.0.1"
                );
                Ok::<_, NetError>(with_servers(&[SocketAddr::from(([127, 0, 0, 1], 53))]))
            })?
        } else {
            with_servers(&self.servers)
        };
        bound(builder.options_mut(), insists);
        builder.build()
    }
}

fn with_servers(servers: &[SocketAddr]) -> hickory_resolver::ResolverBuilder<TokioRuntimeProvider> {
    let servers = servers
        .iter()
        .map(|server| {
            let on_port = |mut connection: ConnectionConfig| {
                connection.port = server.port();
                connection
            };
            NameServerConfig::new(
                server.ip(),
                true,
                vec![on_port(ConnectionConfig::udp()), on_port(ConnectionConfig::tcp())],
            )
        })
        .collect();
    Resolver::builder_with_config(ResolverConfig::from_name_servers(servers), TokioRuntimeProvider::default())
}

fn bound(options: &mut ResolverOpts, insists: bool) {
    options.cache_size = 0;
    options.ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
    // A verification has ten seconds in all; a name server that is away must leave some for the next one.
    options.timeout = options.timeout.min(Duration::from_secs(2));
    // A request about a homeserver that is not listed tries again by itself, and within its budget.
    options.attempts = if insists { options.attempts.max(2) } else { 0 };
    // One domain whose name servers do not answer must not take the places of all others.
    options.max_active_requests = 2048;
}

/// A place among the look-ups of strangers, handed on when it is dropped.
struct Place {
    lookups: Arc<Mutex<Lookups<oneshot::Sender<Self>>>>,
    domain: u64,
    since: Instant,
    hung: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = Instant::now();
        let hung = self.hung || now >= self.since + STRANGERS_TIMEOUT / 2;
        let mut unwanted = Vec::new();
        let mut lookups = lock(&self.lookups);
        lookups.release(now, self.domain, hung);
        while let Some((domain, waker)) = lookups.next(now) {
            let place = Self {
                lookups: self.lookups.clone(),
                domain,
                since: now,
                hung: false,
            };
            // Whoever does not wait any more gives it back, after this.
            unwanted.extend(waker.send(place).err());
        }
        drop(lookups);
    }
}

fn lock<W>(lookups: &Mutex<Lookups<W>>) -> MutexGuard<'_, Lookups<W>> {
    lookups.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nothing was found, and how long that holds.
struct Nothing {
    error: DnsError,
    life: Option<Duration>,
}

fn nothing(error: &NetError) -> Nothing {
    if !error.is_no_records_found() {
        return Nothing {
            error: DnsError::Failed(error.to_string()),
            life: None,
        };
    }
    let seconds = if let NetError::Dns(Refusal::NoRecordsFound(none)) = error {
        none.negative_ttl
    } else {
        None
    };
    Nothing {
        error: DnsError::NotFound,
        life: seconds.map(|seconds| Duration::from_secs(seconds.into()).min(MAX_NEGATIVE_LIFE)),
    }
}

/// Both families at once. One of them does alone when the other one has nothing, or takes long.
async fn both_families(resolver: &TokioResolver, name: Name) -> Result<(Instant, Vec<IpAddr>), Nothing> {
    let ask = async |kind| {
        let found = resolver.lookup(name.clone(), kind).await.map_err(|error| nothing(&error))?;
        let addresses = addresses_in(&found);
        if addresses.is_empty() {
            return Err(Nothing {
                error: DnsError::NotFound,
                life: None,
            });
        }
        Ok((life(&found), addresses))
    };
    let (mut v6, mut v4) = (std::pin::pin!(ask(RecordType::AAAA)), std::pin::pin!(ask(RecordType::A)));
    let mut patience = std::pin::pin!(sleep(IPV6_PATIENCE));
    let (mut of_v6, mut of_v4, mut patient) = (None, None, true);
    while of_v6.is_none() || of_v4.is_none() {
        tokio::select! {
            found = &mut v6, if of_v6.is_none() => of_v6 = Some(found),
            found = &mut v4, if of_v4.is_none() => of_v4 = Some(found),
            () = &mut patience, if patient => patient = false,
        }
        if !patient && [&of_v6, &of_v4].iter().any(|found| matches!(found, Some(Ok(_)))) {
            break;
        }
    }
    let whole = of_v6.is_some() && of_v4.is_some();
    match (of_v6, of_v4) {
        (Some(Ok((until, mut addresses))), Some(Ok((also_until, more)))) => {
            // Neither family may crowd the other one out.
            addresses.truncate(MOST - more.len().min(MOST / 2));
            addresses.extend(more);
            addresses.truncate(MOST);
            Ok((until.min(also_until), addresses))
        }
        (Some(Ok((until, addresses))), _) | (_, Some(Ok((until, addresses)))) => {
            let until = if whole {
                until
            } else {
                until.min(Instant::now() + MAX_NEGATIVE_LIFE)
            };
            Ok((until, addresses))
        }
        // A failure may pass, so it says more than that one family is not there.
        (Some(Err(v6)), Some(Err(v4))) if matches!(v6.error, DnsError::NotFound) => Err(Nothing {
            life: v4.life.zip(v6.life).map(|(a, b)| a.min(b)),
            error: v4.error,
        }),
        (Some(Err(failed)), _) | (None, Some(Err(failed))) => Err(Nothing {
            error: failed.error,
            life: None,
        }),
        (None, None) => Err(Nothing {
            error: DnsError::NotFound,
            life: None,
        }),
    }
}

/// The first few addresses of an answer.
fn addresses_in(found: &Lookup) -> Vec<IpAddr> {
    found
        .answers()
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .take(MOST)
        .collect()
}

fn targets(found: &Lookup) -> Vec<SrvTarget> {
    found
        .answers()
        .iter()
        .filter_map(|record| if let RData::SRV(srv) = &record.data { Some(srv) } else { None })
        .map(|srv| SrvTarget {
            priority: srv.priority,
            weight: srv.weight,
            port: srv.port,
            host: srv.target.to_ascii().trim_end_matches('.').to_owned(),
        })
        .take(MOST)
        .collect()
}

fn life(found: &Lookup) -> Instant {
    found.valid_until().min(Instant::now() + MAX_LIFE)
}

/// Names without case and final dot are one.
fn key(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Orders targets as RFC 2782 says: by priority, and within one priority at random by weight.
#[must_use]
pub fn order(mut targets: Vec<SrvTarget>, mut random_below: impl FnMut(u64) -> u64) -> Vec<SrvTarget> {
    targets.sort_by_key(|t| (t.priority, t.weight));
    let mut ordered = Vec::with_capacity(targets.len());
    while let Some(priority) = targets.first().map(|t| t.priority) {
        let end = targets.partition_point(|t| t.priority == priority);
        let total: u64 = targets[..end].iter().map(|t| u64::from(t.weight)).sum();
        let mark = random_below(total + 1);
        let mut sum = 0;
        let at = targets[..end]
            .iter()
            .position(|t| {
                sum += u64::from(t.weight);
                sum >= mark
            })
            .unwrap_or(0);
        ordered.push(targets.remove(at));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(priority: u16, weight: u16, host: &str) -> SrvTarget {
        SrvTarget {
            priority,
            weight,
            port: 1,
            host: host.into(),
        }
    }

    fn hosts(targets: &[SrvTarget]) -> Vec<&str> {
        targets.iter().map(|t| t.host.as_str()).collect()
    }

    #[test]
    fn priority_comes_first_and_weight_decides_within() {
        let all = vec![target(20, 5, "c"), target(10, 0, "a"), target(10, 9, "b")];
        assert_eq!(hosts(&order(all.clone(), |_| 0)), ["a", "b", "c"]);
        assert_eq!(hosts(&order(all, |below| below - 1)), ["b", "a", "c"]);
    }

    #[test]
    fn the_weight_is_the_share() {
        let (mut first, mut seed) = (0, 1_u64);
        for _ in 0..10_000 {
            let ordered = order(vec![target(1, 75, "a"), target(1, 25, "b")], |below| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 33) % below
            });
            first += usize::from(ordered[0].host == "a");
        }
        assert!((7_200..7_800).contains(&first), "{first} of 10000");
    }
}
