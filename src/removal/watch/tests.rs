use super::*;

const INTERVAL: u64 = 30_000;
const HOUR: u64 = 3_600_000;
const TEN_MINUTES: u64 = 600_000;
const ROOM: &str = "call";

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn watch() -> Watch {
    bounded(1000, 100)
}

fn bounded(most: usize, most_per_user: u32) -> Watch {
    let config = Config {
        interval: INTERVAL,
        own: "own.example".into(),
        most,
        most_per_user,
    };
    Watch::new(config, 7, at(0))
}

fn token<'a>(user_id: &'a str, identity: &'a str, now: u64, checked: bool) -> Token<'a> {
    Token {
        room_id: "!r:own.example",
        user_id,
        room: ROOM,
        identity,
        end: at(now + HOUR),
        checked,
    }
}

fn key(identity: &str) -> Key {
    Key::new(ROOM, identity)
}

fn all() -> About {
    About::All(ROOM.into())
}

fn one(identity: &str) -> About {
    About::One(key(identity))
}

/// Whom a question asks about, and about whom it wants to know whether our homeserver is there.
fn asked_about(outputs: &[Output]) -> Vec<(About, Vec<(String, bool)>)> {
    let asks = outputs.iter().filter_map(|output| match output {
        Output::Ask(question) => Some(question),
        Output::List(_) | Output::Get(_) | Output::Remove(_) | Output::Persist(_) | Output::Forget(_) => None,
    });
    asks.map(|question| {
        let people = question.people.iter();
        let people = people.map(|person| (person.user_id.to_string(), person.doubtful)).collect();
        (question.about.clone(), people)
    })
    .collect()
}

/// What is left when nothing is stored.
fn calls(outputs: Vec<Output>) -> Vec<Output> {
    let stored = |output: &Output| matches!(output, Output::Persist(_) | Output::Forget(_));
    outputs.into_iter().filter(|output| !stored(output)).collect()
}

fn issue(watch: &mut Watch, token: &Token<'_>, now: u64) {
    assert!(calls(watch.issued(token, at(now)).expect("a place")).is_empty());
}

/// The sweep at `now` asks about all of the room; `joined` are its members by a question asked then.
fn sweep(watch: &mut Watch, joined: &[&str], own_is_in: Option<bool>, now: u64) -> Vec<Output> {
    let asked = asked_about(&watch.time(at(now)));
    assert_eq!(asked.len(), 1, "a question at {now}");
    answer(watch, &all(), joined, own_is_in, now)
}

fn answer(watch: &mut Watch, about: &About, joined: &[&str], own_is_in: Option<bool>, now: u64) -> Vec<Output> {
    let said = |user: &str| {
        Some(Said {
            joined: joined.contains(&user),
            asked: at(now),
        })
    };
    let mut out = watch.answered(about, &said, own_is_in, at(now));
    out.extend(watch.over(about, at(now)));
    calls(out)
}

fn removed(watch: &mut Watch, identity: &str, outcome: Outcome, now: u64) -> Vec<Output> {
    calls(watch.removed(&key(identity), outcome, at(now), at(now)))
}

#[test]
fn who_left_is_removed_within_an_interval_and_again_at_each_sweep() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 1);
    assert_eq!(watch.next_deadline(), Some(at(1 + INTERVAL)));
    assert!(watch.time(at(INTERVAL)).is_empty());
    let out = watch.time(at(1 + INTERVAL));
    assert_eq!(asked_about(&out), [(all(), vec![("@a:own.example".into(), false)])]);
    assert!(answer(&mut watch, &all(), &["@a:own.example"], None, 1 + INTERVAL).is_empty());
    assert_eq!(watch.next_deadline(), Some(at(1 + 2 * INTERVAL)));

    for n in 2..5 {
        let now = 1 + n * INTERVAL;
        assert_eq!(sweep(&mut watch, &[], None, now), [Output::Remove(key("a"))], "sweep {n}");
        let outcome = if n == 2 { Outcome::Removed } else { Outcome::NotThere };
        assert!(removed(&mut watch, "a", outcome, now).is_empty());
    }
    // Back in the Matrix room.
    assert!(sweep(&mut watch, &["@a:own.example"], None, 1 + 5 * INTERVAL).is_empty());
    assert!(watch.came(ROOM, "a", at(1 + 5 * INTERVAL)).is_empty());
    assert!(!watch.row(&key("a")).unwrap().past.left);
}

#[test]
fn who_was_never_known_as_a_member_is_never_removed() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, false), 0);
    let mut asked = 0;
    for n in 1..100 {
        let out = watch.time(at(n * INTERVAL));
        asked += asked_about(&out).len();
        if !asked_about(&out).is_empty() {
            assert!(answer(&mut watch, &all(), &[], Some(true), n * INTERVAL).is_empty());
        }
    }
    assert_eq!(asked, 4 + 5, "less and less often: after 2, 4, 8, and then every 16 sweeps");
    // Once seen as a member, they are.
    let mut now = 100 * INTERVAL;
    while asked_about(&watch.time(at(now))).is_empty() {
        now += INTERVAL;
    }
    let out = watch.answered(&all(), &|_| Some(Said { joined: true, asked: at(now) }), None, at(now));
    assert_eq!(out, [Output::Persist(key("a"))]);
    assert!(calls(watch.over(&all(), at(now))).iter().all(|output| matches!(output, Output::Get(_))));
    assert_eq!(sweep(&mut watch, &[], None, now + INTERVAL), [Output::Remove(key("a"))]);
}

#[test]
fn without_our_homeserver_in_the_room_only_its_own_users_and_checked_tokens_count() {
    let users = [
        ("@checked:else.example", "checked", true),
        ("@ours:own.example", "ours", false),
        ("@seen:else.example", "seen", false),
    ];
    let everybody = users.map(|(user, ..)| user);
    for (own_is_in, gone) in [
        (Some(false), vec!["checked", "ours"]),
        (None, vec!["checked", "ours"]),
        (Some(true), vec!["checked", "ours", "seen"]),
    ] {
        let mut watch = watch();
        for (user, identity, checked) in users {
            issue(&mut watch, &token(user, identity, 0, checked), 0);
        }
        assert!(sweep(&mut watch, &everybody, None, INTERVAL).is_empty());
        let asked = asked_about(&watch.time(at(2 * INTERVAL)));
        assert_eq!(
            asked[0].1,
            [
                ("@checked:else.example".to_owned(), false),
                ("@ours:own.example".to_owned(), false),
                ("@seen:else.example".to_owned(), true),
            ]
        );
        assert_eq!(
            answer(&mut watch, &all(), &[], own_is_in, 2 * INTERVAL),
            [Output::List(ROOM.into())],
            "never the room as a whole"
        );
        let there = |_: &Name| true;
        let now = at(2 * INTERVAL);
        let out = watch.listed(&ROOM.into(), Some(&there), now, now);
        assert_eq!(out, gone.into_iter().map(|identity| Output::Remove(key(identity))).collect::<Vec<_>>());
    }
}

#[test]
fn what_is_not_a_clear_answer_changes_nothing() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
    for n in 1..10 {
        assert_eq!(asked_about(&watch.time(at(n * INTERVAL))).len(), 1);
        assert!(watch.answered(&all(), &|_| None, Some(true), at(n * INTERVAL)).is_empty());
        assert!(watch.over(&all(), at(n * INTERVAL)).is_empty());
    }
    // A no that was asked for before the last yes, or at the same time, is none.
    issue(&mut watch, &token("@a:own.example", "a", 280_000, true), 280_000);
    for asked in [279_999, 280_000] {
        let said = |_: &str| {
            Some(Said {
                joined: false,
                asked: at(asked),
            })
        };
        assert!(watch.answered(&all(), &said, Some(true), at(280_001)).is_empty());
    }
    assert!(!watch.row(&key("a")).unwrap().past.left);
}

#[test]
fn a_call_is_not_asked_about_twice_at_a_time_and_the_lanes_are_bounded() {
    let mut watch = watch();
    for n in 0..20 {
        let room = format!("call{n}");
        let token = Token {
            room: &room,
            ..token("@a:own.example", "a", 0, true)
        };
        issue(&mut watch, &token, 0);
    }
    let asked = asked_about(&watch.time(at(INTERVAL)));
    assert_eq!(asked.len(), LANES);
    assert_eq!(watch.next_deadline(), None);
    // However late, those that are under way are left alone; each answer makes room for one more.
    assert!(watch.time(at(10 * INTERVAL)).is_empty());
    let mut seen: BTreeSet<Name> = asked.iter().map(|(about, _)| about.room().clone()).collect();
    for about in asked.into_iter().skip(1).map(|(about, _)| about) {
        let next = asked_about(&watch.over(&about, at(10 * INTERVAL)));
        assert_eq!(next.len(), 1);
        assert!(seen.insert(next[0].0.room().clone()), "once in a sweep");
    }
}

#[test]
fn of_several_only_those_who_are_there_are_removed() {
    let mut watch = watch();
    for (user, identity) in [("@a:own.example", "a"), ("@b:own.example", "b"), ("@c:own.example", "c")] {
        issue(&mut watch, &token(user, identity, 0, true), 0);
    }
    let out = sweep(&mut watch, &["@b:own.example"], None, INTERVAL);
    assert_eq!(out, [Output::List(ROOM.into())]);
    let there = |identity: &Name| *identity != Name::from("a");
    let now = at(INTERVAL + 100);
    let out = watch.listed(&ROOM.into(), Some(&there), now, now);
    assert_eq!(out, [Output::Remove(key("c"))]);
    let out = sweep(&mut watch, &["@b:own.example"], None, 2 * INTERVAL);
    assert_eq!(out, [Output::Remove(key("a"))], "c is being removed");
}

#[test]
fn without_a_list_each_is_tried_again() {
    let mut watch = watch();
    for (user, identity) in [("@a:own.example", "a"), ("@b:own.example", "b")] {
        issue(&mut watch, &token(user, identity, 0, true), 0);
    }
    assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::List(ROOM.into())]);
    assert!(watch.listed(&ROOM.into(), None, at(INTERVAL), at(INTERVAL)).is_empty());
    let next = watch.next_deadline().unwrap();
    assert!((at(INTERVAL + 250)..=at(INTERVAL + 500)).contains(&next));
    let asked = asked_about(&watch.time(at(INTERVAL + 500)));
    assert_eq!(
        asked.iter().map(|(about, _)| about.clone()).collect::<BTreeSet<_>>(),
        [one("a"), one("b")].into()
    );
}

#[test]
fn a_removal_that_fails_is_tried_again_for_a_minute_and_asked_about_each_time() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
    assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::Remove(key("a"))]);
    let (mut now, mut tries) = (at(INTERVAL), 0);
    loop {
        let out = watch.removed(&key("a"), Outcome::Failed, now, now);
        assert!(calls(out).is_empty());
        // Sweeps leave it to that.
        let next = watch.next_deadline().unwrap();
        if !watch.singles.contains_key(&key("a")) {
            break;
        }
        now = next;
        let asked = asked_about(&watch.time(now));
        for (about, _) in asked {
            let said = |_: &str| {
                Some(Said {
                    joined: false,
                    asked: now,
                })
            };
            let out = watch.answered(&about, &said, None, now);
            if about == one("a") {
                assert_eq!(out, [Output::Remove(key("a"))]);
                tries += 1;
            } else {
                assert!(out.is_empty(), "{out:?}");
            }
            let _ = watch.over(&about, now);
        }
        if watch.seat(&key("a")).is_some_and(|seat| !seat.removing) {
            // That was the sweep alone.
            let at = watch.next_deadline().unwrap();
            now = at;
            for (about, _) in asked_about(&watch.time(now)) {
                let said = |_: &str| {
                    Some(Said {
                        joined: false,
                        asked: now,
                    })
                };
                let _ = watch.answered(&about, &said, None, now);
                let _ = watch.over(&about, now);
                tries += 1;
            }
        }
    }
    assert!((5..20).contains(&tries), "{tries}");
    assert!(now.since(at(INTERVAL)) <= RETRIED_FOR);
}

#[test]
fn who_is_joined_again_before_the_next_try_is_left_alone() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
    assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::Remove(key("a"))]);
    assert!(removed(&mut watch, "a", Outcome::Failed, INTERVAL).is_empty());
    let next = INTERVAL + 500;
    assert_eq!(asked_about(&watch.time(at(next))).len(), 1);
    assert!(answer(&mut watch, &one("a"), &["@a:own.example"], None, next).is_empty());
    assert!(watch.singles.is_empty() && watch.due.is_empty());
}

#[test]
fn who_comes_back_with_the_old_token_is_asked_about_at_once_and_removed() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
    assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::Remove(key("a"))]);
    // They come back while they are being removed, and after that.
    assert!(watch.came(ROOM, "a", at(INTERVAL + 10)).is_empty());
    let mut out = removed(&mut watch, "a", Outcome::Removed, INTERVAL + 20);
    for n in 0..3 {
        let now = INTERVAL + 1000 * (n + 1);
        assert_eq!(asked_about(&out), [(one("a"), vec![("@a:own.example".into(), false)])], "return {n}");
        assert_eq!(answer(&mut watch, &one("a"), &[], None, now), [Output::Remove(key("a"))]);
        assert!(removed(&mut watch, "a", Outcome::Removed, now + 20).is_empty());
        out = watch.came(ROOM, "a", at(now + 500));
    }
    // This time they have joined the Matrix room before.
    assert_eq!(asked_about(&out).len(), 1);
    assert!(answer(&mut watch, &one("a"), &["@a:own.example"], None, INTERVAL + 9000).is_empty());
    assert!(watch.came(ROOM, "a", at(INTERVAL + 9500)).is_empty());
    // No answer: the next sweep asks again.
    assert_eq!(sweep(&mut watch, &[], None, 2 * INTERVAL), [Output::Remove(key("a"))]);
    assert!(removed(&mut watch, "a", Outcome::Removed, 2 * INTERVAL).is_empty());
    assert_eq!(asked_about(&watch.came(ROOM, "a", at(2 * INTERVAL + 10))).len(), 1);
    assert!(watch.over(&one("a"), at(2 * INTERVAL + 20)).is_empty());
    assert!(watch.singles.is_empty());
    assert_eq!(sweep(&mut watch, &[], None, 3 * INTERVAL), [Output::Remove(key("a"))]);
}

#[test]
fn a_checked_token_clears_the_mark_and_another_one_does_not() {
    for (checked, left) in [(true, false), (false, true)] {
        let mut watch = watch();
        issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
        assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::Remove(key("a"))]);
        assert!(removed(&mut watch, "a", Outcome::Removed, INTERVAL).is_empty());
        issue(&mut watch, &token("@a:own.example", "a", INTERVAL + 1, checked), INTERVAL + 1);
        assert_eq!(watch.row(&key("a")).unwrap().past.left, left);
        assert_eq!(watch.row(&key("a")).unwrap().end, at(INTERVAL + 1 + HOUR));
        assert_eq!(asked_about(&watch.came(ROOM, "a", at(INTERVAL + 2))).len(), usize::from(left));
    }
}

#[test]
fn a_token_that_is_issued_while_somebody_is_about_to_be_removed_stops_that() {
    let mut watch = watch();
    for n in 0..=LANES {
        let identity = n.to_string();
        let user = format!("@u{n}:own.example");
        let room = format!("call{n}");
        let token = Token {
            room: &room,
            ..token(&user, &identity, 0, true)
        };
        issue(&mut watch, &token, 0);
    }
    // All lanes to the SFU are taken by others.
    let mut asked = asked_about(&watch.time(at(INTERVAL)));
    let mut removals = Vec::new();
    while let Some((about, _)) = asked.pop() {
        let said = |_: &str| {
            Some(Said {
                joined: false,
                asked: at(INTERVAL),
            })
        };
        let mut out = watch.answered(&about, &said, None, at(INTERVAL));
        out.extend(watch.over(&about, at(INTERVAL)));
        asked.extend(asked_about(&out));
        removals.extend(calls(out).into_iter().filter(|output| matches!(output, Output::Remove(_))));
    }
    assert_eq!((removals.len(), watch.removals.len()), (LANES, 1));
    let Some(Output::Remove(last)) = watch.removals.front() else { panic!("a removal waits") };
    let last = last.clone();
    let (room, identity) = (last.room.to_string(), last.identity.to_string());
    let user = format!("@u{identity}:own.example");
    let again = Token {
        room: &room,
        ..token(&user, &identity, INTERVAL, true)
    };
    issue(&mut watch, &again, INTERVAL + 1);
    let Some(Output::Remove(first)) = removals.pop() else { panic!("a removal") };
    let out = watch.removed(&first, Outcome::Removed, at(INTERVAL), at(INTERVAL + 2));
    assert!(calls(out).is_empty(), "they are members again");
    assert!(!watch.seat(&last).unwrap().removing);
}

#[test]
fn a_no_that_waited_too_long_is_asked_for_again() {
    let mut watch = watch();
    for (user, identity) in [("@a:own.example", "a"), ("@b:own.example", "b")] {
        issue(&mut watch, &token(user, identity, 0, true), 0);
    }
    assert_eq!(sweep(&mut watch, &[], None, INTERVAL), [Output::List(ROOM.into())]);
    let now = at(INTERVAL + FRESH + 1);
    let out = watch.listed(&ROOM.into(), Some(&|_| true), at(INTERVAL), now);
    let asked = asked_about(&out);
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(out.iter().all(|output| !matches!(output, Output::Remove(_))));
}

/// Whatever is asked meanwhile is not answered.
fn come(watch: &mut Watch, now: u64) {
    for (about, _) in asked_about(&watch.came(ROOM, "a", at(now))) {
        assert!(watch.over(&about, at(now)).is_empty());
    }
}

#[test]
fn a_seat_is_forgotten_when_token_and_ten_minutes_are_over_and_nobody_sits_there() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, false), 0);
    let looks = |watch: &mut Watch, now: u64| {
        let mut out = watch.time(at(now));
        for (about, _) in asked_about(&out) {
            out.extend(watch.over(&about, at(now)));
        }
        out.into_iter().filter(|output| matches!(output, Output::Get(_) | Output::List(_))).collect::<Vec<_>>()
    };
    let gets = [Output::Get(key("a"))];
    // Seen coming a minute before the token's end: the SFU goes on renewing it.
    come(&mut watch, HOUR - 60_000);
    let mut now = HOUR;
    while now < HOUR - 60_000 + TEN_MINUTES {
        assert!(looks(&mut watch, now).is_empty(), "{now}");
        now += INTERVAL;
    }
    // No answer: asked again; somebody is there: for ten minutes not.
    assert_eq!(looks(&mut watch, now), gets);
    assert!(watch.got(&key("a"), None, at(now), at(now)).is_empty());
    now += INTERVAL;
    assert_eq!(looks(&mut watch, now), gets);
    assert!(watch.got(&key("a"), Some(true), at(now), at(now)).is_empty());
    assert!(looks(&mut watch, now + TEN_MINUTES - INTERVAL).is_empty());
    now += TEN_MINUTES;
    // Nobody there, but nobody saw them leave: ten minutes more.
    assert_eq!(looks(&mut watch, now), gets);
    assert!(watch.got(&key("a"), Some(false), at(now), at(now)).is_empty());
    assert!(looks(&mut watch, now + TEN_MINUTES - INTERVAL).is_empty());
    now += TEN_MINUTES;
    assert_eq!(looks(&mut watch, now), gets);
    assert_eq!(watch.got(&key("a"), Some(false), at(now), at(now)), [Output::Forget(key("a"))]);
    assert!(watch.is_empty() && watch.calls.is_empty() && watch.users.is_empty());
    let _ = watch.time(at(now + INTERVAL));
    assert_eq!(watch.next_deadline(), None, "nothing goes on without anybody");
}

#[test]
fn who_never_came_is_forgotten_with_the_token_and_who_was_seen_leaving_ten_minutes_later() {
    for (leaves, kept_until) in [(false, HOUR + LEEWAY), (true, HOUR + TEN_MINUTES)] {
        let mut watch = watch();
        issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
        if leaves {
            come(&mut watch, HOUR - 1000);
            watch.went(ROOM, "a", at(HOUR));
        }
        let mut now = HOUR;
        while watch.len() == 1 {
            now += INTERVAL;
            for output in watch.time(at(now)) {
                match output {
                    Output::Ask(question) => {
                        assert!(answer(&mut watch, &question.about, &["@a:own.example"], None, now).is_empty());
                    }
                    Output::Get(key) => drop(watch.got(&key, Some(false), at(now), at(now))),
                    Output::List(_) | Output::Remove(_) | Output::Persist(_) | Output::Forget(_) => panic!("{output:?}"),
                }
            }
        }
        assert!((kept_until..=kept_until + INTERVAL).contains(&now), "{now}");
    }
}

#[test]
fn an_sfu_that_never_says_anything_does_not_keep_seats_for_ever() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, false), 0);
    let mut now = 0;
    while !watch.is_empty() {
        now += INTERVAL;
        for output in watch.time(at(now)) {
            match output {
                Output::Ask(question) => drop(watch.over(&question.about, at(now))),
                Output::Get(key) => drop(watch.got(&key, None, at(now), at(now))),
                Output::List(_) | Output::Remove(_) | Output::Persist(_) | Output::Forget(_) => {}
            }
        }
    }
    assert!((HOUR + UNCLEAR_FOR..=HOUR + LEEWAY + UNCLEAR_FOR + INTERVAL).contains(&now));
}

#[test]
fn too_many_are_not_kept_in_mind() {
    let mut watch = bounded(5, 3);
    for n in 0..3 {
        issue(&mut watch, &token("@a:own.example", &n.to_string(), 0, true), 0);
    }
    assert!(watch.issued(&token("@a:own.example", "x", 0, true), at(0)).is_none(), "of one user");
    issue(&mut watch, &token("@a:own.example", "1", 1, true), 1);
    issue(&mut watch, &token("@b:own.example", "b", 0, true), 1);
    issue(&mut watch, &token("@c:own.example", "c", 0, true), 1);
    assert!(watch.issued(&token("@d:own.example", "d", 0, true), at(1)).is_none(), "in all");
    assert_eq!((watch.len(), watch.users.len()), (5, 3));
    watch.restore(&token("@e:own.example", "e", 0, true), Past::default(), at(1));
    assert_eq!(watch.len(), 5);
}

#[test]
fn what_is_restored_is_asked_about_soon_and_older_than_what_is_known() {
    let mut watch = watch();
    let past = Past {
        member: true,
        left: false,
        seen: None,
    };
    let marked = Past { left: true, ..past };
    watch.restore(&token("@a:own.example", "a", 0, false), past, at(0));
    watch.restore(&token("@b:own.example", "b", 0, false), Past::default(), at(0));
    watch.restore(&token("@c:own.example", "c", 0, true), marked, at(0));
    issue(&mut watch, &token("@d:own.example", "d", 0, true), 0);
    watch.restore(&token("@d:own.example", "d", 0, true), marked, at(0));
    assert!(!watch.row(&key("d")).unwrap().past.left);
    assert!(watch.row(&key("c")).unwrap().past.left);
    // Who left before is asked about first, too.
    assert_eq!(asked_about(&watch.came(ROOM, "c", at(1))), [(one("c"), vec![("@c:own.example".into(), false)])]);
    assert!(watch.over(&one("c"), at(2)).is_empty());
    assert_eq!(sweep(&mut watch, &["@d:own.example"], None, BREATH), [Output::List(ROOM.into())]);
    let out = watch.listed(&ROOM.into(), Some(&|_| true), at(BREATH), at(BREATH));
    assert_eq!(out, [Output::Remove(key("a")), Output::Remove(key("c"))], "b was never known as a member");
    // A late store does not make us sweep all the time.
    watch.restore(&token("@e:own.example", "e", 0, true), past, at(5000));
    assert_eq!(watch.next_deadline(), Some(at(BREATH + INTERVAL)));
}

#[test]
fn two_users_of_one_name_on_the_sfu_are_two() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "@a:own.example:1:2", 0, true), 0);
    issue(&mut watch, &token("@a:own.example:1", "@a:own.example:1:2", 0, false), 1);
    assert_eq!((watch.len(), watch.users.len()), (1, 1));
    assert!(!watch.row(&key("@a:own.example:1:2")).unwrap().past.member);
}

#[test]
fn a_seat_is_small() {
    assert!(size_of::<Seat>() <= 104, "{}", size_of::<Seat>());
    assert!(size_of::<Call>() <= 64, "{}", size_of::<Call>());
}
