//! Request bodies of the token routes.

use serde_json::{Value, json};

use super::homeserver::Homeserver;

/// An OpenID token as a homeserver hands it out.
pub(crate) fn openid(server: &str, token: &str) -> Value {
    json!({"access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600})
}

/// A complete `/get_token` body.
pub(crate) fn get_token(room: &str, server: &str, token: &str, user: &str) -> Value {
    json!({
        "room_id": room,
        "slot_id": "m.call#ROOM",
        "openid_token": openid(server, token),
        "member": {"id": "member1", "claimed_user_id": user, "claimed_device_id": "DEVICE"},
    })
}

/// A complete legacy `/sfu/get` body.
pub(crate) fn sfu_get(room: &str, server: &str, token: &str) -> Value {
    json!({"room": room, "openid_token": openid(server, token), "device_id": "DEVICE"})
}

/// A `/get_token` body of a user of `homeserver`, with a fresh token.
pub(crate) fn get_token_of(homeserver: &Homeserver, localpart: &str, room: &str) -> Value {
    get_token(room, &homeserver.name, &homeserver.token(localpart), &homeserver.user(localpart))
}

/// A `/sfu/get` body of a user of `homeserver`, with a fresh token.
pub(crate) fn sfu_get_of(homeserver: &Homeserver, localpart: &str, room: &str) -> Value {
    sfu_get(room, &homeserver.name, &homeserver.token(localpart))
}

/// A `/delegate_delayed_leave` body of a user of `homeserver`, with a fresh token.
pub(crate) fn delegate_of(homeserver: &Homeserver, localpart: &str, room: &str, delay_id: &str, delay_ms: u64) -> Value {
    let mut body = get_token_of(homeserver, localpart, room);
    body["delay_id"] = json!(delay_id);
    body["delay_timeout"] = json!(delay_ms);
    body
}

/// `body` with the member at `pointer` (RFC 6901) set, or removed where `value` is `None`.
pub(crate) fn with(body: &Value, pointer: &str, value: Option<Value>) -> Value {
    let mut body = body.clone();
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
    let object = body
        .pointer_mut(parent)
        .and_then(Value::as_object_mut)
        .unwrap_or_else(|| panic!("no object at {parent:?}"));
    match value {
        Some(value) => object.insert(name.into(), value),
        None => object.remove(name),
    };
    body
}
