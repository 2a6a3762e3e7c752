//! The rules of one leave, row by row: inputs in, outputs out, time moved by hand.

use super::*;
use DelayedEventAction::{Cancel, Restart, Send};
use Output::{Call, Confirm, Done, Granted, Store};
use proptest::prelude::*;

const DELAY: u64 = 20_000;

#[test]
fn l2b_the_wait_restarts_for_a_minute_and_ends_one_delay_later_with_one_try() {
    let mut leave = Bench::new(DELAY);
    leave.outcome = Some(Outcome::Done);
    let restarts = at_of(&leave.until(60_000), Call(Restart));
    assert_eq!(restarts, [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]);
    leave.outcome = None;
    leave.last_no = Some(leave.now.after(15_000));
    assert_eq!(leave.until(20_000), [(20_000, Call(Send))]);
    let end = FinishReason::NotSent(DepartureCause::NeverJoined);
    assert_eq!(leave.called(Outcome::Transient(None)), [Done(end)]);
}

#[test]
fn l2b_a_short_delay_is_not_restarted_before_somebody_comes() {
    let mut leave = Bench::new(4_999);
    leave.last_no = Some(leave.now);
    assert_eq!(leave.until(5_000), [(4_999, Call(Send))]);
}

#[test]
fn l2b_a_long_wait_without_a_clear_no_sends_nothing() {
    for (last_no, expected) in [
        (None, Done(FinishReason::NeverJoined)),
        (Some(59_000), Done(FinishReason::NeverJoined)),
        (Some(70_000), Confirm),
        (Some(115_000), Call(Send)),
    ] {
        let mut leave = Bench::new(120_000);
        leave.last_no = last_no.map(|millis| leave.now.after(millis));
        leave.outcome = Some(Outcome::Transient(None));
        let actions = leave.until(59_999);
        assert_eq!(actions, [], "the half is after the first minute");
        let ended: Vec<_> = leave.until(60_001).into_iter().filter(|(_, out)| *out != Call(Restart)).collect();
        assert_eq!(ended.first(), Some(&(60_001, expected)), "{last_no:?}");
    }
}

#[test]
fn l4_restarts_at_once_when_seen_then_at_half_of_the_delay_after_the_last_was_sent() {
    let mut leave = Bench::new(DELAY);
    assert_eq!(leave.step(Input::Present), [Call(Restart)]);
    leave.wait(400);
    assert_eq!(leave.called(Outcome::Done), [Store, Granted]);
    let next = leave.until(DELAY / 2);
    let [(at, Call(Restart))] = next[..] else { panic!("{next:?}") };
    assert!((9_000 - 400..=10_000 - 400).contains(&at), "{at}");
}

#[test]
fn l4_what_another_process_may_restart_too_waits_for_80_per_cent() {
    let mut leave = Bench::active(DELAY);
    leave.outcome = Some(Outcome::Done);
    leave.shared = true;
    assert_eq!(leave.step(Input::Shared), []);
    assert_eq!(at_of(&leave.until(3 * DELAY), Call(Restart)), [16_000, 32_000, 48_000]);
    // Alone again, at half of the delay as ever.
    leave.shared = false;
    let next = at_of(&leave.until(DELAY), Call(Restart));
    assert_eq!(next[0], 4_000);
    assert!(next[1] <= 14_000, "{next:?}");
}

#[test]
fn l4_an_answer_that_comes_after_half_of_the_delay_is_followed_by_a_restart_at_once() {
    let mut leave = Bench::new(8_000);
    leave.usual_ms = 5_000;
    let _ = leave.step(Input::Present);
    assert_eq!(leave.until(5_000), []);
    assert_eq!(leave.called(Outcome::Done), [Store, Granted, Call(Restart)]);
    for _ in 0..20 {
        assert_eq!(leave.until(5_000), []);
        assert_eq!(leave.called(Outcome::Done), [Store, Call(Restart)]);
    }
}

#[test]
fn l4_failures_are_tried_again_until_one_delay_after_the_last_answer() {
    let mut leave = Bench::active(DELAY);
    leave.outcome = Some(Outcome::Transient(None));
    let actions = leave.until(DELAY + 1);
    let restarts = at_of(&actions, Call(Restart));
    assert!(restarts.len() >= 4, "{restarts:?}");
    assert_eq!(actions.last(), Some(&(DELAY, Done(FinishReason::GivenUp))));
}

/// One 503 with `Retry-After: 3600`, and the homeserver is well a second later.
#[test]
fn l4_a_hint_moves_a_restart_by_a_third_of_what_is_left_at_most() {
    for (delay, hint, most) in [
        (18_000, Duration::from_secs(3_600), 3_300),
        (18_000, Duration::from_secs(1), 1_000),
        (3_600_000, Duration::MAX, 60_000),
    ] {
        let mut leave = Bench::active(delay);
        while leave.until(50).is_empty() {}
        assert_eq!(leave.called(Outcome::Transient(Some(hint))), []);
        let next = leave.until(most);
        assert!(matches!(next[..], [(_, Call(Restart))]), "{delay} {hint:?}: {next:?}");
    }
}

/// A lost call costs a quarter of what is left, and a late answer to it counts from when it was sent.
#[test]
fn l4_a_try_is_waited_for_a_quarter_of_what_is_left() {
    for (delay, usual_ms, least, most) in [
        (18_000, 20, 2_250, 2_480),
        // There is no time for another one; that it was granted cannot be ruled out until a delay after it.
        (1_600, 20, 1_600, 1_600),
        (18_000, 4_000, 8_000, 8_000),
        (3_600_000, 20, 10_000, 10_000),
    ] {
        let mut leave = Bench::active(delay);
        leave.usual_ms = usual_ms;
        while leave.until(1).is_empty() {}
        let sent = leave.now;
        let next = leave.until(10_000);
        let &(at, first) = next.first().unwrap();
        assert!((least..=most).contains(&at), "{delay} {usual_ms}: {at}");
        if delay < 2_000 {
            assert_eq!(first, Done(FinishReason::GivenUp));
            continue;
        }
        assert_eq!(first, Call(Restart), "{delay}");
        let _ = leave.step(Input::Called {
            action: Restart,
            sent,
            outcome: Outcome::Done,
        });
        assert_eq!(leave.leave.counted_from, sent);
        assert_eq!(leave.leave.deadline(), leave.now.after(delay));
    }
}

#[test]
fn l4_held_for_longer_than_its_delay_it_is_restarted_first() {
    let now = Time::START;
    let mut leave = Bench::of(Leave::new(delay(6_000), now.before(7_000), now));
    assert_eq!(leave.step(Input::Time), [Call(Restart)]);
}

#[test]
fn l4_l8_no_restart_more_often_than_every_250_ms() {
    for millis in [1, 100, 499, 600] {
        let mut leave = Bench::new(millis);
        leave.outcome = Some(Outcome::Done);
        let _ = leave.step(Input::Present);
        let restarts = at_of(&leave.until(10_000), Call(Restart));
        assert!(restarts.windows(2).all(|pair| pair[1] - pair[0] >= 250), "{restarts:?}");
    }
}

#[test]
fn l4a_limited_restarts_stay_in_line_and_may_wait_until_80_percent() {
    let mut leave = Bench::active(DELAY);
    let counted = leave.now;
    let _ = leave.until(DELAY / 2);
    assert_eq!(leave.called(Outcome::Limited(Some(Duration::from_secs(3_600)))), []);
    leave.permits = false;
    assert_eq!(leave.until(250), []);
    let expected = (Restart, counted.after(DELAY), counted.after(DELAY / 5 * 4));
    assert_eq!(leave.leave.pending_call(), Some(expected));
}

#[test]
fn l5_a_leave_is_tried_until_the_homeserver_fires_it_but_for_half_a_minute_at_least() {
    for (delay, window) in [(DELAY, 30_000), (120_000, 120_000), (7_200_000, 3_600_000)] {
        let mut leave = Bench::active(delay);
        leave.outcome = Some(Outcome::Transient(None));
        leave.confirms = true;
        let now = leave.now;
        let mut actions: Vec<_> = leave.gone(DepartureCause::RoomClosed).into_iter().map(|out| (0, out)).collect();
        actions.extend(leave.until(window + 10_000));
        let sends = at_of(&actions, Call(Send));
        let end = Done(FinishReason::NotSent(DepartureCause::RoomClosed));
        assert_eq!(actions.last().map(|(_, out)| *out), Some(end), "{now:?}");
        let last = sends.last().unwrap();
        assert!(*last <= window && *last > window * 2 / 5, "{delay}: {last}");
    }
}

#[test]
fn l5_retry_after_is_clamped() {
    for (hint, pause) in [
        (Duration::ZERO, 250),
        (Duration::from_secs(2), 2_000),
        (Duration::MAX, 30_000 - 250),
    ] {
        let mut leave = Bench::active(DELAY);
        leave.confirms = true;
        assert_eq!(leave.gone(DepartureCause::Reported), [Call(Send)]);
        assert_eq!(leave.called(Outcome::Transient(Some(hint))), []);
        let next = leave.until(pause);
        assert_eq!(at_of(&next, Call(Send)), [pause], "{hint:?}: {next:?}");
        let end = Done(FinishReason::Sent(DepartureCause::Reported));
        assert_eq!(leave.called(Outcome::Done), [end]);
    }
}

#[test]
fn l5a_on_old_evidence_nothing_is_sent() {
    let mut leave = Bench::active(DELAY);
    leave.permits = false;
    assert_eq!(leave.gone(DepartureCause::Reported), []);
    assert_eq!(leave.until(10_000), []);
    leave.permits = true;
    assert_eq!(leave.step(Input::Time), [Confirm], "asked first when its turn comes");
    assert_eq!(leave.leave.pending_call(), None);
    assert_eq!(leave.gone(DepartureCause::Reported), [Call(Send)], "one clear no is enough");
    // The process stood still while the next try was pending.
    assert_eq!(leave.called(Outcome::Transient(None)), []);
    assert_eq!(leave.step(Input::Woke(0)), [Confirm]);
    assert_eq!(leave.until(5_000), [], "not before an answer");
    assert_eq!(leave.step(Input::Present), [Call(Restart)]);
    assert_eq!(leave.leave.phase(), Phase::Active);
}

#[test]
fn l5a_whoever_the_pause_brought_near_the_end_is_restarted_at_once() {
    for (lost_ms, expected) in [(0, 0), (8_000, 1), (60_000, 1)] {
        let mut leave = Bench::active(18_000);
        leave.wait(3_000);
        let restarts = leave.step(Input::Woke(lost_ms));
        assert_eq!(restarts, vec![Call(Restart); expected], "{lost_ms}");
    }
}

/// A clock that was set has ended nothing: a homeserver that limits, or is away for some seconds, has its time.
#[test]
fn l5a_a_clock_that_jumps_gives_nothing_up_before_its_time() {
    let mut leave = Bench::active(60_000);
    leave.wait(5_000);
    leave.permits = false;
    let _ = leave.step(Input::Woke(3_600_000));
    assert_eq!(leave.until(40_000), []);
    assert_eq!(leave.leave.phase(), Phase::Active);
    leave.permits = true;
    assert_eq!(leave.step(Input::Time), [Call(Restart)]);
    assert_eq!(leave.called(Outcome::Done), [Store]);
    assert_eq!(leave.leave.phase(), Phase::Active);
}

#[test]
fn l5a_a_call_that_was_under_way_when_the_host_was_suspended_is_not_waited_for() {
    // Of 60 s two are left, and the restart that was under way when the host was suspended is lost.
    let mut leave = Bench::active(60_000);
    assert_eq!(at_of(&leave.until(30_000), Call(Restart)).len(), 1);
    let left = leave.leave.deadline().since(leave.now);
    assert_eq!(leave.step(Input::Woke(left - 2_000)), [Call(Restart)]);
    // A leave that was being sent is sent again on new evidence only: who was gone may be back.
    let mut leave = Bench::active(60_000);
    assert_eq!(leave.gone(DepartureCause::Reported), [Call(Send)]);
    leave.wait(100);
    let _ = leave.step(Input::Woke(3_600_000));
    let again = leave.until(2_000);
    assert_eq!((at_of(&again, Call(Send)).len(), at_of(&again, Confirm).len()), (0, 1), "{again:?}");
    assert_eq!(leave.gone(DepartureCause::Missing), [Call(Send)]);
}

#[test]
fn l6_what_each_outcome_of_a_restart_does() {
    let refusals = [
        (Outcome::NotFound, FinishReason::EventGone),
        (Outcome::Conflict, FinishReason::EventGone),
        (Outcome::Forbidden, FinishReason::Refused),
    ];
    for (outcome, reason) in refusals {
        let mut leave = Bench::active(DELAY);
        let _ = leave.until(DELAY / 2);
        assert_eq!(leave.called(outcome), [], "{outcome:?} is asked once more");
        assert_eq!(leave.until(2_000), [(2_000, Call(Restart))], "{outcome:?}");
        assert_eq!(leave.called(outcome), [Done(reason)]);
        assert_eq!(leave.step(Input::Present), [], "nothing after the end");
        let mut leave = Bench::active(DELAY);
        let _ = leave.until(DELAY / 2);
        let _ = leave.called(outcome);
        let _ = leave.until(2_000);
        assert_eq!(leave.called(Outcome::Done), [Store], "{outcome:?} was taken back");
    }
    for outcome in [Outcome::Transient(None), Outcome::Limited(None)] {
        let mut leave = Bench::active(DELAY);
        let _ = leave.until(DELAY / 2);
        assert_eq!(leave.called(outcome), [], "{outcome:?}");
        assert_eq!(at_of(&leave.until(1_000), Call(Restart)).len(), 1, "{outcome:?}");
    }
}

#[test]
fn l6_late_noes_to_tries_that_ran_side_by_side_are_one_no() {
    let mut leave = Bench::active(DELAY);
    let mut tries = Vec::new();
    while tries.len() < 2 {
        tries.extend(leave.until(1).iter().map(|_| leave.now));
    }
    let no = |sent| Input::Called {
        action: Restart,
        sent,
        outcome: Outcome::NotFound,
    };
    assert_eq!(leave.step(no(tries[0])), [], "the newer one tells");
    assert_eq!(leave.step(no(tries[1])), [], "the first no");
    let next = leave.until(SECOND_OPINION_MS);
    assert!(matches!(next[..], [(1_000.., Call(Restart))]), "{next:?}");
    assert_eq!(leave.called(Outcome::NotFound), [Done(FinishReason::EventGone)]);
}

#[test]
fn l6_what_each_outcome_of_a_send_and_of_a_cancellation_does() {
    let sent = Some(FinishReason::Sent(DepartureCause::Reported));
    for (outcome, end, cancelled) in [
        (Outcome::Done, sent, true),
        (Outcome::NotFound, sent, true),
        (Outcome::Conflict, sent, true),
        (Outcome::Forbidden, Some(FinishReason::Refused), true),
        (Outcome::Transient(None), None, false),
        (Outcome::Limited(None), None, false),
    ] {
        let mut leave = Bench::active(DELAY);
        let _ = leave.gone(DepartureCause::Reported);
        assert_eq!(leave.called(outcome).first().copied(), end.map(Done), "send {outcome:?}");
        let mut leave = Bench::active(DELAY);
        let _ = leave.step(Input::Replaced);
        assert_eq!(leave.step(Input::Superseded), [Call(Cancel)]);
        let end = cancelled.then_some(Done(FinishReason::Replaced));
        assert_eq!(leave.called(outcome).first().copied(), end, "cancel {outcome:?}");
    }
}

#[test]
fn l5_who_comes_back_before_the_leave_is_on_its_way_is_not_reported() {
    let mut leave = Bench::active(DELAY);
    leave.wait(300);
    let _ = leave.gone(DepartureCause::Reported);
    let _ = leave.called(Outcome::Transient(Some(Duration::from_secs(5))));
    assert_eq!(leave.step(Input::Present), [Call(Restart)]);
    assert_eq!(leave.leave.phase(), Phase::Active);
    let mut leave = Bench::active(DELAY);
    leave.wait(300);
    let _ = leave.gone(DepartureCause::Reported);
    assert_eq!(leave.step(Input::Present), [], "it is on its way");
    assert_eq!(leave.called(Outcome::Transient(None)), [Call(Restart)], "it did not get there");
}

#[test]
fn l11_a_restored_leave_goes_on_with_the_time_that_is_left() {
    let now = Time::START;
    for (restarted, seen, deadline, first) in [
        (now.before(15_000), true, 5_000, true),
        (now.before(3_000), true, 17_000, false),
        (now.before(40_000), true, 20_000, true),
        (now.after(40_000), true, 20_000, true),
        (now.before(15_000), false, 5_000, false),
    ] {
        let leave = Leave::restored(delay(DELAY), now.before(90_000), restarted, seen, now);
        let mut leave = Bench::of(leave);
        assert_eq!(leave.leave.deadline(), now.after(deadline), "{restarted:?} {seen}");
        assert_eq!(leave.step(Input::Time) == [Call(Restart)], first, "{restarted:?} {seen}");
    }
}

#[test]
fn l11_a_record_from_the_future_is_restarted_at_half_of_its_delay_like_any_other() {
    // The next restart was counted from the moment that the record names: never made within the delay.
    for seen in [true, false] {
        let restarted = Time::START.after(3_600_000);
        let mut leave = Bench::of(Leave::restored(delay(DELAY), Time::START, restarted, seen, Time::START));
        leave.outcome = Some(Outcome::Done);
        let restarts = at_of(&leave.until(60_000), Call(Restart));
        assert!(restarts.windows(2).all(|two| two[1] - two[0] <= DELAY / 2), "{seen}: {restarts:?}");
        assert!(restarts.len() >= 6, "{seen}: {restarts:?}");
    }
}

#[test]
fn l14_a_replaced_event_that_only_seems_to_be_over_since_the_clock_was_set_is_cancelled() {
    let mut leave = Bench::active(DELAY);
    assert_eq!(leave.step(Input::Replaced), []);
    assert_eq!(leave.step(Input::Woke(3_600_000)), []);
    assert_eq!(leave.step(Input::Superseded), [Call(Cancel)]);
}

#[test]
fn l14_an_event_that_only_seems_to_be_over_when_it_is_replaced_is_cancelled() {
    let mut leave = Bench::new(300_000);
    leave.wait(295_000);
    // The clock was set: five seconds are left in truth.
    let _ = leave.step(Input::Woke(10_000));
    leave.wait(3_000);
    assert_eq!(leave.step(Input::Replaced), []);
    assert_eq!(leave.step(Input::Superseded), [Call(Cancel)]);
}

#[test]
fn l12_stopping_restarts_the_active_once_more() {
    let mut leave = Bench::active(DELAY);
    leave.wait(300);
    leave.stopping = true;
    assert_eq!(leave.step(Input::Stopping), [Call(Restart)]);
    assert!(!leave.leave.is_at_rest());
    assert_eq!(leave.called(Outcome::Done), [Store]);
    assert!(leave.leave.is_at_rest());
    assert_eq!(leave.until(DELAY - 1), []);
    let mut leave = Bench::active(DELAY);
    let _ = leave.gone(DepartureCause::Reported);
    let _ = leave.step(Input::Stopping);
    assert!(!leave.leave.is_at_rest(), "a leave that is due is sent");
}

#[test]
fn l13a_a_silent_sfu_pauses_restarts_and_the_leave_stays_until_its_deadline() {
    let mut leave = Bench::active(DELAY);
    leave.silent = true;
    assert_eq!(leave.step(Input::Time), []);
    assert_eq!(leave.until(DELAY - 1_000), []);
    leave.silent = false;
    assert_eq!(leave.step(Input::Time), [Call(Restart)], "it answers again in time");
    let _ = leave.called(Outcome::Done);
    leave.silent = true;
    assert_eq!(leave.until(DELAY), [(DELAY, Done(FinishReason::SfuSilent))]);
}

#[test]
fn l14_a_replaced_leave_cancels_its_event_once_the_next_one_was_restarted() {
    let mut leave = Bench::active(DELAY);
    assert_eq!(leave.step(Input::Replaced), []);
    assert_eq!(leave.until(3_000), [], "not before");
    assert_eq!(leave.step(Input::Superseded), [Call(Cancel)]);
    assert_eq!(leave.called(Outcome::Transient(None)), []);
    assert_eq!(at_of(&leave.until(1_000), Call(Cancel)).len(), 1);
    assert_eq!(leave.called(Outcome::NotFound), [Done(FinishReason::Replaced)]);
    let mut leave = Bench::active(DELAY);
    leave.outcome = Some(Outcome::Transient(None));
    let _ = (leave.step(Input::Replaced), leave.step(Input::Superseded));
    let end = leave.until(DELAY).last().copied();
    assert!(
        end.is_some_and(|(at, out)| at <= DELAY && out == Done(FinishReason::Replaced)),
        "tried within its deadline: {end:?}"
    );
}

#[test]
fn l14_the_same_event_again_renews_the_leave() {
    let mut leave = Bench::active(DELAY);
    leave.wait(5_000);
    assert_eq!(leave.renew(DELAY * 2), [Store, Call(Restart)]);
    assert_eq!(leave.leave.deadline(), leave.now.after(DELAY * 2));
    let _ = leave.called(Outcome::Done);
    leave.permits = false;
    let _ = leave.gone(DepartureCause::Reported);
    leave.wait(500);
    assert_eq!(leave.renew(DELAY), [Store]);
    assert_eq!(leave.leave.phase(), Phase::AwaitingJoin, "asked for after the departure");
    leave.permits = true;
    assert!(at_of(&leave.until(3_000), Call(Send)).is_empty());
    let _ = leave.step(Input::Present);
    assert_eq!(leave.leave.phase(), Phase::Active);
}

#[test]
fn l14_an_answer_from_before_the_event_was_delegated_again_grants_nothing() {
    // X is restarted, replaced and being cancelled, and delegated again: what comes late of that restart says nothing of the
    // cancellation, and the one that replaced it must not be cancelled for it.
    let mut leave = Bench::active(DELAY);
    assert_eq!(at_of(&leave.until(DELAY / 2), Call(Restart)).len(), 1);
    let (_, sent) = leave.newest.expect("a restart");
    leave.wait(500);
    assert_eq!(leave.step(Input::Replaced), []);
    assert_eq!(leave.step(Input::Superseded), [Call(Cancel)]);
    leave.wait(100);
    assert_eq!(leave.renew(DELAY), [Store, Call(Restart)]);
    let late = Input::Called {
        action: Restart,
        sent,
        outcome: Outcome::Done,
    };
    assert_eq!(leave.step(late), [Store]);
    assert_eq!(leave.called(Outcome::Done), [Store, Granted]);
    // Delegated twice in a row, nothing was cancelled between.
    let mut leave = Bench::new(DELAY);
    assert_eq!(leave.step(Input::Present), [Call(Restart)]);
    leave.wait(1);
    assert_eq!(leave.renew(DELAY), [Store]);
    assert_eq!(leave.called(Outcome::Done), [Store, Granted]);
}

#[test]
fn a_leave_is_over_at_once_for_whoever_was_kicked_evicted_or_failed_to_join() {
    for reason in [FinishReason::Kicked, FinishReason::Evicted, FinishReason::JoinFailed] {
        assert_eq!(Bench::active(DELAY).step(Input::Over(reason)), [Done(reason)]);
    }
}

// --- whatever it is told ---

#[derive(Clone, Copy, Debug)]
enum Op {
    Wait(u64),
    Present,
    Gone(u64),
    JoinFailed,
    Permit,
    Called(u8),
    Lost,
    LastNo(u64),
    Renewed,
    Replaced,
    Installed,
    Superseded,
    Woke(u64),
    Silent(bool),
    Stopping,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u64..4_000).prop_map(Op::Wait),
        2 => (4_000u64..100_000).prop_map(Op::Wait),
        4 => Just(Op::Present),
        3 => (0u64..12_000).prop_map(Op::Gone),
        8 => Just(Op::Permit),
        6 => (0u8..8).prop_map(Op::Called),
        1 => Just(Op::Lost),
        1 => (0u64..100_000).prop_map(Op::LastNo),
        1 => Just(Op::Renewed),
        1 => any::<bool>().prop_map(Op::Silent),
        1 => (0u64..100_000).prop_map(Op::Woke),
        1 => prop_oneof![Just(Op::JoinFailed), Just(Op::Replaced), Just(Op::Installed), Just(Op::Superseded), Just(Op::Stopping)],
    ]
}

/// One leave, and what must hold of it whatever it is told.
struct Watched {
    bench: Bench,
    calls: Vec<(DelayedEventAction, Time)>,
    finished: bool,
    last_restart: Option<Time>,
}

impl Watched {
    fn new(millis: u64, seed: u64) -> Self {
        let mut bench = Bench::new(millis);
        bench.permits = false;
        bench.jitter = Jitter::new(seed);
        Self {
            bench,
            calls: Vec::new(),
            finished: false,
            last_restart: None,
        }
    }

    fn step(&mut self, input: Input) {
        let (now, phase) = (self.bench.now, self.bench.leave.phase());
        let deadline = self.bench.leave.deadline();
        let outputs = self.bench.step(input);
        assert!(!self.finished || outputs.is_empty(), "{outputs:?} after the end");
        for output in outputs {
            assert!(!self.finished, "{output:?} after the end");
            match output {
                Call(Restart) => {
                    assert!(self.last_restart.is_none_or(|last| now.since(last) >= 250), "restarted too soon");
                    assert!(now < deadline, "a restart after the event has run out");
                    self.last_restart = Some(now);
                    self.calls.push((Restart, now));
                }
                Call(action) => {
                    let until = match (action, phase) {
                        (Send, Phase::Sending { evidence, until, .. }) => {
                            assert!(evidence.is_some_and(|asked| now.since(asked) < FRESH_MS), "on old evidence");
                            until
                        }
                        (Cancel, Phase::Cancelling { until }) => until,
                        _ => panic!("{action:?} in {phase:?}"),
                    };
                    assert!(now <= until, "tried after the window");
                    self.calls.push((action, now));
                }
                Done(_) => self.finished = true,
                Store | Confirm | Granted => {}
            }
        }
        if let Phase::Sending { until, .. } | Phase::Cancelling { until } = self.bench.leave.phase() {
            let most = self.bench.leave.delay().as_millis().max(MAX_SEND_MS);
            assert!(until <= now.after(most), "{until:?} {now:?}");
        }
        if let Some((_, until, relaxed)) = self.bench.leave.pending_call() {
            assert!(relaxed <= until);
        }
    }

    fn wait(&mut self, millis: u64) {
        let until = self.bench.now.after(millis);
        while let Some(at) = self.bench.next_deadline().filter(|&at| at <= until) {
            self.bench.now = self.bench.now.max(at);
            self.step(Input::Time);
            let next = self.bench.next_deadline();
            assert!(next.is_none_or(|next| next > self.bench.now), "no progress: {:?}", self.bench.leave);
        }
        self.bench.now = until;
    }

    fn run(&mut self, op: Op) {
        let now = self.bench.now;
        match op {
            Op::Wait(millis) => self.wait(millis),
            Op::Present => self.step(Input::Present),
            Op::Gone(ago) => self.step(Input::Gone(DepartureEvidence {
                cause: DepartureCause::Missing,
                asked: now.before(ago),
            })),
            Op::JoinFailed => self.step(Input::Over(FinishReason::JoinFailed)),
            Op::Permit => {
                if self.bench.leave.pending_call().is_some() {
                    self.step(Input::Permit);
                }
            }
            Op::Called(kind) => {
                let outcome = [
                    Outcome::Done,
                    Outcome::Done,
                    Outcome::NotFound,
                    Outcome::Limited(None),
                    Outcome::Transient(None),
                    Outcome::Transient(Some(Duration::ZERO)),
                    Outcome::Transient(Some(Duration::MAX)),
                    Outcome::Transient(Some(Duration::from_secs(3))),
                ][usize::from(kind)];
                // Those that are late end after those that are not.
                if let Some((action, sent)) = self.calls.pop() {
                    self.step(Input::Called { action, sent, outcome });
                }
            }
            Op::Lost => drop(self.calls.pop()),
            Op::LastNo(ago) => self.bench.last_no = Some(now.before(ago)),
            Op::Renewed => self.step(Input::Renewed(self.bench.leave.delay(), now)),
            Op::Replaced => self.step(Input::Replaced),
            Op::Installed => self.step(Input::Installed),
            Op::Superseded => self.step(Input::Superseded),
            Op::Woke(lost_ms) => self.step(Input::Woke(lost_ms)),
            Op::Silent(silent) => {
                self.bench.silent = silent;
                self.step(Input::Time);
            }
            Op::Stopping => {
                self.bench.stopping = true;
                self.step(Input::Stopping);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_leave_keeps_its_bounds_whatever_it_is_told(
        delay in prop_oneof![1u64..2_000, 2_000u64..60_000, 60_000u64..=86_400_000],
        seed: u64,
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut watched = Watched::new(delay, seed);
        watched.step(Input::Time);
        for op in ops {
            watched.run(op);
        }
    }

    /// The homeserver and the SFU fall silent: the leave ends by itself, at most one delay and an hour later.
    #[test]
    fn nobody_waits_for_ever(delay in 1u64..86_400_000, ops in prop::collection::vec(op(), 0..60)) {
        let mut watched = Watched::new(delay, 1);
        watched.step(Input::Time);
        for op in ops {
            watched.run(op);
        }
        let end = watched.bench.now.after(2 * delay + 3_600_000 + 20_000);
        while !watched.finished && watched.bench.now < end {
            watched.wait(1_000.max(delay / 50));
            watched.run(Op::Permit);
            watched.run(Op::Called(4));
        }
        prop_assert!(watched.finished, "{:?}", watched.bench.leave);
    }

    #[test]
    fn l5_tries_stay_within_the_window(
        hints in prop::collection::vec(prop::option::of(0u64..u64::MAX), 1..200),
        window in 0u64..4_000_000,
        seed: u64,
    ) {
        let (mut now, until, mut jitter) = (Time::START, Time::START.after(window), Jitter::new(seed));
        for (n, hint) in hints.into_iter().enumerate() {
            let failures = u8::try_from(n + 1).unwrap_or(u8::MAX);
            let Some(next) = Schedule::SEND.next_try(failures, hint.map(Duration::from_millis), now, until, &mut jitter) else { break };
            prop_assert!(next <= until && next.since(now) >= MIN_PAUSE_MS);
            now = next;
        }
    }
}

// --- the bench ---

struct Bench {
    leave: Leave,
    now: Time,
    jitter: Jitter,
    usual_ms: u64,
    silent: bool,
    shared: bool,
    stopping: bool,
    last_no: Option<Time>,
    /// Grants permits as soon as they are wanted.
    permits: bool,
    /// Ends every call so.
    outcome: Option<Outcome>,
    /// The SFU says no whenever it is asked again.
    confirms: bool,
    newest: Option<(DelayedEventAction, Time)>,
    cause: DepartureCause,
}

impl Bench {
    fn of(leave: Leave) -> Self {
        Self {
            leave,
            now: Time::START,
            jitter: Jitter::new(3),
            usual_ms: 20,
            silent: false,
            shared: false,
            stopping: false,
            last_no: None,
            permits: true,
            outcome: None,
            confirms: false,
            newest: None,
            cause: DepartureCause::Reported,
        }
    }

    fn new(millis: u64) -> Self {
        Self::of(Leave::new(delay(millis), Time::START, Time::START))
    }

    /// Somebody is there, and the first restart got through.
    fn active(millis: u64) -> Self {
        let mut bench = Self::new(millis);
        assert_eq!(bench.step(Input::Present), [Call(Restart)]);
        assert_eq!(bench.called(Outcome::Done), [Store, Granted]);
        assert_eq!(bench.leave.phase(), Phase::Active);
        bench
    }

    fn take(&mut self, input: Input) -> Vec<Output> {
        let mut around = Around {
            now: self.now,
            jitter: &mut self.jitter,
            usual_ms: self.usual_ms,
            sfu_silent: self.silent,
            shared: self.shared,
            stopping: self.stopping,
            last_no: self.last_no,
            replaced_until: None,
        };
        self.leave.step(input, &mut around)
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        let mut outputs = self.take(input);
        let mut n = 0;
        loop {
            if self.permits && self.leave.pending_call().is_some() {
                outputs.extend(self.take(Input::Permit));
            }
            let Some(&output) = outputs.get(n) else { return outputs };
            n += 1;
            match output {
                Call(action) => {
                    self.newest = Some((action, self.now));
                    if let Some(outcome) = self.outcome {
                        let sent = self.now;
                        outputs.extend(self.take(Input::Called { action, sent, outcome }));
                    }
                }
                Confirm if self.confirms => {
                    let (cause, asked) = (self.cause, self.now);
                    outputs.extend(self.take(Input::Gone(DepartureEvidence { cause, asked })));
                }
                Store | Confirm | Granted | Done(_) => {}
            }
        }
    }

    /// The newest call has ended.
    fn called(&mut self, outcome: Outcome) -> Vec<Output> {
        let (action, sent) = self.newest.expect("a call");
        self.step(Input::Called { action, sent, outcome })
    }

    /// The SFU was asked just now, and said no.
    fn gone(&mut self, cause: DepartureCause) -> Vec<Output> {
        self.cause = cause;
        let asked = self.now;
        self.step(Input::Gone(DepartureEvidence { cause, asked }))
    }

    fn renew(&mut self, millis: u64) -> Vec<Output> {
        self.step(Input::Renewed(delay(millis), self.now))
    }

    fn next_deadline(&self) -> Option<Time> {
        self.leave.next_deadline(self.silent)
    }

    /// Lets so many milliseconds go by; what was asked for, and how many milliseconds in.
    fn until(&mut self, millis: u64) -> Vec<(u64, Output)> {
        let (start, end) = (self.now, self.now.after(millis));
        let mut done = Vec::new();
        while let Some(at) = self.next_deadline().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            let passed = self.now.since(start);
            done.extend(
                self.step(Input::Time)
                    .into_iter()
                    .filter(|out| *out != Store)
                    .map(|out| (passed, out)),
            );
        }
        self.now = end;
        done
    }

    fn wait(&mut self, millis: u64) {
        self.now = self.now.after(millis);
    }
}

fn at_of(outputs: &[(u64, Output)], wanted: Output) -> Vec<u64> {
    outputs.iter().filter(|(_, output)| *output == wanted).map(|(at, _)| *at).collect()
}

fn delay(millis: u64) -> Delay {
    Delay::from_millis(millis).expect("a delay")
}
