//! Who sits at which address. Everything is below four neighbouring second octets of 127.0.0.0/8, so that two sieges, and
//! tests that run beside one, do not meet.

use std::net::{Ipv4Addr, SocketAddr};

/// The attackers' source addresses.
pub const ATTACKERS: u64 = 32;
/// Domains of those that verify and then hang, and the /24s that they are on.
pub const DOMAINS: u64 = 200;
const DOMAIN_GROUPS: u64 = 20;
/// Addresses of the victim of the fan-outs.
pub const VICTIMS: u8 = 8;
/// Ports of the victim that SRV records name.
pub const VICTIM_PORTS: [u16; 8] = [8448, 9001, 9002, 9003, 9004, 9005, 9006, 9007];
/// Fresh homeservers that there can be.
pub const MOST_FRESH: u64 = 500;

/// Names.
pub const LISTED: &str = "listed.home.siege";
pub const VERIFIED: &str = "verified.away.siege";

#[derive(Clone, Copy, Debug)]
pub struct Places {
    base: u8,
}

impl Places {
    pub fn of_this_process() -> Self {
        Self {
            base: 224 + (std::process::id() % 7) as u8 * 4,
        }
    }

    /// Those that another process has.
    pub fn below(base: u8) -> Self {
        Self { base }
    }

    pub fn base(self) -> u8 {
        self.base
    }

    /// Where somebody is who is reached by a front at `place` only.
    pub fn behind(self, place: Ipv4Addr) -> Ipv4Addr {
        let [_, octet, c, d] = place.octets();
        Ipv4Addr::new(127, octet, c + 100, d)
    }

    fn at(self, octet: u8, c: u8, d: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.base + octet, c, d)
    }

    pub fn service(self) -> SocketAddr {
        (self.at(0, 0, 1), 8080).into()
    }

    /// Where one of several replicas is; the first one is where a single service would be.
    pub fn replica(self, n: u8) -> SocketAddr {
        (self.at(0, 0, 1 + n), 8080).into()
    }

    /// Where the next instance of the service is, while the last one still stands.
    pub fn other_service(self) -> SocketAddr {
        (self.at(0, 0, 2), 8080).into()
    }

    pub fn redis(self) -> SocketAddr {
        (self.at(0, 55, 1), 6379).into()
    }

    /// Two, one of which stands behind the address above.
    pub fn redis_server(self, which: usize) -> SocketAddr {
        (self.at(0, 155, 1 + (which % 2) as u8), 6379).into()
    }

    pub fn dns(self) -> SocketAddr {
        (self.at(0, 53, 53), 53).into()
    }

    pub fn sfu(self) -> SocketAddr {
        (self.at(0, 54, 1), 7880).into()
    }

    pub fn listed(self) -> Ipv4Addr {
        self.at(0, 1, 1)
    }

    pub fn listed_client_api(self) -> SocketAddr {
        (self.listed(), 8008).into()
    }

    pub fn verified(self) -> Ipv4Addr {
        self.at(0, 2, 1)
    }

    /// Homeservers that nobody has heard of, each on a /24 of its own.
    pub fn fresh(self, k: u64) -> Ipv4Addr {
        self.at(2 + (k / 250 % 2) as u8, (k % 250) as u8, 1)
    }

    /// Where honest clients, webhooks and health checks come from.
    pub fn honest(self, n: u64) -> Ipv4Addr {
        self.at(0, 200, 1 + (n % 40) as u8)
    }

    pub fn attacker(self, n: u64) -> Ipv4Addr {
        self.at(1, 200, 1 + (n % ATTACKERS) as u8)
    }

    pub fn tarpit(self, n: u64) -> Ipv4Addr {
        self.at(1, 30 + (n % 4) as u8, 1)
    }

    pub fn spelled(self, n: u64) -> Ipv4Addr {
        self.at(1, 40 + (n % 4) as u8, 1)
    }

    pub fn slow(self, n: u64) -> Ipv4Addr {
        self.at(1, 50 + (n % 4) as u8, 1)
    }

    pub fn bomb(self, n: u64) -> Ipv4Addr {
        self.at(1, 60 + (n % 8) as u8, 1)
    }

    pub fn informer(self, n: u64) -> Ipv4Addr {
        self.at(1, 70 + (n % 4) as u8, 1)
    }

    pub fn redirector(self) -> Ipv4Addr {
        self.at(1, 80, 1)
    }

    pub fn victim(self, n: u8) -> Ipv4Addr {
        self.at(1, 90, 1 + n % VICTIMS)
    }

    pub fn domain(self, k: u64) -> Ipv4Addr {
        self.at(1, 100 + (k % DOMAIN_GROUPS) as u8, 1 + (k / DOMAIN_GROUPS % 100) as u8)
    }
}

/// The number behind the letters of a label: 17 of `f17`.
pub fn number(label: &str) -> Option<u64> {
    label.trim_start_matches(|c: char| c.is_ascii_alphabetic()).parse().ok()
}

/// A number that looks like nothing, for each number.
pub fn scrambled(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
