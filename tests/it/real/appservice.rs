//! Application-service mode on real parts: two federated homeservers, each with an instance of the service and an SFU of its
//! own, and real clients. The users call their homeserver, as clients do; the registrations are those that
//! `lk-jwt-service generate-registration` prints.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::client::Answer;
use crate::support::hashes::{SLOT, alias, homeserver_identity, identity};
use crate::support::jwt::Jwt;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{self, real_neighbours, say};
use crate::support::service::{Service, Setup, binary, free_address};
use crate::support::synapse::{Synapse, User};
use crate::support::{Shared, wait_until};

const V1: &str = "/_matrix/client/v1/rtc/livekit";
const UNSTABLE: &str = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit";
const DELAYED: &str = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";
const MEMBER: &str = "org.matrix.msc3401.call.member";
/// Events travel between the homeservers, and memberships with them.
const FEDERATION: Duration = Duration::from_secs(30);

/// Held for writing while a service is away.
static STANDING: RwLock<()> = RwLock::new(());

/// A homeserver with its service and its SFU.
struct Side {
    service: Mutex<Option<Service>>,
    setup: Setup,
    synapse: Synapse,
    livekit: Livekit,
}

struct Stage {
    a: Side,
    b: Side,
}

impl Stage {
    /// `None` where these tests are left out.
    fn get() -> Option<Arc<Self>> {
        static SHARED: Shared<Stage> = Shared::new();
        real_neighbours().then(|| {
            SHARED.get(|| {
                let stage = Self {
                    a: Side::spawn(),
                    b: Side::spawn(),
                };
                for side in [&stage.a, &stage.b] {
                    side.livekit.start();
                    side.synapse.wait_ready();
                    side.start_service();
                }
                stage
            })
        })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The services are judged while their neighbours still stand.
        for side in [&self.a, &self.b] {
            side.stop_service();
            if std::thread::panicking() {
                say(&format!("the end of a homeserver's log:\n{}", side.synapse.tail()));
            }
        }
    }
}

impl Side {
    fn spawn() -> Self {
        let (address, ports) = (free_address(), [process::free_port(), process::free_port()]);
        let (name, url) = (format!("127.0.0.1:{}", ports[0]), format!("http://{address}"));
        let printed = Command::new(binary())
            .args(["generate-registration", &name, &url])
            .env_clear()
            .output()
            .expect("the service's binary");
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
        let registration: PathBuf = process::directory("registration").join("lk-jwt-service.yaml");
        std::fs::write(&registration, &printed.stdout).expect("a file");
        let synapse = Synapse::spawn_with(&registration, ports);
        let livekit = Livekit::prepare_with_webhooks(&[format!("{url}/sfu_webhook")]);
        let text = String::from_utf8_lossy(&printed.stdout).into_owned();
        let mut setup = livekit
            .setup(&[&name])
            .env("LIVEKIT_JWT_BIND", &address.to_string())
            .env("LIVEKIT_HS_SERVER_NAME", &name)
            .env("LIVEKIT_AS_REGISTRATION_FILE", &registration.to_string_lossy())
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &format!("{name}=http://127.0.0.1:{}", ports[1]))
            .env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "2")
            .reached_at(address);
        for token in text
            .lines()
            .filter(|line| line.starts_with("as_token") || line.starts_with("hs_token"))
        {
            setup = setup.secret(token.split('\'').nth(1).expect("a token in quotes"));
        }
        Self {
            service: Mutex::default(),
            setup,
            synapse,
            livekit,
        }
    }

    fn start_service(&self) {
        *self.service.lock().unwrap() = Some(self.setup.clone().start());
    }

    fn stop_service(&self) {
        drop(self.service.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// A room of `owner`'s in which `others` are, too.
#[track_caller]
fn room_of(owner: &User<'_>, others: &[&User<'_>]) -> String {
    let request = json!({"preset": "public_chat", "power_level_content_override": {"events": {MEMBER: 0}}});
    let answer = owner.request("POST", "/_matrix/client/v3/createRoom", Some(&request));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let room = answer.field("room_id");
    for other in others {
        let path = format!("/_matrix/client/v3/join/{room}?server_name={}", owner.homeserver.name);
        // A homeserver that has just started may need another try to reach its peer.
        wait_until("the join", FEDERATION, || {
            other.request("POST", &path, Some(&json!({}))).status == 200
        });
    }
    room
}

fn body(livekit: &Livekit, room: &str, member: &str) -> Value {
    json!({"url": livekit.url(), "room_id": room, "slot_id": SLOT, "member_id": member})
}

fn get_token(user: &User<'_>, body: &Value) -> Answer {
    user.request("POST", &format!("{V1}/get_token"), Some(body))
}

/// Asks until the other homeserver has heard of the memberships.
#[track_caller]
fn token(user: &User<'_>, body: &Value) -> Value {
    let mut answer = get_token(user, body);
    wait_until("a token", FEDERATION, || {
        if answer.status != 200 {
            answer = get_token(user, body);
        }
        answer.status == 200
    });
    answer.json()
}

#[track_caller]
fn assert_token(answer: &Value, livekit: &Livekit, room: &str, identity: &str) {
    let jwt = Jwt::decode(answer["jwt"].as_str().expect("jwt")).expect("a JWT");
    assert!(jwt.is_signed_with(livekit.secret()), "signed for another SFU");
    assert_eq!(jwt.claims["sub"], json!(identity));
    assert_eq!(jwt.claims["video"]["room"], json!(alias(room, SLOT)));
    assert_eq!(jwt.claims["video"]["canPublish"], json!(true));
}

/// Joins the SFU with a token; the homeserver's answer has no need of a `url`.
#[track_caller]
fn join(livekit: &Livekit, answer: &Value) -> (Client, String) {
    Client::join(&json!({"url": livekit.url(), "jwt": answer["jwt"]}))
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(now.as_millis()).expect("not that late")
}

#[test]
fn a_user_joins_the_sfu_of_their_own_homeserver() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let side = &stage.a;
    let alice = side.synapse.register("alice");
    let room = room_of(&alice, &[]);
    for prefix in [V1, UNSTABLE, "/_matrix/client/v3/rtc/livekit"] {
        let answer = alice.request("POST", &format!("{prefix}/get_token"), Some(&body(&side.livekit, &room, "m")));
        assert_eq!(answer.status, 200, "{prefix}: {}", answer.text());
        assert_token(&answer.json(), &side.livekit, &room, &homeserver_identity(&alice.id, "m"));
    }
    let mut same = body(&side.livekit, &room, "m");
    same["url"] = json!(format!("WS://{}/", side.livekit.address()));
    let answer = get_token(&alice, &same);
    assert_eq!(answer.status, 200, "{}", answer.text());
    let (_client, name) = join(&side.livekit, &answer.json());
    assert_eq!(name, homeserver_identity(&alice.id, "m"));
    assert_eq!(side.livekit.participants(&alias(&room, SLOT)), [name]);
    // The words of the generation before.
    let mut old = body(&side.livekit, &room, "m");
    old["member_id"] = json!(null);
    old["member"] = json!({"id": "m", "claimed_device_id": alice.device, "claimed_user_id": alice.id});
    let answer = get_token(&alice, &old);
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_token(&answer.json(), &side.livekit, &room, &identity(&alice.id, &alice.device, "m"));
}

#[test]
fn users_of_two_homeservers_meet_on_either_sfu() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let (alice, bob) = (stage.a.synapse.register("alice"), stage.b.synapse.register("bob"));
    let room = room_of(&alice, &[&bob]);
    for (host, guest, sfu, guests_own) in [(&alice, &bob, &stage.a, &stage.b), (&bob, &alice, &stage.b, &stage.a)] {
        let mut clients = Vec::new();
        let mine = body(&sfu.livekit, &room, "m");
        let mut theirs = mine.clone();
        theirs["server_name"] = json!(sfu.synapse.name);
        for (user, request) in [(host, &mine), (guest, &theirs)] {
            let answer = token(user, request);
            let name = homeserver_identity(&user.id, "m");
            assert_token(&answer, &sfu.livekit, &room, &name);
            let (client, joined) = join(&sfu.livekit, &answer);
            assert_eq!(joined, name);
            clients.push(client);
        }
        assert_eq!(sfu.livekit.participants(&alias(&room, SLOT)).len(), 2);
        assert!(
            guests_own.livekit.room(&alias(&room, SLOT)).is_none() || host.id != alice.id,
            "a room on the wrong SFU"
        );
    }
}

#[test]
fn who_is_not_in_the_room_is_refused() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let (alice, carol) = (stage.a.synapse.register("alice"), stage.a.synapse.register("carol"));
    let bob = stage.b.synapse.register("bob");
    let room = room_of(&alice, &[]);
    get_token(&carol, &body(&stage.a.livekit, &room, "m")).assert_errcode(403, "M_FORBIDDEN");
    get_token(&alice, &body(&stage.a.livekit, "!nowhere", "m")).assert_errcode(403, "M_FORBIDDEN");
    // The other homeserver is not in the room: neither may its SFU be used, nor may its users come in.
    let mut remote = body(&stage.b.livekit, &room, "m");
    remote["server_name"] = json!(stage.b.synapse.name);
    get_token(&alice, &remote).assert_errcode(403, "M_FORBIDDEN");
    let mut stranger = body(&stage.a.livekit, &room, "m");
    stranger["server_name"] = json!(stage.a.synapse.name);
    get_token(&bob, &stranger).assert_errcode(403, "M_FORBIDDEN");
    assert!(stage.a.livekit.room(&alias(&room, SLOT)).is_none(), "a room was opened for nobody");
    // Joined, they are let in at once: a no is not remembered.
    let path = format!("/_matrix/client/v3/join/{room}");
    assert_eq!(carol.request("POST", &path, Some(&json!({}))).status, 200);
    assert_eq!(get_token(&carol, &body(&stage.a.livekit, &room, "m")).status, 200);
    // Another SFU than ours, and one that the other homeserver has not.
    get_token(&alice, &body(&stage.b.livekit, &room, "m")).assert_errcode(400, "M_INVALID_PARAM");
    let shared = room_of(&alice, &[&bob]);
    let mut wrong = body(&stage.a.livekit, &shared, "m");
    wrong["server_name"] = json!(stage.b.synapse.name);
    let mut answer = get_token(&alice, &wrong);
    wait_until("the other homeserver's refusal", FEDERATION, || {
        if answer.status != 400 {
            answer = get_token(&alice, &wrong);
        }
        answer.status == 400
    });
    answer.assert_errcode(400, "M_INVALID_PARAM");
}

/// The standalone routes of a homeserver that alone has full access are for members, too (decision A7).
#[test]
fn the_standalone_routes_are_for_members() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let (alice, carol) = (stage.a.synapse.register("alice"), stage.a.synapse.register("carol"));
    let bob = stage.b.synapse.register("bob");
    let room = room_of(&alice, &[&bob]);
    let service = stage.a.service.lock().unwrap_or_else(PoisonError::into_inner);
    let service = service.as_ref().expect("a running service");
    for (user, status) in [(&alice, 200), (&bob, 200), (&carol, 403)] {
        for (path, body) in [("/get_token", user.get_token(&room)), ("/sfu/get", user.sfu_get(&room))] {
            let answer = service.post(path, &body);
            assert_eq!(answer.status, status, "{path} of {}: {}", user.id, answer.text());
        }
    }
}

#[test]
fn a_delegated_leave_is_restarted_and_sent() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let side = &stage.a;
    let (alice, carol) = (side.synapse.register("alice"), side.synapse.register("carol"));
    let room = room_of(&alice, &[&carol]);
    let state = |user: &User<'_>| format!("/_matrix/client/v3/rooms/{room}/state/{MEMBER}/_{}_{}", user.id, user.device);
    let here = json!({"application": "m.call", "device_id": alice.device, "call_id": "", "expires": 14_400_000});
    let schedule = |user: &User<'_>| {
        assert_eq!(user.request("PUT", &state(user), Some(&here)).status, 200);
        let path = format!("{}?org.matrix.msc4140.delay=20000", state(user));
        let answer = user.request("PUT", &path, Some(&json!({})));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.field("delay_id")
    };
    let (alices, carols) = (schedule(&alice), schedule(&carol));
    let delegate = |delay_id: &str| {
        let mut request = body(&side.livekit, &room, "m");
        request["delay_id"] = json!(delay_id);
        alice.request("POST", &format!("{V1}/delegate_delayed_leave"), Some(&request))
    };
    for foreign in [carols.as_str(), "syd_nobodys"] {
        delegate(foreign).assert_errcode(400, "M_INVALID_PARAM");
    }
    let answer = token(&alice, &body(&side.livekit, &room, "m"));
    let delegated = delegate(&alices);
    assert_eq!((delegated.status, delegated.json()), (200, json!({})), "{}", delegated.text());
    let since = || {
        let answer = alice.request("GET", &format!("{DELAYED}/{alices}"), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["delayed_since_ts"].as_u64().expect("delayed_since_ts")
    };
    let before = since();
    let joined = now_ms();
    let (client, _) = join(&side.livekit, &answer);
    wait_until("the restart", Duration::from_secs(10), || since() > before.max(joined));
    let event = || {
        let answer = alice.request("GET", &format!("{}?format=event", state(&alice)), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    assert_eq!(event()["content"], here);
    drop(client);
    // Killed: the SFU notices it after some 20 s; the leave is in the timeline 3 s later at most.
    wait_until("the leave", Duration::from_secs(60), || event()["content"] == json!({}));
}

#[test]
fn who_leaves_the_matrix_room_is_removed_from_the_sfu_and_again_with_the_old_token() {
    let Some(stage) = Stage::get() else { return };
    let _standing = STANDING.read().unwrap_or_else(PoisonError::into_inner);
    let side = &stage.a;
    let alice = side.synapse.register("alice");
    let (carol, bob) = (side.synapse.register("carol"), stage.b.synapse.register("bob"));
    let room = room_of(&alice, &[&carol, &bob]);
    let mut remote = body(&side.livekit, &room, "m");
    remote["server_name"] = json!(side.synapse.name);
    let answers = [
        token(&alice, &body(&side.livekit, &room, "m")),
        token(&carol, &body(&side.livekit, &room, "m")),
        token(&bob, &remote),
    ];
    let clients = answers.each_ref().map(|answer| join(&side.livekit, answer).0);
    let present = || {
        let mut present = side.livekit.participants(&alias(&room, SLOT));
        present.sort_unstable();
        present
    };
    let hers = homeserver_identity(&alice.id, "m");
    assert_eq!(present().len(), 3);
    // One leaves, the other is banned.
    assert_eq!(
        carol
            .request("POST", &format!("/_matrix/client/v3/rooms/{room}/leave"), Some(&json!({})))
            .status,
        200
    );
    let ban = json!({"user_id": bob.id});
    assert_eq!(
        alice
            .request("POST", &format!("/_matrix/client/v3/rooms/{room}/ban"), Some(&ban))
            .status,
        200
    );
    let left = Instant::now();
    for gone in &clients[1..] {
        assert_eq!(gone.disconnected(), "PARTICIPANT_REMOVED");
    }
    say(&format!(
        "removed from the SFU {:.1} s after they left",
        left.elapsed().as_secs_f64()
    ));
    assert_eq!(present(), std::slice::from_ref(&hers));
    for answer in &answers[1..] {
        let back = Client::start(&json!({"url": side.livekit.url(), "jwt": answer["jwt"]}));
        assert_eq!(back.disconnected(), "PARTICIPANT_REMOVED");
    }
    assert_eq!(present(), [hers], "who stays is left alone");
    // No new token, as soon as the yes of a moment ago is forgotten.
    let again = || get_token(&carol, &body(&side.livekit, &room, "m"));
    wait_until("a refusal", Duration::from_secs(10), || again().status == 403);
    again().assert_errcode(403, "M_FORBIDDEN");
    // Back in the Matrix room, back in the call.
    assert_eq!(
        carol
            .request("POST", &format!("/_matrix/client/v3/join/{room}"), Some(&json!({})))
            .status,
        200
    );
    let (_client, name) = join(&side.livekit, &token(&carol, &body(&side.livekit, &room, "m")));
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        assert!(present().contains(&name), "removed although joined again");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_homeserver_bears_that_the_service_is_away() {
    let Some(stage) = Stage::get() else { return };
    let _alone = STANDING.write().unwrap_or_else(PoisonError::into_inner);
    let side = &stage.b;
    let bob = side.synapse.register("bob");
    let room = room_of(&bob, &[]);
    side.stop_service();
    let answer = get_token(&bob, &body(&side.livekit, &room, "m"));
    side.start_service();
    assert_eq!((answer.status, answer.field("errcode")), (500, "M_UNKNOWN".into()));
    let answer = get_token(&bob, &body(&side.livekit, &room, "m"));
    assert_eq!(answer.status, 200, "{}", answer.text());
}
