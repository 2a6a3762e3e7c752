//! Every recorded scene of a real SFU, replayed at its recorded times: the right restarts and sends for each, no others.

use super::world::{Fate, Guest, SimRoom, Told, World};
use lk_jwt_service::internals::core::Settings;
use lk_jwt_service::internals::delayed_event::DelayedEventAction;
use lk_jwt_service::internals::livekit::DisconnectReason;
use lk_jwt_service::internals::presence::EventKind;
use serde_json::Value;
use std::collections::BTreeMap;

const DELAY: u64 = 20_000;

struct Recorded {
    at: u64,
    answered: u64,
    iat: Option<i64>,
    body: Value,
}

fn scenes() -> Vec<(String, Vec<Recorded>)> {
    let mut scenes: Vec<(String, Vec<Recorded>)> = Vec::new();
    for line in include_str!("../data/webhooks.jsonl").lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let name = line["scene"].as_str().unwrap().to_owned();
        let body: Value = serde_json::from_str(line["body"].as_str().unwrap()).unwrap();
        let jwt = line["headers"]
            .as_array()
            .unwrap()
            .iter()
            .find(|header| header[0] == "Authorization")
            .unwrap()[1]
            .as_str()
            .unwrap();
        let claims: Value = serde_json::from_slice(&base64(jwt.split('.').nth(1).unwrap())).unwrap();
        let at = (line["at"].as_f64().unwrap() * 1000.0).round() as u64;
        let row = Recorded {
            at,
            answered: line["answered"].as_u64().unwrap(),
            iat: claims["iat"].as_i64(),
            body,
        };
        // A scene that was recorded twice begins anew when its clock does.
        match scenes
            .last_mut()
            .filter(|(last, rows)| *last == name && rows.last().is_some_and(|row| row.at <= at))
        {
            Some((_, rows)) => rows.push(row),
            None => scenes.push((name, vec![row])),
        }
    }
    scenes
}

fn base64(text: &str) -> Vec<u8> {
    let (mut bits, mut n, mut out) = (0u32, 0, Vec::new());
    for c in text.bytes() {
        let v = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'-' | b'+' => 62,
            _ => 63,
        };
        bits = bits << 6 | u32::from(v);
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
            bits &= (1 << n) - 1;
        }
    }
    out
}

/// What happens at the SFU, what is delivered, what the world does by itself.
enum Step<'a> {
    Happens(&'a Recorded),
    Delivered(&'a Recorded),
    Delegate(String, String),
    Kill,
    Up,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn happened(row: &Recorded) -> u64 {
    let created = row.body["createdAt"].as_str().unwrap().parse::<i64>().unwrap();
    let late = u64::try_from(row.iat.unwrap() - created).unwrap() * 1000;
    row.at.saturating_sub(late)
}

struct Outcome {
    world: World,
    identity: Option<(String, String)>,
}

fn replay(name: &str, rows: &[Recorded], delegated_after: i64) -> Outcome {
    let mut steps: BTreeMap<(u64, usize), Step<'_>> = BTreeMap::new();
    let mut serial = 0;
    let mut add = |at: u64, step| {
        serial += 1;
        steps.insert((at, serial), step);
    };
    let mut identity = None;
    for row in rows {
        let participant = &row.body["participant"];
        let key = (text(&row.body["room"], "name").to_owned(), text(participant, "identity").to_owned());
        let joined = participant["joinedAtMs"].as_str().and_then(|ms| ms.parse::<i64>().ok());
        if identity.is_none() && !key.1.is_empty() {
            let scene_began = row.iat.unwrap() * 1000 - i64::try_from(row.at).unwrap();
            let joined = (joined.unwrap() - scene_began).clamp(0, i64::try_from(row.at).unwrap());
            add(
                u64::try_from((joined + delegated_after).max(50)).unwrap(),
                Step::Delegate(key.0.clone(), key.1.clone()),
            );
            identity = Some(key);
        }
        add(happened(row), Step::Happens(row));
        if row.answered == 200 {
            add(row.at, Step::Delivered(row));
        }
    }
    if name.starts_with("SFU killed") {
        add(2_600, Step::Kill);
        add(4_700, Step::Up);
    }
    let mut world = World::new(Settings::default(), 7);
    let mut later_sids: Vec<String> = Vec::new();
    for row in rows.iter().filter(|row| row.body["event"] == "room_started") {
        later_sids.push(text(&row.body["room"], "sid").to_owned());
    }
    let mut seen = std::collections::BTreeSet::new();
    for ((at, _), step) in steps {
        world.advance_to(World::at(at));
        match step {
            Step::Delegate(room, identity) => {
                world.delegate(&room, &identity, "leave", DELAY).unwrap();
            }
            Step::Kill => world.kill_sfu(),
            Step::Up => {
                world.sfu_up = true;
                world.next_sid.extend(later_sids.last().cloned());
            }
            Step::Happens(row) => {
                if seen.insert(text(&row.body, "id").to_owned()) {
                    happens(&mut world, row);
                }
            }
            Step::Delivered(row) => delivered(&mut world, row),
        }
    }
    world.advance(200_000);
    Outcome { world, identity }
}

fn happens(world: &mut World, row: &Recorded) {
    let room = text(&row.body["room"], "name").to_owned();
    let sid = text(&row.body["room"], "sid").to_owned();
    let participant = &row.body["participant"];
    let identity = text(participant, "identity").to_owned();
    match text(&row.body, "event") {
        "room_started" => {
            let room = world.rooms.entry(room).or_insert_with(|| SimRoom {
                sid: sid.clone(),
                ..SimRoom::default()
            });
            room.sid = sid;
        }
        "room_finished" => {
            world.rooms.remove(&room);
        }
        "participant_joined" => {
            let joined_at_ms = text(participant, "joinedAtMs").parse().unwrap();
            let guest = Guest {
                sid: text(participant, "sid").into(),
                joined_at_ms,
                active: true,
            };
            world
                .rooms
                .entry(room)
                .or_insert_with(|| SimRoom { sid, ..SimRoom::default() })
                .guests
                .insert(identity, guest);
        }
        "participant_left" | "participant_connection_aborted" => {
            if let Some(room) = world.rooms.get_mut(&room)
                && room
                    .guests
                    .get(&identity)
                    .is_some_and(|guest| guest.sid == text(participant, "sid"))
            {
                room.guests.remove(&identity);
            }
        }
        _ => {}
    }
}

fn delivered(world: &mut World, row: &Recorded) {
    let (room, participant) = (&row.body["room"], &row.body["participant"]);
    let reason = DisconnectReason::parse(text(participant, "disconnectReason"));
    let kind = match text(&row.body, "event") {
        "room_started" => EventKind::RoomStarted,
        "room_finished" => EventKind::RoomFinished,
        "participant_joined" => EventKind::Joined,
        "participant_left" => EventKind::Left(reason),
        "participant_connection_aborted" => EventKind::Aborted(reason),
        "track_published" | "track_unpublished" => EventKind::Track,
        _ => EventKind::Other,
    };
    let id = text(&row.body, "id");
    world.deliver(&Told {
        kind,
        digest: id
            .bytes()
            .chain(row.iat.unwrap().to_le_bytes())
            .fold(7, |hash, byte| hash * 31 % 0xffff_ffff + u64::from(byte)),
        issued_at: row.iat.unwrap(),
        id: id.into(),
        created_at: row.body["createdAt"].as_str().and_then(|at| at.parse().ok()).unwrap_or(0),
        room: text(room, "name").into(),
        room_sid: text(room, "sid").into(),
        identity: text(participant, "identity").into(),
        sid: text(participant, "sid").into(),
        joined_at_ms: text(participant, "joinedAtMs").parse().unwrap_or(0),
    });
}

/// When the leave may be sent, in milliseconds of the scene.
fn expected(name: &str) -> Option<(u64, u64)> {
    let goodbye = |left: u64| Some((left + 1_500, left + 2_000 + 25));
    match name {
        "rooms created, one deleted" => goodbye(37_540),
        "same identity joins twice, the second stays" => goodbye(6_910),
        "client killed (no goodbye)" => goodbye(23_420),
        "removed by RemoveParticipant" => goodbye(2_800),
        "room deleted with a participant in it" => goodbye(2_760),
        "signal connection opened, media never connected, then closed after 25 s" => Some((20_000, 100_000)),
        "signal connection opened and dropped at once" => Some((20_000, 85_000)),
        "join with a token whose participant is then asked for by GetParticipant" => goodbye(4_420),
        "SFU stopped by SIGTERM with a participant in a room" => goodbye(12_400),
        "SFU killed with a participant in a room, started again after 2 s" => Some((64_000, 67_000)),
        "SFU killed with a participant in a room, started again after 2 s, room created anew after 4 more" => goodbye(30_430),
        "webhook receiver answers 500 three times" | "webhook receiver away for 8 s" => Some((7_380, 8_000)),
        "webhook receiver answers 401 three times" => Some((2_120, 90_000)),
        "browser client (livekit-client 2.23): full-reconnect" => goodbye(14_750),
        "browser client (livekit-client 2.23): signal-reconnect" => goodbye(13_960),
        "browser client (livekit-client 2.23): resume-reconnect" => goodbye(14_060),
        "browser client (livekit-client 2.23): server-leave" => Some((4_280 + 6_000, 4_280 + 6_200)),
        "browser client (livekit-client 2.23): migration" => goodbye(14_130),
        "browser client (livekit-client 2.23): node-failure" => goodbye(13_840),
        "browser client (livekit-client 2.23): reload" | "browser client (livekit-client 2.23): close" => goodbye(0),
        "CreateRoom while a participant is in it" => goodbye(0),
        other => panic!("a scene that nobody has thought about: {other}"),
    }
}

#[test]
fn every_recorded_scene_ends_in_one_leave_at_the_right_time() {
    let mut played = 0;
    for (name, rows) in scenes() {
        for delegated_after in [-1_000, 100, 1_000] {
            let Outcome { world, identity } = replay(&name, &rows, delegated_after);
            if identity.is_none() {
                continue;
            }
            played += 1;
            let last_left = rows
                .iter()
                .rfind(|row| row.body["event"] == "participant_left")
                .map_or(0, |row| row.at);
            let (from, to) = match expected(&name).unwrap() {
                (1_500, 2_025) => (last_left + 1_500, last_left + 2_025),
                times => times,
            };
            let context = format!("{name} ({delegated_after}): {:?} {:?}", world.finished, world.calls);
            // Nobody who was never seen is waited for longer than the homeserver waits: its timer and our one attempt coincide.
            let never_seen = name.starts_with("signal connection");
            let at = match world.fate("leave") {
                Fate::Sent(at) => at,
                Fate::Fired(at) if never_seen => at,
                fate @ (Fate::Scheduled { .. } | Fate::Fired(_) | Fate::Cancelled(_)) => panic!("not sent by us: {fate:?} in {context}"),
            };
            let at = at.as_millis() - World::at(0).as_millis();
            assert!((from..=to).contains(&at), "sent at {at}, not in {from}..={to}: {context}");
            assert_eq!(world.count(DelayedEventAction::Send, "leave"), 1, "{context}");
            let restarts: Vec<u64> = world
                .calls
                .iter()
                .filter(|call| call.3 == DelayedEventAction::Restart)
                .map(|call| call.0.as_millis() - World::at(0).as_millis())
                .collect();
            assert!(
                restarts.iter().all(|&restart| restart < at || never_seen),
                "restarted after the end: {context}"
            );
            // From the first one on, none is missing.
            let last = restarts.last().copied().unwrap_or(at);
            assert!(
                never_seen || at - last <= DELAY / 2 + 50,
                "nothing between {last} and {at}: {context}"
            );
            let gaps: Vec<u64> = restarts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            assert!(
                gaps.iter()
                    .skip(1)
                    .all(|gap| (DELAY * 45 / 100 - 50..=DELAY / 2 + 50).contains(gap)),
                "{gaps:?} {context}"
            );
        }
    }
    assert!(played > 60, "{played}");
}
