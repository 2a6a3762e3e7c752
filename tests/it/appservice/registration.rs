//! `lk-jwt-service generate-registration`, and that the service takes what it prints.

use std::time::Duration;

use yaml_rust2::{Yaml, YamlLoader};

use super::{GET_TOKEN, Stage, traced};
use crate::support::own_homeserver::OwnHomeserver;
use crate::support::process::directory;
use crate::support::service::Setup;
use crate::support::sfu::Sfu;

/// Runs it to its end; exit code, stdout and stderr.
fn run(words: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let setup = Setup::bare().unset("LIVEKIT_JWT_BIND").unset("LIVEKIT_LOG_LEVEL");
    let setup = words
        .iter()
        .fold(setup.argument("generate-registration"), |setup, word| setup.argument(word));
    let setup = environment.iter().fold(setup, |setup, (name, value)| setup.env(name, value));
    let service = setup.spawn();
    let status = service.wait_exit(Duration::from_secs(20));
    (status.code(), service.stdout(), service.log())
}

fn parsed(text: &str) -> Yaml {
    YamlLoader::load_from_str(text).expect("YAML").remove(0)
}

#[test]
fn it_prints_a_registration_with_other_tokens_each_time() {
    let mut tokens = std::collections::BTreeSet::new();
    for _ in 0..3 {
        let (code, stdout, stderr) = run(&["example.com", "http://lk:8080"], &[]);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        let yaml = parsed(&stdout);
        for key in ["as_token", "hs_token"] {
            let token = yaml[key].as_str().expect("a token").to_owned();
            assert!(token.len() >= 32, "{token}");
            tokens.insert(token);
        }
        assert_eq!(yaml["io.element.msc4512.proxy_url"].as_str(), Some("http://lk:8080"));
    }
    assert_eq!(tokens.len(), 6);
}

#[test]
fn what_cannot_work_is_said_on_stderr_with_a_failure() {
    type Case = (&'static [&'static str], &'static [(&'static str, &'static str)], &'static str);
    let cases: [Case; 5] = [
        (&[], &[], "LIVEKIT_HS_SERVER_NAME"),
        (&["https://example.com"], &[], "https://example.com"),
        (&["example.com", "lk:8080"], &[], "lk:8080"),
        (&["example.com"], &[("LIVEKIT_AS_TOKEN", "two words")], "LIVEKIT_AS_TOKEN"),
        (&["example.com", "http://lk:8080", "more"], &[], "more"),
    ];
    for (words, environment, named) in cases {
        let (code, stdout, stderr) = run(words, environment);
        assert!(code.is_some_and(|code| code != 0), "{words:?}: {code:?}");
        assert_eq!(stdout, "", "{words:?}");
        assert!(stderr.contains(named), "{words:?}: {stderr}");
        assert!(!stderr.contains("two words"), "a token in {stderr}");
    }
}

#[test]
fn the_environment_is_enough() {
    let environment = [("LIVEKIT_HS_SERVER_NAME", "example.com"), ("LIVEKIT_JWT_BIND", ":9090")];
    let (code, stdout, stderr) = run(&[], &environment);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(parsed(&stdout)["proxy_url"].as_str(), Some("http://localhost:9090"));
}

#[test]
fn the_service_takes_what_it_prints() {
    let (own, sfu) = (OwnHomeserver::start(), Sfu::start());
    // The tokens of the fake, so that it is the one that knows them.
    let tokens = [
        ("LIVEKIT_AS_TOKEN", own.as_token.as_str()),
        ("LIVEKIT_HS_TOKEN", own.hs_token.as_str()),
    ];
    let setup = Setup::bare().argument("generate-registration").argument(own.name());
    let printer = tokens.iter().fold(setup, |setup, (name, value)| setup.env(name, value)).spawn();
    assert_eq!(printer.wait_exit(Duration::from_secs(20)).code(), Some(0));
    let file = directory("registration").join("registration.yaml");
    std::fs::write(&file, printer.stdout()).expect("a file");
    // It is all that the printer is for.
    std::mem::forget(printer);
    let service = own
        .serving(traced(&sfu))
        .unset("LIVEKIT_AS_TOKEN")
        .unset("LIVEKIT_HS_TOKEN")
        .env("LIVEKIT_AS_REGISTRATION_FILE", &file.to_string_lossy())
        .start();
    let stage = Stage { service, sfu, own };
    let ask = stage.client();
    assert_eq!(ask.path, GET_TOKEN);
    assert_eq!(stage.call(&ask).status, 200);
    assert_eq!(stage.call(&stage.relayed()).status, 200);
    assert_eq!(stage.call(&stage.delegation()).status, 200);
}

/// The tokens that are in the file count, and those beside it do not.
#[test]
fn the_file_wins_over_the_variables() {
    let (own, sfu) = (OwnHomeserver::start(), Sfu::start());
    let file = directory("registration").join("registration.yaml");
    let text = format!("as_token: '{}'\nhs_token: \"{}\"\n", own.as_token, own.hs_token);
    std::fs::write(&file, text).expect("a file");
    let service = own
        .serving(traced(&sfu))
        .env("LIVEKIT_AS_TOKEN", "another")
        .env("LIVEKIT_HS_TOKEN", "another")
        .env("LIVEKIT_AS_REGISTRATION_FILE", &file.to_string_lossy())
        .start();
    let stage = Stage { service, sfu, own };
    assert_eq!(stage.call(&stage.client()).status, 200);
    let mut ask = stage.client();
    ask.authorization = Some("Bearer another".into());
    stage.call(&ask).assert_errcode(401, "M_UNKNOWN_TOKEN");
}
