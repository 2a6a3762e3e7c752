//! An independent look at JWTs: nothing here is shared with the service.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub(crate) struct Jwt {
    pub(crate) header: Value,
    pub(crate) claims: Value,
    /// The middle segment as it was sent.
    pub(crate) payload: String,
    signed: String,
    signature: Vec<u8>,
}

impl Jwt {
    /// Takes a compact JWT apart.
    pub(crate) fn decode(token: &str) -> Option<Self> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        let part = |text: &str| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok();
        Some(Self {
            header: part(header)?,
            claims: part(payload)?,
            payload: payload.into(),
            signed: signed.into(),
            signature: URL_SAFE_NO_PAD.decode(signature).ok()?,
        })
    }

    /// A token with these claims, signed by HS256.
    pub(crate) fn sign(claims: &Value, secret: &str) -> String {
        let part = |text: &[u8]| URL_SAFE_NO_PAD.encode(text);
        let signed = format!(
            "{}.{}",
            part(br#"{"alg":"HS256","typ":"JWT"}"#),
            part(claims.to_string().as_bytes())
        );
        let signature = hmac_sha256(secret.as_bytes(), signed.as_bytes());
        format!("{signed}.{}", part(&signature))
    }

    /// Whether it was signed with `secret` by HS256.
    pub(crate) fn is_signed_with(&self, secret: &str) -> bool {
        self.header["alg"] == "HS256" && self.signature == hmac_sha256(secret.as_bytes(), self.signed.as_bytes())
    }
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut block = [0u8; 64];
    if key.len() > block.len() {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let inner = Sha256::new().chain_update(block.map(|b| b ^ 0x36)).chain_update(message).finalize();
    Sha256::new()
        .chain_update(block.map(|b| b ^ 0x5c))
        .chain_update(inner)
        .finalize()
        .to_vec()
}

#[test]
fn the_recorded_vector_is_signed_with_its_secret() {
    let token = concat!(
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJkZXZrZXkiLCJzdWIiOiJKK1Q0NXRHcnV4YytIclVPcUpKbHlRU1YzM203MjhDbWU0K3Z0OC9TV3JV",
        "IiwiZXhwIjoxNzAwMDAzNjAwLCJuYmYiOjE3MDAwMDAwMDAsImlhdCI6MTcwMDAwMDAwMCwiaWRlbnRpdHkiOiJKK1Q0NXRHcnV4YytIclVPcUpKbHlRU1YzM203",
        "MjhDbWU0K3Z0OC9TV3JVIiwidmlkZW8iOnsicm9vbUpvaW4iOnRydWUsInJvb20iOiJPODQzN1czK2ptek1Wam9JUDN0TndibStYeEhRazJpS3BPQTdhcXczcVNj",
        "IiwiY2FuUHVibGlzaCI6dHJ1ZSwiY2FuU3Vic2NyaWJlIjp0cnVlLCJjYW5VcGRhdGVPd25NZXRhZGF0YSI6dHJ1ZX19.-_gPpeNryfTlNOa5Tbz6Od7RIlrADJZXFmHaswNCVp4",
    );
    let jwt = Jwt::decode(token).expect("a JWT");
    assert!(jwt.is_signed_with("devsecret"));
    assert!(!jwt.is_signed_with("devsecres"));
}
