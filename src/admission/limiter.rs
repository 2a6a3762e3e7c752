//! The async side of [`FairQueue`]: waits for a place, and gives it back when it is dropped.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::fair_queue::{Asker, FairQueue, Places, Ticket};

/// Places for which callers wait in turn.
#[derive(Debug)]
pub struct FairLimiter(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    queue: FairQueue,
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
            queue: FairQueue::new(places),
            waiting: HashMap::new(),
        }))
    }

    /// A place, if one may be taken at once.
    pub fn try_acquire(&self, asker: Asker) -> Option<Permit<'_>> {
        self.0.lock().queue.try_acquire(&asker).then(|| Permit { limiter: self, asker })
    }

    /// Waits for a place. Whoever drops the future does not wait any more.
    pub async fn acquire(&self, asker: Asker) -> Permit<'_> {
        let (ticket, granted) = {
            let mut inner = self.0.lock();
            match inner.queue.acquire(&asker) {
                Ok(()) => return Permit { limiter: self, asker },
                Err(ticket) => {
                    let (grant, granted) = oneshot::channel();
                    inner.waiting.insert(ticket, grant);
                    (ticket, granted)
                }
            }
        };
        let waiting = Waiting {
            limiter: self,
            asker,
            ticket: Some(ticket),
        };
        // The sender is dropped by nobody but `Waiting`.
        let _ = granted.await;
        waiting.go_on()
    }
}

impl Inner {
    fn grant(&mut self) {
        while let Some(ticket) = self.queue.grant_next() {
            if let Some(grant) = self.waiting.remove(&ticket) {
                let _ = grant.send(());
            }
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut inner = self.limiter.0.lock();
        inner.queue.release(&self.asker);
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
        let mut inner = self.limiter.0.lock();
        if inner.waiting.remove(&ticket).is_some() {
            inner.queue.cancel(&self.asker, ticket);
        } else {
            // It had just been granted.
            inner.queue.release(&self.asker);
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
        assert!(limiter.0.lock().waiting.is_empty());
        let _place = limiter.acquire(asker(3)).await;
    }
}
