use super::*;

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn settle(health: &mut SfuHealth, now: Time) -> Vec<Due> {
    let mut due = Vec::new();
    health.settle(now, &mut due);
    due
}

fn watching() -> SfuHealth {
    let mut health = SfuHealth::new(Some(30_000), at(0));
    health.need(true, at(0));
    assert_eq!(settle(&mut health, at(0)), [Due::Probe]);
    health.on_probe(Reach::Answered, at(5));
    assert_eq!(settle(&mut health, at(5)), []);
    health
}

/// Lets time pass until then, each probe ending so; what was due, and when.
fn run(health: &mut SfuHealth, reach: Reach, until: u64) -> Vec<(Time, Due)> {
    let mut all = Vec::new();
    while let Some(next) = health.next_deadline().filter(|&next| next <= at(until)) {
        for due in settle(health, next) {
            if due == Due::Probe {
                health.on_probe(reach, next.after(1));
            }
            all.push((next, due));
        }
    }
    all
}

fn times(all: &[(Time, Due)], wanted: Due) -> Vec<Time> {
    all.iter().filter(|(_, due)| *due == wanted).map(|(at, _)| *at).collect()
}

#[test]
fn calm_it_asks_every_second_and_for_all_rooms_every_thirty() {
    let mut health = watching();
    let all = run(&mut health, Reach::Answered, 60_500);
    let (probes, lists) = (times(&all, Due::Probe).len(), times(&all, Due::ListRooms).len());
    assert_eq!((probes, lists, all.len()), (60, 2, 62));
}

#[test]
fn closed_it_asks_every_100_ms_for_a_minute_then_every_second_one_question_at_a_time() {
    let mut health = watching();
    health.on_closed(at(500));
    assert_eq!(settle(&mut health, at(500)), [Due::Answering, Due::Probe]);
    assert!(!health.is_answering());
    assert_eq!(health.next_deadline(), Some(at(600_005)), "one at a time");
    health.on_probe(Reach::Unreachable, at(501));
    let probes = times(&run(&mut health, Reach::Unreachable, 70_000), Due::Probe);
    assert_eq!(probes[0], at(600));
    assert_eq!(probes.iter().filter(|&&probe| probe <= at(60_500)).count(), 600);
    assert!((8..=10).contains(&probes.iter().filter(|&&probe| probe > at(60_500)).count()));
    health.on_probe(Reach::Answered, at(70_001));
    assert_eq!(settle(&mut health, at(70_001)), [Due::Answering, Due::ListRooms]);
    assert_eq!(health.answering_ms(at(70_101)), 600, "of an answering SFU");
}

#[test]
fn any_answer_ends_the_trouble_and_a_failed_call_begins_it() {
    let mut health = watching();
    health.on_call(Reach::Unreachable, at(100));
    assert_eq!(settle(&mut health, at(100)), [Due::Answering, Due::Probe]);
    health.on_call(Reach::Answered, at(110));
    assert_eq!(settle(&mut health, at(110)), [Due::Answering, Due::ListRooms]);
    assert_eq!(health.last_trouble(), Some(at(100)));
}

/// A front with one dead backend.
#[test]
fn trouble_that_brings_nothing_new_asks_for_all_rooms_ever_less_often() {
    let mut health = watching();
    let mut lists = Vec::new();
    for n in 1..600 {
        health.on_call(if n % 2 == 0 { Reach::Answered } else { Reach::Unreachable }, at(n * 1_000));
        lists.extend(times(&run(&mut health, Reach::Answered, n * 1_000), Due::ListRooms));
    }
    assert!(lists.len() <= 25, "{lists:?}");
}

#[test]
fn silence_is_ten_minutes_after_the_last_answer_or_webhook_and_warned_of_each_minute() {
    let mut health = watching();
    health.on_closed(at(1_000));
    health.on_webhook(at(200_000));
    let all = run(&mut health, Reach::Unreachable, 1_000_000);
    let warned: Vec<_> = all.iter().filter(|(_, due)| matches!(due, Due::Warn(_))).collect();
    assert_eq!(warned.first(), Some(&&(at(800_000), Due::Warn(600_000))));
    assert_eq!(warned.len(), 4);
    assert_eq!(times(&all, Due::Silent(true)), [at(800_000)]);
    health.on_webhook(at(1_000_001));
    assert!(settle(&mut health, at(1_000_001)).contains(&Due::Silent(false)), "restarts go on");
}

#[test]
fn an_sfu_that_never_answered_is_silent_after_an_hour_and_a_quiet_one_never() {
    let mut health = SfuHealth::new(None, at(0));
    health.need(true, at(0));
    assert_eq!(health.next_deadline(), None, "switched off, and nothing went unanswered");
    health.on_call(Reach::TimedOut, at(10));
    assert_eq!(health.next_deadline(), Some(at(3_600_000)));
    health.on_call(Reach::Answered, at(20));
    assert_eq!(health.next_deadline(), None);
}

#[test]
fn nobody_to_watch_nothing_to_ask() {
    let mut health = watching();
    health.need(false, at(10));
    assert_eq!(health.next_deadline(), None);
    health.on_closed(at(20));
    assert_eq!(settle(&mut health, at(20)), [Due::Answering]);
    health.need(true, at(30));
    assert_eq!(settle(&mut health, at(30)), [Due::Probe]);
}
