//! Guards which addresses may be dialled for a name that a stranger chose (decision O5). Pure.
//!
//! Source of the ranges: the IANA special-purpose address registries
//! ([IPv4](https://www.iana.org/assignments/iana-ipv4-special-registry),
//! [IPv6](https://www.iana.org/assignments/iana-ipv6-special-registry)), RFC 6890.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Origin of the name that led to the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The operator wrote this homeserver's name down: it may live in a private network.
    Listed,
    /// A client sent the name, and anybody could have.
    Stranger,
}

/// The address must not be dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AddressDenied {
    /// Loopback, private, unique-local or carrier-NAT: allowed for listed names and allowed networks.
    #[error("the address is in a private network")]
    Private,
    /// Unspecified, link-local, multicast, broadcast, documentation or reserved: never allowed.
    #[error("the address is in a range that is never dialled (link-local, multicast, documentation or reserved)")]
    Never,
}

/// The rule, with what the operator allows on top.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    /// Networks in `LIVEKIT_FEDERATION_ALLOWED_NETWORKS`.
    pub allowed_networks: Vec<IpNet>,
    /// TLS verification is off: a lab, where everything is private.
    pub lab: bool,
}

impl Guard {
    /// Whether `address` may be dialled.
    ///
    /// # Errors
    /// With the kind of range that it lies in.
    pub fn check(&self, address: IpAddr, trust: Trust) -> Result<(), AddressDenied> {
        match class(address) {
            Class::Public => Ok(()),
            Class::Never => Err(AddressDenied::Never),
            Class::Private => {
                let allowed = self
                    .allowed_networks
                    .iter()
                    .any(|net| net.contains(&address) || net.contains(&address.to_canonical()));
                if allowed || self.lab || trust == Trust::Listed {
                    Ok(())
                } else {
                    Err(AddressDenied::Private)
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Public,
    Private,
    Never,
}

fn class(address: IpAddr) -> Class {
    match address {
        IpAddr::V4(v4) => class_v4(v4),
        // An address that carries another is as bad as the worse of the two.
        IpAddr::V6(v6) => embedded(v6).into_iter().map(class_v4).fold(class_v6(v6), Ord::max),
    }
}

fn class_v4(address: Ipv4Addr) -> Class {
    let within = |nets: &[([u8; 4], u8)]| {
        nets.iter()
            .any(|&(base, bits)| Ipv4Net::new_assert(base.into(), bits).contains(&address))
    };
    if within(&[
        ([0, 0, 0, 0], 8),       // "this network", unspecified
        ([169, 254, 0, 0], 16),  // link-local, cloud metadata
        ([192, 0, 0, 0], 24),    // IETF protocol assignments
        ([192, 0, 2, 0], 24),    // documentation
        ([192, 88, 99, 0], 24),  // 6to4 relay anycast, deprecated
        ([198, 18, 0, 0], 15),   // benchmarking
        ([198, 51, 100, 0], 24), // documentation
        ([203, 0, 113, 0], 24),  // documentation
        ([224, 0, 0, 0], 4),     // multicast
        ([240, 0, 0, 0], 4),     // reserved, broadcast
    ]) {
        Class::Never
    } else if within(&[
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([127, 0, 0, 0], 8),
        ([172, 16, 0, 0], 12),
        ([192, 168, 0, 0], 16),
    ]) {
        Class::Private
    } else {
        Class::Public
    }
}

fn class_v6(address: Ipv6Addr) -> Class {
    let within = |net: &str| net.parse::<Ipv6Net>().is_ok_and(|net| net.contains(&address));
    if address.is_loopback() || within("fc00::/7") {
        Class::Private
    } else if !address.is_unspecified()
        && (within("::ffff:0:0/96") || within("::/96") || within("64:ff9b::/96") || within("64:ff9b:1::/48"))
    {
        // Mere wrappers: what they carry decides.
        Class::Public
    } else if within("2001::/32") {
        Class::Public // Teredo, a wrapper too
    } else if within("2001::/23") || within("2001:db8::/32") || within("3fff::/20") || !within("2000::/3") {
        // Protocol assignments, documentation, and all outside global unicast: link-local, multicast, reserved.
        Class::Never
    } else {
        Class::Public
    }
}

/// The IPv4 addresses inside an IPv6 address.
fn embedded(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let o = address.octets();
    let v4 = |a: usize, b: usize, c: usize, d: usize| Ipv4Addr::new(o[a], o[b], o[c], o[d]);
    let last = v4(12, 13, 14, 15);
    match address.segments() {
        // Loopback and unspecified look like IPv4-compatible addresses.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => vec![],
        // IPv4-mapped, IPv4-compatible, NAT64 (RFC 6052).
        [0, 0, 0, 0, 0, 0 | 0xffff, _, _] | [0x64, 0xff9b, 0, 0, 0, 0, _, _] => vec![last],
        // NAT64 for local use (RFC 8215): a /48 (RFC 6052, 2.2), or a /96 inside of it.
        // What is not used of the two forms is zero.
        [0x64, 0xff9b, 1, ..] => [v4(6, 7, 9, 10), last].into_iter().filter(|v4| !v4.is_unspecified()).collect(),
        // 6to4 (RFC 3056).
        [0x2002, ..] => vec![v4(2, 3, 4, 5)],
        // Teredo (RFC 4380): the server, and the client with its bits flipped.
        [0x2001, 0, ..] => vec![v4(4, 5, 6, 7), Ipv4Addr::from_bits(!last.to_bits())],
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(address: &str, trust: Trust) -> Result<(), AddressDenied> {
        Guard::default().check(address.parse().unwrap(), trust)
    }

    #[test]
    fn public_addresses_pass() {
        for address in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.255.255",
            "172.32.0.1",
            "192.0.1.1",
            "198.17.255.255",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00::1",
            "::ffff:1.1.1.1",
            "::1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::1",
            "2001:0:101:101::fefe:fefe",
        ] {
            assert_eq!(verdict(address, Trust::Stranger), Ok(()), "{address}");
        }
    }

    #[test]
    fn private_addresses_are_for_listed_names() {
        for address in [
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "::1",
            "fc00::1",
            "fd12::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::a00:1",
            "2002:a00:1::1",
            "2002:7f00:1::",
            "2001:0:a00:1::fefe:fefe",
            "2001:0:101:101::f5ff:fffe",
        ] {
            assert_eq!(verdict(address, Trust::Stranger), Err(AddressDenied::Private), "{address}");
        }
        for address in ["10.0.0.1", "127.0.0.1", "::1", "fd12::1", "::ffff:127.0.0.1"] {
            assert_eq!(verdict(address, Trust::Listed), Ok(()), "{address}");
        }
    }

    #[test]
    fn some_ranges_are_never_dialled() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
            "3fff::1",
            "100::1",
            "2001:2::1",
            "2001:20::1",
            "5f00::1",
            "4000::1",
            "::ffff:169.254.169.254",
            "::169.254.1.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1:a9fe:a9:fe00::",
            "2002:a9fe:a9fe::1",
            "2001:0:a9fe:a9fe::fefe:fefe",
            "2001:0:101:101::5601:5601",
        ] {
            for trust in [Trust::Stranger, Trust::Listed] {
                assert_eq!(verdict(address, trust), Err(AddressDenied::Never), "{address}");
            }
            let lab = Guard {
                allowed_networks: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
                lab: true,
            };
            assert_eq!(
                lab.check(address.parse().unwrap(), Trust::Listed),
                Err(AddressDenied::Never),
                "{address}"
            );
        }
    }

    #[test]
    fn networks_can_be_allowed() {
        let guard = Guard {
            allowed_networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
            lab: false,
        };
        for (address, allowed) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("10.2.0.1", false),
            ("fd00::1", true),
            ("fc00::1", false),
        ] {
            assert_eq!(guard.check(address.parse().unwrap(), Trust::Stranger).is_ok(), allowed, "{address}");
        }
        let lab = Guard {
            allowed_networks: vec![],
            lab: true,
        };
        assert_eq!(lab.check("127.0.0.1".parse().unwrap(), Trust::Stranger), Ok(()));
    }
}
