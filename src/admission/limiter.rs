//! The async side of [`Turns`]: waits for a place, and gives it back when it is dropped.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::turns::{Asker, Places, Ticket, Turns};

/// Places for which callers wait in turn.
#[derive(Debug)]
pub struct FairLimiter(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    turns: Turns,
    waiting: HashMap<Ticket, oneshot::Sender<()>>,
}

/// A place; dropping it gives it back.
#[derive(Debug)]
pub struct Permit<'a> {
    limiter: &'a FairLimiter,
    asker: Asker,
}

impl FairLimiter {
    /// Makes a limiter whose places are all free.
    #[must_use]
    pub fn new(places: Places) -> Self {
        Self(Mutex::new(Inner {
            turns: Turns::new(places),
            waiting: HashMap::new(),
        }))
    }

    /// A place, if one may be taken at once.
    pub fn try_acquire(&self, asker: Asker) -> Option<Permit<'_>> {
        self.lock().turns.take_at_once(&asker).then(|| Permit { limiter: self, asker })
    }

    /// Waits for a place. Whoever drops the future does not wait any more.
    pub async fn acquire(&self, asker: Asker) -> Permit<'_> {
        let (ticket, turn) = {
            let mut inner = self.lock();
            match inner.turns.ask(&asker) {
                Ok(()) => return Permit { limiter: self, asker },
                Err(ticket) => {
                    let (grant, turn) = oneshot::channel();
                    inner.waiting.insert(ticket, grant);
                    (ticket, turn)
                }
            }
        };
        let waiting = Waiting {
            limiter: self,
            asker,
            ticket: Some(ticket),
        };
        // The sender is dropped by nobody but `Waiting`.
        let _ = turn.await;
        waiting.go_on()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn grant(&mut self) {
        while let Some(ticket) = self.turns.grant_next() {
            if let Some(turn) = self.waiting.remove(&ticket) {
                let _ = turn.send(());
            }
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut inner = self.limiter.lock();
        inner.turns.give_back(&self.asker);
        inner.grant();
    }
}

struct Waiting<'a> {
    limiter: &'a FairLimiter,
    asker: Asker,
    /// Ticket of the waiting caller; `None` once the place is taken.
    ticket: Option<Ticket>,
}

impl<'a> Waiting<'a> {
    fn go_on(mut self) -> Permit<'a> {
        self.ticket = None;
        Permit {
            limiter: self.limiter,
            asker: self.asker,
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut inner = self.limiter.lock();
        if inner.waiting.remove(&ticket).is_some() {
            inner.turns.leave(&self.asker, ticket);
        } else {
            // It had just been granted.
            inner.turns.give_back(&self.asker);
            inner.grant();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::super::Class;
    use super::*;

    fn asker(name: u64) -> Asker {
        Asker {
            class: Class::Listed,
            group: name,
            domain: name,
            name,
            client: 0,
        }
    }

    fn limiter(total: u32) -> FairLimiter {
        FairLimiter::new(Places {
            total,
            shares: [total, 0, 0],
            per_name: [total; 3],
            group_part: 1,
        })
    }

    #[tokio::test]
    async fn a_place_that_is_given_back_goes_to_who_waits() {
        let limiter = limiter(1);
        let first = limiter.acquire(asker(1)).await;
        let (second, ()) = tokio::join!(limiter.acquire(asker(2)), async { drop(first) });
        assert!(timeout(Duration::from_millis(1), limiter.acquire(asker(3))).await.is_err());
        drop(second);
        let _third = limiter.acquire(asker(3)).await;
    }

    #[tokio::test]
    async fn whoever_gives_up_loses_no_place() {
        let limiter = limiter(1);
        for _ in 0..3 {
            let held = limiter.acquire(asker(1)).await;
            let mut waits = Box::pin(limiter.acquire(asker(2)));
            assert!(timeout(Duration::from_millis(1), &mut waits).await.is_err());
            // Granted, and dropped before it is polled again.
            drop(held);
            drop(waits);
        }
        assert!(limiter.lock().waiting.is_empty());
        let _place = limiter.acquire(asker(3)).await;
    }
}
