//! A file behind redirects: https only, at most five, each hop through the guard.

use http::header;
use url::Url;

use super::dial::{Attempt, Dialer, Dialled};
use super::failure::Failure;
use super::guard::Trust;
use super::route::{Reply, Route, Via, fetch_once, host_header, host_of, tls_name};
use crate::server_name::Host;

const MAX_REDIRECTS: usize = 5;

/// Gets `path` of `host:port`; `None` where the redirects lead nowhere.
///
/// # Errors
/// When a hop could not be reached, or was refused.
pub(super) async fn get<'a>(
    dialer: &'a Dialer,
    host: Host,
    port: Option<u16>,
    path: &str,
    trust: Trust,
    limit: usize,
    attempt: &Attempt<'a>,
) -> Result<Option<Reply>, Failure> {
    if !attempt.budget.fetch() {
        return Err(Failure::Spent);
    }
    let mut hop = Hop {
        authority: authority(&host, port),
        host,
        port: port.unwrap_or(443),
        path: path.to_owned(),
    };
    for _ in 0..=MAX_REDIRECTS {
        let route = Route {
            via: Via::Fixed(hop.host.clone(), hop.port),
            host_header: host_header(&hop.authority)?,
            base_path: String::new(),
            tls_name: Some(tls_name(&hop.host)?),
            dialled: Dialled::Guarded(trust),
        };
        let reply = fetch_once(dialer, &route, &hop.path, limit, attempt).await?;
        if !reply.status.is_redirection() {
            return Ok(Some(reply));
        }
        let location = reply.headers.get(header::LOCATION).and_then(|location| location.to_str().ok());
        match location.and_then(|location| hop.next(location)) {
            Some(next) => hop = next,
            None => return Ok(None),
        }
    }
    Ok(None)
}

struct Hop {
    host: Host,
    port: u16,
    authority: String,
    path: String,
}

impl Hop {
    fn next(&self, location: &str) -> Option<Self> {
        let here = Url::parse(&format!("https://{}{}", self.authority, self.path)).ok()?;
        let next = here.join(location).ok().filter(|url| url.scheme() == "https")?;
        let host = host_of(&next)?;
        Some(Self {
            authority: authority(&host, next.port()),
            host,
            port: next.port().unwrap_or(443),
            path: next[url::Position::BeforePath..url::Position::AfterQuery].to_owned(),
        })
    }
}

fn authority(host: &Host, port: Option<u16>) -> String {
    let host = match host {
        Host::Name(name) => name.to_string(),
        Host::Ip(std::net::IpAddr::V4(ip)) => ip.to_string(),
        Host::Ip(std::net::IpAddr::V6(ip)) => format!("[{ip}]"),
    };
    match port {
        Some(port) => format!("{host}:{port}"),
        None => host,
    }
}
