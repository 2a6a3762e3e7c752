//! Decides whose request may go on (decisions H7, H7a, H7b). Nobody keeps anybody else from being served: places are shared by who
//! is reached and not by how the asker wrote it, and a full share delays its own.
//!
//! The modules below decide and are pure.

pub mod budget;
pub mod crowd;
pub mod dials;
pub mod fair_queue;
pub mod limiter;
pub mod lookups;
pub mod rate_limiter;
pub mod rates;
pub mod room;
pub mod verified;

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;

use crate::server_name::{Host, ServerName};

/// How well a homeserver is known here. Each class has a share of its own of everything that is scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The operator wrote the homeserver's name down.
    Listed,
    /// The homeserver has answered `userinfo` well within a day.
    Verified,
    /// Any other homeserver: a stranger could have made the name up.
    Stranger,
}

impl Class {
    /// All classes, the most trusted first.
    pub const ALL: [Self; 3] = [Self::Listed, Self::Verified, Self::Stranger];
}

/// The machines that a homeserver is on, as far as they can be told from others: the /24 (IPv6: /48) of the address that is
/// dialled for it, or the host name that a forward proxy dials. Names cost an attacker nothing, networks do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// An IPv4 /24.
    V4([u8; 3]),
    /// An IPv6 /48.
    V6([u8; 6]),
    /// A host name, hashed: a forward proxy looks it up.
    Proxied(u64),
}

impl From<IpAddr> for Group {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let [a, b, c, _] = v4.octets();
                Self::V4([a, b, c])
            }
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, ..] = v6.octets();
                Self::V6([a, b, c, d, e, f])
            }
        }
    }
}

/// Identifies the sender of a request, as far as that can be told: clients order those who wait for one homeserver, and nobody is
/// refused for being one (decision H7b).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client(pub u64);

impl From<IpAddr> for Client {
    /// Takes an IPv4 address whole and of an IPv6 address its /64: as much as one customer has.
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self(u64::from(v4.to_bits())),
            IpAddr::V6(v6) => Self((v6.to_bits() >> 64) as u64),
        }
    }
}

/// A homeserver as admission tells it from others: hashes with a key of this process, since the names come from strangers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Who {
    /// Class of the homeserver: how well it is known.
    pub class: Class,
    /// The last two labels of its name: what somebody had to register. They order turns and nothing else.
    pub domain: u64,
    /// Hash of the homeserver's name without case, final dot and port.
    pub name: u64,
}

impl Who {
    /// Returns an asker of its own for finding out where the homeserver is: that must not stand behind the requests that wait for
    /// it.
    #[must_use]
    pub const fn discovered(self) -> Self {
        Self { name: !self.name, ..self }
    }
}

/// Makes [`Who`] of names, with keys of this process.
#[derive(Debug, Default)]
pub struct NameHasher(RandomState, RandomState);

/// The last two labels of a server's [`ServerName::host_key`], which had to be registered; all of an address.
fn domain<'a>(server: &ServerName, host_key: &'a str) -> &'a str {
    match server.parts().0 {
        Host::Ip(_) => host_key,
        Host::Name(_) => host_key.rmatch_indices('.').nth(1).map_or(host_key, |(at, _)| &host_key[at + 1..]),
    }
}

impl NameHasher {
    /// `server`, which is of `class`.
    #[must_use]
    pub fn who(&self, server: &ServerName, class: Class) -> Who {
        let host = server.host_key();
        Who {
            class,
            domain: self.hash(domain(server, &host)),
            name: self.hash(&host),
        }
    }

    /// A hash of `text` with the key of this process.
    #[must_use]
    pub fn hash(&self, text: &str) -> u64 {
        self.0.hash_one(text)
    }

    /// Two independent hashes of `text`, where two texts that are taken for one would be worse than a late answer.
    #[must_use]
    pub fn fingerprint(&self, text: &str) -> u128 {
        u128::from(self.0.hash_one(text)) << 64 | u128::from(self.1.hash_one(text))
    }

    /// A hash of a group with the key of this process.
    #[must_use]
    pub fn hash_of(&self, group: &Group) -> u64 {
        self.0.hash_one(group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(hasher: &NameHasher, text: &str) -> Who {
        hasher.who(&ServerName::parse(text).unwrap(), Class::Stranger)
    }

    #[test]
    fn spellings_are_one_homeserver() {
        let hasher = NameHasher::default();
        for other in ["EVIL.test", "evil.test.", "evil.test:9443", "Evil.Test.:09443"] {
            assert_eq!(who(&hasher, other), who(&hasher, "evil.test"), "{other}");
        }
        assert_eq!(who(&hasher, "[::ffff:192.0.2.1]:1"), who(&hasher, "192.0.2.1"));
        assert_ne!(who(&hasher, "a.evil.test").name, who(&hasher, "evil.test").name);
        assert_eq!(who(&hasher, "a.b.evil.test").domain, who(&hasher, "evil.test").domain);
        assert_ne!(who(&hasher, "192.0.2.1").domain, who(&hasher, "198.51.2.1").domain);
    }

    #[test]
    fn neighbours_are_one_group() {
        let group = |text: &str| Group::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(group("192.0.2.1"), group("192.0.2.255"));
        assert_eq!(group("192.0.2.1"), group("::ffff:192.0.2.9"));
        assert_ne!(group("192.0.2.1"), group("192.0.3.1"));
        assert_eq!(group("2001:db8:1::1"), group("2001:db8:1:ffff::1"));
        assert_ne!(group("2001:db8:1::1"), group("2001:db8:2::1"));
    }
}
