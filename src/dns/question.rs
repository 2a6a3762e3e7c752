//! Questions to DNS, by hickory's resolver: made as `/etc/resolv.conf` and `/etc/hosts` are, and made again when they change.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError as HickoryDnsError, NetError};
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{Resolver, TokioResolver};
use parking_lot::Mutex;
use tokio::time::sleep;

use super::SrvTarget;
use super::memory::{Answer, Found, NoAnswer};

/// More targets or addresses than this of one name are not looked at.
const MAX_ADDRESSES: usize = 8;
/// The longest name of a host that is kept, in bytes: no longer one can be asked about, unless most of it is escapes.
const MAX_HOST_BYTES: usize = 254;
/// Some name servers drop questions for IPv6 addresses (RFC 4074): after this time IPv4 addresses do alone.
const RESOLUTION_DELAY: Duration = Duration::from_millis(500);
/// The longest text of a failure that is kept, in bytes.
const MAX_TEXT_BYTES: usize = 200;
const FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// A resolver, made at first use so that it costs the start nothing.
pub(super) struct Resolvers {
    /// Servers to ask; empty for those of `/etc/resolv.conf`.
    servers: Vec<SocketAddr>,
    /// A question that fails is asked again.
    insists: bool,
    made: Mutex<Option<(Files, TokioResolver)>>,
}

/// Marks by which a change of a file is noticed: its inode, length and time of change.
type Files = [Option<(u64, u64, SystemTime)>; FILES.len()];

/// A resolver, and whether what was found by an older one no longer counts.
pub(super) struct Ready {
    pub(super) resolver: TokioResolver,
    pub(super) is_new: bool,
}

impl Resolvers {
    pub(super) const fn new(servers: Vec<SocketAddr>, insists: bool) -> Self {
        Self {
            servers,
            insists,
            made: Mutex::new(None),
        }
    }

    /// The resolver for the files as they are now.
    pub(super) fn ready(&self) -> Result<Ready, NetError> {
        let files = files();
        let mut made = self.made.lock();
        if let Some((_, resolver)) = made.as_ref().filter(|(before, _)| *before == files) {
            let resolver = resolver.clone();
            return Ok(Ready { resolver, is_new: false });
        }
        let resolver = self.make()?;
        let is_new = made.replace((files, resolver.clone())).is_some();
        Ok(Ready { resolver, is_new })
    }

    fn make(&self) -> Result<TokioResolver, NetError> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().or_else(|error| {
                tracing::warn!(name: "resolv_conf_unusable",
                    error = error.to_string(),
                    "/etc/resolv.conf cannot be used; asking the DNS server on 127.0.0.1"
                );
                Ok::<_, NetError>(with_servers(&[SocketAddr::from(([127, 0, 0, 1], 53))]))
            })?
        } else {
            with_servers(&self.servers)
        };
        bound(builder.options_mut(), self.insists);
        builder.build()
    }
}

fn files() -> Files {
    use std::os::unix::fs::MetadataExt as _;
    FILES.map(|path| {
        let file = fs::metadata(path).ok()?;
        Some((file.ino(), file.len(), file.modified().ok()?))
    })
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

fn bound(options: &mut ResolverOpts, insists: bool) {
    options.cache_size = 0;
    options.ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
    // A verification has ten seconds in all; a name server that is away must leave some for the next one.
    options.timeout = options.timeout.min(Duration::from_secs(2));
    // A request about a homeserver that is not listed tries again by itself, and within its budget.
    options.attempts = if insists { options.attempts.max(2) } else { 0 };
    // One domain whose name servers do not answer must not take the places of all others.
    options.max_active_requests = 2048;
}

/// The IPv6 and IPv4 addresses of a name.
pub(super) async fn addresses(resolver: TokioResolver, name: Name) -> Answer {
    let (until, addresses) = both_families(&resolver, name).await?;
    Ok((Found::Addresses(addresses.into()), until))
}

/// The SRV records of a name.
pub(super) async fn targets(resolver: TokioResolver, name: Name) -> Answer {
    let found = resolver.lookup(name, RecordType::SRV).await.map_err(|error| no_answer(&error))?;
    let targets = targets_in(&found);
    if targets.is_empty() {
        return Err(NoAnswer::Nothing(Some(
            found.valid_until().saturating_duration_since(Instant::now()),
        )));
    }
    Ok((Found::Targets(targets.into()), found.valid_until()))
}

/// DNS did not say anything, for this reason.
pub(super) fn failed(why: &str) -> NoAnswer {
    let end = (0..=why.len().min(MAX_TEXT_BYTES))
        .rfind(|at| why.is_char_boundary(*at))
        .unwrap_or(0);
    NoAnswer::Failed(why[..end].into())
}

fn no_answer(error: &NetError) -> NoAnswer {
    if !error.is_no_records_found() {
        return failed(&error.to_string());
    }
    NoAnswer::Nothing(if let NetError::Dns(HickoryDnsError::NoRecordsFound(none)) = error {
        none.negative_ttl.map(|seconds| Duration::from_secs(seconds.into()))
    } else {
        None
    })
}

/// Asks for addresses of both families at once. One of them does alone when the other one has nothing, or takes long.
async fn both_families(resolver: &TokioResolver, name: Name) -> Result<(Instant, Vec<IpAddr>), NoAnswer> {
    let ask = async |kind| {
        let found = resolver.lookup(name.clone(), kind).await.map_err(|error| no_answer(&error))?;
        let addresses = addresses_in(&found);
        if addresses.is_empty() {
            return Err(NoAnswer::Nothing(None));
        }
        Ok((found.valid_until(), addresses))
    };
    let (mut v6, mut v4) = (std::pin::pin!(ask(RecordType::AAAA)), std::pin::pin!(ask(RecordType::A)));
    let mut delay = std::pin::pin!(sleep(RESOLUTION_DELAY));
    let (mut of_v6, mut of_v4, mut is_waiting) = (None, None, true);
    while of_v6.is_none() || of_v4.is_none() {
        tokio::select! {
            found = &mut v6, if of_v6.is_none() => of_v6 = Some(found),
            found = &mut v4, if of_v4.is_none() => of_v4 = Some(found),
            () = &mut delay, if is_waiting => is_waiting = false,
        }
        if !is_waiting && [&of_v6, &of_v4].iter().any(|found| matches!(found, Some(Ok(_)))) {
            break;
        }
    }
    match (of_v6, of_v4) {
        (Some(Ok((until, mut addresses))), Some(Ok((also_until, more)))) => {
            // Neither family may crowd the other one out.
            addresses.truncate(MAX_ADDRESSES - more.len().min(MAX_ADDRESSES / 2));
            addresses.extend(more);
            addresses.truncate(MAX_ADDRESSES);
            Ok((until.min(also_until), addresses))
        }
        (Some(Ok(found)), _) | (_, Some(Ok(found))) => Ok(found),
        // A failure may pass, so it says more than that one family is not there.
        (Some(Err(failed @ NoAnswer::Failed(_))), _) | (_, Some(Err(failed @ NoAnswer::Failed(_)))) => Err(failed),
        (of_v6, of_v4) => {
            let life = |nothing| match nothing {
                Some(Err(NoAnswer::Nothing(life))) => life,
                Some(Ok(_) | Err(NoAnswer::Failed(_))) | None => None,
            };
            Err(NoAnswer::Nothing(life(of_v6).zip(life(of_v4)).map(|(a, b)| a.min(b))))
        }
    }
}

/// The first few addresses of an answer.
fn addresses_in(found: &Lookup) -> Vec<IpAddr> {
    found
        .answers()
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .take(MAX_ADDRESSES)
        .collect()
}

/// Whether a target is a plain host name. Others could not be named to a proxy.
fn is_host(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    name.len() <= MAX_HOST_BYTES && name.bytes().all(is_plain)
}

fn targets_in(found: &Lookup) -> Vec<SrvTarget> {
    found
        .answers()
        .iter()
        .filter_map(|record| if let RData::SRV(srv) = &record.data { Some(srv) } else { None })
        .map(|srv| SrvTarget {
            priority: srv.priority,
            weight: srv.weight,
            port: srv.port,
            host: srv.target.to_ascii().trim_end_matches('.').to_owned(),
        })
        .filter(|target| is_host(&target.host))
        .take(MAX_ADDRESSES)
        .collect()
}
