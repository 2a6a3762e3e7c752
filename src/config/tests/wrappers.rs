//! The environment of each wrapper in use.

use super::*;

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
