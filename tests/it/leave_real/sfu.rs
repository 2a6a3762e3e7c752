//! The SFU is killed, forgets every room, and is back some time later.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use super::clients::{joins_and_is_watched, leaves_within_two_seconds};
use super::clock::{now_ms, sleep_until};
use super::stage::{Plan, Stage};
use super::steered::Browser;
use super::takes::{self, Void, stands_again, wait_back};
use crate::support::process::{answers, real_neighbours, say};

const DELAY: u64 = 20;
/// From the SFU's first answer until a room stands again. What the service may take of it, 100 ms, is shown where time is
/// an input (`leave/rules.rs`), and usually it takes 10; the rest is for processes that wait for each other on a busy machine.
const AT_ONCE: u64 = 300;

#[test]
fn an_sfu_that_is_back_after_1_s() {
    if !real_neighbours() {
        return;
    }
    takes::play(|| is_back_after(1, DELAY));
}

#[test]
fn an_sfu_that_is_back_after_3_s() {
    if !real_neighbours() {
        return;
    }
    takes::play(|| is_back_after(3, DELAY));
}

#[test]
fn an_sfu_that_is_back_after_20_s() {
    if !real_neighbours() {
        return;
    }
    takes::play(|| is_back_after(20, DELAY));
}

/// Two browsers, whose events have this delay in seconds.
pub(super) fn is_back_after(seconds: u64, delay: u64) -> Result<(), Void> {
    let stage = Arc::new(Stage::new(Plan::default()));
    let browser = Browser::shared();
    let callers: Vec<_> = (1..=2)
        .map(|n| {
            let (caller, tab) = (stage.caller(&format!("sfu{seconds}s{n}")), browser.open());
            let delayed = caller.schedule(delay);
            let sid = joins_and_is_watched(&caller, &delayed, |answer| tab.join(answer));
            (caller, tab, delayed, sid)
        })
        .collect();
    let killed = now_ms();
    stage.livekit.kill();
    sleep_until(killed + seconds * 1000);
    let first_answer = FirstAnswer::of(stage.livekit.address());
    stage.livekit.start();
    let first_answer = first_answer.at();
    // The rooms at once.
    for (caller, ..) in &callers {
        stands_again(caller, first_answer, AT_ONCE);
    }
    // Both by themselves.
    for (caller, tab, _, before) in &callers {
        let back = match wait_back(caller, tab, killed) {
            Ok(back) => back,
            Err(void) => {
                callers.iter().for_each(|(_, tab, ..)| tab.close());
                return Err(void);
            }
        };
        say(&format!(
            "{}: the browser was back {:.1} s after the SFU",
            caller.name,
            (back["at"].as_u64().expect("at") - first_answer) as f64 / 1000.0
        ));
        assert_ne!(tab.wait_connected(), *before);
    }
    sleep_until(now_ms().max(first_answer + (delay.min(DELAY) + 5) * 1000));
    for (caller, tab, delayed, _) in &callers {
        tab.wait_connected();
        caller.assert_there(delayed);
    }
    for (caller, tab, delayed, _) in &callers {
        let gone = now_ms();
        tab.leave();
        let notice = caller.wait_notice("participant_left", gone, Duration::from_secs(5));
        leaves_within_two_seconds(caller, delayed, &notice);
        tab.close();
    }
    Ok(())
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
