//! Who is dealt with, and how often they may ask, behind our homeserver.

use std::time::Duration;

use super::{OTHER, Stage};
use crate::support::client::Answer;
use crate::support::neighbour::Reply;
use crate::support::wait_until;

/// 96 requests in flight, of which our homeserver may have 48.
const FEW: [&str; 4] = ["/bin/sh", "-c", "ulimit -n 256 && exec \"$@\"", "sh"];

#[track_caller]
fn assert_blocked(answer: &Answer) {
    answer.assert_error(403, "M_FORBIDDEN", "This service is not for users of that homeserver");
    assert_eq!(answer.field("reason"), "blocked_homeserver", "{}", answer.text());
}

/// In neither direction, and our homeserver is not asked about anything.
#[test]
fn a_blocked_homeserver_gets_no_token_and_gives_none() {
    for (variable, value) in [
        ("LIVEKIT_BLOCKED_HOMESERVERS", "*.example.org"),
        ("LIVEKIT_ALLOWED_HOMESERVERS", "friend.example.org"),
    ] {
        let stage = Stage::with(|setup| setup.env(variable, value));
        let asked = stage.own.asked().len();
        assert_blocked(&stage.call(&stage.federated()));
        assert_blocked(&stage.call(&stage.relayed()));
        let about_them: Vec<_> = stage.own.asked().split_off(asked);
        let about_them = about_them
            .iter()
            .filter(|(request, _)| format!("{request:?}").contains(OTHER))
            .count();
        assert_eq!(about_them, 0);
        let ours = stage.call(&stage.client());
        assert_eq!(ours.status, 200, "our own users always may: {}", ours.text());
    }
}

#[test]
fn users_of_both_homeservers_have_a_rate() {
    let stage = Stage::with(|setup| setup.env("LIVEKIT_RATE_LIMIT_USER", "3"));
    for ask in [Stage::client, Stage::federated, Stage::relayed] {
        // alice asks in two ways.
        let mut statuses: Vec<_> = (0..4).map(|_| stage.call(&ask(&stage)).status).collect();
        statuses.dedup();
        assert_eq!(statuses.last(), Some(&429), "{statuses:?}");
        assert!(statuses.len() == 2 || statuses == [429], "{statuses:?}");
    }
}

/// A homeserver makes up as many users as it likes, and each of them is held for asking too often.
#[test]
fn a_homeserver_whose_users_are_held_leaves_places_for_everybody_else() {
    const USERS: usize = 60;
    const RATE: usize = 6;
    let stage = Stage::with(|setup| setup.wrapped_in(&FEW).env("LIVEKIT_RATE_LIMIT_USER", &RATE.to_string()));
    let asks = (0..USERS).map(|n| {
        let mut ask = stage.federated();
        (ask.body["user_id"], ask.who) = (format!("@u{n}:evil.example").into(), Some("evil.example".into()));
        ask
    });
    let asks: Vec<_> = asks.collect();
    for ask in &asks {
        (0..RATE).for_each(|_| drop(stage.call(ask)));
    }
    let held: Vec<_> = asks.iter().map(|ask| stage.service.begin(&ask.call())).collect();
    wait_until("more than there are places", Duration::from_secs(8), || {
        held.iter().filter(|request| request.is_finished()).count() >= USERS - 48
    });
    for ask in [stage.client(), stage.federated(), stage.delegation()] {
        let answer = stage.call(&ask);
        assert_eq!(answer.status, 200, "{}: {}", ask.path, answer.text());
    }
    assert!(held.iter().any(|request| !request.is_finished()), "nobody is held any more");
}

/// The service of another homeserver never answers, and users of ours ask for tokens of its SFU.
#[test]
fn requests_to_a_homeserver_that_hangs_leave_places_for_everybody_else() {
    let stage = Stage::with(|setup| setup.wrapped_in(&FEW));
    stage.own.script(|_, asked| asked.is_relay().then_some(Reply::Hang));
    let asks: Vec<_> = (0..60).map(|_| stage.client_of_other()).collect();
    let held: Vec<_> = asks.iter().map(|ask| stage.service.begin(&ask.call())).collect();
    wait_until("more than there are places", Duration::from_secs(8), || {
        held.iter().filter(|request| request.is_finished()).count() >= asks.len() - 48
    });
    for ask in [stage.client(), stage.delegation()] {
        let answer = stage.call(&ask);
        assert_eq!(answer.status, 200, "{}: {}", ask.path, answer.text());
    }
    assert!(held.iter().any(|request| !request.is_finished()), "nobody is held any more");
}
