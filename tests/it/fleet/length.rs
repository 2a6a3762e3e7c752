//! How long the scenes are: a few rounds of each in the run of all tests, and what the table of scenes asks for in `./tests/fleet`.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::stage::Stage;

/// The most rounds of each scene, where they are at their full length.
fn most_rounds() -> Option<usize> {
    std::env::var("LK_FLEET_ROUNDS").ok()?.parse().ok()
}

/// Whether the scenes are at their full length, and have the machine for themselves.
pub(super) fn is_full() -> bool {
    most_rounds().is_some()
}

/// So many rounds.
pub(super) fn rounds(few: usize, all: usize) -> usize {
    most_rounds().map_or(few, |most| all.min(most))
}

/// So many people.
pub(super) fn people(few: usize, all: usize) -> usize {
    if is_full() { all } else { few }
}

/// Plays the rounds of a scene, at full length on so many stages at a time.
pub(super) fn on_stages(stages: usize, rounds: usize, scene: impl Fn(&mut Stage, usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..if is_full() { stages.min(rounds) } else { 1 } {
            scope.spawn(|| {
                let Some(mut stage) = Stage::start(3) else { return };
                loop {
                    let round = next.fetch_add(1, Ordering::Relaxed);
                    if round >= rounds {
                        break;
                    }
                    scene(&mut stage, round);
                }
            });
        }
    });
}
