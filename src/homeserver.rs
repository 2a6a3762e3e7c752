//! A homeserver's client-server API: where it is, and what it offers.
//!
//! * `homeserver/versions.rs` which paths it offers (decisions L7 and A4)
//! * `homeserver/delayed_events.rs` managing delayed events (MSC4140): one call is one attempt; when to try again is
//!   decided in `delayed_leave/`
//! * `homeserver/own.rs` the homeserver that this service belongs to, and all that takes the `as_token`;
//!   `homeserver/question_limiter.rs` whose question is put to it next
#![expect(clippy::disallowed_methods, reason = "an adapter: asks, waits and remembers")]

mod delayed_events;
mod own;
mod question_limiter;
mod versions;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{StatusCode, header};
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

pub use own::{OwnError, OwnHomeserver, Relayed, Subject};

use crate::admission::Class;
use crate::federation::{BaseUrl, ClientApi, Failure, Federation, Next, Rediscovery, Reply};
use crate::log_throttle::LogThrottle;
use crate::retry;
use crate::secret::Secret;
use crate::server_name::ServerName;
use crate::wire::errcode;
use versions::Offers;

/// How many are remembered, and how many more where they have delegated leaves.
const MAX_UNUSED: usize = 2048;
const MAX_HOMESERVERS: usize = 2 * MAX_UNUSED;
/// How many of those longest not used are looked through for one that may be forgotten.
const MAX_LOOKED_THROUGH: usize = 64;
const VERSIONS: &str = "/_matrix/client/versions";
const MAX_REPLY_BYTES: usize = 64 * 1024;
/// The longest address in bytes: homeservers choose it, and it is kept.
const MAX_BASE_URL_BYTES: usize = 2 * 1024;
const VERSIONS_TIMEOUT: Duration = Duration::from_secs(4);
const VERSIONS_LIFE: Duration = Duration::from_secs(3600);
const VERSIONS_FAILURE_LIFE: Duration = Duration::from_secs(60);
/// How long an old address is used before the well-known file is asked again.
const FAILURE_LIFE: Duration = Duration::from_secs(60);
/// How long a failure to find any address is believed.
const SHARED_FAILURE_LIFE: Duration = Duration::from_secs(1);

/// The client-server APIs of all homeservers.
pub struct Homeservers {
    federation: Arc<Federation>,
    overrides: BTreeMap<ServerName, Url>,
    table: Mutex<LruCache<ServerName, Arc<AsyncMutex<Known>>>>,
    has_leaves: OnceLock<HasLeaves>,
    lost: LogThrottle,
    denied: LogThrottle,
}

/// Whether a homeserver has delegated leaves.
pub type HasLeaves = Box<dyn Fn(&str) -> bool + Send + Sync>;

#[derive(Default)]
struct Known {
    api: Option<(Arc<ClientApi>, Url)>,
    /// Until when the address may be believed; for ever where the operator wrote it down.
    until: Option<Instant>,
    offers: Option<(Offers, Instant)>,
    /// When that was last thought to be out of date.
    doubted: Option<Instant>,
    rediscovery: Rediscovery,
    /// Until when a failure to find the address is not tried again.
    failed: Option<(Instant, Failure)>,
}

/// A call below the API of a homeserver, on whichever of two paths it has.
struct Call<'a> {
    /// Rest of the path, behind either beginning.
    tail: &'a str,
    token: Option<&'a Secret>,
    /// POSTs this; without it, the call is a GET.
    json: Option<Bytes>,
    limit: usize,
}

impl Homeservers {
    /// Makes the adapter, with the addresses of `LIVEKIT_CS_API_URL_OVERRIDES`.
    #[must_use]
    pub fn new(federation: Arc<Federation>, overrides: BTreeMap<ServerName, Url>) -> Self {
        Self {
            federation,
            overrides,
            table: Mutex::new(LruCache::unbounded()),
            has_leaves: OnceLock::new(),
            lost: LogThrottle::once_a_minute(),
            denied: LogThrottle::once_a_minute(),
        }
    }

    /// Other names do not push out a homeserver that has delegated leaves: its address must be at hand when one is due.
    pub fn keep_those_with_leaves(&self, has_leaves: HasLeaves) {
        // Set once, by the driver.
        let _ = self.has_leaves.set(has_leaves);
    }

    /// A participant of the homeserver of that name was seen on the SFU.
    pub fn has_participant(&self, server: &str) {
        if let Ok(server) = ServerName::parse(server) {
            self.federation.has_participant(&server);
        }
    }

    /// How well the homeserver of that name is known, if it is a name.
    #[must_use]
    pub fn class(&self, server: &str) -> Class {
        ServerName::parse(server).map_or(Class::Stranger, |server| self.federation.class(&server))
    }

    /// Finds the API of `server`; what may pass is tried again until `deadline`.
    ///
    /// # Errors
    /// When it cannot be found.
    pub async fn resolve(&self, server: &ServerName, deadline: Instant) -> Result<(), Failure> {
        self.resolve_for(server, false, deadline).await
    }

    /// Whether the homeserver answers within that time, by what is known of where it is.
    pub async fn answers(&self, server: &ServerName, within: Duration) -> bool {
        let asked = async {
            let (api, _) = self.api(server).await.ok()?;
            api.get(VERSIONS, None, MAX_REPLY_BYTES).await.ok()
        };
        matches!(timeout(within, asked).await, Ok(Some(reply)) if reply.status == StatusCode::OK)
    }

    /// Finds the API of `server` for calls with the `as_token`, or without.
    async fn resolve_for(&self, server: &ServerName, with_token: bool, deadline: Instant) -> Result<(), Failure> {
        let find = || async {
            let found = timeout_at(deadline, self.api_for(server, with_token)).await;
            found.unwrap_or(Err(Failure::Timeout)).map(|_| ())
        };
        retry::until(deadline, find).await
    }

    async fn api(&self, server: &ServerName) -> Result<(Arc<ClientApi>, Offers), Failure> {
        let entry = self.known(server);
        let mut known = entry.lock().await;
        let api = self.client_api(server, &entry, &mut known).await?;
        let now = Instant::now();
        let offers = match known.offers {
            Some((offers, until)) => {
                if now >= until {
                    // What was true an hour ago will do meanwhile: a restart that is due must not wait for it.
                    known.offers = Some((offers, now + VERSIONS_FAILURE_LIFE));
                    tokio::spawn(refresh(api.clone(), entry.clone()));
                }
                offers
            }
            None => match versions(&api).await {
                Ok((offers, life)) => {
                    known.offers = Some((offers, Instant::now() + life));
                    offers
                }
                Err(failure) => {
                    // It is as if no address had been found: the file may be corrected.
                    known.api = None;
                    known.failed = Some((Instant::now() + SHARED_FAILURE_LIFE, failure.clone()));
                    return Err(failure);
                }
            },
        };
        Ok((api, offers))
    }

    /// The API for a call with the `as_token`, or without: with it, an address that nobody wrote down has to be https.
    async fn api_for(&self, server: &ServerName, with_token: bool) -> Result<(Arc<ClientApi>, Offers), Failure> {
        let (api, offers) = self.api(server).await?;
        if with_token && !api.may_carry_secrets() {
            self.may_be_corrected(server).await;
            return Err(Failure::NoClientApi("its address is http, over which the as_token is not sent"));
        }
        Ok((api, offers))
    }

    async fn client_api(&self, server: &ServerName, entry: &Arc<AsyncMutex<Known>>, known: &mut Known) -> Result<Arc<ClientApi>, Failure> {
        let now = Instant::now();
        if let Some((api, _)) = &known.api {
            // What was true an hour ago will do meanwhile.
            if known.until.is_some_and(|until| now >= until) && known.rediscovery.is_due(now) {
                known.rediscovery.asked(now);
                self.rediscover(server, entry, None);
            }
            return Ok(api.clone());
        }
        if let Some(url) = self.overrides.get(server) {
            let api = Arc::new(self.federation.client_api(server, url, true)?);
            known.api = Some((api.clone(), url.clone()));
            return Ok(api);
        }
        // All who wait for the file share its failure, too.
        if let Some((_, failure)) = known.failed.as_ref().filter(|(until, _)| now < *until) {
            return Err(failure.clone());
        }
        let found = Box::pin(find(&self.federation, server, None)).await;
        let now = Instant::now();
        known.rediscovery.asked(now);
        let api = found.and_then(|base| {
            let api = Arc::new(self.federation.client_api(server, &base.url, false)?);
            known.until = Some(now + base.life);
            known.offers = None;
            known.api = Some((api.clone(), base.url));
            Ok(api)
        });
        known.failed = api.as_ref().err().map(|failure| (now + SHARED_FAILURE_LIFE, failure.clone()));
        api
    }

    /// Makes a call on one of the two paths. Where what answers is no homeserver, it is looked for anew (decision O2): in the
    /// background, since whoever calls tries again.
    async fn ask(&self, server: &ServerName, api: &Arc<ClientApi>, call: &Call<'_>, path: &str) -> Result<Reply, Failure> {
        let used = Instant::now();
        let answer = call.at(api, path).await;
        let is_elsewhere = match &answer {
            Ok(reply) => reply.status != StatusCode::TOO_MANY_REQUESTS && !is_object(&reply.body),
            Err(failure) => failure.may_be_elsewhere(),
        };
        if is_elsewhere {
            Box::pin(self.look_again(server, api, used)).await;
        }
        answer
    }

    /// Finds anew where the API of `server` is, because what was used from `used` on has led nowhere: at most once a second.
    async fn look_again(&self, server: &ServerName, api: &Arc<ClientApi>, used: Instant) {
        let entry = self.known(server);
        let now = Instant::now();
        let mut known = entry.lock().await;
        match known.rediscovery.next(used, now) {
            Next::GiveUp | Next::Use | Next::Wait(_) => return,
            Next::Doubt => {
                known.rediscovery.doubted(now);
                api.doubt();
                return;
            }
            Next::Ask => known.rediscovery.asked_again(now),
        }
        api.doubt();
        self.rediscover(server, &entry, Some(now));
    }

    /// Reads the file again where its address cannot be used: it may have been corrected.
    async fn may_be_corrected(&self, server: &ServerName) {
        let entry = self.known(server);
        let mut known = entry.lock().await;
        let now = Instant::now();
        if known.rediscovery.is_due(now) {
            known.rediscovery.asked(now);
            self.rediscover(server, &entry, Some(now));
        }
    }

    /// Asks the file in the background, unless the operator wrote the address down.
    fn rediscover(&self, server: &ServerName, entry: &Arc<AsyncMutex<Known>>, since: Option<Instant>) {
        if !self.overrides.contains_key(server) {
            tokio::spawn(rediscover(self.federation.clone(), server.clone(), entry.clone(), since));
        }
    }

    /// Asks again in the background which versions the homeserver offers: it may have been updated. One that stays as it is must
    /// not be asked for every call.
    async fn doubt_versions(&self, server: &ServerName, api: &Arc<ClientApi>) {
        let entry = self.known(server);
        let mut known = entry.lock().await;
        let now = Instant::now();
        if known.doubted.is_none_or(|doubted| now >= doubted + VERSIONS_FAILURE_LIFE) {
            known.doubted = Some(now);
            tokio::spawn(refresh(api.clone(), entry.clone()));
        }
    }

    fn known(&self, server: &ServerName) -> Arc<AsyncMutex<Known>> {
        let mut table = self.table.lock();
        // Who is asked for leaves takes a lock of its own, and never comes here under it.
        if !table.contains(server) {
            make_room(&mut table, |name| self.has_leaves.get().is_some_and(|has_leaves| has_leaves(name)));
        }
        table.get_or_insert(server.clone(), Arc::default).clone()
    }
}

impl Call<'_> {
    async fn at(&self, api: &ClientApi, path: &str) -> Result<Reply, Failure> {
        let path = format!("{path}{}", self.tail);
        match &self.json {
            None => api.get(&path, self.token, self.limit).await,
            Some(json) => api.post(&path, self.token, json.clone(), self.limit).await,
        }
    }
}

/// Makes room for one more in the table. Of those that were not used for longest, the first without leaves goes.
fn make_room<V>(table: &mut LruCache<ServerName, V>, has_leaves: impl Fn(&str) -> bool) {
    for _ in 0..MAX_LOOKED_THROUGH {
        if table.len() < MAX_UNUSED {
            return;
        }
        let Some((name, value)) = table.pop_lru() else { return };
        if !has_leaves(name.as_str()) {
            return;
        }
        table.push(name, value);
    }
    if table.len() >= MAX_HOMESERVERS {
        table.pop_lru();
    }
}

/// Where the well-known file says that the API of `server` is; the https address, where the http one only leads there.
async fn find(federation: &Federation, server: &ServerName, since: Option<Instant>) -> Result<BaseUrl, Failure> {
    let mut base = federation.client_base_url(server, since).await?;
    let is_short = |url: &Url| url.as_str().len() <= MAX_BASE_URL_BYTES;
    if !is_short(&base.url) {
        return Err(Failure::NoClientApi("its address is too long"));
    }
    if base.url.scheme() == "http"
        && let Ok(Some(https)) = timeout(VERSIONS_TIMEOUT, redirect_to_https(federation, server, &base.url)).await
        && is_short(&https)
    {
        base.url = https;
    }
    Ok(base)
}

/// The https address on the same host to which questions below an http one are redirected. Found out before any call: a call is
/// not sent a second time to wherever an answer says, and would meet the redirect for ever.
async fn redirect_to_https(federation: &Federation, server: &ServerName, base: &Url) -> Option<Url> {
    let api = federation.client_api(server, base, false).ok()?;
    let reply = api.get(VERSIONS, None, MAX_REPLY_BYTES).await.ok()?;
    let location = reply.headers.get(header::LOCATION).filter(|_| reply.status.is_redirection())?;
    let mut https = base.join(location.to_str().ok()?).ok()?;
    let below = https.path().strip_suffix(VERSIONS)?.to_owned();
    https.set_path(&below);
    let is_same = https.host_str() == base.host_str() && https.query().is_none() && https.fragment().is_none();
    (https.scheme() == "https" && is_same).then_some(https)
}

/// Finds the API anew in the background, with what is offered there: nobody waits for either. An address that has worked is better
/// than none, and than one that must not be dialled.
async fn rediscover(federation: Arc<Federation>, server: ServerName, entry: Arc<AsyncMutex<Known>>, since: Option<Instant>) {
    let found = async {
        let base = find(&federation, &server, since).await?;
        let before = entry.lock().await.api.as_ref().map(|(_, url)| url.clone());
        if before.as_ref() == Some(&base.url) {
            return Ok((base, None));
        }
        let api = Arc::new(federation.client_api(&server, &base.url, false)?);
        let (offers, life) = versions(&api).await?;
        Ok((base, Some((api, offers, life))))
    };
    let found: Result<_, Failure> = found.await;
    let mut known = entry.lock().await;
    match found {
        Ok((base, moved)) => {
            let now = Instant::now();
            known.until = Some(now + base.life);
            if let Some((api, offers, life)) = moved {
                known.api = Some((api, base.url));
                known.offers = Some((offers, now + life));
            }
        }
        Err(failure) => {
            let (server, reason) = (server.as_str(), failure.to_string());
            tracing::debug!(server, reason, "going on with the former address of the client-server API");
            known.until = Some(Instant::now() + FAILURE_LIFE);
        }
    }
}

async fn refresh(api: Arc<ClientApi>, entry: Arc<AsyncMutex<Known>>) {
    let asked = versions(&api).await;
    let mut known = entry.lock().await;
    // An answer that says nothing is no reason to forget one that said something.
    if let Ok((offers, life)) = asked
        && !offers.is_empty()
    {
        known.offers = Some((offers, Instant::now() + life));
    }
}

async fn versions(api: &ClientApi) -> Result<(Offers, Duration), Failure> {
    match timeout(VERSIONS_TIMEOUT, api.get(VERSIONS, None, MAX_REPLY_BYTES)).await {
        Ok(Ok(reply)) if reply.status == StatusCode::OK => Ok((Offers::read(&reply.body), VERSIONS_LIFE)),
        // Nobody will ever be called there (decision O5): said now, while there is somebody to hear it.
        Ok(Err(failure @ Failure::AddressDenied { .. })) => Err(failure),
        // The call itself will tell whether the homeserver is there.
        Ok(Ok(_) | Err(_)) | Err(_) => Ok((Offers::default(), VERSIONS_FAILURE_LIFE)),
    }
}

/// Whether the body begins as a JSON object does: all that a homeserver says is one.
fn is_object(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

/// Whether the body is an error of Matrix with this code.
fn is_error(body: &[u8], code: &str) -> bool {
    errcode(body).is_some_and(|errcode| errcode == code)
}

/// Text as one segment of a path, whatever is in it.
pub(crate) fn segment(text: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut segment = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            segment.push(char::from(byte));
        } else {
            segment.push('%');
            segment.push(char::from(HEX[usize::from(byte >> 4)]));
            segment.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(table: &mut LruCache<ServerName, ()>, name: &str, has_leaves: impl Fn(&str) -> bool) {
        make_room(table, has_leaves);
        table.push(ServerName::parse(name).unwrap(), ());
    }

    /// B21: 2,048 other names pushed out a homeserver whose leaves were due.
    #[test]
    fn other_names_do_not_push_out_a_homeserver_that_has_leaves() {
        let mut table = LruCache::unbounded();
        let has_leaves = |name: &str| name.starts_with("call");
        (0..100).for_each(|n| enter(&mut table, &format!("call{n}.example"), has_leaves));
        (0..10_000).for_each(|n| enter(&mut table, &format!("other{n}.example"), has_leaves));
        assert_eq!(table.iter().filter(|(name, ())| has_leaves(name.as_str())).count(), 100);
        assert!(table.len() <= MAX_UNUSED + MAX_LOOKED_THROUGH, "{}", table.len());
        (0..10_000).for_each(|n| enter(&mut table, &format!("many{n}.example"), |_| true));
        assert_eq!(table.len(), MAX_HOMESERVERS);
    }
}
