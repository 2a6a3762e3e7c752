//! The rules that take more than one job: sweeps, pace, bounds, restore, stop, the SFU's restarts, replacement.

use super::world::{Fate, World};
use lk_jwt_service::delayed_leave::jobs::{Call, Config, Delegated, Delegation, Fact, Output, Record, Refusal, WebhookKind};
use lk_jwt_service::delayed_leave::machine::{Cause, LeaveReason, Reason, State};
use lk_jwt_service::time::{Delay, Time};
use std::time::Duration;

const DELAY: u64 = 18_000;

fn world() -> World {
    World::new(Config::default(), 11)
}

/// So many in one room, all delegated and restarted once.
fn call(world: &mut World, room: &str, guests: usize, delay: u64) {
    world.open(room);
    for n in 0..guests {
        world.join(room, &format!("{room}-{n}"), true);
        world.delegate(room, &format!("{room}-{n}"), &format!("{room}-{n}"), delay).unwrap();
    }
    world.advance(500);
}

fn connected(world: &World, room: &str, identity: &str) -> bool {
    let job = world.jobs.find(room, identity).and_then(|id| world.jobs.get(id));
    job.is_some_and(|job| *job.machine().state() == State::Connected)
}

fn running(world: &World, delay_id: &str) -> bool {
    matches!(world.fate(delay_id), Fate::Scheduled { .. })
}

fn since(world: &World, from: Time) -> u64 {
    world.now.since(from)
}

#[test]
fn l3_one_is_asked_for_by_name_several_by_one_list() {
    let mut world = world();
    call(&mut world, "one", 1, 3_600_000);
    call(&mut world, "many", 50, 3_600_000);
    world.sfu_calls.clear();
    world.advance(300_000);
    let calls = |name| world.sfu_calls.get(name).copied().unwrap_or(0);
    assert!((9..=11).contains(&calls("GetParticipant")), "{:?}", world.sfu_calls);
    assert!((9..=11).contains(&calls("ListParticipants")), "{:?}", world.sfu_calls);
    assert!((9..=11).contains(&calls("ListRooms")), "{:?}", world.sfu_calls);
}

#[test]
fn l3_absences_from_a_list_are_confirmed_one_by_one() {
    let mut world = world();
    call(&mut world, "many", 50, 3_600_000);
    for n in 0..3 {
        world.part("many", &format!("many-{n}"), LeaveReason::ClientInitiated, false);
    }
    world.sfu_calls.clear();
    world.advance(35_000);
    assert_eq!(
        world.sfu_calls["GetParticipant"], 6,
        "one per suspected absence and a second question: {:?}",
        world.sfu_calls
    );
    let sent = world
        .finished
        .iter()
        .filter(|(_, _, _, reason)| *reason == Reason::Sent(Cause::Absent))
        .count();
    assert_eq!(sent, 3, "{:?}", world.finished);
    assert!(running(&world, "many-10"));
}

#[test]
fn l3_without_webhooks_a_leave_is_sent_within_40_s() {
    let mut world = world();
    world.open("room");
    world.join("room", "al", false);
    world.delegate("room", "al", "leave", DELAY).unwrap();
    world.advance(60_000);
    world.part("room", "al", LeaveReason::ClientInitiated, false);
    let left = world.now;
    world.advance(40_000);
    let Fate::Sent(at) = world.fate("leave") else {
        panic!("{:?}", world.fate("leave"))
    };
    assert!(at.since(left) >= 3_000);
}

#[test]
fn l3_an_sfu_that_answers_500_or_nothing_or_refuses_lists_is_no_sign_of_departure() {
    let mut world = world();
    call(&mut world, "room", 3, DELAY);
    world.sfu_errors = true;
    world.advance(120_000);
    world.sfu_errors = false;
    world.sfu_hangs = true;
    world.advance(120_000);
    world.sfu_hangs = false;
    world.advance(60_000);
    assert!((0..3).all(|n| running(&world, &format!("room-{n}"))), "{:?}", world.finished);
    let id = world.jobs.find("room", "room-0").unwrap();
    assert_eq!(*world.jobs.get(id).unwrap().machine().state(), State::Connected);
}

#[test]
fn l9a_polling_that_is_off_stays_on_until_a_webhook_was_verified() {
    let mut world = World::new(
        Config {
            sweep_every: None,
            ..Config::default()
        },
        1,
    );
    world.open("room");
    world.join("room", "al", false);
    world.delegate("room", "al", "leave", 3_600_000).unwrap();
    world.advance(100_000);
    let before = world.sfu_calls["GetParticipant"];
    assert!(before >= 3);
    world.tell(WebhookKind::Track, "elsewhere", "bo", "PA_x", 1);
    world.advance(31_000);
    let silent_from = world.sfu_calls["GetParticipant"];
    world.advance(200_000);
    assert_eq!(world.sfu_calls["GetParticipant"], silent_from);
}

#[test]
fn l4_a_slow_homeserver_reports_nobody_gone() {
    let mut world = world();
    world.homeserver_latency = 5_000;
    call(&mut world, "room", 40, 8_000);
    world.advance(300_000);
    assert!((0..40).all(|n| running(&world, &format!("room-{n}"))), "{:?}", world.finished);
}

#[test]
fn l4a_twelve_with_synapses_default_limits_stay_for_ten_minutes() {
    let mut world = world();
    world.limiter = Some((5.0, 5.0, 1.0, world.now));
    call(&mut world, "room", 12, 18_000);
    world.advance(600_000);
    assert!((0..12).all(|n| running(&world, &format!("room-{n}"))), "{:?}", world.finished);
    let refused = world
        .calls
        .iter()
        .filter(|(_, _, _, _, outcome)| matches!(outcome, lk_jwt_service::delayed_event::Outcome::Limited(_)))
        .count();
    assert!(refused * 5 < world.calls.len(), "{refused} of {}", world.calls.len());
    world.part("room", "room-3", LeaveReason::ClientInitiated, true);
    let left = world.now;
    world.advance(5_000);
    let Fate::Sent(at) = world.fate("room-3") else {
        panic!("{:?}", world.fate("room-3"))
    };
    assert!(at.since(left) <= 4_000, "a send goes first: {}", at.since(left));
}

#[test]
fn l4a_a_homeserver_that_grants_more_is_used_to_the_full() {
    for (per_second, burst, guests) in [(3.0, 5.0, 12), (10.0, 10.0, 40)] {
        let mut world = world();
        world.limiter = Some((burst, burst, per_second, world.now));
        call(&mut world, "room", guests, 6_000);
        world.advance(300_000);
        let all = (0..guests).all(|n| running(&world, &format!("room-{n}")));
        assert!(all, "{per_second} a second, {guests} guests: {:?}", world.finished);
    }
}

#[test]
fn l5_a_homeserver_that_is_away_for_25_s_still_gets_the_leave() {
    let mut world = world();
    call(&mut world, "room", 1, 60_000);
    world.homeserver_down = true;
    world.part("room", "room-0", LeaveReason::ClientInitiated, true);
    world.advance(25_000);
    world.homeserver_down = false;
    world.advance(20_000);
    assert!(matches!(world.fate("room-0"), Fate::Sent(_)), "{:?}", world.calls);
}

#[test]
fn l8_bounds() {
    let config = Config {
        per_user: 2,
        per_homeserver: 3,
        total: 5,
        ..Config::default()
    };
    let mut jobs = lk_jwt_service::delayed_leave::jobs::Jobs::new(config, 1, Time::START);
    let ask =
        |jobs: &mut lk_jwt_service::delayed_leave::jobs::Jobs, user: &str, room: &str, homeserver: &str, delay_id: &str, exempt: bool| {
            let delegation = Delegation {
                room,
                identity: user,
                user,
                homeserver,
                delay_id,
                delay: Delay::from_millis(DELAY).unwrap(),
                arrived: Time::START,
                exempt,
                creates_room: true,
                as_user: false,
            };
            jobs.delegate(&delegation, Time::START).map(|(delegated, _)| delegated)
        };
    assert!(ask(&mut jobs, "al", "1", "a", "1", false).is_ok());
    assert!(ask(&mut jobs, "al", "2", "a", "2", false).is_ok());
    assert_eq!(ask(&mut jobs, "al", "3", "a", "3", false), Err(Refusal::UserFull));
    assert!(
        matches!(ask(&mut jobs, "al", "2", "a", "2", false), Ok(Delegated::Renewed(_))),
        "a renewal costs nothing"
    );
    assert!(ask(&mut jobs, "bo", "1", "a", "4", false).is_ok());
    assert_eq!(ask(&mut jobs, "ca", "1", "a", "5", false), Err(Refusal::HomeserverFull));
    assert!(ask(&mut jobs, "ca", "1", "a", "5", true).is_ok(), "named in full access");
    assert!(ask(&mut jobs, "da", "1", "b", "6", false).is_ok());
    assert_eq!(ask(&mut jobs, "ed", "1", "c", "7", true), Err(Refusal::Full));
    for millis in [0, 86_400_001, u64::MAX] {
        assert_eq!(Delay::from_millis(millis), None);
    }
    for millis in [1, 86_400_000] {
        assert!(Delay::from_millis(millis).is_some());
    }
}

fn record<'a>(identity: &'a str, now: Time, age: u64, seen: bool) -> Record<'a> {
    Record {
        delegation: Delegation {
            room: "room",
            identity,
            user: identity,
            homeserver: "hs.example",
            delay_id: identity,
            delay: Delay::from_millis(DELAY).unwrap(),
            arrived: now.before(600_000),
            exempt: true,
            creates_room: true,
            as_user: false,
        },
        restarted: now.before(age),
        sid: seen.then_some("PA_old"),
        joined_at_ms: 1,
        room_sid: seen.then_some("RM_old"),
        last_sighted: Some(now.before(age)),
        seen,
    }
}

fn restore(world: &mut World, record: &Record<'_>) {
    let left = record.delegation.delay.as_millis() - world.now.since(record.restarted).min(record.delegation.delay.as_millis());
    world.events.insert(
        record.delegation.delay_id.into(),
        (
            Fate::Scheduled {
                fires: world.now.after(left),
            },
            record.delegation.delay,
        ),
    );
    let outputs = world.jobs.restore(record, world.now);
    world.run(outputs);
}

#[test]
fn l11_whoever_left_while_the_service_was_down_is_reported_and_whoever_stayed_is_not() {
    let mut world = world();
    world.next_sid.push_back("RM_old".into());
    world.open("room");
    let guest = super::world::Guest {
        sid: "PA_old".into(),
        joined_at_ms: 1,
        active: true,
    };
    world.rooms.get_mut("room").unwrap().guests.insert("stayed".into(), guest);
    for identity in ["stayed", "left", "more"] {
        let record = record(identity, world.now, 5_000, true);
        restore(&mut world, &record);
    }
    world.advance(5_000);
    assert!(matches!(world.fate("left"), Fate::Sent(_)), "{:?}", world.finished);
    assert!(running(&world, "stayed"));
    world.advance(60_000);
    assert!(running(&world, "stayed"));
}

#[test]
fn l11_service_and_sfu_down_together_lose_nobody() {
    let mut world = world();
    let record = record("al", world.now, 5_000, true);
    world.sfu_up = false;
    restore(&mut world, &record);
    world.advance(3_000);
    world.sfu_up = true;
    let up = world.now;
    world.advance(150);
    assert!(world.rooms.contains_key("room"), "created again at the first answer");
    assert!(world.created[0].0.since(up) <= 120);
    world.advance(15_000);
    world.join("room", "al", true);
    world.advance(120_000);
    assert!(running(&world, "al"), "{:?}", world.finished);
}

#[test]
fn l11_expired_records_are_dropped_and_newer_jobs_stand() {
    let mut world = world();
    let expired = record("al", world.now, DELAY, true);
    let outputs: Vec<_> = world.jobs.restore(&expired, world.now).into_iter().collect();
    assert_eq!(
        outputs,
        [Output::Forget {
            room: "room".into(),
            identity: "al".into()
        }]
    );
    world.delegate("room", "bo", "newer", DELAY).unwrap();
    let older = record("bo", world.now, 1_000, true);
    assert!(world.jobs.restore(&older, world.now).is_empty());
    assert_eq!(world.jobs.len(), 1);
}

#[test]
fn l12_stop_restarts_all_sends_what_is_due_and_comes_to_rest() {
    let mut world = world();
    call(&mut world, "room", 20, DELAY);
    world.advance(4_000);
    world.part("room", "room-7", LeaveReason::ClientInitiated, true);
    world.calls.clear();
    world.fact(Fact::Stopping);
    assert!(!world.jobs.is_at_rest());
    world.advance(2_100);
    assert!(world.jobs.is_at_rest());
    assert!((0..20).all(|n| world.count(Call::Restart, &format!("room-{n}")) == 1));
    assert!(matches!(world.fate("room-7"), Fate::Sent(_)));
}

#[test]
fn l13_the_sfu_killed_and_back_after_1_3_and_20_s() {
    for away in [1_000, 3_000, 20_000] {
        let mut world = world();
        call(&mut world, "a", 2, DELAY);
        call(&mut world, "b", 1, DELAY);
        world.advance(100_000);
        world.kill_sfu();
        world.advance(away);
        world.sfu_up = true;
        let up = world.now;
        world.advance(200);
        for room in ["a", "b"] {
            assert!(world.rooms.contains_key(room), "{away}: {:?}", world.created);
        }
        assert!(
            world.created.iter().all(|(at, _)| at.since(up) <= 100 + 4 * world.latency),
            "{away}: {:?} {up:?}",
            world.created
        );
        world.advance(10_000);
        world.join("a", "a-0", true);
        world.join("b", "b-0", false);
        world.advance(200_000);
        assert!(running(&world, "a-0") && running(&world, "b-0"), "{away}: {:?}", world.finished);
        let Fate::Sent(at) = world.fate("a-1") else {
            panic!("{away}: {:?}", world.fate("a-1"))
        };
        assert!(
            (60_000..65_000).contains(&at.since(up)),
            "{away}: whoever does not come back is reported after a minute"
        );
        world.part("a", "a-0", LeaveReason::ClientInitiated, true);
        world.part("b", "b-0", LeaveReason::ClientInitiated, true);
        world.advance(2_500);
        assert!(matches!((world.fate("a-0"), world.fate("b-0")), (Fate::Sent(_), Fate::Sent(_))));
    }
}

#[test]
fn l13_rooms_are_asked_for_in_portions_and_the_base_address_every_second() {
    let mut world = world();
    for n in 0..1_201 {
        let room = format!("room{n}");
        world.open(&room);
        world.join(&room, &room, true);
        world.delegate(&room, &room, &room, 3_600_000).unwrap();
    }
    world.advance(1_000);
    world.sfu_calls.clear();
    world.advance(60_000);
    assert_eq!(world.sfu_calls["ListRooms"], 2 * 3);
}

#[test]
fn l13_a_room_that_ended_by_itself_is_a_departure_of_all_in_it() {
    let mut world = world();
    call(&mut world, "room", 2, DELAY);
    for n in 0..2 {
        world.part("room", &format!("room-{n}"), LeaveReason::ClientInitiated, false);
    }
    let sid = world.rooms["room"].sid.clone();
    world.rooms.clear();
    world.tell(WebhookKind::RoomFinished, "room", "", "", 0);
    world.fact(Fact::Webhook(lk_jwt_service::delayed_leave::jobs::Webhook {
        kind: WebhookKind::RoomFinished,
        id: "EV_end",
        happened: world.now,
        room: "room",
        room_sid: &sid,
        identity: "",
        sid: "",
        joined_at_ms: 0,
    }));
    world.advance(4_000);
    assert!(
        (0..2).all(|n| matches!(world.fate(&format!("room-{n}")), Fate::Sent(_))),
        "{:?}",
        world.finished
    );
    assert!(world.created.is_empty());
}

#[test]
fn l13_switched_off_asks_and_creates_nothing() {
    let mut world = World::new(
        Config {
            list_rooms_every: None,
            ..Config::default()
        },
        1,
    );
    call(&mut world, "room", 2, DELAY);
    world.advance(100_000);
    assert!(!world.sfu_calls.contains_key("ListRooms"), "{:?}", world.sfu_calls);
    world.kill_sfu();
    world.advance(1_000);
    world.sfu_up = true;
    world.advance(60_000);
    assert!(world.created.is_empty());
}

#[test]
fn l13a_an_sfu_killed_for_good_pauses_restarts_after_ten_minutes() {
    let mut world = world();
    call(&mut world, "room", 2, DELAY);
    world.advance(10_000);
    world.kill_sfu();
    let killed = world.now;
    world.advance(590_000);
    assert!((0..2).all(|n| running(&world, &format!("room-{n}"))));
    assert_eq!(world.warnings, 0);
    world.advance(60_000);
    assert!(world.warnings >= 1);
    for n in 0..2 {
        let Fate::Fired(at) = world.fate(&format!("room-{n}")) else {
            panic!("the homeserver's timer ends it")
        };
        assert!((600_000..640_000).contains(&at.since(killed)));
    }
    assert!(world.jobs.is_empty());
    assert!(since(&world, killed) > 0);
}

#[test]
fn l13a_an_sfu_that_never_answered_does_not_end_calls_for_an_hour() {
    let mut world = world();
    world.sfu_up = false;
    let record = record("al", world.now, 1_000, true);
    restore(&mut world, &record);
    world.advance(3_500_000);
    assert!(running(&world, "al"));
    world.advance(300_000);
    assert!(!running(&world, "al"));
}

#[test]
fn l14_a_page_reloaded_and_delegated_anew_is_not_thrown_out_by_its_old_event() {
    for pause in [0, 300, 1_000, 2_500] {
        let mut world = world();
        call(&mut world, "room", 1, 15_000);
        world.advance(3_000);
        world.part("room", "room-0", LeaveReason::ClientInitiated, true);
        world.advance(160);
        world.join("room", "room-0", true);
        world.advance(pause);
        world.delegate("room", "room-0", "second", 15_000).unwrap();
        world.advance(100_000);
        assert!(
            matches!(world.fate("room-0"), Fate::Cancelled(_)),
            "{pause}: {:?}",
            world.fate("room-0")
        );
        assert!(
            running(&world, "second") && connected(&world, "room", "room-0"),
            "{pause}: {:?}",
            world.finished
        );
        world.part("room", "room-0", LeaveReason::ClientInitiated, true);
        world.advance(2_100);
        assert!(matches!(world.fate("second"), Fate::Sent(_)));
    }
}

#[test]
fn l14_delegated_before_the_new_session_has_joined() {
    let mut world = world();
    call(&mut world, "room", 1, 15_000);
    world.part("room", "room-0", LeaveReason::ClientInitiated, true);
    world.advance(700);
    world.delegate("room", "room-0", "second", 15_000).unwrap();
    world.advance(2_000);
    world.join("room", "room-0", true);
    world.advance(100_000);
    assert!(matches!(world.fate("room-0"), Fate::Cancelled(_)));
    assert!(running(&world, "second"), "{:?}", world.finished);
}

#[test]
fn l14_an_earlier_request_that_is_done_later_does_not_replace_the_later_one() {
    let mut world = world();
    world.open("room");
    world.join("room", "al", true);
    let first = world.now;
    world.advance(500);
    let second = world.now;
    world.delegate_arrived("room", "al", "second", DELAY, second).unwrap();
    world.advance(500);
    assert_eq!(
        world.delegate_arrived("room", "al", "first", DELAY, first),
        Ok(Delegated::Overtaken)
    );
    world.advance(100_000);
    assert!(matches!(world.fate("first"), Fate::Cancelled(_)));
    assert!(running(&world, "second"));
    assert_eq!(world.jobs.len(), 1);
}

#[test]
fn l10_forget_follows_the_end_of_a_current_job_only() {
    let mut world = world();
    call(&mut world, "room", 1, DELAY);
    let old = world.jobs.find("room", "room-0").unwrap();
    world.delegate("room", "room-0", "second", DELAY).unwrap();
    let homeserver = world.jobs.get(old).unwrap().homeserver();
    let outcome = lk_jwt_service::delayed_event::Outcome::Done;
    let outputs: Vec<_> = world
        .jobs
        .handle(
            Fact::Called {
                job: old,
                homeserver,
                call: Call::Cancel,
                outcome,
            },
            world.now,
        )
        .into_iter()
        .collect();
    assert!(
        outputs.iter().any(|output| matches!(
            output,
            Output::Finished {
                reason: Reason::Replaced,
                ..
            }
        )),
        "{outputs:?}"
    );
    assert!(
        !outputs.iter().any(|output| matches!(output, Output::Forget { .. })),
        "the record is the successor's: {outputs:?}"
    );
}

#[test]
fn nothing_is_left_behind() {
    let mut world = world();
    call(&mut world, "room", 100, DELAY);
    for n in 0..100 {
        world.part("room", &format!("room-{n}"), LeaveReason::ClientInitiated, true);
    }
    world.advance(10_000);
    assert!(world.jobs.is_empty());
    world.advance(2_000);
    assert_eq!(world.jobs.next_deadline(), None, "idle means idle");
    assert!(world.jobs.find("room", "room-1").is_none());
    let _ = Duration::ZERO;
}

#[test]
fn l14_results_of_a_job_that_is_over_never_reach_the_next_under_its_number() {
    let mut world = world();
    call(&mut world, "room", 1, DELAY);
    let old = world.jobs.find("room", "room-0").unwrap();
    let homeserver = world.jobs.get(old).unwrap().homeserver();
    let asked = world.now;
    world.part("room", "room-0", LeaveReason::ClientInitiated, true);
    world.advance(3_000);
    assert!(world.jobs.get(old).is_none());
    world.join("room", "room-0", true);
    world.delegate("room", "room-0", "next", DELAY).unwrap();
    world.advance(600);
    assert!(connected(&world, "room", "room-0"));
    let next = world.jobs.find("room", "room-0").unwrap();
    assert_ne!(old, next);
    let before = format!("{:?}", world.jobs.get(next).unwrap().machine());
    for (call, outcome) in [
        (Call::Restart, lk_jwt_service::delayed_event::Outcome::NotFound),
        (Call::Send, lk_jwt_service::delayed_event::Outcome::Done),
        (Call::Cancel, lk_jwt_service::delayed_event::Outcome::Done),
    ] {
        world.fact(Fact::Called {
            job: old,
            homeserver,
            call,
            outcome,
        });
    }
    world.fact(Fact::LookedUp {
        job: old,
        asked,
        answer: lk_jwt_service::delayed_leave::jobs::Looked::Absent,
    });
    assert_eq!(format!("{:?}", world.jobs.get(next).unwrap().machine()), before);
    assert_eq!(world.jobs.get(next).unwrap().delay_id(), "next");
}
