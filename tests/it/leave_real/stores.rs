//! Jobs that outlive the service: a real Redis, and a file.

use std::sync::Arc;
use std::time::Duration;

use super::clients::{joins_and_is_watched, leaves_within_two_seconds};
use super::clock::{lateness_since, now_ms, sleep_s, sleep_until};
use super::stage::{Caller, Delayed, Plan, Stage};
use super::steered::{Browser, Party};
use super::takes::{self, Void, stands_again, wait_back};
use crate::support::process::{directory, real_neighbours, say};
use crate::support::redis::RedisServer;
use crate::support::wait_until;

fn redis() -> RedisServer {
    RedisServer::start(&[]).expect("redis-server, or these tests are left out")
}

fn with(redis: &RedisServer) -> Plan {
    Plan::default().env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address()))
}

/// The records that it holds.
fn records(redis: &RedisServer) -> String {
    let script = r"return table.concat(redis.call('HVALS', KEYS[1]), '\n')";
    redis.ask(&["EVAL", script, "1", "lk-jwt:jobs"])
}

/// How many jobs it holds.
fn jobs(redis: &RedisServer) -> usize {
    let answer = redis.ask(&["HLEN", "lk-jwt:jobs"]);
    let number = answer.strip_prefix(':').and_then(|n| n.trim_end().parse().ok());
    number.unwrap_or_else(|| panic!("HLEN: {answer:?}"))
}

/// A browser and a Python client come back, another client does not.
#[test]
fn service_and_sfu_killed_together_with_redis() {
    if !real_neighbours() {
        return;
    }
    takes::play(service_and_sfu_are_killed_together);
}

fn service_and_sfu_are_killed_together() -> Result<(), Void> {
    const DELAY: u64 = 20;
    let redis = redis();
    let stage = Arc::new(Stage::new(with(&redis)));
    let (browser, party, lost) = (Browser::shared(), Party::start(), Party::start());
    let tab = browser.open();
    let [in_browser, in_python, killed] = ["togetherbrowser", "togetherpython", "togetherkilled"].map(|name| stage.caller(name));
    let of_browser = in_browser.schedule(DELAY);
    joins_and_is_watched(&in_browser, &of_browser, |answer| tab.join(answer));
    let of_python = in_python.schedule(DELAY);
    joins_and_is_watched(&in_python, &of_python, |answer| party.join("python", answer));
    let of_killed = killed.schedule(DELAY);
    joins_and_is_watched(&killed, &of_killed, |answer| lost.join("killed", answer));
    assert_eq!(jobs(&redis), 3);
    // Not together with the others.
    sleep_s(6.0);

    let began = now_ms();
    stage.livekit.kill();
    stage.kill_service();
    lost.kill();
    sleep_until(began + 3000);
    stage.livekit.start();
    stage.start_service();
    let back = now_ms();
    for caller in [&in_browser, &in_python, &killed] {
        stands_again(caller, back, 500);
    }
    if let Err(void) = wait_back(&in_browser, &tab, began) {
        tab.close();
        return Err(void);
    }
    in_python.wait_notice("participant_joined", back - 1000, Duration::from_secs(45));
    say(&format!(
        "service and SFU killed together: both clients were back {:.1} s after them",
        (now_ms() - back) as f64 / 1000.0
    ));
    let sent = killed.wait_sent(&of_killed, Duration::from_secs(90));
    say(&format!(
        "service and SFU killed together: the one who did not come back was reported {:.1} s after them",
        (sent - back) as f64 / 1000.0
    ));
    sleep_until(sent.max(back + (DELAY + 10) * 1000));
    in_browser.assert_there(&of_browser);
    in_python.assert_there(&of_python);
    tab.wait_connected();
    says_goodbye(&in_browser, &of_browser, || tab.leave());
    says_goodbye(&in_python, &of_python, || party.leave("python"));
    wait_until("Redis to be empty", Duration::from_secs(5), || jobs(&redis) == 0);
    Ok(())
}

#[track_caller]
fn says_goodbye(caller: &Caller, delayed: &Delayed, leave: impl FnOnce()) {
    let gone = now_ms();
    leave();
    let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
    leaves_within_two_seconds(caller, delayed, &notice);
}

#[test]
fn the_service_is_killed_between_the_steps_with_redis() {
    if !real_neighbours() {
        return;
    }
    let redis = redis();
    killed_between_the_steps("redis", with(&redis));
    wait_until("Redis to be empty", Duration::from_secs(5), || jobs(&redis) == 0);
}

#[test]
fn the_service_is_killed_between_the_steps_with_a_file() {
    if !real_neighbours() {
        return;
    }
    let file = directory("state").join("jobs");
    killed_between_the_steps("file", Plan::default().env("LIVEKIT_STATE_PATH", &file.to_string_lossy()));
}

/// kill -9 between delegation and join, between join and leave, and between the SFU's word and the leave.
fn killed_between_the_steps(store: &str, plan: Plan) {
    let (stage, party) = (Arc::new(Stage::new(plan)), Party::start());
    let [early, late, inside] = ["early", "late", "inside"].map(|name| stage.caller(&format!("{store}{name}")));
    let of_inside = inside.schedule(15);
    joins_and_is_watched(&inside, &of_inside, |answer| party.join("inside", answer));
    let (of_early, of_late) = (early.schedule(15), late.schedule(15));
    let (for_early, for_late) = (early.token(Some(&of_early)), late.token(Some(&of_late)));

    // Between delegation and join: one joins while it is down, one after.
    stage.kill_service();
    party.join("early", &for_early);
    sleep_s(1.0);
    let back = now_ms();
    stage.start_service();
    party.join("late", &for_late);
    for (caller, delayed) in [(&early, &of_early), (&late, &of_late), (&inside, &of_inside)] {
        caller.wait_restarted(delayed, back, Duration::from_secs(10));
    }

    // Between join and leave: one leaves while it is down.
    stage.kill_service();
    party.leave("inside");
    sleep_s(1.0);
    let back = now_ms();
    stage.start_service();
    let sent = inside.wait_sent(&of_inside, Duration::from_secs(14));
    say(&format!(
        "{store}: left while it was down, the leave was asked for {} ms after its start",
        sent - back
    ));

    // Between the SFU's word and the leave.
    let gone = now_ms();
    party.leave("late");
    late.wait_notice("participant_left", gone, Duration::from_secs(5));
    sleep_s(0.5);
    stage.kill_service();
    assert!(stage.calls.of(&of_late, "send").is_empty(), "this machine is too slow");
    sleep_s(0.5);
    let back = now_ms();
    stage.start_service();
    let sent = late.wait_sent(&of_late, Duration::from_secs(14));
    say(&format!(
        "{store}: killed after the SFU's word, the leave was asked for {} ms after its start",
        sent - back
    ));

    // And as ever.
    early.wait_restarted(&of_early, back, Duration::from_secs(10));
    early.assert_there(&of_early);
    says_goodbye(&early, &of_early, || party.leave("early"));
}

/// SIGSTOP: its connections stay open, and nothing is answered.
#[test]
fn redis_stopped_for_30_s() {
    if !real_neighbours() {
        return;
    }
    const DELAY: u64 = 15;
    let redis = redis();
    let stage = Arc::new(Stage::new(with(&redis)));
    let party = Party::start();
    let [leaves, stays, comes_and_goes, comes] =
        ["leaves", "stays", "comesandgoes", "comes"].map(|name| stage.caller(&format!("redisstop{name}")));
    let of_leaves = leaves.schedule(DELAY);
    joins_and_is_watched(&leaves, &of_leaves, |answer| party.join("leaves", answer));
    let of_stays = stays.schedule(DELAY);
    joins_and_is_watched(&stays, &of_stays, |answer| party.join("stays", answer));
    wait_until("both jobs in Redis", Duration::from_secs(5), || jobs(&redis) == 2);

    let stopped = now_ms();
    redis.freeze();
    sleep_s(1.0);
    says_goodbye(&leaves, &of_leaves, || party.leave("leaves"));
    let of_comes_and_goes = comes_and_goes.schedule(DELAY);
    joins_and_is_watched(&comes_and_goes, &of_comes_and_goes, |answer| {
        // The room is created right before the job is to be stored.
        let room = comes_and_goes.alias();
        let created = stage.notices.wait("room_started", Duration::from_secs(5), |n| {
            n.event == "room_started" && n.room == room
        });
        let took = now_ms() - created.at;
        let late = lateness_since(created.at);
        say(&format!(
            "a delegation while Redis is stopped waited {took} ms for it; the machine was late by {late} ms"
        ));
        assert!(took < 3500 + late, "{took} ms");
        party.join("comesandgoes", answer)
    });
    let of_comes = comes.schedule(DELAY);
    joins_and_is_watched(&comes, &of_comes, |answer| party.join("comes", answer));
    sleep_s(2.0);
    says_goodbye(&comes_and_goes, &of_comes_and_goes, || party.leave("comesandgoes"));
    sleep_until(stopped + 30_000);
    redis.thaw();

    for (caller, delayed) in [(&stays, &of_stays), (&comes, &of_comes)] {
        caller.assert_there(delayed);
        let restarts = stage.calls.of(delayed, "restart");
        let at: Vec<_> = std::iter::once(delayed.at).chain(restarts.iter().map(|c| c.at)).collect();
        let longest = at.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
        say(&format!(
            "{}: longest time between two restarts while Redis was stopped: {longest} ms",
            caller.name
        ));
        assert!(longest <= DELAY * 1000 * 8 / 10, "{}: a restart was late: {at:?}", caller.name);
    }
    let thawed = now_ms();
    wait_until("what happened meanwhile to be in Redis", Duration::from_secs(15), || {
        let records = records(&redis);
        let there = |delayed: &Delayed| records.contains(&delayed.id);
        [there(&of_stays), there(&of_comes), there(&of_leaves), there(&of_comes_and_goes)] == [true, true, false, false]
    });
    say(&format!("Redis was whole {} ms after it went on", now_ms() - thawed));

    // Whole: what it holds is enough for the next life.
    stage.kill_service();
    let back = now_ms();
    stage.start_service();
    for (who, caller, delayed) in [("stays", &stays, &of_stays), ("comes", &comes, &of_comes)] {
        caller.wait_restarted(delayed, back, Duration::from_secs(10));
        caller.assert_there(delayed);
        says_goodbye(caller, delayed, || party.leave(who));
    }
    wait_until("Redis to be empty", Duration::from_secs(5), || jobs(&redis) == 0);
}
