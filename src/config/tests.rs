//! The whole of the configuration; below, what concerns one notion each.

use std::cell::RefCell;
use std::io;

use super::*;

mod addresses;
mod app_service;
mod keys;
mod lists;
mod mistakes;
mod policy;
mod wrappers;

type Pairs<'a> = &'a [(&'a str, &'a str)];
type Outcome = Result<(Config, Vec<String>), ConfigErrors>;

const SECRET: &str = "hunter2-hunter2-hunter2-hunter2-hunter2";

/// What every start needs.
const BASE: [(&str, &str); 4] = [
    ("LIVEKIT_URL", "wss://livekit.example.com"),
    ("LIVEKIT_KEY", "key"),
    ("LIVEKIT_SECRET", SECRET),
    ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
];

fn load_as(variables: Pairs<'_>, files: Pairs<'_>, dev: bool) -> Outcome {
    let find = |pairs: Pairs<'_>, name: &str| pairs.iter().rev().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned());
    let read = |path: &str| find(files, path).ok_or_else(|| io::ErrorKind::NotFound.into());
    let names: Vec<String> = variables.iter().map(|pair| pair.0.to_owned()).collect();
    let sources = Sources {
        get: &|name| find(variables, name),
        names: &names,
        read_file: &read,
        has_certificates: &|path| match find(files, &path.to_string_lossy()) {
            Some(text) => Ok(!text.is_empty()),
            None => Err(io::ErrorKind::NotFound.into()),
        },
    };
    Config::from_sources(sources, dev)
}

fn load(variables: Pairs<'_>, files: Pairs<'_>) -> Outcome {
    load_as(variables, files, false)
}

/// The base with changes; `"<unset>"` takes a variable away.
fn with(changes: Pairs<'_>) -> Vec<(&'static str, String)> {
    let kept = BASE.iter().filter(|pair| !changes.iter().any(|change| change.0 == pair.0));
    let kept = kept.map(|pair| (pair.0, pair.1.to_owned()));
    let set = changes.iter().filter(|change| change.1 != "<unset>");
    let names = |name: &str| {
        VARIABLES
            .iter()
            .find(|variable| variable.name == name)
            .expect("a variable of the table")
            .name
    };
    kept.chain(set.map(|change| (names(change.0), change.1.to_owned()))).collect()
}

fn load_with(changes: Pairs<'_>, files: Pairs<'_>) -> Outcome {
    let variables = with(changes);
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    load(&variables, files)
}

fn config(changes: Pairs<'_>) -> Config {
    load_with(changes, &[]).unwrap_or_else(|errors| panic!("{changes:?}: {errors}")).0
}

fn warnings(changes: Pairs<'_>) -> Vec<String> {
    load_with(changes, &[]).unwrap_or_else(|errors| panic!("{changes:?}: {errors}")).1
}

fn errors(changes: Pairs<'_>) -> String {
    load_with(changes, &[])
        .err()
        .unwrap_or_else(|| panic!("{changes:?} was accepted"))
        .to_string()
}

fn listed(names: &[&str]) -> Homeservers {
    Homeservers::Listed(names.iter().map(|name| ServerName::parse(name).unwrap()).collect())
}

fn pairs_of(config: &Config) -> Vec<(&str, &str)> {
    config
        .livekit
        .keys
        .iter()
        .map(|pair| (pair.key.as_str(), pair.secret.expose()))
        .collect()
}

#[test]
fn the_table_and_the_parser_name_the_same_variables() {
    let asked = RefCell::new(BTreeMap::<String, ()>::new());
    for variables in [&[] as Pairs<'_>, &[("LIVEKIT_KEY_FILE", "/keys")], &[("LIVEKIT_AS_TOKEN", "x")]] {
        let get = |name: &str| {
            asked.borrow_mut().insert(name.to_owned(), ());
            variables.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned())
        };
        let sources = Sources {
            read_file: &|_| Ok("key: secret".to_owned()),
            ..Sources::variables(&get)
        };
        let _ = Config::from_sources(sources, false);
    }
    // What libraries read is in the line below the table.
    let also = |name: &str| name.to_ascii_uppercase().ends_with("_PROXY") || name.starts_with("SSL_CERT_");
    let asked: Vec<String> = asked.into_inner().into_keys().filter(|name| !also(name)).collect();
    let mut table: Vec<String> = VARIABLES.iter().map(|variable| variable.name.to_owned()).collect();
    table.sort();
    assert_eq!(asked, table);
}

#[test]
fn the_defaults_are_those_of_the_table() {
    let config = config(&[]);
    assert_eq!(config.bind.to_string(), ":8080");
    assert_eq!(config.path_prefix.as_deref(), Some("/livekit/jwt"));
    assert_eq!(config.shutdown_grace, Duration::from_secs(10));
    assert_eq!(config.livekit.url, "wss://livekit.example.com");
    assert_eq!(config.livekit.api_base.as_str(), "https://livekit.example.com/");
    assert_eq!(pairs_of(&config), [("key", SECRET)]);
    assert_eq!(config.full_access, listed(&["example.com"]));
    assert_eq!(config.remote_can_publish, Homeservers::All);
    assert_eq!(config.jwt_ttl, Duration::from_secs(3600));
    assert!(config.can_update_own_metadata);
    assert!(!config.skip_tls_verification);
    assert!(config.federation_overrides.is_empty() && config.cs_api_overrides.is_empty());
    assert!(config.allowed_networks.is_empty() && config.dns_servers.is_empty());
    assert_eq!(config.log, LogSettings::default());
    assert!(config.delegated_leave.redis.is_none() && config.delegated_leave.state_path.is_none());
    assert_eq!(config.delegated_leave.sanity_check_interval, Some(Duration::from_secs(30)));
    assert_eq!(config.delegated_leave.room_watch_interval, Some(Duration::from_secs(30)));
    assert!(config.app_service.is_none());
    assert_eq!(
        config.membership,
        Membership {
            required: false,
            check_interval: Some(Duration::from_secs(30))
        }
    );
    assert_eq!(warnings(&[]), [""; 0]);

    for (name, shown) in [
        ("LIVEKIT_JWT_BIND", ":8080"),
        ("LIVEKIT_JWT_PATH_PREFIX", "/livekit/jwt"),
        ("LIVEKIT_JWT_TTL_SECONDS", "3600"),
        ("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "10"),
        ("LIVEKIT_LOG_LEVEL", "info"),
        ("LIVEKIT_LOG_FORMAT", "text"),
        ("LIVEKIT_CAN_UPDATE_OWN_METADATA", "true"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "30"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
        ("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "*"),
    ] {
        assert_eq!(
            VARIABLES.iter().find(|variable| variable.name == name).unwrap().default,
            shown,
            "{name}"
        );
    }
}

/// Decision P3, and the exceptions of P4.
#[test]
fn empty_is_unset_and_values_are_trimmed() {
    for blank in ["", " ", "\t\r\n"] {
        for Variable { name, .. } in VARIABLES {
            let required = ["LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET"].contains(name);
            let must_not_be_blank = [
                "LIVEKIT_FULL_ACCESS_HOMESERVERS",
                "LIVEKIT_ALLOWED_HOMESERVERS",
                "LIVEKIT_BLOCKED_HOMESERVERS",
            ]
            .contains(name);
            let outcome = load_with(&[(name, blank)], &[]);
            assert_eq!(outcome.is_err(), required || must_not_be_blank, "{name}={blank:?}");
            if let Ok((_, warnings)) = outcome {
                assert_eq!(warnings, [""; 0], "{name}={blank:?}");
            }
        }
    }
    let config = load_with(
        &[
            ("LIVEKIT_URL", " wss://livekit.example.com/sfu \n"),
            ("LIVEKIT_KEY", "\tkey\r\n"),
            ("LIVEKIT_SECRET", "<unset>"),
            ("LIVEKIT_SECRET_FROM_FILE", " /secret "),
            ("LIVEKIT_JWT_BIND", " :80 "),
            ("LIVEKIT_JWT_TTL_SECONDS", " 60 "),
        ],
        &[("/secret", "\u{feff} hunter2-hunter2-hunter2-hunter2-hunter2\r\n")],
    );
    let (config, _) = config.unwrap();
    assert_eq!(config.livekit.url, "wss://livekit.example.com/sfu");
    assert_eq!(pairs_of(&config), [("key", SECRET)]);
    assert_eq!(config.bind.to_string(), ":80");
}

#[test]
fn numbers_have_bounds() {
    let seconds = Duration::from_secs;
    assert_eq!(config(&[("LIVEKIT_JWT_TTL_SECONDS", "60")]).jwt_ttl, seconds(60));
    assert_eq!(config(&[("LIVEKIT_JWT_TTL_SECONDS", "86400")]).jwt_ttl, seconds(86_400));
    assert_eq!(config(&[("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "0")]).shutdown_grace, seconds(0));
    for (name, value) in [
        ("LIVEKIT_JWT_TTL_SECONDS", "59"),
        ("LIVEKIT_JWT_TTL_SECONDS", "86401"),
        ("LIVEKIT_JWT_TTL_SECONDS", "1h"),
        ("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "-1"),
        ("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "3601"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "-5"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1.5"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "+"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "30s"),
        ("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS", "x"),
        ("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "x"),
    ] {
        let text = errors(&[(name, value)]);
        assert!(
            text.starts_with(&format!("{name} must be a whole number of seconds from ")) && text.contains(&format!("not {value:?}")),
            "{text}"
        );
    }
    for (value, expected) in [
        ("0", None),
        ("+5", Some(5)),
        ("0030", Some(30)),
        ("86401", Some(86_400)),
        ("99999999999999999999", Some(86_400)),
    ] {
        let interval = |name: &'static str| load_with(&[(name, value)], &[]).unwrap();
        let expected = expected.map(seconds);
        let (config, warnings) = interval("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS");
        assert_eq!(config.delegated_leave.sanity_check_interval, expected, "{value}");
        assert_eq!(
            warnings.iter().any(|text| text.contains("is above 86400 seconds")),
            value.len() > 4,
            "{warnings:?}"
        );
        assert_eq!(
            interval("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS")
                .0
                .delegated_leave
                .room_watch_interval,
            expected
        );
        assert_eq!(
            interval("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS").0.membership.check_interval,
            expected
        );
    }
}

#[test]
fn switches() {
    for (value, expected, warned) in [
        ("true", true, 0),
        ("TRUE", true, 0),
        ("1", true, 0),
        ("false", false, 0),
        ("off", false, 0),
        ("maybe", false, 1),
    ] {
        let (config, warnings) = load_with(&[("LIVEKIT_CAN_UPDATE_OWN_METADATA", value)], &[]).unwrap();
        assert_eq!(
            (config.can_update_own_metadata, warnings.len()),
            (expected, warned),
            "{value}: {warnings:?}"
        );
    }
    for (value, expected) in [
        ("YES_I_KNOW_WHAT_I_AM_DOING", true),
        ("yes_i_know_what_i_am_doing", false),
        ("true", false),
        ("\"YES_I_KNOW_WHAT_I_AM_DOING\"", false),
    ] {
        let (config, warnings) = load_with(&[("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", value)], &[]).unwrap();
        assert_eq!(
            (config.skip_tls_verification, warnings.len()),
            (expected, 1),
            "{value}: {warnings:?}"
        );
    }
}

/// What charts set shares a Redis, unless that was refused.
#[test]
fn replicas_share_where_it_is_said() {
    const REDIS: (&str, &str) = ("LIVEKIT_REDIS_URL", "redis://redis");
    const CHART: (&str, &str) = ("LIVEKIT_JWT_REPLICA_IP", "10.42.0.17");
    for (variables, sharing) in [
        (&[][..], Sharing::No),
        (&[REDIS], Sharing::No),
        (&[CHART], Sharing::No),
        (&[REDIS, CHART], Sharing::May),
        (&[REDIS, ("LIVEKIT_REDIS_SHARED", "on")], Sharing::Must),
        (&[REDIS, CHART, ("LIVEKIT_REDIS_SHARED", "true")], Sharing::Must),
        (&[REDIS, CHART, ("LIVEKIT_REDIS_SHARED", "false")], Sharing::No),
    ] {
        assert_eq!(config(variables).delegated_leave.sharing, sharing, "{variables:?}");
    }
    assert!(errors(&[CHART, ("LIVEKIT_REDIS_SHARED", "true")]).contains("needs a Redis"));
    assert!(errors(&[REDIS, CHART, ("LIVEKIT_REDIS_SHARED", "maybe")]).contains("must be true or false"));
}

#[test]
fn logging_never_stops_a_start() {
    use tracing::level_filters::LevelFilter;
    for (changes, level, format, warned) in [
        (
            &[("LIVEKIT_LOG_LEVEL", "WARNING")] as Pairs<'_>,
            LevelFilter::WARN,
            LogFormat::Text,
            0,
        ),
        (
            &[("LIVEKIT_LOG_LEVEL", "Debug"), ("LIVEKIT_LOG_FORMAT", "JSON")],
            LevelFilter::DEBUG,
            LogFormat::Json,
            0,
        ),
        (
            &[("LIVEKIT_LOG_LEVEL", "loud"), ("LIVEKIT_LOG_FORMAT", "xml")],
            LevelFilter::INFO,
            LogFormat::Text,
            2,
        ),
        (&[("RUST_LOG", "debug")], LevelFilter::DEBUG, LogFormat::Text, 0),
        (
            &[("RUST_LOG", "debug"), ("LIVEKIT_LOG_LEVEL", "error")],
            LevelFilter::ERROR,
            LogFormat::Text,
            0,
        ),
        (&[("RUST_LOG", "a[b]=info,=debug,a=loud")], LevelFilter::INFO, LogFormat::Text, 3),
    ] {
        let (config, warnings) = load_with(changes, &[]).unwrap();
        assert_eq!(
            (config.log.level, config.log.format, warnings.len()),
            (level, format, warned),
            "{changes:?}: {warnings:?}"
        );
    }
    let targets = config(&[("RUST_LOG", "info, lk-jwt-service::federation=debug,hickory_resolver,hyper=off")])
        .log
        .targets;
    let expected = [
        ("lk_jwt_service::federation", LevelFilter::DEBUG),
        ("hickory_resolver", LevelFilter::TRACE),
        ("hyper", LevelFilter::OFF),
    ];
    assert_eq!(targets, expected.map(|(target, level)| (target.to_owned(), level)));
}

/// Decision P13.
#[test]
fn dev_fills_what_is_unset() {
    let (config, warnings) = load_as(&[], &[], true).unwrap();
    assert_eq!(
        (config.livekit.url.as_str(), config.livekit.api_base.as_str()),
        ("ws://localhost:7880", "http://localhost:7880/")
    );
    assert_eq!(pairs_of(&config), [("devkey", "secret")]);
    assert_eq!(config.full_access, Homeservers::All);
    assert!(warnings.len() == 1 && warnings[0].contains("not for production"), "{warnings:?}");

    let set = [BASE[0], BASE[1], BASE[2], BASE[3], ("LIVEKIT_JWT_PORT", "6080")];
    let (config, _) = load_as(&set, &[], true).unwrap();
    assert_eq!(config.livekit.url, "wss://livekit.example.com");
    assert_eq!(pairs_of(&config), [("key", SECRET)]);
    assert_eq!(config.full_access, listed(&["example.com"]));
    assert!(load_as(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "")], &[], true).is_err());
}

/// Decision P21.
#[test]
fn the_summary_says_what_it_runs_with_and_no_secret() {
    let plain = config(&[]).summary();
    assert_eq!((plain.store.as_str(), plain.mode.as_str()), ("memory", "standalone"));
    assert_eq!(
        (
            plain.full_access.as_str(),
            plain.remote_can_publish.as_str(),
            plain.membership.as_str()
        ),
        ("example.com", "*", "not checked")
    );
    assert_eq!(
        (plain.path_prefix.as_str(), plain.cs_api_overrides.as_str()),
        ("/livekit/jwt", "none")
    );
    assert!(plain.tls_verification && plain.jwt_ttl_seconds == 3600);
    let full = config(&[
        ("LIVEKIT_URL", "wss://user:hunter2@livekit.example.com/sfu?key=hunter2"),
        ("LIVEKIT_REDIS_URL", "rediss://me:hunter2@redis:6380/1"),
        ("LIVEKIT_REDIS_PASSWORD", "hunter2"),
        ("LIVEKIT_HS_SERVER_NAME", "example.com"),
        ("LIVEKIT_AS_TOKEN", "hunter2-as"),
        ("LIVEKIT_HS_TOKEN", "hunter2-hs"),
        ("LIVEKIT_CS_API_URL_OVERRIDES", "example.com=http://synapse:8008"),
        ("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "b.example c.example"),
        ("LIVEKIT_JWT_PATH_PREFIX", "/"),
        ("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS", "0"),
        ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
    ])
    .summary();
    for (shown, expected) in [
        (&full.livekit_url, "wss://livekit.example.com/sfu"),
        (&full.livekit_api, "https://livekit.example.com/sfu/"),
        (&full.store, "rediss://redis:6380"),
        (&full.mode, "application service of example.com"),
        (&full.membership, "required everywhere, participants checked: every 30 s"),
        (&full.cs_api_overrides, "example.com=http://synapse:8008/"),
        (&full.remote_can_publish, "b.example, c.example"),
        (&full.path_prefix, "none"),
        (&full.sfu_checks, "participants every 30 s, rooms off"),
    ] {
        assert_eq!(shown, expected);
    }
    assert!(!full.tls_verification && !format!("{full:?}").contains("hunter2"), "{full:?}");
}
