//! Room aliases and participant identities, computed independently of the service.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};

/// Slot of every call that Element Call makes, and of all legacy requests.
pub(crate) const SLOT: &str = "m.call#ROOM";

/// The LiveKit room of a Matrix room and slot.
pub(crate) fn alias(room: &str, slot: &str) -> String {
    hash(&[room, slot])
}

/// The hashed identity of a participant.
pub(crate) fn identity(user: &str, device: &str, member: &str) -> String {
    hash(&[user, device, member])
}

/// The hashed identity of a participant behind the homeserver's endpoints.
pub(crate) fn homeserver_identity(user: &str, member: &str) -> String {
    hash(&[user, member])
}

fn hash(parts: &[&str]) -> String {
    STANDARD_NO_PAD.encode(Sha256::digest(serde_json::to_vec(parts).expect("strings")))
}
