//! Step 2, what a homeserver's users may do. Pure.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::fmt;

use crate::outcome::words;
use crate::server_name::{Host, ServerName};

/// A list of homeservers from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Homeservers<E = ServerName> {
    /// Every homeserver, written as `*`.
    All,
    /// The ones named: compared byte for byte, or by their hosts where the entries are [`HostPattern`]s.
    Listed(BTreeSet<E>),
}

/// An entry of a list of homeservers.
pub trait Entry: Ord + Sized {
    /// Reads an entry; `None` where it can name no homeserver.
    fn parse(text: &str) -> Option<Self>;

    /// Whether an entry of `list` stands for `server`.
    fn is_among(list: &BTreeSet<Self>, server: &ServerName) -> bool;
}

impl Entry for ServerName {
    fn parse(text: &str) -> Option<Self> {
        Self::parse(text).ok()
    }

    fn is_among(list: &BTreeSet<Self>, server: &ServerName) -> bool {
        list.contains(server)
    }
}

/// Homeservers by their host, whatever their port: those of one host, or those of all hosts below a domain (`*.example.com`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPattern(
    /// A host as [`ServerName::host_key`] has it; with a dot before it for all below it.
    Box<str>,
);

impl HostPattern {
    /// The host of this homeserver.
    #[must_use]
    pub fn of(server: &ServerName) -> Self {
        Self(server.host_key().into())
    }

    /// Whether it stands for all that `other` stands for.
    fn covers(&self, other: &Self) -> bool {
        self == other || (self.0.starts_with('.') && other.0.ends_with(&*self.0))
    }

    /// The one host that it stands for, as a server name; `None` for a whole domain.
    #[must_use]
    pub fn host(&self) -> Option<ServerName> {
        if self.0.starts_with('.') {
            return None;
        }
        let bracketed = format!("[{}]", self.0);
        ServerName::parse(&self.0).or_else(|_| ServerName::parse(&bracketed)).ok()
    }
}

impl Entry for HostPattern {
    fn parse(text: &str) -> Option<Self> {
        let Some(domain) = text.strip_prefix("*.") else {
            return ServerName::parse(text).ok().map(|server| Self::of(&server));
        };
        let domain = ServerName::parse(domain).ok()?;
        let host = domain.host_key();
        let is_domain = matches!(domain.parts(), (Host::Name(_), _)) && !host.is_empty() && !host.starts_with('.');
        is_domain.then(|| Self(format!(".{host}").into()))
    }

    fn is_among(list: &BTreeSet<Self>, server: &ServerName) -> bool {
        // Each request asks, and most services list nobody.
        if list.is_empty() {
            return false;
        }
        let host = server.host_key();
        let is_below = |(at, _): (usize, &str)| list.contains(&host[at..]);
        let is_name = matches!(server.parts().0, Host::Name(_));
        list.contains(host.as_str()) || (is_name && host.match_indices('.').any(is_below))
    }
}

/// Looks an entry up by its text.
impl Borrow<str> for HostPattern {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.0.starts_with('.') { "*" } else { "" };
        write!(f, "{star}{}", self.0)
    }
}

impl<E: Entry> Homeservers<E> {
    /// Whether `name` is among the homeservers.
    #[must_use]
    pub fn contains(&self, name: &ServerName) -> bool {
        match self {
            Self::All => true,
            Self::Listed(list) => E::is_among(list, name),
        }
    }

    /// Whether somebody wrote `name` down; `*` names nobody.
    #[must_use]
    pub fn names(&self, name: &ServerName) -> bool {
        !matches!(self, Self::All) && self.contains(name)
    }

    /// The entries; of `*` there are none.
    pub fn entries(&self) -> impl Iterator<Item = &E> {
        match self {
            Self::All => None,
            Self::Listed(list) => Some(list),
        }
        .into_iter()
        .flatten()
    }
}

impl Homeservers {
    /// Whether `name` is among them and nobody else.
    #[must_use]
    pub fn is_only(&self, name: &ServerName) -> bool {
        self.names(name) && self.entries().count() == 1
    }
}

words! {
    /// Kind of track, by LiveKit's names in `canPublishSources`.
    Source {
        /// Track of a camera.
        Camera = "camera",
        /// Track of a microphone.
        Microphone = "microphone",
        /// The picture of a screen.
        ScreenShare = "screen_share",
        /// The sound of a screen.
        ScreenShareAudio = "screen_share_audio",
    }
}

/// Rights of the users of one homeserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Full access: their request opens the room on the SFU. Others can only join a room that stands.
    pub creates_rooms: bool,
    /// Whether the users may send media and data.
    pub publishes: bool,
}

impl Access {
    /// Rights of the users for whom our own homeserver speaks, its own or those of its peers: the room is opened for both, and
    /// whoever is in the Matrix room may be there ([MSC4195](https://github.com/matrix-org/matrix-spec-proposals/pull/4195)).
    #[must_use]
    pub const fn of_member(publishes: bool) -> Self {
        Self {
            creates_rooms: true,
            publishes,
        }
    }
}

/// Rights by homeserver (decisions P4 and T1).
#[derive(Debug, Clone)]
pub struct Policy {
    /// `LIVEKIT_ALLOWED_HOMESERVERS`, our own and those with full access included: nobody else gets anything.
    pub allowed: Homeservers<HostPattern>,
    /// `LIVEKIT_BLOCKED_HOMESERVERS`: these get nothing, wherever else they are listed.
    pub blocked: Homeservers<HostPattern>,
    /// Homeservers in `LIVEKIT_FULL_ACCESS_HOMESERVERS`.
    pub full_access: Homeservers,
    /// `LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS`: restricted users who may publish.
    pub remote_can_publish: Homeservers,
    /// `LIVEKIT_HS_SERVER_NAME`: its users always publish.
    pub own: Option<ServerName>,
}

impl Policy {
    /// Whether `server` is dealt with at all: it is asked, and its users are answered.
    #[must_use]
    pub fn admits(&self, server: &ServerName) -> bool {
        self.allowed.contains(server) && !self.blocked.contains(server)
    }

    /// Entries of lists that come to nothing, since the homeserver gets nothing at all; each with the reason.
    #[must_use]
    pub fn contradictions(&self) -> Vec<String> {
        let is_blocked = |entry: &&HostPattern| self.blocked.entries().any(|blocked| blocked.covers(entry));
        let allowed = self.allowed.entries().filter(is_blocked);
        let allowed = allowed.map(|entry| {
            format!("LIVEKIT_ALLOWED_HOMESERVERS names {entry}, which LIVEKIT_BLOCKED_HOMESERVERS blocks: who is on both is blocked")
        });
        let publishing = self.remote_can_publish.entries().filter(|name| !self.admits(name));
        let publishing = publishing.map(|name| {
            let list = if self.blocked.contains(name) {
                "LIVEKIT_BLOCKED_HOMESERVERS blocks"
            } else {
                "LIVEKIT_ALLOWED_HOMESERVERS leaves out"
            };
            format!("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS names {name}, which {list}: its users get no token at all")
        });
        allowed.chain(publishing).collect()
    }

    /// Returns the rights of the users of `server`.
    #[must_use]
    pub fn of(&self, server: &ServerName) -> Access {
        let creates_rooms = self.full_access.contains(server);
        let ours = self.own.as_ref() == Some(server);
        Access {
            creates_rooms,
            publishes: creates_rooms || ours || self.remote_can_publish.contains(server),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServerName {
        ServerName::parse(text).unwrap()
    }

    fn listed(names: &[&str]) -> Homeservers {
        Homeservers::Listed(names.iter().map(|n| name(n)).collect())
    }

    fn patterns(entries: &[&str]) -> Homeservers<HostPattern> {
        Homeservers::Listed(entries.iter().map(|text| HostPattern::parse(text).expect(text)).collect())
    }

    #[test]
    fn patterns_are_compared_by_host() {
        let list = patterns(&["example.com:8448", "*.Evil.test.", "192.0.2.1", "[2001:db8::1]", "*.0.2.2"]);
        for server in [
            "example.com",
            "EXAMPLE.com.",
            "example.com:9",
            "a.evil.test",
            "a.b.EVIL.test.:1",
            "192.0.2.1:8448",
            "[2001:DB8:0::1]:1",
            "[::ffff:192.0.2.1]",
        ] {
            assert!(list.contains(&name(server)) && list.names(&name(server)), "{server}");
        }
        for server in [
            "b.example.com",
            "example.com.test",
            "evil.test",
            "notevil.test",
            "a.evil.test.example",
            "192.0.2.2",
            "[2001:db8::2]",
        ] {
            assert!(!list.contains(&name(server)), "{server}");
        }
    }

    #[test]
    fn a_pattern_is_a_host_or_a_whole_domain() {
        for (text, shown, host) in [
            ("Example.com.", "example.com", Some("example.com")),
            ("example.com:8448", "example.com", Some("example.com")),
            ("*.Example.com", "*.example.com", None),
            ("[2001:db8:0::1]", "2001:db8::1", Some("[2001:db8::1]")),
        ] {
            let pattern = HostPattern::parse(text).unwrap();
            assert_eq!((pattern.to_string().as_str(), pattern.host()), (shown, host.map(name)), "{text}");
        }
        for text in [
            "",
            "*",
            "*.",
            "*..",
            "*..a",
            "*.*.a",
            "a.*.b",
            "*a.b",
            "*.192.0.2.1",
            "*.[::1]",
            "a_b",
            "https://a",
        ] {
            assert_eq!(HostPattern::parse(text), None, "{text}");
        }
    }

    #[test]
    fn blocked_wins_over_everything() {
        let policy = |allowed, blocked: &[&str]| Policy {
            allowed,
            blocked: patterns(blocked),
            full_access: Homeservers::All,
            remote_can_publish: Homeservers::All,
            own: None,
        };
        let open = policy(Homeservers::All, &["*.evil.test", "evil.test"]);
        let closed = policy(patterns(&["a.test", "*.b.test"]), &["x.b.test"]);
        for (policy, server, admitted) in [
            (&open, "good.test", true),
            (&open, "evil.test", false),
            (&open, "EVIL.test:8448", false),
            (&open, "a.evil.test", false),
            (&closed, "a.test", true),
            (&closed, "a.test:8448", true),
            (&closed, "y.b.test", true),
            (&closed, "x.b.test", false),
            (&closed, "x.b.test.:1", false),
            (&closed, "b.test", false),
            (&closed, "good.test", false),
        ] {
            assert_eq!(policy.admits(&name(server)), admitted, "{server}");
        }
    }

    #[test]
    fn full_access_is_compared_byte_for_byte() {
        let policy = Policy {
            allowed: Homeservers::All,
            blocked: patterns(&[]),
            full_access: listed(&["example.com"]),
            remote_can_publish: Homeservers::All,
            own: None,
        };
        assert_eq!(
            policy.of(&name("example.com")),
            Access {
                creates_rooms: true,
                publishes: true
            }
        );
        for other in ["Example.com", "example.com:8448", "example.com.", "b.example.com"] {
            assert_eq!(
                policy.of(&name(other)),
                Access {
                    creates_rooms: false,
                    publishes: true
                },
                "{other}"
            );
        }
    }

    #[test]
    fn publishing_can_be_withheld_from_strangers_only() {
        let policy = Policy {
            allowed: Homeservers::All,
            blocked: patterns(&[]),
            full_access: listed(&["full.example"]),
            remote_can_publish: listed(&["friend.example"]),
            own: Some(name("own.example")),
        };
        for (server, publishes) in [
            ("full.example", true),
            ("friend.example", true),
            ("own.example", true),
            ("stranger.example", false),
        ] {
            assert_eq!(policy.of(&name(server)).publishes, publishes, "{server}");
        }
    }

    #[test]
    fn a_wildcard_opens_the_door_and_names_nobody() {
        let all: Homeservers = Homeservers::All;
        assert!(all.contains(&name("x.example")) && !all.names(&name("x.example")));
    }
}
