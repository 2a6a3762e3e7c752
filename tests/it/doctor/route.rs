//! `POST /doctor`: who may ask, how often, and what a stranger can make of it (nothing).

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lk_jwt_service::internals::doctor::{TicketKey, Use, Wishes};
use lk_jwt_service::secret::Secret;
use serde_json::{Value, json};

use crate::support::bodies;
use crate::support::client::{Answer, Call};
use crate::support::homeserver::Homeserver;
use crate::support::jwt::Jwt;
use crate::support::service::{Setup, binary};
use crate::support::sfu::Sfu;
use crate::support::world::World;
use crate::support::{unique, unique_room};

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// A ticket as the command makes it, at another time or for another use.
fn ticket(secret: &str, purpose: Use, now: u64, wishes: Wishes) -> String {
    TicketKey::derive(&Secret::new(secret)).sign(purpose, &format!("ticket-of-a-test-{:016}", unique()), &wishes, now)
}

/// A run that costs little: the store alone is looked at.
fn short() -> Wishes {
    Wishes {
        only: vec![lk_jwt_service::internals::doctor::Group::Store],
        ..Wishes::default()
    }
}

fn ask(bearer: &str) -> Call {
    Call::post("/doctor", "").header("Authorization", &format!("Bearer {bearer}"))
}

/// The findings of an answer, one object a line.
fn lines(answer: &Answer) -> Vec<Value> {
    answer
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn who_knows_the_secret_is_answered_and_nobody_twice_with_one_ticket() {
    let world = World::new();
    let good = ticket(world.sfu.secret(), Use::Run, now(), short());
    let answer = world.service.call(&ask(&good));
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/x-ndjson")));
    let lines = lines(&answer);
    assert_eq!(lines[0]["id"], "store-memory", "{lines:?}");
    assert_eq!(lines.last(), Some(&json!({"end": null})));
    world.service.call(&ask(&good)).assert_error(401, "M_UNAUTHORIZED", DENIED);
    // Below the prefix too, and six a minute.
    let again = || ticket(world.sfu.secret(), Use::Run, now(), short());
    let call = Call::post("/livekit/jwt/doctor", "").header("Authorization", &format!("Bearer {}", again()));
    assert_eq!(world.service.call(&call).status, 200);
    for _ in 0..4 {
        assert_eq!(world.service.call(&ask(&again())).status, 200);
    }
    let refused = world.service.call(&ask(&again()));
    refused.assert_error(429, "M_LIMIT_EXCEEDED", "One run at a time, six a minute");
    assert!(
        refused
            .header("retry-after")
            .is_some_and(|wait| (1..=60).contains(&wait.parse().unwrap_or(0)))
    );
}

const DENIED: &str = "The request could not be authorised.";

#[test]
fn nobody_else_makes_it_do_anything() {
    let (sfu, stranger) = (Sfu::start(), Homeserver::start());
    let service = Setup::new(&sfu).start();
    let secret = sfu.secret();
    let claims = json!({"aud": "lk-jwt-service/doctor", "iat": now(), "exp": now() + 60, "jti": "0123456789abcdef0123"});
    let token_of_the_sfu = Jwt::sign(&claims, secret);
    let forged = [
        String::new(),
        "nonsense".to_owned(),
        token_of_the_sfu,
        ticket("another secret that nobody has told", Use::Run, now(), Wishes::default()),
        ticket(secret, Use::Run, now() - 61, Wishes::default()),
        ticket(secret, Use::Run, now() + 120, Wishes::default()),
        ticket(secret, Use::Who, now(), Wishes::default()),
        ticket(secret, Use::Slow, now(), Wishes::default()),
    ];
    // The check at the start is over.
    service.wait_event("sfu_up");
    let creations = sfu.creations();
    let body = json!({"servers": [stranger.name], "wishes": {"servers": [stranger.name]}, "url": format!("https://{}", stranger.name)});
    let calls: Vec<_> = (0..2_000)
        .map(|n| {
            let target = if n % 2 == 0 { "/doctor" } else { "/livekit/jwt/doctor/" };
            Call::json(target, &body).header("Authorization", &format!("Bearer {}", forged[n % forged.len()]))
        })
        .collect();
    let answers = service.flood(&calls, 50);
    let strip = |answer: &Answer| {
        let mut body = answer.json();
        body.as_object_mut().expect("an object").remove("request_id");
        (answer.status, body)
    };
    let constant = json!({"errcode": "M_UNAUTHORIZED", "error": DENIED, "reason": "not_allowed"});
    for answer in &answers {
        assert_eq!(strip(answer), (401, constant.clone()));
    }
    assert_eq!(
        (stranger.http.connections().len(), sfu.creations()),
        (0, creations),
        "somebody was asked"
    );
    // A body that never comes is not waited for.
    let mut connection = service.connect();
    connection.send(b"POST /doctor HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n");
    let began = Instant::now();
    assert_eq!(connection.answer().map(|answer| answer.status), Some(401));
    assert!(began.elapsed() < Duration::from_secs(5));
    // Not even the holder of a ticket names a host in the body.
    let good = ticket(
        secret,
        Use::Run,
        now(),
        Wishes {
            only: vec![],
            ..Wishes::default()
        },
    );
    let answer = service.call(&Call::json("/doctor", &body).header("Authorization", &format!("Bearer {good}")));
    assert_eq!(answer.status, 200);
    assert!(!answer.text().contains(&stranger.name));
    assert_eq!(stranger.http.connections().len(), 0, "the body named a host");
    assert_eq!(service.get("/doctor").status, 405);
}

#[test]
fn a_run_takes_no_place_of_a_call() {
    let world = World::new();
    let slow = ticket(world.sfu.secret(), Use::Run, now(), Wishes::default());
    let running = world.service.begin(&ask(&slow));
    let room = unique_room();
    let answer = world.service.post("/get_token", &bodies::get_token_of(&world.home, "alice", &room));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(running.join().expect("a thread").map(|answer| answer.status), Some(200));
}

#[test]
fn only_a_ticket_is_told_which_instance_answers() {
    let world = World::new();
    let by = |header: Option<String>| {
        let mut call = Call::json("/get_token", &json!({}));
        if let Some(header) = header {
            call = call.header("X-Lk-Jwt-Doctor", &header);
        }
        let answer = crate::support::client::call(world.service.address(), &call);
        assert_eq!(answer.status, 400);
        answer.header("x-served-by").unwrap_or_default().to_owned()
    };
    let who = |secret: &str, purpose| Some(ticket(secret, purpose, now(), Wishes::default()));
    let told = by(who(world.sfu.secret(), Use::Who));
    assert!(told.starts_with("lk-jwt-service/") && told.contains("; instance="), "{told}");
    for stranger in [
        None,
        Some("x".to_owned()),
        who("another", Use::Who),
        who(world.sfu.secret(), Use::Run),
    ] {
        assert_eq!(by(stranger), "lk-jwt-service");
    }
}

#[test]
fn in_dev_mode_only_this_machine_may_ask() {
    let sfu = Sfu::start();
    let service = Setup::new(&sfu)
        .env("LIVEKIT_SECRET", "secret")
        .argument("--dev")
        .secret("no such text")
        .start();
    let ask_from = |client: Option<&str>| {
        let mut call = ask(&ticket("secret", Use::Run, now(), short()));
        if let Some(client) = client {
            call = call.header("X-Forwarded-For", client);
        }
        service.call(&call).status
    };
    assert_eq!(ask_from(Some("8.8.4.4")), 401, "through a proxy on this machine");
    assert_eq!(ask_from(None), 200);
}

fn doctor(env: &[(&str, &str)], arguments: &[&str]) -> Output {
    Command::new(binary())
        .arg("doctor")
        .args(arguments)
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the service's binary")
}

#[test]
fn what_cannot_be_done_is_said_with_exit_code_2() {
    let said = |env: &[(&str, &str)], arguments: &[&str]| {
        let output = doctor(env, arguments);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    const NOBODY: [(&str, &str); 4] = [
        ("LIVEKIT_URL", "wss://livekit.invalid"),
        ("LIVEKIT_KEY", "key"),
        ("LIVEKIT_SECRET", "a-secret-of-at-least-32-characters-it-is"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
    ];
    for (env, arguments, text) in [
        (&[][..], &[][..], "LIVEKIT_URL must be set"),
        (&[], &["--nonsense"], "unexpected argument"),
        (&[], &["--only", "everything", "--url", "https://x.example"], "the groups are sfu"),
        (
            &[],
            &["--server", "a b", "--url", "https://x.example"],
            "not the name of a homeserver",
        ),
        (&[], &["--url", "wss://x.example"], "--url needs"),
        (&[], &["--env-file", "/nonexistent"], "--env-file /nonexistent"),
        // Nothing was found out: no homeserver is named.
        (&NOBODY, &["--only", "routes"], "no check could be made"),
        (&[], &["--user-token", "/nonexistent", "--url", "https://x.example"], "--user-token"),
        (&[], &["--user-token", binary(), "--url", "http://x.example"], "--user-token"),
    ] {
        let (code, stderr) = said(env, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(text), "{arguments:?}: {stderr}");
    }
    let help = doctor(&[], &["--help"]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("--anonymize"));
}

#[test]
fn another_secret_is_told_as_such_and_a_second_run_has_to_wait() {
    let world = World::new();
    let address = world.service.address().to_string();
    let env = |secret| {
        [
            ("LIVEKIT_URL", "ws://127.0.0.1:1".to_owned()),
            ("LIVEKIT_KEY", world.sfu.key().to_owned()),
            ("LIVEKIT_SECRET", secret),
            ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "nobody.example.org".to_owned()),
            ("LIVEKIT_JWT_BIND", address.clone()),
        ]
    };
    let run = |secret: String, arguments: &[&str]| {
        let env = env(secret);
        let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        doctor(&env, arguments)
    };
    let other = run("another-secret-of-at-least-32-characters".into(), &[]);
    let stderr = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(other.status.code() == Some(2) && stderr.contains("another secret"), "{stderr}");
    let good = run(world.sfu.secret().to_owned(), &["--only", "store", "--json"]);
    let document: Value = serde_json::from_slice(&good.stdout).expect("JSON");
    assert_eq!((good.status.code(), &document["made_by"]), (Some(0), &json!("service")));
    assert_eq!(
        run(world.sfu.secret().to_owned(), &["--only", "store", "--strict"]).status.code(),
        Some(1)
    );
    for _ in 0..4 {
        run(world.sfu.secret().to_owned(), &["--only", "store"]);
    }
    let late = run(world.sfu.secret().to_owned(), &["--only", "store"]);
    let stderr = String::from_utf8_lossy(&late.stderr).into_owned();
    assert!(late.status.code() == Some(2) && stderr.contains("six a minute"), "{stderr}");
}
