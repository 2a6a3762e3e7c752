//! From a host and a port to a TLS connection: the only place where an address of a homeserver is dialled, and so the
//! place where the guard stands. The address that was checked is the address that is dialled.

use std::convert::Infallible;
use std::future::ready;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_rustls::MaybeHttpsStream;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName as TlsName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower::{ServiceExt as _, service_fn};

use super::failure::Failure;
use super::guard::{Guard, Trust};
use crate::admission::Group;
use crate::dns::Dns;
use crate::server_name::Host;
use crate::tls::Tls;

/// A dead target must leave time for the next one within the ten seconds of a verification.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// An open connection, encrypted or (overrides only) plain.
pub(super) type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Opens connections.
pub(super) struct Dialer {
    pub(super) dns: Arc<Dns>,
    pub(super) guard: Guard,
    pub(super) proxies: Matcher,
    pub(super) tls: Arc<Tls>,
}

impl Dialer {
    /// Connects to `host:port`, and speaks TLS with it where `tls_name` says so.
    pub(super) async fn open(
        &self,
        host: &Host,
        port: u16,
        trust: Dialled,
        tls_name: Option<&TlsName<'static>>,
    ) -> Result<Stream, Failure> {
        let scheme = if tls_name.is_some() { "https" } else { "http" };
        let tcp = self.tcp(scheme, host, port, trust).await?;
        let Some(name) = tls_name else {
            return Ok(MaybeHttpsStream::Http(tcp));
        };
        let failed = |error: String| Failure::Tls {
            target: target(host, port),
            error,
        };
        let config = self.tls.config().map_err(|error| failed(error.to_string()))?;
        match timeout(CONNECT_TIMEOUT, TlsConnector::from(config).connect(name.clone(), TokioIo::new(tcp))).await {
            Ok(Ok(tls)) => Ok(MaybeHttpsStream::Https(TokioIo::new(tls))),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed("the handshake timed out".into())),
        }
    }

    async fn tcp(&self, scheme: &str, host: &Host, port: u16, trust: Dialled) -> Result<TokioIo<TcpStream>, Failure> {
        if let Some(proxy) = uri(scheme, host, port).and_then(|uri| self.proxies.intercept(&uri).map(|proxy| (uri, proxy))) {
            self.check_before_proxy(host, trust).await?;
            return tunnel(proxy.0, &proxy.1, &target(host, port)).await;
        }
        let addresses = self.addresses(host, trust).await?;
        let connect = |error: String| Failure::Connect {
            target: target(host, port),
            error,
        };
        let sockets: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
        // The connector brings "happy eyeballs" (RFC 8305); it never sees the name, only what was checked.
        let mut connector = HttpConnector::new_with_resolver(service_fn(move |_| ready(Ok::<_, Infallible>(sockets.clone().into_iter()))));
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        connector
            .oneshot(Uri::from_static("http://checked"))
            .await
            .map_err(|error| connect(chain(&error)))
    }

    /// The machines that `host` is on.
    pub(super) async fn group(&self, host: &Host, trust: Trust) -> Result<Group, Failure> {
        if uri("https", host, 443).is_some_and(|uri| self.proxies.intercept(&uri).is_some()) {
            let mut hasher = DefaultHasher::new();
            target(host, 0).hash(&mut hasher);
            return Ok(Group::Proxied(hasher.finish()));
        }
        let addresses = self.addresses(host, Dialled::Guarded(trust)).await?;
        addresses.first().copied().map(Group::from).ok_or(Failure::Timeout)
    }

    /// What `host` resolves to, as far as it may be dialled.
    async fn addresses(&self, host: &Host, trust: Dialled) -> Result<Vec<IpAddr>, Failure> {
        let (found, name) = match host {
            Host::Ip(ip) => (vec![*ip], ip.to_string()),
            Host::Name(name) => match self.dns.addresses(name).await {
                Ok(found) => (found, name.to_string()),
                Err(error) => {
                    return Err(Failure::Dns {
                        host: name.to_string(),
                        error,
                    });
                }
            },
        };
        let Dialled::Guarded(trust) = trust else {
            return Ok(found);
        };
        let mut refused = None;
        let mut allowed = Vec::with_capacity(found.len());
        for address in found {
            match self.guard.check(address, trust) {
                Ok(()) => allowed.push(address),
                Err(why) => {
                    refused = Some(Failure::Refused {
                        host: name.clone(),
                        address,
                        why,
                    });
                }
            }
        }
        match refused {
            Some(refused) if allowed.is_empty() => Err(refused),
            Some(_) | None => Ok(allowed),
        }
    }

    /// The proxy resolves names by itself; what resolves here to a refused address is refused all the same.
    async fn check_before_proxy(&self, host: &Host, trust: Dialled) -> Result<(), Failure> {
        match self.addresses(host, trust).await {
            Ok(_) | Err(Failure::Dns { .. }) => Ok(()),
            Err(refused) => Err(refused),
        }
    }
}

/// Whether the guard has a say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialled {
    /// The operator wrote this very address down as an override's target.
    Override,
    /// Discovery led here.
    Guarded(Trust),
}

async fn tunnel(destination: Uri, proxy: &Intercept, target: &str) -> Result<TokioIo<TcpStream>, Failure> {
    let failed = |error: String| Failure::Proxy {
        target: target.to_owned(),
        error,
    };
    if proxy.uri().scheme_str() != Some("http") {
        return Err(failed("only http:// proxies are supported".into()));
    }
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_nodelay(true);
    let mut tunnel = Tunnel::new(proxy.uri().clone(), connector);
    if let Some(auth) = proxy.basic_auth() {
        tunnel = tunnel.with_auth(auth.clone());
    }
    match timeout(CONNECT_TIMEOUT * 2, tunnel.oneshot(destination)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(failed(chain(&error))),
        Err(_) => Err(failed("no answer in time".into())),
    }
}

/// What the settings for proxies are asked about: those for HTTPS must not send plain text their way.
fn uri(scheme: &str, host: &Host, port: u16) -> Option<Uri> {
    format!("{scheme}://{}/", target(host, port)).parse().ok()
}

/// `host:port` as a URL's authority.
pub(super) fn target(host: &Host, port: u16) -> String {
    match host {
        Host::Ip(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        Host::Ip(IpAddr::V4(ip)) => format!("{ip}:{port}"),
        Host::Name(name) => format!("{name}:{port}"),
    }
}

/// An error with its causes, as one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
