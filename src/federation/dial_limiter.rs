//! How often an address is dialled: the waiting for what `admission/dials.rs` decides.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::admission::Who;
use crate::admission::dials::{Decision, Dials, Target, Ticket};

/// A connection that is given up after so long counts as one that failed.
const HUNG_AFTER: Duration = Duration::from_secs(3);

/// Limits how often an address is dialled.
#[derive(Default)]
pub(super) struct DialLimiter {
    dials: Mutex<Dials>,
    freed: Notify,
}

/// The permission to dial an address once, and what became of it.
pub(super) struct DialPermit<'a> {
    limiter: &'a DialLimiter,
    target: Target,
    who: Who,
    since: Instant,
    settled: bool,
}

impl DialLimiter {
    /// Waits for the permit to dial `target` for `who`; `queued` is told when that takes time.
    pub(super) async fn acquire(&self, target: Target, who: Who, queued: &Notify) -> DialPermit<'_> {
        let mut waiting = Waiting {
            limiter: self,
            ticket: self.dials.lock().enter(Instant::now().into_std(), target, who),
            done: false,
        };
        loop {
            let freed = self.freed.notified();
            let decision = self.dials.lock().poll(Instant::now().into_std(), &waiting.ticket);
            match decision {
                Decision::Go => break,
                Decision::At(at) => {
                    queued.notify_one();
                    tokio::select! {
                        () = sleep_until(at.into()) => {}
                        () = freed => {}
                    }
                }
            }
        }
        waiting.done = true;
        DialPermit {
            limiter: self,
            target,
            who,
            since: Instant::now(),
            settled: false,
        }
    }
}

impl DialPermit<'_> {
    /// The connection stands, and is encrypted where it has to be.
    pub(super) fn succeeded(mut self) {
        self.settled = true;
        if self.limiter.dials.lock().succeeded(self.target, self.who) {
            self.limiter.freed.notify_waiters();
        }
    }

    /// Notes that the connection could not be made.
    pub(super) fn failed(mut self) {
        self.settle_failed();
    }

    fn settle_failed(&mut self) {
        self.settled = true;
        self.limiter.dials.lock().failed(Instant::now().into_std(), self.target, self.who);
    }
}

impl Drop for DialPermit<'_> {
    fn drop(&mut self) {
        if !self.settled && self.since.elapsed() >= HUNG_AFTER {
            self.settle_failed();
        }
    }
}

struct Waiting<'a> {
    limiter: &'a DialLimiter,
    ticket: Ticket,
    done: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.limiter.dials.lock().leave(&self.ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Class;
    use std::net::IpAddr;

    fn who(class: Class, name: u64) -> Who {
        Who { class, domain: name, name }
    }

    #[tokio::test(start_paused = true)]
    async fn four_a_second_after_a_burst_of_eight() {
        let (limiter, queued) = (DialLimiter::default(), Notify::new());
        let target = Target::from(IpAddr::from([192, 0, 2, 1]));
        let start = Instant::now();
        for n in 0..16 {
            drop(limiter.acquire(target, who(Class::Stranger, n), &queued).await);
        }
        assert!((2000..2100).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        drop(limiter.acquire(target, who(Class::Verified, 99), &queued).await);
        assert!(start.elapsed().as_millis() < 2100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_success_sets_everybody_free() {
        let (limiter, queued) = (DialLimiter::default(), Notify::new());
        let target = Target::from(IpAddr::from([192, 0, 2, 1]));
        let one = who(Class::Listed, 1);
        let permit = limiter.acquire(target, one, &queued).await;
        permit.failed();
        let probe = limiter.acquire(target, one, &queued).await;
        let start = Instant::now();
        let waiting = async {
            for _ in 0..50 {
                drop(limiter.acquire(target, one, &queued).await);
            }
        };
        tokio::join!(waiting, async { probe.succeeded() });
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
