#![expect(clippy::disallowed_methods, reason = "a moment to count from")]

use super::*;

const HOLD: Duration = Duration::from_secs(10);

fn rate(per_minute: u32) -> Option<Rate> {
    NonZeroU32::new(per_minute).map(Rate)
}

fn of_user(user: u64) -> Asker {
    Asker {
        user,
        homeserver: None,
        delegates: false,
    }
}

/// Delays in milliseconds of so many requests at the same moment; of the one that is refused its wait, negative.
fn delays(buckets: &mut Buckets, asker: &Asker, now: Instant, count: usize) -> Vec<i64> {
    let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap();
    (0..count)
        .map(|_| match buckets.take(asker, now, now + HOLD) {
            Ok(at) => millis(at - now),
            Err(exceeded) => -millis(exceeded.wait),
        })
        .collect()
}

#[test]
fn sixty_at_once_then_one_a_second_then_none() {
    let mut buckets = Buckets::new(Rates {
        user: rate(60),
        homeserver: None,
    });
    let now = Instant::now();
    let seen = delays(&mut buckets, &of_user(1), now, 73);
    assert_eq!(seen[..60], [0; 60]);
    assert_eq!(seen[60..70], [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000, 10_000]);
    assert_eq!(seen[70..], [-11_000; 3], "a refused request does not count");
    assert_eq!(delays(&mut buckets, &of_user(2), now, 1), [0], "another user");
    // Seventy were carried out: after eleven seconds one of them at once, as was said, and after seventy all sixty.
    let later = now + Duration::from_secs(11);
    assert_eq!(delays(&mut buckets, &of_user(1), later, 2), [0, 1000]);
    let much_later = now + Duration::from_secs(80);
    assert_eq!(delays(&mut buckets, &of_user(1), much_later, 61)[59..], [0, 1000]);
}

#[test]
fn a_delegation_is_the_last_to_be_refused() {
    let mut buckets = Buckets::new(Rates {
        user: rate(60),
        homeserver: None,
    });
    let now = Instant::now();
    assert_eq!(delays(&mut buckets, &of_user(1), now, 71)[70], -11_000);
    let delegates = Asker {
        delegates: true,
        ..of_user(1)
    };
    let seen = delays(&mut buckets, &delegates, now, 61);
    assert_eq!((seen[..50].to_vec(), seen[50], seen[60]), (vec![0; 50], 1000, -11_000));
}

#[test]
fn a_homeserver_is_counted_with_all_its_users_and_only_where_it_is_not_listed() {
    let mut buckets = Buckets::new(Rates {
        user: rate(10),
        homeserver: rate(30),
    });
    let now = Instant::now();
    let stranger = |user| Asker {
        homeserver: Some(7),
        ..of_user(user)
    };
    for user in 0..3 {
        assert_eq!(delays(&mut buckets, &stranger(user), now, 10), [0; 10]);
    }
    let seen = delays(&mut buckets, &stranger(3), now, 6);
    assert_eq!(seen, [2000, 4000, 6000, 8000, 10_000, -12_000]);
    let refused = buckets.take(&stranger(4), now, now + HOLD).unwrap_err();
    assert_eq!(refused.limit, RateLimit::Homeserver);
    assert_eq!(
        refused.to_string(),
        "the homeserver asks more often than LIVEKIT_RATE_LIMIT_HOMESERVER allows"
    );
    // What the homeserver's rate refused was not counted as the user's.
    assert_eq!(delays(&mut buckets, &of_user(4), now, 10), [0; 10]);
    assert_eq!(buckets.take(&of_user(4), now, now).unwrap_err().limit, RateLimit::User);
}

#[test]
fn off_is_as_often_as_they_like() {
    let mut buckets = Buckets::new(Rates {
        user: None,
        homeserver: None,
    });
    let asker = Asker {
        homeserver: Some(1),
        ..of_user(1)
    };
    assert_eq!(delays(&mut buckets, &asker, Instant::now(), 1000), vec![0; 1000]);
}

#[test]
fn whoever_asked_longest_ago_is_forgotten_first() {
    let mut buckets = Buckets::new(Rates {
        user: rate(1),
        homeserver: None,
    });
    let now = Instant::now();
    for user in 0..=MAX_BUCKETS.get() as u64 {
        assert_eq!(delays(&mut buckets, &of_user(user), now, 1), [0]);
    }
    assert_eq!(buckets.users.as_ref().unwrap().full_at.len(), MAX_BUCKETS.get());
    assert_eq!(delays(&mut buckets, &of_user(1), now, 1), [-60_000]);
    assert_eq!(delays(&mut buckets, &of_user(0), now, 1), [0], "forgotten, and in nobody's way");
}
