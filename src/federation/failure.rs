//! Why a homeserver could not be asked, in words for the operator's log. Nothing here reaches a client.

use std::net::IpAddr;
use std::time::Duration;

use super::guard::AddressDenied;
use crate::dns::DnsError;
use crate::retry::{Transient, backoff};
use crate::tls;

/// A failed attempt to reach a homeserver.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// A name did not resolve.
    #[error("{host}: {error}")]
    Dns {
        /// Name that was asked about.
        host: String,
        /// Error that DNS gave.
        error: DnsError,
    },
    /// The guard refused the address.
    #[error("{host} is at {address}: {why}")]
    AddressDenied {
        /// Name or literal that led to the address.
        host: String,
        /// Address in question.
        address: IpAddr,
        /// Kind of range that the address is in.
        why: AddressDenied,
    },
    /// No TCP connection could be made.
    #[error("cannot connect to {target}: {error}")]
    Connect {
        /// Target as `host:port`.
        target: String,
        /// Error in the system's words.
        error: String,
    },
    /// No TLS session could be made.
    #[error("TLS with {target} failed: {error}")]
    Tls {
        /// Target as `host:port`.
        target: String,
        /// Error in the TLS library's words.
        error: String,
    },
    /// The forward proxy did not open a tunnel.
    #[error("the forward proxy did not reach {target}: {error}")]
    Proxy {
        /// Target as `host:port`.
        target: String,
        /// The proxy's or the library's words.
        error: String,
    },
    /// The SRV record says that there is no such service.
    #[error("the SRV record of {0} says that it has no federation service")]
    NoService(String),
    /// `m.server` of the well-known file is not a server name.
    #[error("https://{0}/.well-known/matrix/server delegates to something that is not a server name")]
    BadDelegation(String),
    /// The well-known file names no client-server API.
    #[error("/.well-known/matrix/client cannot be used: {0}")]
    NoClientApi(&'static str),
    /// The connection broke, or what came back was not HTTP.
    #[error("no valid HTTP answer: {0}")]
    Http(String),
    /// The answer is larger than any honest one.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The time of the request was used up.
    #[error("no answer in time")]
    Timeout,
    /// Too many requests wait for this homeserver, or for homeservers that nobody knows.
    #[error("too many requests are waiting for homeservers")]
    Busy,
    /// The request has made as many connections or asked as many questions as one request may.
    #[error("no more connections are made for one request")]
    Spent,
}

impl Transient for Failure {
    const NEIGHBOUR: &'static str = "the homeserver";

    fn pause(&self, tries: u32) -> Option<Duration> {
        self.may_pass().then(|| backoff(tries))
    }
}

impl Failure {
    /// Whether trying again soon may help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Dns { .. } | Self::Connect { .. } | Self::Tls { .. } | Self::Proxy { .. } | Self::Http(_) | Self::Timeout => true,
            Self::AddressDenied { .. }
            | Self::NoService(_)
            | Self::BadDelegation(_)
            | Self::NoClientApi(_)
            | Self::TooLarge(_)
            | Self::Busy
            | Self::Spent => false,
        }
    }

    /// Whether what was remembered of the way there may be out of date.
    #[must_use]
    pub fn may_be_elsewhere(&self) -> bool {
        match self {
            Self::Dns { .. }
            | Self::Connect { .. }
            | Self::Tls { .. }
            | Self::Proxy { .. }
            | Self::NoService(_)
            | Self::Http(_)
            | Self::TooLarge(_)
            | Self::Timeout => true,
            Self::AddressDenied { .. } | Self::BadDelegation(_) | Self::NoClientApi(_) | Self::Busy | Self::Spent => false,
        }
    }

    /// Whether DNS said that there is no such name, which for a stranger's is the last word: a wait would also tell names
    /// that exist in a private network, and are refused at once, from those that do not.
    #[must_use]
    pub fn is_no_name(&self) -> bool {
        matches!(
            self,
            Self::Dns {
                error: DnsError::NotFound,
                ..
            }
        )
    }

    /// Advice to the operator.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Dns { .. } => "check the server name's DNS records as seen from this machine or container",
            Self::AddressDenied {
                why: AddressDenied::Private,
                ..
            } => {
                "if this homeserver is yours, name it in LIVEKIT_FULL_ACCESS_HOMESERVERS, or its network in LIVEKIT_FEDERATION_ALLOWED_NETWORKS (for example 10.0.0.0/8)"
            }
            Self::AddressDenied {
                why: AddressDenied::Never, ..
            } => "such an address is never dialled; correct the DNS record or the delegation",
            Self::Connect { .. } => {
                "check that the homeserver's federation port (8448, or the delegated one) is reachable from here; LIVEKIT_FEDERATION_URL_OVERRIDES can name an internal address"
            }
            Self::Tls { error, .. } => {
                tls::remedy(error).unwrap_or("check the certificate at that address; a private CA goes into SSL_CERT_FILE or SSL_CERT_DIR")
            }
            Self::Proxy { .. } => "check HTTPS_PROXY and NO_PROXY",
            Self::NoService(_) => "correct the SRV record _matrix-fed._tcp",
            Self::NoClientApi(_) => "serve the file with m.homeserver.base_url, or name the address in LIVEKIT_CS_API_URL_OVERRIDES",
            Self::BadDelegation(_) => "m.server must be host or host:port, without https://",
            Self::Http(_) | Self::TooLarge(_) => "check that /_matrix/federation is routed to the homeserver",
            Self::Timeout => "check that the homeserver answers /_matrix/federation/v1/version from here within seconds",
            Self::Spent => "look at the homeserver's delegation: at most 8 connections are made for one request",
            Self::Busy => "a flood, or a homeserver that does not answer; other homeservers are not affected",
        }
    }
}
