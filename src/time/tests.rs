use super::*;

#[test]
fn a_wall_clock_that_jumped_shows_in_the_drift() {
    let clock = WallClock::new(Time::START, 1_000_000);
    for jumped in [0, 12_000, -5_000] {
        let later = WallClock::new(Time::START.after(7_000), 1_007_000 + jumped);
        assert_eq!(clock.drift_ms(&later), jumped);
    }
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
