//! Webhooks as livekit-server sends them, and as others would.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::time::{SystemTime, UNIX_EPOCH};

use super::client::{Answer, Call};
use super::jwt::Jwt;
use super::service::Service;
use super::sfu::{Session, Sfu};
use super::unique;

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_millis().try_into().expect("before the year 292 million")
}

/// An event about a participant, in protobuf's JSON.
pub(crate) fn event(name: &str, session: &Session, reason: Option<&str>) -> Value {
    let state = if name == "participant_joined" { "ACTIVE" } else { "DISCONNECTED" };
    let mut participant = json!({
        "sid": session.sid,
        "identity": session.identity,
        "state": state,
        "joinedAt": (session.joined_at_ms / 1000).to_string(),
        "joinedAtMs": session.joined_at_ms.to_string(),
        "version": 3,
    });
    if let Some(reason) = reason {
        participant["disconnectReason"] = reason.into();
    }
    json!({
        "event": name,
        "room": {"sid": session.room_sid, "name": session.room, "emptyTimeout": 300, "departureTimeout": 20},
        "participant": participant,
        "id": format!("EV_{}", unique()),
        "createdAt": now().to_string(),
    })
}

pub(crate) fn joined(session: &Session) -> Value {
    event("participant_joined", session, None)
}

pub(crate) fn left(session: &Session, reason: &str) -> Value {
    event("participant_left", session, Some(reason))
}

/// What livekit-server puts into the token of a webhook.
pub(crate) fn claims(sfu: &Sfu, body: &[u8]) -> Value {
    claims_of(sfu.key(), body)
}

fn claims_of(key: &str, body: &[u8]) -> Value {
    let now = now();
    json!({
        "iss": key,
        "exp": now + 300,
        "nbf": now,
        "iat": now,
        "sha256": STANDARD.encode(Sha256::digest(body)),
    })
}

/// The request, with the token that is given.
pub(crate) fn with_token(body: impl Into<Vec<u8>>, authorization: &str) -> Call {
    Call::post("/sfu_webhook", body)
        .header("Content-Type", "application/webhook+json")
        .header("Authorization", authorization)
}

/// The request, signed as it should be.
pub(crate) fn signed(sfu: &Sfu, body: &str) -> Call {
    with_token(body, &Jwt::sign(&claims(sfu, body.as_bytes()), sfu.secret()))
}

/// The request, signed with another key and secret.
pub(crate) fn signed_with(key: &str, secret: &str, body: &str) -> Call {
    with_token(body, &Jwt::sign(&claims_of(key, body.as_bytes()), secret))
}

/// Tells the service, whatever it answers.
#[track_caller]
pub(crate) fn tell(service: &Service, sfu: &Sfu, event: &Value) -> Answer {
    service.call(&signed(sfu, &event.to_string()))
}
