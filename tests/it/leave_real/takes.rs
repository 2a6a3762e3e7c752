//! A scene whose conditions did not come about shows nothing, and is played again; one that failed is not.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::clock::{lateness_since, now_ms, sleep_s};
use super::stage::Caller;
use super::steered::Tab;
use crate::support::process::say;

/// So often is a scene played. Browsers connect in the wrong moment in a few takes of a hundred.
const TAKES: usize = 5;

/// Why a take shows nothing.
pub(super) struct Void(pub(super) String);

pub(super) fn play(scene: impl Fn() -> Result<(), Void>) {
    for take in 1..=TAKES {
        match scene() {
            Ok(()) => return,
            Err(Void(why)) => say(&format!("take {take} of at most {TAKES} shows nothing: {why}")),
        }
    }
    panic!("no take of {TAKES} showed anything");
}

/// Fails unless the SFU has the caller's room again so soon after that moment.
#[track_caller]
pub(super) fn stands_again(caller: &Caller, since: u64, within_ms: u64) {
    let created = loop {
        if let Some(room) = caller.stage.livekit.room(&caller.alias()) {
            break u64::try_from(room.creation_time_ms).expect("after 1970");
        }
        assert!(now_ms() < since + 5000, "{}: the room was not created again", caller.name);
        sleep_s(0.01);
    };
    let (after, late) = (i128::from(created) - i128::from(since), lateness_since(since));
    say(&format!(
        "{}: the room stood again after {after} ms; the machine was late by {late} ms",
        caller.name
    ));
    assert!(after <= i128::from(within_ms + late), "{}: {after} ms", caller.name);
}

/// Waits until a browser is back by itself after the SFU was restarted.
///
/// livekit-client gives up for good at the first 404. One that connected between the SFU's first answer and the creation of
/// its room was lost before anybody could do anything about it; that the room came in time is for the scene to see. It
/// counts only where the SFU's own log shows that order.
#[track_caller]
pub(super) fn wait_back(caller: &Caller, tab: &Tab, since: u64) -> Result<Value, Void> {
    const TIMEOUT: Duration = Duration::from_secs(45);
    let end = Instant::now() + TIMEOUT;
    loop {
        let events = tab.events(since);
        let of = |name: &str| events.iter().find(|event| event["event"] == name);
        if let Some(back) = of("Reconnected") {
            return Ok(back.clone());
        }
        if of("Disconnected").is_some() && was_refused_before_the_room_stood(caller) {
            return Err(Void(format!(
                "{}: the browser connected between the SFU's first answer and the creation of its room",
                caller.name
            )));
        }
        assert!(
            of("Disconnected").is_none() && Instant::now() < end,
            "{}: the browser is not back within {TIMEOUT:?}: {events:?}",
            caller.name
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn was_refused_before_the_room_stood(caller: &Caller) -> bool {
    is_refused_first(&caller.stage.livekit.log(), &caller.alias())
}

/// By the SFU's log since its last start, which notes a room when it stands.
fn is_refused_first(log: &str, room: &str) -> bool {
    let room = format!("\"{room}\"");
    let before = log.lines().filter(|line| line.contains(&room));
    before
        .take_while(|line| !line.contains("API RoomService.CreateRoom"))
        .any(|line| line.contains("requested room does not exist") && line.contains("\"status\": 404"))
}

#[test]
fn only_who_was_refused_before_its_own_room_stood_could_not_be_helped() {
    let refused = |room| {
        format!(
            r#"2026-07-29T11:30:31.478Z WARN livekit service/utils.go:84 error handling request {{"room": "{room}", "status": 404, "method": "GET", "path": "/rtc/v1", "error": "requested room does not exist"}}"#
        )
    };
    let line = |what, room| {
        format!(
            r#"2026-07-29T11:30:31.522Z INFO livekit.api service/twirp.go:149 API RoomService.{what} {{"room": "{room}", "status": "200"}}"#
        )
    };
    let (asked, stands) = (line("ListRooms", "a"), line("CreateRoom", "a"));
    let is_void = |lines: &[&str]| is_refused_first(&lines.join("\n"), "a");
    assert!(is_void(&[&asked, &refused("a"), &stands]));
    assert!(is_void(&[&line("CreateRoom", "b"), &refused("a"), &stands]));
    assert!(!is_void(&[&asked, &stands, &refused("a")]));
    assert!(!is_void(&[&asked, &refused("b"), &stands]));
    assert!(!is_void(&[&asked, &stands]));
}
