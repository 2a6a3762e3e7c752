//! The Redis URL, in the grammar of the old service. No message repeats it: it may hold a password.

use std::fmt;
use std::path::PathBuf;

use url::Url;

use super::reader::Reader;
use crate::secret::Secret;

const URL: &str = "LIVEKIT_REDIS_URL";
const PASSWORD: &str = "LIVEKIT_REDIS_PASSWORD";
const SHARED: &str = "LIVEKIT_REDIS_SHARED";
const REPLICA: &str = "LIVEKIT_JWT_REPLICA_IP";
const SENTINEL: &str = "redis+sentinel";
const CLUSTER: &str = "redis+cluster";

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// The parameters that the old service took after the `?`; any other was an error.
const PARAMETERS: [&str; 21] = [
    "client_name",
    "conn_max_idle_time",
    "conn_max_lifetime",
    "conn_max_lifetime_jitter",
    "db",
    "dial_timeout",
    "idle_timeout",
    "max_active_conns",
    "max_concurrent_dials",
    "max_conn_age",
    "max_idle_conns",
    "max_retries",
    "max_retry_backoff",
    "min_idle_conns",
    "min_retry_backoff",
    "pool_fifo",
    "pool_size",
    "pool_timeout",
    "protocol",
    "read_timeout",
    "write_timeout",
];

/// How to reach Redis.
#[derive(Clone, Debug)]
pub struct Redis {
    /// The URL with user name and password taken out: `redis`, `rediss` or `unix`, the host filled in; or `redis+sentinel:` and the name of
    /// the primary, or `redis+cluster:`, and each server as a parameter.
    pub url: Url,
    /// The number of the database.
    pub database: u32,
    /// The user name, decoded.
    pub username: Option<String>,
    /// The password, decoded.
    pub password: Option<Secret>,
}

/// Where the server is. Shown without credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisAddress {
    /// A host and a port, with or without TLS.
    Tcp {
        /// Name, or address without brackets.
        host: String,
        /// TCP port of the server.
        port: u16,
        /// Whether TLS is spoken there, and how.
        tls: Option<RedisTls>,
    },
    /// Sentinels that know where the primary is.
    Sentinel {
        /// Names or addresses of the sentinels, with their ports.
        sentinels: Vec<(String, u16)>,
        /// Name under which they watch the primary.
        primary: String,
    },
    /// Nodes of a cluster, which know where each key is.
    Cluster {
        /// Names or addresses of some nodes, with their ports.
        nodes: Vec<(String, u16)>,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// TLS of a `rediss` URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedisTls {
    /// `skip_verify`: any certificate will do.
    pub skip_verify: bool,
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, tls } => {
                let scheme = if tls.is_some() { "rediss" } else { "redis" };
                write!(f, "{scheme}://{}:{port}", bracketed(host))
            }
            Self::Sentinel { sentinels, primary } => write!(f, "{SENTINEL}://{}/{primary}", listed(sentinels)),
            Self::Cluster { nodes } => write!(f, "{CLUSTER}://{}", listed(nodes)),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn listed(servers: &[(String, u16)]) -> String {
    let all: Vec<_> = servers.iter().map(|(host, port)| format!("{}:{port}", bracketed(host))).collect();
    all.join(",")
}

/// A host and a port, as they stand in a list of servers.
fn server(text: &str, default_port: u16) -> Option<(String, u16)> {
    let url = Url::parse(&format!("redis://{text}")).ok()?;
    let host = url.host_str().filter(|host| !host.is_empty())?;
    let is_alone = url.path().is_empty() && url.query().is_none() && url.username().is_empty();
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    is_alone.then(|| (host, url.port().unwrap_or(default_port)))
}

impl Redis {
    /// Where the server is.
    #[must_use]
    pub fn address(&self) -> RedisAddress {
        if self.url.scheme() == "unix" {
            let path = percent_decode(self.url.path()).unwrap_or_else(|| self.url.path().to_owned());
            return RedisAddress::Unix(path.into());
        }
        let servers = |port| self.url.query_pairs().filter_map(|(_, text)| server(&text, port)).collect();
        if self.url.scheme() == SENTINEL {
            return RedisAddress::Sentinel {
                sentinels: servers(SENTINEL_PORT),
                primary: percent_decode(self.url.path()).unwrap_or_default(),
            };
        }
        if self.url.scheme() == CLUSTER {
            return RedisAddress::Cluster { nodes: servers(PORT) };
        }
        let host = self.url.host_str().unwrap_or("localhost");
        let skip_verify = || {
            let parameter = self.url.query_pairs().filter(|(name, _)| name == "skip_verify").last();
            parameter.is_some_and(|(_, value)| value == "1" || value.eq_ignore_ascii_case("true"))
        };
        RedisAddress::Tcp {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: self.url.port().unwrap_or(PORT),
            tls: (self.url.scheme() == "rediss").then(|| RedisTls {
                skip_verify: skip_verify(),
            }),
        }
    }
}

/// Whether several replicas share the Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Redis of one instance alone.
    No,
    /// Several share it: without the rights for that the service does not start.
    Must,
    /// Several share it where Redis has the rights for that: charts of the old service say so, and an exchanged image has to start.
    May,
}

/// A mistake must not make each of the replicas watch alone.
pub(super) fn sharing(reader: &mut Reader<'_>) -> Sharing {
    match reader.switch(SHARED) {
        Some(Ok(true)) => {
            if reader.value(URL).is_none() {
                reader.mistake(SHARED, format!("needs a Redis that all replicas use: set {URL}"));
            }
            Sharing::Must
        }
        Some(Ok(false)) => Sharing::No,
        Some(Err(value)) => {
            reader.mistake(SHARED, format!("must be true or false, not {}", super::reader::shown(&value)));
            Sharing::No
        }
        None if reader.value(REPLICA).is_some() && reader.value(URL).is_some() => Sharing::May,
        None => Sharing::No,
    }
}

pub(super) fn redis(reader: &mut Reader<'_>) -> Option<Redis> {
    let (url, password) = (reader.value(URL), reader.value(PASSWORD));
    let Some(url) = url else {
        if password.is_some() {
            reader.warn(format!("{PASSWORD} is ignored, because {URL} is not set"));
        }
        return None;
    };
    let mut redis = match parse(&url) {
        Ok(redis) => redis,
        Err(problem) => {
            reader.mistake(URL, format!("must be an address such as redis://redis:6379, but it {problem}"));
            return None;
        }
    };
    if let Some(password) = password {
        if redis.password.is_some() {
            reader.warn(format!("{PASSWORD} is used, and the password in {URL} ignored"));
        }
        redis.password = Some(Secret::new(password));
    }
    Some(redis)
}

/// An error completes the sentence "it ...".
fn parse(text: &str) -> Result<Redis, &'static str> {
    const ENCODING: &str = "has a `%` that is not followed by two hexadecimal digits: write %25 for it";
    if text.contains(char::is_whitespace) {
        return Err("has white space inside");
    }
    let (scheme, rest) = text
        .split_once("://")
        .ok_or("has no scheme: write redis:// before it, or rediss:// for TLS")?;
    let scheme = match scheme.to_ascii_lowercase().as_str() {
        "redis" | "valkey" => "redis",
        "rediss" | "valkeys" => "rediss",
        "unix" => "unix",
        "redis+sentinel" | "valkey+sentinel" => SENTINEL,
        "redis+cluster" | "valkey+cluster" => CLUSTER,
        _ => return Err("has a scheme other than redis, rediss, valkey, valkeys, redis+sentinel, redis+cluster and unix"),
    };
    // User name and password are taken apart here, because no part of them may reach an error text of the parser.
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(authority_end);
    let (credentials, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (username, password) = match credentials.split_once(':') {
        Some((username, password)) => (username, Some(password)),
        None => (credentials, None),
    };
    let username = percent_decode(username).ok_or(ENCODING)?;
    let password = password.map(|password| percent_decode(password).ok_or(ENCODING)).transpose()?;

    let of_servers = match scheme {
        SENTINEL => Some(sentinels(host, tail)?),
        CLUSTER => Some((cluster(host, tail)?, 0)),
        _ => None,
    };
    if let Some((url, database)) = of_servers {
        return Ok(with(url, database, username, password));
    }
    let default_host = if scheme != "unix" && (host.is_empty() || host.starts_with(':')) {
        "localhost"
    } else {
        ""
    };
    let url = Url::parse(&format!("{scheme}://{default_host}{host}{tail}"))
        .map_err(|_| "is not a valid URL: write special characters of the password percent-encoded, or set LIVEKIT_REDIS_PASSWORD")?;
    if url.fragment().is_some() {
        return Err("has a `#`: write %23 for it");
    }
    let database = database(&url)?;
    Ok(with(url, database, username, password))
}

fn with(url: Url, database: u32, username: String, password: Option<String>) -> Redis {
    Redis {
        url,
        database,
        username: Some(username).filter(|name| !name.is_empty()),
        password: password.filter(|password| !password.is_empty()).map(Secret::new),
    }
}

/// The sentinels before the path, and in it the name of the primary and the number of a database.
fn sentinels(hosts: &str, tail: &str) -> Result<(Url, u32), &'static str> {
    const FORM: &str = "must name sentinels and the primary: redis+sentinel://s1:26379,s2:26379/name/0";
    let mut segments = tail.trim_matches('/').split('/');
    let primary = segments
        .next()
        .filter(|name| !name.is_empty() && !name.contains(['?', '#']))
        .ok_or(FORM)?;
    let database = segments.next().map_or(Ok(0), |text| text.parse().map_err(|_| FORM))?;
    if segments.next().is_some() {
        return Err(FORM);
    }
    let url = with_servers(&format!("{SENTINEL}:{primary}"), hosts).ok_or(FORM)?;
    Ok((url, database))
}

/// Some nodes before the path. A cluster has one database, the first.
fn cluster(hosts: &str, tail: &str) -> Result<Url, &'static str> {
    const FORM: &str = "must name nodes of a cluster and nothing after them: redis+cluster://h1:6379,h2:6379";
    if !matches!(tail, "" | "/" | "/0") {
        return Err(FORM);
    }
    with_servers(&format!("{CLUSTER}:"), hosts).ok_or(FORM)
}

fn with_servers(url: &str, hosts: &str) -> Option<Url> {
    let mut url = Url::parse(url).ok()?;
    for host in hosts.split(',') {
        server(host, PORT)?;
        url.query_pairs_mut().append_pair("server", host);
    }
    Some(url)
}

fn database(url: &Url) -> Result<u32, &'static str> {
    const NOT_A_NUMBER: &str = "names a database that is not a number";
    let mut database = 0;
    if url.scheme() == "unix" {
        if url.path().trim_matches('/').is_empty() {
            return Err("has no path to a socket");
        }
    } else {
        let mut segments = url.path().split('/').filter(|segment| !segment.is_empty());
        if let Some(segment) = segments.next() {
            database = segment.parse().map_err(|_| NOT_A_NUMBER)?;
        }
        if segments.next().is_some() {
            return Err("has a path of more than the number of a database");
        }
    }
    for (name, value) in url.query_pairs() {
        let tls_only = name == "skip_verify" && url.scheme() == "rediss";
        if !tls_only && !PARAMETERS.contains(&name.as_ref()) {
            return Err("has an unknown parameter after the `?` (or a `?` in the password: write %3F for it)");
        }
        if name == "db" && !value.is_empty() {
            database = value.parse().map_err(|_| NOT_A_NUMBER)?;
        }
    }
    Ok(database)
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            plain => plain,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lists_of_servers() {
        for (text, shown, database, password) in [
            (
                "redis+sentinel://s1:26379,s2:26380/lk",
                "redis+sentinel://s1:26379,s2:26380/lk",
                0,
                None,
            ),
            (
                "redis+sentinel://u:p%40@s1,[::1]:1/my-primary/3",
                "redis+sentinel://s1:26379,[::1]:1/my-primary",
                3,
                Some("p@"),
            ),
            ("VALKEY+Sentinel://s1/lk/", "redis+sentinel://s1:26379/lk", 0, None),
            (
                "redis+cluster://h1:7000,h2,[::1]",
                "redis+cluster://h1:7000,h2:6379,[::1]:6379",
                0,
                None,
            ),
            ("valkey+cluster://u:p%40@h1/0", "redis+cluster://h1:6379", 0, Some("p@")),
        ] {
            let redis = parse(text).unwrap();
            assert_eq!(redis.address().to_string(), shown, "{text}");
            assert_eq!(redis.database, database, "{text}");
            assert_eq!(redis.password.as_ref().map(Secret::expose), password, "{text}");
        }
        for text in [
            "redis+sentinel://s1:26379",
            "redis+sentinel:///lk",
            "redis+sentinel://s1,/lk",
            "redis+sentinel://s1:x/lk",
            "redis+sentinel://s1/lk/one",
            "redis+sentinel://s1/lk/1/2",
            "redis+sentinel://s1/?lk",
            "redis+cluster://",
            "redis+cluster://s1,,s2",
            "redis+cluster://s1:6379/1",
            "redis+cluster://s1:6379?db=0",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn reads_the_grammar_of_the_old_service() {
        for (text, url, database, username, password) in [
            ("redis://redis:6379", "redis://redis:6379", 0, None, None),
            ("redis://", "redis://localhost", 0, None, None),
            ("redis://:6380", "redis://localhost:6380", 0, None, None),
            ("redis:///3", "redis://localhost/3", 3, None, None),
            ("REDISS://r/2?skip_verify=true", "rediss://r/2?skip_verify=true", 2, None, None),
            ("valkey://:pw@v/1", "redis://v/1", 1, None, Some("pw")),
            ("Valkeys://v?skip_verify=true", "rediss://v?skip_verify=true", 0, None, None),
            (
                "redis://r/2?db=5&dial_timeout=5s",
                "redis://r/2?db=5&dial_timeout=5s",
                5,
                None,
                None,
            ),
            ("redis://:p%40ss%2Fword@r", "redis://r", 0, None, Some("p@ss/word")),
            (
                "redis://me:p:a@s@[::1]:6379/0",
                "redis://[::1]:6379/0",
                0,
                Some("me"),
                Some("p:a@s"),
            ),
            ("redis://me@r", "redis://r", 0, Some("me"), None),
            ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1", 1, None, None),
            ("unix://me:pw@/run/redis.sock", "unix:///run/redis.sock", 0, Some("me"), Some("pw")),
        ] {
            let redis = parse(text).unwrap();
            assert_eq!(redis.url.as_str(), url, "{text}");
            assert_eq!(redis.database, database, "{text}");
            assert_eq!(redis.username.as_deref(), username, "{text}");
            assert_eq!(redis.password.as_ref().map(Secret::expose), password, "{text}");
        }
    }

    #[test]
    fn knows_where_the_server_is() {
        for (text, shown, skip_verify) in [
            ("redis://", "redis://localhost:6379", None),
            ("redis://u:p@[::1]/3", "redis://[::1]:6379", None),
            ("redis://10.0.0.1:1", "redis://10.0.0.1:1", None),
            ("rediss://r", "rediss://r:6379", Some(false)),
            ("rediss://r:2?skip_verify=true", "rediss://r:2", Some(true)),
            ("rediss://r:2?skip_verify=true&skip_verify=0", "rediss://r:2", Some(false)),
            ("unix://u:p@/run/a%20b.sock?db=1", "unix:///run/a b.sock", None),
        ] {
            let address = parse(text).unwrap().address();
            assert_eq!(address.to_string(), shown, "{text}");
            let tls = match address {
                RedisAddress::Tcp { tls, .. } => tls.map(|tls| tls.skip_verify),
                RedisAddress::Unix(_) | RedisAddress::Sentinel { .. } | RedisAddress::Cluster { .. } => None,
            };
            assert_eq!(tls, skip_verify, "{text}");
        }
    }

    #[test]
    fn refuses_what_the_old_service_refused() {
        for text in [
            "redis:6379",
            "http://redis",
            "valkeyss://v",
            "valkey://v?skip_verify=true",
            "redis://:p/ss@redis",
            "redis://r:port",
            "redis://r/a",
            "redis://r/1/2",
            "redis://r?db=x",
            "redis://r?nonsense=1",
            "redis://r?skip_verify=true",
            "redis://:%zz@r",
            "redis://:%f@r",
            "redis://r#x",
            "unix://",
            "redis://a b",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
