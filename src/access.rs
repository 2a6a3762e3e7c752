//! Step 2, what a homeserver's users may do. Pure.

use std::collections::BTreeSet;

use crate::server_name::ServerName;

/// A list of homeservers from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Homeservers {
    /// Every homeserver, written as `*`.
    All,
    /// The ones named, compared byte for byte.
    Listed(BTreeSet<ServerName>),
}

impl Homeservers {
    /// Whether `name` is among the homeservers.
    #[must_use]
    pub fn contains(&self, name: &ServerName) -> bool {
        match self {
            Self::All => true,
            Self::Listed(names) => names.contains(name),
        }
    }

    /// Whether `name` is among them and nobody else.
    #[must_use]
    pub fn is_only(&self, name: &ServerName) -> bool {
        self.names(name) && matches!(self, Self::Listed(names) if names.len() == 1)
    }

    /// Whether somebody wrote this very name down; `*` names nobody.
    #[must_use]
    pub fn names(&self, name: &ServerName) -> bool {
        match self {
            Self::All => false,
            Self::Listed(names) => names.contains(name),
        }
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
    /// Homeservers in `LIVEKIT_FULL_ACCESS_HOMESERVERS`.
    pub full_access: Homeservers,
    /// `LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS`: restricted users who may publish.
    pub remote_can_publish: Homeservers,
    /// `LIVEKIT_HS_SERVER_NAME`: its users always publish.
    pub own: Option<ServerName>,
}

impl Policy {
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

    #[test]
    fn full_access_is_compared_byte_for_byte() {
        let policy = Policy {
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
        assert!(Homeservers::All.contains(&name("x.example")));
        assert!(!Homeservers::All.names(&name("x.example")));
    }
}
