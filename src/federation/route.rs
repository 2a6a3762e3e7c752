//! Where the requests for one server name go, and a client that goes there and nowhere else.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::InvalidUri;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::ServerName as TlsName;
use tower::Service;
use url::Url;

use super::dial::{Dialer, Dialled, Stream, chain};
use super::failure::Failure;
use super::pace::Pace;
use crate::dns::{self, DnsError};
use crate::secret::Secret;
use crate::server_name::Host;

const USER_AGENT: &str = concat!("lk-jwt-service/", env!("CARGO_PKG_VERSION"));
/// Federation port where nothing else is said.
const DEFAULT_PORT: u16 = 8448;
/// Longest head of an answer.
const MAX_HEAD: usize = 32 * 1024;

/// How to find the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Via {
    /// A host and a port.
    Fixed(Host, u16),
    /// The SRV records of a name; without any, the name itself at port 8448. Asked anew for each connection.
    Srv(Box<str>),
}

/// Everything that the specification fixes about a connection to one server name.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Route {
    pub(super) via: Via,
    /// `Host` header.
    pub(super) host_header: String,
    /// In front of the request's path; only overrides have one.
    pub(super) base_path: String,
    /// Name for SNI and the certificate; plain HTTP (overrides only) without it.
    pub(super) tls_name: Option<TlsName<'static>>,
    pub(super) dialled: Dialled,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, complete.
    pub body: Bytes,
}

impl Route {
    /// To an address that is written as a URL.
    pub(super) fn to_url(url: &Url, dialled: Dialled) -> Result<Self, Failure> {
        let host = host_of(url).ok_or(Failure::NoClientApi("the address has no host"))?;
        let tls = url.scheme() == "https";
        Ok(Self {
            tls_name: if tls { Some(tls_name(&host)?) } else { None },
            via: Via::Fixed(host, url.port_or_known_default().unwrap_or(DEFAULT_PORT)),
            host_header: url[url::Position::BeforeHost..url::Position::AfterPort].to_owned(),
            base_path: url.path().trim_end_matches('/').to_owned(),
            dialled,
        })
    }

    async fn connect(&self, dialer: &Dialer) -> Result<Stream, Failure> {
        match &self.via {
            Via::Fixed(host, port) => dialer.open(host, *port, self.dialled, self.tls_name.as_ref()).await,
            Via::Srv(name) => self.connect_by_srv(dialer, name).await,
        }
    }

    async fn connect_by_srv(&self, dialer: &Dialer, name: &str) -> Result<Stream, Failure> {
        let mut records = dialer.dns.srv(&format!("_matrix-fed._tcp.{name}")).await;
        if matches!(records, Err(DnsError::NotFound)) {
            records = dialer.dns.srv(&format!("_matrix._tcp.{name}")).await;
        }
        let Ok(records) = records else {
            return dialer
                .open(&Host::Name(name.into()), DEFAULT_PORT, self.dialled, self.tls_name.as_ref())
                .await;
        };
        let mut last = Failure::NoService(name.to_owned());
        for target in dns::order(records, |below| rand::random_range(0..below)) {
            if target.host.is_empty() {
                continue;
            }
            match dialer
                .open(&Host::Name(target.host.into()), target.port, self.dialled, self.tls_name.as_ref())
                .await
            {
                Ok(stream) => return Ok(stream),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }
}

/// Opens connections along one route; the URL it is given is not looked at.
#[derive(Clone)]
pub(super) struct Connector {
    dialer: Arc<Dialer>,
    route: Arc<Route>,
    pace: Arc<Pace>,
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { dialer, route, pace } = self.clone();
        Box::pin(async move {
            pace.wait().await;
            route.connect(&dialer).await
        })
    }
}

/// A route with its pooled connections.
pub(super) struct Link {
    pub(super) route: Arc<Route>,
    client: Client<Connector, Full<Bytes>>,
}

impl Link {
    /// Keeps up to `idle` unused connections for half a minute.
    pub(super) fn new(dialer: Arc<Dialer>, route: Arc<Route>, pace: Arc<Pace>, idle: usize) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(idle)
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_timer(TokioTimer::new())
            .http1_max_buf_size(MAX_HEAD)
            .build(Connector {
                dialer,
                route: route.clone(),
                pace,
            });
        Self { route, client }
    }

    /// Sends one GET; redirects are answers like any other.
    pub(super) async fn get(&self, path_and_query: &str, limit: usize) -> Result<Reply, Failure> {
        self.ask(&Ask::get(path_and_query), limit).await
    }

    /// Sends one request; redirects are answers like any other.
    pub(super) async fn ask(&self, ask: &Ask<'_>, limit: usize) -> Result<Reply, Failure> {
        let request = ask.request(&self.route)?;
        let response = self.client.request(request).await.map_err(|error| cause(&error))?;
        collect(response, limit).await
    }
}

/// One request along a route.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) path_and_query: &'a str,
    pub(super) token: Option<&'a Secret>,
    pub(super) json: Option<Bytes>,
}

impl<'a> Ask<'a> {
    fn get(path_and_query: &'a str) -> Self {
        Self {
            method: Method::GET,
            path_and_query,
            token: None,
            json: None,
        }
    }

    fn request(&self, route: &Route) -> Result<Request<Full<Bytes>>, Failure> {
        let broken = |error: http::Error| Failure::Http(error.to_string());
        let scheme = if route.tls_name.is_some() { "https" } else { "http" };
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(format!(
                "{scheme}://{}{}{}",
                route.host_header, route.base_path, self.path_and_query
            ))
            .header(header::HOST, &route.host_header)
            .header(header::USER_AGENT, USER_AGENT);
        if let Some(token) = self.token {
            let mut bearer = HeaderValue::try_from(format!("Bearer {}", token.expose())).map_err(|error| broken(error.into()))?;
            bearer.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, bearer);
        }
        if self.json.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(self.json.clone().unwrap_or_default())).map_err(broken)
    }
}

/// One GET over a connection of its own, closed afterwards.
pub(super) async fn fetch_once(dialer: &Dialer, route: &Route, path_and_query: &str, limit: usize) -> Result<Reply, Failure> {
    let mut request = Ask::get(path_and_query).request(route)?;
    // At this level nobody makes it the path that servers expect.
    *request.uri_mut() = path_and_query
        .parse()
        .map_err(|error: InvalidUri| Failure::Http(error.to_string()))?;
    let stream = route.connect(dialer).await?;
    let http = |error: hyper::Error| Failure::Http(chain(&error));
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(stream)
        .await
        .map_err(http)?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(http)?;
        collect(response, limit).await
    };
    tokio::pin!(exchange);
    tokio::select! {
        reply = &mut exchange => reply,
        // The connection may end first, with the whole answer already read.
        _ = connection => exchange.await,
    }
}

async fn collect(response: http::Response<hyper::body::Incoming>, limit: usize) -> Result<Reply, Failure> {
    let (head, body) = response.into_parts();
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(Reply {
            status: head.status,
            headers: head.headers,
            body: body.to_bytes(),
        }),
        Err(error) if error.is::<LengthLimitError>() => Err(Failure::TooLarge(limit)),
        Err(error) => Err(Failure::Http(error.to_string())),
    }
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

/// The failure of our own connector, or what the HTTP library says. Its text never holds the URL.
fn cause(error: &hyper_util::client::legacy::Error) -> Failure {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(failure) = inner.downcast_ref::<Failure>() {
            return failure.clone();
        }
        source = inner.source();
    }
    Failure::Http(chain(error))
}
