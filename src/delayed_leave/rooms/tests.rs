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

/// A room with one connected job, known to stand as A, somebody sighted at 0.
fn standing() -> (Rooms, RoomId, Arc<str>) {
    let mut rooms = Rooms::default();
    let id = rooms.enter("room", at(0));
    rooms.join(id);
    rooms.count(id, false, true, true);
    assert_eq!(rooms.told(id, "A", true, None, at(0), at(0)), News::None);
    let sid = rooms.sid(id).cloned().unwrap_or_else(|| "".into());
    (rooms, id, sid)
}

#[test]
fn missing_soon_after_a_sighting_or_after_trouble_is_lost_else_ended() {
    for (asked, trouble, verdict) in [
        (12_999, None, Verdict::Lost),
        (13_000, None, Verdict::Ended),
        (60_000, Some(at(50_000)), Verdict::Lost),
        (60_000, Some(at(1)), Verdict::Lost),
    ] {
        let (mut rooms, id, sid) = standing();
        assert_eq!(rooms.listed(id, None, at(asked), trouble, at(asked)), News::Judged);
        assert_eq!(rooms.verdict(id, Some(&sid), Some(at(0)), trouble), verdict, "{asked} {trouble:?}");
    }
}

/// Without webhooks the sid of a room that ends before its first list is never learnt.
#[test]
fn a_room_whose_sid_was_never_learnt_is_judged_alike() {
    for (asked, trouble, verdict) in [
        (12_999, None, Verdict::Lost),
        (28_000, None, Verdict::Ended),
        (28_000, Some(at(20_000)), Verdict::Lost),
    ] {
        let mut rooms = Rooms::default();
        let id = rooms.enter("room", at(0));
        rooms.join(id);
        rooms.count(id, false, true, true);
        rooms.sighted(id, at(0));
        assert_eq!(rooms.listed(id, None, at(asked), trouble, at(asked)), News::Judged);
        assert_eq!(rooms.verdict(id, None, Some(at(0)), trouble), verdict, "{asked} {trouble:?}");
    }
}

#[test]
fn trouble_from_before_it_last_stood_says_nothing() {
    let (mut rooms, id, sid) = standing();
    assert_eq!(
        rooms.listed(id, Some(row("A", 0)), at(30_000), Some(at(20_000)), at(30_001)),
        News::Empty
    );
    assert_eq!(rooms.listed(id, None, at(60_000), Some(at(20_000)), at(60_001)), News::Judged);
    assert_eq!(rooms.verdict(id, Some(&sid), Some(at(0)), Some(at(20_000))), Verdict::Ended);
}

#[test]
fn another_sid_is_judged_like_a_missing_room_and_the_new_one_stands() {
    let (mut rooms, id, sid) = standing();
    assert_eq!(rooms.listed(id, Some(row("B", 1)), at(5_000), None, at(5_001)), News::Judged);
    assert_eq!(rooms.verdict(id, Some(&sid), Some(at(0)), None), Verdict::Lost);
    let new = rooms.sid(id).cloned();
    assert_eq!(rooms.verdict(id, new.as_ref(), Some(at(5_000)), None), Verdict::Stands);
    assert_eq!(
        rooms.told(id, "A", true, None, at(5_002), at(5_002)),
        News::None,
        "a late event of the old room"
    );
    assert_eq!(rooms.sid(id), new.as_ref());
}

#[test]
fn finished_is_ended_however_recent_and_not_created_again() {
    let (mut rooms, id, sid) = standing();
    assert_eq!(rooms.finished(id, "other", at(1_000)), News::None);
    assert_eq!(rooms.finished(id, "A", at(1_000)), News::Judged);
    assert_eq!(rooms.verdict(id, Some(&sid), Some(at(0)), None), Verdict::Ended);
    assert_eq!(rooms.listed(id, None, at(2_000), None, at(2_000)), News::None);
    assert!(!rooms.settle(id, at(2_000)).create);
}

#[test]
fn missing_it_is_created_at_once_and_again_until_it_stands() {
    let (mut rooms, id, _) = standing();
    let mut jitter = Jitter::new(1);
    assert_eq!(rooms.listed(id, None, at(100), None, at(105)), News::Judged);
    assert!(rooms.settle(id, at(105)).create);
    assert!(!rooms.settle(id, at(106)).create, "one call at a time");
    assert_eq!(rooms.created(id, None, None, at(200), &mut jitter), News::None);
    assert!(rooms.settle(id, at(600)).create);
    assert_eq!(rooms.created(id, Some(row("B", 0)), None, at(700), &mut jitter), News::None);
    assert!(!rooms.settle(id, at(90_000)).create);
    let (mut rooms, id, _) = standing();
    rooms.count(id, true, false, true);
    assert_eq!(rooms.listed(id, None, at(100), None, at(105)), News::Judged);
    assert!(!rooms.settle(id, at(105)).create, "nobody is there for whose sake it would be");
}

#[test]
fn a_question_from_before_the_room_or_its_sid_was_known_judges_nothing() {
    let mut rooms = Rooms::default();
    let id = rooms.enter("room", at(1_000));
    rooms.join(id);
    assert_eq!(rooms.listed(id, None, at(999), None, at(1_005)), News::None);
    assert_eq!(rooms.told(id, "A", true, None, at(2_000), at(2_000)), News::None);
    assert_eq!(rooms.listed(id, None, at(1_500), None, at(2_005)), News::None);
    assert_eq!(rooms.sid(id).map(|sid| &**sid), Some("A"));
}

#[test]
fn what_the_store_remembers_is_lost_when_it_does_not_stand() {
    let mut rooms = Rooms::default();
    let id = rooms.enter("room", at(0));
    rooms.join(id);
    let sid: Arc<str> = "A".into();
    rooms.restore(id, Some(&sid), Some(at(0)), at(0));
    assert_eq!(
        rooms.listed(id, Some(row("B", 0)), at(9_000_000), None, at(9_000_001)),
        News::Judged
    );
    assert_eq!(rooms.verdict(id, Some(&sid), Some(at(0)), None), Verdict::Lost);
}
