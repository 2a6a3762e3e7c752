//! Bounds look-ups of strangers' names (decision H7a): so many at a time, each of which takes sockets. A domain may hold as many
//! places as are still free, and domains whose look-ups hung lately leave a quarter to the others, so that a newcomer finds a place
//! whoever has names that hang.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a look-up that hung counts, and how many domains are remembered for it.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
const MAX_HUNG: usize = 1024;

/// Places, and those who wait for one; `W` wakes one of them.
#[derive(Debug)]
pub struct Lookups<W> {
    places: usize,
    free: usize,
    held: HashMap<u64, usize>,
    waiting: Vec<(u64, u64, W)>,
    hung: HashMap<u64, Instant>,
    last: u64,
}

impl<W> Lookups<W> {
    /// Makes a bound with so many places, all free.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self {
            places,
            free: places,
            held: HashMap::new(),
            waiting: Vec::new(),
            hung: HashMap::new(),
            last: 0,
        }
    }

    /// Takes a place for `domain`, if it may have one now.
    #[must_use]
    pub fn take(&mut self, now: Instant, domain: u64) -> bool {
        let may = self.may(now, domain);
        if may {
            self.free -= 1;
            *self.held.entry(domain).or_default() += 1;
        }
        may
    }

    /// Puts `waker` into the queue.
    pub fn wait(&mut self, domain: u64, waker: W) {
        self.last += 1;
        self.waiting.push((domain, self.last, waker));
    }

    /// Gives a place back.
    pub fn release(&mut self, now: Instant, domain: u64, hung: bool) {
        self.free += 1;
        if let Some(held) = self.held.get_mut(&domain) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&domain);
            }
        }
        if hung {
            if self.hung.len() >= MAX_HUNG {
                self.hung.retain(|_, at| now < *at + REMEMBERED_FOR);
            }
            if self.hung.len() >= MAX_HUNG {
                self.hung.clear();
            }
            self.hung.insert(domain, now);
        }
    }

    /// The next one who gets a place, which is taken for it already: whose domain did not hang, and has the fewest.
    pub fn next(&mut self, now: Instant) -> Option<(u64, W)> {
        let (at, _) = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, (domain, ..))| self.may(now, *domain))
            .min_by_key(|(_, (domain, number, _))| (self.has_hung(now, *domain), self.held_by(*domain), Reverse(*number)))?;
        let (domain, _, waker) = self.waiting.swap_remove(at);
        self.take(now, domain).then_some((domain, waker))
    }

    /// Drops from the queue whoever does not wait any more.
    pub fn retain(&mut self, mut waits: impl FnMut(&W) -> bool) {
        self.waiting.retain(|(.., waker)| waits(waker));
    }

    fn may(&self, now: Instant, domain: u64) -> bool {
        let kept = if self.has_hung(now, domain) { self.places / 4 } else { 0 };
        self.held_by(domain) + kept < self.free
    }

    fn held_by(&self, domain: u64) -> usize {
        self.held.get(&domain).copied().unwrap_or_default()
    }

    fn has_hung(&self, now: Instant, domain: u64) -> bool {
        self.hung.get(&domain).is_some_and(|at| now < *at + REMEMBERED_FOR)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a moment to count from")]
mod tests {
    use super::*;

    #[test]
    fn one_domain_leaves_half() {
        let (mut lookups, now) = (Lookups::<()>::new(96), Instant::now());
        assert_eq!((0..1000).filter(|_| lookups.take(now, 1)).count(), 48);
        assert_eq!((0..1000).filter(|_| lookups.take(now, 2)).count(), 24);
    }

    #[test]
    fn domains_that_hang_leave_a_quarter() {
        let (mut lookups, now) = (Lookups::<u64>::new(96), Instant::now());
        for domain in 0..200 {
            assert!(lookups.take(now, domain));
            lookups.release(now, domain, true);
        }
        let taken = (0..2000).filter(|n| lookups.take(now, n % 200)).count();
        assert_eq!(taken, 72);
        assert!(lookups.take(now, 999), "a newcomer");
        lookups.release(now, 999, false);
        lookups.wait(100, 100);
        assert!(lookups.next(now).is_none());
        lookups.release(now, 7, true);
        assert_eq!(lookups.next(now), Some((100, 100)));
    }

    #[test]
    fn who_has_the_fewest_is_next() {
        let (mut lookups, now) = (Lookups::new(3), Instant::now());
        assert!(lookups.take(now, 1) && lookups.take(now, 2) && lookups.take(now, 3));
        for domain in [4, 1, 4, 1] {
            lookups.wait(domain, domain);
        }
        lookups.release(now, 2, false);
        assert_eq!(lookups.next(now), Some((4, 4)));
        assert_eq!(lookups.next(now), None);
        lookups.retain(|domain| *domain != 4);
        lookups.release(now, 3, false);
        lookups.release(now, 4, false);
        assert_eq!(lookups.next(now), Some((1, 1)));
    }
}
