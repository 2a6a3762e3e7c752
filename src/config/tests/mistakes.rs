//! Mistakes: all at once, by the name of their variable, and without secrets.

use super::*;

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
    for name in ["LIVEKIT_KEYS", "URL", "LOG", "LK_JWT_SERVICE_HOST"] {
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
