//! One call for all who want the same thing at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;
use tokio::time::Instant;

/// Calls under way, by what they are for.
pub struct Together<T>(Mutex<HashMap<Box<str>, Entry<T>>>);

struct Entry<T> {
    call: Arc<Call<T>>,
    /// How many share it.
    sharers: usize,
}

struct Call<T> {
    began: Instant,
    answer: OnceCell<T>,
}

impl<T: Clone> Together<T> {
    /// None under way.
    #[must_use]
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// The answer to the call that is under way for `key`, or to `call`; and when that began, at the latest. When the one who
    /// makes the call goes away, the next one makes it.
    pub async fn ask(&self, key: &str, call: impl Future<Output = T>) -> (T, Instant) {
        let shared = self.share(key);
        let answer = shared.call.answer.get_or_init(|| call).await.clone();
        (answer, shared.call.began)
    }

    fn share<'a>(&'a self, key: &'a str) -> Shared<'a, T> {
        let mut calls = self.lock();
        let entry = calls.entry(key.into()).or_insert_with(Entry::new);
        entry.sharers += 1;
        Shared {
            all: self,
            key,
            call: entry.call.clone(),
        }
    }
}

impl<T> Together<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Entry<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Default for Together<T> {
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

/// One of those who share a call. The last one to go, or the first one after the answer, clears the entry away; a
/// client that hangs up is dropped in the middle of it.
struct Shared<'a, T> {
    all: &'a Together<T>,
    key: &'a str,
    call: Arc<Call<T>>,
}

impl<T> Drop for Shared<'_, T> {
    fn drop(&mut self) {
        let mut calls = self.all.lock();
        // A later call for the same is none of ours.
        if let Some(entry) = calls.get_mut(self.key).filter(|entry| Arc::ptr_eq(&entry.call, &self.call)) {
            entry.sharers -= 1;
            if entry.sharers == 0 || self.call.answer.initialized() {
                calls.remove(self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;
    use std::time::Duration;

    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn those_who_come_meanwhile_share_the_answer_and_those_who_come_later_do_not() {
        let (together, calls) = (Together::new(), Cell::new(0));
        let call = async || {
            calls.set(calls.get() + 1);
            yield_now().await;
            calls.get()
        };
        let (one, two, other) = tokio::join!(together.ask("a", call()), together.ask("a", call()), together.ask("b", call()));
        assert_eq!((one.0, one.1), (two.0, two.1));
        assert_eq!((other.0, calls.get()), (2, 2));
        assert_eq!(together.ask("a", call()).await.0, 3);
        assert!(together.lock().is_empty());
    }

    #[tokio::test]
    async fn when_the_caller_goes_away_the_next_one_calls() {
        let together = Together::new();
        let waits = timeout(Duration::from_millis(1), together.ask("a", pending::<u8>()));
        let (gone, answer) = tokio::join!(waits, together.ask("a", async { 7 }));
        assert!(gone.is_err());
        assert_eq!(answer.0, 7);
        assert!(together.lock().is_empty());
    }
}
