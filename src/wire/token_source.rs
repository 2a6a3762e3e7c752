//! A request of LiveKit's token sources: `/token_source` (`Authorization`, query and body). Pure.
//!
//! The body is LiveKit's and cannot carry what a Matrix identity needs; that comes in the head. What the body says about who
//! takes part is refused rather than ignored: who believes to be called "bob" must learn otherwise, and `room_config` can
//! start agents and recordings.

use serde::Serialize;
use serde_json::Value;
use url::form_urlencoded;

use super::{
    BadRequest, MAX_ACCESS_TOKEN_BYTES, MAX_ID_BYTES, MAX_MEMBER_ID_BYTES, ParticipantRequest, TokenRequest, UnverifiedOpenIdToken,
    begins_with_port, object,
};
use crate::identity::ROOM_SLOT;
use crate::secret::Secret;

/// Fields that a client must not choose.
const NOT_OURS: [&str; 5] = [
    "participant_identity",
    "participant_name",
    "participant_metadata",
    "participant_attributes",
    "room_config",
];

/// Parameters in the head of a request, complete and bounded. Nothing in it is verified.
#[derive(Debug)]
pub struct TokenSourceHead {
    openid_token: UnverifiedOpenIdToken,
    device_id: String,
    /// Member and slot: the participant is that of `/get_token`.
    member: Option<(String, String)>,
}

impl TokenSourceHead {
    /// Reads the values of the header `Authorization`, and the query.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn parse<'a>(authorization: impl IntoIterator<Item = &'a [u8]>, query: &str) -> Result<Self, BadRequest> {
        let access_token = bearer(authorization).ok_or(BadRequest::NoBearer)?;
        let (mut server_name, mut device_id, mut member_id, mut slot_id) = Default::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let field: &mut String = match &*key {
                "matrix_server_name" => &mut server_name,
                "device_id" => &mut device_id,
                "member_id" => &mut member_id,
                "slot_id" => &mut slot_id,
                _ => continue,
            };
            *field = value.into_owned();
        }
        if server_name.is_empty() {
            return Err(BadRequest::NoServerNameParameter);
        }
        if device_id.is_empty() {
            return Err(BadRequest::NoDeviceIdParameter);
        }
        if !slot_id.is_empty() && member_id.is_empty() {
            return Err(BadRequest::SlotWithoutMember);
        }
        let lengths = [
            (&device_id, MAX_ID_BYTES),
            (&member_id, MAX_MEMBER_ID_BYTES),
            (&slot_id, MAX_ID_BYTES),
        ];
        if lengths.iter().any(|(text, max)| text.len() > *max) || access_token.len() > MAX_ACCESS_TOKEN_BYTES {
            return Err(BadRequest::LongParameter);
        }
        let member = if member_id.is_empty() {
            if begins_with_port(&device_id) {
                return Err(BadRequest::DeviceIdParameter);
            }
            None
        } else {
            Some((member_id, if slot_id.is_empty() { ROOM_SLOT.to_owned() } else { slot_id }))
        };
        // What is so long is no server name, which has an answer of its own; nothing is kept of it while the body comes.
        if server_name.len() > MAX_ID_BYTES {
            server_name = String::new();
        }
        Ok(Self {
            openid_token: UnverifiedOpenIdToken {
                access_token: Secret::new(access_token),
                unverified_server_name: server_name,
            },
            device_id,
            member,
        })
    }
}

/// The one bearer token. Browsers join headers that were given twice by a comma.
fn bearer<'a>(authorization: impl IntoIterator<Item = &'a [u8]>) -> Option<&'a str> {
    let mut values = authorization.into_iter();
    let value = std::str::from_utf8(values.next()?).ok()?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim_start();
    let is_one = values.next().is_none() && scheme.eq_ignore_ascii_case("Bearer");
    (is_one && !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',')).then_some(token)
}

impl TokenRequest {
    /// Parses the body of `/token_source`, whose head was read before.
    ///
    /// # Errors
    /// The first thing that is wrong, in the order of the contract.
    pub fn token_source(head: Result<TokenSourceHead, BadRequest>, body: &[u8]) -> Result<Self, BadRequest> {
        let TokenSourceHead {
            openid_token,
            device_id,
            member,
        } = head?;
        let body = object(body)?;
        let room = body.get("room_name").and_then(Value::as_str);
        let room = room.filter(|room| room.starts_with('!') && room.len() <= MAX_ID_BYTES);
        let room = room.ok_or(BadRequest::RoomName)?.to_owned();
        if NOT_OURS.iter().any(|key| body.get(*key).is_some_and(|value| !holds_nothing(value))) {
            return Err(BadRequest::NotTheClients);
        }
        let participant = match member {
            None => ParticipantRequest::Legacy { room, device_id },
            Some((member_id, slot_id)) => ParticipantRequest::Member {
                room_id: room,
                slot_id,
                claimed_device_id: device_id,
                member_id,
            },
        };
        Ok(Self {
            openid_token,
            claimed_user_id: None,
            participant,
            event: None,
        })
    }
}

/// SDKs write defaults out, some of them always. How deep a body may be nested, the JSON library bounds.
fn holds_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.iter().all(holds_nothing),
        Value::Object(members) => members.values().all(holds_nothing),
    }
}

/// The answer of `/token_source`.
#[derive(Debug, Serialize)]
pub struct TokenSourceReply<'a> {
    /// The address of the SFU.
    pub server_url: &'a str,
    /// The LiveKit token.
    pub participant_token: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const GOOD: &str = "matrix_server_name=example.org&device_id=DEVICE";

    fn head(authorization: &[&str], query: &str) -> Result<TokenSourceHead, BadRequest> {
        TokenSourceHead::parse(authorization.iter().map(|value| value.as_bytes()), query)
    }

    fn request(query: &str, body: &Value) -> Result<TokenRequest, BadRequest> {
        TokenRequest::token_source(head(&["Bearer t"], query), body.to_string().as_bytes())
    }

    #[test]
    fn there_is_one_bearer_token() {
        for (good, token) in [("Bearer t", "t"), ("bearer   a.b-_~+/=", "a.b-_~+/="), (" BEARER t ", "t")] {
            assert_eq!(head(&[good], GOOD).unwrap().openid_token.access_token.expose(), token, "{good}");
        }
        for bad in [
            &[][..],
            &[""],
            &["Bearer"],
            &["Bearer "],
            &["Basic t"],
            &["t"],
            &["Bearert"],
            &["Bearer a b"],
            &["Bearer a, Bearer b"],
            &["Bearer a,Bearer"],
            &["Bearer a", "Bearer a"],
            &["Bearer ä"],
        ] {
            assert_eq!(head(bad, GOOD).unwrap_err(), BadRequest::NoBearer, "{bad:?}");
        }
    }

    #[test]
    fn parameters_are_judged_in_their_order() {
        let long = "x".repeat(256);
        let member = |length: usize| format!("{GOOD}&member_id={}", "x".repeat(length));
        for (query, bad) in [
            (String::new(), BadRequest::NoServerNameParameter),
            (format!("{GOOD}&matrix_server_name="), BadRequest::NoServerNameParameter),
            ("matrix_server_name=x".into(), BadRequest::NoDeviceIdParameter),
            (format!("{GOOD}&device_id"), BadRequest::NoDeviceIdParameter),
            (format!("{GOOD}&slot_id=s&device_id={long}"), BadRequest::SlotWithoutMember),
            (format!("{GOOD}&slot_id=s&member_id="), BadRequest::SlotWithoutMember),
            (format!("{GOOD}&device_id={long}"), BadRequest::LongParameter),
            (format!("{GOOD}&device_id={long}&member_id=m"), BadRequest::LongParameter),
            (member(512), BadRequest::LongParameter),
            (format!("{GOOD}&member_id=m&slot_id={long}"), BadRequest::LongParameter),
            (format!("{GOOD}&device_id=8448:D"), BadRequest::DeviceIdParameter),
            (format!("{GOOD}&device_id=8448%3AD"), BadRequest::DeviceIdParameter),
        ] {
            assert_eq!(head(&["Bearer t"], &query).unwrap_err(), bad, "{query}");
        }
        for query in [
            GOOD.to_owned(),
            format!("device_id=&{GOOD}&other=x&&=&slot_id="),
            member(511),
            format!("{GOOD}&member_id=m&slot_id=s&device_id=8448:D"),
        ] {
            assert!(head(&["Bearer t"], &query).is_ok(), "{query}");
        }
        assert_eq!(
            head(&[&format!("Bearer {}", "x".repeat(4097))], GOOD).unwrap_err(),
            BadRequest::LongParameter
        );
        let long = format!("matrix_server_name={}&device_id=D", "x".repeat(5000));
        assert_eq!(head(&["Bearer t"], &long).unwrap().openid_token.unverified_server_name, "");
    }

    #[test]
    fn the_participant_is_that_of_the_other_routes() {
        let key = |query: &str| request(query, &json!({"room_name": "!r:x"})).unwrap().participant.key("@a:x");
        let of = |parse: fn(&[u8]) -> Result<TokenRequest, BadRequest>, body: Value| {
            parse(body.to_string().as_bytes()).unwrap().participant.key("@a:x")
        };
        let openid = json!({"access_token": "t", "matrix_server_name": "x"});
        let legacy = json!({"room": "!r:x", "device_id": "D", "openid_token": openid});
        assert_eq!(key("matrix_server_name=x&device_id=D"), of(TokenRequest::sfu_get, legacy));
        for (slot, slot_id) in [("", "m.call#ROOM"), ("&slot_id=m.call%23other", "m.call#other")] {
            let member = json!({"id": "a+b c", "claimed_user_id": "@a:x", "claimed_device_id": "D"});
            let body = json!({"room_id": "!r:x", "slot_id": slot_id, "member": member, "openid_token": openid});
            let query = format!("matrix_server_name=x&device_id=D&member_id=a%2Bb+c{slot}");
            assert_eq!(key(&query), of(TokenRequest::get_token, body));
        }
    }

    #[test]
    fn what_is_not_the_clients_must_hold_nothing() {
        let nothing = json!([null, "", {}, [], 0, -0.0, false, {"agents": [{"agent_name": "", "x": [[{}], 0]}]}]);
        for key in NOT_OURS {
            for value in nothing.as_array().unwrap() {
                assert!(request(GOOD, &json!({"room_name": "!r:x", key: value})).is_ok(), "{key}: {value}");
            }
            for value in [
                json!("bob"),
                json!(1),
                json!(true),
                json!([[{"a": " "}]]),
                json!({"unknown": {"b": 0.1}}),
            ] {
                let body = json!({"room_name": "!r:x", key: value});
                assert_eq!(request(GOOD, &body).unwrap_err(), BadRequest::NotTheClients, "{key}: {value}");
            }
        }
    }

    #[test]
    fn the_room_is_a_matrix_room() {
        for value in [
            json!(null),
            json!(""),
            json!("r"),
            json!("#a:x"),
            json!(5),
            json!(["!r:x"]),
            json!(format!("!{}", "r".repeat(255))),
        ] {
            let body = json!({"room_name": value, "participant_name": "bob"});
            assert_eq!(request(GOOD, &body).unwrap_err(), BadRequest::RoomName, "{value}");
        }
        assert_eq!(request(GOOD, &json!([])).unwrap_err(), BadRequest::NotJson);
    }
}
