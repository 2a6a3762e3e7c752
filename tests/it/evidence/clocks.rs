//! Events that come late, and SFUs whose clocks differ (decision L2): what the SFU answers when it is asked is the truth.

use std::time::{Duration, Instant};

use super::{seconds, watchful, within};
use crate::support::jwt::Jwt;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::sfu::Session;
use crate::support::{wait_until, webhook};

const DELAY: Duration = seconds(10);

fn wait(time: Duration) {
    let end = Instant::now() + time;
    wait_until("the time to pass", time + TIMEOUT, || Instant::now() >= end);
}

/// LiveKit sends a webhook again with the same JWT. Eight seconds later, the delegation of the next session is one second old.
#[test]
fn a_departure_sent_again_is_not_the_next_sessions() {
    std::thread::scope(|scope| {
        for clock_known in [false, true] {
            scope.spawn(move || {
                let scene = Scene::with(watchful);
                let former = scene.sfu.join(&scene.alias, &scene.identity);
                scene.sfu.leave(&scene.alias, &scene.identity);
                let body = webhook::left(&former, "CLIENT_INITIATED").to_string();
                let token = Jwt::sign(&webhook::claims(&scene.sfu, body.as_bytes()), scene.sfu.secret());
                let born = Instant::now();
                if clock_known {
                    let other = Session {
                        room: "another".into(),
                        identity: "another".into(),
                        ..former
                    };
                    scene.send_webhook(&webhook::joined(&other));
                }
                wait(seconds(7).saturating_sub(born.elapsed()));
                scene.delegate(DELAY);
                wait(seconds(8).saturating_sub(born.elapsed()));
                let answer = scene.service.call(&webhook::with_token(body, &token));
                assert_eq!(answer.status, 200, "{}", answer.text());
                // It takes a while until somebody is there.
                wait(seconds(3));
                assert_eq!(scene.sends().len(), 0, "sent before anybody was there; clock known: {clock_known}");
                let session = scene.joined();
                scene.stays_until(Instant::now() + seconds(6), DELAY);
                let absent = scene.leave(&session, "CLIENT_INITIATED");
                let took = scene.wait_sent(TIMEOUT) - absent;
                eprintln!("sent again after 8 s, clock known {clock_known}: kept, and watched: sent {took:.1?} after she left");
                assert!(took < within(seconds(4), absent), "{took:?}");
            });
        }
    });
}

/// Two nodes five seconds apart, or one whose clock was set back: the second session seems older, or much younger, than the first.
#[test]
fn sessions_of_nodes_with_other_clocks_are_told_apart() {
    let cases = [(-5_000, true), (-5_000, false), (5_000, true), (5_000, false)];
    std::thread::scope(|scope| {
        for (skew, told) in cases {
            scope.spawn(move || {
                let what = format!("second node {skew} ms, told {told}");
                let scene = Scene::with(watchful);
                scene.delegate(DELAY);
                let first = scene.joined();
                // The page is reloaded: another node has the second session, and its events have that node's time.
                let second = Session {
                    sid: format!("{}second", first.sid),
                    joined_at_ms: webhook::now_ms() + skew,
                    ..first.clone()
                };
                scene.sfu.enter(&second);
                let of_second = |mut event: serde_json::Value| {
                    event["createdAt"] = ((webhook::now_ms() + skew) / 1000).to_string().into();
                    event
                };
                if told {
                    scene.send_webhook(&of_second(webhook::joined(&second)));
                }
                scene.send_webhook(&webhook::left(&first, "CLIENT_INITIATED"));
                scene.stays_until(Instant::now() + seconds(8), DELAY);
                scene.sfu.leave(&scene.alias, &scene.identity);
                let absent = Instant::now();
                if told {
                    scene.send_webhook(&of_second(webhook::left(&second, "CLIENT_INITIATED")));
                }
                let took = scene.wait_sent(seconds(20)) - absent;
                eprintln!("{what}: 0 sent while she was there; sent {took:.1?} after she left");
                assert!(took < within(seconds(5), absent), "{what}: {took:?}");
                scene.wait_over(TIMEOUT);
            });
        }
    });
}

/// A browser whose resume failed says goodbye and is back at once, on a node whose clock is five seconds behind: the goodbye looks
/// old when it arrives, and is not.
#[test]
fn who_is_back_on_a_node_that_is_behind_stays() {
    std::thread::scope(|scope| {
        for reason in ["CLIENT_INITIATED", "CONNECTION_TIMEOUT", "STATE_MISMATCH"] {
            scope.spawn(move || {
                let scene = Scene::with(watchful);
                scene.delegate(DELAY);
                let first = scene.joined();
                // Until the goodbye does not look older than the delegation.
                wait(seconds(6));
                let mut goodbye = webhook::left(&first, reason);
                goodbye["createdAt"] = (webhook::now() - 5).to_string().into();
                scene.sfu.leave(&scene.alias, &scene.identity);
                let gone = Instant::now();
                scene.send_webhook(&goodbye);
                wait(Duration::from_millis(300).saturating_sub(gone.elapsed()));
                scene.sfu.join(&scene.alias, &scene.identity);
                scene.stays_until(gone + seconds(8), DELAY);
                eprintln!("{reason}, on a node five seconds behind: 0 sent");
            });
        }
    });
}
