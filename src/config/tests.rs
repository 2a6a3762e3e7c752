//! The whole of the configuration: each rule, each alias, and the environment of each wrapper in use.

use std::cell::RefCell;
use std::io;

use super::*;

mod policy;

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

/// Decision P4.
#[test]
fn the_list_of_full_access_is_never_open_by_accident() {
    const NAME: &str = "LIVEKIT_FULL_ACCESS_HOMESERVERS";
    for (value, expected) in [
        ("*", Homeservers::All),
        (" * ", Homeservers::All),
        ("*,", Homeservers::All),
        ("a.example,b.example", listed(&["a.example", "b.example"])),
        (
            "a.example b.example,\n\tc.example:8448 ,",
            listed(&["a.example", "b.example", "c.example:8448"]),
        ),
        ("a.example,a.example", listed(&["a.example"])),
        ("[::1]:8448", listed(&["[::1]:8448"])),
        ("a.example,*", listed(&["a.example"])),
        ("a.example,https://b.example", listed(&["a.example"])),
    ] {
        assert_eq!(config(&[(NAME, value)]).full_access, expected, "{value:?}");
    }
    for value in ["", " ", ",", " , ,", "*,*", "https://example.com", "\"example.com\"", "a_b"] {
        let text = errors(&[(NAME, value)]);
        assert!(
            text.starts_with(NAME) && text.contains("example.com, or set it to * for all"),
            "{value:?}: {text}"
        );
    }
    assert!(errors(&[(NAME, "https://example.com/")]).contains("never matches, write example.com."));

    let open = load_with(&[(NAME, "<unset>")], &[]).unwrap();
    assert_eq!(open.0.full_access, Homeservers::All);
    assert!(
        open.1[0].contains("every homeserver of the federation may create rooms on your SFU"),
        "{:?}",
        open.1
    );
    assert!(open.1[0].contains("LIVEKIT_FULL_ACCESS_HOMESERVERS=example.com"), "{:?}", open.1);
    assert_eq!(warnings(&[(NAME, "*")]), [""; 0]);

    assert!(warnings(&[(NAME, "a.example,*")])[0].contains("* means all homeservers only if it stands alone"));
    for (entry, remedy) in [
        ("https://b.example", "write b.example"),
        ("https://b.example:8448/_matrix", "write b.example:8448"),
        ("'b.example'", "write b.example"),
        ("@alice:b.example", "write b.example"),
        ("https://u:p@b.example/", "write b.example"),
        ("b..é", "write it as in user IDs"),
    ] {
        let found = warnings(&[(NAME, &format!("a.example,{entry}"))]);
        assert!(
            found.len() == 1 && found[0].starts_with(NAME) && found[0].contains(remedy),
            "{entry}: {found:?}"
        );
    }
}

#[test]
fn the_old_name_of_the_list_counts_when_the_new_one_is_unset() {
    const OLD: &str = "LIVEKIT_LOCAL_HOMESERVERS";
    let (config, warnings) = load_with(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "<unset>"), (OLD, "old.example")], &[]).unwrap();
    assert_eq!(config.full_access, listed(&["old.example"]));
    assert!(
        warnings[0].contains("deprecated: rename it to LIVEKIT_FULL_ACCESS_HOMESERVERS"),
        "{warnings:?}"
    );
    assert_eq!(
        load_with(&[(OLD, "old.example")], &[]).unwrap().0.full_access,
        listed(&["example.com"])
    );
    // A failed expansion, as under the new name.
    assert!(errors(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", "<unset>"), (OLD, "")]).starts_with(OLD));
    assert!(errors(&[("LIVEKIT_FULL_ACCESS_HOMESERVERS", ""), (OLD, "old.example")]).starts_with("LIVEKIT_FULL_ACCESS"));
}

/// Decision P5.
#[test]
fn aliases_count_only_when_the_modern_name_is_unset() {
    let no_keys = [("LIVEKIT_KEY", ""), ("LIVEKIT_SECRET", "")];
    let api = [
        ("LIVEKIT_API_KEY", "api"),
        ("LIVEKIT_API_SECRET", "api-secret-api-secret-api-secret-api"),
    ];
    let (config, warnings) = load_with(&[no_keys, api].concat(), &[]).unwrap();
    assert_eq!(pairs_of(&config), [("api", "api-secret-api-secret-api-secret-api")]);
    assert_eq!(warnings, [""; 0]);
    assert_eq!(pairs_of(&load_with(&api, &[]).unwrap().0), [("key", SECRET)]);

    for (changes, bind, deprecated) in [
        (&[("LIVEKIT_JWT_PORT", "6080")] as Pairs<'_>, ":6080", true),
        (&[("LK_JWT_PORT", "6080")], ":6080", true),
        (&[("LIVEKIT_JWT_PORT", "1"), ("LK_JWT_PORT", "2")], ":1", true),
        (&[("LIVEKIT_JWT_BIND", ":1"), ("LK_JWT_PORT", "2")], ":1", false),
        (&[("LIVEKIT_JWT_BIND", ""), ("LIVEKIT_JWT_PORT", "2")], ":2", true),
        (&[("LIVEKIT_JWT_BIND", ":1"), ("LIVEKIT_JWT_PORT", " ")], ":1", false),
    ] {
        let (config, warnings) = load_with(changes, &[]).unwrap();
        assert_eq!(config.bind.to_string(), bind, "{changes:?}");
        assert_eq!(warnings.len(), usize::from(deprecated), "{changes:?}: {warnings:?}");
        assert!(
            !deprecated || warnings[0].contains(&format!("deprecated: set LIVEKIT_JWT_BIND={bind}")),
            "{warnings:?}"
        );
    }
}

/// Decision P6, the old pairs of files, and which source wins.
#[test]
fn keys_come_from_variables_and_files() {
    const LONG: &str = "file-secret-file-secret-file-secret";
    let unset = [("LIVEKIT_KEY", "<unset>"), ("LIVEKIT_SECRET", "<unset>")];
    let files = [
        ("/key", "file-key\n"),
        ("/secret", "file-secret-file-secret-file-secret\n"),
        ("/pair", "pair-key: pair-secret-pair-secret-pair-secret\n"),
        (
            "/two",
            "# keys\none: one-secret-one-secret-one-secret-one\n\"two\": 'two-secret-two-secret-two-secret-two'\n",
        ),
    ];
    let pair = ("pair-key", "pair-secret-pair-secret-pair-secret");
    let two = [
        ("one", "one-secret-one-secret-one-secret-one"),
        ("two", "two-secret-two-secret-two-secret-two"),
    ];
    for (changes, expected, warned) in [
        (
            &[("LIVEKIT_KEY_FROM_FILE", "/key"), ("LIVEKIT_SECRET_FROM_FILE", "/secret")] as Pairs<'_>,
            &[("file-key", LONG)] as Pairs<'_>,
            None,
        ),
        (
            &[("LIVEKIT_KEY", "key"), ("LIVEKIT_SECRET_FROM_FILE", "/secret")],
            &[("key", LONG)],
            None,
        ),
        (
            &[
                ("LIVEKIT_KEY", "key"),
                ("LIVEKIT_KEY_FROM_FILE", "/key"),
                ("LIVEKIT_SECRET_FROM_FILE", "/secret"),
            ],
            &[("file-key", LONG)],
            Some("LIVEKIT_KEY_FROM_FILE is set, so LIVEKIT_KEY is ignored"),
        ),
        (&[("LIVEKIT_KEY_FILE", "/pair")], &[pair], None),
        (&[("LIVEKIT_KEY_FILE", "/two")], &two, None),
        (
            &[
                ("LIVEKIT_KEY_FILE", "/pair"),
                ("LIVEKIT_KEY", "key"),
                ("LIVEKIT_SECRET_FROM_FILE", "/nowhere"),
            ],
            &[pair],
            Some("LIVEKIT_KEY_FILE is set, so LIVEKIT_KEY, LIVEKIT_SECRET_FROM_FILE is ignored"),
        ),
        (
            &[("LIVEKIT_KEY_FILE", "/key"), ("LIVEKIT_SECRET_FILE", "/secret")],
            &[("file-key", LONG)],
            Some("deprecated"),
        ),
        (
            &[("LIVEKIT_KEY", "key"), ("LIVEKIT_SECRET_FILE", "/secret")],
            &[("key", LONG)],
            Some("deprecated"),
        ),
    ] {
        let changes: Vec<_> = unset
            .iter()
            .filter(|(name, _)| !changes.iter().any(|c| c.0 == *name))
            .chain(changes)
            .copied()
            .collect();
        let (config, warnings) = load_with(&changes, &files).unwrap_or_else(|errors| panic!("{changes:?}: {errors}"));
        assert_eq!(pairs_of(&config), expected, "{changes:?}");
        assert_eq!(warnings.len(), usize::from(warned.is_some()), "{changes:?}: {warnings:?}");
        assert!(
            warnings.iter().all(|text| text.contains(warned.unwrap_or_default())),
            "{warnings:?}"
        );
    }

    for (changes, content, expected) in [
        (
            &[("LIVEKIT_KEY_FILE", "/f")] as Pairs<'_>,
            "file-key",
            "LIVEKIT_KEY_FILE needs a file of `key: secret` lines, but there is no colon",
        ),
        (
            &[("LIVEKIT_KEY_FILE", "/f")],
            "one: hunter2\ntwo",
            "LIVEKIT_KEY_FILE needs a file of `key: secret` lines, but line 2 has no colon",
        ),
        (
            &[("LIVEKIT_KEY_FILE", "/f")],
            " \n",
            "LIVEKIT_KEY_FILE needs a file with content: \"/f\" is empty",
        ),
        (
            &[("LIVEKIT_KEY_FILE", "/none")],
            "",
            "LIVEKIT_KEY_FILE needs the path of a file that this user may read: \"/none\" gives \"entity not found\"",
        ),
        (
            &[("LIVEKIT_SECRET_FROM_FILE", "hunter2")],
            "",
            "LIVEKIT_SECRET_FROM_FILE needs the path of a file that this user may read: the file that it names gives",
        ),
        (
            &[("LIVEKIT_KEY_FILE", "/f"), ("LIVEKIT_SECRET_FILE", "/none")],
            "key",
            "LIVEKIT_SECRET_FILE needs the path of a file",
        ),
    ] {
        let text = load_with(changes, &[("/f", content)]).unwrap_err().to_string();
        assert!(text.starts_with(expected) && !text.contains("hunter2"), "{changes:?}: {text}");
    }
}

#[test]
fn a_weak_or_odd_secret_is_accepted_and_warned_about() {
    for (value, expected) in [
        ("secret", &["fewer than 32 characters"] as &[&str]),
        ("\"hunter2-hunter2-hunter2-hunter2-hunter2\"", &["LIVEKIT_SECRET is in quotes"]),
        (
            "hunter2-hunter2-hunter2-hunter2-hunter2 # mine",
            &["LIVEKIT_SECRET has white space inside"],
        ),
        ("hunter2-hunter2-hunter2-hunter2-hunter2", &[]),
    ] {
        let found = warnings(&[("LIVEKIT_SECRET", value)]);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        assert!(
            found.iter().zip(expected).all(|(text, expected)| text.contains(expected)),
            "{found:?}"
        );
        assert_eq!(pairs_of(&config(&[("LIVEKIT_SECRET", value)])), [("key", value)]);
    }
}

/// Decision P7.
#[test]
fn the_address_of_livekit() {
    let with_prefix = config(&[("LIVEKIT_URL", "wss://Example.com/livekit/sfu")]).livekit;
    assert_eq!(
        (with_prefix.url.as_str(), with_prefix.api_base.as_str()),
        ("wss://Example.com/livekit/sfu", "https://example.com/livekit/sfu/")
    );
    let apart = config(&[("LIVEKIT_API_URL", "http://livekit:7880")]).livekit;
    assert_eq!(
        (apart.url.as_str(), apart.api_base.as_str()),
        ("wss://livekit.example.com", "http://livekit:7880/")
    );

    let found = warnings(&[("LIVEKIT_URL", "wss://u:hunter2@example.com")]);
    assert!(
        found[0].starts_with("LIVEKIT_URL holds a user name or password") && !found[0].contains("hunter2"),
        "{found:?}"
    );
    assert_eq!(
        config(&[("LIVEKIT_URL", "wss://u:hunter2@example.com")]).livekit.api_base.as_str(),
        "https://example.com/"
    );

    for (name, value) in [
        ("LIVEKIT_URL", "livekit.example.com"),
        ("LIVEKIT_URL", "ftp://example.com"),
        ("LIVEKIT_URL", "\"wss://example.com\""),
        ("LIVEKIT_URL", "wss://"),
        ("LIVEKIT_API_URL", "livekit:7880"),
        ("LIVEKIT_API_URL", "http://u:hunter2@livekit"),
    ] {
        let text = errors(&[(name, value)]);
        assert!(
            text.starts_with(&format!("{name} must be a ")) && text.lines().count() == 1 && !text.contains("hunter2"),
            "{text}"
        );
    }
}

/// Decision P8.
#[test]
fn the_address_to_listen_on() {
    for (value, expected) in [
        (":8081", ":8081"),
        ("8080", ":8080"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("[::]:8080", "[::]:8080"),
        ("localhost:80", "localhost:80"),
    ] {
        assert_eq!(config(&[("LIVEKIT_JWT_BIND", value)]).bind.to_string(), expected);
    }
    assert_eq!(
        errors(&[("LIVEKIT_JWT_BIND", ":80"), ("LIVEKIT_JWT_PORT", "80")]),
        "LIVEKIT_JWT_BIND and LIVEKIT_JWT_PORT must not be set together: remove LIVEKIT_JWT_PORT"
    );
    for (name, value) in [
        ("LIVEKIT_JWT_BIND", "localhost"),
        ("LIVEKIT_JWT_BIND", "\":8080\""),
        ("LIVEKIT_JWT_BIND", "http://localhost:8080"),
        ("LIVEKIT_JWT_PORT", ":8080"),
        ("LIVEKIT_JWT_PORT", "http"),
        ("LIVEKIT_JWT_PORT", "+80"),
        ("LK_JWT_PORT", "70000"),
    ] {
        let text = errors(&[(name, value)]);
        assert!(text.starts_with(&format!("{name} ")) && text.contains("8080"), "{text}");
    }
    let get = |name: &str| (name == "LIVEKIT_JWT_PORT").then(|| "6080".to_owned());
    assert_eq!(bind(&get).unwrap().to_string(), ":6080");
}

#[test]
fn the_path_prefix() {
    for (value, expected) in [
        ("/", None),
        ("//", None),
        ("/rtc", Some("/rtc")),
        ("/a/b-c.d_e~/", Some("/a/b-c.d_e~")),
    ] {
        assert_eq!(
            config(&[("LIVEKIT_JWT_PATH_PREFIX", value)]).path_prefix.as_deref(),
            expected,
            "{value}"
        );
    }
    for value in ["rtc", "/a//b", "/a/../b", "/{a}", "/a b", "/a?b", "http://a/b", "/%2e"] {
        assert!(
            errors(&[("LIVEKIT_JWT_PATH_PREFIX", value)]).starts_with("LIVEKIT_JWT_PATH_PREFIX must be a path"),
            "{value}"
        );
    }
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

/// Decision O6.
#[test]
fn overrides_are_checked_at_start() {
    for name in ["LIVEKIT_CS_API_URL_OVERRIDES", "LIVEKIT_FEDERATION_URL_OVERRIDES"] {
        let read = |value: &str| {
            let config = config(&[(name, value)]);
            let map = if name.starts_with("LIVEKIT_CS") {
                config.cs_api_overrides
            } else {
                config.federation_overrides
            };
            map.into_iter().map(|(server, url)| format!("{server} {url}")).collect::<Vec<_>>()
        };
        for (value, expected) in [
            ("a.example=http://synapse:8008", &["a.example http://synapse:8008/"] as &[&str]),
            ("a.example=matrix.a.example", &["a.example https://matrix.a.example/"]),
            ("a.example=matrix.a.example:8448", &["a.example https://matrix.a.example:8448/"]),
            ("[::1]:8448=https://[::1]:8449/base", &["[::1]:8448 https://[::1]:8449/base"]),
            (
                " a.example = http://x , b.example=http://y ",
                &["a.example http://x/", "b.example http://y/"],
            ),
            ("a.example=http://x,a.example=http://y", &["a.example http://y/"]),
            ("a.example=http://x/b=c", &["a.example http://x/b=c"]),
        ] {
            assert_eq!(read(value), expected, "{name}={value}");
        }
        for (value, entry) in [
            ("a.example=http://x,", 2),
            (",a.example=http://x", 1),
            ("a.example", 1),
            ("a.example=", 1),
            ("=http://x", 1),
            ("a.example=http://x,b.example=ftp://y", 2),
            ("a.example=http:/x", 1),
            ("a.example=https://", 1),
            ("a.example=https://x?y", 1),
            ("a.example=https://x#y", 1),
            ("a.example=http://x y", 1),
            ("https://a.example=http://x", 1),
            ("a.example=https://u:hunter2@x", 1),
        ] {
            let text = errors(&[(name, value)]);
            let start = format!("{name} must be server=https://host:port, by comma, but entry {entry}");
            assert!(text.starts_with(&start) && !text.contains("hunter2"), "{value}: {text}");
        }
    }
}

#[test]
fn networks_and_dns_servers() {
    let networks = config(&[("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.1.2.3/8, fd00::/8 192.168.1.7,::1")]).allowed_networks;
    assert_eq!(
        networks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8", "fd00::/8", "192.168.1.7/32", "::1/128"]
    );
    let servers = config(&[("LIVEKIT_DNS_SERVERS", "10.0.0.53,127.0.0.1:5353 ::1,[::1]:5353 [fd00::53]")]).dns_servers;
    assert_eq!(
        servers.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.53:53", "127.0.0.1:5353", "[::1]:53", "[::1]:5353", "[fd00::53]:53"]
    );
    for (name, value) in [
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.0.0.0/33"),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "example.com"),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", ","),
        ("LIVEKIT_DNS_SERVERS", "dns.example"),
        ("LIVEKIT_DNS_SERVERS", "10.0.0.53:0"),
    ] {
        let text = errors(&[(name, value)]);
        assert!(text.starts_with(&format!("{name} must be ")), "{text}");
    }
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

#[test]
fn redis_is_checked_and_its_password_hidden() {
    let changes = [
        ("LIVEKIT_REDIS_URL", "rediss://me:hunter2@redis:6380/1"),
        ("LIVEKIT_REDIS_PASSWORD", "swordfish"),
    ];
    let (config, warnings) = load_with(&changes, &[]).unwrap();
    let redis = config.delegated_leave.redis.clone().unwrap();
    assert_eq!(
        (redis.url.as_str(), redis.database, redis.username.as_deref()),
        ("rediss://redis:6380/1", 1, Some("me"))
    );
    assert_eq!(redis.password.unwrap().expose(), "swordfish");
    assert!(warnings[0].contains("LIVEKIT_REDIS_PASSWORD is used"), "{warnings:?}");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(!format!("{config:?}{warnings:?}").contains("hunter2") && !format!("{config:?}").contains("swordfish"));
    assert!(self::warnings(&[("LIVEKIT_REDIS_PASSWORD", "swordfish")])[0].contains("LIVEKIT_REDIS_URL is not set"));
    assert!(errors(&[("LIVEKIT_REDIS_URL", "redis:6379")]).starts_with("LIVEKIT_REDIS_URL must be an address such as redis://"));
}

#[test]
fn application_service_mode_is_all_or_nothing() {
    const NAME: (&str, &str) = ("LIVEKIT_HS_SERVER_NAME", "own.example");
    const FILE: (&str, &str) = ("LIVEKIT_AS_REGISTRATION_FILE", "/registration.yaml");
    const TOKENS: [(&str, &str); 2] = [("LIVEKIT_AS_TOKEN", "hunter2-as"), ("LIVEKIT_HS_TOKEN", "hunter2-hs")];
    let files = [("/registration.yaml", "as_token: hunter2-as\nhs_token: hunter2-hs\n")];
    for changes in [&[NAME, FILE] as Pairs<'_>, &[NAME, TOKENS[0], TOKENS[1]], &[NAME, FILE, TOKENS[0]]] {
        let (config, warnings) = load_with(changes, &files).unwrap_or_else(|errors| panic!("{changes:?}: {errors}"));
        let own = config.app_service.as_ref().unwrap();
        assert_eq!(
            (own.server_name.as_str(), own.as_token.expose(), own.hs_token.expose()),
            ("own.example", "hunter2-as", "hunter2-hs")
        );
        assert!(warnings.is_empty(), "{warnings:?}");
        assert!(!format!("{config:?}{warnings:?}").contains("hunter2"));
    }
    let alone = load_with(&[NAME, FILE, ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "<unset>")], &files)
        .unwrap()
        .0;
    assert_eq!(alone.full_access, listed(&["own.example"]));
    let same = [NAME, ("LIVEKIT_AS_TOKEN", "hunter2"), ("LIVEKIT_HS_TOKEN", "hunter2")];
    let (_, warnings) = load_with(&same, &[]).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("are the same") && !warnings[0].contains("hunter2"));

    for (changes, missing) in [
        (&[NAME] as Pairs<'_>, &["LIVEKIT_AS_TOKEN", "LIVEKIT_HS_TOKEN"] as &[&str]),
        (&[TOKENS[0]], &["LIVEKIT_HS_SERVER_NAME", "LIVEKIT_HS_TOKEN"]),
        (&[FILE], &["LIVEKIT_HS_SERVER_NAME"]),
        (
            &[NAME, ("LIVEKIT_AS_REGISTRATION_FILE", "/none")],
            &["LIVEKIT_AS_REGISTRATION_FILE"],
        ),
        (
            &[("LIVEKIT_HS_SERVER_NAME", "https://own.example"), FILE],
            &["LIVEKIT_HS_SERVER_NAME"],
        ),
        (&[("LIVEKIT_REQUIRE_MEMBERSHIP", "true")], &["LIVEKIT_REQUIRE_MEMBERSHIP"]),
        (&[("LIVEKIT_REQUIRE_MEMBERSHIP", "perhaps")], &["LIVEKIT_REQUIRE_MEMBERSHIP"]),
    ] {
        let text = load_with(changes, &files).unwrap_err().to_string();
        let named: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(named, missing, "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn a_registration_is_yaml_with_two_tokens() {
    let load = |content: &str| {
        let settings = [
            ("LIVEKIT_HS_SERVER_NAME", "own.example"),
            ("LIVEKIT_AS_REGISTRATION_FILE", "/registration.yaml"),
        ];
        load_with(&settings, &[("/registration.yaml", content)])
    };
    for content in [
        "as_token: a\nhs_token: b",
        "# x\nid: lk\nurl: null\nas_token: \"a\" # ours\nhs_token: 'b'\nnamespaces: {users: [{exclusive: false, regex: '@.*'}]}\n",
        "{as_token: a, hs_token: b}",
        "---\nhs_token: b\nas_token: >-\n  a\n",
        "io.element.msc4502.scopes: [x]\nas_token: a\nhs_token: b\n",
        "\u{feff}as_token: a\r\nhs_token: b\r\n",
    ] {
        let (config, _) = load(content).unwrap_or_else(|errors| panic!("{content}: {errors}"));
        let own = config.app_service.unwrap();
        assert_eq!((own.as_token.expose(), own.hs_token.expose()), ("a", "b"), "{content}");
    }
    for (content, mistakes) in [
        ("", 1),
        ("hunter2: [", 1),
        ("hunter2", 1),
        ("- hunter2", 1),
        ("as_token: hunter2\n", 1),
        ("id: x\n", 2),
        ("as_token: 5\nhs_token: null\n", 2),
        ("as_token: [hunter2]\nhs_token: hunter2 hunter2\n", 2),
        ("as_token: ''\nhs_token: hünter2\n", 2),
    ] {
        let text = load(content).unwrap_err().to_string();
        assert_eq!(text.lines().count(), mistakes, "{content}: {text}");
        assert!(
            text.lines().all(|line| line.starts_with("LIVEKIT_AS_REGISTRATION_FILE needs ")),
            "{text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
    }
    let twice = load("as_token: hunter2\nhs_token: b\nas_token: hunter3\n").unwrap_err().to_string();
    assert!(
        twice.contains("every key once") && !twice.contains("valid YAML") && !twice.contains("hunter"),
        "{twice}"
    );
}

/// Decision A7.
#[test]
fn membership_is_required_where_our_homeserver_alone_has_full_access() {
    const OWN: [(&str, &str); 3] = [
        ("LIVEKIT_HS_SERVER_NAME", "own.example"),
        ("LIVEKIT_AS_TOKEN", "a"),
        ("LIVEKIT_HS_TOKEN", "b"),
    ];
    let required = |own: &[(&'static str, &'static str)], full_access, switch| {
        let mut changes = own.to_vec();
        changes.extend([
            ("LIVEKIT_FULL_ACCESS_HOMESERVERS", full_access),
            ("LIVEKIT_REQUIRE_MEMBERSHIP", switch),
        ]);
        config(&changes).membership.required
    };
    for (full_access, automatic) in [
        ("own.example", true),
        ("<unset>", true),
        ("own.example other.example", false),
        ("other.example", false),
        ("*", false),
        // Beside other names the star is a name like them, and nobody's.
        ("* own.example", true),
    ] {
        assert_eq!(required(&OWN, full_access, "<unset>"), automatic, "{full_access}");
        assert!(required(&OWN, full_access, "true"), "{full_access}");
        assert!(!required(&OWN, full_access, "false"), "{full_access}");
    }
    assert!(!required(&[], "own.example", "<unset>"));
    assert!(!required(&[], "own.example", "false"));
}

/// Decision P9: all at once, each by its name, no secret.
#[test]
fn every_mistake_is_reported_at_once() {
    let wrong = [
        ("LIVEKIT_URL", "hunter2@nowhere"),
        ("LIVEKIT_API_URL", "x"),
        ("LIVEKIT_SECRET_FROM_FILE", "hunter2"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", ","),
        ("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "https://x"),
        ("LIVEKIT_JWT_TTL_SECONDS", "x"),
        ("LIVEKIT_JWT_BIND", "x"),
        ("LIVEKIT_JWT_PATH_PREFIX", "x"),
        ("LIVEKIT_SHUTDOWN_GRACE_SECONDS", "x"),
        ("LIVEKIT_FEDERATION_URL_OVERRIDES", "a=https://u:hunter2@b?c"),
        ("LIVEKIT_CS_API_URL_OVERRIDES", "hunter2@x"),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "x"),
        ("LIVEKIT_DNS_SERVERS", "x"),
        ("LIVEKIT_REDIS_URL", "redis://:hunter2@redis/x"),
        ("LIVEKIT_REDIS_PASSWORD", "hunter2"),
        ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "x"),
        ("LIVEKIT_ROOM_WATCH_INTERVAL_SECONDS", "x"),
        ("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "x"),
        ("LIVEKIT_REQUIRE_MEMBERSHIP", "x"),
        ("LIVEKIT_HS_SERVER_NAME", "https://x"),
        ("LIVEKIT_AS_TOKEN", "hunter2"),
    ];
    let text = load(&wrong, &[]).unwrap_err().to_string();
    assert!(!text.contains("hunter2"), "{text}");
    let mut named: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let mut expected: Vec<_> = wrong
        .iter()
        .map(|pair| pair.0)
        .filter(|name| !["LIVEKIT_REDIS_PASSWORD", "LIVEKIT_AS_TOKEN"].contains(name))
        .collect();
    // Missing because of the others.
    expected.extend(["LIVEKIT_KEY", "LIVEKIT_HS_TOKEN"]);
    named.sort_unstable();
    expected.sort_unstable();
    assert_eq!(named, expected, "{text}");
}

#[test]
fn nothing_at_all_says_what_is_needed() {
    let text = load(&[], &[]).unwrap_err().to_string();
    let named: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(named, ["LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET"], "{text}");
}

/// A value that was not UTF-8 is not unset: that would open the list of full access.
#[test]
fn broken_bytes_are_refused() {
    for Variable { name, .. } in VARIABLES.iter().filter(|variable| {
        ![
            "LIVEKIT_LOCAL_HOMESERVERS",
            "LIVEKIT_API_KEY",
            "LIVEKIT_API_SECRET",
            "LIVEKIT_SECRET_FILE",
            "LIVEKIT_KEYS",
        ]
        .contains(&variable.name)
    }) {
        assert!(
            errors(&[(name, "a\u{fffd}")]).contains(&format!("{name} is not valid UTF-8")),
            "{name}"
        );
    }
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

/// Every environment of `wrappers` that is known to be in use starts, and listens where its proxy looks.
#[test]
fn every_wrapper_in_use_starts() {
    const UUID: &str = "0b0a8a24-5d53-4c4f-9d3c-1f1c1f7a5a55";
    let ess_file = "/secrets/ess-generated/ELEMENT_CALL_LIVEKIT_SECRET";
    let credentials = "/run/credentials/lk-jwt-service.service";
    let (nix_pair, nix_key, nix_secret) = (
        format!("{credentials}/key-file"),
        format!("{credentials}/key"),
        format!("{credentials}/secret"),
    );
    let table: &[(&str, Pairs<'_>, Pairs<'_>, &str)] = &[
        (
            "ess-helm",
            &[
                ("LIVEKIT_KEY", "matrix-rtc"),
                ("LIVEKIT_SECRET_FROM_FILE", ess_file),
                ("LIVEKIT_URL", "wss://mrtc.ess.localhost"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "ess.localhost"),
                (
                    "LIVEKIT_CS_API_URL_OVERRIDES",
                    "ess.localhost=http://ess-synapse.ess.svc.cluster.local.:8008",
                ),
            ],
            &[(ess_file, UUID)],
            ":8080",
        ),
        (
            "ess-helm with the application service",
            &[
                ("LIVEKIT_KEY", "matrix-rtc"),
                ("LIVEKIT_SECRET_FROM_FILE", ess_file),
                ("LIVEKIT_URL", "wss://mrtc.ess.localhost"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
                ("LIVEKIT_AS_REGISTRATION_FILE", "/secrets/ess-generated/MATRIX_RTC_REGISTRATION"),
                ("LIVEKIT_HS_SERVER_NAME", "ess.localhost"),
            ],
            &[
                (ess_file, UUID),
                (
                    "/secrets/ess-generated/MATRIX_RTC_REGISTRATION",
                    "as_token: a\nhs_token: b\nurl: null\n",
                ),
            ],
            ":8080",
        ),
        (
            "matrix-docker-ansible-deploy, an env-file with empty values",
            &[
                ("LIVEKIT_JWT_BIND", ":8080"),
                ("LIVEKIT_KEY", UUID),
                ("LIVEKIT_URL", "wss://matrix.example.com/livekit-server"),
                ("LIVEKIT_SECRET", UUID),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
                ("LIVEKIT_CS_API_URL_OVERRIDES", ""),
            ],
            &[],
            ":8080",
        ),
        (
            "an env-file that keeps quotes",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_KEY", "\"devkey\""),
                ("LIVEKIT_SECRET", "'secret'"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
                ("LIVEKIT_LOG_LEVEL", "\"debug\""),
                ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "\"\""),
            ],
            &[],
            ":8080",
        ),
        (
            "NixOS with a key file",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_JWT_BIND", ":8080"),
                ("LIVEKIT_KEY_FILE", &nix_pair),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
            ],
            &[(&nix_pair, "key: f6lQGaHtM5HfgZjIcec3cOCRfiDqIine4CpZZnqdT5cE\n")],
            ":8080",
        ),
        (
            "NixOS with credentials",
            &[
                ("LIVEKIT_URL", "ws://127.0.0.1:7880"),
                ("LIVEKIT_JWT_BIND", "127.0.0.1:8080"),
                ("LIVEKIT_KEY_FROM_FILE", &nix_key),
                ("LIVEKIT_SECRET_FROM_FILE", &nix_secret),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
            ],
            &[(&nix_key, "key"), (&nix_secret, "secret\n")],
            "127.0.0.1:8080",
        ),
        (
            "NixOS, the older module",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_JWT_PORT", "8080"),
                ("LIVEKIT_KEY_FILE", &nix_pair),
            ],
            &[(&nix_pair, "key: f6lQGaHtM5HfgZjIcec3cOCRfiDqIine4CpZZnqdT5cE\n")],
            ":8080",
        ),
        (
            "Element Call's compose file",
            &[
                ("LIVEKIT_JWT_PORT", "16080"),
                ("LIVEKIT_URL", "wss://matrix-rtc.othersite.m.localhost/livekit/sfu"),
                ("LIVEKIT_KEY", "devkey"),
                ("LIVEKIT_SECRET", "secret"),
                ("LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "YES_I_KNOW_WHAT_I_AM_DOING"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "*"),
            ],
            &[],
            ":16080",
        ),
        (
            "tuwunel and continuwuity",
            &[
                ("LIVEKIT_JWT_BIND", ":8081"),
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_KEY", "LK_MATRIX_KEY"),
                ("LIVEKIT_SECRET", UUID),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
            ],
            &[],
            ":8081",
        ),
        (
            "element-call-helm of 2024",
            &[
                ("LIVEKIT_URL", "wss://sfu.example.com"),
                ("LIVEKIT_KEY", "key"),
                ("LIVEKIT_SECRET", UUID),
            ],
            &[],
            ":8080",
        ),
        (
            "element-docker-demo",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_KEY", "key"),
                ("LIVEKIT_SECRET", "secret"),
                ("LK_JWT_PORT", "8080"),
                ("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"),
            ],
            &[("/etc/ssl/certs/ca-certificates.crt", "a certificate")],
            ":8080",
        ),
        (
            "compose and quadlet files in the wild",
            &[
                ("LIVEKIT_URL", "https://livekit.example.com"),
                ("LIVEKIT_KEY_FILE", "/lk-key-secret"),
                ("LIVEKIT_JWT_PORT", "8080"),
                ("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "30"),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com, matrix.example.org"),
            ],
            &[("/lk-key-secret", "lk-key: lk-secret")],
            ":8080",
        ),
        (
            "Redis, as the old service took it",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_KEY", "key"),
                ("LIVEKIT_SECRET", UUID),
                ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com"),
                (
                    "LIVEKIT_REDIS_URL",
                    "rediss://default:pa%3Ass@redis:6379/2?dial_timeout=5s&skip_verify=true",
                ),
            ],
            &[],
            ":8080",
        ),
        (
            "version 0.2.2",
            &[
                ("LIVEKIT_URL", "wss://livekit.example.com"),
                ("LIVEKIT_KEY_FILE", "/key"),
                ("LIVEKIT_SECRET_FILE", "/secret"),
                ("LIVEKIT_LOCAL_HOMESERVERS", "example.com"),
            ],
            &[("/key", "key"), ("/secret", UUID)],
            ":8080",
        ),
    ];
    for (name, variables, files, bind) in table {
        let (config, warnings) = load(variables, files).unwrap_or_else(|errors| panic!("{name}: {errors}"));
        assert_eq!(config.bind.to_string(), *bind, "{name}");
        assert!(
            !warnings.iter().any(|text| text.contains("does not read it")),
            "{name}: {warnings:?}"
        );
        for secret in config
            .livekit
            .keys
            .iter()
            .map(|pair| pair.secret.expose())
            .filter(|secret| *secret != "secret")
        {
            assert!(!warnings.iter().any(|text| text.contains(secret)), "{name}: {warnings:?}");
        }
    }
}

/// Decision P16.
#[test]
fn a_port_that_is_a_link_counts_as_unset() {
    for link in ["tcp://10.43.0.7:8080", " udp://10.43.0.7:8080\n", "sctp://[fd00::1]:80"] {
        for name in ["LIVEKIT_JWT_PORT", "LK_JWT_PORT"] {
            let (with_bind, warnings) = load_with(&[("LIVEKIT_JWT_BIND", ":8081"), (name, link)], &[]).unwrap();
            assert_eq!(with_bind.bind.to_string(), ":8081", "{name}={link}");
            // Beside an address the oldest name is not asked for anything.
            assert!(warnings.iter().all(|text| text.contains("Kubernetes")), "{warnings:?}");
            let (alone, warnings) = load_with(&[(name, link)], &[]).unwrap();
            assert_eq!(alone.bind.to_string(), ":8080", "{name}={link}");
            assert!(
                warnings.len() == 1 && warnings[0].starts_with(&format!("{name} counts as unset: Kubernetes")),
                "{warnings:?}"
            );
        }
    }
    let both = [("LIVEKIT_JWT_PORT", "tcp://10.43.0.7:8080"), ("LK_JWT_PORT", "6080")];
    assert_eq!(config(&both).bind.to_string(), ":6080");
    for (name, value) in [
        ("LIVEKIT_JWT_PORT", "http://10.43.0.7"),
        ("LIVEKIT_JWT_BIND", "tcp://10.43.0.7:8080"),
    ] {
        assert!(errors(&[(name, value)]).starts_with(name));
    }
    let get = |name: &str| (name == "LIVEKIT_JWT_PORT").then(|| "tcp://10.43.0.7:8080".to_owned());
    assert_eq!(bind(&get).unwrap().to_string(), ":8080");
}

/// Decision P17: each is told once, whatever else would be wrong with such a value.
#[test]
fn a_failed_expansion_is_a_mistake() {
    const NOTHING: &str = "which nothing has filled in";
    for (name, value) in [
        ("LIVEKIT_URL", "wss://${HOST}/x"),
        ("LIVEKIT_URL", "${LIVEKIT_URL:-wss://hunter2.example}"),
        ("LIVEKIT_URL", "<your domain>"),
        ("LIVEKIT_API_URL", "http://{{ livekit }}:7880"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "${SERVER_NAME}"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com,{{ .Values.serverName }}"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "example.com $(hostname -d)"),
        ("LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS", "<server name>"),
        ("LIVEKIT_JWT_BIND", ":${PORT}"),
        ("LIVEKIT_JWT_PORT", "${PORT}"),
        ("LIVEKIT_JWT_PATH_PREFIX", "/${PREFIX}"),
        ("LIVEKIT_JWT_TTL_SECONDS", "$(TTL)"),
        ("LIVEKIT_CS_API_URL_OVERRIDES", "example.com=http://${SYNAPSE}:8008"),
        ("LIVEKIT_FEDERATION_URL_OVERRIDES", "${OVERRIDES}"),
        ("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "10.0.0.0/8,${NETWORK}"),
        ("LIVEKIT_DNS_SERVERS", "{{ dns }}"),
        ("LIVEKIT_REDIS_URL", "redis://:${hunter2}@redis"),
        ("LIVEKIT_STATE_PATH", "${DATA}/state"),
        ("LIVEKIT_SECRET_FROM_FILE", "${CREDENTIALS_DIRECTORY}/secret"),
        ("LIVEKIT_KEY", "<key>"),
        ("LIVEKIT_SECRET", "${hunter2}"),
        ("LIVEKIT_SECRET", "\"${{ secrets.hunter2 }}\""),
        ("LIVEKIT_SECRET", "$(pass show hunter2)"),
    ] {
        let text = errors(&[(name, value)]);
        assert!(
            text.starts_with(&format!("{name} holds ")) && text.contains(NOTHING) && text.lines().count() == 1,
            "{name}={value}: {text}"
        );
        assert!(!text.contains("hunter2"), "{text}");
    }
    // Some text of a secret.
    for secret in [
        "${a}hunter2-hunter2-hunter2-hunter2-",
        "hunter2-hunter2-hunter2-{{hunter2}}-",
        "<<hunter2-hunter2-hunter2-hunter2",
    ] {
        assert_eq!(pairs_of(&config(&[("LIVEKIT_SECRET", secret)])), [("key", secret)]);
    }
    assert!(load_with(&[("LIVEKIT_LOG_LEVEL", "${LEVEL}"), ("RUST_LOG", "${LEVEL}")], &[]).is_ok());

    let as_tokens = [
        ("LIVEKIT_HS_SERVER_NAME", "{{ matrix_domain }}"),
        ("LIVEKIT_AS_TOKEN", "${AS_TOKEN}"),
        ("LIVEKIT_HS_TOKEN", "<hunter2>"),
        ("LIVEKIT_REDIS_PASSWORD", "$(hunter2)"),
        ("LIVEKIT_URL", "wss://${HOST}"),
    ];
    let text = errors(&as_tokens);
    let mut named: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let mut expected = as_tokens.map(|pair| pair.0);
    named.sort_unstable();
    expected.sort_unstable();
    assert!(named == expected && !text.contains("hunter2"), "{text}");

    let registration = [("LIVEKIT_HS_SERVER_NAME", "own.example"), ("LIVEKIT_AS_REGISTRATION_FILE", "/f")];
    let no_keys = [("LIVEKIT_KEY", "<unset>"), ("LIVEKIT_SECRET", "<unset>")];
    for (changes, content) in [
        (
            &[("LIVEKIT_SECRET", "<unset>"), ("LIVEKIT_SECRET_FROM_FILE", "/f")] as Pairs<'_>,
            "${hunter2}\n",
        ),
        (&[("LIVEKIT_KEY", "<unset>"), ("LIVEKIT_KEY_FROM_FILE", "/f")], "{{ hunter2 }}"),
        (&[no_keys[0], no_keys[1], ("LIVEKIT_KEY_FILE", "/f")], "key: ${hunter2}\n"),
        (&[no_keys[0], no_keys[1], ("LIVEKIT_KEY_FILE", "/f")], "{{ key }}: {{ hunter2 }}\n"),
        (&registration, "as_token: ${hunter2}\nhs_token: <hunter2>\n"),
        (&registration, "as_token: '{{hunter2}}'\nhs_token: hunter2\n"),
    ] {
        let text = load_with(changes, &[("/f", content)]).unwrap_err().to_string();
        assert!(
            text.contains("names a file that holds ") && text.lines().count() == 1 && !text.contains("hunter2"),
            "{content}: {text}"
        );
    }
}

/// Decision P18.
#[test]
fn mistaken_names_are_told() {
    let read = |more: Pairs<'_>| {
        let variables = [&BASE as Pairs<'_>, more].concat();
        load(&variables, &[]).unwrap().1
    };
    for (name, nearest) in [
        ("FULL_ACCESS_HOMESERVERS", "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
        ("HS_SERVER_NAME", "LIVEKIT_HS_SERVER_NAME"),
        ("LK_JWT_BIND", "LIVEKIT_JWT_BIND"),
        ("LIVEKIT_REDIS_URI", "LIVEKIT_REDIS_URL"),
    ] {
        let warnings = read(&[(name, "hunter2")]);
        let expected = format!("{name} is set, but this service does not read it: did you mean {nearest}?");
        assert_eq!(warnings, [expected]);
        assert_eq!(read(&[(name, " ")]), [""; 0]);
    }
    for name in ["LIVEKIT_JWT_REPLICA_IP", "LIVEKIT_KEYS", "URL", "LOG", "LK_JWT_SERVICE_HOST"] {
        assert_eq!(read(&[(name, "x")]), [""; 0], "{name}");
    }
    let odd = read(&[("LIVEKIT_A\u{1b}[31m", "x")]);
    assert!(!odd[0].contains('\u{1b}'), "{odd:?}");
    let names: Vec<String> = (0..1000).map(|index| format!("LIVEKIT_NOBODYS_{index}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), "x")).collect();
    let warnings = read(&many);
    assert!(
        warnings.len() == 21 && warnings[20].starts_with("980 more variables"),
        "{warnings:?}"
    );

    // A start that fails may fail because of it.
    let text = load(&[("LK_URL", "wss://hunter2"), BASE[1], BASE[2]], &[]).unwrap_err().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert!(
        lines[0].starts_with("LIVEKIT_URL must be set") && lines[1].ends_with("did you mean LIVEKIT_URL?"),
        "{text}"
    );
}

/// Decision P20: only what will be used is looked at.
#[test]
fn proxies_that_cannot_work_stop_the_start() {
    let outcome = |set: Pairs<'_>| load(&[&BASE as Pairs<'_>, set].concat(), &[]);
    const HTTP: &str = "http://user:hunter2@proxy:3128";
    const SOCKS: &str = "socks5h://user:hunter2@proxy:1080";
    for set in [
        &[("HTTPS_PROXY", HTTP)] as Pairs<'_>,
        &[("https_proxy", HTTP), ("HTTP_PROXY", HTTP)],
        &[("ALL_PROXY", HTTP)],
        &[("HTTPS_PROXY", ""), ("https_proxy", " ")],
        &[("NO_PROXY", SOCKS)],
        // All three, as desktops set them.
        &[("http_proxy", HTTP), ("https_proxy", HTTP), ("all_proxy", SOCKS)],
        &[("HTTPS_PROXY", HTTP), ("https_proxy", SOCKS)],
    ] {
        let (_, warnings) = outcome(set).unwrap_or_else(|errors| panic!("{set:?}: {errors}"));
        assert_eq!(warnings, [""; 0], "{set:?}");
    }
    let (_, warnings) = outcome(&[("HTTPS_PROXY", ""), ("https_proxy", SOCKS)]).unwrap();
    assert_eq!(warnings, ["HTTPS_PROXY is set to nothing, so https_proxy does not count"]);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        for (value, expected) in [
            (
                "socks5://user:hunter2@proxy:1080",
                "SOCKS proxy, which is not supported: set it to the http:// address",
            ),
            (SOCKS, "SOCKS proxy, which is not supported"),
            ("https://user:hunter2@proxy:3129", "https://, which is not supported"),
            ("ftp://hunter2", "cannot be used"),
            ("http://user:hunter2@proxy:3128\r", "white space or a line end"),
            ("http://user:hunter2@${PROXY}:3128", "which nothing has filled in"),
        ] {
            let text = outcome(&[(name, value)]).unwrap_err().to_string();
            assert!(
                text.starts_with(name) && text.contains(expected) && text.lines().count() == 1 && !text.contains("hunter2"),
                "{name}={value}: {text}"
            );
        }
    }
    let text = outcome(&[("HTTPS_PROXY", HTTP), ("all_proxy", SOCKS)]).unwrap_err().to_string();
    assert!(text.starts_with("all_proxy names a SOCKS proxy"), "{text}");
}

/// Decision P11.
#[test]
fn named_certificates_must_be_there() {
    let files = [
        ("/ca.crt", "a certificate"),
        ("/empty.crt", ""),
        ("/certs", "a certificate"),
        ("/none", ""),
    ];
    let outcome = |set: Pairs<'_>| load(&[&BASE as Pairs<'_>, set].concat(), &files);
    for set in [
        &[("SSL_CERT_FILE", "/ca.crt\r")] as Pairs<'_>,
        &[("SSL_CERT_FILE", " "), ("SSL_CERT_DIR", "")],
        &[("SSL_CERT_DIR", "/nowhere:/none:/certs")],
    ] {
        assert_eq!(
            outcome(set).unwrap_or_else(|errors| panic!("{set:?}: {errors}")).1,
            [""; 0],
            "{set:?}"
        );
    }
    for (set, named) in [
        (&[("SSL_CERT_FILE", "/nowhere")] as Pairs<'_>, &["SSL_CERT_FILE"] as &[&str]),
        (&[("SSL_CERT_FILE", "/empty.crt")], &["SSL_CERT_FILE"]),
        (&[("SSL_CERT_FILE", "/empty.crt"), ("SSL_CERT_DIR", "/certs")], &["SSL_CERT_FILE"]),
        (&[("SSL_CERT_FILE", "/ca.crt"), ("SSL_CERT_DIR", "/none")], &["SSL_CERT_DIR"]),
        (&[("SSL_CERT_DIR", "/none:/nowhere")], &["SSL_CERT_DIR", "SSL_CERT_DIR"]),
    ] {
        let text = outcome(set).unwrap_err().to_string();
        let found: Vec<_> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(found, named, "{text}");
    }
}

/// A password may hold whatever separates the entries of a list.
#[test]
fn a_piece_of_a_password_is_not_repeated() {
    for (name, value) in [
        ("LIVEKIT_URL", "wss://user:hunter2 hunter2@example.com"),
        ("LIVEKIT_URL", "ftp://example.com?key=hunter2"),
        ("LIVEKIT_CS_API_URL_OVERRIDES", "a.example=https://user:hunter2,x@host"),
        ("LIVEKIT_FEDERATION_URL_OVERRIDES", "a.example=https://user:x,hunter2@host"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "https://user:hunter2 x@host"),
        ("LIVEKIT_FULL_ACCESS_HOMESERVERS", "https://hunter2:12,34@host"),
        ("LIVEKIT_DNS_SERVERS", "udp://user:hunter2,x@10.0.0.1"),
    ] {
        let text = match load_with(&[(name, value)], &[]) {
            Ok((_, warnings)) => warnings.join("\n"),
            Err(errors) => errors.to_string(),
        };
        assert!(text.contains(name) && !text.contains("hunter2"), "{name}={value}: {text}");
    }
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
