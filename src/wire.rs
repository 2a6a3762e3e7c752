//! Request and reply JSON of the client routes, parsed into types that cannot be empty. Pure.
//!
//! As lenient as the clients in use need it (decision H5): unknown fields are ignored, `null` counts as absent, of a
//! repeated key the last one wins, text after the object is ignored. No check here asks anybody else.

mod homeserver;
mod token_source;

use std::borrow::Cow;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize as _, Deserializer as _, Serialize};
use serde_json::{Map, Value};

use crate::identity::{self, ParticipantKey, ROOM_SLOT};
use crate::secret::Secret;
use crate::time::Delay;

pub use homeserver::{
    ClientDelegationRequest, ClientTokenRequest, FederationTokenRequest, HomeserverParticipant, LegacyMember, RelayedMember,
    RelayedTokenRequest,
};
pub use token_source::{TokenSourceHead, TokenSourceReply};

/// Longest id of a room, a slot, a user or a device in bytes: Matrix allows no longer ones.
const MAX_ID_BYTES: usize = 255;
/// Longest id of a member in bytes: Element Call's is a user and a device, with a colon between.
const MAX_MEMBER_ID_BYTES: usize = 2 * MAX_ID_BYTES + 1;
/// Longest OpenID token in bytes. Synapse's have some thirty, and those of other homeservers may be JWTs.
const MAX_ACCESS_TOKEN_BYTES: usize = 4 * 1024;
/// Longest address of an SFU in bytes.
const MAX_URL_BYTES: usize = 2 * 1024;
/// Longest id of a delayed event in bytes.
const MAX_DELAY_ID_BYTES: usize = 255;

/// Mistake in a request's body; each variant is one row of the error table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Not JSON, or not an object.
    #[error("the body is not a JSON object")]
    NotJson,
    /// A known field holds another JSON type than it should.
    #[error("a field has the wrong type")]
    WrongType,
    /// The body has no `room_id` or no `slot_id`.
    #[error("room_id or slot_id is missing")]
    RoomOrSlot,
    /// `room` of the legacy body.
    #[error("room is missing")]
    LegacyRoom,
    /// The body lacks a field of `member`.
    #[error("a field of member is missing")]
    Member,
    /// The body lacks a field of `openid_token`.
    #[error("a field of openid_token is missing")]
    OpenIdToken,
    /// A field of `openid_token` of the legacy body.
    #[error("a field of openid_token is missing (legacy body)")]
    LegacyOpenIdToken,
    /// A field of `member` of a delegation.
    #[error("a field of member is missing (delegation)")]
    DelegationMember,
    /// A field of `openid_token` of a delegation.
    #[error("a field of openid_token is missing (delegation)")]
    DelegationOpenIdToken,
    /// The body has only one of `delay_id` and `delay_timeout`.
    #[error("delay_id or delay_timeout is missing")]
    HalfDelay,
    /// `delay_timeout` is longer than a day.
    #[error("delay_timeout is out of range")]
    DelayTimeout,
    /// `delay_id` cannot be one segment of a path.
    #[error("delay_id is not the id of a delayed event")]
    DelayId,
    /// A field is longer than any client's: what is kept of it must have a bound.
    #[error("a field is too long")]
    TooLong,
    /// `device_id` of the legacy body begins like the port of a server name.
    #[error("device_id begins with a port")]
    DeviceId,
    /// `url` of a request that came through a homeserver.
    #[error("url is missing")]
    Url,
    /// `member_id` of such a request, and `member` as well.
    #[error("member_id is missing")]
    MemberId,
    /// The body of another homeserver has no `user_id`.
    #[error("user_id is missing")]
    UserId,
    /// `delay_id` of a delegation that came through a homeserver.
    #[error("delay_id is missing")]
    NoDelayId,
    /// The head of `/token_source` has no bearer token, or several.
    #[error("there is no bearer token, or more than one")]
    NoBearer,
    /// The query has no `matrix_server_name`.
    #[error("matrix_server_name is missing in the query")]
    NoServerNameParameter,
    /// The query has no `device_id`.
    #[error("device_id is missing in the query")]
    NoDeviceIdParameter,
    /// `slot_id` in its query, which says nothing without a member.
    #[error("slot_id without member_id in the query")]
    SlotWithoutMember,
    /// A parameter of its query, or its token, is longer than any client's.
    #[error("a parameter of the query, or the token, is too long")]
    LongParameter,
    /// `device_id` of its query begins like the port of a server name.
    #[error("device_id in the query begins with a port")]
    DeviceIdParameter,
    /// `room_name` of its body is not a Matrix room.
    #[error("room_name is not the id of a Matrix room")]
    RoomName,
    /// A field of its body that is not the client's to choose.
    #[error("the body says who takes part, or how the room is to be")]
    NotTheClients,
}

/// The OpenID token as the client hands it over. Nothing in it is verified.
#[derive(Debug)]
pub struct UnverifiedOpenIdToken {
    /// The secret that the homeserver knows.
    pub access_token: Secret,
    /// The homeserver that is said to know it.
    pub unverified_server_name: String,
}

/// ParticipantKey that the client asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum ParticipantRequest {
    /// `/get_token`: both names are hashes.
    Member {
        /// Id of the Matrix room.
        room_id: String,
        /// Slot in the Matrix room.
        slot_id: String,
        /// Device that the client claims.
        claimed_device_id: String,
        /// Random id of the session.
        member_id: String,
    },
    /// The homeserver's own endpoints: the device is not a part of the identity.
    Homeserver {
        /// Id of the Matrix room.
        room_id: String,
        /// Slot in the Matrix room.
        slot_id: String,
        /// Random id of the session.
        member_id: String,
    },
    /// `/sfu/get`: the identity is readable.
    Legacy {
        /// Id of the Matrix room.
        room: String,
        /// Device that the client says it is, possibly empty.
        device_id: String,
    },
}

impl ParticipantRequest {
    /// Id of the Matrix room.
    #[must_use]
    pub fn room_id(&self) -> &str {
        match self {
            Self::Member { room_id, .. } | Self::Homeserver { room_id, .. } => room_id,
            Self::Legacy { room, .. } => room,
        }
    }

    /// The names on the SFU for a user that was verified.
    #[must_use]
    pub fn key(&self, user_id: &str) -> ParticipantKey {
        match self {
            Self::Member {
                room_id,
                slot_id,
                claimed_device_id,
                member_id,
            } => ParticipantKey {
                room: identity::room_alias(room_id, slot_id),
                identity: identity::member_identity(user_id, claimed_device_id, member_id),
            },
            Self::Homeserver {
                room_id,
                slot_id,
                member_id,
            } => ParticipantKey {
                room: identity::room_alias(room_id, slot_id),
                identity: identity::homeserver_identity(user_id, member_id),
            },
            Self::Legacy { room, device_id } => ParticipantKey {
                room: identity::room_alias(room, ROOM_SLOT),
                identity: identity::legacy_identity(user_id, device_id),
            },
        }
    }
}

/// The delayed leave event that a client hands over.
#[derive(Debug, PartialEq, Eq)]
pub struct DelayedEvent {
    /// Id of the event on the homeserver.
    pub id: String,
    /// Delay of the event.
    pub delay: Delay,
}

/// A delegation, complete and of the right types.
#[derive(Debug)]
pub struct DelegationRequest {
    /// OpenID token by which the client says who it is.
    pub openid_token: UnverifiedOpenIdToken,
    /// User that the client claims to be.
    pub claimed_user_id: String,
    /// The participant that is watched.
    pub participant: ParticipantRequest,
    /// Event that is handed over.
    pub event: DelayedEvent,
}

impl DelegationRequest {
    /// Parses the body of `/delegate_delayed_leave`.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn parse(body: &[u8]) -> Result<Self, BadRequest> {
        let body = object(body)?;
        let (participant, claimed_user_id) = member_request(&body, BadRequest::DelegationMember)?;
        Ok(Self {
            openid_token: openid_token(&body, BadRequest::DelegationOpenIdToken)?,
            claimed_user_id,
            participant,
            event: delayed_event(&body)?.ok_or(BadRequest::HalfDelay)?,
        })
    }
}

/// A token request, complete and of the right types.
#[derive(Debug)]
pub struct TokenRequest {
    /// OpenID token by which the client says who it is.
    pub openid_token: UnverifiedOpenIdToken,
    /// The user it says it is, where the body has such a field.
    pub claimed_user_id: Option<String>,
    /// ParticipantKey that the client wants.
    pub participant: ParticipantRequest,
    /// The delayed leave event that it hands over.
    pub event: Option<DelayedEvent>,
}

impl TokenRequest {
    /// Parses the body of `/get_token`.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn get_token(body: &[u8]) -> Result<Self, BadRequest> {
        Self::member(&object(body)?)
    }

    /// Parses the body of `/sfu/get`: the legacy one, or the one of `/get_token`, told apart by `room` and `room_id`.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn sfu_get(body: &[u8]) -> Result<Self, BadRequest> {
        let object = object(body)?;
        let has = |key| object.get(key).is_some_and(|v| !v.is_null());
        if has("room_id") && !has("room") {
            Self::member(&object)
        } else {
            Self::legacy(&object)
        }
    }

    fn member(body: &Map<String, Value>) -> Result<Self, BadRequest> {
        let (participant, claimed_user_id) = member_request(body, BadRequest::Member)?;
        Ok(Self {
            openid_token: openid_token(body, BadRequest::OpenIdToken)?,
            claimed_user_id: Some(claimed_user_id),
            participant,
            event: delayed_event(body)?,
        })
    }

    fn legacy(body: &Map<String, Value>) -> Result<Self, BadRequest> {
        let room = required(body, "room", MAX_ID_BYTES, BadRequest::LegacyRoom)?;
        let openid_token = openid_token(body, BadRequest::LegacyOpenIdToken)?;
        let device_id = optional(body, "device_id", MAX_ID_BYTES)?.unwrap_or_default();
        if begins_with_port(&device_id) {
            return Err(BadRequest::DeviceId);
        }
        Ok(Self {
            openid_token,
            claimed_user_id: None,
            participant: ParticipantRequest::Legacy { room, device_id },
            event: delayed_event(body)?,
        })
    }
}

/// The answer to a token request.
#[derive(Debug, Serialize)]
pub struct TokenReply<'a> {
    /// The address of the SFU; absent where another homeserver asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<&'a str>,
    /// The LiveKit token.
    pub jwt: String,
}

fn object(body: &[u8]) -> Result<Map<String, Value>, BadRequest> {
    let body = replace_invalid_utf8(body);
    let body = replace_lone_surrogates(&body);
    // Not `from_str`: what follows the first value is ignored, as it always was.
    match Value::deserialize(&mut serde_json::Deserializer::from_str(&body)) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) | Err(_) => Err(BadRequest::NotJson),
    }
}

/// Each invalid byte becomes one U+FFFD (and not each invalid sequence): room aliases are hashes of the result, and the
/// services that share an SFU with this one replace them so.
fn replace_invalid_utf8(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(bytes.len() + 16);
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| '\u{fffd}'));
    }
    Cow::Owned(out)
}

/// An escaped surrogate without its other half becomes U+FFFD. `JSON.stringify` writes such strings, and our JSON library
/// refuses the whole body for one.
fn replace_lone_surrogates(json: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(found) = json[at..].find('\\') {
        let escape = at + found;
        at = match (code_unit(json, escape), code_unit(json, escape + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => escape + 12,
            (Some(0xd800..0xe000), _) => {
                out.push_str(&json[copied..escape]);
                out.push('\u{fffd}');
                copied = escape + 6;
                copied
            }
            (Some(_), _) => escape + 6,
            // Some other escape, two characters long.
            (None, _) => json[escape + 1..].chars().next().map_or(json.len(), |c| escape + 1 + c.len_utf8()),
        };
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.push_str(&json[copied..]);
    Cow::Owned(out)
}

/// The UTF-16 code unit of an escape (`\uXXXX`) at this place.
fn code_unit(json: &str, at: usize) -> Option<u16> {
    let digits = json.get(at..at + 6)?.strip_prefix("\\u")?;
    if digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        u16::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, BadRequest> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => Err(BadRequest::WrongType),
    }
}

/// A text of at most `max` bytes that may be absent or empty, which is the same.
fn optional(object: &Map<String, Value>, key: &str, max: usize) -> Result<Option<String>, BadRequest> {
    match text(object, key)? {
        None | Some("") => Ok(None),
        Some(text) if text.len() > max => Err(BadRequest::TooLong),
        Some(text) => Ok(Some(text.to_owned())),
    }
}

fn required(object: &Map<String, Value>, key: &str, max: usize, missing: BadRequest) -> Result<String, BadRequest> {
    optional(object, key, max)?.ok_or(missing)
}

fn nested<'a>(object: &'a Map<String, Value>, key: &str, missing: BadRequest) -> Result<&'a Map<String, Value>, BadRequest> {
    match object.get(key) {
        None | Some(Value::Null) => Err(missing),
        Some(Value::Object(inner)) => Ok(inner),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::String(_)) => Err(BadRequest::WrongType),
    }
}

fn openid_token(body: &Map<String, Value>, missing: BadRequest) -> Result<UnverifiedOpenIdToken, BadRequest> {
    let token = nested(body, "openid_token", missing)?;
    Ok(UnverifiedOpenIdToken {
        access_token: Secret::new(required(token, "access_token", MAX_ACCESS_TOKEN_BYTES, missing)?),
        // Its grammar has a bound, and an answer of its own.
        unverified_server_name: required(token, "matrix_server_name", usize::MAX, missing)?,
    })
}

/// The participant of a session member, and the user it says it is.
fn member_request(body: &Map<String, Value>, missing: BadRequest) -> Result<(ParticipantRequest, String), BadRequest> {
    let room_id = required(body, "room_id", MAX_ID_BYTES, BadRequest::RoomOrSlot)?;
    let slot_id = required(body, "slot_id", MAX_ID_BYTES, BadRequest::RoomOrSlot)?;
    let member = nested(body, "member", missing)?;
    let member_id = required(member, "id", MAX_MEMBER_ID_BYTES, missing)?;
    let claimed_user_id = required(member, "claimed_user_id", MAX_ID_BYTES, missing)?;
    let claimed_device_id = required(member, "claimed_device_id", MAX_ID_BYTES, missing)?;
    let participant = ParticipantRequest::Member {
        room_id,
        slot_id,
        claimed_device_id,
        member_id,
    };
    Ok((participant, claimed_user_id))
}

/// Reads both delay fields or none. A timeout of zero or less counts as absent.
fn delayed_event(body: &Map<String, Value>) -> Result<Option<DelayedEvent>, BadRequest> {
    let id = text(body, "delay_id")?.filter(|id| !id.is_empty());
    let millis = match body.get("delay_timeout") {
        None | Some(Value::Null) => None,
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(digits)) => Some(digits.trim().parse::<f64>().map_err(|_| BadRequest::WrongType)?),
        Some(Value::Bool(_) | Value::Array(_) | Value::Object(_)) => return Err(BadRequest::WrongType),
    };
    match (id, millis.filter(|millis| *millis > 0.0)) {
        (None, None) => Ok(None),
        (Some(_), None) | (None, Some(_)) => Err(BadRequest::HalfDelay),
        (Some(id), Some(millis)) => Ok(Some(DelayedEvent {
            id: Some(id).filter(|id| is_delay_id(id)).ok_or(BadRequest::DelayId)?.to_owned(),
            delay: whole(millis)?.and_then(Delay::from_millis).ok_or(BadRequest::DelayTimeout)?,
        })),
    }
}

/// `3600.0` is whole, `0.5` is not; what is beyond all delays need not be exact.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, whole, and compared with a bound far below the limit of either type"
)]
fn whole(millis: f64) -> Result<Option<u64>, BadRequest> {
    if millis.fract() == 0.0 {
        Ok((millis <= 1e15).then_some(millis as u64))
    } else {
        Err(BadRequest::WrongType)
    }
}

/// Whether `id` can be the id of a delayed event: it becomes one segment of a path, which `.` and `..` are not. Synapse's
/// ids have 23 characters.
fn is_delay_id(id: &str) -> bool {
    !matches!(id, "." | "..") && id.len() <= MAX_DELAY_ID_BYTES
}

/// Whether `device_id` would be read as the port of the server name that stands before it in a legacy identity.
fn begins_with_port(device_id: &str) -> bool {
    let port = device_id.split_once(':').map_or("", |(port, _)| port);
    (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit())
}

/// The `errcode` of an error: what a proxy or a firewall says has none.
pub(crate) fn errcode(body: &[u8]) -> Option<String> {
    text_in(body, "errcode").ok().flatten()
}

/// A text of the object with which a body begins. Odd values of other members, and whatever comes after the object, are ignored (decision
/// O3).
///
/// # Errors
/// When it begins with no object.
pub(crate) fn text_in(body: &[u8], name: &str) -> serde_json::Result<Option<String>> {
    struct Member<'a>(&'a str);

    impl<'de> Visitor<'de> for Member<'_> {
        type Value = Option<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
            let mut text = None;
            while let Some(name) = members.next_key::<String>()? {
                if name == self.0 {
                    text = match members.next_value()? {
                        Value::String(text) => Some(text),
                        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => None,
                    };
                } else {
                    let _: IgnoredAny = members.next_value()?;
                }
            }
            Ok(text)
        }
    }

    let body = String::from_utf8_lossy(body);
    serde_json::Deserializer::from_str(&body).deserialize_map(Member(name))
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_text_is_found_in_whatever_stands_around_it() {
        for body in [
            &br#"{"sub":"@a:x"}"#[..],
            br#" {"x":1e999,"sub":"@a:x","y":{"sub":"@b:x"}} <!-- a proxy was here -->"#,
            b"{\"sub\":\"@a:x\",\"name\":\"\xff\xfe\"}{\"sub\":\"@c:x\"}",
            br#"{"sub":"@b:x","sub":"@a:x"}"#,
        ] {
            assert_eq!(text_in(body, "sub").ok().flatten().as_deref(), Some("@a:x"));
        }
        for body in [&br#"{"sub":["@a:x"]}"#[..], b"{}", br#"{"sub":null}"#] {
            assert_eq!(text_in(body, "sub").ok(), Some(None));
        }
        for body in [&b""[..], br#"["@a:x"]"#, br#""@a:x""#, br#"{"sub":"@a:x""#, b"<html>"] {
            assert!(text_in(body, "sub").is_err(), "{}", String::from_utf8_lossy(body));
        }
    }

    fn full() -> Value {
        json!({"room_id": "!r:x", "slot_id": "s", "openid_token": {"access_token": "t", "matrix_server_name": "x"},
            "member": {"id": "m", "claimed_user_id": "@a:x", "claimed_device_id": "D"}})
    }

    fn legacy() -> Value {
        json!({"room": "!r:x", "device_id": "D", "openid_token": {"access_token": "t", "matrix_server_name": "x"}})
    }

    fn with(mut body: Value, pointer: &str, value: Value) -> Vec<u8> {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        body.pointer_mut(parent).unwrap()[key] = value;
        body.to_string().into_bytes()
    }

    #[test]
    fn parses_both_bodies() {
        let request = TokenRequest::get_token(full().to_string().as_bytes()).unwrap();
        assert_eq!(request.claimed_user_id.as_deref(), Some("@a:x"));
        assert_eq!(request.openid_token.access_token.expose(), "t");
        assert_eq!(request.event, None);
        let request = TokenRequest::sfu_get(legacy().to_string().as_bytes()).unwrap();
        assert_eq!(
            request.participant,
            ParticipantRequest::Legacy {
                room: "!r:x".into(),
                device_id: "D".into()
            }
        );
        assert_eq!(
            TokenRequest::sfu_get(full().to_string().as_bytes())
                .unwrap()
                .claimed_user_id
                .as_deref(),
            Some("@a:x")
        );
    }

    #[test]
    fn missing_null_and_empty_are_the_same() {
        for (pointer, error) in [
            ("/room_id", BadRequest::RoomOrSlot),
            ("/slot_id", BadRequest::RoomOrSlot),
            ("/member/id", BadRequest::Member),
            ("/member/claimed_user_id", BadRequest::Member),
            ("/member/claimed_device_id", BadRequest::Member),
            ("/openid_token/access_token", BadRequest::OpenIdToken),
            ("/openid_token/matrix_server_name", BadRequest::OpenIdToken),
        ] {
            for value in [json!(null), json!("")] {
                assert_eq!(
                    TokenRequest::get_token(&with(full(), pointer, value)).unwrap_err(),
                    error,
                    "{pointer}"
                );
            }
            assert_eq!(
                TokenRequest::get_token(&with(full(), pointer, json!(5))).unwrap_err(),
                BadRequest::WrongType,
                "{pointer}"
            );
        }
        assert_eq!(
            TokenRequest::get_token(&with(full(), "/member", json!(null))).unwrap_err(),
            BadRequest::Member
        );
        assert_eq!(
            TokenRequest::get_token(&with(full(), "/openid_token", json!([]))).unwrap_err(),
            BadRequest::WrongType
        );
        assert_eq!(TokenRequest::sfu_get(b"{}").unwrap_err(), BadRequest::LegacyRoom);
        assert_eq!(
            TokenRequest::sfu_get(&with(legacy(), "/openid_token", json!({}))).unwrap_err(),
            BadRequest::LegacyOpenIdToken
        );
        assert_eq!(
            TokenRequest::sfu_get(&with(legacy(), "/device_id", json!(5))).unwrap_err(),
            BadRequest::WrongType
        );
        assert!(TokenRequest::sfu_get(&with(legacy(), "/device_id", json!(null))).is_ok());
    }

    /// `@a:hs` with the device `8448:D` would be `@a:hs:8448` with the device `D`: another homeserver's user.
    #[test]
    fn a_device_is_not_the_end_of_a_server_name() {
        for (device_id, is_refused) in [
            ("8448:D", true),
            ("8448:", true),
            ("0:D", true),
            ("65535:8448:D", true),
            ("123456:D", false),
            (":D", false),
            ("8448", false),
            ("D8448:D", false),
            ("\u{661}:D", false),
            ("", false),
        ] {
            let body = with(legacy(), "/device_id", json!(device_id));
            assert_eq!(
                TokenRequest::sfu_get(&body).err() == Some(BadRequest::DeviceId),
                is_refused,
                "{device_id}"
            );
        }
    }

    /// (a field, the longest that is taken): of the bodies of clients.
    const LIMITS: [(&str, usize); 6] = [
        ("/room_id", 255),
        ("/slot_id", 255),
        ("/member/id", 511),
        ("/member/claimed_user_id", 255),
        ("/member/claimed_device_id", 255),
        ("/openid_token/access_token", 4096),
    ];

    #[test]
    fn what_matrix_does_not_allow_is_too_long() {
        let of = |length: usize| json!("ä".repeat(length / 2) + &"x".repeat(length % 2));
        for (pointer, longest) in LIMITS {
            let parse = |length| TokenRequest::get_token(&with(full(), pointer, of(length)));
            assert!(parse(longest).is_ok(), "{pointer}");
            assert_eq!(parse(longest + 1).unwrap_err(), BadRequest::TooLong, "{pointer}");
            let delegate = |length| DelegationRequest::parse(&with(full(), pointer, of(length))).unwrap_err();
            assert_eq!(delegate(longest + 1), BadRequest::TooLong, "{pointer}");
            assert_eq!(delegate(longest), BadRequest::HalfDelay, "{pointer}");
        }
        for (pointer, longest) in [("/room", 255), ("/device_id", 255), ("/openid_token/access_token", 4096)] {
            let parse = |length| TokenRequest::sfu_get(&with(legacy(), pointer, of(length)));
            assert!(parse(longest).is_ok(), "{pointer}");
            assert_eq!(parse(longest + 1).unwrap_err(), BadRequest::TooLong, "{pointer}");
        }
        let mut body = homeserver_body();
        body["member"] = json!({"id": "m", "claimed_device_id": "D", "claimed_user_id": "@a:x"});
        for (pointer, longest) in [
            ("/url", 2048),
            ("/room_id", 255),
            ("/slot_id", 255),
            ("/member_id", 511),
            ("/member/id", 511),
            ("/member/claimed_device_id", 255),
            ("/member/claimed_user_id", 255),
        ] {
            let parse = |length| {
                let body = with(body.clone(), pointer, of(length));
                [
                    ClientTokenRequest::parse(&body).err(),
                    FederationTokenRequest::parse(&body).err(),
                    ClientDelegationRequest::parse(&body).err(),
                ]
            };
            assert_eq!(parse(longest), [None; 3], "{pointer}");
            assert_eq!(parse(longest + 1), [Some(BadRequest::TooLong); 3], "{pointer}");
        }
    }

    /// The longest user and device that Matrix allows, as Element Call joins them.
    #[test]
    fn the_longest_member_of_element_call_is_taken() {
        let (user, device) = (format!("@{}:x", "u".repeat(252)), "D".repeat(255));
        let body = with(full(), "/member/claimed_user_id", json!(user));
        let mut body: Value = serde_json::from_slice(&body).unwrap();
        body["member"]["claimed_device_id"] = json!(device);
        body["member"]["id"] = json!(format!("{user}:{device}"));
        assert!(TokenRequest::get_token(body.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn what_is_not_an_object_is_not_json() {
        for body in [
            &b""[..],
            b"  ",
            b"{",
            b"null",
            b"[]",
            b"5",
            b"\"s\"",
            b"\xef\xbb\xbf{}",
            b"{\"a\":1,}",
            b"{\"a\":NaN}",
            b"{a:1}",
        ] {
            assert_eq!(TokenRequest::get_token(body).unwrap_err(), BadRequest::NotJson, "{body:?}");
        }
        let deep = format!("{}1{}", "[".repeat(30_000), "]".repeat(30_000));
        assert_eq!(TokenRequest::get_token(deep.as_bytes()).unwrap_err(), BadRequest::NotJson);
    }

    #[test]
    fn is_lenient_where_clients_need_it() {
        let mut extra = full();
        extra["new_field"] = json!({"deep": [1, 2]});
        extra["member"]["x"] = json!(null);
        extra["openid_token"]["expires_in"] = json!("soon");
        extra["openid_token"]["token_type"] = json!(5);
        assert!(TokenRequest::get_token(extra.to_string().as_bytes()).is_ok());
        let trailing = format!("{} trailing }}", full());
        assert!(TokenRequest::get_token(trailing.as_bytes()).is_ok());
        let repeated = full().to_string().replacen('{', "{\"room_id\":\"\",", 1);
        assert!(TokenRequest::get_token(repeated.as_bytes()).is_ok(), "the last one wins");
    }

    #[test]
    fn every_invalid_byte_becomes_one_replacement_character() {
        let mut body = full().to_string().into_bytes();
        let at = body.windows(4).position(|w| w == b"!r:x").unwrap();
        body.splice(at..at + 4, *b"!\xe2\x82:x");
        let request = TokenRequest::get_token(&body).unwrap();
        let ParticipantRequest::Member { room_id, .. } = request.participant else {
            panic!("wrong body")
        };
        assert_eq!(room_id, "!\u{fffd}\u{fffd}:x");
    }

    #[test]
    fn a_lone_surrogate_becomes_a_replacement_character() {
        for (sent, meant) in [
            (r"\ud800", "\u{fffd}"),
            (r"\uDFFF", "\u{fffd}"),
            (r"a\ud800b\udc00c", "a\u{fffd}b\u{fffd}c"),
            (r"\ud800\ud83d\ude00", "\u{fffd}😀"),
            (r"\udc00\ud800", "\u{fffd}\u{fffd}"),
            (r"\ud83d\ude00", "😀"),
            (r"\ud800\n", "\u{fffd}\n"),
            (r"\\ud800", r"\ud800"),
            (r"é\\é\u00e9", "é\\éé"),
        ] {
            let parsed = object(format!("{{\"x\":\"{sent}\"}}").as_bytes()).unwrap();
            assert_eq!(parsed["x"], meant, "{sent}");
        }
        for broken in [r"\ud8", r"\u+123", r"\é", "\\"] {
            assert_eq!(
                object(format!("{{\"x\":\"{broken}\"}}").as_bytes()).unwrap_err(),
                BadRequest::NotJson,
                "{broken}"
            );
        }
    }

    #[test]
    fn delays_come_in_pairs_and_within_a_day() {
        let delay = |millis| Ok(Some(Delay::from_millis(millis).unwrap()));
        for (id, timeout, expected) in [
            (json!("d"), json!(1), delay(1)),
            (json!("d"), json!("3600000"), delay(3_600_000)),
            (json!("d"), json!(3_600_000.0), delay(3_600_000)),
            (json!("d"), json!(86_400_000), delay(86_400_000)),
            (json!("d"), json!(86_400_001), Err(BadRequest::DelayTimeout)),
            (json!("d"), json!(9_007_199_254_740_992_u64), Err(BadRequest::DelayTimeout)),
            (json!("d"), json!(9_223_372_036_854_775_808_u64), Err(BadRequest::DelayTimeout)),
            (json!("d"), json!("1e300"), Err(BadRequest::DelayTimeout)),
            (json!("d"), json!(0.5), Err(BadRequest::WrongType)),
            (json!("d"), json!(null), Err(BadRequest::HalfDelay)),
            (json!("d"), json!(0), Err(BadRequest::HalfDelay)),
            (json!("d"), json!(-1), Err(BadRequest::HalfDelay)),
            (json!("d"), json!("nan"), Err(BadRequest::HalfDelay)),
            (json!(null), json!(5), Err(BadRequest::HalfDelay)),
            (json!(""), json!(-5), Ok(None)),
            (json!(7), json!(7), Err(BadRequest::WrongType)),
            (json!("d"), json!("soon"), Err(BadRequest::WrongType)),
            (json!("d"), json!(true), Err(BadRequest::WrongType)),
            (json!("."), json!(5), Err(BadRequest::DelayId)),
            (json!(".."), json!(5), Err(BadRequest::DelayId)),
            (json!("x".repeat(256)), json!(5), Err(BadRequest::DelayId)),
            (json!("../a%2e?"), json!(5), delay(5)),
        ] {
            let mut body = legacy();
            body["delay_id"] = id.clone();
            body["delay_timeout"] = timeout.clone();
            body["delay_cs_api_url"] = json!("https://ignored.example");
            let got = TokenRequest::sfu_get(body.to_string().as_bytes()).map(|r| r.event.map(|event| event.delay));
            assert_eq!(got, expected, "{id} {timeout}");
        }
    }

    fn homeserver_body() -> Value {
        json!({"url": "wss://sfu", "room_id": "!r", "slot_id": "s", "member_id": "m", "user_id": "@a:x", "delay_id": "d"})
    }

    #[test]
    fn both_generations_of_members_are_understood_and_the_flat_one_wins() {
        let parse = |body: &Value| ClientTokenRequest::parse(body.to_string().as_bytes()).map(|request| request.wanted.participant);
        let flat = ParticipantRequest::Homeserver {
            room_id: "!r".into(),
            slot_id: "s".into(),
            member_id: "m".into(),
        };
        let mut body = homeserver_body();
        assert_eq!(parse(&body).unwrap(), flat);
        body["member"] = json!({"id": "old", "claimed_device_id": "D", "claimed_user_id": "@a:x"});
        assert_eq!(parse(&body).unwrap(), flat);
        let nested = ParticipantRequest::Member {
            room_id: "!r".into(),
            slot_id: "s".into(),
            claimed_device_id: "D".into(),
            member_id: "old".into(),
        };
        for absent in [json!(null), json!("")] {
            body["member_id"] = absent;
            assert_eq!(parse(&body).unwrap(), nested);
        }
        assert_eq!(nested.key("@a:x").identity, identity::member_identity("@a:x", "D", "old"));
        assert_eq!(flat.key("@a:x").identity, identity::homeserver_identity("@a:x", "m"));
        body["member"] = json!({"id": "old", "device_id": "D"});
        assert_eq!(parse(&body).unwrap(), nested);
        // A member that names no device has the identity of a `member_id`.
        for member in [
            json!({"id": "old"}),
            json!({"id": "old", "claimed_device_id": "", "device_id": null}),
        ] {
            body["member"] = member;
            assert_eq!(
                parse(&body).unwrap().key("@a:x").identity,
                identity::homeserver_identity("@a:x", "old")
            );
        }
        for (broken, why) in [
            (json!({"id": "old", "device_id": 5}), BadRequest::WrongType),
            (json!({"claimed_device_id": "D"}), BadRequest::MemberId),
            (json!({"id": "", "claimed_device_id": "D"}), BadRequest::MemberId),
            (json!(5), BadRequest::WrongType),
            (json!({"id": 5, "claimed_device_id": "D"}), BadRequest::WrongType),
        ] {
            body["member"] = broken;
            assert_eq!(parse(&body).unwrap_err(), why);
        }
    }

    #[test]
    fn what_comes_through_a_homeserver_needs_everything() {
        type Parse = fn(&[u8]) -> Option<BadRequest>;
        let client: Parse = |body| ClientTokenRequest::parse(body).err();
        let federation: Parse = |body| FederationTokenRequest::parse(body).err();
        let delegation: Parse = |body| ClientDelegationRequest::parse(body).err();
        for (parse, fields) in [
            (client, &["url", "room_id", "slot_id", "member_id"][..]),
            (federation, &["user_id", "url", "room_id", "slot_id", "member_id"]),
            (delegation, &["room_id", "slot_id", "member_id", "delay_id"]),
        ] {
            assert_eq!(parse(homeserver_body().to_string().as_bytes()), None);
            for field in fields {
                let why = match *field {
                    "url" => BadRequest::Url,
                    "member_id" => BadRequest::MemberId,
                    "user_id" => BadRequest::UserId,
                    "delay_id" => BadRequest::NoDelayId,
                    _ => BadRequest::RoomOrSlot,
                };
                for (value, expected) in [(json!(null), why), (json!(""), why), (json!(5), BadRequest::WrongType)] {
                    let body = with(homeserver_body(), &format!("/{field}"), value.clone());
                    assert_eq!(parse(&body), Some(expected), "{field}: {value}");
                }
            }
            for body in [&b""[..], b"{", b"[]"] {
                assert_eq!(parse(body), Some(BadRequest::NotJson));
            }
        }
        for url in [json!(null), json!("")] {
            assert_eq!(delegation(&with(homeserver_body(), "/url", url)), None, "it can only be ours");
        }
        assert_eq!(delegation(&with(homeserver_body(), "/url", json!(5))), Some(BadRequest::WrongType));
        for id in [".", "..", &"x".repeat(256)] {
            assert_eq!(
                delegation(&with(homeserver_body(), "/delay_id", json!(id))),
                Some(BadRequest::DelayId)
            );
        }
        assert_eq!(delegation(&with(homeserver_body(), "/delay_id", json!("../a%2e?"))), None);
    }

    #[test]
    fn a_delegation_needs_everything() {
        let mut body = full();
        assert_eq!(
            DelegationRequest::parse(body.to_string().as_bytes()).unwrap_err(),
            BadRequest::HalfDelay
        );
        body["delay_id"] = json!("d");
        body["delay_timeout"] = json!(8000);
        assert_eq!(DelegationRequest::parse(body.to_string().as_bytes()).unwrap().event.id, "d");
        assert_eq!(
            DelegationRequest::parse(&with(body.clone(), "/member/id", json!(""))).unwrap_err(),
            BadRequest::DelegationMember
        );
        assert_eq!(
            DelegationRequest::parse(&with(body, "/openid_token", json!(null))).unwrap_err(),
            BadRequest::DelegationOpenIdToken
        );
        assert_eq!(DelegationRequest::parse(b"").unwrap_err(), BadRequest::NotJson);
    }
}
