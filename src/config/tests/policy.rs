//! Who is dealt with, what they may do, and how often.

use super::*;
use crate::access::Entry as _;
use crate::admission::rates::Rate;

const ALLOWED: &str = "LIVEKIT_ALLOWED_HOMESERVERS";
const BLOCKED: &str = "LIVEKIT_BLOCKED_HOMESERVERS";
const FULL_ACCESS: &str = "LIVEKIT_FULL_ACCESS_HOMESERVERS";

fn patterns(entries: &[&str]) -> Homeservers<HostPattern> {
    Homeservers::Listed(entries.iter().map(|entry| HostPattern::parse(entry).expect(entry)).collect())
}

#[test]
fn everybody_is_dealt_with_unless_lists_say_otherwise() {
    let open = config(&[]);
    assert_eq!((open.allowed, open.blocked), (Homeservers::All, patterns(&[])));
    assert_eq!(config(&[(ALLOWED, "*")]).allowed, Homeservers::All);
    // Those with full access, and our own, are always allowed.
    let own = [
        ("LIVEKIT_HS_SERVER_NAME", "own.example:8448"),
        ("LIVEKIT_AS_TOKEN", "a"),
        ("LIVEKIT_HS_TOKEN", "b"),
    ];
    let closed = config(
        &[
            &own[..],
            &[(ALLOWED, "*.b.example,\n A.example:8448"), (BLOCKED, "x.b.example, *.c.example")],
        ]
        .concat(),
    );
    assert_eq!(
        closed.allowed,
        patterns(&["*.b.example", "a.example", "example.com", "own.example"])
    );
    assert_eq!(closed.blocked, patterns(&["x.b.example", "*.c.example"]));
    // With `*` nobody has full access by name.
    let closed = config(&[(ALLOWED, "a.example"), (FULL_ACCESS, "*")]);
    assert_eq!(closed.allowed, patterns(&["a.example"]));
}

/// Decision P4: neither list is open, or closed, by accident.
#[test]
fn every_entry_of_the_lists_has_to_be_understood() {
    for name in [ALLOWED, BLOCKED] {
        for (value, problem) in [
            ("", "is set, but blank"),
            (" , ", "is set, but blank"),
            ("a.example,https://b.example", "write b.example"),
            ("a.example,*", "only if it stands alone"),
            ("*,*", "only if it stands alone"),
            ("*.", "not a server name"),
            ("a.*.example", "not a server name"),
            ("*.192.0.2.1", "not a server name"),
            ("${BLOCKED}", "${…}"),
        ] {
            let text = errors(&[(name, value)]);
            assert!(text.starts_with(name) && text.contains(problem), "{name}={value:?}: {text}");
        }
    }
}

#[test]
fn whoever_has_full_access_cannot_be_blocked() {
    for (blocked, full_access) in [
        ("*", "*"),
        ("example.com", "example.com"),
        ("EXAMPLE.com.:1", "a.example,example.com:8448"),
        ("*.com", "example.com"),
    ] {
        let text = errors(&[(BLOCKED, blocked), (FULL_ACCESS, full_access)]);
        assert!(text.starts_with(BLOCKED), "{blocked}: {text}");
    }
    let text = errors(&[
        ("LIVEKIT_HS_SERVER_NAME", "own.example"),
        ("LIVEKIT_AS_TOKEN", "a"),
        ("LIVEKIT_HS_TOKEN", "b"),
        (FULL_ACCESS, "*"),
        (BLOCKED, "*.example"),
    ]);
    assert!(
        text.contains("blocks own.example, which has full access or is our own homeserver"),
        "{text}"
    );
}

#[test]
fn lists_that_contradict_are_told() {
    let found = warnings(&[
        (ALLOWED, "a.example b.example *.c.example"),
        (BLOCKED, "b.example,*.example.org"),
        (
            "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS",
            "a.example,b.example,d.example,x.c.example",
        ),
    ]);
    let expected = [
        "LIVEKIT_ALLOWED_HOMESERVERS names b.example, which LIVEKIT_BLOCKED_HOMESERVERS blocks: who is on both is blocked",
        "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS names b.example, which LIVEKIT_BLOCKED_HOMESERVERS blocks: its users get no token at all",
        "LIVEKIT_REMOTE_CAN_PUBLISH_HOMESERVERS names d.example, which LIVEKIT_ALLOWED_HOMESERVERS leaves out: its users get no token at all",
    ];
    assert_eq!(found, expected);
}

#[test]
fn rates_are_numbers_a_minute_or_off() {
    let rates = |changes| config(changes).rates;
    let number = |rate: Option<Rate>| rate.map(|Rate(number)| number.get());
    assert_eq!((number(rates(&[]).user), number(rates(&[]).homeserver)), (Some(60), None));
    let changed = rates(&[("LIVEKIT_RATE_LIMIT_USER", "OFF"), ("LIVEKIT_RATE_LIMIT_HOMESERVER", "+600")]);
    assert_eq!((number(changed.user), number(changed.homeserver)), (None, Some(600)));
    for name in ["LIVEKIT_RATE_LIMIT_USER", "LIVEKIT_RATE_LIMIT_HOMESERVER"] {
        for value in ["0", "-1", "60/min", "1.5", "100001", "99999999999999999999"] {
            let text = errors(&[(name, value)]);
            assert!(
                text.starts_with(name) && text.contains("from 1 to 100000, or off"),
                "{value}: {text}"
            );
        }
    }
}

#[test]
fn sources_are_livekits_words() {
    const NAME: &str = "LIVEKIT_PUBLISH_SOURCES";
    for (value, expected) in [
        ("", Source::ALL),
        ("all", Source::ALL),
        ("microphone", &[Source::Microphone]),
        (
            "screen_share_audio, Microphone screen_share",
            &[Source::Microphone, Source::ScreenShare, Source::ScreenShareAudio],
        ),
        ("camera,microphone,screen_share,screen_share_audio", Source::ALL),
    ] {
        assert_eq!(config(&[(NAME, value)]).publish_sources, expected, "{value}");
    }
    for value in ["video", "camera,screen", "none", ",", "all,camera"] {
        let text = errors(&[(NAME, value)]);
        let wanted = "must be all, or some of camera, microphone, screen_share, screen_share_audio, by comma or space, not ";
        assert!(text.starts_with(NAME) && text.contains(wanted), "{value}: {text}");
    }
}

#[test]
fn participants_are_a_number() {
    const NAME: &str = "LIVEKIT_MAX_PARTICIPANTS";
    for (value, expected) in [("", 0), ("0", 0), ("10", 10), ("100000", 100_000)] {
        assert_eq!(config(&[(NAME, value)]).max_participants, expected, "{value}");
    }
    for value in ["ten", "-1", "100001", "1e3"] {
        assert!(errors(&[(NAME, value)]).starts_with(NAME), "{value}");
    }
}

#[test]
fn the_summary_has_the_policy() {
    let plain = config(&[]).summary();
    let shown = |summary: summary::Summary| {
        [
            summary.allowed,
            summary.blocked,
            summary.rate_limits,
            summary.publish_sources,
            summary.max_participants,
        ]
    };
    assert_eq!(shown(plain), ["*", "none", "users 60 a minute, homeservers off", "all", "no limit"]);
    let full = config(&[
        (ALLOWED, "*.b.example"),
        (BLOCKED, "x.b.example"),
        ("LIVEKIT_RATE_LIMIT_USER", "off"),
        ("LIVEKIT_RATE_LIMIT_HOMESERVER", "600"),
        ("LIVEKIT_PUBLISH_SOURCES", "microphone,camera"),
        ("LIVEKIT_MAX_PARTICIPANTS", "10"),
    ]);
    assert_eq!(
        shown(full.summary()),
        [
            "*.b.example, example.com",
            "x.b.example",
            "users off, homeservers 600 a minute",
            "camera, microphone",
            "10"
        ]
    );
}
