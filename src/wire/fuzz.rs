//! Any body at all: an answer, never a panic, and nothing that is larger than the body. `tests/fuzz` tries a million.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const KEYS: [&str; 25] = [
    "room_name",
    "participant_name",
    "participant_attributes",
    "room_config",
    "url",
    "user_id",
    "member_id",
    "server_name",
    "room",
    "room_id",
    "slot_id",
    "device_id",
    "openid_token",
    "access_token",
    "token_type",
    "matrix_server_name",
    "expires_in",
    "member",
    "id",
    "claimed_user_id",
    "claimed_device_id",
    "delay_id",
    "delay_timeout",
    "delay_cs_api_url",
    "x",
];

fn whole() -> Value {
    json!({
        "url": "wss://example.org", "user_id": "@a:example.org", "member_id": "m", "server_name": "example.org",
        "room": "!r:example.org", "room_name": "!r:example.org", "room_id": "!r:example.org", "slot_id": "m.call#ROOM", "device_id": "DEVICE",
        "openid_token": {"access_token": "t", "matrix_server_name": "example.org", "token_type": "Bearer", "expires_in": 3600},
        "member": {"id": "m", "claimed_user_id": "@a:example.org", "claimed_device_id": "DEVICE"},
        "delay_id": "syd_1", "delay_timeout": 8000, "delay_cs_api_url": "https://example.org",
    })
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n.to_string())),
        (0..90_000_000i64).prop_map(|n| json!(n)),
        prop::sample::select(vec!["", ".", "..", "%2e", "a/b", "a?b", "\u{0}", "3600000", "3600000.0", "1e400"]).prop_map(|s| json!(s)),
        "\\PC{0,12}".prop_map(|s| json!(s)),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            1 => prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            3 => prop::collection::hash_map(prop::sample::select(KEYS.to_vec()), inner, 0..8).prop_map(|map| json!(map)),
        ]
    })
}

/// A good body of which some fields are others.
fn almost_good() -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((prop::sample::select(KEYS.to_vec()), 0..3u8, prop::option::of(any_value())), 0..4);
    changes.prop_map(|changes| {
        let mut body = whole();
        for (key, place, value) in changes {
            let object = match place {
                0 => Some(&mut body),
                1 => body.get_mut("member"),
                _ => body.get_mut("openid_token"),
            };
            if let Some(object) = object.and_then(Value::as_object_mut) {
                match value {
                    Some(value) => drop(object.insert(key.to_owned(), value)),
                    None => drop(object.remove(key)),
                }
            }
        }
        body.to_string().into_bytes()
    })
}

/// Bytes of it are others, it is cut, or something is put in.
fn mangled() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..8),
        prop::sample::select(vec![
            "\\ud800",
            "\\udc00",
            "\\ud83d\\ude00",
            "\\u",
            "\\",
            "\"",
            "{",
            "[",
            "1e9",
            "-0"
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        (0..2_000usize).prop_map(|deep| b"[".repeat(deep)),
        (0..2_000usize).prop_map(|deep| b"{\"x\":".repeat(deep)),
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), piece, any::<bool>()), 1..4);
    (almost_good(), edits, prop::option::of(any::<prop::sample::Index>())).prop_map(|(mut body, edits, cut)| {
        for (at, piece, over) in edits {
            let from = at.index(body.len() + 1);
            let to = if over { (from + piece.len()).min(body.len()) } else { from };
            body.splice(from..to, piece);
        }
        if let Some(cut) = cut.filter(|_| !body.is_empty()) {
            body.truncate(cut.index(body.len()));
        }
        body
    })
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        2 => almost_good(),
        2 => any_value().prop_map(|value| value.to_string().into_bytes()),
        3 => mangled(),
        1 => prop::collection::vec(any::<u8>(), 0..200),
    ]
}

fn all_is_there<'a>(mut texts: Vec<&'a str>, participant: &'a ParticipantRequest, body: &[u8]) {
    match participant {
        ParticipantRequest::Member {
            room_id,
            slot_id,
            claimed_device_id,
            member_id,
        } => texts.extend([room_id.as_str(), slot_id, claimed_device_id, member_id]),
        ParticipantRequest::Homeserver {
            room_id,
            slot_id,
            member_id,
        } => texts.extend([room_id.as_str(), slot_id, member_id]),
        ParticipantRequest::Legacy { room, .. } => texts.push(room),
    }
    assert!(texts.iter().all(|text| !text.is_empty()));
    // A byte that is no UTF-8 becomes three; the id of a member may be there twice.
    let all: usize = texts.iter().map(|text| text.len()).sum();
    assert!(all <= 4 * body.len());
}

fn is_sound(event: Option<&DelayedEvent>) {
    if let Some(event) = event {
        assert!((1..=86_400_000).contains(&event.delay.as_millis()));
        is_an_id(&event.id);
    }
}

fn is_an_id(id: &str) {
    assert!(!id.is_empty() && id != "." && id != ".." && id.len() <= 255);
}

fn texts(token: &UnverifiedOpenIdToken) -> Vec<&str> {
    assert!(token.access_token.expose().len() <= 4096);
    vec![token.access_token.expose(), &token.unverified_server_name]
}

/// A good query of which some parameters are others, or not as they should be written.
fn any_query() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec!["matrix_server_name", "device_id", "member_id", "slot_id", "x", "%6d", ""]);
    let value = prop_oneof!["\\PC{0,12}", "[0-9]{0,6}[:%=&+;]{0,2}[A-Z]{0,3}", "x{0,600}"];
    prop::collection::vec((key, value), 0..6).prop_map(|pairs| {
        let more: String = pairs.iter().map(|(key, value)| format!("&{key}={value}")).collect();
        format!("matrix_server_name=example.org&device_id=DEVICE{more}")
    })
}

proptest! {
    #[test]
    fn any_token_source_request_has_an_answer(body in any_body(), query in any_query(), authorization in "(Bearer )?\\PC{0,12}") {
        for authorization in ["Bearer t", &authorization] {
            let head = TokenSourceHead::parse([authorization.as_bytes()], &query);
            let Ok(request) = TokenRequest::token_source(head, &body) else { continue };
            prop_assert!(request.openid_token.unverified_server_name.len() <= 255);
            prop_assert!(!request.openid_token.access_token.expose().is_empty());
            prop_assert!(request.event.is_none() && request.participant.room_id().starts_with('!'));
            let (length, is_sound) = match &request.participant {
                ParticipantRequest::Member { room_id, slot_id, claimed_device_id, member_id } => (
                    room_id.len() + slot_id.len() + claimed_device_id.len() + member_id.len(),
                    ![slot_id, claimed_device_id, member_id].iter().any(|text| text.is_empty()),
                ),
                ParticipantRequest::Legacy { room, device_id } => {
                    (room.len() + device_id.len(), !device_id.is_empty() && !begins_with_port(device_id))
                }
                ParticipantRequest::Homeserver { .. } => (0, false),
            };
            prop_assert!(is_sound && length <= 3 * 255 + 511);
        }
    }

    #[test]
    fn any_request_body_has_an_answer(body in any_body()) {
        for request in [TokenRequest::get_token(&body), TokenRequest::sfu_get(&body)].into_iter().flatten() {
            all_is_there(texts(&request.openid_token), &request.participant, &body);
            prop_assert!(request.claimed_user_id.is_none_or(|user| !user.is_empty()));
            is_sound(request.event.as_ref());
        }
        if let Ok(request) = DelegationRequest::parse(&body) {
            all_is_there(texts(&request.openid_token), &request.participant, &body);
            is_sound(Some(&request.event));
        }
        if let Ok(request) = ClientTokenRequest::parse(&body) {
            all_is_there(vec![&request.url], &request.wanted.participant, &body);
        }
        if let Ok(request) = FederationTokenRequest::parse(&body) {
            all_is_there(vec![&request.url, &request.unverified_user_id], &request.wanted.participant, &body);
        }
        if let Ok(request) = ClientDelegationRequest::parse(&body) {
            all_is_there(request.url.iter().map(String::as_str).collect(), &request.wanted.participant, &body);
            is_an_id(&request.delay_id);
        }
    }
}
