//! The standalone routes beside the homeserver's: for members only where our homeserver stands alone (decision A7).

use serde_json::{Value, json};

use super::{Done, Stage};
use crate::support::bodies;
use crate::support::client::Answer;
use crate::support::client_api::ClientApi;
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::{Homeserver, unknown_token};
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::error;
use crate::support::{unique, unique_room};

/// The three endpoints, each with a good body of alice of this homeserver.
fn requests(stage: &Stage, homeserver: &Homeserver, room: &str) -> [(&'static str, Value); 3] {
    let delay_id = stage.own.schedule(&homeserver.user("alice"), room, 600_000);
    [
        ("/get_token", bodies::get_token_of(homeserver, "alice", room)),
        ("/sfu/get", bodies::sfu_get_of(homeserver, "alice", room)),
        (
            "/delegate_delayed_leave",
            bodies::delegate_of(homeserver, "alice", room, &delay_id, 600_000),
        ),
    ]
}

/// Another homeserver that has delayed events.
fn with_events() -> (Homeserver, ClientApi) {
    let (away, api) = (Homeserver::start(), ClientApi::start());
    away.answer_client_well_known(Reply::json(200, &json!({"m.homeserver": {"base_url": api.url()}})));
    (away, api)
}

#[track_caller]
fn assert_not_joined(answer: &Answer) {
    answer.assert_errcode(403, "M_FORBIDDEN");
    assert!(answer.field("error").contains("Not joined"), "{}", answer.text());
}

/// Members only: refused before anything else is done, and let in as soon as they join.
fn for_members_only(stage: &Stage, homeserver: &Homeserver, full_access: bool) {
    let (room, user) = (unique_room(), homeserver.user("alice"));
    for (path, body) in requests(stage, homeserver, &room) {
        let before = stage.done();
        assert_not_joined(&stage.service.post(path, &body));
        let done = stage.done() - before;
        assert_eq!(done, Done { users: 1, ..Done::NOTHING }, "{path}");
    }
    assert_eq!(stage.sfu.creations_of(&alias(&room, SLOT)), 0);
    stage.own.join(&room, &user);
    for (path, body) in requests(stage, homeserver, &room) {
        let answer = stage.service.post(path, &body);
        if full_access || path != "/delegate_delayed_leave" {
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        } else {
            answer.assert_errcode(403, "M_FORBIDDEN");
            assert!(answer.field("error").contains("full access"), "{}", answer.text());
        }
    }
    assert_eq!(stage.sfu.creations_of(&alias(&room, SLOT)) > 0, full_access);
}

/// Whoever the homeserver vouches for, and no question about anybody's rooms.
fn for_everybody(stage: &Stage, homeserver: &Homeserver, full_access: bool) {
    for (path, body) in requests(stage, homeserver, &unique_room()) {
        let answer = stage.service.post(path, &body);
        let expected = if full_access || path != "/delegate_delayed_leave" {
            200
        } else {
            403
        };
        assert_eq!(answer.status, expected, "{path}: {}", answer.text());
        assert!(!answer.field("error").contains("Not joined"), "{}", answer.text());
    }
    assert_eq!(stage.done().users, 0);
}

#[test]
fn they_are_for_members_where_our_homeserver_stands_alone() {
    let (stage, away) = (Stage::new(), Homeserver::start());
    for_members_only(&stage, &stage.own.federation, true);
    for_members_only(&stage, &away, false);
    // Nobody is asked about a user whom nobody vouched for.
    let before = stage.done();
    let body = bodies::get_token(
        &unique_room(),
        stage.own.name(),
        "oidctokenNEVERLOGunknown",
        &stage.own.user("alice"),
    );
    stage.service.post("/get_token", &body).assert_errcode(401, "M_UNAUTHORIZED");
    stage.own.federation.answer_userinfo(Some(unknown_token()));
    let body = bodies::get_token_of(&stage.own.federation, "alice", &unique_room());
    stage.service.post("/get_token", &body).assert_errcode(401, "M_UNAUTHORIZED");
    assert_eq!(stage.done() - before, Done::NOTHING);
}

#[test]
fn it_is_the_default_where_nobody_says_who_has_full_access() {
    let stage = Stage::with(|setup| setup.unset("LIVEKIT_FULL_ACCESS_HOMESERVERS"));
    for_members_only(&stage, &stage.own.federation, true);
}

#[test]
fn they_are_for_everybody_beside_other_homeservers() {
    let (away, _api) = with_events();
    for list in ["*".to_owned(), format!("{} nobody.example.org", away.name)] {
        let stage = Stage::with(|setup| setup.env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &list));
        for_everybody(&stage, &away, true);
        for_everybody(&stage, &stage.own.federation, list == "*");
    }
}

#[test]
fn the_operator_has_the_last_word() {
    let (away, _api) = with_events();
    let stage = Stage::with(|setup| setup.env("LIVEKIT_REQUIRE_MEMBERSHIP", "false"));
    for_everybody(&stage, &stage.own.federation, true);
    for_everybody(&stage, &away, false);
    let stage = Stage::with(|setup| {
        setup
            .env("LIVEKIT_REQUIRE_MEMBERSHIP", "true")
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*")
    });
    for_members_only(&stage, &stage.own.federation, true);
    for_members_only(&stage, &away, true);
}

/// A token route with a delayed event is refused before the event is looked at.
#[test]
fn a_token_with_a_delegation_is_for_members_too() {
    let stage = Stage::new();
    let home = &stage.own.federation;
    let (room, delay_id) = (unique_room(), format!("syd_{}", unique()));
    let body = bodies::delegate_of(home, "alice", &room, &delay_id, 600_000);
    assert_not_joined(&stage.service.post("/get_token", &body));
    stage.own.join(&room, &home.user("alice"));
    let body = bodies::delegate_of(home, "alice", &room, &delay_id, 600_000);
    assert_eq!(stage.service.post("/get_token", &body).status, 200);
}

/// What the operator has to mend is said at once; see `deadlines.rs` for what may pass.
#[test]
fn a_homeserver_that_does_not_let_us_ask_is_a_502() {
    let stage = Stage::new();
    stage
        .own
        .script(|_, asked| asked.is_about_user().then(|| error(403, "M_FORBIDDEN", "Missing scope")));
    let room = unique_room();
    for (path, body) in requests(&stage, &stage.own.federation, &room) {
        let answer = stage.service.post(path, &body);
        answer.assert_errcode(502, "M_UNKNOWN");
        stage.service.wait_line_of(&answer).says(&["WARN", "scope"]);
    }
    assert_eq!(stage.sfu.creations(), 0);
}
