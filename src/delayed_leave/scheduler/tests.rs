use super::*;
use proptest::prelude::*;
use std::time::Duration;

mod world;

use world::{Bucket, Job, World};

const NOBODY: [usize; 0] = [];

fn leave(n: u32) -> LeaveId {
    Id::numbered(n)
}

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn restart(deadline: u64) -> PendingCall {
    PendingCall {
        action: DelayedEventAction::Restart,
        deadline: at(deadline),
        relaxed: at(deadline * 4 / 5),
        delay_ms: 18_000,
        user: deadline,
        seen: true,
    }
}

fn send(deadline: u64) -> PendingCall {
    PendingCall {
        action: DelayedEventAction::Send,
        ..restart(deadline)
    }
}

fn never_seen(deadline: u64) -> PendingCall {
    PendingCall {
        seen: false,
        ..restart(deadline)
    }
}

fn scheduler(names: &[&str]) -> (CallScheduler, Vec<HomeserverId>) {
    let mut scheduler = CallScheduler::new(Concurrency {
        per_homeserver: 4,
        total: 8,
        strangers: 4,
    });
    let ids = names.iter().map(|name| scheduler.enter(name, true)).collect();
    (scheduler, ids)
}

fn permits(scheduler: &mut CallScheduler, now: Time) -> Vec<LeaveId> {
    std::iter::from_fn(|| scheduler.next_permit(now))
        .map(|permit| permit.leave)
        .collect()
}

#[test]
fn the_timeout_is_a_quarter_of_what_is_left_within_bounds() {
    assert_eq!(timeout_ms(20_000, 100), 5_000);
    assert_eq!(timeout_ms(2_000, 100), 1_000);
    assert_eq!(timeout_ms(4_000, 1_500), 3_000);
    assert_eq!(timeout_ms(3_600_000, 8_000), 10_000);
}

#[test]
fn urgent_restarts_go_first_then_sends_then_the_nearest_deadline_and_the_never_seen_last() {
    let (mut scheduler, hs) = scheduler(&["a"]);
    let calls = [
        restart(9_000),
        restart(2_900),
        send(60_000),
        restart(5_000),
        never_seen(100),
        restart(0),
    ];
    for (n, call) in (0..).zip(calls) {
        scheduler.enqueue(hs[0], leave(n), call, at(0));
    }
    let mut order = Vec::new();
    while let Some(permit) = scheduler.next_permit(at(0)) {
        order.push(permit.leave);
        scheduler.on_result(hs[0], at(0), Outcome::Done, at(0), &mut Jitter::new(1));
    }
    assert_eq!(
        order,
        [1, 2, 3, 0, 5, 4].map(leave),
        "what was late when it came goes before the never-seen only"
    );
}

#[test]
fn sends_take_three_quarters_of_the_places() {
    let (mut scheduler, hs) = scheduler(&["a"]);
    for n in 0..8 {
        scheduler.enqueue(hs[0], leave(n), send(60_000), at(0));
    }
    assert_eq!(permits(&mut scheduler, at(0)).len(), 3);
    scheduler.enqueue(hs[0], leave(9), restart(60_000), at(0));
    assert_eq!(permits(&mut scheduler, at(0)), [leave(9)]);
}

#[test]
fn calls_are_bounded_per_homeserver_and_in_all() {
    let (mut scheduler, hs) = scheduler(&["a", "b", "c"]);
    for n in 0..18 {
        scheduler.enqueue(hs[n as usize % 3], leave(n), restart(9_000), at(0));
    }
    assert_eq!(permits(&mut scheduler, at(0)).len(), 8);
    assert_eq!(scheduler.next_deadline(), None);
    scheduler.on_result(hs[0], at(0), Outcome::Done, at(5), &mut Jitter::new(1));
    assert_eq!(permits(&mut scheduler, at(5)).len(), 1);
}

#[test]
fn a_slow_call_gives_its_place_back_but_256_at_most() {
    let mut scheduler = CallScheduler::new(Concurrency::default());
    let id = scheduler.enter("a", true);
    for n in 0..1_000 {
        scheduler.enqueue(id, leave(n), restart(90_000), at(0));
    }
    let mut granted = Vec::new();
    let mut now = at(0);
    while let Some(next) = scheduler.next_deadline().filter(|next| *next < at(60_000)) {
        now = now.max(next);
        granted.push((now.since(at(0)), permits(&mut scheduler, now).len()));
    }
    assert_eq!(granted, [(0, 64), (2_000, 64), (4_000, 64), (6_000, 64), (8_000, 64)]);
}

#[test]
fn a_429_pauses_the_homeserver_and_no_other() {
    let (mut scheduler, hs) = scheduler(&["a", "b"]);
    scheduler.enqueue(hs[0], leave(1), restart(30_000), at(0));
    assert_eq!(permits(&mut scheduler, at(0)), [leave(1)]);
    scheduler.on_result(
        hs[0],
        at(0),
        Outcome::Limited(Some(Duration::from_secs(3))),
        at(0),
        &mut Jitter::new(1),
    );
    let is_limited = |scheduler: &CallScheduler, id| {
        scheduler
            .homeservers
            .get(id)
            .is_some_and(|found| found.limit(scheduler.now).is_some())
    };
    assert!(is_limited(&scheduler, hs[0]) && !is_limited(&scheduler, hs[1]));
    scheduler.enqueue(hs[0], leave(1), restart(30_000), at(0));
    scheduler.enqueue(hs[0], leave(2), send(30_000), at(0));
    scheduler.enqueue(hs[1], leave(3), restart(30_000), at(0));
    assert_eq!(permits(&mut scheduler, at(0)), [leave(3)]);
    assert_eq!(scheduler.next_deadline(), Some(at(3_000)));
    assert_eq!(permits(&mut scheduler, at(3_000)), [leave(2)], "the send first");
    assert_eq!(
        permits(&mut scheduler, at(3_000 + 2 * MIN_GAP_MS - 1)),
        [],
        "the restart at a distance"
    );
    assert_eq!(permits(&mut scheduler, at(3_000 + 2 * MIN_GAP_MS)), [leave(1)]);
    let _ = permits(&mut scheduler, at(200_000));
    assert!(!is_limited(&scheduler, hs[0]));
}

#[test]
fn strangers_leave_room_for_listed_homeservers_and_none_holds_more_than_a_quarter_while_others_wait() {
    let mut scheduler = CallScheduler::new(Concurrency {
        per_homeserver: 8,
        total: 16,
        strangers: 16,
    });
    let strangers = ["s", "t", "u"].map(|name| scheduler.enter(name, false));
    for n in 0..60 {
        scheduler.enqueue(strangers[n as usize / 20], leave(n), restart(1_000), at(0));
    }
    let granted = permits(&mut scheduler, at(0));
    let of = |granted: &[LeaveId], s: u32| granted.iter().filter(|&&id| (s * 20..s * 20 + 20).any(|n| leave(n) == id)).count();
    assert_eq!([0, 1, 2].map(|s| of(&granted, s)), [3, 3, 2], "half of all, by turns");
    assert_eq!(scheduler.next_deadline(), None);
    let listed = scheduler.enter("listed", true);
    for n in 100..120 {
        scheduler.enqueue(listed, leave(n), restart(90_000), at(0));
    }
    assert_eq!(permits(&mut scheduler, at(0)).len(), 8);
    assert_eq!(permits(&mut scheduler, at(0)).len(), 0, "all are taken");
    scheduler.on_result(listed, at(0), Outcome::Done, at(1), &mut Jitter::new(1));
    assert_eq!(permits(&mut scheduler, at(1)).len(), 1);
}

#[test]
fn a_stranger_alone_is_lent_what_others_do_not_use() {
    let mut scheduler = CallScheduler::new(Concurrency {
        per_homeserver: 8,
        total: 16,
        strangers: 8,
    });
    let [alone, other] = ["s", "t"].map(|name| scheduler.enter(name, false));
    for n in 0..20 {
        scheduler.enqueue(alone, leave(n), restart(9_000), at(0));
    }
    assert_eq!(permits(&mut scheduler, at(0)).len(), 8);
    scheduler.enqueue(other, leave(50), restart(9_000), at(1));
    scheduler.enqueue(other, leave(51), restart(9_000), at(1));
    for _ in 0..2 {
        scheduler.on_result(alone, at(0), Outcome::Done, at(2), &mut Jitter::new(1));
    }
    assert_eq!(permits(&mut scheduler, at(2)), [leave(50), leave(51)]);
}

#[test]
fn never_seen_participants_have_64_places_two_per_homeserver_half_of_them_of_strangers() {
    let mut scheduler = CallScheduler::new(Concurrency::default());
    let mut granted = Vec::new();
    for (listed, base) in [(false, 0), (true, 1_000)] {
        for n in 0..100 {
            let id = scheduler.enter(&format!("{listed}{n}"), listed);
            for k in 0..5 {
                scheduler.enqueue(id, leave(base + n * 5 + k), never_seen(9_000), at(0));
            }
        }
        granted.extend(permits(&mut scheduler, at(0)));
    }
    assert_eq!(granted.len(), 64);
    assert_eq!(granted.iter().filter(|&&id| id < leave(1_000)).count(), 32);
    let mut homeservers: Vec<_> = (0..1_500).filter(|&n| granted.contains(&leave(n))).map(|n| n / 5).collect();
    homeservers.dedup();
    assert_eq!(homeservers.len(), 64, "by turns");
}

/// Refuses the first call, and says for how long; then these are enqueued. Who gets a permit when until 20 s, if each call has this
/// outcome 10 ms later.
fn during_a_pause_of(hint: Duration, calls: &[(u32, PendingCall)], outcome: Outcome) -> Vec<(LeaveId, u64)> {
    let (mut scheduler, hs) = scheduler(&["a"]);
    scheduler.enqueue(hs[0], leave(99), restart(50_000), at(0));
    let _ = permits(&mut scheduler, at(0));
    scheduler.on_result(hs[0], at(0), Outcome::Limited(Some(hint)), at(0), &mut Jitter::new(1));
    for &(n, call) in calls {
        scheduler.enqueue(hs[0], leave(n), call, at(0));
    }
    let (mut granted, mut ends, mut now) = (Vec::new(), None, at(0));
    loop {
        let next = [scheduler.next_deadline(), ends.map(|(ends, _)| ends)].into_iter().flatten().min();
        let Some(next) = next.filter(|&next| next <= at(20_000)) else {
            return granted;
        };
        now = now.max(next);
        if let Some((_, sent)) = ends.take_if(|(ends, _)| *ends <= now) {
            scheduler.on_result(hs[0], sent, outcome, now, &mut Jitter::new(1));
        }
        for leave in permits(&mut scheduler, now) {
            granted.push((leave, now.since(at(0))));
            ends = Some((now.after(10), now));
        }
    }
}

#[test]
fn whoever_runs_out_of_time_is_tried_in_a_pause() {
    let short = Duration::from_millis(3_900);
    let granted = during_a_pause_of(short, &[(1, send(3_500)), (2, never_seen(3_000))], Outcome::Transient(None));
    assert_eq!(granted[0], (leave(1), 2_500));
    let refused = Outcome::Limited(Some(Duration::MAX));
    let granted = during_a_pause_of(Duration::MAX, &[(2, restart(10_000)), (3, restart(10_100))], refused);
    assert_eq!(granted, [(leave(2), 6_000), (leave(3), 7_000)], "one at a time");
}

/// What a homeserver says to one restart does not cost the leaves of all.
#[test]
fn a_long_pause_ends_when_the_homeserver_takes_a_call() {
    let sends: Vec<_> = (0..12).map(|n| (n, send(10_000))).collect();
    let granted = during_a_pause_of(Duration::MAX, &sends, Outcome::Done);
    assert_eq!(granted.len(), 12, "{granted:?}");
    assert_eq!(granted[0].1, 6_000);
    assert!(granted.iter().all(|&(_, at)| at < 10_000), "{granted:?}");
    // Not by what was in flight before it began.
    let (mut scheduler, hs) = scheduler(&["a"]);
    for n in 0..2 {
        scheduler.enqueue(hs[0], leave(n), restart(90_000), at(0));
    }
    assert_eq!(permits(&mut scheduler, at(0)).len(), 2);
    scheduler.on_result(
        hs[0],
        at(0),
        Outcome::Limited(Some(Duration::from_secs(60))),
        at(1),
        &mut Jitter::new(1),
    );
    scheduler.on_result(hs[0], at(0), Outcome::Done, at(2), &mut Jitter::new(1));
    scheduler.enqueue(hs[0], leave(2), send(90_000), at(3));
    assert_eq!(permits(&mut scheduler, at(1_000)), []);
}

#[test]
fn while_limited_users_take_turns_with_their_sends() {
    let (mut scheduler, hs) = scheduler(&["a"]);
    scheduler.enqueue(hs[0], leave(99), restart(50_000), at(0));
    let _ = permits(&mut scheduler, at(0));
    scheduler.on_result(hs[0], at(0), Outcome::Limited(None), at(0), &mut Jitter::new(1));
    for n in 0..100 {
        let user = u64::from(n / 98);
        scheduler.enqueue(hs[0], leave(n), PendingCall { user, ..send(30_000) }, at(0));
    }
    let mut now = at(2_000);
    let mut order = Vec::new();
    for _ in 0..4 {
        order.extend(permits(&mut scheduler, now));
        scheduler.on_result(hs[0], now, Outcome::Done, now, &mut Jitter::new(1));
        now = now.after(1_000);
    }
    assert_eq!(order[..4], [0, 98, 1, 99].map(leave));
}

/// A homeserver that has refused a call, for a second.
fn limiting() -> (CallScheduler, Vec<HomeserverId>) {
    let (mut scheduler, hs) = scheduler(&["a"]);
    scheduler.enqueue(hs[0], leave(9_999), restart(50_000), at(0));
    let _ = permits(&mut scheduler, at(0));
    let limited = Outcome::Limited(Some(Duration::from_secs(1)));
    scheduler.on_result(hs[0], at(0), limited, at(0), &mut Jitter::new(1));
    (scheduler, hs)
}

#[test]
fn what_is_not_wanted_any_more_costs_the_others_neither_time_nor_their_turn() {
    let (mut scheduler, hs) = limiting();
    for n in 0..40 {
        let user = u64::from(n);
        scheduler.enqueue(hs[0], leave(n), PendingCall { user, ..send(30_000) }, at(0));
    }
    let now = at(2_000);
    // Thirty were to be sent on evidence that is old by now.
    for n in 0..30 {
        let permit = scheduler.next_permit(now);
        assert_eq!(permit.map(|permit| permit.leave), Some(leave(n)));
        scheduler.declined(permit.unwrap(), now);
    }
    assert_eq!(permits(&mut scheduler, now), [leave(30)]);
    // They come again, before users whose turn has been.
    for n in 0..30 {
        let user = u64::from(n);
        scheduler.enqueue(hs[0], leave(n), PendingCall { user, ..send(29_000) }, now);
    }
    scheduler.on_result(hs[0], now, Outcome::Done, now, &mut Jitter::new(1));
    assert_eq!(permits(&mut scheduler, at(5_000)), [leave(0)]);
}

#[test]
fn of_a_thousand_that_are_not_wanted_any_more_some_are_found_at_a_time() {
    let (mut scheduler, hs) = limiting();
    for n in 0..1_000 {
        let user = u64::from(n);
        scheduler.enqueue(hs[0], leave(n), PendingCall { user, ..send(90_000) }, at(0));
    }
    let mut found = Vec::new();
    for second in 2..5 {
        let mut count = 0;
        while let Some(permit) = scheduler.next_permit(at(second * 2_000)) {
            scheduler.declined(permit, at(second * 2_000));
            count += 1;
        }
        found.push(count);
    }
    assert_eq!(found, [MAX_TAKEN_BACK + 1; 3]);
}

#[test]
fn what_is_not_wanted_any_more_is_not_granted_and_the_empty_are_forgotten() {
    let (mut scheduler, hs) = scheduler(&["a"]);
    let cancel = PendingCall {
        action: DelayedEventAction::Cancel,
        ..restart(2)
    };
    for call in [restart(9_000), restart(0), send(1), cancel, never_seen(7)] {
        scheduler.enqueue(hs[0], leave(1), call, at(0));
        scheduler.dequeue(hs[0], leave(1), call.deadline, at(0));
        assert_eq!(scheduler.next_deadline(), None);
    }
    scheduler.enqueue(hs[0], leave(1), restart(9_000), at(0));
    let permit = scheduler.next_permit(at(0)).unwrap();
    assert_eq!(scheduler.jobs("a"), 1);
    scheduler.leave(hs[0]);
    assert_eq!((scheduler.jobs("a"), scheduler.name(hs[0]).map(|name| &**name)), (0, Some("a")));
    scheduler.declined(permit, at(0));
    assert_eq!(scheduler.name(hs[0]), None);
    assert!(scheduler.by_name.is_empty() && scheduler.homeservers.is_empty());
    assert_eq!(scheduler.in_flight, [0; 4]);
}

#[test]
fn the_usual_time_is_the_median_of_the_last_32_calls() {
    let (mut scheduler, hs) = scheduler(&["a"]);
    assert_eq!(scheduler.usual_ms(hs[0]), 0);
    for (calls, millis, usual) in [(3, 100, 100), (2, 9_000, 100), (32, 1_500, 1_500)] {
        for n in 0..calls {
            scheduler.enqueue(hs[0], leave(n), restart(9_000), at(0));
            let _ = permits(&mut scheduler, at(0));
            scheduler.on_result(hs[0], at(0), Outcome::Transient(None), at(millis), &mut Jitter::new(1));
        }
        assert_eq!(scheduler.usual_ms(hs[0]), usual);
    }
}

#[test]
fn what_cannot_be_carried_is_told_once_a_minute_and_the_longest_delays_are_carried() {
    // One restart a second: ten of 60 s cost 0.2, twelve of 8 s cost 1.9.
    let mut world = World::new();
    let hs = world.homeserver(true, Bucket::synapse());
    for n in 0..22 {
        let delay = if n < 10 { 60_000 } else { 8_000 };
        world.job(at(300 * n), Job::present(hs, delay));
    }
    world.run(at(180_000));
    let lost = world.lost();
    assert!(lost.iter().all(|&n| n >= 10), "{lost:?}");
    assert!((1..=2).contains(&world.overloads.len()), "{:?}", world.overloads);
    println!(
        "figure: 22 wanted, {} lost, all with the shortest delay; warnings {:?}",
        lost.len(),
        world.overloads
    );
}

#[test]
fn a_user_with_many_calls_does_not_cost_the_others() {
    let mut world = World::new();
    let hs = world.homeserver(true, Bucket::synapse());
    for n in 0..10 {
        world.job(at(100 * n), Job::present(hs, 18_000));
    }
    for n in 0..90 {
        let job = Job {
            user: 77,
            ..Job::present(hs, 18_000)
        };
        world.job(at(20_000 + 100 * n), job);
    }
    world.run(at(180_000));
    let lost = world.lost();
    println!(
        "figure: of one user's 90 {} were lost, of the others {}",
        lost.len(),
        lost.iter().filter(|&&n| n < 10).count()
    );
    assert!(lost.iter().all(|&n| n >= 10), "{lost:?}");
}

#[test]
fn b6_three_thousand_sends_do_not_cost_those_who_stay() {
    let mut world = World::new();
    let hs = world.homeserver(true, |_: Time, _: usize, action: DelayedEventAction| {
        let millis = if action == DelayedEventAction::Send { 1_000 } else { 20 };
        Some((Outcome::Done, millis))
    });
    for n in 0..20 {
        world.job(at(n * 300), Job::present(hs, 15_000));
    }
    for n in 0..3_000 {
        world.job(
            at(20_000 + n / 10),
            Job {
                leaves: true,
                ..Job::present(hs, 15_000)
            },
        );
    }
    world.run(at(150_000));
    println!(
        "figure: B6 lost {:?}, sends done {}, the last after {} ms",
        world.lost(),
        world.sent,
        world.last_sent.since(at(20_000))
    );
    assert_eq!((world.lost(), world.sent), (vec![], 3_000));
}

#[test]
fn b7_three_silent_seconds_cost_nobody() {
    let mut world = World::new();
    let hs = world.homeserver(true, |now: Time, _: usize, _: DelayedEventAction| {
        let silent = (100_000..103_000).contains(&now.since(at(0)));
        (!silent).then_some((Outcome::Done, 20))
    });
    for n in 0..300 {
        world.job(at(91_000 - 9_000 * (n % 9) + n), Job::present(hs, 18_000));
    }
    world.run(at(160_000));
    println!("figure: B7 silent 3 s: lost {:?}, least {} ms left", world.lost(), world.least);
    assert_eq!(world.lost(), NOBODY);
}

#[test]
fn b7_silence_that_meets_all_at_once_costs_nobody() {
    let mut world = World::new();
    let hs = world.homeserver(true, |now: Time, _: usize, _: DelayedEventAction| {
        let silent = (9_000..12_000).contains(&now.since(at(0)));
        (!silent).then_some((Outcome::Done, 20))
    });
    for _ in 0..300 {
        world.job(at(0), Job::present(hs, 18_000));
    }
    world.run(at(60_000));
    println!(
        "figure: B7 silent 3 s, all due at once: lost {:?}, least {} ms left",
        world.lost(),
        world.least
    );
    assert_eq!(world.lost(), NOBODY);
}

#[test]
fn b7_one_restart_that_is_never_answered_costs_nobody() {
    for delay in [8_000, 18_000] {
        let mut world = World::new();
        let mut calls = 0;
        let hs = world.homeserver(true, move |_: Time, _: usize, _: DelayedEventAction| {
            calls += 1;
            (calls != 4).then_some((Outcome::Done, 20))
        });
        world.job(at(0), Job::present(hs, delay));
        world.run(at(120_000));
        println!(
            "figure: B7 one never answered, {delay} ms: lost {:?}, least {} ms left",
            world.lost(),
            world.least
        );
        assert_eq!(world.lost(), NOBODY);
    }
}

#[test]
fn b7_a_homeserver_that_always_needs_a_second_and_a_half_costs_nobody() {
    let mut world = World::new();
    let hs = world.homeserver(true, |_: Time, _: usize, _: DelayedEventAction| Some((Outcome::Done, 1_500)));
    for n in 0..50 {
        world.job(at(n * 70), Job::present(hs, 8_000));
    }
    world.run(at(120_000));
    println!("figure: B7 always 1.5 s: lost {:?}, least {} ms left", world.lost(), world.least);
    assert_eq!(world.lost(), NOBODY);
}

#[test]
fn b8_a_hint_of_an_hour_moves_a_restart_by_a_third_of_what_is_left() {
    for outcome in [Outcome::Transient, Outcome::Limited] {
        let mut world = World::new();
        let hs = world.homeserver(true, move |now: Time, _: usize, _: DelayedEventAction| {
            let away = (9_000..10_000).contains(&now.since(at(0)));
            let hint = Some(Duration::from_secs(3_600));
            Some((if away { outcome(hint) } else { Outcome::Done }, 20))
        });
        world.job(at(0), Job::present(hs, 18_000));
        world.run(at(60_000));
        println!(
            "figure: B8 {:?}: lost {:?}, least {} ms left",
            outcome(None),
            world.lost(),
            world.least
        );
        assert_eq!(world.lost(), NOBODY);
        assert!(world.least >= 3_600, "{}", world.least);
    }
}

#[test]
fn a14_made_up_homeservers_that_hold_their_calls_cost_nobody_of_a_listed_one() {
    for seen in [true, false] {
        let mut world = World::new();
        // They are restored before anybody else.
        for k in 0..600 {
            let hs = world.homeserver(false, |_: Time, _: usize, _: DelayedEventAction| Some((Outcome::Done, 9_900)));
            for n in 0..5 {
                let job = Job {
                    seen,
                    attacks: true,
                    ..Job::present(hs, 10_000)
                };
                world.job(at(n * 1_500 + k), job);
            }
        }
        let hs = world.homeserver(true, |_: Time, _: usize, _: DelayedEventAction| Some((Outcome::Done, 50)));
        for n in 0..20 {
            world.job(at(5_000 + n * 100), Job::present(hs, 10_000));
        }
        world.run(at(60_000));
        println!(
            "figure: A14 seen {seen}: lost {:?}, least {} ms left, strangers held {}",
            world.lost(),
            world.least,
            world.most_strangers
        );
        assert_eq!(world.lost(), NOBODY);
        assert!(world.most_strangers <= 1_024);
    }
}

#[test]
fn a15_one_user_who_delegates_ten_a_second_and_never_comes_costs_nobody() {
    for whole_seconds in [true, false] {
        let mut world = World::new();
        let hs = world.homeserver(
            true,
            Bucket {
                whole_seconds,
                ..Bucket::synapse()
            },
        );
        for n in 0..10 {
            world.job(at(100 * n), Job::present(hs, 18_000));
        }
        for n in 0..1_000 {
            let job = Job {
                user: 77,
                seen: false,
                attacks: true,
                until: Some(at(5_000 + 100 * n + 10_000)),
                ..Job::present(hs, 18_000)
            };
            world.job(at(5_000 + 100 * n), job);
        }
        world.run(at(150_000));
        println!(
            "figure: A15 lost {:?}, least {} ms left, {} of {} calls refused",
            world.lost(),
            world.least,
            world.refused,
            world.calls
        );
        assert_eq!(world.lost(), NOBODY);
    }
}

/// Twelve with a delay of 18 s and Synapse's own limit, of whom so many leave in one moment.
#[test]
fn nobody_who_stays_is_reported_gone_because_many_leave() {
    for leaving in [1, 3, 6, 9, 11] {
        let (mut least, mut last, mut refused) = (u64::MAX, 0, 0);
        for moment in (120_000..135_000).step_by(500) {
            let mut world = World::new();
            let hs = world.homeserver(true, Bucket::synapse());
            for n in 0..12 {
                let until = (n < leaving).then_some(at(moment));
                world.job(
                    at(500 * n),
                    Job {
                        until,
                        ..Job::present(hs, 18_000)
                    },
                );
            }
            world.run(at(moment - 1));
            let before = world.refused;
            world.run(at(moment + 40_000));
            assert_eq!((world.lost(), world.sent), (vec![], leaving as usize), "{leaving} at {moment}");
            least = least.min(world.least);
            last = last.max(world.last_sent.since(at(moment)));
            refused = refused.max(world.refused - before);
        }
        println!("figure: {leaving} of 12 leave: least {least} ms left, the last leave after {last} ms, {refused} refusals");
        assert!(least >= 500, "{leaving} leave: {least} ms to spare");
        assert!(last <= 13_000, "{leaving} leave: the last leave was taken after {last} ms");
    }
}

/// So many with that delay stay for three minutes, and come as far apart as is said.
fn all_stay(bucket: Bucket, people: u32, delay: u64, apart: u64) -> World {
    let mut world = World::new();
    let hs = world.homeserver(true, bucket);
    for n in 0..people {
        world.job(at(apart * u64::from(n)), Job::present(hs, delay));
    }
    world.run(at(180_000));
    world
}

/// As many as a homeserver can carry, whose restarts wait until 80 % of the delay: five sixths of that.
fn as_many_as_fit(per_second: f64, delay: u64) -> u32 {
    (per_second * delay as f64 / 1_000.0 * 0.8 * 0.83) as u32
}

#[test]
fn all_whom_a_homeserver_can_carry_stay() {
    let (mut worst, mut warned, mut worlds) = (0.0f64, 0, 0);
    for (per_second, burst) in [(1.0, 5.0), (3.0, 5.0), (10.0, 10.0)] {
        for delay in [6_000, 8_000, 18_000, 60_000] {
            for (whole_seconds, apart) in [(true, 0), (true, 100), (false, 0), (false, 500)] {
                let bucket = Bucket {
                    per_second,
                    burst,
                    whole_seconds,
                };
                let world = all_stay(bucket, as_many_as_fit(per_second, delay), delay, apart);
                let said = format!(
                    "{} of {} refused, warned {:?}: {bucket:?} {delay} {apart}",
                    world.refused, world.calls, world.overloads
                );
                assert_eq!(world.lost(), NOBODY, "{said}");
                assert!(world.refused * 4 <= world.calls, "{said}");
                worst = worst.max(world.refused as f64 / world.calls as f64);
                worlds += 1;
                warned += usize::from(!world.overloads.is_empty());
            }
        }
    }
    println!(
        "figure: at five sixths of what fits: nobody lost, at most {:.0} % refused, {warned} of {worlds} worlds warned",
        worst * 100.0
    );
}

/// Fewer than usual, as each plays minutes; or as many as are asked for.
fn cases(few: u32) -> u32 {
    let asked = std::env::var("PROPTEST_CASES").ok();
    asked.and_then(|cases| cases.parse().ok()).unwrap_or(few)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(24)))]

    #[test]
    fn nobody_whose_demand_fits_is_lost(
        (per_second, burst) in prop::sample::select(vec![(1.0, 5.0), (3.0, 5.0), (10.0, 10.0)]),
        delay in 6_000u64..30_000, share in 1u32..=100, apart in 0u64..600, whole_seconds: bool,
    ) {
        let bucket = Bucket { per_second, burst, whole_seconds };
        let people = (as_many_as_fit(per_second, delay) * share / 100).max(1);
        prop_assert_eq!(all_stay(bucket, people, delay, apart).lost(), NOBODY);
    }

    /// Several homeservers with their own limits, hangs and latencies, people of mixed delays who come, stay and leave, and users who
    /// delegate and never come: nobody who stays is lost where what they need fits.
    #[test]
    fn nobody_present_is_lost_in_any_world_with_room_for_all(
        worlds in prop::collection::vec((
            prop::option::of(prop::sample::select(vec![(1.0, 5.0), (3.0, 5.0), (10.0, 10.0)])),
            prop::collection::vec((8_000u64..60_000, 0u64..60_000, prop::option::of(30_000u64..100_000)), 1..60),
            any::<bool>(), 10u64..1_500, 0u32..200, 20_000u64..80_000, 0u64..3_000,
        ), 1..4),
    ) {
        let mut world = World::new();
        for (limit, people, listed, latency, never_come, silent_from, silent_for) in worlds {
            let mut room = f64::MAX;
            let hs = if let Some((per_second, burst)) = limit {
                room = per_second * 0.8 * 0.7;
                world.homeserver(listed, Bucket { per_second, burst, whole_seconds: true })
            } else {
                world.homeserver(listed, move |now: Time, _: usize, _: DelayedEventAction| {
                    let silent = (silent_from..silent_from + silent_for).contains(&now.since(at(0)));
                    (!silent).then_some((Outcome::Done, latency))
                })
            };
            for (delay, begins, until) in people {
                // Two tries that meet silence, and a third, fit in half of that.
                let delay = if limit.is_none() { delay.max(15_000) } else { delay };
                room -= 1_000.0 / delay as f64;
                if room > 0.0 {
                    let until = until.map(|until| at(begins + until));
                    world.job(at(begins), Job { until, ..Job::present(hs, delay) });
                }
            }
            for n in 0..u64::from(never_come) {
                let until = Some(at(n * 100 + 10_000));
                world.job(at(n * 100), Job { user: 7, seen: false, attacks: true, until, ..Job::present(hs, 10_000) });
            }
        }
        world.run(at(150_000));
        prop_assert_eq!(world.lost(), NOBODY);
    }

    #[test]
    fn everybody_gets_a_permit_and_time_moves_on(
        ops in prop::collection::vec((0u8..4, 0u32..20, 1u64..200_000, prop::option::of(0u64..300_000)), 1..100),
    ) {
        let (mut scheduler, hs) = scheduler(&["a", "b"]);
        let (mut now, mut waiting, mut flying) = (at(0), BTreeMap::<LeaveId, PendingCall>::new(), Vec::<(Permit, Time)>::new());
        for (kind, n, ms, hint) in ops {
            let id = hs[(n % 2) as usize];
            match kind {
                0 => {
                    let call = match n % 4 {
                        0 => PendingCall { deadline: now.after(ms), ..send(0) },
                        1 => PendingCall { deadline: now.after(ms), ..never_seen(0) },
                        _ => PendingCall { deadline: now.after(ms), relaxed: now.after(ms / 2), user: u64::from(n), ..restart(0) },
                    };
                    if flying.iter().any(|(permit, _)| permit.leave == leave(n)) {
                    } else if let Some(call) = waiting.remove(&leave(n)) {
                        scheduler.dequeue(id, leave(n), call.deadline, now);
                    } else {
                        waiting.insert(leave(n), call);
                        scheduler.enqueue(id, leave(n), call, now);
                    }
                }
                1 => now = now.after(ms),
                _ => if let Some((permit, sent)) = flying.pop() {
                    let outcome = if kind == 2 { Outcome::Done } else { Outcome::Limited(hint.map(Duration::from_millis)) };
                    scheduler.on_result(permit.homeserver, sent, outcome, now, &mut Jitter::new(1));
                },
            }
            while let Some(permit) = scheduler.next_permit(now) {
                prop_assert!(waiting.remove(&permit.leave).is_some(), "granted what was not wanted");
                flying.push((permit, now));
            }
            prop_assert!(scheduler.next_deadline().is_none_or(|next| next > now), "something was due and not granted");
            prop_assert_eq!(scheduler.in_flight.iter().sum::<u32>() as usize, flying.len());
        }
        for _ in 0..600 {
            while let Some((permit, sent)) = flying.pop() {
                scheduler.on_result(permit.homeserver, sent, Outcome::Done, now, &mut Jitter::new(1));
            }
            now = now.after(1_000);
            while let Some(permit) = scheduler.next_permit(now) {
                waiting.remove(&permit.leave);
                flying.push((permit, now));
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?}");
        for (permit, _) in flying {
            scheduler.declined(permit, now);
        }
        for id in hs {
            scheduler.leave(id);
        }
        prop_assert!(scheduler.homeservers.is_empty() && scheduler.overloaded.is_empty());
        prop_assert!(scheduler.agendas.iter().all(BTreeSet::is_empty));
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "measures how long it takes")]
fn two_hundred_thousand_calls_take_logarithmic_time_and_little_memory() {
    assert!(
        size_of::<Key>() + size_of::<Queued>() <= 48,
        "twice that where the nodes of the tree are half empty"
    );
    assert!(size_of::<Homeserver>() <= 240, "{}", size_of::<Homeserver>());
    for limited in [false, true] {
        let mut took = Vec::new();
        for count in [20_000, 200_000] {
            let mut scheduler = CallScheduler::new(Concurrency::default());
            let id = scheduler.enter("a", true);
            if limited {
                scheduler.enqueue(id, leave(u32::MAX), restart(9_000), at(0));
                let _ = scheduler.next_permit(at(0));
                scheduler.on_result(id, at(0), Outcome::Limited(None), at(1), &mut Jitter::new(1));
            }
            let started = std::time::Instant::now();
            let call = |n: u32| restart(1_000_000 + u64::from(n.wrapping_mul(2_654_435_761) % 1_000_000));
            for n in 0..count {
                scheduler.enqueue(id, leave(n), call(n), at(2));
            }
            let mut now = at(3_000);
            for _ in 0..1_000 {
                now = now.after(100);
                while let Some(permit) = scheduler.next_permit(now) {
                    scheduler.on_result(permit.homeserver, now, Outcome::Done, now, &mut Jitter::new(1));
                    if limited {
                        break;
                    }
                }
            }
            for n in 0..count {
                scheduler.dequeue(id, leave(n), call(n).deadline, now);
            }
            took.push(started.elapsed().as_secs_f64() / f64::from(count) * 1e6);
            assert!(scheduler.homeservers.get(id).is_some_and(|homeserver| !homeserver.is_waited_for()));
        }
        println!(
            "figure: limited {limited}: {:.1} and {:.1} us for each of 20,000 and 200,000 calls",
            took[0], took[1]
        );
    }
}
