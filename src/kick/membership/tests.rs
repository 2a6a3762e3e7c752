use super::*;
use crate::clock::cpu_time;
use crate::kick::shares::MAX_UNSEEN_PER_USER;
use proptest::prelude::*;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

const INTERVAL: u64 = 30_000;
const HOUR: u64 = 3_600_000;
const TEN_MINUTES: u64 = 600_000;
const ROOM: &str = "call";
const ROOM_ID: &str = "!r:own.example";
const ALICE: &str = "@a:own.example";
const CLOCKS: WallClock = WallClock::new(Time::START, 0);

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

/// The core, asked after every fact what is to be done.
#[derive(Debug)]
struct Tracker(MembershipTracker);

impl Tracker {
    fn on_token(&mut self, issued: &IssuedToken<'_>, now: Time) -> Result<Vec<Action>, CapacityError> {
        self.0.on_token(issued, now)?;
        Ok(self.0.step(now))
    }

    fn on_present(&mut self, room: &str, identity: &str, now: Time) -> Vec<Action> {
        self.0.on_present(room, identity, now);
        self.0.step(now)
    }

    fn on_list(&mut self, room: &Name, present: Option<&BTreeSet<Name>>, asked: Time, now: Time) -> Vec<Action> {
        self.0.on_list(room, present, asked, now);
        self.0.step(now)
    }

    fn on_membership(&mut self, query: &MembershipQuery, answer: MembershipAnswer<'_>, asked: Time, now: Time) -> Vec<Action> {
        self.0.on_membership(query, answer, asked, now);
        self.0.step(now)
    }

    fn on_removed(&mut self, key: &Arc<TokenKey>, outcome: RemovalOutcome, asked: Time, now: Time) -> Vec<Action> {
        self.0.on_removed(key, outcome, asked, now);
        self.0.step(now)
    }

    fn on_time(&mut self, now: Time) -> Vec<Action> {
        self.0.step(now)
    }
}

impl Deref for Tracker {
    type Target = MembershipTracker;

    fn deref(&self) -> &MembershipTracker {
        &self.0
    }
}

impl DerefMut for Tracker {
    fn deref_mut(&mut self) -> &mut MembershipTracker {
        &mut self.0
    }
}

fn bounded(max_tokens: usize) -> Tracker {
    Tracker(MembershipTracker::new(
        INTERVAL,
        Shares::new("own.example".into(), None, max_tokens),
        at(0),
    ))
}

/// Of which webhooks tell.
fn tracker() -> Tracker {
    bounded(1000)
}

fn token<'a>(user_id: &'a str, identity: &'a str, now: u64, checked: bool) -> IssuedToken<'a> {
    IssuedToken {
        room_id: ROOM_ID,
        user_id,
        room: ROOM,
        identity,
        end: at(now + HOUR),
        checked: checked.then_some(at(now)),
    }
}

fn key(identity: &str) -> Arc<TokenKey> {
    Arc::new(TokenKey::new(ROOM, identity))
}

fn query(scope: QueryScope, origin: Origin, is_sweep: bool) -> MembershipQuery {
    MembershipQuery {
        room_id: ROOM_ID.into(),
        scope,
        origin,
        is_sweep,
    }
}

fn about(user: &str, is_sweep: bool) -> MembershipQuery {
    let origin = if user.ends_with(":own.example") {
        Origin::Local
    } else {
        Origin::Remote
    };
    query(QueryScope::User(user.into()), origin, is_sweep)
}

fn members(is_sweep: bool) -> MembershipQuery {
    query(QueryScope::Members, Origin::Local, is_sweep)
}

/// The questions to the homeserver.
fn asked(actions: &[Action]) -> Vec<MembershipQuery> {
    let asks = actions.iter().filter_map(|action| match action {
        Action::Ask(query) => Some(query.clone()),
        Action::List(_) | Action::Remove(_) | Action::EndDelegatedLeave(_) | Action::Issued(_) | Action::Mark(_) | Action::Forget(_) => {
            None
        }
    });
    asks.collect()
}

/// What is left when nothing is stored.
fn calls(actions: Vec<Action>) -> Vec<Action> {
    let is_stored = |action: &Action| matches!(action, Action::Issued(_) | Action::Mark(_) | Action::Forget(_));
    actions.into_iter().filter(|action| !is_stored(action)).collect()
}

fn issue(tracker: &mut Tracker, token: &IssuedToken<'_>, now: u64) {
    assert!(calls(tracker.on_token(token, at(now)).expect("a place")).is_empty());
}

/// A token of which somebody makes use; webhooks tell so.
fn inside(tracker: &mut Tracker, user_id: &str, identity: &str, now: u64) {
    issue(tracker, &token(user_id, identity, now, true), now);
    tracker.on_webhook(ROOM);
    assert!(tracker.on_present(ROOM, identity, at(now)).is_empty(), "they are joined");
}

/// The homeserver answers at once.
fn answer(tracker: &mut Tracker, query: &MembershipQuery, joined: &[&str], now: u64) -> Vec<Action> {
    let is_joined = |user: &str| joined.contains(&user);
    let answer = match &query.scope {
        QueryScope::Members => MembershipAnswer::Members(&is_joined),
        QueryScope::User(user) => MembershipAnswer::Joined(is_joined(user)),
        QueryScope::OwnServer => MembershipAnswer::Joined(true),
    };
    calls(tracker.on_membership(query, answer, at(now), at(now)))
}

/// The sweep at `now` asks one question.
fn sweep(tracker: &mut Tracker, joined: &[&str], now: u64) -> Vec<Action> {
    let asked = asked(&tracker.on_time(at(now)));
    assert_eq!(asked.len(), 1, "a question at {now}");
    answer(tracker, &asked[0], joined, now)
}

fn removed(tracker: &mut Tracker, identity: &str, outcome: RemovalOutcome, now: u64) -> Vec<Action> {
    calls(tracker.on_removed(&key(identity), outcome, at(now), at(now)))
}

fn listed(tracker: &mut Tracker, present: &[&str], asked: u64, now: u64) -> Vec<Action> {
    let present = present.iter().map(|identity| Name::from(*identity)).collect();
    tracker.on_list(&ROOM.into(), Some(&present), at(asked), at(now))
}

fn state<'a>(tracker: &'a Tracker, identity: &str) -> StoredToken<'a> {
    tracker.record(&key(identity), &CLOCKS).expect("a token")
}

fn restore(tracker: &mut Tracker, issued: &IssuedToken<'_>, (member, left): (bool, bool), now: u64) {
    let stored = StoredToken {
        room: issued.room.into(),
        identity: issued.identity.into(),
        room_id: issued.room_id.into(),
        user_id: issued.user_id.into(),
        expires_at: CLOCKS.unix_millis(issued.end),
        last_seen: None,
        member,
        left,
    };
    tracker.restore(&stored, &CLOCKS, at(now));
}

#[test]
fn who_left_is_removed_within_an_interval_and_again_when_they_come_back() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 1);
    assert_eq!(tracker.next_deadline(), Some(at(1 + INTERVAL)));
    assert!(tracker.on_time(at(INTERVAL)).is_empty());
    assert!(sweep(&mut tracker, &[ALICE], 1 + INTERVAL).is_empty());
    assert_eq!(tracker.next_deadline(), Some(at(1 + 2 * INTERVAL)));

    let now = 1 + 2 * INTERVAL;
    assert_eq!(sweep(&mut tracker, &[], now), [Action::Remove(key("a"))]);
    assert_eq!(
        removed(&mut tracker, "a", RemovalOutcome::Removed, now),
        [Action::EndDelegatedLeave(key("a"))]
    );
    // The token still opens the room: whether they are back is looked at in each sweep, should webhooks be lost.
    for n in 3..5 {
        let now = 1 + n * INTERVAL;
        assert_eq!(tracker.on_time(at(now)), [Action::List(ROOM.into())], "sweep {n}");
        let present: &[&str] = if n == 4 { &["a"] } else { &[] };
        let out = listed(&mut tracker, present, now, now);
        assert_eq!(asked(&out).len(), present.len());
        for query in asked(&out) {
            assert_eq!(answer(&mut tracker, &query, &[], now), [Action::Remove(key("a"))]);
            assert_eq!(removed(&mut tracker, "a", RemovalOutcome::NotThere, now).len(), 1);
        }
    }
    // Back in the Matrix room.
    let now = 1 + 5 * INTERVAL;
    let back = asked(&tracker.on_present(ROOM, "a", at(now)));
    assert_eq!(back, [about(ALICE, false)]);
    assert!(answer(&mut tracker, &back[0], &[ALICE], now).is_empty());
    assert!(!state(&tracker, "a").left);
}

#[test]
fn who_was_never_known_as_a_member_is_never_removed() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, false), 0);
    tracker.on_webhook(ROOM);
    let first = asked(&tracker.on_present(ROOM, "a", at(1)));
    assert_eq!(first, [about(ALICE, false)]);
    assert!(answer(&mut tracker, &first[0], &[], 1).is_empty());
    for n in 1..100 {
        assert!(sweep(&mut tracker, &[], n * INTERVAL).is_empty(), "sweep {n}");
    }
    // Once seen as a member, they are.
    let question = asked(&tracker.on_time(at(100 * INTERVAL)));
    let out = tracker.on_membership(&question[0], MembershipAnswer::Joined(true), at(100 * INTERVAL), at(100 * INTERVAL));
    assert_eq!(out, [Action::Mark(key("a"))]);
    assert_eq!(sweep(&mut tracker, &[], 101 * INTERVAL), [Action::Remove(key("a"))]);
}

/// Presence first: who only holds a token costs no question.
#[test]
fn nobody_is_asked_about_who_is_not_in_the_call() {
    let mut tracker = tracker();
    for n in 0..20 {
        issue(&mut tracker, &token(&format!("@u{n}:own.example"), &n.to_string(), 0, true), 0);
    }
    tracker.on_webhook(ROOM);
    for n in 1..100 {
        let out = tracker.on_time(at(n * INTERVAL));
        assert!(asked(&out).is_empty(), "sweep {n}");
        // Once in ten minutes the SFU is asked whether the webhooks missed somebody.
        let is_time = n % 20 == 1;
        assert_eq!(out.len(), usize::from(is_time), "sweep {n}");
        if is_time {
            assert!(listed(&mut tracker, &[], n * INTERVAL, n * INTERVAL).is_empty());
        }
    }
}

#[test]
fn without_our_homeserver_in_the_room_only_its_own_users_count() {
    {
        for own_is_in in [Some(false), None, Some(true)] {
            let mut tracker = tracker();
            inside(&mut tracker, "@checked:else.example", "checked", 0);
            inside(&mut tracker, ALICE, "ours", 0);
            issue(&mut tracker, &token("@stranger:else.example", "stranger", 0, false), 0);
            for query in asked(&tracker.on_present(ROOM, "stranger", at(0))) {
                assert!(answer(&mut tracker, &query, &[], 0).is_empty());
            }
            let now = INTERVAL;
            assert_eq!(asked(&tracker.on_time(at(now))), [members(true)]);
            // The list is not for us to see, since nobody of ours is in it, or for another reason.
            let mut waiting = asked(&tracker.on_membership(&members(true), MembershipAnswer::NoList, at(now), at(now)));
            let mut gone = Vec::new();
            while let Some(query) = waiting.pop() {
                let answer = match (&query.scope, own_is_in) {
                    (QueryScope::OwnServer, Some(own_is_in)) => MembershipAnswer::Joined(own_is_in),
                    (QueryScope::OwnServer, None) => MembershipAnswer::Refused,
                    (QueryScope::User(_), _) => MembershipAnswer::Joined(false),
                    (QueryScope::Members, _) => panic!("{query:?}"),
                };
                let out = tracker.on_membership(&query, answer, at(now), at(now));
                waiting.extend(asked(&out));
                gone.extend(out.into_iter().filter_map(|action| match action {
                    Action::Remove(key) => Some(key.identity.to_string()),
                    Action::Ask(_)
                    | Action::List(_)
                    | Action::EndDelegatedLeave(_)
                    | Action::Issued(_)
                    | Action::Mark(_)
                    | Action::Forget(_) => None,
                }));
            }
            gone.sort();
            let expected: &[&str] = match own_is_in {
                Some(false) | None => &["ours"],
                Some(true) => &["checked", "ours"],
            };
            assert_eq!(gone, expected, "{own_is_in:?}");
        }
    }
}

/// A new token for another device does not make a stranger of somebody who has left.
#[test]
fn what_is_known_of_a_user_is_known_of_all_of_their_tokens() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    let now = 2 * INTERVAL;
    assert_eq!(sweep(&mut tracker, &[], now), [Action::Remove(key("a"))]);
    issue(&mut tracker, &token(ALICE, "fresh", now + 1, false), now + 1);
    assert!(state(&tracker, "fresh").member && state(&tracker, "fresh").left);
    // A checked one says that they are back.
    issue(&mut tracker, &token(ALICE, "again", now + 2, true), now + 2);
    for identity in ["a", "fresh", "again"] {
        assert!(!state(&tracker, identity).left, "{identity}");
    }
}

#[test]
fn what_is_not_a_clear_answer_changes_nothing() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    let answers = [
        MembershipAnswer::Refused,
        MembershipAnswer::TimedOut,
        MembershipAnswer::Unavailable { retry_after_ms: None },
        MembershipAnswer::NoList,
    ];
    for n in 1..10 {
        let now = at(n * INTERVAL);
        let asked = asked(&tracker.on_time(now));
        assert_eq!(asked, [about(ALICE, true)]);
        let answer = answers[n as usize % answers.len()];
        assert!(tracker.on_membership(&asked[0], answer, now, now).is_empty());
    }
    // A no that was asked for before the last yes, or just after it, is none.
    issue(&mut tracker, &token(ALICE, "a", 280_000, true), 280_000);
    for asked in [279_999, 280_000, 284_999] {
        let out = tracker.on_membership(&about(ALICE, false), MembershipAnswer::Joined(false), at(asked), at(285_000));
        assert!(out.is_empty());
    }
    assert!(!state(&tracker, "a").left);
}

fn call_of(n: usize, user: &str) -> (String, String, String) {
    (
        format!("call{n:03}"),
        format!("!r{n:03}:own.example"),
        user.replace('#', &n.to_string()),
    )
}

/// A call with one participant of each of these users, for each number.
fn calls_with(tracker: &mut Tracker, count: usize, users: &[&str]) {
    for n in 0..count {
        for user in users {
            let (room, room_id, user) = call_of(n, user);
            let token = IssuedToken {
                room: &room,
                room_id: &room_id,
                ..token(&user, &user, 0, true)
            };
            issue(tracker, &token, 0);
            tracker.on_webhook(&room);
            assert!(tracker.on_present(&room, &user, at(0)).is_empty());
        }
    }
}

#[test]
fn a_user_is_not_asked_about_twice_at_a_time_and_the_questions_are_bounded() {
    let mut tracker = tracker();
    calls_with(&mut tracker, 20, &[ALICE]);
    let asked_first = asked(&tracker.on_time(at(INTERVAL)));
    assert_eq!(asked_first.len(), MAX_CALLS);
    assert_eq!(
        tracker.next_deadline(),
        Some(at(2 * INTERVAL)),
        "the sweep of the others, of whom there are none"
    );
    // However late, those that are under way are left alone; each answer makes room for one more.
    assert!(tracker.on_time(at(10 * INTERVAL)).is_empty());
    let mut seen: BTreeSet<_> = asked_first.iter().map(|query| query.room_id.clone()).collect();
    for query in &asked_first[1..] {
        let next = asked(&tracker.on_membership(query, MembershipAnswer::Joined(true), at(INTERVAL), at(10 * INTERVAL)));
        assert_eq!(next.len(), 1);
        assert!(seen.insert(next[0].room_id.clone()), "once in a sweep");
    }
}

#[test]
fn users_of_other_homeservers_do_not_keep_our_own_waiting() {
    let mut tracker = tracker();
    calls_with(&mut tracker, 2 * MAX_CALLS, &["@u#:hostile.example", ALICE]);
    // No list comes where hostile homeservers take part, and nothing that is asked about their users is ever answered.
    let (mut ours, mut hanging, mut now) = (BTreeSet::new(), 0, INTERVAL);
    for _ in 0..10 {
        let mut waiting = asked(&tracker.on_time(at(now)));
        while let Some(query) = waiting.pop() {
            let answer = match (&query.scope, query.origin) {
                (QueryScope::Members, _) => MembershipAnswer::TimedOut,
                (QueryScope::User(_) | QueryScope::OwnServer, Origin::Local) => {
                    ours.insert((now, query.room_id.clone()));
                    MembershipAnswer::Joined(true)
                }
                (QueryScope::User(_) | QueryScope::OwnServer, Origin::Remote) => {
                    hanging += 1;
                    continue;
                }
            };
            waiting.extend(asked(&tracker.on_membership(&query, answer, at(now), at(now))));
        }
        now += INTERVAL;
    }
    assert_eq!((ours.len(), hanging), (10 * 2 * MAX_CALLS, MAX_CALLS));
}

#[test]
fn of_several_only_those_who_are_there_are_removed() {
    let mut tracker = tracker();
    let [b, c] = ["@b:own.example", "@c:own.example"];
    for (user, identity) in [(ALICE, "a"), (b, "b"), (c, "c")] {
        inside(&mut tracker, user, identity, 0);
    }
    tracker.on_gone(ROOM, "a", at(OLD_SESSION_MS));
    assert_eq!(asked(&tracker.on_time(at(INTERVAL))), [members(true)], "one question");
    let out = answer(&mut tracker, &members(true), &[b], INTERVAL);
    assert_eq!(out, [Action::Remove(key("c"))], "a is not there");
    assert!(state(&tracker, "a").left, "and is asked about as soon as they are");
    assert_eq!(asked(&tracker.on_present(ROOM, "a", at(INTERVAL + 1))), [about(ALICE, false)]);
}

/// C1: the homeserver cannot be asked about one of them.
#[test]
fn a_question_that_fails_concerns_one_user() {
    let mut tracker = tracker();
    let [odd, banned] = ["@\u{e9}:own.example", "@banned:own.example"];
    for (user, identity) in [(ALICE, "a"), (odd, "odd"), (banned, "banned")] {
        inside(&mut tracker, user, identity, 0);
    }
    let now = INTERVAL;
    assert_eq!(asked(&tracker.on_time(at(now))), [members(true)]);
    let by_name = asked(&tracker.on_membership(&members(true), MembershipAnswer::Refused, at(now), at(now)));
    assert_eq!(by_name.len(), 3);
    let mut gone = Vec::new();
    for query in by_name {
        gone.extend(if query == about(odd, true) {
            calls(tracker.on_membership(&query, MembershipAnswer::Refused, at(now), at(now)))
        } else {
            answer(&mut tracker, &query, &[ALICE], now)
        });
    }
    assert_eq!(gone, [Action::Remove(key("banned"))]);
}

#[test]
fn a_homeserver_that_is_away_ends_the_sweep_and_the_next_one_begins_there() {
    let mut tracker = tracker();
    calls_with(&mut tracker, 30, &[ALICE]);
    let room = |n: usize| -> Arc<str> { call_of(n, "").1.into() };
    let first = |tracker: &mut Tracker, now: u64| -> Vec<Arc<str>> {
        asked(&tracker.on_time(at(now))).into_iter().map(|query| query.room_id).collect()
    };
    let of = |n: usize| MembershipQuery {
        room_id: room(n),
        ..about(ALICE, true)
    };
    assert_eq!(first(&mut tracker, INTERVAL), (0..8).map(room).collect::<Vec<_>>());
    let away = MembershipAnswer::Unavailable { retry_after_ms: None };
    assert_eq!(
        asked(&tracker.on_membership(&of(0), MembershipAnswer::Joined(true), at(INTERVAL), at(INTERVAL))),
        [of(8)]
    );
    for n in 1..9 {
        let now = at(INTERVAL + n as u64);
        assert!(
            tracker.on_membership(&of(n), away, at(INTERVAL), now).is_empty(),
            "nobody else is asked about"
        );
    }
    // Room 1 failed first. The second time it is taken for the reason, and its turn comes last.
    assert_eq!(first(&mut tracker, 2 * INTERVAL), (1..9).map(room).collect::<Vec<_>>());
    for n in 1..9 {
        let now = at(2 * INTERVAL + 5_000);
        assert!(
            tracker
                .on_membership(&of(n), MembershipAnswer::TimedOut, at(2 * INTERVAL), now)
                .is_empty()
        );
    }
    let mut order = first(&mut tracker, 3 * INTERVAL);
    assert_eq!(order, (2..10).map(room).collect::<Vec<_>>());
    let mut place = 0;
    while place < order.len() {
        let query = MembershipQuery {
            room_id: order[place].clone(),
            ..about(ALICE, true)
        };
        let now = at(3 * INTERVAL);
        order.extend(
            asked(&tracker.on_membership(&query, MembershipAnswer::Joined(true), now, now))
                .into_iter()
                .map(|query| query.room_id),
        );
        place += 1;
    }
    assert_eq!(order, (2..30).chain(0..2).map(room).collect::<Vec<_>>());
    assert_eq!(first(&mut tracker, 4 * INTERVAL), (0..8).map(room).collect::<Vec<_>>());
}

/// A9: the wait that the homeserver asks for is kept.
#[test]
fn nothing_is_asked_while_the_homeserver_wants_a_pause() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(asked(&tracker.on_time(at(INTERVAL))), [about(ALICE, true)]);
    let limited = MembershipAnswer::Unavailable {
        retry_after_ms: Some(90_000),
    };
    assert!(
        tracker
            .on_membership(&about(ALICE, true), limited, at(INTERVAL), at(INTERVAL))
            .is_empty()
    );
    issue(&mut tracker, &token("@b:own.example", "b", INTERVAL, false), INTERVAL);
    assert!(tracker.on_present(ROOM, "b", at(INTERVAL + 1)).is_empty());
    assert_eq!(tracker.next_deadline(), Some(at(INTERVAL + 90_000)));
    assert!(tracker.on_time(at(INTERVAL + 89_999)).is_empty());
    let later = asked(&tracker.on_time(at(INTERVAL + 90_000)));
    assert_eq!(later, [about("@b:own.example", false), members(true)]);
}

#[test]
fn a_list_that_was_too_long_is_not_asked_for_again() {
    let mut tracker = tracker();
    let users = [ALICE, "@b:own.example", "@c:own.example"];
    for user in users {
        inside(&mut tracker, user, user, 0);
    }
    let (mut lists, mut names) = (0, 0);
    for n in 1..120 {
        let now = at(n * INTERVAL);
        let mut waiting = asked(&tracker.on_time(now));
        while let Some(query) = waiting.pop() {
            let answer = match query.scope {
                QueryScope::Members => {
                    lists += 1;
                    MembershipAnswer::NoList
                }
                QueryScope::User(_) | QueryScope::OwnServer => {
                    names += 1;
                    MembershipAnswer::Joined(true)
                }
            };
            waiting.extend(asked(&tracker.on_membership(&query, answer, now, now)));
        }
    }
    assert_eq!((lists, names), (1, 119 * 3));
}

/// C4: a virtual hour in which everybody joins and nobody leaves the Matrix room.
#[test]
fn joining_costs_at_most_three_questions_and_a_room_one_in_each_sweep() {
    for with_webhooks in [true, false] {
        for people in [1, 2, 3, 12, 100] {
            let mut tracker = tracker();
            let (mut questions, mut token_checks, mut lists, mut joins) = (0, 0, 0, 0);
            let mut present = BTreeSet::new();
            let users: Vec<_> = (0..people)
                .map(|n| format!("@u{n}:{}", if n % 3 == 2 { "else.example" } else { "own.example" }))
                .collect();
            let mut now = 0;
            while now < HOUR {
                // One joins every 17 seconds; at last half of them go and come back.
                let turn = usize::try_from(now / 17_000).unwrap();
                if now % 17_000 == 0 && turn < people + people / 2 {
                    let user = &users[turn % people];
                    if turn < people {
                        // The token route asks about a local user; about a remote one, also whether our homeserver is there.
                        token_checks += if user.ends_with("own.example") { 1 } else { 2 };
                        let out = tracker.on_token(&token(user, user, now, true), at(now)).expect("a place");
                        questions += settle(&mut tracker, out, &present, now, &mut lists);
                    } else if with_webhooks {
                        tracker.on_gone(ROOM, user, at(now));
                    }
                    joins += 1;
                    present.insert(Name::from(user.as_str()));
                    if with_webhooks {
                        tracker.on_webhook(ROOM);
                        // 12 s later: the yes of the token route is no evidence any more.
                        now += 12_000;
                        let out = tracker.on_present(ROOM, user, at(now));
                        questions += settle(&mut tracker, out, &present, now, &mut lists);
                        now -= 12_000;
                    }
                }
                if tracker.next_deadline().is_some_and(|next| next <= at(now)) {
                    let out = tracker.on_time(at(now));
                    questions += settle(&mut tracker, out, &present, now, &mut lists);
                }
                now += 1_000;
            }
            let sweeps = usize::try_from(HOUR / INTERVAL).unwrap();
            let most = 3 * joins + sweeps;
            let all = questions + token_checks;
            println!(
                "webhooks {with_webhooks}, {people} people, {joins} joins: {questions} + {token_checks} of {most} questions, {lists} lists"
            );
            assert!(all <= most, "webhooks {with_webhooks}, {people} people: {all} of {most}");
            assert!(
                lists <= if with_webhooks { sweeps / 20 + 1 + people / 2 } else { sweeps },
                "{lists} lists"
            );
        }
    }
}

/// Everybody is joined, and everything is answered at once; gives the questions to the homeserver.
fn settle(tracker: &mut Tracker, actions: Vec<Action>, present: &BTreeSet<Name>, now: u64, lists: &mut usize) -> usize {
    let (mut questions, mut waiting) = (0, VecDeque::from(actions));
    while let Some(action) = waiting.pop_front() {
        waiting.extend(match action {
            Action::Ask(query) => {
                questions += 1;
                let answer = match query.scope {
                    QueryScope::Members => MembershipAnswer::Members(&|_| true),
                    QueryScope::User(_) | QueryScope::OwnServer => MembershipAnswer::Joined(true),
                };
                tracker.on_membership(&query, answer, at(now), at(now))
            }
            Action::List(room) => {
                *lists += 1;
                tracker.on_list(&room, Some(present), at(now), at(now))
            }
            Action::Remove(_) | Action::EndDelegatedLeave(_) => panic!("nobody left"),
            Action::Issued(_) | Action::Mark(_) | Action::Forget(_) => Vec::new(),
        });
    }
    questions
}

#[test]
fn a_removal_that_fails_is_tried_again_ever_more_rarely_and_asked_about_each_time() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(sweep(&mut tracker, &[], INTERVAL), [Action::Remove(key("a"))]);
    let (mut now, mut tries) = (INTERVAL, Vec::new());
    while now < INTERVAL + 60_000 {
        tries.push(now - INTERVAL);
        assert!(removed(&mut tracker, "a", RemovalOutcome::Failed, now).is_empty());
        now = tracker.next_deadline().expect("a moment").since(at(0));
        let asked = asked(&tracker.on_time(at(now)));
        assert_eq!(asked.len(), 1);
        assert_eq!(answer(&mut tracker, &asked[0], &[], now), [Action::Remove(key("a"))]);
    }
    // The sweep after thirty seconds tries, too.
    assert_eq!(tries, [0, 1_000, 3_000, 7_000, 15_000, 30_000, 31_000]);
    assert_eq!(removed(&mut tracker, "a", RemovalOutcome::Removed, now).len(), 1);
    assert_eq!(tracker.tokens[&key("a")].failures, 0);
}

#[test]
fn who_is_joined_again_before_the_next_try_is_left_alone() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(sweep(&mut tracker, &[], INTERVAL), [Action::Remove(key("a"))]);
    assert!(removed(&mut tracker, "a", RemovalOutcome::Failed, INTERVAL).is_empty());
    let next = INTERVAL + 1_000;
    assert_eq!(asked(&tracker.on_time(at(next))), [about(ALICE, false)]);
    assert!(answer(&mut tracker, &about(ALICE, false), &[ALICE], next).is_empty());
    assert!(tracker.due.is_empty() && tracker.removals.is_empty());
}

#[test]
fn who_comes_back_with_the_old_token_is_asked_about_at_once_and_removed() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(sweep(&mut tracker, &[], INTERVAL), [Action::Remove(key("a"))]);
    // They come back while they are being removed, and after that.
    assert!(tracker.on_present(ROOM, "a", at(INTERVAL + 10)).is_empty());
    let mut out = calls(tracker.on_removed(&key("a"), RemovalOutcome::Removed, at(INTERVAL), at(INTERVAL + 20)));
    for n in 0..3 {
        let now = INTERVAL + 1000 * (n + 1);
        assert_eq!(out, [Action::Ask(about(ALICE, false))], "return {n}");
        assert_eq!(answer(&mut tracker, &about(ALICE, false), &[], now), [Action::Remove(key("a"))]);
        assert_eq!(removed(&mut tracker, "a", RemovalOutcome::Removed, now + 20).len(), 1);
        out = tracker.on_present(ROOM, "a", at(now + 500));
    }
    // This time they have joined the Matrix room before.
    assert_eq!(asked(&out).len(), 1);
    assert!(answer(&mut tracker, &about(ALICE, false), &[ALICE], INTERVAL + 9000).is_empty());
    assert!(tracker.on_present(ROOM, "a", at(INTERVAL + 9500)).is_empty());
    // No answer: the next sweep asks again.
    assert_eq!(sweep(&mut tracker, &[], 2 * INTERVAL), [Action::Remove(key("a"))]);
    assert_eq!(removed(&mut tracker, "a", RemovalOutcome::Removed, 2 * INTERVAL).len(), 1);
    let again = asked(&tracker.on_present(ROOM, "a", at(2 * INTERVAL + 10)));
    assert_eq!(again.len(), 1);
    let away = MembershipAnswer::Unavailable { retry_after_ms: None };
    assert!(
        tracker
            .on_membership(&again[0], away, at(2 * INTERVAL), at(2 * INTERVAL + 20))
            .is_empty()
    );
    assert_eq!(sweep(&mut tracker, &[], 3 * INTERVAL), [Action::Remove(key("a"))]);
}

#[test]
fn a_checked_token_clears_the_mark_and_another_one_does_not() {
    for (checked, left) in [(true, false), (false, true)] {
        let mut tracker = tracker();
        inside(&mut tracker, ALICE, "a", 0);
        assert_eq!(sweep(&mut tracker, &[], INTERVAL), [Action::Remove(key("a"))]);
        assert_eq!(removed(&mut tracker, "a", RemovalOutcome::Removed, INTERVAL).len(), 1);
        issue(&mut tracker, &token(ALICE, "a", INTERVAL + 1, checked), INTERVAL + 1);
        assert_eq!(state(&tracker, "a").left, left);
        assert_eq!(at(state(&tracker, "a").expires_at.try_into().unwrap()), at(INTERVAL + 1 + HOUR));
        assert_eq!(asked(&tracker.on_present(ROOM, "a", at(INTERVAL + 2))).len(), usize::from(left));
    }
}

#[test]
fn a_token_that_is_issued_while_somebody_is_about_to_be_removed_stops_that() {
    let mut tracker = tracker();
    calls_with(&mut tracker, MAX_CALLS + 1, &["@u#:own.example"]);
    // All places for calls to the SFU are taken by others.
    let mut waiting = asked(&tracker.on_time(at(INTERVAL)));
    let mut removals = Vec::new();
    while let Some(query) = waiting.pop() {
        let out = tracker.on_membership(&query, MembershipAnswer::Joined(false), at(INTERVAL), at(INTERVAL));
        waiting.extend(asked(&out));
        removals.extend(out.into_iter().filter(|action| matches!(action, Action::Remove(_))));
    }
    assert_eq!((removals.len(), tracker.removals.len()), (MAX_CALLS, 1));
    let last = tracker.removals.front().cloned().expect("a removal waits");
    let stored = tracker.record(&last, &CLOCKS).unwrap();
    let [room_id, user_id] = [stored.room_id, stored.user_id].map(String::from);
    let (room, identity) = (last.room.to_string(), last.identity.to_string());
    let again = IssuedToken {
        room: &room,
        room_id: &room_id,
        ..token(&user_id, &identity, INTERVAL, true)
    };
    issue(&mut tracker, &again, INTERVAL + 1);
    let Some(Action::Remove(first)) = removals.pop() else {
        panic!("a removal")
    };
    let out = tracker.on_removed(&first, RemovalOutcome::Removed, at(INTERVAL), at(INTERVAL + 2));
    assert_eq!(calls(out), [Action::EndDelegatedLeave(first)], "they are members again");
    assert!(!tracker.tokens[&last].is_removing);
}

/// L5a: ten seconds.
#[test]
fn a_no_that_waited_too_long_is_asked_for_again() {
    for (waited, is_enough) in [(EVIDENCE_MS - 1, true), (EVIDENCE_MS, false)] {
        let mut tracker = tracker();
        inside(&mut tracker, ALICE, "a", 0);
        assert_eq!(asked(&tracker.on_time(at(INTERVAL))), [about(ALICE, true)]);
        let now = INTERVAL + waited;
        let out = calls(tracker.on_membership(&about(ALICE, true), MembershipAnswer::Joined(false), at(INTERVAL), at(now)));
        if is_enough {
            assert_eq!(out, [Action::Remove(key("a"))]);
        } else {
            assert_eq!(out, [Action::Ask(about(ALICE, false))]);
            assert_eq!(answer(&mut tracker, &about(ALICE, false), &[], now), [Action::Remove(key("a"))]);
        }
    }
}

/// L5a: on the monotonic clock no time has passed.
#[test]
fn a_process_that_stood_still_asks_before_it_removes() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(asked(&tracker.on_time(at(INTERVAL))), [about(ALICE, true)]);
    let now = INTERVAL + 100;
    tracker.on_woke(at(now));
    let out = calls(tracker.on_membership(&about(ALICE, true), MembershipAnswer::Joined(false), at(INTERVAL), at(now)));
    assert_eq!(out, [Action::Ask(about(ALICE, false))]);
    assert!(answer(&mut tracker, &about(ALICE, false), &[ALICE], now).is_empty());
}

#[test]
fn a_departure_right_after_an_arrival_may_be_that_of_the_session_before() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    tracker.on_gone(ROOM, "a", at(100));
    // So they are asked about, and the SFU is asked who is there.
    let out = tracker.on_time(at(INTERVAL));
    assert_eq!(out.len(), 2);
    assert!(out.contains(&Action::Ask(about(ALICE, true))) && out.contains(&Action::List(ROOM.into())));
    assert!(answer(&mut tracker, &about(ALICE, true), &[ALICE], INTERVAL).is_empty());
    assert!(listed(&mut tracker, &[], INTERVAL, INTERVAL + 1).is_empty());
    assert!(tracker.on_time(at(2 * INTERVAL)).is_empty(), "nobody is there");
}

/// Where webhooks say nothing, one list in each sweep finds who came.
#[test]
fn without_webhooks_the_rooms_are_listed() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, true), 0);
    issue(&mut tracker, &token("@b:own.example", "b", 0, true), 0);
    assert_eq!(tracker.on_time(at(INTERVAL)), [Action::List(ROOM.into())]);
    assert!(tracker.on_list(&ROOM.into(), None, at(INTERVAL), at(INTERVAL)).is_empty());
    // Nor does the SFU say who is there: perhaps everybody is.
    let out = tracker.on_time(at(2 * INTERVAL));
    assert_eq!(out, [Action::Ask(members(true)), Action::List(ROOM.into())]);
    assert!(answer(&mut tracker, &members(true), &[ALICE, "@b:own.example"], 2 * INTERVAL).is_empty());
    assert!(listed(&mut tracker, &[], 2 * INTERVAL, 2 * INTERVAL).is_empty());
    let now = 2 * INTERVAL + EVIDENCE_MS;
    let out = listed(&mut tracker, &["a", "b", "somebody"], now, now);
    assert_eq!(out, [Action::Ask(members(false))], "one question about both");
    assert_eq!(answer(&mut tracker, &members(false), &[ALICE], now), [Action::Remove(key("b"))]);
    // A list that somebody else asked for spares ours.
    let now = 3 * INTERVAL - 1_000;
    assert!(listed(&mut tracker, &["a"], now, now).is_empty());
    assert_eq!(asked(&tracker.on_time(at(3 * INTERVAL))), [about(ALICE, true)]);
    assert!(!tracker.lists.contains(&ROOM.into()) && tracker.listing.is_empty());
}

/// Whatever is asked meanwhile is answered with yes.
fn come(tracker: &mut Tracker, now: u64) {
    let out = tracker.on_present(ROOM, "a", at(now));
    for query in asked(&out) {
        assert!(answer(tracker, &query, &[ALICE], now).is_empty());
    }
}

#[test]
fn a_token_is_forgotten_when_it_and_ten_minutes_are_over_and_nobody_is_there() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, true), 0);
    tracker.on_webhook(ROOM);
    let looks = |tracker: &mut Tracker, now: u64| {
        let out = tracker.on_time(at(now));
        for query in asked(&out) {
            assert!(answer(tracker, &query, &[ALICE], now).is_empty());
        }
        out.contains(&Action::List(ROOM.into()))
    };
    // Seen coming a minute before the token's end: the SFU goes on renewing it.
    come(&mut tracker, HOUR - 60_000);
    let mut now = HOUR;
    while now < HOUR - 60_000 + TEN_MINUTES {
        assert!(!looks(&mut tracker, now), "{now}");
        now += INTERVAL;
    }
    // No answer: asked again; somebody is there: for ten minutes not.
    assert!(looks(&mut tracker, now));
    assert!(tracker.on_list(&ROOM.into(), None, at(now), at(now)).is_empty());
    now += INTERVAL;
    assert!(looks(&mut tracker, now));
    assert!(listed(&mut tracker, &["a"], now, now).is_empty());
    assert!(!looks(&mut tracker, now + TEN_MINUTES - INTERVAL));
    now += TEN_MINUTES;
    // Nobody there, but nobody saw them leave: ten minutes more.
    assert!(looks(&mut tracker, now));
    assert!(listed(&mut tracker, &[], now, now).is_empty());
    assert!(!looks(&mut tracker, now + TEN_MINUTES - INTERVAL));
    now += TEN_MINUTES;
    assert!(looks(&mut tracker, now));
    assert_eq!(listed(&mut tracker, &[], now, now), [Action::Forget(key("a"))]);
    assert!(is_clean(&tracker));
    let _ = tracker.on_time(at(now + INTERVAL));
    assert_eq!(tracker.next_deadline(), None, "nothing goes on without anybody");
}

fn is_clean(tracker: &Tracker) -> bool {
    tracker.shares.is_empty()
        && tracker.tokens.is_empty()
        && tracker.calls.is_empty()
        && tracker.rooms.is_empty()
        && tracker.users.is_empty()
        && tracker.open.is_empty()
        && tracker.due.is_empty()
        && tracker.removals.is_empty()
        && tracker.lists.is_empty()
        && tracker.listing.is_empty()
        && tracker.sweeps.iter().all(|sweep| sweep.asking == 0 && sweep.queue.is_empty())
        && tracker.member_lists.is_empty()
        && !tracker.is_reading_list
        && tracker.removing == 0
}

#[test]
fn an_sfu_that_never_says_anything_does_not_keep_tokens_for_ever() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, false), 0);
    let mut now = 0;
    while !tracker.tokens.is_empty() {
        now += INTERVAL;
        for action in tracker.on_time(at(now)) {
            match action {
                Action::List(room) => assert!(tracker.on_list(&room, None, at(now), at(now)).is_empty()),
                Action::Ask(query) => assert!(answer(&mut tracker, &query, &[], now).is_empty()),
                Action::Remove(_) | Action::EndDelegatedLeave(_) => panic!("{action:?}"),
                Action::Issued(_) | Action::Mark(_) | Action::Forget(_) => {}
            }
        }
    }
    assert!((HOUR + UNCLEAR_MS..=HOUR + LEEWAY_MS + UNCLEAR_MS + INTERVAL).contains(&now));
    assert!(is_clean(&tracker));
}

#[test]
fn names_longer_than_matrix_allows_are_not_kept() {
    let mut tracker = tracker();
    let long = "x".repeat(64 * 1024);
    let good = token(ALICE, "a", 0, true);
    let bad = [
        IssuedToken { room_id: &long, ..good },
        IssuedToken { user_id: &long, ..good },
        IssuedToken { room: &long, ..good },
        IssuedToken { identity: &long, ..good },
    ];
    for bad in bad {
        assert_eq!(tracker.on_token(&bad, at(1)), Err(CapacityError::NameTooLong));
        restore(&mut tracker, &bad, (false, false), 1);
    }
    assert!(is_clean(&tracker));
    let [room_id, user_id, identity] = [255, 255, 511].map(|bytes| "x".repeat(bytes));
    let longest = IssuedToken {
        room_id: &room_id,
        user_id: &user_id,
        identity: &identity,
        ..good
    };
    issue(&mut tracker, &longest, 1);
    assert_eq!(tracker.shares.len(), 1);
}

/// A13: one homeserver fills all that it may have, with people who never come.
#[test]
fn strangers_leave_a_place_for_everybody_else() {
    let mut tracker = bounded(40_000);
    let mut refused = 0;
    for n in 0..400 {
        let user = format!("@u{n}:evil.example");
        for member in 0..50 {
            let identity = format!("{n}-{member}");
            match tracker.on_token(&token(&user, &identity, 0, true), at(0)) {
                Ok(_) => assert!(member < MAX_UNSEEN_PER_USER),
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, CapacityError::Unseen | CapacityError::Room), "{error}");
                }
            }
        }
    }
    assert_eq!((tracker.shares.len(), refused), (2_000, 400 * 50 - 2_000));
    for user in [ALICE, "@b:good.example"] {
        issue(&mut tracker, &token(user, user, 0, true), 0);
    }
    // One that is known gets a new token.
    issue(&mut tracker, &token("@u0:evil.example", "0-0", 1, true), 1);
    // Who is seen has room for another one, within the homeserver's share of the room.
    assert_eq!(tracker.on_token(&token(ALICE, "another", 1, true), at(1)).map(|_| ()), Ok(()));
}

/// A13: within a full room, looking a token up takes as long as in a room of one.
#[test]
fn a_token_costs_the_same_in_a_room_of_one_and_of_ten_thousand() {
    const PEOPLE: usize = 10_000;
    let names: Vec<_> = (0..PEOPLE)
        .map(|n| (format!("@u{n}:own.example"), format!("id{n}"), format!("!r{n}"), format!("call{n}")))
        .collect();
    let fill = |is_one_room: bool| {
        let mut tracker = bounded(1_000_000);
        for (user, identity, room_id, room) in &names {
            let one = token(user, identity, 0, true);
            let token = if is_one_room { one } else { IssuedToken { room_id, room, ..one } };
            issue(&mut tracker, &token, 0);
        }
        tracker
    };
    // Tokens of new users and renewed ones, webhooks, and answers about one.
    let cost = |tracker: &mut Tracker, is_one_room: bool| {
        let begun = cpu_time();
        for n in 0..500 {
            let (user, identity, room_id, room) = &names[n * 17 % PEOPLE];
            let new = format!("{identity}-new{n}");
            let one = token(user, identity, 0, true);
            let token = if is_one_room { one } else { IssuedToken { room_id, room, ..one } };
            issue(tracker, &token, 0);
            issue(tracker, &IssuedToken { identity: &new, ..token }, 0);
            assert!(tracker.on_present(token.room, &new, at(0)).is_empty());
            let query = MembershipQuery {
                room_id: token.room_id.into(),
                ..about(user, false)
            };
            assert!(
                tracker
                    .on_membership(&query, MembershipAnswer::Joined(true), at(0), at(0))
                    .is_empty()
            );
            tracker.on_gone(token.room, &new, at(OLD_SESSION_MS));
            // A yes of ten seconds ago does not count.
            let now = at(EVIDENCE_MS);
            assert_eq!(asked(&tracker.on_present(token.room, &new, now)), std::slice::from_ref(&query));
            let out = tracker.on_membership(&query, MembershipAnswer::Joined(true), now, now);
            assert!(out.is_empty());
        }
        cpu_time() - begun
    };
    let best = |is_one_room: bool| (0..5).map(|_| cost(&mut fill(is_one_room), is_one_room)).min().unwrap();
    let (alone, together) = (best(false), best(true));
    println!("500 tokens each: {alone:?} in rooms of one, {together:?} in a room of {PEOPLE}");
    assert!(
        together < 3 * alone + Duration::from_millis(20),
        "{together:?} instead of {alone:?}"
    );
}

#[test]
fn what_is_restored_is_looked_for_soon_and_older_than_what_is_known() {
    let mut tracker = tracker();
    let (member, marked) = ((true, false), (true, true));
    restore(&mut tracker, &token(ALICE, "a", 0, false), member, 0);
    restore(&mut tracker, &token("@b:own.example", "b", 0, false), (false, false), 0);
    restore(&mut tracker, &token("@c:own.example", "c", 0, true), marked, 0);
    issue(&mut tracker, &token("@d:own.example", "d", 0, true), 0);
    restore(&mut tracker, &token("@d:own.example", "d", 0, true), marked, 0);
    assert!(!state(&tracker, "d").left);
    assert!(state(&tracker, "c").left);
    // Who left before is asked about first, too.
    assert_eq!(asked(&tracker.on_present(ROOM, "c", at(1))), [about("@c:own.example", false)]);
    let refused = tracker.on_membership(&about("@c:own.example", false), MembershipAnswer::Refused, at(1), at(2));
    assert!(refused.is_empty());
    // Who was there before the start is looked for once, whatever webhooks tell since.
    tracker.on_webhook(ROOM);
    let out = tracker.on_time(at(MIN_SWEEP_GAP_MS));
    assert_eq!(out, [Action::Ask(about("@c:own.example", true)), Action::List(ROOM.into())]);
    let now = MIN_SWEEP_GAP_MS + 1;
    assert_eq!(listed(&mut tracker, &["a", "b", "c", "d"], now, now), [Action::Ask(members(false))]);
    let out = answer(&mut tracker, &members(false), &["@d:own.example"], now);
    assert_eq!(
        out,
        [Action::Remove(key("a")), Action::Remove(key("c"))],
        "b was never known as a member"
    );
    // A late store does not make us sweep all the time.
    restore(&mut tracker, &token("@e:own.example", "e", 0, true), member, 5000);
    assert!(answer(&mut tracker, &about("@c:own.example", true), &[], now).is_empty());
    assert_eq!(tracker.next_deadline(), Some(at(MIN_SWEEP_GAP_MS + INTERVAL)));
}

#[test]
fn two_users_of_one_name_on_the_sfu_are_two() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "@a:own.example:1:2", 0);
    issue(&mut tracker, &token("@a:own.example:1", "@a:own.example:1:2", 0, false), 1);
    assert_eq!((tracker.shares.len(), tracker.users.len()), (1, 1));
    assert!(!state(&tracker, "@a:own.example:1:2").member);
}

#[test]
fn a_token_is_small() {
    assert!(size_of::<Token>() <= 48, "{}", size_of::<Token>());
    assert!(size_of::<TokenKey>() <= 80, "{}", size_of::<TokenKey>());
    assert!(size_of::<Call>() <= 40, "{}", size_of::<Call>());
    assert!(size_of::<User>() <= 56, "{}", size_of::<User>());
}

/// A room on the SFU, and the Matrix users and the identities of those who may sit there.
const PARTICIPANTS: [(&str, &str, &str); 6] = [
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
    let participant = || 0..PARTICIPANTS.len();
    let act = prop_oneof![
        2 => participant().prop_map(Act::Issue),
        2 => (participant(), any::<bool>()).prop_map(|(participant, joined)| Act::Membership(participant, joined)),
        3 => (participant(), any::<bool>()).prop_map(|(participant, told)| Act::Enter(participant, told)),
        2 => (participant(), any::<bool>()).prop_map(|(participant, told)| Act::Exit(participant, told)),
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
    tracker: Tracker,
    webhooks: bool,
    joined: BTreeSet<&'static str>,
    /// When users were last not joined, and when a checked token was last issued.
    out_at: BTreeMap<&'static str, u64>,
    checked_at: BTreeMap<(&'static str, &'static str), u64>,
    /// Those who were said to be joined, in a call.
    known: BTreeSet<(&'static str, &'static str)>,
    present: BTreeSet<usize>,
    /// Until when a participant's newest token is good.
    tokens: BTreeMap<usize, u64>,
    /// Under way: what the answer will be, and when it was asked for.
    waiting: Vec<(Action, BTreeSet<String>, u64)>,
    removals: usize,
}

impl World {
    fn new(webhooks: bool) -> Self {
        Self {
            now: 0,
            tracker: tracker(),
            webhooks,
            joined: PARTICIPANTS.iter().map(|(_, user, _)| *user).collect(),
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
            Act::Issue(participant) => {
                let (room, user_id, identity) = PARTICIPANTS[participant];
                // A checked token is only for members.
                let checked = participant % 2 == 0;
                if checked && !self.joined.contains(user_id) {
                    return;
                }
                let token = IssuedToken {
                    room,
                    room_id: if room == "one" { ROOM_ID } else { "!two:own.example" },
                    ..token(user_id, identity, self.now, checked)
                };
                if checked {
                    self.checked_at.insert((room, user_id), self.now);
                    self.known.insert((room, user_id));
                }
                self.tokens.insert(participant, self.now + HOUR);
                let out = self.tracker.on_token(&token, at(self.now)).expect("a place");
                self.take(out);
            }
            Act::Membership(participant, joined) => {
                let user = PARTICIPANTS[participant].1;
                if joined {
                    if self.joined.insert(user) {
                        self.out_at.insert(user, self.now);
                    }
                } else {
                    self.joined.remove(user);
                }
            }
            Act::Enter(participant, told) => {
                let (room, _, identity) = PARTICIPANTS[participant];
                if self.tokens.get(&participant).is_none_or(|end| end + LEEWAY_MS <= self.now) || !self.present.insert(participant) {
                    return;
                }
                if self.webhooks {
                    assert!(
                        self.tracker.record(&TokenKey::new(room, identity), &CLOCKS).is_some(),
                        "who can come in is kept in mind"
                    );
                }
                if told || self.webhooks {
                    let out = self.tracker.on_present(room, identity, at(self.now));
                    self.take(out);
                }
            }
            Act::Exit(participant, told) => {
                let (room, _, identity) = PARTICIPANTS[participant];
                if self.present.contains(&participant) {
                    self.leaves(participant);
                    if told || self.webhooks {
                        self.tracker.on_gone(room, identity, at(self.now));
                    }
                }
            }
            Act::RoomEnds(told) => {
                for participant in self
                    .present
                    .clone()
                    .into_iter()
                    .filter(|participant| PARTICIPANTS[*participant].0 == "one")
                {
                    self.leaves(participant);
                }
                if told || self.webhooks {
                    self.tracker.on_room_finished("one", at(self.now));
                }
            }
            Act::Wait(millis) => {
                let until = self.now + millis;
                while let Some(next) = self.tracker.next_deadline().filter(|next| *next <= at(until)) {
                    self.now = self.now.max(next.since(at(0)));
                    let out = self.tracker.on_time(at(self.now));
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
    fn leaves(&mut self, participant: usize) {
        self.present.remove(&participant);
        let end = self.tokens.entry(participant).or_insert(0);
        *end = (*end).max(self.now + RENEWED_MS - LEEWAY_MS);
    }

    fn take(&mut self, outputs: Vec<Action>) {
        for output in outputs {
            let mut truth = BTreeSet::new();
            match &output {
                Action::Ask(_) => truth = self.joined.iter().map(ToString::to_string).collect(),
                Action::List(room) => truth = self.present_in(room),
                // Told when it is known that they are not joined; they may have come back since.
                Action::EndDelegatedLeave(_) => continue,
                Action::Remove(key) => {
                    let participant = self.participant(key);
                    self.may_be_removed(participant);
                    // It happens now; that it happened may never be heard of.
                    if self.present.contains(&participant) {
                        truth.insert("removed".into());
                    }
                }
                Action::Issued(key) | Action::Mark(key) => assert!(self.tracker.record(key, &CLOCKS).is_some()),
                Action::Forget(key) => {
                    assert!(self.tracker.record(key, &CLOCKS).is_none());
                    // Who comes in unseen with a token that was renewed unseen may be missed.
                    let inside = self.present.contains(&self.participant(key));
                    assert!(!(self.webhooks && inside), "who is inside is kept in mind");
                }
            }
            if !matches!(output, Action::Issued(_) | Action::Mark(_) | Action::Forget(_)) {
                self.waiting.push((output, truth, self.now));
            }
        }
        let tracker = &self.tracker;
        assert!(tracker.sweeps.iter().all(|sweep| sweep.asking <= MAX_CALLS));
        assert!(tracker.removing + tracker.listing.len() <= MAX_CALLS);
        assert!(self.waiting.len() <= 3 * MAX_CALLS);
    }

    fn may_be_removed(&self, participant: usize) {
        let (room, user, _) = PARTICIPANTS[participant];
        assert!(self.known.contains(&(room, user)), "never known as a member");
        if self.joined.contains(user) {
            // They were not, a moment ago, and have got no new token since.
            let out = self.out_at.get(user).copied().expect("they have been away");
            assert!(self.now - out <= EVIDENCE_MS, "{user} is joined");
            assert!(
                self.checked_at.get(&(room, user)).is_none_or(|checked| *checked <= out),
                "{user} has a new token"
            );
        }
    }

    fn present_in(&self, room: &Name) -> BTreeSet<String> {
        let here = self.present.iter().map(|participant| PARTICIPANTS[*participant]);
        here.filter(|(name, ..)| Name::from(*name) == *room)
            .map(|(_, _, identity)| identity.to_owned())
            .collect()
    }

    fn participant(&self, key: &TokenKey) -> usize {
        let same = |(room, _, identity): &(&str, &str, &str)| TokenKey::new(room, identity) == *key;
        PARTICIPANTS.iter().position(same).expect("a participant")
    }

    fn answer(&mut self, which: usize, fails: bool) {
        let (output, truth, asked) = self.waiting.remove(which);
        let (asked, now) = (at(asked), at(self.now));
        let out = match output {
            Action::Ask(query) => {
                let is_joined = |user: &str| truth.contains(user);
                let answer = match &query.scope {
                    _ if fails => [MembershipAnswer::Refused, MembershipAnswer::TimedOut][which % 2],
                    QueryScope::Members => MembershipAnswer::Members(&is_joined),
                    QueryScope::User(user) => MembershipAnswer::Joined(is_joined(user)),
                    QueryScope::OwnServer => MembershipAnswer::Joined(true),
                };
                if !fails {
                    // As a list of all members does: also about those who have come since.
                    let room = if &*query.room_id == ROOM_ID { "one" } else { "two" };
                    let joined = PARTICIPANTS.iter().filter(|(_, user, _)| truth.contains(*user));
                    self.known.extend(joined.map(|(_, user, _)| (room, *user)));
                }
                self.tracker.on_membership(&query, answer, asked, now)
            }
            Action::List(room) if fails => self.tracker.on_list(&room, None, asked, now),
            Action::List(room) => {
                let present = truth.iter().map(|identity| Name::from(identity.as_str())).collect();
                self.tracker.on_list(&room, Some(&present), asked, now)
            }
            Action::Remove(key) => {
                let participant = self.participant(&key);
                let outcome = if fails {
                    RemovalOutcome::Failed
                } else if truth.contains("removed") {
                    RemovalOutcome::Removed
                } else {
                    RemovalOutcome::NotThere
                };
                if outcome == RemovalOutcome::Removed && self.present.contains(&participant) {
                    self.removals += 1;
                    self.leaves(participant);
                }
                self.tracker.on_removed(&key, outcome, asked, now)
            }
            Action::EndDelegatedLeave(_) | Action::Issued(_) | Action::Mark(_) | Action::Forget(_) => Vec::new(),
        };
        self.take(out);
    }

    /// From now on everybody answers at once.
    fn calm(&mut self, millis: u64) {
        let until = self.now + millis;
        loop {
            while !self.waiting.is_empty() {
                self.answer(0, false);
            }
            let Some(next) = self.tracker.next_deadline().filter(|next| *next <= at(until)) else {
                break;
            };
            self.now = self.now.max(next.since(at(0)));
            let out = self.tracker.on_time(at(self.now));
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
        world.calm(2 * INTERVAL + MIN_SWEEP_GAP_MS);
        for participant in world.present.clone() {
            let (room, user, identity) = PARTICIPANTS[participant];
            if let Some(row) = world.tracker.record(&TokenKey::new(room, identity), &CLOCKS) {
                prop_assert!(!row.member || world.joined.contains(user), "{user} is still in {room}");
            }
        }
        // When nobody comes any more, nothing is left.
        for participant in world.present.clone() {
            world.leaves(participant);
        }
        world.calm(4 * HOUR);
        prop_assert!(is_clean(&world.tracker), "{:?}", world.tracker);
        prop_assert_eq!(world.tracker.next_deadline(), None);
    }
}

/// The instance that this one follows went on for a while: what it issued is watched, and what it renewed is watched for longer.
#[test]
fn tokens_of_another_instance_are_watched_and_take_no_places_of_tokens_that_nobody_uses() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, true), 0);
    for n in 0..MAX_UNSEEN_PER_USER {
        restore(&mut tracker, &token(ALICE, &format!("before{n}"), 0, false), (true, false), 0);
    }
    restore(&mut tracker, &token(ALICE, "a", HOUR, false), (true, false), 1_000);
    assert_eq!(state(&tracker, "a").expires_at, CLOCKS.unix_millis(at(2 * HOUR)));
    // Not of another user with the same plain identity.
    restore(&mut tracker, &token("@b:own.example", "a", 2 * HOUR, false), (true, false), 1_000);
    assert_eq!(state(&tracker, "a").expires_at, CLOCKS.unix_millis(at(2 * HOUR)));
    assert!(tracker.on_token(&token(ALICE, "after", 2_000, true), at(2_000)).is_ok());
    for key in tracker.tokens.keys().cloned().collect::<Vec<_>>() {
        tracker.forget(&key);
    }
    assert_eq!(tracker.shares.len(), 0, "each place is given back once");
}

/// The replica that renewed a token did not know what the watcher knows of its user.
#[test]
fn what_is_known_is_written_again_over_what_another_replica_has_written() {
    let mut tracker = tracker();
    issue(&mut tracker, &token(ALICE, "a", 0, true), 0);
    for (stored, is_written) in [((true, false), false), ((false, false), true), ((true, true), true)] {
        restore(&mut tracker, &token(ALICE, "a", 1, false), stored, 1);
        let marks = tracker
            .step(at(1))
            .into_iter()
            .filter(|action| *action == Action::Mark(key("a")))
            .count();
        assert_eq!(marks, usize::from(is_written), "{stored:?}");
    }
    // Of this one's user nothing is known here: what is stored is taken over.
    issue(&mut tracker, &token("@b:own.example", "b", 0, false), 0);
    let _ = tracker.step(at(1));
    restore(&mut tracker, &token("@b:own.example", "b", 1, false), (true, false), 1);
    assert_eq!(tracker.step(at(1)), []);
    assert!(state(&tracker, "b").member);
}

/// A member list may take long, one after the other, where rooms are of hostile homeservers: nobody waits for it for more than a sweep.
#[test]
fn who_waits_for_a_list_since_the_last_sweep_is_asked_about_by_name() {
    let mut tracker = tracker();
    calls_with(&mut tracker, 60, &[ALICE, "@mallory:own.example"]);
    let first = asked(&tracker.on_time(at(INTERVAL)));
    assert_eq!(first.len(), 1, "one list at a time");
    // It does not come; all others are asked about in the next sweep.
    let (mut waiting, mut rooms) = (asked(&tracker.on_time(at(2 * INTERVAL))), BTreeSet::new());
    while let Some(query) = waiting.pop() {
        assert!(matches!(query.scope, QueryScope::User(_)), "{query:?}");
        rooms.insert(query.room_id.clone());
        waiting.extend(asked(&tracker.on_membership(
            &query,
            MembershipAnswer::Joined(true),
            at(2 * INTERVAL),
            at(2 * INTERVAL),
        )));
    }
    assert_eq!(rooms.len(), 60);
}

/// Somebody is in a room that sweeps come to behind all others.
fn inside_the_last_room(tracker: &mut Tracker, user_id: &str) {
    let in_last = IssuedToken {
        room: "last",
        room_id: "!z:own.example",
        ..token(user_id, "b", 0, true)
    };
    issue(tracker, &in_last, 0);
    tracker.on_webhook("last");
    assert!(tracker.on_present("last", "b", at(0)).is_empty());
}

/// Of a hundred rooms with somebody of a homeserver that never answers, in the one behind them somebody is found to have left.
#[test]
fn a_homeserver_that_hangs_does_not_keep_those_of_others() {
    let mut tracker = tracker();
    calls_with(&mut tracker, 100, &["@u#:hostile.example"]);
    inside_the_last_room(&mut tracker, "@b:remote.example");
    let (mut waiting, mut hung) = (asked(&tracker.on_time(at(INTERVAL))), 0);
    let mut found = None;
    while let Some(query) = waiting.pop() {
        let answer = match &query.scope {
            QueryScope::User(user) if user.ends_with(":hostile.example") => {
                hung += 1;
                MembershipAnswer::TimedOut
            }
            QueryScope::User(_) => MembershipAnswer::Joined(false),
            QueryScope::OwnServer | QueryScope::Members => MembershipAnswer::Joined(true),
        };
        let out = tracker.on_membership(&query, answer, at(INTERVAL + 5_000), at(INTERVAL + 5_000));
        found = found.or_else(|| out.iter().find(|action| matches!(action, Action::Remove(_))).cloned());
        waiting.extend(asked(&out));
    }
    assert_eq!(found, Some(Action::Remove(Arc::new(TokenKey::new("last", "b")))));
    assert!(hung <= MAX_CALLS, "{hung}");
    // The next sweep tries again.
    assert_eq!(asked(&tracker.on_time(at(2 * INTERVAL))).len(), MAX_CALLS);
}

/// Eight rooms that our homeserver cannot see into, each with somebody of a homeserver that answers: it may be the rooms that hang.
#[test]
fn rooms_that_hang_do_not_keep_others_of_the_same_homeserver() {
    let mut tracker = tracker();
    calls_with(&mut tracker, MAX_CALLS, &["@u#:big.example"]);
    inside_the_last_room(&mut tracker, "@b:big.example");
    let mut found = Vec::new();
    for now in [INTERVAL, 2 * INTERVAL] {
        let mut waiting = asked(&tracker.on_time(at(now)));
        while let Some(query) = waiting.pop() {
            let answer = match &query.scope {
                QueryScope::User(user) if &**user != "@b:big.example" => MembershipAnswer::TimedOut,
                QueryScope::User(_) => MembershipAnswer::Joined(false),
                QueryScope::OwnServer | QueryScope::Members => MembershipAnswer::Joined(true),
            };
            let out = tracker.on_membership(&query, answer, at(now + 5_000), at(now + 5_000));
            found.extend(out.iter().filter(|action| matches!(action, Action::Remove(_))).cloned());
            waiting.extend(asked(&out));
        }
    }
    assert_eq!(found, [Action::Remove(Arc::new(TokenKey::new("last", "b")))]);
}

#[test]
fn a_removal_that_ends_after_they_joined_again_ends_no_delegation() {
    let mut tracker = tracker();
    inside(&mut tracker, ALICE, "a", 0);
    assert_eq!(sweep(&mut tracker, &[], INTERVAL), [Action::Remove(key("a"))]);
    issue(&mut tracker, &token(ALICE, "a", INTERVAL + 7_000, true), INTERVAL + 7_000);
    assert_eq!(removed(&mut tracker, "a", RemovalOutcome::Removed, INTERVAL + 7_500), []);
}
