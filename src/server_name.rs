//! The name of a homeserver, checked against the grammar of the Matrix specification
//! ([appendices, "Server Name"](https://spec.matrix.org/v1.16/appendices/#server-name)).
//!
//! It says nothing about where that homeserver is: that is `federation.rs`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest server name in bytes: it must fit into a user ID, which has 255.
const MAX_BYTES: usize = 252;

/// A syntactically valid server name: `host[:port]`. Compared byte for byte (decision O7).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServerName(Box<str>);

/// Host in front of the port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// An IPv4 address, or an IPv6 address in brackets.
    Ip(IpAddr),
    /// A name to ask DNS about.
    Name(Box<str>),
}

impl Host {
    /// Whether programs that know more spellings of IPv4 addresses than Rust may take this name for one: its last label is a number
    /// ("ends in a number", WHATWG URL 3.5).
    #[must_use]
    pub fn ends_in_number(&self) -> bool {
        let Self::Name(name) = self else { return false };
        let name = name.strip_suffix('.').unwrap_or(name);
        let last = name.rsplit('.').next().unwrap_or(name);
        let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
        let is_hex = hex.is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        is_hex || (!last.is_empty() && last.bytes().all(|digit| digit.is_ascii_digit()))
    }
}

/// The text is not a server name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a Matrix server name (host, host:port, or an IPv6 address in brackets)")]
pub struct InvalidServerName;

impl ServerName {
    /// Checks `text` against the grammar.
    ///
    /// # Errors
    /// When it is empty, longer than a user ID allows, or breaks the grammar.
    pub fn parse(text: &str) -> Result<Self, InvalidServerName> {
        if text.len() > MAX_BYTES {
            return Err(InvalidServerName);
        }
        split(text).ok_or(InvalidServerName)?;
        Ok(Self(text.into()))
    }

    /// The name in the spelling that was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host without case and final dot: spellings that reach the same machine are one homeserver.
    #[must_use]
    pub fn host_key(&self) -> String {
        match self.parts().0 {
            Host::Ip(ip) => ip.to_canonical().to_string(),
            Host::Name(name) => name.trim_end_matches('.').to_ascii_lowercase(),
        }
    }

    /// [`Self::host_key`] with the explicit port, which whoever names the server chooses.
    #[must_use]
    pub fn host_and_port_key(&self) -> String {
        let (host, port) = (self.host_key(), self.parts().1);
        match port {
            None => host,
            Some(port) if host.contains(':') => format!("[{host}]:{port}"),
            Some(port) => format!("{host}:{port}"),
        }
    }

    /// Host and explicit port.
    #[must_use]
    pub fn parts(&self) -> (Host, Option<u16>) {
        // `parse` is the only constructor and has split the same text.
        split(&self.0).unwrap_or_else(|| (Host::Name(self.0.clone()), None))
    }
}

fn split(text: &str) -> Option<(Host, Option<u16>)> {
    let (host, port) = match text.rsplit_once(':') {
        // The last colon of a bracketed address without port stands inside the brackets.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port_number(port).filter(|_| port.len() <= 5)?)),
        _ => (text, None),
    };
    Some((parse_host(host)?, port))
}

/// Reads a port: digits and nothing else, though Rust takes a sign before them.
pub(crate) fn port_number(digits: &str) -> Option<u16> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

fn parse_host(host: &str) -> Option<Host> {
    if let Some(inner) = host.strip_prefix('[') {
        let address: Ipv6Addr = inner.strip_suffix(']')?.parse().ok()?;
        return Some(Host::Ip(address.into()));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some(Host::Ip(address.into()));
    }
    let dns = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    dns.then(|| Host::Name(host.into()))
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_grammar() {
        for (text, host, port) in [
            ("example.com", Host::Name("example.com".into()), None),
            ("Example.COM:8448", Host::Name("Example.COM".into()), Some(8448)),
            ("localhost:08448", Host::Name("localhost".into()), Some(8448)),
            ("1.2.3.4", Host::Ip([1, 2, 3, 4].into()), None),
            ("1.2.3.4:80", Host::Ip([1, 2, 3, 4].into()), Some(80)),
            ("[::1]", Host::Ip(Ipv6Addr::LOCALHOST.into()), None),
            ("[2001:db8::1]:443", Host::Ip("2001:db8::1".parse().unwrap()), Some(443)),
            ("127.1", Host::Name("127.1".into()), None),
            ("0x7f000001", Host::Name("0x7f000001".into()), None),
        ] {
            let name = ServerName::parse(text).unwrap();
            assert_eq!(name.parts(), (host, port), "{text}");
            assert_eq!(name.as_str(), text);
        }
    }

    #[test]
    fn knows_other_spellings_of_addresses() {
        let ends_in_number = |text: &str| ServerName::parse(text).unwrap().parts().0.ends_in_number();
        for text in [
            "0x7f000001",
            "0X7F.1",
            "10.0x1",
            "169.254.0xa9fe:443",
            "127.1",
            "127.0.0.1.",
            "2130706433",
            "a.0x",
        ] {
            assert!(ends_in_number(text), "{text}");
        }
        for text in ["example.org", "0xcafe.example", "1.2.3.4", "[::1]", "1.2.example.", "x1", "0xg"] {
            assert!(!ends_in_number(text), "{text}");
        }
    }

    #[test]
    fn refuses_everything_else() {
        let long = "a".repeat(253);
        for text in [
            "",
            ":",
            ":80",
            "example.com:",
            "example.com:65536",
            "example.com:+1",
            "example.com:123456",
            "a b",
            "a/b",
            "a@b",
            "a_b",
            "é.example",
            "::1",
            "[::1",
            "::1]",
            "[1.2.3.4]",
            "[]",
            "[::1%25eth0]",
            "[::1]:x",
            "a\n",
            "a\0b",
            "http://a",
            &long,
        ] {
            assert_eq!(ServerName::parse(text), Err(InvalidServerName), "{text:?}");
        }
    }
}
