//! Says the same thing seldom: what strangers can cause must not fill the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(60);

/// Lets one of many through, a minute apart, with how many there were since the last one.
pub struct Seldom(Mutex<(Option<Instant>, u64)>);

impl Seldom {
    /// The first one is let through.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new((None, 0)))
    }

    /// Calls `say` with the number of times since it was last called, unless that is less than a minute ago.
    pub fn tell(&self, say: impl FnOnce(u64)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 += 1;
        if state.0.is_none_or(|last| last.elapsed() >= PAUSE) {
            let count = std::mem::take(&mut state.1);
            state.0 = Some(Instant::now());
            drop(state);
            say(count);
        }
    }
}

impl Default for Seldom {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many() {
        let (seldom, mut told) = (Seldom::new(), Vec::new());
        for _ in 0..100 {
            seldom.tell(|count| told.push(count));
        }
        assert_eq!(told, [1]);
    }
}
