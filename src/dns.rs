//! Addresses and SRV records, asked without blocking a thread.
//!
//! `/etc/hosts` and the search list of `/etc/resolv.conf` are honoured, and followed when they change. `memory.rs` says how
//! long an answer counts, `question.rs` asks. What may be dialled is not decided here but in `federation/guard.rs`.
#![expect(clippy::disallowed_methods, reason = "an adapter: asks, waits and remembers")]

mod memory;
mod question;

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::Name;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{sleep_until, timeout, timeout_at};

use crate::admission::budget::Budget;
use crate::admission::lookups::Lookups;
use crate::admission::{Class, Who};
use crate::single_flight::SingleFlight;
use memory::{Answer, Former, Found, Known, Memory};
use question::Resolvers;

/// Look-ups for strangers at a time: each takes two sockets, and up to six where nobody answers.
const MAX_STRANGER_LOOKUPS: usize = 64;
/// Time for one look-up of a stranger's name.
const STRANGER_LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);
/// How long DNS is waited for where the former answer may do.
const FORMER_ANSWER_AFTER: Duration = Duration::from_millis(500);
/// How long it is waited for where the former answer could not be used.
const DOUBTED_ANSWER_AFTER: Duration = Duration::from_secs(2);
const _: () = assert!(
    FORMER_ANSWER_AFTER.as_millis() < DOUBTED_ANSWER_AFTER.as_millis(),
    "a former answer that is doubted is kept back for longer"
);

/// A target of an SRV record set, RFC 2782.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvTarget {
    /// Priority of the target; the smallest is asked first.
    pub priority: u16,
    /// Share of the target among those of one priority.
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
    Failed(Arc<str>),
    /// The request has asked as many questions as one request may.
    #[error("no more questions are asked for one request")]
    Spent,
}

/// For whom DNS is asked.
#[derive(Debug, Clone, Copy)]
pub struct Asker<'a> {
    /// The homeserver whose name led here.
    pub who: Who,
    /// Budget that is left for the client's request.
    pub budget: &'a Budget,
    /// Answers to questions that were asked before this moment do not count.
    pub since: Option<Instant>,
}

/// Asks DNS, and remembers.
pub struct Dns {
    listed: Arc<Side>,
    verified: Arc<Side>,
    strangers: Arc<Side>,
    lookups: Arc<Mutex<Lookups<oneshot::Sender<Place>>>>,
}

/// A resolver and what it found: what strangers make us ask is kept apart.
struct Side {
    resolvers: Resolvers,
    memory: Mutex<Memory>,
    /// By name, and for strangers by the domain whose place the question takes: nobody waits for a place of another domain.
    questions: SingleFlight<(Box<str>, u64), Result<Found, DnsError>>,
}

impl Side {
    fn new(servers: Vec<SocketAddr>, insists: bool) -> Arc<Self> {
        Arc::new(Self {
            resolvers: Resolvers::new(servers, insists),
            memory: Mutex::new(Memory::new()),
            questions: SingleFlight::new(),
        })
    }

    fn resolver(&self) -> Result<TokioResolver, DnsError> {
        let ready = self.resolvers.ready().map_err(|error| DnsError::Failed(error.to_string().into()))?;
        if ready.is_new {
            self.memory.lock().outdate();
        }
        Ok(ready.resolver)
    }

    /// Asks one question for all who want the same, and not before it is `due`.
    async fn ask(
        &self,
        (key, domain): (Box<str>, u64),
        since: Option<Instant>,
        due: Option<Instant>,
        question: impl Future<Output = Answer>,
    ) -> Result<Found, DnsError> {
        let asking = pin!(async {
            if let Some(due) = due {
                sleep_until(due.into()).await;
            }
            let asked = Instant::now();
            // Somebody may have had an answer on the way here.
            if let Known::Current(known) = self.memory.lock().get(&key, since, asked) {
                return known;
            }
            let answer = question.await;
            let mut memory = self.memory.lock();
            let now = Instant::now();
            memory.put(&key, &answer, asked, now);
            match memory.get(&key, Some(asked), now) {
                Known::Current(known) => known,
                // What was put there a moment ago counts.
                Known::Former(_) | Known::Unknown => Err(DnsError::NotFound),
            }
        });
        self.questions.run((key.clone(), domain), asking).await.0
    }
}

impl Dns {
    /// Asks `servers`, or those of `/etc/resolv.conf` when there are none.
    #[must_use]
    pub fn new(servers: &[SocketAddr]) -> Self {
        Self {
            listed: Side::new(servers.to_vec(), true),
            verified: Side::new(servers.to_vec(), false),
            strangers: Side::new(servers.to_vec(), false),
            lookups: Arc::new(Mutex::new(Lookups::new(MAX_STRANGER_LOOKUPS))),
        }
    }

    /// All IPv6 and IPv4 addresses of `host`, which the operator wrote down. With `since`, an answer to a question that was
    /// asked before that moment does not count: what it said could not be used.
    ///
    /// # Errors
    /// When there are none.
    pub async fn addresses(&self, host: &str, since: Option<Instant>) -> Result<Vec<IpAddr>, DnsError> {
        self.look_up_addresses(host, None, since).await
    }

    /// All IPv6 and IPv4 addresses of `host`, to which a homeserver led.
    ///
    /// # Errors
    /// When there are none.
    pub async fn addresses_for(&self, host: &str, asker: &Asker<'_>) -> Result<Vec<IpAddr>, DnsError> {
        self.look_up_addresses(host, Some(asker), asker.since).await
    }

    async fn look_up_addresses(&self, host: &str, asker: Option<&Asker<'_>>, since: Option<Instant>) -> Result<Vec<IpAddr>, DnsError> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let key = key(host);
        let mut name = Name::from_utf8(host).map_err(|_| DnsError::NotFound)?;
        if asker.is_some_and(|asker| asker.who.class == Class::Stranger) && key.contains('.') {
            // A search list would multiply the questions, and is not for names of strangers.
            name.set_fqdn(true);
        }
        let question = |resolver| question::addresses(resolver, name);
        match self.look_up(key, asker, since, 2, question).await? {
            Found::Addresses(addresses) => Ok(addresses.to_vec()),
            Found::Targets(_) => Err(DnsError::NotFound),
        }
    }

    /// The SRV records of `service` of a homeserver, in no particular order.
    ///
    /// # Errors
    /// When there are none.
    pub async fn srv_for(&self, service: &str, asker: &Asker<'_>) -> Result<Vec<SrvTarget>, DnsError> {
        // Fully qualified: a search list must not turn one server's name into another's.
        let mut name = Name::from_ascii(service).map_err(|_| DnsError::NotFound)?;
        name.set_fqdn(true);
        let question = |resolver| question::targets(resolver, name);
        // No host has a space in its name: what is known of its addresses says nothing about services.
        let key = format!("SRV {}", key(service)).into();
        match self.look_up(key, Some(asker), asker.since, 1, question).await? {
            Found::Targets(targets) => Ok(targets.to_vec()),
            Found::Addresses(_) => Err(DnsError::NotFound),
        }
    }

    /// Looks a name up in memory, as far as that counts, or else asks DNS.
    async fn look_up<Q>(
        &self,
        key: Box<str>,
        asker: Option<&Asker<'_>>,
        since: Option<Instant>,
        questions: u32,
        question: impl FnOnce(TokioResolver) -> Q,
    ) -> Result<Found, DnsError>
    where
        Q: Future<Output = Answer> + Send + 'static,
    {
        let side = self.side(asker);
        let resolver = side.resolver()?;
        let now = Instant::now();
        let mut known = side.memory.lock().get(&key, since, now);
        if matches!(known, Known::Unknown) && asker.is_some_and(|asker| asker.who.class == Class::Verified) {
            // What was found while it was a stranger, by the files as they are now.
            self.strangers.resolver()?;
            let (mut memory, mut before) = (side.memory.lock(), self.strangers.memory.lock());
            memory.take_over(&mut before, &key);
            known = memory.get(&key, since, now);
        }
        let former = match known {
            Known::Current(known) => return known,
            Known::Former(former) => Some(former),
            Known::Unknown => None,
        };
        if asker.is_some_and(|asker| !asker.budget.questions(questions)) {
            return former.map(|former| former.found).ok_or(DnsError::Spent);
        }
        let question = question(resolver);
        let stranger = asker.filter(|asker| asker.who.class == Class::Stranger);
        let lookups = stranger.map(|asker| (self.lookups.clone(), asker.who.domain));
        let flight = (key, stranger.map_or(0, |asker| asker.who.domain));
        let asking = async move {
            match lookups {
                None => question.await,
                Some((lookups, domain)) => {
                    let mut place = place(lookups, domain).await;
                    let answer = timeout(STRANGER_LOOKUP_TIMEOUT, question).await;
                    place.hung = answer.is_err();
                    answer.unwrap_or_else(|_| Err(question::failed("no answer in time")))
                }
            }
        };
        let Some(Former { found, doubted, due }) = former else {
            // Boxed: seldom, and larger than all the rest.
            return Box::pin(side.ask(flight, since, None, asking)).await;
        };
        // Whoever has something to go by does not wait for a name server that is away.
        let wait = if doubted { DOUBTED_ANSWER_AFTER } else { FORMER_ANSWER_AFTER };
        let began = side.questions.began(&flight);
        let until = began.map_or(now, Into::into).max(due) + wait;
        let side = side.clone();
        let asking = Box::pin(async move { side.ask(flight, since, Some(due), asking).await });
        let answer = if began.is_some() {
            timeout_at(until.into(), asking).await.ok()
        } else {
            // The question goes on without whoever asked it first.
            timeout_at(until.into(), tokio::spawn(asking)).await.ok().and_then(Result::ok)
        };
        answer.unwrap_or(Ok(found))
    }

    fn side(&self, asker: Option<&Asker<'_>>) -> &Arc<Side> {
        match asker.map(|asker| asker.who.class) {
            Some(Class::Stranger) => &self.strangers,
            Some(Class::Verified) => &self.verified,
            Some(Class::Listed) | None => &self.listed,
        }
    }
}

/// A place among the look-ups of strangers.
async fn place(lookups: Arc<Mutex<Lookups<oneshot::Sender<Place>>>>, domain: u64) -> Place {
    let waiting = {
        let mut lookups = lookups.lock();
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
        lookups,
        domain,
        since: Instant::now(),
        hung: false,
    }
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
        let hung = self.hung || now >= self.since + STRANGER_LOOKUP_TIMEOUT / 2;
        let mut unwanted = Vec::new();
        let mut lookups = self.lookups.lock();
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

/// Names without case and final dot are one.
fn key(name: &str) -> Box<str> {
    name.trim_end_matches('.').to_ascii_lowercase().into()
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
