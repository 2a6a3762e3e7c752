//! A look at an address, step by step, for `doctor`: who is there, with which certificate, and what is answered. The guard
//! stands before it as before everything else; nothing is remembered, and nothing that is remembered counts.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use url::{Position, Url};

use super::Federation;
use super::dial::{Attempt, Dialled, Place, Stream};
use super::discovery::{File, discover};
use super::failure::Failure;
use super::follow;
use super::guard::Trust;
use super::pool::{Open, Switched};
use super::route::{Ask, Reply, Route, USER_AGENT};
use crate::admission::budget::Budget;
use crate::admission::{Class, Who};
use crate::server_name::ServerName;

/// Largest well-known file that is read, in bytes.
const MAX_FILE_BYTES: usize = 50 * 1024;

/// Bytes that come over a connection in another protocol, at most.
const MAX_UPGRADED_BYTES: usize = 1024 * 1024;

/// A request to one address.
pub struct Look<'a> {
    /// Where it goes; the query is sent, the fragment is not.
    pub url: &'a Url,
    /// Method of the request.
    pub method: Method,
    /// Headers beside those that every request has.
    pub headers: &'a [(HeaderName, HeaderValue)],
    /// Body of the request.
    pub body: Bytes,
    /// Largest body of an answer in bytes.
    pub limit: usize,
    /// Moment since when answers of DNS count.
    pub since: Instant,
}

/// Facts about a connection that was made for a look.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts {
    /// Address at the other end.
    pub address: Option<SocketAddr>,
    /// When the certificate of the other end expires, in seconds since 1970.
    pub certificate_ends: Option<i64>,
}

/// Answer to a look.
#[derive(Debug)]
pub struct Looked {
    /// Facts about the connection.
    pub facts: Facts,
    /// The answer as it came.
    pub reply: Reply,
}

/// Way to a homeserver's federation API, as the specification's steps find it, and the answer there.
#[derive(Debug)]
pub struct Trace {
    /// Step of the specification that found the way.
    pub step: &'static str,
    /// Name that the homeserver is asked under.
    pub asked_as: String,
    /// Answer to the question.
    pub looked: Looked,
}

/// Answer to a request for another protocol.
pub enum Upgrade {
    /// The other side speaks the other protocol from here on.
    Switched(Box<Switched>),
    /// The other side answers like to any request, with this status.
    Answered(StatusCode),
}

impl Federation {
    /// The way of `look`, its request, and in whose name it is made. How far an address is trusted depends on whether a
    /// configuration leads there, or a host that others named.
    fn prepare(&self, look: &Look<'_>, is_configured: bool) -> Result<(Route, Request<Full<Bytes>>, Who), Failure> {
        let (trust, class) = if is_configured {
            (Trust::Listed, Class::Listed)
        } else {
            (Trust::Stranger, Class::Verified)
        };
        let route = Route::to_url(look.url, Dialled::Guarded(trust))?;
        let request = look.request(&route)?;
        Ok((route, request, self.of_host(look.url, class)))
    }

    /// Asks `look` once. Only a host that stands in the configuration may be in a private network.
    ///
    /// # Errors
    /// When there is no whole answer before `deadline`.
    pub async fn look(&self, look: &Look<'_>, is_configured: bool, deadline: Instant) -> Result<Looked, Failure> {
        let (route, request, who) = self.prepare(look, is_configured)?;
        let asked = Box::pin(self.ask_once(&route, request, look.limit, who, look.since));
        timeout_at(deadline, asked).await.unwrap_or(Err(Failure::Timeout))
    }

    /// Asks for another protocol, as a browser opens a WebSocket.
    ///
    /// # Errors
    /// When there is no answer before `deadline`.
    pub async fn upgrade(&self, look: &Look<'_>, is_configured: bool, deadline: Instant) -> Result<Upgrade, Failure> {
        let (route, request, who) = self.prepare(look, is_configured)?;
        let asked = Box::pin(self.upgrade_once(&route, request, who, look.since));
        timeout_at(deadline, asked).await.unwrap_or(Err(Failure::Timeout))
    }

    /// Finds the federation API of `server` anew, step by step, and asks it for `path`.
    ///
    /// # Errors
    /// When there is no whole answer before `deadline`.
    pub async fn trace(&self, server: &ServerName, path: &str, limit: usize, since: Instant, deadline: Instant) -> Result<Trace, Failure> {
        let asked = async {
            let who = self.dialler_of(server);
            let (budget, queued) = (Budget::of(who.class), Notify::new());
            let attempt = Attempt::new(who, &budget, &queued, None);
            attempt.asks_since(Some(since));
            let found = discover(&self.dialer, server, self.trust(server), &attempt).await?;
            let request = Ask::get(path).request(&found.route)?;
            let looked = match self.ask_once(&found.route, request, limit, who, since).await {
                // The fallbacks lead nowhere, since the file could not be asked for: that is the cause.
                Err(failure) if found.file == File::Unreachable => return Err(self.no_delegation(server, who).await.unwrap_or(failure)),
                looked => looked?,
            };
            Ok(Trace {
                step: found.step,
                asked_as: found.route.host().to_owned(),
                looked,
            })
        };
        timeout_at(deadline, Box::pin(asked)).await.unwrap_or(Err(Failure::Timeout))
    }

    /// Why `/.well-known/matrix/server` of `server` cannot be asked for, if it cannot.
    async fn no_delegation(&self, server: &ServerName, who: Who) -> Option<Failure> {
        let (host, port) = server.parts();
        let (budget, queued) = (Budget::of(who.class), Notify::new());
        let attempt = Attempt::new(who, &budget, &queued, None);
        let path = "/.well-known/matrix/server";
        let file = follow::get(&self.dialer, host, port, path, self.trust(server), MAX_FILE_BYTES, &attempt).await;
        // Where there is no such name, that is told.
        file.err()
    }

    /// Whether `server` stands in the configuration.
    #[must_use]
    pub fn is_configured(&self, server: &ServerName) -> bool {
        self.is_listed(server)
    }

    /// Whether `host` has addresses, and which; the guard has no say, since none of them is dialled.
    ///
    /// # Errors
    /// When DNS says that there is no such name, or does not answer.
    pub async fn addresses_of(&self, host: &str) -> Result<Vec<std::net::IpAddr>, crate::dns::DnsError> {
        self.dialer.dns.addresses(host, None).await
    }

    /// Whether the guard lets `address` be dialled for a host that others named.
    #[must_use]
    pub fn may_dial(&self, address: std::net::IpAddr, is_configured: bool) -> bool {
        let trust = if is_configured { Trust::Listed } else { Trust::Stranger };
        self.dialer.guard.check(address, trust).is_ok()
    }

    fn dialler_of(&self, server: &ServerName) -> Who {
        self.dialer.hasher.who(server, self.class(server).min(Class::Verified))
    }

    fn of_host(&self, url: &Url, class: Class) -> Who {
        let authority = &url[Position::BeforeHost..Position::AfterPort];
        match ServerName::parse(authority) {
            Ok(name) => self.dialer.hasher.who(&name, class),
            Err(_) => Who {
                class,
                domain: self.dialer.hasher.hash(authority),
                name: self.dialer.hasher.hash(authority),
            },
        }
    }

    async fn ask_once(
        &self,
        route: &Route,
        request: Request<Full<Bytes>>,
        limit: usize,
        who: Who,
        since: Instant,
    ) -> Result<Looked, Failure> {
        let (budget, queued) = (Budget::of(who.class), Notify::new());
        let attempt = Attempt::new(who, &budget, &queued, None);
        attempt.asks_since(Some(since));
        let (mut connection, _place, facts) = self.open(route, &attempt).await?;
        let reply = connection.exchange(request, limit).await.map_err(|unanswered| unanswered.failure)?;
        Ok(Looked { facts, reply })
    }

    async fn upgrade_once(&self, route: &Route, request: Request<Full<Bytes>>, who: Who, since: Instant) -> Result<Upgrade, Failure> {
        let (budget, queued) = (Budget::of(who.class), Notify::new());
        let attempt = Attempt::new(who, &budget, &queued, None);
        attempt.asks_since(Some(since));
        let (connection, _place, _) = self.open(route, &attempt).await?;
        let upgraded = connection.upgrade(request, MAX_UPGRADED_BYTES).await?;
        Ok(upgraded.map_or_else(Upgrade::Answered, |stream| Upgrade::Switched(Box::new(stream))))
    }

    /// A connection for one look, with its place.
    async fn open<'a>(&'a self, route: &Route, attempt: &Attempt<'a>) -> Result<(Box<Open>, Place<'a>, Facts), Failure> {
        let mut facts = Facts::default();
        let opening = async {
            let (stream, place) = route.connect(&self.dialer, attempt).await?;
            facts = Facts::of(&stream);
            Ok((stream, place))
        };
        let (connection, place) = Open::new(&self.dialer.pool, opening).await?;
        Ok((connection, place, facts))
    }
}

impl<'a> Look<'a> {
    /// A GET without a body.
    #[must_use]
    pub const fn get(url: &'a Url, headers: &'a [(HeaderName, HeaderValue)], limit: usize, since: Instant) -> Self {
        Self {
            url,
            method: Method::GET,
            headers,
            body: Bytes::new(),
            limit,
            since,
        }
    }

    fn request(&self, route: &Route) -> Result<Request<Full<Bytes>>, Failure> {
        let path = &self.url[Position::BeforePath..Position::AfterQuery];
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::try_from(path).map_err(|_| Failure::Http("the address has no path that can be asked for".into()))?;
        let headers = request.headers_mut();
        headers.insert(header::HOST, route.host_header.clone());
        headers.insert(header::USER_AGENT, USER_AGENT);
        headers.extend(self.headers.iter().cloned());
        Ok(request)
    }
}

impl Facts {
    fn of(stream: &Stream) -> Self {
        match stream {
            Stream::Plain(tcp) => Self {
                address: tcp.peer_addr().ok(),
                certificate_ends: None,
            },
            Stream::Tls(tls) => {
                let (tcp, session) = tls.get_ref();
                let certificate = session.peer_certificates().and_then(<[_]>::first);
                Self {
                    address: tcp.peer_addr().ok(),
                    certificate_ends: certificate.and_then(|certificate| not_after(certificate)),
                }
            }
        }
    }
}

/// When a certificate expires (RFC 5280, 4.1: `tbsCertificate.validity.notAfter`), in seconds since 1970.
fn not_after(der: &[u8]) -> Option<i64> {
    let (_, certificate, _) = element(der)?;
    let (_, mut rest, _) = element(certificate)?;
    // The version may be left out.
    if rest.first() == Some(&0xa0) {
        rest = element(rest)?.2;
    }
    // Serial number, signature algorithm, issuer.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (_, validity, _) = element(rest)?;
    let (_, _, rest) = element(validity)?;
    let (tag, time, _) = element(rest)?;
    let text = std::str::from_utf8(time).ok()?;
    let text = match tag {
        // Of two digits, those from 50 on are of the last century.
        0x17 if text.get(..2)? >= "50" => format!("19{text}"),
        0x17 => format!("20{text}"),
        0x18 => text.to_owned(),
        _ => return None,
    };
    // By hand: the parser of dates for all formats is large.
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<u32>().ok();
    let date = chrono::NaiveDate::from_ymd_opt(i32::try_from(number(0, 4)?).ok()?, number(4, 6)?, number(6, 8)?)?;
    let time = date.and_hms_opt(number(8, 10)?, number(10, 12)?, number(12, 14)?)?;
    Some(time.and_utc().timestamp())
}

/// Tag and content of the first element of DER, and what comes after it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest
            .split_at_checked(usize::from(first & 0x7f))
            .filter(|(digits, _)| digits.len() <= 4)?;
        (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_certificate_is_read() {
        for (year, seconds) in [(2031, 1_924_992_000), (2051, 2_556_144_000)] {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(vec!["a.example".into()]).unwrap();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(not_after(certificate.der()), Some(seconds), "{year}");
        }
        for broken in [&b""[..], b"\x30", b"\x30\x84\xff\xff\xff\xff", b"\x30\x03\x02\x01\x01"] {
            assert_eq!(not_after(broken), None, "{broken:?}");
        }
    }
}
