//! What a user may do on the SFU.

use std::collections::BTreeSet;

use crate::server_name::ServerName;

/// A set of homeservers as an operator writes it: `*`, or names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Homeservers {
    /// Every homeserver of the federation (`*`).
    All,
    /// Only these, compared byte for byte.
    Listed(BTreeSet<ServerName>),
}

impl Homeservers {
    /// Whether `server` belongs to the set.
    #[must_use]
    pub fn contains(&self, server: &ServerName) -> bool {
        match self {
            Self::All => true,
            Self::Listed(names) => names.contains(server),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_what_it_names_and_a_star_holds_all() {
        let (one, two) = (ServerName::parse("one.example").unwrap(), ServerName::parse("One.example").unwrap());
        let listed = Homeservers::Listed(BTreeSet::from([one.clone()]));
        assert!(listed.contains(&one));
        assert!(!listed.contains(&two));
        assert!(Homeservers::All.contains(&two));
    }
}
