//! A call of one user, step by step: access token, OpenID token, LiveKit token, join and leave; and whether they may say so in the
//! Matrix room.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Method, header};
use serde_json::Value;

use super::arrivals::ROOM;
use super::check::Sink;
use super::discovery::{JSON, ORIGIN, judge_transports, service_url};
use super::fault;
use super::sfu::{base_of, join};
use super::{MAX_BODY_BYTES, Run, answered, below, json_of, nonce, texts, words};
use crate::federation::{ClientApi, Look, Reply};
use crate::homeserver::segment;
use crate::secret::Secret;
use crate::server_name::ServerName;

/// Events by which clients say that they are in a call.
const MEMBER: &str = "org.matrix.msc3401.call.member";
const STEPS: [&str; 5] = ["openid", "transports", "token", "join", "power-level"];

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>) {
    let Some(token) = run.wishes.user_token.as_deref().map(Secret::new) else {
        return;
    };
    let servers = run.servers();
    let Some(server) = servers.first() else {
        return sink.skip(&["access-token"], "no homeserver is named: give one with --server");
    };
    let sink = sink.about(server.as_str());
    let api = match run.api(server).await {
        Ok(api) => api,
        Err(failure) => return sink.fail_before(&STEPS, "access-token", &fault::CLIENT_API, &words(&failure)),
    };
    if !api.may_carry_secrets() {
        let because = "the client-server API is not https: the access token is not sent there";
        return sink.skip(&["access-token"], because);
    }
    let user = match run.get(&api, "/_matrix/client/v3/account/whoami", Some(&token)).await {
        Ok(reply) => match field(&reply, "user_id") {
            Some(user) => user,
            None => return sink.fail_before(&STEPS, "access-token", &fault::USER_TOKEN, &said(&reply)),
        },
        Err(failure) => return sink.fail_before(&STEPS, "access-token", &fault::CLIENT_API, &words(&failure)),
    };
    sink.ok("access-token", &format_args!("it is one of {user}"));
    if let Ok(reply) = run.client_api(server, Some(&token)).await {
        judge_transports(run, &reply, None, &sink);
    }
    if let Some(room) = &run.wishes.room {
        check_power_level(run, &api, &token, &user, room, &sink).await;
    }
    let path = format!("/_matrix/client/v3/user/{}/openid/request_token", segment(&user));
    let why = match run.post(&api, &path, &token, &texts(&[])).await {
        Ok(reply) if field(&reply, "access_token").is_some() => {
            sink.ok("openid", &"the homeserver gives the user an OpenID token");
            return check_call(run, server, &user, json_of(&reply.body), &sink).await;
        }
        Ok(reply) => said(&reply),
        Err(failure) => words(&failure),
    };
    sink.fail_before(&STEPS[2..4], "openid", &fault::USER_OPENID, &why);
}

async fn check_call(run: &Run<'_>, server: &ServerName, user: &str, openid: Value, sink: &Sink<'_>) {
    let Some(service) = service_url(run, server).await else {
        return sink.skip(&STEPS[2..4], "no address of this service is known: see the discovery");
    };
    let is_made_up = run.wishes.room.is_none();
    let room = run.wishes.room.clone().unwrap_or_else(|| format!("!{ROOM}{}:{server}", nonce()));
    let mut body = texts(&[("room_id", &room), ("slot_id", "m.call#ROOM")]);
    body["openid_token"] = openid;
    let id = format!("doctor-{}", nonce());
    body["member"] = texts(&[("id", &id), ("claimed_user_id", user), ("claimed_device_id", "DOCTOR")]);
    let url = below(&service, "get_token");
    let headers = [(header::ORIGIN, ORIGIN), (header::CONTENT_TYPE, JSON)];
    let look = Look {
        url: &url,
        method: Method::POST,
        headers: &headers,
        body: Bytes::from(body.to_string()),
        limit: MAX_BODY_BYTES,
        since: run.began,
    };
    // The service may hold the request for as long as a homeserver takes.
    let reply = match run.context.federation.look(&look, run.is_configured(&url), run.ends).await {
        Ok(looked) => looked.reply,
        Err(failure) => return sink.fail_before(&STEPS[3..4], "token", &fault::USER_REFUSED, &words(&failure)),
    };
    let (Some(jwt), Some(sfu)) = (field(&reply, "jwt"), field(&reply, "url")) else {
        let mut saw = said(&reply);
        for (name, before, after) in [("reason", " (", ")"), ("request_id", ", request id ", "")] {
            if let Some(value) = field(&reply, name) {
                saw.extend([before, &value, after]);
            }
        }
        return sink.fail_before(&STEPS[3..4], "token", &fault::USER_REFUSED, &saw);
    };
    let claims = claims(&jwt).unwrap_or_default();
    let grant = |name: &str| claims.get("video")?.get(name);
    let publishes = if grant("canPublish").and_then(Value::as_bool) == Some(true) {
        "join, see and publish"
    } else {
        "join and see"
    };
    let alias = grant("room").and_then(Value::as_str).unwrap_or_default();
    sink.ok("token", &format_args!("the service gives a token to {publishes} in {alias}"));
    let token = Secret::new(jwt);
    match base_of(&sfu) {
        Some(base) => match join(run, &base, &token).await {
            Ok(_) => sink.ok("join", &format_args!("the user joins at {sfu}, and leaves")),
            Err(saw) => sink.fail("join", &fault::USER_JOIN, &saw),
        },
        None => sink.fail("join", &fault::USER_JOIN, &format_args!("the service names {sfu}")),
    }
    if is_made_up && let Some(livekit) = &run.context.sfu {
        // It would end by itself in five minutes.
        let _ = livekit.delete_room(alias).await;
    }
}

async fn check_power_level(run: &Run<'_>, api: &ClientApi, token: &Secret, user: &str, room: &str, sink: &Sink<'_>) {
    let path = format!("/_matrix/client/v3/rooms/{}/state/m.room.power_levels/", segment(room));
    let reply = match run.get(api, &path, Some(token)).await {
        Ok(reply) if reply.status.is_success() => reply,
        Ok(reply) => return sink.skip(&STEPS[4..], &format!("the room's power levels: {}", said(&reply))),
        Err(failure) => return sink.skip(&STEPS[4..], &words(&failure)),
    };
    let (has, needs) = power_levels(&json_of(&reply.body), user);
    if has < needs && is_creator(run, api, token, user, room).await {
        let saw = format_args!("{user} has created the room, and may do anything there");
        return sink.ok("power-level", &saw);
    }
    let saw = format_args!("{MEMBER} needs {needs} there, and {user} has {has}");
    if has >= needs {
        sink.ok("power-level", &saw);
    } else {
        sink.fail("power-level", &fault::USER_POWER_LEVEL, &saw);
    }
}

/// Whether `user` is one of those who created the room, in a version of rooms in which they are above all levels
/// ([MSC4289](https://github.com/matrix-org/matrix-spec-proposals/pull/4289)).
async fn is_creator(run: &Run<'_>, api: &ClientApi, token: &Secret, user: &str, room: &str) -> bool {
    let path = format!("/_matrix/client/v3/rooms/{}/state/m.room.create/?format=event", segment(room));
    let reply = run.get(api, &path, Some(token)).await;
    reply.is_ok_and(|reply| creates(&json_of(&reply.body), user))
}

fn creates(event: &Value, user: &str) -> bool {
    let content = event.get("content");
    let version = content.and_then(|content| content.get("room_version")?.as_str()?.parse::<u32>().ok());
    let others = content.and_then(|content| content.get("additional_creators")?.as_array());
    let mut creators = event.get("sender").into_iter().chain(others.into_iter().flatten());
    version.is_some_and(|version| version >= 12) && creators.any(|creator| creator.as_str() == Some(user))
}

/// Level that `user` has, and the one that is needed to say that one is in a call.
fn power_levels(levels: &Value, user: &str) -> (i64, i64) {
    let number = |value: Option<&Value>| value.and_then(Value::as_i64);
    let has = number(levels.get("users").and_then(|users| users.get(user))).or_else(|| number(levels.get("users_default")));
    let needs = number(levels.get("events").and_then(|events| events.get(MEMBER))).or_else(|| number(levels.get("state_default")));
    (has.unwrap_or(0), needs.unwrap_or(50))
}

fn field(reply: &Reply, name: &str) -> Option<String> {
    json_of(&reply.body).get(name)?.as_str().map(str::to_owned)
}

fn said(reply: &Reply) -> String {
    format!("the answer is {}", answered(reply))
}

fn claims(jwt: &str) -> Option<Value> {
    Some(json_of(&URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1)?).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn power_levels_are_those_of_the_specification() {
        let levels = json!({"users": {"@a:x": 100}, "users_default": 5, "events": {MEMBER: 5}, "state_default": 60});
        assert_eq!(power_levels(&levels, "@a:x"), (100, 5));
        assert_eq!(power_levels(&levels, "@b:x"), (5, 5));
        assert_eq!(power_levels(&json!({"state_default": 60}), "@b:x"), (0, 60));
        assert_eq!(power_levels(&json!({}), "@b:x"), (0, 50));
        let created = |version: &str| json!({"sender": "@a:x", "content": {"room_version": version, "additional_creators": ["@b:x"]}});
        assert!(creates(&created("12"), "@a:x") && creates(&created("12"), "@b:x"));
        assert!(!creates(&created("12"), "@c:x") && !creates(&created("11"), "@a:x") && !creates(&json!({}), "@a:x"));
    }
}
