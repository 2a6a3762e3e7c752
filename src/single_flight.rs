//! Shares a call among all who want the same thing at the same time.
#![expect(clippy::disallowed_methods, reason = "tells whoever waits when the shared call began")]

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

/// Calls under way, by what they are for.
pub struct SingleFlight<K, T>(Mutex<HashMap<K, Entry<T>>>);

struct Entry<T> {
    call: Arc<Call<T>>,
    /// Number of callers who share the call.
    sharers: usize,
}

struct Call<T> {
    began: Instant,
    answer: OnceCell<T>,
}

impl<K: Clone + Eq + Hash, T: Clone> SingleFlight<K, T> {
    /// Makes a table with no call under way.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// The answer to the call that is under way for `key`, or to `call`; and when that began, at the latest. When the one who
    /// makes the call goes away, the next one makes it. Pinned: moving `call` to where it runs would keep it in memory several times.
    pub async fn run(&self, key: K, call: impl Future<Output = T> + Unpin) -> (T, Instant) {
        let shared = self.share(key);
        let answer = shared.call.answer.get_or_init(|| call).await.clone();
        (answer, shared.call.began)
    }

    /// Runs or joins the call until `deadline`, which `call` keeps by itself: whoever made another call may have longer.
    pub async fn run_until(&self, key: K, deadline: Instant, call: impl Future<Output = T> + Unpin) -> Option<T> {
        let shared = self.share(key);
        let answer = shared.call.answer.get_or_init(|| call);
        if shared.is_first {
            Some(answer.await.clone())
        } else {
            timeout_at(deadline, answer).await.ok().cloned()
        }
    }

    /// Since when somebody makes the call for `key`, if anybody does.
    pub fn began(&self, key: &K) -> Option<Instant> {
        self.0.lock().get(key).map(|entry| entry.call.began)
    }

    fn share(&self, key: K) -> Shared<'_, K, T> {
        let mut calls = self.0.lock();
        let entry = calls.entry(key.clone()).or_insert_with(Entry::new);
        entry.sharers += 1;
        Shared {
            all: self,
            key,
            call: entry.call.clone(),
            is_first: entry.sharers == 1,
        }
    }
}

impl<K, T> SingleFlight<K, T> {}

impl<K: Clone + Eq + Hash, T: Clone> Default for SingleFlight<K, T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Entry<T> {
    fn new() -> Self {
        let call = Call {
            began: Instant::now(),
            answer: OnceCell::new(),
        };
        Self {
            call: Arc::new(call),
            sharers: 0,
        }
    }
}

/// A caller's part of a shared call. The last one to go, or the first one after the answer, clears the entry away; a client that
/// hangs up is dropped in the middle of it.
struct Shared<'a, K: Eq + Hash, T> {
    all: &'a SingleFlight<K, T>,
    key: K,
    call: Arc<Call<T>>,
    /// Whether this caller shared the call with nobody when it came.
    is_first: bool,
}

impl<K: Eq + Hash, T> Drop for Shared<'_, K, T> {
    fn drop(&mut self) {
        let mut calls = self.all.0.lock();
        // A later call for the same is none of ours.
        if let Some(entry) = calls.get_mut(&self.key).filter(|entry| Arc::ptr_eq(&entry.call, &self.call)) {
            entry.sharers -= 1;
            if entry.sharers == 0 || self.call.answer.initialized() {
                calls.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{pending, ready};
    use std::time::Duration;

    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn those_who_come_meanwhile_share_the_answer_and_those_who_come_later_do_not() {
        let (flights, calls) = (SingleFlight::new(), Cell::new(0));
        let call = || {
            Box::pin(async {
                calls.set(calls.get() + 1);
                yield_now().await;
                calls.get()
            })
        };
        let (one, two, other) = tokio::join!(flights.run("a", call()), flights.run("a", call()), flights.run("b", call()));
        assert_eq!((one.0, one.1), (two.0, two.1));
        assert_eq!((other.0, calls.get()), (2, 2));
        assert_eq!(flights.run("a", call()).await.0, 3);
        assert!(flights.0.lock().is_empty());
    }

    #[tokio::test]
    async fn when_the_caller_goes_away_the_next_one_calls() {
        let flights = SingleFlight::new();
        let waits = timeout(Duration::from_millis(1), flights.run("a", pending::<u8>()));
        let (gone, answer) = tokio::join!(waits, flights.run("a", ready(7)));
        assert!(gone.is_err());
        assert_eq!(answer.0, 7);
        assert!(flights.0.lock().is_empty());
    }
}
