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
    assert_eq!(turns(&mut pace, at(3_000)), [job(2)], "the send first");
    assert_eq!(turns(&mut pace, at(6_000)), [job(1)], "the other at a distance");
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

/// Synapse by itself, as recorded: one call a second for an address after a burst of five; a refusal comes after half a
/// second and asks for one more.
struct Synapse {
    tokens: f64,
    filled: Time,
}

impl Synapse {
    fn ask(&mut self, now: Time) -> (Outcome, Time) {
        self.tokens = (self.tokens + now.since(self.filled) as f64 / 1_000.0).min(5.0);
        self.filled = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return (Outcome::Done, now.after(10));
        }
        (Outcome::Limited(Some(Duration::from_secs(1))), now.after(500))
    }
}

const DELAY: u64 = 18_000;

/// Twelve with a delay of 18 s, of whom so many leave in one moment after two minutes. The least time that a restart of
/// those who stay left unused, how long after the moment each leave was taken, and the refusals since.
fn twelve_of_whom_leave(leaving: u32, moment: u64) -> (u64, Vec<u64>, usize) {
    #[derive(Clone, Copy, PartialEq)]
    enum Call {
        Restart,
        Send,
    }
    let mut pace = Pace::new(Concurrency::default());
    let id = pace.enter("a");
    let mut synapse = Synapse {
        tokens: 5.0,
        filled: at(0),
    };
    let (mut restarted, mut wanted) = ([at(0); 12], [None; 12]);
    // What is under way, and what begins later, by its time.
    let mut flying: BTreeMap<(Time, usize), (Call, Outcome, Time)> = BTreeMap::new();
    let mut later: BTreeMap<(Time, usize), Call> = (0..12).map(|n| ((at(500 * n as u64), n), Call::Restart)).collect();
    let mut gone = [false; 12];
    let (mut least, mut sent, mut refused) = (u64::MAX, Vec::new(), 0);
    let mut now = at(0);
    while now < at(moment + 40_000) {
        if now >= at(moment) && !gone[0] {
            for n in 0..leaving as usize {
                gone[n] = true;
                later.retain(|&(_, other), _| other != n);
                if let Some(wish) = wanted[n].take() {
                    pace.unwant(id, job(n as u32), wish, now);
                }
                later.insert((now, n), Call::Send);
            }
        }
        while let Some(((_, n), call)) = later
            .first_key_value()
            .filter(|((at, _), _)| *at <= now)
            .map(|(key, call)| (*key, *call))
        {
            later.pop_first();
            if (call == Call::Restart) == gone[n] {
                continue;
            }
            let wish = match call {
                Call::Restart => Wish::Restart {
                    until: restarted[n].after(DELAY),
                    relaxed: restarted[n].after(DELAY * 4 / 5),
                },
                Call::Send => Wish::Send {
                    until: at(moment + 30_000),
                },
            };
            wanted[n] = Some(wish);
            pace.want(id, job(n as u32), wish, now);
        }
        while let Some((_, granted)) = pace.next_turn(now) {
            let n = (0..12).find(|&n| job(n as u32) == granted).expect("one of them");
            wanted[n] = None;
            let (outcome, answered) = synapse.ask(now);
            let call = if gone[n] { Call::Send } else { Call::Restart };
            flying.insert((answered, n), (call, outcome, now));
        }
        while let Some((&(answered, n), &(call, outcome, started))) = flying.first_key_value().filter(|((at, _), _)| *at <= now) {
            flying.pop_first();
            pace.ended(id, outcome, now, &mut Jitter::new(1));
            match (call, outcome) {
                (Call::Restart, Outcome::Done) => {
                    if started >= at(moment) {
                        least = least.min(restarted[n].after(DELAY).since(started));
                    }
                    assert!(started < restarted[n].after(DELAY), "{n} was reported gone at {started:?}");
                    restarted[n] = started;
                    later.insert((started.after(DELAY / 2), n), Call::Restart);
                }
                (Call::Send, Outcome::Done) => sent.push(answered.since(at(moment))),
                (call, _) => {
                    refused += usize::from(started >= at(moment));
                    later.insert((now.after(250), n), call);
                }
            }
        }
        for (n, restarted) in restarted.iter().enumerate().filter(|&(n, _)| !gone[n]) {
            assert!(
                now < restarted.after(DELAY),
                "{n} was reported gone, {} ms after the moment",
                now.since(at(moment))
            );
        }
        now = now.after(10);
    }
    (least, sent, refused)
}

#[test]
fn under_synapses_own_limits_nobody_who_stays_is_reported_gone_because_many_leave() {
    for leaving in [1, 3, 6, 9, 11] {
        let (mut least, mut last, mut refused) = (u64::MAX, 0, 0);
        for moment in (120_000..135_000).step_by(500) {
            let found = twelve_of_whom_leave(leaving, moment);
            least = least.min(found.0);
            last = last.max(found.1.iter().copied().max().unwrap_or_default());
            refused = refused.max(found.2);
            assert_eq!(found.1.len(), leaving as usize, "leaves");
        }
        assert!(least >= 500, "{leaving} leave: {least} ms to spare");
        assert!(last <= 13_000, "{leaving} leave: the last leave was taken after {last} ms");
        assert!(refused <= leaving as usize + 3, "{leaving} leave: {refused} refusals");
    }
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
