//! The SFU's webhooks: who sent this, and what does it say. Pure.
//!
//! In two steps, so that the body of a stranger is never read: [`Claims::verify`] looks at the header only,
//! [`Claims::body_matches`] at the body. What is read of the body is what is used, and nothing else in it can make an
//! event unreadable.

use std::fmt;
use std::sync::LazyLock;

use crate::livekit::DisconnectReason;
use base64::Engine as _;
use base64::alphabet;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use jsonwebtoken::{Algorithm, DecodingKey};
use livekit_api::access_token::AccessToken;
use livekit_protocol as proto;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::json;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::secret::Keys;

/// The HMAC that `jsonwebtoken` verifies with: LiveKit's crate installs it with the first token that it makes.
static HMAC: LazyLock<()> = LazyLock::new(|| drop(AccessToken::with_api_key("key", "secret").to_jwt()));

/// How far the SFU's clock may be off, as LiveKit itself has it.
const LEEWAY_SECONDS: f64 = 60.0;

/// Standard base64, with or without padding.
const STANDARD: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Proof in the header of a webhook: the SFU announces a body with this hash.
#[derive(Clone, Debug)]
pub struct Claims {
    body_sha256: Vec<u8>,
    digest: u64,
    issued_at: Option<i64>,
}

/// The body is the one that the SFU announced, or rather one with its hash.
#[derive(Clone, Copy, Debug)]
pub struct Verified {
    /// When the SFU sent it, in seconds since 1970: the `iat` of its token.
    pub issued_at: Option<i64>,
    /// Tells this token from any other one: a part of its signature.
    pub digest: u64,
}

/// Why a webhook is not the SFU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WebhookAuthError {
    /// The `Authorization` header is missing.
    #[error("there is no Authorization header")]
    Missing,
    /// The token is not a signed JWT.
    #[error("the Authorization header is no JWT")]
    NotJwt,
    /// The token is signed with another algorithm than HS256.
    #[error("the token is not signed with HS256")]
    Algorithm,
    /// `iss` is none of our keys, and none of our secrets fits.
    #[error("the token is signed with a key that is not configured here")]
    UnknownKey,
    /// `iss` is one of our keys, and its secret does not fit.
    #[error("the signature of the token is wrong")]
    Signature,
    /// The token has no `exp`.
    #[error("the token has no end")]
    Endless,
    /// The token's `exp` has passed.
    #[error("the token has expired")]
    Expired,
    /// `nbf` is yet to come.
    #[error("the token is not valid yet")]
    Early,
    /// No `sha256`: a token for something else, such as joining a room.
    #[error("the token is not one of a webhook")]
    NotWebhook,
    /// The body has another hash.
    #[error("the body is not the one that the token was made for")]
    Body,
}

impl WebhookAuthError {
    /// Whether it came with a token as an SFU makes them for webhooks: whoever calls the address by chance has none, or one for joining.
    #[must_use]
    pub const fn is_of_an_sfu(self) -> bool {
        match self {
            Self::Missing | Self::NotJwt | Self::Algorithm | Self::NotWebhook => false,
            Self::UnknownKey | Self::Signature | Self::Endless | Self::Expired | Self::Early | Self::Body => true,
        }
    }

    /// Advice to the operator.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::UnknownKey => {
                "`webhook.api_key` in livekit-server's configuration must be one of the keys configured here (LIVEKIT_KEY or LIVEKIT_KEY_FILE)"
            }
            Self::Signature => "LIVEKIT_SECRET must be the secret of that key in livekit-server's `keys:`; look for stray spaces or quotes",
            Self::Expired | Self::Early => {
                "the clocks of this machine and of livekit-server differ by more than a minute; check NTP on both"
            }
            Self::Body => "a proxy between livekit-server and this service changes bodies; let the SFU call this service directly",
            Self::Missing | Self::NotJwt => {
                "if this came from livekit-server, a proxy changes the Authorization header; otherwise somebody else calls this address"
            }
            Self::Algorithm | Self::Endless | Self::NotWebhook => {
                "this did not come from livekit-server's webhook sender; somebody else calls this address"
            }
        }
    }
}

#[derive(Deserialize)]
struct Header<'a> {
    alg: &'a str,
}

#[derive(Deserialize)]
struct Payload {
    iss: Option<String>,
    exp: Option<f64>,
    nbf: Option<f64>,
    iat: Option<f64>,
    sha256: Option<String>,
}

impl Claims {
    /// Step one: the value of `Authorization`, a JWT with or without `Bearer`. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// When it does not prove that the SFU announces a webhook.
    pub fn verify(authorization: &str, keys: &Keys, now: u64) -> Result<Self, WebhookAuthError> {
        let token = authorization.trim();
        let token = match token.split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer ") => token.trim_start(),
            Some(_) | None => token,
        };
        if token.is_empty() {
            return Err(WebhookAuthError::Missing);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(WebhookAuthError::NotJwt)?;
        let (header, payload) = signed.split_once('.').ok_or(WebhookAuthError::NotJwt)?;
        let [header, payload, mac] = [decode(header)?, decode(payload)?, decode(signature)?];

        let header: Header<'_> = serde_json::from_slice(&header).map_err(|_| WebhookAuthError::NotJwt)?;
        if header.alg != "HS256" {
            return Err(WebhookAuthError::Algorithm);
        }
        let unverified: Payload = serde_json::from_slice(&payload).map_err(|_| WebhookAuthError::NotJwt)?;
        check_signature(signed, signature, unverified.iss.as_deref(), keys)?;
        let digest = mac.first_chunk().copied().map_or(0, u64::from_le_bytes);
        Self::check(unverified, digest, now)
    }

    /// Checks the claims of a token whose signature was right.
    fn check(payload: Payload, digest: u64, now: u64) -> Result<Self, WebhookAuthError> {
        #[expect(clippy::cast_precision_loss, reason = "exact for the next 285 million years")]
        let now = now as f64;
        if payload.exp.ok_or(WebhookAuthError::Endless)? + LEEWAY_SECONDS < now {
            return Err(WebhookAuthError::Expired);
        }
        if payload.nbf.is_some_and(|nbf| nbf > now + LEEWAY_SECONDS) {
            return Err(WebhookAuthError::Early);
        }
        let hash = payload.sha256.ok_or(WebhookAuthError::NotWebhook)?;
        let hash = hash.replace('-', "+").replace('_', "/");
        // Of another length it is the hash of no body: there is nothing to wait for.
        let hash = STANDARD.decode(hash).ok().filter(|hash| hash.len() == 32);
        #[expect(clippy::cast_possible_truncation, reason = "a cast of floats saturates")]
        Ok(Self {
            body_sha256: hash.ok_or(WebhookAuthError::NotWebhook)?,
            digest,
            issued_at: payload.iat.map(|iat| iat as i64),
        })
    }

    /// Step two: the body.
    ///
    /// # Errors
    /// When it is another one than the SFU announced.
    pub fn body_matches(&self, body: &[u8]) -> Result<Verified, WebhookAuthError> {
        if bool::from(Sha256::digest(body).as_slice().ct_eq(&self.body_sha256)) {
            Ok(Verified {
                issued_at: self.issued_at,
                digest: self.digest,
            })
        } else {
            Err(WebhookAuthError::Body)
        }
    }
}

fn decode(segment: &str) -> Result<Vec<u8>, WebhookAuthError> {
    URL_SAFE_NO_PAD.decode(segment).map_err(|_| WebhookAuthError::NotJwt)
}

/// By the secrets of the key that `iss` names (two lines of a keys file may name one), else by all.
fn check_signature(signed: &str, signature: &str, unverified_iss: Option<&str>, keys: &Keys) -> Result<(), WebhookAuthError> {
    LazyLock::force(&HMAC);
    let known = unverified_iss.is_some_and(|iss| keys.secret_of(iss).is_some());
    let mut candidates = keys.iter().filter(|pair| !known || Some(pair.key.as_str()) == unverified_iss);
    let fits = candidates.any(|pair| {
        let secret = DecodingKey::from_secret(pair.secret.expose().as_bytes());
        jsonwebtoken::crypto::verify(signature, signed.as_bytes(), &secret, Algorithm::HS256).unwrap_or(false)
    });
    match (fits, known) {
        (true, _) => Ok(()),
        (false, true) => Err(WebhookAuthError::Signature),
        (false, false) => Err(WebhookAuthError::UnknownKey),
    }
}

/// An event, reduced to what is used. Absent and `null` are the same everywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Webhook {
    /// Id of the event: the same on every retry. Empty where it is missing.
    pub id: Box<str>,
    /// When it happened, by the SFU's clock, in seconds since 1970.
    pub created_at: Option<i64>,
    /// Kind of the event.
    pub kind: Kind,
    /// Room that the event is about.
    pub room: Option<Room>,
    /// Participant that the event is about.
    pub participant: Option<Participant>,
}

/// Kinds of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// LiveKit's event `room_started`.
    RoomStarted,
    /// LiveKit's event `room_finished`.
    RoomFinished,
    /// LiveKit's event `participant_joined`.
    ParticipantJoined,
    /// LiveKit's event `participant_left`.
    ParticipantLeft,
    /// LiveKit's event `participant_connection_aborted`.
    ParticipantConnectionAborted,
    /// LiveKit's event `track_published`.
    TrackPublished,
    /// LiveKit's event `track_unpublished`.
    TrackUnpublished,
    /// Any other event, known to LiveKit or not.
    #[default]
    Other,
}

/// A LiveKit room in an event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Name of the room; empty where it is missing.
    pub name: Box<str>,
    /// The id of this life of it; empty where it is missing.
    pub sid: Box<str>,
    /// Number of participants in the room, late by up to 5 s.
    pub num_participants: u32,
    /// Seconds that it stands after the last one has left; 0 where it is missing.
    pub departure_timeout: u32,
}

/// A participant in an event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Participant {
    /// Identity of the participant; empty where it is missing.
    pub identity: Box<str>,
    /// The id of this session; empty where it is missing.
    pub sid: Box<str>,
    /// State of the participant.
    pub state: State,
    /// When it joined, by the SFU's clock, in seconds since 1970; 0 where it is missing.
    pub joined_at: u64,
    /// Moment of joining in milliseconds since 1970, by the SFU's clock.
    pub joined_at_ms: u64,
    /// Reason for which the participant left.
    pub disconnect_reason: DisconnectReason,
}

/// A participant's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// `JOINING`, which is what is meant where nothing is said.
    #[default]
    Joining,
    /// LiveKit's state `JOINED`.
    Joined,
    /// LiveKit's state `ACTIVE`.
    Active,
    /// LiveKit's state `DISCONNECTED`.
    Disconnected,
    /// A state that is not known here.
    Unknown,
}

/// A verified body that is no JSON object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the webhook's body is no JSON object")]
pub struct NotJson;

impl Webhook {
    /// Reads a verified body of bounded size. Fields of unexpected types count as absent.
    ///
    /// # Errors
    /// When the body is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, NotJson> {
        let body = String::from_utf8_lossy(body);
        let [event, id, created_at, room, participant] = pick(&body, ["event", "id", "createdAt", "room", "participant"]).ok_or(NotJson)?;
        Ok(Self {
            id: text(id),
            created_at: integer(created_at),
            kind: event
                .and_then(|raw| serde_json::from_str(raw).ok())
                .map_or(Kind::Other, Kind::named),
            room: room.and_then(Room::parse),
            participant: participant.and_then(Participant::parse),
        })
    }
}

impl Webhook {
    /// Writes what is used of the event, in LiveKit's form: [`Self::parse`] reads the same from it.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let room = self.room.as_ref().map(|room| {
            json!({
                "name": room.name, "sid": room.sid, "numParticipants": room.num_participants, "departureTimeout": room.departure_timeout,
            })
        });
        let participant = self.participant.as_ref().map(|participant| {
            let state = match participant.state {
                State::Joining => Some(proto::participant_info::State::Joining),
                State::Joined => Some(proto::participant_info::State::Joined),
                State::Active => Some(proto::participant_info::State::Active),
                State::Disconnected => Some(proto::participant_info::State::Disconnected),
                State::Unknown => None,
            };
            json!({
                "identity": participant.identity, "sid": participant.sid, "joinedAt": participant.joined_at,
                "joinedAtMs": participant.joined_at_ms, "state": state.map_or("?", |state| state.as_str_name()),
                "disconnectReason": participant.disconnect_reason.name(),
            })
        });
        json!({"event": self.kind.name(), "id": self.id, "createdAt": self.created_at, "room": room, "participant": participant})
    }
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::RoomStarted => "room_started",
            Self::RoomFinished => "room_finished",
            Self::ParticipantJoined => "participant_joined",
            Self::ParticipantLeft => "participant_left",
            Self::ParticipantConnectionAborted => "participant_connection_aborted",
            Self::TrackPublished => "track_published",
            Self::TrackUnpublished => "track_unpublished",
            Self::Other => "",
        }
    }

    fn named(name: String) -> Self {
        match name.as_str() {
            "room_started" => Self::RoomStarted,
            "room_finished" => Self::RoomFinished,
            "participant_joined" => Self::ParticipantJoined,
            "participant_left" => Self::ParticipantLeft,
            "participant_connection_aborted" => Self::ParticipantConnectionAborted,
            "track_published" => Self::TrackPublished,
            "track_unpublished" => Self::TrackUnpublished,
            _ => Self::Other,
        }
    }
}

impl Room {
    fn parse(json: &str) -> Option<Self> {
        let [name, sid, num_participants, departure_timeout] = pick(json, ["name", "sid", "numParticipants", "departureTimeout"])?;
        Some(Self {
            name: text(name),
            sid: text(sid),
            num_participants: unsigned(num_participants).try_into().unwrap_or(u32::MAX),
            departure_timeout: unsigned(departure_timeout).try_into().unwrap_or(u32::MAX),
        })
    }
}

impl Participant {
    fn parse(json: &str) -> Option<Self> {
        let [identity, sid, state, joined_at, joined_at_ms, reason] =
            pick(json, ["identity", "sid", "state", "joinedAt", "joinedAtMs", "disconnectReason"])?;
        Some(Self {
            identity: text(identity),
            sid: text(sid),
            state: state.map_or(State::Joining, |raw| {
                enumerated(raw, proto::participant_info::State::from_str_name).map_or(State::Unknown, State::from)
            }),
            joined_at: unsigned(joined_at),
            joined_at_ms: unsigned(joined_at_ms),
            disconnect_reason: reason.map_or(DisconnectReason::Unknown, |raw| {
                enumerated(raw, proto::DisconnectReason::from_str_name).map_or(DisconnectReason::Unknown, DisconnectReason::from)
            }),
        })
    }
}

impl From<proto::participant_info::State> for State {
    fn from(state: proto::participant_info::State) -> Self {
        use proto::participant_info::State as Theirs;
        match state {
            Theirs::Joining => Self::Joining,
            Theirs::Joined => Self::Joined,
            Theirs::Active => Self::Active,
            Theirs::Disconnected => Self::Disconnected,
        }
    }
}

fn text(raw: Option<&str>) -> Box<str> {
    raw.and_then(|raw| serde_json::from_str(raw).ok()).unwrap_or_default()
}

/// A 64-bit integer: a number, or one in a string.
fn integer(raw: Option<&str>) -> Option<i64> {
    let digits = raw?.trim_matches('"');
    digits.parse().ok().or_else(|| {
        let number: f64 = digits.parse().ok()?;
        #[expect(clippy::cast_possible_truncation, reason = "a cast of floats saturates")]
        number.is_finite().then_some(number as i64)
    })
}

fn unsigned(raw: Option<&str>) -> u64 {
    integer(raw).and_then(|number| number.try_into().ok()).unwrap_or(0)
}

/// A name or a number.
fn enumerated<T: TryFrom<i32>>(raw: &str, named: fn(&str) -> Option<T>) -> Option<T> {
    match integer(Some(raw)) {
        Some(number) => i32::try_from(number).ok().and_then(|number| number.try_into().ok()),
        None => serde_json::from_str::<String>(raw).ok().as_deref().and_then(named),
    }
}

/// The members of an object with these names, which may also be written in snake_case; of a repeated one the last.
/// Everything else is skipped unread.
fn pick<'a, const N: usize>(json: &'a str, names: [&'static str; N]) -> Option<[Option<&'a str>; N]> {
    struct Pick<const N: usize>([&'static str; N]);

    impl<'de, const N: usize> Visitor<'de> for Pick<N> {
        type Value = [Option<&'de str>; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = [None; N];
            while let Some(place) = map.next_key_seed(Place(&self.0))? {
                match place.and_then(|place| found.get_mut(place)) {
                    Some(slot) => *slot = Some(map.next_value::<&RawValue>()?.get()).filter(|raw| *raw != "null"),
                    None => {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
            }
            Ok(found)
        }
    }

    /// Finds which of the names a key is.
    struct Place<'n>(&'n [&'static str]);

    impl<'de> DeserializeSeed<'de> for Place<'_> {
        type Value = Option<usize>;

        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_str(self)
        }
    }

    impl Visitor<'_> for Place<'_> {
        type Value = Option<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a key")
        }

        fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
            let same = |name: &str| {
                let key = key.bytes().filter(|b| *b != b'_').map(|b| b.to_ascii_lowercase());
                key.eq(name.bytes().map(|b| b.to_ascii_lowercase()))
            };
            Ok(self.0.iter().position(|name| same(name)))
        }
    }

    serde_json::Deserializer::from_str(json).deserialize_map(Pick(names)).ok()
}

#[cfg(test)]
mod tests;
