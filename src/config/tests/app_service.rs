//! Application-service mode.

use super::*;

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
