//! Reaching a homeserver's federation API: where it is, whether it may be dialled, how much of it at once.
//!
//! The whole server discovery of the Matrix specification
//! ([server-server API](https://spec.matrix.org/v1.16/server-server-api/#resolving-server-names)), over `hickory-resolver`
//! and our own walk through its steps. `resolvematrix` 1.4 was read for the purpose and not taken: it maps SNI names to
//! destinations in one process-wide table, so two server names that share a host share a destination and no guard can
//! tell whose request it is; it follows the first SRV target only, puts the port into the `Host` header where the
//! specification has none, and its caches have neither a bound nor the lifetimes that decision O2 asks for.
//!
//! * `discovery.rs` the steps; `well_known.rs` step 3; `route.rs` a result with its pooled connections
//! * `dial.rs` the only place that dials, with `guard.rs` in front; `dial_limiter.rs` how often an address is dialled;
//!   `pool.rs` connections, and answers bounded as they come
//! * whose turn it is to be asked, `admission` says
//! * `follow.rs` files behind redirects; `client_api.rs` the way to a homeserver's client-server API
//! * `look.rs` one look at an address, for `doctor`
//! * `homeservers.rs` what is remembered of each homeserver, bounded; `rediscovery.rs` when that is asked for again
//!
//! Who is who on that homeserver is `openid.rs`.
#![expect(clippy::disallowed_methods, reason = "an adapter: dials, waits and remembers")]

mod client_api;
mod dial;
mod dial_limiter;
mod discovery;
mod failure;
mod follow;
mod guard;
mod homeservers;
mod look;
mod pool;
mod rediscovery;
mod route;
mod well_known;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use url::Url;

pub use client_api::{BaseUrl, ClientApi};
pub use failure::Failure;
pub use guard::{AddressDenied, Guard, Trust};
pub use homeservers::Homeserver;
pub use look::{Look, Looked, Upgrade};
pub use pool::Switched;
pub(crate) use rediscovery::{Next, Rediscovery};
pub use route::Reply;

use crate::access::Homeservers;
use crate::admission::budget::Budget;
use crate::admission::fair_queue::Places;
use crate::admission::limiter::FairLimiter;
use crate::admission::verified::{REMEMBERED_FOR, Verified};
use crate::admission::{Class, Client, NameHasher, Who};
use crate::clock::unix_seconds as now;
use crate::dns::Dns;
use crate::log_throttle::LogThrottle;
use crate::metrics::{GuardReason, METRICS};
use crate::retry::MIN_REMAINING;
use crate::server_name::ServerName;
use crate::tls::Tls;
use dial::{Attempt, Dialer, Queueing};
use dial_limiter::DialLimiter;
use homeservers::Table;
use pool::Pool;

/// Requests in flight to one homeserver, by class (decision O4).
const IN_FLIGHT: [u32; 3] = [32, 32, 4];
/// An answer is taken note of again after so many seconds.
const VERIFY_INTERVAL_SECONDS: u64 = 60;
/// Settings of the operator about homeservers.
pub struct Settings {
    /// Addresses that may be dialled.
    pub guard: Guard,
    /// Addresses in `LIVEKIT_FEDERATION_URL_OVERRIDES`.
    pub overrides: BTreeMap<ServerName, Url>,
    /// Names that stand in the configuration, besides those of the overrides.
    pub listed: Homeservers,
    /// More names of that kind: our own, and those of the other override list.
    pub also_listed: Vec<ServerName>,
    /// Forward proxies of the environment.
    pub proxies: Matcher,
    /// Connections to homeservers that may be in use at a time; those that are kept give way (decision P14).
    pub connections_out: u32,
    /// Keeps for the next start who has answered well.
    pub remember: Remember,
}

/// Stores that the homeserver of this host has answered well at this second of the wall clock, or forgets it.
pub type Remember = Box<dyn Fn(&str, Option<u64>) + Send + Sync>;

/// A GET below a homeserver's federation API.
#[derive(Clone, Copy)]
pub struct Get<'a> {
    /// Path and query of the request.
    pub path: &'a str,
    /// The longest body that is read, in bytes.
    pub limit: usize,
    /// Whether it was tried before: then a remembered failure does not count.
    pub again: bool,
}

/// On whose behalf a homeserver is asked.
pub struct Caller<'a> {
    /// Sender of the request.
    pub client: Client,
    /// Budget that is left of what the request may cost others.
    pub budget: &'a Budget,
    /// When the answer has to be there.
    pub deadline: Instant,
}

/// Finds homeservers, and asks them.
pub struct Federation {
    dialer: Arc<Dialer>,
    listed: Homeservers,
    also_listed: Vec<ServerName>,
    homeservers: Table,
    verified: Mutex<Verified>,
    remember: Remember,
    refused: LogThrottle,
}

impl Federation {
    /// Makes the adapter; no homeserver is asked and no file read before the first request.
    #[must_use]
    pub fn new(settings: Settings, dns: Arc<Dns>, tls: Arc<Tls>) -> Self {
        let Settings {
            guard,
            overrides,
            listed,
            also_listed,
            proxies,
            connections_out,
            remember,
        } = settings;
        if proxies.intercept(&Uri::from_static("https://homeserver.invalid/")).is_some() {
            tracing::info!(name: "forward_proxy",
                "homeservers are dialled through the forward proxy of HTTPS_PROXY or ALL_PROXY: which private addresses may be reached \
                 behind it is for the proxy to decide"
            );
        }
        let somebody_is_listed = !also_listed.is_empty() || !overrides.is_empty() || listed != Homeservers::All;
        Self {
            dialer: Arc::new(Dialer {
                dns,
                overrides,
                guard,
                proxies,
                tls,
                hasher: NameHasher::default(),
                dial_limiter: DialLimiter::default(),
                places: FairLimiter::new(Places::shared(connections_out, somebody_is_listed, IN_FLIGHT)),
                pool: Pool::new(usize::try_from(connections_out).unwrap_or(usize::MAX)),
            }),
            listed,
            also_listed,
            homeservers: Table::new(),
            verified: Mutex::default(),
            remember,
            refused: LogThrottle::new(20, Duration::from_secs(60)),
        }
    }

    /// Returns the entry of `server`, made where there is none.
    #[must_use]
    pub fn homeserver(&self, server: &ServerName) -> Arc<Homeserver> {
        self.homeservers.get(server, now(), || {
            let (trust, until) = match self.trust(server) {
                Trust::Listed => (Trust::Listed, 0),
                Trust::Stranger => (Trust::Stranger, self.verified.lock().until(&server.host_and_port_key())),
            };
            let class = match trust {
                Trust::Listed => Class::Listed,
                Trust::Stranger if until > now() => Class::Verified,
                Trust::Stranger => Class::Stranger,
            };
            Homeserver::new(server.clone(), trust, self.dialer.hasher.who(server, class), until)
        })
    }

    /// Returns the marks that tell `server` from others, with its class.
    #[must_use]
    pub fn who(&self, server: &ServerName) -> Who {
        self.homeserver(server).who(now())
    }

    /// How well `server` is known.
    #[must_use]
    pub fn class(&self, server: &ServerName) -> Class {
        self.who(server).class
    }

    /// `homeserver` has answered as the specification says: from now on it counts as verified.
    pub fn has_answered(&self, homeserver: &Homeserver) {
        let now = now();
        // Once a minute is often enough. Where nobody knows on which machines it is, nobody could say whose share it fills.
        if homeserver.trust() == Trust::Listed || homeserver.verified_until() + VERIFY_INTERVAL_SECONDS > now + REMEMBERED_FOR.as_secs() {
            return;
        }
        let Some(group) = homeserver.group() else { return };
        // Another port of that host may be anybody's idea.
        let host = homeserver.name().host_and_port_key();
        let (changes, until) = {
            let mut verified = self.verified.lock();
            (verified.on_answer(&host, group, now), verified.until(&host))
        };
        homeserver.is_verified_until(until);
        if changes.store {
            (self.remember)(&host, Some(now));
        }
        for host in changes.forget {
            (self.remember)(&host, None);
        }
    }

    /// A participant of `server` was seen on the SFU: among those that have verified a token it is forgotten last.
    pub fn has_participant(&self, server: &ServerName) {
        self.verified.lock().on_participant(&server.host_and_port_key());
    }

    /// The homeserver of `host` had answered well at this second, before the start.
    pub fn restore(&self, host: &str, at: u64) {
        self.verified.lock().restore(host, at, now());
    }

    /// Returns the budget of one request about `homeserver`.
    #[must_use]
    pub fn budget(&self, homeserver: &Homeserver) -> Budget {
        Budget::of(homeserver.class(now()))
    }

    /// Two independent hashes of `text` with keys of this process.
    #[must_use]
    pub fn fingerprint(&self, text: &str) -> u128 {
        self.dialer.hasher.fingerprint(text)
    }

    /// Asks `homeserver` on behalf of `caller`.
    ///
    /// # Errors
    /// When there is no whole answer within the limit before the deadline.
    pub async fn get(&self, homeserver: &Arc<Homeserver>, get: &Get<'_>, caller: &Caller<'_>) -> Result<Reply, Failure> {
        let asking = self.ask(homeserver, get, caller);
        let reply = timeout_at(caller.deadline, asking).await.unwrap_or(Err(Failure::Timeout));
        if let Err(failure @ Failure::AddressDenied { why, .. }) = &reply {
            METRICS.guard_refused(match why {
                AddressDenied::Private => GuardReason::Private,
                AddressDenied::Never => GuardReason::Never,
            });
            self.warn_once(homeserver, failure);
        }
        reply
    }

    /// The first refusal of a name is told, since it may be the operator's own; a flood of names is not.
    fn warn_once(&self, homeserver: &Homeserver, failure: &Failure) {
        if !homeserver.first_refusal() {
            return;
        }
        self.refused.log(|count| {
            let (server, reason, remedy) = (homeserver.name().as_str(), failure.to_string(), failure.remedy());
            tracing::warn!(name: "address_denied", server, reason, count, remedy, "a homeserver's address is not dialled");
        });
    }

    /// Asks, and asks again as somebody better known when the homeserver turns out to be one meanwhile.
    async fn ask(&self, homeserver: &Arc<Homeserver>, get: &Get<'_>, caller: &Caller<'_>) -> Result<Reply, Failure> {
        let verified = homeserver.becomes_verified();
        let who = homeserver.who(now());
        // Boxed: whoever has not come this far does not carry it.
        let asking = Box::pin(self.ask_as(who, homeserver, get, caller));
        if who.class != Class::Stranger {
            return asking.await;
        }
        tokio::select! {
            biased;
            reply = asking => return reply,
            () = verified => {}
        }
        let who = homeserver.who(now());
        Box::pin(self.ask_as(who, homeserver, get, caller)).await
    }

    async fn ask_as(&self, who: Who, homeserver: &Arc<Homeserver>, get: &Get<'_>, caller: &Caller<'_>) -> Result<Reply, Failure> {
        let (queueing, queued) = (queueing(homeserver, caller), Notify::new());
        let attempt = Attempt::new(who, caller.budget, &queued, Some(queueing));
        let link = homeserver.link(&self.dialer, get.again, &attempt).await?;
        let reply = link.get(&self.dialer, get.path, get.limit, &attempt).await?;
        homeserver.took(reply.took);
        homeserver.is_on(link.group());
        Ok(reply)
    }

    /// Finds anew where `homeserver` is, because what was remembered at `used` has led nowhere, and says whether another try
    /// makes sense. It is asked for at most once a second, for all requests together; with `waits`, until it may be.
    pub async fn look_again(&self, homeserver: &Homeserver, caller: &Caller<'_>, used: Instant, waits: bool) -> bool {
        let (queueing, queued) = (queueing(homeserver, caller), Notify::new());
        let attempt = Attempt::new(homeserver.who(now()), caller.budget, &queued, Some(queueing));
        let looking = Box::pin(homeserver.look_again(&self.dialer, used, waits, &attempt));
        match timeout_at(caller.deadline, looking).await {
            Ok(Ok(link)) => link.is_some(),
            // The next try tells.
            Ok(Err(_)) => true,
            Err(_) => {
                homeserver.is_missed();
                false
            }
        }
    }

    fn is_listed(&self, server: &ServerName) -> bool {
        self.listed.names(server) || self.also_listed.contains(server) || self.dialer.overrides.contains_key(server)
    }
}

/// Times for waiting in turn: a request with less time left than an answer usually needs would only waste a turn.
fn queueing(homeserver: &Homeserver, caller: &Caller<'_>) -> Queueing {
    let usual = homeserver.usual().max(MIN_REMAINING);
    Queueing {
        client: caller.client,
        until: caller.deadline.checked_sub(usual).unwrap_or(caller.deadline),
    }
}
