//! Where the requests for one server name go, and a client that goes there and nowhere else.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use parking_lot::Mutex;
use rustls::pki_types::ServerName as TlsName;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;
use url::Url;

use super::dial::{Attempt, Dialer, Dialled, Place, Stream};
use super::failure::Failure;
use super::pool::{Keep, Open, Share};
use crate::admission::Group;
use crate::dns::{self, DnsError, SrvTarget};
use crate::secret::Secret;
use crate::server_name::Host;

pub(super) const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("lk-jwt-service/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// A look-up that failed is made again after this time.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(1);
/// Federation port where nothing else is said.
const DEFAULT_PORT: u16 = 8448;

/// How to find the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Via {
    /// A host and a port.
    Fixed(Host, u16),
    /// The SRV records of a name; without any, the name itself at port 8448. Asked anew for each connection.
    Srv(Box<str>),
}

/// Specification of a connection to one server name: address, TLS name and Host header.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Route {
    pub(super) via: Via,
    /// Value of the `Host` header.
    pub(super) host_header: HeaderValue,
    /// In front of the request's path; only overrides have one.
    pub(super) base_path: String,
    /// Name for SNI and the certificate; plain HTTP (overrides only) without it.
    pub(super) tls_name: Option<TlsName<'static>>,
    pub(super) dialled: Dialled,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status of the answer.
    pub status: StatusCode,
    /// Headers of the answer.
    pub headers: HeaderMap,
    /// Body of the answer, complete.
    pub body: Bytes,
    /// From the request's first byte to the answer's last.
    pub took: Duration,
}

impl Route {
    /// To an address that is written as a URL.
    pub(super) fn to_url(url: &Url, dialled: Dialled) -> Result<Self, Failure> {
        let host = host_of(url).ok_or(Failure::NoClientApi("the address has no host"))?;
        let tls = url.scheme() == "https";
        Ok(Self {
            tls_name: if tls { Some(tls_name(&host)?) } else { None },
            via: Via::Fixed(host, url.port_or_known_default().unwrap_or(DEFAULT_PORT)),
            host_header: host_header(&url[url::Position::BeforeHost..url::Position::AfterPort])?,
            base_path: url.path().trim_end_matches('/').to_owned(),
            dialled,
        })
    }

    /// The host that requests name.
    pub(super) fn host(&self) -> &str {
        // Made of text.
        self.host_header.to_str().unwrap_or_default()
    }

    /// The machines that will be dialled first.
    async fn group(&self, dialer: &Dialer, attempt: &Attempt<'_>) -> Result<Group, Failure> {
        match &self.via {
            Via::Fixed(host, port) => dialer.group(host, *port, self.dialled, attempt).await,
            Via::Srv(name) => {
                let targets = srv(dialer, name, attempt).await.unwrap_or_default();
                let first = dns::order(targets, |_| 0).into_iter().find(|target| !target.host.is_empty());
                let (host, port) = first.map_or_else(|| (name.clone(), DEFAULT_PORT), |target| (target.host.into(), target.port));
                dialer.group(&Host::Name(host), port, self.dialled, attempt).await
            }
        }
    }

    pub(super) async fn connect<'d>(&self, dialer: &'d Dialer, attempt: &Attempt<'d>) -> Result<(Stream, Place<'d>), Failure> {
        match &self.via {
            Via::Fixed(host, port) => dialer.open(host, *port, self.dialled, self.tls_name.as_ref(), attempt).await,
            Via::Srv(name) => self.connect_by_srv(dialer, name, attempt).await,
        }
    }

    async fn connect_by_srv<'d>(&self, dialer: &'d Dialer, name: &str, attempt: &Attempt<'d>) -> Result<(Stream, Place<'d>), Failure> {
        let Ok(records) = srv(dialer, name, attempt).await else {
            return dialer
                .open(
                    &Host::Name(name.into()),
                    DEFAULT_PORT,
                    self.dialled,
                    self.tls_name.as_ref(),
                    attempt,
                )
                .await;
        };
        let mut last = None;
        for target in dns::order(records, |below| rand::random_range(0..below)) {
            if target.host.is_empty() {
                continue;
            }
            match dialer
                .open(
                    &Host::Name(target.host.into()),
                    target.port,
                    self.dialled,
                    self.tls_name.as_ref(),
                    attempt,
                )
                .await
            {
                Ok(stream) => return Ok(stream),
                Err(Failure::Spent) => return Err(last.unwrap_or(Failure::Spent)),
                Err(failure) => last = Some(failure),
            }
        }
        Err(last.unwrap_or_else(|| Failure::NoService(name.to_owned())))
    }
}

/// The SRV records of a server name.
async fn srv(dialer: &Dialer, name: &str, attempt: &Attempt<'_>) -> Result<Vec<SrvTarget>, DnsError> {
    let asker = attempt.asker();
    let records = dialer.dns.srv_for(&format!("_matrix-fed._tcp.{name}"), &asker).await;
    if matches!(records, Err(DnsError::NotFound)) {
        return dialer.dns.srv_for(&format!("_matrix._tcp.{name}"), &asker).await;
    }
    records
}

/// A route with its pooled connections.
pub(super) struct Link {
    pub(super) route: Arc<Route>,
    share: Share,
    /// The machines that were dialled last, or will be first.
    group: Mutex<Option<Group>>,
    /// Held by the one request that looks them up, with when that last failed.
    looking_up: AsyncMutex<Option<Instant>>,
    /// Answers of DNS from before this moment do not count: they led to somebody else.
    since: Mutex<Option<Instant>>,
}

impl Link {
    /// Makes the link; no address is dialled before the first request.
    pub(super) fn new(dialer: &Dialer, route: Arc<Route>) -> Self {
        Self {
            share: dialer.pool.share(),
            route,
            group: Mutex::new(None),
            looking_up: AsyncMutex::default(),
            since: Mutex::default(),
        }
    }

    /// Marks the open connections as doubtful, or notes at `now` that no server is there: DNS is asked past its memory, and
    /// everybody goes there by a new connection.
    pub(super) fn doubt(&self, now: Instant) {
        *self.since.lock() = Some(now);
        *self.group.lock() = None;
        self.share.renew();
    }

    /// The machines that were dialled last.
    pub(super) fn group(&self) -> Option<Group> {
        *self.group.lock()
    }

    /// Sends one GET; redirects are answers like any other.
    pub(super) async fn get<'a>(
        &self,
        dialer: &'a Dialer,
        path_and_query: &str,
        limit: usize,
        attempt: &Attempt<'a>,
    ) -> Result<Reply, Failure> {
        self.ask(dialer, &Ask::get(path_and_query), limit, attempt).await
    }

    /// Sends one request; redirects are answers like any other.
    pub(super) async fn ask<'a>(&self, dialer: &'a Dialer, ask: &Ask<'_>, limit: usize, attempt: &Attempt<'a>) -> Result<Reply, Failure> {
        let keep = Keep::of(attempt.who.class);
        let share = self.share.key();
        attempt.asks_since(*self.since.lock());
        // A place first: while one waits for it, somebody else may have done with a connection.
        let group = match self.share.group().or_else(|| self.group()) {
            Some(group) => Some(group),
            None => self.look_group_up(dialer, attempt).await,
        };
        // Where nobody can say who will be dialled, the dialling does.
        let place = match group {
            Some(group) => Some(dialer.place(group, attempt).await?),
            None => None,
        };
        if let Some(mut connection) = self.share.take() {
            match connection.exchange(ask.request(&self.route)?, limit).await {
                Ok(reply) => {
                    self.share.put(share, connection, keep);
                    return Ok(reply);
                }
                // It was closed while nobody looked.
                Err(unanswered) if unanswered.again => {}
                Err(unanswered) => return Err(unanswered.failure),
            }
        }
        attempt.hold(place);
        let (mut connection, _place) = self.connect(dialer, attempt).await?;
        let answered = connection.exchange(ask.request(&self.route)?, limit).await;
        let reply = answered.map_err(|unanswered| unanswered.failure)?;
        self.share.put(share, connection, keep);
        Ok(reply)
    }

    /// The machines that will be dialled first: one request looks them up for all.
    async fn look_group_up(&self, dialer: &Dialer, attempt: &Attempt<'_>) -> Option<Group> {
        let mut failed = self.looking_up.lock().await;
        if let Some(group) = self.group() {
            return Some(group);
        }
        if failed.is_some_and(|failed| failed.elapsed() < LOOKUP_INTERVAL) {
            return None;
        }
        let group = Box::pin(self.route.group(dialer, attempt)).await.ok();
        *failed = group.is_none().then(Instant::now);
        *self.group.lock() = group;
        group
    }

    /// A new connection, or one that somebody else has done with while we wait for our turn to dial.
    async fn connect<'a>(&self, dialer: &'a Dialer, attempt: &Attempt<'a>) -> Result<(Box<Open>, Place<'a>), Failure> {
        // Seldom, and larger than all the rest.
        let connecting = Box::pin(Open::new(&dialer.pool, self.route.connect(dialer, attempt)));
        let returned = async {
            attempt.queued.notified().await;
            self.share.returned().await
        };
        let (connection, place) = tokio::select! {
            connected = connecting => connected?,
            connection = returned => {
                let place = dialer.place(connection.group(), attempt).await?;
                (connection, place)
            }
        };
        *self.group.lock() = Some(connection.group());
        Ok((connection, place))
    }
}

/// A request along a route.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) path_and_query: &'a str,
    pub(super) token: Option<&'a Secret>,
    pub(super) json: Option<Bytes>,
}

impl<'a> Ask<'a> {
    pub(super) fn get(path_and_query: &'a str) -> Self {
        Self {
            method: Method::GET,
            path_and_query,
            token: None,
            json: None,
        }
    }

    pub(super) fn request(&self, route: &Route) -> Result<Request<Full<Bytes>>, Failure> {
        let broken = |error: http::Error| Failure::Http(error.to_string());
        let path = [&route.base_path, self.path_and_query].concat();
        let mut request = Request::new(Full::new(self.json.clone().unwrap_or_default()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::try_from(path).map_err(|error| broken(error.into()))?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, route.host_header.clone());
        headers.insert(header::USER_AGENT, USER_AGENT);
        if let Some(token) = self.token {
            let mut bearer = HeaderValue::try_from(["Bearer ", token.expose()].concat()).map_err(|error| broken(error.into()))?;
            bearer.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, bearer);
        }
        if self.json.is_some() {
            headers.insert(header::CONTENT_TYPE, JSON);
        }
        Ok(request)
    }
}

/// Sends a GET over a connection of its own, closed afterwards.
pub(super) async fn fetch_once<'a>(
    dialer: &'a Dialer,
    route: &Route,
    path_and_query: &str,
    limit: usize,
    attempt: &Attempt<'a>,
) -> Result<Reply, Failure> {
    let request = Ask::get(path_and_query).request(route)?;
    let (mut connection, _place) = Open::new(&dialer.pool, route.connect(dialer, attempt)).await?;
    connection.exchange(request, limit).await.map_err(|unanswered| unanswered.failure)
}

/// The value of a `Host` header.
pub(super) fn host_header(host: &str) -> Result<HeaderValue, Failure> {
    HeaderValue::from_str(host).map_err(|error| Failure::Http(error.to_string()))
}

/// The host of a URL, in our terms.
pub(super) fn host_of(url: &Url) -> Option<Host> {
    match url.host()? {
        url::Host::Domain(domain) => Some(Host::Name(domain.into())),
        url::Host::Ipv4(ip) => Some(Host::Ip(ip.into())),
        url::Host::Ipv6(ip) => Some(Host::Ip(ip.into())),
    }
}

/// The name that a certificate of `host` must carry.
pub(super) fn tls_name(host: &Host) -> Result<TlsName<'static>, Failure> {
    match host {
        Host::Ip(ip) => Ok(TlsName::IpAddress((*ip).into())),
        Host::Name(name) => TlsName::try_from(name.trim_end_matches('.').to_owned()).map_err(|error| Failure::Tls {
            target: name.to_string(),
            error: error.to_string(),
        }),
    }
}
