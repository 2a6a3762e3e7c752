//! Values that must never be printed, and LiveKit's key pairs made of them.

use std::fmt;

/// A secret text: `Debug` and `Display` show a placeholder.
///
/// There is no `PartialEq` on purpose: comparing secrets with `==` takes a time that tells how much was right.
#[derive(Clone)]
pub struct Secret(Box<str>);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: impl Into<Box<str>>) -> Self {
        Self(text.into())
    }

    /// The secret itself, for the one place that uses it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// An API key of LiveKit with its secret.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// The API key: public, it is the `iss` of every token.
    pub key: String,
    /// Secret that signs the tokens of that key.
    pub secret: Secret,
}

/// All key pairs, at least one (decision P6).
#[derive(Clone, Debug)]
pub struct Keys {
    signing: KeyPair,
    others: Vec<KeyPair>,
}

impl Keys {
    /// `signing` signs; it and the `others` verify webhooks.
    #[must_use]
    pub const fn new(signing: KeyPair, others: Vec<KeyPair>) -> Self {
        Self { signing, others }
    }

    /// Adds `former` keys, which go on verifying.
    #[must_use]
    pub fn with_former<'a>(&'a self, former: impl Iterator<Item = &'a KeyPair>) -> Self {
        Self {
            signing: self.signing.clone(),
            others: self.others.iter().chain(former).cloned().collect(),
        }
    }

    /// Whether this very pair is one of them.
    #[must_use]
    pub fn has(&self, pair: &KeyPair) -> bool {
        self.iter()
            .any(|own| own.key == pair.key && own.secret.expose() == pair.secret.expose())
    }

    /// The pair that signs our tokens: the first of the file.
    #[must_use]
    pub const fn signing(&self) -> &KeyPair {
        &self.signing
    }

    /// Every pair, the signing one first.
    pub fn iter(&self) -> impl Iterator<Item = &KeyPair> {
        std::iter::once(&self.signing).chain(&self.others)
    }

    /// The secret of `key`, if we know that key.
    #[must_use]
    pub fn secret_of(&self, key: &str) -> Option<&Secret> {
        self.iter().find(|pair| pair.key == key).map(|pair| &pair.secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_prints_a_secret() {
        let pair = |key: &str| KeyPair {
            key: key.into(),
            secret: Secret::new("hunter2"),
        };
        let keys = Keys::new(pair("first"), vec![pair("second")]);
        let printed = format!("{keys:?} {keys:#?} {} {:?}", keys.signing().secret, Secret::new("hunter2"));
        assert!(!printed.contains("hunter2"), "{printed}");
        assert!(printed.contains("[secret]") && printed.contains("second"), "{printed}");
    }

    #[test]
    fn the_first_pair_signs_and_all_are_found() {
        let pair = |key: &str| KeyPair {
            key: key.into(),
            secret: Secret::new(format!("{key}-secret")),
        };
        let keys = Keys::new(pair("first"), vec![pair("second")]);
        assert_eq!(keys.signing().key, "first");
        assert_eq!(keys.secret_of("second").unwrap().expose(), "second-secret");
        assert!(keys.secret_of("third").is_none());
    }
}
