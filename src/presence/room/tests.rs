use super::*;

fn at(millis: u64) -> Time {
    Time::START.after(millis)
}

fn row(sid: &str, num_participants: u32) -> RoomRow<'_> {
    RoomRow {
        name: "room",
        sid,
        num_participants,
        departure_timeout: 20,
    }
}

fn empty() -> Room {
    let mut room = Room::new("room".into(), at(0));
    room.swept = 1;
    room
}

/// A room with somebody in it, known to stand as A, somebody sighted at 0.
fn standing() -> (Room, Arc<str>) {
    let mut room = empty();
    assert_eq!(room.on_event("A", Some(at(0)), Some(at(0)), None, at(0)), News::Same);
    let sid = room.intern("A");
    (room, sid)
}

#[test]
fn missing_soon_after_a_sighting_or_after_trouble_is_lost_else_closed() {
    for (asked, trouble, status) in [
        (12_999, None, RoomStatus::Lost),
        (13_000, None, RoomStatus::Closed),
        (60_000, Some(at(50_000)), RoomStatus::Lost),
        (60_000, Some(at(1)), RoomStatus::Lost),
    ] {
        let (mut room, sid) = standing();
        assert_eq!(room.on_listed(None, at(asked), trouble, at(asked)), News::Changed);
        assert_eq!(room.status(Some(&sid), Some(at(0)), trouble), status, "{asked} {trouble:?}");
    }
}

/// Without webhooks the sid of a room that ends before its first list is never learnt.
#[test]
fn a_room_whose_sid_was_never_learnt_is_judged_alike() {
    for (asked, trouble, status) in [
        (12_999, None, RoomStatus::Lost),
        (28_000, None, RoomStatus::Closed),
        (28_000, Some(at(20_000)), RoomStatus::Lost),
    ] {
        let mut room = empty();
        room.on_sighting(Some(at(0)));
        assert_eq!(room.on_listed(None, at(asked), trouble, at(asked)), News::Changed);
        assert_eq!(room.status(None, Some(at(0)), trouble), status, "{asked} {trouble:?}");
    }
}

#[test]
fn trouble_from_before_it_last_stood_says_nothing() {
    let (mut room, sid) = standing();
    let trouble = Some(at(20_000));
    assert_eq!(room.on_listed(Some(&row("A", 0)), at(30_000), trouble, at(30_001)), News::Empty);
    assert_eq!(room.on_listed(None, at(60_000), trouble, at(60_001)), News::Changed);
    assert_eq!(room.status(Some(&sid), Some(at(0)), trouble), RoomStatus::Closed);
}

#[test]
fn another_sid_is_judged_like_a_missing_room_and_the_new_one_stands() {
    let (mut room, sid) = standing();
    assert_eq!(room.on_listed(Some(&row("B", 1)), at(5_000), None, at(5_001)), News::Changed);
    assert_eq!(room.status(Some(&sid), Some(at(0)), None), RoomStatus::Lost);
    let new = room.intern("B");
    assert_eq!(room.status(Some(&new), Some(at(5_000)), None), RoomStatus::Open);
    assert!(room.is_past("A"), "a late event of the old room is known as such");
    assert!(!room.is_past("B"));
}

#[test]
fn finished_is_closed_however_recent_and_not_created_again() {
    let (mut room, sid) = standing();
    assert_eq!(room.on_finished("other", at(1_000)), News::Same);
    assert_eq!(room.on_finished("A", at(1_000)), News::Changed);
    assert_eq!(room.status(Some(&sid), Some(at(0)), None), RoomStatus::Closed);
    assert_eq!(room.on_listed(None, at(2_000), None, at(2_000)), News::Same);
    assert!(!room.settle(at(2_000)).create);
}

#[test]
fn missing_it_is_created_at_once_and_again_until_it_stands() {
    let (mut room, _) = standing();
    let mut jitter = Jitter::new(1);
    assert_eq!(room.on_listed(None, at(100), None, at(105)), News::Changed);
    assert!(room.settle(at(105)).create);
    assert!(!room.settle(at(106)).create, "one call at a time");
    assert_eq!(room.on_created(None, None, at(200), &mut jitter), News::Same);
    assert!(room.settle(at(600)).create);
    assert_eq!(room.on_created(Some(&row("B", 0)), None, at(700), &mut jitter), News::Same);
    assert!(!room.settle(at(90_000)).create);
    let (mut room, _) = standing();
    room.swept = 0;
    assert_eq!(room.on_listed(None, at(100), None, at(105)), News::Changed);
    assert!(!room.settle(at(105)).create, "nobody is there for whose sake it would be");
}

#[test]
fn a_question_from_before_the_room_or_its_sid_was_known_judges_nothing() {
    let mut room = Room::new("room".into(), at(1_000));
    room.swept = 1;
    assert_eq!(room.on_listed(None, at(999), None, at(1_005)), News::Same);
    assert_eq!(room.on_event("A", Some(at(2_000)), Some(at(2_000)), None, at(2_000)), News::Same);
    assert_eq!(room.on_listed(None, at(1_500), None, at(2_005)), News::Same);
    assert_eq!(room.sid.as_deref(), Some("A"));
    // Whoever waits for an answer gets one to a later question.
    room.want_check(at(3_000));
    assert_eq!(room.on_listed(Some(&row("A", 1)), at(2_999), None, at(3_005)), News::Same);
    assert!(room.settle(at(3_005)).check);
}

#[test]
fn what_the_store_remembers_is_lost_when_it_does_not_stand() {
    let mut room = empty();
    let sid: Arc<str> = "A".into();
    room.restore(Some(&sid), Some(at(0)), false, at(0));
    let asked = at(9_000_000);
    assert_eq!(room.on_listed(Some(&row("B", 0)), asked, None, asked), News::Changed);
    assert_eq!(room.status(Some(&sid), Some(at(0)), None), RoomStatus::Lost);
}

#[test]
fn sweeps_are_anywhere_in_the_interval_first_and_keep_their_distance_then() {
    let mut room = empty();
    room.plan_sweep(at(7), at(30));
    assert_eq!(room.next_deadline(), Some(at(7)));
    assert!(room.settle(at(7)).sweep);
    room.plan_sweep(at(8), at(37));
    assert_eq!(room.next_deadline(), Some(at(37)));
    room.sweep_soon(at(10));
    assert!(room.settle(at(10)).sweep);
    room.plan_sweep(at(23), at(40));
    assert_eq!(room.next_deadline(), Some(at(23)), "one out of turn is no place in the interval");
}

#[test]
fn three_former_sids_are_remembered() {
    let mut room = empty();
    for (n, sid) in ["A", "B", "C", "D", "E"].into_iter().enumerate() {
        let _ = room.on_event(sid, Some(at(n as u64)), None, None, at(n as u64));
    }
    assert_eq!(
        ["A", "B", "C", "D", "E"].map(|sid| room.is_past(sid)),
        [false, true, true, true, false]
    );
}

#[test]
fn a_room_that_is_shown_again_is_no_former_one() {
    let mut room = empty();
    let _ = room.on_event("B", Some(at(0)), None, None, at(0));
    // An event of a room before it comes late.
    let _ = room.on_event("A", Some(at(0)), None, None, at(1_000));
    assert!(room.is_past("B"));
    let _ = room.on_listed(Some(&row("B", 1)), at(30_000), None, at(30_001));
    assert!(!room.is_past("B"), "what it tells counts again");
    assert!(room.is_past("A"));
}
