//! Addresses: of LiveKit, of this service, of Redis, of proxies; and certificates.

use super::*;

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
fn the_page_for_users() {
    for (given, expected) in [
        (None, CheckPage::Basic),
        (Some("off"), CheckPage::Off),
        (Some("basic"), CheckPage::Basic),
        (Some("On"), CheckPage::On),
    ] {
        let pairs: Vec<_> = given.map(|value| ("LIVEKIT_CHECK_PAGE", value)).into_iter().collect();
        assert_eq!(config(&pairs).check_page, expected, "{given:?}");
    }
    assert!(errors(&[("LIVEKIT_CHECK_PAGE", "yes")]).starts_with("LIVEKIT_CHECK_PAGE must be off, basic or on, not "));
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
