//! Random sequences of answers and webhooks. Whole random worlds are told by `simulation`.

use super::world::{Fate, World};
use lk_jwt_service::internals::core::Settings;
use lk_jwt_service::internals::livekit::DisconnectReason;
use lk_jwt_service::internals::presence::EventKind;
use proptest::prelude::*;

const DELAY: u64 = 18_000;

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

proptest! {
    #![proptest_config(cases(300))]

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
