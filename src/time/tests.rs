use super::*;

#[test]
fn an_event_happened_before_it_came_by_as_much_as_its_delivery_took() {
    let arrival = Time::START;
    assert_eq!(event_time(arrival, Some(1_795_241_617), Some(1_795_241_611)), arrival.before(6_000));
    for (issued, created) in [
        (None, Some(1)),
        (Some(1), None),
        (None, None),
        (Some(1), Some(9)),
        (Some(i64::MIN), Some(i64::MAX)),
    ] {
        assert_eq!(event_time(arrival, issued, created), arrival);
    }
    assert_eq!(event_time(arrival, Some(i64::MAX), Some(i64::MIN)), Time::EARLIEST);
}

#[test]
fn stored_moments_survive_the_round_trip() {
    let clock = WallClock::new(Time::START, 1_795_241_149_333);
    for unix in [1_795_241_149_333, 1_795_241_149_332, 1_795_000_000_000, 1_796_000_000_000] {
        assert_eq!(clock.unix_millis(clock.time(unix)), unix);
    }
    assert_eq!(clock.time(i64::MIN), Time::EARLIEST);
    assert_eq!(size_of::<Option<Time>>(), 8);
}
