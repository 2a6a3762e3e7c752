//! Evidence before every leave, on the binary: whoever is there is never reported gone, whoever is gone always is, whatever pages,
//! habits, rooms and clocks stand in between (decisions L1 to L6).
//!
//! - [`habits`]: webhooks and an SFU as test suites and older servers have them
//! - [`pages`]: answers of somebody else: a firewall, a gateway, a proxy
//! - [`rooms`]: an SFU that is very quick, or half dead
//! - [`names`]: legacy names that read alike
//! - [`clocks`]: events that come late, and SFUs whose clocks differ

mod clocks;
mod habits;
mod names;
mod pages;
mod rooms;

use std::time::{Duration, Instant};

use crate::support::client::Call;
use crate::support::scene::{Scene, TIMEOUT};
use crate::support::service::Setup;
use crate::support::sfu::Session;
use crate::support::{bodies, hashes, lateness, unique, wait_until};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Asks the SFU every second.
fn watchful(setup: Setup) -> Setup {
    setup.env("LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS", "1")
}

/// One of many participants of a scene.
struct Person {
    name: String,
    identity: String,
    delay_id: String,
}

/// So many people of the scene's homeserver and room.
fn people(scene: &Scene, count: usize) -> Vec<Person> {
    let person = |number| {
        let name = format!("p{number}");
        Person {
            identity: hashes::identity(&scene.home.user(&name), "DEVICE", "member1"),
            delay_id: format!("syd_{}", unique()),
            name,
        }
    };
    (0..count).map(person).collect()
}

/// Everybody hands over an event with this delay.
#[track_caller]
fn delegate_all(scene: &Scene, people: &[Person], delay: Duration) {
    let millis = u64::try_from(delay.as_millis()).expect("a delay");
    let call = |p: &Person| {
        let body = bodies::delegate_of(&scene.home, &p.name, &scene.room, &p.delay_id, millis);
        Call::json("/delegate_delayed_leave", &body)
    };
    for answer in scene.service.flood(&people.iter().map(call).collect::<Vec<_>>(), 8) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

/// Everybody is there, without a word.
fn enter_all(scene: &Scene, people: &[Person]) -> Vec<Session> {
    people.iter().map(|p| scene.sfu.join(&scene.alias, &p.identity)).collect()
}

#[track_caller]
fn wait_restarted_all(scene: &Scene, people: &[Person]) {
    wait_until("everybody's first restart", TIMEOUT * 2, || {
        people.iter().all(|p| scene.api.count("restart", &p.delay_id) > 0)
    });
}

/// How many of them were reported gone.
fn sent(scene: &Scene, people: &[Person]) -> usize {
    people.iter().filter(|p| scene.api.count("send", &p.delay_id) > 0).count()
}

/// Polls until this moment; fails at once where one of them is reported gone.
#[track_caller]
fn nobody_is_sent_until(scene: &Scene, people: &[Person], end: Instant) {
    wait_until("the time to pass", end.saturating_duration_since(Instant::now()) + TIMEOUT, || {
        assert_eq!(sent(scene, people), 0, "people who are there were reported gone");
        Instant::now() >= end
    });
}

/// That long, and what this machine was late by since then.
fn within(limit: Duration, began: Instant) -> Duration {
    limit + lateness::since(began) * 2
}
