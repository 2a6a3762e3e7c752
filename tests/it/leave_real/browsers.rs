//! livekit-client in headless Chromium: what it does when a connection breaks, and how a tab ends.

use std::time::Duration;

use super::clients::{is_cancelled, is_missed, joins_and_is_watched, leaves_within_two_seconds};
use super::clock::{now_ms, sleep_s, sleep_until};
use super::stage::Stage;
use super::steered::Browser;
use super::takes::{self, Void};
use crate::support::process::{real_neighbours, say};

const DELAY: u64 = 15;

#[test]
fn full_reconnect_is_no_leave() {
    if !real_neighbours() {
        return;
    }
    comes_back("full-reconnect");
}

#[test]
fn resume_reconnect_is_no_leave() {
    if !real_neighbours() {
        return;
    }
    comes_back("resume-reconnect");
}

#[test]
fn signal_reconnect_is_no_leave() {
    if !real_neighbours() {
        return;
    }
    comes_back("signal-reconnect");
}

#[test]
fn migration_is_no_leave() {
    if !real_neighbours() {
        return;
    }
    comes_back("migration");
}

#[test]
fn node_failure_is_no_leave() {
    if !real_neighbours() {
        return;
    }
    comes_back("node-failure");
}

/// A connection that breaks in one of the ways in which livekit-client mends it.
fn comes_back(scenario: &str) {
    let stage = Stage::shared();
    let caller = stage.caller(&scenario.replace('-', ""));
    let tab = Browser::shared().open();
    let delayed = caller.schedule(DELAY);
    let first = joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
    // Not in the SDK's first moments: its own data channels are to stand.
    sleep_s(1.5);
    let broken = tab.simulate(scenario);
    tab.wait_event("Reconnected", broken, Duration::from_secs(30));
    let second = tab.wait_connected();
    // What a service that believed it would do is done after this: its own delay, and the homeserver's.
    sleep_until(broken + (DELAY + 5) * 1000);
    caller.assert_there(&delayed);
    let told: Vec<_> = stage
        .notices
        .all()
        .into_iter()
        .filter(|n| n.identity == caller.identity && n.at >= broken)
        .collect();
    let told: Vec<_> = told.iter().map(|n| format!("{} {}", n.event, n.reason).trim().to_owned()).collect();
    say(&format!(
        "{scenario}: {} session, the SFU told {told:?}",
        if first == second { "the same" } else { "another" }
    ));
    tab.wait_connected();
    let since = caller.since(&delayed).expect("the delayed event");
    assert!(since > broken, "no restart since it came back");
    let gone = now_ms();
    tab.leave();
    let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &delayed, &notice);
    tab.close();
}

/// The SFU ends the session, and livekit-client stays away.
#[test]
fn server_leave_is_a_leave() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let caller = stage.caller("serverleave");
    let tab = Browser::shared().open();
    let delayed = caller.schedule(DELAY);
    joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
    sleep_s(1.5);
    let ended = tab.simulate("server-leave");
    let notice = caller.wait_notice("participant_left", ended, Duration::from_secs(10));
    let sent = caller.wait_sent(&delayed, Duration::from_secs(15));
    let after = i128::from(sent) - i128::from(notice.at);
    say(&format!(
        "server-leave: {}, the leave was asked for {after} ms later",
        notice.reason
    ));
    // SERVER_SHUTDOWN is not believed for 3 s, then asked about twice, 3 s apart.
    assert!((3000..=9000).contains(&after), "after {after} ms");
    assert_eq!(tab.state().0, "disconnected");
    tab.close();
}

#[test]
fn a_tab_is_closed() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let caller = stage.caller("tabclosed");
    let tab = Browser::shared().open();
    let delayed = caller.schedule(DELAY);
    joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
    sleep_s(1.0);
    let closed = now_ms();
    tab.close();
    let notice = caller.wait_notice("participant_left", closed, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &delayed, &notice);
}

/// kill -9 of the whole browser.
#[test]
fn a_browser_that_is_killed() {
    if !real_neighbours() {
        return;
    }
    let stage = Stage::shared();
    let caller = stage.caller("browserkilled");
    let browser = Browser::start();
    let tab = browser.open();
    let delayed = caller.schedule(DELAY);
    joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
    sleep_s(1.0);
    browser.kill();
    is_missed(&caller, &delayed, now_ms());
}

/// A page that is reloaded says goodbye, and is back at once with another delayed event: the old one is cancelled, and
/// the new session is never shown as gone.
#[test]
fn a_page_is_reloaded() {
    if !real_neighbours() {
        return;
    }
    takes::play(|| page_is_reloaded(DELAY));
}

/// The event of the page that goes has this delay in seconds.
pub(super) fn page_is_reloaded(delay: u64) -> Result<(), Void> {
    let stage = Stage::shared();
    let caller = stage.caller("reloaded");
    let tab = Browser::shared().open();
    let old = caller.schedule(delay);
    joins_and_is_watched(&caller, &old, |answer| tab.join(answer));
    sleep_s(1.5);
    let openid = caller.openid();
    let reloaded = now_ms();
    tab.reload();
    caller.appear();
    let new = caller.schedule(20);
    let answer = caller.token_of(openid, Some(&new));
    let delegated = now_ms();
    tab.join(&answer);
    let notice = caller.wait_notice("participant_left", reloaded, Duration::from_secs(5));
    say(&format!(
        "reloaded: {} told after {} ms, the next delegation answered after {} ms",
        notice.reason,
        notice.at - reloaded,
        delegated - reloaded
    ));
    if delegated >= notice.at + 1400 {
        tab.close();
        return Err(Void("the page was not back while the service still doubted".into()));
    }
    is_cancelled(&stage, &caller, &old, &new);
    sleep_until(new.at + old.delay_ms.min(20_000) + 4000);
    assert_eq!(caller.left(), None, "shown as gone: {:?}", stage.calls.of_any(&old));
    caller.assert_there(&new);
    let gone = now_ms();
    tab.leave();
    let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
    leaves_within_two_seconds(&caller, &new, &notice);
    tab.close();
    Ok(())
}
