//! When what is due, of many things that each have one moment at most. Pure.
//!
//! A moment that was set anew stays in the queue, and is found out of date when its time comes: whoever owns the things knows the
//! moment that is set. The queue is rebuilt before such moments are more than a quarter of those that are set. (A tree without them took
//! more CPU and, in small pieces between those of the requests, more memory: measured.)

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::time::Time;

/// Moments by key.
#[derive(Debug)]
pub(crate) struct Timers<K>(BinaryHeap<Reverse<(Time, K)>>);

impl<K: Ord> Default for Timers<K> {
    fn default() -> Self {
        Self(BinaryHeap::new())
    }
}

impl<K: Ord + Copy> Timers<K> {
    /// Sets the moment of a thing whose moment was `old`.
    pub(crate) fn set(&mut self, old: &mut Option<Time>, new: Option<Time>, key: K) {
        if std::mem::replace(old, new) != new
            && let Some(at) = new
        {
            self.0.push(Reverse((at, key)));
        }
    }

    /// The first moment that is still set, of at most so many things.
    pub(crate) fn first(&mut self, things: usize, set: impl Fn(K) -> Option<Time>) -> Option<(Time, K)> {
        let is_set = |&Reverse((at, key)): &Reverse<(Time, K)>| set(key) == Some(at);
        while self.0.peek().is_some_and(|first| !is_set(first)) {
            self.0.pop();
        }
        if self.0.capacity() > 4 * self.0.len() + 1_024 {
            self.0.shrink_to(2 * self.0.len());
        }
        if self.0.len() > things + things / 4 + 64 {
            let mut moments = std::mem::take(&mut self.0).into_vec();
            moments.retain(is_set);
            moments.sort_unstable();
            moments.dedup();
            moments.shrink_to(moments.len() * 2);
            self.0 = moments.into();
        }
        self.0.peek().map(|&Reverse(first)| first)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes the first moment out.
    pub(crate) fn pop(&mut self) {
        self.0.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_that_were_set_anew_are_passed_over_and_do_not_pile_up() {
        let mut timers = Timers::default();
        let mut set = [None; 3];
        for round in 0..10_000_u64 {
            let key = usize::try_from(round % 3).unwrap();
            let mut moment = set[key];
            timers.set(&mut moment, Some(Time::START.after(20_000 - round)), key);
            set[key] = moment;
            timers.first(3, |key| set[key]);
            assert!(timers.len() <= 70, "{}", timers.len());
        }
        for key in 3..10_000 {
            timers.set(&mut None, Some(Time::START), key);
        }
        timers.first(3, |key| set.get(key).copied().flatten());
        assert!(timers.0.capacity() <= 1_300, "{}", timers.0.capacity());
        let mut order = Vec::new();
        while let Some((_, key)) = timers.first(3, |key| set[key]) {
            timers.pop();
            set[key] = None;
            order.push(key);
        }
        assert_eq!(order, [0, 2, 1]);
    }
}
