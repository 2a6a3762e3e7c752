//! `POST …/client/…/rtc/livekit/delegate_delayed_leave`, and delegations with the `as_token` (decision A6).

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::table::{Row, check, common, fields, refused};
use super::{Ask, Done, OTHER, Stage};
use crate::support::client_api::ClientApi;
use crate::support::hashes::{SLOT, alias, homeserver_identity, identity};
use crate::support::homeserver::Homeserver;
use crate::support::neighbour::{Reply, Request};
use crate::support::own_homeserver::{OwnHomeserver, Proposal, error};
use crate::support::process::directory;
use crate::support::sfu::Session;
use crate::support::{bodies, unique, unique_room, wait_until, webhook};

const TIMEOUT: Duration = Duration::from_secs(20);

const EVENT: Done = Done {
    events: 1,
    ..Done::NOTHING
};
const EVENT_AND_USER: Done = Done { users: 1, ..EVENT };

fn before_any_question() -> Vec<Row> {
    let mut rows = common();
    // It can only be ours.
    rows.retain(|row| row.what != "no url");
    rows.extend([
        Row::new("no event", |_, ask| ask.body["delay_id"] = "".into(), 400, "M_BAD_JSON").says("missing `delay_id`"),
        Row::new(
            "an event that is a path",
            |_, ask| ask.body["delay_id"] = "..".into(),
            400,
            "M_BAD_JSON",
        )
        .says("not the id"),
        Row::new(
            "a long event",
            |_, ask| ask.body["delay_id"] = "x".repeat(256).into(),
            400,
            "M_BAD_JSON",
        )
        .says("not the id"),
        Row::new("no identity", |_, ask| ask.who = None, 401, "M_UNAUTHORIZED"),
        Row::new(
            "another SFU",
            |_, ask| ask.body["url"] = "wss://elsewhere.example.org".into(),
            400,
            "M_INVALID_PARAM",
        )
        .says("`url`"),
        Row::new(
            "an identity that is none",
            |_, ask| ask.who = Some("alice".into()),
            400,
            "M_INVALID_PARAM",
        )
        .says("user id"),
        Row::new(
            "a user of another homeserver",
            |_, ask| ask.who = Some(format!("@alice:{OTHER}")),
            400,
            "M_INVALID_PARAM",
        )
        .says("user id"),
    ]);
    rows
}

fn no_event(what: &'static str, fault: fn(&Stage, &mut Ask)) -> Row {
    Row::new(what, fault, 400, "M_INVALID_PARAM")
        .says("no such delayed event")
        .after(EVENT)
}

fn unknown(what: &'static str, fault: fn(&Stage, &mut Ask)) -> Row {
    Row::new(what, fault, 503, "M_UNKNOWN").says("whose delayed event").after(EVENT)
}

fn questions() -> Vec<Row> {
    vec![
        unknown("a homeserver that does not know us", |stage, _| {
            stage
                .own
                .script(|_, asked| asked.is_event().then(|| error(401, "M_UNKNOWN_TOKEN", "no")));
        }),
        unknown("a homeserver that forbids it", |stage, _| {
            stage
                .own
                .script(|_, asked| asked.is_event().then(|| error(403, "M_FORBIDDEN", "masquerade")));
        }),
        unknown("an answer that cannot be read", |stage, _| {
            stage
                .own
                .script(|_, asked| asked.is_event().then(|| Reply::text(200, "text/html", "<html>")));
        }),
        no_event("an event that nobody knows", |_, ask| ask.body["delay_id"] = "syd_unknown".into()),
        no_event("an event of somebody else", |stage, ask| {
            ask.body["delay_id"] = stage.own.schedule(&stage.own.user("bob"), &ask.room(), 600_000).into();
        }),
        no_event("an event of another room", |stage, ask| {
            ask.body["delay_id"] = stage.own.schedule(&stage.own.user("alice"), &unique_room(), 600_000).into();
        }),
        no_event("an event without a delay", |stage, ask| {
            ask.body["delay_id"] = stage.own.schedule(&stage.own.user("alice"), &ask.room(), 0).into();
        }),
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
        .after(EVENT_AND_USER),
        Row::new(
            "somebody who is not in the room",
            |stage, ask| stage.own.part(&ask.room(), &stage.own.user("alice")),
            403,
            "M_FORBIDDEN",
        )
        .says("Not joined")
        .after(EVENT_AND_USER),
        Row::new(
            "an event whose record would be too long",
            |stage, ask| {
                let long = "\u{1}".repeat(255);
                stage.own.schedule_as(&long, &stage.own.user("alice"), &ask.room(), 600_000);
                ask.body["delay_id"] = long.into();
            },
            400,
            "M_BAD_JSON",
        )
        .says("too long")
        .after(EVENT_AND_USER),
    ]
}

#[test]
fn every_row_of_the_table_in_its_order() {
    let mut rows = before_any_question();
    rows.extend(questions());
    let file = directory("appservice").join("jobs");
    let stage = Stage::with(|setup| setup.env("LIVEKIT_STATE_PATH", &file.to_string_lossy()));
    check(&stage, Stage::delegation, &rows);
    // One job came of the request without a fault, and none of the others.
    let kept = stored(&file);
    let events: BTreeSet<_> = kept
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("syd_"))
        .collect();
    // A copy of a page may end an id otherwise.
    let shortest = events.iter().min_by_key(|event| event.len()).expect("the event of the job");
    assert!(events.iter().all(|event| event.starts_with(shortest)), "{kept}");
}

#[test]
fn every_field_may_be_missing_in_every_way() {
    fields(&Stage::new(), Stage::delegation, &["room_id", "slot_id", "member_id", "delay_id"]);
}

/// As the proposal has it, the body names no SFU: it can only be ours.
#[test]
fn a_delegation_without_a_url_is_taken() {
    let stage = Stage::new();
    for absent in [None, Some(json!(null)), Some(json!(""))] {
        let mut ask = stage.delegation();
        match absent {
            Some(absent) => ask.body["url"] = absent,
            None => drop(ask.body.as_object_mut().expect("an object").remove("url")),
        }
        let answer = stage.call(&ask);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let session = joins(&stage, &ask);
        let delay_id = ask.body["delay_id"].as_str().expect("an id");
        wait_until("a restart", TIMEOUT, || !stage.own.managed(delay_id, "restart").is_empty());
        leaves(&stage, &session);
    }
}

#[test]
fn an_own_homeserver_that_cannot_be_found_is_a_400_before_any_question() {
    let stage = Stage::lost(OwnHomeserver::start());
    let lost = Row::new("no client-server API", |_, _| {}, 400, "M_BAD_JSON").says("client-server API");
    refused(&stage, stage.delegation(), &lost, None);
    for later in questions() {
        refused(&stage, stage.delegation(), &lost, Some(&later));
    }
    for row in before_any_question() {
        refused(&stage, stage.delegation(), &row, None);
    }
}

/// All texts in the store.
fn stored(file: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(file).expect("the store")).into_owned()
}

/// Whoever took part as this says so in the webhooks.
fn joins(stage: &Stage, ask: &Ask) -> Session {
    let identity = homeserver_identity(&stage.own.user("alice"), "member1");
    let session = stage.sfu.join(&alias(&ask.room(), SLOT), &identity);
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
    session
}

fn leaves(stage: &Stage, session: &Session) {
    stage.sfu.leave(&session.room, &session.identity);
    let left = webhook::left(session, "CLIENT_INITIATED");
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &left).status, 200);
}

#[track_caller]
fn assert_signed(own: &OwnHomeserver, user: &str, calls: &[Request]) {
    for call in calls {
        assert_eq!(
            call.header("authorization"),
            Some(format!("Bearer {}", own.as_token).as_str()),
            "{}",
            call.target
        );
        let query: Vec<_> = call.query.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(query, [("user_id", user)], "{}", call.target);
    }
}

#[test]
fn restarts_and_sends_carry_the_token_and_the_users_name() {
    let stage = Stage::new();
    // The name needs escaping in a query.
    let (user, room) = (stage.own.user("al+ice=1/2&x"), unique_room());
    stage.own.join(&room, &user);
    let mut ask = stage.delegation().set("room_id", room.as_str());
    let delay_id = stage.own.schedule(&user, &room, 3000);
    ask.who = Some(user.clone());
    let ask = ask.set("delay_id", delay_id.as_str()).set("delay_timeout", 3_600_000);
    let answer = stage.call(&ask);
    assert_eq!((answer.status, answer.text().as_str()), (200, "{}\n"));
    let session = stage.sfu.join(&alias(&room, SLOT), &homeserver_identity(&user, "member1"));
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
    // The delay is the homeserver's three seconds, and not the hour that the client says.
    wait_until("three restarts", TIMEOUT, || stage.own.managed(&delay_id, "restart").len() >= 3);
    leaves(&stage, &session);
    wait_until("the leave", TIMEOUT, || !stage.own.managed(&delay_id, "send").is_empty());
    for what in ["restart", "send"] {
        assert_signed(&stage.own, &user, &stage.own.managed(&delay_id, what));
    }
    assert_eq!(stage.done().rooms, 0);
}

#[test]
fn one_event_is_cancelled_with_the_token_when_another_takes_its_place() {
    let stage = Stage::new();
    let first = stage.delegation();
    let first_id = first.body["delay_id"].as_str().expect("an id").to_owned();
    assert_eq!(stage.call(&first).status, 200);
    let user = stage.own.user("alice");
    let second_id = stage.own.schedule(&user, &first.room(), 600_000);
    assert_eq!(stage.call(&first.clone().set("delay_id", second_id.as_str())).status, 200);
    wait_until("the first one to be cancelled", TIMEOUT, || {
        !stage.own.managed(&first_id, "cancel").is_empty()
    });
    assert_signed(&stage.own, &user, &stage.own.managed(&first_id, "cancel"));
}

#[test]
fn a_job_keeps_its_user_over_a_restart_of_the_service() {
    let directory = directory("appservice");
    let file = directory.join("jobs");
    let stage = Stage::with(|setup| setup.env("LIVEKIT_STATE_PATH", &file.to_string_lossy()));
    let ask = stage.delegation();
    // Short enough to be restarted again soon.
    let short = stage.own.schedule(&stage.own.user("alice"), &ask.room(), 8_000);
    let ask = ask.set("delay_id", short);
    let (user, delay_id) = (stage.own.user("alice"), ask.body["delay_id"].as_str().expect("an id").to_owned());
    assert_eq!(stage.call(&ask).status, 200);
    let session = joins(&stage, &ask);
    wait_until("a restart", TIMEOUT, || !stage.own.managed(&delay_id, "restart").is_empty());
    let Stage { service, sfu, own } = stage;
    service.signal("TERM");
    assert!(service.wait_exit(TIMEOUT).success());
    drop(service);
    let kept = stored(&file);
    assert!(kept.contains(&delay_id) && !kept.contains("NEVERLOG"), "{kept}");
    let before = own.managed(&delay_id, "restart").len();
    let service = own
        .serving(super::traced(&sfu))
        .env("LIVEKIT_STATE_PATH", &file.to_string_lossy())
        .start();
    let stage = Stage { service, sfu, own };
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
    wait_until("a restart by the next process", TIMEOUT, || {
        stage.own.managed(&delay_id, "restart").len() > before
    });
    leaves(&stage, &session);
    wait_until("the leave", TIMEOUT, || !stage.own.managed(&delay_id, "send").is_empty());
    for what in ["restart", "send"] {
        assert_signed(&stage.own, &user, &stage.own.managed(&delay_id, what));
    }
}

#[test]
fn events_are_managed_on_the_path_that_there_is() {
    let path = |stable| (Proposal::DelayedEvents, stable);
    for (says, has) in [
        (vec![path(false)], false),
        (vec![path(true)], true),
        (vec![path(false), path(true)], true),
        (vec![], true),
        (vec![path(true)], false),
    ] {
        let stage = Stage::prepared(|own| {
            own.advertise(says.clone());
            own.serve([path(has), (Proposal::IsJoined, false)]);
        });
        let ask = stage.delegation();
        let delay_id = ask.body["delay_id"].as_str().expect("an id").to_owned();
        assert_eq!(stage.call(&ask).status, 200, "{says:?}");
        let session = joins(&stage, &ask);
        let last = |what: &str| {
            let mut all = stage.own.asked().into_iter().rev();
            all.find(|(_, asked)| asked.is_manage(&delay_id, what))
                .and_then(|(_, asked)| asked.proposal())
        };
        wait_until("a restart on that path", TIMEOUT, || last("restart") == Some(path(has)));
        leaves(&stage, &session);
        wait_until("a leave on that path", TIMEOUT, || last("send") == Some(path(has)));
        for what in ["restart", "send"] {
            assert_signed(&stage.own, &stage.own.user("alice"), &stage.own.managed(&delay_id, what));
        }
    }
}

/// A delegation through the standalone route, until its event was restarted.
fn standalone(stage: &Stage, homeserver: &Homeserver, delay_id: &str, room: &str) {
    let body = bodies::delegate_of(homeserver, "alice", room, delay_id, 600_000);
    let answer = stage.service.post("/delegate_delayed_leave", &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let identity = identity(&homeserver.user("alice"), "DEVICE", "member1");
    let session = stage.sfu.join(&alias(room, SLOT), &identity);
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
}

#[test]
fn standalone_delegations_carry_the_token_for_our_users_only() {
    let (away, api) = (Homeserver::start(), ClientApi::start());
    let own = OwnHomeserver::start();
    let overrides = format!("{}={},{}", own.name(), own.url(), api.override_of(&away));
    let full_access = format!("{},{}", own.name(), away.name);
    let stage = Stage::of(own, |setup| {
        setup
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &overrides)
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", &full_access)
    });

    let (user, room) = (stage.own.user("alice"), unique_room());
    let ours = stage.own.schedule(&user, &room, 600_000);
    standalone(&stage, &stage.own.federation, &ours, &room);
    wait_until("a restart", TIMEOUT, || !stage.own.managed(&ours, "restart").is_empty());
    assert_signed(&stage.own, &user, &stage.own.managed(&ours, "restart"));

    let theirs = format!("syd_{}", unique());
    standalone(&stage, &away, &theirs, &unique_room());
    wait_until("a restart there", TIMEOUT, || api.count("restart", &theirs) > 0);
    for call in api.http.requests() {
        assert_eq!(
            (call.header("authorization"), call.query("user_id")),
            (None, None),
            "{}",
            call.target
        );
    }
    assert_eq!(api.strays(), [""; 0]);
    assert_eq!(stage.own.managed(&theirs, "restart").len(), 0);
}

/// The other member of the pair in MSC4140: `delay`, which some homeservers say instead.
#[test]
fn the_delay_may_be_called_delay() {
    let stage = Stage::new();
    let ask = stage.delegation();
    let room = ask.room();
    stage.own.script(move |_, asked| {
        asked
            .is_event()
            .then(|| Reply::json(200, &json!({"delay_id": "x", "room_id": room, "delay": 600_000})))
    });
    assert_eq!(stage.call(&ask).status, 200);
}

/// C2: who left the Matrix room and was removed from the call is no member any more: there is nothing to call about.
#[test]
fn who_was_removed_from_the_call_has_no_leave_left_to_send() {
    let stage = Stage::with(|setup| setup.env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "1"));
    let (user, ask) = (stage.own.user("alice"), stage.delegation());
    let room = ask.room();
    assert_eq!(stage.call(&stage.client_in(&room)).status, 200);
    // Restarted about once a second while it is watched.
    let delay_id = stage.own.schedule(&user, &room, 2_000);
    assert_eq!(stage.call(&ask.set("delay_id", delay_id.as_str())).status, 200);
    let identity = homeserver_identity(&user, "member1");
    let session = stage.sfu.join(&alias(&room, SLOT), &identity);
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &webhook::joined(&session)).status, 200);
    let calls = || ["restart", "send", "cancel"].map(|what| stage.own.managed(&delay_id, what).len());
    wait_until("restarts", TIMEOUT, || calls()[0] >= 2);
    stage.own.part(&room, &user);
    wait_until("the removal", TIMEOUT, || !stage.sfu.has(&session.room, &session.identity));
    let left = webhook::left(&session, "PARTICIPANT_REMOVED");
    assert_eq!(webhook::tell(&stage.service, &stage.sfu, &left).status, 200);
    // What was under way when that was told may still arrive.
    let removed = Instant::now();
    wait_until("half a second to pass", TIMEOUT, || removed.elapsed() > Duration::from_millis(500));
    let before = calls();
    wait_until("four seconds to pass", TIMEOUT, || removed.elapsed() > Duration::from_secs(4));
    eprintln!("removed: {:?} calls before, {:?} after four seconds", before, calls());
    assert_eq!(calls(), before, "a call about an event of somebody who was removed");
    assert_eq!(before[1..], [0, 0]);
}
