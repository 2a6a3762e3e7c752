//! `POST …/federation/…/rtc/livekit/get_token`: what is refused, in which order.

use super::table::{Row, check, common, fields, refused};
use super::{Done, OTHER, Stage};
use crate::support::own_homeserver::{OwnHomeserver, error};
use crate::support::sfu::Fault;
use crate::support::unique_room;

const OUR_SERVER: Done = Done {
    servers: 1,
    ..Done::NOTHING
};
const SERVER_AND_USER: Done = Done { users: 1, ..OUR_SERVER };

fn before_any_question() -> Vec<Row> {
    let mut rows = common();
    let first_field = rows.iter().position(|row| row.answer.1 == "M_BAD_JSON").expect("a field");
    let no_user = Row::new("no user", |_, ask| ask.body["user_id"] = "".into(), 400, "M_BAD_JSON").says("`user_id`");
    rows.insert(first_field, no_user);
    rows.extend([
        Row::new("no origin", |_, ask| ask.who = None, 401, "M_UNAUTHORIZED"),
        Row::new("a blank origin", |_, ask| ask.who = Some("  ".into()), 401, "M_UNAUTHORIZED"),
        Row::new(
            "a user that is none",
            |_, ask| ask.body["user_id"] = format!("bob:{OTHER}").into(),
            400,
            "M_INVALID_PARAM",
        )
        .says("user id"),
        Row::new(
            "a user without a name",
            |_, ask| ask.body["user_id"] = format!("@:{OTHER}").into(),
            400,
            "M_INVALID_PARAM",
        )
        .says("user id"),
        Row::new(
            "a user of a third homeserver",
            |_, ask| ask.body["user_id"] = "@bob:third.example.org".into(),
            403,
            "M_FORBIDDEN",
        )
        .says("not one of the homeserver"),
        Row::new(
            "a user of ours",
            |stage, ask| ask.body["user_id"] = stage.own.user("alice").into(),
            403,
            "M_FORBIDDEN",
        )
        .says("not one of the homeserver"),
    ]);
    rows
}

fn questions() -> [Row; 4] {
    [
        Row::new(
            "a homeserver that does not say whether it is in the room",
            |stage, _| {
                stage
                    .own
                    .script(|_, asked| asked.is_about_server().then(|| error(403, "M_FORBIDDEN", "Missing scope")));
            },
            502,
            "M_UNKNOWN",
        )
        .after(OUR_SERVER),
        Row::new(
            "a room that none of our users is in",
            |_, ask| ask.body["room_id"] = unique_room().into(),
            403,
            "M_FORBIDDEN",
        )
        .says("Not joined")
        .after(OUR_SERVER),
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
        .after(SERVER_AND_USER),
        Row::new(
            "a user who is not in the room",
            |stage, ask| stage.own.part(&ask.room(), &format!("@bob:{OTHER}")),
            403,
            "M_FORBIDDEN",
        )
        .says("Not joined")
        .after(SERVER_AND_USER),
    ]
}

#[test]
fn every_row_of_the_table_in_its_order() {
    let mut rows = before_any_question();
    rows.extend(questions());
    rows.extend([
        Row::new(
            "another SFU",
            |_, ask| ask.body["url"] = "wss://elsewhere.example.org".into(),
            400,
            "M_INVALID_PARAM",
        )
        .says("`url`")
        .after(SERVER_AND_USER),
        Row::new(
            "an SFU that refuses",
            |stage, _| stage.sfu.fail(Some(Fault::NoGrant)),
            500,
            "M_UNKNOWN",
        )
        .after(Done {
            rooms: 1,
            ..SERVER_AND_USER
        }),
    ]);
    check(&Stage::new(), Stage::federated, &rows);
}

#[test]
fn every_field_may_be_missing_in_every_way() {
    fields(
        &Stage::new(),
        Stage::federated,
        &["user_id", "url", "room_id", "slot_id", "member_id"],
    );
}

#[test]
fn an_own_homeserver_that_cannot_be_found_is_a_400_before_any_question() {
    let stage = Stage::lost(OwnHomeserver::start());
    let lost = Row::new("no client-server API", |_, _| {}, 400, "M_BAD_JSON").says("client-server API");
    refused(&stage, stage.federated(), &lost, None);
    for later in questions() {
        refused(&stage, stage.federated(), &lost, Some(&later));
    }
    for row in before_any_question() {
        refused(&stage, stage.federated(), &row, None);
    }
}

#[test]
fn what_a_peer_of_the_older_generation_sends_is_taken() {
    let stage = Stage::new();
    let mut ask = stage.federated();
    let bob = format!("@bob:{OTHER}");
    ask.body.as_object_mut().expect("an object").remove("member_id");
    ask.body["member"] = serde_json::json!({"id": "member1", "claimed_device_id": "DEVICE", "claimed_user_id": bob});
    ask.body["unknown"] = 5.into();
    assert_eq!(stage.call(&ask).status, 200);
    ask.body["member"]["claimed_user_id"] = format!("@mallory:{OTHER}").into();
    let before = stage.done();
    stage.call(&ask).assert_errcode(400, "M_INVALID_PARAM");
    assert_eq!(stage.done() - before, Done::NOTHING);
}
