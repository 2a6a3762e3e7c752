//! `/token_source`: LiveKit's token sources, by Matrix identity.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use url::form_urlencoded;

use crate::support::bodies;
use crate::support::client::{Answer, Call};
use crate::support::hashes::{SLOT, alias};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::neighbour::Reply;
use crate::support::own_homeserver::OwnHomeserver;
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Fault, Sfu};
use crate::support::world::World;
use crate::support::{lateness, secrets, unique_room, wait_until};

const FIELDS: [&str; 5] = [
    "participant_identity",
    "participant_name",
    "participant_metadata",
    "participant_attributes",
    "room_config",
];

/// One request, to be spoilt.
#[derive(Clone)]
struct Ask {
    method: &'static str,
    authorization: Vec<String>,
    content_type: &'static str,
    query: Vec<(&'static str, String)>,
    body: Value,
    /// Instead of `body`.
    raw: Option<&'static str>,
    /// White space after the body.
    padding: usize,
}

impl Ask {
    fn new(server: &str, token: &str, room: &str) -> Self {
        Self {
            method: "POST",
            authorization: vec![format!("Bearer {token}")],
            content_type: "application/json",
            query: vec![("matrix_server_name", server.into()), ("device_id", "DEVICE".into())],
            body: json!({"room_name": room}),
            raw: None,
            padding: 0,
        }
    }

    /// Of a user of `homeserver`, with a fresh token.
    fn of(homeserver: &Homeserver, localpart: &str, room: &str) -> Self {
        Self::new(&homeserver.name, &homeserver.token(localpart), room)
    }

    /// With this parameter, or without it.
    fn query(mut self, key: &'static str, value: Option<&str>) -> Self {
        self.query.retain(|(name, _)| *name != key);
        self.query.extend(value.map(|value| (key, value.to_owned())));
        self
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.body[key] = value;
        self
    }

    fn call(&self) -> Call {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(&self.query).finish();
        let body = self.raw.map_or_else(|| self.body.to_string(), str::to_owned) + &" ".repeat(self.padding);
        let call = Call::with_body(self.method, &format!("/token_source?{query}"), body).header("Content-Type", self.content_type);
        let values = self.authorization.iter();
        values.fold(call, |call, value| call.header("Authorization", value))
    }

    #[track_caller]
    fn post(&self, service: &Service) -> Answer {
        let answer = service.call(&self.call());
        let (text, given) = (answer.text(), answer.status == 201);
        for name in ["server_url", "participant_token"] {
            assert_eq!(text.contains(name), given, "status {}: {text}", answer.status);
        }
        assert!(given || answer.status >= 400, "status {}: {text}", answer.status);
        answer
    }
}

/// Room and identity.
#[track_caller]
fn participant(token: &str) -> (String, String) {
    let claims = Jwt::decode(token).expect("a JWT").claims;
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    (text(&claims["video"]["room"]), text(&claims["sub"]))
}

#[track_caller]
fn given(answer: &Answer) -> (String, String) {
    assert_eq!(answer.status, 201, "{}", answer.text());
    participant(&answer.field("participant_token"))
}

/// What an SDK's developer can set, and how each SDK writes what was not set.
fn sdk_bodies(room: &str) -> [(&'static str, Value); 6] {
    [
        ("JS, C++, Rust, Unity", json!({"room_name": room})),
        ("Swift, Android, Flutter", json!({"room_name": room, "room_config": {}})),
        (
            "defaults spelled out",
            json!({
                "room_name": room, "participant_name": "", "participant_identity": "", "participant_metadata": "",
                "participant_attributes": {}, "room_config": {"name": "", "empty_timeout": 0, "sync_streams": false, "agents": []},
            }),
        ),
        (
            "an agent without a name",
            json!({"room_name": room, "room_config": {"agents": [{"agent_name": "", "metadata": "", "deployment": ""}]}}),
        ),
        (
            "nulls",
            json!({
                "room_name": room, "participant_name": null, "participant_identity": null, "participant_metadata": null,
                "participant_attributes": null, "room_config": null,
            }),
        ),
        (
            "what LiveKit may add",
            json!({"room_name": room, "x": {"y": [1]}, "participant_kind": "agent"}),
        ),
    ]
}

#[test]
fn what_each_sdk_sends_is_answered_with_an_address_and_a_token() {
    let world = World::shared();
    for (sdk, body) in sdk_bodies(&unique_room()) {
        for content_type in ["application/json", "text/plain", ""] {
            let mut ask = Ask::of(&world.home, "alice", "");
            ask.body = body.clone();
            ask.content_type = content_type;
            let answer = ask.post(&world.service);
            let room = body["room_name"].as_str().expect("a room");
            let expected = (alias(room, SLOT), format!("{}:DEVICE", world.home.user("alice")));
            assert_eq!(given(&answer), expected, "{sdk} {content_type}");
            let expected = format!(
                "{{\"server_url\":\"{}\",\"participant_token\":\"{}\"}}\n",
                world.sfu.url(),
                answer.field("participant_token")
            );
            assert_eq!(answer.text(), expected);
            let jwt = Jwt::decode(&answer.field("participant_token")).expect("a JWT");
            assert!(jwt.is_signed_with(world.sfu.secret()));
        }
    }
}

#[test]
fn what_a_client_must_not_choose_is_refused_and_nobody_is_asked() {
    let world = World::with(|setup| setup);
    let everything = [
        json!("bob"),
        json!("Bob"),
        json!("{}"),
        json!({"a": "b"}),
        json!({"agents": [{"agent_name": "recorder", "metadata": "m", "deployment": "d"}]}),
    ];
    let mut all = Ask::of(&world.home, "alice", &unique_room());
    for (field, value) in FIELDS.iter().zip(everything) {
        all = all.set(field, value.clone());
        let one = Ask::of(&world.home, "alice", &unique_room()).set(field, value);
        one.post(&world.service).assert_error(403, "M_FORBIDDEN", FORBIDDEN);
    }
    all.post(&world.service).assert_error(403, "M_FORBIDDEN", FORBIDDEN);
    // Unknown settings, default or not: what they will mean, nobody knows.
    for value in [
        json!({"egress": {"x": 1}}),
        json!({"new": true}),
        json!([0, [{"x": "y"}]]),
        json!(7),
    ] {
        let ask = Ask::of(&world.home, "alice", &unique_room()).set("room_config", value);
        ask.post(&world.service).assert_error(403, "M_FORBIDDEN", FORBIDDEN);
    }
    assert_nobody_asked(&world);
}

/// What the service asks the SFU by itself is not counted.
#[track_caller]
fn assert_nobody_asked(world: &World) {
    let asked = [
        world.home.http.requests().len(),
        world.away.http.requests().len(),
        world.sfu.creations(),
    ];
    assert_eq!(asked, [0, 0, 0], "requests to the homeservers, rooms created");
}

const FORBIDDEN: &str = "`participant_identity`, `participant_name`, `participant_metadata`, `participant_attributes` and \
                         `room_config` must be left out or empty: who takes part is the user of the OpenID token";
const NO_TOKEN: &str = "Send the `access_token` of a Matrix OpenID token as one header `Authorization: Bearer ...`; \
                        in livekit-client, `headers` must be a plain object";
const NO_SERVER: &str = "The query is missing `matrix_server_name`, of the OpenID token";
const NO_DEVICE: &str = "The query is missing `device_id`, of the device that takes part";
const BAD_ROOM: &str = "The request body `room_name` must be the id of a Matrix room, which begins with `!`";
const UNAUTHORISED: &str = "The request could not be authorised.";

/// Rows of the error table in their order: what is wrong, the answer, and its text.
type Row = (&'static str, fn(Ask) -> Ask, u16, &'static str, &'static str);

/// What is wrong is found without asking anybody.
const ROWS: [Row; 28] = [
    (
        "method",
        |ask| Ask { method: "PUT", ..ask },
        405,
        "M_UNRECOGNIZED",
        "Method not allowed",
    ),
    (
        "too large",
        |ask| Ask {
            padding: 64 * 1024 + 1,
            ..ask
        },
        413,
        "M_TOO_LARGE",
        "The request body is too large",
    ),
    ("no token", |ask| bearing(ask, &[]), 401, "M_MISSING_TOKEN", NO_TOKEN),
    ("empty token", |ask| bearing(ask, &["Bearer "]), 401, "M_MISSING_TOKEN", NO_TOKEN),
    (
        "another scheme",
        |ask| bearing(ask, &["Basic dDp0"]),
        401,
        "M_MISSING_TOKEN",
        NO_TOKEN,
    ),
    (
        "two headers",
        |ask| {
            let mut authorization = ask.authorization.clone();
            authorization.push("Bearer other".into());
            Ask { authorization, ..ask }
        },
        401,
        "M_MISSING_TOKEN",
        NO_TOKEN,
    ),
    (
        "two headers in one",
        |ask| bearing(ask, &["Bearer one, Bearer two"]),
        401,
        "M_MISSING_TOKEN",
        NO_TOKEN,
    ),
    (
        "no server",
        |ask| ask.query("matrix_server_name", None),
        400,
        "M_MISSING_PARAM",
        NO_SERVER,
    ),
    (
        "empty server",
        |ask| ask.query("matrix_server_name", Some("")),
        400,
        "M_MISSING_PARAM",
        NO_SERVER,
    ),
    ("no device", |ask| ask.query("device_id", None), 400, "M_MISSING_PARAM", NO_DEVICE),
    (
        "empty device",
        |ask| ask.query("device_id", Some("")),
        400,
        "M_MISSING_PARAM",
        NO_DEVICE,
    ),
    (
        "a slot and no member",
        |ask| ask.query("slot_id", Some("m.call#ROOM")),
        400,
        "M_INVALID_PARAM",
        "The query has a `slot_id` and no `member_id`",
    ),
    (
        "long device",
        |ask| ask.query("device_id", Some(&"D".repeat(256))),
        400,
        "M_INVALID_PARAM",
        "The query has a parameter that is too long, or the token is",
    ),
    (
        "a device like a port",
        |ask| ask.query("device_id", Some("8448:D")),
        400,
        "M_INVALID_PARAM",
        "The query's `device_id` must not begin with a port",
    ),
    (
        "no JSON",
        |ask| Ask { raw: Some("{"), ..ask },
        400,
        "M_NOT_JSON",
        "Error reading request",
    ),
    (
        "no object",
        |ask| Ask { raw: Some("[]"), ..ask },
        400,
        "M_NOT_JSON",
        "Error reading request",
    ),
    (
        "empty body",
        |ask| Ask { raw: Some(""), ..ask },
        400,
        "M_NOT_JSON",
        "Error reading request",
    ),
    ("no room", |ask| ask.set("room_name", json!(null)), 400, "M_BAD_JSON", BAD_ROOM),
    (
        "a room of another type",
        |ask| ask.set("room_name", json!(5)),
        400,
        "M_BAD_JSON",
        BAD_ROOM,
    ),
    (
        "an alias",
        |ask| ask.set("room_name", json!("#room:x")),
        400,
        "M_BAD_JSON",
        BAD_ROOM,
    ),
    (
        "a long room",
        |ask| ask.set("room_name", json!("!".repeat(256))),
        400,
        "M_BAD_JSON",
        BAD_ROOM,
    ),
    (
        "identity",
        |ask| ask.set("participant_identity", json!("bob")),
        403,
        "M_FORBIDDEN",
        FORBIDDEN,
    ),
    (
        "name",
        |ask| ask.set("participant_name", json!("Bob")),
        403,
        "M_FORBIDDEN",
        FORBIDDEN,
    ),
    (
        "metadata",
        |ask| ask.set("participant_metadata", json!("{}")),
        403,
        "M_FORBIDDEN",
        FORBIDDEN,
    ),
    (
        "attributes",
        |ask| ask.set("participant_attributes", json!({"a": "b"})),
        403,
        "M_FORBIDDEN",
        FORBIDDEN,
    ),
    (
        "an agent",
        |ask| ask.set("room_config", json!({"agents": [{"agent_name": "a"}]})),
        403,
        "M_FORBIDDEN",
        FORBIDDEN,
    ),
    (
        "no server name",
        |ask| ask.query("matrix_server_name", Some("https://x/")),
        401,
        "M_UNAUTHORIZED",
        UNAUTHORISED,
    ),
    (
        "a long server name",
        |ask| ask.query("matrix_server_name", Some(&"x".repeat(300))),
        401,
        "M_UNAUTHORIZED",
        UNAUTHORISED,
    ),
];

fn bearing(ask: Ask, values: &[&str]) -> Ask {
    let authorization = values.iter().map(|value| (*value).to_owned()).collect();
    Ask { authorization, ..ask }
}

#[test]
fn each_fault_has_its_row_alone_and_with_each_later_one_and_nobody_is_asked() {
    let world = World::with(|setup| setup);
    for (n, (what, spoil, status, errcode, text)) in ROWS.iter().enumerate() {
        let good = || Ask::of(&world.home, "alice", &unique_room());
        spoil(good()).post(&world.service).assert_error(*status, errcode, text);
        for (later, spoil_too, ..) in &ROWS[n + 1..] {
            let answer = spoil(spoil_too(good())).post(&world.service);
            assert_eq!(
                (answer.status, answer.field("errcode").as_str(), answer.field("error").as_str()),
                (*status, *errcode, *text),
                "{what}, and {later}"
            );
        }
    }
    assert_nobody_asked(&world);
}

/// What neighbours say comes last, in the words that the other routes have.
#[test]
fn what_is_wrong_with_the_user_comes_after_all_that() {
    let world = World::with(|setup| setup);
    let made_up = || Ask::new(&world.home.name, &secrets::token(), &unique_room());
    for (what, spoil, status, errcode, _) in &ROWS {
        let answer = spoil(made_up()).post(&world.service);
        assert_eq!((answer.status, answer.field("errcode").as_str()), (*status, *errcode), "{what}");
    }
    assert_nobody_asked(&world);
    let foreign = world.away.token("alice");
    for (what, ask, reason) in [
        ("a made-up token", made_up(), "token_rejected"),
        (
            "another homeserver's token",
            Ask::new(&world.home.name, &foreign, &unique_room()),
            "token_rejected",
        ),
        (
            "a homeserver that speaks for another's user",
            Ask::new(&world.home.name, &world.home.token_of(&world.away.user("alice")), &unique_room()),
            "user_mismatch",
        ),
        (
            "a server that is not there",
            Ask::new("127.0.0.1:1", &world.home.token("alice"), &unique_room()),
            "homeserver_unreachable",
        ),
        (
            "a server name that is none",
            made_up().query("matrix_server_name", Some("x y")),
            "invalid_server_name",
        ),
        ("no token", bearing(made_up(), &[]), "token_missing"),
    ] {
        let answer = ask.post(&world.service);
        assert_eq!(
            (answer.status, answer.field("reason").as_str()),
            (401, reason),
            "{what}: {}",
            answer.text()
        );
    }
    assert_eq!(world.sfu.creations(), 0);
    // A room that cannot be opened.
    world
        .sfu
        .fail(Some(Fault::Instead(Reply::text(401, "text/plain", "invalid API key: x"))));
    let answer = Ask::of(&world.home, "alice", &unique_room()).post(&world.service);
    answer.assert_error(500, "M_UNKNOWN", "Unable to create room on SFU");
    // The others have no room opened for them, and are asked about at their own homeserver.
    let room = unique_room();
    let answer = Ask::new(&world.away.name, &foreign, &room).post(&world.service);
    assert_eq!(given(&answer).1, format!("{}:DEVICE", world.away.user("alice")));
    assert_eq!(world.sfu.creations_of(&alias(&room, SLOT)), 0);
    assert_eq!((world.home.asked_about(&foreign), world.away.asked_about(&foreign)), (1, 1));
}

#[test]
fn a_body_that_does_not_come_is_told_before_all_that() {
    let world = World::shared();
    let heads = ["", "Authorization: Bearer x\r\n"].map(|header| {
        let mut connection = world.service.connect();
        connection.send(format!("POST /token_source HTTP/1.1\r\nHost: x\r\n{header}Content-Length: 100\r\n\r\n{{").as_bytes());
        connection
    });
    for mut connection in heads {
        let answer = connection.answer().expect("an answer");
        answer.assert_errcode(408, "M_UNKNOWN");
        answer.assert_manners();
    }
}

#[test]
fn the_participants_are_those_of_the_other_routes() {
    let world = World::shared();
    let (service, home) = (&world.service, &world.home);
    for (localpart, device, member, slot) in [
        ("alice", "DEVICE", "member1", None),
        ("älice", "a b+c%2B&d=é~?>", "@alice:x:DEVICE", Some("m.call#other")),
        (
            "a.b_c-d=e/f+1",
            "D:8448",
            "82a10a4a-35ba-4447-bdc8-46980f35fb73",
            Some("m.call#ROOM"),
        ),
    ] {
        let room = unique_room();
        let mut legacy = bodies::sfu_get_of(home, localpart, &room);
        legacy["device_id"] = json!(device);
        let ask = Ask::of(home, localpart, &room).query("device_id", Some(device));
        assert_eq!(
            given(&ask.post(service)),
            participant(&service.post("/sfu/get", &legacy).field("jwt")),
            "{device}"
        );
        let mut body = bodies::get_token_of(home, localpart, &room);
        body["slot_id"] = json!(slot.unwrap_or(SLOT));
        body["member"] = json!({"id": member, "claimed_user_id": home.user(localpart), "claimed_device_id": device});
        let ask = ask.query("member_id", Some(member)).query("slot_id", slot);
        assert_eq!(
            given(&ask.post(service)),
            participant(&service.post("/get_token", &body).field("jwt")),
            "{device}"
        );
    }
    // With a member the identity is a hash, in which no device can be taken for a port.
    let ask = Ask::of(home, "alice", &unique_room()).query("device_id", Some("8448:D"));
    given(&ask.query("member_id", Some("m")).post(service));
}

#[test]
fn of_what_is_there_twice_the_last_counts_and_what_is_unknown_does_not() {
    let world = World::shared();
    let room = unique_room();
    let mut ask = Ask::of(&world.home, "alice", &room);
    ask.query.splice(
        0..0,
        [
            ("device_id", "FIRST".into()),
            ("matrix_server_name", "x".into()),
            ("room_name", "!no".into()),
        ],
    );
    let mut call = ask.clone();
    let twice = format!(r#"{{"room_name":"!first:x","participant_name":"bob","room_name":"{room}","participant_name":""}} and more"#);
    call.raw = Some(Box::leak(twice.into_boxed_str()));
    for ask in [ask, call] {
        let expected = (alias(&room, SLOT), format!("{}:DEVICE", world.home.user("alice")));
        assert_eq!(given(&ask.post(&world.service)), expected);
    }
    // No delayed leave is handed over here.
    let ask = Ask::of(&world.home, "alice", &room).set("delay_id", json!("syd_1"));
    given(&ask.set("delay_timeout", json!(8000)).post(&world.service));
}

/// LiveKit's SDK for Android gives up after 10 s.
#[test]
fn a_neighbour_that_is_away_is_waited_for_until_eight_seconds_have_gone_by() {
    type Break = fn(&World);
    let cases: [(&str, u16, &str, Break); 4] = [
        ("the SFU refuses", 500, "sfu_unreachable", |world| world.sfu.http.refuse()),
        ("the SFU never answers", 500, "sfu_unreachable", |world| {
            world.sfu.fail(Some(Fault::Hang));
        }),
        ("the homeserver refuses", 401, "homeserver_unreachable", |world| {
            world.home.http.refuse();
        }),
        ("the homeserver never answers", 401, "homeserver_unreachable", |world| {
            world.home.answer_userinfo(Some(Reply::Hang));
        }),
    ];
    lateness::measure();
    let began = Instant::now();
    let waiting: Vec<_> = cases
        .into_iter()
        .map(|(case, status, reason, fail)| {
            let world = World::new();
            fail(&world);
            let request = world.service.begin(&Ask::of(&world.home, "alice", &unique_room()).call());
            (case, status, reason, world, request)
        })
        .collect();
    for (case, status, reason, _world, request) in waiting {
        let answer = request.join().expect("the request").expect("an answer");
        assert_eq!((answer.status, answer.field("reason").as_str()), (status, reason), "{case}");
        assert_held(case, &answer, began);
        eprintln!("{case}: {status} after {:?}", answer.took);
    }
}

/// On the same trouble, at the same time: however busy the machine is, this route is answered before the others are.
#[test]
fn it_is_held_for_less_time_than_the_other_routes() {
    let world = World::new();
    world.sfu.http.refuse();
    let room = unique_room();
    let [other, ours] = [
        Call::json("/get_token", &bodies::get_token_of(&world.home, "alice", &room)),
        Ask::of(&world.home, "alice", &room).call(),
    ]
    .map(|call| world.service.begin(&call));
    let [other, ours] = [other, ours].map(|request| request.join().expect("the request").expect("an answer"));
    for answer in [&other, &ours] {
        assert_eq!((answer.status, answer.field("reason").as_str()), (500, "sfu_unreachable"));
    }
    // Eight seconds and ten: each tries every second until then.
    let earlier = other.took.saturating_sub(ours.took);
    assert!(
        earlier > Duration::from_millis(500),
        "{:?}, the other one {:?}",
        ours.took,
        other.took
    );
}

/// Not given up early, and answered while the SDKs still wait.
#[track_caller]
fn assert_held(case: &str, answer: &Answer, began: Instant) {
    let held = Duration::from_millis(6_500)..Duration::from_millis(9_500) + lateness::since(began);
    assert!(held.contains(&answer.took), "{case}: answered after {:?}", answer.took);
}

/// A service whose homeserver says who is in a Matrix room.
fn for_members(change: impl FnOnce(Setup) -> Setup) -> (Service, Sfu, OwnHomeserver) {
    let (sfu, own) = (Sfu::start(), OwnHomeserver::start());
    let setup = own.serving(Setup::new(&sfu).unset("LIVEKIT_FULL_ACCESS_HOMESERVERS"));
    let service = change(setup.unset("LIVEKIT_REQUIRE_MEMBERSHIP")).start();
    (service, sfu, own)
}

#[test]
fn where_tokens_are_for_members_only_it_has_no_others() {
    let (service, sfu, own) = for_members(|setup| setup);
    let (room, user) = (unique_room(), own.user("alice"));
    for member in [None, Some("member1")] {
        let ask = Ask::of(&own.federation, "alice", &room).query("member_id", member);
        ask.post(&service).assert_errcode(403, "M_FORBIDDEN");
        assert_eq!(sfu.creations(), 0);
    }
    own.join(&room, &user);
    given(&Ask::of(&own.federation, "alice", &room).post(&service));
    assert_eq!(sfu.creations_of(&alias(&room, SLOT)), 1);
    // Held no longer than the SDKs wait.
    own.script(|_, asked| asked.is_about_user().then_some(Reply::Hang));
    lateness::measure();
    let began = Instant::now();
    let answer = Ask::of(&own.federation, "alice", &unique_room()).post(&service);
    assert_eq!((answer.status, answer.field("errcode").as_str()), (502, "M_UNKNOWN"));
    assert_held("the homeserver does not say who is in the room", &answer, began);
}

#[test]
fn who_leaves_the_matrix_room_leaves_the_call() {
    let (service, sfu, own) = for_members(|setup| setup.env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "1"));
    let (room, user) = (unique_room(), own.user("alice"));
    own.join(&room, &user);
    let (name, identity) = given(&Ask::of(&own.federation, "alice", &room).post(&service));
    sfu.join(&name, &identity);
    own.part(&room, &user);
    wait_until("the removal", Duration::from_secs(20), || {
        !sfu.removals(&name, &identity).is_empty()
    });
}

/// What the tests against the real SDKs run is what the page shows.
#[test]
fn the_examples_of_the_page_are_the_files_that_the_tests_run() {
    let read = |path: &str| std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path);
    let page = read("docs/token-source.md");
    let shown: Vec<_> = page.split("<!-- example: ").skip(1).collect();
    assert_eq!(shown.len(), 4);
    for example in shown {
        let (name, rest) = example.split_once(" -->\n```").expect("a block of code");
        let block = rest
            .split_once('\n')
            .and_then(|(_, code)| code.split_once("\n```\n"))
            .expect("its end")
            .0;
        assert_eq!(read(&format!("tests/tools/token_source/{name}")), format!("{block}\n"), "{name}");
    }
    // Of the other languages it says that they were not run.
    let (_, others) = page.split_once("were *not run*").expect("what was not run");
    for language in ["```swift", "```kotlin", "```cpp"] {
        assert!(others.contains(language) && page.matches(language).count() == 1, "{language}");
    }
}
