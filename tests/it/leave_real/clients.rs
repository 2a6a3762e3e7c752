//! How a client can go: with a goodbye, killed, replaced by another of the same identity.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::clock::{lateness_since, now_ms, sleep_s, sleep_until};
use super::stage::{Caller, Delayed, Notice, Stage};
use super::steered::Party;
use crate::support::process::{real_neighbours, say};

const SECOND: u64 = 1000;

/// From the delegation by way of the SFU's webhook to `delayed_since_ts`.
#[track_caller]
pub(super) fn joins_and_is_watched(caller: &Caller, delayed: &Delayed, join: impl FnOnce(&Value) -> String) -> String {
    let before = caller.since(delayed).expect("the delayed event");
    let answer = caller.token(Some(delayed));
    let sid = join(&answer);
    let joined = caller.wait_notice("participant_joined", before, Duration::from_secs(20));
    assert_eq!(joined.sid, sid);
    // With a long delay nothing but somebody who is seen is a reason to restart so soon, and the SFU may show them before it tells.
    let after = if delayed.delay_ms > 60_000 {
        before
    } else {
        joined.at.saturating_sub(300).max(before)
    };
    let since = caller.wait_restarted(delayed, after, Duration::from_secs(15));
    say(&format!(
        "{}: the delay began again {} ms after the SFU told of the join",
        caller.name,
        i128::from(since) - i128::from(joined.at)
    ));
    sid
}

/// The leave that follows a goodbye: after two questions, 0.8 s and 1.5 s later, and not after 2 s. Our own note of the
/// goodbye may be late.
#[track_caller]
pub(super) fn leaves_within_two_seconds(caller: &Caller, delayed: &Delayed, notice: &Notice) {
    let sent = caller.wait_sent(delayed, Duration::from_secs(8));
    let left = caller.left().expect("a leave");
    let after = i128::from(sent) - i128::from(notice.at);
    say(&format!(
        "{}: {} told, leave asked for {after} ms later, in the timeline after {} ms",
        caller.name,
        notice.reason,
        i128::from(left) - i128::from(notice.at)
    ));
    let late = lateness_since(notice.at - SECOND);
    assert!(
        after >= 1300 - i128::from(late),
        "{}: the leave was sent {after} ms after the goodbye; the machine was late by {late} ms",
        caller.name
    );
    assert!(
        after <= i128::from(2000 + late),
        "{}: the leave was sent only {after} ms after the goodbye; the machine was late by {late} ms",
        caller.name
    );
}

/// A client of the Python SDK says goodbye.
#[test]
fn a_goodbye() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("goodbye"), Party::start());
    let delayed = caller.schedule(20);
    joins_and_is_watched(&caller, &delayed, |answer| party.join("a", answer));
    // Long enough for the second restart, at half of the delay.
    let first = caller.since(&delayed).expect("the delayed event");
    caller.wait_restarted(&delayed, first, Duration::from_secs(13));
    caller.assert_there(&delayed);
    party.leave("a");
    let notice = caller.wait_notice("participant_left", first, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &delayed, &notice);
}

/// The same by `/get_token` and `/delegate_delayed_leave`.
#[test]
fn a_goodbye_after_the_delegate_route() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("delegateroute"), Party::start());
    let delayed = caller.schedule(15);
    let answer = caller.token_and_delegation(&delayed);
    party.join("a", &answer);
    let joined = caller.wait_notice("participant_joined", delayed.at, Duration::from_secs(10));
    assert_eq!(joined.identity, caller.hashed_identity());
    caller.wait_restarted(&delayed, joined.at.saturating_sub(300), Duration::from_secs(5));
    party.leave("a");
    let notice = caller.wait_notice("participant_left", joined.at, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &delayed, &notice);
}

/// kill -9: the SFU takes 20 s to notice; restarts go on meanwhile, as the delay is shorter.
#[test]
fn a_client_that_is_killed() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("killed"), Party::start());
    let delayed = caller.schedule(15);
    joins_and_is_watched(&caller, &delayed, |answer| party.join("a", answer));
    sleep_s(1.0);
    party.kill();
    is_missed(&caller, &delayed, now_ms());
}

/// The leave within 3 s of the SFU's own notice, and not before it was asked about.
#[track_caller]
pub(super) fn is_missed(caller: &Caller, delayed: &Delayed, killed: u64) {
    let notice = caller.wait_notice("participant_left", killed, Duration::from_secs(40));
    let sent = caller.wait_sent(delayed, Duration::from_secs(8));
    let after = i128::from(sent) - i128::from(notice.at);
    say(&format!(
        "{}: the SFU told {} {:.1} s after the kill, the leave was asked for {after} ms later",
        caller.name,
        notice.reason,
        (notice.at - killed) as f64 / 1000.0
    ));
    let late = lateness_since(notice.at);
    assert!(
        (1300..=i128::from(3000 + late)).contains(&after),
        "{}: after {after} ms; the machine was late by {late} ms",
        caller.name
    );
}

/// The old session ends by DUPLICATE_IDENTITY, the new one is there: no leave until the second is gone.
#[test]
fn the_same_identity_twice() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("twice"), Party::start());
    let delayed = caller.schedule(15);
    let first = joins_and_is_watched(&caller, &delayed, |answer| party.join("first", answer));
    sleep_s(1.0);
    let again = now_ms();
    let second = party.join("second", &caller.token(None));
    assert_ne!(first, second);
    let notice = caller.wait_notice("participant_left", again, Duration::from_secs(5));
    assert_eq!((notice.reason.as_str(), &notice.sid), ("DUPLICATE_IDENTITY", &first));
    sleep_until(again + delayed.delay_ms + 4 * SECOND);
    caller.assert_there(&delayed);
    let gone = now_ms();
    party.leave("second");
    let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &delayed, &notice);
}

/// A client that delegates another event while it is in the room: the old one is cancelled and never fires.
#[test]
fn a_second_delegation_of_the_same_identity() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let (caller, party) = (stage.caller("again"), Party::start());
    let old = caller.schedule(15);
    joins_and_is_watched(&caller, &old, |answer| party.join("a", answer));
    let new = caller.schedule(20);
    let before = caller.since(&new).expect("the new delayed event");
    caller.token(Some(&new));
    is_cancelled(&stage, &caller, &old, &new);
    caller.wait_restarted(&new, before, Duration::from_secs(10));
    sleep_until(new.at + old.delay_ms + 4 * SECOND);
    assert_eq!(caller.left(), None, "the old leave event fired: {:?}", stage.calls.of_any(&old));
    caller.assert_there(&new);
    let gone = now_ms();
    party.leave("a");
    let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &new, &notice);
    assert!(stage.calls.of(&old, "send").is_empty());
}

/// Waits until Synapse does not know the old event any more, because the service cancelled it.
#[track_caller]
pub(super) fn is_cancelled(stage: &Arc<Stage>, caller: &Caller, old: &Delayed, new: &Delayed) {
    // A call is on record once it is answered, when Synapse has done it already.
    crate::support::wait_until("the old delayed event to be cancelled, and gone", Duration::from_secs(10), || {
        caller.since(old).is_none() && !stage.calls.of(old, "cancel").is_empty()
    });
    let cancelled = stage.calls.of(old, "cancel");
    let first = &cancelled[0];
    assert_eq!(first.status, 200, "{cancelled:?}");
    assert!(stage.calls.of(old, "send").is_empty(), "{}: the old event was sent", caller.name);
    say(&format!(
        "{}: the old event was cancelled {} ms after the new one was scheduled",
        caller.name,
        i128::from(first.at) - i128::from(new.at)
    ));
}
