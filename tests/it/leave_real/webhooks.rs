//! Webhooks that never come, and webhooks that nobody took.

use std::sync::Arc;
use std::time::Duration;

use super::clients::{joins_and_is_watched, leaves_within_two_seconds};
use super::clock::{now_ms, sleep_s, sleep_until};
use super::stage::{Plan, Stage};
use super::steered::Party;
use crate::support::process::{directory, real_neighbours, say};

/// With the default of polling, and with polling switched off: the leave all the same, within 40 s.
#[test]
fn nobody_wired_the_webhooks() {
    if !real_neighbours() {
        return;
    }
    let settings = [("default", None), ("0", Some("0"))];
    let party = Party::start();
    let all: Vec<_> = settings
        .iter()
        .map(|(name, interval)| {
            let mut plan = Plan {
                webhooks: false,
                ..Plan::default()
            };
            if let Some(interval) = interval {
                plan = plan.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", interval);
            }
            let stage = Arc::new(Stage::new(plan));
            let caller = stage.caller(&format!("unwired{name}"));
            let delayed = caller.schedule(20);
            joins_and_is_watched(&caller, &delayed, |answer| party.join(name, answer));
            (*name, stage, caller, delayed)
        })
        .collect();
    sleep_s(3.0);
    let gone: Vec<_> = all
        .iter()
        .map(|(name, ..)| {
            let gone = now_ms();
            party.leave(name);
            gone
        })
        .collect();
    for ((name, _, caller, delayed), gone) in all.iter().zip(gone) {
        let sent = caller.wait_sent(delayed, Duration::from_secs(50));
        let after = (sent - gone) as f64 / 1000.0;
        say(&format!(
            "webhooks not wired, polling {name}: the leave was asked for {after:.1} s after the goodbye"
        ));
        assert!(after <= 40.0, "polling {name}: {after:.1} s");
    }
    let (_, off, ..) = &all[1];
    let line = off.service().wait_event("polling_until_webhook");
    line.says(&["WARN", "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "webhook"]);
}

/// Killed; the jobs are in a file. One leaves and one joins while nobody takes webhooks, one stays.
#[test]
fn webhooks_while_the_service_was_down() {
    if !real_neighbours() {
        return;
    }
    let file = directory("state").join("jobs");
    let plan = Plan::default().env("LIVEKIT_STATE_PATH", &file.to_string_lossy());
    nothing_is_lost("down", plan, Stage::kill_service, Stage::start_service);
}

/// Stopped: it is there, and does not answer.
#[test]
fn webhooks_while_the_service_was_stopped() {
    if !real_neighbours() {
        return;
    }
    nothing_is_lost(
        "stopped",
        Plan::default(),
        |stage| stage.service().signal("STOP"),
        |stage| stage.service().signal("CONT"),
    );
}

fn nothing_is_lost(name: &str, plan: Plan, stop: fn(&Stage), go_on: fn(&Stage)) {
    let (stage, party) = (Arc::new(Stage::new(plan)), Party::start());
    let [leaves, joins, stays] = ["leaves", "joins", "stays"].map(|who| stage.caller(&format!("{name}{who}")));
    let [of_leaves, of_joins, of_stays] = [&leaves, &joins, &stays].map(|caller| caller.schedule(15));
    joins_and_is_watched(&leaves, &of_leaves, |answer| party.join("leaves", answer));
    joins_and_is_watched(&stays, &of_stays, |answer| party.join("stays", answer));
    let token = joins.token(Some(&of_joins));
    let stopped = now_ms();
    stop(&stage);
    sleep_s(1.0);
    party.leave("leaves");
    party.join("joins", &token);
    sleep_until(stopped + 5000);
    let back = now_ms();
    go_on(&stage);
    let sent = leaves.wait_sent(&of_leaves, Duration::from_secs(20));
    say(&format!(
        "{name} for 5 s: the leave was asked for {:.1} s after that",
        (sent - back) as f64 / 1000.0
    ));
    for (caller, delayed) in [(&joins, &of_joins), (&stays, &of_stays)] {
        caller.wait_restarted(delayed, back, Duration::from_secs(12));
    }
    sleep_until(back + of_joins.delay_ms + 4000);
    for (who, caller, delayed) in [("joins", &joins, &of_joins), ("stays", &stays, &of_stays)] {
        caller.assert_there(delayed);
        let gone = now_ms();
        party.leave(who);
        let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
        leaves_within_two_seconds(caller, delayed, &notice);
    }
}
