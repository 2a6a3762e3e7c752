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
