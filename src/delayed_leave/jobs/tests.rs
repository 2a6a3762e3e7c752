use super::*;
use crate::time::Delay;

const NOW: Time = Time::START;

fn delegation<'a>(identity: &'a str, delay_id: &'a str) -> Delegation<'a> {
    Delegation {
        room: "room",
        identity,
        user: "@a:x",
        homeserver: "x",
        delay_id,
        delay: Delay::from_millis(3_600_000).unwrap(),
        arrived: NOW,
        exempt: true,
        creates_room: true,
        as_user: false,
    }
}

fn jobs() -> Jobs {
    let config = Config {
        per_user: u32::MAX,
        ..Config::default()
    };
    Jobs::new(config, 1, NOW)
}

#[test]
fn a_job_is_small() {
    // A hundred thousand of them are to fit into a small container, with nothing of their own beside.
    assert!(size_of::<Option<Job>>() <= 408, "{}", size_of::<Option<Job>>());
    assert!(size_of::<(Time, Timer)>() <= 16);
}

#[test]
fn names_are_taken_apart_again() {
    for (identity, delay_id, user) in [("i", "d", "u"), ("", "", ""), ("é", "", "@ü:x"), ("i", "😀", &"u".repeat(300))] {
        let names = Names::new(identity, delay_id, user);
        assert_eq!((names.identity(), names.delay_id(), names.user()), (identity, delay_id, user));
    }
}

#[test]
fn timers_that_are_set_anew_do_not_pile_up() {
    let mut jobs = jobs();
    let _ = jobs.delegate(&delegation("i", "d"), NOW).unwrap();
    for millis in 0..10_000 {
        let now = NOW.after(millis);
        let again = Delegation {
            arrived: now,
            ..delegation("i", "d")
        };
        let (delegated, _) = jobs.delegate(&again, now).unwrap();
        assert!(matches!(delegated, Delegated::Renewed(_)));
        assert!(jobs.timers.len() < 128, "{}", jobs.timers.len());
        assert!(jobs.next_deadline().is_some_and(|at| at > now));
    }
}

#[test]
fn the_place_of_a_job_that_is_over_is_given_back_and_its_number_is_not() {
    let mut jobs = jobs();
    let identities: Vec<_> = (0..2_000).map(|n| n.to_string()).collect();
    let mut last = Vec::new();
    for round in 0..3 {
        let mut ids = Vec::new();
        for identity in &identities {
            match jobs.delegate(&delegation(identity, "d"), NOW).unwrap().0 {
                Delegated::New(id) => ids.push(id),
                other @ (Delegated::Renewed(_) | Delegated::Overtaken) => panic!("{other:?}"),
            }
        }
        assert_eq!((jobs.len(), jobs.rooms.len(), jobs.users.len()), (2_000, 1, 1));
        assert!(ids.iter().all(|id| !last.contains(id)), "round {round}");
        assert!(jobs.table.places() <= 2_048);
        let mut out = Outputs::default();
        for &id in &ids {
            jobs.finish(id, false, Reason::Refused, NOW, &mut out);
        }
        jobs.settle(NOW, &mut out);
        assert_eq!((jobs.len(), jobs.rooms.len(), jobs.users.len()), (0, 0, 0));
        assert_eq!(jobs.table.places(), 0);
        assert!(last.iter().all(|&id| jobs.get(id).is_none()));
        last = ids;
    }
}

#[test]
fn a_list_is_read_in_any_order_and_with_strangers_in_it() {
    let mut jobs = jobs();
    let identities: Vec<_> = (0..50).map(|n| format!("i{n}")).collect();
    for identity in &identities {
        let _ = jobs.delegate(&delegation(identity, identity), NOW).unwrap();
    }
    let room = jobs.rooms.find("room").unwrap();
    let mut rows: Vec<_> = identities
        .iter()
        .filter(|identity| *identity != "i7")
        .map(String::as_str)
        .chain(["", "i", "i500", "z"])
        .map(|identity| Row {
            identity,
            sid: identity,
            joined_at_ms: 1,
            active: true,
        })
        .collect();
    for turn in [0, 17] {
        rows.rotate_left(turn);
        let asked = NOW.after(1_000);
        let _ = jobs.handle(
            Fact::Listed {
                room,
                asked,
                answer: Answered::Yes(&rows),
            },
            asked,
        );
        for identity in &identities {
            let job = jobs.get(jobs.find("room", identity).unwrap()).unwrap();
            let expected = (identity != "i7").then_some(identity.as_str());
            assert_eq!(job.machine().session().sid(), expected);
        }
    }
}

#[test]
fn where_a_list_is_too_long_to_be_read_each_is_asked_for() {
    let mut jobs = jobs();
    for identity in ["a", "b", "c"] {
        let (delegated, _) = jobs.delegate(&delegation(identity, identity), NOW).unwrap();
        let Delegated::New(job) = delegated else { panic!("{delegated:?}") };
        let answer = Looked::Present(Row {
            identity,
            sid: identity,
            joined_at_ms: 1,
            active: true,
        });
        // One of them has not come yet.
        if identity != "b" {
            let _ = jobs.handle(Fact::LookedUp { job, asked: NOW, answer }, NOW);
        }
    }
    let room = jobs.rooms.find("room").unwrap();
    let mut asked_for = |answer| {
        let now = NOW.after(100);
        let outputs = jobs.handle(Fact::Listed { room, asked: now, answer }, now);
        outputs.into_iter().filter(|output| matches!(output, Output::LookUp { .. })).count()
    };
    assert_eq!(asked_for(Answered::Unclear), 0);
    assert_eq!(asked_for(Answered::TooMuch), 2);
}
