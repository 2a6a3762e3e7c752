//! Step 4, the LiveKit JWT that a client joins with.
//!
//! The claims are `livekit-api`'s. The payload is written as ASCII, because Element Call runs `atob` on the raw
//! base64url segment and `atob` does not know `-` and `_`: in ASCII text only `>`, `?`, `~` and DEL can produce these,
//! so they, and everything outside ASCII, are written as `\uXXXX`.
#![expect(clippy::disallowed_methods, reason = "tokens begin and end at the time of day")]

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac as _};
use livekit_api::access_token::{AccessToken, AccessTokenError, Claims, VideoGrants};
use parking_lot::RwLock;
use serde::Serialize as _;
use sha2::Sha256;

use crate::access::{Access, Source};
use crate::identity::ParticipantKey;
use crate::secret::KeyPair;

/// How far back a token's `nbf` is: the caches of LiveKit's SDKs ask anew for a token that is not valid yet by the client's
/// clock (decision T5). The SFU takes any `nbf` in the past.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Identity of this service, or of who tries something for it, on the SFU.
pub const VISITOR: &str = "lk-jwt-service";

/// The first segment of every token: `{"typ":"JWT","alg":"HS256"}`.
const HEADER: &str = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9";

/// Signs tokens with the first of the configured key pairs.
pub struct Minter {
    signing: RwLock<Signing>,
    ttl: Duration,
    grants: Grants,
}

/// Rights that every participant's token has, or lacks.
#[derive(Debug, Clone)]
pub struct Grants {
    /// Whether users may change their own metadata.
    pub can_update_own_metadata: bool,
    /// Kinds of tracks that whoever publishes may publish.
    pub publish_sources: Vec<Source>,
}

struct Signing {
    key: String,
    /// With the secret taken in: that is half of the work for a short text.
    mac: Hmac<Sha256>,
}

impl Signing {
    fn new(pair: &KeyPair) -> Result<Self, MintError> {
        let secret = pair.secret.expose();
        AccessToken::with_api_key(&pair.key, secret).to_jwt()?;
        Ok(Self {
            key: pair.key.clone(),
            mac: Hmac::new_from_slice(secret.as_bytes()).map_err(|_| AccessTokenError::InvalidKeys)?,
        })
    }
}

/// A token could not be made: a defect or an impossible clock, never a client's fault.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a LiveKit token: {0}")]
pub struct MintError(#[from] AccessTokenError);

impl Minter {
    /// `ttl` is the life of a token, `grants` the rights in each.
    ///
    /// # Errors
    /// When the key pair cannot sign.
    pub fn new(pair: &KeyPair, ttl: Duration, grants: Grants) -> Result<Self, MintError> {
        Ok(Self {
            signing: RwLock::new(Signing::new(pair)?),
            ttl,
            grants,
        })
    }

    /// Signs with another pair from now on.
    ///
    /// # Errors
    /// When that pair cannot sign; then the former one goes on.
    pub fn sign_with(&self, pair: &KeyPair) -> Result<(), MintError> {
        *self.signing.write() = Signing::new(pair)?;
        Ok(())
    }

    /// The life of a token.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        self.ttl
    }

    /// The token of one participant of one room.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn mint(&self, participant: &ParticipantKey, access: Access) -> Result<String, MintError> {
        let publish = Some(access.publishes);
        let sources = &self.grants.publish_sources;
        // An empty list is left out of the token, which the SFU takes for all.
        let is_limited = access.publishes && sources.len() < Source::ALL.len();
        let sources = sources.iter().filter(|_| is_limited);
        self.sign(
            VideoGrants {
                room_join: true,
                room: participant.room.clone(),
                can_publish: publish,
                can_publish_data: publish,
                can_subscribe: Some(true),
                can_publish_sources: sources.map(|source| source.word().to_owned()).collect(),
                can_update_own_metadata: Some(self.grants.can_update_own_metadata),
                ..VideoGrants::default()
            },
            participant.identity.clone(),
            self.ttl,
        )
    }

    /// The token of one call to the SFU's API, without an identity.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn api_token(&self, grants: VideoGrants, ttl: Duration) -> Result<String, MintError> {
        self.sign(grants, String::new(), ttl)
    }

    /// A token that joins as [`VISITOR`]: for a question about joining, or to try the way there.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn joining_token(&self, grants: VideoGrants, ttl: Duration) -> Result<String, MintError> {
        self.sign(grants, VISITOR.to_owned(), ttl)
    }

    fn sign(&self, video: VideoGrants, identity: String, ttl: Duration) -> Result<String, MintError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = |time: Duration| usize::try_from(time.as_secs()).unwrap_or(usize::MAX);
        let signing = self.signing.read();
        let claims = Claims {
            iss: signing.key.clone(),
            sub: identity,
            nbf: seconds(now.saturating_sub(CLOCK_SKEW)),
            exp: seconds(now + ttl),
            video,
            ..Claims::default()
        };
        let payload = ascii_json(&claims)?;
        let mut token = String::with_capacity(HEADER.len() + payload.len() * 4 / 3 + 50);
        token.push_str(HEADER);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(&payload, &mut token);
        let signature = signing.mac.clone().chain_update(&token).finalize().into_bytes();
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

fn encoding(error: serde_json::Error) -> AccessTokenError {
    AccessTokenError::Encoding(error.into())
}

fn ascii_json(claims: &Claims) -> Result<Vec<u8>, MintError> {
    let mut out = Vec::with_capacity(384);
    claims
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, AtobSafe))
        .map_err(encoding)?;
    Ok(out)
}

struct AtobSafe;

impl serde_json::ser::Formatter for AtobSafe {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        let is_unsafe = |byte: &u8| !byte.is_ascii() || matches!(byte, b'>' | b'?' | b'~' | 0x7f);
        while let Some(at) = rest.as_bytes().iter().position(is_unsafe) {
            let (safe, tail) = rest.split_at(at);
            writer.write_all(safe.as_bytes())?;
            let mut chars = tail.chars();
            if let Some(c) = chars.next() {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;
    use base64::engine::general_purpose::STANDARD_NO_PAD;
    use serde_json::{Value, json};

    fn minter() -> Minter {
        minter_with(Source::ALL)
    }

    fn minter_with(publish_sources: &[Source]) -> Minter {
        let pair = KeyPair {
            key: "devkey".into(),
            secret: Secret::new("devsecret"),
        };
        let grants = Grants {
            can_update_own_metadata: true,
            publish_sources: publish_sources.to_vec(),
        };
        Minter::new(&pair, Duration::from_secs(3600), grants).unwrap()
    }

    fn claims(token: &str) -> Value {
        let payload = token.split('.').nth(1).unwrap();
        // What `atob` accepts: the standard alphabet.
        serde_json::from_slice(&STANDARD_NO_PAD.decode(payload).expect("atob must be able to read the payload")).unwrap()
    }

    #[test]
    fn grants_what_the_contract_says_and_verifies() {
        let participant = ParticipantKey {
            room: "alias".into(),
            identity: "@a:x:DEV".into(),
        };
        let token = minter()
            .mint(
                &participant,
                Access {
                    creates_rooms: true,
                    publishes: true,
                },
            )
            .unwrap();
        let got = claims(&token);
        assert_eq!(got["iss"], "devkey");
        assert_eq!(got["sub"], "@a:x:DEV");
        assert_eq!(
            got["video"],
            json!({"roomJoin": true, "room": "alias", "canPublish": true, "canPublishData": true, "canSubscribe": true, "canUpdateOwnMetadata": true})
        );
        assert_eq!(got["exp"].as_u64().unwrap() - got["nbf"].as_u64().unwrap(), 3600 + 60);
        assert_eq!(got["iat"], json!(null));
        let verified = livekit_api::access_token::TokenVerifier::with_api_key("devkey", "devsecret")
            .verify(&token)
            .unwrap();
        assert_eq!(verified.sub, "@a:x:DEV");
    }

    #[test]
    fn sources_are_named_where_some_are_missing_and_somebody_publishes() {
        let participant = ParticipantKey {
            room: "r".into(),
            identity: "i".into(),
        };
        let quiet = [Source::Microphone, Source::ScreenShare];
        for (sources, publishes, named) in [
            (Source::ALL, true, Value::Null),
            (&quiet, true, json!(["microphone", "screen_share"])),
            (&quiet, false, Value::Null),
        ] {
            let access = Access {
                creates_rooms: false,
                publishes,
            };
            let got = claims(&minter_with(sources).mint(&participant, access).unwrap());
            assert_eq!(got["video"]["canPublishSources"], named, "{sources:?} {publishes}");
        }
    }

    #[test]
    fn a_listener_publishes_neither_media_nor_data() {
        let participant = ParticipantKey {
            room: "r".into(),
            identity: "i".into(),
        };
        let got = claims(
            &minter()
                .mint(
                    &participant,
                    Access {
                        creates_rooms: false,
                        publishes: false,
                    },
                )
                .unwrap(),
        );
        assert_eq!(
            (&got["video"]["canPublish"], &got["video"]["canPublishData"]),
            (&json!(false), &json!(false))
        );
        assert_eq!(got["video"]["canSubscribe"], json!(true));
    }

    #[test]
    fn the_payload_is_readable_by_atob_whatever_stands_at_whatever_offset() {
        for pad in 0..3 {
            for text in [
                "~~~~",
                "????",
                ">>>>",
                "\u{7f}\u{7f}\u{7f}",
                "é😀\u{2028}",
                "a~b?c>d",
                "\"\\\n\u{1}",
            ] {
                let identity = format!("{}{text}", "x".repeat(pad));
                let participant = ParticipantKey {
                    room: "r".into(),
                    identity: identity.clone(),
                };
                let token = minter()
                    .mint(
                        &participant,
                        Access {
                            creates_rooms: true,
                            publishes: true,
                        },
                    )
                    .unwrap();
                assert_eq!(claims(&token)["sub"], json!(identity));
            }
        }
    }
}
