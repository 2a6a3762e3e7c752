//! From a host and a port to a TLS connection: the only place where an address of a homeserver is dialled, and so the
//! place where the guard stands. The address that was checked is the address that is dialled.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant as StdInstant};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::pki_types::ServerName as TlsName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::ServiceExt as _;
use url::Url;

use super::dial_limiter::{DialLimiter, DialPermit};
use super::failure::Failure;
use super::guard::{Guard, Trust};
use super::pool::Pool;
use crate::admission::budget::Budget;
use crate::admission::dials::Target;
use crate::admission::limiter::{FairLimiter, Permit};
use crate::admission::{Class, Client, Group, NameHasher, Who, fair_queue};
use crate::dns::{Asker, Dns, DnsError};
use crate::retry::RETRY_BUDGET;
use crate::server_name::{Host, ServerName};
use crate::text::error_chain;
use crate::tls::Tls;

/// A dead target must leave time for the next one within the ten seconds of a verification.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
const _: () = assert!(
    2 * CONNECT_TIMEOUT.as_millis() < RETRY_BUDGET.as_millis(),
    "a dead target leaves time for the next one"
);

/// A connection whose other end has not acknowledged what was sent for so long is broken.
const TCP_USER_TIMEOUT_MS: u32 = 3000;

/// After this time the next address is tried too ("connection attempt delay", RFC 8305).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// An open connection.
pub(super) enum Stream {
    /// Overrides and lab set-ups only.
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Opens connections to homeservers.
pub(super) struct Dialer {
    pub(super) dns: Arc<Dns>,
    /// Addresses in `LIVEKIT_FEDERATION_URL_OVERRIDES`.
    pub(super) overrides: BTreeMap<ServerName, Url>,
    pub(super) guard: Guard,
    pub(super) proxies: Matcher,
    pub(super) tls: Arc<Tls>,
    pub(super) hasher: NameHasher,
    pub(super) dial_limiter: DialLimiter,
    /// A place is one use of a connection.
    pub(super) places: FairLimiter,
    pub(super) pool: Arc<Pool>,
}

/// A TCP connection that is being made.
type Connecting<'a, 'd> = Pin<Box<dyn Future<Output = Connected<'d>> + Send + 'a>>;

/// For whom a connection is made.
pub(super) struct Attempt<'a> {
    /// The homeserver whose name led to the machine.
    pub(super) who: Who,
    /// Budget that is left for the client's request.
    pub(super) budget: &'a Budget,
    /// Told when an address is paced and there is a queue.
    pub(super) queued: &'a Notify,
    /// How to wait for a place; calls without it have a bound of their own.
    pub(super) queueing: Option<Queueing>,
    /// A place that was taken before it was clear whether anybody has to be dialled.
    pub(super) held: Mutex<Option<Place<'a>>>,
    /// Answers of DNS from before this moment do not count.
    pub(super) since: Mutex<Option<StdInstant>>,
}

/// How a request waits for a place among the connections in use (decision H7a).
#[derive(Clone, Copy)]
pub(super) struct Queueing {
    pub(super) client: Client,
    /// Moment until which a place is waited for.
    pub(super) until: Instant,
}

/// A place among the connections in use, and the machines that it is on. It is held until the answer is there.
pub(super) struct Place<'a> {
    pub(super) group: Group,
    _permit: Option<Permit<'a>>,
}

/// The permission to dial an address: the permit for now, and the place that the connection will have.
struct Permits<'a> {
    dial: DialPermit<'a>,
    place: Place<'a>,
}

/// A connection that stands, on which nothing was said yet.
type Connected<'a> = Result<(TcpStream, Permits<'a>), Failure>;

impl<'a> Attempt<'a> {
    /// For `who`; with `queueing`, it waits for a place.
    pub(super) fn new(who: Who, budget: &'a Budget, queued: &'a Notify, queueing: Option<Queueing>) -> Self {
        Self {
            who,
            budget,
            queued,
            queueing,
            held: Mutex::default(),
            since: Mutex::default(),
        }
    }

    /// The place that is held, if it is one for the machines of `group`.
    fn take_held(&self, group: Group) -> Option<Place<'a>> {
        let held = self.held.lock().take()?;
        (held.group == group || self.who.class == Class::Listed).then_some(Place { group, ..held })
    }

    /// Holds `place` for whoever is dialled next.
    pub(super) fn hold(&self, place: Option<Place<'a>>) {
        *self.held.lock() = place;
    }

    /// Has answers of DNS from before `since` count no more.
    pub(super) fn asks_since(&self, since: Option<Instant>) {
        *self.since.lock() = since.map(Instant::into_std);
    }

    /// Describes to the resolver who asks.
    pub(super) fn asker(&self) -> Asker<'_> {
        Asker {
            who: self.who,
            budget: self.budget,
            since: *self.since.lock(),
        }
    }
}

impl Dialer {
    /// Waits for a place to use a connection to the machines of `group`.
    pub(super) async fn place(&self, group: Group, attempt: &Attempt<'_>) -> Result<Place<'_>, Failure> {
        let Some(queueing) = attempt.queueing else {
            return Ok(Place { group, _permit: None });
        };
        let who = attempt.who;
        let asker = fair_queue::Asker {
            class: who.class,
            group: match who.class {
                // The operator chose the name: it is nobody else's.
                Class::Listed => who.name,
                Class::Verified | Class::Stranger => self.hasher.hash_of(&group),
            },
            domain: who.domain,
            name: who.name,
            client: queueing.client.0,
        };
        let permit = match self.places.try_acquire(asker) {
            Some(permit) => permit,
            None => timeout_at(queueing.until, self.places.acquire(asker))
                .await
                .map_err(|_| Failure::Busy)?,
        };
        Ok(Place {
            group,
            _permit: Some(permit),
        })
    }

    /// Connects to `host:port`, and speaks TLS with it where `tls_name` says so.
    pub(super) async fn open<'a>(
        &'a self,
        host: &Host,
        port: u16,
        trust: Dialled,
        tls_name: Option<&TlsName<'static>>,
        attempt: &Attempt<'a>,
    ) -> Result<(Stream, Place<'a>), Failure> {
        let scheme = if tls_name.is_some() { "https" } else { "http" };
        let (tcp, Permits { dial, place }) = self.tcp(scheme, host, port, trust, attempt).await?;
        let Some(name) = tls_name else {
            dial.succeeded();
            return Ok((Stream::Plain(tcp), place));
        };
        let failed = |error: String| Failure::Tls {
            target: target(host, port),
            error,
        };
        let config = self.tls.config().map_err(|error| failed(error.to_string()))?;
        let error = match timeout(CONNECT_TIMEOUT, TlsConnector::from(config).connect(name.clone(), tcp)).await {
            Ok(Ok(tls)) => {
                dial.succeeded();
                return Ok((Stream::Tls(Box::new(tls)), place));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the handshake timed out".into(),
        };
        dial.failed();
        Err(failed(error))
    }

    async fn tcp<'a>(&'a self, scheme: &str, host: &Host, port: u16, trust: Dialled, attempt: &Attempt<'a>) -> Connected<'a> {
        if let Some((uri, proxy)) = uri(scheme, host, port).and_then(|uri| self.proxies.intercept(&uri).map(|proxy| (uri, proxy))) {
            let paced = self.check_before_proxy(host, trust, attempt).await?;
            let permit = self.permit(paced, attempt).await?;
            return match tunnel(uri, &proxy, &target(host, port)).await {
                Ok(stream) => Ok((stream, permit)),
                Err(failure) => {
                    permit.dial.failed();
                    Err(failure)
                }
            };
        }
        let addresses = self.addresses(host, trust, attempt).await?;
        self.first_of(interleave(addresses), host, port, attempt).await
    }

    /// Waits until `target` may be dialled.
    async fn permit<'a>(&'a self, target: Target, attempt: &Attempt<'a>) -> Result<Permits<'a>, Failure> {
        let group = group_of(target);
        let place = match attempt.take_held(group) {
            Some(place) => place,
            None => self.place(group, attempt).await?,
        };
        let dial = self.dial_limiter.acquire(target, attempt.who, attempt.queued).await;
        if attempt.budget.dial() {
            Ok(Permits { dial, place })
        } else {
            Err(Failure::Spent)
        }
    }

    /// Connects to whichever address answers first: the next one is tried when one has failed or takes long ("happy
    /// eyeballs", RFC 8305). Only what was checked comes here.
    async fn first_of<'a>(&'a self, addresses: Vec<IpAddr>, host: &Host, port: u16, attempt: &Attempt<'a>) -> Connected<'a> {
        let connect = |address| self.connect(SocketAddr::new(address, port), host, attempt);
        if let [address] = addresses[..] {
            return connect(address).await;
        }
        let mut addresses = addresses.into_iter();
        let mut trying: Vec<Connecting<'_, '_>> = Vec::new();
        let mut last = None;
        loop {
            if let Some(address) = addresses.next() {
                trying.push(Box::pin(connect(address)));
            } else if trying.is_empty() {
                return Err(last.unwrap_or_else(|| connect_failure(host, port, "no address".into())));
            }
            let done = poll_fn(|cx| {
                for (at, one) in trying.iter_mut().enumerate() {
                    if let Poll::Ready(done) = one.as_mut().poll(cx) {
                        return Poll::Ready((at, done));
                    }
                }
                Poll::Pending
            });
            let (at, done) = if addresses.len() == 0 {
                done.await
            } else {
                match timeout(ATTEMPT_DELAY, done).await {
                    Ok(done) => done,
                    Err(_) => continue,
                }
            };
            drop(trying.swap_remove(at));
            match done {
                Ok(connected) => return Ok(connected),
                // What really happened says more than that there may be no more of it.
                Err(Failure::Spent) if last.is_some() => {}
                Err(failure) => last = Some(failure),
            }
        }
    }

    async fn connect<'a>(&'a self, address: SocketAddr, host: &Host, attempt: &Attempt<'a>) -> Connected<'a> {
        let permit = self.permit(Target::from(address.ip()), attempt).await?;
        let error = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Requests are written whole; without it nothing works worse than a little slower.
                let _ = stream.set_nodelay(true);
                // Nor without this: a machine that has gone is missed before the request's time is over.
                let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, TCP_USER_TIMEOUT_MS);
                return Ok((stream, permit));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".into(),
        };
        permit.dial.failed();
        Err(connect_failure(host, address.port(), error))
    }

    /// The machines that will be dialled first for `host`.
    pub(super) async fn group(&self, host: &Host, port: u16, trust: Dialled, attempt: &Attempt<'_>) -> Result<Group, Failure> {
        // Nobody shares the places of a homeserver that is listed.
        if attempt.who.class == Class::Listed {
            return Ok(Group::Proxied(attempt.who.name));
        }
        let target = if uri("https", host, port).is_some_and(|uri| self.proxies.intercept(&uri).is_some()) {
            self.check_before_proxy(host, trust, attempt).await?
        } else {
            let addresses = interleave(self.addresses(host, trust, attempt).await?);
            addresses
                .first()
                .map_or_else(|| self.proxied(host), |address| Target::from(*address))
        };
        Ok(group_of(target))
    }

    /// Resolves `host` to the addresses that may be dialled.
    async fn addresses(&self, host: &Host, trust: Dialled, attempt: &Attempt<'_>) -> Result<Vec<IpAddr>, Failure> {
        let (allowed, refused) = self.judged(host, trust, attempt).await?;
        match refused {
            Some(refused) if allowed.is_empty() => Err(refused),
            Some(_) | None => Ok(allowed),
        }
    }

    /// Resolves `host` to the addresses that may be dialled, and one that may not.
    async fn judged(&self, host: &Host, trust: Dialled, attempt: &Attempt<'_>) -> Result<(Vec<IpAddr>, Option<Failure>), Failure> {
        let (found, name) = match host {
            Host::Ip(ip) => (vec![*ip], ip.to_string()),
            Host::Name(name) => match self.dns.addresses_for(name, &attempt.asker()).await {
                Ok(found) => (found, name.to_string()),
                Err(DnsError::Spent) => return Err(Failure::Spent),
                Err(error) => {
                    return Err(Failure::Dns {
                        host: name.to_string(),
                        error,
                    });
                }
            },
        };
        let Dialled::Guarded(trust) = trust else {
            return Ok((found, None));
        };
        let mut refused = None;
        let mut allowed = Vec::with_capacity(found.len());
        for address in found {
            match self.guard.check(address, trust) {
                Ok(()) => allowed.push(address),
                Err(why) => {
                    refused = Some(Failure::AddressDenied {
                        host: name.clone(),
                        address,
                        why,
                    });
                }
            }
        }
        Ok((allowed, refused))
    }

    /// The proxy resolves names by itself and takes any of the addresses: what resolves here to a refused one, be it among
    /// others, is refused. The machine by which the dial is paced.
    async fn check_before_proxy(&self, host: &Host, trust: Dialled, attempt: &Attempt<'_>) -> Result<Target, Failure> {
        match self.judged(host, trust, attempt).await {
            Ok((_, Some(refused))) => Err(refused),
            Ok((found, None)) => Ok(found.first().map_or_else(|| self.proxied(host), |address| Target::from(*address))),
            // What only a proxy may resolve; an IPv4 address that is spelt as a name (0x7f.1) is none.
            Err(Failure::Dns { .. }) if !host.ends_in_number() => Ok(self.proxied(host)),
            Err(failure) => Err(failure),
        }
    }

    fn proxied(&self, host: &Host) -> Target {
        match host {
            Host::Ip(ip) => Target::from(*ip),
            Host::Name(name) => Target::Proxied(self.hasher.hash(&name.trim_end_matches('.').to_ascii_lowercase())),
        }
    }
}

fn group_of(target: Target) -> Group {
    match target {
        Target::Ip(address) => Group::from(address),
        Target::Proxied(name) => Group::Proxied(name),
    }
}

fn connect_failure(host: &Host, port: u16, error: String) -> Failure {
    Failure::Connect {
        target: target(host, port),
        error,
    }
}

/// IPv6 and IPv4 in turn, in the order in which they came.
fn interleave(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (mut v6, mut v4): (std::collections::VecDeque<_>, std::collections::VecDeque<_>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let mut mixed = Vec::with_capacity(v6.len() + v4.len());
    while !(v6.is_empty() && v4.is_empty()) {
        mixed.extend(v6.pop_front());
        mixed.extend(v4.pop_front());
    }
    mixed
}

/// Whether the guard has a say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialled {
    /// The operator wrote this very address down as an override's target.
    Override,
    /// Discovery led to the address.
    Guarded(Trust),
}

async fn tunnel(destination: Uri, proxy: &Intercept, target: &str) -> Result<TcpStream, Failure> {
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
        Ok(Ok(stream)) => Ok(TokioIo::into_inner(stream)),
        Ok(Err(error)) => Err(failed(error_chain(&error))),
        Err(_) => Err(failed("no answer in time".into())),
    }
}

/// Address about which the settings for proxies are asked: those for HTTPS must not send plain text their way.
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

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_take_turns() {
        let parse = |text: &str| text.split(' ').map(|address| address.parse().unwrap()).collect::<Vec<IpAddr>>();
        assert_eq!(
            interleave(parse("2001:db8::1 2001:db8::2 192.0.2.1 192.0.2.2 192.0.2.3")),
            parse("2001:db8::1 192.0.2.1 2001:db8::2 192.0.2.2 192.0.2.3")
        );
        assert_eq!(interleave(parse("192.0.2.1")), parse("192.0.2.1"));
    }
}
