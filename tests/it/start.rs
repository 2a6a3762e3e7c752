//! The command line, and what a wrong configuration says (decisions P1 to P13).

use std::path::Path;
use std::time::Duration;

use crate::support::client::Connection;
use crate::support::secrets;
use crate::support::service::{Service, Setup};
use crate::support::sfu::Sfu;

const VARIABLES: &[&str] = &[
    "LIVEKIT_URL",
    "LIVEKIT_API_URL",
    "LIVEKIT_KEY",
    "LIVEKIT_SECRET",
    "LIVEKIT_KEY_FROM_FILE",
    "LIVEKIT_SECRET_FROM_FILE",
    "LIVEKIT_KEY_FILE",
    "LIVEKIT_FULL_ACCESS_HOMESERVERS",
    "LIVEKIT_JWT_BIND",
    "LIVEKIT_JWT_PATH_PREFIX",
    "LIVEKIT_JWT_TTL_SECONDS",
    "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS",
    "LIVEKIT_CS_API_URL_OVERRIDES",
    "LIVEKIT_FEDERATION_URL_OVERRIDES",
    "LIVEKIT_FEDERATION_ALLOWED_NETWORKS",
    "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS",
    "LIVEKIT_CAN_UPDATE_OWN_METADATA",
    "LIVEKIT_REDIS_URL",
    "LIVEKIT_REDIS_SHARED",
    "LIVEKIT_JWT_REPLICA_IP",
    "LIVEKIT_LOG_LEVEL",
    "LIVEKIT_LOG_FORMAT",
    "LIVEKIT_SHUTDOWN_GRACE_SECONDS",
    "LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS",
    "LIVEKIT_HS_SERVER_NAME",
    "RUST_LOG",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTPS_PROXY",
    "NO_PROXY",
    // Older names.
    "LIVEKIT_API_KEY",
    "LIVEKIT_API_SECRET",
    "LIVEKIT_LOCAL_HOMESERVERS",
    "LIVEKIT_JWT_PORT",
    "LK_JWT_PORT",
    "LIVEKIT_SECRET_FILE",
];

/// Runs it to its end.
fn run(setup: Setup) -> (Service, i32) {
    let service = setup.spawn();
    let status = service.wait_exit(Duration::from_secs(10));
    let code = status.code().unwrap_or_else(|| panic!("ended by a signal: {status}"));
    (service, code)
}

/// What is wrong is what a start says, word by word, and nothing is begun; the code with which `check-config` ends.
#[track_caller]
pub(crate) fn assert_check_config_says_the_same(what: &str, setup: &Setup) -> i32 {
    let (checked, code) = run(setup.clone().argument("check-config"));
    if code != 0 {
        let (started, failed) = run(setup.clone());
        let words = |service: &Service| {
            let log = service.log();
            let lines = log.lines().map(|line| match serde_json::from_str::<serde_json::Value>(line) {
                Ok(object) => format!("{:?} {}", object["variable"], object["message"]),
                Err(_) => line.to_owned(),
            });
            lines.collect::<Vec<_>>()
        };
        assert_eq!((code, words(&checked)), (failed, words(&started)), "{what}");
        assert_eq!(checked.stdout(), "", "{what}");
    }
    code
}

#[test]
fn help_lists_every_variable() {
    for argument in ["--help", "-h"] {
        let (service, code) = run(Setup::bare().unset("LIVEKIT_JWT_BIND").argument(argument));
        assert_eq!((code, service.log().as_str()), (0, ""), "{argument}");
        let help = service.stdout();
        for variable in VARIABLES {
            assert!(help.contains(variable), "{variable} is missing from {argument}:\n{help}");
        }
        for default in ["8080", "3600", "/livekit/jwt"] {
            assert!(help.contains(default), "the default {default} is missing from {argument}:\n{help}");
        }
    }
}

#[test]
fn version_is_that_of_the_package() {
    for argument in ["--version", "-V"] {
        let (service, code) = run(Setup::bare().argument(argument));
        assert_eq!(
            (code, service.stdout()),
            (0, format!("lk-jwt-service {}\n", env!("CARGO_PKG_VERSION"))),
            "{argument}"
        );
    }
}

#[test]
fn an_argument_that_nobody_knows_is_no_way_to_start() {
    let (service, code) = run(Setup::new(&Sfu::start()).argument("--nonsense"));
    assert_ne!(code, 0);
    assert!(
        service.log().contains("--nonsense") && service.log().contains("--help"),
        "{}",
        service.log()
    );
}

#[test]
fn dev_needs_no_environment_and_is_not_for_production() {
    let service = Setup::bare().argument("--dev").start();
    let line = service.wait_event("listening");
    line.says(&["livekit_url=\"ws://localhost:7880\""]);
    assert!(service.warns_of(&["--dev", "not for production"]));
    // What is set wins over what is filled in.
    let sfu = Sfu::start();
    let home = crate::support::homeserver::Homeserver::start();
    let service = Setup::new(&sfu).full_access(&[&home]).argument("--dev").start();
    let body = crate::support::bodies::sfu_get_of(&home, "alice", &crate::support::unique_room());
    let answer = service.post("/sfu/get", &body);
    assert_eq!((answer.status, answer.field("url")), (200, sfu.url()), "{}", answer.text());
}

#[test]
fn all_mistakes_are_told_at_once_whatever_the_log_level() {
    for level in ["error", "warn", "info", "debug", "ERROR", "nonsense"] {
        for format in ["text", "json"] {
            let secret = secrets::sfu_secret();
            let setup = Setup::bare()
                .env("LIVEKIT_LOG_LEVEL", level)
                .env("LIVEKIT_LOG_FORMAT", format)
                .env("LIVEKIT_URL", "sfu.example.org")
                .env("LIVEKIT_SECRET", &secret)
                .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", ",")
                .env("LIVEKIT_JWT_PORT", "8081")
                .env("LIVEKIT_JWT_TTL_SECONDS", "1")
                .env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1.5")
                .env("LIVEKIT_CS_API_URL_OVERRIDES", "example.org")
                .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.0.0.0/99")
                .env("LIVEKIT_REDIS_URL", "redis://user:redispasswordNEVERLOG@host:port/")
                .env("RUST_LOG", "off")
                .secret("redispasswordNEVERLOG");
            assert_eq!(assert_check_config_says_the_same(level, &setup), 1);
            let (service, code) = run(setup);
            assert_eq!(code, 1, "{level}: {}", service.log());
            for variable in [
                "LIVEKIT_URL",
                "LIVEKIT_KEY",
                "LIVEKIT_FULL_ACCESS_HOMESERVERS",
                "LIVEKIT_JWT_BIND",
                "LIVEKIT_JWT_PORT",
                "LIVEKIT_JWT_TTL_SECONDS",
                "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS",
                "LIVEKIT_CS_API_URL_OVERRIDES",
                "LIVEKIT_FEDERATION_ALLOWED_NETWORKS",
                "LIVEKIT_REDIS_URL",
            ] {
                assert!(
                    service.log().contains(variable),
                    "{level}: {variable} is not named:\n{}",
                    service.log()
                );
            }
        }
    }
}

/// One change to a good environment each; a value of `None` unsets. The error must name the variable.
#[test]
fn each_mistake_names_its_variable_and_binds_no_port() {
    let sfu = Sfu::start();
    let list = "LIVEKIT_FULL_ACCESS_HOMESERVERS";
    let cases: &[(&str, Option<&str>)] = &[
        ("LIVEKIT_URL", None),
        ("LIVEKIT_URL", Some("")),
        ("LIVEKIT_URL", Some("  ")),
        ("LIVEKIT_URL", Some("sfu.example.org")),
        ("LIVEKIT_URL", Some("ftp://sfu.example.org")),
        ("LIVEKIT_URL", Some("ws://")),
        ("LIVEKIT_URL", Some("wss:sfu")),
        ("LIVEKIT_API_URL", Some("sfu:7880")),
        ("LIVEKIT_KEY", None),
        ("LIVEKIT_KEY", Some(" \n")),
        ("LIVEKIT_SECRET", None),
        ("LIVEKIT_SECRET", Some("")),
        ("LIVEKIT_KEY_FILE", Some("/nonexistent/keys")),
        ("LIVEKIT_SECRET_FROM_FILE", Some("/nonexistent/secret")),
        (list, Some("")),
        (list, Some(" ")),
        (list, Some(",")),
        (list, Some(" , ,\n")),
        ("LIVEKIT_JWT_BIND", Some("127.0.0.1:99999")),
        ("LIVEKIT_JWT_BIND", Some("nonsense")),
        ("LIVEKIT_JWT_BIND", Some("[::1:80")),
        ("LIVEKIT_JWT_TTL_SECONDS", Some("59")),
        ("LIVEKIT_JWT_TTL_SECONDS", Some("86401")),
        ("LIVEKIT_JWT_TTL_SECONDS", Some("1h")),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", Some("-1")),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", Some("1.5")),
        ("LIVEKIT_CS_API_URL_OVERRIDES", Some("a")),
        ("LIVEKIT_CS_API_URL_OVERRIDES", Some("a=b,")),
        ("LIVEKIT_CS_API_URL_OVERRIDES", Some("=b")),
        ("LIVEKIT_FEDERATION_URL_OVERRIDES", Some("a=")),
        ("LIVEKIT_FEDERATION_URL_OVERRIDES", Some("a=ftp://b")),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", Some("10.0.0.0/33")),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", Some("lan")),
        ("LIVEKIT_SHUTDOWN_GRACE_SECONDS", Some("soon")),
        ("LIVEKIT_REDIS_URL", Some("http://host")),
        ("LIVEKIT_REDIS_URL", Some("redis://:redispasswordNEVERLOG@h:x")),
    ];
    for (variable, value) in cases {
        let setup = Setup::new(&sfu).secret("redispasswordNEVERLOG");
        let setup = match value {
            Some(value) => setup.env(variable, value),
            None => setup.unset(variable),
        };
        let what = format!("{variable}={value:?}");
        assert_eq!(assert_check_config_says_the_same(&what, &setup), 1, "{what}");
        let (service, code) = run(setup);
        assert_eq!(code, 1, "{what}: {}", service.log());
        assert!(
            service.log().contains(variable),
            "{variable}={value:?} is not named:\n{}",
            service.log()
        );
        assert!(
            Connection::open(service.address()).is_err(),
            "{variable}={value:?}: the port is open"
        );
    }
}

#[test]
fn a_port_in_use_is_an_error_that_says_so() {
    let sfu = Sfu::start();
    let first = Setup::new(&sfu).start();
    let second = Setup::new(&sfu)
        .env("LIVEKIT_JWT_BIND", &first.address().to_string())
        .env("LIVEKIT_LOG_LEVEL", "error");
    let (second, code) = run(second);
    assert_eq!(code, 1);
    assert!(
        second.log().contains("LIVEKIT_JWT_BIND") && second.log().contains(&first.address().to_string()),
        "{}",
        second.log()
    );
}

#[test]
fn everybody_has_full_access_only_with_a_warning() {
    let sfu = Sfu::start();
    let service = Setup::new(&sfu).unset("LIVEKIT_FULL_ACCESS_HOMESERVERS").start();
    assert!(service.warns_of(&["LIVEKIT_FULL_ACCESS_HOMESERVERS"]));
    let mixed = Setup::new(&sfu).env("LIVEKIT_FULL_ACCESS_HOMESERVERS", "* example.org").start();
    assert!(mixed.warns_of(&["LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"]));
}

/// Key and secret by every way in which they can be given: each must open the same SFU.
#[test]
fn key_and_secret_come_from_where_they_are() {
    let sfu = Sfu::start();
    let home = crate::support::homeserver::Homeserver::start();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("keys-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_string_lossy().into_owned()
    };
    let (key, secret) = (sfu.key(), sfu.secret());
    let key_file = file("key", &format!("{key}\n"));
    let secret_file = file("secret", &format!(" {secret} \r\n"));
    let ways: Vec<Vec<(&str, String)>> = vec![
        vec![("LIVEKIT_KEY", format!(" {key}\n")), ("LIVEKIT_SECRET", format!("{secret}\n"))],
        vec![("LIVEKIT_API_KEY", key.into()), ("LIVEKIT_API_SECRET", secret.into())],
        vec![
            ("LIVEKIT_KEY_FROM_FILE", key_file.clone()),
            ("LIVEKIT_SECRET_FROM_FILE", secret_file.clone()),
        ],
        vec![("LIVEKIT_KEY", key.into()), ("LIVEKIT_SECRET_FROM_FILE", secret_file.clone())],
        vec![("LIVEKIT_KEY_FILE", key_file.clone()), ("LIVEKIT_SECRET_FILE", secret_file.clone())],
        vec![("LIVEKIT_KEY_FILE", file("one", &format!("{key}: {secret}\n")))],
        vec![("LIVEKIT_KEY_FILE", file("bare", &format!("{key}:{secret}")))],
        vec![(
            "LIVEKIT_KEY_FILE",
            file(
                "yaml",
                &format!("# keys\n\"{key}\": '{secret}'  # the first signs\nother: othersecret:with:colons\n"),
            ),
        )],
        vec![
            ("LIVEKIT_KEY_FILE", file("wins", &format!("{key}: {secret}\n"))),
            ("LIVEKIT_KEY", "no".into()),
            ("LIVEKIT_SECRET", "no".into()),
        ],
    ];
    for way in ways {
        let mut setup = Setup::new(&sfu)
            .full_access(&[&home])
            .unset("LIVEKIT_KEY")
            .unset("LIVEKIT_SECRET")
            .secret("othersecret");
        for (name, value) in &way {
            setup = setup.env(name, value);
        }
        let names: Vec<_> = way.iter().map(|(name, _)| *name).collect();
        let service = setup.start();
        let answer = service.post(
            "/sfu/get",
            &crate::support::bodies::sfu_get_of(&home, "alice", &crate::support::unique_room()),
        );
        assert_eq!(answer.status, 200, "{names:?}: {}", answer.text());
    }
    let _ = std::fs::remove_dir_all(&directory);
}
