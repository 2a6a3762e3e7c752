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
//! * `dial.rs` the only place that dials, with `guard.rs` in front; `pace.rs` how often an address is dialled;
//!   `pool.rs` connections, and answers bounded as they come
//! * `follow.rs` files behind redirects; `client_api.rs` the way to a homeserver's client-server API
//! * `homeservers.rs` what is remembered of each homeserver, bounded
//!
//! Who is who on that homeserver is `openid.rs`.

mod client_api;
mod dial;
mod discovery;
mod failure;
mod follow;
mod guard;
mod homeservers;
mod pace;
mod pool;
mod route;
mod well_known;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use url::Url;

pub use client_api::{BaseUrl, ClientApi};
pub use failure::Failure;
pub use guard::{Guard, Refused, Trust};
pub use route::Reply;

use crate::access::Homeservers;
use crate::admission::budget::Budget;
use crate::admission::{Class, Names};
use crate::dns::Dns;
use crate::hold::TOO_LATE;
use crate::server_name::ServerName;
use crate::tls::Tls;
use dial::Dialer;
use homeservers::{Homeserver, Table};
use pace::Pace;
use pool::Pool;

/// So many refused names are told per time.
const WARNINGS: u32 = 20;
const WARNINGS_PER: Duration = Duration::from_secs(60);

/// What the operator says about homeservers.
pub struct Settings {
    /// Addresses that may be dialled.
    pub guard: Guard,
    /// `LIVEKIT_FEDERATION_URL_OVERRIDES`.
    pub overrides: BTreeMap<ServerName, Url>,
    /// Names that stand in the configuration, besides those of the overrides.
    pub listed: Homeservers,
    /// More names of that kind: our own, and those of the other override list.
    pub also_listed: Vec<ServerName>,
    /// Forward proxies of the environment.
    pub proxies: Matcher,
    /// Requests that may wait for homeservers that are neither listed nor ever verified a token here (decision H7).
    pub strangers_in_flight: usize,
    /// Connections to homeservers, beyond which those that are not in use are closed (decision P14).
    pub connections_out: usize,
}

/// Asks homeservers.
pub struct Federation {
    dialer: Arc<Dialer>,
    overrides: BTreeMap<ServerName, Url>,
    listed: Homeservers,
    also_listed: Vec<ServerName>,
    homeservers: Table,
    strangers: Semaphore,
    told: Mutex<(Option<Instant>, u32)>,
}

impl Federation {
    /// Nothing is asked and nothing is read before the first request.
    #[must_use]
    pub fn new(settings: Settings, dns: Arc<Dns>, tls: Arc<Tls>) -> Self {
        let Settings {
            guard,
            overrides,
            listed,
            also_listed,
            proxies,
            strangers_in_flight,
            connections_out,
        } = settings;
        if proxies.intercept(&Uri::from_static("https://homeserver.invalid/")).is_some() {
            tracing::info!(
                "homeservers are dialled through the forward proxy of HTTPS_PROXY or ALL_PROXY: which private addresses may be reached \
                 behind it is for the proxy to decide"
            );
        }
        Self {
            dialer: Arc::new(Dialer {
                dns,
                guard,
                proxies,
                tls,
                names: Names::default(),
                pace: Pace::default(),
                pool: Pool::new(connections_out),
            }),
            overrides,
            listed,
            also_listed,
            homeservers: Table::new(),
            strangers: Semaphore::new(strangers_in_flight),
            told: Mutex::default(),
        }
    }

    /// Whether `server` is listed or has verified a token here: such a homeserver is waited for.
    pub fn knows(&self, server: &ServerName) -> bool {
        self.is_listed(server) || self.homeservers.knows(server)
    }

    /// How well `server` is known.
    #[must_use]
    pub fn class(&self, server: &ServerName) -> Class {
        if self.is_listed(server) {
            Class::Listed
        } else if self.homeservers.knows(server) {
            Class::Verified
        } else {
            Class::Stranger
        }
    }

    /// `server` has verified a token: from now on it counts as known.
    pub fn has_verified(&self, server: &ServerName) {
        if !self.is_listed(server) {
            self.homeservers.promote(server);
        }
    }

    /// One GET below the federation API of `server`. With `again`, a remembered failure does not count.
    ///
    /// # Errors
    /// When there is no whole answer of at most `limit` bytes before `deadline`.
    pub async fn get(
        &self,
        server: &ServerName,
        path_and_query: &str,
        limit: usize,
        again: bool,
        deadline: Instant,
        budget: &Budget,
    ) -> Result<Reply, Failure> {
        let _slot = if self.knows(server) {
            None
        } else {
            Some(self.strangers.try_acquire().map_err(|_| Failure::Busy)?)
        };
        // Boxed: whoever has not come this far does not carry it.
        let asking = Box::pin(self.ask(server, path_and_query, limit, again, deadline, budget));
        let reply = timeout_at(deadline, asking).await.unwrap_or(Err(Failure::Timeout));
        if let Err(failure @ Failure::Refused { .. }) = &reply {
            self.warn_once(server, failure);
        }
        reply
    }

    /// The first refusal of a name is told, since it may be the operator's own; a flood of names is not.
    fn warn_once(&self, server: &ServerName, failure: &Failure) {
        if !self.homeservers.first_refusal(server) {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if told.0.is_none_or(|since| now > since + WARNINGS_PER) {
            *told = (Some(now), 0);
        }
        told.1 += 1;
        if told.1 <= WARNINGS {
            let (reason, remedy) = (failure.to_string(), failure.remedy());
            tracing::warn!(server = server.as_str(), reason, remedy, "a homeserver's address is not dialled");
        }
    }

    async fn ask(
        &self,
        server: &ServerName,
        path_and_query: &str,
        limit: usize,
        again: bool,
        deadline: Instant,
        budget: &Budget,
    ) -> Result<Reply, Failure> {
        loop {
            let homeserver = self.homeservers.get(server, || self.enlist(server));
            let Some(_turn) = homeserver.turn().await? else {
                // It became known while we waited: there is room for more now.
                continue;
            };
            // When a homeserver hangs, all who wait for it get their turn at once, just before their time is up.
            if Instant::now() + TOO_LATE > deadline {
                return Err(Failure::Timeout);
            }
            let link = homeserver.link(&self.dialer, &self.overrides, again, budget).await?;
            return link.get(path_and_query, limit, budget).await;
        }
    }

    fn enlist(&self, server: &ServerName) -> Homeserver {
        let listed = self.is_listed(server);
        Homeserver::new(server.clone(), if listed { Trust::Listed } else { Trust::Stranger }, listed)
    }

    fn is_listed(&self, server: &ServerName) -> bool {
        self.listed.names(server) || self.also_listed.contains(server) || self.overrides.contains_key(server)
    }
}
