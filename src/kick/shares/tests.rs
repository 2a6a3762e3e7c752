use super::*;

impl Shares {
    pub(in crate::kick) fn len(&self) -> u32 {
        let taken = |origin| self.taken.get(&Share::Total(origin)).copied().unwrap_or(0);
        Origin::BOTH.into_iter().map(taken).sum()
    }

    pub(in crate::kick) fn is_empty(&self) -> bool {
        self.taken.is_empty()
    }
}

/// Whether there is a place for one more.
fn admit(shares: &mut Shares, room_id: &str, user_id: &str, restored: bool) -> Result<(), CapacityError> {
    let (room_id, user_id) = (room_id.into(), user_id.into());
    shares.take(&room_id, &user_id, restored)?;
    shares.give_back(&room_id, &user_id, false);
    Ok(())
}

fn fill(shares: &mut Shares, room_id: &str, user_id: &str, tokens: u32, seen: bool) {
    for _ in 0..tokens {
        assert_eq!(shares.take(&room_id.into(), &user_id.into(), false), Ok(()), "{room_id} {user_id}");
        if seen {
            shares.seen(&user_id.into());
        }
    }
}

#[test]
fn a_full_share_refuses_its_own_newcomers_only() {
    let mut shares = Shares::new("own.example".into(), None, 200_000);
    // 20 unused ones of a user; a used one makes room for another.
    fill(&mut shares, "!r", "@a:evil.example", MAX_UNSEEN_PER_USER, false);
    assert_eq!(admit(&mut shares, "!r", "@a:evil.example", false), Err(CapacityError::Unseen));
    assert_eq!(admit(&mut shares, "!r", "@a:evil.example", true), Ok(()), "restored");
    shares.seen(&"@a:evil.example".into());
    assert_eq!(admit(&mut shares, "!r", "@a:evil.example", false), Ok(()));
    // 2,000 of a homeserver in a room, 10,000 of it in all.
    for n in 1..100 {
        fill(&mut shares, "!r", &format!("@u{n}:evil.example"), 20, false);
    }
    assert_eq!(admit(&mut shares, "!r", "@x:evil.example", false), Err(CapacityError::Room));
    for n in 0..400 {
        fill(&mut shares, &format!("!r{}", n / 100), &format!("@v{n}:evil.example"), 20, false);
    }
    assert_eq!(admit(&mut shares, "!new", "@x:evil.example", false), Err(CapacityError::Homeserver));
    // Nobody else notices.
    assert_eq!(admit(&mut shares, "!r", "@x:good.example", false), Ok(()));
    assert_eq!(admit(&mut shares, "!r", "@x:own.example", false), Ok(()));
    fill(&mut shares, "!r", "@x:own.example", MAX_PER_USER, true);
    assert_eq!(admit(&mut shares, "!r", "@x:own.example", false), Err(CapacityError::User));
}

#[test]
fn remote_users_leave_half_to_our_own_and_three_quarters_to_each_other() {
    let mut shares = Shares::new("own.example".into(), None, 800);
    for server in 0..4 {
        for user in 0..5 {
            fill(&mut shares, "!r", &format!("@u{user}:s{server}.example"), 20, false);
        }
        let full = if server == 3 {
            CapacityError::Total
        } else {
            CapacityError::Homeserver
        };
        assert_eq!(admit(&mut shares, "!r", &format!("@x:s{server}.example"), false), Err(full));
    }
    for user in 0..20 {
        fill(&mut shares, "!r", &format!("@u{user}:own.example"), 20, false);
    }
    assert_eq!(admit(&mut shares, "!r", "@x:own.example", false), Err(CapacityError::Total));
    let room: Arc<str> = "!r".into();
    for user in 0..20 {
        for _ in 0..20 {
            shares.give_back(&room, &format!("@u{user}:own.example").into(), false);
            shares.give_back(&room, &format!("@u{}:s{}.example", user % 5, user / 5).into(), false);
        }
    }
    assert!(shares.is_empty());
}

/// Names cost whoever makes them up nothing.
#[test]
fn made_up_homeservers_leave_half_of_the_remote_users_places_to_those_that_are_listed() {
    let is_listed: IsListed = Box::new(|server| server == "partner.example");
    let mut shares = Shares::new("own.example".into(), Some(is_listed), 800);
    for name in 0..10 {
        fill(&mut shares, "!r", &format!("@u:h{name}.evil.example"), 20, false);
    }
    assert_eq!(admit(&mut shares, "!r", "@u:h11.evil.example", false), Err(CapacityError::Total));
    assert_eq!(admit(&mut shares, "!r", "@u:h11.evil.example", true), Ok(()), "restored");
    for user in 0..5 {
        fill(&mut shares, "!r", &format!("@u{user}:partner.example"), 20, false);
    }
    for name in 0..10 {
        for _ in 0..20 {
            shares.give_back(&"!r".into(), &format!("@u:h{name}.evil.example").into(), false);
        }
    }
    assert_eq!(admit(&mut shares, "!r", "@u:h11.evil.example", false), Ok(()));
}
