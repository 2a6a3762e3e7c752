//! Where the SFU is: the addresses that its name has, and the client whose kept connections lead there.
//!
//! A container that was made anew has another address, and its old one may be somebody else's by then. So when a call fails
//! at the connection, or is answered by something that is not LiveKit, DNS is asked past every memory (decision O2); where
//! the name leads elsewhere, the kept connections are let go. Nobody waits for that: whoever tries again finds out.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use parking_lot::Mutex;
use url::Url;

use super::api::CALL_TIMEOUT;
use super::refusal::SfuError;
use crate::dns::{Dns, DnsError};
use crate::tls::{CONNECT_TIMEOUT, Tls};

const _: () = assert!(
    CONNECT_TIMEOUT.as_millis() < CALL_TIMEOUT.as_millis(),
    "a call has time left once it is connected"
);

/// How long the name is taken to lead where it did while calls succeed: an SFU that is being replaced answers until its last
/// call is over. What is asked then is what DNS said, as long as that counts.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);

/// Where the SFU is.
pub(super) struct Endpoint {
    /// The base address of the API.
    pub(super) uri: Option<Uri>,
    /// The forward proxy on the way there.
    pub(super) proxy: Option<Intercept>,
    pub(super) tls: Arc<Tls>,
    pub(super) resolver: SfuResolver,
    /// The client, and how often the name had led elsewhere when it was made.
    client: Mutex<Option<(u64, reqwest::Client)>>,
}

/// Resolves names as those of homeservers are resolved; the SFU's address is the operator's own choice and not guarded.
#[derive(Clone)]
pub(super) struct SfuResolver {
    dns: Arc<Dns>,
    /// Host that connections are made to: the SFU, or the proxy on the way there. `None` where that is an address.
    host: Option<Arc<str>>,
    led: Arc<Mutex<Led>>,
    /// Held while DNS is asked past every memory.
    looking: Arc<tokio::sync::Mutex<()>>,
}

/// Where the host's name led.
#[derive(Default)]
struct Led {
    /// The last time, in order, and when that was.
    addresses: Vec<IpAddr>,
    at: Option<Instant>,
    /// How often that was elsewhere than before.
    moves: u64,
}

impl Endpoint {
    pub(super) fn new(base: &Url, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        let uri: Option<Uri> = base.as_str().parse().ok();
        let proxy = uri.as_ref().and_then(|uri| Matcher::from_env().intercept(uri));
        let host = proxy.as_ref().map(Intercept::uri).or(uri.as_ref()).and_then(Uri::host);
        let host = host
            .filter(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().is_err())
            .map(Arc::from);
        Self {
            uri,
            proxy,
            tls,
            resolver: SfuResolver {
                dns,
                host,
                led: Arc::default(),
                looking: Arc::default(),
            },
            client: Mutex::new(None),
        }
    }

    /// How often the name has led elsewhere than before.
    pub(super) fn moves(&self) -> u64 {
        self.resolver.led.lock().moves
    }

    /// The client. One with connections to another place is replaced.
    pub(super) fn client(&self) -> Result<reqwest::Client, SfuError> {
        let moves = self.moves();
        if self.resolver.led.lock().at.is_some_and(|at| at.elapsed() > LOOKUP_INTERVAL) {
            self.look(None);
        }
        let mut kept = self.client.lock();
        if let Some((_, client)) = kept.as_ref().filter(|(made_after, _)| *made_after == moves) {
            return Ok(client.clone());
        }
        // Made at first use: reading CA certificates takes longer than the whole rest of the start.
        let builder = self.tls.client().map_err(|error| SfuError::Connect(error.to_string()))?;
        let client = builder
            .dns_resolver(Arc::new(self.resolver.clone()))
            .pool_max_idle_per_host(32)
            .build()
            .map_err(|error| SfuError::Connect(error.without_url().to_string()))?;
        Ok(kept.insert((moves, client)).1.clone())
    }

    /// Asks DNS past every memory where the SFU is by now.
    pub(super) fn look_again(&self) {
        self.look(Some(Instant::now()));
    }

    /// Asks in the background, one look at a time.
    fn look(&self, since: Option<Instant>) {
        let resolver = self.resolver.clone();
        if let Some(host) = resolver.host.clone()
            && let Ok(look) = resolver.looking.clone().try_lock_owned()
        {
            tokio::spawn(async move {
                // Where DNS does not answer, nothing has changed.
                if let Ok(found) = resolver.dns.addresses(&host, since).await {
                    resolver.leads_to(found);
                }
                drop(look);
            });
        }
    }
}

impl SfuResolver {
    /// Where to connect to; the port is filled in by whoever connects.
    pub(super) async fn find(&self, name: &str) -> Result<Vec<SocketAddr>, DnsError> {
        let found = self.dns.addresses(name, None).await?;
        let sockets = found.iter().map(|ip| SocketAddr::new(*ip, 0)).collect();
        if self.host.as_deref() == Some(name) {
            self.leads_to(found);
        }
        Ok(sockets)
    }

    /// Notes where the name leads.
    fn leads_to(&self, mut found: Vec<IpAddr>) {
        found.sort_unstable();
        let mut led = self.led.lock();
        let before = std::mem::replace(&mut led.addresses, found);
        let moved = !before.is_empty() && before != led.addresses;
        led.moves += u64::from(moved);
        led.at = Some(Instant::now());
    }
}

impl reqwest::dns::Resolve for SfuResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let resolver = self.clone();
        Box::pin(async move { Ok(Box::new(resolver.find(name.as_str()).await?.into_iter()) as reqwest::dns::Addrs) })
    }
}
