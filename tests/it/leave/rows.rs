//! Faults that were found in the field, one test each: what happened, with the numbers of the day, and what must happen.

use std::collections::BTreeMap;
use std::time::Duration;

use lk_jwt_service::internals::core::{Core, Delegation, Fact, Settings};
use lk_jwt_service::internals::delayed_event::{DelayedEventAction, Outcome};
use lk_jwt_service::internals::delayed_leave::{CapacityError, Handover};
use lk_jwt_service::internals::livekit::{Answer, DisconnectReason, ParticipantRow};
use lk_jwt_service::internals::presence::{self, EventKind};
use lk_jwt_service::internals::store::JobRecord;
use lk_jwt_service::internals::time::{Delay, Time};

use super::world::{Fate, Told, World};

fn world() -> World {
    World::new(Settings::default(), 23)
}

fn world_swept_every(sweep_ms: u64, list_rooms_ms: Option<u64>) -> World {
    let presence = presence::Settings {
        sweep_ms: Some(sweep_ms),
        list_rooms_ms,
    };
    World::new(
        Settings {
            presence,
            ..Settings::default()
        },
        23,
    )
}

/// So many in one room, all delegated, seen and restarted once.
fn call(world: &mut World, room: &str, guests: usize, delay: u64) {
    world.open(room);
    for n in 0..guests {
        let name = format!("{room}-{n}");
        world.join(room, &name, true);
        world.delegate(room, &name, &name, delay).unwrap();
    }
    world.advance(500);
}

/// How many of them are not reported gone.
fn running(world: &World, room: &str, guests: usize) -> usize {
    let names = (0..guests).map(|n| format!("{room}-{n}"));
    names.filter(|name| matches!(world.fate(name), Fate::Scheduled { .. })).count()
}

/// How many of them are reported gone by this service, by then.
fn sent(world: &World, room: &str, guests: usize, by: Time) -> usize {
    let names = (0..guests).map(|n| format!("{room}-{n}"));
    names.filter(|name| matches!(world.fate(name), Fate::Sent(at) if at <= by)).count()
}

#[test]
fn a14_600_homeservers_that_hold_their_calls_report_none_of_20_honest_people_gone() {
    let mut world = world();
    call(&mut world, "honest", 20, 18_000);
    let strangers = |world: &mut World, round: usize| {
        for n in 0..600 {
            let (homeserver, name) = (format!("hs{n}.evil.example"), format!("evil-{round}-{n}"));
            world.holds.insert(homeserver.clone(), 9_900);
            world.open("evil");
            world.join("evil", &name, true);
            let user = format!("@{name}:{homeserver}");
            let _ = world.delegate_of(&user, &homeserver, "evil", &name, &name, 10_000, world.now);
        }
    };
    for round in 0..4 {
        strangers(&mut world, round);
        world.advance(5_000);
    }
    assert_eq!(running(&world, "honest", 20), 20);
    world.crash(1_000);
    world.advance(40_000);
    assert_eq!(running(&world, "honest", 20), 20, "after a restart");
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn a14_200_000_who_never_came_refuse_no_listed_homeserver() {
    let mut core = Core::new(Settings::default(), 1, Time::START);
    let mut delegate = |user: &str, homeserver: &str, listed: bool, now: Time| {
        let handover = Handover {
            user,
            homeserver,
            delay_id: user,
            delay: Delay::from_millis(86_400_000).unwrap(),
            arrived: now,
            listed,
            as_user: false,
        };
        let delegation = Delegation {
            room: user,
            identity: user,
            handover,
        };
        let delegated = core.delegate(&delegation, now).map(|(delegated, _)| delegated);
        (delegated, core.leaves().len())
    };
    for n in 0..200_000u64 {
        let (delegated, jobs) = delegate(&format!("@{n}"), &format!("hs{}", n % 600), false, Time::START.after(n / 100));
        assert!(delegated.is_ok() && jobs <= 20_000, "{n}: {delegated:?} {jobs}");
    }
    let (delegated, jobs) = delegate("@al:hs.example", "hs.example", true, Time::START.after(2_001));
    assert!(delegated.is_ok(), "{delegated:?}");
    assert_eq!(jobs, 20_000);
}

#[test]
fn a15_one_user_who_delegates_ten_a_second_ends_none_of_ten_calls() {
    let mut world = world();
    world.limiter = Some((5.0, 5.0, 1.0, world.now));
    call(&mut world, "honest", 10, 18_000);
    world.advance(60_000);
    for n in 0..500 {
        let name = format!("junk{n}");
        let _ = world.delegate_of("@junk", "hs.example", &name, &name, &name, 10_000, world.now);
        world.advance(100);
    }
    assert_eq!(running(&world, "honest", 10), 10);
    world.advance(60_000);
    assert_eq!(running(&world, "honest", 10), 10);
}

#[test]
fn a16_10_000_who_never_come_cost_less_than_20_questions_a_second() {
    let mut world = world();
    world.tell(EventKind::Track, "elsewhere", "bo", "PA_x", 1);
    for n in 0..10_000 {
        let name = format!("never{n}");
        world.delegate(&name, &name, &name, 86_400_000).unwrap();
        if n % 10 == 9 {
            world.advance(1_000);
        }
    }
    world.advance(3_600_000);
    world.looked_up.clear();
    let from = world.now;
    world.advance(3_600_000);
    let mut minutes = BTreeMap::<u64, usize>::new();
    for at in &world.looked_up {
        *minutes.entry(at.since(from) / 60_000).or_default() += 1;
    }
    let most = minutes.values().max().copied().unwrap_or(0);
    let average = world.looked_up.len() as f64 / 3_600.0;
    eprintln!("A16: {average:.1} a second, {:.1} in the worst minute", most as f64 / 60.0);
    assert!(average < 20.0 && most < 20 * 60, "{average} {most}");
}

#[test]
fn b1_a_page_for_a_second_reports_none_of_50_gone() {
    for from in (0..9_000).step_by(500) {
        let mut world = world();
        call(&mut world, "room", 50, 18_000);
        world.advance(from);
        // Whatever its status, a page is not the homeserver's word.
        world.homeserver_instead = Some(Outcome::Transient(None));
        world.advance(1_000);
        world.homeserver_instead = None;
        world.advance(60_000);
        assert_eq!(running(&world, "room", 50), 50, "{from}");
    }
}

#[test]
fn b2_1_500_who_are_back_before_the_webhooks_are_not_reported() {
    for rooms in [1, 1_500] {
        let mut world = world();
        world.latency = 100;
        let of = |n: usize| format!("room{}", n % rooms);
        for n in 0..1_500 {
            world.open(&of(n));
            world.join(&of(n), &format!("room-{n}"), true);
            let name = format!("room-{n}");
            world.delegate(&of(n), &name, &name, 60_000).unwrap();
        }
        world.advance(10_000);
        for n in 0..1_500 {
            let name = format!("room-{n}");
            let left = world.rooms[&of(n)].guests[&name].clone();
            world.webhook_delay = 4_000;
            world.part(&of(n), &name, DisconnectReason::ClientInitiated, false);
            world.join(&of(n), &name, true);
            world.webhook_delay = 1;
            let kind = EventKind::Left(DisconnectReason::ClientInitiated);
            world.tell(kind, &of(n), &name, &left.sid, left.joined_at_ms);
        }
        world.advance(100_000);
        assert_eq!(running(&world, "room", 1_500), 1_500, "{rooms} rooms");
    }
}

#[test]
fn b2_a_process_frozen_for_12_s_after_100_webhooks_reports_nobody() {
    for frozen_after in [0, 500, 790, 850, 1_300, 1_503] {
        let mut world = world();
        call(&mut world, "room", 100, 60_000);
        world.advance(5_000);
        for n in 0..100 {
            world.part("room", &format!("room-{n}"), DisconnectReason::ClientInitiated, true);
        }
        world.advance(frozen_after);
        for n in 0..100 {
            world.webhook_delay = 13_000;
            world.join("room", &format!("room-{n}"), true);
        }
        world.stand_still(12_000, false);
        world.advance(30_000);
        assert_eq!(running(&world, "room", 100), 100, "{frozen_after}: {:?}", world.finished.first());
    }
}

#[test]
fn b3_an_sfu_that_answers_in_no_time_gets_30_of_30_reported_within_5_s() {
    for (told, list_rooms_ms, refused) in [
        (true, Some(30_000), false),
        (true, None, false),
        (false, Some(30_000), false),
        (false, None, false),
        (true, Some(30_000), true),
        (false, Some(30_000), true),
    ] {
        let mut world = world_swept_every(1_000, list_rooms_ms);
        world.latency = 0;
        if refused {
            world.instead.insert("ListRooms", Answer::Refused);
        }
        call(&mut world, "room", 31, 60_000);
        world.advance(30_000);
        for n in 0..30 {
            world.part("room", &format!("room-{n}"), DisconnectReason::ClientInitiated, told);
        }
        let left = world.now;
        world.advance(100_000);
        let sent = sent(&world, "room", 30, left.after(5_000));
        assert_eq!(sent, 30, "told {told}, list {list_rooms_ms:?}, refused {refused}");
        assert!(matches!(world.fate("room-30"), Fate::Scheduled { .. }), "who stays, stays");
        world.sfu_calls.clear();
        world.advance(60_000);
        assert!(
            world.sfu_calls.get("ListRooms").is_none_or(|&calls| calls <= 3),
            "{:?}",
            world.sfu_calls
        );
    }
}

#[test]
fn b4_a_departure_told_again_8_s_later_ends_no_delegation_that_is_a_second_old() {
    for clock_known in [true, false] {
        let mut world = world();
        world.open("room");
        if clock_known {
            world.join("room", "bo", true);
        }
        // The first delivery was refused, so that nobody here knows of it.
        let happened = world.seconds(world.now);
        let told = Told {
            kind: EventKind::Left(DisconnectReason::ClientInitiated),
            digest: 4_711,
            issued_at: happened,
            id: "EV_left".into(),
            created_at: happened,
            room: "room".into(),
            room_sid: world.rooms["room"].sid.clone(),
            identity: "al".into(),
            sid: "PA_former".into(),
            joined_at_ms: world.now.as_millis(),
        };
        world.advance(7_000);
        world.delegate("room", "al", "second", 18_000).unwrap();
        world.advance(1_000);
        world.deliver(&told);
        world.advance(4_000);
        assert_eq!(world.count(DelayedEventAction::Send, "second"), 0, "{:?}", world.finished);
        world.join("room", "al", true);
        world.advance(100_000);
        assert!(matches!(world.fate("second"), Fate::Scheduled { .. }), "{:?}", world.finished);
        world.part("room", "al", DisconnectReason::ClientInitiated, true);
        world.advance(2_100);
        assert!(matches!(world.fate("second"), Fate::Sent(_)), "and is watched");
    }
}

#[test]
fn b5_nodes_whose_clocks_differ_neither_end_nor_keep_anybody() {
    for (first, second) in [(5_000, 0), (0, 5_000), (0, -3_600_000), (3_600_000, 0), (0, 3_600_000)] {
        for reason in [DisconnectReason::DuplicateIdentity, DisconnectReason::ClientInitiated] {
            let mut world = world();
            world.now = World::at(10_000_000);
            world.sfu_ahead = first;
            call(&mut world, "room", 1, 18_000);
            world.advance(60_000);
            let left = world.rooms["room"].guests["room-0"].clone();
            world.part("room", "room-0", reason, false);
            world.sfu_ahead = second;
            world.join("room", "room-0", true);
            world.sfu_ahead = first;
            world.tell(EventKind::Left(reason), "room", "room-0", &left.sid, left.joined_at_ms);
            world.advance(120_000);
            assert_eq!(running(&world, "room", 1), 1, "{first} {second} {reason:?}: {:?}", world.finished);
            // A second SFU with the same key tells of its own room.
            let (kind, digest) = (EventKind::Left(DisconnectReason::ClientInitiated), 4_711);
            let seconds = world.seconds(world.now);
            world.deliver(&Told {
                kind,
                digest,
                issued_at: seconds,
                id: "EV_other".into(),
                created_at: seconds,
                room: "room".into(),
                room_sid: "RM_other".into(),
                identity: "room-0".into(),
                sid: "PA_other".into(),
                joined_at_ms: u64::MAX,
            });
            world.advance(60_000);
            assert_eq!(running(&world, "room", 1), 1, "{first} {second} {reason:?}: {:?}", world.finished);
            world.sfu_ahead = second;
            world.part("room", "room-0", DisconnectReason::ClientInitiated, true);
            let gone = world.now;
            world.advance(45_000);
            let Fate::Sent(at) = world.fate("room-0") else {
                panic!("{first} {second} {reason:?}: {:?}", world.fate("room-0"))
            };
            eprintln!("B5: {first} {second} {reason:?}: sent after {} ms", at.since(gone));
            assert!(world.core.leaves().is_empty());
        }
    }
}

#[test]
fn b5_a_node_whose_clock_is_behind_reports_nobody_who_is_back_at_once() {
    for (first, second) in [(5_000, 0), (0, 5_000), (3_600_000, 0)] {
        for back_after in [50, 100, 300, 450] {
            let mut world = world();
            world.now = World::at(10_000_000);
            world.sfu_ahead = first;
            call(&mut world, "room", 1, 18_000);
            world.advance(20_000);
            world.sfu_ahead = second;
            world.part("room", "room-0", DisconnectReason::ClientInitiated, true);
            world.advance(back_after);
            world.webhook_delay = 4_000;
            world.join("room", "room-0", true);
            world.advance(60_000);
            assert_eq!(running(&world, "room", 1), 1, "{first} {second} {back_after}: {:?}", world.finished);
        }
    }
}

#[test]
fn b6_3_000_leaves_that_take_a_second_each_report_none_of_20_who_stay() {
    let mut world = world();
    call(&mut world, "stay", 20, 15_000);
    call(&mut world, "leave", 3_000, 300_000);
    world.advance(60_000);
    world.send_latency = Some(1_000);
    for n in 0..3_000 {
        world.part("leave", &format!("leave-{n}"), DisconnectReason::ClientInitiated, true);
    }
    let left = world.now;
    world.advance(240_000);
    assert_eq!(running(&world, "stay", 20), 20);
    assert_eq!(sent(&world, "leave", 3_000, world.now), 3_000);
    let last = world.finished.iter().map(|(at, _, _)| at.since(left)).max().unwrap_or(0);
    eprintln!("B6: the last of 3,000 was sent after {last} ms");
    assert!(last < 90_000, "{last}");
}

#[test]
fn b7_one_restart_that_is_never_answered_ends_nobody() {
    for delay in [8_000, 18_000] {
        let mut world = world();
        call(&mut world, "room", 1, delay);
        world.silent_calls = 1;
        world.advance(100_000);
        assert_eq!(world.silent_calls, 0);
        assert_eq!(running(&world, "room", 1), 1, "{delay}: {:?}", world.calls);
    }
}

#[test]
fn b7_a_homeserver_silent_for_3_s_ends_none_of_300() {
    for from in (0..9_000).step_by(1_000) {
        let mut world = world();
        call(&mut world, "room", 300, 18_000);
        world.advance(from);
        world.silent_calls = u32::MAX;
        world.advance(3_000);
        world.silent_calls = 0;
        world.advance(60_000);
        assert_eq!(running(&world, "room", 300), 300, "{from}");
    }
}

#[test]
fn b7_a_homeserver_that_needs_1_5_s_keeps_delays_of_8_s() {
    let mut world = world();
    world.homeserver_latency = 1_500;
    call(&mut world, "room", 100, 8_000);
    world.advance(300_000);
    assert_eq!(running(&world, "room", 100), 100);
}

#[test]
fn b8_a_hint_of_an_hour_ends_nobody() {
    let mut world = world();
    call(&mut world, "room", 1, 18_000);
    let hour = Some(Duration::from_secs(3_600));
    world.homeserver_instead = Some(Outcome::Transient(hour));
    while world.count(DelayedEventAction::Restart, "room-0") < 2 {
        world.advance(10);
    }
    let refused = world.now;
    world.advance(1_000);
    world.homeserver_instead = None;
    world.advance(100_000);
    assert_eq!(running(&world, "room", 1), 1);
    let next = world.calls.iter().map(|(at, ..)| *at).find(|at| *at > refused).unwrap();
    eprintln!("B8: tried again after {} ms", next.since(refused));
    assert!(next.since(refused) <= 3_300, "a third of what is left");
}

#[test]
fn b10_a_request_held_for_longer_than_its_delay_restarts_first() {
    let mut world = world();
    world.open("room");
    world.advance(7_000);
    world
        .delegate_of("@al", "hs.example", "room", "al", "al", 6_000, World::at(0))
        .unwrap();
    world.advance(200);
    assert_eq!(world.count(DelayedEventAction::Restart, "al"), 1);
    world.advance(2_000);
    world.join("room", "al", true);
    world.advance(60_000);
    assert_eq!(world.count(DelayedEventAction::Send, "al"), 0);
    assert!(matches!(world.fate("al"), Fate::Scheduled { .. }), "{:?}", world.finished);
}

#[test]
fn b11_the_list_of_a_room_that_is_forgotten_is_not_read_as_another_rooms() {
    let mut world = world();
    world.latency = 1_000;
    call(&mut world, "a", 2, 18_000);
    world.advance(2_000);
    world.last_list = None;
    while world.last_list.is_none() {
        world.advance(10);
    }
    let (room, asked) = world.last_list.unwrap();
    for n in 0..2 {
        world.fact(Fact::Kicked("a", &format!("a-{n}")));
    }
    assert!(world.core.leaves().is_empty());
    world.open("b");
    world.delegate("b", "b-0", "b-0", 18_000).unwrap();
    world.delegate("b", "b-1", "b-1", 18_000).unwrap();
    let rows = ["a-0", "b-0"].map(|identity| ParticipantRow {
        identity,
        sid: "PA_x",
        joined_at_ms: 1,
        active: true,
    });
    world.fact(Fact::Participants(room, asked, Answer::Yes(&rows)));
    world.fact(Fact::Participants(room, asked, Answer::Yes(&[])));
    let participant = world.core.presence().find("b", "b-0").unwrap();
    assert!(!world.core.presence().get(participant).unwrap().session().seen);
    world.advance(3_000);
    for n in 0..2 {
        world.join("b", &format!("b-{n}"), true);
    }
    world.advance(60_000);
    assert_eq!(running(&world, "b", 2), 2, "{:?}", world.finished);
}

#[test]
fn b13_a_suspended_host_reports_none_of_50() {
    for from in (0..9_000).step_by(1_000) {
        let mut world = world();
        call(&mut world, "room", 50, 18_000);
        world.advance(from);
        world.stand_still(8_000, true);
        world.advance(60_000);
        assert_eq!(running(&world, "room", 50), 50, "{from}: {:?}", world.finished.first());
    }
}

#[test]
fn b15_5_000_restored_rooms_are_swept_all_over_the_interval() {
    let mut world = world();
    let at = |world: &World, ago: u64| world.clocks().unix_millis(world.now.before(ago));
    for n in 0..5_000 {
        let name = format!("room-{n}");
        world.open(&name);
        let sid = world.join(&name, &name, false).unwrap();
        let delay = Delay::from_millis(3_600_000).unwrap();
        let fires = world.now.after(3_600_000);
        world.events.insert(name.clone(), (Fate::Scheduled { fires }, delay));
        let stored = JobRecord {
            room: name.clone().into(),
            identity: name.clone().into(),
            delay_id: name.clone().into(),
            delay_ms: 3_600_000,
            homeserver: "hs.example".into(),
            restarted_at_ms: at(&world, 1_000),
            user: name.clone().into(),
            sid: Some(sid.into()),
            joined_at_ms: 1,
            room_sid: Some(world.rooms[&name].sid.clone().into()),
            last_sighted_ms: Some(at(&world, 1_000)),
            seen: true,
            ..JobRecord::default()
        };
        world.restore(&stored);
    }
    let from = world.now;
    world.advance(1_000);
    assert!(world.looked_up.len() >= 5_000, "asked at once: {}", world.looked_up.len());
    world.advance(151_000);
    let mut seconds = BTreeMap::<u64, usize>::new();
    for at in world.looked_up.iter().filter(|at| at.since(from) >= 32_000) {
        *seconds.entry(at.since(from) / 1_000).or_default() += 1;
    }
    let most = seconds.values().max().copied().unwrap_or(0);
    eprintln!("B15: at most {most} questions in a second, {} seconds of 120", seconds.len());
    assert!(most <= 2 * 5_000 / 30, "{seconds:?}");
    assert_eq!(running(&world, "room", 5_000), 5_000);
}

#[test]
fn b17_whose_identity_looks_like_another_ones_ends_nothing_of_theirs() {
    let mut world = world();
    call(&mut world, "room", 1, 18_000);
    let refused = world.delegate_of("@mallory:evil", "evil", "room", "room-0", "theirs", 18_000, world.now);
    assert_eq!(refused, Err(CapacityError::UserFull));
    world.advance(100_000);
    assert_eq!(running(&world, "room", 1), 1);
    assert_eq!(world.count(DelayedEventAction::Cancel, "room-0"), 0);
}

#[test]
#[ignore = "load: .ci/run has these run one by one"]
fn b18_100_000_are_restarted_within_10_s_of_sigterm() {
    let mut world = world();
    world.has_store = false;
    for n in 0..100_000 {
        let (room, name) = (format!("room{}", n / 10), format!("room-{n}"));
        world.open(&room);
        world.join(&room, &name, true);
        let homeserver = if n % 50 == 0 {
            "hs.example".into()
        } else {
            format!("hs{}", n % 50)
        };
        let user = format!("@{name}");
        world
            .delegate_of(&user, &homeserver, &room, &name, &name, 3_600_000, world.now)
            .unwrap();
        if n % 1_000 == 999 {
            world.advance(10);
        }
    }
    world.advance(5_000);
    world.calls.clear();
    let (asked, began) = (world.now, std::time::Instant::now());
    world.fact(Fact::Stopping);
    while !world.core.is_at_rest() && world.now.since(asked) < 10_000 {
        world.advance(50);
    }
    let restarted = world.calls.iter().filter(|(.., outcome)| *outcome == Outcome::Done).count();
    eprintln!(
        "B18: {restarted} in {} ms, computed in {:?}",
        world.now.since(asked),
        began.elapsed()
    );
    assert!(world.core.is_at_rest());
    assert_eq!(restarted, 100_000);
}

#[test]
fn b20_a_front_with_a_dead_backend_is_asked_for_rooms_as_the_interval_says() {
    let mut world = world();
    call(&mut world, "room", 3, 18_000);
    world.half_dead = true;
    world.advance(10_000);
    world.sfu_calls.clear();
    world.advance(600_000);
    eprintln!("B20: {:?} in ten minutes", world.sfu_calls.get("ListRooms"));
    assert!(world.sfu_calls["ListRooms"] <= 30, "{:?}", world.sfu_calls);
    assert_eq!(running(&world, "room", 3), 3);
}

#[test]
fn b22_what_other_programs_leave_out_keeps_no_leave_back() {
    for guests in [1, 2, 4] {
        for told in [true, false] {
            for reason in [DisconnectReason::ClientInitiated, DisconnectReason::Unknown] {
                let mut world = world_swept_every(1_000, Some(30_000));
                world.webhooks_bare = true;
                // It knows `CreateRoom` and `GetParticipant`: a 404 without a body for all else.
                world.instead.insert("ListRooms", Answer::Refused);
                world.instead.insert("ListParticipants", Answer::Refused);
                call(&mut world, "room", guests, 18_000);
                // All are told of anew, under the id that every event has.
                for n in 0..guests {
                    let name = format!("room-{n}");
                    world.tell(EventKind::Joined, "room", &name, "", 0);
                    world.advance(3_000);
                }
                assert_eq!(running(&world, "room", guests), guests, "{:?}", world.finished);
                // The page is reloaded: one has another session a moment later.
                world.part("room", "room-0", reason, true);
                world.advance(100);
                world.join("room", "room-0", true);
                world.advance(30_000);
                assert_eq!(running(&world, "room", guests), guests, "{told} {reason:?}: {:?}", world.finished);
                let absent = world.now;
                world.part("room", "room-0", reason, told);
                world.advance(30_000);
                let Fate::Sent(at) = world.fate("room-0") else {
                    panic!("{guests} {told} {reason:?}: {:?}", world.fate("room-0"))
                };
                eprintln!("B22: {guests} {told} {reason:?}: {} ms", at.since(absent));
                assert!(at.since(absent) <= 6_000, "{guests} {told} {reason:?}: {}", at.since(absent));
                assert_eq!(running(&world, "room", guests), guests - 1);
            }
        }
    }
}

#[test]
fn b23_ten_seconds_of_empty_pages_end_nobody_and_lose_nobody() {
    for told in [true, false] {
        for from in [0, 3_000, 6_000, 8_500] {
            let mut world = world();
            call(&mut world, "leave", 5, 60_000);
            call(&mut world, "stay", 15, 60_000);
            world.advance(20_000 + from);
            for name in ["GetParticipant", "ListParticipants", "ListRooms", "CreateRoom"] {
                world.instead.insert(name, Answer::Unclear);
            }
            world.homeserver_instead = Some(Outcome::Transient(None));
            world.advance(3_000);
            for n in 0..5 {
                world.part("leave", &format!("leave-{n}"), DisconnectReason::ClientInitiated, told);
            }
            world.advance(7_000);
            assert_eq!(running(&world, "leave", 5) + running(&world, "stay", 15), 20, "{told} {from}");
            world.instead.clear();
            world.homeserver_instead = None;
            let over = world.now;
            world.advance(120_000);
            let within = if told { 20_000 } else { 40_000 };
            assert_eq!(
                sent(&world, "leave", 5, over.after(within)),
                5,
                "{told} {from}: {:?}",
                world.finished
            );
            assert_eq!(running(&world, "stay", 15), 15, "{told} {from}: {:?}", world.finished);
            assert!(world.created.is_empty(), "{told} {from}: {:?}", world.created);
        }
    }
}

#[test]
fn b13_a_process_that_stood_still_while_a_send_was_under_way_asks_before_the_next_one() {
    let mut sent = Vec::new();
    for after in (0..6_000).step_by(10) {
        let mut world = world();
        world.open("room");
        world.send_latency = Some(200);
        world.delegate("room", "al", "al", 60_000).unwrap();
        world.join("room", "al", true);
        world.advance(2_000);
        world.homeserver_instead = Some(Outcome::Transient(Some(Duration::from_secs(3))));
        world.part("room", "al", DisconnectReason::ClientInitiated, true);
        world.advance(after);
        let tries = world.count(DelayedEventAction::Send, "al");
        world.webhook_delay = 60_000;
        world.join("room", "al", true);
        world.stand_still(5_000, false);
        world.advance(1_000);
        world.homeserver_instead = None;
        world.advance(20_000);
        if matches!(world.fate("al"), Fate::Sent(_)) {
            sent.push((after, tries));
        }
    }
    assert_eq!(sent, []);
}
