//! A token of another homeserver's SFU, by way of both homeservers (MSC4512).

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use serde_json::{Value, json};

use super::{Ask, FEDERATION_GET_TOKEN, OTHER, OTHER_URL, REMOTE_JWT, Stage};
use crate::support::client::Answer;
use crate::support::hashes::SLOT;
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::{Asked, Proposal, error};

/// Nothing that the other side says reaches our users.
#[track_caller]
fn assert_own_words(answer: &Answer) {
    let whole = format!("{:?} {}", answer.headers, answer.text());
    assert!(!whole.contains("REMOTETEXT"), "{whole}");
}

#[test]
fn what_the_other_service_is_asked_is_exactly_what_it_needs() {
    let stage = Stage::new();
    let mut ask = stage.relayed().set("unknown", "x").set("delay_id", "syd_x");
    // Of names like ours.
    ask.body["slot_id"] = SLOT.into();
    let answer = stage.call(&ask);
    assert_eq!(answer.json(), json!({"url": OTHER_URL, "jwt": REMOTE_JWT}));
    let expected = json!({
        "destination": OTHER,
        "method": "POST",
        "path": FEDERATION_GET_TOKEN,
        "body": {"user_id": stage.own.user("alice"), "url": OTHER_URL, "room_id": ask.room(), "slot_id": SLOT, "member_id": "member1"},
    });
    assert_eq!(stage.own.relayed(), [expected]);
    assert_eq!(stage.done().rooms, 0);
    // The way there takes the token, and asks in nobody's name.
    for (request, _) in stage.own.asked() {
        assert_eq!(
            request.header("authorization"),
            Some(format!("Bearer {}", stage.own.as_token).as_str())
        );
        assert_eq!(request.query("user_id"), None);
    }
}

#[test]
fn every_answer_of_the_other_service_has_its_row() {
    let stage = Stage::new();
    let text = "REMOTETEXT";
    for (status, content, expected) in [
        (200, json!({"jwt": REMOTE_JWT, "url": "REMOTETEXT", "x": 1}), (200, "")),
        (201, json!({"jwt": REMOTE_JWT}), (200, "")),
        (200, json!({}), (502, "M_UNKNOWN")),
        (200, json!({"jwt": ""}), (502, "M_UNKNOWN")),
        (200, json!({"jwt": null}), (502, "M_UNKNOWN")),
        (200, json!({"jwt": {"REMOTETEXT": 1}}), (502, "M_UNKNOWN")),
        (200, json!(null), (502, "M_UNKNOWN")),
        (200, json!([REMOTE_JWT]), (502, "M_UNKNOWN")),
        (200, json!(text), (502, "M_UNKNOWN")),
        (302, json!({"jwt": REMOTE_JWT}), (502, "M_UNKNOWN")),
        (403, json!({"errcode": "M_FORBIDDEN", "error": text}), (403, "M_FORBIDDEN")),
        (403, json!({"errcode": text, "error": text}), (502, "M_UNKNOWN")),
        (403, json!({"errcode": ["M_FORBIDDEN"]}), (502, "M_UNKNOWN")),
        (403, json!(null), (502, "M_UNKNOWN")),
        (400, json!({"errcode": "M_INVALID_PARAM", "error": text}), (400, "M_INVALID_PARAM")),
        (400, json!({"errcode": "M_FORBIDDEN", "error": text}), (502, "M_UNKNOWN")),
        (403, json!({"errcode": "M_INVALID_PARAM", "error": text}), (502, "M_UNKNOWN")),
        (400, json!({"errcode": "M_BAD_JSON", "error": text}), (502, "M_UNKNOWN")),
        (400, json!({"errcode": "M_NOT_JSON", "error": text}), (502, "M_UNKNOWN")),
        (401, json!({"errcode": "M_UNAUTHORIZED", "error": text}), (502, "M_UNKNOWN")),
        (404, json!({"errcode": "M_UNRECOGNIZED", "error": text}), (502, "M_UNKNOWN")),
        (405, json!(null), (502, "M_UNKNOWN")),
        (0, json!({"jwt": REMOTE_JWT}), (502, "M_UNKNOWN")),
    ] {
        let ask = stage.relayed();
        let reply = content.clone();
        stage.own.peer(OTHER, move |_| (status, reply.clone()));
        let before = stage.own.count(Asked::is_relay);
        let answer = stage.call(&ask);
        assert_eq!(
            (answer.status, answer.field("errcode").as_str()),
            expected,
            "{status} {content}: {}",
            answer.text()
        );
        assert_own_words(&answer);
        // Of a path that is not there, there is another one.
        let tries = if content["errcode"] == "M_UNRECOGNIZED" { 2 } else { 1 };
        assert_eq!(stage.own.count(Asked::is_relay) - before, tries, "{status} {content}");
    }
    assert_eq!(stage.sfu.creations(), 0);
}

#[test]
fn every_refusal_of_our_own_homeserver_to_relay_is_a_502() {
    let stage = Stage::new();
    for reply in [
        error(403, "IO.ELEMENT.MSC4512.M_FEDPROXY_DESTINATION_DENIED", "REMOTETEXT"),
        error(403, "IO.ELEMENT.MSC4512.M_FEDPROXY_PATH_NOT_ALLOWED", "REMOTETEXT"),
        error(403, "M_FORBIDDEN", "Only application services can use this endpoint"),
        error(401, "M_UNKNOWN_TOKEN", "REMOTETEXT"),
        error(400, "M_MISSING_PARAM", "REMOTETEXT"),
        error(400, "M_INVALID_PARAM", "REMOTETEXT"),
        error(404, "M_UNRECOGNIZED", "REMOTETEXT"),
        Reply::redirect(302, "/REMOTETEXT"),
        Reply::json(200, &json!({"content": {"jwt": REMOTE_JWT}})),
        Reply::json(200, &json!({"status": "200", "content": {"jwt": REMOTE_JWT}})),
        Reply::json(200, &json!({"status": 70000, "content": {"jwt": REMOTE_JWT}})),
        Reply::json(200, &json!({"jwt": REMOTE_JWT})),
        Reply::text(200, "text/html", "<html>REMOTETEXT"),
        Reply::text(200, "application/json", ""),
    ] {
        let ask = stage.relayed();
        let shown = format!("{reply:?}");
        stage.own.script(move |_, asked| asked.is_relay().then(|| reply.clone()));
        let answer = stage.call(&ask);
        assert_eq!(
            (answer.status, answer.field("errcode").as_str()),
            (502, "M_UNKNOWN"),
            "{shown}: {}",
            answer.text()
        );
        answer.assert_errcode(502, "M_UNKNOWN");
        assert_own_words(&answer);
        stage.own.unscript();
    }
    assert_eq!(stage.sfu.creations(), 0);
}

/// A peer that knows the stable path only, in the words of either generation.
#[test]
fn a_peer_may_have_left_the_unstable_path_behind() {
    const STABLE: &str = "/_matrix/federation/v1/rtc/livekit/get_token";
    let stage = Stage::new();
    stage.own.script(|_, asked| {
        let Asked::Relay { body, .. } = asked else { return None };
        let (status, content) = match (body["path"] == STABLE, body["body"]["member"].is_object()) {
            (true, true) => (200, json!({"jwt": REMOTE_JWT})),
            (true, false) => (400, json!({"errcode": "M_BAD_JSON", "error": "REMOTETEXT"})),
            (false, _) => (404, json!({"errcode": "M_UNRECOGNIZED", "error": "REMOTETEXT"})),
        };
        Some(Reply::json(200, &json!({"status": status, "content": content})))
    });
    let answer = stage.call(&both_words(&stage));
    assert_eq!(answer.json(), json!({"url": OTHER_URL, "jwt": REMOTE_JWT}));
    let paths: Vec<_> = stage.own.relayed().into_iter().map(|call| call["path"].clone()).collect();
    assert_eq!(paths, [FEDERATION_GET_TOKEN, STABLE, STABLE]);
}

/// `member`, as clients of the older generation send it; with `member_id`, where they speak both.
fn both_words(stage: &Stage) -> Ask {
    let member = json!({"id": "older", "claimed_device_id": "DEVICE", "claimed_user_id": stage.own.user("alice")});
    stage.relayed().set("member", member)
}

fn older_only(stage: &Stage) -> Ask {
    let mut ask = both_words(stage);
    ask.body.as_object_mut().expect("an object").remove("member_id");
    ask
}

#[test]
fn a_peer_of_the_older_generation_is_asked_once_more_in_its_words() {
    for errcode in ["M_NOT_JSON", "M_BAD_JSON"] {
        let stage = Stage::new();
        let older = move |body: &Value| match body["member"].is_object() && body.get("member_id").is_none() {
            true => (200, json!({"jwt": REMOTE_JWT})),
            false => (400, json!({"errcode": errcode, "error": "REMOTETEXT"})),
        };
        for (ask, first) in [(both_words(&stage), "member1"), (older_only(&stage), "older")] {
            stage.own.peer(OTHER, older);
            let before = stage.own.relayed().len();
            let answer = stage.call(&ask);
            assert_eq!(answer.json(), json!({"url": OTHER_URL, "jwt": REMOTE_JWT}));
            let said: Vec<_> = stage
                .own
                .relayed()
                .split_off(before)
                .into_iter()
                .map(|call| call["body"].clone())
                .collect();
            let plain = json!({"user_id": stage.own.user("alice"), "url": OTHER_URL, "room_id": ask.room(), "slot_id": SLOT});
            let (mut new, mut old) = (plain.clone(), plain);
            new["member_id"] = first.into();
            old["member"] = json!({"id": "older", "claimed_device_id": "DEVICE", "claimed_user_id": stage.own.user("alice")});
            assert_eq!(said, [new, old]);
        }
        // Nobody invents a device.
        let ask = stage.relayed();
        stage.own.peer(OTHER, older);
        let before = stage.own.relayed().len();
        let answer = stage.call(&ask);
        answer.assert_errcode(502, "M_UNKNOWN");
        assert_own_words(&answer);
        assert_eq!(stage.own.relayed().len() - before, 1);
    }
}

#[test]
fn the_second_attempt_is_the_last_and_only_for_these_codes() {
    let stage = Stage::new();
    for (status, errcode, tries, expected) in [
        (400, "M_BAD_JSON", 2, 502),
        (400, "M_NOT_JSON", 2, 502),
        (400, "M_UNKNOWN", 1, 502),
        (400, "M_INVALID_PARAM", 1, 400),
        (403, "M_FORBIDDEN", 1, 403),
        (403, "M_BAD_JSON", 1, 502),
        (404, "M_NOT_JSON", 1, 502),
    ] {
        let ask = both_words(&stage);
        stage
            .own
            .peer(OTHER, move |_| (status, json!({"errcode": errcode, "error": "REMOTETEXT"})));
        let before = stage.own.relayed().len();
        let answer = stage.call(&ask);
        assert_eq!(answer.status, expected, "{status} {errcode}: {}", answer.text());
        assert_own_words(&answer);
        assert_eq!(stage.own.relayed().len() - before, tries, "{status} {errcode}");
    }
}

#[test]
fn what_may_pass_over_there_is_asked_again() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    static SEEN: Mutex<Vec<Value>> = Mutex::new(Vec::new());
    let stage = Stage::new();
    let ask = stage.relayed();
    stage.own.peer(OTHER, |body| {
        SEEN.lock().unwrap().push(body.clone());
        match CALLS.fetch_add(1, SeqCst) {
            0 => (503, json!({"errcode": "M_UNKNOWN"})),
            1 => (429, json!({"errcode": "M_LIMIT_EXCEEDED"})),
            _ => (200, json!({"jwt": REMOTE_JWT})),
        }
    });
    assert_eq!(stage.call(&ask).status, 200);
    let seen = SEEN.lock().unwrap();
    assert!(seen.len() == 3 && seen.iter().all(|body| *body == seen[0]), "{seen:?}");
}

#[test]
fn the_path_of_the_relay_follows_versions() {
    let (stable, unstable) = ((Proposal::FedProxy, true), (Proposal::FedProxy, false));
    let joined = (Proposal::IsJoined, false);
    // What is said, what is there, and which paths are then tried.
    for (says, has, tried) in [
        (vec![], unstable, vec![unstable]),
        (vec![unstable], unstable, vec![unstable]),
        (vec![stable], stable, vec![stable]),
        (vec![stable, unstable], stable, vec![stable]),
        (vec![], stable, vec![unstable, stable]),
        (vec![stable], unstable, vec![stable, unstable]),
    ] {
        let stage = Stage::prepared(|own| {
            own.advertise(says.clone());
            own.serve([has, joined]);
        });
        let answer = stage.call(&stage.relayed());
        assert_eq!(answer.status, 200, "{says:?}: {}", answer.text());
        let relays = stage.own.asked().into_iter().filter(|(_, asked)| asked.is_relay());
        let paths: Vec<_> = relays.filter_map(|(_, asked)| asked.proposal()).collect();
        assert_eq!(paths, tried, "says {says:?}, has {has:?}");
    }
}
