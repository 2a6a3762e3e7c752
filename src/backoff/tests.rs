use super::*;

#[test]
fn pauses_grow_by_half_up_to_the_cap_and_are_shortened_by_a_fifth_at_most() {
    let mut jitter = Jitter::new(1);
    for (failures, longest) in [(1, 500), (2, 750), (3, 1_125), (4, 1_687), (10, 15_000), (255, 15_000)] {
        for _ in 0..100 {
            let pause = Schedule::SEND.pause(failures, &mut jitter);
            assert!(pause <= longest && pause >= longest * 4 / 5, "{failures}: {pause}");
        }
    }
    assert_eq!(
        Schedule::SEND.pause(0, &mut Jitter::new(7)),
        Schedule::SEND.pause(0, &mut Jitter::new(7))
    );
}

#[test]
fn hints_are_clamped_to_a_quarter_of_a_second_and_to_what_is_left() {
    let now = Time::START;
    let next = |hint: Duration, window| Schedule::SEND.next_try(1, Some(hint), now, now.after(window), &mut Jitter::new(1));
    assert_eq!(next(Duration::ZERO, 10_000), Some(now.after(250)));
    assert_eq!(next(Duration::from_secs(3), 10_000), Some(now.after(3_000)));
    assert_eq!(next(Duration::MAX, 10_000), Some(now.after(9_750)));
    assert_eq!(next(Duration::ZERO, 500), Some(now.after(250)));
    assert_eq!(next(Duration::ZERO, 499), None);
}

#[test]
fn retry_after_is_read_in_every_form_that_servers_send() {
    let date = Some(Duration::from_secs(9));
    for (header, date, body, read) in [
        (Some("3"), date, Some(1), Some(3_000)),
        (Some(" 3 "), None, None, Some(3_000)),
        (Some("0"), None, None, Some(0)),
        (Some("-5"), None, Some(7), Some(0)),
        (Some("99999999999999999999999999"), None, None, Some(u64::MAX)),
        (Some("Sat, 21 Nov 2026 08:00:00 GMT"), date, Some(1), Some(9_000)),
        (Some("1.5"), None, Some(1_500), Some(1_500)),
        (Some(""), None, None, None),
        (Some("-"), None, None, None),
        (None, None, Some(u64::MAX), Some(u64::MAX)),
        (None, None, None, None),
    ] {
        let hint = hint(header, date, body).map(as_millis);
        assert_eq!(hint, read, "{header:?} {date:?} {body:?}");
    }
}
