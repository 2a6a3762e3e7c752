use super::*;
use proptest::prelude::*;
use std::time::Duration;

fn job(n: u32) -> JobId {
    JobId::numbered(n)
}

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn restart(until: u64) -> Wish {
    Wish::Restart {
        until: at(until),
        relaxed: at(until * 4 / 5),
    }
}

fn pace(names: &[&str]) -> (Pace, Vec<HomeserverId>) {
    let mut pace = Pace::new(Concurrency {
        per_homeserver: 2,
        total: 3,
    });
    let ids = names.iter().map(|name| pace.enter(name)).collect();
    (pace, ids)
}

fn turns(pace: &mut Pace, now: Time) -> Vec<JobId> {
    std::iter::from_fn(|| pace.next_turn(now)).map(|(_, job)| job).collect()
}

#[test]
fn sends_go_first_then_the_nearest_deadline() {
    let (mut pace, hs) = pace(&["a"]);
    for (n, wish) in [
        (1, restart(9_000)),
        (2, restart(5_000)),
        (3, Wish::Send { until: at(60_000) }),
        (4, Wish::Cancel { until: at(7_000) }),
    ] {
        pace.want(hs[0], job(n), wish, at(0));
    }
    let mut order = Vec::new();
    while let Some((id, job)) = pace.next_turn(at(0)) {
        order.push(job);
        pace.ended(id, Outcome::Done, at(0), &mut Jitter::new(1));
    }
    assert_eq!(order, [job(3), job(2), job(4), job(1)]);
}

#[test]
fn concurrency_is_bounded_per_homeserver_and_in_all() {
    let (mut pace, hs) = pace(&["a", "b"]);
    for n in 0..4 {
        pace.want(hs[0], job(n), restart(9_000), at(0));
        pace.want(hs[1], job(10 + n), restart(9_000), at(0));
    }
    assert_eq!(turns(&mut pace, at(0)), [job(0), job(1), job(10)]);
    assert_eq!(pace.next_deadline(), None);
    pace.ended(hs[0], Outcome::Done, at(5), &mut Jitter::new(1));
    assert_eq!(turns(&mut pace, at(5)).len(), 1);
}

#[test]
fn a_429_pauses_the_homeserver_and_no_other() {
    let (mut pace, hs) = pace(&["a", "b"]);
    pace.want(hs[0], job(1), restart(30_000), at(0));
    assert_eq!(turns(&mut pace, at(0)), [job(1)]);
    pace.ended(hs[0], Outcome::Limited(Some(Duration::from_secs(3))), at(0), &mut Jitter::new(1));
    pace.want(hs[0], job(1), restart(30_000), at(0));
    pace.want(hs[0], job(2), Wish::Send { until: at(30_000) }, at(0));
    pace.want(hs[1], job(3), restart(30_000), at(0));
    assert_eq!(turns(&mut pace, at(0)), [job(3)]);
    assert_eq!(pace.next_deadline(), Some(at(3_000)));
    assert_eq!(turns(&mut pace, at(3_000)), [job(2), job(1)], "the send first");
}

#[test]
fn whoever_runs_out_of_time_gets_a_last_chance_in_a_pause() {
    let (mut pace, hs) = pace(&["a"]);
    pace.want(hs[0], job(1), restart(50_000), at(0));
    let _ = turns(&mut pace, at(0));
    pace.ended(hs[0], Outcome::Limited(Some(Duration::MAX)), at(0), &mut Jitter::new(1));
    pace.want(hs[0], job(2), restart(10_000), at(0));
    pace.want(hs[0], job(3), restart(10_100), at(0));
    let mut granted = Vec::new();
    let mut now = at(0);
    while let Some(next) = pace.next_deadline().filter(|&next| next <= at(20_000)) {
        now = now.max(next);
        granted.extend(turns(&mut pace, now).into_iter().map(|job| (job, now)));
    }
    assert_eq!(granted, [(job(2), at(9_000)), (job(3), at(10_000))]);
}

#[test]
fn while_limited_restarts_move_to_80_percent_but_for_a_trickle() {
    let (mut pace, hs) = pace(&["a"]);
    pace.want(hs[0], job(0), restart(100_000), at(0));
    let _ = turns(&mut pace, at(0));
    pace.ended(hs[0], Outcome::Limited(Some(Duration::from_secs(1))), at(0), &mut Jitter::new(1));
    for n in 1..=20 {
        pace.want(hs[0], job(n), restart(100_000 + u64::from(n)), at(0));
    }
    let mut granted = 0;
    let mut now = at(0);
    while let Some(next) = pace.next_deadline().filter(|&next| next < at(20_000)) {
        now = now.max(next);
        for _ in turns(&mut pace, now) {
            granted += 1;
            pace.declined(hs[0], now);
        }
    }
    assert_eq!(granted, 10, "one every two seconds");
    assert!(pace.next_deadline() <= Some(at(21_000)));
}

#[test]
fn what_is_not_wanted_any_more_is_not_granted_and_the_empty_are_forgotten() {
    let (mut pace, hs) = pace(&["a"]);
    for wish in [restart(9_000), Wish::Send { until: at(1) }, Wish::Cancel { until: at(2) }] {
        pace.want(hs[0], job(1), wish, at(0));
        pace.unwant(hs[0], job(1), wish, at(0));
        assert_eq!(pace.next_deadline(), None);
    }
    assert_eq!(pace.jobs("a"), 1);
    pace.leave(hs[0]);
    assert_eq!((pace.jobs("a"), pace.name(hs[0])), (0, None));
}

proptest! {
    #[test]
    fn everybody_gets_a_turn_and_time_moves_on(
        ops in prop::collection::vec((0u8..4, 0u32..20, 1u64..200_000, prop::option::of(0u64..300_000)), 1..100),
    ) {
        let (mut pace, hs) = pace(&["a", "b"]);
        let (mut now, mut waiting, mut flying) = (at(0), BTreeMap::new(), Vec::new());
        for (kind, n, ms, hint) in ops {
            let id = hs[(n % 2) as usize];
            match kind {
                0 => {
                    let until = now.after(ms);
                    let wish = match n % 3 {
                        0 => Wish::Send { until },
                        1 => Wish::Cancel { until },
                        _ => Wish::Restart { until, relaxed: now.after(ms / 2) },
                    };
                    if !flying.iter().any(|&(_, flying)| flying == job(n)) && waiting.insert(n, (id, wish)).is_none() {
                        pace.want(id, job(n), wish, now);
                    } else if let Some((id, wish)) = waiting.get(&n) {
                        pace.want(*id, job(n), *wish, now);
                    }
                }
                1 => now = now.after(ms),
                _ => if let Some((id, _)) = flying.pop() {
                    let outcome = if kind == 2 { Outcome::Done } else { Outcome::Limited(hint.map(Duration::from_millis)) };
                    pace.ended(id, outcome, now, &mut Jitter::new(1));
                },
            }
            while let Some((id, job)) = pace.next_turn(now) {
                waiting.retain(|&n, _| tests::job(n) != job);
                flying.push((id, job));
            }
            prop_assert!(pace.next_deadline().is_none_or(|next| next > now), "something was due and not granted");
        }
        for _ in 0..400 {
            while let Some((id, _)) = flying.pop() {
                pace.ended(id, Outcome::Done, now, &mut Jitter::new(1));
            }
            now = now.after(1_000);
            while let Some((id, job)) = pace.next_turn(now) {
                waiting.retain(|&n, _| tests::job(n) != job);
                flying.push((id, job));
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?}");
    }
}
