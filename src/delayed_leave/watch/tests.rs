use super::*;

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn settle(watch: &mut Watch, now: Time) -> Vec<Wanted> {
    let mut wanted = Vec::new();
    watch.settle(now, &mut wanted);
    wanted
}

fn watching() -> Watch {
    let mut watch = Watch::new(Some(30_000), at(0));
    watch.need(true, at(0));
    assert_eq!(settle(&mut watch, at(0)), [Wanted::Probe]);
    watch.probed(Reach::Answered, at(5));
    assert_eq!(settle(&mut watch, at(5)), []);
    watch
}

#[test]
fn calm_it_asks_every_second_and_for_all_rooms_every_thirty() {
    let mut watch = watching();
    let (mut probes, mut lists) = (0, 0);
    while let Some(next) = watch.next_deadline().filter(|&next| next <= at(60_500)) {
        for wanted in settle(&mut watch, next) {
            match wanted {
                Wanted::Probe => {
                    probes += 1;
                    watch.probed(Reach::Answered, next.after(3));
                }
                Wanted::ListRooms => lists += 1,
                Wanted::Warn(_) | Wanted::Tell(_) => panic!("{wanted:?}"),
            }
        }
    }
    assert_eq!((probes, lists), (60, 2));
}

#[test]
fn closed_it_hunts_every_100_ms_for_a_minute_then_every_second_one_question_at_a_time() {
    let mut watch = watching();
    watch.closed(at(500));
    assert_eq!(settle(&mut watch, at(500)), [Wanted::Tell(Sfu::Failing), Wanted::Probe]);
    assert_eq!(watch.next_deadline(), Some(at(600_005)), "one at a time");
    let mut probes = Vec::new();
    watch.probed(Reach::Unreachable, at(501));
    while let Some(next) = watch.next_deadline().filter(|&next| next <= at(70_000)) {
        assert_eq!(settle(&mut watch, next), [Wanted::Probe]);
        probes.push(next);
        watch.probed(Reach::Unreachable, next.after(1));
    }
    assert_eq!(probes[0], at(600));
    assert_eq!(probes.iter().filter(|&&probe| probe <= at(60_500)).count(), 600);
    assert!((8..=10).contains(&probes.iter().filter(|&&probe| probe > at(60_500)).count()));
    watch.probed(Reach::Answered, at(70_001));
    assert_eq!(settle(&mut watch, at(70_001)), [Wanted::Tell(Sfu::Answering), Wanted::ListRooms]);
}

#[test]
fn any_answer_ends_the_hunt_and_a_failed_call_begins_it() {
    let mut watch = watching();
    watch.called(Reach::Unreachable, at(100));
    assert_eq!(settle(&mut watch, at(100)), [Wanted::Tell(Sfu::Failing), Wanted::Probe]);
    watch.called(Reach::Answered, at(110));
    assert_eq!(settle(&mut watch, at(110)), [Wanted::Tell(Sfu::Answering), Wanted::ListRooms]);
    assert_eq!(watch.trouble(), Some(at(100)));
}

#[test]
fn silence_is_ten_minutes_after_the_last_answer_or_webhook_and_warned_of_each_minute() {
    let mut watch = watching();
    watch.closed(at(1_000));
    watch.heard(at(200_000));
    let mut warned = Vec::new();
    while let Some(next) = watch.next_deadline().filter(|&next| next <= at(1_000_000)) {
        for wanted in settle(&mut watch, next) {
            match wanted {
                Wanted::Probe => watch.probed(Reach::Unreachable, next.after(1)),
                Wanted::Warn(_) => warned.push(next),
                Wanted::Tell(_) | Wanted::ListRooms => {}
            }
        }
    }
    assert_eq!(warned.first(), Some(&at(800_000)));
    assert_eq!(warned.len(), 4);
    assert_eq!(watch.sfu(), Sfu::Silent);
    watch.heard(at(1_000_001));
    assert_eq!(
        settle(&mut watch, at(1_000_001)).first(),
        Some(&Wanted::Tell(Sfu::Failing)),
        "restarts go on"
    );
}

#[test]
fn an_sfu_that_never_answered_is_silent_after_an_hour_and_a_quiet_one_never() {
    let mut watch = Watch::new(None, at(0));
    watch.need(true, at(0));
    assert_eq!(watch.next_deadline(), None, "switched off, and nothing went unanswered");
    watch.called(Reach::TimedOut, at(10));
    assert_eq!(watch.next_deadline(), Some(at(3_600_000)));
    watch.called(Reach::Answered, at(20));
    assert_eq!(watch.next_deadline(), None);
}

#[test]
fn nobody_to_watch_nothing_to_ask() {
    let mut watch = watching();
    watch.need(false, at(10));
    assert_eq!(watch.next_deadline(), None);
    watch.closed(at(20));
    assert_eq!(settle(&mut watch, at(20)), [Wanted::Tell(Sfu::Failing)]);
    watch.need(true, at(30));
    assert_eq!(settle(&mut watch, at(30)), [Wanted::Probe]);
}
