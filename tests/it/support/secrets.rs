//! What must never be seen in a log or in an error body.
//!
//! Every OpenID token, SFU secret and application-service token of these tests begins with a marker, and every JWT with one of few prefixes, so that
//! one look finds them all, cut or escaped ones included.

use super::unique;

const TOKEN: &str = "oidctokenNEVERLOG";
const SFU_SECRET: &str = "sfusecretNEVERLOG";
const AS_TOKEN: &str = "astokenNEVERLOG";
const HS_TOKEN: &str = "hstokenNEVERLOG";

/// How the Base64 of a JWT's header or payload begins.
const JWT: [&str; 9] = [
    "eyJhbGciOi",
    "eyJ0eXAiOi",
    "eyJraWQiOi",
    "eyJpc3MiOi",
    "eyJleHAiOj",
    "eyJuYmYiOj",
    "eyJzdWIiOi",
    "eyJ2aWRlbyI6",
    "eyJpYXQiOj",
];

/// A fresh OpenID access token.
pub(crate) fn token() -> String {
    format!("{TOKEN}{:010}x{:08x}", unique(), std::process::id())
}

/// A fresh secret for an SFU, long enough for LiveKit.
pub(crate) fn sfu_secret() -> String {
    format!("{SFU_SECRET}{:020}", unique())
}

/// What a service sends to its homeserver.
pub(crate) fn as_token() -> String {
    format!("{AS_TOKEN}{:020}", unique())
}

/// What a homeserver sends to its service.
pub(crate) fn hs_token() -> String {
    format!("{HS_TOKEN}{:020}", unique())
}

/// Fails when `text` holds anything secret; `of` says whose text it is.
pub(crate) fn assert_none(of: &str, text: &str, registered: &[String]) {
    let markers = [TOKEN, SFU_SECRET, AS_TOKEN, HS_TOKEN].into_iter().chain(JWT);
    for secret in markers.chain(registered.iter().map(String::as_str)) {
        if let Some(at) = text.find(secret) {
            let from = text[..at].rfind('\n').map_or(0, |n| n + 1);
            let line = text[from..].lines().next().unwrap_or_default();
            panic!("{of} holds a secret ({secret}…): {line}");
        }
    }
}
