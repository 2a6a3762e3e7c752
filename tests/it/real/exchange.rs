//! The main job: a real user's OpenID token becomes a token with which a real client joins a real SFU.

use serde_json::json;

use super::{Neighbours, assert_grants, assert_not_logged, claims};
use crate::support::bodies::{self, with};
use crate::support::ca::Ca;
use crate::support::hashes::{SLOT, alias, identity};
use crate::support::homeserver::Homeserver;
use crate::support::livekit::Client;
use crate::support::service::Setup;
use crate::support::unique_room;

const UNAUTHORISED: &str = "The request could not be authorised.";

#[test]
fn a_user_of_a_real_homeserver_joins_a_real_sfu_with_tls_verified() {
    let Some(real) = Neighbours::get() else { return };
    // Full access names the homeserver, which allows its address too; B is not named.
    joins(&real, real.livekit.setup(&[&real.home.name]));
}

#[test]
fn a_user_of_a_real_homeserver_joins_a_real_sfu_without_tls_verification() {
    let Some(real) = Neighbours::get() else { return };
    let setup = real
        .livekit
        .setup(&[&real.home.name])
        .env("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING")
        .env("SSL_CERT_FILE", &Ca::untrusted().file().to_string_lossy())
        .unset("LIVEKIT_FEDERATION_ALLOWED_NETWORKS");
    joins(&real, setup);
}

/// Both routes, users of both homeservers, in one room.
fn joins(real: &Neighbours, setup: Setup) {
    let service = setup.start();
    let (alice, bob) = (real.home.register("alice"), real.away.register("bob"));
    let room = alice.create_room();
    let mut clients = Vec::new();
    for user in [&alice, &bob] {
        for path in ["/get_token", "/sfu/get"] {
            let (body, name) = match path {
                "/get_token" => (user.get_token(&room), identity(&user.id, &user.device, "member1")),
                _ => (user.sfu_get(&room), format!("{}:{}", user.id, user.device)),
            };
            let answer = service.post(path, &body);
            assert_eq!(answer.status, 200, "{path} of {}: {}", user.id, answer.text());
            let answer = answer.json();
            assert_eq!(answer["url"], real.livekit.url());
            assert_grants(&claims(&answer, real.livekit), real.livekit.key(), &name, &room);
            assert_not_logged(&service, &[&body]);
            clients.push((Client::start(&answer), name));
        }
    }
    for (client, name) in &clients {
        assert_eq!(
            client.joined(),
            *name,
            "the SFU knows the client by another name than the token says"
        );
    }
    let mut present = real.livekit.participants(&alias(&room, SLOT));
    present.sort_unstable();
    let mut expected: Vec<_> = clients.iter().map(|(_, name)| name.clone()).collect();
    expected.sort_unstable();
    assert_eq!(present, expected);
}

/// Verification is really on: an authority that did not sign the homeserver's certificate gets nobody in.
#[test]
fn a_real_homeserver_must_prove_its_name() {
    let Some(real) = Neighbours::get() else { return };
    let service = real
        .livekit
        .setup(&[&real.home.name])
        .env("SSL_CERT_FILE", &Ca::untrusted().file().to_string_lossy())
        .start();
    let body = real.home.register("alice").get_token(&unique_room());
    let answer = service.post("/get_token", &body);
    answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
    service.wait_line_of(&answer).says(&["WARN", "certificate", &real.home.name]);
    assert_not_logged(&service, &[&body]);
}

#[test]
fn a_restricted_user_comes_in_once_a_full_access_user_has_opened_the_room() {
    let Some(real) = Neighbours::get() else { return };
    let service = real.livekit.setup(&[&real.home.name]).start();
    let (alice, bob) = (real.home.register("alice"), real.away.register("bob"));
    let room = alice.create_room();
    for (path, body) in [("/get_token", bob.get_token(&room)), ("/sfu/get", bob.sfu_get(&room))] {
        let answer = service.post(path, &body);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        assert!(
            real.livekit.room(&alias(&room, SLOT)).is_none(),
            "a restricted user opened the room on {path}"
        );
        let why = Client::refused(&answer.json());
        assert!(
            why.contains("404") && why.contains("requested room does not exist"),
            "refused for another reason: {why}"
        );
    }
    let early = service.post("/get_token", &bob.get_token(&room)).json();
    assert_eq!(service.post("/get_token", &alice.get_token(&room)).status, 200);
    assert!(
        real.livekit.room(&alias(&room, SLOT)).is_some(),
        "the room does not stand after a full-access user's request"
    );
    let (_client, name) = Client::join(&early);
    assert_eq!(name, identity(&bob.id, &bob.device, "member1"));
}

#[test]
fn nobody_comes_in_under_a_false_name() {
    let Some(real) = Neighbours::get() else { return };
    let rogue = Homeserver::start();
    let service = real.livekit.setup(&[&real.home.name, &real.away.name, &rogue.name]).start();
    let (alice, bob) = (real.home.register("alice"), real.away.register("bob"));
    let room = unique_room();
    let (of_alice, of_bob) = (alice.get_token(&room), bob.get_token(&room));
    let legacy_of_bob = bob.sfu_get(&room);
    let at_home = Some(json!(real.home.name));
    let claims_to_be_alice = rogue.token_of(&alice.id);
    let cases = [
        (
            "a made-up token",
            "/get_token",
            with(&of_alice, "/openid_token/access_token", Some(json!("madeupmadeupmadeupmadeup"))),
            "token_rejected",
        ),
        (
            "a made-up token, legacy",
            "/sfu/get",
            with(
                &legacy_of_bob,
                "/openid_token/access_token",
                Some(json!("madeupmadeupmadeupmadeup")),
            ),
            "token_rejected",
        ),
        (
            "B's token as one of A",
            "/get_token",
            with(&of_bob, "/openid_token/matrix_server_name", at_home.clone()),
            "token_rejected",
        ),
        (
            "B's token as one of A, legacy",
            "/sfu/get",
            with(&legacy_of_bob, "/openid_token/matrix_server_name", at_home),
            "token_rejected",
        ),
        (
            "B's token for a user of A",
            "/get_token",
            with(&of_bob, "/member/claimed_user_id", Some(json!(alice.id))),
            "user_mismatch",
        ),
        (
            "B's token for another user of B",
            "/get_token",
            with(
                &of_bob,
                "/member/claimed_user_id",
                Some(json!(format!("@nobody:{}", real.away.name))),
            ),
            "user_mismatch",
        ),
        (
            "a homeserver whose userinfo names a user of A",
            "/get_token",
            bodies::get_token(&room, &rogue.name, &claims_to_be_alice, &alice.id),
            "user_mismatch",
        ),
        (
            "a homeserver whose userinfo names a user of A, legacy",
            "/sfu/get",
            bodies::sfu_get(&room, &rogue.name, &claims_to_be_alice),
            "user_mismatch",
        ),
    ];
    for (case, path, body, reason) in &cases {
        let answer = service.post(path, body);
        assert_eq!(answer.status, 401, "{case}: {}", answer.text());
        answer.assert_error(401, "M_UNAUTHORIZED", UNAUTHORISED);
        assert_eq!(answer.field("reason"), *reason, "{case}");
        assert!(answer.took.as_secs() < 5, "{case}: answered after {:?}", answer.took);
    }
    assert!(rogue.asked() > 0, "the rogue homeserver was not even asked");
    assert!(
        real.livekit.room(&alias(&room, SLOT)).is_none(),
        "a room was opened for somebody unknown"
    );
    // The very same tokens are good where they belong.
    for body in [&of_alice, &of_bob] {
        assert_eq!(service.post("/get_token", body).status, 200);
    }
    assert_not_logged(&service, &[&of_alice, &of_bob, &legacy_of_bob]);
}
