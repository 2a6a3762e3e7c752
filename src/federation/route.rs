//! Where the requests for one server name go, and a client that goes there and nowhere else.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::ServerName as TlsName;
use tower::Service;

use super::dial::{Dialer, Dialled, Stream, chain};
use super::failure::Failure;
use super::pace::Pace;
use crate::dns::{self, DnsError};
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
    client: Client<Connector, Empty<Bytes>>,
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
        let request = get(&self.route, path_and_query)?;
        let response = self.client.request(request).await.map_err(|error| cause(&error))?;
        collect(response, limit).await
    }
}

/// One GET over a connection of its own, closed afterwards.
pub(super) async fn fetch_once(dialer: &Dialer, route: &Route, path_and_query: &str, limit: usize) -> Result<Reply, Failure> {
    let request = get(route, path_and_query)?;
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

fn get(route: &Route, path_and_query: &str) -> Result<Request<Empty<Bytes>>, Failure> {
    let scheme = if route.tls_name.is_some() { "https" } else { "http" };
    let mut request = Request::get(format!("{scheme}://{}{}{path_and_query}", route.host_header, route.base_path))
        .header(header::USER_AGENT, USER_AGENT)
        .body(Empty::new())
        .map_err(|error| Failure::Http(error.to_string()))?;
    let host = HeaderValue::from_str(&route.host_header).map_err(|error| Failure::Http(error.to_string()))?;
    request.headers_mut().insert(header::HOST, host);
    Ok(request)
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
