use super::*;
use proptest::prelude::*;
use serde_json::json;

const GO: &str = r#"{"Params":{"DelayId":"syd_1","DelayTimeout":8000000000,"ServerName":"example.com","LiveKitRoom":"krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","LiveKitIdentity":"@a:x:DEV"},"RestartedAt":"2026-07-23T09:28:51.123456789Z"}"#;
const GO_FIELD: &str = r#"["krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs","@a:x:DEV"]"#;

fn read_ok(field: &str, value: &str) -> JobRecord<'static> {
    JobRecord::read(field.as_bytes(), value.as_bytes()).unwrap()
}

/// Reads and writes again.
fn rewritten(field: &str, value: &str) -> String {
    read_ok(field, value).value_over(value)
}

#[test]
fn a_record_of_the_go_service_survives_to_the_byte() {
    let job = read_ok(GO_FIELD, GO);
    assert_eq!((&*job.delay_id, &*job.homeserver, job.delay_ms), ("syd_1", "example.com", 8000));
    assert_eq!(job.restarted_at_ms, 1_784_798_931_123);
    assert_eq!(job.expires_at_ms(), 1_784_798_939_123);
    let ours = (
        &*job.user,
        job.delegated_at_ms,
        job.as_user,
        &job.sid,
        job.joined_at_ms,
        &job.replaces,
    );
    assert_eq!(ours, ("", None, false, &None, 0, &Vec::new()));
    assert_eq!((job.field(), job.value_over(GO)), (GO_FIELD.to_owned(), GO.to_owned()));

    let mut restarted = job;
    restarted.restarted_at_ms += 4000;
    restarted.delay_ms = 9000;
    assert_eq!(
        restarted.value_over(GO),
        GO.replace("51.123456789", "55.123").replace("8000000000", "9000000000")
    );
}

#[test]
fn fields_and_values_are_escaped_as_go_does() {
    assert_eq!(
        field("<a>&", "@\u{2028}\u{2029}é\"\\\n\u{1}\u{7f}:x"),
        "[\"\\u003ca\\u003e\\u0026\",\"@\\u2028\\u2029é\\\"\\\\\\n\\u0001\u{7f}:x\"]"
    );
    let mut job = read_ok(GO_FIELD, GO);
    job.delay_id = "<&>".into();
    assert!(job.value().contains(r#""DelayId":"\u003c\u0026\u003e""#));
}

#[test]
fn what_only_we_store_stands_under_one_key_and_survives() {
    let mut job = read_ok(GO_FIELD, GO);
    job = JobRecord {
        user: "@a:x".into(),
        delegated_at_ms: Some(1_784_798_900_000),
        as_user: true,
        sid: Some("PA_1".into()),
        joined_at_ms: 1_784_798_931_000,
        room_sid: Some("RM_1".into()),
        last_sighted_ms: Some(1_784_798_931_001),
        seen: true,
        replaces: vec![Replaced {
            delay_id: "syd_0".into(),
            until_ms: 1_784_798_940_000,
        }],
        ..job
    };
    let value = job.value();
    let members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&value).unwrap();
    assert_eq!(members.keys().collect::<Vec<_>>(), [OURS, "Params", "RestartedAt"]);
    assert_eq!(read_ok(GO_FIELD, &value), job);
    assert_eq!(rewritten(GO_FIELD, &value), value);
}

#[test]
fn keys_that_nobody_knows_survive() {
    let value = r#"{"Lease":{"n":12345678901234567890123,"s":"\ud800"},"Params":{"DelayId":"d","DelayTimeout":8000000001,"ServerName":"x","LiveKitRoom":"r","LiveKitIdentity":"i","New":[1.50]},"RestartedAt":"2026-07-23T11:28:51.5+02:00","LkJwtServiceWatch":{"seen":true,"generation":7}}"#;
    let field = r#"["r", "i"]"#;
    assert_eq!(JobRecord::read_with(field.as_bytes(), value.as_bytes()).unwrap().1, value);
    let written = rewritten(field, value);
    for kept in [
        r#""Lease":{"n":12345678901234567890123,"s":"\ud800"}"#,
        r#""New":[1.50]"#,
        r#""generation":7"#,
        r#""DelayTimeout":8000000001"#,
        r#""RestartedAt":"2026-07-23T11:28:51.5+02:00""#,
    ] {
        assert!(written.contains(kept), "{kept} is missing in {written}");
    }
    assert_eq!(rewritten(field, &written), written);
}

#[test]
fn reads_as_leniently_as_go() {
    let lower = GO
        .replace("Params", "params")
        .replace("DelayId", "DELAYID")
        .replace("RestartedAt", "restartedat");
    assert_eq!(read_ok(GO_FIELD, &lower), read_ok(GO_FIELD, GO));
    assert_eq!(read_ok(GO_FIELD, &GO.replace("8000000000", "8000000000.0")).delay_ms, 8000);
    assert_eq!(read_ok(GO_FIELD, &GO.replace("8000000000", "8e9")).delay_ms, 8000);
    // The last one wins, as everywhere.
    assert_eq!(
        read_ok(GO_FIELD, &GO.replace("\"RestartedAt\"", "\"RestartedAt\":null,\"RestartedAt\"")).delay_ms,
        8000
    );
    for nothing in [
        r#"{"Params":{"DelayId":"d"}}"#,
        r#"{"Params":{"DelayId":"d","LiveKitRoom":null},"RestartedAt":null}"#,
        r#"{"Params":{"DelayId":"d","DelayTimeout":null}}"#,
    ] {
        let job = read_ok(GO_FIELD, nothing);
        assert_eq!((job.delay_ms, job.restarted_at_ms), (0, time::ZERO_MS), "{nothing}");
        assert_eq!(&*job.identity, "@a:x:DEV", "the field says who it is");
        assert!(job.expires_at_ms() < 0);
    }
    // What is wrong in our own part is as good as absent.
    let odd = GO.replace(
        "\"RestartedAt\"",
        r#""LkJwtServiceWatch":{"sid":5,"seen":"x","joinedAtMs":-1,"replaces":[{"delayId":"d"}]},"RestartedAt""#,
    );
    assert_eq!(read_ok(GO_FIELD, &odd), read_ok(GO_FIELD, GO));
    let number = GO.replace("\"RestartedAt\"", r#""LkJwtServiceWatch":7,"RestartedAt""#);
    assert_eq!(read_ok(GO_FIELD, &number), read_ok(GO_FIELD, GO));
}

#[test]
fn what_is_no_record_is_told_apart() {
    let read = |value: &str| JobRecord::read(GO_FIELD.as_bytes(), value.as_bytes()).unwrap_err();
    for (value, why) in [
        ("", Unreadable("it is no JSON object")),
        ("null", Unreadable("it is no JSON object")),
        ("[]", Unreadable("it is no JSON object")),
        ("{} x", Unreadable("it is no JSON object")),
        (r#"{"Params":[]}"#, Unreadable("it is no JSON object")),
        (r#"{"Params":{"DelayId":5}}"#, Unreadable("a value has the wrong type")),
        (r#"{"Params":{"DelayTimeout":"8"}}"#, Unreadable("a value has the wrong type")),
        (r#"{"Params":{"DelayTimeout":1.5}}"#, Unreadable("a value has the wrong type")),
        (
            r#"{"Params":{"DelayTimeout":9223372036854775808}}"#,
            Unreadable("a value has the wrong type"),
        ),
        (r#"{"RestartedAt":5}"#, Unreadable("a value has the wrong type")),
        (r#"{"RestartedAt":"2026-07-23t09:28:51z"}"#, Unreadable("RestartedAt is no time")),
        ("{}", Unreadable("DelayId is not the id of an event")),
        (r#"{"Params":null}"#, Unreadable("DelayId is not the id of an event")),
        (r#"{"Params":{"DelayId":""}}"#, Unreadable("DelayId is not the id of an event")),
        (r#"{"Params":{"DelayId":"."}}"#, Unreadable("DelayId is not the id of an event")),
        (r#"{"Params":{"DelayId":".."}}"#, Unreadable("DelayId is not the id of an event")),
    ] {
        assert_eq!(read(value), why, "{value}");
    }
    let nameless = |field: &[u8]| JobRecord::read(field, b"{}").unwrap_err();
    assert_eq!(nameless(b"x"), Unreadable("it names no room or no participant"));
    assert_eq!(nameless(br#"["","i"]"#), Unreadable("it names no room or no participant"));
    assert_eq!(nameless(br#"["a","b","c"]"#), Unreadable("it names no room or no participant"));
    assert_eq!(nameless(b"\xff"), Unreadable("it is not UTF-8"));
    assert_eq!(nameless(&vec![b'x'; MAX_BYTES + 1]), Unreadable("it is too long"));
}

#[test]
fn a_rewritten_record_stays_readable_whatever_was_kept() {
    // Just short enough to be read; our own keys would make it too long.
    let filler = "x".repeat(MAX_BYTES - GO.len() - 10);
    let value = GO.replacen('{', &format!(r#"{{"k":"{filler}","#), 1);
    let mut job = read_ok(GO_FIELD, &value);
    job.user = "@somebody-with-a-long-name:example.org".into();
    let written = job.value_over(&value);
    assert_eq!(read_ok(GO_FIELD, &written), job);
}

/// A record, or something that looks a little like one.
fn almost_a_record() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        Just(json!("2026-07-23T09:28:51.123456789Z")),
        "\\PC{0,12}".prop_map(|s| json!(s)),
    ];
    let key = prop_oneof![
        prop::sample::select(vec![
            "Params",
            "params",
            "RestartedAt",
            "DelayId",
            "DelayTimeout",
            "ServerName",
            "LiveKitRoom",
            "LiveKitIdentity",
            OURS,
            "sid",
            "seen",
            "user",
            "joinedAtMs",
            "lastSighted",
        ])
        .prop_map(str::to_owned),
        "\\PC{0,6}",
    ];
    let value = leaf.prop_recursive(3, 24, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            prop::collection::hash_map(key.clone(), inner, 0..8).prop_map(|map| json!(map)),
        ]
    });
    prop_oneof![
        3 => value.prop_map(|value| value.to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
        2 => (0..GO.len(), any::<u8>()).prop_map(|(at, byte)| {
            let mut bytes = GO.as_bytes().to_vec();
            bytes[at] = byte;
            bytes
        }),
    ]
}

proptest! {
    // `tests/fuzz` tries a million.
    #[test]
    fn reading_never_panics_and_rewriting_changes_nothing(value in almost_a_record(), room in "\\PC{1,9}", identity in "\\PC{1,9}") {
        let stored_field = field(&room, &identity);
        if let Ok(job) = JobRecord::read(stored_field.as_bytes(), &value) {
            let written = job.value_over(std::str::from_utf8(&value).unwrap());
            prop_assert_eq!(read_ok(&stored_field, &written), job);
            prop_assert_eq!(rewritten(&stored_field, &written), written);
        }
    }

    #[test]
    fn every_job_survives(
        texts in prop::array::uniform4("\\PC{1,12}"), delay_ms in 0..86_400_000i64, restarted_at_ms in 0..4_000_000_000_000i64,
        user in "\\PC{0,9}", joined_at_ms in 0..4_000_000_000_000u64, last_sighted_ms: Option<i64>, seen: bool,
        replaced in prop::collection::vec(("\\PC{1,9}", any::<i64>()), 0..8),
    ) {
        let [room, identity, delay_id, homeserver] = texts.map(Cow::Owned);
        let replaces = replaced.into_iter().map(|(delay_id, until_ms)| Replaced { delay_id: delay_id.into(), until_ms });
        let replaces = replaces.filter(|replaced| is_event(&replaced.delay_id)).collect();
        let job = JobRecord {
            room, identity, delay_id, delay_ms, homeserver, restarted_at_ms, user: user.into(), joined_at_ms, last_sighted_ms, seen,
            replaces, ..JobRecord::default()
        };
        prop_assume!(is_event(&job.delay_id));
        let (field, value) = (field(&job.room, &job.identity), job.value());
        prop_assert_eq!(JobRecord::read_with(field.as_bytes(), value.as_bytes()), Ok((job, "")));
        prop_assert_eq!(rewritten(&field, &value), value);
    }

    #[test]
    fn any_bytes_are_survived(field in prop::collection::vec(any::<u8>(), 0..64), value in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = JobRecord::read(&field, &value);
    }
}

#[test]
fn records_of_former_versions_are_read_and_lose_nothing_but_what_was_always_true() {
    let former = GO.replace(
        "\"RestartedAt\"",
        r#""LkJwtServiceWatch":{"user":"@a:x","delegatedAt":7,"createsRoom":true,"asUser":false,"seen":true},"RestartedAt""#,
    );
    let job = read_ok(GO_FIELD, &former);
    assert_eq!(
        (&*job.user, job.delegated_at_ms, job.as_user, job.seen),
        ("@a:x", Some(7), false, true)
    );
    assert!(
        job.value_over(&former)
            .contains(r#""LkJwtServiceWatch":{"user":"@a:x","delegatedAt":7,"seen":true}"#)
    );
}

#[test]
fn eight_replaced_events_are_written_and_read_the_oldest_goes() {
    let replaced = |n: i64, id: &str| Replaced {
        delay_id: format!("{id}{n}").into(),
        until_ms: n,
    };
    let mut job = read_ok(GO_FIELD, GO);
    job.replaces = (0..10).map(|n| replaced(n, "d")).collect();
    let value = job.value();
    assert_eq!(read_ok(GO_FIELD, &value).replaces, job.replaces[2..]);
    // What somebody else wrote is not believed to be bounded, nor to name events.
    let many: Vec<_> = (0..20)
        .map(|n| json!({"delayId": if n % 2 == 0 { ".." } else { "x" }, "until": n, "more": 1}))
        .collect();
    let ours = format!(r#""LkJwtServiceWatch":{{"replaces":{}}},"RestartedAt""#, json!(many));
    let read = read_ok(GO_FIELD, &GO.replace("\"RestartedAt\"", &ours)).replaces;
    assert_eq!(
        read.iter().map(|replaced| replaced.until_ms).collect::<Vec<_>>(),
        [5, 7, 9, 11, 13, 15, 17, 19]
    );
    // Where the record would be too long to be read, the oldest go.
    let long = "x".repeat(3000);
    job.replaces = (0..8).map(|n| replaced(n, &long)).collect();
    let value = job.value();
    assert!(value.len() <= MAX_BYTES);
    assert_eq!(read_ok(GO_FIELD, &value).replaces, job.replaces[3..]);
}

#[test]
fn a_record_of_a_delegation_is_bounded_as_it_is_stored() {
    let delegation = |delay_id: String| JobRecord {
        room: "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs".into(),
        identity: "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs".into(),
        delay_id: delay_id.into(),
        delay_ms: 8000,
        homeserver: "example.org".into(),
        user: "@a:example.org".into(),
        as_user: true,
        ..JobRecord::default()
    };
    for name in ["x", "~", "<", "\u{0}", "\"", "é", "\u{2028}"] {
        let longest = JobRecord {
            delay_ms: 86_400_000,
            room: name.repeat(50).into(),
            user: name.repeat(90).into(),
            ..delegation(name.repeat(70))
        };
        let written = longest.field().len() + longest.value().len();
        assert!(written <= longest.longest(), "{name:?}: {written}, {}", longest.longest());
    }
    let most = (0..3000).take_while(|n| delegation("x".repeat(*n)).fits()).last().unwrap();
    assert!((1300..1600).contains(&most), "{most}");
    assert!(!delegation("<".repeat(most / 2)).fits(), "it counts what is stored");
    let sighted = JobRecord {
        restarted_at_ms: 1_784_798_931_123,
        delegated_at_ms: Some(1_784_798_931_123),
        sid: Some("PA_Pt7njTzCJd84".into()),
        joined_at_ms: 1_784_798_931_123,
        room_sid: Some("RM_fVRDLoGhLVAK".into()),
        last_sighted_ms: Some(1_784_798_931_123),
        seen: true,
        ..delegation("x".repeat(most))
    };
    assert!(sighted.field().len() + sighted.value().len() <= MAX_DELEGATED_BYTES);
}

#[test]
fn of_two_delegations_the_later_one_counts_and_names_the_other() {
    let job = |delay_id: &'static str, at: i64| JobRecord {
        room: "r".into(),
        identity: "i".into(),
        delay_id: delay_id.into(),
        delay_ms: 18_000,
        restarted_at_ms: at,
        delegated_at_ms: Some(at),
        user: "@a:hs".into(),
        ..JobRecord::default()
    };
    let names = |job: &JobRecord<'_>| {
        job.replaces
            .iter()
            .map(|replaced| replaced.delay_id.to_string())
            .collect::<Vec<_>>()
    };
    let stored = job("x", 10_000);
    for (at, now, winner, loser) in [
        (10_251, 20_000, "y", "x"),
        (9_751, 20_000, "y", "x"),
        (9_750, 20_000, "x", "y"),
        // What is stored lies in the future.
        (5_000, 9_999, "y", "x"),
    ] {
        let own = job("y", at);
        let merged = own.in_order_with(Some(&stored), Some(now), 250).unwrap();
        assert_eq!((&*merged.delay_id, names(&merged)), (winner, vec![loser.to_owned()]), "{at}");
        // The same again changes nothing.
        let again = own.in_order_with(Some(&merged), Some(now), 250).unwrap();
        assert_eq!((&*again.delay_id, names(&again)), (winner, vec![loser.to_owned()]), "{at}");
    }
    // The same event: the later moments of both, and the session that was sighted last.
    let mut sighted = job("x", 9_000);
    (sighted.sid, sighted.last_sighted_ms, sighted.seen) = (Some("PA".into()), Some(9_500), true);
    let renewed = job("x", 11_000);
    for (own, other) in [(&sighted, &renewed), (&renewed, &sighted)] {
        let merged = own.in_order_with(Some(other), None, 250).unwrap();
        assert_eq!((merged.delegated_at_ms, merged.restarted_at_ms), (Some(11_000), 11_000));
        assert_eq!((merged.sid.as_deref(), merged.seen, names(&merged)), (Some("PA"), true, Vec::new()));
    }
    // Another user's stays as it is; nobody's is taken over.
    let strange = JobRecord {
        user: "@b:hs".into(),
        ..job("x", 1)
    };
    assert_eq!(job("y", 2).in_order_with(Some(&strange), None, 250), None);
    let of_the_go_service = JobRecord {
        user: "".into(),
        ..job("x", 1)
    };
    assert_eq!(
        names(&job("y", 2).in_order_with(Some(&of_the_go_service), None, 250).unwrap()),
        ["x"]
    );
    let own = job("y", 2);
    assert_eq!(own.in_order_with(None, None, 250), Some(own.clone()));
}

#[test]
fn a_record_that_was_handed_over_covers_what_is_known_until_something_is_added() {
    let replaced = |delay_id: &'static str| Replaced {
        delay_id: delay_id.into(),
        until_ms: 1,
    };
    let handed = JobRecord {
        delay_id: "syd_1".into(),
        replaces: vec![replaced("syd_0")],
        ..JobRecord::default()
    };
    let with = |change: fn(&mut JobRecord<'static>)| {
        let mut now = handed.clone();
        change(&mut now);
        now.is_covered_by(&handed)
    };
    assert!(with(|_| {}));
    assert!(with(|now| now.restarted_at_ms = 5));
    assert!(with(|now| now.replaces.clear()), "it was cancelled meanwhile");
    assert!(!with(|now| now.delay_id = "syd_2".into()));
    assert!(!with(|now| now.seen = true));
    assert!(!with(|now| now.sid = Some("PA_1".into())));
    // One that arrived before and finished its checks after.
    let mut late = handed.clone();
    late.replaces.push(replaced("syd_late"));
    assert!(!late.is_covered_by(&handed));
}
