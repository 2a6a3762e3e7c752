use super::*;
use proptest::prelude::*;

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
    About::All(ROOM.into(), Whose::Own)
}

fn one(identity: &str) -> About {
    About::One(key(identity), Whose::Own)
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
    let out = watch.answered(
        &all(),
        &|_| {
            Some(Said {
                joined: true,
                asked: at(now),
            })
        },
        None,
        at(now),
    );
    assert_eq!(out, [Output::Persist(key("a"))]);
    assert!(
        calls(watch.over(&all(), at(now)))
            .iter()
            .all(|output| matches!(output, Output::Get(_)))
    );
    assert_eq!(sweep(&mut watch, &[], None, now + INTERVAL), [Output::Remove(key("a"))]);
}

#[test]
fn without_our_homeserver_in_the_room_only_its_own_users_count() {
    let users = [
        ("@checked:else.example", "checked", true),
        ("@ours:own.example", "ours", false),
        ("@seen:else.example", "seen", false),
    ];
    let everybody = users.map(|(user, ..)| user);
    for (own_is_in, gone) in [
        (Some(false), vec![Output::Remove(key("ours"))]),
        (None, vec![Output::Remove(key("ours"))]),
        // All three: never the room as a whole.
        (Some(true), vec![Output::List(ROOM.into())]),
    ] {
        let mut watch = watch();
        for (user, identity, checked) in users {
            issue(&mut watch, &token(user, identity, 0, checked), 0);
        }
        let others = About::All(ROOM.into(), Whose::Other);
        assert_eq!(asked_about(&watch.time(at(INTERVAL))).len(), 2);
        for about in [all(), others.clone()] {
            assert!(answer(&mut watch, &about, &everybody, None, INTERVAL).is_empty());
        }
        let asked = asked_about(&watch.time(at(2 * INTERVAL)));
        let people = vec![("@checked:else.example".to_owned(), true), ("@seen:else.example".to_owned(), true)];
        assert_eq!(
            asked,
            [(all(), vec![("@ours:own.example".to_owned(), false)]), (others.clone(), people)]
        );
        // As where one question was asked for all of them.
        assert_eq!(answer(&mut watch, &others, &[], own_is_in, 2 * INTERVAL), gone, "{own_is_in:?}");
    }
}

/// A new token for another device does not make a stranger of somebody who has left.
#[test]
fn what_is_known_of_a_user_is_known_of_all_of_their_seats() {
    let mut watch = watch();
    issue(&mut watch, &token("@a:own.example", "a", 0, true), 0);
    let now = 2 * INTERVAL;
    assert_eq!(sweep(&mut watch, &[], None, now), [Output::Remove(key("a"))]);
    issue(&mut watch, &token("@a:own.example", "fresh", now + 1, false), now + 1);
    let row = watch.row(&key("fresh")).unwrap();
    assert!(row.past.member && row.past.left);
    // A checked one says that they are back.
    issue(&mut watch, &token("@a:own.example", "again", now + 2, true), now + 2);
    for identity in ["a", "fresh", "again"] {
        assert!(!watch.row(&key(identity)).unwrap().past.left, "{identity}");
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
    // A no that was asked for before the last yes, or just after it, is none.
    issue(&mut watch, &token("@a:own.example", "a", 280_000, true), 280_000);
    for asked in [279_999, 280_000, 284_999] {
        let said = |_: &str| {
            Some(Said {
                joined: false,
                asked: at(asked),
            })
        };
        assert!(watch.answered(&all(), &said, Some(true), at(285_000)).is_empty());
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
    assert_eq!(
        watch.next_deadline(),
        Some(at(2 * INTERVAL)),
        "the sweep of the others, of whom there are none"
    );
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
fn users_of_other_homeservers_do_not_keep_our_own_waiting() {
    let mut watch = watch();
    for n in 0..2 * LANES {
        let (room, hostile) = (format!("call{n:02}"), format!("@u{n}:hostile.example"));
        let hostile = Token {
            room: &room,
            ..token(&hostile, "h", 0, true)
        };
        issue(&mut watch, &hostile, 0);
        let ours = Token {
            room: &room,
            ..token("@a:own.example", "a", 0, true)
        };
        issue(&mut watch, &ours, 0);
    }
    // Nothing that is asked about the others is ever answered.
    let (mut ours, mut waiting) = (0, asked_about(&watch.time(at(INTERVAL))));
    while let Some(place) = waiting.iter().position(|(about, _)| about.whose() == Whose::Own) {
        let (about, _) = waiting.remove(place);
        ours += 1;
        waiting.extend(asked_about(&watch.over(&about, at(INTERVAL))));
    }
    assert_eq!((ours, waiting.len()), (2 * LANES, LANES));
    assert_eq!(watch.next_deadline(), Some(at(2 * INTERVAL)), "our own are asked about again");
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
    let (mut now, mut tries) = (INTERVAL, 0);
    loop {
        assert!(removed(&mut watch, "a", Outcome::Failed, now).is_empty());
        if watch.singles.is_empty() {
            break;
        }
        // Sweeps leave it to that.
        while watch.seat(&key("a")).is_some_and(|seat| !seat.removing) {
            now = watch.next_deadline().expect("a moment").since(at(0));
            for (about, _) in asked_about(&watch.time(at(now))) {
                let expected = if about == one("a") {
                    vec![Output::Remove(key("a"))]
                } else {
                    vec![]
                };
                assert_eq!(answer(&mut watch, &about, &[], None, now), expected);
            }
        }
        tries += 1;
    }
    assert!((5..20).contains(&tries), "{tries}");
    assert!((INTERVAL + RETRIED_FOR / 2..=INTERVAL + RETRIED_FOR).contains(&now), "{now}");
    assert_eq!(sweep(&mut watch, &[], None, now + INTERVAL), [Output::Remove(key("a"))]);
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
    assert!(watch.singles.is_empty() && watch.sweeps.iter().all(|sweep| sweep.due.is_empty()));
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
        assert_eq!(
            asked_about(&out),
            [(one("a"), vec![("@a:own.example".into(), false)])],
            "return {n}"
        );
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
    let Some(Output::Remove(last)) = watch.removals.front() else {
        panic!("a removal waits")
    };
    let last = last.clone();
    let (room, identity) = (last.room.to_string(), last.identity.to_string());
    let user = format!("@u{identity}:own.example");
    let again = Token {
        room: &room,
        ..token(&user, &identity, INTERVAL, true)
    };
    issue(&mut watch, &again, INTERVAL + 1);
    let Some(Output::Remove(first)) = removals.pop() else {
        panic!("a removal")
    };
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
        out.into_iter()
            .filter(|output| matches!(output, Output::Get(_) | Output::List(_)))
            .collect::<Vec<_>>()
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
fn who_was_seen_leaving_is_forgotten_ten_minutes_later_and_who_was_not_after_two_questions() {
    for (leaves, kept_until) in [(false, HOUR + LEEWAY + TEN_MINUTES), (true, HOUR + TEN_MINUTES)] {
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
fn texts_longer_than_matrix_allows_are_not_kept_in_mind() {
    let mut watch = watch();
    let long = "x".repeat(64 * 1024);
    let good = token("@a:own.example", "a", 0, true);
    let bad = [
        Token { room_id: &long, ..good },
        Token { user_id: &long, ..good },
        Token { room: &long, ..good },
        Token { identity: &long, ..good },
    ];
    for bad in bad {
        assert!(watch.issued(&bad, at(1)).is_none());
        watch.restore(&bad, Past::default(), at(1));
    }
    assert!(watch.is_empty() && watch.calls.is_empty() && watch.users.is_empty());
    let [room_id, user_id, identity] = [255, 255, 511].map(|bytes| "x".repeat(bytes));
    let longest = Token {
        room_id: &room_id,
        user_id: &user_id,
        identity: &identity,
        ..good
    };
    issue(&mut watch, &longest, 1);
    assert_eq!(watch.len(), 1);
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
    assert_eq!(
        asked_about(&watch.came(ROOM, "c", at(1))),
        [(one("c"), vec![("@c:own.example".into(), false)])]
    );
    assert!(watch.over(&one("c"), at(2)).is_empty());
    assert_eq!(sweep(&mut watch, &["@d:own.example"], None, BREATH), [Output::List(ROOM.into())]);
    let out = watch.listed(&ROOM.into(), Some(&|_| true), at(BREATH), at(BREATH));
    assert_eq!(
        out,
        [Output::Remove(key("a")), Output::Remove(key("c"))],
        "b was never known as a member"
    );
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

/// A room on the SFU, and the Matrix users and the identities of those who may sit there.
const SEATS: [(&str, &str, &str); 6] = [
    ("one", "@a:own.example", "a"),
    ("one", "@a:own.example", "a2"),
    ("one", "@b:own.example", "b"),
    ("one", "@c:else.example", "c"),
    ("two", "@a:own.example", "a"),
    ("two", "@b:own.example", "b"),
];

#[derive(Clone, Copy, Debug)]
enum Act {
    Issue(usize),
    Membership(usize, bool),
    Enter(usize, bool),
    Exit(usize, bool),
    RoomEnds(bool),
    Wait(u64),
    Answer(usize, bool),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let seat = || 0..SEATS.len();
    let act = prop_oneof![
        2 => seat().prop_map(Act::Issue),
        2 => (seat(), any::<bool>()).prop_map(|(seat, joined)| Act::Membership(seat, joined)),
        3 => (seat(), any::<bool>()).prop_map(|(seat, told)| Act::Enter(seat, told)),
        2 => (seat(), any::<bool>()).prop_map(|(seat, told)| Act::Exit(seat, told)),
        1 => any::<bool>().prop_map(Act::RoomEnds),
        3 => (0..45_000_u64).prop_map(Act::Wait),
        1 => (0..30 * 60_000_u64).prop_map(Act::Wait),
        6 => (0..4_usize, prop::bool::weighted(0.2)).prop_map(|(which, fails)| Act::Answer(which, fails)),
    ];
    prop::collection::vec(act, 0..120)
}

/// The homeserver, the SFU, and those who use them.
struct World {
    now: u64,
    watch: Watch,
    webhooks: bool,
    joined: BTreeSet<&'static str>,
    /// When users were last not joined, and when a checked token was last issued.
    out_at: BTreeMap<&'static str, u64>,
    checked_at: BTreeMap<(&'static str, &'static str), u64>,
    /// Those who were said to be joined, in a call.
    known: BTreeSet<(&'static str, &'static str)>,
    present: BTreeSet<usize>,
    /// Until when a seat's newest token is good.
    tokens: BTreeMap<usize, u64>,
    /// Under way: what the answer will be, and when it was asked for.
    waiting: Vec<(Output, BTreeSet<String>, u64)>,
    removals: usize,
}

impl World {
    fn new(webhooks: bool) -> Self {
        Self {
            now: 0,
            watch: watch(),
            webhooks,
            joined: SEATS.iter().map(|(_, user, _)| *user).collect(),
            out_at: BTreeMap::new(),
            checked_at: BTreeMap::new(),
            known: BTreeSet::new(),
            present: BTreeSet::new(),
            tokens: BTreeMap::new(),
            waiting: Vec::new(),
            removals: 0,
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Issue(seat) => {
                let (room, user_id, identity) = SEATS[seat];
                // A checked token is only for members.
                let checked = seat % 2 == 0;
                if checked && !self.joined.contains(user_id) {
                    return;
                }
                let token = Token {
                    room,
                    ..token(user_id, identity, self.now, checked)
                };
                if checked {
                    self.checked_at.insert((room, user_id), self.now);
                    self.known.insert((room, user_id));
                }
                self.tokens.insert(seat, self.now + HOUR);
                let out = self.watch.issued(&token, at(self.now)).expect("a place");
                self.take(out);
            }
            Act::Membership(seat, joined) => {
                let user = SEATS[seat].1;
                if joined {
                    if self.joined.insert(user) {
                        self.out_at.insert(user, self.now);
                    }
                } else {
                    self.joined.remove(user);
                }
            }
            Act::Enter(seat, told) => {
                let (room, _, identity) = SEATS[seat];
                if self.tokens.get(&seat).is_none_or(|end| end + LEEWAY <= self.now) || !self.present.insert(seat) {
                    return;
                }
                if self.webhooks {
                    assert!(
                        self.watch.row(&Key::new(room, identity)).is_some(),
                        "who can come in is kept in mind"
                    );
                }
                if told || self.webhooks {
                    let out = self.watch.came(room, identity, at(self.now));
                    self.take(out);
                }
            }
            Act::Exit(seat, told) => {
                let (room, _, identity) = SEATS[seat];
                if self.present.contains(&seat) {
                    self.leaves(seat);
                    if told || self.webhooks {
                        self.watch.went(room, identity, at(self.now));
                    }
                }
            }
            Act::RoomEnds(told) => {
                for seat in self.present.clone().into_iter().filter(|seat| SEATS[*seat].0 == "one") {
                    self.leaves(seat);
                }
                if told || self.webhooks {
                    self.watch.ended("one", at(self.now));
                }
            }
            Act::Wait(millis) => {
                let until = self.now + millis;
                while let Some(next) = self.watch.next_deadline().filter(|next| *next <= at(until)) {
                    self.now = self.now.max(next.since(at(0)));
                    let out = self.watch.time(at(self.now));
                    self.take(out);
                }
                self.now = until;
            }
            Act::Answer(which, fails) => {
                if which < self.waiting.len() {
                    self.answer(which, fails);
                }
            }
        }
    }

    /// The SFU has renewed the token while they were inside.
    fn leaves(&mut self, seat: usize) {
        self.present.remove(&seat);
        let end = self.tokens.entry(seat).or_insert(0);
        *end = (*end).max(self.now + RENEWED_FOR - LEEWAY);
    }

    fn take(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            let mut truth = BTreeSet::new();
            match &output {
                Output::Ask(_) => truth = self.joined.iter().map(ToString::to_string).collect(),
                Output::List(room) => truth = self.present_in(room),
                Output::Get(key) => truth = self.present_in(&key.room),
                Output::Remove(key) => {
                    let seat = self.seat(key);
                    self.may_be_removed(seat);
                    // It happens now; that it happened may never be heard of.
                    if self.present.contains(&seat) {
                        truth.insert("removed".into());
                    }
                }
                Output::Persist(key) => assert!(self.watch.row(key).is_some()),
                Output::Forget(key) => {
                    assert!(self.watch.row(key).is_none());
                    // Who comes in unseen with a token that was renewed unseen may be missed.
                    let inside = self.present.contains(&self.seat(key));
                    assert!(!(self.webhooks && inside), "who is inside is kept in mind");
                }
            }
            if !matches!(output, Output::Persist(_) | Output::Forget(_)) {
                self.waiting.push((output, truth, self.now));
            }
        }
        assert!(self.watch.sweeps.iter().all(|sweep| sweep.asking <= LANES) && self.watch.calling <= LANES);
        assert!(self.waiting.len() <= 3 * LANES);
    }

    fn may_be_removed(&self, seat: usize) {
        let (room, user, _) = SEATS[seat];
        assert!(self.known.contains(&(room, user)), "never known as a member");
        if self.joined.contains(user) {
            // They were not, a moment ago, and have got no new token since.
            let out = self.out_at.get(user).copied().expect("they have been away");
            assert!(self.now - out <= FRESH, "{user} is joined");
            assert!(
                self.checked_at.get(&(room, user)).is_none_or(|checked| *checked <= out),
                "{user} has a new token"
            );
        }
    }

    fn present_in(&self, room: &Name) -> BTreeSet<String> {
        let here = self.present.iter().map(|seat| SEATS[*seat]);
        here.filter(|(name, ..)| Name::from(*name) == *room)
            .map(|(_, _, identity)| identity.to_owned())
            .collect()
    }

    fn seat(&self, key: &Key) -> usize {
        let same = |(room, _, identity): &(&str, &str, &str)| Key::new(room, identity) == *key;
        SEATS.iter().position(same).expect("a seat")
    }

    fn answer(&mut self, which: usize, fails: bool) {
        let (output, truth, asked) = self.waiting.remove(which);
        let (asked, now) = (at(asked), at(self.now));
        let out = match output {
            Output::Ask(question) => {
                if !fails {
                    let said = |user: &str| {
                        let joined = truth.contains(user);
                        Some(Said { joined, asked })
                    };
                    // As a list of all members does: also about those who have come since.
                    let room = self.seat_room(question.about.room());
                    self.known.extend(
                        SEATS
                            .iter()
                            .filter(|(_, user, _)| truth.contains(*user))
                            .map(|(_, user, _)| (room, *user)),
                    );
                    let out = self.watch.answered(&question.about, &said, Some(true), now);
                    self.take(out);
                }
                self.watch.over(&question.about, now)
            }
            Output::List(room) => {
                let there = |identity: &Name| truth.contains(&identity.to_string());
                let there: &dyn Fn(&Name) -> bool = &there;
                self.watch.listed(&room, Some(there).filter(|_| !fails), asked, now)
            }
            Output::Get(key) => {
                let there = truth.contains(&key.identity.to_string());
                self.watch.got(&key, Some(there).filter(|_| !fails), asked, now)
            }
            Output::Remove(key) => {
                let seat = self.seat(&key);
                let outcome = if fails {
                    Outcome::Failed
                } else if truth.contains("removed") {
                    Outcome::Removed
                } else {
                    Outcome::NotThere
                };
                if outcome == Outcome::Removed && self.present.contains(&seat) {
                    self.removals += 1;
                    self.leaves(seat);
                }
                self.watch.removed(&key, outcome, asked, now)
            }
            Output::Persist(_) | Output::Forget(_) => Vec::new(),
        };
        self.take(out);
    }

    fn seat_room(&self, room: &Name) -> &'static str {
        SEATS.iter().find(|(name, ..)| Name::from(*name) == *room).expect("a room").0
    }

    /// From now on everybody answers at once.
    fn calm(&mut self, millis: u64) {
        let until = self.now + millis;
        loop {
            while !self.waiting.is_empty() {
                self.answer(0, false);
            }
            let Some(next) = self.watch.next_deadline().filter(|next| *next <= at(until)) else {
                break;
            };
            self.now = self.now.max(next.since(at(0)));
            let out = self.watch.time(at(self.now));
            self.take(out);
        }
        self.now = until;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn members_stay_and_who_left_goes(acts in acts(), webhooks: bool) {
        let mut world = World::new(webhooks);
        for act in acts {
            world.act(act);
        }
        world.calm(2 * INTERVAL + BREATH);
        for seat in world.present.clone() {
            let (room, user, identity) = SEATS[seat];
            if let Some(row) = world.watch.row(&Key::new(room, identity)) {
                prop_assert!(!row.past.member || world.joined.contains(user), "{user} is still in {room}");
            }
        }
        // When nobody comes any more, nothing is left.
        for seat in world.present.clone() {
            world.leaves(seat);
        }
        world.calm(4 * HOUR);
        let watch = &world.watch;
        prop_assert!(watch.is_empty() && watch.calls.is_empty() && watch.users.is_empty());
        prop_assert!(watch.singles.is_empty() && watch.sweeps.iter().all(|sweep| sweep.due.is_empty()) && watch.removals.is_empty() && watch.looks.is_empty());
        prop_assert!(watch.sweeps.iter().all(|sweep| sweep.asking == 0));
        prop_assert_eq!((watch.calling, watch.next_deadline()), (0, None));
    }
}
