use super::*;

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn event(digest: u64, id: &'static str) -> SfuEvent<'static> {
    SfuEvent {
        kind: EventKind::Joined,
        digest,
        issued_at: 1,
        id,
        created_at: 1,
        room: "room",
        room_sid: "RM",
        identity: "al",
        sid: "PA",
        joined_at_ms: 1,
    }
}

#[test]
fn l2_a_repeat_has_the_same_token_or_the_same_id_and_all_else_that_names_it() {
    let first = event(1, "EV");
    for (second, repeat) in [
        (event(1, "other"), true),
        (event(2, "EV"), true),
        (event(2, "other"), false),
        (
            SfuEvent {
                kind: EventKind::Track,
                digest: 2,
                ..first
            },
            false,
        ),
        (
            SfuEvent {
                sid: "PB",
                digest: 2,
                ..first
            },
            false,
        ),
        (
            SfuEvent {
                created_at: 2,
                digest: 2,
                ..first
            },
            false,
        ),
    ] {
        let mut recent = RecentEvents::default();
        assert!(!recent.is_repeat(&first, at(0)));
        assert_eq!(recent.is_repeat(&second, at(1)), repeat, "{second:?}");
    }
}

/// Other programs leave out a part, and use one id for all.
#[test]
fn l2_an_id_counts_only_where_nothing_is_missing() {
    for bare in [
        event(1, ""),
        SfuEvent { sid: "", ..event(1, "EV") },
        SfuEvent {
            created_at: 0,
            ..event(1, "EV")
        },
    ] {
        let mut recent = RecentEvents::default();
        assert!(!recent.is_repeat(&bare, at(0)));
        assert!(!recent.is_repeat(&SfuEvent { digest: 2, ..bare }, at(1)), "{bare:?}");
        assert!(recent.is_repeat(&bare, at(2)));
    }
}

#[test]
fn l2_repeats_are_known_for_ten_minutes_and_65_536_at_most() {
    let mut recent = RecentEvents::default();
    assert!(!recent.is_repeat(&event(1, ""), at(0)));
    assert!(recent.is_repeat(&event(1, ""), at(600_000)));
    assert!(!recent.is_repeat(&event(1, ""), at(600_001)));
    let mut recent = RecentEvents::default();
    for n in 0..200_000 {
        assert!(!recent.is_repeat(
            &SfuEvent {
                created_at: 1 + n as i64,
                ..event(n, "EV")
            },
            at(0)
        ));
        assert!(recent.known.len() <= MAX_REMEMBERED && recent.order.len() == recent.known.len());
    }
    assert!(recent.is_repeat(&event(199_999, ""), at(1)));
    assert!(!recent.is_repeat(&event(150_000, ""), at(1)), "the oldest went");
}

#[test]
fn l2_an_event_is_placed_by_the_least_difference_of_ten_minutes() {
    let mut clock = SfuClock::default();
    assert_eq!(clock.place(5, at(100)), None, "nothing is known yet");
    clock.learn(0, at(0));
    assert_eq!(clock.place(5, at(100)), None, "0 is missing");
    let of = |millis: u64| Time::from_millis(millis);
    clock.learn(100, of(107_000));
    assert_eq!(clock.place(100, of(120_000)), Some(of(107_000)));
    clock.learn(110, of(112_000));
    assert_eq!(clock.place(100, of(120_000)), Some(of(102_000)), "messages only ever come late");
    assert_eq!(clock.place(0, of(120_000)), None);
    assert_eq!(clock.place(500, of(120_000)), Some(of(120_000)), "not in the future");
    clock.learn(120, of(150_000));
    assert_eq!(clock.place(100, of(150_000)), Some(of(102_000)));
    // The SFU's clock was set back: after two windows only what was seen since counts.
    for minute in 3..20 {
        clock.learn(minute * 60 - 1_000, of(minute as u64 * 60_000 + 5));
    }
    assert_eq!(clock.place(0 - 100, of(1_200_000)), Some(of(900_005)));
    assert_eq!(clock.place(100, of(1_800_000)), None, "and what is too old counts no more");
}
