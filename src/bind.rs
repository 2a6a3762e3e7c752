//! Where the service listens (decision P8), and where the healthcheck therefore finds it.
//!
//! It does not know which variable the address came from: that is `config.rs`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::{TcpListener, TcpSocket};

use crate::server_name::port_number;

/// New connections that the kernel keeps until they are taken: as many as may have a request in flight. Beyond it, it drops
/// them, and clients try again after one, three and seven seconds.
const BACKLOG: u32 = 4096;

/// Bytes that the kernel keeps for a connection in each direction: some ten requests, or answers.
const KERNEL_BUFFER_BYTES: u32 = 16 * 1024;

/// An address to listen on, as the operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// No host at all (`:8080`): IPv6 and IPv4.
    Any,
    Ip(IpAddr),
    /// A host name, or an IPv6 address with a zone, which only the system's resolver understands.
    Name(String),
}

/// The text is not an address to listen on; the message says what to write instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBind {
    /// There is no port.
    #[error("has no port: write :8080 for all addresses, or host:port")]
    NoPort,
    /// The port is a name, or out of range.
    #[error("needs a port number from 0 to 65535 (service names such as :http are not understood)")]
    Port,
    /// An IPv6 address without brackets.
    #[error("has too many colons: write an IPv6 address in brackets, as in [::1]:8080")]
    Brackets,
    /// The host part is neither an address nor a name.
    #[error("is not an address to listen on: write :8080, host:port or [IPv6]:port, without a scheme, a path or quotes")]
    Host,
}

impl Bind {
    /// All addresses of this machine, IPv6 and IPv4.
    #[must_use]
    pub const fn any(port: u16) -> Self {
        Self { host: Host::Any, port }
    }

    /// Reads `:8080`, `host:port`, `[v6]:port` or a bare port number.
    ///
    /// # Errors
    /// When the text is none of these.
    pub fn parse(text: &str) -> Result<Self, InvalidBind> {
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            return port_number(text).map(Self::any).ok_or(InvalidBind::Port);
        }
        let (host, port) = match text.rsplit_once(':') {
            // The last colon stands inside the brackets.
            Some((_, rest)) if rest.ends_with(']') => return Err(InvalidBind::NoPort),
            Some(split) => split,
            None => return Err(InvalidBind::NoPort),
        };
        // The host first: for `http://host` and `::1` its message is the helpful one.
        let host = parse_host(host)?;
        port_number(port).map(|port| Self { host, port }).ok_or(InvalidBind::Port)
    }

    /// The addresses to try, the best first.
    ///
    /// A name gives its IPv4 addresses before its IPv6 ones, as the old service preferred them.
    ///
    /// # Errors
    /// When a host name cannot be resolved.
    pub async fn candidates(&self) -> io::Result<Vec<SocketAddr>> {
        let at = |ip: IpAddr| SocketAddr::new(ip, self.port);
        match &self.host {
            Host::Any => Ok(vec![at(Ipv6Addr::UNSPECIFIED.into()), at(Ipv4Addr::UNSPECIFIED.into())]),
            Host::Ip(ip) => Ok(vec![at(*ip)]),
            Host::Name(name) => {
                let mut found: Vec<_> = tokio::net::lookup_host((name.as_str(), self.port)).await?.collect();
                found.sort_by_key(SocketAddr::is_ipv6);
                Ok(found)
            }
        }
    }

    /// Opens the port.
    ///
    /// `[::]` serves IPv4 as well, unless the administrator of a Linux machine has set `net.ipv6.bindv6only` to 1;
    /// `0.0.0.0` is the way out where the machine or the sandbox knows no IPv6.
    ///
    /// # Errors
    /// When no candidate can be opened; the text names the address.
    pub async fn listen(&self) -> io::Result<TcpListener> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {self}: {error}"));
        let mut failure = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
        for candidate in self.candidates().await.map_err(named)? {
            match open(candidate) {
                Ok(listener) => return Ok(listener),
                Err(error) => failure = error,
            }
            // Somebody else has the port: half of the addresses would only hide that.
            if matches!(failure.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) {
                break;
            }
        }
        Err(named(failure))
    }

    /// Host and port to reach the service from the same machine: loopback where it listens on every address.
    #[must_use]
    pub fn healthcheck_targets(&self) -> Vec<(String, u16)> {
        let (v6, v4) = (Ipv6Addr::LOCALHOST.to_string(), Ipv4Addr::LOCALHOST.to_string());
        let hosts = match &self.host {
            Host::Any => vec![v6, v4],
            Host::Ip(IpAddr::V6(ip)) if ip.is_unspecified() => vec![v6, v4],
            Host::Ip(IpAddr::V4(ip)) if ip.is_unspecified() => vec![v4],
            Host::Ip(ip) => vec![ip.to_string()],
            Host::Name(name) => vec![name.clone()],
        };
        hosts.into_iter().map(|host| (host, self.port)).collect()
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Any => write!(f, ":{}", self.port),
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Name(name) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Remedy where a port cannot be opened.
#[must_use]
pub fn remedy(error: &io::Error) -> &'static str {
    let kind = error.kind();
    if kind == io::ErrorKind::PermissionDenied {
        "ports below 1024 need a right that this process does not have (CAP_NET_BIND_SERVICE): choose another one, as :8080"
    } else if kind == io::ErrorKind::AddrNotAvailable {
        "this machine, or container, has no such address: write :PORT for all that it has"
    } else {
        "is another program using the port?"
    }
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A restarted service gets its port back at once.
    socket.set_reuseaddr(true)?;
    // Each connection gets these: what clients send ahead and do not fetch is in memory that counts as ours (decision P14).
    socket.set_recv_buffer_size(KERNEL_BUFFER_BYTES)?;
    socket.set_send_buffer_size(KERNEL_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn parse_host(host: &str) -> Result<Host, InvalidBind> {
    if host.is_empty() {
        return Ok(Host::Any);
    }
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let (address, zone) = inner.split_once('%').map_or((inner, None), |(address, zone)| (address, Some(zone)));
        let ip: Ipv6Addr = address.parse().map_err(|_| InvalidBind::Host)?;
        return match zone {
            None => Ok(Host::Ip(ip.into())),
            Some(zone) if is_name(zone) => Ok(Host::Name(inner.to_owned())),
            Some(_) => Err(InvalidBind::Host),
        };
    }
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(Host::Ip(ip.into()));
    }
    if is_name(host) {
        return Ok(Host::Name(host.to_owned()));
    }
    let bare_v6 = host.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.');
    Err(if bare_v6 { InvalidBind::Brackets } else { InvalidBind::Host })
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_every_form_in_use() {
        for (text, shown) in [
            (":8080", ":8080"),
            ("8080", ":8080"),
            ("0.0.0.0:8080", "0.0.0.0:8080"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::]:8080", "[::]:8080"),
            ("[::1]:6080", "[::1]:6080"),
            ("localhost:8080", "localhost:8080"),
            ("my_host.internal:80", "my_host.internal:80"),
            ("[fe80::1%eth0]:8080", "[fe80::1%eth0]:8080"),
            (":08080", ":8080"),
        ] {
            assert_eq!(Bind::parse(text).unwrap().to_string(), shown, "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_and_says_what_to_write() {
        for (text, error) in [
            ("", InvalidBind::NoPort),
            ("localhost", InvalidBind::NoPort),
            ("[::1]", InvalidBind::NoPort),
            ("8080x", InvalidBind::NoPort),
            (":", InvalidBind::Port),
            ("localhost:", InvalidBind::Port),
            (":http", InvalidBind::Port),
            (":+80", InvalidBind::Port),
            (":65536", InvalidBind::Port),
            ("99999", InvalidBind::Port),
            ("::1:8080", InvalidBind::Brackets),
            ("::8080", InvalidBind::Brackets),
            ("http://localhost:8080", InvalidBind::Host),
            ("\":8080\"", InvalidBind::Host),
            ("*:8080", InvalidBind::Host),
            ("[zz]:8080", InvalidBind::Host),
            ("[fe80::1%]:80", InvalidBind::Host),
            ("a b:80", InvalidBind::Host),
        ] {
            assert_eq!(Bind::parse(text), Err(error), "{text}");
        }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn no_host_means_both_families_and_a_name_prefers_ipv4() {
        let addresses = |text: &str| block_on(Bind::parse(text).unwrap().candidates()).unwrap();
        assert_eq!(addresses(":80"), ["[::]:80".parse().unwrap(), "0.0.0.0:80".parse().unwrap()]);
        assert_eq!(addresses("[::]:80"), ["[::]:80".parse().unwrap()]);
        assert_eq!(addresses("0.0.0.0:80"), ["0.0.0.0:80".parse().unwrap()]);
        assert_eq!(addresses("localhost:80")[0], "127.0.0.1:80".parse().unwrap());
    }

    #[test]
    fn no_host_serves_ipv4() {
        block_on(async {
            let port = Bind::any(0).listen().await.unwrap().local_addr().unwrap().port();
            let listener = Bind::any(port).listen().await.unwrap();
            let connect = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port));
            let (accepted, connected) = tokio::join!(listener.accept(), connect);
            assert!(accepted.is_ok() && connected.is_ok());
        });
    }

    #[test]
    fn a_failure_names_the_address() {
        block_on(async {
            let taken = Bind::parse("localhost:0").unwrap().listen().await.unwrap();
            let port = taken.local_addr().unwrap().port();
            let error = Bind::parse(&format!("localhost:{port}")).unwrap().listen().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(
                error.to_string().starts_with(&format!("cannot listen on localhost:{port}: ")),
                "{error}"
            );
            // Too long for DNS, so no server is asked.
            let name = format!("{}:80", "a".repeat(64));
            let error = Bind::parse(&name).unwrap().listen().await.unwrap_err();
            assert!(error.to_string().starts_with(&format!("cannot listen on {name}: ")), "{error}");
        });
    }

    #[test]
    fn the_healthcheck_connects_where_somebody_listens() {
        for (text, hosts) in [
            (":8080", &["::1", "127.0.0.1"] as &[&str]),
            ("8080", &["::1", "127.0.0.1"]),
            ("[::]:8080", &["::1", "127.0.0.1"]),
            ("0.0.0.0:8080", &["127.0.0.1"]),
            ("192.0.2.7:8080", &["192.0.2.7"]),
            ("[2001:db8::7]:8080", &["2001:db8::7"]),
            ("localhost:8080", &["localhost"]),
        ] {
            let expected: Vec<_> = hosts.iter().map(|host| ((*host).to_owned(), 8080)).collect();
            assert_eq!(Bind::parse(text).unwrap().healthcheck_targets(), expected, "{text}");
        }
    }
}
