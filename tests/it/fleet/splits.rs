//! Two primaries at once: some replicas reach the one, some the other; and one connection of a replica that stands still.

use std::time::{Duration, Instant};

use super::events::Events;
use super::length::{self, rounds};
use super::link::Way;
use super::scenes::{SHORT, crowd};
use super::stage::{Person, SYNC_AT_ONCE, Stage, TIMEOUT, readyz, states, within};
use crate::support::redis::RedisServer;
use crate::support::sfu::Session;
use crate::support::{unique, wait_until, webhook};

/// After a split exactly one watches by then.
const ONE_WATCHER: Duration = Duration::from_secs(10);
/// Whoever delegates is watched by then.
const WATCHED: Duration = Duration::from_secs(5);
/// A departure of which the wrong side was told is found by then.
const FOUND: Duration = Duration::from_secs(45);
/// Between two people who do something.
const PACE: Duration = Duration::from_millis(600);

/// Somebody with another event and another session in the same seat, as after a reload. The SFU never shows the seat empty.
fn reload(stage: &Stage, at: usize, seat: &(Person, Session), schedule: impl Fn(&Person)) -> (Person, Session) {
    let mut person = seat.0.clone();
    person.delay_id = format!("syd_{}", unique());
    schedule(&person);
    assert_eq!(stage.delegate_at(stage.nodes[at].as_ref().expect("a node"), &person), 200);
    let session = stage.sfu.join(&person.alias, &person.identity);
    stage.tell(&webhook::left(&seat.1, "CLIENT_INITIATED"));
    stage.tell(&webhook::joined(&session));
    (person, session)
}

/// R5b: the connection over which the watcher reads messages stands still, and its others pass.
#[test]
fn a_watcher_that_hears_nothing_is_followed() {
    let Some(stage) = Stage::start(3) else { return };
    for _ in 0..rounds(1, 20) {
        let people = crowd(&stage, 7, SHORT);
        let (watcher, server) = (stage.wait_one_watcher(), stage.server());
        let began = Instant::now();
        stage.links[watcher].set(Way::Unread);
        // One leaves and is back at once; two reload, one of them at the deaf one; one leaves for good; one comes.
        stage.sfu.leave(&people[0].1.room, &people[0].1.identity);
        let other = stage.nodes[server].as_ref().expect("a node");
        assert_eq!(
            webhook::tell(other, &stage.sfu, &webhook::left(&people[0].1, "CLIENT_INITIATED")).status,
            200
        );
        let back = stage.sfu.join(&people[0].0.alias, &people[0].0.identity);
        assert_eq!(webhook::tell(other, &stage.sfu, &webhook::joined(&back)).status, 200);
        let mut all = vec![(people[0].0.clone(), back)];
        for (at, seat) in [(server, &people[1]), (watcher, &people[2])] {
            all.push(reload(&stage, at, seat, |_| {}));
        }
        stage.sfu.leave(&people[3].1.room, &people[3].1.identity);
        let gone = Instant::now();
        assert_eq!(
            webhook::tell(other, &stage.sfu, &webhook::left(&people[3].1, "CLIENT_INITIATED")).status,
            200
        );
        let newcomer = stage.person(SHORT);
        assert_eq!(stage.delegate_at(other, &newcomer), 200);
        let session = stage.sfu.join(&newcomer.alias, &newcomer.identity);
        all.push((newcomer, session));
        all.extend(people[4..].iter().cloned());
        let next = stage.wait_other_watcher(watcher, TIMEOUT);
        let took = began.elapsed();
        let reported = stage.wait_sent(&people[3].0, gone, TIMEOUT);
        wait_until("exactly one watcher", TIMEOUT, || stage.watcher() == Some(next));
        stage.links[watcher].set(Way::Open);
        stage.wait_no_guests();
        for (former, seat) in [(&people[1].0, &all[1].0), (&people[2].0, &all[2].0)] {
            wait_until("the event of before the reload to be cancelled", TIMEOUT, || {
                stage.api.count("cancel", &former.delay_id) > 0
            });
            let first = stage.api.times("cancel", &former.delay_id)[0];
            assert!(stage.api.times("restart", &seat.delay_id).iter().any(|at| *at <= first));
            assert_eq!(stage.api.count("send", &former.delay_id), 0);
        }
        stage.assert_there(&all);
        // Each of them is watched, with the event that counts.
        let left: Vec<_> = all.iter().map(|(_, session)| stage.leave(session)).collect();
        let goodbyes = all
            .iter()
            .zip(left)
            .map(|((person, _), gone)| stage.wait_sent(person, gone, TIMEOUT));
        let worst = goodbyes.max().unwrap_or_default();
        eprintln!("R5b: followed after {took:?}, the departure meanwhile reported after {reported:?}, the others within {worst:?}");
        wait_until("no records", TIMEOUT, || stage.records() == 0);
    }
}

/// R10: one watcher on each side, while people reload at both; in the end the side of the former watcher counts.
#[test]
fn after_a_split_every_seat_has_a_living_event() {
    let length = if length::is_full() { 60 } else { 10 };
    splits("R10", Duration::from_secs(length), (true, false));
}

/// R10: the same where the other side counts, and the other ways round; minutes of it, as R8 has it.
#[test]
fn after_a_split_every_seat_has_a_living_event_whichever_side_counts() {
    if length::is_full() {
        splits("R10", Duration::from_secs(60), (true, true));
        splits("R10", Duration::from_secs(60), (false, false));
        splits("R10", Duration::from_secs(60), (false, true));
        splits("R8", Duration::from_secs(300), (true, true));
    }
}

/// The watcher is alone on its side or with one other, and the other side counts in the end or its own.
fn splits(name: &str, length: Duration, (is_alone, others_count): (bool, bool)) {
    let Some(stage) = Stage::with(3, &SYNC_AT_ONCE) else { return };
    let host = stage.redis.address().ip().to_string();
    let Some(other) = RedisServer::start(&["--replicaof", &host, "6379"]) else {
        return;
    };
    let events = Events::of(&stage.api);
    let schedule = |person: &Person| events.schedule(person);
    let come = |at: usize| {
        let person = stage.person(SHORT);
        schedule(&person);
        assert_eq!(stage.delegate_at(stage.nodes[at].as_ref().expect("a node"), &person), 200);
        let session = stage.sfu.join(&person.alias, &person.identity);
        (person, session)
    };
    let mut seats: Vec<_> = (0..8).map(|at| come(at % 3)).collect();
    stage.wait_restarted(&seats, Instant::now() - Duration::from_secs(60));
    wait_until("the other server to have all", TIMEOUT, || {
        other.ask(&["HLEN", "lk-jwt:jobs"]) == format!(":{}\r\n", seats.len())
    });
    let watcher = stage.wait_one_watcher();
    let mut others: Vec<_> = (0..3).filter(|at| *at != watcher).collect();
    others.truncate(if is_alone { 2 } else { 1 });
    assert_eq!(other.ask(&["REPLICAOF", "NO", "ONE"]), "+OK\r\n");
    others.iter().for_each(|&at| stage.links[at].lead_to(other.address()));
    let began = Instant::now();
    let mut two = None;
    let mut gone = Vec::new();
    let mut worst = Duration::ZERO;
    for turn in 0.. {
        let asked = Instant::now();
        if asked.duration_since(began) >= length && two.is_some() {
            break;
        }
        let at = turn % 3;
        if turn % 4 == 3 {
            let newcomer = come(at);
            let answered = Instant::now();
            let restarts = || stage.api.times("restart", &newcomer.0.delay_id);
            wait_until("the newcomer to be watched", TIMEOUT, || !restarts().is_empty());
            let took = restarts()[0].saturating_duration_since(answered);
            assert!(took <= within(WATCHED, asked), "{took:?}: {:?}", states(&stage));
            worst = worst.max(took);
            seats.push(newcomer);
        } else if turn % 10 == 9 && length > FOUND {
            let (person, session) = seats.remove(turn % seats.len());
            stage.leave(&session);
            gone.push((person, Instant::now()));
        } else {
            let at_seat = turn * 5 % seats.len();
            seats[at_seat] = reload(&stage, at, &seats[at_seat], schedule);
        }
        let watches = |at: usize| readyz(stage.nodes[at].as_ref().expect("a node"))["watches"] == true;
        let (there, here): (Vec<usize>, Vec<usize>) = (0..3).partition(|at| others.contains(at));
        if two.is_none() && there.into_iter().any(watches) && here.into_iter().any(watches) {
            two = Some(began.elapsed());
        }
        assert!(
            began.elapsed() < length + TIMEOUT,
            "nobody watches on the other side: {:?}",
            states(&stage)
        );
        assert_living(&stage, &events, &seats);
        std::thread::sleep(PACE.saturating_sub(asked.elapsed()));
    }
    let (counts, replica) = if others_count {
        (other.address(), &stage.redis)
    } else {
        (stage.redis.address(), &other)
    };
    assert_eq!(replica.ask(&["REPLICAOF", &counts.ip().to_string(), "6379"]), "+OK\r\n");
    stage.links.iter().for_each(|link| link.lead_to(counts));
    let healed = Instant::now();
    wait_until("exactly one watcher", TIMEOUT, || stage.watcher().is_some());
    let one = healed.elapsed();
    assert!(one <= within(ONE_WATCHER, healed), "{one:?}");
    stage.wait_no_guests();
    for (person, left) in &gone {
        wait_until("the departure to be found", FOUND.saturating_sub(left.elapsed()) + TIMEOUT, || {
            events.living(person).is_empty()
        });
    }
    // What counts is left, of each seat.
    wait_until("one event in each seat", TIMEOUT, || {
        assert_living(&stage, &events, &seats);
        seats.iter().all(|(person, _)| events.living(person).len() == 1)
    });
    for (person, _) in &seats {
        assert_eq!(events.sent(person), Vec::<String>::new(), "somebody who is there was reported gone");
        assert_eq!(
            events.living(person),
            std::slice::from_ref(&person.delay_id),
            "the last event counts"
        );
    }
    events.assert_well();
    let settled = healed.elapsed();
    assert!(stage.wait_one_watcher() < 3);
    // Each is watched.
    let left = Instant::now();
    for (_, session) in &seats {
        stage.leave(session);
    }
    for (person, _) in &seats {
        wait_until("the departure to be reported", TIMEOUT, || !events.sent(person).is_empty());
        assert_eq!(events.living(person), Vec::<String>::new());
    }
    eprintln!(
        "{name}, {length:?}, the watcher alone: {is_alone}, the others' side counts: {others_count}: two watchers after {two:?}, newcomers \
         watched within {worst:?}; one watcher {one:?} after healing, one event in each of {} seats after {settled:?}, all reported {:?} \
         after they left",
        seats.len(),
        left.elapsed()
    );
}

#[track_caller]
fn assert_living(stage: &Stage, events: &Events, seats: &[(Person, Session)]) {
    for (person, _) in seats {
        assert!(
            !events.living(person).is_empty(),
            "no living event: {person:?}, {:?}",
            states(stage)
        );
    }
}
