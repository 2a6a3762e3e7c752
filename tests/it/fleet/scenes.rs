//! The scenes in short form. `LK_FLEET_ROUNDS` repeats those that are random in time.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lk_jwt_service::internals::doctor::{Group, TicketKey, Use, Wishes};
use lk_jwt_service::secret::Secret;
use serde_json::{Value, json};

use super::events::Events;
use super::length::{self, rounds};
use super::link::Way;
use super::stage::{Person, Stage, TIMEOUT, readyz, states, up, within};
use crate::support::client::Call;
use crate::support::redis::RedisServer;
use crate::support::service::{Service, Setup};
use crate::support::sfu::{Session, Sfu};
use crate::support::{bodies, unique, wait_until, webhook};

pub(super) const HOUR: Duration = Duration::from_secs(3600);
pub(super) const SHORT: Duration = Duration::from_secs(18);
/// A departure is reported within that time (L2a, and the way of the webhook).
const GOODBYE: Duration = Duration::from_millis(2300);
/// A dead watcher is followed within a node's life, two beats and 0.3 s.
const TAKEOVER: Duration = Duration::from_millis(7300);
pub(super) const SHORT_TAKEOVER: Duration = Duration::from_millis(3100);

/// Two beats of the longest life: by then all nodes know how short the delays are.
pub(super) const KNOWN: Duration = Duration::from_millis(2500);

/// What `doctor` finds of the store, by check.
fn doctor(node: &Service, sfu: &Sfu) -> HashMap<String, Value> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let wishes = Wishes {
        only: vec![Group::Store],
        ..Wishes::default()
    };
    let ticket = TicketKey::derive(&Secret::new(sfu.secret())).sign(Use::Run, &format!("ticket-of-a-test-{:016}", unique()), &wishes, now);
    let answer = node.call(&Call::post("/doctor", "").header("Authorization", &format!("Bearer {ticket}")));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.text();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter_map(|line| Some((line["check"].as_str()?.to_owned(), line))).collect()
}

/// So many people who are there, each restarted at least once.
#[track_caller]
pub(super) fn crowd(stage: &Stage, count: usize, delay: Duration) -> Vec<(Person, Session)> {
    let began = Instant::now();
    let people: Vec<_> = (0..count).map(|_| stage.arrive(delay)).collect();
    stage.wait_restarted(&people, began);
    people
}

/// R1: people come and go, everything round robin; at full length three hundred in three minutes.
#[test]
fn goodbyes_are_reported_whoever_was_told() {
    let Some(stage) = Stage::start(3) else { return };
    let began = Instant::now();
    let stay = crowd(&stage, 6, SHORT);
    let (count, hands, pace) = if length::is_full() {
        (300, 6, Duration::from_millis(600))
    } else {
        (12, 1, Duration::ZERO)
    };
    let worst = Mutex::new(Duration::ZERO);
    let comes_and_goes = |turn: u32| {
        std::thread::sleep((began + pace * turn).saturating_duration_since(Instant::now()));
        let people = crowd(&stage, 1, HOUR);
        let epoch = stage.epoch();
        let gone = stage.leave(&people[0].1);
        let took = stage.wait_sent(&people[0].0, gone, TIMEOUT);
        // A machine that stands still for seconds moves the watch.
        if stage.epoch() == epoch {
            let mut worst = worst.lock().unwrap();
            *worst = took.max(*worst);
        }
    };
    std::thread::scope(|scope| {
        for hand in 0..hands {
            scope.spawn(move || (hand..count).step_by(hands as usize).for_each(comes_and_goes));
        }
    });
    let worst = worst.into_inner().unwrap();
    eprintln!(
        "R1: {count} came and went in {:?}, the latest goodbye after {worst:?}",
        began.elapsed()
    );
    assert!(worst <= within(GOODBYE, began), "{worst:?}: {:?}", states(&stage));
    stage.assert_there(&stay);
    wait_until("only those who stay to have a record", TIMEOUT, || stage.records() == stay.len());
}

/// R2: kill -9 of the watcher, with delays of an hour.
#[test]
fn a_killed_watcher_is_followed_within_seven_seconds() {
    let Some(mut stage) = Stage::start(3) else { return };
    let people = crowd(&stage, length::people(60, 1_000), HOUR);
    let mut worst = Duration::ZERO;
    for _ in 0..rounds(1, 20) {
        let (began, watcher) = (Instant::now(), stage.wait_one_watcher());
        let killed = stage.kill(watcher);
        stage.wait_other_watcher(watcher, TIMEOUT);
        let took = killed.elapsed();
        let asked = stage.wait_looked_up(&people[..1], killed, TIMEOUT);
        eprintln!("R2: watched after {took:?}, the SFU asked after {asked:?}");
        assert!(took <= within(TAKEOVER, began), "{took:?}");
        worst = worst.max(took);
        stage.add(|setup| setup);
    }
    eprintln!("R2: {} people, watched after {worst:?} at worst", people.len());
    stage.assert_there(&people);
    wait_until("all nodes to be up", TIMEOUT, || stage.living().all(|node| up(node) == 3));
    // Nothing was lost: whoever leaves is reported.
    let gone = stage.leave(&people[7].1);
    let took = stage.wait_sent(&people[7].0, gone, TIMEOUT);
    assert!(took <= within(GOODBYE, gone), "{took:?}");
}

/// R2b: the first heir is frozen when its turn comes.
#[test]
fn where_the_heir_is_frozen_too_the_next_one_follows() {
    let Some(mut stage) = Stage::start(3) else { return };
    let people = crowd(&stage, 10, SHORT);
    std::thread::sleep(KNOWN);
    let watcher = stage.wait_one_watcher();
    let heir = (0..3).find(|at| *at != watcher).expect("an heir");
    let began = Instant::now();
    stage.nodes[heir].as_ref().expect("a node").signal("STOP");
    let killed = stage.kill(watcher);
    let third = 3 - watcher - heir;
    wait_until("the third to watch", TIMEOUT, || {
        readyz(stage.nodes[third].as_ref().expect("a node"))["watches"] == true
    });
    let took = killed.elapsed();
    eprintln!("R2b: the third watches after {took:?}");
    // A life, and the beats of those before it in the order.
    assert!(took <= within(SHORT_TAKEOVER + Duration::from_millis(1200), began), "{took:?}");
    stage.nodes[heir].as_ref().expect("a node").signal("CONT");
    wait_until("exactly one watcher", TIMEOUT, || stage.watcher() == Some(third));
    stage.assert_there(&people);
}

/// R3: the same with delays of 18 s; every restart comes in time, when it is due.
#[test]
fn with_short_delays_nobodys_event_fires_in_a_takeover() {
    length::on_stages(5, rounds(2, 50), |stage, round| {
        let people = crowd(stage, length::people(60, 200), SHORT);
        let (began, watcher) = (Instant::now(), stage.wait_one_watcher());
        // Known to all by now that delays are short.
        std::thread::sleep(KNOWN + Duration::from_millis(unique() * 317 % 9000));
        let killed = stage.kill(watcher);
        stage.wait_other_watcher(watcher, TIMEOUT);
        let took = killed.elapsed();
        stage.wait_restarted(&people, killed);
        let late = stage.latest_restart(&people, killed);
        eprintln!("R3, round {round}: watched after {took:?}, no restart later than {late:?}");
        assert!(took.max(late) <= within(SHORT_TAKEOVER, began), "{took:?}, {late:?}");
        stage.add(|setup| setup);
        stage.assert_there(&people);
        for (_, session) in &people {
            stage.leave(session);
        }
    });
}

/// R3: the same where the homeserver limits, and carries half as many again as are there; at full length also where it carries just
/// those.
#[test]
fn where_the_homeserver_limits_nobodys_event_fires_in_a_takeover() {
    let (count, turns) = (length::people(30, 200), rounds(1, 5));
    // Restarts under a limit wait for four fifths of the delay.
    let needed = count as f64 / (0.8 * SHORT.as_secs_f64());
    for (limit, may_run_out) in [(1.5, 0.0), (1.0, SHORT_TAKEOVER.as_secs_f64())] {
        if limit == 1.0 && !length::is_full() {
            continue;
        }
        let Some(mut stage) = Stage::start(3) else { return };
        let events = Events::of(&stage.api);
        let began = Instant::now();
        let people: Vec<_> = (0..count)
            .map(|_| {
                let person = stage.person(SHORT);
                events.schedule(&person);
                assert_eq!(stage.delegate_at(stage.next(), &person), 200);
                let session = stage.sfu.join(&person.alias, &person.identity);
                stage.tell(&webhook::joined(&session));
                (person, session)
            })
            .collect();
        stage.wait_restarted(&people, began);
        events.limit(needed * limit, 5.0);
        for _ in 0..turns {
            // Long enough for all to have been restarted under the limit.
            std::thread::sleep(SHORT);
            let (before, watcher) = (events.ran_out(), stage.wait_one_watcher());
            stage.kill(watcher);
            stage.wait_other_watcher(watcher, TIMEOUT);
            stage.add(|setup| setup);
            std::thread::sleep(SHORT);
            let ran_out = events.ran_out() - before;
            eprintln!("R3: at a limit of {limit} times what {count} people need, {ran_out} events ran out");
            assert!(ran_out as f64 <= may_run_out * needed, "{ran_out}: {:?}", states(&stage));
        }
    }
}

/// R4: kill -9 of the watcher right after a departure was told, or that a room is over, by whomever.
#[test]
fn a_departure_that_was_told_is_reported_though_the_watcher_dies() {
    length::on_stages(4, rounds(2, 100), |stage, round| {
        for (delay, limit) in [(HOUR, 11_500), (SHORT, 7_300)] {
            let people = crowd(stage, 3, delay);
            std::thread::sleep(KNOWN);
            let (began, watcher) = (Instant::now(), stage.wait_one_watcher());
            let (gone, what) = if round % 2 == 0 {
                (stage.leave(&people[0].1), "participant_left")
            } else {
                (stage.finish(&people[0].1), "room_finished")
            };
            let moment = Duration::from_millis(unique() * 317 % 2000);
            std::thread::sleep(moment);
            stage.kill(watcher);
            let took = stage.wait_sent(&people[0].0, gone, TIMEOUT);
            eprintln!("R4, round {round}, {delay:?}, killed {moment:?} after {what}: the leave after {took:?}");
            assert!(took <= within(Duration::from_millis(limit), began), "{took:?}");
            stage.assert_there(&people[1..]);
            stage.add(|setup| setup);
            for (_, session) in &people[1..] {
                stage.leave(session);
            }
            wait_until("everybody's leave to be sent", TIMEOUT, || {
                people.iter().all(|(person, _)| stage.api.count("send", &person.delay_id) > 0)
            });
        }
    });
}

/// R5: the watcher is stopped for longer than a node's life; meanwhile one leaves and returns, one reloads, one leaves.
#[test]
fn a_watcher_that_wakes_up_reports_nobody_who_is_there() {
    length::on_stages(8, rounds(1, 100), |stage, round| {
        let people = crowd(stage, 6, SHORT);
        let watcher = stage.wait_one_watcher();
        let node = stage.nodes[watcher].as_ref().expect("a node");
        let other = (0..stage.nodes.len()).find(|at| *at != watcher && stage.nodes[*at].is_some());
        let other = stage.nodes[other.expect("another node")].as_ref().expect("a node");
        let tell = |event: &Value| {
            wait_until("a webhook to be taken", TIMEOUT, || {
                webhook::tell(other, &stage.sfu, event).status == 200
            });
        };
        // Somebody's departure is just being looked into, or was reported already.
        stage.sfu.leave(&people[0].1.room, &people[0].1.identity);
        let left = webhook::left(&people[0].1, "CLIENT_INITIATED");
        assert_eq!(webhook::tell(node, &stage.sfu, &left).status, 200);
        let stops = if length::is_full() { unique() * 317 % 1500 } else { 0 };
        std::thread::sleep(Duration::from_millis(stops));
        node.signal("STOP");
        let stopped = Instant::now();
        let returns = if length::is_full() { 50 + unique() * 131 % 4000 } else { 0 };
        std::thread::sleep(Duration::from_millis(returns));
        let mut all = people.clone();
        all[0].1 = stage.sfu.join(&all[0].0.alias, &all[0].0.identity);
        if length::is_full() {
            // The report of the departure may just be on its way.
            std::thread::sleep(Duration::from_millis(50));
        }
        let was_reported = stage.api.count("send", &people[0].0.delay_id) > 0;
        if was_reported {
            // As a client does whose event was sent.
            all[0].0.delay_id = format!("syd_{}", unique());
            assert_eq!(stage.delegate_at(other, &all[0].0), 200);
        }
        tell(&webhook::joined(&all[0].1));
        if returns.is_multiple_of(2) {
            stage.wait_other_watcher(watcher, TIMEOUT);
        }
        // A reload: another event, another session.
        all[1].0.delay_id = format!("syd_{}", unique());
        assert_eq!(stage.delegate_at(other, &all[1].0), 200);
        all[1].1 = stage.sfu.join(&all[1].0.alias, &all[1].0.identity);
        tell(&webhook::joined(&all[1].1));
        // One leaves for good.
        let (gone, session) = all.pop().expect("six people");
        stage.sfu.leave(&session.room, &session.identity);
        tell(&webhook::left(&session, "CLIENT_INITIATED"));
        stage.wait_other_watcher(watcher, TIMEOUT);
        let reported = stage.wait_sent(&gone, stopped, TIMEOUT);
        if length::is_full() {
            std::thread::sleep((stopped + Duration::from_secs(30)).saturating_duration_since(Instant::now()));
        }
        node.signal("CONT");
        stage.wait_one_watcher();
        let after = Instant::now();
        stage.wait_restarted(&all, after);
        stage.assert_there(&all);
        let former = &people[1].0.delay_id;
        wait_until("the event of before the reload to be cancelled", TIMEOUT, || {
            stage.api.count("cancel", former) > 0
        });
        assert_eq!(stage.api.count("send", former), 0);
        let first = stage.api.times("cancel", former)[0];
        assert!(stage.api.times("restart", &all[1].0.delay_id).iter().any(|at| *at <= first));
        eprintln!(
            "R5, round {round}: stopped {stops} ms after the departure (reported: {was_reported}), back {returns} ms later, the other \
             departure reported {reported:?} after the stop"
        );
        for (person, session) in &all {
            let gone = stage.leave(session);
            stage.wait_sent(person, gone, TIMEOUT);
        }
    });
}

/// R6: one after the other is stopped, as in a rolling deploy, while tokens are asked for and people come and go.
#[test]
fn a_rolling_deploy_moves_the_watch_and_refuses_nothing() {
    let Some(mut stage) = Stage::start(3) else { return };
    let people = crowd(&stage, length::people(40, 300), SHORT);
    let mut given = 0;
    for at in 0..3 {
        stage.add(|setup| setup);
        // Nodes that have just started are given nothing while others are settled.
        let was_watcher = stage.wait_one_watcher() == at;
        let leaving = stage.nodes[at].take().expect("a node");
        let restarts = stage.api.restarts();
        leaving.signal("TERM");
        let mut asked = 0;
        let began = Instant::now();
        while leaving.exit_status().is_none() {
            let (person, session) = stage.arrive(SHORT);
            let body = bodies::get_token_of(&stage.home, &person.user, &person.room);
            assert_eq!(stage.next().post("/get_token", &body).status, 200);
            // Those that still come to the old one.
            if let Ok(connection) = crate::support::client::Connection::open(leaving.address()).as_mut() {
                let call = Call::new("GET", "/healthz");
                connection.send(&call.bytes(leaving.address()));
                assert!(connection.answer().is_none_or(|answer| answer.status == 200));
            }
            asked += 1;
            stage.leave(&session);
            assert!(began.elapsed() < TIMEOUT, "it does not end:\n{}", leaving.log());
        }
        leaving.wait_exit(TIMEOUT);
        let log = leaving.log();
        assert!(!log.contains("event=watch_not_handed_over"), "{log}");
        assert!(!log.contains("not every delayed event"), "{log}");
        given += usize::from(was_watcher);
        eprintln!(
            "R6: stopped after {:?}, {asked} came and went meanwhile, it watched: {was_watcher}",
            began.elapsed()
        );
        let _ = restarts;
        stage.wait_one_watcher();
    }
    assert!(given >= 1);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
}

/// R9: the watcher's way to Redis is frozen, cut, or passed in one direction only.
#[test]
fn a_watcher_without_redis_goes_on_and_yields_when_it_is_back() {
    let Some(stage) = Stage::start(3) else { return };
    let people = crowd(&stage, 12, SHORT);
    for way in [Way::Frozen, Way::Cut, Way::Unanswered] {
        let (began, watcher) = (Instant::now(), stage.wait_one_watcher());
        stage.links[watcher].set(way);
        let next = stage.wait_other_watcher(watcher, TIMEOUT);
        let took = began.elapsed();
        // From here on both restart; `simulation` counts how often, to the call.
        if length::is_full() {
            std::thread::sleep(KNOWN);
            let (both_since, before) = (Instant::now(), stage.api.restarts());
            std::thread::sleep(Duration::from_secs(60));
            let both = stage.api.restarts() - before;
            // At half of the delay, up to a tenth of it earlier.
            let usual = both_since.elapsed().as_secs_f64() / 8.55 * 12.0;
            eprintln!("R9, {way:?}: {:.2} times the usual restarts while two work", both as f64 / usual);
            // All are restarted at once: give or take a round.
            assert!(both as f64 <= 1.7 * usual + 12.0, "{both} restarts, {usual:.0} are usual");
        }
        assert_eq!(stage.nodes[watcher].as_ref().expect("a node").get("/readyz").status, 200);
        // Somebody delegates to it, and leaves.
        let guest = stage.person(SHORT);
        assert_eq!(stage.delegate_at(stage.nodes[watcher].as_ref().expect("a node"), &guest), 200);
        let session = stage.sfu.join(&guest.alias, &guest.identity);
        std::thread::sleep(Duration::from_secs(3));
        stage.links[watcher].set(Way::Open);
        let healed = Instant::now();
        wait_until("exactly one watcher", TIMEOUT, || stage.watcher() == Some(next));
        let one = healed.elapsed();
        wait_until("no guests", TIMEOUT, || {
            readyz(stage.nodes[watcher].as_ref().expect("a node"))["guests"] == 0
        });
        stage.tell(&webhook::joined(&session));
        let gone = stage.leave(&session);
        stage.wait_sent(&guest, gone, TIMEOUT);
        eprintln!("R9, {way:?}: taken over after {took:?}, one watcher {one:?} after healing");
        assert!(one <= within(Duration::from_secs(3), healed), "{one:?}");
    }
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
}

/// R9b: the watcher reaches Redis, but not the SFU, or not the homeserver; the others do.
#[test]
fn a_watcher_that_cannot_work_gives_the_watch_away() {
    let Some(stage) = Stage::start(3) else { return };
    let people = crowd(&stage, 8, SHORT);
    let mut gave = HashSet::new();
    for (link, way) in [(&stage.sfu_links, Way::Cut), (&stage.home_links, Way::Cut)] {
        let watcher = stage.wait_one_watcher();
        // Once a minute at most: a machine that stands still for seconds may have moved the watch back.
        if !gave.insert(watcher) {
            eprintln!("R9b: left out, since this one has given the watch away just before");
            continue;
        }
        let epoch = stage.epoch();
        let cut = Instant::now();
        link[watcher].set(way);
        let next = stage.wait_other_watcher(watcher, TIMEOUT * 2);
        let took = cut.elapsed();
        eprintln!("R9b: given away after {took:?}");
        // The SFU is silent for 10 s, or the next restart fails, which is due within half of the delay.
        assert!(took <= within(Duration::from_secs(16), cut), "{took:?}");
        let after = Instant::now();
        stage.wait_restarted(&people, after);
        stage.assert_there(&people);
        // A machine that stands still for seconds moves the watch.
        assert!(stage.epoch() > epoch + 1 || stage.wait_one_watcher() == next);
        link[watcher].set(Way::Open);
        stage.assert_there(&people);
    }
}

/// R11: Redis loses everything, then the watcher dies.
#[test]
fn an_emptied_redis_is_filled_again_and_nothing_is_lost() {
    let Some(mut stage) = Stage::start(3) else { return };
    let people = crowd(&stage, 30, SHORT);
    let watcher = stage.wait_one_watcher();
    assert_eq!(stage.redis.ask(&["FLUSHALL"]), "+OK\r\n");
    let flushed = Instant::now();
    wait_until("the records to be back", TIMEOUT, || stage.records() == people.len());
    let took = flushed.elapsed();
    eprintln!("R11: all records back after {took:?}");
    assert!(took <= within(Duration::from_secs(12), flushed), "{took:?}");
    assert_eq!(stage.wait_one_watcher(), watcher);
    stage.kill(watcher);
    stage.wait_other_watcher(watcher, TIMEOUT);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
    let gone = stage.leave(&people[3].1);
    stage.wait_sent(&people[3].0, gone, TIMEOUT);
}

/// While Redis is away every delegation is taken, and watched as a guest's; it is handed over when Redis is back.
#[test]
fn delegations_are_taken_while_redis_is_away() {
    let Some(mut stage) = Stage::start(2) else { return };
    let server = stage.server();
    stage.redis.kill();
    let mut people = Vec::new();
    for at in [server, 1 - server] {
        let person = stage.person(SHORT);
        let asked = Instant::now();
        assert_eq!(stage.delegate_at(stage.nodes[at].as_ref().expect("a node"), &person), 200);
        assert!(asked.elapsed() <= within(Duration::from_secs(4), asked), "{:?}", asked.elapsed());
        let session = stage.sfu.join(&person.alias, &person.identity);
        people.push((person, session));
    }
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.redis.start_again();
    wait_until("both records to be written", TIMEOUT, || stage.records() == 2);
    stage.wait_no_guests();
    let watcher = stage.wait_one_watcher();
    // The server can go: its delegation is the watcher's by now.
    stage.kill(1 - watcher);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
}

/// Somebody's bound holds whoever is asked.
#[test]
fn a_user_at_their_bound_is_refused_everywhere() {
    let Some(stage) = Stage::start(2) else { return };
    let first = stage.person(HOUR);
    let mut refused = false;
    for n in 0..130 {
        let mut person = stage.person(HOUR);
        person.user = first.user.clone();
        let status = stage.delegate_at(stage.next(), &person);
        assert!(matches!(status, 200 | 429), "{n}: {status}");
        refused |= status == 429;
        assert!(status == 200 || n >= 100, "refused at {n}");
        if n >= 100 {
            // What overshoots within a beat is taken.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    assert!(refused, "{} records", stage.records());
}

/// Replicas that serve another SFU wait, and say so.
#[test]
fn a_replica_for_another_sfu_waits_and_says_so() {
    let Some(mut stage) = Stage::start(2) else { return };
    let people = crowd(&stage, 3, SHORT);
    let other = Sfu::start();
    let waits = stage.add(|setup| setup.env("LIVEKIT_URL", &other.url()));
    let node = stage.nodes[waits].as_ref().expect("a node");
    node.wait_event("other_sfu_on_this_redis");
    assert_eq!(readyz(node)["watches"], false);
    // Strangers learn nothing of the replicas.
    let forwarded = node
        .call(&Call::new("GET", "/readyz").header("X-Forwarded-For", "203.0.113.7"))
        .json();
    assert_eq!(
        (&forwarded["ready"], forwarded.get("watches"), forwarded.get("nodes")),
        (&json!(true), None, None)
    );
    let watcher = stage.nodes[stage.wait_one_watcher()].as_ref().expect("a node");
    wait_until("the watcher to know of it", TIMEOUT, || {
        readyz(watcher)["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3)
    });
    for asked in [node, watcher] {
        let found = doctor(asked, &stage.sfu);
        assert_eq!(found["fleet-nodes"]["id"], "fleet-differs", "{found:?}");
        assert_eq!(found["fleet"]["result"], "ok", "{found:?}");
    }
    stage.assert_there(&people);
}

/// R12, with an instance of ours that shares nothing: from one to several and back, while people are there.
#[test]
fn a_rolling_update_from_one_instance_and_back_loses_nothing() {
    let Some(mut stage) = Stage::start(0) else { return };
    let old = stage.add(|setup| setup.unset("LIVEKIT_REDIS_SHARED"));
    let people = crowd(&stage, 10, SHORT);
    stage.add(|setup| setup);
    stage.add(|setup| setup);
    stage.wait_one_watcher();
    stop(&mut stage, old);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
    let gone = stage.leave(&people[0].1);
    stage.wait_sent(&people[0].0, gone, TIMEOUT);
    // Back again.
    let people = people[1..].to_vec();
    stage.add(|setup| setup.unset("LIVEKIT_REDIS_SHARED"));
    stop(&mut stage, 1);
    stop(&mut stage, 2);
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.assert_there(&people);
    let gone = stage.leave(&people[0].1);
    stage.wait_sent(&people[0].0, gone, TIMEOUT);
}

pub(super) fn stop(stage: &mut Stage, at: usize) {
    let node = stage.nodes[at].take().expect("a node");
    node.signal("TERM");
    node.wait_exit(TIMEOUT);
}

/// What charts for several replicas set is enough beside a Redis with the rights; without them an exchanged image starts as one that is
/// alone, and says why.
#[test]
fn the_variable_of_charts_shares_where_redis_allows_it() {
    let Some(mut stage) = Stage::start(0) else { return };
    let of_a_chart = |setup: Setup| setup.unset("LIVEKIT_REDIS_SHARED").env("LIVEKIT_JWT_REPLICA_IP", "10.42.0.17");
    stage.add(of_a_chart);
    stage.add(of_a_chart);
    stage.wait_one_watcher();
    let node = stage.nodes[1].as_ref().expect("a node");
    wait_until("both nodes to be up", TIMEOUT, || up(node) == 2);
    let own = RedisServer::start(&[]).expect("Redis");
    let rights = ["+hset", "+hdel", "+hscan", "+ping"];
    let user = [&["ACL", "SETUSER", "lk", "on", ">secret", "~lk-jwt:*"][..], &rights].concat();
    assert_eq!(own.ask(&user), "+OK\r\n");
    let alone = stage.add(|setup| of_a_chart(setup).env("LIVEKIT_REDIS_URL", &format!("redis://lk:secret@{}", own.address())));
    let node = stage.nodes[alone].as_ref().expect("a node");
    let line = node.wait_line(&[("event", "not_shared"), ("level", "ERROR")]);
    line.says(&["TIME was refused (NOPERM)", "+evalsha", "LIVEKIT_JWT_REPLICA_IP"]);
    assert_eq!(stage.delegate_at(node, &stage.person(HOUR)), 200);
    wait_until("the record to be written", TIMEOUT, || {
        own.ask(&["HLEN", "lk-jwt:jobs"]) == ":1\r\n"
    });
}

/// R14: what is not shared sends the same few commands as ever.
#[test]
fn without_sharing_redis_sees_the_commands_of_before() {
    let Some(redis) = RedisServer::start(&[]) else {
        return;
    };
    let scene = crate::support::scene::Scene::with(|setup| setup.env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address())));
    scene.delegate(HOUR);
    let session = scene.joined();
    scene.leave(&session, "CLIENT_INITIATED");
    scene.wait_sent(TIMEOUT);
    wait_until("the record to be removed", TIMEOUT, || {
        redis.ask(&["HLEN", "lk-jwt:jobs"]) == ":0\r\n"
    });
    let statistics = redis.ask(&["INFO", "commandstats"]);
    let commands = statistics.lines().filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(':'));
    let mut commands: Vec<_> = commands
        .map(|(command, _)| command)
        .filter(|command| !["info", "hlen"].contains(command))
        .collect();
    commands.sort_unstable();
    assert_eq!(commands, ["hdel", "hscan", "hset", "ping"]);
}
