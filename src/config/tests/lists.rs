//! Lists of homeservers, of overrides, of networks and of DNS servers.

use super::*;

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
