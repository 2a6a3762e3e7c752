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
        strangers: 2,
    });
    let ids = names.iter().map(|name| pace.enter(name, true)).collect();
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
fn strangers_leave_room_for_others() {
    let (mut pace, _) = pace(&["named"]);
    let strangers = ["s", "t", "u"].map(|name| pace.enter(name, false));
    for (n, &stranger) in (0..).zip(&strangers) {
        pace.want(stranger, job(n), restart(1_000), at(0));
    }
    assert_eq!(turns(&mut pace, at(0)).len(), 2);
    assert_eq!(pace.next_deadline(), None, "no room for a third");
    let named = pace.enter("named", true);
    pace.want(named, job(9), restart(90_000), at(0));
    assert_eq!(turns(&mut pace, at(0)), [job(9)]);
    pace.ended(strangers[0], Outcome::Done, at(5), &mut Jitter::new(1));
    assert_eq!(turns(&mut pace, at(5)), [job(2)]);
}

/// Refuses the first one, and says for how long; then these stand in line. Who gets a turn when until 20 s, if each call
/// has this outcome 10 ms later.
fn during_a_pause_of(hint: Duration, wishes: &[(u32, Wish)], outcome: Outcome) -> Vec<(JobId, u64)> {
    let (mut pace, hs) = pace(&["a"]);
    pace.want(hs[0], job(99), restart(50_000), at(0));
    let _ = turns(&mut pace, at(0));
    pace.ended(hs[0], Outcome::Limited(Some(hint)), at(0), &mut Jitter::new(1));
    for &(n, wish) in wishes {
        pace.want(hs[0], job(n), wish, at(0));
    }
    let (mut granted, mut ends, mut now) = (Vec::new(), None, at(0));
    loop {
        let next = [pace.next_deadline(), ends].into_iter().flatten().min();
        let Some(next) = next.filter(|&next| next <= at(20_000)) else {
            return granted;
        };
        now = now.max(next);
        if ends.take_if(|ends| *ends <= now).is_some() {
            pace.ended(hs[0], outcome, now, &mut Jitter::new(1));
        }
        for job in turns(&mut pace, now) {
            granted.push((job, now.since(at(0))));
            ends = Some(now.after(10));
        }
    }
}

#[test]
fn whoever_runs_out_of_time_gets_a_last_chance_in_a_pause() {
    let short = Duration::from_millis(3_900);
    let granted = during_a_pause_of(short, &[(1, Wish::Send { until: at(3_500) })], Outcome::Transient(None));
    assert_eq!(granted, [(job(1), 2_500)]);
    let refused = Outcome::Limited(Some(Duration::MAX));
    let granted = during_a_pause_of(Duration::MAX, &[(2, restart(10_000)), (3, restart(10_100))], refused);
    assert_eq!(granted, [(job(2), 8_000), (job(3), 9_000)], "one at a time");
}

/// What a homeserver says to one restart does not cost the leaves of all.
#[test]
fn a_long_pause_ends_when_the_homeserver_takes_a_call() {
    let sends: Vec<_> = (0..12).map(|n| (n, Wish::Send { until: at(10_000) })).collect();
    let granted = during_a_pause_of(Duration::MAX, &sends, Outcome::Done);
    assert_eq!(granted.len(), 12, "{granted:?}");
    assert_eq!(granted[0].1, 6_000);
    assert!(granted.iter().all(|&(_, at)| at < 10_000), "{granted:?}");
    // Not by what was under way before it began.
    let (mut pace, hs) = pace(&["a"]);
    for n in 0..2 {
        pace.want(hs[0], job(n), restart(90_000), at(0));
    }
    assert_eq!(turns(&mut pace, at(0)).len(), 2);
    pace.ended(hs[0], Outcome::Limited(Some(Duration::from_secs(60))), at(1), &mut Jitter::new(1));
    pace.ended(hs[0], Outcome::Done, at(2), &mut Jitter::new(1));
    pace.want(hs[0], job(2), Wish::Send { until: at(90_000) }, at(3));
    assert_eq!(turns(&mut pace, at(1_000)), []);
}

#[test]
fn while_limited_restarts_move_to_80_percent_but_for_a_trickle() {
    let (mut pace, hs) = pace(&["a"]);
    pace.want(hs[0], job(0), restart(1_000_000), at(0));
    let _ = turns(&mut pace, at(0));
    pace.ended(hs[0], Outcome::Limited(Some(Duration::from_secs(1))), at(0), &mut Jitter::new(1));
    for n in 1..=2_000 {
        pace.want(hs[0], job(n), restart(1_000_000 + u64::from(n)), at(0));
    }
    let mut granted = Vec::new();
    let mut now = at(0);
    while let Some(next) = pace.next_deadline().filter(|&next| next < at(20_000)) {
        now = now.max(next);
        for _ in turns(&mut pace, now) {
            granted.push(now);
            pace.declined(hs[0], now);
        }
    }
    assert!(granted[0] >= at(1_000));
    assert!(
        granted.windows(2).all(|pair| pair[1].since(pair[0]) >= 2 * FIRST_GAP),
        "half as many as might be"
    );
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
    let id = pace.enter("a", true);
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

/// A homeserver that allows so many calls a second after a burst. As Synapse does, it answers a refusal half a second
/// later, and says in whole seconds when to come back.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: f64,
    burst: f64,
    whole_seconds: bool,
}

/// So many with that delay stay for three minutes, and come as far apart as is said. The least time that a restart left
/// unused, and how many calls were made and refused.
fn all_stay(bucket: Bucket, people: u32, delay: u64, apart: u64) -> Result<(u64, usize, usize), String> {
    let mut pace = Pace::new(Concurrency::default());
    let id = pace.enter("a", true);
    let (mut tokens, mut filled) = (bucket.burst, at(0));
    let mut restarted: Vec<Option<Time>> = vec![None; people as usize];
    // When who stands in line (again), and whose call is answered when: what, and when it was sent.
    let mut later: BTreeSet<(Time, u32)> = (0..people).map(|n| (at(apart * u64::from(n)), n)).collect();
    let mut flying: BTreeMap<(Time, u32), (Outcome, Time)> = BTreeMap::new();
    let (mut least, mut calls, mut refused) = (u64::MAX, 0, 0);
    let mut now = at(0);
    while now < at(180_000) {
        while let Some(&(_, n)) = later.first().filter(|(at, _)| *at <= now) {
            later.pop_first();
            let last = *restarted[n as usize].get_or_insert(now);
            let wish = Wish::Restart {
                until: last.after(delay),
                relaxed: last.after(delay * 4 / 5),
            };
            pace.want(id, job(n), wish, now);
        }
        while let Some((_, granted)) = pace.next_turn(now) {
            let n = (0..people).find(|&n| job(n) == granted).expect("one of them");
            tokens = (tokens + now.since(filled) as f64 / 1_000.0 * bucket.per_second).min(bucket.burst);
            filled = now;
            calls += 1;
            if tokens >= 1.0 {
                tokens -= 1.0;
                flying.insert((now.after(10), n), (Outcome::Done, now));
            } else {
                refused += 1;
                let exact = ((1.0 - tokens) / bucket.per_second * 1_000.0).ceil() as u64;
                let hint = if bucket.whole_seconds {
                    exact.div_ceil(1_000) * 1_000
                } else {
                    exact
                };
                flying.insert((now.after(500), n), (Outcome::Limited(Some(Duration::from_millis(hint))), now));
            }
        }
        while let Some((&(answered, n), &(outcome, sent))) = flying.first_key_value().filter(|((at, _), _)| *at <= now) {
            flying.remove(&(answered, n));
            pace.ended(id, outcome, now, &mut Jitter::new(1));
            if outcome == Outcome::Done {
                let last = restarted[n as usize].replace(sent).expect("it stood in line");
                let left = last.after(delay).as_millis().saturating_sub(sent.as_millis());
                least = least.min(left);
                later.insert((sent.after(delay / 2), n));
            } else {
                later.insert((now.after(250), n));
            }
        }
        for (n, last) in restarted.iter().enumerate() {
            if last.is_some_and(|last| now >= last.after(delay)) {
                return Err(format!(
                    "{n} of {people} ran out at {now:?}, {refused} of {calls} refused: {bucket:?}"
                ));
            }
        }
        now = now.after(5);
    }
    Ok((least, calls, refused))
}

/// As many as a homeserver can carry, whose restarts wait until 80 % of the delay: five sixths of that.
fn as_many_as_fit(per_second: f64, delay: u64) -> u32 {
    (per_second * delay as f64 / 1_000.0 * 0.8 * 0.83) as u32
}

#[test]
fn all_whom_a_homeserver_can_carry_stay() {
    for (per_second, burst) in [(1.0, 5.0), (3.0, 5.0), (10.0, 10.0)] {
        for delay in [6_000, 8_000, 18_000] {
            for (whole_seconds, apart) in [(true, 0), (true, 100), (false, 0), (false, 500)] {
                let bucket = Bucket {
                    per_second,
                    burst,
                    whole_seconds,
                };
                let people = as_many_as_fit(per_second, delay);
                let (_, calls, refused) = all_stay(bucket, people, delay, apart).unwrap();
                assert!(
                    refused * 4 <= calls,
                    "{refused} of {calls} refused: {bucket:?} {people} {delay} {apart}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(12)))]
    #[test]
    fn nobody_whose_demand_fits_starves(
        (per_second, burst) in prop::sample::select(vec![(1.0, 5.0), (3.0, 5.0), (10.0, 10.0)]),
        delay in 6_000u64..30_000, share in 1u32..=100, apart in 0u64..600, whole_seconds: bool,
    ) {
        let bucket = Bucket { per_second, burst, whole_seconds };
        let people = (as_many_as_fit(per_second, delay) * share / 100).max(1);
        prop_assert!(all_stay(bucket, people, delay, apart).is_ok(), "{:?}", all_stay(bucket, people, delay, apart));
    }
}

/// Fewer than usual, as each plays three minutes; or as many as are asked for.
fn cases(few: u32) -> u32 {
    std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(few)
}
