//! Stories of a simulation, each of which is drawn from its seed: told by several threads, and judged together.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// A variable of the environment that is a number.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Tells the story of each seed, and sums up what they return. One that panics ended badly: `alone` says how to tell it again.
#[track_caller]
pub(crate) fn tell_all(seeds: &[u64], threads: u64, alone: impl Fn(u64) -> String + Sync, tell: impl Fn(u64) -> u64 + Sync) -> u64 {
    let (next, sum) = (AtomicUsize::new(0), AtomicU64::new(0));
    let tell_some = || {
        let mut failed = Vec::new();
        while let Some(&seed) = seeds.get(next.fetch_add(1, Relaxed)) {
            if let Ok(count) = catch_unwind(AssertUnwindSafe(|| tell(seed))) {
                sum.fetch_add(count, Relaxed);
            } else {
                eprintln!("  seed {seed}: {}", alone(seed));
                failed.push(seed);
            }
        }
        failed
    };
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(tell_some)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(
        failed.is_empty(),
        "{} of {} stories end badly: {failed:?}",
        failed.len(),
        seeds.len()
    );
    sum.into_inner()
}
