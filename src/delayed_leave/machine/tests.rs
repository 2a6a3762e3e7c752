//! The rules of one job, row by row: inputs in, exact actions out, time moved by hand.

use super::*;
use crate::backoff::Schedule;
use Action::{Cancel, Finish, JudgeRoom, Persist, Restart, Send};
use LeaveReason as R;
use proptest::prelude::*;

const DELAY: u64 = 20_000;
const QUICK: Action = Action::LookUp {
    within: Duration::from_millis(400),
};
const ASK: Action = Action::LookUp {
    within: Duration::from_secs(5),
};

#[test]
fn l2_a_repeat_and_a_late_event_of_an_older_session_change_nothing() {
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.joined_as("b", 2_000), [Persist]);
    assert_eq!(job.left_as("a", 1_000, R::ClientInitiated), []);
    assert_eq!(job.joined_as("a", 1_000), []);
    assert_eq!(*job.machine.state(), State::Connected);
    let event = Event {
        id: Some(7),
        ..job.event("b", 2_000)
    };
    assert_eq!(job.step(Input::Left(event, R::DuplicateIdentity)), []);
    assert_eq!(job.joined_as("c", 3_000), [Persist]);
    assert_eq!(
        job.step(Input::Left(Event { sid: "c", ..event }, R::ClientInitiated)),
        [],
        "the same event again"
    );
    assert_eq!(*job.machine.state(), State::Connected);
}

#[test]
fn l2_a_departure_of_a_newer_session_counts_though_its_join_was_never_told() {
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.left_as("b", 2_000, R::ClientInitiated), [Persist]);
    assert_eq!(job.until(2_000), [(800, QUICK), (1_500, QUICK), (1_950, Send)]);
}

#[test]
fn l2_reports_from_more_than_two_seconds_before_the_delegation_change_nothing() {
    let mut job = Bench::new(DELAY);
    let _ = job.until(100);
    let old = Event {
        happened: job.start.before(2_001),
        ..job.event("a", 1_000)
    };
    assert_eq!(job.step(Input::Left(old, R::ClientInitiated)), []);
    assert_eq!(*job.machine.state(), State::Waiting);
    let recent = Event {
        happened: job.start.before(2_000),
        ..old
    };
    assert_eq!(job.step(Input::Left(recent, R::ClientInitiated)), [Persist, QUICK]);
    assert!(matches!(job.machine.state(), State::Doubted { why: Doubt::Reported, .. }));
}

#[test]
fn l2a_usually_final_reasons_take_two_quick_questions() {
    for reason in [
        R::ClientInitiated,
        R::ConnectionTimeout,
        R::ParticipantRemoved,
        R::RoomDeleted,
        R::RoomClosed,
        R::SignalClose,
        R::UserRejected,
        R::UserUnavailable,
    ] {
        let mut job = Bench::connected(DELAY);
        assert_eq!(job.left(reason), []);
        assert_eq!(job.until(800), [(800, QUICK)]);
        assert_eq!(job.answer(Answer::Absent), [], "the first no is not believed");
        assert_eq!(job.until(700), [(700, QUICK)]);
        assert_eq!(job.answer(Answer::Absent), [Send], "{reason:?}");
    }
}

#[test]
fn l2a_no_answer_and_the_same_sid_are_departures() {
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    assert_eq!(job.until(2_000), [(800, QUICK), (1_500, QUICK), (1_950, Send)]);
    for answer in [present("a", 1_000), present("", 0), Answer::Unclear] {
        let mut job = Bench::connected(DELAY);
        let _ = job.left(R::ClientInitiated);
        let _ = job.until(1_500);
        assert_eq!(job.answer(answer), [Send]);
    }
}

#[test]
fn l2a_another_sid_is_a_continuation_joining_counts() {
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    let _ = job.until(800);
    let joining = Answer::Present(Participant {
        sid: "b",
        joined_at_ms: 2_000,
        active: false,
    });
    assert_eq!(job.answer(joining), [Persist]);
    assert_eq!(*job.machine.state(), State::Connected);
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    assert_eq!(job.joined_as("b", 2_000), [Persist]);
    assert_eq!(job.until(5_000), []);
}

#[test]
fn l2a_a_report_that_comes_late_is_checked_once_at_once() {
    let mut job = Bench::connected(DELAY);
    job.wait(7_000);
    let late = Event {
        happened: job.now.before(6_000),
        ..job.event("a", 1_000)
    };
    assert_eq!(job.step(Input::Left(late, R::ClientInitiated)), [QUICK]);
    assert_eq!(job.answer(Answer::Absent), [Send]);
}

#[test]
fn l2a_a_second_of_rounding_brings_no_question_forward() {
    let mut job = Bench::connected(DELAY);
    let rounded = Event {
        happened: job.now.before(1_000),
        ..job.event("a", 1_000)
    };
    assert_eq!(job.step(Input::Left(rounded, R::ClientInitiated)), []);
    assert_eq!(job.until(2_000), [(800, QUICK), (1_500, QUICK), (1_950, Send)]);
}

#[test]
fn l2a_other_reasons_are_judged_by_asking_after_three_seconds() {
    for reason in [
        R::DuplicateIdentity,
        R::Migration,
        R::StateMismatch,
        R::ServerShutdown,
        R::JoinFailure,
        R::Unknown,
    ] {
        let mut job = Bench::connected(DELAY);
        assert_eq!(job.left(reason), []);
        assert_eq!(job.until(3_000), [(3_000, ASK)]);
        assert_eq!(job.answer(Answer::Absent), []);
        assert_eq!(job.until(3_000), [(3_000, ASK)]);
        assert_eq!(job.answer(Answer::Absent), [JudgeRoom]);
        assert_eq!(job.room(Verdict::Stands), [Send], "{reason:?}");
        let mut job = Bench::connected(DELAY);
        let _ = job.left(reason);
        let _ = job.until(3_000);
        assert_eq!(job.answer(present("a", 1_000)), []);
        assert_eq!(*job.machine.state(), State::Connected, "{reason:?}");
    }
}

#[test]
fn l2a_an_aborted_connection_of_the_session_that_was_seen_is_a_report() {
    let mut job = Bench::connected(DELAY);
    let event = job.event("a", 1_000);
    assert_eq!(job.step(Input::Aborted(Event { sid: "z", ..event }, R::SignalClose)), []);
    assert_eq!(*job.machine.state(), State::Connected);
    assert_eq!(job.step(Input::Aborted(event, R::SignalClose)), []);
    assert_eq!(job.until(2_000), [(800, QUICK), (1_500, QUICK), (1_950, Send)]);
}

#[test]
fn l2b_the_wait_restarts_for_a_minute_and_ends_one_delay_later_with_one_try() {
    let mut job = Bench::new(DELAY);
    job.answers = Some(Answer::Absent);
    let restarts: Vec<u64> = job
        .until(60_000)
        .iter()
        .filter(|(_, action)| *action == Restart)
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(restarts, [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]);
    let end: Vec<_> = job
        .until(30_000)
        .into_iter()
        .filter(|(_, action)| !matches!(action, Action::LookUp { .. }))
        .collect();
    assert_eq!(end, [(20_000, Send)]);
    assert_eq!(
        job.step(Input::Sent(Outcome::Transient(None))),
        [Finish(Reason::NotSent(Cause::NeverCame))]
    );
}

#[test]
fn l2b_a_short_delay_is_not_restarted_before_somebody_comes() {
    let mut job = Bench::new(4_999);
    job.answers = Some(Answer::Absent);
    let actions = job.until(5_000);
    assert!(actions.iter().all(|(_, action)| *action != Restart));
    assert_eq!(actions.last(), Some(&(4_999, Send)));
}

#[test]
fn l2b_a_long_wait_without_a_clear_no_sends_nothing() {
    let mut job = Bench::new(120_000);
    job.answers = Some(Answer::Unclear);
    let actions = job.until(300_000);
    assert_eq!(actions.last().map(|(_, action)| *action), Some(Finish(Reason::NeverCame)));
    assert!(actions.iter().all(|(_, action)| *action != Send));
    let mut job = Bench::new(120_000);
    job.answers = Some(Answer::Absent);
    assert_eq!(job.until(300_000).last().map(|(_, action)| *action), Some(Send));
}

#[test]
fn l2b_questions_grow_apart_and_come_closer_at_the_end() {
    let mut job = Bench::new(3_600_000);
    job.answers = Some(Answer::Absent);
    let asked: Vec<u64> = job
        .until(3_660_000)
        .iter()
        .filter(|(_, action)| matches!(action, Action::LookUp { .. }))
        .map(|(at, _)| *at)
        .collect();
    assert_eq!(asked[0], 0);
    assert!(asked[1] <= 500);
    assert!(asked.windows(2).all(|pair| pair[1] - pair[0] <= 20_000));
    assert!(asked.len() < 250, "{}", asked.len());
}

#[test]
fn l2b_aborts_change_nothing_but_a_failed_join_ends_the_job() {
    let mut job = Bench::new(DELAY);
    assert_eq!(job.step(Input::Aborted(job.event("a", 1_000), R::SignalClose)), [ASK]);
    assert_eq!(*job.machine.state(), State::Waiting);
    assert_eq!(
        job.step(Input::Aborted(job.event("a", 1_000), R::JoinFailure)),
        [Finish(Reason::JoinFailed)]
    );
    assert_eq!(job.joined_as("b", 2_000), [], "nothing after the end");
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.step(Input::Aborted(job.event("z", 9_000), R::JoinFailure)), []);
    assert_eq!(*job.machine.state(), State::Connected);
}

#[test]
fn l2b_present_but_never_seen_starts_restarts_and_is_judged_by_asking() {
    let mut job = Bench::new(DELAY);
    let _ = job.until(0);
    let joining = Answer::Present(Participant {
        sid: "a",
        joined_at_ms: 1_000,
        active: false,
    });
    assert_eq!(job.answer(joining), [Persist, Restart]);
    assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist]);
    assert_eq!(
        job.step(Input::Aborted(job.event("a", 1_000), R::SignalClose)),
        [],
        "not reported gone: never seen"
    );
    assert!(matches!(
        job.machine.state(),
        State::Doubted {
            why: Doubt::Suspected { .. },
            ..
        }
    ));
}

#[test]
fn l3_an_absence_counts_when_it_is_confirmed_and_the_room_stands() {
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.step(Input::Ask), [ASK]);
    assert_eq!(job.answer(Answer::Absent), []);
    assert_eq!(job.until(2_999), []);
    assert_eq!(job.until(1), [(1, ASK)]);
    let asked = job.now;
    job.wait(5);
    assert_eq!(job.answer(Answer::Absent), [JudgeRoom]);
    let stale = Input::Room {
        asked,
        verdict: Verdict::Stands,
    };
    assert_eq!(
        job.step(stale),
        [],
        "an answer to a question from before the second no says nothing"
    );
    assert_eq!(job.room(Verdict::Stands), [Send]);
    assert_eq!(job.step(Input::Sent(Outcome::Done)), [Finish(Reason::Sent(Cause::Absent))]);
}

#[test]
fn l3_what_is_neither_a_clear_yes_nor_a_clear_no_changes_nothing() {
    let mut job = Bench::connected(DELAY);
    let _ = job.step(Input::Ask);
    assert_eq!(job.answer(Answer::Unclear), []);
    assert_eq!(*job.machine.state(), State::Connected);
    let _ = job.step(Input::Ask);
    let _ = job.answer(Answer::Absent);
    let _ = job.until(3_000);
    for _ in 0..3 {
        assert_eq!(job.answer(Answer::Unclear), []);
        assert!(job.until(20_000).iter().any(|(_, action)| *action == ASK), "it is asked again");
        assert!(matches!(
            job.machine.state(),
            State::Doubted {
                why: Doubt::Absent { .. },
                ..
            }
        ));
        job.keep_alive();
    }
    assert_eq!(job.answer(present("a", 1_000)), []);
    assert_eq!(*job.machine.state(), State::Connected);
}

#[test]
fn l3_a_no_to_a_question_from_before_a_sighting_is_stale() {
    let mut job = Bench::connected(DELAY);
    let _ = job.step(Input::Ask);
    job.wait(10);
    let _ = job.joined_as("b", 2_000);
    assert_eq!(job.answer(Answer::Absent), []);
    assert_eq!(*job.machine.state(), State::Connected);
}

#[test]
fn l4_restarts_at_once_when_seen_then_at_half_of_the_delay_after_the_last_was_sent() {
    let mut job = Bench::new(DELAY);
    let _ = job.until(0);
    assert_eq!(job.joined_as("a", 1_000), [Persist, Restart]);
    job.wait(400);
    assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist]);
    let next = job.until(DELAY / 2);
    assert_eq!(next.len(), 1);
    let (at, action) = next[0];
    assert_eq!(action, Restart);
    assert!((9_000 - 400..=10_000 - 400).contains(&at), "{at}");
}

#[test]
fn l4_an_answer_that_comes_after_half_of_the_delay_is_followed_by_a_restart_at_once() {
    let mut job = Bench::new(8_000);
    let _ = job.until(0);
    let _ = job.joined_as("a", 1_000);
    for _ in 0..20 {
        assert_eq!(job.until(5_000), []);
        assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist, Restart]);
    }
}

#[test]
fn l4_failures_are_tried_again_until_one_delay_after_the_last_answer() {
    let mut job = Bench::connected(DELAY);
    job.outcome = Some(Outcome::Transient(None));
    let actions = job.until(DELAY + 1);
    let restarts = actions.iter().filter(|(_, action)| *action == Restart).count();
    assert!(restarts >= 4, "{restarts}");
    assert_eq!(actions.last(), Some(&(DELAY, Finish(Reason::GivenUp))));
}

/// One 503 with `Retry-After: 3600`, and the homeserver is well a second later.
#[test]
fn l4_a_hint_moves_a_restart_by_a_third_of_what_is_left_at_most() {
    for (delay, hint, most) in [
        (18_000, Duration::from_secs(3_600), 3_200),
        (18_000, Duration::from_secs(1), 1_000),
        (3_600_000, Duration::MAX, 60_000),
    ] {
        let mut job = Bench::connected(delay);
        let [(_, Restart)] = job.until(delay / 2)[..] else {
            panic!("one restart")
        };
        assert_eq!(job.step(Input::Restarted(Outcome::Transient(Some(hint)))), []);
        let next = job.until(most);
        assert!(matches!(next[..], [(_, Restart)]), "{delay} {hint:?}: {next:?}");
    }
}

#[test]
fn l4_a_try_that_is_on_its_way_at_the_end_is_waited_for() {
    let mut job = Bench::connected(DELAY);
    let _ = job.until(DELAY / 2);
    assert_eq!(job.until(DELAY), []);
    assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist, Restart]);
    let _ = job.until(DELAY * 2);
    assert_eq!(job.step(Input::Restarted(Outcome::Transient(None))), [Finish(Reason::GivenUp)]);
}

#[test]
fn l4_restarts_go_on_during_every_doubt() {
    let mut job = Bench::connected(DELAY);
    job.outcome = Some(Outcome::Done);
    let _ = job.room(Verdict::Lost);
    job.answers = Some(Answer::Unclear);
    let restarts = job.until(600_000).iter().filter(|(_, action)| *action == Restart).count();
    assert!((60..=67).contains(&restarts), "{restarts}");
}

#[test]
fn l4_l8_no_restart_more_often_than_every_250_ms() {
    let mut job = Bench::new(1);
    job.answers = Some(present("a", 1_000));
    job.outcome = Some(Outcome::Done);
    let restarts: Vec<u64> = job
        .until(10_000)
        .iter()
        .filter(|(_, action)| *action == Restart)
        .map(|(at, _)| *at)
        .collect();
    assert!(restarts.windows(2).all(|pair| pair[1] - pair[0] >= 250), "{restarts:?}");
}

#[test]
fn l4a_limited_restarts_stay_in_line_and_may_wait_until_80_percent() {
    let mut job = Bench::connected(DELAY);
    let _ = job.until(DELAY / 2);
    assert_eq!(job.step(Input::Restarted(Outcome::Limited(Some(Duration::from_secs(3_600))))), []);
    job.turns = false;
    assert_eq!(job.until(250), []);
    assert_eq!(
        job.machine.wish(),
        Some(Wish::Restart {
            until: job.start.after(DELAY),
            relaxed: job.start.after(DELAY / 5 * 4)
        })
    );
}

#[test]
fn l5_a_leave_is_tried_until_the_homeserver_fires_it_but_for_half_a_minute_at_least() {
    for (delay, window) in [(DELAY, 30_000), (120_000, 120_000), (7_200_000, 3_600_000)] {
        let mut job = Bench::connected(delay);
        job.outcome = Some(Outcome::Transient(None));
        job.answers = Some(Answer::Absent);
        let _ = job.room(Verdict::Ended);
        let actions = job.until(window + 10_000);
        let sends: Vec<u64> = actions.iter().filter(|(_, action)| *action == Send).map(|(at, _)| *at).collect();
        let (first, last) = (sends[0], sends[sends.len() - 1]);
        assert_eq!(
            actions.last().map(|(_, action)| *action),
            Some(Finish(Reason::NotSent(Cause::RoomOver)))
        );
        assert!(last - first <= window && last - first > window * 2 / 5, "{delay}: {first} {last}");
    }
}

#[test]
fn l5_retry_after_is_clamped() {
    for (hint, pause) in [
        (Duration::ZERO, 250),
        (Duration::from_secs(2), 2_000),
        (Duration::MAX, 30_000 - 250),
    ] {
        let mut job = Bench::connected(DELAY);
        let _ = job.left(R::ClientInitiated);
        let _ = job.until(1_500);
        assert_eq!(job.answer(Answer::Absent), [Send]);
        assert_eq!(job.step(Input::Sent(Outcome::Transient(Some(hint)))), []);
        assert_eq!(job.until(pause), [(pause, Send)]);
        assert_eq!(job.step(Input::Sent(Outcome::Done)), [Finish(Reason::Sent(Cause::Reported))]);
    }
}

#[test]
fn l6_what_each_outcome_does() {
    for (outcome, end) in [
        (Outcome::NotFound, Some(Reason::EventGone)),
        (Outcome::Conflict, Some(Reason::EventGone)),
        (Outcome::Forbidden, Some(Reason::Refused)),
        (Outcome::Transient(None), None),
        (Outcome::Limited(None), None),
    ] {
        let mut job = Bench::connected(DELAY);
        let _ = job.until(DELAY / 2);
        assert_eq!(
            job.step(Input::Restarted(outcome)).first().copied(),
            end.map(Finish),
            "restart {outcome:?}"
        );
    }
    for (outcome, end) in [
        (Outcome::Done, Some(Reason::Sent(Cause::Reported))),
        (Outcome::NotFound, Some(Reason::Sent(Cause::Reported))),
        (Outcome::Conflict, Some(Reason::Sent(Cause::Reported))),
        (Outcome::Forbidden, Some(Reason::Refused)),
        (Outcome::Transient(None), None),
        (Outcome::Limited(None), None),
    ] {
        let mut job = Bench::connected(DELAY);
        let _ = job.left(R::ClientInitiated);
        let _ = job.until(2_000);
        assert_eq!(job.step(Input::Sent(outcome)).first().copied(), end.map(Finish), "send {outcome:?}");
    }
}

#[test]
fn l5_who_comes_back_before_the_leave_is_on_its_way_is_not_reported() {
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    let _ = job.until(2_000);
    let _ = job.step(Input::Sent(Outcome::Transient(Some(Duration::from_secs(5)))));
    assert_eq!(job.joined_as("b", 9_000), [Persist, Restart]);
    assert_eq!(*job.machine.state(), State::Connected);
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    let _ = job.until(2_000);
    assert_eq!(job.joined_as("b", 9_000), [Persist], "it is on its way");
    assert_eq!(job.step(Input::Sent(Outcome::Transient(None))), [Restart], "it did not get there");
}

#[test]
fn l11_a_restored_job_goes_on_with_the_time_that_is_left() {
    let now = Time::START;
    let seen = Session::restored(Some("a"), 1_000, None, Some(now.before(9_000)), true);
    let machine = Machine::restored(
        delay(DELAY),
        Some(now.before(60_000)),
        now.before(15_000),
        seen,
        now,
        Sfu::Answering,
    );
    let mut job = Bench::of(machine, now);
    assert_eq!(job.machine.deadline(), now.after(5_000));
    assert_eq!(job.step(Input::Time), [Restart], "half of the delay is over");
    let unseen = Machine::restored(delay(DELAY), None, now.before(15_000), Session::default(), now, Sfu::Answering);
    let mut job = Bench::of(unseen, now);
    job.answers = Some(Answer::Absent);
    let actions: Vec<_> = job
        .until(6_000)
        .into_iter()
        .filter(|(_, action)| !matches!(action, Action::LookUp { .. }))
        .collect();
    assert_eq!(actions[0], (0, Restart));
}

#[test]
fn l12_stopping_restarts_the_connected_once_more() {
    let mut job = Bench::connected(DELAY);
    job.wait(300);
    assert!(job.machine.next_deadline().is_some());
    assert_eq!(job.step(Input::Stopping), [Restart]);
    assert!(!job.machine.is_at_rest());
    assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist]);
    assert!(job.machine.is_at_rest());
    assert_eq!(job.until(DELAY - 1), []);
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    let _ = job.step(Input::Stopping);
    assert!(!job.machine.is_at_rest(), "a leave that is due is sent");
}

#[test]
fn l13_the_participants_of_a_lost_room_have_a_minute_of_an_answering_sfu() {
    let mut job = Bench::connected(3_600_000);
    assert_eq!(job.room(Verdict::Lost), []);
    let _ = job.until(20_000);
    let _ = job.step(Input::Sfu(Sfu::Failing));
    assert_eq!(job.until(120_000), [], "nobody answers: no clock runs");
    let _ = job.step(Input::Sfu(Sfu::Answering));
    assert_eq!(job.room(Verdict::Lost), [], "lost once more, not begun anew");
    assert_eq!(job.until(40_000), [(40_000, ASK)]);
    assert!(job.answer(Answer::Unclear).is_empty());
    assert!(!job.until(2_000).is_empty());
    assert_eq!(job.answer(Answer::Absent), [Send]);
}

#[test]
fn l13_whoever_is_seen_again_is_there() {
    let mut job = Bench::connected(DELAY);
    let _ = job.room(Verdict::Lost);
    assert_eq!(job.joined_as("b", 9_000), [Persist]);
    assert_eq!(*job.machine.state(), State::Connected);
    let _ = job.room(Verdict::Lost);
    let participant = Participant {
        sid: "c",
        joined_at_ms: 10_000,
        active: true,
    };
    assert_eq!(
        job.step(Input::Listed {
            asked: job.now,
            participant,
            room_sid: None
        }),
        [Persist]
    );
    assert_eq!(*job.machine.state(), State::Connected);
}

#[test]
fn l13_the_end_of_a_room_is_a_departure_of_all_in_it() {
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.room(Verdict::Ended), [ASK]);
    assert_eq!(job.answer(Answer::Absent), []);
    assert_eq!(job.until(3_000), [(3_000, ASK)]);
    assert_eq!(job.answer(Answer::Absent), [Send], "the room needs no asking");
}

#[test]
fn l13_an_absence_in_a_room_that_turns_out_lost_gets_the_grace() {
    let mut job = Bench::connected(DELAY);
    let _ = job.step(Input::Ask);
    let _ = job.answer(Answer::Absent);
    let _ = job.until(3_000);
    assert_eq!(job.answer(Answer::Absent), [JudgeRoom]);
    assert_eq!(job.room(Verdict::Lost), []);
    assert!(matches!(
        job.machine.state(),
        State::Doubted {
            why: Doubt::Lost { .. },
            ..
        }
    ));
}

#[test]
fn l13a_a_silent_sfu_pauses_restarts_and_the_job_stays_until_its_deadline() {
    let mut job = Bench::connected(DELAY);
    let _ = job.step(Input::Sfu(Sfu::Failing));
    let _ = job.step(Input::Sfu(Sfu::Silent));
    assert_eq!(job.until(DELAY - 1_000), []);
    assert_eq!(job.step(Input::Sfu(Sfu::Answering)), [Restart], "it answers again in time");
    let _ = job.step(Input::Restarted(Outcome::Done));
    let _ = job.step(Input::Sfu(Sfu::Silent));
    assert_eq!(job.until(DELAY), [(DELAY, Finish(Reason::SfuSilent))]);
}

#[test]
fn l14_a_replaced_job_cancels_its_event_and_nothing_else() {
    let mut job = Bench::connected(DELAY);
    assert_eq!(job.step(Input::Replaced), [Cancel]);
    assert_eq!(job.step(Input::Cancelled(Outcome::Transient(None))), []);
    assert!(job.until(1_000).iter().all(|(_, action)| *action == Cancel));
    assert_eq!(job.step(Input::Cancelled(Outcome::NotFound)), [Finish(Reason::Replaced)]);
    let mut job = Bench::connected(DELAY);
    job.outcome = Some(Outcome::Transient(None));
    assert_eq!(job.step(Input::Replaced), [Cancel]);
    let _ = job.step(Input::Cancelled(Outcome::Transient(None)));
    let end = job.until(DELAY).last().copied();
    assert!(
        end.is_some_and(|(at, action)| at <= DELAY && action == Finish(Reason::Replaced)),
        "tried within its deadline: {end:?}"
    );
}

#[test]
fn l14_a_successor_inherits_the_session() {
    let job = Bench::connected(DELAY);
    let mut next = Bench::of(job.machine.successor(delay(DELAY), job.now), job.now);
    assert_eq!(next.step(Input::Time), [Restart]);
    assert_eq!(*next.machine.state(), State::Connected);
    let mut job = Bench::connected(DELAY);
    let _ = job.left(R::ClientInitiated);
    let mut next = Bench::of(job.machine.successor(delay(DELAY), job.now), job.now);
    assert_eq!(
        *next.machine.state(),
        State::Waiting,
        "a page was reloaded: its next session is on the way"
    );
    assert_eq!(next.left(R::ClientInitiated), [ASK], "that session's departure is known");
    assert_eq!(*next.machine.state(), State::Waiting);
    assert_eq!(next.joined_as("b", 9_000), [Persist, Restart]);
}

#[test]
fn l14_the_same_event_again_renews_the_job() {
    let mut job = Bench::connected(DELAY);
    job.wait(5_000);
    let renewed = Input::Renewed {
        delay: delay(DELAY * 2),
        arrived: job.now,
    };
    assert_eq!(job.step(renewed), [Persist, Restart]);
    assert_eq!(job.machine.deadline(), job.now.after(DELAY * 2));
    let _ = job.step(Input::Restarted(Outcome::Done));
    let _ = job.left(R::ClientInitiated);
    job.wait(500);
    let _ = job.step(Input::Renewed {
        delay: delay(DELAY),
        arrived: job.now,
    });
    assert_eq!(*job.machine.state(), State::Waiting, "asked for after it was reported gone");
    assert!(job.until(3_000).iter().all(|(_, action)| *action != Send));
    assert_eq!(job.joined_as("b", 9_000), [Persist]);
    assert_eq!(*job.machine.state(), State::Connected);
}

proptest! {
    #[test]
    fn l5_tries_stay_within_the_window(hints in prop::collection::vec(prop::option::of(0u64..u64::MAX), 1..200), window in 0u64..4_000_000, seed: u64) {
        let (mut now, until, mut jitter) = (Time::START, Time::START.after(window), Jitter::new(seed));
        for (n, hint) in hints.into_iter().enumerate() {
            let failures = u8::try_from(n + 1).unwrap_or(u8::MAX);
            let Some(next) = Schedule::SEND.next_try(failures, hint.map(Duration::from_millis), now, until, &mut jitter) else { break };
            prop_assert!(next <= until && next.since(now) >= LEAST_PAUSE);
            now = next;
        }
    }
}

// --- the bench ---

struct Bench {
    machine: Machine,
    start: Time,
    now: Time,
    jitter: Jitter,
    asked: Option<Time>,
    /// Grants turns as soon as they are wanted.
    turns: bool,
    /// Answers every question so.
    answers: Option<Answer<'static>>,
    /// Ends every call so.
    outcome: Option<Outcome>,
}

impl Bench {
    fn of(machine: Machine, now: Time) -> Self {
        Self {
            machine,
            start: now,
            now,
            jitter: Jitter::new(3),
            asked: None,
            turns: true,
            answers: None,
            outcome: None,
        }
    }

    fn new(millis: u64) -> Self {
        Self::of(Machine::new(delay(millis), Time::START, Sfu::Answering), Time::START)
    }

    /// Somebody is there, and the first restart got through.
    fn connected(millis: u64) -> Self {
        let mut job = Self::new(millis);
        assert_eq!(job.until(0), [(0, ASK)]);
        job.wait(300);
        assert_eq!(job.answer(present("a", 1_000)), [Persist, Restart]);
        assert_eq!(job.step(Input::Restarted(Outcome::Done)), [Persist]);
        assert_eq!(*job.machine.state(), State::Connected);
        job.start = job.now;
        job
    }

    fn step(&mut self, input: Input<'_>) -> Vec<Action> {
        let mut actions = self.machine.step(input, self.now, &mut self.jitter);
        let mut n = 0;
        loop {
            if self.turns && self.machine.wish().is_some() {
                actions.extend(self.machine.step(Input::Turn, self.now, &mut self.jitter));
            }
            let Some(&action) = actions.get(n) else { return actions };
            n += 1;
            match action {
                Action::LookUp { .. } => {
                    self.asked = Some(self.now);
                    if let Some(answer) = self.answers {
                        let input = Input::LookedUp {
                            asked: self.now,
                            answer,
                            room_sid: None,
                        };
                        actions.extend(self.machine.step(input, self.now, &mut self.jitter));
                    }
                }
                Restart | Send | Cancel => {
                    let outcome = self
                        .outcome
                        .or_else(|| (action == Restart && self.answers.is_some()).then_some(Outcome::Done));
                    if let Some(outcome) = outcome {
                        let input = match action {
                            Restart => Input::Restarted(outcome),
                            Send => Input::Sent(outcome),
                            Cancel | Action::LookUp { .. } | JudgeRoom | Persist | Finish(_) => Input::Cancelled(outcome),
                        };
                        actions.extend(self.machine.step(input, self.now, &mut self.jitter));
                    }
                }
                JudgeRoom | Persist | Finish(_) => {}
            }
        }
    }

    /// Lets so many milliseconds go by; what was done, and how many milliseconds in.
    fn until(&mut self, millis: u64) -> Vec<(u64, Action)> {
        let (start, end) = (self.now, self.now.after(millis));
        let mut done = Vec::new();
        while let Some(at) = self.machine.next_deadline().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            let now = self.now;
            done.extend(self.step(Input::Time).into_iter().map(|action| (now.since(start), action)));
        }
        self.now = end;
        done
    }

    fn wait(&mut self, millis: u64) {
        self.now = self.now.after(millis);
    }

    fn answer(&mut self, answer: Answer<'_>) -> Vec<Action> {
        let asked = self.asked.expect("a question");
        self.step(Input::LookedUp {
            asked,
            answer,
            room_sid: None,
        })
    }

    fn event(&self, sid: &'static str, joined_at_ms: u64) -> Event<'static> {
        Event {
            id: None,
            sid,
            joined_at_ms,
            happened: self.now,
            room_sid: None,
        }
    }

    fn joined_as(&mut self, sid: &'static str, joined_at_ms: u64) -> Vec<Action> {
        let event = self.event(sid, joined_at_ms);
        self.step(Input::Joined(event))
    }

    fn left(&mut self, reason: LeaveReason) -> Vec<Action> {
        self.left_as("a", 1_000, reason)
    }

    fn left_as(&mut self, sid: &'static str, joined_at_ms: u64, reason: LeaveReason) -> Vec<Action> {
        let event = self.event(sid, joined_at_ms);
        self.step(Input::Left(event, reason))
    }

    fn room(&mut self, verdict: Verdict) -> Vec<Action> {
        self.step(Input::Room { asked: self.now, verdict })
    }

    fn keep_alive(&mut self) {
        let _ = self.step(Input::Restarted(Outcome::Done));
    }
}

fn delay(millis: u64) -> Delay {
    Delay::from_millis(millis).expect("a delay")
}

fn present(sid: &'static str, joined_at_ms: u64) -> Answer<'static> {
    Answer::Present(Participant {
        sid,
        joined_at_ms,
        active: true,
    })
}
