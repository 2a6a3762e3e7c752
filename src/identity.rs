//! Names on the SFU: the room alias and the participant identity. Pure.
//!
//! Both are hashes that other clients and services compute too, so every byte counts
//! ([MSC4195](https://github.com/matrix-org/matrix-spec-proposals/pull/4195)): unpadded standard base64 of the SHA-256
//! of a compact JSON array of strings. The JSON is plain: `<`, `>`, `&`, U+2028 and U+2029 stand for themselves, as in
//! the MSC and in matrix-js-sdk, and not escaped as Go's encoder does it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest as _, Sha256};

/// The slot that every legacy client means: the one call of a room.
pub const ROOM_SLOT: &str = "m.call#ROOM";

/// Identifies a participant on the SFU: a LiveKit room and the identity in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ParticipantKey {
    /// Name of the LiveKit room.
    pub room: String,
    /// Identity of the participant, the `sub` of the LiveKit token.
    pub identity: String,
}

/// The LiveKit room of a slot in a Matrix room.
#[must_use]
pub fn room_alias(room_id: &str, slot_id: &str) -> String {
    hash(&[room_id, slot_id])
}

/// The identity of a session member, as `/get_token` clients expect it.
#[must_use]
pub fn member_identity(user_id: &str, device_id: &str, member_id: &str) -> String {
    hash(&[user_id, device_id, member_id])
}

/// The identity of a session member behind the homeserver's own endpoints, where the device is not a part of it.
#[must_use]
pub fn homeserver_identity(user_id: &str, member_id: &str) -> String {
    hash(&[user_id, member_id])
}

/// The identity that `/sfu/get` clients expect: readable, and with an empty device it ends in `:`.
#[must_use]
pub fn legacy_identity(user_id: &str, device_id: &str) -> String {
    format!("{user_id}:{device_id}")
}

fn hash(parts: &[&str]) -> String {
    // A slice of strings always serialises; the fallback cannot be reached and would match no client.
    let json = serde_json::to_vec(parts).unwrap_or_default();
    STANDARD_NO_PAD.encode(Sha256::digest(json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_aliases_match_the_vectors() {
        for (room, slot, alias) in [
            ("!roomid:example.com", "slot1234", "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"),
            ("!room:example.com", ROOM_SLOT, "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs"),
            ("!r:x", ROOM_SLOT, "pRFzEPtSfqdKIzEf0NCR8PiABfxPTGTxjJq8B7Y6NS4"),
            ("!a\u{fffd}b\u{fffd}:x", ROOM_SLOT, "zqoXFrhuzjhY05gcyTEVNf6DCroEp5poFwQH+j4ufgo"),
            ("!é😀:x", ROOM_SLOT, "rmKuWCH36l1AX88q0aWVIAgFOu5OlHwOu3nuNeFrwzo"),
            (
                "a\"b\\c/d",
                "\u{8}\u{c}\n\r\t\0\u{1f}\u{7f}",
                "V48XcqIsLG/EmqYLAUmG95qc5aorKrrkhTJHvQIexII",
            ),
            ("", "", "Q5CD84lWulHs6QYxVSxuojxcKVcNPVcQ5AjnfgG6c3U"),
        ] {
            assert_eq!(room_alias(room, slot), alias, "{room:?} {slot:?}");
        }
    }

    /// Decision T4: these two differ from the Go service, which escapes them as HTML, and agree with the clients.
    #[test]
    fn html_characters_stay_plain() {
        let html = room_alias("!a<b>&c:x", ROOM_SLOT);
        assert_ne!(html, "cDgj1jylvCeyef74HWx13+FSLF10XfvuYRpmcnfWSoo");
        assert_eq!(html, STANDARD_NO_PAD.encode(Sha256::digest("[\"!a<b>&c:x\",\"m.call#ROOM\"]")));
        let lines = room_alias("!a\u{2028}\u{2029}b:x", ROOM_SLOT);
        assert_ne!(lines, "rFvjx9ds90Oqu9ngmrLOHZADg9LmWQovZkhHjYqPkTM");
        assert_eq!(
            lines,
            STANDARD_NO_PAD.encode(Sha256::digest("[\"!a\u{2028}\u{2029}b:x\",\"m.call#ROOM\"]"))
        );
    }

    #[test]
    fn identities_match_the_vectors() {
        assert_eq!(
            member_identity("@alice:example.com", "DEVICE123", "memberABC"),
            "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"
        );
        assert_eq!(
            homeserver_identity("@alice:example.com", "memberABC"),
            "M3VnsLXrkbxIDINXO64u8PZzFyD9ZYFiQULR2dshWYs"
        );
        assert_eq!(legacy_identity("@alice:example.com", "DEV"), "@alice:example.com:DEV");
        assert_eq!(legacy_identity("@alice:example.com", ""), "@alice:example.com:");
    }
}
