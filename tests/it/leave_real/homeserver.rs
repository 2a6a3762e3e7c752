//! What Synapse answers: limits, events that it does not know.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::clients::joins_and_is_watched;
use super::clock::{now_ms, sleep_s, sleep_until};
use super::stage::{Caller, Delayed, Plan, Stage};
use super::steered::Party;
use crate::support::process::{real_neighbours, say};
use crate::support::synapse::Synapse;

/// One restart a second for the service's address, after a burst of five; twelve participants with a delay of 18 s want
/// 1.3 at half of it. Then eight leave in one second, and later the others.
#[test]
fn twelve_stay_two_minutes_under_default_limits_and_leave() {
    if !real_neighbours() {
        return;
    }
    static LIMITED: OnceLock<Synapse> = OnceLock::new();
    let plan = Plan {
        synapse: LIMITED.get_or_init(Synapse::start_limited),
        ..Plan::default()
    };
    let (stage, party) = (Arc::new(Stage::new(plan)), Party::start());
    let callers: Vec<_> = (1..=12)
        .map(|n| {
            let caller = stage.caller(&format!("limited{n}"));
            let delayed = caller.schedule(18);
            party.join(&caller.name, &caller.token(Some(&delayed)));
            (caller, delayed)
        })
        .collect();
    let all_in = now_ms();
    while now_ms() < all_in + 120_000 {
        sleep_s(5.0);
        callers.iter().for_each(|(caller, delayed)| caller.assert_there(delayed));
    }
    let calls = stage.calls.all();
    let restarts = |status| calls.iter().filter(|c| c.action == "restart" && c.status == status).count();
    let (done, limited) = (restarts(200), restarts(429));
    let longest = callers.iter().map(|(_, delayed)| longest_gap(&stage, delayed)).max();
    say(&format!(
        "twelve, default limits, two minutes: {done} restarts, {limited} answered 429, longest time between two of one event {:.1} s of 18",
        longest.unwrap_or_default() as f64 / 1000.0
    ));
    assert!(limited > 0, "Synapse limited nothing: this shows nothing");
    // Most of them in one second; the others stay, and their restarts compete with eight leaves.
    let (leaving, staying) = callers.split_at(8);
    let gone = now_ms();
    leaving.iter().for_each(|(caller, _)| party.leave(&caller.name));
    sleep_until(gone + 25_000);
    staying.iter().for_each(|(caller, delayed)| caller.assert_there(delayed));
    report_leaves(&stage, leaving, gone);
    let gone = now_ms();
    staying.iter().for_each(|(caller, _)| party.leave(&caller.name));
    sleep_until(gone + 20_000);
    report_leaves(&stage, staying, gone);
}

/// Five seconds on the way to Synapse, each time, and an event that runs for eight.
#[test]
fn a_slow_homeserver_reports_nobody_gone() {
    if !real_neighbours() {
        return;
    }
    let stage = Arc::new(Stage::new(Plan {
        slow: Duration::from_secs(5),
        ..Plan::default()
    }));
    let party = Party::start();
    // The first question is which paths Synapse has; it is not asked again for the others.
    let first = stage.caller("slowfirst");
    party.join("first", &first.token(Some(&first.schedule(120))));
    let callers: Vec<_> = ["slowone", "slowtwo"]
        .map(|name| {
            let caller = stage.caller(name);
            let delayed = caller.schedule(8);
            joins_and_is_watched(&caller, &delayed, |answer| party.join(name, answer));
            (caller, delayed)
        })
        .into();
    let all_in = now_ms();
    while now_ms() < all_in + 45_000 {
        sleep_s(1.0);
        callers.iter().for_each(|(caller, delayed)| caller.assert_there(delayed));
    }
    for (caller, _) in &callers {
        party.leave(&caller.name);
        caller.wait_left(Duration::from_secs(20));
    }
}

/// Fails unless each leave was sent.
fn report_leaves(stage: &Stage, callers: &[(Caller, Delayed)], gone: u64) {
    let mut after: Vec<_> = callers
        .iter()
        .map(|(caller, delayed)| (caller.wait_sent(delayed, Duration::ZERO) - gone) as f64 / 1000.0)
        .collect();
    after.sort_by(f64::total_cmp);
    let refused = stage.calls.all().iter().filter(|c| c.at >= gone && c.status == 429).count();
    say(&format!(
        "{} leave at once under default limits: sent after {after:.1?} s, {refused} calls answered 429",
        callers.len()
    ));
}

/// Between two restarts that Synapse took.
fn longest_gap(stage: &Stage, delayed: &Delayed) -> u64 {
    let mut at = vec![delayed.at];
    at.extend(stage.calls.of(delayed, "restart").iter().filter(|c| c.status == 200).map(|c| c.at));
    at.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// A client that cancels its event itself ends the job: the homeserver is asked once more (L6), then nothing is restarted or sent.
#[test]
fn a_cancelled_event_ends_the_job() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("cancelled"), Party::start());
    let delayed = caller.schedule(15);
    joins_and_is_watched(&caller, &delayed, |answer| party.join("a", answer));
    caller.cancel(&delayed);
    let cancelled = now_ms();
    sleep_until(cancelled + 12_000);
    let after = |status| {
        stage
            .calls
            .of_any(&delayed)
            .iter()
            .filter(|c| c.at >= cancelled && c.status == status)
            .count()
    };
    assert_eq!((after(404), after(200)), (2, 0), "{:?}", stage.calls.of_any(&delayed));
    party.leave("a");
    sleep_until(cancelled + 20_000);
    assert_eq!((after(404), after(200)), (2, 0), "{:?}", stage.calls.of_any(&delayed));
    assert_eq!(caller.left(), None);
}

/// An id that Synapse never gave.
#[test]
fn an_unknown_event_ends_the_job() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("unknown"), Party::start());
    let delayed = Delayed {
        id: "syd_nobodyEverScheduledThis".into(),
        delay_ms: 15_000,
        at: now_ms(),
    };
    party.join("a", &caller.token(Some(&delayed)));
    sleep_s(12.0);
    let calls = stage.calls.of_any(&delayed);
    assert!(!calls.is_empty(), "it was not even tried");
    assert!(calls.len() <= 2 && calls.iter().all(|c| c.status == 404), "{calls:?}");
    party.leave("a");
    sleep_s(5.0);
    assert_eq!(stage.calls.of_any(&delayed).len(), calls.len());
    assert_eq!(caller.left(), None);
}
