//! Where people run it: in a pipe and on a terminal, beside a unit, from a laptop, without a running service; and what it never says.

use std::collections::BTreeMap;
use std::fs::write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::stack::{PUBLIC, Run, Stack};
use crate::support::ca::Ca;
use crate::support::network::in_own_network;
use crate::support::process::{self, program, real_neighbours};
use crate::support::service::binary;

/// Fails unless the document is what the schema says.
#[track_caller]
fn assert_schema(run: &Run) {
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctor.schema.json");
    let program = "import json, sys, jsonschema; jsonschema.validate(json.load(sys.stdin), json.load(open(sys.argv[1])))";
    let mut python = Command::new(process::tool("py/bin/python"))
        .args(["-c", program, schema])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python");
    std::io::Write::write_all(python.stdin.as_mut().expect("piped"), run.stdout.as_bytes()).expect("stdin");
    drop(python.stdin.take());
    let output = python.wait_with_output().expect("an end");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        run.stdout
    );
}

#[track_caller]
fn assert_result(run: &Run, check: &str, result: &str) {
    let checks = run.checks();
    let found: Vec<_> = checks
        .iter()
        .filter(|one| one["check"] == check)
        .map(|one| &one["result"])
        .collect();
    assert!(
        found.contains(&&json!(result)),
        "{check} is {found:?}:\n{}\n{}",
        run.stdout,
        run.stderr
    );
}

#[test]
fn it_works_where_people_are() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| {
        let mut stack = Stack::new();
        let mut plan = stack.healthy();
        // One fault, so that there is something to draw.
        plan.sfu["room"]["auto_create"] = json!(true);
        stack.apply(&plan);
        in_a_pipe_and_on_a_terminal(&stack);
        stack.apply(&plan);
        for_a_user(&stack);
        stack.apply(&plan);
        beside_a_unit(&stack);
        from_a_laptop(&stack);
        stack.apply(&plan);
        beside_another_instance(&stack);
        without_a_service(&mut stack);
    });
}

/// What others check of a deployment is right, too: `testmatrix` (PyPI).
#[test]
#[ignore = "needs testmatrix from PyPI: ./tests/faults"]
fn testmatrix_finds_nothing_wrong_with_calls() {
    if !real_neighbours() {
        return;
    }
    in_own_network(|| {
        let mut stack = Stack::new();
        let mut plan = stack.healthy();
        // It asks for tokens of a room that does not exist.
        plan.env.insert("LIVEKIT_REQUIRE_MEMBERSHIP", "false".to_owned());
        stack.apply(&plan);
        let (user, token) = stack.register("alice");
        let output = Command::new(process::tool("testmatrix/bin/testmatrix"))
            .args(["-u", &user, "-t", &token, "example.org"])
            .env("REQUESTS_CA_BUNDLE", Ca::trusted().file())
            .output()
            .expect("testmatrix");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        process::say(&said);
        for expected in [
            "MatrixRTC SFU configured",
            "Livekit detected via RTC transport endpoint",
            "delayed events work",
        ] {
            assert!(
                said.lines().any(|line| line.contains('✔') && line.contains(expected)),
                "no {expected:?} in\n{said}"
            );
        }
        let wrong: Vec<_> = said
            .lines()
            .filter(|line| line.contains('𐄂') && ["RTC", "SFU", "livekit", "token", "delayed"].iter().any(|word| line.contains(word)))
            .collect();
        assert!(wrong.is_empty(), "{wrong:?} in\n{said}");
    });
}

fn in_a_pipe_and_on_a_terminal(stack: &Stack) {
    let text = stack.doctor(&[]);
    assert_eq!(text.code, 1);
    for expected in [
        "SFU (livekit-server)\n",
        "  FAIL  auto-create",
        "        means  anybody",
        "          auto_create: false\n",
        "        see    README.md#sfu-auto-create\n",
        " 1 FAIL, 0 warn, ",
    ] {
        assert!(text.stdout.contains(expected), "no {expected:?} in\n{}", text.stdout);
    }
    assert!(!text.stdout.contains('\u{1b}') && text.stderr.is_empty(), "{text:?}");
    let document = stack.doctor(&["--json"]);
    assert_schema(&document);
    let hidden = stack.doctor(&["--json", "--anonymize"]);
    assert_schema(&hidden);
    assert_eq!(hidden.ids("FAIL"), ["sfu-auto-create"]);
    let shown = stack.doctor(&["--anonymize"]);
    for name in ["example.org", "8.8.4.", "127.", "livekit.example", "@"] {
        for said in [&hidden.stdout, &shown.stdout] {
            assert!(!said.contains(name), "{name} is in\n{said}");
        }
    }
    // `script` makes a terminal.
    let output = Command::new(program("script"))
        .args(["-qec", &format!("{} doctor --only sfu", binary()), "/dev/null"])
        .env_clear()
        .envs(stack.environment())
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .output()
        .expect("script");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("\u{1b}[1;31mFAIL") && shown.contains("checks made …"), "{shown}");
}

fn for_a_user(stack: &Stack) {
    let (user, token) = stack.register("alice");
    let environment = stack.environment();
    // A room that she is in: tokens are for members.
    let client = std::net::SocketAddr::from(([127, 0, 0, 1], 8009));
    let call = |path: &str, body: &Value| {
        let call = crate::support::client::Call::json(path, body).header("Authorization", &format!("Bearer {token}"));
        crate::support::client::call(client, &call)
    };
    let room = call("/_matrix/client/v3/createRoom", &json!({})).field("room_id");
    let run = stack.doctor_with(
        &environment,
        &["--json", "--user-token", "-", "--room", &room, "--only", "user"],
        Some(&token),
    );
    for check in ["access-token", "openid", "token", "join", "power-level", "transports"] {
        assert_result(&run, check, "ok");
    }
    assert!(!run.stdout.contains(&token), "the access token is in the output");
    assert!(run.stdout.contains(&user));
    let other = stack.doctor_with(&environment, &["--json", "--user-token", "-", "--only", "user"], Some("syt_nobody"));
    assert_eq!(other.ids("FAIL"), ["user-token"]);
    assert!(!other.stdout.contains("syt_nobody"));
}

fn beside_a_unit(stack: &Stack) {
    let nothing = BTreeMap::new();
    let pid = stack.service().pid.to_string();
    let run = stack.doctor_with(&nothing, &["--json", "--pid", &pid], None);
    assert_eq!(run.ids("FAIL"), ["sfu-auto-create"], "{run:?}");
    assert!(run.stdout.contains("\"made_by\": \"service\""));
    let file = stack.directory().join("service.env");
    let lines: String = stack
        .environment()
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"))
        .collect();
    write(&file, lines).expect("a file");
    let run = stack.doctor_with(&nothing, &["--json", "--env-file", &file.to_string_lossy()], None);
    assert_eq!(run.ids("FAIL"), ["sfu-auto-create"], "{run:?}");
    let run = stack.doctor_with(&nothing, &["--json", "--url", PUBLIC, "--env-file", &file.to_string_lossy()], None);
    assert!(
        run.stdout.contains("\"view\": \"outside\"") && run.stdout.contains("\"view\": \"inside\""),
        "{run:?}"
    );
}

fn from_a_laptop(stack: &Stack) {
    let trusted = Ca::trusted().file().to_string_lossy().into_owned();
    let env = BTreeMap::from([("SSL_CERT_FILE".to_owned(), trusted)]);
    let run = stack.doctor_elsewhere(&env, &["--json", "--url", PUBLIC, "--server", "example.org"]);
    assert!(run.stdout.contains("no secret is known here"), "{run:?}");
    for check in ["well-known", "entry", "routes", "cors", "federation", "openid"] {
        assert_result(&run, check, "ok");
    }
    assert_eq!((run.ids("FAIL"), run.code), (vec![], 0), "{}", run.stdout);
    let elsewhere = stack.doctor_elsewhere(&env, &["--json", "--url", "https://livekit.example.org:444", "--only", "routes"]);
    assert_eq!(elsewhere.ids("FAIL"), ["route-unreachable"], "seen from outside it is broken");
}

/// Somebody else writes leaves into the same Redis.
fn beside_another_instance(stack: &Stack) {
    let (field, value) = foreign_record();
    stack.redis().hset(&field, &value);
    let run = stack.doctor(&["--json", "--only", "store"]);
    assert_eq!(run.ids("FAIL"), ["store-shared"], "{}", run.stdout);
}

fn without_a_service(stack: &mut Stack) {
    let environment = stack.environment();
    stack.stop_service();
    let run = stack.doctor_with(&environment, &["--json"], None);
    assert!(run.stdout.contains("this process makes the checks by itself"), "{run:?}");
    assert_eq!(run.ids("FAIL")[..], ["route-gateway", "sfu-auto-create"], "{}", run.stdout);
    assert_result(&run, "webhook", "skip");
    assert_schema(&run);
}

/// A leave that another instance has taken over.
fn foreign_record() -> (String, String) {
    let job = json!({
        "Params": {
            "DelayId": "syd_1", "DelayTimeout": 3_600_000_000_000_u64, "ServerName": "example.org",
            "LiveKitRoom": "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs", "LiveKitIdentity": "@a:example.org:DEV",
        },
        "RestartedAt": "2126-07-23T09:28:51.123456789Z",
    });
    (
        json!(["krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs", "@a:example.org:DEV"]).to_string(),
        job.to_string(),
    )
}
