//! Addresses and SRV records, asked without blocking a thread and remembered for their TTL.
//!
//! `/etc/hosts` and the search list of `/etc/resolv.conf` are honoured. What may be dialled is not decided here but in
//! `federation/guard.rs`.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::time::Duration;

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup_ip::LookupIp;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::{Name, RData};
use hickory_resolver::{Resolver, TokioResolver};
use tokio::time::sleep;

/// More targets or addresses than this of one name are not looked at.
const MOST: usize = 8;

/// Answers remembered. Names come from strangers, so this bounds what they can make us keep.
const CACHE_ENTRIES: u64 = 1024;

/// Some name servers drop questions for IPv6 addresses (RFC 4074): after this time IPv4 addresses do alone.
const IPV6_PATIENCE: Duration = Duration::from_millis(500);

/// One target of an SRV record set, RFC 2782.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvTarget {
    /// Smaller is asked first.
    pub priority: u16,
    /// Share among those of one priority.
    pub weight: u16,
    /// Port to connect to.
    pub port: u16,
    /// Host name without the trailing dot; empty where the record says that there is no service.
    pub host: String,
}

/// A name could not be resolved.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DnsError {
    /// DNS answered: there is no such name or no such record.
    #[error("the name does not exist in DNS")]
    NotFound,
    /// DNS did not answer, or answered with an error.
    #[error("DNS did not answer ({0})")]
    Failed(String),
}

/// The resolver, made at first use so that it costs the start nothing.
pub struct Dns {
    servers: Vec<SocketAddr>,
    resolver: OnceLock<TokioResolver>,
}

impl Dns {
    /// Asks `servers`, or those of `/etc/resolv.conf` when there are none.
    #[must_use]
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self {
            servers,
            resolver: OnceLock::new(),
        }
    }

    /// All IPv6 and IPv4 addresses of `host`.
    ///
    /// # Errors
    /// When there are none.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, DnsError> {
        let resolver = self.resolver()?;
        let ipv4_alone = async {
            sleep(IPV6_PATIENCE).await;
            resolver.ipv4_lookup(host).await.ok().map(LookupIp::from)
        };
        let found = tokio::select! {
            found = resolver.lookup_ip(host) => found.map_err(|error| failure(&error))?,
            Some(found) = ipv4_alone => found,
        };
        let addresses: Vec<_> = found.iter().take(MOST).collect();
        if addresses.is_empty() {
            Err(DnsError::NotFound)
        } else {
            Ok(addresses)
        }
    }

    /// The SRV records of `service`, in no particular order.
    ///
    /// # Errors
    /// When there are none.
    pub async fn srv(&self, service: &str) -> Result<Vec<SrvTarget>, DnsError> {
        // Fully qualified: a search list must not turn one server's name into another's.
        let mut name = Name::from_ascii(service).map_err(|_| DnsError::NotFound)?;
        name.set_fqdn(true);
        let found = self.resolver()?.srv_lookup(name).await.map_err(|error| failure(&error))?;
        let targets: Vec<_> = found
            .answers()
            .iter()
            .filter_map(|record| if let RData::SRV(srv) = &record.data { Some(srv) } else { None })
            .map(|srv| SrvTarget {
                priority: srv.priority,
                weight: srv.weight,
                port: srv.port,
                host: srv.target.to_ascii().trim_end_matches('.').to_owned(),
            })
            .take(MOST)
            .collect();
        if targets.is_empty() { Err(DnsError::NotFound) } else { Ok(targets) }
    }

    fn resolver(&self) -> Result<&TokioResolver, DnsError> {
        if let Some(resolver) = self.resolver.get() {
            return Ok(resolver);
        }
        let made = self.make().map_err(|error| DnsError::Failed(error.to_string()))?;
        Ok(self.resolver.get_or_init(|| made))
    }

    fn make(&self) -> Result<TokioResolver, NetError> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().or_else(|error| {
                tracing::warn!(
                    error = error.to_string(),
                    "/etc/resolv.conf cannot be used; asking the DNS server on 127.0.0.1"
                );
                Ok::<_, NetError>(with_servers(&[SocketAddr::from(([127, 0, 0, 1], 53))]))
            })?
        } else {
            with_servers(&self.servers)
        };
        bound(builder.options_mut());
        builder.build()
    }
}

fn with_servers(servers: &[SocketAddr]) -> hickory_resolver::ResolverBuilder<TokioRuntimeProvider> {
    let servers = servers
        .iter()
        .map(|server| {
            let on_port = |mut connection: ConnectionConfig| {
                connection.port = server.port();
                connection
            };
            NameServerConfig::new(
                server.ip(),
                true,
                vec![on_port(ConnectionConfig::udp()), on_port(ConnectionConfig::tcp())],
            )
        })
        .collect();
    Resolver::builder_with_config(ResolverConfig::from_name_servers(servers), TokioRuntimeProvider::default())
}

fn bound(options: &mut ResolverOpts) {
    options.cache_size = CACHE_ENTRIES;
    options.ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
    // A verification has ten seconds in all; a name server that is away must leave some for the next one.
    options.timeout = options.timeout.min(Duration::from_secs(2));
    options.attempts = options.attempts.max(2);
    // One domain whose name servers do not answer must not take the places of all others.
    options.max_active_requests = 2048;
    options.positive_max_ttl = Some(Duration::from_secs(3600));
    options.negative_max_ttl = Some(Duration::from_secs(60));
}

fn failure(error: &NetError) -> DnsError {
    if error.is_no_records_found() {
        DnsError::NotFound
    } else {
        DnsError::Failed(error.to_string())
    }
}

/// Orders targets as RFC 2782 says: by priority, and within one priority at random by weight.
#[must_use]
pub fn order(mut targets: Vec<SrvTarget>, mut random_below: impl FnMut(u64) -> u64) -> Vec<SrvTarget> {
    targets.sort_by_key(|t| (t.priority, t.weight));
    let mut ordered = Vec::with_capacity(targets.len());
    while let Some(priority) = targets.first().map(|t| t.priority) {
        let end = targets.partition_point(|t| t.priority == priority);
        let total: u64 = targets[..end].iter().map(|t| u64::from(t.weight)).sum();
        let mark = random_below(total + 1);
        let mut sum = 0;
        let at = targets[..end]
            .iter()
            .position(|t| {
                sum += u64::from(t.weight);
                sum >= mark
            })
            .unwrap_or(0);
        ordered.push(targets.remove(at));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(priority: u16, weight: u16, host: &str) -> SrvTarget {
        SrvTarget {
            priority,
            weight,
            port: 1,
            host: host.into(),
        }
    }

    fn hosts(targets: &[SrvTarget]) -> Vec<&str> {
        targets.iter().map(|t| t.host.as_str()).collect()
    }

    #[test]
    fn priority_comes_first_and_weight_decides_within() {
        let all = vec![target(20, 5, "c"), target(10, 0, "a"), target(10, 9, "b")];
        assert_eq!(hosts(&order(all.clone(), |_| 0)), ["a", "b", "c"]);
        assert_eq!(hosts(&order(all, |below| below - 1)), ["b", "a", "c"]);
    }

    #[test]
    fn the_weight_is_the_share() {
        let (mut first, mut seed) = (0, 1_u64);
        for _ in 0..10_000 {
            let ordered = order(vec![target(1, 75, "a"), target(1, 25, "b")], |below| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (seed >> 33) % below
            });
            first += usize::from(ordered[0].host == "a");
        }
        assert!((7_200..7_800).contains(&first), "{first} of 10000");
    }
}
