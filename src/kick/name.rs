//! Names on the SFU, kept in little space. Pure.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// A room or an identity. Most are hashes (`identity.rs`), which are kept as the 32 bytes that they stand for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Name(Kind);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Kind {
    Hash([u8; 32]),
    Text(Box<str>),
}

impl Name {
    /// The least of all names.
    pub(super) const FIRST: Self = Self(Kind::Hash([0; 32]));
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
mod tests;
