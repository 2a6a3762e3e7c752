//! What a real SFU answers when something is wrong with it, and what the operator is told.

use std::time::{Duration, Instant};

use super::Neighbours;
use crate::support::client::Call;
use crate::support::homeserver::Homeserver;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{real_neighbours, say};
use crate::support::service::Setup;
use crate::support::{bodies, secrets, unique_room};

const NO_ROOM: &str = "Unable to create room on SFU";

/// Held, not refused: Element Call would show a fatal page.
#[test]
fn an_sfu_that_starts_four_seconds_late_is_waited_for() {
    if !real_neighbours() {
        return;
    }
    let (livekit, home) = (Livekit::prepare(), Homeserver::start());
    let service = livekit.setup(&[&home.name]).start();
    let began = Instant::now();
    let waiting = service.begin(&Call::json("/get_token", &bodies::get_token_of(&home, "alice", &unique_room())));
    std::thread::sleep(Duration::from_secs(4));
    livekit.start();
    let started = began.elapsed();
    let answer = waiting.join().expect("the request").expect("an answer");
    assert_eq!(answer.status, 200, "livekit-server answered after {started:?}: {}", answer.text());
    assert!(answer.took > Duration::from_secs(4), "{:?}", answer.took);
    say(&format!(
        "an SFU that starts late: it answered {:.1} s after the request came, the client had its 200 after {:.1} s",
        started.as_secs_f64(),
        answer.took.as_secs_f64()
    ));
    let (_client, _) = Client::join(&answer.json());
}

#[test]
fn what_a_real_sfu_refuses_is_answered_and_explained_at_once() {
    let Some(real) = Neighbours::get() else { return };
    let alice = real.home.register("alice");
    type Change = fn(Setup, &Livekit) -> Setup;
    let cases: [(&str, Change, &[&str]); 4] = [
        (
            "wrong secret",
            |setup, _| setup.env("LIVEKIT_SECRET", &secrets::sfu_secret()),
            &["signature", "LIVEKIT_SECRET must be", "LIVEKIT_KEY"],
        ),
        (
            "unknown key",
            |setup, _| setup.env("LIVEKIT_KEY", "otherkey"),
            &["does not know", "LIVEKIT_KEY must be"],
        ),
        (
            "a prefix that the SFU does not know",
            |setup, livekit| setup.env("LIVEKIT_URL", &format!("{}/livekit/sfu", livekit.url())),
            &["path", "prefix of LIVEKIT_URL", "LIVEKIT_API_URL"],
        ),
        (
            "the same, in LIVEKIT_API_URL",
            |setup, livekit| setup.env("LIVEKIT_API_URL", &format!("http://{}/nowhere", livekit.address())),
            &["path", "prefix", "LIVEKIT_API_URL"],
        ),
    ];
    for (case, change, log) in cases {
        let service = change(real.livekit.setup(&[&real.home.name]), real.livekit).start();
        for (path, body) in [
            ("/get_token", alice.get_token(&unique_room())),
            ("/sfu/get", alice.sfu_get(&unique_room())),
        ] {
            let mark = service.log().len();
            let answer = service.post(path, &body);
            assert_eq!(answer.status, 500, "{case}: {}", answer.text());
            answer.assert_error(500, "M_UNKNOWN", NO_ROOM);
            assert_eq!(answer.field("reason"), "sfu_rejected", "{case}");
            // What may pass would have been held for ten seconds.
            assert!(answer.took < Duration::from_secs(5), "{case}: answered after {:?}", answer.took);
            let line = service.wait_log_after(mark, &["warn", log[0]]);
            for text in log {
                assert!(line.contains(text), "{case}: {text:?} is not in {line}");
            }
            super::assert_not_logged(&service, &[&body]);
        }
    }
}
