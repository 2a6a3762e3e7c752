//! LiveKit's keys: their sources, and what is odd about them.

use super::*;

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

/// livekit-server's own variable is the last source of the pair.
#[test]
fn the_keys_of_livekit_server_are_used_where_nothing_else_names_one() {
    const NAME: &str = "LIVEKIT_KEYS";
    let none = [("LIVEKIT_KEY", "<unset>"), ("LIVEKIT_SECRET", "<unset>")];
    let with_keys = |value: &str| -> String {
        let config = config(&[&none[..], &[(NAME, value)]].concat());
        let pairs = pairs_of(&config).into_iter();
        pairs.map(|(key, secret)| format!("{key} {secret}\n")).collect()
    };
    let pair = format!("devkey {SECRET}\n");
    assert_eq!(with_keys(&format!("devkey: {SECRET}")), pair);
    assert_eq!(with_keys(&format!("\"devkey\": '{SECRET}'")), pair);
    assert_eq!(with_keys(&format!("{{devkey: {SECRET}}}")), pair);
    assert_eq!(
        with_keys(&format!("devkey: {SECRET}\nother: {SECRET}")),
        format!("{pair}other {SECRET}\n")
    );

    let (beside, told) = load_with(&[(NAME, "devkey: hunter2")], &[]).unwrap();
    assert_eq!(
        (pairs_of(&beside), told),
        (vec![("key", SECRET)], Vec::new()),
        "ours counts, as before"
    );
    let half = errors(&[(NAME, "devkey: hunter2"), ("LIVEKIT_SECRET", "<unset>")]);
    assert!(half.starts_with("LIVEKIT_SECRET must be set"), "{half}");
    for value in [
        "hunter2",
        "devkey:",
        "{hunter2",
        "devkey: hunter2\nhunter2",
        "{{ hunter2 }}",
        "{devkey: }",
    ] {
        let text = errors(&[&none[..], &[(NAME, value)]].concat());
        assert!(text.starts_with(NAME) && !text.contains("hunter2"), "{value}: {text}");
    }
    let dev = load_as(&[(NAME, "devkey: hunter2")], &[], true).unwrap().0;
    assert_eq!(pairs_of(&dev), [("devkey", "hunter2")], "--dev fills what is unset only");
}
