//! The promises of L1, pinned over random sequences of inputs: first one machine and any facts at all, then a whole world.

use super::world::{Fate, World};
use lk_jwt_service::delayed_event::Outcome;
use lk_jwt_service::delayed_leave::{Delegated, FinishReason};
use lk_jwt_service::driver::core::Settings;
use lk_jwt_service::livekit::{Answer, DisconnectReason};
use lk_jwt_service::presence::{DepartureCause, EventKind};
use lk_jwt_service::time::Time;
use proptest::prelude::*;
use std::time::Duration;

fn cases(count: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(count);
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn reason() -> impl Strategy<Value = DisconnectReason> {
    (0u8..16).prop_map(|n| DisconnectReason::parse(&n.to_string()))
}

/// What may happen in the world between two looks at it.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Wait(u64),
    Delegate(u8, u8),
    Join(u8, bool),
    Part(u8, DisconnectReason, bool),
    SfuDown,
    SfuUp,
    Lossy(bool),
    Stale(u8),
    RoomForgotten,
    WebhookAgain(u8),
    HomeserverAway(u64),
    SfuHangs(u64),
    Crash(u64),
    Webhooks(u64, bool),
    /// A request that arrived so long ago is done now.
    Held(u8, u64),
    /// Somebody else's user has the same identity by the looks of it.
    Stranger(u8),
    StandStill(u64, bool),
    HomeserverLimits(u64),
    NoLists(Option<Answer<()>>),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (1u64..5_000).prop_map(Happening::Wait),
        3 => (5_000u64..70_000).prop_map(Happening::Wait),
        3 => (0u8..3, 0u8..4).prop_map(|(who, event)| Happening::Delegate(who, event)),
        4 => (0u8..3, any::<bool>()).prop_map(|(who, told)| Happening::Join(who, told)),
        3 => (0u8..3, reason(), any::<bool>()).prop_map(|(who, reason, told)| Happening::Part(who, reason, told)),
        1 => any::<bool>().prop_map(Happening::Lossy),
        1 => (0u8..3).prop_map(Happening::Stale),
        1 => (0u8..3).prop_map(Happening::WebhookAgain),
        1 => (500u64..6_000).prop_map(Happening::HomeserverAway),
        1 => (500u64..9_000).prop_map(Happening::SfuHangs),
        1 => (0u64..4_000).prop_map(Happening::Crash),
        1 => (prop_oneof![Just(0u64), 1u64..25_000], any::<bool>()).prop_map(|(delay, twice)| Happening::Webhooks(delay, twice)),
        1 => Just(Happening::SfuDown),
        2 => Just(Happening::SfuUp),
        1 => Just(Happening::RoomForgotten),
        2 => (0u8..3, 1u64..8_000).prop_map(|(who, ago)| Happening::Held(who, ago)),
        1 => (0u8..3).prop_map(Happening::Stranger),
        1 => (3_000u64..8_000, any::<bool>()).prop_map(|(millis, clock_stops)| Happening::StandStill(millis, clock_stops)),
        1 => (500u64..6_000).prop_map(Happening::HomeserverLimits),
        1 => prop_oneof![Just(None), Just(Some(Answer::Refused)), Just(Some(Answer::TooLarge))].prop_map(Happening::NoLists),
    ]
}

const DELAY: u64 = 18_000;

struct Story {
    world: World,
    lossy: bool,
    /// Since when somebody is there or not; how long an SFU outage may excuse it.
    present_since: [Option<Time>; 3],
    events: [Vec<String>; 3],
    old_sids: [Option<(String, u64)>; 3],
}

impl Story {
    fn happen(&mut self, happening: Happening) {
        let name = |who: u8| format!("user{who}");
        match happening {
            Happening::Wait(millis) => self.wait(millis),
            Happening::Delegate(who, event) => {
                // Once in a while the same event again; an old one is never handed over again.
                let events = &self.events[usize::from(who)];
                let again = events.last().filter(|_| event == 0).cloned();
                let delay_id = again.unwrap_or_else(|| format!("{who}-{}", events.len()));
                // A homeserver does not give out an id twice.
                let is_new = !self.world.events.contains_key(&delay_id);
                if (is_new || matches!(self.world.fate(&delay_id), Fate::Scheduled { .. }))
                    && self.world.delegate("room", &name(who), &delay_id, DELAY).is_ok()
                {
                    self.events[usize::from(who)].push(delay_id);
                }
            }
            Happening::Held(who, ago) => {
                let arrived = self.world.now.before(ago);
                let events = &mut self.events[usize::from(who)];
                let delay_id = format!("{who}-{}", events.len());
                match self.world.delegate_of(
                    &format!("@{}", name(who)),
                    "hs.example",
                    "room",
                    &name(who),
                    &delay_id,
                    DELAY,
                    arrived,
                ) {
                    // The later request goes on to count.
                    Ok(Delegated::Overtaken) => events.insert(events.len() - 1, delay_id),
                    Ok(Delegated::New(_) | Delegated::Renewed(_)) => events.push(delay_id),
                    Err(_) => {}
                }
            }
            Happening::Stranger(who) => {
                let (now, is_known) = (self.world.now, self.world.core.find("room", &name(who)).is_some());
                if is_known {
                    let taken = self
                        .world
                        .delegate_of("@stranger", "other.example", "room", &name(who), "stranger", DELAY, now);
                    assert!(taken.is_err(), "{taken:?}");
                }
            }
            Happening::StandStill(millis, clock_stops) => {
                self.lossy = true;
                self.world.stand_still(millis, clock_stops);
                self.wait(DELAY / 2);
            }
            Happening::HomeserverLimits(millis) => {
                self.lossy = true;
                self.world.homeserver_instead = Some(Outcome::Limited(Some(Duration::from_millis(700))));
                self.wait(millis);
                self.world.homeserver_instead = None;
                self.wait(DELAY / 2);
            }
            Happening::NoLists(answer) => {
                self.world.instead = answer.map(|answer| ("ListParticipants", answer)).into_iter().collect();
            }
            Happening::Join(who, told) => {
                if self.world.sfu_up {
                    self.world.open("room");
                    if let Some(old) = self.world.rooms["room"].guests.get(&name(who)) {
                        self.old_sids[usize::from(who)] = Some((old.sid.clone(), old.joined_at_ms));
                    }
                    self.world.advance(1);
                    self.world.join("room", &name(who), told);
                    self.present_since[usize::from(who)].get_or_insert(self.world.now);
                }
            }
            Happening::Part(who, reason, told) => {
                if self.world.sfu_up {
                    self.world.part("room", &name(who), reason, told);
                    self.present_since[usize::from(who)] = None;
                }
            }
            Happening::SfuDown => {
                self.world.kill_sfu();
                self.present_since = [None; 3];
            }
            Happening::Webhooks(delay, twice) => {
                self.world.webhook_delay = delay;
                self.world.webhooks_twice = twice;
            }
            Happening::Crash(down_for) => {
                self.lossy = true;
                self.world.crash(down_for);
                self.wait(DELAY / 2);
            }
            Happening::SfuUp => self.world.sfu_up = true,
            Happening::HomeserverAway(millis) => {
                self.lossy = true;
                self.world.homeserver_down = true;
                self.wait(millis);
                self.world.homeserver_down = false;
                // Two outages in a row are one of twice the length: a delay carries one.
                self.wait(DELAY / 2);
            }
            Happening::SfuHangs(millis) => {
                self.lossy = true;
                self.world.sfu_hangs = true;
                self.wait(millis);
                self.world.sfu_hangs = false;
            }
            Happening::Lossy(lossy) => {
                self.lossy |= lossy;
                self.world.lossy = lossy.then_some(3);
            }
            Happening::Stale(who) => {
                if let Some((sid, joined)) = self.old_sids[usize::from(who)].clone() {
                    self.world.tell(
                        EventKind::Left(DisconnectReason::DuplicateIdentity),
                        "room",
                        &name(who),
                        &sid,
                        joined,
                    );
                }
            }
            Happening::RoomForgotten => {
                self.world.rooms.clear();
                self.present_since = [None; 3];
            }
            Happening::WebhookAgain(who) => {
                if let Some(guest) = self.world.rooms.get("room").and_then(|room| room.guests.get(&name(who)).cloned()) {
                    self.world
                        .tell(EventKind::Joined, "room", &name(who), &guest.sid, guest.joined_at_ms);
                }
            }
        }
        self.check();
    }

    fn wait(&mut self, millis: u64) {
        let until = self.world.now.after(millis);
        while self.world.now < until {
            let next = self.world.now.after(200).min(until);
            self.world.advance_to(next);
            self.check();
        }
    }

    /// Whoever comes unannounced in the last moments of a wait may be missed, the more so when answers get lost.
    fn tolerance(&self) -> u64 {
        if self.lossy { 20_000 } else { 1_000 }
    }

    /// Nobody who is there is reported gone: not by us, and not by the homeserver's timer while we hold the event.
    fn check(&self) {
        for (who, since) in self.present_since.iter().enumerate() {
            let Some(since) = since else { continue };
            let Some(delay_id) = self.events[who].last() else { continue };
            if let Fate::Sent(at) | Fate::Fired(at) = self.world.fate(delay_id) {
                let reason = self
                    .world
                    .finished
                    .iter()
                    .rfind(|(_, id, _)| id == delay_id)
                    .map(|(_, _, reason)| *reason);
                let tolerance = match reason {
                    // An arrival at the very end of a wait may be missed, or come too late for a restart.
                    Some(
                        FinishReason::Sent(DepartureCause::NeverJoined)
                        | FinishReason::NotSent(DepartureCause::NeverJoined)
                        | FinishReason::NeverJoined,
                    )
                    | Some(FinishReason::GivenUp | FinishReason::EventGone)
                    | None => self.tolerance(),
                    Some(_) => 50,
                };
                assert!(
                    at <= since.after(tolerance),
                    "user{who} is there since {since:?}, {delay_id} was sent at {at:?}: {:?}",
                    self.world.finished
                );
            }
        }
    }
}

fn story(seed: u64, settings: Settings) -> Story {
    let mut world = World::new(settings, seed);
    world.homeserver_latency = 10;
    Story {
        lossy: false,
        world,
        present_since: [None; 3],
        events: Default::default(),
        old_sids: Default::default(),
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn nobody_present_is_reported_gone_and_nobody_gone_stays(
        seed: u64,
        disasters: bool,
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let mut story = story(seed, Settings::default());
        for happening in happenings {
            if disasters || !matches!(happening, Happening::SfuDown | Happening::RoomForgotten) {
                story.happen(happening);
            }
        }
        // Peace: whoever is there stays, whoever is not is reported.
        story.world.sfu_up = true;
        story.world.lossy = None;
        story.wait(200_000);
        for who in 0..3 {
            let Some(delay_id) = story.events[who].last() else { continue };
            let there = story.world.rooms.get("room").is_some_and(|room| room.guests.contains_key(&format!("user{who}")));
            let fate = story.world.fate(delay_id);
            if there {
                let since = story.present_since[who].unwrap();
                match fate {
                    Fate::Scheduled { .. } => {}
                    // Reported before this session began, or never seen within the delay of its delegation.
                    Fate::Sent(at) | Fate::Fired(at) => prop_assert!(at <= since.after(story.tolerance()), "{delay_id} {fate:?} {since:?} {:?}", story.world.finished),
                    Fate::Cancelled(_) => prop_assert!(false, "the last event was cancelled"),
                }
            } else {
                prop_assert!(!matches!(fate, Fate::Scheduled { .. }), "{delay_id} is still running, {:?}", story.world.core.find("room", &format!("user{who}")).map(|id| story.world.core.leaves().get(id).unwrap().leave().clone()));
            }
            // Every event but the last was cancelled, sent, or has run out: none is left to fire later.
            for old in &story.events[who] {
                if old != delay_id {
                    prop_assert!(!matches!(story.world.fate(old), Fate::Scheduled { .. }), "{old} will fire");
                }
            }
        }
        // And nothing is left of those who go.
        for who in 0..3 {
            story.world.part("room", &format!("user{who}"), DisconnectReason::ClientInitiated, true);
        }
        story.world.advance(300_000);
        prop_assert!(story.world.core.leaves().is_empty() && story.world.core.is_at_rest(), "{:?}", story.world.core);
        story.world.advance(60_000);
        prop_assert_eq!(story.world.core.next_deadline(), None);
    }

    #[test]
    fn results_of_a_replaced_job_never_touch_its_successor(
        seed: u64,
        outcomes in prop::collection::vec((0u8..3, 0u64..3_000), 1..20),
    ) {
        // All calls to the homeserver are answered late, by whatever: the last delegation's event runs on.
        let mut world = World::new(Settings::default(), seed);
        world.open("room");
        world.homeserver_latency = 900;
        world.join("room", "al", true);
        for (n, (_, wait)) in outcomes.iter().enumerate() {
            world.delegate("room", "al", &format!("event{n}"), DELAY).unwrap();
            world.advance(*wait);
        }
        let last = format!("event{}", outcomes.len() - 1);
        for (n, (kind, wait)) in outcomes.iter().enumerate() {
            if n + 1 < outcomes.len() && *kind == 0 {
                // The homeserver forgets an old event: its restart and its cancellation meet a 404.
                world.events.remove(&format!("event{n}"));
            }
            world.advance(*wait);
        }
        world.advance(100_000);
        prop_assert!(matches!(world.fate(&last), Fate::Scheduled { .. }), "{:?} {:?}", world.fate(&last), world.finished);
        prop_assert_eq!(world.core.leaves().len(), 1);
        for n in 0..outcomes.len() - 1 {
            let id = format!("event{n}");
            if let Some((fate, _)) = world.events.get(&id) {
                prop_assert!(matches!(fate, Fate::Cancelled(_)), "{id}: {fate:?}");
            }
        }
    }

    #[test]
    fn any_webhook_at_all_is_survived(
        webhooks in prop::collection::vec((0u8..7, 0u8..3, 0u8..3, 0u8..3, 0u64..100_000, any::<u64>()), 1..80),
    ) {
        let mut world = World::new(Settings::default(), 1);
        world.delegate("room", "al", "leave", DELAY).unwrap();
        for (kind, sid, room_sid, identity, wait, joined_at_ms) in webhooks {
            let reason = DisconnectReason::parse(&(wait % 16).to_string());
            let kind = [
                EventKind::RoomStarted, EventKind::RoomFinished, EventKind::Joined, EventKind::Left(reason),
                EventKind::Aborted(reason), EventKind::Track, EventKind::Other,
            ][usize::from(kind)];
            let seconds = world.seconds(world.now.before(joined_at_ms % 100_000));
            world.deliver(&super::world::Told {
                kind, digest: joined_at_ms, issued_at: world.seconds(world.now), id: String::new(), created_at: seconds, room: "room".into(),
                room_sid: ["", "RM_a", "RM_b"][usize::from(room_sid)].into(), identity: ["", "al", "bo"][usize::from(identity)].into(),
                sid: ["", "PA_a", "PA_b"][usize::from(sid)].into(), joined_at_ms,
            });
            world.advance(wait % 4_000);
        }
    }
}
