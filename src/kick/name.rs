//! Names on the SFU, kept in little space. Pure.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// A room or an identity. Most are hashes (`identity.rs`), which are kept as the 32 bytes that they stand for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Name(Kind);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Hash([u8; 32]),
    Text(Box<str>),
}

impl Name {
    /// The least of all names.
    pub const FIRST: Self = Self(Kind::Hash([0; 32]));
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        let mut hash = [0; 32];
        // Only what is written exactly as we would write it: two names must never become one.
        let exact = STANDARD_NO_PAD.decode_slice(name, &mut hash) == Ok(32) && STANDARD_NO_PAD.encode(hash) == name;
        Self(if exact { Kind::Hash(hash) } else { Kind::Text(name.into()) })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Hash(hash) => f.write_str(&STANDARD_NO_PAD.encode(hash)),
            Kind::Text(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{ROOM_SLOT, legacy_identity, member_identity, room_alias};
    use proptest::prelude::*;

    #[test]
    fn hashes_take_no_more_than_their_bytes() {
        for hash in [room_alias("!r:x", ROOM_SLOT), member_identity("@a:x", "D", "m")] {
            let name = Name::from(hash.as_str());
            assert!(matches!(name.0, Kind::Hash(_)), "{hash}");
            assert_eq!(name.to_string(), hash);
        }
        assert!(matches!(Name::from(legacy_identity("@a:x", "D").as_str()).0, Kind::Text(_)));
        assert!(size_of::<Name>() <= 40);
    }

    proptest! {
        /// Of 43 characters, too, the last of which may hold bits that no hash has.
        #[test]
        fn every_name_comes_back(name in "[A-Za-z0-9+/]{43}|[A-Za-z0-9+/]{42}[AQgw]|\\PC{0,60}") {
            prop_assert_eq!(Name::from(name.as_str()).to_string(), name);
        }
    }
}
