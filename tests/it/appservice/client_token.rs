//! `POST …/client/…/rtc/livekit/get_token`: what is refused, in which order, and what is taken.

use serde_json::json;

use super::table::{Row, check, common, fields, refused};
use super::{Ask, Done, OTHER, Stage};
use crate::support::own_homeserver::{OwnHomeserver, error};
use crate::support::sfu::Fault;
use crate::support::unique_room;

const ONE_USER: Done = Done { users: 1, ..Done::NOTHING };
const USER_AND_SERVER: Done = Done { servers: 1, ..ONE_USER };

/// The rows before the first question, but for the one about the SFU.
fn before_any_question() -> Vec<Row> {
    let mut rows = common();
    rows.push(Row::new(
        "a server name of the wrong type",
        |_, ask| ask.body["server_name"] = json!({}),
        400,
        "M_BAD_JSON",
    ));
    rows.push(Row::new("no identity", |_, ask| ask.who = None, 401, "M_UNAUTHORIZED"));
    rows.push(Row::new(
        "a blank identity",
        |_, ask| ask.who = Some(" ".into()),
        401,
        "M_UNAUTHORIZED",
    ));
    rows
}

fn other_sfu() -> Row {
    Row::new(
        "another SFU",
        |_, ask| ask.body["url"] = "wss://elsewhere.example.org".into(),
        400,
        "M_INVALID_PARAM",
    )
    .says("`url`")
}

fn identities() -> [Row; 3] {
    let bad = |what, fault| Row::new(what, fault, 400, "M_INVALID_PARAM").says("user id");
    [
        bad("an identity that is none", |_, ask| ask.who = Some("alice".into())),
        bad("an identity without a name", |stage, ask| {
            ask.who = Some(format!("@:{}", stage.own.name()));
        }),
        bad("a user of another homeserver", |_, ask| ask.who = Some(format!("@alice:{OTHER}"))),
    ]
}

fn membership() -> [Row; 2] {
    [
        Row::new(
            "a homeserver that does not say who is in the room",
            |stage, _| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_user().then(|| error(403, "M_FORBIDDEN", "Missing scope")));
            },
            502,
            "M_UNKNOWN",
        )
        .after(ONE_USER),
        Row::new(
            "somebody who is not in the room",
            |_, ask| ask.body["room_id"] = unique_room().into(),
            403,
            "M_FORBIDDEN",
        )
        .says("Not joined")
        .after(ONE_USER),
    ]
}

#[test]
fn every_row_of_the_table_for_our_sfu_in_its_order() {
    let mut rows = before_any_question();
    rows.push(other_sfu());
    rows.extend(identities());
    rows.extend(membership());
    rows.push(
        Row::new(
            "an SFU that refuses",
            |stage, _| stage.sfu.fail(Some(Fault::NoGrant)),
            500,
            "M_UNKNOWN",
        )
        .after(Done { rooms: 1, ..ONE_USER }),
    );
    check(&Stage::new(), Stage::client, &rows);
}

#[test]
fn every_row_of_the_table_for_another_sfu_in_its_order() {
    let mut rows = before_any_question();
    rows.extend(identities());
    rows.push(
        Row::new(
            "a server name that is none",
            |_, ask| ask.body["server_name"] = "https://other.example.org/".into(),
            400,
            "M_INVALID_PARAM",
        )
        .says("`server_name`"),
    );
    rows.extend(membership());
    rows.extend([
        Row::new(
            "a homeserver that does not say which homeservers are in the room",
            |stage, _| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_server().then(|| error(401, "M_UNKNOWN_TOKEN", "no")));
            },
            502,
            "M_UNKNOWN",
        )
        .after(USER_AND_SERVER),
        Row::new(
            "a homeserver that is not in the room",
            |_, ask| ask.body["server_name"] = "third.example.org".into(),
            403,
            "M_FORBIDDEN",
        )
        .says("Not joined")
        .after(USER_AND_SERVER),
        Row::new(
            "a peer that refuses",
            |stage, _| {
                stage
                    .own
                    .peer(OTHER, |_| (403, json!({"errcode": "M_FORBIDDEN", "error": "REMOTETEXT"})));
            },
            403,
            "M_FORBIDDEN",
        )
        .says("other homeserver")
        .after(Done {
            relays: 1,
            ..USER_AND_SERVER
        }),
    ]);
    check(&Stage::new(), Stage::relayed, &rows);
}

#[test]
fn every_field_may_be_missing_in_every_way() {
    fields(&Stage::new(), Stage::client, &["url", "room_id", "slot_id", "member_id"]);
}

#[test]
fn an_own_homeserver_that_cannot_be_found_is_a_400_before_any_question() {
    let stage = Stage::lost(OwnHomeserver::start());
    let lost = Row::new("no client-server API", |_, _| {}, 400, "M_BAD_JSON").says("client-server API");
    for good in [Stage::client, Stage::relayed] as [fn(&Stage) -> Ask; 2] {
        refused(&stage, good(&stage), &lost, None);
        for later in membership() {
            refused(&stage, good(&stage), &lost, Some(&later));
        }
        let mut earlier = before_any_question();
        earlier.extend(identities());
        for row in earlier {
            refused(&stage, good(&stage), &row, None);
        }
    }
    refused(&stage, stage.client(), &other_sfu(), None);
}

#[test]
fn what_makes_no_difference_makes_none() {
    let stage = Stage::new();
    let (_, address) = stage
        .sfu
        .url()
        .split_once("//")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .expect("a URL");
    for url in [
        format!("ws://{address}"),
        format!("ws://{address}/"),
        format!("WS://{address}"),
        format!("ws://{address}//"),
    ] {
        let answer = stage.call(&stage.client().set("url", url.as_str()));
        assert_eq!((answer.status, answer.field("url")), (200, url));
    }
    for name in [json!(null), json!(""), json!(stage.own.name())] {
        assert_eq!(stage.call(&stage.client().set("server_name", name.clone())).status, 200, "{name}");
    }
    let future = stage
        .client()
        .set("unknown", json!({"deep": [1, {"x": null}]}))
        .set("openid_token", 5)
        .set("delay_timeout", "soon");
    assert_eq!(stage.call(&future).status, 200);
    // A body that is not said to be JSON, a token with white space after it, and a room without a server in its id.
    let mut odd = stage.client();
    odd.authorization = Some(format!("Bearer  {} ", stage.own.hs_token));
    assert_eq!(stage.call(&odd).status, 200);
    let room = "!5rbKGZO6JYeO2UuSXMpZKshWxVwYTgSNWgGE78AL3nc";
    stage.own.join(room, &stage.own.user("alice"));
    assert_eq!(stage.call(&stage.client_in(room)).status, 200);
}

#[test]
fn the_largest_body_is_taken() {
    let stage = Stage::new();
    let mut ask = stage.client();
    let mut raw = ask.body.to_string().into_bytes();
    raw.resize(64 * 1024, b' ');
    ask.raw = Some(raw);
    assert_eq!(stage.call(&ask).status, 200);
}

#[test]
fn the_older_words_are_understood_and_may_not_lie() {
    let stage = Stage::new();
    let member = |user: &str| json!({"id": "member1", "claimed_device_id": "DEVICE", "claimed_user_id": user});
    let older = |user: &str| {
        let mut ask = stage.client().set("member", member(user));
        ask.body.as_object_mut().expect("an object").remove("member_id");
        ask
    };
    assert_eq!(stage.call(&older(&stage.own.user("alice"))).status, 200);
    for somebody in [stage.own.user("mallory"), format!("@alice:{OTHER}")] {
        let before = stage.done();
        stage.call(&older(&somebody)).assert_errcode(400, "M_INVALID_PARAM");
        assert_eq!(stage.done() - before, Done::NOTHING);
    }
    for (field, value) in [
        ("id", json!("")),
        ("id", json!(null)),
        ("id", json!(7)),
        ("claimed_device_id", json!(7)),
    ] {
        let mut ask = older(&stage.own.user("alice"));
        ask.body["member"][field] = value;
        stage.call(&ask).assert_errcode(400, "M_BAD_JSON");
    }
}

/// C7: the names of schemes have no case.
#[test]
fn the_scheme_may_be_written_in_any_case() {
    let stage = Stage::new();
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR "] {
        assert!(stage.takes(stage.client(), format!("{scheme} {}", stage.own.hs_token)), "{scheme}");
    }
    assert!(!stage.takes(stage.client(), format!("bearer{}", stage.own.hs_token)));
}

/// Synapse's list of transports may say `https` where we say `wss`, and the other way round (decision A3).
#[test]
fn the_schemes_of_websockets_and_of_http_are_the_same() {
    let stage = Stage::new();
    let url = stage.sfu.url().replacen("ws", "http", 1);
    for mut ask in [stage.client(), stage.federated(), stage.delegation()] {
        ask.body["url"] = url.as_str().into();
        let answer = stage.call(&ask);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}
