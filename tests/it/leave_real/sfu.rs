//! The SFU is killed, forgets every room, and is back some time later.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use super::calm;
use super::clients::{joins_and_is_watched, leaves_within_two_seconds};
use super::clock::{lateness_since, now_ms, sleep_s, sleep_until};
use super::stage::{Plan, Stage};
use super::steered::Browser;
use crate::support::process::{answers, say};

const DELAY: u64 = 20;
/// The service asks every 100 ms (L13), and we every 5: the first answer that we see may be the one before its own.
const AT_ONCE: u64 = 150;

pub(super) fn an_sfu_that_is_back_after_1_s() {
    is_back_after(1);
}

pub(super) fn an_sfu_that_is_back_after_3_s() {
    is_back_after(3);
}

pub(super) fn an_sfu_that_is_back_after_20_s() {
    is_back_after(20);
}

fn is_back_after(seconds: u64) {
    let stage = Arc::new(Stage::new(Plan::default()));
    let browser = Browser::shared();
    let callers: Vec<_> = (1..=2)
        .map(|n| {
            let (caller, tab) = (stage.caller(&format!("sfu{seconds}s{n}")), browser.open());
            let delayed = caller.schedule(DELAY);
            let sid = joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
            (caller, tab, delayed, sid)
        })
        .collect();
    calm::begin();
    let killed = now_ms();
    stage.livekit.kill();
    sleep_until(killed + seconds * 1000);
    let first_answer = FirstAnswer::of(stage.livekit.address());
    stage.livekit.start();
    let first_answer = first_answer.at();
    // The rooms at once.
    for (caller, ..) in &callers {
        let created = loop {
            if let Some(room) = stage.livekit.room(&caller.alias()) {
                break u64::try_from(room.creation_time_ms).expect("after 1970");
            }
            assert!(now_ms() < first_answer + 5000, "{}: the room was not created again", caller.name);
            sleep_s(0.01);
        };
        let after = i128::from(created) - i128::from(first_answer);
        let late = lateness_since(first_answer);
        say(&format!(
            "{}: the room stood again {after} ms after the SFU's first answer; the machine was late by {late} ms",
            caller.name
        ));
        assert!(after <= i128::from(AT_ONCE + late), "{}: {after} ms", caller.name);
    }
    calm::leave();
    // Both by themselves.
    for (caller, tab, _, before) in &callers {
        let back = tab.wait_event("Reconnected", first_answer, Duration::from_secs(45));
        say(&format!(
            "{}: the browser was back {:.1} s after the SFU",
            caller.name,
            (back["at"].as_u64().expect("at") - first_answer) as f64 / 1000.0
        ));
        let (state, sid) = tab.state();
        assert_eq!(state, "connected");
        assert_ne!(sid, *before);
    }
    sleep_until(now_ms().max(first_answer + (DELAY + 5) * 1000));
    for (caller, tab, delayed, _) in &callers {
        caller.assert_there(delayed);
        assert_eq!(tab.state().0, "connected", "{}", caller.name);
    }
    for (caller, tab, delayed, _) in &callers {
        let gone = now_ms();
        tab.leave();
        let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
        leaves_within_two_seconds(caller, delayed, &notice);
        tab.close();
    }
}

/// Asks an SFU that is starting, every 5 ms.
struct FirstAnswer {
    given_up: Arc<AtomicBool>,
    asking: Option<JoinHandle<u64>>,
}

impl FirstAnswer {
    fn of(address: SocketAddr) -> Self {
        let given_up = Arc::new(AtomicBool::new(false));
        let asking = std::thread::spawn({
            let given_up = given_up.clone();
            move || {
                while !given_up.load(Relaxed) && !answers(address, "/") {
                    std::thread::sleep(Duration::from_millis(5));
                }
                now_ms()
            }
        });
        Self {
            given_up,
            asking: Some(asking),
        }
    }

    fn at(mut self) -> u64 {
        self.asking.take().expect("asking").join().expect("the one who asks")
    }
}

impl Drop for FirstAnswer {
    fn drop(&mut self) {
        self.given_up.store(true, Relaxed);
    }
}
