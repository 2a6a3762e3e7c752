//! When what is due, of many things that each have one moment at most. Pure.

use std::collections::BTreeSet;

use crate::time::Time;

/// Moments by key. Each thing knows the moment that is set for it.
#[derive(Debug)]
pub(crate) struct Timers<K>(BTreeSet<(Time, K)>);

impl<K: Ord> Default for Timers<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Copy> Timers<K> {
    /// Sets the moment of a thing whose moment was `old`; a thing that goes has none.
    pub(crate) fn set(&mut self, old: &mut Option<Time>, new: Option<Time>, key: K) {
        if *old == new {
            return;
        }
        if let Some(at) = std::mem::replace(old, new) {
            self.0.remove(&(at, key));
        }
        self.0.extend(new.map(|at| (at, key)));
    }

    /// The first moment.
    pub(crate) fn first(&self) -> Option<Time> {
        self.0.first().map(|&(at, _)| at)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes out the first that is due by `now`. The thing has no moment from then on.
    pub(crate) fn next_due(&mut self, now: Time) -> Option<K> {
        let is_due = self.first().is_some_and(|at| at <= now);
        is_due.then(|| self.0.pop_first()).flatten().map(|(_, key)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_has_one_moment_and_comes_when_that_is_due() {
        let mut timers = Timers::default();
        let mut set = [None; 3];
        for round in 0..100_u64 {
            let key = usize::try_from(round % 3).unwrap();
            timers.set(&mut set[key], Some(Time::START.after(200 - round)), key);
        }
        timers.set(&mut set[1], None, 1);
        assert_eq!((timers.first(), timers.next_due(Time::START)), (set[0], None));
        let due: Vec<_> = std::iter::from_fn(|| timers.next_due(Time::LATEST)).collect();
        assert_eq!((due, timers.first()), (vec![0, 2], None));
    }
}
